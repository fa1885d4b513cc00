"""Means and variances of the inputs of each layer, over all rows of the data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.network.layers import (
    Coverage,
    Layer,
    channels,
    coverage,
    example_count,
    expand_channels,
    output_rows,
    rows,
)
from bnp_analysis.network.risk import EmpiricalRisk

STATISTICS = ("channel", "patch")


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance of each input feature of a layer.

    Attributes:
        mean, variance: `(groups, m)`, float64; expanded from channels for a convolution.
        constant: `(groups, m)` bool, features with one value on all the data, found by minimum and maximum.
        rows: `R`, the rows of `H^`.
        examples: `N`, the examples that they come from.
    """

    mean: Tensor
    variance: Tensor
    constant: Tensor
    rows: int
    examples: int


class Accumulator:
    """Streaming moments `(count, mean, M2, min, max)` per column, merged exactly (Chan's formulas, T4)."""

    def __init__(self) -> None:
        self.count = 0
        self.unit = 0.0
        self.mean = self.m2 = self.low = self.high = torch.zeros(0, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take in more rows `(R, m)`."""
        rows = Accumulator()
        rows.unit, rows.count = float(torch.finfo(x.dtype).eps), x.shape[0]
        x = x.double()
        rows.mean = x.mean(dim=0)
        rows.m2 = (x - rows.mean).square().sum(dim=0)
        rows.low, rows.high = x.amin(dim=0), x.amax(dim=0)
        self.merge(rows)

    def merge(self, other: Accumulator) -> None:
        """Take in the rows that another has seen."""
        if other.count == 0:
            return
        if self.count == 0:
            vars(self).update(vars(other))
            return
        self.unit = max(self.unit, other.unit)
        total = self.count + other.count
        delta = other.mean - self.mean
        self.mean = self.mean + delta * (other.count / total)
        self.m2 = self.m2 + other.m2 + delta.square() * (self.count * other.count / total)
        self.low, self.high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        self.count = total

    def to(self, device: torch.device | str) -> Accumulator:
        """The same on another device."""
        other = Accumulator()
        vars(other).update({k: v.to(device) if isinstance(v, Tensor) else v for k, v in vars(self).items()})
        return other

    @property
    def variance(self) -> Tensor:
        """Biased variance, exactly zero for a constant column."""
        return torch.where(self.constant, torch.zeros_like(self.m2), self.m2 / self.count)

    @property
    def constant(self) -> Tensor:
        """Columns with a single value, up to a few units in its last place.

        The same row may come out of a matrix product a rounding apart; its variance would be that of rounding.
        """
        size = torch.maximum(self.low.abs(), self.high.abs())
        return self.high - self.low <= 8 * self.unit * size


def layer_moments(
    risk: EmpiricalRisk, *, statistics: str = "channel", layers: Coverage | None = None
) -> dict[str, Moments]:
    """Exact mean and variance of every covered layer's inputs over the whole data of a risk.

    `mu = H^T e / R`, `sigma^2 = mean((h - mu)^2)`; with `statistics="channel"` a convolution has one pair per input
    channel over batch and space, with `"patch"` one per entry of the patch (T6).

    Args:
        risk: the empirical risk, whose inputs are seen at its `theta`.
        statistics: `"channel"` or `"patch"`; dense layers do not distinguish them.
        layers: the covered layers, if known.

    Returns:
        Layer name -> `Moments`.

    Raises:
        InvalidInputError: an unknown `statistics`; NonFiniteError: activations with NaN or infinity.

    Source: T3, T6.
    """
    if statistics not in STATISTICS:
        raise InvalidInputError(f"statistics must be 'channel' or 'patch', got {statistics!r}")
    layers = coverage(risk) if layers is None else layers
    sums = {layer.name: Accumulator() for layer in layers}
    counts = dict.fromkeys(sums, (0, 0))
    parts = risk.group.share(lambda: _own_moments(risk, statistics, layers), "the moments of layers")
    for own_sums, own_counts in parts:
        for name, own in own_sums.items():
            sums[name].merge(own.to(risk.space.device))
            counts[name] = _added(counts[name], own_counts[name])
    return {layer.name: _moments(layer, sums[layer.name], counts[layer.name], statistics) for layer in layers}


def _own_moments(
    risk: EmpiricalRisk, statistics: str, layers: Coverage
) -> tuple[dict[str, Accumulator], dict[str, tuple[int, int]]]:
    """The moments and numbers of rows and examples in this process's batches, on the CPU."""
    sums = {layer.name: Accumulator() for layer in layers}
    counts = dict.fromkeys(sums, (0, 0))

    def visit(name: str, module: nn.Module, args: Any, output: Any) -> None:
        layer = layers[name]
        values = _columns(layer, args[0], statistics)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"the input of layer {name!r} has NaN or infinite entries")
        sums[name].add(values)
        counts[name] = _added(counts[name], (output_rows(layer, output), example_count(layer, args[0])))

    risk.capture(visit, sums)
    return {name: found.to("cpu") for name, found in sums.items()}, counts


def _added(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def _columns(layer: Layer, h: Tensor, statistics: str) -> Tensor:
    if statistics == "channel":
        return channels(layer, h)
    return rows(layer, h).flatten(start_dim=1)


def _moments(layer: Layer, found: Accumulator, count: tuple[int, int], statistics: str) -> Moments:
    shape = (layer.groups, layer.features)
    columns = (found.mean, found.variance, found.constant)
    if statistics == "channel" and layer.patch > 1:
        mean, variance, constant = (expand_channels(layer, column) for column in columns)
    else:
        mean, variance, constant = (column.view(shape) for column in columns)
    return Moments(mean, variance, constant, *count)


def layer_rows(risk: EmpiricalRisk, layers: Coverage | None = None) -> dict[str, Tensor]:
    """All rows of every covered layer, `(R, groups, m)`, over the data of a risk.

    Returns:
        Layer name -> rows in the risk's dtype; memory grows with the data.
    """
    layers = coverage(risk) if layers is None else layers
    # Something to join also where this process has no batch.
    found = {layer.name: [risk.theta.new_zeros(0, layer.groups, layer.features)] for layer in layers}

    def visit(name: str, module: nn.Module, args: Any, output: Any) -> None:
        # A copy: rows of a dense layer are its input, and what follows may write into that.
        found[name].append(rows(layers[name], args[0]).clone())

    with risk.group.together("a pass over the rows of layers"):
        risk.capture(visit, found)
    own = {name: torch.cat(parts) for name, parts in found.items()}
    return {name: risk.group.gather(partial(own.__getitem__, name), f"rows of {name}") for name in own}
