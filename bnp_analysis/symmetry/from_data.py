"""Null directions from data and derivatives: dependent inputs, rows and units without effect, unused outputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.linalg.spectra.checks import null_vectors
from bnp_analysis.network.batches import Batch
from bnp_analysis.network.layer_kinds import kind_of
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.runtime.memory import require_memory
from bnp_analysis.symmetry.candidates import SHIFTS, Candidate, Cause, Chart, Orbit, Part
from bnp_analysis.symmetry.constraints import Use
from bnp_analysis.symmetry.graph import Graph, Node
from bnp_analysis.symmetry.recording import sensitivities

# Floating-point operations that the search in one layer may take.
_MOST_WORK = 2e12
# Random combinations of the outputs, and how many rows are looked at for each channel.
_PROBES = 4
_ROWS = 16
Counted = Sequence[Tensor | None] | None


def without_effect(chart: Chart, graphs: list[Graph]) -> Candidate:
    """The coordinates that no output depends on, of parameters that no layer or norm holds alone.

    Parameters that are never read, rows of an embedding that the data do not ask for, slopes of a PReLU that is never
    below zero.
    """
    parts = []
    for name in chart.space.names:
        users = [node for node in chart.graph if name in node.parameters.values()]
        if len(users) == 1 and (users[0].is_layer or users[0].is_norm):
            continue
        still = ~torch.stack([graph.moved[name].reshape(-1) for graph in graphs]).any(dim=0)
        if bool(still.any()):
            positions = chart.positions(name).reshape(-1)[still]
            parts.append(Part(positions, torch.eye(len(positions), dtype=torch.float64)))
    return Candidate(Cause.NO_EFFECT, tuple(parts))


def dependent_inputs(chart: Chart, graphs: list[Graph], skipped: list[str]) -> list[Candidate]:
    """`e_i (x) v` with `H^ v = 0` on the rows that reach the output of the network through unit `i`.

    All rows for most layers. What a ReLU or a max-pooling cuts does not count, and a unit with no row left is dead. A
    norm's gain and bias are the weights of units with one input.

    Args:
        chart: the parameters.
        graphs: the recorded operations of every batch.
        skipped: gets a word for every layer that was left out.

    Returns:
        Candidates with the causes `DEPENDENT_INPUTS`, `INACTIVE_ROWS`, `DEAD_UNITS`.
    """
    parts: dict[str, list[Part]] = {Cause.DEPENDENT_INPUTS: [], Cause.INACTIVE_ROWS: [], Cause.DEAD_UNITS: []}
    for node in graphs[0]:
        names = [name for role, name in node.parameters.items() if role in ("weight", "bias") and name in chart.space]
        if not (node.is_layer or node.is_norm) or not names:
            continue
        if shared := [name for name in names if graphs[0].uses(name) > 1]:
            skipped.append(f"{', '.join(shared)}: used more than once")
        elif node.channel_axis is None:
            skipped.append(f"{node.layer}: {node.kind} over several axes")
        else:
            search = _Search(chart, [graph.nodes[node.index] for graph in graphs], skipped)
            for i in range(search.units):
                cause, vectors = search.of_unit(i)
                parts[cause] += [search.part(i, vectors)] if vectors.shape[1] else []
    return [Candidate(cause, tuple(found)) for cause, found in parts.items()]


class _Search:
    """The rows of one layer or norm in all batches, and the null spaces of its units."""

    def __init__(self, chart: Chart, nodes: list[Node], skipped: list[str]) -> None:
        self._chart, self._nodes, self._first = chart, nodes, nodes[0]
        self.units = self._first.shape[self._axis]
        self.roles = [role for role in ("weight", "bias") if self._first.parameters.get(role) in chart.space.names]
        self.reach = torch.cat([self._by_unit(node.reach) for node in nodes])
        self.groups = int(self._first.arguments.get("groups", 1)) if self._first.kind == "conv" else 1
        features = 1 if self._first.is_norm else torch.Size(self._first.arguments["weight_shape"][1:]).numel()
        self.width = features * ("weight" in self.roles) + ("bias" in self.roles)
        numbers = float(len(self.reach)) * self.groups * self.width
        require_memory(int(8 * 4 * numbers), f"the input rows of {self._first.layer}", device=self.reach.device)
        partial = int((self.reach.any(dim=0) & ~self.reach.all(dim=0)).sum())
        self.searched = 2.0 * numbers * self.width * (1 + partial) <= _MOST_WORK
        if not self.searched:
            skipped.append(f"{self._first.layer}: too large to search the active rows of each unit for dependences")
        self._rows: Tensor | None = None
        self._common: dict[int, Tensor] = {}

    @property
    def _axis(self) -> int:
        axis = self._first.channel_axis
        assert axis is not None
        return axis

    def _by_unit(self, values: Tensor | None) -> Tensor:
        assert values is not None
        return values.movedim(self._axis, -1).reshape(-1, self.units)

    def of_unit(self, i: int) -> tuple[Cause, Tensor]:
        """The cause and an orthonormal basis of the null space of unit `i`'s rows."""
        mine = self.reach[:, i]
        if not bool(mine.any()):
            return Cause.DEAD_UNITS, torch.eye(self.width, dtype=torch.float64)
        h, key = self._unit_rows(i), i if self._first.is_norm else i // (self.units // self.groups)
        if key not in self._common:
            self._common[key] = null_vectors(h)
        common = self._common[key]
        if not self.searched or bool(mine.all()):
            return Cause.DEPENDENT_INPUTS, common
        vectors = null_vectors(h[mine.to(h.device)])
        alike = vectors.shape[1] == common.shape[1]
        return (Cause.DEPENDENT_INPUTS, common) if alike else (Cause.INACTIVE_ROWS, vectors)

    def _unit_rows(self, i: int) -> Tensor:
        """`(R, m + 1)`, every row of length one: a row counts however small it is."""
        if self._first.is_norm:
            return self._extended(torch.cat([self._normalized(node, i) for node in self._nodes]))
        if self._rows is None:
            self._rows = self._extended(torch.cat([_layer_rows(node) for node in self._nodes]))
        return self._rows[:, i // (self.units // self.groups)]

    def _extended(self, h: Tensor) -> Tensor:
        h = h if "weight" in self.roles else h[..., :0]
        h = torch.cat([h, h.new_ones(*h.shape[:-1], 1)], dim=-1) if "bias" in self.roles else h
        size = h.norm(dim=-1, keepdim=True)
        return h / torch.where(size > 0, size, 1.0)

    def _normalized(self, node: Node, i: int) -> Tensor:
        """What the gain of channel `i` multiplies, `(R, 1)`."""
        assert node.output is not None
        y, given = self._by_unit(_double(node.output))[:, i : i + 1], node.parameters
        gain, offset = (self._chart.tensor(given[r])[i] if r in given else None for r in ("weight", "bias"))
        y = y if offset is None else y - offset
        return y if gain is None or gain == 0 else y / gain

    def part(self, i: int, vectors: Tensor) -> Part:
        """Vectors over `(weights, bias)` of unit `i`, at least one."""
        names = [self._first.parameters[role] for role in self.roles]
        places = [self._chart.positions(name)[i].reshape(-1) for name in names]
        pieces = zip(places, torch.split(vectors.cpu(), [len(place) for place in places]), strict=True)
        moving = [(where, values) for where, values in pieces if bool(values.any())]
        return Part(torch.cat([where for where, _ in moving]), torch.cat([values for _, values in moving]))


def _double(t: Tensor) -> Tensor:
    return t.cpu().double() if t.device.type == "mps" else t.double()


def _layer_rows(node: Node) -> Tensor:
    """All rows `(R, groups, m)` of a layer in float64, from what it received and how it was called."""
    assert node.received is not None
    h, shape = _double(node.received), node.arguments["weight_shape"]
    if node.kind == "linear":
        return h.reshape(-1, 1, shape[1])
    kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    settings = {key: node.arguments[key] for key in ("stride", "padding", "dilation") if key in node.arguments}
    groups = int(node.arguments.get("groups", 1))
    module = kinds[len(shape)](
        shape[1] * groups, shape[0], tuple(shape[2:]), groups=groups, bias=False, device="meta", **settings
    )
    kind = kind_of(module)
    assert kind is not None
    return kind.of("", module).rows(h)


# Directions in what a layer makes that no output depends on, from derivatives: `d` times anything is null.


@dataclass(frozen=True, eq=False)
class Writer:
    """Where a layer, an embedding or an added parameter writes: columns of positions, channel after channel."""

    node: Node
    entries: tuple[Tensor, ...]
    axis: int


class UnreadOutputs:
    """`d (x) c`: `W += d c^T, b += c_0 d`, where a change of the layer's output along `d` reaches no output.

    What a norm's mean, linear layers of low rank behind, or the loss take out: the latter sees no common shift of an
    example's outputs before a softmax. Derivatives are taken in float64. A direction counts only if half of the data
    say the same, so that it is none of those that more data would take away.

    Args:
        risk: the empirical risk.
        chart: its parameters.
        graph: the recorded operations.
        uses: what parameters do in it.
        counted: for each batch, which outputs the loss looks at; default all.
    """

    def __init__(self, risk: EmpiricalRisk, chart: Chart, graph: Graph, uses: Sequence[Use], counted: Counted) -> None:
        self._graph, self._rows = graph, list[tuple[dict[int, Tensor], Cause | None]]()
        writers = list(_writers(chart, graph, uses))
        if not writers:
            return
        precise = risk if risk.space.device.type == "mps" else risk.to(torch.float64)
        axes = [axis for axis in range(1, risk.outputs.ndim) if shift_invariant(risk, axis)]
        self._slack = 100 * precise.eps / torch.finfo(torch.float64).eps
        self._rows.append((_sensitive_rows(precise, writers, counted, []), None))
        if axes:
            self._rows.append((_sensitive_rows(precise, writers, counted, axes), Cause.SOFTMAX_SHIFT))

    def candidates(self, chart: Chart, uses: Sequence[Use]) -> list[Candidate]:
        """Those that move the free parameters of a chart."""
        found: dict[bool, list[Candidate]] = {False: [], True: []}
        for writer in _writers(chart, self._graph, uses):
            for rows_of, known in self._rows:
                d = _steady(rows_of.get(writer.node.index), self._slack)
                if d is not None:
                    cause = known or _cause(self._graph, d)
                    parts = [Part(entries, d) for entries in writer.entries]
                    finite = _at_once(self._graph, writer, cause, d)
                    orbits = (Orbit(cause, shifted=p.positions, steps=p.values[:, 0]) for p in parts if finite)
                    found[cause is Cause.SOFTMAX_SHIFT].append(Candidate(cause, tuple(parts), orbits=tuple(orbits)))
        return found[False] + found[True]


def _writers(chart: Chart, graph: Graph, uses: Sequence[Use]) -> Iterator[Writer]:
    """Parameters that are free and used once."""
    counts = torch.zeros(len(chart.values), dtype=torch.int64)
    for use in uses:
        for entries in use.entries:
            counts += torch.bincount(torch.from_numpy(entries).reshape(-1), minlength=len(counts))

    def movable(entries: Tensor) -> bool:
        return bool((entries < chart.dim).all()) and bool((counts[entries] == 1).all())

    for use in uses:
        if use.node >= 0 and not use.entrywise and len(use.source) == 1:
            node = graph.nodes[use.node]
            columns = [*torch.from_numpy(use.weight.T), *([] if use.bias is None else [torch.from_numpy(use.bias)])]
            free = tuple(column for column in columns if movable(column))
            if free and node.channel_axis is not None:
                yield Writer(node, free, node.channel_axis)
    for node in graph:
        for name in node.parameters.values() if node.kind == "add" else ():
            places = chart.positions(name)
            if places.ndim and places.shape[-1] == node.shape[-1] and movable(places):
                yield Writer(node, tuple(places.reshape(-1, places.shape[-1])), len(node.shape) - 1)


def _sensitive_rows(risk: EmpiricalRisk, writers: list[Writer], counted: Counted, axes: list[int]) -> dict[int, Tensor]:
    """Derivatives of random combinations of the outputs, `(rows, channels)` for each node, in a random order."""
    generator = torch.Generator().manual_seed(0)
    axis_of = {writer.node.index: writer.axis for writer in writers}
    found: dict[int, list[Tensor]] = {index: [] for index in axis_of}
    for batch in risk.batches:
        covectors = list(_covectors(risk, batch, None if counted is None else counted[batch.index], axes, generator))
        for grads in sensitivities(risk, batch, covectors):
            for index in [k for k in axis_of if k in grads]:
                rows_of = grads[index].movedim(axis_of[index], -1)
                rows_of = rows_of.reshape(-1, rows_of.shape[-1])
                rows_of = rows_of[(rows_of != 0).any(dim=1)]
                keep = torch.randperm(len(rows_of), generator=generator)[: _ROWS * rows_of.shape[1]]
                found[index].append(rows_of[keep])
    stacked = {index: torch.cat(parts) for index, parts in found.items() if parts}
    return {index: all_of[torch.randperm(len(all_of), generator=generator)] for index, all_of in stacked.items()}


def _covectors(
    risk: EmpiricalRisk, batch: Batch, counted: Tensor | None, axes: list[int], generator: torch.Generator
) -> Iterator[Tensor]:
    with torch.no_grad():
        like = risk.batch_outputs(risk.named_tensors(), batch)
    weights = 1.0 if counted is None else counted.to(like)
    for _ in range(_PROBES):
        v = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like) * weights
        for axis in axes:
            v = v - v.mean(dim=axis, keepdim=True)
        yield v * weights


def _steady(rows_of: Tensor | None, slack: float) -> Tensor | None:
    """`(channels, q)`: directions that all rows are orthogonal to, and that half of them tell as well."""
    if rows_of is None or len(rows_of) < 2:
        return None
    live = (rows_of != 0).any(dim=0)
    rows_of = rows_of[:, live]
    half, whole = null_vectors(rows_of[: len(rows_of) // 2], slack), null_vectors(rows_of, slack)
    if whole.shape[1] == 0 or whole.shape[1] != half.shape[1]:
        return None
    d = torch.zeros(len(live), whole.shape[1], dtype=torch.float64)
    d[live] = whole
    return d


def _at_once(graph: Graph, writer: Writer, cause: Cause, d: Tensor) -> bool:
    """Whether what removes `d` comes right behind, whatever the parameters: then it is a translation of any length."""
    readers = graph.consumers(writer.node.index)
    common = d.shape[1] == 1 and float((d - d[0]).abs().max()) < 1e-12
    last = cause is Cause.SOFTMAX_SHIFT and writer.node.index == graph.result and not readers
    return common and (last or (bool(readers) and all(SHIFTS.get(node.kind) is cause for node in readers)))


def _cause(graph: Graph, d: Tensor) -> Cause:
    """The first operation that takes out what `d` is, a common shift of channels or of each group of them."""
    for node in graph:
        if node.kind in ("layer_norm", "group_norm", "softmax", "log_softmax"):
            groups = int(node.arguments["groups"]) if node.kind == "group_norm" else 1
            if len(d) % groups == 0:
                common = d.view(groups, -1, d.shape[1])
                if float((common - common[:, :1]).abs().max()) < 1e-9:
                    return SHIFTS[node.kind]
    return Cause.UNREAD_OUTPUTS


def shift_invariant(risk: EmpiricalRisk, axis: int) -> bool:
    """Whether adding another constant along an axis of the outputs, elsewhere any, leaves the loss as it is.

    Constants of all sizes are tried: beside large outputs or targets the loss hides small ones in its rounding.
    """
    batch = next(iter(risk.batches))
    with torch.no_grad():
        outputs = risk.batch_outputs(risk.named_tensors(), batch)
        shape = [1 if d == axis else size for d, size in enumerate(outputs.shape)]
        shift = torch.linspace(-1.0, 2.0, torch.Size(shape).numel(), dtype=torch.float64).view(shape).to(outputs)
        plain, largest = risk.batch_loss(outputs, batch), torch.finfo(outputs.dtype).max
        for size in (largest**power for power in (0.0, 0.12, 0.24, 0.36, 0.48)):
            shifted = outputs + size * shift
            moved = risk.batch_loss(shifted, batch)
            if not bool(torch.isfinite(moved)) and size > 1:
                break  # a loss that overflows says nothing
            if not bool((plain - moved).abs() <= 100 * risk.eps * (1 + plain.abs() + shifted.abs().max())):
                return False
    return True
