"""Symmetries as directions of parameters: scales and shifts that solve the equations, mixings of channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bnp_analysis.linalg.bases import Floats, Ints, Sparse
from bnp_analysis.symmetry.candidates import SCALES, SHIFTS, Candidate, Cause, Orbit, Part
from bnp_analysis.symmetry.constraints import Constraints, Equations, combined, coo_array, csr_array, solutions, vstack

# The word that says most about a symmetry comes first.
_TELLING = (
    Cause.QUERY_KEY, Cause.RESIDUAL_STREAM, Cause.NORM_AFFINE, Cause.ALWAYS_ACTIVE, Cause.HOMOGENEITY,
    Cause.ATTENTION_VALUES,
)  # fmt: skip
_SHIFT_OF = {scale: SHIFTS.get(kind) for kind, scale in SCALES.items()}
# k channels have k^2 mixings, whose basis takes n k^2 numbers and n k^4 operations.
_MOST_WORK = 1e12
_EMPTY = np.zeros(0, np.int64)
Vector = tuple[Ints, Floats]


# Scales and shifts.


def parameter_moves(c: Constraints) -> tuple[Sparse, Sparse, Sparse]:
    """How scales and shifts move the free parameters, and what constant or shared parameters ask of them.

    Each use says how its parameters must move; those that cannot, or in two ways, are demands.

    Returns:
        Tangents `(n, unknowns)`; the same for parameters of 1, which scales multiply by powers of `t` wherever they
        are; demands `(equations, unknowns)`.
    """
    rows, entries = _expressions(c, c.theta)
    size = c.chart.dim
    stuck = (entries < 0) | (entries >= size) | np.isin(entries, np.concatenate([_EMPTY, *c.pinned]))
    free = np.flatnonzero(~stuck)
    order = free[np.argsort(entries[free], kind="stable")]
    # The first use of each parameter moves it, the others must agree.
    moved, first, use = np.unique(entries[order], return_index=True, return_inverse=True)
    again = np.setdiff1d(np.arange(len(order)), first)
    differ = csr_array(rows[order[again]] - rows[order[first[use[again]]]])
    onto = coo_array((np.ones(len(moved)), (moved, order[first])), shape=(size, len(entries))).tocsr()
    exponents = onto @ _expressions(c, np.ones_like(c.theta))[0]
    return csr_array(onto @ rows), csr_array(exponents), csr_array(vstack([rows[np.flatnonzero(stuck)], differ]))


def _expressions(c: Constraints, theta: Floats) -> tuple[Sparse, Ints]:
    """For each use of a parameter, what must become of it; missing biases are parameters -1 with the value 0."""
    found, entries = Equations(), [_EMPTY]
    for use in c.uses:
        out = np.broadcast_to(use.out[:, None], use.weight.shape)
        w = theta[use.weight]
        entries.append(use.weight.ravel())
        if use.table:
            found.add((2 * out.ravel(), w.ravel()), (2 * out.ravel() + 1, 1.0))
            continue
        source = use.source[use.group]
        found.add((2 * out.ravel(), w.ravel()), (2 * source.ravel(), -w.ravel()))
        bias = np.full(len(use.out), -1) if use.bias is None else use.bias
        b = np.zeros(len(use.out)) if use.bias is None else theta[bias]
        moving = np.flatnonzero((use.source > 1).any(axis=0))
        found.add((2 * use.out, b), (2 * use.out + 1, 1.0), *((2 * source[:, k] + 1, -w[:, k]) for k in moving))
        entries.append(bias)
    return found.matrix(2 * c.count), np.concatenate(entries)


def scale_candidates(c: Constraints) -> list[Candidate]:
    """Solutions of the equations as directions, those that only the limit of no eps allows apart."""
    *moves, demands = parameter_moves(c)
    size = 2 * c.count
    common = vstack([c.equations.matrix(size), demands])
    vectors, left_out = solutions(csr_array(vstack([common, c.exact.matrix(size)])))
    if left_out:
        c.skipped.append(f"{left_out} scales and shifts depend on each other: too many to solve for")
    found = _candidates(c, moves, vectors, exact=True)
    if c.relaxed:
        more, _ = solutions(csr_array(vstack([common, c.limit.matrix(size)])))
        picked = _independent(more, 2 * np.unique(np.concatenate(c.relaxed)), size)
        found += _candidates(c, moves, picked, exact=False)
    return found


def _independent(vectors: list[Vector], wanted: Ints, size: int) -> list[Vector]:
    """Vectors whose values at some unknowns are independent, as many as there are."""
    dense = combined(vectors, size)[wanted].toarray()
    picked: list[Vector] = []
    for k in np.flatnonzero(np.abs(dense).max(axis=0, initial=0.0)):
        column = dense[:, k].copy()
        pivot = int(np.abs(column).argmax())
        if abs(column[pivot]) > 1e-9:
            picked.append(vectors[k])
            dense -= np.outer(column, dense[pivot] / column[pivot])
    return picked


def _candidates(c: Constraints, moves: list[Sparse], vectors: list[Vector], *, exact: bool) -> list[Candidate]:
    basis = combined(vectors, 2 * c.count)
    tangents, exponents = ((moved @ basis).tocsc() for moved in moves)
    found: dict[Cause, list[tuple[Part, Orbit | None]]] = {}
    for k, (unknowns, _) in enumerate(vectors):
        where, values = _column(tangents, k)
        if len(where):
            names = {c.causes[label] for label in (unknowns // 2).tolist() if label in c.causes}
            shifts = unknowns % 2
            cause = _cause(names, shifts=bool(shifts.all()), any_shift=bool(shifts.any()), exact=exact)
            orbit = None
            # A unit that is linear on the data only, or a scale that only this batch makes up for, has none.
            if exact and not shifts.any() and Cause.COMPENSATED_SCALE not in names:
                orbit = Orbit(cause, *_column(exponents, k))
            elif exact and shifts.all() and Cause.ALWAYS_ACTIVE not in names:
                orbit = Orbit(cause, shifted=where, steps=values)
            found.setdefault(cause, []).append((Part(where, values[:, None]), orbit))
    return [
        Candidate(cause, tuple(part for part, _ in mine), exact, tuple(orbit for _, orbit in mine) if exact else ())
        for cause, mine in found.items()
    ]


def _column(columns: Sparse, k: int) -> tuple[Tensor, Tensor]:
    """The positions and values of the nonzero entries of a column."""
    inside = slice(columns.indptr[k], columns.indptr[k + 1])
    values, where = columns.data[inside], columns.indices[inside].astype(np.int64)
    return torch.from_numpy(where[values != 0]), torch.from_numpy(values[values != 0])


def _cause(names: set[Cause], *, shifts: bool, any_shift: bool, exact: bool) -> Cause:
    """What a solution is counted under; whether it has nothing but shifts, or any."""
    if exact and Cause.COMPENSATED_SCALE in names:
        return Cause.COMPENSATED_SCALE
    divided = sorted(name for name in names if name in _SHIFT_OF)
    if divided:
        return (_SHIFT_OF[divided[0]] if shifts else None) or divided[0]
    telling = next((name for name in _TELLING if name in names), Cause.LINEAR_LAYER)
    if telling is Cause.ALWAYS_ACTIVE and not any_shift:
        return Cause.HOMOGENEITY
    return Cause.KEY_BIAS if telling is Cause.QUERY_KEY and shifts else telling


# Mixings.

# `(i, j, v)`: `v` times channel `j` is added to channel `i`.
Matrix = tuple[tuple[int, int, float], ...]
Pairs = Sequence[tuple[Ints, Ints]]
# The labels of channels at one place, with their sign, gains and offsets.
Place = tuple[Ints, int, Floats, Floats]


@dataclass(frozen=True, eq=False)
class Frame:
    """Channels in parallel.

    Attributes:
        places: `(channels, places)`, their labels at every place that they pass; `signs (places,)` is -1 where the
            channels are the others in a scalar product.
        kind: `"all"` matrices, `"mean"` only a channel added to all, which a norm takes out with the mean, `"size"`
            only rotations, which norms let pass, `"both"` only those that keep the mean.
    """

    places: Ints
    signs: Ints
    kind: str

    def matrices(self) -> Iterator[Matrix]:
        """A basis of the mixings, but for the scales of single channels."""
        n = len(self.places)
        if self.kind == "mean":
            yield from (tuple((i, j, 1.0) for i in range(n)) for j in range(n))
        elif self.kind == "both":
            for j in range(1, n):
                for k in range(j + 1, n):
                    yield (0, j, 1.0), (j, 0, -1.0), (j, k, 1.0), (k, j, -1.0), (k, 0, 1.0), (0, k, -1.0)
        elif self.kind == "size":
            yield from (((i, j, 1.0), (j, i, -1.0)) for i in range(n) for j in range(i))
        else:
            yield from (((i, j, 1.0),) for i in range(n) for j in range(n) if i != j)


def frames(c: Constraints) -> list[Frame]:
    """All channels that the same things happen to, in groups of two and more: between norms, and through them."""
    between = _frames(c, c.aligned, [*c.treated, *c.held], through=False)
    return between + _frames(c, [*c.aligned, *c.passed], c.treated, through=True)


def _frames(c: Constraints, aligned: Pairs, treated: Pairs, *, through: bool) -> list[Frame]:
    keys = np.zeros(c.count, np.int64)
    numbers = np.random.default_rng(0).integers(1, 2**40, c.treatments)
    for labels, kinds in treated:
        np.add.at(keys, labels, numbers[kinds])
    alike: dict[tuple[int, ...], list[tuple[Ints, Ints]]] = {}
    for labels, signs in _parallel(c.count, aligned, c.opposed):
        if labels[0] > 1:
            plus, minus = (int(keys[labels[signs == s]].sum()) for s in (1, -1))
            alike.setdefault((plus, minus, len(labels), int(signs.sum())), []).append((labels, signs))
    found = []
    for members in alike.values():
        if len(members) > 1 and all((signs == members[0][1]).all() for _, signs in members):
            places = np.stack([labels for labels, _ in members])
            kind = _kind(c, places, through=through)
            found += [Frame(places, members[0][1], kind)] if kind else []
    return found


def _kind(c: Constraints, places: Ints, *, through: bool) -> str:
    """Where norms read all of the channels, a mean may be added before them and rotations pass; where some, nothing."""
    read = [(len(np.intersect1d(labels, places)), len(labels), mean) for labels, mean in c.normalized]
    norms = [(hit == size == len(places), mean) for hit, size, mean in read if hit]
    if not norms:
        return "" if through else "all"
    means = [mean for _, mean in norms]
    if not through:
        # Every norm on the way takes the mean out, of all of the channels.
        return "mean" if all(whole for whole, _ in norms) else ""
    return ("both" if any(means) else "size") if all(whole for whole, _ in norms) else ""


def _parallel(n: int, aligned: Pairs, opposed: Pairs) -> Iterator[tuple[Ints, Ints]]:
    """The labels of each channel in order, with their signs."""
    a, b, q, k = (np.concatenate([_EMPTY, *(p[side] for p in some)]) for some in (aligned, opposed) for side in (0, 1))
    # Each label twice, as itself and as its opposite.
    first = np.concatenate([a, a + n, q, q + n])
    second = np.concatenate([b, b + n, k + n, k])
    graph = coo_array((np.ones(len(first)), (first, second)), shape=(2 * n, 2 * n))
    labels = connected_components(graph, directed=False)[1]
    order = np.argsort(labels, kind="stable")
    cuts = np.flatnonzero(np.diff(labels[order])) + 1
    for members in np.split(order, cuts):
        own = members % n
        smallest = int(own.argmin())
        # A channel that is its own opposite cannot move; of a pair, the one whose first label is itself stands.
        if len(np.unique(own)) == len(own) and members[smallest] < n:
            sort = np.argsort(own)
            yield own[sort], np.where(members[sort] < n, 1, -1)


@dataclass(frozen=True, eq=False)
class Shear:
    """What one use of mixed channels is asked for: `theta[target] += factor * theta[source]`."""

    use: int
    reads: bool
    target: Ints
    source: Ints
    factor: Floats


class Mixer:
    """Writes mixings of a frame as moves of parameters."""

    def __init__(self, c: Constraints) -> None:
        self._c = c
        used = np.concatenate([_EMPTY, *(entries.ravel() for use in c.uses for entries in use.entries)])
        self._counts = np.bincount(used, minlength=len(c.theta))
        self._stuck = np.arange(len(c.theta)) >= c.chart.dim
        self._stuck[np.concatenate([_EMPTY, *c.pinned])] = True
        self._writers = {int(label): (u, row) for u, use in enumerate(c.uses) for row, label in enumerate(use.out)}
        self._readers: dict[int, list[tuple[int, int]]] = {}
        for u, use in enumerate(c.uses):
            for group, source in enumerate(use.source):
                for label in np.unique(source[source > 1]):
                    self._readers.setdefault(int(label), []).append((u, group))

    def candidates(self, frame: Frame) -> list[Candidate]:
        """What all mixings of a frame move."""
        n, c = len(frame.places), self._c
        if c.chart.dim * float(n) ** 4 > _MOST_WORK:
            c.skipped.append(f"{n}^2 mixings of parallel channels are too many")
            return []
        names = {c.causes.get(label) for label in frame.places.ravel().tolist()}
        cause = _mixing_cause(frame, names)
        if not self._movable(frame):
            return []
        signed = zip(frame.places.T, frame.signs.tolist(), strict=True)
        places = [(place, sign, c.gain(place), c.offset(place)) for place, sign in signed]
        parts: list[Part] = []
        orbits: list[Orbit | None] = []
        symmetric: set[tuple[int, int]] = set()
        for matrix in frame.matrices():
            shears = self._shears(places, matrix)
            part = self._part(shears)
            if part is not None:
                parts.append(part)
                finite = len(matrix) == 1 and Cause.ALWAYS_ACTIVE not in names
                orbits.append(self._orbit(cause, shears) if finite else None)
            elif len(matrix) == 1:
                symmetric.add((min(matrix[0][:2]), max(matrix[0][:2])))
        # Where single mixings move shared parameters in two ways, rotations may not.
        for i, j in sorted(symmetric):
            part = self._part(self._shears(places, ((i, j, 1.0), (j, i, -1.0))))
            parts += [] if part is None else [part]
        orbits += [None] * (len(parts) - len(orbits))
        return [Candidate(cause, tuple(parts), orbits=tuple(orbits))] if parts else []

    def _movable(self, frame: Frame) -> bool:
        """Whether a use of the channels has any parameter that is not constant."""
        labels = frame.places.ravel().tolist()
        met = {self._writers[label][0] for label in labels if label in self._writers}
        met |= {u for label in labels for u, _ in self._readers.get(label, [])}
        return any(not self._stuck[entries].all() for u in met for entries in self._c.uses[u].entries)

    def _shears(self, places: list[Place], matrix: Matrix) -> list[Shear]:
        """What all uses of the channels are asked for."""
        found: list[Shear] = []
        for place, sign, gains, offsets in places:
            for i, j, value in matrix:
                into, source = (i, j) if sign > 0 else (j, i)
                factor = sign * value * gains[into] / gains[source]
                found += self._written(int(place[into]), int(place[source]), factor)
                found += self._read(int(place[into]), int(place[source]), factor, offsets[source])
        # What is made before what is read: each of the two alone is a shear.
        return sorted(found, key=lambda shear: shear.reads)

    def _written(self, into: int, source: int, factor: float) -> list[Shear]:
        u, row = self._writers.get(into, (-1, 0))
        other, other_row = self._writers.get(source, (-1, 0))
        if u < 0 or u != other or self._c.uses[u].entrywise:
            return []
        target, taken = (
            np.concatenate([np.atleast_1d(entries[k]) for entries in self._c.uses[u].entries]) for k in (row, other_row)
        )
        return [Shear(u, False, target, taken, np.full(len(target), factor))]

    def _read(self, into: int, source: int, factor: float, offset: float) -> list[Shear]:
        found = []
        for u, group in self._readers.get(source, []):
            use = self._c.uses[u]
            if use.entrywise or (u, group) not in self._readers.get(into, []):
                continue
            rows = np.flatnonzero(use.group == group)
            target = use.weight[rows][:, use.source[group] == source]
            taken = use.weight[rows][:, use.source[group] == into]
            found.append(Shear(u, True, target.ravel(), taken.ravel(), np.full(target.size, -factor)))
            if offset and use.bias is not None:
                bias = np.repeat(use.bias[rows], taken.shape[1])
                found.append(Shear(u, True, bias, taken.ravel(), np.full(taken.size, factor * offset)))
        return found

    def _part(self, shears: list[Shear]) -> Part | None:
        """The tangent; None where a constant would have to move, or a shared parameter in two ways."""
        if not shears:
            return None
        use = np.concatenate([np.full(len(shear.target), shear.use) for shear in shears])
        target = np.concatenate([shear.target for shear in shears])
        change = np.concatenate([shear.factor * self._c.theta[shear.source] for shear in shears])
        positions, place = np.unique(target, return_inverse=True)
        values = np.bincount(place, change)
        if bool((values[self._stuck[positions]] != 0).any()):
            return None
        for k in np.flatnonzero(self._counts[positions] > 1):
            mine = target == positions[k]
            agreed = self._agreed(int(positions[k]), use[mine], change[mine])
            if agreed is None:
                return None
            values[k] = agreed
        keep = values != 0
        return Part(torch.from_numpy(positions[keep]), torch.from_numpy(values[keep])[:, None]) if keep.any() else None

    def _agreed(self, entry: int, use: Ints, change: Floats) -> float | None:
        """What all uses of a shared parameter ask for alike; None where they differ, or one uses it twice."""
        times = np.array([sum(int((entries == entry).sum()) for entries in one.entries) for one in self._c.uses])
        asked = np.bincount(use, change, minlength=len(times))[times > 0]
        apart = times.max() > 1 or asked.max() - asked.min() > 1e-12 * np.abs(asked).max()
        return None if apart else float(asked[0])

    def _orbit(self, cause: Cause, shears: list[Shear]) -> Orbit | None:
        """The group along a mixing of one channel into another: what is made, then what is read."""
        steps = []
        for reads in (False, True):
            mine = [shear for shear in shears if shear.reads == reads]
            if mine:
                target = np.concatenate([shear.target for shear in mine])
                source = np.concatenate([shear.source for shear in mine])
                factor = np.concatenate([shear.factor for shear in mine])
                if (self._counts[target] > 1).any():
                    return None
                free = ~self._stuck[target]
                steps.append(
                    (torch.from_numpy(np.stack([target, source], axis=1)[free]), torch.from_numpy(factor[free]))
                )
        return Orbit(cause, sheared=tuple(steps))


def _mixing_cause(frame: Frame, names: set[Cause | None]) -> Cause:
    if frame.kind != "all":
        return Cause.LAYER_NORM_SHIFT if frame.kind == "mean" else Cause.ROTATION
    order = (Cause.QUERY_KEY, Cause.RESIDUAL_STREAM, Cause.ALWAYS_ACTIVE, Cause.ATTENTION_VALUES)
    return next((name for name in order if name in names), Cause.LINEAR_LAYER)
