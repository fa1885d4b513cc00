"""Homogeneous linear equations with few terms in many unknowns, and a local basis of their solutions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.csgraph import connected_components

# The stubs of scipy cannot tell which of many arrays these are.
Sparse = Any
coo_array: Any = sparse.coo_array
csr_array: Any = sparse.csr_array
vstack: Any = sparse.vstack
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

# Pivots and coefficients below this, relative to their row, are rounding.
_SMALL = 1e-11
# Unknowns that only elimination can settle, at once.
_MOST = 2000


class Equations:
    """Rows `sum_k c_k u_k = 0`, collected piece by piece."""

    def __init__(self) -> None:
        self._rows: list[Ints] = []
        self._unknowns: list[Ints] = []
        self._values: list[Floats] = []
        self.count = 0

    def add(self, *terms: tuple[Ints | int, Floats | float]) -> None:
        """One equation per entry of the longest array; each term is (unknowns, coefficients)."""
        arrays = [np.broadcast_arrays(np.asarray(u, np.int64).ravel(), np.asarray(c, float).ravel()) for u, c in terms]
        size = 0 if any(len(u) == 0 for u, _ in arrays) else max(len(u) for u, _ in arrays)
        if size == 0:
            return
        for unknowns, values in arrays:
            self._rows.append(self.count + np.arange(size))
            self._unknowns.append(np.broadcast_to(unknowns, (size,)))
            self._values.append(np.broadcast_to(values, (size,)))
        self.count += size

    def matrix(self, unknowns: int) -> Sparse:
        """`(equations, unknowns)`."""
        if not self._rows:
            return csr_array((0, unknowns))
        where = (np.concatenate(self._rows), np.concatenate(self._unknowns))
        return coo_array((np.concatenate(self._values), where), shape=(self.count, unknowns)).tocsr()


def solutions(matrix: Sparse) -> tuple[list[tuple[Ints, Floats]], int]:
    """A basis of `{u: M u = 0}`, each vector as (unknowns, values), on as few unknowns as elimination finds.

    Equations `u = 0` and `u = v` are settled by counting classes; the rest by elimination, component by component.

    Returns:
        The basis, and how many unknowns were left out because their component is too large.

    Example:
        >>> basis, _ = solutions(csr_array(np.array([[1.0, -1, 0, 0], [0, 0, 1, 1]])))
        >>> [(u.tolist(), v.tolist()) for u, v in basis]
        [([0, 1], [1.0, 1.0]), ([2, 3], [-1.0, 1.0])]
    """
    labels, rest = _classes(matrix)
    members = _members(labels)
    involved = np.unique(rest.indices)
    alone = np.ones(len(members), bool)
    alone[involved] = alone[labels[-1]] = False
    free = np.flatnonzero(alone)
    basis: list[tuple[Ints, Floats]] = [(members[c], np.ones(len(members[c]))) for c in free]
    left_out = 0
    for classes, dense in _components(rest):
        if dense is None:
            left_out += len(classes)
            continue
        for column in _null_columns(dense).T:
            moving = np.flatnonzero(column)
            where = [members[classes[k]] for k in moving]
            values = [np.full(len(members[classes[k]]), column[k]) for k in moving]
            basis.append((np.concatenate(where), np.concatenate(values)))
    basis.sort(key=lambda vector: int(vector[0].min()))
    return basis, left_out


def _classes(matrix: Sparse) -> tuple[Ints, Sparse]:
    """The class of each unknown, that of zero last; and the equations between classes that are left."""
    unknowns = matrix.shape[1]
    labels = np.arange(unknowns + 1)
    while True:
        count = int(labels.max()) + 1
        onto = csr_array((np.ones(unknowns), (np.arange(unknowns), labels[:-1])), shape=(unknowns, count))
        rows = _cleaned(csr_array(matrix @ onto), int(labels[-1]))
        size = np.diff(rows.indptr)
        first = rows.indptr[:-1]
        single = rows.indices[first[size == 1]]
        pairs = first[size == 2]
        same = np.abs(rows.data[pairs] + rows.data[pairs + 1]) <= _SMALL * np.abs(rows.data[pairs])
        a = np.concatenate([single, rows.indices[pairs[same]]])
        b = np.concatenate([np.full(len(single), labels[-1]), rows.indices[pairs[same] + 1]])
        if len(a) == 0:
            return labels, rows
        edges = coo_array((np.ones(len(a)), (a, b)), shape=(count, count))
        labels = connected_components(edges, directed=False)[1].astype(np.int64)[labels]


def _cleaned(rows: Sparse, zero: int) -> Sparse:
    """Without the class of zero, without rounding, without empty rows."""
    coo = rows.tocoo()
    largest = np.zeros(rows.shape[0])
    np.maximum.at(largest, coo.coords[0], np.abs(coo.data))
    keep = (coo.coords[1] != zero) & (np.abs(coo.data) > _SMALL * largest[coo.coords[0]])
    kept = coo_array((coo.data[keep], (coo.coords[0][keep], coo.coords[1][keep])), shape=rows.shape).tocsr()
    return csr_array(kept[np.flatnonzero(np.diff(kept.indptr))])


def _members(labels: Ints) -> list[Ints]:
    order = np.argsort(labels[:-1], kind="stable")
    cuts = np.searchsorted(labels[:-1][order], np.arange(int(labels.max()) + 2))
    return [order[begin:end] for begin, end in pairwise(cuts)]


def _components(rows: Sparse) -> Iterator[tuple[Ints, Floats | None]]:
    """Classes that equations connect, with their equations; None where they are too many."""
    if rows.shape[0] == 0:
        return
    pattern = csr_array((np.ones(rows.nnz), rows.indices, rows.indptr), shape=rows.shape)
    tree = coo_array(
        (np.ones(rows.nnz), (_row_numbers(rows), rows.indices + rows.shape[0])), shape=[sum(rows.shape)] * 2
    )
    labels = connected_components(tree, directed=False)[1]
    mine = labels[rows.shape[0] :]
    for label in np.unique(mine[np.unique(pattern.indices)]):
        classes = np.flatnonzero(mine == label)
        if len(classes) > _MOST:
            yield classes, None
            continue
        dense = rows[np.flatnonzero(labels[: rows.shape[0]] == label)][:, classes].toarray()
        # Most equations come many times: sorting rows is slower than looking at their bytes.
        once = list({row.tobytes(): i for i, row in enumerate(dense)}.values())
        yield classes, np.unique(dense[once], axis=0)


def _row_numbers(rows: Sparse) -> Ints:
    return np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))


def _null_columns(matrix: Floats) -> Floats:
    """The null space by Gauss-Jordan elimination with complete pivoting: sparse where the equations are."""
    work = matrix / np.abs(matrix).max(axis=1, keepdims=True)
    width, row = work.shape[1], 0
    pivots: list[int] = []
    while row < len(work):
        rest = np.abs(work[row:])
        rest[:, pivots] = 0.0
        i, j = np.unravel_index(int(rest.argmax()), rest.shape)
        if rest[i, j] <= _SMALL:
            break
        work[[row, row + i]] = work[[row + i, row]]
        work[row] /= work[row, j]
        others = np.flatnonzero(work[:, j])
        others, moving = others[others != row], np.flatnonzero(work[row])
        work[np.ix_(others, moving)] -= np.outer(work[others, j], work[row, moving])
        pivots.append(int(j))
        row += 1
    free = [j for j in range(width) if j not in set(pivots)]
    basis = np.zeros((width, len(free)))
    basis[free, np.arange(len(free))] = 1.0
    basis[pivots] = -work[:row][:, free]
    basis[np.abs(basis) <= _SMALL] = 0.0
    return basis


def combined(vectors: Sequence[tuple[Ints, Floats]], size: int) -> Sparse:
    """Vectors `(unknowns, values)` as the columns of a sparse matrix."""
    if not vectors:
        return csr_array((size, 0))
    columns = np.repeat(np.arange(len(vectors)), [len(u) for u, _ in vectors])
    where = (np.concatenate([u for u, _ in vectors]), columns)
    return coo_array((np.concatenate([v for _, v in vectors]), where), shape=(size, len(vectors))).tocsr()
