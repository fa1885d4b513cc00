"""Symmetry rules of layers, normalizations, products of activations, and attention.

Each rule takes the constraints, the node and its arguments by name, and returns what stands for the result, or None
where it cannot be followed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.linalg.bases import Ints
from bnp_analysis.symmetry.candidates import SCALES, Cause
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
)
from bnp_analysis.symmetry.elementwise import Found, Given, gained
from bnp_analysis.symmetry.graph import Node

# Less than this of a scale behind a norm is not told from nothing.
_LEAST = 1e-9


def linear(c: Constraints, node: Node, given: Given) -> Found:
    return _linear(c, node, given["input"], given["weight"].entries, given.get("bias"))


def _linear(c: Constraints, node: Node, source: Value, weight: Tensor, bias: Parameters | None) -> Activation:
    width, last = weight.shape[1], len(node.shape) - 1
    columns = _channels(c, source, -1, width)
    return _used(c, node, last, columns[None], weight, bias, columns, np.zeros(width, np.int64))


def _channels(c: Constraints, source: Value, axis: int, width: int) -> Ints:
    """One label for each input feature; a constant input has none that moves."""
    if isinstance(source, Constant):
        return np.full(width, FIXED)
    return c.merge(c.labels(source).movedim(axis, -1))


def _used(
    c: Constraints,
    node: Node,
    axis: int,
    source: Ints,
    weight: Tensor,
    bias: Parameters | None,
    channels: Ints,
    group: Ints,
) -> Activation:
    """Weights `(units, features)` on channels, each in its group; mixed where read equally often, by one group."""
    out = c.fresh(len(weight))
    c.uses.append(Use(out, source, weight.numpy(), None if bias is None else bias.entries.numpy(), node.index))
    c.treat(out, np.arange(len(out)) // (len(out) // len(source)))
    labels, first, counts = np.unique(channels, return_index=True, return_counts=True)
    c.treat(labels, counts * (int(group.max()) + 1) + group[first])
    return along_axis(out, node.shape, axis)


def convolution(c: Constraints, node: Node, given: Given) -> Found:
    weight: Tensor = given["weight"].entries
    groups, kernel = int(given.get("groups", 1)), weight.shape[2:]
    inputs, axis = weight.shape[1] * groups, len(node.shape) - len(kernel) - 1
    channels = _channels(c, given["input"], axis, inputs)
    padding = given.get("padding", 0)
    if padding != "valid" if isinstance(padding, str) else np.any(padding):
        c.fix(channels, scale=False)
    taps = np.repeat(channels.reshape(groups, -1), kernel.numel(), axis=1)
    group = np.arange(inputs) // (inputs // groups)
    return _used(c, node, axis, taps, weight.flatten(1), given.get("bias"), channels, group)


def embedding(c: Constraints, node: Node, given: Given) -> Found:
    if given.get("max_norm") is not None:
        return None
    rows, ignored = given["weight"].entries.numpy().T, given.get("padding_idx")
    out = c.fresh(len(rows))
    c.uses.append(Use(out, np.full((1, rows.shape[1]), FIXED), rows, node=node.index, table=True))
    c.treat(out)
    if ignored is not None:
        # Its row gets no gradient: what needs it to move is no direction of these derivatives.
        held = bool((c.theta[rows[:, ignored]] != 0).any())
        c.fix(out, scale=held)
        if held:
            c.separate(out)
    return along_axis(out, node.shape, len(node.shape) - 1)


# Products of activations, attention.


def matmul(c: Constraints, node: Node, given: Given) -> Found:
    a, b = given.get("input"), given.get("other")
    if isinstance(b, Parameters) and b.entries.ndim == 2 and isinstance(a, Activation | Constant):
        return _linear(c, node, a, b.entries.T, None)
    if not isinstance(a, Activation | Constant) or not isinstance(b, Activation | Constant):
        return None
    left, right = c.labels(a), c.labels(b)
    if left.ndim < 2 or right.ndim < 2:
        return None
    if isinstance(b, Activation) and bool((left <= ZERO).all()):
        if isinstance(a, Activation):
            rows = a.weights in (left.ndim - 1, -1)
        else:
            rows = bool((a.value.double().sum(dim=-1) - 1).abs().max() < 1e-12)
        return _averaged(c, right, node.shape, sums_to_one=rows)
    if bool((right <= ZERO).all()):
        # `y M` with a constant `M`: all entries along the last axis move as one.
        found = c.merge_along(left, -1)
        c.only(found, scale=True)
        return Activation(torch.from_numpy(found).unsqueeze(-1).expand(node.shape).contiguous())
    return _contracted(c, c.merge_along(left, -2), c.merge_along(right, -1), node)


def _averaged(c: Constraints, values: Tensor, shape: torch.Size, *, sums_to_one: bool) -> Activation:
    """`A v` with an `A` that nothing moves: linear in the channels of `v`, and shifts pass where rows sum to one."""
    channels = c.merge_along(values, -2)
    if not sums_to_one:
        c.fix(channels, scale=False)
    _by_head(c, channels)
    c.name(channels, Cause.ATTENTION_VALUES)
    return Activation(torch.from_numpy(channels).unsqueeze(-2).expand(shape).contiguous())


def _by_head(c: Constraints, channels: Ints) -> None:
    """Channels mix only within the heads that they all belong to."""
    flat = channels.reshape(-1, channels.shape[-1])
    keys = np.random.default_rng(0).integers(1, 2**40, len(flat))
    labels, place = np.unique(flat, return_inverse=True)
    kinds = np.zeros(len(labels), np.int64)
    np.add.at(kinds, place.reshape(-1), np.repeat(keys, flat.shape[1]))
    c.treat(labels, kinds)


def _contracted(c: Constraints, q: Ints, k: Ints, node: Node) -> Activation:
    """`sum_c q_c k_c`: opposite scales, up to one for each product; the keys may share a shift before a softmax."""
    q, k = np.broadcast_arrays(q, k)
    width = q.shape[-1]
    rows, place = np.unique(np.concatenate([q, k], axis=-1).reshape(-1, 2 * width), axis=0, return_inverse=True)
    out = c.fresh(len(rows))
    a, b = rows[:, :width].ravel(), rows[:, width:].ravel()
    c.equations.add((2 * a, 1.0), (2 * b, 1.0), (2 * np.repeat(out, width), -1.0))
    _multiplied(c, a, b, removed=_reaches_softmax(c, node.index))
    _by_head(c, q)
    _by_head(c, k)
    c.only(out, scale=True)
    labels = torch.from_numpy(out[place.reshape(-1)].reshape(q.shape[:-1]))
    return Activation(labels[..., None, None].expand(node.shape).contiguous())


def _multiplied(c: Constraints, q: Ints, k: Ints, *, removed: bool) -> None:
    """Channels that are multiplied; what a softmax over the keys removes may shift them."""
    c.fix(q, scale=False)
    if not removed:
        c.fix(k, scale=False)
    c.opposed.append((q, k))
    c.separate(np.concatenate([q[k <= ZERO], k[q <= ZERO]]))
    c.name(np.concatenate([q, k]), Cause.QUERY_KEY)


def _reaches_softmax(c: Constraints, index: int) -> bool:
    """Whether all that becomes of scores is a softmax over the last axis."""
    readers = c.graph.consumers(index)
    for node in readers:
        over_last = node.kind == "softmax" and node.arguments.get("dim") in (-1, len(node.shape) - 1)
        if not over_last and not (node.operation.keeps_softmax and _reaches_softmax(c, node.index)):
            return False
    return bool(readers) and c.graph.result != index


def attention(c: Constraints, node: Node, given: Given) -> Found:
    if given.get("enable_gqa") or isinstance(given.get("mask"), Activation | Parameters):
        return None
    q, k, v = (c.labels(given[role]) for role in ("query", "key", "value"))
    a, b = np.broadcast_arrays(c.merge_along(q, -2), c.merge_along(k, -2))
    queries, keys = np.unique(np.stack([a.ravel(), b.ravel()]), axis=1)
    c.equations.add((2 * queries, 1.0), (2 * keys, 1.0))
    _multiplied(c, queries, keys, removed=True)
    _by_head(c, a)
    _by_head(c, b)
    return _averaged(c, v, node.shape, sums_to_one=True)


# Normalizations: what they remove, and what their gain and offset do.


def norm_over_features(c: Constraints, node: Node, given: Given) -> Found:
    """Divides by a size that all entries of the last axes share; only a layer norm also takes their mean out."""
    value, shape, mean = given["input"], given["shape"], node.kind == "layer_norm"
    count = 1 if isinstance(shape, int) else len(shape)
    if isinstance(value, Parameters):
        return None
    rotates = None
    if isinstance(value, Activation):
        _share(c, node, value.labels, shift=mean)
        rows = torch.unique(value.labels.reshape(-1, value.labels.shape[-1]), dim=0).numpy()
        if count == 1 and len(rows) == 1 and len(np.unique(rows)) == rows.size and bool((rows > ZERO).all()):
            rotates = rows[0]
    out = _affine(c, node, given, tuple(node.shape[-count:]))
    if rotates is None:
        _separate(c, value, out)
    else:
        _rotate(c, rotates, out, mean)
    return out


def _share(c: Constraints, node: Node, labels: Tensor, *, shift: bool) -> None:
    """All these entries share one scale, zero unless eps is, and one shift, where a mean is taken out."""
    found, common = np.unique(labels.numpy()), c.fresh(1)
    if bool((found == ZERO).any()):
        c.fix(common, scale=False)
    found = found[found != ZERO]
    c.equate(np.repeat(common, len(found)), found, shift=shift)
    if not shift:
        c.fix(found, scale=False)
    _divided(c, node, common)


def _divided(c: Constraints, node: Node, common: Ints) -> None:
    """A common scale is divided out again, but for eps."""
    c.name(common, SCALES[node.kind])
    if node.arguments.get("eps", 1e-5) != 0:
        c.exact.add((2 * common, 1.0))
        c.relaxed.append(common)


def _affine(c: Constraints, node: Node, given: Given, shape: tuple[int, ...], source: Any = None) -> Activation:
    """The gain and offset of a norm; `source` are the labels of what they act on, by default of what nothing moves."""
    weight, bias = given.get("weight"), given.get("bias")
    labels = fixed(shape).labels if source is None else source
    if isinstance(weight, Parameters):
        offsets = bias.entries.view(shape) if isinstance(bias, Parameters) else None
        labels = gained(c, labels, weight.entries.view(shape), offsets).labels
        c.name(labels.numpy(), Cause.NORM_AFFINE)
    elif source is None and len(shape) == 1:
        # Nothing scales or shifts them, but rotations pass.
        held = c.fresh(shape[0])
        c.fix(held)
        labels = torch.from_numpy(held)
    return Activation(labels.expand(node.shape).contiguous())


def _separate(c: Constraints, value: Value, out: Activation) -> None:
    """No channel mixes with another, neither before nor behind a norm."""
    before = value.labels.numpy().ravel() if isinstance(value, Activation) else np.zeros(0, np.int64)
    c.separate(np.concatenate([before, out.labels.numpy().ravel()]))


def _rotate(c: Constraints, before: Ints, out: Activation, mean: bool) -> None:
    """Orthogonal mixing passes through a norm; gain and offset change its basis behind it."""
    gains = c.gain(before)
    if bool((gains != gains[0]).any()) or bool((out.labels <= ZERO).any()):
        c.separate(out.labels.numpy())
        c.separate(before)
        return
    c.normalized.append((before, mean))
    (c.treat if mean else c.separate)(before, rotates=True)
    behind = out.labels.reshape(-1, len(before))[0].numpy()
    c.passed.append((behind, before))
    c.treat(behind)
    c.separate(behind, rotates=True)


def group_norm(c: Constraints, node: Node, given: Given) -> Found:
    value = given["input"]
    if isinstance(value, Parameters):
        return None
    if isinstance(value, Activation):
        for part in value.labels.chunk(int(given["groups"]), dim=1):
            _share(c, node, part, shift=True)
    out = _affine(c, node, given, (node.shape[1], *[1] * (len(node.shape) - 2)))
    _separate(c, value, out)
    return out


def norm_by_channel(c: Constraints, node: Node, given: Given) -> Found:
    """Statistics of each channel: from what it receives, or stored ones, which make it an affine map."""
    value = given["input"]
    if isinstance(value, Parameters):
        return None
    channels = _channels(c, value, 1, node.shape[1])
    live = bool(given.get("training", node.kind != "batch_norm")) or given.get("mean") is None
    normalized, where = np.full(len(channels), FIXED), np.flatnonzero(channels > ZERO)
    if len(where):
        divide = _divided_by_batch if live else _divided_by_constants
        normalized[where] = divide(c, node, given, channels[where], where)
    shape = (node.shape[1], *[1] * (len(node.shape) - 2))
    out = _affine(c, node, given, shape, torch.from_numpy(normalized).view(shape))
    _separate(c, value, out)
    return out


def _divided_by_batch(c: Constraints, node: Node, given: Given, before: Ints, where: Ints) -> Ints:
    """A scale comes out as `eps/(var + eps)` of itself: an exact number where there is one batch."""
    after, eps = c.fresh(len(before)), float(node.arguments.get("eps", 1e-5))
    c.fix(after, scale=False)
    received = c.full[0].nodes[node.index].received
    if node.kind == "batch_norm" and len(c.full) == 1 and received is not None:
        values = received.cpu().double().movedim(1, 0).flatten(start_dim=1)[torch.from_numpy(where)]
        left = (eps / (values.var(dim=1, correction=0) + eps)).numpy()
        c.exact.add((2 * after, 1.0), (2 * before, -left))
        if eps:
            # What elimination would take for zero holds the scale: it is none, however small.
            c.exact.add((2 * before[left < _LEAST], 1.0))
        c.limit.add((2 * after, 1.0))
        c.name(after, Cause.COMPENSATED_SCALE)
        c.name(before, SCALES[node.kind])
        c.relaxed.append(before)
    else:
        c.equations.add((2 * after, 1.0))
        _divided(c, node, before)
    return after


def _divided_by_constants(c: Constraints, node: Node, given: Given, before: Ints, where: Ints) -> Ints:
    """`(y - m)/s`: the mean stays behind when `y` is scaled."""
    mean, variance = (given[name].value.double().numpy()[where] for name in ("mean", "variance"))
    size = np.sqrt(variance + float(node.arguments.get("eps", 1e-5)))
    after = c.mapped(before, 1 / size, -mean / size)
    c.name(after, Cause.NORM_AFFINE)
    return after
