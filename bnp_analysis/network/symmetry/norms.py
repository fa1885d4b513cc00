"""Normalizations, read as demands on labels: what they remove, and what their gain and offset do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.network.graph import Node
from bnp_analysis.network.symmetry.arithmetic import gained
from bnp_analysis.network.symmetry.signals import FIXED, ZERO, Known, Signal, Stored, Value
from bnp_analysis.network.symmetry.system import Ints
from bnp_analysis.network.symmetry.trace import Trace, rule

# Less than this of a scale behind a norm is not told from nothing.
_LEAST = 1e-9


@rule("layer_norm", "rms_norm")
def across_features(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    """Divides by a size that all entries of the last axes share; only a layer norm also takes their mean out."""
    shape = given["shape"]
    count = 1 if isinstance(shape, int) else len(shape)
    value = given["input"]
    if isinstance(value, Stored):
        return None
    mean = node.kind == "layer_norm"
    rotates = None
    if isinstance(value, Signal):
        _share(trace, node, value.labels, shift=mean)
        rows = torch.unique(value.labels.reshape(-1, value.labels.shape[-1]), dim=0)
        if count == 1 and len(rows) == 1:
            rotates = rows[0].numpy()
    out = _affine(trace, node, given, tuple(node.shape[-count:]))
    moving = isinstance(value, Signal) and bool((value.labels > ZERO).any())
    if rotates is None or len(np.unique(rotates)) < len(rotates) or bool((rotates <= ZERO).any()):
        _break(trace, value if moving else None, out)
    else:
        _rotate(trace, rotates, out, mean)
    return [out]


def _share(trace: Trace, node: Node, labels: Tensor, *, shift: bool) -> None:
    """All these entries share one scale, zero unless eps is, and one shift, where a mean is taken out."""
    ledger = trace.ledger
    found = np.unique(labels.numpy())
    common = ledger.fresh(1)
    if bool((found == ZERO).any()):
        ledger.hold(common, scale=False)
    found = found[found != ZERO]
    ledger.tie(np.repeat(common, len(found)), found, shift=shift)
    if not shift:
        ledger.hold(found, scale=False)
    _divided(trace, node, common)


def _divided(trace: Trace, node: Node, common: Ints) -> None:
    """A common scale is divided out again, but for eps."""
    ledger = trace.ledger
    ledger.name(common, f"{node.kind} scale")
    if node.arguments.get("eps", 1e-5) != 0:
        ledger.exact.add((2 * common, 1.0))
        ledger.relaxed.append(common)


def _affine(trace: Trace, node: Node, given: dict[str, Any], shape: tuple[int, ...], source: Any = None) -> Signal:
    """The gain and offset of a norm; `source` are the labels of what they act on, by default of what nothing moves."""
    weight, bias = given.get("weight"), given.get("bias")
    labels = torch.full(shape, FIXED, dtype=torch.int64) if source is None else source
    if isinstance(weight, Stored):
        entries = weight.entries.view(shape)
        out = gained(trace, labels, entries, bias.entries.view(shape) if isinstance(bias, Stored) else None).labels
        trace.ledger.name(out.numpy(), "norm affine")
    elif source is None and len(shape) == 1:
        # Nothing scales or shifts them, but rotations pass.
        held = trace.ledger.fresh(shape[0])
        trace.ledger.hold(held)
        out = torch.from_numpy(held)
    else:
        out = labels
    return Signal(out.expand(node.shape).contiguous())


def _break(trace: Trace, value: Value | None, out: Signal) -> None:
    parts = [out] if value is None or not isinstance(value, Signal) else [value, out]
    labels = np.unique(np.concatenate([part.labels.numpy().ravel() for part in parts]))
    trace.ledger.event(labels[labels > ZERO], apart=True)


def _rotate(trace: Trace, before: Ints, out: Signal, mean: bool) -> None:
    """Orthogonal mixing passes through a norm; gain and offset change its basis behind it."""
    ledger = trace.ledger
    gains = ledger.gain(before)
    if bool((gains != gains[0]).any()) or bool((out.labels <= ZERO).any()):
        _break(trace, None, out)
        ledger.event(before, apart=True)
        return
    ledger.rotated.append((before, mean))
    ledger.event(before, apart=not mean, rotates=True)
    behind = out.labels.reshape(-1, len(before))[0].numpy()
    moving = behind > ZERO
    ledger.passed.append((behind[moving], before[moving]))
    ledger.event(behind[moving])
    ledger.event(behind[moving], apart=True, rotates=True)


@rule("group_norm")
def in_groups(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    value, groups = given["input"], int(given["groups"])
    channels = node.shape[1]
    if isinstance(value, Stored):
        return None
    if isinstance(value, Signal):
        for part in value.labels.chunk(groups, dim=1):
            _share(trace, node, part, shift=True)
    out = _affine(trace, node, given, (channels, *[1] * (len(node.shape) - 2)))
    _break(trace, value, out)
    return [out]


@rule("batch_norm", "instance_norm")
def by_channel(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    """Statistics of each channel: from what it receives, or stored ones, which make it an affine map."""
    value = given["input"]
    if isinstance(value, Stored):
        return None
    ledger, shape = trace.ledger, (node.shape[1], *[1] * (len(node.shape) - 2))
    if isinstance(value, Known):
        channels = np.full(shape[0], FIXED)
    else:
        channels = ledger.merge(value.labels.movedim(1, -1))
    live = bool(given.get("training", node.kind != "batch_norm")) or given.get("mean") is None
    normalized = np.full(len(channels), FIXED)
    moving = channels > ZERO
    if moving.any():
        normalized[moving] = ledger.fresh(int(moving.sum()))
        if live:
            _divided_by_batch(trace, node, channels[moving], normalized[moving], np.flatnonzero(moving))
        else:
            _divided_by_constants(trace, node, given, channels[moving], normalized[moving], np.flatnonzero(moving))
    out = _affine(trace, node, given, shape, torch.from_numpy(normalized).view(shape))
    _break(trace, value, out)
    return [out]


def _divided_by_batch(trace: Trace, node: Node, before: Ints, after: Ints, where: Ints) -> None:
    """A scale comes out as `eps/(var + eps)` of itself: an exact number where there is one batch."""
    ledger, eps = trace.ledger, float(node.arguments.get("eps", 1e-5))
    ledger.hold(after, scale=False)
    received = trace.full[0].nodes[node.index].received
    if node.kind == "batch_norm" and len(trace.full) == 1 and received is not None:
        values = received.cpu().double().movedim(1, 0).flatten(start_dim=1)[torch.from_numpy(where)]
        left = (eps / (values.var(dim=1, correction=0) + eps)).numpy()
        ledger.exact.add((2 * after, 1.0), (2 * before, -left))
        if eps:
            # What elimination would take for zero holds the scale: it is none, however small.
            ledger.exact.add((2 * before[left < _LEAST], 1.0))
        ledger.limit.add((2 * after, 1.0))
        ledger.name(after, "batch_norm scale made up for")
        ledger.name(before, "batch_norm scale")
        ledger.relaxed.append(before)
    else:
        ledger.equations.add((2 * after, 1.0))
        _divided(trace, node, before)


def _divided_by_constants(
    trace: Trace, node: Node, given: dict[str, Any], before: Ints, after: Ints, where: Ints
) -> None:
    """`(y - m)/s`: the mean stays behind when `y` is scaled."""
    ledger = trace.ledger
    mean, variance = (given[name].value.double().numpy()[where] for name in ("mean", "variance"))
    size = np.sqrt(variance + float(node.arguments.get("eps", 1e-5)))
    ledger.tie(after, before, shift=False)
    ledger.name(after, "norm affine")
    ledger.equations.add((2 * after + 1, 1.0), (2 * before + 1, -1 / size), (2 * before, -mean / size))
