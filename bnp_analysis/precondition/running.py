"""Running means and variances: the pure functions (T4), used where BNP trains and where its theory is checked."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from bnp_analysis.errors import InvalidInputError


@overload
def update_moments(
    mean: Tensor, var: Tensor, batch_mean: Tensor, batch_var: Tensor, rho: float | Tensor
) -> tuple[Tensor, Tensor]: ...
@overload
def update_moments(mean: float, var: float, batch_mean: float, batch_var: float, rho: float) -> tuple[float, float]: ...
def update_moments(
    mean: Tensor | float,
    var: Tensor | float,
    batch_mean: Tensor | float,
    batch_var: Tensor | float,
    rho: float | Tensor,
) -> tuple[Tensor | float, Tensor | float]:
    """The law of total variance for running statistics, exact for any `rho` and any batch size, one row included (T4).

    `mu' = rho mu + (1-rho) mu_batch`,
    `sigma'^2 = rho sigma^2 + (1-rho) sigma_batch^2 + rho (1-rho) (mu_batch - mu)^2`: mean and variance of the mixture
    of what was seen (weight `rho`) and the batch (weight `1-rho`).

    Args:
        mean, var: of what was seen before.
        batch_mean, batch_var: of the batch, the variance biased (1/R).
        rho: weight of what was seen before, a number or a value per entry.

    Returns:
        The new mean and variance.

    Example:
        >>> update_moments(0.0, 0.0, 2.0, 0.0, 0.5)
        (1.0, 1.0)
    """
    delta = batch_mean - mean
    new_var = var + (1 - rho) * ((batch_var - var) + rho * delta * delta)
    return mean + (1 - rho) * delta, new_var


def corrected_rho(rho: float, k: int) -> float:
    """The weight that step `k >= 1` gives to the past when the start is to weigh nothing, `(rho - rho^k)/(1 - rho^k)`.

    Step 1 forgets the start (0); later every batch weighs as under constant `rho`, divided by the sum of the weights.

    Raises:
        InvalidInputError: `rho` outside `[0, 1)` or `k < 1`.

    Example:
        >>> [round(corrected_rho(0.99, k), 4) for k in (1, 2, 3, 10_000)]
        [0.0, 0.4975, 0.6633, 0.99]
    """
    if not 0 <= rho < 1 or k < 1:
        raise InvalidInputError(f"0 <= rho < 1 and k >= 1 are needed, got rho={rho}, k={k}")
    return without_start(rho, rho ** (k - 1))


def without_start(rho: float, start: float) -> float:
    """The weight of the past, the start left out: `start` is the product of all earlier `rho` (T4)."""
    return rho * (1 - start) / (1 - rho * start) if start < 1 else 0.0
