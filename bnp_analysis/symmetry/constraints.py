"""What a network's operations demand of its activations: which scales, shifts and mixings of channels they let through.

Each tensor inside the network has labels for its entries; entries of one label change together, by `scale y + shift`.
Operations write linear equations between these scales and shifts, parameters move accordingly.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.symmetry.candidates import Cause, Chart
from bnp_analysis.symmetry.graph import Graph, Name, Slot
from bnp_analysis.symmetry.linear_system import Equations, Floats, Ints

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
        if isinstance(given, Slot):
            return self.values[given]
        if isinstance(given, Name):
            return Parameters(self.chart.positions(given.name))
        if isinstance(given, Tensor) and given.is_floating_point():
            return Constant(given)
        if isinstance(given, list | tuple):
            return type(given)(self.value(part) for part in given)
        return {key: self.value(part) for key, part in given.items()} if isinstance(given, dict) else given

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
    if isinstance(given, Activation | Parameters | Constant):
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
