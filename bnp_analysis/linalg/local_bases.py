"""Orthonormal columns on few coordinates each, grown some columns at a time, and what is orthogonal to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

# Coordinates `(p,)` and columns `(p, k)` on them; on the CPU, in float64.
Block = tuple[Tensor, Tensor]
# The stubs of scipy cannot tell which of many arrays these are.
Sparse = Any
_coo_array: Any = sparse.coo_array
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Columns that are compared with the others at once.
_TOGETHER = 64
# Entries of unit columns, and scalar products of two, that are rounding.
_ROUNDING = 2.0**-52
# Longer than this, a direction outside the others has lost no digit that counts; until all are, so often.
_CLEAR, _PASSES = 0.1, 4
# No longer than this, it is what rounding has left.
_NOTHING = 1e-13


class LocalBasis:
    """Orthonormal columns, and what is orthogonal to them; some columns at a time, on the coordinates that count.

    A product of two sparse matrices costs ten times what a sparse one with a narrow dense one does, operation for
    operation.
    """

    def __init__(self, dim: int) -> None:
        self._columns: Sparse = sparse.csc_array((dim, 0))
        # Coordinates, the part that has each, and where the columns of every part begin.
        self._where, self._parts, self._begins = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64)

    def extend(self, blocks: Sequence[Block]) -> None:
        dim = self._columns.shape[0]
        self._columns = sparse.hstack([self._columns, sparse_columns(dim, blocks)], format="csc")
        numbers = np.arange(len(blocks)) + len(self._begins) - 1
        self._where = np.concatenate([self._where, *(where.numpy() for where, _ in blocks)])
        self._parts = np.concatenate([self._parts, np.repeat(numbers, [len(where) for where, _ in blocks])])
        self._begins = np.concatenate([self._begins, self._begins[-1] + np.cumsum([v.shape[1] for _, v in blocks])])

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
        touched = np.zeros(columns.shape[0], bool)
        touched[columns.indices] = True
        parts = _marked(self._parts[touched[self._where]], len(self._begins) - 1)
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


def orthonormal_blocks(dim: int, blocks: Sequence[Block]) -> list[Block] | None:
    """An orthonormal basis of the span of independent columns, which stays on few coordinates where they are.

    Blocks before others are orthogonalized first, those in a row that share no coordinates together.

    Returns:
        The blocks; None where columns are dependent to rounding.
    """
    known, found = LocalBasis(dim), list[Block]()
    for group in _apart(dim, blocks):
        fresh = [(where, columns / columns.norm(dim=0)) for where, columns in group]
        # What is left of nearly dependent columns is their rounding, enlarged: taken off once more.
        for _ in range(_PASSES):
            rest, least = known.taken_off(sparse_columns(dim, fresh))[0], 1.0
            fresh = []
            for which in components(rest):
                where, values = dense_block(rest, which)
                Q, R = torch.linalg.qr(values)
                least = min(least, float(R.diagonal().abs().min()))
                fresh.append((where, Q))
            if least > _CLEAR or least <= _NOTHING:
                break
        if least <= _CLEAR or sum(Q.shape[1] for _, Q in fresh) != sum(columns.shape[1] for _, columns in group):
            return None
        known.extend(fresh)
        found += fresh
    return found


def _apart(dim: int, blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks in their order, as many together as share no coordinates."""
    some, taken = list[Block](), torch.zeros(dim, dtype=torch.bool)
    for where, columns in blocks:
        if some and bool(taken[where].any()):
            yield some
            some, taken = [], torch.zeros(dim, dtype=torch.bool)
        some.append((where, columns))
        taken[where] = True
    if some:
        yield some


def _marked(indices: Ints, size: int) -> Ints:
    """Which of the numbers below `size` there are, in order."""
    found = np.zeros(size, bool)
    found[indices] = True
    return np.flatnonzero(found)


def _rounded(columns: Floats) -> Floats:
    """Without what rounding explains in unit columns."""
    return np.where(np.abs(columns) <= _ROUNDING, 0.0, columns)


def sparse_columns(dim: int, blocks: Sequence[Block]) -> Sparse:
    """Blocks side by side as a sparse matrix of columns."""
    if not blocks:
        return sparse.csc_array((dim, 0))
    values = torch.cat([columns.T.reshape(-1) for _, columns in blocks]).numpy()
    where = torch.cat([where.repeat(columns.shape[1]) for where, columns in blocks]).numpy()
    ends = np.cumsum([0, *(len(where) for where, columns in blocks for _ in range(columns.shape[1]))])
    matrix = sparse.csc_array((values, where, ends), shape=(dim, len(ends) - 1))
    # Zeros that are stored would pass for shared coordinates.
    matrix.data[np.abs(matrix.data) <= _ROUNDING] = 0.0
    matrix.eliminate_zeros()
    return matrix


def dense_block(columns: Sparse, which: Ints) -> Block:
    """Some sparse columns on the coordinates where one of them is not zero."""
    begins, ends = columns.indptr[which], columns.indptr[which + 1]
    inside = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
    positions, place = np.unique(columns.indices[inside], return_inverse=True)
    values = np.zeros((len(positions), len(which)))
    values[place, np.repeat(np.arange(len(which)), ends - begins)] = columns.data[inside]
    return torch.from_numpy(positions.astype(np.int64)), torch.from_numpy(values)


def components(columns: Sparse) -> Iterator[Ints]:
    """The numbers of columns that share coordinates, together: small matrices, and zeros stay exact."""
    live = np.flatnonzero(np.diff(columns.indptr))
    if len(live) == 0:
        return
    rows, number = columns.indices, np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))
    edges = _coo_array((np.ones(len(rows)), (rows, number + columns.shape[0])), shape=[sum(columns.shape)] * 2)
    labels = connected_components(edges, directed=False)[1][columns.shape[0] :]
    order = live[np.argsort(labels[live], kind="stable")]
    yield from np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
