"""`bnp-analysis spectrum`: parse, call, print."""

from __future__ import annotations

import argparse
from pathlib import Path

from bnp_analysis.cli.problem import PRECONDITIONERS, engine_of, engine_options, figure_option, problem_options, risk_of
from bnp_analysis.cli.processes import in_processes, process_options
from bnp_analysis.curvature import CURVATURES
from bnp_analysis.diagnose import curvature_matrix
from bnp_analysis.linalg import eigenpairs, spectral_density


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    problem_options(parser)
    process_options(parser)
    engine_options(parser)
    figure_option(parser)
    parser.add_argument("--curvature", choices=CURVATURES, default="hessian", help="the matrix")
    parser.add_argument("--top", type=int, default=5, metavar="K", help="eigenvalues to print")
    parser.add_argument("--probes", type=int, default=8, help="random vectors of the density")
    parser.add_argument("--steps", type=int, default=64, help="Lanczos steps of each")
    parser.add_argument(
        "--no-reorthogonalization", action="store_true", help="keep three vectors of a density's run, not all of them"
    )
    parser.set_defaults(run=_spectrum)


@in_processes
def _spectrum(arguments: argparse.Namespace) -> int:
    risk = risk_of(arguments)
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
            base = Path(arguments.json)
            suffix = "" if factor is None else "-with-P"
            for name, result in (("eigenpairs", pairs), ("density", density)):
                path = base.with_name(f"{base.stem}-{name}{suffix}{base.suffix or '.json'}")
                result.save(path)
                print(f"wrote {path}")
    if arguments.figure:
        from bnp_analysis.plotting import save_densities

        save_densities(densities, arguments.figure, f"{arguments.data}, {arguments.model}")
        print(f"wrote {arguments.figure}")
    return 0
