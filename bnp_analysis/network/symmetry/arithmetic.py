"""Sums, products and powers, read as demands on labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.network.graph import Node
from bnp_analysis.network.symmetry.signals import FIXED, ZERO, Known, Signal, Stored, Use, Value
from bnp_analysis.network.symmetry.system import Floats, Ints
from bnp_analysis.network.symmetry.trace import Trace, rule


def together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors in their common shape."""
    shape = np.broadcast_shapes(tuple(a.shape), tuple(b.shape))
    return a.expand(shape), b.expand(shape)


def pairs(a: Tensor, b: Tensor) -> tuple[Ints, Ints, Tensor]:
    """The different pairs of two label tensors, and which of them each entry is."""
    a, b = together(a, b)
    base = int(b.max()) + 1
    unique, place = torch.unique(a * base + b, return_inverse=True)
    return (unique // base).numpy(), (unique % base).numpy(), place


def scaled(trace: Trace, value: Signal, factor: Tensor) -> Signal | None:
    """`c y`: a constant for each label, or at least zeros in it; else only scales pass."""
    ledger = trace.ledger
    labels, factor = together(value.labels, factor.double())
    labels = torch.where(factor == 0, ZERO, labels)
    moving = labels > ZERO
    old, place = torch.unique(labels[moving], return_inverse=True)
    if len(old) == 0:
        return Signal(labels)
    c = torch.zeros(len(old), dtype=torch.float64).index_put((place,), factor[moving])
    olds, out = old.numpy(), labels.clone()
    if not torch.equal(c[place], factor[moving]):
        ledger.hold(olds, scale=False)
        ledger.event(olds, apart=True)
        return Signal(labels)
    new = ledger.fresh(len(olds))
    out[moving] = torch.from_numpy(new)[place]
    factors = c.numpy()
    ledger.tie(new, olds, shift=False)
    ledger.equations.add((2 * new + 1, 1.0), (2 * olds + 1, -factors))
    carry(trace, new, olds, factors, 0.0)
    return Signal(out)


def carry(trace: Trace, new: Ints, old: Ints, factors: Floats, offsets: Floats | float) -> None:
    """The same channels behind `y -> c y + d`."""
    ledger = trace.ledger
    ledger.align(new, old)
    gains, shifted = ledger.gain(old) * factors, ledger.offset(old) * factors + offsets
    ledger.gains |= dict(zip(new.tolist(), gains.tolist(), strict=True))
    ledger.offsets |= dict(zip(new.tolist(), shifted.tolist(), strict=True))
    ledger.event(new[gains == 0], apart=True)


@rule("add", "sub", "rsub")
def summed(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    if set(given) != {"input", "other"}:
        return None
    a, b = (as_value(given[role]) for role in ("input", "other"))
    if node.kind == "sub":
        b = negative(trace, b)
    elif node.kind == "rsub":
        a = negative(trace, a)
    if isinstance(a, Known):
        a, b = b, a
    return [_shifted(trace, a, b.value) if isinstance(b, Known) else _sum(trace, a, b)]


def negative(trace: Trace, value: Value) -> Value:
    if isinstance(value, Known):
        return Known(-value.value)
    return scaled(trace, Signal(trace.ledger.lift(value)), torch.tensor(-1.0)) or value


def as_value(part: Any) -> Value:
    if isinstance(part, Signal | Stored | Known):
        return part
    return Known(part.double() if isinstance(part, Tensor) else torch.tensor(float(part), dtype=torch.float64))


def _shifted(trace: Trace, value: Value, constant: Tensor) -> Signal:
    """`y + c`: where `c` is one number for each label, a scale of `y` is one of the sum and a shift."""
    ledger = trace.ledger
    labels, constant = together(ledger.lift(value), constant.double())
    if not bool(constant.any()):
        return Signal(labels)
    # What was exactly zero is a constant now.
    labels = torch.where((labels == ZERO) & (constant != 0), FIXED, labels)
    moving = labels > ZERO
    old, place = torch.unique(labels[moving], return_inverse=True)
    c = torch.zeros(len(old), dtype=torch.float64).index_put((place,), constant[moving])
    olds = old.numpy()
    if len(olds) == 0 or not torch.equal(c[place], constant[moving]):
        ledger.hold(olds, shift=False)
        ledger.event(olds, apart=True)
        return Signal(labels)
    new, out, c_ = ledger.fresh(len(olds)), labels.clone(), c.numpy()
    out[moving] = torch.from_numpy(new)[place]
    ledger.tie(new, olds, shift=False)
    ledger.equations.add((2 * new + 1, 1.0), (2 * olds + 1, -1.0), (2 * olds, c_))
    carry(trace, new, olds, np.ones(len(olds)), c_)
    return Signal(out)


def _sum(trace: Trace, first: Value, second: Value) -> Signal:
    ledger = trace.ledger
    a, b, place = pairs(ledger.lift(first), ledger.lift(second))
    out = np.where(a == ZERO, b, a)
    both = (a != ZERO) & (b != ZERO)
    a, b = a[both], b[both]
    new = ledger.fresh(len(a))
    out[both] = new
    ledger.tie(new, a, shift=False)
    ledger.tie(new, b, shift=False)
    ledger.equations.add((2 * new + 1, 1.0), (2 * a + 1, -1.0), (2 * b + 1, -1.0))
    carry(trace, new, a, np.ones(len(a)), ledger.offset(b))
    ledger.align(new, b)
    # Mixing acts on both in one basis only where they came with the same gains, and never on constants.
    ledger.event(new[(ledger.gain(a) != ledger.gain(b)) | (a == FIXED) | (b == FIXED)], apart=True)
    if isinstance(first, Signal) and isinstance(second, Signal):
        meeting = (a != FIXED) & (b != FIXED)
        for labels in (new, a, b):
            ledger.name(labels[meeting], "residual stream")
    return Signal(torch.from_numpy(out)[place])


@rule("mul", "div")
def product(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    if set(given) != {"input", "other"}:
        return None
    a, b = (as_value(given[role]) for role in ("input", "other"))
    if node.kind == "div" and isinstance(b, Known):
        b = Known(1 / b.value)
    elif isinstance(a, Known) and node.kind == "mul":
        a, b = b, a
    if isinstance(a, Known) or (isinstance(a, Stored) and isinstance(b, Stored | Known)):
        return None
    if isinstance(a, Signal) and isinstance(b, Known):
        found = scaled(trace, a, b.value)
        return None if found is None else [found]
    if isinstance(a, Stored) and isinstance(b, Signal) and node.kind == "mul":
        a, b = b, a
    if isinstance(a, Signal) and isinstance(b, Stored):
        if node.kind == "div":
            return None
        out = gained(trace, a.labels, b.entries)
        constant = np.unique(out.labels[torch.broadcast_to(a.labels == FIXED, out.labels.shape)].numpy())
        trace.ledger.event(constant, apart=True)
        return [out]
    if not (isinstance(a, Signal) and isinstance(b, Signal)):
        return None  # A parameter over an activation.
    return [_product(trace, a.labels, b.labels, 1.0 if node.kind == "mul" else -1.0)]


def gained(trace: Trace, labels: Tensor, entries: Tensor, bias: Tensor | None = None) -> Signal:
    """`g y + b`, entry by entry; the gains and shifts may move."""
    ledger = trace.ledger
    old, position, place = pairs(labels, entries)
    if not (old > ZERO).any() and bias is None and not (old == FIXED).any():
        return Signal(together(labels, entries)[0])
    new = ledger.fresh(len(old))
    offsets = None
    if bias is not None:
        flat = together(bias, place)[0].reshape(-1)
        offsets = np.zeros(len(old), np.int64)
        offsets[place.reshape(-1).numpy()] = flat.numpy()
    ledger.uses.append(Use(new, old[:, None], position[:, None], offsets, entrywise=True))
    gains: Floats = trace.theta[position]
    shifts: Floats = np.zeros(len(old)) if offsets is None else trace.theta[offsets]
    moving = old > ZERO
    carry(trace, new[moving], old[moving], gains[moving], shifts[moving])
    ledger.gains |= dict(zip(new[~moving].tolist(), gains[~moving].tolist(), strict=True))
    ledger.offsets |= dict(zip(new[~moving].tolist(), shifts[~moving].tolist(), strict=True))
    return Signal(torch.from_numpy(new)[place])


def _product(trace: Trace, first: Tensor, second: Tensor, sign: float) -> Signal:
    ledger = trace.ledger
    a, b, place = pairs(first, second)
    new = ledger.fresh(len(a))
    ledger.equations.add((2 * new, 1.0), (2 * a, -1.0), (2 * b, -sign))
    for labels in (a, b, new):
        ledger.hold(labels, scale=False)
        ledger.event(labels[labels > ZERO], apart=True)
    return Signal(torch.from_numpy(np.where((a == ZERO) | (b == ZERO), ZERO, new))[place])


@rule("neg")
def negated(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    value = given.get("argument0")
    return [negative(trace, value)] if isinstance(value, Signal) else None


@rule("pow", "square")
def power(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    """`y^k` scales like `k` times the scale of `y`."""
    value = given.get("input", given.get("argument0"))
    exponent = 2.0 if node.kind == "square" else given.get("other")
    if not isinstance(value, Signal) or not isinstance(exponent, int | float):
        return None
    ledger = trace.ledger
    old, place = torch.unique(value.labels, return_inverse=True)
    olds, new = old.numpy(), ledger.fresh(len(old))
    ledger.equations.add((2 * new, 1.0), (2 * olds, -float(exponent)))
    for labels in (olds, new):
        ledger.hold(labels, scale=False)
        ledger.event(labels[labels > ZERO], apart=True)
    ledger.name(new, "homogeneity")
    return [Signal(torch.where(value.labels == ZERO, ZERO, torch.from_numpy(new)[place]))]
