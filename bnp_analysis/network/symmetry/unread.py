"""Directions in what a layer makes that no output depends on, from derivatives: `d` times anything is null."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.network.batches import Batch
from bnp_analysis.network.candidates import Candidate, Chart, Move, Part
from bnp_analysis.network.dependencies import null_vectors
from bnp_analysis.network.graph import Graph, Node, sensitivities
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.symmetry.signals import Use

# Random combinations of the outputs, and how many rows are looked at for each channel.
_PROBES = 4
_ROWS = 16


@dataclass(frozen=True, eq=False)
class Writer:
    """Where a layer, an embedding or an added parameter writes: columns of positions, channel after channel."""

    node: Node
    entries: tuple[Tensor, ...]
    axis: int


def unread(
    risk: EmpiricalRisk, chart: Chart, graph: Graph, uses: Sequence[Use], counted: Sequence[Tensor | None] | None
) -> list[Candidate]:
    """`d (x) c`: `W += d c^T, b += c_0 d`, where a change of the layer's output along `d` reaches no output.

    What a norm's mean, linear layers of low rank behind, or the loss take out: the latter sees no common shift of an
    example's outputs before a softmax. Derivatives are taken in float64. A direction counts only if half of the data
    say the same, so that it is none of those that more data would take away.

    Args:
        risk: the empirical risk.
        chart: the parameters.
        graph: the recorded operations.
        uses: what parameters do in it.
        counted: for each batch, which outputs the loss looks at; default all.
    """
    writers = list(_writers(chart, graph, uses))
    if not writers:
        return []
    found: list[Candidate] = []
    precise = risk if risk.space.device.type == "mps" else risk.to(torch.float64)
    axes = [axis for axis in range(1, risk.outputs.ndim) if shift_invariant(risk, axis)]
    plain = _rows(precise, writers, counted, [])
    seen = _rows(precise, writers, counted, axes) if axes else plain
    for writer in writers:
        for rows, name in ((plain, ""), (seen, "softmax shift")):
            if name and not axes:
                continue
            d = _steady(rows.get(writer.node.index), 100 * precise.eps / torch.finfo(torch.float64).eps)
            if d is not None:
                parts = [Part(entries, d) for entries in writer.entries]
                cause = name or _name(graph, d)
                moves = tuple(_move(part) for part in parts) if _at_once(graph, writer, cause, d) else ()
                found.append(Candidate(cause, tuple(parts), moves=moves))
    return sorted(found, key=lambda candidate: candidate.cause == "softmax shift")


def _writers(chart: Chart, graph: Graph, uses: Sequence[Use]) -> Iterator[Writer]:
    """Parameters that are free and used once."""
    counts = torch.zeros(chart.size, dtype=torch.int64)
    for use in uses:
        for entries in (use.weight, use.bias):
            if entries is not None:
                counts += torch.bincount(torch.from_numpy(entries).reshape(-1), minlength=chart.size)

    def movable(entries: Tensor) -> bool:
        return bool((entries < chart.dim).all()) and bool((counts[entries] == 1).all())

    for use in uses:
        if use.node >= 0 and not use.entrywise and len(use.source) == 1:
            node = graph.nodes[use.node]
            columns = [*torch.from_numpy(use.weight.T), *([] if use.bias is None else [torch.from_numpy(use.bias)])]
            axis = node.channel_axis
            free = tuple(column for column in columns if movable(column))
            if free and axis is not None:
                yield Writer(node, free, axis)
    for node in graph:
        names = [name for name in node.parameters.values() if node.kind == "add" and name in chart.space]
        for name in names:
            places = chart.positions(name)
            if places.ndim and places.shape[-1] == node.shape[-1] and movable(places):
                yield Writer(node, tuple(places.reshape(-1, places.shape[-1])), len(node.shape) - 1)


def _rows(
    risk: EmpiricalRisk, writers: list[Writer], counted: Sequence[Tensor | None] | None, axes: list[int]
) -> dict[int, Tensor]:
    """Derivatives of random combinations of the outputs, `(rows, channels)` for each node, in a random order."""
    generator = torch.Generator().manual_seed(0)
    found: dict[int, list[Tensor]] = {writer.node.index: [] for writer in writers}
    for batch in risk.batches:
        covectors = list(_covectors(risk, batch, None if counted is None else counted[batch.index], axes, generator))
        for grads in sensitivities(risk, batch, covectors):
            for writer in {w.node.index: w for w in writers}.values():
                if writer.node.index in grads:
                    rows = grads[writer.node.index].movedim(writer.axis, -1)
                    rows = rows.reshape(-1, rows.shape[-1])
                    rows = rows[(rows != 0).any(dim=1)]
                    keep = torch.randperm(len(rows), generator=generator)[: _ROWS * rows.shape[1]]
                    found[writer.node.index].append(rows[keep])
    stacked = {index: torch.cat(parts) for index, parts in found.items() if parts}
    return {index: rows[torch.randperm(len(rows), generator=generator)] for index, rows in stacked.items()}


def _covectors(
    risk: EmpiricalRisk, batch: Batch, counted: Tensor | None, axes: list[int], generator: torch.Generator
) -> Iterator[Tensor]:
    with torch.no_grad():
        like = risk.batch_outputs(risk.named_tensors(), batch)
    for _ in range(_PROBES):
        v = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
        v = v if counted is None else v * counted.to(like)
        for axis in axes:
            v = v - v.mean(dim=axis, keepdim=True)
        yield v if counted is None else v * counted.to(like)


def _steady(rows: Tensor | None, slack: float) -> Tensor | None:
    """`(channels, q)`: directions that all rows are orthogonal to, and that half of them tell as well."""
    if rows is None or len(rows) < 2:
        return None
    live = (rows != 0).any(dim=0)
    rows = rows[:, live]
    half = null_vectors(rows[: len(rows) // 2], slack=slack)
    whole = null_vectors(rows, slack=slack)
    if whole.shape[1] == 0 or whole.shape[1] != half.shape[1]:
        return None
    d = torch.zeros(len(live), whole.shape[1], dtype=torch.float64)
    d[live] = whole
    return d


def _at_once(graph: Graph, writer: Writer, cause: str, d: Tensor) -> bool:
    """Whether what removes `d` comes right behind, whatever the parameters: then it is a translation of any length."""
    readers = graph.consumers(writer.node.index)
    common = d.shape[1] == 1 and float((d - d[0]).abs().max()) < 1e-12
    last = cause == "softmax shift" and writer.node.index == graph.result and not readers
    return common and (last or (bool(readers) and all(f"{node.kind} shift" == cause for node in readers)))


def _move(part: Part) -> Move:
    none, empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
    return Move(none, empty, part.positions, part.values[:, 0])


def _name(graph: Graph, d: Tensor) -> str:
    for node in graph:
        if node.kind in ("layer_norm", "group_norm", "softmax", "log_softmax"):
            groups = int(node.arguments["groups"]) if node.kind == "group_norm" else 1
            if len(d) % groups == 0:
                common = d.view(groups, -1, d.shape[1])
                if float((common - common[:, :1]).abs().max()) < 1e-9:
                    return f"{node.kind.removeprefix('log_')} shift"
    return "unread outputs"


def shift_invariant(risk: EmpiricalRisk, axis: int) -> bool:
    """Whether adding another constant along an axis of the outputs, elsewhere any, leaves the loss as it is."""
    batch = next(iter(risk.batches))
    with torch.no_grad():
        outputs = risk.batch_outputs(risk.named_tensors(), batch)
        shape = [1 if d == axis else size for d, size in enumerate(outputs.shape)]
        shift = torch.linspace(-1.0, 2.0, torch.Size(shape).numel(), dtype=torch.float64).view(shape).to(outputs)
        plain, moved = risk.batch_loss(outputs, batch), risk.batch_loss(outputs + shift, batch)
        size = 1 + plain.abs() + outputs.abs().max()
    return bool((plain - moved).abs() <= 100 * risk.eps * size)
