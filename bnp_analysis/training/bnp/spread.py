"""From the statistics of all layers side by side to what multiplies each layer's weights, in few operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bnp_analysis.network.layers import Layer, expand_channels
from bnp_analysis.training.bnp.running_moments import Buffer


def layer_width(layer: Layer, statistics: str) -> int:
    """How many means a layer has: per channel, or per entry of its patches, group by group."""
    if statistics == "patch" or isinstance(layer.module, nn.Linear):
        return layer.groups * layer.features
    return layer.module.in_channels


class Spread:
    """Means and damped variances of each layer, channels repeated over their patches.

    Args:
        layers: in the order of the statistics.
        widths: how many means each has.
        eps1, eps2: damping.
    """

    def __init__(self, layers: Sequence[Layer], widths: Sequence[int], eps1: float, eps2: float) -> None:
        self._layers = tuple(layers)
        sizes = [layer.groups * layer.features for layer in layers]
        self._sizes, self._channelwise = sizes, [w != size for w, size in zip(widths, sizes, strict=True)]
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        source, begin = [], 0
        for layer, width, channelwise in zip(layers, widths, self._channelwise, strict=True):
            own = torch.arange(begin, begin + width)
            source.append(expand_channels(layer, own).flatten() if channelwise else own)
            begin += width
        self._owner, self._source = owner, torch.cat(source)
        self._eps1, self._floor, self._repeats = eps1, eps2, any(self._channelwise)
        self._out: Tensor | None = None
        self._means: list[Tensor] = []
        self._damped: list[Tensor] = []

    def __call__(self, now: Buffer) -> tuple[list[Tensor], list[Tensor]]:
        """`mu` and `sigma^2 + eps1 max(sigma^2) + eps2`, 1 in place of a zero; `(m,)`, or `(groups, m)` of several."""
        means, s2 = now.shaped or self._prepare(now), self._s2
        top = torch.index_select(torch.add(self._eps2, now.largest, alpha=self._eps1), 0, self._owner)
        if self._repeats:
            torch.index_select(now.values, 1, self._source, out=self._out)
            s2.add_(top)
        else:
            torch.add(now.variance, top, out=s2)
        if not self._floor:
            s2.masked_fill_(s2 == 0, 1.0)
        return means, self._damped

    def _prepare(self, now: Buffer) -> list[Tensor]:
        """Where the results go, `(2, sum of m)`, and the views that each step needs, which are made once."""
        like = now.values
        if self._out is None or self._out.dtype is not like.dtype or self._out.device != like.device:
            self._owner, self._source = self._owner.to(like.device), self._source.to(like.device)
            self._eps2 = like.new_full((len(self._sizes),), self._floor)
            self._out = torch.empty(2, sum(self._sizes), dtype=like.dtype, device=like.device)
            self._s2 = self._out[1]
            self._means, self._damped = self._split(self._out[0]), self._split(self._s2)
        now.shaped = self._means if self._repeats else self._split(now.mean)
        return now.shaped

    def one(self, index: int, values: Tensor) -> Tensor:
        """The values of one layer's statistics, `(groups, m)`."""
        layer = self._layers[index]
        return expand_channels(layer, values) if self._channelwise[index] else values.view(layer.groups, -1)

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat, self._sizes)
        return [part if y.groups == 1 else part.view(y.groups, -1) for part, y in zip(parts, self._layers, strict=True)]
