"""BNP's direction on gradients: `P P^T` of one layer, in place (T3, T5)."""

from __future__ import annotations

import torch
from torch import Tensor

from bnp_analysis.precondition.bnp import damped_variance


def precondition_(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    *,
    q2: float,
    eps1: float,
    eps2: float,
) -> None:
    """Replace a layer's gradients by `P P^T` times them.

    With a bias `Gw' = (Gw - Gb mu^T)/s2/q2`, `Gb' = Gb/q2 - Gw' mu` (T3). Without one
    `Gw' = Gw (diag s2 + mu mu^T)^-1 / q2` (T5), which is diagonal where `mu = 0`.

    Args:
        weight: gradient `(n, ...)`, contiguous; changed.
        bias: gradient `(n,)`, contiguous, or None; changed.
        mean, variance: `(groups, m)`, the variance undamped.
        q2: `q^2`.
        eps1, eps2: damping.

    Example:
        >>> gw, gb = torch.tensor([[2.0]]), torch.tensor([1.0])
        >>> precondition_(gw, gb, torch.tensor([[3.0]]), torch.tensor([[4.0]]), q2=1.0, eps1=0.0, eps2=0.0)
        >>> gw.item(), gb.item()
        (-0.25, 1.75)
    """
    # Undamped variances may be zero, damped ones not, and a where per layer and step is not free.
    damped = variance + (eps1 * variance.amax() + eps2) if eps2 > 0 else damped_variance(variance, eps1, eps2)
    if bias is None:
        _without_bias_(weight, mean, damped, q2)
    elif mean.shape[0] == 1:
        w, mu = weight.view(weight.shape[0], -1), mean[0]
        w.addr_(bias, mu, alpha=-1).mul_((damped[0] * q2).reciprocal_())
        bias.addmv_(w, mu, beta=1 / q2, alpha=-1)
    else:
        groups, m = mean.shape
        w, b = weight.view(groups, -1, m), bias.view(groups, -1, 1)
        w.baddbmm_(b, mean.unsqueeze(1), alpha=-1).mul_((damped * q2).reciprocal_().unsqueeze(1))
        b.baddbmm_(w, mean.unsqueeze(2), beta=1 / q2, alpha=-1)


def _without_bias_(weight: Tensor, mean: Tensor, damped: Tensor, q2: float) -> None:
    """`Gw (diag s2 + mu mu^T)^-1 / q2`; in terms of `v = mu/sigma` nothing overflows that need not."""
    groups, m = mean.shape
    w = weight.view(groups, -1, m)
    inverse = damped.rsqrt()
    v = mean * inverse
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    u = (v / norm.clamp_min(torch.finfo(v.dtype).tiny)).unsqueeze(2)
    shrink = (norm / torch.hypot(torch.ones_like(norm), norm)).square().unsqueeze(2)
    w.mul_(inverse.unsqueeze(1))
    w.sub_((w @ u) @ (shrink * u).transpose(1, 2)).mul_((inverse / q2).unsqueeze(1))
