"""Commands that `torchrun` may start several times: every process takes its shard, the first one prints and writes."""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from contextlib import redirect_stdout

from bnp_analysis.distributed import ALONE, initialize, launched
from bnp_analysis.errors import InvalidInputError

Run = Callable[[argparse.Namespace], int]


def process_options(parser: argparse.ArgumentParser) -> None:
    """Options of commands that run in several processes."""
    parser.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="under torchrun: how late a process may be before the others end with an error",
    )
    parser.set_defaults(group=ALONE)


def in_processes(run: Run) -> Run:
    """Let a command run in all processes that were launched; `arguments.group` says which this is."""

    @functools.wraps(run)
    def over_all(arguments: argparse.Namespace) -> int:
        with initialize(timeout=arguments.timeout) as group:
            arguments.group = group
            if group.rank == 0:
                return run(arguments)
            arguments.json = arguments.figure = None
            arguments.quiet = True
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                return run(arguments)

    return over_all


def require_one_process(command: str, arguments: argparse.Namespace | None = None) -> None:
    """Refuse several processes for a command that would do everything in each of them.

    Raises:
        InvalidInputError: says how to start it.
    """
    if launched() > 1 and not hasattr(arguments, "group"):
        raise InvalidInputError(
            f"{launched()} processes were launched, but {command} does not share its work among them: each would do "
            f"all of it and write the same files. Start it without torchrun; condition and spectrum run in several"
        )
