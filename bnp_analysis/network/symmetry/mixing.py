"""Channels that a network treats alike may be mixed: all matrices where it is linear, rotations through a norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.csgraph import connected_components

from bnp_analysis.network.candidates import Candidate, Move, Part
from bnp_analysis.network.symmetry.signals import Ledger
from bnp_analysis.network.symmetry.system import Floats, Ints, coo_array

# k channels have k^2 mixings, whose basis takes n k^2 numbers and n k^4 operations.
_MOST_WORK = 1e12
# `(i, j, v)`: `v` times channel `j` is added to channel `i`.
Matrix = tuple[tuple[int, int, float], ...]
# The use that asks for it (-u - 1 where it reads), and `theta[target] += factor * theta[source]`.
Shear = tuple[int, Ints, Ints, Floats]
Place = tuple[Ints, int, Floats, Floats]
_EMPTY = np.zeros(0, np.int64)


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
    kind: str = "all"

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


def frames(ledger: Ledger) -> list[Frame]:
    """All channels that the same things happen to, in groups of two and more: between norms, and through them."""
    between = _frames(ledger, ledger.aligned, [*ledger.events, *ledger.stops], _before_norms)
    return between + _frames(ledger, [*ledger.aligned, *ledger.passed], ledger.events, _through_norms)


Pairs = Sequence[tuple[Ints, Ints]]


def _frames(ledger: Ledger, aligned: Pairs, events: Pairs, kind: Callable[[Ledger, Ints], str]) -> list[Frame]:
    keys = np.zeros(ledger.count, np.int64)
    numbers = np.random.default_rng(0).integers(1, 2**40, ledger.events_seen)
    for labels, kinds in events:
        np.add.at(keys, labels, numbers[kinds])
    alike: dict[tuple[int, ...], list[tuple[Ints, Ints]]] = {}
    for labels, signs in _channels(ledger.count, aligned, ledger.opposed):
        if labels[0] > 1:
            plus, minus = (int(keys[labels[signs == s]].sum()) for s in (1, -1))
            alike.setdefault((plus, minus, len(labels), int(signs.sum())), []).append((labels, signs))
    found = []
    for members in alike.values():
        if len(members) > 1 and all((signs == members[0][1]).all() for _, signs in members):
            places = np.stack([labels for labels, _ in members])
            word = kind(ledger, places)
            found += [Frame(places, members[0][1], word)] if word else []
    return found


def _before_norms(ledger: Ledger, places: Ints) -> str:
    """Where a norm reads them all, a mean may be added; where it reads some, nothing."""
    read = [len(hit) == len(labels) == len(places) for labels, _, hit in _norms_of(ledger, places)]
    return "all" if not read else ("mean" if all(read) else "")


def _through_norms(ledger: Ledger, places: Ints) -> str:
    """Rotations, where every norm on the way reads all of the channels."""
    norms = list(_norms_of(ledger, places))
    if not norms or not all(len(hit) == len(labels) == len(places) for labels, _, hit in norms):
        return ""
    return "both" if any(mean for _, mean, _ in norms) else "size"


def _norms_of(ledger: Ledger, places: Ints) -> Iterator[tuple[Ints, bool, Ints]]:
    for labels, mean in ledger.rotated:
        hit = np.intersect1d(labels, places)
        if len(hit):
            yield labels, mean, hit


def _channels(n: int, aligned: Pairs, opposed: Pairs) -> Iterator[tuple[Ints, Ints]]:
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


class Mixer:
    """Writes mixings of a frame as moves of parameters."""

    def __init__(self, ledger: Ledger, theta: Floats) -> None:
        self._ledger, self._theta = ledger, theta
        used = np.concatenate(
            [_EMPTY, *(e for use in ledger.uses for e in (use.weight.ravel(), use.bias) if e is not None)]
        )
        counts = np.bincount(used, minlength=ledger.chart.size)
        self._stuck = np.arange(len(counts)) >= ledger.chart.dim
        for entries in ledger.pinned:
            self._stuck[entries] = True
        self._shared = counts > 1
        self._writers = {int(label): (u, row) for u, use in enumerate(ledger.uses) for row, label in enumerate(use.out)}
        self._readers: dict[int, list[tuple[int, int]]] = {}
        for u, use in enumerate(ledger.uses):
            for group, source in enumerate(use.source):
                for label in np.unique(source[source > 1]):
                    self._readers.setdefault(int(label), []).append((u, group))

    def candidates(self, frame: Frame) -> list[Candidate]:
        n = len(frame.places)
        if self._ledger.chart.dim * float(n) ** 4 > _MOST_WORK:
            self._ledger.skipped.append(f"{n}^2 mixings of parallel channels are too many")
            return []
        names = {self._ledger.causes.get(int(label)) for label in frame.places.ravel()}
        cause = _cause(frame, names)
        if not self._movable(frame):
            return []
        places = self._places(frame)
        parts, moves, again = [], [], set()
        for matrix in frame.matrices():
            shears = self._shears(places, matrix)
            part = self._part(shears)
            if part is not None:
                parts.append(part)
                finite = len(matrix) == 1 and "always-active units" not in names
                moves.append(self._finite(shears) if finite else None)
            elif len(matrix) == 1:
                again.add(tuple(sorted(matrix[0][:2])))
        for i, j in sorted(again):
            part = self._part(self._shears(places, ((i, j, 1.0), (j, i, -1.0))))
            if part is not None:
                parts.append(part)
                moves.append(None)
        return [Candidate(cause, tuple(parts), moves=tuple(moves))] if parts else []

    def _movable(self, frame: Frame) -> bool:
        """Whether a use of the channels has any parameter that is not constant."""
        labels = [int(label) for label in frame.places.ravel()]
        met = {self._writers[label][0] for label in labels if label in self._writers}
        met |= {u for label in labels for u, _ in self._readers.get(label, [])}
        entries = [e for u in met for e in (self._ledger.uses[u].weight, self._ledger.uses[u].bias) if e is not None]
        return any(not self._stuck[e].all() for e in entries)

    def _places(self, frame: Frame) -> list[Place]:
        """The labels at each place, with their signs, gains and offsets."""
        ledger = self._ledger
        signed = zip(frame.places.T, frame.signs.tolist(), strict=True)
        return [(place, sign, ledger.gain(place), ledger.offset(place)) for place, sign in signed]

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
        return sorted(found, key=lambda shear: shear[0] < 0)

    def _written(self, into: int, source: int, factor: float) -> list[Shear]:
        u, row = self._writers.get(into, (-1, 0))
        other, other_row = self._writers.get(source, (-1, 0))
        use = self._ledger.uses[u]
        if u < 0 or u != other or use.entrywise:
            return []
        target, taken = [use.weight[row]], [use.weight[other_row]]
        if use.bias is not None:
            target, taken = [*target, use.bias[[row]]], [*taken, use.bias[[other_row]]]
        where = np.concatenate(target)
        return [(u, where, np.concatenate(taken), np.full(len(where), factor))]

    def _read(self, into: int, source: int, factor: float, offset: float) -> list[Shear]:
        found = []
        for u, group in self._readers.get(source, []):
            use = self._ledger.uses[u]
            if use.entrywise or (u, group) not in self._readers.get(into, []):
                continue
            rows = np.flatnonzero(use.group == group)
            target = use.weight[rows][:, use.source[group] == source]
            taken = use.weight[rows][:, use.source[group] == into]
            # Below zero: a use that reads.
            found.append((-u - 1, target.ravel(), taken.ravel(), np.full(target.size, -factor)))
            if offset and use.bias is not None:
                bias = np.repeat(use.bias[rows], taken.shape[1])
                found.append((-u - 1, bias, taken.ravel(), np.full(taken.size, factor * offset)))
        return found

    def _part(self, shears: list[Shear]) -> Part | None:
        """The tangent; None where a constant would have to move, or a shared parameter in two ways."""
        if not shears:
            return None
        use = np.concatenate([np.full(len(t), u if u >= 0 else -u - 1) for u, t, _, _ in shears])
        target = np.concatenate([t for _, t, _, _ in shears])
        change = np.concatenate([f * self._theta[s] for _, _, s, f in shears])
        positions, place = np.unique(target, return_inverse=True)
        values = np.bincount(place, change)
        if bool((values[self._stuck[positions]] != 0).any()):
            return None
        shared = self._shared[positions]
        if shared.any():
            agreed = self._agreed(use, target, change)
            if agreed is None:
                return None
            values[shared] = [agreed[int(e)] for e in positions[shared]]
        keep = values != 0
        return Part(torch.from_numpy(positions[keep]), torch.from_numpy(values[keep])[:, None]) if keep.any() else None

    def _finite(self, shears: list[Shear]) -> Move | None:
        """The group along a mixing of one channel into another: what is made, then what is read."""
        none, empty = torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64)
        steps = []
        for reads in (False, True):
            mine = [shear for shear in shears if (shear[0] < 0) == reads]
            if mine:
                target, source, factor = (np.concatenate([shear[k] for shear in mine]) for k in (1, 2, 3))
                if self._shared[target].any():
                    return None
                free = ~self._stuck[target]
                steps.append(
                    (torch.from_numpy(np.stack([target, source], axis=1)[free]), torch.from_numpy(factor[free]))
                )
        return Move(none, empty, none, empty, tuple(steps))

    def _agreed(self, use: Ints, target: Ints, change: Floats) -> dict[int, float] | None:
        """What all uses of shared parameters ask for alike."""
        asked: dict[int, dict[int, float]] = {}
        for u, entry, value in zip(use.tolist(), target.tolist(), change.tolist(), strict=True):
            if self._shared[entry]:
                mine = asked.setdefault(entry, {})
                mine[u] = mine.get(u, 0.0) + value
        found = {}
        for entry, mine in asked.items():
            users = self._users(entry)
            values = [mine.get(u, 0.0) for u in users]
            if len(users) != len(set(users)) or max(values) - min(values) > 1e-12 * max(map(abs, values)):
                return None
            found[entry] = values[0]
        return found

    def _users(self, entry: int) -> list[int]:
        found = []
        for u, use in enumerate(self._ledger.uses):
            found += [u] * int((use.weight == entry).sum() + (0 if use.bias is None else (use.bias == entry).sum()))
        return found


def _cause(frame: Frame, names: set[str | None]) -> str:
    if frame.kind == "mean":
        return "layer_norm shift"
    if frame.kind != "all":
        return "rotation through norms"
    for name in ("attention query-key", "residual stream", "always-active units", "attention values"):
        if name in names:
            return name
    return "linear layer"
