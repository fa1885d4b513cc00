"""`bnp-analysis check`: parse, call, print."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator

from bnp_analysis.cli.options import PRECONDITIONERS, problem_options, risk_of, write
from bnp_analysis.theory.check import Check, CheckTable, Source, named
from bnp_analysis.theory.statements import check_theory
from bnp_analysis.theory.statements.rates import rates_of

# A network whose dense reference matrices take seconds.
SMALL = {"samples": 300, "hidden": [12, 8]}


def check(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> check(parser)
        >>> parser.parse_args(["--only", "T7", "T11"]).only
        ['T7', 'T11']
    """
    parser.epilog = (
        "Exit status: 0 every applicable check holds, 1 a check fails, 2 bad input or no statement applies, "
        "130 interrupted (finished checks are kept)."
    )
    problem_options(parser)
    add = parser.add_argument
    names = "check only these statements, by the paper's names or T-numbers (quoted, or without spaces: prop10): "
    add("--only", nargs="+", metavar="NAME", help=names + ", ".join(Source))
    add("--time-limit", type=float, metavar="SECONDS", help="start no further statement after this time")
    add(
        "--rates",
        type=float,
        metavar="SECONDS",
        help="also measure convergence rates on this network, for this time each",
    )
    add("--verbose", action="store_true", help="print hypotheses and details of every check")
    parser.set_defaults(run=_check, **SMALL)


def _check(arguments: argparse.Namespace) -> int:
    """Run the command; the exit status is the verdict."""
    if arguments.only is not None:
        named(arguments.only)
    risk, name = risk_of(arguments), arguments.preconditioner
    preconditioner = None if name == "bnp" else PRECONDITIONERS[name](risk)  # that of BNP is check_theory's own

    def line(check: Check) -> None:
        print(check, flush=True)
        if arguments.verbose:
            words = {**{f"({name})": kept for name, kept in check.hypotheses.items()}, **check.details}
            print("".join(f"      {name}: {_short(value)}\n" for name, value in words.items()), end="")

    table = check_theory(
        risk,
        preconditioner=preconditioner,
        only=arguments.only,
        seed=arguments.seed,
        dtype=None,
        progress=not arguments.quiet and sys.stderr.isatty(),
        report=line,
        time_limit=arguments.time_limit,
    )
    if arguments.rates is not None and table.stop == "done":
        rates = rates_of(risk, preconditioner, seed=arguments.seed, time_limit=arguments.rates)
        table = _with(table, rates, line)
    print(f"{table.summary()}; {table.seconds:.1f} s")
    write(table, arguments.json)
    return exit_status(table)


def _with(table: CheckTable, checks: Iterator[Check], report: Callable[[Check], None]) -> CheckTable:
    """The table with more checks appended; Ctrl-C keeps the finished ones."""
    began, found, stop = time.perf_counter(), list(table.checks), table.stop
    try:
        for check in checks:
            found.append(check)
            report(check)
    except KeyboardInterrupt:
        stop = "interrupted in the rates"
    seconds = table.seconds + time.perf_counter() - began
    return dataclasses.replace(table, checks=tuple(found), stop=stop, seconds=seconds)


def exit_status(table: CheckTable) -> int:
    """0 where every applicable check holds, 1 where one fails, 2 where none applies, 130 where it was interrupted."""
    if table.failed:
        return 1
    if table.stop.startswith("interrupted"):
        return 130
    return 0 if table.holds else 2


def _short(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
