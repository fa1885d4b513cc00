"""Which layers the channels of a layer reach, through operations that treat every channel alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.network.graph import Graph, Node

_MAXIMA = {f"{name}{d}d" for name in ("max_pool", "adaptive_max_pool") for d in (1, 2, 3)}
_AVERAGES = {f"{name}{d}d" for name in ("avg_pool", "adaptive_avg_pool") for d in (1, 2, 3)} | {"mean"}
# Positively homogeneous, entry by entry.
_ENTRYWISE = {"relu", "leaky_relu", "prelu"}
_SOFTMAX = {"softmax", "log_softmax"}
# Leave the values as they are.
_TRANSPARENT = {
    "flatten", "view", "reshape", "contiguous", "clone", "dropout", "dropout1d", "dropout2d", "dropout3d", "to",
    "float", "double", "squeeze", "unsqueeze", "unflatten",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads channels: `features (C, width)` are the input features of each channel."""

    node: Node
    features: Tensor

    def entries(self, channel: int) -> Tensor:
        """The entries of its weight that multiply a channel, in the same order for each."""
        shape = self.node.arguments["weight_shape"]
        out, inputs = shape[0], shape[1]
        groups = self.groups
        grid = torch.arange(torch.Size(shape).numel()).view(groups, out // groups, inputs, -1)
        picked = [grid[int(f) // inputs, :, int(f) % inputs] for f in self.features[channel]]
        return torch.stack(picked, dim=1).reshape(-1)

    @property
    def groups(self) -> int:
        return int(self.node.arguments.get("groups", 1))


@dataclass(frozen=True, eq=False)
class Link:
    """A layer or norm, the layers that read its channels, and what lies between.

    Attributes:
        producer: the layer or norm.
        channels: how many it has.
        readers: the layers that read it.
        output: the axis of the network's output at which its channels arrive, where they do.
        softmax: whether a softmax over its channels reads it.
        passed: the operations on the way.
    """

    producer: Node
    channels: int
    readers: tuple[Reader, ...]
    output: int | None
    softmax: bool
    passed: tuple[Node, ...]

    @property
    def inner(self) -> bool:
        """Whether nothing but layers reads it."""
        return bool(self.readers) and self.output is None and not self.softmax

    @property
    def activations(self) -> tuple[Node, ...]:
        return tuple(node for node in self.passed if node.kind in _ENTRYWISE)

    @property
    def maxima(self) -> bool:
        return any(node.kind in _MAXIMA for node in self.passed)

    @property
    def averages(self) -> tuple[Node, ...]:
        return tuple(node for node in self.passed if node.kind in _AVERAGES)

    @property
    def linear(self) -> bool:
        return not self.activations and not self.maxima


def channel_axis(node: Node) -> int | None:
    """The axis of the output of a layer or norm that runs over its channels; None if there is no such axis."""
    if node.kind == "conv":
        return len(node.shape) + 1 - len(node.arguments["weight_shape"])
    if node.kind in ("layer_norm", "rms_norm"):
        shape = node.arguments.get("shape", ())
        return len(node.shape) - 1 if isinstance(shape, int) or len(shape) == 1 else None
    return len(node.shape) - 1 if node.kind == "linear" else 1


def follow(graph: Graph, producer: Node) -> tuple[Link | None, str]:
    """All that a producer's channels reach through homogeneous operations, or why there is no such link."""
    axis = channel_axis(producer)
    if axis is None:
        return None, f"{producer.kind} over several axes"
    count = producer.shape[axis]
    front = [(producer, axis, torch.arange(count))]
    readers: list[Reader] = []
    passed: list[Node] = []
    output, softmax = None, False
    while front:
        node, axis, channel = front.pop()
        if node.index == graph.result:
            output = axis
        for reader in graph.consumers(node.index):
            if reader.is_norm:
                return None, ""
            if reader.is_layer and reader.inputs == (node.index,):
                if axis != (len(reader.before) - 1 if reader.kind == "linear" else channel_axis(reader)):
                    return None, f"{reader.layer} reads it along another axis"
                order = torch.argsort(channel, stable=True)
                readers.append(Reader(reader, order.view(count, -1)))
                continue
            if reader.kind in _SOFTMAX and reader.arguments.get("dim") in (axis, axis - len(node.shape)):
                softmax = True
                continue
            moved = _through(reader, axis, channel)
            if moved is None:
                return None, f"passes through {reader.kind}"
            passed.append(reader)
            front.append((reader, *moved))
    return Link(producer, count, tuple(readers), output, softmax, tuple(passed)), ""


def _through(node: Node, axis: int, channel: Tensor) -> tuple[int, Tensor] | None:
    """Where the channels are behind an operation: the axis, and the channel of each of its entries."""
    before, after = node.before, node.shape
    if node.kind in _ENTRYWISE or (node.kind in _TRANSPARENT and before == after):
        return axis, channel
    if node.kind in _MAXIMA or node.kind in _AVERAGES:
        pooled = len(before) - axis - 1 if node.kind == "mean" else int(node.kind[-2])
        kept = axis < len(before) - pooled and after[: axis + 1] == before[: axis + 1]
        return (axis, channel) if kept and len(after) in (len(before), axis + 1) else None
    if node.kind not in _TRANSPARENT:
        return None
    # Move the channels' numbers as the values were moved; the first axis, where it stays, is that of the examples.
    first = int(before[:1] == after[:1] and axis > 0)
    shape = [-1 if d == axis else 1 for d in range(first, len(before))]
    ids = channel.view(shape).expand(before[first:]).reshape(after[first:])
    for d in range(ids.ndim):
        along = ids.movedim(d, -1).reshape(-1, ids.shape[d])
        if bool((along == along[:1]).all()) and bool((along[0].bincount() > 0).all()):
            return d + first, along[0]
    return None
