"""The command line: parse, call, print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from bnp_analysis.cli.checkout import IN_CHECKOUT, run_in_checkout
from bnp_analysis.cli.condition import add_condition_command
from bnp_analysis.cli.problem import checked_problem, problem_options
from bnp_analysis.cli.processes import require_one_process
from bnp_analysis.cli.spectrum import add_spectrum_command
from bnp_analysis.errors import BNPAnalysisError
from bnp_analysis.theory.command import add_check_command
from bnp_analysis.training.command import add_train_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 done, 1 a check fails, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words and words[0] in IN_CHECKOUT:
            require_one_process(words[0])
            return run_in_checkout(words[0], words[1:])
        arguments = _parser().parse_args(words)
        require_one_process(words[0], arguments)
        return int(arguments.run(arguments))
    except (BNPAnalysisError, ImportError, FileNotFoundError) as error:
        print(f"bnp-analysis: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bnp-analysis: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bnp-analysis",
        description="Condition numbers of neural-network losses, with evidence, with and without BNP.",
        epilog="Exit status: 0 done, 1 a check fails, 2 bad input, 130 interrupted.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_condition_command(commands)
    add_spectrum_command(commands)
    add_train_command(commands)
    add_check_command(commands, problem_options, checked_problem)
    for name, (_, words) in IN_CHECKOUT.items():
        commands.add_parser(name, help=f"{words} (in a checkout, found upward from here, or --root FOLDER)")
    return parser
