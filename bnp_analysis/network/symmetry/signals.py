"""What is known of a tensor inside a network: which of its entries move together, or which parameters it shows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.network.candidates import Chart
from bnp_analysis.network.symmetry.system import Equations, Floats, Ints

# Labels that every network has: entries that must not move, and entries that are zero whatever moves.
FIXED, ZERO = 0, 1


@dataclass(frozen=True, eq=False)
class Signal:
    """An activation by the labels of its entries: those with label `l` may change by `scale_l y + shift_l`.

    `weights` is the axis along which the entries are nonnegative and sum to one, where there is one.
    """

    labels: Tensor
    weights: int | None = None


@dataclass(frozen=True, eq=False)
class Stored:
    """Entries of parameters, by their positions in the chart."""

    entries: Tensor


@dataclass(frozen=True, eq=False)
class Known:
    """A tensor that no parameter moves."""

    value: Tensor


Value = Signal | Stored | Known


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


@dataclass(eq=False)
class Ledger:
    """What the operations demand of the labels: equations of scales and shifts, and which channels stay parallel.

    The change of an entry is `scale y + shift`; unknown `2 l` is the scale of label `l`, `2 l + 1` its shift.

    Attributes:
        chart: the parameters.
        equations: between scales and shifts.
        uses: what parameters do.
        exact, limit: equations that hold beside them as it is, and in the limit of no eps in the norms.
        relaxed: labels that this limit sets free.
        pinned: positions of parameters that are used in ways that are not followed.
        skipped: words for what was not followed.
    """

    chart: Chart
    equations: Equations = field(default_factory=Equations)
    uses: list[Use] = field(default_factory=list)
    exact: Equations = field(default_factory=Equations)
    limit: Equations = field(default_factory=Equations)
    relaxed: list[Ints] = field(default_factory=list)
    pinned: list[Ints] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    count: int = 2
    # Pairs of labels that are the same channel at two places; of opposite ones, as in a scalar product.
    aligned: list[tuple[Ints, Ints]] = field(default_factory=list)
    opposed: list[tuple[Ints, Ints]] = field(default_factory=list)
    # The same, from before a norm to behind it: for rotations only.
    passed: list[tuple[Ints, Ints]] = field(default_factory=list)
    # What happens to labels, for mixing: (labels, a number for what treats them alike); `stops`: unless rotated.
    events: list[tuple[Ints, Ints]] = field(default_factory=list)
    stops: list[tuple[Ints, Ints]] = field(default_factory=list)
    # Labels that a norm divides by their common size; True where it also takes out their mean.
    rotated: list[tuple[Ints, bool]] = field(default_factory=list)
    # y = gain * (the channel as it was made) + offset.
    gains: dict[int, float] = field(default_factory=dict)
    offsets: dict[int, float] = field(default_factory=dict)
    causes: dict[int, str] = field(default_factory=dict)
    events_seen: int = 0

    def __post_init__(self) -> None:
        self.hold(np.array([FIXED, ZERO]))

    def fresh(self, count: int) -> Ints:
        """New labels."""
        self.count += count
        return np.arange(self.count - count, self.count)

    def hold(self, labels: Ints, *, scale: bool = True, shift: bool = True) -> None:
        """Neither scale nor shift, or one of the two."""
        labels = np.unique(labels)
        if scale:
            self.equations.add((2 * labels, 1.0))
        if shift:
            self.equations.add((2 * labels + 1, 1.0))

    def tie(self, a: Ints, b: Ints, *, scale: bool = True, shift: bool = True) -> None:
        """The same scale and shift, pair by pair, or one of the two."""
        keep = a != b
        a, b = a[keep], b[keep]
        if scale and len(a):
            self.equations.add((2 * a, 1.0), (2 * b, -1.0))
        if shift and len(a):
            self.equations.add((2 * a + 1, 1.0), (2 * b + 1, -1.0))

    def align(self, a: Ints, b: Ints) -> None:
        """The same channels, as far as mixing goes."""
        self.aligned.append((a, b))

    def event(self, labels: Ints, kinds: Ints | None = None, *, apart: bool = False, rotates: bool = False) -> None:
        """Something that treats these labels alike, or those of one kind, or each in its own way.

        With `rotates` it lets rotations pass all the same.
        """
        labels, first = np.unique(labels, return_index=True)
        kinds = np.zeros(len(labels), np.int64) if kinds is None else np.unique(kinds[first], return_inverse=True)[1]
        kinds = np.arange(len(labels)) if apart else kinds
        if len(labels):
            (self.stops if rotates else self.events).append((labels, self.events_seen + kinds))
            self.events_seen += int(kinds.max()) + 1

    def name(self, labels: Ints, cause: str) -> None:
        """The cause that symmetries of these labels are counted under, if no earlier word says another."""
        for label in np.unique(labels):
            self.causes.setdefault(int(label), cause)

    def merge(self, labels: Tensor) -> Ints:
        """One label for each column of `(positions, channels)`, whose entries must move together."""
        rows = torch.unique(labels.reshape(-1, labels.shape[-1]), dim=0).numpy()
        first = rows[(rows != ZERO).argmax(axis=0), np.arange(rows.shape[1])]
        for row in rows:
            moving = row != ZERO
            self.tie(first[moving], row[moving])
            self.align(first[moving], row[moving])
            # Where some entries are zero, the others cannot be shifted alone.
            self.hold(first[~moving & (first != ZERO)], scale=False)
        return np.asarray(first)

    def pin(self, value: Value) -> None:
        """Read by something that is not followed."""
        if isinstance(value, Stored):
            self.pinned.append(np.unique(value.entries.numpy()))
        elif isinstance(value, Signal):
            labels = np.unique(value.labels.numpy())
            self.hold(labels)
            self.event(labels[labels > ZERO], apart=True)

    def lift(self, value: Value) -> Tensor:
        """The labels of a value where it is treated as an activation."""
        if isinstance(value, Signal):
            return value.labels
        if isinstance(value, Known):
            return torch.where(value.value == 0, ZERO, FIXED).to(torch.int64)
        entries, place = np.unique(value.entries.numpy(), return_inverse=True)
        out = self.fresh(len(entries))
        self.uses.append(Use(out, np.zeros((1, 1), np.int64), entries[:, None], table=True))
        self.event(out)
        # An entry without dimensions would come out as a scalar.
        return torch.from_numpy(np.asarray(out[place.reshape(value.entries.shape)]))

    def gain(self, labels: Ints) -> Floats:
        return np.array([self.gains.get(int(label), 1.0) for label in labels])

    def offset(self, labels: Ints) -> Floats:
        return np.array([self.offsets.get(int(label), 0.0) for label in labels])
