"""Activations, pools and means, read as demands on labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.network.graph import Node
from bnp_analysis.network.symmetry.arithmetic import carry, scaled
from bnp_analysis.network.symmetry.signals import ZERO, Signal, Stored, Value
from bnp_analysis.network.symmetry.system import Floats, Ints
from bnp_analysis.network.symmetry.trace import Trace, fixed, rule

# Smooth, and neither homogeneous nor periodic: nothing but what is constant passes.
_RIGID = (
    "tanh", "sigmoid", "gelu", "silu", "softplus", "elu", "elu_", "selu", "celu", "mish", "softsign", "logsigmoid",
    "exp", "log", "log1p", "expm1", "sin", "cos", "erf", "atan", "asinh", "tanhshrink", "softmin",
)  # fmt: skip
_MAXIMA = tuple(f"{name}{d}d" for name in ("max_pool", "adaptive_max_pool") for d in (1, 2, 3))
_AVERAGES = tuple(f"{name}{d}d" for name in ("avg_pool", "adaptive_avg_pool") for d in (1, 2, 3))


@rule("relu", "leaky_relu", "prelu", "abs", "clamp", "clamp_min")
def activation(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    """Positively homogeneous; a channel that the data keep on one side of zero is linear."""
    value = given.get("input", given.get("argument0"))
    if not isinstance(value, Signal):
        return None
    if node.kind.startswith("clamp") and [part for role, part in given.items() if part is not value] != [0]:
        return None
    ledger = trace.ledger
    old, place = torch.unique(value.labels, return_inverse=True)
    olds = old.numpy()
    slopes = _slopes(trace, node, value.labels, olds)
    linear = (slopes != 0) & (olds > ZERO)
    ledger.hold(olds[~linear & (olds > ZERO)], scale=False)
    ledger.event(olds[~linear & (olds > ZERO)], apart=True)
    new, out = ledger.fresh(int(linear.sum())), olds.copy()
    out[linear] = new
    before, slope = olds[linear], slopes[linear]
    ledger.tie(new, before, shift=False)
    ledger.equations.add((2 * new + 1, 1.0), (2 * before + 1, -slope))
    carry(trace, new, before, slope, 0.0)
    ledger.name(new, "always-active units")
    ledger.name(olds[~linear], "homogeneity")
    return [Signal(torch.from_numpy(out)[place])]


def _slopes(trace: Trace, node: Node, labels: Tensor, old: Ints) -> Floats:
    """The slope of each label where all its entries that count have one sign; zero elsewhere."""
    if node.kind not in ("relu", "leaky_relu"):
        return np.zeros(len(old))
    below = 0.0 if node.kind == "relu" else float(node.arguments.get("negative_slope", 0.01))
    positive = negative = torch.ones(1, dtype=torch.bool)
    for graph in trace.full:
        signs, reach = graph.nodes[node.index].signs, graph.nodes[node.index].reach
        assert signs is not None
        assert reach is not None
        up, down = over_examples((signs > 0) | ~reach, labels), over_examples((signs < 0) | ~reach, labels)
        if up is None or down is None:
            return np.zeros(len(old))
        positive, negative = positive & up, negative & down
    # One entry among the examples stands for all.
    here = labels if positive.shape == labels.shape else _one_example(labels, positive.shape)
    slopes = np.zeros(len(old))
    for k, label in enumerate(old):
        mine = here == int(label)
        slopes[k] = 1.0 if bool(positive[mine].all()) else (below if bool(negative[mine].all()) else 0.0)
    return slopes


def over_examples(flags: Tensor, labels: Tensor) -> Tensor | None:
    """Whether all examples have a flag, entry by entry; None where the labels depend on the example."""
    axes = [d for d in range(flags.ndim) if flags.shape[d] != labels.shape[d]]
    if not axes:
        return flags
    if len(axes) > 1 or not bool((labels == labels.narrow(axes[0], 0, 1)).all()):
        return None
    return flags.all(dim=axes[0], keepdim=True)


def _one_example(labels: Tensor, shape: torch.Size) -> Tensor:
    for axis in range(labels.ndim):
        if shape[axis] != labels.shape[axis]:
            labels = labels.narrow(axis, 0, 1)
    return labels


@rule(*_RIGID)
def rigid(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    value = given.get("input", given.get("argument0"))
    if isinstance(value, Stored) or value is None:
        return None
    trace.ledger.pin(value)
    return [fixed(node.shape)]


@rule(*_MAXIMA, *_AVERAGES, "interpolate")
def pooled(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    """Channel by channel, over space."""
    value = given.get("input", given.get("argument0"))
    if not isinstance(value, Signal):
        return None
    space = value.labels.ndim - 2 if node.kind == "interpolate" else int(node.kind[-2])
    axis = value.labels.ndim - space - 1
    channels = trace.ledger.merge(value.labels.movedim(axis, -1))
    if node.kind in _MAXIMA:
        trace.ledger.event(channels[channels > ZERO], apart=True)
    elif np.any(np.asarray(given.get("padding", 0)) != 0):
        trace.ledger.hold(channels, scale=False)
    along = [-1 if d == axis else 1 for d in range(len(node.shape))]
    out = torch.from_numpy(channels).view(along).expand(node.shape).contiguous()
    assert node.call is not None
    return [Signal(out)] * node.call.outputs


@rule("mean", "sum", "amax", "max")
def reduced(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    value, dim = given.get("input"), given.get("dim")
    if not isinstance(value, Signal) or isinstance(dim, Value | Tensor) or (dim is None and node.kind == "max"):
        return None
    labels = value.labels
    if not labels.numel():  # a part of the batch that two examples do not have
        return None
    given_dims = range(labels.ndim) if dim is None else ((dim,) if isinstance(dim, int) else tuple(dim))
    dims = sorted({d % labels.ndim for d in given_dims})
    rest = [d for d in range(labels.ndim) if d not in dims]
    flat = labels.permute(*dims, *rest).reshape(-1, max(1, torch.Size(labels.shape[d] for d in rest).numel()))
    found = trace.ledger.merge(flat)
    if node.kind in ("amax", "max"):
        trace.ledger.event(found[found > ZERO], apart=True)
    out = Signal(torch.from_numpy(found.copy()).reshape(node.shape))
    if node.kind == "sum":
        return [scaled(trace, out, torch.tensor(float(len(flat)))) or out]
    assert node.call is not None
    return [out] * node.call.outputs
