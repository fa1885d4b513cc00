"""The measured scale `q^2` of a layer while it trains (T8)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bnp_analysis.network.layers import Layer, rows

_POWER_STEPS = 5


class MeasuredScale:
    """`|G^|^2 / R` of the rows of a step, by power steps that continue from the last ones (T8)."""

    def __init__(self) -> None:
        self.vector: Tensor | None = None

    def __call__(self, layer: Layer, inputs: Sequence[Tensor], mean: Tensor, s2: Tensor) -> float:
        """The largest over the groups, for inputs normalized by the mean and the damped variance."""
        mean, s2 = (t.view(layer.groups, -1) for t in (mean, s2))
        v = mean / s2.sqrt()
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        u = v / norm.clamp_min(torch.finfo(v.dtype).tiny)
        shrink = 1 - 1 / torch.hypot(torch.ones_like(norm), norm)
        parts = []
        for h in inputs:
            g = rows(layer, h.to(mean.dtype))
            if layer.bias is not None:
                g = torch.cat([(g - mean) / s2.sqrt(), g.new_ones(*g.shape[:2], 1)], dim=2)
            else:
                g = g / s2.sqrt()
                g = g - shrink * u * (g * u).sum(dim=2, keepdim=True)
            parts.append(g.transpose(0, 1))
        G = torch.cat(parts, dim=1)
        count = torch.tensor(float(G.shape[1]), dtype=G.dtype, device=G.device)
        _reduce(count)
        return self._iterate(G, count)

    def _iterate(self, G: Tensor, count: Tensor) -> float:
        x = self.vector
        if x is None or x.shape != (G.shape[0], G.shape[2], 1):
            x = G.new_ones(G.shape[0], G.shape[2], 1)
        # A little of everything, so that a start orthogonal to the new leading direction is left again.
        x = x.to(G) + 1e-3 * torch.cos(torch.arange(G.shape[2], dtype=G.dtype, device=G.device)).view(1, -1, 1)
        size = x.new_zeros(G.shape[0], 1, 1)
        for _ in range(_POWER_STEPS):
            x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(torch.finfo(G.dtype).tiny)
            x = G.transpose(1, 2) @ (G @ x)
            _reduce(x)
            size = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        self.vector = x
        return float(size.max() / count) or 1.0


def _reduce(x: Tensor) -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(x)
