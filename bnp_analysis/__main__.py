"""`python -m bnp_analysis`, the same as `bnp-analysis`."""

import sys

from bnp_analysis.cli import main

if __name__ == "__main__":
    sys.exit(main())
