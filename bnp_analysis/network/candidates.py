"""Candidate null directions as columns on few coordinates, and how they are written into the flat space."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.network.graph import Graph
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
class Move:
    """A one-parameter group of maps of the flat space, `T_s T_t = T_(s t)`, read with `log t` as its time.

    Attributes:
        scaled, exponents: `theta[scaled] *= t^exponents`.
        moved, steps: `theta[moved] += log(t) steps`.
        sheared: for each of some steps in a row, `theta[target] += log(t) * factor * theta[source]`, summed over equal
            targets; columns `(target, source)` and the factors.
    """

    scaled: Tensor
    exponents: Tensor
    moved: Tensor
    steps: Tensor
    sheared: tuple[tuple[Tensor, Tensor], ...] = ()


@dataclass(frozen=True, eq=False)
class Candidate:
    """Directions of one cause; `exact` is False where only a norm's eps = 0 would make them null.

    `moves[i]` is the finite symmetry along the single column of `parts[i]`, where there is one.
    """

    cause: str
    parts: tuple[Part, ...]
    exact: bool = True
    moves: tuple[Move | None, ...] = ()

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
        begin, self._start = self.space.dim, {}
        for name, t in self._tensors.items():
            if name not in self.space:
                self._start[name] = begin
                begin += t.numel()
        # Every number of every parameter: the free ones as in the flat space, then the constants.
        self.size, self.dim = begin, self.space.dim

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def positions(self, name: str) -> Tensor:
        """Where the entries of a parameter lie, of its shape; constants lie behind the flat space."""
        start = self.space.slice_of(name).start if name in self.space else self._start[name]
        t = self._tensors[name]
        return torch.arange(start, start + t.numel()).view(t.shape)

    def values(self) -> Tensor:
        """All numbers by position."""
        found = torch.zeros(self.size, dtype=torch.float64)
        for name, t in self._tensors.items():
            found[self.positions(name).reshape(-1)] = t.reshape(-1)
        return found

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
