"""Candidate null directions of any network: what the structure and the data say must not change the outputs.

Tangent vectors of symmetries (T11), read off the recorded operations. Nothing here is believed: `curvature` verifies
each candidate before it counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.network.candidates import Candidate, Chart
from bnp_analysis.network.dependencies import dependent_inputs, without_effect
from bnp_analysis.network.graph import Graph, record_graph
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.symmetry import activations, arithmetic, norms, products, shapes
from bnp_analysis.network.symmetry.gauge import scale_candidates
from bnp_analysis.network.symmetry.mixing import Mixer, frames
from bnp_analysis.network.symmetry.trace import Trace
from bnp_analysis.network.symmetry.unread import unread
from bnp_analysis.runtime.memory import require_memory

# Importing them registers what operations mean.
_RULES = (activations, arithmetic, norms, products, shapes)


def candidate_directions(
    risk: EmpiricalRisk, counted: Sequence[Tensor | None] | None = None
) -> tuple[list[Candidate], list[str]]:
    """Candidates of every cause, the most local first, and what could not be analysed.

    Inside one unit: parameters without effect, dependent inputs, inactive rows, dead units. Inside one layer: what
    nothing reads, because a norm, a layer behind or the loss takes it out. Across layers: scales, shifts and mixings
    of channels, wherever they are made and read.

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
    found = [without_effect(chart, graphs), *dependent_inputs(chart, graphs, skipped)]
    if graph.transformed:
        return [c for c in found if c.count], [*skipped, "passes through transforms of torch.func"]
    trace = Trace(chart, _with_calls(risk, graph), graphs)
    ledger = trace.ledger
    found += unread(risk, chart, graph, ledger.uses, counted)
    found += scale_candidates(ledger, trace.theta)
    mixer = Mixer(ledger, trace.theta)
    for frame in frames(ledger):
        found += mixer.candidates(frame)
    skipped += [*ledger.skipped, *_unread_parameters(chart, trace)]
    return [c for c in sorted(found, key=lambda c: not c.exact) if c.count], list(dict.fromkeys(skipped))


def _graphs(risk: EmpiricalRisk, counted: Sequence[Tensor | None] | None) -> list[Graph]:
    graphs: list[Graph] = []
    for batch in risk.batches:
        graphs.append(record_graph(risk, batch, None if counted is None else counted[batch.index]))
        if len(graphs) == 1:
            tensors = list(_held(graphs[0]))
            held = sum(t.numel() * t.element_size() for t in tensors)
            where = tensors[0].device if tensors else None
            require_memory(int(held * risk.batches.total / batch.count), "what the layers receive", device=where)
    return graphs


def _held(graph: Graph) -> Iterator[Tensor]:
    for node in graph:
        yield from (t for t in (node.received, node.output, node.reach, node.signs) if t is not None)


def _with_calls(risk: EmpiricalRisk, graph: Graph) -> Graph:
    """The same operations on two examples, where they do the same; else on the first batch."""
    batch = next(iter(risk.batches))
    few = slice_batch(batch, 0, 2)
    for part in (few, batch):
        found = None if part is None else _recorded(risk, part)
        if found is not None and found.same_operations(graph):
            return found
    return record_graph(risk, batch, calls=True)


def _recorded(risk: EmpiricalRisk, batch: Batch) -> Graph | None:
    try:
        return record_graph(risk, batch, calls=True)
    except (RuntimeError, ValueError, IndexError):  # Written for one size of batch.
        return None


def _unread_parameters(chart: Chart, trace: Trace) -> list[str]:
    """Free parameters that operations of unknown kinds use."""
    return [f"{name}: used by {kind}" for name, kind in trace.unknown if name in chart.space]
