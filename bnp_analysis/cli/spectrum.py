"""`bnp-analysis spectrum`: parse, call, print."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from bnp_analysis.cli.problem import PRECONDITIONERS, engine_of, engine_options, figure_option, problem_options, risk_of
from bnp_analysis.cli.processes import in_processes, process_options
from bnp_analysis.diagnose import CURVATURES, curvature_matrix
from bnp_analysis.linalg import eigenpairs, spectral_density


def add_spectrum_command(commands: Any) -> None:
    """Add the command to the object that `ArgumentParser.add_subparsers` returned."""
    spectrum = commands.add_parser(
        "spectrum",
        help="largest eigenvalues and spectral density, without and with a preconditioner",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    problem_options(spectrum)
    process_options(spectrum)
    engine_options(spectrum)
    figure_option(spectrum)
    spectrum.add_argument("--curvature", choices=CURVATURES, default="hessian", help="the matrix")
    spectrum.add_argument("--top", type=int, default=5, metavar="K", help="eigenvalues to print")
    spectrum.add_argument("--probes", type=int, default=8, help="random vectors of the density")
    spectrum.add_argument("--steps", type=int, default=64, help="Lanczos steps of each")
    spectrum.add_argument(
        "--no-reorthogonalization", action="store_true", help="keep three vectors of a density's run, not all of them"
    )
    spectrum.set_defaults(run=_spectrum)


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
