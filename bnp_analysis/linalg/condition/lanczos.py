"""The method lanczos: what Ritz values allow one to claim (T13)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from bnp_analysis.errors import NotConvexError, ZeroOperatorError
from bnp_analysis.linalg.condition.certificates import (
    incomplete,
    invariance_slack,
    kuczynski_wozniakowski,
    null_contamination,
    require_probability,
    zero_matrix,
)
from bnp_analysis.linalg.condition.largest import held_vectors, krylov_magnitudes
from bnp_analysis.linalg.condition.methods import LANCZOS_STEPS, Method, Price, Problem, next_method, register
from bnp_analysis.linalg.condition.number import Extremes, Magnitudes
from bnp_analysis.linalg.derived import Shifted
from bnp_analysis.linalg.forming import amplified
from bnp_analysis.linalg.krylov.lanczos import Floats, Tridiagonalization, lanczos, tridiagonal_eigh
from bnp_analysis.linalg.matrices import Columns
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.preconditioner import congruence
from bnp_analysis.linalg.scale import Scaled, exponent
from bnp_analysis.linalg.spectra.checks import norm_estimate, require_symmetric, rounding_norm
from bnp_analysis.linalg.spectra.null import NORM_STEPS, require_null
from bnp_analysis.runtime.memory import available_memory, require_memory
from bnp_analysis.runtime.random import generator, normal

# Eigenvalues that a run goes for unless told otherwise.
RANKS = 100
# Lanczos vectors that hold more than this of an undeclared null space support no bound.
_CONTAMINATION = 1e-2
# Of the free memory, what vectors may take unless told how many: products need some too. The least that a run has.
_SHARE, _LEAST = 0.5, 5


def lanczos_ends(problem: Problem) -> Extremes:
    """Ritz values: a lower bound where T13 allows one, an upper one if the whole null space is declared."""
    A, null, failure_probability = problem.A, problem.null, problem.failure_probability
    require_probability(failure_probability)
    operator, basis, noise, spent = conditioned(problem)
    run, extra = _run(problem, operator, basis)
    values, residuals = run.ritz()
    floor = noise * float(np.abs(values).max())
    if values[0] < -floor:
        raise NotConvexError(
            f"the operator is indefinite: Lanczos found the Ritz value {values[0]:.4g} with residual "
            f"{residuals[0]:.2g} (rounding explains {floor:.2g}). Use magnitude_condition_number(A), or the "
            "Gauss-Newton matrix"
        )
    top = float(values[-1])
    if top <= 0:
        return zero_matrix(null, run.matvecs)
    # On the part of the basis that lies in the range, no Ritz value is below lambda_min+.
    clean = len(run.alpha) if null.complete else _clean_steps(run, noise)
    in_range = float(tridiagonal_eigh(run.alpha[:clean], run.beta[: clean - 1])[0][0])
    in_range /= 1.0 if null.complete else 1 - _CONTAMINATION**2
    bottom = min(in_range if in_range > floor else math.inf, _certified_smallest(values, residuals, floor))
    lower = max(top - floor, 0.0) / (bottom + floor) if math.isfinite(bottom) else math.nan
    dim = A.dim - null.dim
    k = len(run.alpha)
    upper, note = math.inf, "" if null.complete else incomplete(null)
    if null.complete and math.isfinite(bottom):
        # Two bounds of each end, so each may fail with half of the probability.
        chance = failure_probability / 2
        high, low = kuczynski_wozniakowski(top, float(values[0]), k, dim, chance)
        slack = invariance_slack(run.residual_norm + floor, dim, chance)
        high, low = min(high, top + slack), max(low, float(values[0]) - slack)
        upper = (high + floor) / (low - floor) if low > floor else math.inf
        note = "" if math.isfinite(upper) else _not_certified(run, math.sqrt(top / bottom), dim, chance)
    if not math.isfinite(lower):
        note = "no Ritz value stands above the noise floor" + (f"; {note}" if note else "")
    return Extremes(
        lambda_max=top,
        lambda_min=bottom if math.isfinite(bottom) else 0.0,
        lower=lower,
        upper=upper,
        null_dim=null.dim,
        null_sources=null.sources,
        noise_floor=floor,
        failure_probability=failure_probability,
        residual_max=float(residuals[-1]),
        residual_min=float(residuals[0]),
        matvecs=run.matvecs + extra + spent,
        stop=run.stop,
        note=note,
    )


def lanczos_magnitudes(problem: Problem) -> Extremes:
    """A lower bound of `max|lambda| / min|lambda|`: interior eigenvalues have no one-sided Ritz bound but this.

    For `x` in the range, `min|lambda| <= |A x| / |x|`; the least such ratio on the space searched is the
    smallest singular value of the tridiagonal matrix extended by its residual row.
    """
    null = problem.null
    operator, basis, noise, spent = conditioned(problem)
    run, extra = _run(problem, operator, basis)
    values, residuals = run.ritz()
    top = float(np.abs(values).max())
    floor = noise * top
    k = len(run.alpha) if null.complete else _clean_steps(run, noise)
    extended = np.zeros((k + 1, k))
    extended[:k] = np.diag(run.alpha[:k]) + np.diag(run.beta[: k - 1], 1) + np.diag(run.beta[: k - 1], -1)
    extended[k, -1] = run.residual_norm if k == len(run.alpha) else run.beta[k - 1]
    in_range = float(np.linalg.svd(extended, compute_uv=False)[-1]) / math.sqrt(1 - _CONTAMINATION**2)
    bottom = min(in_range if in_range > floor else math.inf, _certified_smallest(np.abs(values), residuals, floor))
    lower = max(top - floor, 0.0) / (bottom + floor) if math.isfinite(bottom) else math.nan
    return Extremes(
        lambda_max=top,
        lambda_min=bottom if math.isfinite(bottom) else 0.0,
        lower=lower,
        upper=math.inf,
        null_dim=null.dim,
        null_sources=null.sources,
        negative=int((values + residuals < -floor).sum()),
        noise_floor=floor,
        matvecs=run.matvecs + extra + spent,
        stop=run.stop,
        note="interior eigenvalues are bounded from one side only by Lanczos; method='dense' decides them",
    )


def _fitting(A: SymmetricOperator, most: int, vectors: Callable[[int], int]) -> int:
    """The largest number up to `most`, steps or eigenvalues, whose vectors take at most a part of what is free."""
    free = _SHARE * available_memory(A.device) / (A.dim * A.dtype.itemsize)
    return next((size for size in range(most, _LEAST, -1) if vectors(size) <= free), min(most, _LEAST))


def conditioned(problem: Problem, held: int | None = None) -> tuple[SymmetricOperator, Columns, float, int]:
    """The operator measured, its null basis, the relative noise of its eigenvalues, products spent.

    Memory is asked for first, for `held` vectors, by default those of one run: the probes alone are a dozen.
    """
    A, P, null, seed, steps = problem.A, problem.P, problem.null, problem.seed, problem.krylov_steps
    vectors = min(steps, A.dim) + 12 if held is None else held
    require_memory(
        vectors * A.dim * A.dtype.itemsize,
        f"{vectors} vectors of length {A.dim} for {steps} Lanczos steps",
        device=A.device,
    )
    spent = 2 + null.cost
    require_symmetric(A, seed)
    noise = 10 * math.sqrt(A.dim) * A.eps
    if null.dim:
        # Declared directions are zero by evidence: what is left of them measures the rounding from below.
        noise = max(noise, require_null(A, null, rounding_norm(A, seed), "A"))
    operator = A if P is None else congruence(A, P)
    basis = null.basis if P is None else P.transport(null.basis)
    if not (amplified(operator) or isinstance(operator.inner if isinstance(operator, Scaled) else operator, Shifted)):
        return operator, basis, noise, spent
    # Rounding in P^T A P is relative to |P|^2 |A|, which may exceed |P^T A P| (T13).
    actual = norm_estimate(operator, seed)
    worse = max(1.0, rounding_norm(operator, seed) / actual) if actual > 0 else 1.0
    return operator, basis, noise * worse, spent + 2 * NORM_STEPS


def _run(problem: Problem, operator: SymmetricOperator, basis: Columns) -> tuple[Tridiagonalization, int]:
    """A random start where the null space is declared; else one in the range, `A g` (T13, trap 7)."""
    start, extra = None, 0
    if not problem.null.complete:
        start = operator @ normal((operator.dim,), generator(problem.seed), operator)
        extra = 1
        if float(start.double().norm()) == 0.0:
            raise ZeroOperatorError("the operator maps a random vector to zero: it is the zero operator")

    def converged(run: Tridiagonalization) -> bool:
        values, residuals = run.ritz()
        return bool(residuals[0] <= 1e-10 * abs(values[0]) and residuals[-1] <= 1e-10 * abs(values[-1]))

    steps = min(problem.krylov_steps, operator.dim - basis.shape[1])
    # With a declared null space more steps tighten the probabilistic bound even after convergence.
    until = None if problem.null.complete else converged
    run = lanczos(
        operator,
        steps,
        start=start,
        seed=problem.seed,
        null=basis,
        until=until,
        checkpoint=problem.checkpoint,
        progress=problem.progress,
    )
    return run, extra


def _not_certified(run: Tridiagonalization, root: float, dim: int, chance: float) -> str:
    """Why there is no upper bound, and what would give one."""
    steps = len(run.alpha)
    if run.stop == "invariant subspace":
        return f"after {steps} steps the space is invariant to rounding, which can hide a small eigenvalue; use 'dense'"
    if run.stop == "exhausted":
        return f"after all {steps} steps the smallest Ritz value does not stand above the noise floor"
    needed = math.ceil(root * math.log(1.648 * math.sqrt(dim) / (chance / 2)) / 2)
    return f"smallest Ritz value not certified after {steps} steps, about {needed} needed"


def _clean_steps(run: Tridiagonalization, noise: float) -> int:
    """How many Lanczos vectors, together, hold at most `_CONTAMINATION` of an undeclared null space."""
    scale = float(np.abs(run.alpha).max() + (np.abs(run.beta).max() if run.beta.size else 0.0))
    bounds = null_contamination(run.alpha, run.beta, noise * scale, noise)
    total = np.sqrt(np.cumsum(bounds**2))
    return max(1, int((total <= _CONTAMINATION).sum()))


def _certified_smallest(values: Floats, residuals: Floats, floor: float) -> float:
    """The least `theta + residual` of a Ritz pair that certifies a nonzero eigenvalue, `inf` if there is none."""
    certain = values - residuals > floor
    return float((values + residuals)[certain].min()) if certain.any() else math.inf


def _with_least(ends: Extremes, problem: Problem) -> Extremes:
    """The same where no eigenvalue is below `problem.least` if `A` is semidefinite: that bounds the bottom end."""
    least = math.ldexp(problem.least, -ends.exponent)
    if ends.lambda_min < least - ends.noise_floor:
        return replace(ends, note=f"A is indefinite, delta bounds nothing; {ends.note}".rstrip("; "))
    if math.isfinite(ends.upper) or ends.stop == "interrupted":
        return ends
    high, _ = kuczynski_wozniakowski(
        ends.lambda_max, 0.0, problem.krylov_steps, problem.A.dim, problem.failure_probability
    )
    upper = (high + ends.noise_floor) / least
    return replace(ends, upper=upper, note="" if math.isfinite(upper) else ends.note)


def _solve(problem: Problem) -> Extremes:
    usual = problem.krylov_steps
    if problem.steps is None:
        problem = replace(problem, steps=_fitting(problem.A, usual, lambda steps: steps + 12))
    inner = problem.scaled()
    ends = inner.in_units(lanczos_ends(inner) if problem.semidefinite else lanczos_magnitudes(inner))
    if not math.isfinite(ends.upper):
        cut = f"; memory has room for {problem.steps} of {usual} steps" if problem.krylov_steps < usual else ""
        ends = replace(ends, note=ends.note + cut + next_method(problem.A))
    return _with_least(ends, problem) if problem.least else ends


def _magnitudes(problem: Problem) -> Magnitudes:
    """The largest `|lambda|`, by default 100 of them, with three steps for each and 100 at least."""
    room = problem.A.dim - problem.null.dim
    count = usual = min(problem.count or RANKS, room)

    def steps_for(count: int) -> int:
        return max(LANCZOS_STEPS, 3 * count) if problem.steps is None else problem.steps

    def held(count: int) -> int:
        return held_vectors(count, min(steps_for(count), room))

    if problem.count is None:
        count = _fitting(problem.A, usual, held)
    steps = steps_for(count)
    problem = replace(problem, steps=steps).scaled()
    operator, basis, noise, spent = conditioned(problem, held(count))
    found = krylov_magnitudes(
        operator,
        basis,
        count,
        steps=steps,
        noise=noise,
        failure_probability=problem.failure_probability,
        probes=problem.probes,
        seed=problem.seed,
        progress=problem.progress,
    )
    stop = "memory" if count < usual and found.stop == "steps" else found.stop
    return replace(found, matvecs=found.matvecs + spent, exponent=-exponent(operator), stop=stop)


def _price(A: SymmetricOperator, steps: int) -> Price:
    return Price(float(steps + 3), (steps + 1) * A.dim * A.dtype.itemsize, 4.0 * steps**2 * A.dim)


LANCZOS = register(
    Method(
        name="lanczos",
        claim="a lower bound",
        price=_price,
        solve=_solve,
        magnitudes=_magnitudes,
        automatic=lambda A: True,
        indefinite=True,
        order=60,
    )
)
