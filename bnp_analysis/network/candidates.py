"""Candidate null directions as columns on few coordinates, and how they are written into the flat space."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.network.graph import Graph, Node
from bnp_analysis.network.links import Reader
from bnp_analysis.network.risk import EmpiricalRisk


@dataclass(frozen=True, eq=False)
class Part:
    """Columns `values (p, k)` on the flat positions `positions (p,)`, zero elsewhere; on the CPU, in float64."""

    positions: Tensor
    values: Tensor

    @property
    def count(self) -> int:
        return self.values.shape[1]


@dataclass(frozen=True, eq=False)
class Candidate:
    """Directions of one cause; `exact` is False where only a norm's eps = 0 would make them null."""

    cause: str
    parts: tuple[Part, ...]
    exact: bool = True

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)


@dataclass(frozen=True, eq=False)
class Piece:
    """Columns `values (p, k)` on the entries `entries (p,)` of one parameter tensor."""

    name: str
    entries: Tensor
    values: Tensor


class Chart:
    """Where the parameters of a graph lie in the flat space, and their values in float64 on the CPU."""

    def __init__(self, risk: EmpiricalRisk, graph: Graph) -> None:
        self.space, self.graph = risk.space, graph
        self._tensors = {name: t.detach().cpu().double() for name, t in risk.named_tensors().items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def movable(self, name: str) -> bool:
        """Whether a parameter is free and used once."""
        return name in self.space and self.graph.uses(name) == 1

    def part(self, pieces: Iterable[Piece]) -> Part | None:
        """Pieces of several tensors as one part; None if a constant or shared tensor would have to move."""
        positions, values = [], []
        for piece in pieces:
            if not bool(piece.values.any()):
                continue
            if not self.movable(piece.name):
                return None
            positions.append(self.space.slice_of(piece.name).start + piece.entries)
            values.append(piece.values)
        return Part(torch.cat(positions), torch.cat(values)) if positions else None

    def candidate(self, cause: str, parts: Iterable[Part | None], *, exact: bool = True) -> Candidate:
        return Candidate(cause, tuple(part for part in parts if part is not None), exact)

    def entries(self, name: str, unit: int) -> Tensor:
        """The entries of row `unit` of a tensor."""
        tensor = self._tensors[name]
        width = tensor.numel() // tensor.shape[0]
        return torch.arange(unit * width, (unit + 1) * width)

    def row(self, node: Node, into: int, source: int) -> list[Piece]:
        """The weights and bias of unit `source`, placed in unit `into`."""
        names = [node.parameters[role] for role in ("weight", "bias") if role in node.parameters]
        return [Piece(name, self.entries(name, into), self.tensor(name)[source].reshape(-1, 1)) for name in names]

    def columns(self, readers: Iterable[Reader], channel: int, factor: float, onto: int | None = None) -> list[Piece]:
        """The weights that read a channel, times a factor, placed on channel `onto`; default where they are."""
        pieces = []
        for reader in readers:
            name = reader.node.parameters["weight"]
            values = self.tensor(name).reshape(-1, 1)[reader.entries(channel)]
            pieces.append(Piece(name, reader.entries(channel if onto is None else onto), factor * values))
        return pieces

    def single(self, name: str, entry: int, value: float = 1.0) -> Piece:
        return Piece(name, torch.tensor([entry]), torch.tensor([[value]], dtype=torch.float64))
