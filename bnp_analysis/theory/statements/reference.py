"""BNP of one layer written out from its definition, dense: what the package's operators are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.network import Layer
from bnp_analysis.precondition import BlockDiagonal, BNPBlock, BNPPreconditioner
from bnp_analysis.theory.statements.setting import NotApplicable, Problem


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """Mean and biased variance of a layer's inputs, `(groups, m)`, and which of them never change."""

    mean: Tensor
    variance: Tensor
    constant: Tensor


def own_moments(problem: Problem, layer: Layer, statistics: str = "channel") -> LayerMoments:
    """The moments from all values at once: of each entry of a patch, or of each input channel, repeated."""
    if statistics == "patch" or not layer.spatial:
        values = problem.rows[layer.name]
    else:
        seen: list[Tensor] = []
        problem.risk.capture(lambda name, module, args, out: seen.append(args[0].clone()), [layer.name])
        values = torch.cat([channel_values(layer, h) for h in seen])
    return moments_of(values, layer)


def moments_of(values: Tensor, layer: Layer) -> LayerMoments:
    """The moments of rows, `(R, groups, m)`, or of the values of input channels, `(R, channels)`."""
    mean, variance = values.mean(dim=0), values.var(dim=0, unbiased=False)
    low, high = values.amin(dim=0), values.amax(dim=0)
    constant = high - low <= 8 * torch.finfo(values.dtype).eps * torch.maximum(low.abs(), high.abs())
    variance = torch.where(constant, torch.zeros_like(variance), variance)
    if mean.ndim == 1:
        shape = (layer.groups, layer.features)
        mean, variance, constant = (
            t.view(layer.groups, -1, 1).expand(-1, -1, layer.patch).reshape(shape) for t in (mean, variance, constant)
        )
    return LayerMoments(mean, variance, constant)


def channel_values(layer: Layer, h: Tensor) -> Tensor:
    """The values of each feature or channel of a layer's input or output, `(R, channels)`."""
    return h.movedim(layer.channel_axis, -1).reshape(-1, h.shape[layer.channel_axis])


def damped(moments: LayerMoments, settings: Mapping[str, Any]) -> Tensor:
    """`sigma^2 + eps1 max(sigma^2) + eps2`, 1 in place of a zero."""
    s2 = moments.variance + float(settings["eps1"]) * moments.variance.max() + float(settings["eps2"])
    return torch.where(s2 > 0, s2, torch.ones_like(s2))


def scale(layer: Layer, rows: int, rule: str = "rows", examples: int = 1) -> float:
    """`q = sqrt(max(m/R, 1))`, or `sqrt(max(m/N, sqrt(R/N)))` of the rule "paper"."""
    if rule == "paper":
        return math.sqrt(max(layer.features / examples, math.sqrt(rows / examples)))
    return math.sqrt(max(layer.features / rows, 1.0))


def extended(rows: Tensor, bias: bool) -> Tensor:
    """`[H, e]` in torch's order, or `H` without a bias; rows `(R, m)`."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) if bias else rows


def block_of(P: object, layer: Layer) -> BNPBlock:
    """The part of a BNP preconditioner on a layer.

    Raises:
        NotApplicable: it is not BNP's.
    """
    found = P.blocks.get(layer.name, (None, None))[1] if isinstance(P, BlockDiagonal) else None
    scaled = isinstance(found, BNPBlock) and found.output_scales is not None
    if not isinstance(P, BNPPreconditioner) or not isinstance(found, BNPBlock) or scaled:
        raise NotApplicable(f"the preconditioner is {type(P).__name__}, not BNP's")
    return found


def first_unit(layer: Layer, group: int) -> int:
    """The first output unit of a group."""
    return group * (layer.units // layer.groups)
