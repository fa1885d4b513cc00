"""`bnp-analysis figures` and `bench`: programs that only a checkout has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bnp_analysis.errors import InvalidInputError

#: Commands that run files of a checkout: name -> (its folder, what it does).
IN_CHECKOUT = {
    "figures": ("paper_figures", "make the figures of the theory"),
    "bench": ("benchmarks", "run a benchmark: truth_suite, bnp_step, peers, ..."),
}


def run_in_checkout(command: str, words: list[str]) -> int:
    """Run `python -m paper_figures ...` or `python benchmarks/NAME.py ...` from the root of a checkout."""
    here = Path.cwd()
    if "--root" in words:
        place = words.index("--root")
        here = Path(*words[place + 1 : place + 2])
        del words[place : place + 2]
    folder = IN_CHECKOUT[command][0]
    root = next((path for path in (here, *here.absolute().parents) if (path / folder / "README.md").exists()), None)
    if root is None:
        raise InvalidInputError(
            f"{command} needs a checkout, and {here} is in none: clone the repository (an installed package has no "
            f"{folder}/) and run this inside it, or give --root FOLDER"
        )
    # The checkout's own package, also where another version is installed.
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def run(*program: str) -> int:
        return subprocess.run([sys.executable, *program, *words], cwd=root, env=environment, check=False).returncode

    if command == "figures":
        return run("-m", folder)
    scripts = sorted(
        path.stem for path in (root / folder).glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
    )
    if not words or words[0] not in scripts:
        raise InvalidInputError(f"bench needs the name of a benchmark: {', '.join(scripts)}")
    return run(str(root / folder / f"{words.pop(0)}.py"))
