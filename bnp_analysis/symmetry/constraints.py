"""Equations for the scales, shifts and mixings of channels under which operations are equivariant.

Each tensor inside the network has labels for its entries; entries of one label change together, by `scale y + shift`.
Operations write linear equations between these scales and shifts, parameters move accordingly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bnp_analysis.linalg.bases import Floats, Ints, Sparse
from bnp_analysis.runtime.trees import map_leaves
from bnp_analysis.symmetry.candidates import Cause, Chart
from bnp_analysis.symmetry.graph import Graph, Name, Slot

# The stubs of scipy cannot tell which of many arrays these are.
coo_array: Any = sparse.coo_array
csr_array: Any = sparse.csr_array
vstack: Any = sparse.vstack
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
    equations, unknowns = rows.nonzero()
    tree = coo_array((np.ones(len(equations)), (equations, unknowns + rows.shape[0])), shape=[sum(rows.shape)] * 2)
    labels = connected_components(tree, directed=False)[1]
    mine = labels[rows.shape[0] :]
    for label in np.unique(mine[np.unique(unknowns)]):
        classes = np.flatnonzero(mine == label)
        if len(classes) > _MOST:
            yield classes, None
            continue
        dense = rows[np.flatnonzero(labels[: rows.shape[0]] == label)][:, classes].toarray()
        # Most equations come many times: sorting rows is slower than looking at their bytes.
        once = list({row.tobytes(): i for i, row in enumerate(dense)}.values())
        yield classes, np.unique(dense[once], axis=0)


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


# Labels that every network has: entries that must not move, and entries that are zero whatever moves.
FIXED, ZERO = 0, 1


@dataclass(frozen=True, eq=False)
class Activation:
    """A tensor that depends on parameters and data, by the labels of its entries.

    `weights` is the axis along which the entries are nonnegative and sum to one, where there is one.
    """

    labels: Tensor
    weights: int | None = None


@dataclass(frozen=True, eq=False)
class Parameters:
    """Entries of parameters, by their positions in the chart."""

    entries: Tensor


@dataclass(frozen=True, eq=False)
class Constant:
    """A tensor that no parameter moves."""

    value: Tensor


Value = Activation | Parameters | Constant


@dataclass(frozen=True, eq=False)
class Use:
    """Parameters at work: `y_o = sum_k W[o, k] x_{in[g(o), k]} + b_o`, the same wherever it is applied.

    Attributes:
        out: `(O,)`, the labels of what it makes.
        source: `(G, K)`, the labels of what it reads, for each of `G` groups of outputs, all of one size.
        weight: `(O, K)`, the positions of its weights in the chart.
        bias: `(O,)`, likewise; None if it has none.
        node: the index of the node whose output it makes as such; -1 for others.
        table: the columns of `weight` are outputs themselves, one at a time, in place of a product.
        entrywise: gains, not a product with a matrix.
    """

    out: Ints
    source: Ints
    weight: Ints
    bias: Ints | None = None
    node: int = -1
    table: bool = False
    entrywise: bool = False

    @property
    def group(self) -> Ints:
        """`(O,)`: the group of each output."""
        return np.arange(len(self.out)) // (len(self.out) // len(self.source))

    @property
    def entries(self) -> list[Ints]:
        """The positions of weights and biases."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]


class Constraints:
    """Equations between the scales and shifts of labels, and which channels stay parallel.

    Unknown `2 l` is the scale of label `l`, `2 l + 1` its shift.

    Args:
        chart: the parameters.
        graph: the operations on few examples, with calls.
        full: the operations on every batch, for what only values tell: always-active units, variances.

    Attributes:
        theta: the values of all parameters, by position.
        values: what stands for each tensor that a node made.
        equations: between scales and shifts.
        exact, limit: equations that hold beside them as it is, and in the limit of no eps in the norms.
        relaxed: labels that this limit sets free.
        uses: what parameters do.
        pinned: positions of parameters that are used in ways that are not followed.
        skipped: words for what was not followed.
        aligned: pairs of labels that are the same channel at two places.
        opposed: pairs of channels that are multiplied in a scalar product.
        passed: like `aligned`, from before a norm to behind it: for rotations only.
        treated, held: what happens to labels: (labels, numbers that are equal for what is treated alike); the second
            unless they are rotated.
        normalized: labels that a norm divides by their common size; True where it also takes out their mean.
        causes: label -> the word that symmetries of it are counted under.
    """

    def __init__(self, chart: Chart, graph: Graph, full: list[Graph]) -> None:
        self.chart, self.graph, self.full = chart, graph, full
        self.theta: Floats = chart.values.numpy()
        self.values: dict[Slot, Value] = {}
        self.equations, self.exact, self.limit = Equations(), Equations(), Equations()
        self.relaxed: list[Ints] = []
        self.uses: list[Use] = []
        self.pinned: list[Ints] = []
        self.skipped: list[str] = []
        self.aligned: list[tuple[Ints, Ints]] = []
        self.opposed: list[tuple[Ints, Ints]] = []
        self.passed: list[tuple[Ints, Ints]] = []
        self.treated: list[tuple[Ints, Ints]] = []
        self.held: list[tuple[Ints, Ints]] = []
        self.normalized: list[tuple[Ints, bool]] = []
        self.causes: dict[int, Cause] = {}
        self.count, self.treatments = 2, 0
        # y = gain * (the channel as it was made) + offset.
        self._gains: dict[int, float] = {}
        self._offsets: dict[int, float] = {}
        self.fix(np.array([FIXED, ZERO]))

    def on(self, chart: Chart) -> Constraints:
        """The same equations where other parameters of the network are free."""
        where, other = np.zeros(len(self.theta), np.int64), copy.copy(self)
        for name in chart.names:
            where[self.chart.positions(name).numpy()] = chart.positions(name).numpy()
        other.chart, other.theta, other.skipped = chart, chart.values.numpy(), [*self.skipped]
        other.pinned = [where[entries] for entries in self.pinned]
        other.uses = [
            replace(use, weight=where[use.weight], bias=None if use.bias is None else where[use.bias])
            for use in self.uses
        ]
        return other

    def value(self, given: Any) -> Any:
        """What stands for an argument: a value for a tensor of floating-point numbers, else the argument."""

        def stands(part: Any) -> Any:
            if isinstance(part, Slot):
                return self.values[part]
            if isinstance(part, Name):
                return Parameters(self.chart.positions(part.name))
            return Constant(part) if isinstance(part, Tensor) and part.is_floating_point() else part

        return map_leaves(given, stands)

    def fresh(self, count: int) -> Ints:
        """New labels."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def fix(self, labels: Ints, *, scale: bool = True, shift: bool = True) -> None:
        """Neither scale nor shift, or one of the two."""
        labels = np.unique(labels)
        if scale:
            self.equations.add((2 * labels, 1.0))
        if shift:
            self.equations.add((2 * labels + 1, 1.0))

    def equate(self, a: Ints, b: Ints, *, scale: bool = True, shift: bool = True) -> None:
        """The same scale and shift, pair by pair, or one of the two."""
        a, b = a[a != b], b[a != b]
        if scale:
            self.equations.add((2 * a, 1.0), (2 * b, -1.0))
        if shift:
            self.equations.add((2 * a + 1, 1.0), (2 * b + 1, -1.0))

    def treat(self, labels: Ints, kinds: Ints | None = None, *, rotates: bool = False) -> None:
        """Something that treats these labels alike, or those of one kind: channels mix with those treated alike.

        With `rotates` it lets rotations pass all the same.
        """
        labels, first = np.unique(labels, return_index=True)
        kinds = np.zeros(len(labels), np.int64) if kinds is None else np.unique(kinds[first], return_inverse=True)[1]
        labels, kinds = labels[labels > ZERO], kinds[labels > ZERO]
        if len(labels):
            (self.held if rotates else self.treated).append((labels, self.treatments + kinds))
            self.treatments += int(kinds.max()) + 1

    def separate(self, labels: Ints, *, rotates: bool = False) -> None:
        """Something that treats each of these labels in its own way, so that they do not mix."""
        labels = np.unique(labels)
        self.treat(labels, labels, rotates=rotates)

    def only(self, labels: Ints, *, scale: bool = False, shift: bool = False) -> None:
        """Of changes, at most scales, or at most shifts, of each label by itself."""
        self.fix(labels, scale=not scale, shift=not shift)
        self.separate(labels)

    def name(self, labels: Ints, cause: Cause) -> None:
        """The cause that symmetries of these labels are counted under, if no earlier word says another."""
        for label in np.unique(labels):
            self.causes.setdefault(int(label), cause)

    def merge(self, labels: Tensor) -> Ints:
        """One label for each column of `(..., channels)`, whose entries must move together."""
        rows = torch.unique(labels.reshape(-1, labels.shape[-1]), dim=0).numpy()
        first = rows[(rows != ZERO).argmax(axis=0), np.arange(rows.shape[1])]
        for row in rows:
            moving = row != ZERO
            self.equate(first[moving], row[moving])
            self.aligned.append((first[moving], row[moving]))
            # Where some entries are zero, the others cannot be shifted alone.
            self.fix(first[~moving & (first != ZERO)], scale=False)
        return np.asarray(first)

    def merge_along(self, labels: Tensor, axis: int) -> Ints:
        """One label for all positions along an axis."""
        moved = labels.movedim(axis, 0)
        return self.merge(moved.reshape(len(moved), -1)).reshape(moved.shape[1:])

    def mapped(self, old: Ints, factor: Floats, offset: Floats | float = 0.0) -> Ints:
        """New labels for `c y + d`, the same channels."""
        new = self.fresh(len(old))
        self.equate(new, old, shift=False)
        self.equations.add((2 * new + 1, 1.0), (2 * old + 1, -factor), (2 * old, offset))
        self.follow(new, old, factor, offset)
        return new

    def follow(self, new: Ints, old: Ints, factor: Floats, offset: Floats | float) -> None:
        """The same channels behind `y -> c y + d`, as far as mixing goes."""
        self.aligned.append((new, old))
        self.set_affine(new, self.gain(old) * factor, self.offset(old) * factor + offset)
        self.separate(new[self.gain(new) == 0])

    def set_affine(self, labels: Ints, gains: Floats, offsets: Floats) -> None:
        self._gains |= dict(zip(labels.tolist(), gains.tolist(), strict=True))
        self._offsets |= dict(zip(labels.tolist(), offsets.tolist(), strict=True))

    def gain(self, labels: Ints) -> Floats:
        return np.array([self._gains.get(int(label), 1.0) for label in labels])

    def offset(self, labels: Ints) -> Floats:
        return np.array([self._offsets.get(int(label), 0.0) for label in labels])

    def pin(self, value: Value) -> None:
        """Read by something that is not followed."""
        if isinstance(value, Parameters):
            self.pinned.append(np.unique(value.entries.numpy()))
        elif isinstance(value, Activation):
            self.only(value.labels.numpy())

    def labels(self, value: Value) -> Tensor:
        """The labels of a value where it is treated as an activation."""
        if isinstance(value, Activation):
            return value.labels
        if isinstance(value, Constant):
            return torch.where(value.value == 0, ZERO, FIXED).to(torch.int64)
        entries, place = np.unique(value.entries.numpy(), return_inverse=True)
        out = self.fresh(len(entries))
        self.uses.append(Use(out, np.zeros((1, 1), np.int64), entries[:, None], table=True))
        self.treat(out)
        # An entry without dimensions would come out as a scalar.
        return torch.from_numpy(np.asarray(out[place.reshape(value.entries.shape)]))


def values_in(given: Any) -> Iterator[Value]:
    """Every value inside lists, tuples and dicts."""
    if isinstance(given, Value):
        yield given
    elif isinstance(given, dict | list | tuple):
        for part in given.values() if isinstance(given, dict) else given:
            yield from values_in(part)


def fixed(shape: Sequence[int], weights: int | None = None) -> Activation:
    """An activation that no symmetry moves."""
    return Activation(torch.full(tuple(shape), FIXED, dtype=torch.int64), weights)


def along_axis(labels: Ints, shape: torch.Size, axis: int) -> Activation:
    """An activation whose labels run along one axis."""
    along = [1] * len(shape)
    along[axis] = -1
    return Activation(torch.from_numpy(np.asarray(labels)).view(along).expand(shape).contiguous())
