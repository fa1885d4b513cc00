"""Means, variances and second moments of layer inputs over all rows of the data, and running averages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.network.layer_kinds import Layer, by_module
from bnp_analysis.network.layers import Coverage, coverage
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.runtime.kinds import gated

STATISTICS = ("channel", "patch")


# Tensors or numbers.
T = TypeVar("T", Tensor, float)


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

    def add_counts(self, rows: int, counts: Tensor) -> None:
        """Take in rows of zeros with a one, `counts` of each column, without forming them."""
        found, p = Accumulator(), counts.double() / max(rows, 1)
        found.unit, found.count, found.mean, found.m2 = torch.finfo(torch.float64).eps, rows, p, rows * p * (1 - p)
        found.low, found.high = (counts == rows).double(), (counts > 0).double()
        self.merge(found)

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


@gated
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

    def see(layer: Layer, h: Tensor, rows: int) -> None:
        counts[layer.name] = _added(counts[layer.name], (rows, layer.example_count(h)))
        if (indices := layer.counted(h)) is not None:
            sums[layer.name].add_counts(*indices)
            return
        values = layer.channels(h) if statistics == "channel" else layer.rows(h).flatten(start_dim=1)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"the input of layer {layer.name!r} has NaN or infinite entries")
        sums[layer.name].add(values)

    _each_input(risk, layers, see)
    return {name: found.to("cpu") for name, found in sums.items()}, counts


def _each_input(risk: EmpiricalRisk, layers: Iterable[Layer], see: Callable[[Layer, Tensor, int], None]) -> None:
    """`see(layer, input, rows)` for every time that one of the layers runs on this process's batches."""
    known = by_module(layers)

    def visit(name: str, module: nn.Module, args: Any, output: Any) -> None:
        inputs = known[name][0].inputs(args, output)
        for layer in known[name]:
            h = inputs[layer.kind.weight].detach()
            see(layer, h, layer.row_count(h, output))

    risk.capture(visit, known)


def _added(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return a[0] + b[0], a[1] + b[1]


def _moments(layer: Layer, found: Accumulator, count: tuple[int, int], statistics: str) -> Moments:
    columns = (found.mean, found.variance, found.constant)
    if statistics == "channel":
        mean, variance, constant = (layer.expand(column) for column in columns)
    else:
        mean, variance, constant = (column.view(layer.groups, layer.features) for column in columns)
    return Moments(mean, variance, constant, *count)


@gated
def layer_rows(risk: EmpiricalRisk, layers: Coverage | None = None) -> dict[str, Tensor]:
    """All rows of every covered layer, `(R, groups, m)`, over the data of a risk.

    Returns:
        Layer name -> rows in the risk's dtype; memory grows with the data.
    """
    layers = coverage(risk) if layers is None else layers
    # Something to join also where this process has no batch.
    found = {layer.name: [risk.theta.new_zeros(0, layer.groups, layer.features)] for layer in layers}

    def see(layer: Layer, h: Tensor, _: int) -> None:
        # A copy: rows of a dense layer are its input, and what follows may write into that.
        found[layer.name].append(layer.rows(h).clone())

    with risk.group.together("a pass over the rows of layers"):
        _each_input(risk, layers, see)
    own = {name: torch.cat(parts) for name, parts in found.items()}
    return {name: risk.group.gather(functools.partial(own.__getitem__, name), f"rows of {name}") for name in own}


def extended(layer: Layer, h: Tensor) -> Tensor:
    """The rows `[h, 1]` in torch's order, weights first; `h` where the layer has no free bias."""
    return h if layer.bias is None else torch.cat([h, h.new_ones(*h.shape[:2], 1)], dim=2)


def second_moments(
    risk: EmpiricalRisk, layers: Coverage, transform: Callable[[Layer, Tensor], Tensor] = extended
) -> dict[str, Tensor]:
    """`(1/R) sum_r t_r t_r^T` of the transformed rows of each layer, over the data of a risk.

    Args:
        risk: the empirical risk, whose inputs are seen at its `theta`.
        layers: the covered layers.
        transform: `(layer, rows (R, groups, m)) -> (R, groups, d)`; by default the extended rows themselves.

    Returns:
        Layer name -> `(groups, d, d)`, float64.
    """
    parts = risk.group.share(lambda: _own_sums(risk, layers, transform), "second moments")
    means = {}
    for name in (layer.name for layer in layers):
        mine = [part[name] for part in parts if name in part]
        total = functools.reduce(torch.add, (gram.to(risk.space.device) for gram, _ in mine))
        means[name] = total / sum(count for _, count in mine)
    return means


def _own_sums(
    risk: EmpiricalRisk, layers: Coverage, transform: Callable[[Layer, Tensor], Tensor]
) -> dict[str, tuple[Tensor, int]]:
    """The sums and numbers of rows over this process's batches, for layers that ran."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys((layer.name for layer in layers), 0)

    def see(layer: Layer, h: Tensor, _: int) -> None:
        t = transform(layer, layer.rows(h).double()).transpose(0, 1)
        gram = t.transpose(1, 2) @ t
        sums[layer.name] = sums[layer.name] + gram if layer.name in sums else gram
        counts[layer.name] += t.shape[1]

    _each_input(risk, layers, see)
    return {name: (total.cpu(), counts[name]) for name, total in sums.items()}


@dataclass(frozen=True)
class InputTriangles:
    """Triangular factors, per group, with the singular values of the three forms of a layer's inputs.

    Constant features are set aside first: they are collinear with the bias column, and centring would hide
    it. Attributes are lists over groups of `(k, k)` float64 matrices.
    """

    raw: list[Tensor]
    centered: list[Tensor]
    normalized: list[Tensor]


def input_triangles(risk: EmpiricalRisk, moments: dict[str, Moments], layers: Coverage) -> dict[str, InputTriangles]:
    """QR triangles of `H^ = [e, H]`, `H^U = [e, H - e mu^T]` and `G^ = [e, (H - e mu^T)/sigma]` for every layer.

    Each is formed directly and streamed over batches, so the rows of a convolution are never held at once.
    Layers without a free bias keep the column `e`: the inputs are judged, not the parameters.

    Args:
        risk: the empirical risk.
        moments: exact means and variances, from `layer_moments`.
        layers: the covered layers.

    Returns:
        Layer name -> `InputTriangles`.

    Source: T7, T13.
    """
    parts = risk.group.share(lambda: _own_triangles(risk, moments, layers), "the triangles of layers' inputs")
    return {layer.name: _joined([part[layer.name] for part in parts], risk.space.device) for layer in layers}


def _joined(parts: list[list[list[Tensor]]], device: torch.device) -> InputTriangles:
    """The triangles of all rows from those of several pieces; none where a piece has no row."""
    forms: tuple[list[Tensor], ...] = ([], [], [])
    for groups in zip(*parts, strict=True):
        for form, found in enumerate(forms):
            pieces = [triangles[form].to(device) for triangles in groups if triangles]
            found.append(pieces[0] if len(pieces) == 1 else torch.linalg.qr(torch.cat(pieces), mode="r")[1])
    return InputTriangles(*forms)


def _own_triangles(risk: EmpiricalRisk, moments: dict[str, Moments], layers: Coverage) -> dict[str, list[list[Tensor]]]:
    """For each layer and group the three triangles of this process's rows, formed batch by batch."""
    partial: dict[str, list[list[Tensor]]] = {layer.name: [[] for _ in range(layer.groups)] for layer in layers}

    def see(layer: Layer, h: Tensor, _: int) -> None:
        known, all_rows = moments[layer.name], layer.rows(h).double()
        for group, triangles in enumerate(partial[layer.name]):
            kept = ~known.constant[group]
            h = all_rows[:, group, kept]
            centered = h - known.mean[group, kept]
            normalized = centered / known.variance[group, kept].sqrt()
            e = h.new_ones(h.shape[0], 1)
            fresh = [torch.cat([e, part], dim=1) for part in (h, centered, normalized)]
            if triangles:
                fresh = [torch.cat([old, new]) for old, new in zip(triangles, fresh, strict=True)]
            triangles[:] = [torch.linalg.qr(part, mode="r")[1] for part in fresh]

    _each_input(risk, layers, see)
    return {name: [[t.cpu() for t in triangles] for triangles in groups] for name, groups in partial.items()}


def update_moments(mean: T, var: T, batch_mean: T, batch_var: T, rho: Any) -> tuple[T, T]:
    """The law of total variance for running statistics, exact for any `rho` and any batch size, one row included (T4).

    `mu' = rho mu + (1-rho) mu_batch`,
    `sigma'^2 = rho sigma^2 + (1-rho) sigma_batch^2 + rho (1-rho) (mu_batch - mu)^2`: mean and variance of the mixture
    of what was seen (weight `rho`) and the batch (weight `1-rho`).

    Args:
        mean, var: of what was seen before.
        batch_mean, batch_var: of the batch, the variance biased (1/R).
        rho: weight of what was seen before, a number or a value per entry.

    Returns:
        The new mean and variance.

    Example:
        >>> update_moments(0.0, 0.0, 2.0, 0.0, 0.5)
        (1.0, 1.0)
    """
    delta = batch_mean - mean
    new_var = var + (1 - rho) * ((batch_var - var) + rho * delta * delta)
    return mean + (1 - rho) * delta, new_var


def corrected_rho(rho: float, k: int) -> float:
    """The weight that step `k >= 1` gives to the past when the start is to weigh nothing, `(rho - rho^k)/(1 - rho^k)`.

    Step 1 forgets the start (0); later every batch weighs as under constant `rho`, divided by the sum of the weights.

    Raises:
        InvalidInputError: `rho` outside `[0, 1)` or `k < 1`.

    Example:
        >>> [round(corrected_rho(0.99, k), 4) for k in (1, 2, 3, 10_000)]
        [0.0, 0.4975, 0.6633, 0.99]
    """
    if not 0 <= rho < 1 or k < 1:
        raise InvalidInputError(f"0 <= rho < 1 and k >= 1 are needed, got rho={rho}, k={k}")
    return without_start(rho, rho ** (k - 1))


def without_start(rho: float, start: float) -> float:
    """The weight of the past, the start left out: `start` is the product of all earlier `rho` (T4)."""
    return rho * (1 - start) / (1 - rho * start) if start < 1 else 0.0
