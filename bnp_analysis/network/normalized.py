"""What a normalization right behind a layer takes from that layer's parameters (T11)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bnp_analysis.network.candidates import Candidate, Chart, Part, Piece
from bnp_analysis.network.graph import Graph, Node
from bnp_analysis.network.links import Link, channel_axis, follow


def _norm_behind(graph: Graph, node: Node) -> Node | None:
    """The norm that alone reads a layer, over the layer's own channels."""
    readers = graph.consumers(node.index)
    if len(readers) != 1 or not readers[0].is_norm or node.index == graph.result:
        return None
    norm, axis = readers[0], channel_axis(node)
    if norm.kind in ("layer_norm", "rms_norm"):
        shape = norm.arguments.get("shape", ())
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        return norm if shape == tuple(node.shape[axis:]) else None
    return norm if axis == 1 else None


def _by_batch(norm: Node) -> bool:
    """Whether the norm takes its statistics from what it receives; else they are constants."""
    default = norm.kind != "batch_norm"
    given = norm.arguments.get("training", default)
    return bool(given) or norm.arguments.get("mean") is None


def _groups(norm: Node, units: int) -> list[list[int]]:
    """Channels that are normalized together."""
    if norm.kind in ("batch_norm", "instance_norm"):
        return [[i] for i in range(units)]
    count = int(norm.arguments["groups"]) if norm.kind == "group_norm" else 1
    size = units // count
    return [list(range(g * size, (g + 1) * size)) for g in range(count)]


def norm_shifts(chart: Chart, node: Node) -> Candidate:
    """Shifts that the norm subtracts again: a bias, or one input's weights, common to a group."""
    norm = _norm_behind(chart.graph, node)
    if norm is None or norm.kind == "rms_norm" or not _by_batch(norm):
        return Candidate("norm shift", ())
    weight, bias = node.parameters["weight"], node.parameters.get("bias")
    shape = node.arguments["weight_shape"]
    parts: list[Part | None] = []
    for group in _groups(norm, shape[0]):
        common = torch.ones(len(group), 1, dtype=torch.float64)
        if bias is not None:
            parts.append(chart.part([Piece(bias, torch.tensor(group), common)]))
        # Where only one position is normalized at a time, a shift may depend on the inputs.
        alone = norm.kind == "layer_norm" or (norm.kind == "group_norm" and len(node.shape) == 2)
        if node.kind == "linear" and alone:
            rows = torch.tensor(group) * shape[1]
            parts += [chart.part([Piece(weight, rows + j, common)]) for j in range(shape[1])]
    return chart.candidate(f"{norm.kind} shift", parts)


def norm_scales(chart: Chart, node: Node) -> Iterator[Candidate]:
    """Scales that the norm divides out again up to its eps; what makes up for the eps of a BatchNorm, exactly."""
    norm = _norm_behind(chart.graph, node)
    if norm is None or not _by_batch(norm):
        return
    link, _ = follow(chart.graph, norm)
    weight, bias = node.parameters["weight"], node.parameters.get("bias")
    # A variance over the batch does not see the bias; one over the channels does.
    names = [weight] if bias is None or norm.kind in ("batch_norm", "instance_norm") else [weight, bias]
    groups = _groups(norm, node.arguments["weight_shape"][0])
    scales = [[piece for i in group for piece in _rows(chart, names, i)] for group in groups]
    eps = norm.arguments.get("eps")
    yield chart.candidate(f"{norm.kind} scale", map(chart.part, scales), exact=eps == 0)
    if norm.kind == "batch_norm" and node.output is not None:
        values, size = _flat(node, node.output), 1e-5 if eps is None else float(eps)
        left = size / (values.var(dim=1, correction=0) + size)
        behind = [_rescaled(chart, norm, link, i, -float(part)) for i, part in enumerate(left)]
        made_up = (chart.part([*pieces, *more]) for pieces, more in zip(scales, behind, strict=True) if more)
        yield chart.candidate("batch_norm scale made up for", made_up)


def _rescaled(chart: Chart, norm: Node, link: Link | None, i: int, factor: float) -> list[Piece]:
    """What multiplies channel `i` behind a norm by `1 + factor`: its gain, or what reads it; nothing if neither can."""
    gain = norm.parameters.get("weight")
    if gain is not None:
        return [chart.single(gain, i, factor * float(chart.tensor(gain)[i]))]
    return [] if link is None or not link.inner else chart.columns(link.readers, i, factor)


def _rows(chart: Chart, names: list[str], unit: int) -> list[Piece]:
    return [Piece(name, chart.entries(name, unit), chart.tensor(name)[unit].reshape(-1, 1)) for name in names]


def _flat(node: Node, values: Tensor) -> Tensor:
    """`(channels, everything else)` in float64."""
    axis = channel_axis(node)
    assert axis is not None
    return values.cpu().double().movedim(axis, 0).flatten(start_dim=1)


def absorbed(chart: Chart, node: Node) -> Candidate:
    """A layer and the affine map of a norm with fixed statistics behind it: a scale and a shift per channel."""
    norm = _norm_behind(chart.graph, node)
    if norm is None or _by_batch(norm):
        return Candidate("norm affine", ())
    gain, offset, bias = norm.parameters.get("weight"), norm.parameters.get("bias"), node.parameters.get("bias")
    link, _ = follow(chart.graph, norm)
    mean, variance = (norm.arguments[name].cpu().double() for name in ("mean", "variance"))
    slope = (variance + norm.arguments.get("eps", 1e-5)).rsqrt() * (1.0 if gain is None else chart.tensor(gain))
    parts: list[Part | None] = []
    for i in range(len(mean)):
        pieces, more = chart.row(node, i, i), _rescaled(chart, norm, link, i, -1.0)
        # The norm multiplies `a - mean`: the mean stays behind, in the shift behind or in the bias before.
        if offset is not None:
            pieces.append(chart.single(offset, i, -float(slope[i] * mean[i])))
        elif bias is not None:
            pieces[-1] = chart.single(bias, i, float(chart.tensor(bias)[i] - mean[i]))
        if more:
            parts.append(chart.part([*pieces, *more]))
        if bias is not None and offset is not None:
            parts.append(chart.part([chart.single(bias, i), chart.single(offset, i, -float(slope[i]))]))
    return chart.candidate("norm affine", parts)
