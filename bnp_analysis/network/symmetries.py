"""Candidate null directions of feed-forward and convolutional chains: what the structure says must not change the loss.

Tangent vectors of symmetries (T11), read off the recorded operations. Nothing here is believed: `curvature` verifies
each candidate before it counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bnp_analysis.network.dependencies import Candidate, dependent_inputs
from bnp_analysis.network.graph import HOMOGENEOUS, NORMS, TRANSPARENT, Graph, Node, record_graph
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.tangents import Link, TangentBuilder, channels_of


def candidate_directions(
    risk: EmpiricalRisk, reach: Mapping[str, Tensor] | None = None
) -> tuple[list[Candidate], list[str]]:
    """Candidates of every cause, and what could not be analysed.

    Causes: homogeneous units and channels, linear hidden layers, always-active units, the softmax shift, normalization
    layers, dependent inputs, dead units.

    Args:
        risk: the empirical risk; its data are run once and their activations held in memory.
        reach: layer name -> `(R, units)`, the rows that reach the loss through each unit, where known; else read off
            a ReLU behind the layer.

    Returns:
        The candidates in `risk.space`, and words for what was left out.

    Source: T11.
    """
    graphs = [record_graph(risk, batch) for batch in risk.batches]
    graph = graphs[0]
    builder = TangentBuilder(risk, graph)
    found: list[Candidate] = []
    skipped: list[str] = []
    for node in graph:
        if node.kind in ("linear", "conv") or (node.kind in NORMS and "weight" in node.parameters):
            link, why = _follow(graph, node)
            if link is not None:
                found += builder.rescalings(link)
                found += builder.mixings(link, _slopes(graphs, link), skipped)
            elif why:
                skipped.append(f"{node.layer}: {why}")
        if node.kind in ("linear", "conv"):
            found += builder.normalized(node)
    found += builder.output_shift(risk, graph)
    found += dependent_inputs(risk, graphs, skipped, reach or {})
    return [c for c in found if c.columns.shape[1]], skipped


def _follow(graph: Graph, producer: Node) -> tuple[Link | None, str]:
    """All layers that a layer's channels reach through homogeneous operations, or why there is no such link."""
    consumers: list[tuple[Node, int]] = []
    through: list[Node] = []
    channels = channels_of(producer)
    front, linear = [producer], True
    while front:
        node = front.pop()
        if node.index == graph.result:
            return None, ""
        readers = graph.consumers(node.index)
        for reader in readers:
            if reader.kind in ("linear", "conv") and reader.inputs[:1] == (node.index,):
                weight_in = _fan_in(reader)
                if reader.arguments.get("groups", 1) != 1 or weight_in % channels:
                    return None, "grouped or reshaped consumer"
                consumers.append((reader, weight_in // channels))
            elif reader.kind in HOMOGENEOUS or reader.kind in TRANSPARENT:
                if reader.kind in TRANSPARENT and not _keepschannels_of(node.output, reader.output):
                    return None, f"reshaped by {reader.kind}"
                linear = linear and reader.kind in TRANSPARENT
                through.append(reader)
                front.append(reader)
            elif reader.kind in NORMS:
                return None, ""
            else:
                return None, f"passes through {reader.kind}"
    if not consumers:
        return None, ""
    return Link(producer, tuple(consumers), linear, tuple(through)), ""


def _fan_in(node: Node) -> int:
    assert node.received is not None
    return node.received.shape[-1] if node.kind == "linear" else node.received.shape[1]


def _keepschannels_of(before: Tensor, after: Tensor) -> bool:
    """The same shape, or trailing dimensions merged behind the channels: channel `i` is a run of features."""
    return before.shape == after.shape or (
        after.ndim == 2 and before.ndim > 2 and after.shape == (before.shape[0], math.prod(before.shape[1:]))
    )


def _slopes(graphs: list[Graph], link: Link) -> dict[int, float]:
    """Channels that act linearly on all the data, with the slope: every one without an activation, else those that one
    ReLU or LeakyReLU passes with a single sign."""
    count = channels_of(link.producer)
    if link.linear:
        return dict.fromkeys(range(count), 1.0)
    activations = [node for node in link.through if node.kind in HOMOGENEOUS]
    if len(activations) != 1 or activations[0].kind not in ("relu", "relu_", "leaky_relu"):
        return {}
    positive = torch.ones(count, dtype=torch.bool)
    negative = torch.full_like(positive, activations[0].kind == "leaky_relu")
    for graph in graphs:
        values = graph.nodes[link.producer.index].output
        axis = values.ndim - 1 if link.producer.kind in ("linear", "layer_norm", "rms_norm") else 1
        rows = values.movedim(axis, 0).reshape(count, -1).cpu()
        positive &= (rows > 0).all(dim=1)
        negative &= (rows < 0).all(dim=1)
    below = float(activations[0].arguments.get("negative_slope", 0.01))
    return {i: 1.0 if positive[i] else below for i in range(count) if positive[i] or (negative[i] and below != 0.0)}
