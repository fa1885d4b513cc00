"""The operations of one forward pass as a graph, and the interface of an operation's rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Operation:
    """What is known of one kind of operation: a line of the table in `operations`.

    Attributes:
        effect: writes into the constraints what it demands of its inputs, and returns what comes out; None where
            it cannot be followed.
        arguments: the parts that its arguments play, in the order in which they are passed.
        names: further names of torch for the same operation; in-place and `__dunder__` forms need no mention.
        role: `"layer"` for products with a weight, `"norm"`, `"relu"` where a sign decides about the slope, `"writer"`
            for what else may bring parameters in.
        keeps_softmax: a softmax of what comes out loses what a softmax of what goes in would lose.
    """

    effect: Callable[..., Any] | None = None
    arguments: tuple[str, ...] = ("input",)
    names: tuple[str, ...] = ()
    role: str = ""
    keeps_softmax: bool = False


@dataclass(frozen=True)
class Slot:
    """A tensor that a node made: the node's index, and which of its tensors it is."""

    node: int
    position: int


@dataclass(frozen=True)
class Name:
    """A parameter."""

    name: str


@dataclass(frozen=True, eq=False)
class Call:
    """A call as it was made, with a `Slot` or a `Name` in the place of each tensor that is not a constant."""

    function: Any
    positional: list[Any]
    keywords: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Node:
    """One call.

    Attributes:
        index: its place in the order of execution.
        kind: its name in the table of operations, or the function's; `"linear"` and `"conv"` only where weight and
            bias are parameters as such.
        operation: what is known of the kind.
        inputs: the nodes whose outputs it reads; -1 stands for anything else.
        parameters: role -> name of the parameters it uses.
        arguments: the other arguments by name; of tensors only the statistics of a norm.
        before, shape: of its first input, and of its output.
        outputs: how many tensors it makes.
        call: the whole call, where the graph was asked to keep it.
        received, output: copies of both, of layers and norms only; what follows may write into them.
        signs: of activations: the signs of what they receive.
        reach: of layers, norms and activations: which entries of the output the network's output depends on, to
            first order.
    """

    index: int
    kind: str
    operation: Operation
    inputs: tuple[int, ...]
    parameters: dict[str, str]
    arguments: dict[str, Any]
    before: torch.Size
    shape: torch.Size
    outputs: int
    call: Call | None = None
    received: Tensor | None = None
    output: Tensor | None = None
    signs: Tensor | None = None
    reach: Tensor | None = None

    @property
    def layer(self) -> str:
        """The name of the layer whose weight it uses (empty for a bare layer), or its kind."""
        name = self.parameters.get("weight", self.kind)
        return "" if name == "weight" else name.removesuffix(".weight")

    @property
    def channel_axis(self) -> int | None:
        """The axis of the output of a layer or norm that runs over its channels; None if there is no such axis."""
        if self.kind == "conv":
            return len(self.shape) + 1 - len(self.arguments["weight_shape"])
        if self.kind in ("layer_norm", "rms_norm"):
            shape = self.arguments.get("shape", ())
            return len(self.shape) - 1 if isinstance(shape, int) or len(shape) == 1 else None
        return 1 if self.is_norm else len(self.shape) - 1

    @property
    def is_layer(self) -> bool:
        return self.operation.role == "layer"

    @property
    def is_norm(self) -> bool:
        return self.operation.role == "norm"


@dataclass(eq=False)
class Graph:
    """The nodes in the order of execution.

    Attributes:
        nodes: the calls.
        output: the tensor that is the network's output, where a node made it.
        moved: free parameter -> which of its entries that output depends on, to first order.
        transformed: whether operations inside transforms of `torch.func`, or gradients read from `.grad`, are missing
            among the nodes.
    """

    nodes: list[Node] = field(default_factory=list)
    output: Slot | None = None
    moved: dict[str, Tensor] = field(default_factory=dict)
    transformed: bool = False

    @property
    def result(self) -> int:
        """The node that made the network's output, -1 if none did."""
        return -1 if self.output is None else self.output.node

    def consumers(self, index: int) -> list[Node]:
        """Nodes that read the output of a node."""
        return [node for node in self.nodes if index in node.inputs]

    def uses(self, name: str) -> int:
        """How many nodes use a parameter."""
        return sum(name in node.parameters.values() for node in self.nodes)

    def same_operations(self, other: Graph) -> bool:
        """Whether another batch went the same way."""
        return [(n.kind, n.inputs, n.parameters) for n in self] == [(n.kind, n.inputs, n.parameters) for n in other]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)
