"""How fast gradient descent and heavy ball contract near a minimizer: predicted, and fitted to a run (T14, T15).

Numbers in, numbers out. All eigenvalues are the *nonzero* ones of the Hessian in the variables of the iteration,
`P^T Hess P`: along the null space nothing moves, so its zeros do not slow the iteration down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.results import Result

Values = Tensor | npt.NDArray[np.float64] | Sequence[float]


class HeavyBall(NamedTuple):
    """Step size `alpha` and momentum `beta` of `theta_(k+1) = theta_k - alpha grad + beta (theta_k - theta_(k-1))`."""

    step: float
    momentum: float


def contraction_factor(eigenvalues: Values, step: float) -> float:
    """The asymptotic factor of gradient descent, `r(alpha) = max_i |1 - alpha lambda_i|` over nonzero eigenvalues.

    Args:
        eigenvalues: the nonzero ones, all positive, in any order.
        step: `alpha > 0`.

    Returns:
        The factor; 1 or more means that the iteration does not converge.

    Raises:
        InvalidInputError: no eigenvalue, one that is not positive and finite, or such a step.

    Source: T14.

    Example:
        >>> contraction_factor([4.0, 1.0], 0.25)
        0.75
    """
    values = positive(eigenvalues)
    return float(np.abs(1 - _positive_number(step, "step") * values).max())


def best_step(largest: float, smallest: float) -> float:
    """The step at which gradient descent contracts fastest, `alpha = 2 / (lambda_max + lambda_min+)`.

    Example:
        >>> best_step(4.0, 1.0)
        0.4
    """
    largest, smallest = _ends(largest, smallest)
    return 2 / (largest + smallest)


def best_factor(kappa: float) -> float:
    """The factor at the best step, `r = (kappa* - 1) / (kappa* + 1)`.

    Example:
        >>> best_factor(4.0)
        0.6
    """
    return (_condition(kappa) - 1) / (kappa + 1)


def best_heavy_ball(largest: float, smallest: float) -> HeavyBall:
    """The best step and momentum: `alpha = (2/(sqrt lambda_max + sqrt lambda_min+))^2`, `beta = r^2`.

    There `r = (sqrt kappa* - 1)/(sqrt kappa* + 1)`, both ends of the spectrum have a double root, and the decay is
    `k r^k`.

    Example:
        >>> best_heavy_ball(9.0, 1.0)
        HeavyBall(step=0.25, momentum=0.25)
    """
    largest, smallest = _ends(largest, smallest)
    high, low = math.sqrt(largest), math.sqrt(smallest)
    return HeavyBall((2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2)


def best_heavy_ball_factor(kappa: float) -> float:
    """The factor of heavy ball at its optimum, `(sqrt kappa* - 1) / (sqrt kappa* + 1)`.

    Example:
        >>> best_heavy_ball_factor(9.0)
        0.5
    """
    return best_factor(math.sqrt(_condition(kappa)))


def heavy_ball_factor(eigenvalues: Values, step: float, momentum: float) -> float:
    """The asymptotic factor of heavy ball at any step and momentum.

    The largest modulus of a root of `x^2 - (1 + beta - alpha lambda) x + beta` over the nonzero eigenvalues:
    `sqrt beta` where `(1 + beta - alpha lambda)^2 <= 4 beta`, else
    `(|1 + beta - alpha lambda| + sqrt((1 + beta - alpha lambda)^2 - 4 beta)) / 2`.

    Args:
        eigenvalues: the nonzero ones, all positive.
        step: `alpha > 0`.
        momentum: `0 <= beta < 1`; 0 is gradient descent.

    Raises:
        InvalidInputError: see `contraction_factor`; a momentum outside `[0, 1)`.

    Source: T14.

    Example:
        >>> heavy_ball_factor([9.0, 1.0], 0.25, 0.25)
        0.5
    """
    values = positive(eigenvalues)
    beta = check_momentum(momentum)
    trace = np.abs(1 + beta - _positive_number(step, "step") * values)
    excess = trace**2 - 4 * beta
    roots = np.where(excess <= 0, math.sqrt(beta), (trace + np.sqrt(np.maximum(excess, 0))) / 2)
    return float(roots.max())


def joint_spectrum(eigenvalues: Values, step: float, rho: float) -> npt.NDArray[np.float64]:
    """The eigenvalues of full-batch BNP with running statistics, `{1 - alpha lambda_i} u {rho}`, by magnitude.

    The map of parameters and statistics is block triangular at a minimizer, since the preconditioner multiplies a
    gradient that vanishes there: the parameters keep the factor of the limit preconditioner even if `rho` is larger.

    Args:
        eigenvalues: the nonzero ones of `P^T Hess P` with the preconditioner of the limit statistics.
        step: `alpha > 0`.
        rho: `0 <= rho < 1`, the weight of the past in the statistics.

    Returns:
        The distinct values in descending magnitude, `rho` once for all statistics.

    Source: T15.

    Example:
        >>> joint_spectrum([4.0, 1.0], 0.25, 0.9)
        array([0.9 , 0.75, 0.  ])
    """
    if not 0 <= rho < 1:
        raise InvalidInputError(f"rho must be in [0, 1), got {rho}")
    values = 1 - _positive_number(step, "step") * positive(eigenvalues)
    values = np.unique(np.append(values, rho))
    return values[np.argsort(-np.abs(values), kind="stable")]


def time_constant(factor: float) -> float:
    """Iterations in which an error that contracts by `r` falls by the factor `e`: `-1 / log r`.

    Returns:
        The number, infinite for `r >= 1`, 0 for `r = 0`.

    Example:
        >>> round(time_constant(0.9), 4)
        9.4912
    """
    if not factor >= 0:
        raise InvalidInputError(f"a contraction factor is not negative, got {factor}")
    if factor >= 1:
        return math.inf
    return 0.0 if factor == 0 else -1 / math.log(factor)


def check_momentum(momentum: float) -> float:
    """Refuse a momentum outside `[0, 1)`."""
    if not 0 <= momentum < 1:
        raise InvalidInputError(f"momentum must be in [0, 1), got {momentum}")
    return float(momentum)


def positive(eigenvalues: Values) -> npt.NDArray[np.float64]:
    """The values as a flat array, refused unless all are positive and finite."""
    given: Any = eigenvalues.detach().cpu() if isinstance(eigenvalues, Tensor) else eigenvalues
    values = np.asarray(given, dtype=np.float64).reshape(-1)
    if not values.size or not bool(np.isfinite(values).all()) or not bool((values > 0).all()):
        raise InvalidInputError(
            f"the nonzero eigenvalues must be positive and finite, got {values.size} of them"
            + (f" from {values.min():.3g} to {values.max():.3g}" if values.size else "")
            + "; zeros belong to the null space, and a negative one means that the point is no minimizer"
        )
    return values


def _positive_number(value: float, name: str) -> float:
    if not 0 < value < math.inf:
        raise InvalidInputError(f"{name} must be positive and finite, got {value}")
    return float(value)


def _ends(largest: float, smallest: float) -> tuple[float, float]:
    if not 0 < smallest <= largest < math.inf:
        raise InvalidInputError(f"0 < smallest <= largest is needed, got {smallest} and {largest}")
    return float(largest), float(smallest)


def _condition(kappa: float) -> float:
    if not 1 <= kappa < math.inf:
        raise InvalidInputError(f"a condition number is at least 1 and finite, got {kappa}")
    return float(kappa)


RULE = (
    "least squares through log|grad| over the second half of the iterations above the rounding floor, minus log k "
    "where the decay is k r^k; 95 % interval from the slopes of 8 consecutive blocks"
)
_BLOCKS = 8
_SAMPLES = 400


@dataclass(frozen=True, kw_only=True, repr=False)
class RateFit(Result):
    """What the tail of a run says about its contraction factor.

    Attributes:
        factor: `r`.
        time_constant: `-1/log r`, infinite where nothing falls.
        low, high: 95 % interval of the time constant; `high` is infinite where the slopes do not exclude it.
        drift: `|slope of the second half / slope of the first half - 1|` of the tail: small in a straight tail.
        first, last: iterations of the tail, `last` excluded.
        e_folds: by how many factors of `e` the norm falls over the tail.
        power: 1 for `k r^k`, else 0.
        rule: how it was fitted.
    """

    factor: float
    time_constant: float
    low: float
    high: float
    drift: float
    first: int
    last: int
    e_folds: float
    power: int = 0
    rule: str = RULE

    @property
    def half_width(self) -> float:
        """Of the interval, relative to the time constant."""
        return max(self.high - self.time_constant, self.time_constant - self.low) / self.time_constant

    def summary(self) -> str:
        """The factor, its time constant and the interval."""
        return (
            f"r = {self.factor:.8g}, -1/log r = {self.time_constant:.5g} ({self.low:.5g} .. {self.high:.5g}), "
            f"iterations {self.first} to {self.last}, {self.e_folds:.1f} e-folds"
        )


def fit_rate(norms: Values, *, floor: float = 0.0, power: int = 0) -> RateFit:
    """Fit `|g_k| ~ C r^k`, or `C k r^k`, to the tail of a run.

    The rule: of the iterations before the norm first falls to `floor`, the second half; a straight line by least
    squares through `log|g_k|` (minus `log k` for `power=1`). The interval is that of a mean of 8 slopes of
    consecutive blocks, which does not pretend that neighbouring iterations are independent.

    Args:
        norms: `(n,)`, one per iteration.
        floor: at and below it rounding decides.
        power: 1 where a double root makes the decay `k r^k`.

    Returns:
        A `RateFit`.

    Raises:
        InvalidInputError: fewer than 32 iterations above the floor, or norms there that are no numbers.

    Source: T14.

    Example:
        >>> fit = fit_rate([0.9**k for k in range(100)])
        >>> round(fit.factor, 10), round(fit.time_constant, 4), fit.first
        (0.9, 9.4912, 50)
    """
    if power not in (0, 1):
        raise InvalidInputError(f"power must be 0 or 1, got {power}")
    given = np.asarray(norms.detach().cpu() if isinstance(norms, Tensor) else norms, dtype=np.float64)
    below = np.flatnonzero(given <= floor)
    last = int(below[0]) if below.size else given.size
    first = last // 2
    if last - first < 2 * _BLOCKS:
        raise InvalidInputError(
            f"{last} iterations above the rounding floor {floor:.2g} are too few to fit; 32 are needed"
        )
    values = positive(given[:last])
    k = np.arange(first, last, dtype=np.float64)
    y = np.log(values[first:last])
    y -= power * np.log(k)
    slope = _slope(k, y)
    blocks = np.array([_slope(a, b) for a, b in zip(*(np.array_split(v, _BLOCKS) for v in (k, y)), strict=True)])
    # Here, since it takes longer to import than all else together.
    from scipy.stats import t as student

    spread = float(student.ppf(0.975, _BLOCKS - 1) * blocks.std(ddof=1) / math.sqrt(_BLOCKS))
    half = len(k) // 2
    early, late = _slope(k[:half], y[:half]), _slope(k[half:], y[half:])
    return RateFit(
        factor=math.exp(slope),
        time_constant=_constant(slope),
        low=_constant(slope - spread),
        high=_constant(slope + spread),
        drift=abs(late / early - 1) if early else math.inf,
        first=first,
        last=last,
        e_folds=float(np.log(values[first] / values[last - 1])),
        power=power,
    )


def expected_bias(eigenvalues: Values, step: float, momentum: float, *, first: int, last: int, power: int = 0) -> float:
    """How far the fit would be off if every mode of the spectrum took part equally: is the run long enough?

    On a quadratic with these eigenvalues, started with equal gradients in all modes, the norms at the iterations of the
    tail are fitted by the same rule and compared with the asymptotic factor. Modes that are nearly as slow as the
    slowest make it large; then a fitted slope decides nothing. It judges the length of a run and is no observation.

    Args:
        eigenvalues: the nonzero ones.
        step, momentum: of the iteration; momentum 0 for gradient descent.
        first, last: the tail.
        power: as in `fit_rate`.

    Returns:
        `|fitted / asymptotic - 1|` of the time constants.

    Example:
        >>> expected_bias([4.0, 1.0], 0.4, 0.0, first=50, last=100) < 1e-6
        True
    """
    values, beta = positive(eigenvalues), check_momentum(momentum)
    k = np.unique(np.linspace(first, last - 1, _SAMPLES).astype(np.int64))
    # (e_(k+1), e_k) = M (e_k, e_(k-1)) for every mode, over the asymptotic factor r; started at rest, e_(-1) = e_0.
    M = np.zeros((len(values), 2, 2))
    M[:, 0, 0], M[:, 0, 1], M[:, 1, 0] = 1 + beta - step * values, -beta, 1
    r = heavy_ball_factor(values, step, beta)
    if r == 0:
        return 0.0
    gaps = np.diff(k, prepend=0)
    powers = {int(gap): np.linalg.matrix_power(M / r, int(gap)) for gap in set(gaps)}
    e, norms = np.ones((len(values), 2, 1)), []
    for gap in gaps:
        e = powers[int(gap)] @ e
        norms.append(np.linalg.norm(e[:, 0]))
    trace = np.log(np.maximum(norms, np.finfo(np.float64).tiny))
    slope = _slope(k.astype(np.float64), trace - power * np.log(np.maximum(k, 1)))
    shift = math.log(r)
    return abs(shift / (shift + slope) - 1) if shift + slope < 0 else math.inf


def _slope(k: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    centred = k - k.mean()
    return float(centred @ (y - y.mean()) / (centred @ centred))


def _constant(slope: float) -> float:
    return -1 / slope if slope < 0 else math.inf
