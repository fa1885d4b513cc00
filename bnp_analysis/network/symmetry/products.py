"""Layers, products of activations, attention: where parameters work and channels meet."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.network.graph import Node
from bnp_analysis.network.symmetry.signals import FIXED, ZERO, Known, Signal, Stored, Use, Value
from bnp_analysis.network.symmetry.system import Ints
from bnp_analysis.network.symmetry.trace import Trace, fixed, rule, spread_over

# What scores may pass through on their way to the softmax that removes a common shift.
_TO_SOFTMAX = {"mul", "div", "add", "sub", "masked_fill", "where", "to", "float", "double", "dropout"}


@rule("linear", "linear with computed weights")
def linear(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    source, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    if isinstance(source, Value) and isinstance(weight, Stored) and (bias is None or isinstance(bias, Stored)):
        return [_linear(trace, node, source, weight.entries, None if bias is None else bias.entries)]
    return None


def _linear(trace: Trace, node: Node, source: Value, weight: Tensor, bias: Tensor | None) -> Signal:
    ledger = trace.ledger
    columns = _columns(trace, source, weight.shape[1])
    out = ledger.fresh(len(weight))
    entries = weight.numpy()
    ledger.uses.append(Use(out, columns[None], entries, None if bias is None else bias.numpy(), node.index))
    ledger.event(out)
    _read(trace, columns, np.zeros(len(columns), np.int64))
    return spread_over(out, node.shape, len(node.shape) - 1)


def _columns(trace: Trace, source: Value, width: int) -> Ints:
    """One label for each input feature; a constant input has none that moves."""
    if isinstance(source, Known):
        return np.full(width, FIXED)
    return trace.ledger.merge(trace.ledger.lift(source).reshape(-1, width))


def _read(trace: Trace, columns: Ints, kinds: Ints) -> None:
    """Channels are read alike where they are read equally often, and by the same group."""
    labels, first, counts = np.unique(columns, return_index=True, return_counts=True)
    moving = labels > ZERO
    trace.ledger.event(labels[moving], counts[moving] * (int(kinds.max()) + 1) + kinds[first[moving]])


@rule("conv", "conv with computed weights")
def convolution(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    source, weight, bias = given.get("input"), given.get("weight"), given.get("bias")
    if (
        not isinstance(source, Value)
        or not isinstance(weight, Stored)
        or not (bias is None or isinstance(bias, Stored))
    ):
        return None
    ledger, groups = trace.ledger, int(given.get("groups", 1))
    kernel = weight.entries.shape[2:]
    units, inputs = len(weight.entries), weight.entries.shape[1] * groups
    axis = len(node.shape) - len(kernel) - 1
    if isinstance(source, Known):
        channels = np.full(inputs, FIXED)
    else:
        channels = ledger.merge(ledger.lift(source).movedim(axis, -1))
    if _pads(given.get("padding", 0)):
        ledger.hold(channels[channels > ZERO], scale=False)
    taps = np.repeat(channels.reshape(groups, -1), kernel.numel(), axis=1)
    out = ledger.fresh(units)
    entries = weight.entries.reshape(units, -1).numpy()
    ledger.uses.append(Use(out, taps, entries, None if bias is None else bias.entries.numpy(), node.index))
    ledger.event(out, np.arange(units) // (units // groups))
    _read(trace, channels, np.arange(inputs) // (inputs // groups))
    return [spread_over(out, node.shape, axis)]


def _pads(padding: Any) -> bool:
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, tuple | list) else bool(padding)


@rule("embedding")
def embedding(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    weight, ignored = given.get("weight"), given.get("padding_idx")
    if not isinstance(weight, Stored) or any(given.get(key) is not None for key in ("max_norm", "argument3")):
        return None
    ledger = trace.ledger
    rows = weight.entries.numpy().T
    out = ledger.fresh(len(rows))
    ledger.uses.append(Use(out, np.full((1, rows.shape[1]), FIXED), rows, node=node.index, table=True))
    ledger.event(out)
    if ignored is not None:
        # Its row gets no gradient: what needs it to move is no direction of these derivatives.
        ledger.hold(out, scale=bool((trace.theta[rows[:, ignored]] != 0).any()))
    return [spread_over(out, node.shape, len(node.shape) - 1)]


@rule("matmul")
def matmul(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    a, b = given.get("input"), given.get("other")
    if isinstance(b, Stored) and b.entries.ndim == 2 and isinstance(a, Signal | Known):
        return [_linear(trace, node, a, b.entries.T, None)]
    if not isinstance(a, Signal | Known) or not isinstance(b, Signal | Known):
        return None
    left, right = trace.ledger.lift(a), trace.ledger.lift(b)
    if left.ndim < 2 or right.ndim < 2:
        return None
    if isinstance(b, Signal) and bool((left <= ZERO).all()):
        rows = isinstance(a, Signal) and a.weights in (left.ndim - 1, -1)
        return [averaged(trace, right, node.shape, sums_to_one=rows or _row_sums(a))]
    if bool((right <= ZERO).all()):
        return [_fixed_mixture(trace, left, node.shape)]
    q, k = _over(trace, left, -2), _over(trace, right, -1)
    return [_contracted(trace, q, k, node)]


def _row_sums(value: Value) -> bool:
    if not isinstance(value, Known):
        return False
    sums = value.value.double().sum(dim=-1)
    return bool((sums - 1).abs().max() < 1e-12)


def averaged(trace: Trace, values: Tensor, shape: torch.Size, *, sums_to_one: bool) -> Signal:
    """`A v` with an `A` that nothing moves: linear in the channels of `v`, and shifts pass where rows sum to one."""
    channels = _over(trace, values, -2)
    moving = np.unique(channels[channels > ZERO])
    if not sums_to_one:
        trace.ledger.hold(moving, scale=False)
    _by_head(trace, channels)
    trace.ledger.name(moving, "attention values")
    return Signal(torch.from_numpy(channels).unsqueeze(-2).expand(shape).contiguous())


def _over(trace: Trace, labels: Tensor, axis: int) -> Ints:
    """`(batch, channels)` with one label for all positions along an axis."""
    moved = labels.movedim(axis, 0)
    return trace.ledger.merge(moved.reshape(len(moved), -1)).reshape(moved.shape[1:])


def _by_head(trace: Trace, channels: Ints) -> None:
    """Channels mix only within the heads that they all belong to."""
    flat = channels.reshape(-1, channels.shape[-1])
    keys = np.random.default_rng(0).integers(1, 2**40, len(flat))
    labels, place = np.unique(flat, return_inverse=True)
    kinds = np.zeros(len(labels), np.int64)
    np.add.at(kinds, place.reshape(-1), np.repeat(keys, flat.shape[1]))
    moving = labels > ZERO
    trace.ledger.event(labels[moving], kinds[moving])


def _fixed_mixture(trace: Trace, labels: Tensor, shape: torch.Size) -> Signal:
    """`y M` with a constant `M`: all entries along the last axis move as one."""
    ledger = trace.ledger
    found = ledger.merge(labels.movedim(-1, 0).reshape(labels.shape[-1], -1)).reshape(labels.shape[:-1])
    moving = np.unique(found[found > ZERO])
    ledger.hold(moving, scale=False)
    ledger.event(moving, apart=True)
    return Signal(torch.from_numpy(found).unsqueeze(-1).expand(shape).contiguous())


def _contracted(trace: Trace, q: Ints, k: Ints, node: Node) -> Signal:
    """`sum_c q_c k_c`: opposite scales, up to one for each product; the keys may share a shift before a softmax."""
    ledger = trace.ledger
    q, k = np.broadcast_arrays(q, k)
    width = q.shape[-1]
    rows, place = np.unique(np.concatenate([q, k], axis=-1).reshape(-1, 2 * width), axis=0, return_inverse=True)
    out = ledger.fresh(len(rows))
    a, b = rows[:, :width].ravel(), rows[:, width:].ravel()
    ledger.equations.add((2 * a, 1.0), (2 * b, 1.0), (2 * np.repeat(out, width), -1.0))
    meet(trace, a, b, removed=_reaches_softmax(trace, node.index))
    _by_head(trace, q)
    _by_head(trace, k)
    ledger.hold(out, scale=False)
    ledger.event(out, apart=True)
    labels = torch.from_numpy(out[place.reshape(-1)].reshape(q.shape[:-1]))
    return Signal(labels[..., None, None].expand(node.shape).contiguous())


def meet(trace: Trace, q: Ints, k: Ints, *, removed: bool) -> None:
    """Channels that are multiplied; what a softmax over the keys removes may shift them."""
    ledger = trace.ledger
    ledger.hold(q, scale=False)
    if not removed:
        ledger.hold(k, scale=False)
    ledger.opposed.append((q, k))
    ledger.event(np.concatenate([q[k <= ZERO], k[q <= ZERO]]), apart=True)
    ledger.name(np.concatenate([q, k]), "attention query-key")


def _reaches_softmax(trace: Trace, index: int) -> bool:
    """Whether all that becomes of scores is a softmax over the last axis."""
    readers = trace.graph.consumers(index)
    for node in readers:
        over_last = node.kind == "softmax" and node.arguments.get("dim") in (-1, len(node.shape) - 1)
        if not over_last and not (node.kind in _TO_SOFTMAX and _reaches_softmax(trace, node.index)):
            return False
    return bool(readers) and trace.graph.result != index


@rule("scaled_dot_product_attention")
def attention(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    parts = [given.get(role) for role in ("query", "key", "value")]
    if given.get("enable_gqa") or not all(isinstance(part, Signal | Known | Stored) for part in parts):
        return None
    if isinstance(given.get("mask"), Signal | Stored):
        return None
    q, k, v = (trace.ledger.lift(part) for part in parts if isinstance(part, Signal | Known | Stored))
    a, b = np.broadcast_arrays(_over(trace, q, -2), _over(trace, k, -2))
    found = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    trace.ledger.equations.add((2 * found[0], 1.0), (2 * found[1], 1.0))
    meet(trace, found[0], found[1], removed=True)
    _by_head(trace, a)
    _by_head(trace, b)
    return [averaged(trace, v, node.shape, sums_to_one=True)]


@rule("softmax", "log_softmax")
def softmax(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    """Invariant to a shift that is common along its axis."""
    value, dim = given.get("input"), given.get("dim")
    if not isinstance(value, Signal) or not isinstance(dim, int):
        return None
    ledger = trace.ledger
    labels = np.unique(value.labels.numpy())
    ledger.hold(labels, shift=False)
    ledger.event(labels[labels > ZERO], apart=True)
    for row in torch.unique(value.labels.movedim(dim, -1).reshape(-1, value.labels.shape[dim]), dim=0).numpy():
        moving = row[row != ZERO]
        ledger.tie(moving[:1].repeat(len(moving)), moving, scale=False)
    return [fixed(node.shape, dim % len(node.shape) if node.kind == "softmax" else None)]
