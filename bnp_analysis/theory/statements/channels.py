"""Which layers the channels of a layer reach, through operations that treat every channel alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.symmetry.elementwise import pooled, same
from bnp_analysis.symmetry.graph import Graph, Node

# Of what moves numbers, what leaves them in their order.
_IN_ORDER = {"flatten", "view", "reshape", "contiguous", "clone", "squeeze", "unsqueeze", "unflatten"}


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
    """A layer, the layers that read its channels, and whether all that lies between is linear."""

    producer: Node
    channels: int
    readers: tuple[Reader, ...]
    linear: bool


def _is_maximum(node: Node) -> bool:
    return node.operation.effect is pooled and "max" in node.kind


def _is_average(node: Node) -> bool:
    return node.kind == "mean" or (node.operation.effect is pooled and "avg" in node.kind)


def _keeps_order(node: Node) -> bool:
    return node.kind in _IN_ORDER or node.operation.effect is same


def follow(graph: Graph, producer: Node) -> Link | None:
    """The layers that a layer's channels reach through homogeneous operations; None where they reach anything else."""
    axis = producer.channel_axis
    if axis is None:
        return None
    count = producer.shape[axis]
    front = [(producer, axis, torch.arange(count))]
    readers: list[Reader] = []
    linear = True
    while front:
        node, axis, channel = front.pop()
        if node.index == graph.result:
            return None
        for reader in graph.consumers(node.index):
            if reader.is_layer and reader.inputs == (node.index,):
                if axis != (len(reader.before) - 1 if reader.kind == "linear" else reader.channel_axis):
                    return None
                readers.append(Reader(reader, torch.argsort(channel, stable=True).view(count, -1)))
            elif (moved := _through(reader, axis, channel)) is None:
                return None
            else:
                linear = linear and not (reader.operation.role == "relu" or _is_maximum(reader))
                front.append((reader, *moved))
    return Link(producer, count, tuple(readers), linear) if readers else None


def _through(node: Node, axis: int, channel: Tensor) -> tuple[int, Tensor] | None:
    """Where the channels are behind an operation: the axis, and the channel of each of its entries."""
    before, after = node.before, node.shape
    if node.operation.role == "relu" or (_keeps_order(node) and before == after):
        return axis, channel
    if _is_maximum(node) or _is_average(node):
        pooled = len(before) - axis - 1 if node.kind == "mean" else int(node.kind[-2])
        kept = axis < len(before) - pooled and after[: axis + 1] == before[: axis + 1]
        return (axis, channel) if kept and len(after) in (len(before), axis + 1) else None
    if not _keeps_order(node):
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
