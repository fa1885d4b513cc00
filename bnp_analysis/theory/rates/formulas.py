"""How fast gradient descent and heavy ball contract near a minimizer: numbers in, numbers out (T14, T15).

All eigenvalues are the *nonzero* ones of the Hessian in the variables of the iteration, `P^T Hess P`: along the null
space nothing moves, so its zeros do not slow the iteration down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from bnp_analysis.errors import InvalidInputError

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


def iterations_to(tolerance: float, factor: float) -> float:
    """Iterations until `r^k <= tolerance`, `ceil(log tolerance / log r)`.

    Returns:
        A whole number, infinite for `r >= 1`.

    Example:
        >>> iterations_to(1e-6, 0.9)
        132.0
    """
    if not 0 < tolerance <= 1:
        raise InvalidInputError(f"tolerance must be in (0, 1], got {tolerance}")
    if factor >= 1:
        return 0.0 if tolerance == 1 else math.inf
    return float(math.ceil(-math.log(tolerance) * time_constant(factor) * (1 - 1e-14)))


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
