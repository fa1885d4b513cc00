"""From running statistics to `P`: what acts on gradients, and the same as an operator that is measured."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn

from bnp_analysis.network.layers import Layer, expand_channels
from bnp_analysis.network.moments import Moments
from bnp_analysis.network.parameters import ParameterSpace
from bnp_analysis.precondition.blocks import layer_positions
from bnp_analysis.precondition.bnp import BNPPreconditioner, damped_variance, layer_block
from bnp_analysis.precondition.bnp_block import BNPBlock
from bnp_analysis.training.bnp_direction import with_bias_, without_bias_
from bnp_analysis.training.bnp_gradients import Gradients, has_free_bias
from bnp_analysis.training.bnp_running import RunningMoments
from bnp_analysis.training.bnp_scale import MeasuredScale, chosen_scale
from bnp_analysis.training.bnp_settings import Settings


def layer_width(layer: Layer, statistics: str) -> int:
    """How many means a layer has: per channel, or per entry of its patches, group by group."""
    if statistics == "patch" or isinstance(layer.module, nn.Linear):
        return layer.groups * layer.features
    return layer.module.in_channels


class Rule:
    """How each layer's statistics become its `P`.

    Args:
        settings: damping, `q`, form without a bias.
        layers: in the order of the statistics.
        running: their statistics.

    Attributes:
        q2: `q^2` of the last step, layer by layer.
    """

    def __init__(self, settings: Settings, layers: Sequence[Layer], running: RunningMoments) -> None:
        self._settings, self._layers, self._running = settings, layers, running
        self._measured = [MeasuredScale() for _ in layers]
        self.q2: dict[int, float] = {}
        # q2 of all layers; for each entry of the statistics its layer, and its q2.
        self._spread: tuple[tuple[float, ...], Tensor, Tensor] | None = None

    def apply(self, found: Sequence[Gradients], inputs: Mapping[int, Sequence[Tensor]]) -> None:
        """Precondition the gradients; `inputs` are those of the step where `q` is measured."""
        moments = {g.index: self._moments(g.index) for g in found}
        for g in found:
            self._scale(g, *moments[g.index], inputs.get(g.index, ()))
        inverses = self._inverses()
        for g in found:
            tensors = [t for t in (g.weight, g.bias) if t is not None]
            mean, variance = moments[g.index]
            # In the statistics' precision where the gradient's is lower.
            ready = all(t.dtype == mean.dtype and t.is_contiguous() for t in tensors)
            wide = tensors if ready else [t.to(mean.dtype).contiguous() for t in tensors]
            if g.bias is not None:
                with_bias_(wide[0], wide[1], mean, self._expanded(g.index, inverses[g.index]), self.q2[g.index])
            else:
                mean, variance = self._form(mean, variance)
                without_bias_(wide[0], mean, self._damped(variance), self.q2[g.index])
            for own, changed in zip(tensors, wide, strict=True):
                if changed is not own:
                    own.copy_(changed)

    def _scale(self, g: Gradients, mean: Tensor, variance: Tensor, inputs: Sequence[Tensor]) -> None:
        q, i = self._settings.q, g.index
        if q == "auto":
            diagonal = g.bias is None and self._settings.bias_free == "diagonal"
            self.q2[i] = chosen_scale(g.layer, self._running.rows[i], mean, variance, diagonal=diagonal)
        elif q != "measured":
            self.q2[i] = float(q) ** 2
        elif inputs:
            layer = g.layer if g.bias is not None else replace(g.layer, bias=None)
            mean, variance = (mean, variance) if g.bias is not None else self._form(mean, variance)
            self.q2[i] = self._measured[i](layer, inputs, mean, self._damped(variance))

    def _form(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """What stands for the moments of a layer without a bias."""
        if self._settings.bias_free == "rank-one":
            return mean, variance
        return torch.zeros_like(mean), variance + mean.square()

    def _damped(self, variance: Tensor) -> Tensor:
        return damped_variance(variance, self._settings.eps1, self._settings.eps2)

    def _inverses(self) -> list[Tensor]:
        """`1/(s2 q2)` of every layer, `(width,)`, in few operations on all of them side by side."""
        running, chosen = self._running, self._settings
        assert running.values is not None
        variances = torch.split(running.values[1], running.widths)
        if not chosen.eps2:
            return [(self._damped(v) * self.q2.get(i, 1.0)).reciprocal_() for i, v in enumerate(variances)]
        q2 = tuple(self.q2.get(i, 1.0) for i in range(len(variances)))
        like = running.values
        if (
            self._spread is None
            or self._spread[0] != q2
            or self._spread[2].dtype != like.dtype
            or self._spread[2].device != like.device
        ):
            widths = torch.tensor(running.widths)
            self._spread = (
                q2,
                torch.arange(len(q2)).repeat_interleave(widths).to(like.device),
                torch.tensor(q2, dtype=torch.float64).repeat_interleave(widths).to(like),
            )
        top = torch.stack([v.amax() for v in variances]).mul_(chosen.eps1).add_(chosen.eps2)
        s2 = top.index_select(0, self._spread[1]).add_(like[1])
        return list(torch.split(s2.mul_(self._spread[2]).reciprocal_(), running.widths))

    def _expanded(self, index: int, values: Tensor) -> Tensor:
        """Of channels over their patches: `(groups, m)`."""
        layer = self._layers[index]
        if values.numel() == layer.groups * layer.features:
            return values.view(layer.groups, layer.features)
        return expand_channels(layer, values)

    def preconditioner(
        self, space: ParameterSpace, covered: Collection[str], uncovered: Mapping[str, str]
    ) -> BNPPreconditioner:
        """`P` over a space, identity on what is not covered."""
        blocks, constant = {}, {}
        for i, layer in enumerate(self._layers):
            if layer.name in covered and layer.weight in space:
                free = layer.bias is not None and layer.bias in space and has_free_bias(layer)
                own = replace(layer, bias=layer.bias if free else None)
                block, still = self._block(own, i, space)
                blocks[layer.name] = (layer_positions(own, space), block)
                constant[layer.name] = tuple(torch.nonzero(still.flatten()).flatten().tolist())
        settings = {**asdict(self._settings), "step": self._running.step}
        return BNPPreconditioner(space, blocks, settings=settings, constant_features=constant, uncovered=uncovered)

    def _moments(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and variance `(groups, m)`."""
        mean, variance = self._running.of(index)
        return self._expanded(index, mean), self._expanded(index, variance)

    def _block(self, layer: Layer, i: int, space: ParameterSpace) -> tuple[BNPBlock, Tensor]:
        mean, variance = (m.detach().to(space.device, torch.float64, copy=True) for m in self._moments(i))
        moments = Moments(mean, variance, variance == 0, self._running.rows[i])
        chosen = self._settings
        q = None if chosen.q == "auto" else math.sqrt(self.q2[i])
        damping = {"eps1": chosen.eps1, "eps2": chosen.eps2}
        block = layer_block(layer, moments, **damping, q=q, bias_free=chosen.bias_free, dtype=space.dtype)
        return block, moments.constant
