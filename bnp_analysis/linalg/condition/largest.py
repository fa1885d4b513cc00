"""The largest eigenvalues in magnitude from Lanczos runs, each with an interval that holds for its own rank (T13)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.linalg.bases import project_out
from bnp_analysis.linalg.condition.certificates import invariance_slack, kuczynski_wozniakowski, no_magnitudes
from bnp_analysis.linalg.condition.number import Magnitudes
from bnp_analysis.linalg.krylov.lanczos import Floats, Tridiagonalization, lanczos, tridiagonal_eigh
from bnp_analysis.linalg.matrices import Columns, beside
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.runtime.progress import Progress
from bnp_analysis.runtime.random import generator, rademacher

# Searches from new random vectors that may add what the first has missed.
_ROUNDS = 3
# Eigenvalues that they are expected to add, and vectors beside those of a basis, both where memory is asked for.
_MISSED, _BESIDE = 10, 11


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
