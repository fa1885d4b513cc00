"""Means and variances of the inputs of each layer, over all rows of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.network.layers import Coverage, Layer, channels, coverage, expand_channels, output_rows, rows
from bnp_analysis.network.risk import EmpiricalRisk

STATISTICS = ("channel", "patch")


@dataclass(frozen=True)
class Moments:
    """Mean and biased variance of each input feature of a layer.

    Attributes:
        mean, variance: `(groups, m)`, float64; expanded from channels for a convolution.
        constant: `(groups, m)` bool, features with one value on all the data, found by minimum and maximum.
        rows: `R`, the rows of `H^`.
    """

    mean: Tensor
    variance: Tensor
    constant: Tensor
    rows: int


class Accumulator:
    """Streaming moments `(count, mean, M2, min, max)` per column, merged exactly (Chan's formulas, T4)."""

    def __init__(self) -> None:
        self.count = 0
        self.unit = 0.0
        self.mean = self.m2 = self.low = self.high = torch.zeros(0, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Take in more rows `(R, m)`."""
        self.unit = max(self.unit, float(torch.finfo(x.dtype).eps))
        x = x.double()
        count = x.shape[0]
        mean = x.mean(dim=0)
        m2 = (x - mean).square().sum(dim=0)
        low, high = x.amin(dim=0), x.amax(dim=0)
        if self.count == 0:
            self.count, self.mean, self.m2, self.low, self.high = count, mean, m2, low, high
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.m2 = self.m2 + m2 + delta.square() * (self.count * count / total)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.count = total

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
    counts = dict.fromkeys(sums, 0)

    def visit(name: str, module: nn.Module, args: Any, output: Any) -> None:
        layer = layers[name]
        values = _columns(layer, args[0], statistics)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"the input of layer {name!r} has NaN or infinite entries")
        sums[name].add(values)
        counts[name] += output_rows(layer, output)

    risk.capture(visit, sums)
    return {layer.name: _moments(layer, sums[layer.name], counts[layer.name], statistics) for layer in layers}


def _columns(layer: Layer, h: Tensor, statistics: str) -> Tensor:
    if statistics == "channel":
        return channels(layer, h)
    return rows(layer, h).flatten(start_dim=1)


def _moments(layer: Layer, found: Accumulator, count: int, statistics: str) -> Moments:
    shape = (layer.groups, layer.features)
    columns = (found.mean, found.variance, found.constant)
    if statistics == "channel" and layer.patch > 1:
        mean, variance, constant = (expand_channels(layer, column) for column in columns)
    else:
        mean, variance, constant = (column.view(shape) for column in columns)
    return Moments(mean, variance, constant, count)


def layer_rows(risk: EmpiricalRisk, layers: Coverage | None = None) -> dict[str, Tensor]:
    """All rows of every covered layer, `(R, groups, m)`, over the data of a risk.

    Returns:
        Layer name -> rows in the risk's dtype; memory grows with the data.
    """
    layers = coverage(risk) if layers is None else layers
    found: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def visit(name: str, module: nn.Module, args: Any, output: Any) -> None:
        # A copy: rows of a dense layer are its input, and what follows may write into that.
        found[name].append(rows(layers[name], args[0]).clone())

    risk.capture(visit, found)
    return {name: torch.cat(parts) for name, parts in found.items()}
