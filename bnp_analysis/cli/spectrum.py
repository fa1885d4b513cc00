"""`bnp-analysis spectrum`: parse, call, print."""

from __future__ import annotations

import argparse
from pathlib import Path

from bnp_analysis.cli.options import (
    PRECONDITIONERS,
    Outputs,
    draw,
    engine_of,
    in_processes,
    operator_options,
    outputs_of,
    risk_of,
    write,
)
from bnp_analysis.curvature import CURVATURES
from bnp_analysis.diagnose import block_spectra, curvature_matrix
from bnp_analysis.linalg import eigenpairs, spectral_density
from bnp_analysis.network import EmpiricalRisk


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    operator_options(parser)
    add = parser.add_argument
    add("--curvature", choices=CURVATURES, default="hessian", help="the matrix")
    add("--top", type=int, default=5, metavar="K", help="eigenvalues to print")
    add("--probes", type=int, default=8, help="random vectors of the density")
    add("--steps", type=int, default=64, help="Lanczos steps of each")
    few = "keep three vectors of a density's run, not all of them"
    add("--no-reorthogonalization", action="store_true", help=few)
    every = "spectra of diagonal blocks in place of the whole: names or patterns, without any every parameter tensor"
    add("--blocks", nargs="*", metavar="PATTERN", help=every)
    parser.set_defaults(run=_spectrum, outputs=_outputs)


def _outputs(arguments: argparse.Namespace) -> Outputs:
    """The files that are written: without `--blocks` four results, named after the one of `--json`."""
    outputs = outputs_of(arguments)
    if arguments.blocks is None:
        for file in outputs.get("--json", [])[:]:
            outputs["--json"] += [_file(file, what, P) for P in (False, True) for what in ("eigenpairs", "density")]
    return outputs


def _file(given: str | Path, what: str, with_P: bool) -> Path:
    base = Path(given)
    return base.parent / f"{base.stem}-{what}{'-with-P' * with_P}{base.suffix or '.json'}"


@in_processes
def _spectrum(arguments: argparse.Namespace) -> int:
    risk = risk_of(arguments)
    if arguments.blocks is not None:
        return _blocks(arguments, risk)
    A = curvature_matrix(risk, arguments.curvature, arguments.seed, **engine_of(arguments))
    P = PRECONDITIONERS[arguments.preconditioner](risk)
    progress = not arguments.quiet
    densities = []
    for label, factor in ((arguments.curvature, None), (f"{arguments.curvature} with P", P)):
        pairs = eigenpairs(A, arguments.top, preconditioner=factor, seed=arguments.seed, progress=progress)
        density = spectral_density(
            A,
            preconditioner=factor,
            probes=arguments.probes,
            steps=arguments.steps,
            reorthogonalize=not arguments.no_reorthogonalization,
            seed=arguments.seed,
            progress=progress,
        )
        print(f"{label}\n  {pairs}\n  {density}")
        densities.append((label, density))
        if arguments.json:
            for what, result in (("eigenpairs", pairs), ("density", density)):
                write(result, _file(arguments.json, what, factor is not None))
        if pairs.stop == "interrupted" or len(density.nodes) < arguments.probes:
            raise KeyboardInterrupt  # what there is was printed and written
    draw("save_densities", densities, arguments)
    return 0


def _blocks(arguments: argparse.Namespace, risk: EmpiricalRisk) -> int:
    found = block_spectra(
        risk,
        blocks=arguments.blocks or None,
        curvature=arguments.curvature,
        probes=arguments.probes,
        steps=arguments.steps,
        dtype=None,
        **engine_of(arguments),
        seed=arguments.seed,
        progress=not arguments.quiet,
    )
    print(found)
    write(found, arguments.json)
    draw("save_block_spectra", found, arguments)
    return 0
