"""Null directions that come from the data: dependent inputs of a layer, rows that do not count, dead units (T11)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.network.candidates import Candidate, Chart, Part, Piece
from bnp_analysis.network.graph import Graph, Node
from bnp_analysis.network.layer_kinds import kind_of
from bnp_analysis.runtime.memory import require_memory

# Floating-point operations that the search in one layer may take.
_MOST_WORK = 2e12
_CAUSES = ("dependent inputs", "inactive rows", "dead units")


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
        entries = still.nonzero().reshape(-1)
        if len(entries):
            positions = chart.space.slice_of(name).start + entries
            parts.append(Part(positions, torch.eye(len(entries), dtype=torch.float64)))
    return Candidate("parameters without effect", tuple(parts))


def dependent_inputs(chart: Chart, graphs: list[Graph], skipped: list[str]) -> list[Candidate]:
    """`e_i (x) v` with `H^ v = 0` on the rows that reach the output of the network through unit `i`.

    All rows for most layers. What a ReLU or a max-pooling cuts does not count, and a unit with no row left is dead. A
    norm's gain and bias are the weights of units with one input.

    Args:
        chart: the parameters.
        graphs: the recorded operations of every batch.
        skipped: gets a word for every layer that was left out.

    Returns:
        Candidates with the causes `"dependent inputs"`, `"inactive rows"`, `"dead units"`.
    """
    parts: dict[str, list[Part]] = {cause: [] for cause in _CAUSES}
    for node in graphs[0]:
        names = [name for role, name in node.parameters.items() if role in ("weight", "bias") and name in chart.space]
        if not (node.is_layer or node.is_norm) or not names:
            continue
        shared = [name for name in names if not chart.movable(name)]
        if shared:
            skipped.append(f"{', '.join(shared)}: used more than once")
        elif node.channel_axis is None:
            skipped.append(f"{node.layer}: {node.kind} over several axes")
        else:
            search = _Search(chart, [graph.nodes[node.index] for graph in graphs], skipped)
            for i in range(search.units):
                cause, vectors = search.of_unit(i)
                part = chart.part(search.pieces(i, vectors)) if vectors.shape[1] else None
                if part is not None:
                    parts[cause].append(part)
    return [Candidate(cause, tuple(found)) for cause, found in parts.items()]


class _Search:
    """The rows of one layer or norm in all batches, and the null spaces of its units."""

    def __init__(self, chart: Chart, nodes: list[Node], skipped: list[str]) -> None:
        self._chart, self._nodes = chart, nodes
        first = nodes[0]
        axis = first.channel_axis
        assert axis is not None
        self.units = first.shape[axis]
        self.roles = [role for role in ("weight", "bias") if first.parameters.get(role) in chart.space.names]
        self.reach = torch.cat([_by_unit(node.reach, axis, self.units) for node in nodes])
        self.groups = int(first.arguments.get("groups", 1)) if first.kind == "conv" else 1
        features = 1 if first.is_norm else torch.Size(first.arguments["weight_shape"][1:]).numel()
        self.width = features * ("weight" in self.roles) + ("bias" in self.roles)
        numbers = float(len(self.reach)) * self.groups * self.width
        require_memory(int(8 * 4 * numbers), f"the input rows of {first.layer}", device=self.reach.device)
        partial = int((self.reach.any(dim=0) & ~self.reach.all(dim=0)).sum())
        self.searched = 2.0 * numbers * self.width * (1 + partial) <= _MOST_WORK
        if not self.searched:
            skipped.append(f"{first.layer}: too large to search the active rows of each unit for dependences")
        self._rows: Tensor | None = None
        self._common: dict[int, Tensor] = {}

    def of_unit(self, i: int) -> tuple[str, Tensor]:
        """The cause and an orthonormal basis of the null space of unit `i`'s rows."""
        mine = self.reach[:, i]
        if not bool(mine.any()):
            return "dead units", torch.eye(self.width, dtype=torch.float64)
        h = self._unit_rows(i)
        common = self._common_null(i, h)
        if not self.searched or bool(mine.all()):
            return "dependent inputs", common
        vectors = null_vectors(h[mine.to(h.device)])
        return ("dependent inputs", common) if vectors.shape[1] == common.shape[1] else ("inactive rows", vectors)

    def _common_null(self, i: int, h: Tensor) -> Tensor:
        key = i if self._nodes[0].is_norm else i // (self.units // self.groups)
        if key not in self._common:
            self._common[key] = null_vectors(h)
        return self._common[key]

    def _unit_rows(self, i: int) -> Tensor:
        """`(R, m + 1)`, every row of length one: a row counts however small it is."""
        if self._nodes[0].is_norm:
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
        axis = node.channel_axis
        assert axis is not None
        y = _double(node.output).movedim(axis, -1).reshape(-1, self.units)[:, i : i + 1]
        gain, offset = (self._chart.tensor(node.parameters[r])[i] if r in node.parameters else None for r in _AFFINE)
        y = y if offset is None else y - offset
        return y if gain is None or gain == 0 else y / gain

    def pieces(self, i: int, vectors: Tensor) -> list[Piece]:
        """Vectors over `(weights, bias)` of unit `i`."""
        found, begin = [], 0
        for role in self.roles:
            name = self._nodes[0].parameters[role]
            entries = self._chart.entries(name, i)
            found.append(Piece(name, entries, vectors[begin : begin + len(entries)].cpu()))
            begin += len(entries)
        return found


_AFFINE = ("weight", "bias")


def _by_unit(values: Tensor | None, axis: int, units: int) -> Tensor:
    assert values is not None
    return values.movedim(axis, -1).reshape(-1, units)


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


def null_vectors(matrix: Tensor, slack: float = 1.0) -> Tensor:
    """An orthonormal basis, in float64, of the right null space: columns that are dependent to the rounding of the SVD.

    Columns are compared at one scale, so that a small one does not pass for zero; in float64 whatever the dtype, so
    that rounded columns do not pass for dependent ones. `slack` allows for a matrix that was computed.

    Example:
        >>> import torch
        >>> null_vectors(torch.tensor([[1.0, 1e-20, 2.0], [1.0, 0.0, 2.0]], dtype=torch.float64)).shape
        torch.Size([3, 1])
    """
    count, width = matrix.shape
    matrix = matrix.double()
    size = matrix.norm(dim=0) if count else matrix.new_zeros(width)
    scale = torch.where(size > 0, size, 1.0)
    work = matrix / scale
    work = torch.linalg.qr(work, mode="r")[1] if count > width else work
    _, s, vh = torch.linalg.svd(work, full_matrices=True)
    floor = slack * max(count, width) * torch.finfo(matrix.dtype).eps * (float(s[0]) if s.numel() else 0.0)
    rank = int((s > floor).sum())
    if rank == width:
        return matrix.new_zeros(width, 0)
    # Back in the old scale; the largest is taken out, so that no column loses its digits.
    basis: Tensor = torch.linalg.qr(vh[rank:].T / (scale / scale.min()).unsqueeze(1))[0]
    return basis
