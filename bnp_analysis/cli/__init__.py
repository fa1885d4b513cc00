"""The command line: parse, call, print. A command's module is loaded when the command is given."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path

from bnp_analysis.errors import BNPAnalysisError, InvalidInputError

#: Every command: its module in this folder, and what it does. A module has a function of the command's name, which adds
#: the options and the default `run` to a parser; those without a module run programs that only a checkout has.
COMMANDS = {
    "condition": (
        "measure",
        "condition numbers of each layer and of the network, without and with a preconditioner",
    ),
    "spectrum": ("measure", "largest eigenvalues and spectral density, without and with a preconditioner"),
    "train": (
        "train",
        "train a network, with any normalization, preconditioner and optimizer; stop and resume bit for bit",
    ),
    "check": ("check", "try every statement of the convergence theory on a network"),
    "figures": ("", "make the figures of the theory and of the paper's experiments"),
    "bench": (
        "",
        "run benchmarks by name, or products, krylov and truth --quick; --list names them "
        "(in a checkout, found upward from here, or --root FOLDER)",
    ),
}

#: Commands that run files of a checkout, and the folder of each.
FOLDERS = {"figures": "paper_figures", "bench": "benchmarks"}
#: What `bench` runs without names, and the flags that it adds; `truth` is short for `truth_suite`.
BY_DEFAULT = {"products": [], "krylov": [], "truth_suite": ["--quick"]}
ALIASES = {"truth": "truth_suite"}
_HELP = {
    "figures": "usage: bnp-analysis figures [NAME ...] [--preset quick|full] [--force] [--out FOLDER] [--root FOLDER]",
    "bench": "usage: bnp-analysis bench [NAME ... | --list] [--quick] [--gpu] [--root FOLDER]\n\n"
    "Benchmarks are in a checkout only: run this inside one, or give its folder by --root.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 a check fails, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    return answered(lambda: _run(words))


def answered(program: Callable[[], int | None], name: str = "bnp-analysis") -> int:
    """Run a program; what it refuses becomes one sentence and the status 2, an interrupt the status 130.

    Example:
        >>> answered(lambda: None)
        0
    """
    try:
        return program() or 0
    except (BNPAnalysisError, ImportError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def _run(words: list[str]) -> int:
    command = words[0] if words else ""
    if command not in COMMANDS:
        _overview().parse_args(words)
    arguments = parser_of(command).parse_args(words[1:]) if COMMANDS[command][0] else None
    if not hasattr(arguments, "group"):
        _require_one_process(command)
    if arguments is None:
        return _run_in_checkout(command, words[1:])
    from bnp_analysis.cli.options import require_arguments  # needs torch, an overview does not

    require_arguments(arguments)
    return int(arguments.run(arguments))


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of the words behind a command that is not one of a checkout's.

    Example:
        >>> parser_of("train").parse_args(["--batch-size", "1"]).batch_size
        1
    """
    module, words = COMMANDS[command]
    parser = argparse.ArgumentParser(
        prog=f"bnp-analysis {command}",
        description=words,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    getattr(importlib.import_module(f"bnp_analysis.cli.{module}"), command)(parser)
    return parser


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnp-analysis",
        description="Condition numbers of neural-network losses, with evidence, with and without BNP.",
        epilog="Exit status: 0 done, 1 a check fails, 2 bad input, 130 interrupted.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (_, words) in COMMANDS.items():
        commands.add_parser(name, help=words)
    return parser


def _require_one_process(command: str) -> None:
    """Refuse several processes for a command that would do everything in each of them."""
    # Commands need torch, an overview of them does not.
    from bnp_analysis.distributed import launched

    if launched() > 1:
        raise InvalidInputError(
            f"{launched()} processes were launched, but {command} does not share its work among them: each would do "
            f"all of it and write the same files. Start it without torchrun; condition and spectrum run in several"
        )


def _run_in_checkout(command: str, words: list[str]) -> int:
    """Run `python -m paper_figures ...`, or `python benchmarks/NAME.py ...` for each name, from a checkout's root.

    Outside of a checkout figures are made by the installed `paper_figures`, into the current folder.
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
    """Run the scripts named first, each with the words that follow; the worst of their exit statuses."""
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
