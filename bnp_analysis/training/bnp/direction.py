"""BNP's direction on gradients: `P P^T` of one layer, in place (T3, T5)."""

from __future__ import annotations

import torch
from torch import Tensor


def with_bias_(weight: Tensor, bias: Tensor, mean: Tensor, damped: Tensor, q2: float) -> None:
    """`Gw' = (Gw - Gb mu^T)/s2/q2`, `Gb' = Gb/q2 - Gw' mu`, in place (T3).

    Args:
        weight: gradient `(n, ...)`, contiguous; changed.
        bias: gradient `(n,)`; changed.
        mean: `mu`, `(m,)`, or `(groups, m)` of several.
        damped: `s2`, like the mean.
        q2: `q^2`.

    Example:
        >>> gw, gb = torch.tensor([[2.0]]), torch.tensor([1.0])
        >>> with_bias_(gw, gb, torch.tensor([3.0]), torch.tensor([4.0]), 1.0)
        >>> gw.item(), gb.item()
        (-0.25, 1.75)
    """
    scale = 1 / q2
    # The fewest passes over the weights: on CPU each is a good part of the cost of a step.
    if mean.ndim == 1:
        w = weight if weight.ndim == 2 else weight.view(weight.shape[0], -1)
        w.addr_(bias, mean, beta=scale, alpha=-scale).div_(damped)
        bias.addmv_(w, mean, beta=scale, alpha=-1)
        return
    groups, m = mean.shape
    w, b = weight.view(groups, -1, m), bias.view(groups, -1, 1)
    w.baddbmm_(b, mean.unsqueeze(1), beta=scale, alpha=-scale).div_(damped.unsqueeze(1))
    b.baddbmm_(w, mean.unsqueeze(2), beta=scale, alpha=-1)


def without_bias_(weight: Tensor, mean: Tensor, damped: Tensor, q2: float) -> None:
    """`Gw' = Gw (diag s2 + mu mu^T)^-1 / q2`, in place; diagonal where `mu = 0` (T5).

    Args:
        weight: gradient `(n, ...)`, contiguous; changed.
        mean: `mu`, `(m,)`, or `(groups, m)` of several.
        damped: `s2`, like the mean.
        q2: `q^2`.

    Example:
        >>> gw = torch.tensor([[26.0]])
        >>> without_bias_(gw, torch.tensor([3.0]), torch.tensor([4.0]), 1.0)
        >>> round(gw.item(), 5)
        2.0
    """
    if mean.ndim == 1:
        mean, damped = mean.unsqueeze(0), damped.unsqueeze(0)
    w = weight.view(mean.shape[0], -1, mean.shape[1])
    # In terms of v = mu/sigma nothing overflows that need not.
    inverse = damped.rsqrt()
    v = mean * inverse
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    u = (v / norm.clamp_min(torch.finfo(v.dtype).tiny)).unsqueeze(2)
    shrink = (norm / torch.hypot(torch.ones_like(norm), norm)).square().unsqueeze(2)
    w.mul_(inverse.unsqueeze(1))
    w.sub_((w @ u) @ (shrink * u).transpose(1, 2)).mul_((inverse / q2).unsqueeze(1))


def divide_units_(weight: Tensor, bias: Tensor | None, squares: Tensor) -> None:
    """Each unit's part divided by its `s_i^2`, in place (T10).

    Example:
        >>> gw, gb = torch.ones(2, 3), torch.ones(2)
        >>> divide_units_(gw, gb, torch.tensor([1.0, 4.0])); gw.sum().item(), gb.tolist()
        (3.75, [1.0, 0.25])
    """
    s2 = squares.to(weight)
    weight.view(s2.numel(), -1).div_(s2.unsqueeze(1))
    if bias is not None:
        bias.div_(s2)
