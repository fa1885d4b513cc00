"""Candidate null directions of feed-forward and convolutional chains: what the structure says must not change the loss.

Tangent vectors of symmetries (T11), read off the recorded operations. Nothing here is believed: `curvature` verifies
each candidate before it counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from bnp_analysis.linalg.memory import require_memory
from bnp_analysis.network.candidates import Candidate, Chart
from bnp_analysis.network.dependencies import dependent_inputs, without_effect
from bnp_analysis.network.graph import Graph, record_graph
from bnp_analysis.network.links import Link, follow
from bnp_analysis.network.normalized import absorbed, norm_scales, norm_shifts
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.tangents import TangentBuilder


def candidate_directions(
    risk: EmpiricalRisk, counted: Sequence[Tensor | None] | None = None
) -> tuple[list[Candidate], list[str]]:
    """Candidates of every cause, the most local first, and what could not be analysed.

    Inside one unit: parameters without effect, dependent inputs, inactive rows, dead units. Inside one layer: what a
    normalization or the softmax removes. Across layers: homogeneous units and channels, linear and always-active ones.

    Args:
        risk: the empirical risk; its data are run once, and what layers and norms receive and return is held.
        counted: for each batch, which outputs the loss looks at; default all.

    Returns:
        The candidates in `risk.space`, and words for what was left out.

    Raises:
        MemoryLimitError: the activations do not fit.

    Source: T11.
    """
    graphs = _graphs(risk, counted)
    graph, skipped = graphs[0], list[str]()
    if not all(graph.same_operations(other) for other in graphs):
        return [], ["the operations depend on the batch"]
    chart = Chart(risk, graph)
    links: dict[int, Link] = {}
    for node in graph:
        if node.is_layer or (node.is_norm and "weight" in node.parameters):
            link, why = follow(graph, node)
            if link is not None:
                links[node.index] = link
            elif why:
                skipped.append(f"{node.layer}: {why}")
    skipped += _unread(chart)
    layers = [node for node in graph if node.is_layer]
    builder = TangentBuilder(risk, graphs, chart, links, skipped)
    found = [without_effect(chart, graphs), *dependent_inputs(chart, graphs, skipped)]
    found += [norm_shifts(chart, node) for node in layers]
    found += builder.deaf()
    for link in links.values():
        found += builder.rescalings(link)
        found += builder.mixings(link)
    for node in layers:
        found += [*norm_scales(chart, node), absorbed(chart, node)]
    return [c for c in found if c.count], list(dict.fromkeys(skipped))


def _graphs(risk: EmpiricalRisk, counted: Sequence[Tensor | None] | None) -> list[Graph]:
    graphs: list[Graph] = []
    for batch in risk.batches:
        graphs.append(record_graph(risk, batch, None if counted is None else counted[batch.index]))
        if len(graphs) == 1:
            held = sum(t.numel() * t.element_size() for t in _held(graphs[0]))
            require_memory(int(held * risk.batches.total / batch.count), "what the layers receive and return")
    return graphs


def _held(graph: Graph) -> Iterator[Tensor]:
    for node in graph:
        yield from (t for t in (node.received, node.output, node.reach) if t is not None)


def _unread(chart: Chart) -> list[str]:
    """Free parameters that only operations of other kinds use."""
    found = {}
    for node in chart.graph:
        for name in node.parameters.values():
            known = node.is_layer or node.is_norm or node.kind == "prelu"
            if name in chart.space and not known:
                found[name] = f"{name}: used by {node.kind}"
    return list(found.values())
