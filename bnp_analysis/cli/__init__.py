"""The command line: parse, call, print. The module of a command is loaded only when the command is run."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence

from bnp_analysis.cli.checkout import run_in_checkout
from bnp_analysis.errors import BNPAnalysisError, InvalidInputError

#: Every command: its module in this folder, and its description. A module has a function of the command's name, which
#: adds the options and the default `run` to a parser; `checkout` runs commands without a module.
COMMANDS = {
    "condition": (
        "measure",
        "condition numbers of each layer and of the network, without and with a preconditioner",
    ),
    "spectrum": ("measure", "largest eigenvalues and spectral density, without and with a preconditioner"),
    "train": (
        "train",
        "train a network, with any normalization, preconditioner and optimizer; runs can be resumed bit for bit",
    ),
    "check": ("check", "check every statement of the convergence theory on a network"),
    "figures": ("", "make the figures of the theory and of the paper's experiments"),
    "bench": (
        "",
        "run benchmarks by name (default: products, krylov, truth --quick); --list prints the names "
        "(in a checkout: the current folder or a parent of it, or --root FOLDER)",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 a check fails, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    return answered(lambda: _run(words))


def answered(program: Callable[[], int | None], name: str = "bnp-analysis") -> int:
    """Run a program; an error of the package becomes one sentence and status 2, an interrupt status 130.

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
        return run_in_checkout(command, words[1:])
    from bnp_analysis.cli.options import require_arguments  # needs torch; the overview does not

    require_arguments(arguments)
    return int(arguments.run(arguments))


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Appends default values to help texts; without a default value the help text itself says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def parser_of(command: str) -> argparse.ArgumentParser:
    """The parser of the arguments of a command that needs no checkout.

    Example:
        >>> parser_of("train").parse_args(["--batch-size", "1"]).batch_size
        1
    """
    module, words = COMMANDS[command]
    parser = argparse.ArgumentParser(
        prog=f"bnp-analysis {command}",
        description=words,
        formatter_class=_Formatter,
    )
    getattr(importlib.import_module(f"bnp_analysis.cli.{module}"), command)(parser)
    return parser


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnp-analysis",
        description="Condition numbers of neural-network losses with certified bounds, with and without BNP.",
        epilog="Exit status: 0 done, 1 a check fails, 2 bad input, 130 interrupted.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (_, words) in COMMANDS.items():
        commands.add_parser(name, help=words)
    return parser


def _require_one_process(command: str) -> None:
    """Refuse several processes for a command that would do all work in each of them."""
    # Commands need torch; the overview does not.
    from bnp_analysis.distributed import launched

    if launched() > 1:
        raise InvalidInputError(
            f"{launched()} processes were launched, but {command} does not share its work among them: each would do "
            f"all of it and write the same files. Start it without torchrun; condition and spectrum run in several"
        )
