"""Second moments of the rows that enter a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.network.layers import Coverage, Layer, rows
from bnp_analysis.network.risk import EmpiricalRisk

Transform = Callable[[Layer, Tensor], Tensor]


def extended(layer: Layer, h: Tensor) -> Tensor:
    """The rows `[h, 1]` in torch's order, weights first; `h` where the layer has no free bias."""
    return h if layer.bias is None else torch.cat([h, h.new_ones(*h.shape[:2], 1)], dim=2)


def second_moments(risk: EmpiricalRisk, layers: Coverage, transform: Transform = extended) -> dict[str, Tensor]:
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


def _own_sums(risk: EmpiricalRisk, layers: Coverage, transform: Transform) -> dict[str, tuple[Tensor, int]]:
    """The sums and numbers of rows over this process's batches, for layers that ran."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys((layer.name for layer in layers), 0)

    def visit(name: str, module: nn.Module, args: Any, output: Any) -> None:
        t = transform(layers[name], rows(layers[name], args[0]).double()).transpose(0, 1)
        gram = t.transpose(1, 2) @ t
        sums[name] = sums[name] + gram if name in sums else gram
        counts[name] += t.shape[1]

    risk.capture(visit, counts)
    return {name: (total.cpu(), counts[name]) for name, total in sums.items()}
