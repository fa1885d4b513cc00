"""The operations of one forward pass as a graph, recorded while they run.

Calls are seen at the level of `torch.nn.functional`, so a network written with functions is read like one made of
modules. Tensors are told apart by identity, parameters by the names under which they were passed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from bnp_analysis.network.batches import Batch, tensors_of
from bnp_analysis.network.kernels import recording
from bnp_analysis.network.risk import EmpiricalRisk

LAYERS = {F.linear: "linear", F.conv1d: "conv", F.conv2d: "conv", F.conv3d: "conv"}
NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
_ALIASES = {
    **{f"{name}{d}d_with_indices": f"{name}{d}d" for name in ("max_pool", "adaptive_max_pool") for d in (1, 2, 3)},
    **{f"_{name}{d}d": f"{name}{d}d" for name in ("max_pool", "adaptive_max_pool") for d in (1, 2, 3)},
    **{f"{name}_": name for name in ("relu", "leaky_relu")},
}
# The parts that arguments play, in the order in which they are passed.
_ORDER = {
    "linear": ("input", "weight", "bias"),
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "batch_norm": ("input", "mean", "variance", "weight", "bias", "training", "momentum", "eps"),
    "instance_norm": ("input", "mean", "variance", "weight", "bias", "training", "momentum", "eps"),
    "layer_norm": ("input", "shape", "weight", "bias", "eps"),
    "group_norm": ("input", "groups", "weight", "bias", "eps"),
    "rms_norm": ("input", "shape", "weight", "eps"),
    "leaky_relu": ("input", "negative_slope"),
    "softmax": ("input", "dim"),
    "log_softmax": ("input", "dim"),
    **{f"avg_pool{d}d": ("input", "kernel_size", "stride", "padding") for d in (1, 2, 3)},
}
_SAME = {
    "running_mean": "mean",
    "running_var": "variance",
    "use_input_stats": "training",
    "normalized_shape": "shape",
    "num_groups": "groups",
}


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
        reach: of layers and norms: which entries of the output the network's output depends on, to first order.
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

    @property
    def layer(self) -> str:
        """The name of the layer whose weight it uses (empty for a bare layer), or its kind."""
        name = self.parameters.get("weight", self.kind)
        return "" if name == "weight" else name.removesuffix(".weight")

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
        result: the one that made the network's output.
        moved: free parameter -> which of its entries that output depends on, to first order.
    """

    nodes: list[Node] = field(default_factory=list)
    result: int = -1
    moved: dict[str, Tensor] = field(default_factory=dict)

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
    def __init__(self, parameters: dict[int, str]) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        # Where the gradient of an output arrives, before anything is written into that output.
        self.edges: dict[int, Any] = {}
        self._parameters = parameters
        self._made: dict[int, int] = {}
        # Kept alive: a freed tensor's identity would be given to another.
        self._alive: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_of((list(args), kwargs))
        kind, roles, arguments = _read(func, args, kwargs, self._parameters)
        keep = kind in ("linear", "conv") or kind in NORMS
        first = next((t for t in given if id(t) not in self._parameters), None)
        received = first.detach().clone() if keep and first is not None else None
        out = func(*args, **kwargs)
        made = [t for t in tensors_of(out if isinstance(out, Tensor | tuple | list) else ()) if t.is_floating_point()]
        if made:
            index = len(self.nodes)
            before = torch.Size() if first is None else first.shape
            inputs = tuple(dict.fromkeys(self._made.get(id(t), -1) for t in given if id(t) not in self._parameters))
            node = Node(index, kind, inputs, roles, arguments, before, made[0].shape, received)
            if keep:
                node = replace(node, output=made[0].detach().clone())
                if made[0].requires_grad:
                    self.edges[index] = get_gradient_edge(made[0])
            self.nodes.append(node)
            self._made |= {id(t): index for t in made}
            self._alive += [out, args, kwargs]
        return out

    def made(self, t: Tensor) -> int:
        return self._made.get(id(t), -1)


@recording()
def record_graph(risk: EmpiricalRisk, batch: Batch, counted: Tensor | None = None) -> Graph:
    """Run one batch and record its operations.

    Args:
        risk: the empirical risk.
        batch: one of its batches.
        counted: of the shape of the outputs: which of them the loss looks at; default all.

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
    recorder = _Recorder({id(t): name for name, t in tensors.items()})
    with recorder:
        out = risk.batch_outputs(tensors, batch)
    wanted = [*recorder.edges.values(), *leaves.values()]
    grads: list[Tensor | None] = [None] * len(wanted)
    if out.requires_grad:
        # One random combination of all outputs: what it does not depend on, none of them does.
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)
        weights = weights if counted is None else weights * counted
        grads = list(torch.autograd.grad(out, wanted, weights, allow_unused=True))
    reached = dict(zip(recorder.edges, grads, strict=False))
    moved = zip(leaves, grads[len(recorder.edges) :], strict=True)
    nodes = [
        node if node.output is None else replace(node, reach=_nonzero(reached.get(node.index), node.shape))
        for node in recorder.nodes
    ]
    return Graph(nodes, recorder.made(out), {name: _nonzero(grad, leaves[name].shape) for name, grad in moved})


def _nonzero(grad: Tensor | None, shape: torch.Size) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool) if grad is None else (grad != 0).cpu()


def _read(func: Any, args: Any, kwargs: Any, names: dict[int, str]) -> tuple[str, dict[str, str], dict[str, Any]]:
    """The kind of a call, the parameters it uses by role, and its other arguments by name."""
    name = str(getattr(func, "__name__", func))
    kind = LAYERS.get(func, _ALIASES.get(name, name))
    order = _ORDER.get(kind, ())
    given = {(order[i] if i < len(order) else f"argument{i}"): value for i, value in enumerate(args)}
    given |= {_SAME.get(key, key): value for key, value in kwargs.items()}
    roles = {role: names[id(value)] for role, value in given.items() if id(value) in names}
    tensors = [value for value in tensors_of((list(args), kwargs)) if id(value) in names]
    roles |= {f"tensor{i}": names[id(t)] for i, t in enumerate(tensors) if names[id(t)] not in roles.values()}
    kept = ("mean", "variance")
    arguments = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in given.items()
        if id(value) not in names and (key in kept or not tensors_of(value))
    }
    if kind in ("linear", "conv"):
        weight, bias = given.get("weight"), given.get("bias")
        arguments["weight_shape"] = tuple(weight.shape) if isinstance(weight, Tensor) else ()
        if id(weight) not in names or (bias is not None and id(bias) not in names):
            kind += " with computed weights"
    return kind, roles, arguments
