"""Do the wheel and the source distribution hold what they promise? `make dist-check` runs this on `dist/`.

From the wheel, in an empty folder and without the checkout: the demo, `--help` of every command, one figure, two of the
notebooks. In the unpacked source distribution: the tests of what is packed. Both use the dependencies of the Python
that runs this.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

COMMANDS = ("condition", "spectrum", "train", "check", "figures", "bench")
FIGURE = "fig06_largest_singular_value"
NOTEBOOKS = ("01_first_condition_number.py", "07_from_the_paper_to_your_network.py")
TESTS = ("packaging", "architecture", "recipes", "paper_map", "figures", "collection", "cli")


def run(folder: Path, paths: Path, *program: str) -> None:
    """Run a program in a folder, with our packages from `paths` alone."""
    print("$", *program, flush=True)
    environment = os.environ | {"PYTHONPATH": str(paths), "MPLBACKEND": "Agg"}
    subprocess.run([sys.executable, *program], cwd=folder, env=environment, check=True)


def check_wheel(wheel: Path, work: Path) -> None:
    """The commands of an installed package, from a folder that is no checkout."""
    installed, folder = work / "installed", work / "empty"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert not (installed / "paper_figures" / "full").exists(), "committed figures are no part of an installation"
    for command in COMMANDS:
        run(folder, installed, "-m", "bnp_analysis", command, "--help")
    run(folder, installed, "-m", "bnp_analysis", "condition", "--samples", "60", "--hidden", "6", "--json", "c.json")
    run(folder, installed, "-m", "bnp_analysis", "figures", FIGURE)
    assert (folder / "paper_figures" / "quick" / f"{FIGURE}.png").exists()
    for name in NOTEBOOKS:
        copy = folder / name
        copy.write_bytes((Path(__file__).resolve().parent.parent / "notebooks" / name).read_bytes())
        run(folder, installed, name)


def check_sdist(sdist: Path, work: Path) -> None:
    """The tests of the unpacked source distribution."""
    with tarfile.open(sdist) as archive:
        archive.extractall(work, filter="data")
    root = work / sdist.name.removesuffix(".tar.gz")
    assert not (root / "benchmarks").exists(), "a part of benchmarks/ would pass for a checkout"
    run(root, root, "-m", "pytest", "-p", "no:cacheprovider", *(f"tests/test_{name}.py" for name in TESTS))


def main(folder: Path) -> None:
    """Check the one wheel and the one source distribution of a folder."""
    with tempfile.TemporaryDirectory() as name:
        check_wheel(next(folder.glob("*.whl")).resolve(), Path(name) / "wheel")
        (Path(name) / "sdist").mkdir()
        check_sdist(next(folder.glob("*.tar.gz")).resolve(), Path(name) / "sdist")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
