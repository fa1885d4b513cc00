"""The condition profile: how the ratio of the largest eigenvalue to the r-th grows with r, as intervals (T13)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.bases import project_out
from bnp_analysis.linalg.condition.certificates import (
    invariance_slack,
    kuczynski_wozniakowski,
    require_probability,
    unexplained_zeros,
    zero_operator,
)
from bnp_analysis.linalg.condition.dense import spectrum
from bnp_analysis.linalg.condition.factor_svd import singular_values
from bnp_analysis.linalg.condition.lanczos import conditioned
from bnp_analysis.linalg.condition.methods import Problem, choose_method
from bnp_analysis.linalg.krylov.lanczos import Floats, Tridiagonalization, lanczos, tridiagonal_eigh
from bnp_analysis.linalg.operators import SymmetricOperator, computed_in
from bnp_analysis.linalg.preconditioner import Preconditioner, check_fits
from bnp_analysis.linalg.scale import exponent, in_floats
from bnp_analysis.linalg.spectra.checks import products_known_to, provenance, require_operator
from bnp_analysis.linalg.spectra.null import HasBasis, read_null
from bnp_analysis.results import Result
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.progress import Progress
from bnp_analysis.runtime.random import generator, rademacher

METHODS = ("auto", "factor-svd", "dense", "lanczos")
_LADDER = (2, 5, 10, 20, 50, 100, 200, 500)
# Ranks that Lanczos goes up to unless told otherwise.
_DEFAULT = 100
# A rung whose eigenvalue is known to no better than this factor is left out.
_KNOWN = 2.0
# Searches from new random vectors that may add what the first has missed.
_ROUNDS = 3


@dataclass(frozen=True, kw_only=True, repr=False)
class ConditionProfile(Result):
    """The ratios `lambda_1 / lambda_r` of a matrix for a ladder of ranks `r`, each an interval.

    Attributes:
        ranks: `(k,)` int64, ascending; a rung whose eigenvalue is not known to within a factor of 2 is left out.
        value, lower, upper: `(k,)` float64, the ratio at each rank and bounds that hold for that very rank.
        lambda_max, lambda_max_lower, lambda_max_upper: the largest `|lambda|` and its bounds.
        rank: the number of nonzero eigenvalues where it is certain, so that the last rung is `kappa*`; else None.
        effective_rank, effective_rank_error: `trace / lambda_1`, and its standard error (0 for a dense matrix).
        thresholds: `(t,)` float64, fractions of `lambda_1`.
        at_least, at_most: `(t,)` int64, bounds of the number of eigenvalues whose size is at least that fraction of
            `lambda_1`; `at_most` is the dimension where no bound is known.
        negative: how many of the eigenvalues looked at are negative; the ratios are then those of magnitudes.
        method: `"factor-svd"`, `"dense"` or `"lanczos"`.
        failure_probability: of all bounds together, over random starts; 0 for a dense matrix.
        dim, dtype, stop: size, precision of the products, why the run ended.
    """

    ranks: NDArray[np.int64]
    value: Floats
    lower: Floats
    upper: Floats
    lambda_max: float
    lambda_max_lower: float
    lambda_max_upper: float
    rank: int | None
    effective_rank: float
    effective_rank_error: float
    thresholds: Floats
    at_least: NDArray[np.int64]
    at_most: NDArray[np.int64]
    negative: int
    method: str
    failure_probability: float
    dim: int
    dtype: str
    stop: str

    def summary(self) -> str:
        """One line: three rungs, the effective rank, how it is known."""
        name = "|lambda|_1/|lambda|_r" if self.negative else "lambda_1/lambda_r"
        chosen = sorted({0, (len(self.ranks) - 1) // 2, len(self.ranks) - 1}) if len(self.ranks) else []
        rungs = ", ".join(
            f"{self.value[i]:.4g} ({self.lower[i]:.4g} .. {self.upper[i]:.4g}) at rank {self.ranks[i]}" for i in chosen
        )
        last = " = kappa*" if self.rank is not None and len(self.ranks) and self.ranks[-1] == self.rank else ""
        error = f" +- {self.effective_rank_error:.2g}" if self.effective_rank_error else ""
        chance = f", fails with probability <= {self.failure_probability:g}" if self.failure_probability else ""
        return (
            f"{name} = {rungs or 'not known at any rank'}{last}; effective rank {self.effective_rank:.4g}{error}; "
            f"{self.method} {self.dtype}, {self.matvecs} products{products_known_to(self)}{chance}"
        )

    def records(self) -> list[dict[str, object]]:
        """One row per rank."""
        columns = zip(self.ranks.tolist(), self.value, self.lower, self.upper, strict=True)
        return [{"rank": r, "value": float(v), "lower": float(a), "upper": float(b)} for r, v, a, b in columns]


@full_float32
def condition_profile(
    A: SymmetricOperator,
    *,
    preconditioner: Preconditioner | None = None,
    null: Tensor | HasBasis | None = None,
    ranks: Sequence[int] | None = None,
    steps: int | None = None,
    method: str = "auto",
    thresholds: Sequence[float] = (1e-2, 1e-4, 1e-6),
    probes: int = 16,
    failure_probability: float = 1e-3,
    seed: int = 0,
    progress: Progress = False,
) -> ConditionProfile:
    """The ratios `lambda_1 / lambda_r` of `P^T A P` for a ladder of ranks `r`, each with bounds, at any size.

    The last ratio of all, `kappa*`, is often beyond double precision, and out of reach of a Krylov method; how the
    ratio grows with the rank is neither. For an indefinite operator the ratios are those of magnitudes.

    Args:
        A: symmetric operator on `R^n`.
        preconditioner: `P` with `theta = P z`; the operator measured is `P^T A P`.
        null: known null directions in the coordinates of `A`; zero eigenvalues are no rungs in any case, declared ones
            need not be found.
        ranks: the ladder, integers from 2 to `n`; default 2, 5, 10, 20, 50, 100 with Lanczos, up to the rank of a dense
            matrix.
        steps: of Lanczos, default three for each rank, at least 100.
        method: `"auto"`: a dense matrix where `condition_number` would take one, else Lanczos. Or `"factor-svd"`,
            `"dense"`, `"lanczos"`.
        thresholds: fractions of `lambda_1` for which eigenvalues are counted.
        probes: random vectors for the part of the trace that Lanczos has not resolved, at least 2.
        failure_probability: of all bounds together, where they rest on random starts.
        seed: of the random starts.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `ConditionProfile`. Rungs that are not reached are left out.

    Raises:
        InvalidInputError: ranks or thresholds that do not fit, an unknown method, a zero operator; NullSpaceError,
        NonFiniteError, MemoryLimitError: as for `condition_number`.

    Source: T13; Cauchy's interlacing and the theorem of Courant and Fischer; Kuczynski and Wozniakowski 1992.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(0.5 ** torch.arange(40, dtype=torch.float64)))
        >>> profile = bnp.condition_profile(A, ranks=[2, 3, 11], method="lanczos")
        >>> [round(x, 6) for x in profile.value.tolist()]
        [2.0, 4.0, 1024.0]
        >>> bool((profile.lower <= profile.value).all() and (profile.value <= profile.upper).all())
        True
    """
    require_operator(A)
    require_probability(failure_probability)
    if method not in METHODS:
        raise InvalidInputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if probes < 2:
        raise InvalidInputError(f"an error bar needs at least two probes, got {probes}")
    if not isinstance(thresholds, Iterable) or not all(0 < t <= 1 for t in thresholds):
        raise InvalidInputError(f"thresholds are fractions of the largest eigenvalue, in (0, 1], got {thresholds}")
    if preconditioner is not None:
        check_fits(A, preconditioner)
    began = time.perf_counter()
    wanted = _ladder(ranks, A.dim)
    chosen = choose_method(A) if method == "auto" else method
    problem = Problem(
        A=A,
        P=preconditioner,
        null=read_null(null, A),
        steps=steps,
        failure_probability=failure_probability,
        seed=seed,
        progress=progress,
    )
    if chosen == "lanczos":
        count = min(max(wanted or [_DEFAULT]), A.dim - problem.null.dim)
        problem = dataclasses.replace(problem, steps=max(100, 3 * count) if steps is None else steps).scaled()
        operator, basis, noise, spent = conditioned(problem)
        found = krylov_magnitudes(
            operator,
            basis,
            count,
            steps=problem.krylov_steps,
            noise=noise,
            failure_probability=failure_probability,
            probes=probes,
            seed=seed,
            progress=progress,
        )
        found = dataclasses.replace(found, matvecs=found.matvecs + spent)
        power = -exponent(operator)
    else:
        found, power = dense_magnitudes(problem, chosen)
    if not found.value.size or not found.lower[0] > 0:
        raise zero_operator(A)
    return _profile(
        found,
        wanted,
        power,
        thresholds=np.array(sorted(thresholds, reverse=True)),
        method=chosen,
        dim=A.dim,
        dtype=computed_in(A),
        **provenance(
            A,
            preconditioner,
            {"ranks": ranks and list(ranks), "steps": steps, "method": method, "probes": probes}
            | {"failure_probability": failure_probability},
            seed,
            began,
        ),
    )


def _ladder(ranks: Sequence[int] | None, dim: int) -> list[int]:
    if ranks is None:
        return []
    if not isinstance(ranks, Iterable):
        raise InvalidInputError(f"ranks must be several integers, got {ranks!r}; for one rank give ranks=[{ranks}]")
    ranks = list(ranks)
    wrong = [r for r in ranks if isinstance(r, bool) or not isinstance(r, int | np.integer) or not 2 <= r <= dim]
    if wrong or not ranks:
        raise InvalidInputError(
            f"ranks must be integers from 2 to the dimension {dim}, got {wrong or 'none'}; leave them out for a ladder"
        )
    return sorted({int(r) for r in ranks})


def _profile(found: Magnitudes, wanted: list[int], power: int, *, thresholds: Floats, **about: Any) -> ConditionProfile:
    reached = np.flatnonzero((found.lower > 0) & (found.upper <= _KNOWN * found.lower)) + 1
    ladder = wanted or [*_LADDER, *(10**k * m for k in range(3, 8) for m in (1, 2, 5))]
    if found.rank is not None and not wanted:
        ladder = [*(r for r in ladder if r < found.rank), found.rank]
    known = set(reached.tolist())
    ranks = np.array([r for r in ladder if r in known and r > 1], dtype=np.int64)
    top, bottom, first = found.upper[0], found.lower[0], found.value[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        lower = np.maximum(bottom / found.upper[ranks - 1], 1.0)
        upper = top / found.lower[ranks - 1]
        value = np.clip(first / found.value[ranks - 1], lower, upper)
    sure = [int((found.lower >= t * top).sum()) for t in thresholds]
    most = [int((found.upper >= t * bottom).sum()) if found.rest < t * bottom else about["dim"] for t in thresholds]
    return ConditionProfile(
        ranks=ranks,
        value=value,
        lower=lower,
        upper=upper,
        lambda_max=in_floats(float(first), power, "the largest eigenvalue"),
        lambda_max_lower=in_floats(float(bottom), power, "the largest eigenvalue"),
        lambda_max_upper=in_floats(float(top), power, "the largest eigenvalue"),
        rank=found.rank,
        effective_rank=found.trace / float(first),
        effective_rank_error=found.trace_error / float(first),
        thresholds=thresholds,
        at_least=np.array(sure, dtype=np.int64),
        at_most=np.array(most, dtype=np.int64),
        negative=found.negative,
        failure_probability=found.failure_probability,
        stop=found.stop,
        matvecs=found.matvecs,
        **about,
    )


@dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """The largest `|lambda|`, descending: estimates, each with an interval that holds for its own rank.

    Attributes:
        value, lower, upper: `(R,)` float64.
        rest: no other eigenvalue is larger.
        rank: how many eigenvalues are nonzero, where that is certain.
        trace, trace_error: of the whole matrix, with a standard error that is 0 where all eigenvalues are known.
        negative: how many of them belong to negative eigenvalues.
    """

    value: Floats
    lower: Floats
    upper: Floats
    rest: float
    rank: int | None
    trace: float
    trace_error: float
    negative: int
    matvecs: int
    failure_probability: float = 0.0
    stop: str = "done"


def dense_magnitudes(problem: Problem, method: str) -> tuple[Magnitudes, int]:
    """All `|lambda|` of a dense matrix within the radius of its rounding, and the power of two that they lack.

    Weyl's theorem bounds each value by itself, so a radius of singular values or eigenvalues holds at every rank.
    """
    if method == "factor-svd":
        F = singular_values(problem)
        if F is None:
            return _nothing(0), 0
        sigma, radius, power, spent = F.values, F.radius, -2 * F.exponent, F.matvecs
        low, high, signed, unit = np.maximum(sigma - radius, 0.0) ** 2, (sigma + radius) ** 2, sigma**2, F.scale**2
        structural, negative, resolved, least = F.structural, 0, int((sigma > radius).sum()), radius**2
    else:
        S = spectrum(problem)
        if S is None:
            return _nothing(0), 0
        signed, radius, power, spent = S.values[np.argsort(-np.abs(S.values))], S.radius, -S.exponent, S.matvecs
        low, high, unit = np.maximum(np.abs(signed) - radius, 0.0), np.abs(signed) + radius, S.scale
        structural, negative, resolved = S.structural, int((signed < -radius).sum()), int((low > 0).sum())
        least = radius
    unresolved, on_word = unexplained_zeros(resolved, structural, problem.null, problem.A)
    return Magnitudes(
        value=np.abs(signed) * unit,
        lower=low * unit,
        upper=high * unit,
        rest=least * unit,
        rank=None if unresolved or on_word else resolved,
        trace=float(signed.sum()) * unit,
        trace_error=0.0,
        negative=negative,
        matvecs=spent,
    ), power


def _nothing(matvecs: int) -> Magnitudes:
    """Of the zero matrix."""
    none = np.zeros(0)
    return Magnitudes(
        value=none, lower=none, upper=none, rest=0.0, rank=0, trace=0.0, trace_error=0.0, negative=0, matvecs=matvecs
    )


def krylov_magnitudes(
    A: SymmetricOperator,
    null: Tensor,
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
    values, vectors = run.ritz()[0], run.ritz_vectors()
    last = tridiagonal_eigh(run.alpha, run.beta)[1][-1]
    scale = float(np.abs(values).max())
    if scale == 0.0:
        return _nothing(run.matvecs)
    pick = np.argsort(-np.abs(values), kind="stable")[:count]
    theta, Y = values[pick], vectors[:, torch.from_numpy(pick.copy()).to(vectors.device)]
    coupling: Floats = run.residual_norm * np.abs(last[pick])
    spent, floor = run.matvecs, noise * scale
    chance = failure_probability / _ROUNDS
    ends = (math.inf, -math.inf)
    for turn in range(1, _ROUNDS + 1):
        room = A.dim - null.shape[1] - Y.shape[1]
        if room == 0 or run.stop == "interrupted":
            ends = (0.0, 0.0) if room == 0 else ends
            break
        beyond = lanczos(A, min(_certifying(A.dim), room), seed=seed + turn, null=torch.cat([null, Y], dim=1))
        spent += beyond.matvecs
        ends = _ends(beyond, room, chance, floor)
        found = beyond.ritz()[0]
        missed = np.abs(found) > (np.abs(theta).min() + floor if Y.shape[1] == count else floor)
        if beyond.stop == "interrupted" or not missed.any() or turn == _ROUNDS:
            break
        more = beyond.ritz_vectors()[:, torch.from_numpy(missed).to(Y.device)]
        theta, Y, coupling, products = _rayleigh_ritz(A, torch.cat([Y, more], dim=1), count)
        spent += products
    trace, error = float(theta.sum()), 0.0
    if room:
        rest, error, products = _trace_beyond(A, torch.cat([null, Y], dim=1), probes, seed)
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
        stop=run.stop,
    )


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


def _rayleigh_ritz(A: SymmetricOperator, basis: Tensor, count: int) -> tuple[Floats, Tensor, Floats, int]:
    """The `count` largest Ritz values in the span of orthonormal columns, vectors, residual norms, products spent."""
    Q = torch.linalg.qr(basis)[0]
    image = A @ Q
    values, S = torch.linalg.eigh(((Q.T @ image + image.T @ Q) / 2).double().cpu())
    pick = torch.argsort(values.abs(), descending=True, stable=True)[:count]
    S = S[:, pick].to(Q)
    Y, residual = Q @ S, project_out(image @ S, Q)
    theta: Floats = values[pick].numpy()
    sizes: Floats = residual.double().norm(dim=0).cpu().numpy()
    return theta, Y, sizes, Q.shape[1]


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


def _trace_beyond(A: SymmetricOperator, known: Tensor, probes: int, seed: int) -> tuple[float, float, int]:
    """The trace of `A` on the complement of orthonormal columns, its standard error, products spent."""
    g = generator(seed, stream=1)
    samples = []
    for _ in range(probes):
        v = project_out(rademacher((A.dim, 1), g, known), known)
        samples.append(float((v.double() * (A @ v).double()).sum()))
    found = np.array(samples)
    return float(found.mean()), float(found.std(ddof=1) / math.sqrt(probes)), probes
