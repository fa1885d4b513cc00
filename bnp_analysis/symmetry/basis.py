"""An orthonormal basis of null directions, grown cause by cause; what is local stays local."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bnp_analysis.linalg.spectra.checks import Verifier
from bnp_analysis.symmetry.candidates import Part
from bnp_analysis.symmetry.linear_system import Floats, Ints, Sparse, coo_array

# Coordinates and columns on them.
Block = tuple[Tensor, Tensor]
# Closer to the span of the others than this, relative, a direction does not count as new.
_NEW = 5e-7
# Longer than this, a direction outside the others has lost no digit that counts.
_CLEAR = 0.1
# Columns that are compared with the others at once.
_TOGETHER = 64
# Entries of unit columns, and scalar products of two, that are rounding.
_ROUNDING = 2.0**-52


@dataclass(frozen=True, eq=False)
class Chunk:
    """Orthonormal columns on the coordinates that they live on.

    Attributes:
        cause: why they are null.
        part: the columns.
        turn: the number of the call of `add` that they came with.
        verified: whether they are candidates that were, not what is left of some.
    """

    cause: str
    part: Part
    turn: int
    verified: bool


class NullBasis:
    """Orthonormal columns in `(n, r)`, kept on the coordinates that they live on.

    Args:
        dim: the dimension `n`.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._chunks: list[Chunk] = []
        self._known = _Known(dim)

    def add(self, cause: str, parts: Sequence[Part], turn: int) -> None:
        """Add the span of null columns, but for what is in it already: in one go what shares no coordinates."""
        lengths = [part.values.norm(dim=0) for part in parts]
        unit = [Part(part.positions, part.values / length) for part, length in zip(parts, lengths, strict=True)]
        units = _columns(self._dim, unit)
        owner = np.repeat(np.arange(len(parts)), [part.count for part in parts])
        rest, reduced = self._known.taken_off(units)
        spread = np.zeros(len(parts), bool)
        spread[owner[reduced]] = True
        direct: list[Chunk] = []
        clean: list[Chunk] = []
        again: list[Part] = []
        for columns in _components(rest):
            source = np.unique(owner[columns])
            if len(source) == 1 and not spread[source[0]]:
                own = unit[source[0]] if len(columns) == unit[source[0]].count else _dense_part(rest, columns)
                direct.append(Chunk(cause, Part(own.positions, _span(own.values)[0]), turn, True))
            else:
                part = _dense_part(rest, columns)
                values, least = _span(part.values)
                part = Part(part.positions, values)
                if least > _CLEAR:
                    clean.append(Chunk(cause, part, turn, False))
                elif part.count:
                    again.append(part)
        # What is left of nearly dependent columns is their rounding, enlarged: cleaned, and verified once more.
        cleaned, _ = self._known.taken_off(_columns(self._dim, again))
        ends = np.cumsum([part.count for part in again])
        clean += [
            Chunk(cause, Part(part.positions, torch.linalg.qr(part.values)[0]), turn, False)
            for part in (_dense_part(cleaned, np.arange(e - p.count, e)) for p, e in zip(again, ends, strict=True))
        ]
        self._extend([chunk for chunk in direct + clean if chunk.part.count])

    def settle(self, verifier: Verifier) -> int | None:
        """Verify what was cleaned; of the first turn where some is not null it is dropped, and all that came later.

        Returns:
            That turn; None where all is null.
        """
        waiting = [i for i, chunk in enumerate(self._chunks) if not chunk.verified]
        parts = [self._chunks[i].part for i in waiting]
        sizes = verifier.sizes([(part.positions, part.values) for part in parts])
        null = {i: size <= verifier.tolerance for i, size in zip(waiting, sizes, strict=True)}
        failed = [self._chunks[i].turn for i, mine in null.items() if not bool(mine.all())]
        last = min(failed, default=self._chunks[-1].turn if self._chunks else 0)
        kept = []
        for i, chunk in enumerate(self._chunks):
            if chunk.turn <= last:
                values = chunk.part.values[:, null[i]] if i in null else chunk.part.values
                kept += [Chunk(chunk.cause, Part(chunk.part.positions, values), chunk.turn, True)]
        self._chunks, self._known = [], _Known(self._dim)
        self._extend([chunk for chunk in kept if chunk.part.count])
        return last if failed else None

    def _extend(self, chunks: list[Chunk]) -> None:
        self._chunks += chunks
        self._known.extend([chunk.part for chunk in chunks])

    def counts(self) -> dict[str, int]:
        """Cause -> dimensions, in the order in which the causes came."""
        found: dict[str, int] = {}
        for chunk in self._chunks:
            found[chunk.cause] = found.get(chunk.cause, 0) + chunk.part.count
        return found

    def blocks(self, like: Tensor) -> tuple[Block, ...]:
        """Positions `(p,)` and columns `(p, k)`, cause after cause as in `counts`; where there is none, one of none."""
        none = like.new_zeros(0, 0)
        parts = [chunk.part for wanted in self.counts() for chunk in self._chunks if chunk.cause == wanted]
        found = tuple((part.positions.to(like.device), part.values.to(like)) for part in parts)
        return found or ((none.reshape(0).long(), none),)


class _Known:
    """Orthonormal columns, and what is orthogonal to them; some columns at a time, on the coordinates that count.

    A product of two sparse matrices costs ten times what a sparse one with a narrow dense one does, operation for
    operation.
    """

    def __init__(self, dim: int) -> None:
        self._columns: Sparse = sparse.csc_array((dim, 0))
        # Which parts have a coordinate, and where the columns of each begin.
        self._parts: Sparse = sparse.csr_array((dim, 0))
        self._begins = np.zeros(1, np.int64)

    def extend(self, parts: Sequence[Part]) -> None:
        dim = self._columns.shape[0]
        self._columns = sparse.hstack([self._columns, _columns(dim, parts)], format="csc")
        one = [Part(part.positions, torch.ones(len(part.positions), 1, dtype=torch.float64)) for part in parts]
        self._parts = sparse.hstack([self._parts, _columns(dim, one)], format="csr")
        self._begins = np.concatenate([self._begins, self._begins[-1] + np.cumsum([part.count for part in parts])])

    def taken_off(self, columns: Sparse) -> tuple[Sparse, Ints]:
        """Unit columns minus their part in the span, twice for rounding, and the numbers of those that have one.

        What shares no coordinates keeps its exact zeros.
        """
        parts, numbers = [columns[:, :0]], [np.zeros(0, np.int64)]
        for begin in range(0, columns.shape[1], _TOGETHER):
            some, reduced = self._taken_off(columns[:, begin : begin + _TOGETHER])
            parts.append(some)
            numbers.append(begin + reduced)
        return sparse.hstack(parts, format="csc"), np.concatenate(numbers)

    def _taken_off(self, columns: Sparse) -> tuple[Sparse, Ints]:
        parts = _marked(self._parts[_marked(columns.indices, columns.shape[0])].indices, self._parts.shape[1])
        met = [np.arange(*self._begins[part : part + 2]) for part in parts]
        known = self._columns[:, np.concatenate(met)] if met else self._columns[:, :0]
        where = _marked(np.concatenate([columns.indices, known.indices]), columns.shape[0])
        known, rest = known[where], columns[where].toarray()
        overlaps = _rounded(known.T @ rest)
        live = overlaps.any(axis=1)
        if not live.any():
            return columns, np.zeros(0, np.int64)
        known, overlaps = known[:, np.flatnonzero(live)], overlaps[live]
        rest = _rounded(rest - known @ overlaps)
        rest = _rounded(rest - known @ _rounded(known.T @ rest))
        column, row = np.nonzero(rest.T)
        ends = np.searchsorted(column, np.arange(rest.shape[1] + 1))
        left = sparse.csc_array((rest[row, column], where[row], ends), shape=columns.shape)
        return left, np.flatnonzero(overlaps.any(axis=0))


def _marked(indices: Ints, size: int) -> Ints:
    """Which of the numbers below `size` there are, in order."""
    found = np.zeros(size, bool)
    found[indices] = True
    return np.flatnonzero(found)


def _rounded(columns: Floats) -> Floats:
    """Without what rounding explains in unit columns."""
    return np.where(np.abs(columns) <= _ROUNDING, 0.0, columns)


def _span(columns: Tensor) -> tuple[Tensor, float]:
    """An orthonormal basis of the columns' span, themselves where they are one; and their least length in it."""
    if columns.shape[1] == 1:
        size = float(columns.norm())
        return (columns / size, size) if size > _NEW else (columns[:, :0], 0.0)
    gram = columns.T @ columns
    if float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max()) < 1e-14:
        return columns, 1.0
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = u[:, s > _NEW]
    return basis, float(s[s > _NEW].min()) if basis.shape[1] else 0.0


def _columns(dim: int, parts: Sequence[Part]) -> Sparse:
    """Parts side by side as a sparse matrix of columns."""
    if not parts:
        return sparse.csc_array((dim, 0))
    values = torch.cat([part.values.T.reshape(-1) for part in parts]).numpy()
    where = torch.cat([part.positions.repeat(part.count) for part in parts]).numpy()
    ends = np.cumsum([0, *(len(part.positions) for part in parts for _ in range(part.count))])
    matrix = sparse.csc_array((values, where, ends), shape=(dim, len(ends) - 1))
    # Zeros that are stored would pass for shared coordinates.
    matrix.data[np.abs(matrix.data) <= _ROUNDING] = 0.0
    matrix.eliminate_zeros()
    return matrix


def _dense_part(columns: Sparse, which: Ints) -> Part:
    """Some sparse columns on the coordinates where one of them is not zero."""
    begins, ends = columns.indptr[which], columns.indptr[which + 1]
    inside = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
    positions, place = np.unique(columns.indices[inside], return_inverse=True)
    values = np.zeros((len(positions), len(which)))
    values[place, np.repeat(np.arange(len(which)), ends - begins)] = columns.data[inside]
    return Part(torch.from_numpy(positions.astype(np.int64)), torch.from_numpy(values))


def _components(columns: Sparse) -> Iterator[Ints]:
    """The numbers of columns that share coordinates, together: small matrices, and zeros stay exact."""
    live = np.flatnonzero(np.diff(columns.indptr))
    if len(live) == 0:
        return
    rows, number = columns.indices, np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))
    edges = coo_array((np.ones(len(rows)), (rows, number + columns.shape[0])), shape=[sum(columns.shape)] * 2)
    labels = connected_components(edges, directed=False)[1][columns.shape[0] :]
    order = live[np.argsort(labels[live], kind="stable")]
    yield from np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
