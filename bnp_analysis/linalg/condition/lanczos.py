"""The method lanczos: bounds on both ends and on the largest eigenvalues from Ritz values (T13)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import NotConvexError, ZeroOperatorError
from bnp_analysis.linalg.bases import project_out
from bnp_analysis.linalg.condition.certificates import (
    incomplete,
    invariance_slack,
    kuczynski_wozniakowski,
    no_magnitudes,
    null_contamination,
    require_probability,
    zero_matrix,
)
from bnp_analysis.linalg.condition.methods import LANCZOS_STEPS, Method, Price, Problem, next_method, register
from bnp_analysis.linalg.condition.number import Extremes, Magnitudes
from bnp_analysis.linalg.derived import Shifted
from bnp_analysis.linalg.forming import amplified
from bnp_analysis.linalg.krylov.lanczos import Floats, Tridiagonalization, lanczos, tridiagonal_eigh
from bnp_analysis.linalg.matrices import Columns, beside
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.preconditioner import congruence
from bnp_analysis.linalg.scale import Scaled, exponent
from bnp_analysis.linalg.spectra.checks import (
    NORM_STEPS,
    left_of,
    norm_estimate,
    require_null,
    require_symmetric,
    rounding_norm,
)
from bnp_analysis.runtime.memory import available_memory, require_memory
from bnp_analysis.runtime.progress import Progress
from bnp_analysis.runtime.random import generator, normal, rademacher

# Eigenvalues that a run goes for unless told otherwise.
RANKS = 100
# Lanczos vectors that hold more than this of an undeclared null space support no bound.
_CONTAMINATION = 1e-2
# Of the free memory, what vectors may take unless told how many: products need some too. The least that a run has.
_SHARE, _LEAST = 0.5, 5
# Searches from new random vectors that may add what the first has missed.
_ROUNDS = 3
# Eigenvalues that they are expected to add, and vectors beside those of a basis, both where memory is asked for.
_MISSED, _BESIDE = 10, 11


def lanczos_ends(problem: Problem) -> Extremes:
    """Ritz values: a lower bound where T13 allows one, an upper one if the whole null space is declared.

    Where magnitudes are compared, interior eigenvalues have no one-sided Ritz bound but this: for `x` in the range,
    `min|lambda| <= |A x| / |x|`, and the least such ratio on the space searched is the smallest singular value of the
    tridiagonal matrix extended by its residual row.
    """
    null, definite, failure_probability = problem.null, problem.semidefinite, problem.failure_probability
    require_probability(failure_probability)
    operator, basis, noise, spent = conditioned(problem)
    run, extra = _run(problem, operator, basis)
    values, residuals = run.ritz()
    floor = noise * float(np.abs(values).max())
    if definite and values[0] < -floor:
        raise NotConvexError(
            f"the operator is indefinite: Lanczos found the Ritz value {values[0]:.4g} with residual "
            f"{residuals[0]:.2g} (rounding explains {floor:.2g}). Use magnitude_condition_number(A), or the "
            "Gauss-Newton matrix"
        )
    sizes = values if definite else np.abs(values)
    top = float(sizes.max())
    if top <= 0:
        return zero_matrix(run.matvecs)
    k = len(run.alpha)
    in_range = _least_in_range(run, k if null.complete else _clean_steps(run, noise), problem)
    bottom = min(in_range if in_range > floor else math.inf, _certified_smallest(sizes, residuals, floor))
    lower = max(top - floor, 0.0) / (bottom + floor) if math.isfinite(bottom) else math.nan
    upper, note = math.inf, "" if null.complete else incomplete(null)
    if not definite:
        note = "interior eigenvalues are bounded from one side only by Lanczos; method='dense' decides them"
    elif null.complete and math.isfinite(bottom):
        # Two bounds of each end, so each may fail with half of the probability.
        dim, chance = problem.A.dim - null.dim, failure_probability / 2
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
        negative=0 if definite else int((values + residuals < -floor).sum()),
        noise_floor=floor,
        failure_probability=failure_probability,
        residual_max=float(residuals[-1]) if definite else math.nan,
        residual_min=float(residuals[0]) if definite else math.nan,
        matvecs=run.matvecs + extra + spent,
        stop=run.stop,
        note=note,
    )


def lanczos_instead(problem: Problem, method: str, why: str, spent: int = 0) -> Extremes:
    """What Lanczos finds where another method cannot go on, after so many products, and why it cannot."""
    found = lanczos_ends(problem)
    note = f"{method} refused: {why}" + (f"; {found.note}" if found.note else "")
    return replace(found, note=note, matvecs=found.matvecs + spent)


def _least_in_range(run: Tridiagonalization, clean: int, problem: Problem) -> float:
    """What `min|lambda|` is at most, from the leading columns of the basis, those that lie in the range."""
    alpha, beta = run.alpha[:clean], run.beta[: clean - 1]
    if problem.semidefinite:  # no Ritz value is below lambda_min+
        least = float(tridiagonal_eigh(alpha, beta)[0][0])
        return least if problem.null.complete else least / (1 - _CONTAMINATION**2)
    extended = np.zeros((clean + 1, clean))
    extended[:clean] = np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1)
    extended[clean, -1] = run.residual_norm if clean == len(run.alpha) else run.beta[clean - 1]
    return float(np.linalg.svd(extended, compute_uv=False)[-1]) / math.sqrt(1 - _CONTAMINATION**2)


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
    noise, spent = noise * worse, spent + 2 * NORM_STEPS
    if P is not None and null.dim and actual > 0:
        noise, spent = noise + 2 * left_of(operator, basis) / actual, spent + null.combined
    return operator, basis, noise, spent


def _run(problem: Problem, operator: SymmetricOperator, basis: Columns) -> tuple[Tridiagonalization, int]:
    """A random start where the null space is declared; else one in the range, `A g` (T13)."""
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
    total = np.sqrt(np.cumsum(np.minimum(bounds, 1.0) ** 2))
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
    ends = inner.in_units(lanczos_ends(inner))
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


def krylov_magnitudes(
    A: SymmetricOperator,
    null: Columns,
    count: int,
    *,
    steps: int,
    noise: float,
    failure_probability: float,
    probes: int,
    seed: int,
    progress: Progress = False,
) -> Magnitudes:
    """The `count` largest `|lambda|` from one Lanczos run, and a second one that certifies that none was missed.

    Let the columns of `Y` be Ritz vectors, `A Y = Y Theta + r s^T` with `r` orthogonal to the space searched. By
    Cauchy's interlacing the i-th largest eigenvalue is at least `theta_i`. By the theorem of Courant and Fischer it is
    at most the largest value of `x^T A x` over unit `x` orthogonal to `y_1, ..., y_(i-1)`, that is the larger
    eigenvalue of `[[theta_i, rho], [rho, b]]` with `rho = |r| |(s_i, s_(i+1), ...)|` and `b` the largest eigenvalue of
    `A` on the complement of `Y`: which a run from a new random vector bounds by the theorem of Kuczynski and
    Wozniakowski. What that run finds above `theta_R`, further copies of repeated eigenvalues, joins `Y`.

    Args:
        A: symmetric operator on `R^n`, of a size near 1.
        null: orthonormal `(n, r)`, null directions.
        count: `R`.
        steps: of the first run.
        noise: of an eigenvalue, relative to `|A|`.
        failure_probability: of all upper bounds together.
        probes: random vectors for the trace of the complement.
        seed: of the random starts.

    Source: Parlett 1998, chapters 10 and 11; Kuczynski and Wozniakowski 1992; T13.
    """
    run = lanczos(A, steps, seed=seed, null=null, progress=progress)
    values, last = run.ritz()[0], tridiagonal_eigh(run.alpha, run.beta)[1][-1]
    scale = float(np.abs(values).max())
    if scale == 0.0:
        return no_magnitudes(run.matvecs)
    pick = np.argsort(-np.abs(values), kind="stable")[:count]
    theta, Y = values[pick], run.ritz_vectors(pick)
    coupling: Floats = run.residual_norm * np.abs(last[pick])
    spent, stop, floor = run.matvecs, run.stop, noise * scale
    del run  # its basis
    chance = failure_probability / _ROUNDS
    ends = (math.inf, -math.inf)
    for turn in range(1, _ROUNDS + 1):
        room = A.dim - null.shape[1] - Y.shape[1]
        if room == 0 or stop == "interrupted":
            ends = (0.0, 0.0) if room == 0 else ends
            break
        beyond = lanczos(A, min(_certifying(A.dim), room), seed=seed + turn, null=beside(null, Y))
        spent += beyond.matvecs
        ends = _ends(beyond, room, chance, floor)
        found = beyond.ritz()[0]
        missed = np.abs(found) > (np.abs(theta).min() + floor if Y.shape[1] == count else floor)
        if beyond.stop == "interrupted" or not missed.any() or turn == _ROUNDS:
            break
        known = [Y, beyond.ritz_vectors(np.flatnonzero(missed))]
        del Y, beyond
        theta, Y, coupling, products = _rayleigh_ritz(A, known, count)
        spent += products
    trace, error = float(theta.sum()), 0.0
    if room:
        rest, error, products = _trace_beyond(A, beside(null, Y), probes, seed)
        trace, spent = trace + rest, spent + products
    order = np.argsort(-np.abs(theta), kind="stable")
    theta, coupling = theta[order], coupling[order]
    upper, rest_bound = _upper_bounds(theta, coupling, ends)
    return Magnitudes(
        value=np.abs(theta),
        lower=np.maximum(_kept(theta) - floor, 0.0),
        upper=upper + floor,
        rest=rest_bound + floor,
        rank=None,
        trace=trace,
        trace_error=math.hypot(error, floor),
        negative=int((theta < -floor).sum()),
        matvecs=spent,
        failure_probability=failure_probability,
        stop=stop,
    )


def held_vectors(count: int, steps: int) -> int:
    """How many vectors `krylov_magnitudes` holds at most: in the first run, in the next ones, in a step of Ritz.

    Example:
        >>> held_vectors(100, 300), held_vectors(20, 100)
        (531, 159)
    """
    first, following, ritz = steps + count, 2 * count + _certifying(10**7) + _MISSED, 5 * count + 2 * _MISSED
    return max(first, following, ritz) + _BESIDE


def _certifying(dim: int) -> int:
    """Steps after which the bound of a random start is within about one per cent."""
    return 30 + 4 * math.ceil(math.log(dim + 1))


def _ends(run: Tridiagonalization, room: int, chance: float, floor: float) -> tuple[float, float]:
    """Bounds of the spectrum on the complement, above and below."""
    values = run.ritz()[0]
    high, low = kuczynski_wozniakowski(float(values[-1]), float(values[0]), len(run.alpha), room, chance / 2)
    if len(run.alpha) < room:
        slack = invariance_slack(run.residual_norm + floor, room, chance / 2)
        high, low = min(high, float(values[-1]) + slack), max(low, float(values[0]) - slack)
    return max(high, 0.0), min(low, 0.0)


def _rayleigh_ritz(A: SymmetricOperator, known: list[Tensor], count: int) -> tuple[Floats, Tensor, Floats, int]:
    """The `count` largest Ritz values in the span of columns, vectors, residual norms, products; `known` is emptied."""
    basis = torch.cat(known, dim=1)
    known.clear()
    Q = torch.linalg.qr(basis)[0]
    del basis
    image = A @ Q
    values, S = torch.linalg.eigh(((Q.T @ image + image.T @ Q) / 2).double().cpu())
    pick = torch.argsort(values.abs(), descending=True, stable=True)[:count]
    S = S[:, pick].to(Q)
    residual = project_out(image @ S, Q)
    del image
    theta: Floats = values[pick].numpy()
    sizes: Floats = residual.double().norm(dim=0).cpu().numpy()
    return theta, Q @ S, sizes, Q.shape[1]


def _upper_bounds(theta: Floats, coupling: Floats, ends: tuple[float, float]) -> tuple[Floats, float]:
    """Bounds of the r-th largest `|lambda|` for `r <= R`, and of all others."""
    bounds: list[float] = []
    rest = 0.0
    for sign, beyond in ((1.0, ends[0]), (-1.0, -ends[1])):
        order = np.argsort(-sign * theta, kind="stable")
        values, couplings = sign * theta[order], coupling[order]
        # Of all columns from the i-th on.
        rho = np.sqrt(np.cumsum(couplings[::-1] ** 2)[::-1])
        positive = int((values > 0).sum())
        found = [_larger(values[i], rho[i], beyond) for i in range(positive)]
        bounds += found
        following = _larger(values[positive], rho[positive], beyond) if positive < values.size else beyond
        rest = max(rest, following)
    # Ritz values of exactly zero have no bound of their own.
    merged = np.sort(np.array(bounds + [rest] * (theta.size - len(bounds))))[::-1]
    return np.maximum(merged, rest), rest


def _larger(a: float, rho: float, b: float) -> float:
    """The larger eigenvalue of `[[a, rho], [rho, b]]`."""
    if not math.isfinite(b):
        return b
    return (a + b) / 2 + math.hypot((a - b) / 2, rho)


def _kept(theta: Floats) -> Floats:
    """Interlacing holds at each end of the spectrum by itself, so for magnitudes merged from both."""
    merged: Floats = np.sort(np.abs(theta))[::-1]
    return merged


def _trace_beyond(A: SymmetricOperator, known: Columns, probes: int, seed: int) -> tuple[float, float, int]:
    """The trace of `A` on the complement of orthonormal columns, its standard error, products spent."""
    g = generator(seed, stream=1)
    samples = []
    for _ in range(probes):
        v = project_out(rademacher((A.dim, 1), g, A), known)
        samples.append(float((v.double() * (A @ v).double()).sum()))
    found = np.array(samples)
    return float(found.mean()), float(found.std(ddof=1) / math.sqrt(probes)), probes


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
