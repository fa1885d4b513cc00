"""Output scaling while training (T10): an estimate from the gradients that pass by, relative between units."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bnp_analysis.network.layers import Layer, by_unit
from bnp_analysis.network.moments import without_start


class OutputScales:
    """`s_i^2` of every unit: a running average of the squared gradients in its pre-activations.

    Sums `v_i = sum_r (dL/da_ir)^2` over the rows of a step, divided by their mean over all units that were seen: the
    scale of the loss, and with it a gradient scaler's, drops out. `s_i^2 = average(v_i) + eps1`, so that no unit's step
    grows more than `1/eps1`-fold. The exact scales need the curvature of the loss (`bnp_preconditioner`); squared
    gradients have that as their mean only where labels are drawn from the model, and miss one factor for all units.

    Args:
        layers: in the order of the statistics.
        rho: weight of the past.
        eps1: damping.
    """

    def __init__(self, layers: Sequence[Layer], rho: float, eps1: float) -> None:
        self._layers, self._rho, self._eps1 = tuple(layers), rho, eps1
        self._units = [layer.units for layer in layers]
        self._sums: dict[int, Tensor] = {}
        self.values: Tensor | None = None
        self.start = [1.0] * len(self._units)

    def receive(self, index: int, gradient: Tensor) -> None:
        """Take in the gradient at an output of a layer, from its hook."""
        g = gradient.detach()
        g = g.float() if g.dtype in (torch.float16, torch.bfloat16) else g
        total = by_unit(self._layers[index], g).square().sum(dim=0)
        before = self._sums.get(index)
        self._sums[index] = total if before is None else before + total

    def forget(self) -> None:
        """Leave out what came since the last step."""
        self._sums = {}

    def commit(self) -> None:
        """Take in what passed in a step, over all processes where training is distributed."""
        found, self._sums = self._sums, {}
        if not found:
            return
        some = next(iter(found.values()))
        parts = [found[i] if i in found else some.new_zeros(n) for i, n in enumerate(self._units)]
        sums = torch.cat(parts)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        old = torch.ones_like(sums) if self.values is None else self.values.to(sums)
        mean = sums.sum() / sum(self._units[i] for i in found)
        # Overflowed or vanished gradients say nothing: what was known goes on.
        relative = torch.where(torch.isfinite(mean) & (mean > 0), sums / mean, old)
        past = [without_start(self._rho, self.start[i]) if i in found else 1.0 for i in range(len(self._units))]
        weights = torch.cat([torch.full((n,), 1 - p, dtype=old.dtype) for n, p in zip(self._units, past, strict=True)])
        self.values = torch.lerp(old, relative, weights.to(old.device, non_blocking=True))
        for i in found:
            self.start[i] *= self._rho

    def squares(self, index: int) -> Tensor:
        """`s_i^2` of the units of a layer, 1 where there is neither gradient nor damping."""
        if self.values is None:
            return torch.ones(self._units[index])
        own = torch.split(self.values, self._units)[index] + self._eps1
        return torch.where(own > 0, own, torch.ones_like(own))

    def state(self, index: int) -> dict[str, Any]:
        """What a state dict keeps of a layer."""
        values = torch.ones(sum(self._units)) if self.values is None else self.values
        own = torch.split(values, self._units)[index].clone()
        return {"output_squares": own, "output_start": self.start[index]}

    def load(self, entries: Sequence[Any]) -> None:
        """Go on from the entries of `state`, layer by layer."""
        self.values = torch.cat([entry["output_squares"] for entry in entries])
        self.start = [float(entry["output_start"]) for entry in entries]
        self._sums = {}
