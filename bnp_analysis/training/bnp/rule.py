"""From running statistics to `P`: what acts on gradients, and the same as an operator that is measured."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from bnp_analysis.network.layers import Layer, expand_channels
from bnp_analysis.network.moments import Moments
from bnp_analysis.network.parameters import ParameterSpace
from bnp_analysis.precondition.blocks import layer_positions
from bnp_analysis.precondition.bnp import BNPPreconditioner, damped_variance, layer_block
from bnp_analysis.precondition.bnp_block import BNPBlock
from bnp_analysis.training.bnp.direction import with_bias_, without_bias_
from bnp_analysis.training.bnp.gradients import Gradients, has_free_bias
from bnp_analysis.training.bnp.running_moments import RunningMoments
from bnp_analysis.training.bnp.scale import MeasuredScale, chosen_scale
from bnp_analysis.training.bnp.settings import Settings


def layer_width(layer: Layer, statistics: str) -> int:
    """How many means a layer has: per channel, or per entry of its patches, group by group."""
    if statistics == "patch" or isinstance(layer.module, nn.Linear):
        return layer.groups * layer.features
    return layer.module.in_channels


@dataclass(frozen=True)
class _Flat:
    """For each entry of the statistics its layer and its `q2`, and a place for `1/(s2 q2)` with views by layer."""

    q2: tuple[float, ...]
    layer: Tensor
    factor: Tensor
    scaled: bool
    out: Tensor
    parts: list[Tensor]

    @classmethod
    def of(cls, q2: tuple[float, ...], widths: list[int], like: Tensor) -> _Flat:
        sizes = torch.tensor(widths)
        layer = torch.arange(len(q2)).repeat_interleave(sizes).to(like.device)
        factor = torch.tensor(q2, dtype=torch.float64).repeat_interleave(sizes).to(like)
        out = torch.empty_like(like)
        return cls(q2, layer, factor, set(q2) != {1.0}, out, list(torch.split(out, widths)))


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
        sizes = [layer.groups * layer.features for layer in layers]
        self._channelwise = [width != size for width, size in zip(running.widths, sizes, strict=True)]
        self._flat: _Flat | None = None
        self._views: tuple[Tensor | None, list[Tensor]] | None = None

    def apply(self, found: Sequence[Gradients], inputs: Mapping[int, Sequence[Tensor]]) -> None:
        """Precondition the gradients; `inputs` are those of the step where `q` is measured."""
        for g in found:
            self._scale(g, inputs.get(g.place, ()))
        means, inverses = self._means(), self._inverses()
        for g in found:
            mean, variance = self._running.of(g.place)
            tensors = (g.weight,) if g.bias is None else (g.weight, g.bias)
            # In the statistics' precision where the gradient's is lower.
            ready = all(t.dtype == mean.dtype and t.is_contiguous() for t in tensors)
            wide = tensors if ready else tuple(t.to(mean.dtype).contiguous() for t in tensors)
            if len(wide) == 2:
                with_bias_(wide[0], wide[1], means[g.place], inverses[g.place], self.q2[g.place])
            else:
                mean, variance = self._form(*self._moments(g.place))
                without_bias_(wide[0], mean, self._damped(variance), self.q2[g.place])
            if not ready:
                for own, changed in zip(tensors, wide, strict=True):
                    if changed is not own:
                        own.copy_(changed)

    def _scale(self, g: Gradients, inputs: Sequence[Tensor]) -> None:
        q, i = self._settings.q, g.place
        if q == "auto":
            diagonal = g.bias is None and self._settings.bias_free == "diagonal"
            moments = self._moments(i) if diagonal else None
            self.q2[i] = chosen_scale(g.layer, self._running.rows[i], moments)
        elif q != "measured":
            self.q2[i] = float(q) ** 2
        elif inputs:
            layer = g.layer if g.bias is not None else replace(g.layer, bias=None)
            mean, variance = self._moments(i) if g.bias is not None else self._form(*self._moments(i))
            self.q2[i] = self._measured[i](layer, inputs, mean, self._damped(variance))

    def _form(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """What stands for the moments of a layer without a bias."""
        if self._settings.bias_free == "rank-one":
            return mean, variance
        return torch.zeros_like(mean), variance + mean.square()

    def _damped(self, variance: Tensor) -> Tensor:
        return damped_variance(variance, self._settings.eps1, self._settings.eps2)

    def _inverses(self) -> list[Tensor]:
        """`1/(s2 q2)` of every layer, `(groups, m)`, in few operations on all of them side by side."""
        running, chosen = self._running, self._settings
        count = len(self._layers)
        variances = [running.of(i)[1] for i in range(count)]
        if not chosen.eps2:
            scaled = [self._damped(v) * self.q2.get(i, 1.0) for i, v in enumerate(variances)]
            return [self._expanded(i, s2.reciprocal_()) for i, s2 in enumerate(scaled)]
        every, q2 = running.variances, tuple([self.q2.get(i, 1.0) for i in range(count)])
        flat = self._flat
        if flat is None or flat.q2 != q2 or flat.out.dtype != every.dtype or flat.out.device != every.device:
            flat = self._flat = _Flat.of(q2, running.widths, every)
            flat.parts[:] = [
                part if self._channelwise[i] else self._expanded(i, part) for i, part in enumerate(flat.parts)
            ]
        top = torch.stack([v.amax() for v in variances]).mul_(chosen.eps1).add_(chosen.eps2)
        torch.index_select(top, 0, flat.layer, out=flat.out)
        flat.out.add_(every)
        if flat.scaled:
            flat.out.mul_(flat.factor)
        flat.out.reciprocal_()
        return [self._expanded(i, part) if self._channelwise[i] else part for i, part in enumerate(flat.parts)]

    def _means(self) -> list[Tensor]:
        """`mu` of every layer, `(groups, m)`; views, made once where the statistics are updated in place."""
        running = self._running
        if self._views is None or self._views[0] is not running.values:
            raw = [running.of(i)[0] for i in range(len(self._layers))]
            self._views = (
                running.values,
                [m if self._channelwise[i] else self._expanded(i, m) for i, m in enumerate(raw)],
            )
        return [self._expanded(i, mean) if self._channelwise[i] else mean for i, mean in enumerate(self._views[1])]

    def _expanded(self, place: int, values: Tensor) -> Tensor:
        """Of channels over their patches: `(groups, m)`."""
        layer = self._layers[place]
        if self._channelwise[place]:
            return expand_channels(layer, values)
        return values.view(layer.groups, layer.features)

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
