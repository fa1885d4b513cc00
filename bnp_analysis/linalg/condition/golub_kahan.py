"""The method golub-kahan: all singular values of a factor that is too large to hold (T13)."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from bnp_analysis.linalg.condition.certificates import factor_extremes, zero_matrix
from bnp_analysis.linalg.condition.methods import Method, Price, Problem, register
from bnp_analysis.linalg.condition.number import Extremes
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.linalg.forming import amplified
from bnp_analysis.linalg.krylov.bidiagonal import Bidiagonalization, golub_kahan
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator
from bnp_analysis.linalg.spectra.checks import NORM_STEPS, factor_rounding_norm, left_of, require_null


def golub_kahan_ends(problem: Problem) -> Extremes:
    """Bidiagonalize `F P` to breakdown: then every nonzero singular value is known; else a lower bound.

    A run that stopped early bounds `sigma_min+` from above by the least singular value of the clean part of `B`:
    the columns of `V` that rounding has not carried into an undeclared null space.
    """
    problem = replace(problem, A=GramOperator(problem.factor("golub-kahan"))).scaled()
    A, P, null, factor = problem.A, problem.P, problem.null, problem.factor("golub-kahan")
    operator: LinearOperator = factor
    basis, size, left, spent = null.basis, 0.0, 0.0, 0
    if null.dim or P is not None or amplified(factor):
        # Otherwise products round relative to |F|, which the run itself finds.
        size, spent = factor_rounding_norm(factor, problem.seed), NORM_STEPS + null.dim
        require_null(factor, null, size, "F")
    if P is not None:
        operator, basis = factor @ P, P.transport(null.basis)
        size *= factor_rounding_norm(P, problem.seed)
        left, spent = left_of(operator, basis), spent + null.combined
    structural = factor.rank_bound
    run = golub_kahan(
        operator,
        A.dim - null.dim if problem.steps is None else problem.steps,
        null=basis if null.dim else None,
        magnitude=size,
        seed=problem.seed,
        checkpoint=problem.checkpoint,
        progress=problem.progress,
    )
    sigma, matvecs = run.singular_values(), run.products + spent
    top = float(sigma[0]) if sigma.size else 0.0
    radius = 10 * A.eps * math.sqrt(max(operator.shape)) * (top + max(top, size)) + run.dropped + left
    if run.stop != "exhausted":
        return problem.in_units(_partial(run, null.complete, radius, min(structural, A.dim - null.dim), matvecs))
    noise = A.eps * max(top, size)
    return problem.in_units(
        factor_extremes(
            A, null, sigma, radius=radius, noise=noise, structural=structural, matvecs=matvecs, stop=run.stop
        )
    )


def _partial(run: Bidiagonalization, complete: bool, radius: float, structural: int, matvecs: int) -> Extremes:
    """A lower bound from the columns of `V` that lie in the row space."""
    sigma = run.singular_values()
    if not (sigma > radius).any():
        return zero_matrix(matvecs)
    top = float(sigma[0])
    clean = run.matrix.shape[1] if complete else run.clean
    least = float(np.linalg.svd(run.matrix[:, :clean], compute_uv=False)[-1]) / math.sqrt(1 - 1e-4)
    known = least > radius
    memory = 8 * structural * (len(run.left) + len(run.right)) / 2**30
    return Extremes(
        lambda_max=top**2,
        lambda_min=least**2 if known else 0.0,
        lower=(max(top - radius, 0.0) / (least + radius)) ** 2 if known else math.nan,
        upper=math.inf,
        noise_floor=radius**2,
        matvecs=matvecs,
        stop=run.stop,
        note=f"stopped after {run.products} of about {structural} products; all of them need {memory:.2g} GiB",
    )


def _price(A: SymmetricOperator, steps: int) -> Price:
    (r, n), rank = ((0, A.dim), 0) if A.factor is None else (A.factor.shape, A.factor.rank_bound)
    return Price(float(rank + 2), 8 * (rank + 1) * (r + n), 4.0 * rank**2 * (r + n))


GOLUB_KAHAN = register(
    Method(
        name="golub-kahan",
        claim="the same, without holding the factor; a lower bound when stopped early; resumes",
        price=_price,
        solve=golub_kahan_ends,
        applies=lambda A: A.factor is not None,
        decides=True,
        order=20,
    )
)
