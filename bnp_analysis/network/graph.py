"""The operations of one forward pass as a graph, recorded while they run.

Calls are seen at the level of `torch.nn.functional`, so a network written with functions is read like one made of
modules. Tensors are told apart by identity, parameters by the names under which they were passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from bnp_analysis.network.batches import Batch
from bnp_analysis.network.calls import ACTIVATIONS, NORMS, arguments_by_name, read_call
from bnp_analysis.network.kernels import derivative, recording
from bnp_analysis.network.observation import transformed
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.smooth import COMPOSITE, opened, watching
from bnp_analysis.runtime.trees import map_tensors, tensors_of

# Where parameters may enter, beside layers.
_WRITERS = {"matmul", "embedding", "add"}


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
    positional: tuple[Any, ...]
    keywords: dict[str, Any]
    outputs: int

    def named(self, kind: str) -> dict[str, Any]:
        """The arguments by the parts they play."""
        return arguments_by_name(kind, self.positional, self.keywords)


@dataclass(frozen=True, eq=False)
class Node:
    """One call.

    Attributes:
        index: its place in the order of execution.
        kind: the function's name; `"linear"` and `"conv"` only where weight and bias are parameters as such.
        inputs: the nodes whose outputs it reads; -1 stands for anything else.
        parameters: role -> name of the parameters it uses.
        arguments: the other arguments by name; of tensors only the statistics of a norm.
        before, shape: of its first input, and of its output.
        received, output: copies of both, of layers and norms only; what follows may write into them.
        reach: of layers, norms and activations: which entries of the output the network's output depends on, to
            first order.
        signs: of activations: the signs of what they receive.
        call: the whole call, where the graph was asked to keep it.
    """

    index: int
    kind: str
    inputs: tuple[int, ...]
    parameters: dict[str, str]
    arguments: dict[str, Any]
    before: torch.Size
    shape: torch.Size
    received: Tensor | None = None
    output: Tensor | None = None
    reach: Tensor | None = None
    signs: Tensor | None = None
    call: Call | None = None

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
        return self.kind in ("linear", "conv")

    @property
    def is_norm(self) -> bool:
        return self.kind in NORMS


@dataclass(eq=False)
class Graph:
    """The nodes in the order of execution.

    Attributes:
        nodes: the calls.
        result: the one that made the network's output, and `output` which of its tensors that is.
        moved: free parameter -> which of its entries that output depends on, to first order.
        transformed: whether operations inside transforms of `torch.func` are missing among the nodes.
    """

    nodes: list[Node] = field(default_factory=list)
    result: int = -1
    output: Slot | None = None
    moved: dict[str, Tensor] = field(default_factory=dict)
    transformed: bool = False

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


class _Recorder(TorchFunctionMode):
    def __init__(self, parameters: dict[int, str], *, calls: bool) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        # Where the gradient of an output arrives, before anything is written into that output.
        self.edges: dict[int, Any] = {}
        self.transformed = False
        self._parameters, self._calls = parameters, calls
        self._made: dict[int, Slot] = {}
        # Kept alive: a freed tensor's identity would be given to another.
        self._alive: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in COMPOSITE:
            with self:
                return opened(func)(*args, **kwargs)
        given = tensors_of((list(args), kwargs))
        if any(transformed(t) for t in given):
            self.transformed = True
            return func(*args, **kwargs)
        kind, roles, arguments = read_call(func, args, kwargs, self._parameters)
        keep = kind in ("linear", "conv") or kind in NORMS
        first = next((t for t in given if id(t) not in self._parameters), None)
        received = first.detach().clone() if keep and first is not None else None
        signs = first.detach().sign().to(torch.int8).cpu() if kind in ACTIVATIONS and first is not None else None
        call = self._call(func, args, kwargs) if self._calls else None
        out = func(*args, **kwargs)
        made = tensors_of(args[0] if kind == "__setitem__" else (out if isinstance(out, Tensor | tuple | list) else ()))
        if any(t.is_floating_point() for t in made):
            index = len(self.nodes)
            before = torch.Size() if first is None else first.shape
            sources = (self.made(t) for t in given if id(t) not in self._parameters)
            inputs = tuple(dict.fromkeys(-1 if slot is None else slot.node for slot in sources))
            call = call if call is None else replace(call, outputs=len(made))
            node = Node(index, kind, inputs, roles, arguments, before, made[0].shape, received, signs=signs, call=call)
            if keep or signs is not None:
                node = replace(node, output=made[0].detach().clone()) if keep else node
            if (keep or signs is not None or kind in _WRITERS) and made[0].requires_grad:
                self.edges[index] = get_gradient_edge(made[0])
            self.nodes.append(node)
            self._made |= {id(t): Slot(index, k) for k, t in enumerate(made) if t.is_floating_point()}
            self._alive += [out, args, kwargs]
        return out

    def _call(self, func: Any, args: Any, kwargs: Any) -> Call:
        def written(t: Tensor) -> Any:
            return (
                Name(self._parameters[id(t)]) if id(t) in self._parameters else self.made(t) or t.detach().cpu().clone()
            )

        return Call(func, tuple(map_tensors(list(args), written)), map_tensors(dict(kwargs), written), 1)

    def made(self, t: Tensor) -> Slot | None:
        return self._made.get(id(t))


@recording()
def record_graph(risk: EmpiricalRisk, batch: Batch, counted: Tensor | None = None, *, calls: bool = False) -> Graph:
    """Run one batch and record its operations.

    Args:
        risk: the empirical risk.
        batch: one of its batches.
        counted: of the shape of the outputs: which of them the loss looks at; default all.
        calls: whether the nodes keep their calls, and with them all constants.

    Returns:
        The `Graph`, without derivatives attached.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(4, 3), torch.zeros(4, dtype=torch.long)
        >>> risk = bnp.EmpiricalRisk(bnp.models.mlp([3, 2, 2]), torch.nn.functional.cross_entropy, (x, y))
        >>> [node.kind for node in record_graph(risk, next(iter(risk.batches)))]
        ['linear', 'relu', 'linear']
    """
    leaves = risk.leaves()
    tensors = risk.named_tensors() | leaves
    recorder = _Recorder({id(t): name for name, t in tensors.items()}, calls=calls)
    # Derivatives of ordinary size: one that saturation has made tiny is no missing edge.
    with recorder, watching(structural=True):
        out = risk.batch_outputs(tensors, batch)
    wanted = [*recorder.edges.values(), *leaves.values()]
    grads: list[Tensor | None] = [None] * len(wanted)
    if out.requires_grad:
        # One random combination of all outputs: what it does not depend on, none of them does.
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)
        weights = weights if counted is None else weights * counted
        what = f"what the outputs of batch {batch.index} depend on"
        grads = [*derivative(out, wanted, weights, materialize_grads=False, what=what)]
    reached = dict(zip(recorder.edges, grads, strict=False))
    moved = zip(leaves, grads[len(recorder.edges) :], strict=True)
    nodes = [
        node
        if node.output is None and node.signs is None
        else replace(node, reach=_nonzero(reached.get(node.index), node.shape))
        for node in recorder.nodes
    ]
    output, found = recorder.made(out), {name: _nonzero(grad, leaves[name].shape) for name, grad in moved}
    return Graph(nodes, -1 if output is None else output.node, output, found, recorder.transformed)


@recording()
def sensitivities(risk: EmpiricalRisk, batch: Batch, covectors: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
    """For each covector of the outputs, its derivatives by what layers and other users of parameters make, by node."""
    tensors = risk.named_tensors() | risk.leaves()
    recorder = _Recorder({id(t): name for name, t in tensors.items()}, calls=False)
    with recorder:
        out = risk.batch_outputs(tensors, batch)
    if not out.requires_grad:
        return
    for covector in covectors:
        wanted, what = [*recorder.edges.values()], f"what the outputs of batch {batch.index} depend on"
        grads = derivative(out, wanted, covector, retain_graph=True, materialize_grads=False, what=what)
        yield {k: g.detach().cpu() for k, g in zip(recorder.edges, grads, strict=True) if g is not None}


def _nonzero(grad: Tensor | None, shape: torch.Size) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool) if grad is None else (grad != 0).cpu()
