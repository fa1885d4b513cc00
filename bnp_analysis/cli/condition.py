"""`bnp-analysis condition`: parse, call, print."""

from __future__ import annotations

import argparse
import textwrap

from bnp_analysis.cli.options import PRECONDITIONERS, draw, engine_of, in_processes, operator_options, risk_of, write
from bnp_analysis.curvature import CURVATURES
from bnp_analysis.diagnose import LEGEND, MOST_WORK, Comparison, compare


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    operator_options(parser)
    parser.add_argument("--layers", nargs="+", metavar="NAME", help="only these layers in the table")
    parser.add_argument(
        "--curvature", nargs="+", choices=CURVATURES, default=["gauss-newton", "hessian"], help="of the whole network"
    )
    parser.add_argument("--max-flops", type=float, default=MOST_WORK, metavar="N", help="that the table may take")
    parser.set_defaults(run=_condition)


@in_processes
def _condition(arguments: argparse.Namespace) -> int:
    risk = risk_of(arguments)
    P = PRECONDITIONERS[arguments.preconditioner](risk)
    result = compare(
        risk,
        P,
        curvature=arguments.curvature,
        layers=arguments.layers,
        profiles=True,
        dtype=None,
        **engine_of(arguments),
        max_flops=arguments.max_flops,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    print(report(result))
    write(result, arguments.json)
    draw("save_comparison", result, arguments, ": what BNP does to the conditioning")
    return 0


def report(result: Comparison) -> str:
    """The text that `condition` prints: table, bounds, methods and product counts; last the whole network, by rank."""
    lines = ["", result.layers.table(), "", LEGEND]
    lines += [
        "Unit and layer blocks of the Gauss-Newton matrix are the Hessian's here: piecewise linear layers."
        if all(row.is_hessian for row in result.layers.layers)
        else "Unit and layer blocks are those of the Gauss-Newton matrix; the Hessian's differ where it says no."
    ]
    lines += ["", "Layer blocks"]
    for row in result.layers.layers:
        lines += [f"  {row.layer:<8} without P  {row.block}", f"  {'':<8} with P     {row.block_with_P}"]
    lines += ["", "Whole network"]
    for name, (plain, conditioned) in result.network.items():
        lines += [f"  {name}", f"    without P  {plain}", f"    with P     {conditioned}"]
    lines += ["rank: nonzero eigenvalues; gap: the smallest nonzero eigenvalue over the largest that counts as zero."]
    if result.layers.uncovered:
        lines += ["", "Not covered by P: " + "; ".join(f"{n} ({why})" for n, why in result.layers.uncovered.items())]
    for found in result.profiles.values():
        lines += ["", *textwrap.wrap(str(found), 120), "", found.table()]
    if result.profiles:
        lines += [
            "",
            "Rows: the largest eigenvalue over that of a rank, value (lower .. upper); gain: without P over with P.",
        ]
    lines += ["", f"{result.matvecs} products with curvature matrices, {result.seconds:.1f} s"]
    return "\n".join(lines)
