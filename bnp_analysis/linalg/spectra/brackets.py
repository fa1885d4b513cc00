"""How far a quadrature, and a mean over random vectors, can be from the count of eigenvalues that they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.special import betainc

from bnp_analysis.linalg.krylov.lanczos import Floats

_ROUNDING = 1e-12  # of sums of weights, in float64


@dataclass(frozen=True)
class Estimate:
    """A number from random vectors, with an interval that counts every error; unpacks as `value, error`.

    Attributes:
        value: the estimate, inside the interval.
        lower, upper: contain the truth with probability `confidence`.
        quadrature: half the width of what the quadrature leaves open for the vectors drawn: certain, and smaller with
            more steps.
        sampling: what the choice of the vectors adds to half the width: smaller with more of them.
        confidence: of the interval.

    Example:
        >>> value, error = Estimate(0.5, 0.4, 0.7, 0.05, 0.1, 0.95)
        >>> round(error, 6)
        0.2
        >>> print(Estimate(0.5, 0.4, 0.7, 0.05, 0.1, 0.95))
        0.5 (0.4 .. 0.7 at 95 %; quadrature +- 0.05, sampling +- 0.1)
    """

    value: float
    lower: float
    upper: float
    quadrature: float
    sampling: float
    confidence: float

    @property
    def error(self) -> float:
        """The distance to the farther end of the interval."""
        return max(self.upper - self.value, self.value - self.lower)

    def __iter__(self) -> Iterator[float]:
        return iter((self.value, self.error))

    def __getitem__(self, place: int) -> float:
        return (self.value, self.error)[place]

    def __str__(self) -> str:
        return (
            f"{self.value:.4g} ({self.lower:.4g} .. {self.upper:.4g} at {100 * self.confidence:.4g} %; "
            f"quadrature +- {self.quadrature:.2g}, sampling +- {self.sampling:.2g})"
        )


def christoffel(x: Floats, nodes: Floats, weights: Floats, residuals: Floats) -> Floats:
    """The Christoffel function of a Lanczos run, `1 / sum_{j <= k} p_j(x)^2` with its orthonormal polynomials.

    The measure of the start vector below `x` and the sum of the weights of the Gauss nodes below `x` differ by no more:
    both lie between the weights below `x` of the rule of `k + 1` nodes, one of them at `x`, and these with the weight
    at `x`, which is this function (Chebyshev, Markov, Stieltjes). It is computed from the rule's matrix in the basis of
    Ritz vectors, `diag(nodes)` with a border of residuals.

    Args:
        x: `(m,)` places.
        nodes, weights: `(k,)` of the Gauss rule, nodes ascending.
        residuals: `(k,)` norms of the Ritz vectors' residuals; zeros where the space is invariant: the rule is exact.

    Returns:
        `(m,)`.

    Source: Golub and Meurant 2010, chapter 6; Karlin and Studden 1966.

    Example:
        >>> two = np.array([-1.0, 1.0])
        >>> christoffel(np.array([0.0, 1e6]), two, np.array([0.5, 0.5]), np.array([0.1, 0.1])).round(3).tolist()
        [0.02, 0.0]
    """
    gaps = x[:, None] - nodes
    # At a node the function is its weight, the limit.
    gaps[gaps == 0] = np.finfo(np.float64).eps * max(float(np.abs(nodes).max()), np.finfo(np.float64).tiny)
    signs = 1.0 - 2.0 * (np.arange(nodes.size) % 2)
    ratios = residuals / gaps
    found: Floats = (ratios @ (signs * np.sqrt(weights))) ** 2 / (1 + (ratios**2).sum(axis=1))
    return found


def chance(share: Floats | float, observed: Floats, probes: int, dim: int) -> Floats:
    """The probability that a mean over random vectors is at most `observed`, where the share of eigenvalues is `share`.

    For Gaussian vectors the share of their length in an eigenspace of dimension `s` has the distribution
    `Beta(s / 2, (n - s) / 2)`, known without a variance estimated from the sample. The mean of `p` of them is in the
    convex order below `Beta(p s / 2, p (n - s) / 2)`, the distribution of the mean weighted by the vectors' lengths,
    which is taken.

    Args:
        share: between 0 and 1.
        observed: `(m,)` means, between 0 and 1.
        probes, dim: `p` and `n`.

    Returns:
        `(m,)`.

    Example:
        >>> chance(0.5, np.array([0.4, 0.5, 0.6]), 8, 400).round(4).tolist()
        [0.0, 0.5, 1.0]
    """
    size = probes * dim / 2
    a, b = np.broadcast_arrays(size * np.asarray(share), size * (1 - np.asarray(share)))
    found = betainc(np.maximum(a, 1e-300), np.maximum(b, 1e-300), np.clip(observed + _ROUNDING, 0.0, 1.0))
    return np.asarray(np.where(a <= 0, 1.0, np.where(b <= 0, observed >= 1 - _ROUNDING, found)))


def shares(lower: Floats, upper: Floats, probes: int, dim: int, confidence: float) -> tuple[Floats, Floats]:
    """Which shares of `dim` eigenvalues a mean over random vectors within `[lower, upper]` is compatible with.

    Args:
        lower, upper: `(m,)` bounds of the mean, between 0 and 1.
        probes, dim: number and length of the vectors.
        confidence: two-sided.

    Returns:
        Bounds `(m,)`.

    Source: Clopper and Pearson 1934, for this distribution.

    Example:
        >>> low, high = shares(np.array([0.5]), np.array([0.5]), 8, 400, 0.95)
        >>> (low.round(3).item(), high.round(3).item())
        (0.476, 0.524)
    """
    tail = (1 - confidence) / 2

    def most(observed: Floats) -> Floats:
        low, high = np.zeros_like(observed), np.ones_like(observed)
        for _ in range(40):
            middle = (low + high) / 2
            likely = chance(middle, observed, probes, dim) >= tail
            low, high = np.where(likely, middle, low), np.where(likely, high, middle)
        return high

    return 1 - most(1 - lower), most(upper)


def whole(least: Floats, most: Floats, dim: int) -> tuple[Floats, Floats]:
    """Bounds of shares rounded inwards to whole numbers of eigenvalues, where any is left between them."""
    low, high = np.ceil(least * dim - 1e-6) / dim, np.floor(most * dim + 1e-6) / dim
    some = low <= high
    return np.where(some, low, least), np.where(some, high, most)


__all__ = ["Estimate", "chance", "christoffel", "shares", "whole"]
