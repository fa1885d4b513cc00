"""`bnp-analysis figures` and `bench`: run scripts of a checkout; figures also run from an installed package."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path

from bnp_analysis.errors import InvalidInputError

#: Commands that run files of a checkout, and the folder of each.
FOLDERS = {"figures": "paper_figures", "bench": "benchmarks"}
#: Benchmarks that `bench` runs by default, with the flags that it adds; `truth` is short for `truth_suite`.
BY_DEFAULT = {"products": [], "krylov": [], "truth_suite": ["--quick"]}
ALIASES = {"truth": "truth_suite"}
_HELP = {
    "figures": "usage: bnp-analysis figures [NAME ...] [--preset quick|full] [--force] [--out FOLDER] [--root FOLDER]",
    "bench": "usage: bnp-analysis bench [NAME ... | --list] [--quick] [--gpu] [--root FOLDER]\n\n"
    "Benchmarks need a checkout: run this inside one, or give its folder by --root.",
}


def run_in_checkout(command: str, words: list[str]) -> int:
    """Run `python -m paper_figures ...`, or `python benchmarks/NAME.py ...` for each name, from a checkout's root.

    Outside of a checkout the installed `paper_figures` makes figures, in the current folder.
    """
    here = Path.cwd()
    if "--root" in words:
        place = words.index("--root")
        here = Path(*words[place + 1 : place + 2])
        del words[place : place + 2]
    folder = FOLDERS[command]
    root = next((path for path in (here, *here.absolute().parents) if (path / folder / "README.md").exists()), None)
    if root is None and command == "figures" and importlib.util.find_spec(folder) is not None:
        return subprocess.run([sys.executable, "-m", folder, *words], check=False).returncode
    if root is None and {"--help", "-h"} & set(words):
        print(_HELP[command])
        return 0
    if root is None:
        raise InvalidInputError(
            f"{command} needs a checkout, and {here} is in none: clone the repository (this installation has no "
            f"{folder}/) and run this inside it, or give --root FOLDER"
        )
    # The checkout's own package, also where another version is installed.
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}

    def run(*program: str) -> int:
        return subprocess.run([sys.executable, *program], cwd=root, env=environment, check=False).returncode

    if command == "figures":
        return run("-m", folder, *words)
    return _bench(root / folder, words, run)


def _bench(folder: Path, words: list[str], run: Callable[..., int]) -> int:
    """Run the scripts named first, each with the remaining arguments; return the largest exit status."""
    scripts = {path.stem: path.read_text() for path in sorted(folder.glob("*.py"))}
    scripts = {name: text for name, text in scripts.items() if 'if __name__ == "__main__"' in text}
    if words == ["--list"]:
        for name, text in scripts.items():
            print(f"{name:<20} {(ast.get_docstring(ast.parse(text)) or '').partition(chr(10))[0]}")
        return 0
    given = [ALIASES.get(word, word) for word in takewhile(lambda word: not word.startswith("-"), words)]
    options = words[len(given) :]
    unknown = [name for name in given if name not in scripts]
    if unknown:
        raise InvalidInputError(f"no benchmark is called {', '.join(unknown)}; there are: {', '.join(scripts)}")
    jobs = dict.fromkeys(given, options) or {
        name: [*(flag for flag in flags if flag not in options), *options]
        for name, flags in BY_DEFAULT.items()
        if "--gpu" not in options or '"--gpu"' in scripts.get(name, "")
    }
    status = 0
    for name, own in jobs.items():
        if len(jobs) > 1:
            print(f"== {' '.join([name, *own])}", flush=True)
        status = max(status, abs(run(str(folder / f"{name}.py"), *own)))  # a signal's is negative
    return status
