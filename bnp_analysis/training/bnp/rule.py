"""From running statistics to `P`: what acts on gradients, and the same as an operator that is measured."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from bnp_analysis.network.layers import Layer
from bnp_analysis.network.moments import Moments
from bnp_analysis.network.parameters import ParameterSpace
from bnp_analysis.precondition.base import layer_positions
from bnp_analysis.precondition.bnp import (
    BNPPreconditioner,
    damped_variance,
    extensions,
    layer_block,
)
from bnp_analysis.precondition.bnp_block import BNPBlock
from bnp_analysis.precondition.output_scale import UnitScaled
from bnp_analysis.precondition.bnp import RULES, scale_square, surviving_mean
from bnp_analysis.training.bnp.direction import divide_units_, with_bias_, without_bias_
from bnp_analysis.training.bnp.gradients import Gradients
from bnp_analysis.training.bnp.layers import has_free_bias
from bnp_analysis.training.bnp.output_scale import OutputScales
from bnp_analysis.training.bnp.running_moments import RunningMoments
from bnp_analysis.training.bnp.scale import MeasuredScale
from bnp_analysis.training.bnp.settings import Settings
from bnp_analysis.training.bnp.spread import Spread


class Rule:
    """How each layer's statistics become its `P`.

    Args:
        settings: damping, `q`, form without a bias.
        layers: in the order of the statistics.
        running: their statistics.
        outputs: the scales of their units, if there are any.

    Attributes:
        q2: `q^2` of the last step, layer by layer.
    """

    def __init__(
        self, settings: Settings, layers: Sequence[Layer], running: RunningMoments, outputs: OutputScales | None
    ) -> None:
        self._settings, self._layers, self._running, self._outputs = settings, layers, running, outputs
        self._measured = [MeasuredScale() for _ in layers]
        self.q2: dict[int, float] = {}
        self._spread = Spread(layers, running.widths, settings.eps1, settings.eps2)

    def apply(self, found: Sequence[Gradients], inputs: Mapping[int, Sequence[Tensor]]) -> None:
        """Precondition the gradients; `inputs` are those of the step where `q` is measured."""
        running, outputs = self._running, self._outputs
        now, rows, examples = running.now, running.rows, running.examples
        assert now is not None
        means, damped = self._spread(now)
        kind, q = now.values.dtype, self._settings.q
        rule = q if isinstance(q, str) and q in RULES else ""
        diagonal = self._settings.bias_free == "diagonal"
        for i, layer, weight, bias in found:
            mean, s2 = means[i], damped[i]
            if bias is None and diagonal:
                mean, s2 = self._diagonal(i)
            if rule and (bias is not None or not diagonal):
                q2 = scale_square(rule, layer.features, rows[i], examples[i])
            else:
                own = layer if bias is not None else replace(layer, bias=None)
                q2 = self._square(i, own, mean, s2, inputs.get(i, ()))
            self.q2[i] = q2
            # In the statistics' precision where the gradient's is lower.
            w = weight if weight.dtype is kind and weight.is_contiguous() else weight.to(kind).contiguous()
            b = bias if bias is None or bias.dtype is kind else bias.to(kind)
            if b is None:
                without_bias_(w, mean, s2, q2)
            else:
                with_bias_(w, b, mean, s2, q2)
            if outputs is not None:
                divide_units_(w, b, outputs.squares(i))
            if w is not weight:
                weight.copy_(w)
            if bias is not None and b is not None and b is not bias:
                bias.copy_(b)

    def _square(self, i: int, layer: Layer, mean: Tensor, s2: Tensor, inputs: Sequence[Tensor]) -> float:
        """`q^2` of a layer in this step, where shapes alone do not give it."""
        q, running = self._settings.q, self._running
        if not isinstance(q, str):
            return float(q) ** 2
        if q in RULES:
            mean, variance = self._moments(i)
            square = scale_square(q, layer.features, running.rows[i], running.examples[i])
            return square + surviving_mean(mean, variance + mean.square())
        if not inputs:
            return self.q2[i]
        return self._measured[i](layer, inputs, mean, s2)

    def _diagonal(self, index: int) -> tuple[Tensor, Tensor]:
        """What stands for the moments of a layer without a bias: no mean, damped second moments (T5)."""
        mean, variance = self._moments(index)
        second = variance + mean.square()
        return torch.zeros_like(mean), damped_variance(second, self._settings.eps1, self._settings.eps2)

    def preconditioner(
        self, space: ParameterSpace, covered: Collection[str], uncovered: Mapping[str, str]
    ) -> BNPPreconditioner:
        """`P` over a space, identity on what is not covered."""
        blocks, constant, seen = {}, {}, {}
        for i, layer in enumerate(self._layers):
            if layer.name in covered and layer.weight in space:
                free = layer.bias is not None and layer.bias in space and has_free_bias(layer)
                own = replace(layer, bias=layer.bias if free else None)
                block, still = self._block(own, i, space)
                blocks[layer.name] = (layer_positions(own, space), block)
                seen[own] = self._running.rows[i], self._running.examples[i]
                constant[layer.name] = tuple(torch.nonzero(still.flatten()).flatten().tolist())
        settings = {**asdict(self._settings), "step": self._running.step}
        return BNPPreconditioner(
            space,
            blocks,
            settings=settings,
            constant_features=constant,
            uncovered=uncovered,
            extensions=extensions(self._settings.q, seen),
        )

    def _moments(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and variance `(groups, m)`."""
        mean, variance = self._running.of(index)
        return self._spread.one(index, mean), self._spread.one(index, variance)

    def _block(self, layer: Layer, i: int, space: ParameterSpace) -> tuple[BNPBlock | UnitScaled, Tensor]:
        mean, variance = (m.detach().to(space.device, torch.float64, copy=True) for m in self._moments(i))
        moments = Moments(mean, variance, variance == 0, self._running.rows[i], self._running.examples[i])
        chosen = self._settings
        block = layer_block(
            layer,
            moments,
            eps1=chosen.eps1,
            eps2=chosen.eps2,
            q=math.sqrt(self.q2[i]),
            bias_free=chosen.bias_free,
            dtype=space.dtype,
        )
        if self._outputs is None:
            return block, moments.constant
        scales = self._outputs.squares(i).to(space.device, torch.float64).sqrt()
        return UnitScaled(block, scales), moments.constant
