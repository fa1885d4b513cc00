"""`bnp-analysis condition` and `spectrum`: parse, call, print."""

from __future__ import annotations

import argparse
import math
import textwrap
from pathlib import Path
from typing import Any

from bnp_analysis.cli.options import (
    PRECONDITIONERS,
    Outputs,
    draw,
    in_processes,
    operator_options,
    outputs_of,
    risk_of,
    write,
)
from bnp_analysis.curvature import CURVATURES
from bnp_analysis.diagnose import LEGEND, MOST_WORK, Comparison, block_spectra, compare, curvature_matrix
from bnp_analysis.linalg import eigenpairs, spectral_density


def _underscored(name: str) -> str:
    return name.replace("-", "_")


def condition(parser: argparse.ArgumentParser) -> None:
    """Add the options of `condition`."""
    operator_options(parser)
    add = parser.add_argument
    add("--layers", nargs="+", metavar="NAME", help="layers in the table; all if not given")
    both = ["gauss_newton", "hessian"]
    add(
        "--curvature",
        nargs="+",
        type=_underscored,
        choices=CURVATURES,
        default=both,
        help="matrices of the whole network",
    )
    add(
        "--max-flops",
        type=float,
        default=MOST_WORK,
        metavar="N",
        help="limit of floating-point operations for the table",
    )
    parser.set_defaults(run=_condition)


def spectrum(parser: argparse.ArgumentParser) -> None:
    """Add the options of `spectrum`."""
    operator_options(parser)
    add = parser.add_argument
    add("--curvature", type=_underscored, choices=CURVATURES, default="hessian", help="matrix to measure")
    add("--top", type=int, default=5, metavar="K", help="number of largest eigenvalues")
    add("--probes", type=int, default=8, help="number of random vectors for the density")
    add("--steps", type=int, default=64, help="Lanczos steps per random vector")
    few = "store three Lanczos vectors for the density instead of all"
    add("--no-reorthogonalization", action="store_true", help=few)
    every = "spectra of diagonal blocks instead of the network: names or patterns; without: every parameter tensor"
    add("--blocks", nargs="*", metavar="PATTERN", help=every)
    parser.set_defaults(run=_spectrum, outputs=_outputs)


def _outputs(arguments: argparse.Namespace) -> Outputs:
    """The files that `spectrum` writes: without `--blocks` four results, with names derived from `--json`."""
    outputs = outputs_of(arguments)
    if arguments.blocks is None:
        for file in outputs.get("--json", [])[:]:
            outputs["--json"] += [_file(file, what, P) for P in (False, True) for what in ("eigenpairs", "density")]
    return outputs


def _file(given: str | Path, what: str, with_P: bool) -> Path:
    base = Path(given)
    return base.parent / f"{base.stem}-{what}{'-with-P' * with_P}{base.suffix or '.json'}"


def _keywords(arguments: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of operators, `engine` and `max_memory`, and of searches, `seed` and `progress`."""
    limit = None if arguments.max_memory is None else math.ceil(2**20 * arguments.max_memory)
    return {"engine": arguments.engine, "max_memory": limit}, {"seed": arguments.seed, "progress": not arguments.quiet}


@in_processes
def _condition(arguments: argparse.Namespace) -> int:
    risk, (engine, search) = risk_of(arguments), _keywords(arguments)
    result = compare(
        risk,
        PRECONDITIONERS[arguments.preconditioner](risk),
        curvature=arguments.curvature,
        layers=arguments.layers,
        profiles=True,
        dtype=None,
        max_flops=arguments.max_flops,
        **engine,
        **search,
    )
    print(report(result))
    write(result, arguments.json)
    draw("save_comparison", result, arguments, ": what BNP does to the conditioning")
    return 0


def report(result: Comparison) -> str:
    """The text that `condition` prints: table, bounds, methods, number of products, and the network's profile."""
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


@in_processes
def _spectrum(arguments: argparse.Namespace) -> int:
    risk, (engine, search) = risk_of(arguments), _keywords(arguments)
    density_of: dict[str, Any] = {"probes": arguments.probes, "steps": arguments.steps, **search}
    if arguments.blocks is not None:
        named: dict[str, Any] = {"blocks": arguments.blocks or None, "curvature": arguments.curvature}
        found = block_spectra(risk, **named, dtype=None, **engine, **density_of)
        print(found)
        write(found, arguments.json)
        draw("save_block_spectra", found, arguments)
        return 0
    A = curvature_matrix(risk, arguments.curvature, arguments.seed, **engine)
    P = PRECONDITIONERS[arguments.preconditioner](risk)
    densities = []
    for label, factor in ((arguments.curvature, None), (f"{arguments.curvature} with P", P)):
        pairs = eigenpairs(A, arguments.top, preconditioner=factor, **search)
        whole = not arguments.no_reorthogonalization
        density = spectral_density(A, preconditioner=factor, reorthogonalize=whole, **density_of)
        print(f"{label}\n  {pairs}\n  {density}")
        densities.append((label, density))
        if arguments.json:
            for what, result in (("eigenpairs", pairs), ("density", density)):
                write(result, _file(arguments.json, what, factor is not None))
        if pairs.stop == "interrupted" or len(density.nodes) < arguments.probes:
            raise KeyboardInterrupt  # what there is was printed and written
    draw("save_densities", densities, arguments)
    return 0
