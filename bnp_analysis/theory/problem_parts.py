"""What problems with a known minimizer are made of: real inputs, margins from kinks, and the dial for `kappa*`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from bnp_analysis.data import load
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.layer_kinds import kind_of

_GRID = 49
_DECADES = 3.0


def white_digits(n: int, features: int, *, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Principal components of handwritten digits, of mean 0 and covariance the identity on these examples.

    Args:
        n: examples, more than `features`.
        features: leading components, at most 40.
        classes: only the digits `0 .. classes - 1`.
        seed: of the subset.

    Returns:
        Inputs `(n, features)` in float64 and labels `(n,)`.

    Raises:
        InvalidInputError: sizes out of range.

    Example:
        >>> x, y = white_digits(100, 5)
        >>> bool(torch.allclose(x.T @ x / 100, torch.eye(5, dtype=torch.float64)))
        True
    """
    if not 1 < classes <= 10 or not 0 < features <= 40 or not features < n:
        raise InvalidInputError(
            f"2 to 10 classes, 1 to 40 features and more examples than features are needed, got classes={classes}, "
            f"features={features}, n={n}"
        )
    data = load("digits", flatten=True, dtype=torch.float64)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    chosen = order[data.y[order] < classes][:n]
    if len(chosen) < n:
        raise InvalidInputError(f"there are {len(chosen)} training digits of these classes, not {n}")
    x = data.x[chosen]
    U, _, Vt = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    # The sign of a singular vector is the library's choice.
    signs = torch.sign(Vt.gather(1, Vt.abs().argmax(dim=1, keepdim=True)).squeeze(1))
    return (U * signs)[:, :features] * math.sqrt(n), data.y[chosen]


def small_digits(n: int, *, seed: int = 0) -> Tensor:
    """Digits averaged to 4 x 4 pixels, standardized per pixel: `(n, 1, 4, 4)` in float64.

    Example:
        >>> small_digits(20).shape
        torch.Size([20, 1, 4, 4])
    """
    x = load("digits", n=n, seed=seed, flatten=False, dtype=torch.float64).x
    x = nn.functional.avg_pool2d(x, 2)
    return (x - x.mean(dim=0)) / x.std(dim=0, correction=0).clamp_min(0.05)


def teach(model: nn.Sequential, x: Tensor, generator: torch.Generator, *, margins: bool) -> Tensor:
    """Draw a network's weights, multiples of orthogonal matrices; with `margins`, no pre-activation comes near zero.

    Each unit's (channel's) bias is moved to the middle of the widest gap among the middle half of its pre-activations:
    the unit is neither dead nor always active, and the kinks stay away from the data.

    Returns:
        The network's outputs.
    """
    layers: list[Any] = list(model)
    with torch.no_grad():
        for k, module in enumerate(layers):
            if kind_of(module) is not None:
                flat = torch.randn(module.weight.flatten(1).shape, generator=generator, dtype=x.dtype)
                U, _, Vt = torch.linalg.svd(flat, full_matrices=False)
                module.weight.copy_((math.sqrt(2) * U @ Vt).view_as(module.weight))
                module.bias.zero_()
                bends = k + 1 < len(layers) and kind_of(layers[k + 1]) is None
                if margins and bends and not isinstance(layers[k + 1], nn.Flatten):
                    a = module(x)
                    columns = a if a.ndim == 2 else a.movedim(1, -1).flatten(0, -2)
                    module.bias.copy_(-torch.stack([_gap(column) for column in columns.T]))
            x = module(x)
    return x


def _gap(values: Tensor) -> Tensor:
    """The middle of the widest gap among the middle half."""
    ordered = values.sort().values
    inner = ordered[len(ordered) // 4 : -(len(ordered) // 4)]
    widest = int(inner.diff().argmax())
    return (inner[widest] + inner[widest + 1]) / 2


def effective_condition(H: Tensor, null_dimension: int) -> float:
    """`lambda_max / lambda_min+` of a stored positive semidefinite matrix with a null space of known dimension."""
    values = torch.linalg.eigvalsh((H + H.T) / 2)
    smallest = float(values[null_dimension])
    return float(values[-1]) / smallest if smallest > 0 else math.inf


def dial(H: Tensor, null_dimension: int, exponents: Tensor, kappa: float | None) -> Tensor:
    """The change of scale `theta' = d theta` at which `kappa*(D^-1 H D^-1) = kappa` (T12).

    Args:
        H: the Hessian at a minimizer, `(n, n)`.
        null_dimension: of its null space, known.
        exponents: `e`, `(n,)`; the scales are `d = 10^(u e)` with one number `u`.
        kappa: wanted; None for `u = 0`.

    Returns:
        `d`, `(n,)`.

    Raises:
        InvalidInputError: a `kappa` that no `u` between -3 and 3 gives; says which ones do.
    """
    e = exponents
    if kappa is None:
        return torch.ones_like(e)

    def excess(u: float) -> float:
        scale = 10 ** (-u * e)
        return math.log(effective_condition(scale[:, None] * H * scale, null_dimension) / kappa)

    grid = np.linspace(-_DECADES, _DECADES, _GRID)
    values = [excess(u) for u in grid]
    best = int(np.argmin(values))
    for k in (*range(best, len(grid) - 1), *range(best - 1, -1, -1)):
        if min(values[k : k + 2]) <= 0 < max(values[k : k + 2]):
            scales: Tensor = 10 ** (brentq(excess, grid[k], grid[k + 1], xtol=1e-13) * e)
            return scales
    low, high = (kappa * math.exp(v) for v in (min(values), max(values)))
    raise InvalidInputError(f"this network reaches kappa* from {low:.3g} to {high:.3g} with this dial, not {kappa:g}")
