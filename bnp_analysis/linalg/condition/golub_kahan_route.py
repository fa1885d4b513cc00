"""The Golub-Kahan route: all singular values of a factor that is too large to hold (T13)."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from bnp_analysis.linalg.condition.extremes import factor_extremes, zero_matrix
from bnp_analysis.linalg.condition.number import Extremes
from bnp_analysis.linalg.forming import amplified
from bnp_analysis.linalg.krylov.bidiagonal import Bidiagonalization, golub_kahan
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.linalg.spectra.checks import factor_rounding_norm
from bnp_analysis.linalg.spectra.null import NORM_STEPS, DeclaredNull, require_null
from bnp_analysis.runtime.progress import Progress


def golub_kahan_ends(
    A: SymmetricOperator,
    P: Preconditioner | None,
    null: DeclaredNull,
    *,
    steps: int | None,
    seed: int,
    checkpoint: str | Path | None,
    progress: Progress,
) -> Extremes:
    """Bidiagonalize `F P` to breakdown: then every nonzero singular value is known; else a lower bound.

    A run that stopped early bounds `sigma_min+` from above by the least singular value of the clean part of `B`:
    the columns of `V` that rounding has not carried into an undeclared null space.
    """
    factor = A.factor
    assert factor is not None
    operator: LinearOperator = factor
    basis, size, spent = null.basis, 0.0, 0
    if null.dim or P is not None or amplified(factor):
        # Otherwise products round relative to |F|, which the run itself finds.
        size, spent = factor_rounding_norm(factor, seed), NORM_STEPS + null.dim
        require_null(factor, null, size, "F")
    if P is not None:
        operator, basis = factor @ P, P.transport(null.basis)
        size *= factor_rounding_norm(P, seed)
    structural = factor.rank_bound
    run = golub_kahan(
        operator,
        A.dim - null.dim if steps is None else steps,
        null=basis if null.dim else None,
        magnitude=size,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )
    sigma = run.singular_values()
    unit = A.eps
    top = float(sigma[0]) if sigma.size else 0.0
    radius = 10 * unit * math.sqrt(max(operator.shape)) * (top + max(top, size)) + run.dropped
    if run.stop != "exhausted":
        return _partial(null, run, radius, min(structural, A.dim - null.dim), run.products + spent)
    return factor_extremes(
        A,
        null,
        sigma,
        radius=radius,
        noise=unit * max(top, size),
        structural=structural,
        matvecs=run.products + spent,
        stop=run.stop,
    )


def _partial(null: DeclaredNull, run: Bidiagonalization, radius: float, structural: int, matvecs: int) -> Extremes:
    """A lower bound from the columns of `V` that lie in the row space."""
    sigma = run.singular_values()
    if not (sigma > radius).any():
        return zero_matrix(null, matvecs)
    top = float(sigma[0])
    clean = run.matrix.shape[1] if null.complete else run.clean
    least = float(np.linalg.svd(run.matrix[:, :clean], compute_uv=False)[-1]) / math.sqrt(1 - 1e-4)
    known = least > radius
    memory = 8 * structural * (len(run.left) + len(run.right)) / 2**30
    return Extremes(
        lambda_max=top**2,
        lambda_min=least**2 if known else 0.0,
        lower=(max(top - radius, 0.0) / (least + radius)) ** 2 if known else math.nan,
        upper=math.inf,
        null_dim=null.dim,
        null_sources=null.sources,
        noise_floor=radius**2,
        matvecs=matvecs,
        stop=run.stop,
        note=f"stopped after {run.products} of about {structural} products; all of them need {memory:.2g} GiB",
    )
