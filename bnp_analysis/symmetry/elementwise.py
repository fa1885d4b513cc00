"""Symmetry rules of arithmetic, activations, reductions and rearrangements of entries.

Each rule takes the constraints, the node and its arguments by name, and returns what stands for the result: a value,
a list of them, or None where it cannot be followed. One that fails, since an argument is something else than what it
asks for, is not followed either.
"""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bnp_analysis.linalg.bases import Floats, Ints
from bnp_analysis.runtime.trees import map_leaves, tensors_of
from bnp_analysis.symmetry.candidates import Cause
from bnp_analysis.symmetry.constraints import (
    FIXED,
    ZERO,
    Activation,
    Constant,
    Constraints,
    Parameters,
    Use,
    Value,
    along_axis,
    fixed,
    values_in,
)
from bnp_analysis.symmetry.graph import Node

Found = Value | list[Value] | None
Given = dict[str, Any]


# Numbers that only move.


def same(c: Constraints, node: Node, given: Given) -> Found:
    """Purity was checked: a dropout that does something would have been refused."""
    return next(values_in(given))


def moved(c: Constraints, node: Node, given: Given) -> Found:
    """The labels, or the positions of parameters, go where the numbers go."""
    assert node.call is not None
    values = list(values_in(given))
    stored = all(isinstance(value, Parameters) for value in values)

    def written(part: Any) -> Any:
        if not isinstance(part, Value):
            return part
        return part.entries.double() if stored and isinstance(part, Parameters) else c.labels(part).double()

    args, kwargs = (map_leaves(c.value(given), written) for given in (node.call.positional, node.call.keywords))
    function = node.call.function
    if node.kind == "view":  # Labels need not lie in memory as the numbers do.
        function, args = torch.reshape, [args[0], args[1:] if isinstance(args[1], int) else args[1]]
    out = [t.round().to(torch.int64) for t in tensors_of(function(*args, **kwargs))]
    if stored:
        return [Parameters(t) for t in out]
    first = values[0]
    weights = first.weights if isinstance(first, Activation) and node.shape == node.before else None
    return [Activation(t, weights) for t in out]


def padded(c: Constraints, node: Node, given: Given) -> Found:
    """Zeros beside the numbers, or the numbers again."""
    labels, mode = c.labels(given["input"]).double(), given.get("mode", "constant")
    value = float(FIXED if given.get("value") else ZERO) if mode == "constant" else None
    return Activation(F.pad(labels, given["pad"], mode=mode, value=value).round().to(torch.int64))


def chosen(c: Constraints, node: Node, given: Given) -> Found:
    """Numbers from one tensor or another by a mask that no parameter moves."""
    plain, other = (c.labels(_as_value(given[role])) for role in ("input", "other"))
    return Activation(torch.where(given["mask"], other, plain))


def _as_value(part: Any) -> Value:
    if isinstance(part, Value):
        return part
    return Constant(part.double() if isinstance(part, Tensor) else torch.tensor(float(part), dtype=torch.float64))


# Sums, products and powers.


def _together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors in their common shape."""
    shape = np.broadcast_shapes(tuple(a.shape), tuple(b.shape))
    return a.expand(shape), b.expand(shape)


def _pairs(a: Tensor, b: Tensor) -> tuple[Ints, Ints, Tensor]:
    """The different pairs of two label tensors, and which of them each entry is."""
    a, b = _together(a, b)
    base = int(b.max()) + 1
    unique, place = torch.unique(a * base + b, return_inverse=True)
    return (unique // base).numpy(), (unique % base).numpy(), place


def _mapped(c: Constraints, labels: Tensor, factor: Tensor | float, offset: Tensor | float) -> Activation:
    """`f y + d` with one of the two trivial: one number for each label, or at least zeros in it.

    Where the numbers differ inside a label, only scales pass a factor, only shifts an offset.
    """
    scaling = isinstance(factor, Tensor)
    labels, constant = _together(labels, torch.as_tensor(factor if scaling else offset).double())
    if not scaling and not bool(constant.any()):
        return Activation(labels)
    # What is zero, or was and is a constant now.
    gone, becomes = (constant == 0, ZERO) if scaling else ((labels == ZERO) & (constant != 0), FIXED)
    labels = torch.where(gone, becomes, labels)
    moving = labels > ZERO
    old, place = torch.unique(labels[moving], return_inverse=True)
    numbers = torch.zeros(len(old), dtype=torch.float64).index_put((place,), constant[moving])
    if not torch.equal(numbers[place], constant[moving]):
        c.only(old.numpy(), scale=scaling, shift=not scaling)
    elif len(old):
        olds, ones = old.numpy(), np.ones(len(old))
        new = c.mapped(olds, numbers.numpy()) if scaling else c.mapped(olds, ones, numbers.numpy())
        labels = labels.clone()
        labels[moving] = torch.from_numpy(new)[place]
    return Activation(labels)


def scaled(c: Constraints, labels: Tensor, factor: Tensor) -> Activation:
    """`f y`."""
    return _mapped(c, labels, factor, 0.0)


def _negative(c: Constraints, value: Value) -> Value:
    return Constant(-value.value) if isinstance(value, Constant) else scaled(c, c.labels(value), torch.tensor(-1.0))


def negated(c: Constraints, node: Node, given: Given) -> Found:
    return _negative(c, given["input"]) if isinstance(given["input"], Activation) else None


def summed(c: Constraints, node: Node, given: Given) -> Found:
    if set(given) != {"input", "other"}:
        return None
    a, b = (_as_value(given[role]) for role in ("input", "other"))
    if node.kind == "sub":
        b = _negative(c, b)
    elif node.kind == "rsub":
        a = _negative(c, a)
    if isinstance(a, Constant):
        a, b = b, a
    return _mapped(c, c.labels(a), 1.0, b.value) if isinstance(b, Constant) else _sum(c, a, b)


def _sum(c: Constraints, first: Value, second: Value) -> Activation:
    a, b, place = _pairs(c.labels(first), c.labels(second))
    out = np.where(a == ZERO, b, a)
    both = (a != ZERO) & (b != ZERO)
    a, b = a[both], b[both]
    out[both] = new = c.fresh(len(a))
    c.equate(new, a, shift=False)
    c.equate(new, b, shift=False)
    c.equations.add((2 * new + 1, 1.0), (2 * a + 1, -1.0), (2 * b + 1, -1.0))
    c.follow(new, a, np.ones(len(a)), c.offset(b))
    c.aligned.append((new, b))
    # Mixing acts on both in one basis only where they came with the same gains, and never on constants.
    c.separate(new[(c.gain(a) != c.gain(b)) | (a == FIXED) | (b == FIXED)])
    if isinstance(first, Activation) and isinstance(second, Activation):
        meeting = (a != FIXED) & (b != FIXED)
        c.name(np.concatenate([new[meeting], a[meeting], b[meeting]]), Cause.RESIDUAL_STREAM)
    return Activation(torch.from_numpy(out)[place])


def product(c: Constraints, node: Node, given: Given) -> Found:
    if set(given) != {"input", "other"}:
        return None
    a, b = (_as_value(given[role]) for role in ("input", "other"))
    divides = node.kind == "div"
    if divides and isinstance(b, Constant):
        b = Constant(1 / b.value)
    elif not divides and not isinstance(a, Activation):
        a, b = b, a
    if not isinstance(a, Activation) or (divides and isinstance(b, Parameters)):
        return None
    if isinstance(b, Constant):
        return scaled(c, a.labels, b.value)
    if isinstance(b, Activation):
        return _powers(c, [(a.labels, 1.0), (b.labels, -1.0 if divides else 1.0)])
    out = gained(c, a.labels, b.entries)
    c.separate(out.labels[(a.labels == FIXED).broadcast_to(out.labels.shape)].numpy())
    return out


def power(c: Constraints, node: Node, given: Given) -> Found:
    """`y^k` scales like `k` times the scale of `y`."""
    out = _powers(c, [(given["input"].labels, 2.0 if node.kind == "square" else float(given["other"]))])
    c.name(out.labels[out.labels != ZERO].numpy(), Cause.HOMOGENEITY)
    return out


def _powers(c: Constraints, factors: list[tuple[Tensor, float]]) -> Activation:
    """Products of powers of one or two activations: scales add up, nothing else passes."""
    (a, k), (b, m) = factors[0], factors[-1]
    first, second, place = _pairs(a, b)
    new = c.fresh(len(first))
    c.equations.add((2 * new, 1.0), (2 * first, -k), *([(2 * second, -m)] if len(factors) > 1 else []))
    c.only(np.concatenate([first, second, new]), scale=True)
    return Activation(torch.from_numpy(np.where((first == ZERO) | (second == ZERO), ZERO, new))[place])


def gained(c: Constraints, labels: Tensor, entries: Tensor, bias: Tensor | None = None) -> Activation:
    """`g y + b`, entry by entry; the gains and shifts may move."""
    old, position, place = _pairs(labels, entries)
    if bias is None and bool((old == ZERO).all()):
        return Activation(_together(labels, entries)[0])
    new, offsets = c.fresh(len(old)), None
    shifts: Floats = np.zeros(len(old))
    if bias is not None:
        offsets = np.zeros(len(old), np.int64)
        offsets[place.reshape(-1).numpy()] = _together(bias, place)[0].reshape(-1).numpy()
        shifts = c.theta[offsets]
    c.uses.append(Use(new, old[:, None], position[:, None], offsets, entrywise=True))
    gains: Floats = c.theta[position]
    c.set_affine(new, gains, shifts)
    moving = old > ZERO
    c.follow(new[moving], old[moving], gains[moving], shifts[moving])
    return Activation(torch.from_numpy(new)[place])


# Activations, pools and means.


def rigid(c: Constraints, node: Node, given: Given) -> Found:
    """Smooth, and neither homogeneous nor periodic: nothing but what is constant passes."""
    if not isinstance(given["input"], Activation | Constant):
        return None
    c.pin(given["input"])
    return fixed(node.shape)


def homogeneous(c: Constraints, node: Node, given: Given) -> Found:
    """Positively homogeneous; a channel that the data keep on one side of zero is linear."""
    if node.kind.startswith("clamp") and [part for role, part in given.items() if role != "input"] != [0]:
        return None
    labels: Tensor = given["input"].labels
    old, place = torch.unique(labels, return_inverse=True)
    olds = old.numpy()
    slopes = _slopes(c, node, labels, olds)
    linear = (slopes != 0) & (olds > ZERO)
    out, bent = olds.copy(), olds[~linear]
    c.only(bent, scale=True)
    out[linear] = new = c.mapped(olds[linear], slopes[linear])
    c.name(new, Cause.ALWAYS_ACTIVE)
    c.name(bent, Cause.HOMOGENEITY)
    return Activation(torch.from_numpy(out)[place])


def _slopes(c: Constraints, node: Node, labels: Tensor, old: Ints) -> Floats:
    """The slope of each label where all its entries that count have one sign; zero elsewhere."""
    slopes = np.zeros(len(old))
    if node.kind not in ("relu", "leaky_relu"):
        return slopes
    below = 0.0 if node.kind == "relu" else float(node.arguments.get("negative_slope", 0.01))
    positive = negative = torch.ones(1, dtype=torch.bool)
    for graph in c.full:
        signs, reach = graph.nodes[node.index].signs, graph.nodes[node.index].reach
        assert signs is not None
        assert reach is not None
        up, down = _over_examples((signs > 0) | ~reach, labels), _over_examples((signs < 0) | ~reach, labels)
        if up is None or down is None:
            return slopes
        positive, negative = positive & up, negative & down
    # One entry among the examples stands for all.
    for axis in range(labels.ndim):
        labels = labels if positive.shape[axis] == labels.shape[axis] else labels.narrow(axis, 0, 1)
    for k, label in enumerate(old):
        mine = labels == int(label)
        slopes[k] = 1.0 if bool(positive[mine].all()) else (below if bool(negative[mine].all()) else 0.0)
    return slopes


def _over_examples(flags: Tensor, labels: Tensor) -> Tensor | None:
    """Whether all examples have a flag, entry by entry; None where the labels depend on the example."""
    axes = [d for d in range(flags.ndim) if flags.shape[d] != labels.shape[d]]
    if not axes:
        return flags
    if len(axes) > 1 or not bool((labels == labels.narrow(axes[0], 0, 1)).all()):
        return None
    return flags.all(dim=axes[0], keepdim=True)


def pooled(c: Constraints, node: Node, given: Given) -> Found:
    """Channel by channel, over space."""
    labels: Tensor = given["input"].labels
    space = labels.ndim - 2 if node.kind == "interpolate" else int(node.kind[-2])
    axis = labels.ndim - space - 1
    channels = c.merge(labels.movedim(axis, -1))
    if "max" in node.kind:
        c.separate(channels)
    elif np.any(np.asarray(given.get("padding", 0)) != 0):
        c.fix(channels, scale=False)
    return along_axis(channels, node.shape, axis)


def reduced(c: Constraints, node: Node, given: Given) -> Found:
    """A mean, sum or maximum along some axes."""
    labels, dim = given["input"].labels, given.get("dim")
    if isinstance(dim, Value | Tensor) or (dim is None and node.kind == "max"):
        return None
    if not labels.numel():  # a part of the batch that two examples do not have
        return None
    dims = range(labels.ndim) if dim is None else {int(d) % labels.ndim for d in np.atleast_1d(dim)}
    rest = [d for d in range(labels.ndim) if d not in dims]
    flat = labels.permute(*sorted(dims), *rest).reshape(-1, torch.Size(labels.shape[d] for d in rest).numel())
    found = c.merge(flat)
    if node.kind in ("amax", "max"):
        c.separate(found)
    out = torch.from_numpy(found).reshape(node.shape)
    return scaled(c, out, torch.tensor(float(len(flat)))) if node.kind == "sum" else Activation(out)


def softmax(c: Constraints, node: Node, given: Given) -> Found:
    """Invariant to a shift that is common along its axis."""
    labels, dim = given["input"].labels, index(given["dim"])
    c.only(labels.numpy(), shift=True)
    for row in torch.unique(labels.movedim(dim, -1).reshape(-1, labels.shape[dim]), dim=0).numpy():
        moving = row[row != ZERO]
        c.equate(moving[:1].repeat(len(moving)), moving, scale=False)
    return fixed(node.shape, dim % len(node.shape) if node.kind == "softmax" else None)
