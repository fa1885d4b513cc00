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
from bnp_analysis.symmetry.linear_system import Ints, Sparse, coo_array

# Closer to the span of the others than this, relative, a direction does not count as new.
_NEW = 5e-7
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
        self._known = sparse.csc_array((dim, 0))

    def add(self, cause: str, parts: Sequence[Part], turn: int) -> None:
        """Add the span of null columns, but for what is in it already: in one go what shares no coordinates."""
        lengths = [part.values.norm(dim=0) for part in parts]
        unit = [Part(part.positions, part.values / length) for part, length in zip(parts, lengths, strict=True)]
        units = _columns(self._dim, unit)
        owner = np.repeat(np.arange(len(parts)), [part.count for part in parts])
        overlaps = self._overlaps(units)
        spread = np.zeros(len(parts), bool)
        spread[owner[np.diff(overlaps.indptr) > 0]] = True
        rest = self._without_known(units, overlaps)
        direct: list[Chunk] = []
        again: list[Part] = []
        for columns in _components(rest):
            source = np.unique(owner[columns])
            if len(source) == 1 and not spread[source[0]]:
                own = unit[source[0]] if len(columns) == unit[source[0]].count else _dense_part(rest, columns)
                direct.append(Chunk(cause, Part(own.positions, _span(own.values)), turn, True))
            else:
                part = _dense_part(rest, columns)
                again.append(Part(part.positions, _span(part.values)))
        # What is left of nearly dependent columns is their rounding, enlarged: cleaned, and verified once more.
        again = [part for part in again if part.count]
        fresh = _columns(self._dim, again)
        cleaned = self._without_known(fresh, self._overlaps(fresh))
        ends = np.cumsum([part.count for part in again])
        clean = [
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
        self._chunks, self._known = [], sparse.csc_array((self._dim, 0))
        self._extend([chunk for chunk in kept if chunk.part.count])
        return last if failed else None

    def _extend(self, chunks: list[Chunk]) -> None:
        self._chunks += chunks
        more = _columns(self._dim, [chunk.part for chunk in chunks])
        self._known = sparse.hstack([self._known, more], format="csc")

    def _overlaps(self, columns: Sparse) -> Sparse:
        """Scalar products of the basis with unit columns, those that are not rounding."""
        return _cleaned(self._known.T @ columns)

    def _without_known(self, columns: Sparse, overlaps: Sparse) -> Sparse:
        """Columns minus their part in the basis, twice for rounding; exact zeros stay."""
        if overlaps.nnz:
            columns = _cleaned(columns - self._known @ overlaps)
            columns = _cleaned(columns - self._known @ self._overlaps(columns))
        return columns

    def counts(self) -> dict[str, int]:
        """Cause -> dimensions, in the order in which the causes came."""
        found: dict[str, int] = {}
        for chunk in self._chunks:
            found[chunk.cause] = found.get(chunk.cause, 0) + chunk.part.count
        return found

    def dense(self, like: Tensor) -> Tensor:
        """`(n, r)`, cause after cause as in `counts`."""
        basis = torch.zeros(self._dim, sum(self.counts().values()), dtype=like.dtype, device=like.device)
        begin = 0
        for wanted in self.counts():
            for part in (chunk.part for chunk in self._chunks if chunk.cause == wanted):
                basis[part.positions.to(like.device), begin : begin + part.count] = part.values.to(like)
                begin += part.count
        return basis


def _span(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span; themselves where they are one."""
    if columns.shape[1] == 1:
        return columns / columns.norm() if float(columns.norm()) > _NEW else columns[:, :0]
    gram = columns.T @ columns
    if float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max()) < 1e-14:
        return columns
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = u[:, s > _NEW]
    return basis


def _columns(dim: int, parts: Sequence[Part]) -> Sparse:
    """Parts side by side as a sparse matrix of columns."""
    if not parts:
        return sparse.csc_array((dim, 0))
    values = torch.cat([part.values.T.reshape(-1) for part in parts]).numpy()
    where = torch.cat([part.positions.repeat(part.count) for part in parts]).numpy()
    ends = np.cumsum([0, *(len(part.positions) for part in parts for _ in range(part.count))])
    # Zeros that are stored would pass for shared coordinates.
    return _cleaned(sparse.csc_array((values, where, ends), shape=(dim, len(ends) - 1)))


def _cleaned(matrix: Sparse) -> Sparse:
    """By columns, without what rounding explains in unit columns."""
    matrix = matrix.tocsc()
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
