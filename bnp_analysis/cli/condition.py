"""`bnp-analysis condition`: parse, call, print."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from bnp_analysis.cli.options import PRECONDITIONERS, engine_of, in_processes, operator_options, risk_of, write
from bnp_analysis.curvature import CURVATURES
from bnp_analysis.diagnose import MOST_WORK, Comparison, compare


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
        dtype=None,
        **engine_of(arguments),
        max_flops=arguments.max_flops,
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    print(report(result))
    write(result, arguments.json)
    if arguments.figure:
        from bnp_analysis.plotting import save_comparison

        title = f"{arguments.data}, {arguments.model}: what BNP does to the conditioning"
        save_comparison(result, arguments.figure, title)
        print(f"wrote {arguments.figure}")
    return 0


def report(result: Comparison) -> str:
    """The text that `condition` prints: table, bounds, methods and product counts."""
    lines = ["", text_table(result.records()), ""]
    lines += [
        "k(.) are sigma_max/sigma_min+ of the layer's inputs, constant features set aside: raw, centred, normalized.",
        "units: the median of the units' blocks (the worst in brackets). >= marks a lower bound.",
    ]
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
    if result.layers.uncovered:
        lines += ["", "Not covered by P: " + "; ".join(f"{n} ({why})" for n, why in result.layers.uncovered.items())]
    lines += ["", f"{result.matvecs} products with curvature matrices, {result.seconds:.1f} s"]
    return "\n".join(lines)


def text_table(records: Sequence[dict[str, Any]]) -> str:
    """Records as aligned columns."""
    if not records:
        return "(no rows)"
    head = list(records[0])
    body = [[str(record[name]) for name in head] for record in records]
    widths = [max(len(name), *(len(row[i]) for row in body)) for i, name in enumerate(head)]
    return "\n".join("  ".join(entry.rjust(w) for entry, w in zip(row, widths, strict=True)) for row in [head, *body])
