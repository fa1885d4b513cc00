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
from bnp_analysis.precondition.bnp import BNPPreconditioner, layer_block
from bnp_analysis.precondition.bnp_block import BNPBlock
from bnp_analysis.training.bnp_gradients import Gradients, has_free_bias, precondition
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

    def apply(self, found: Gradients, inputs: Sequence[Tensor]) -> None:
        """Precondition the gradients of a layer; `inputs` are those of the step where `q` is measured."""
        chosen, i = self._settings, found.index
        mean, variance = self._moments(i)
        diagonal = found.bias is None and chosen.bias_free == "diagonal"
        if chosen.q == "auto":
            self.q2[i] = chosen_scale(found.layer, self._running.rows[i], mean, variance, diagonal=diagonal)
        elif chosen.q != "measured":
            self.q2[i] = float(chosen.q) ** 2
        if diagonal:
            mean, variance = torch.zeros_like(mean), variance + mean.square()
        if chosen.q == "measured" and inputs:
            layer = found.layer if found.bias is not None else replace(found.layer, bias=None)
            self.q2[i] = self._measured[i](layer, inputs, mean, variance, eps1=chosen.eps1, eps2=chosen.eps2)
        precondition(found, mean, variance, q2=self.q2[i], eps1=chosen.eps1, eps2=chosen.eps2)

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
        layer = self._layers[index]
        mean, variance = self._running.of(index)
        if mean.numel() == layer.groups * layer.features:
            shape = (layer.groups, layer.features)
            return mean.view(shape), variance.view(shape)
        return expand_channels(layer, mean), expand_channels(layer, variance)

    def _block(self, layer: Layer, i: int, space: ParameterSpace) -> tuple[BNPBlock, Tensor]:
        mean, variance = (m.detach().to(space.device, torch.float64, copy=True) for m in self._moments(i))
        moments = Moments(mean, variance, variance == 0, self._running.rows[i])
        chosen = self._settings
        q = None if chosen.q == "auto" else math.sqrt(self.q2[i])
        damping = {"eps1": chosen.eps1, "eps2": chosen.eps2}
        block = layer_block(layer, moments, **damping, q=q, bias_free=chosen.bias_free, dtype=space.dtype)
        return block, moments.constant
