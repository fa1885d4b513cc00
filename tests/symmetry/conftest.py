"""The dense references of `tests/curvature` serve here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "curvature"))
