"""The operations of one forward pass as a graph, recorded while they run.

Calls are seen at the level of `torch.nn.functional`, so a network written with functions is read like one made of
modules. Tensors are told apart by identity, parameters by the names under which they were passed in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bnp_analysis.network.batches import Batch, tensors_of
from bnp_analysis.network.risk import EmpiricalRisk

LAYERS = {F.linear: "linear", F.conv1d: "conv", F.conv2d: "conv", F.conv3d: "conv"}
NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
# Positively homogeneous, channel by channel.
HOMOGENEOUS = {
    "relu", "relu_", "leaky_relu", "leaky_relu_", "prelu", "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
}  # fmt: skip
# Leave the values as they are.
TRANSPARENT = {"flatten", "view", "reshape", "contiguous", "dropout", "detach", "to", "float", "double", "squeeze"}
_ALIASES = {
    "_max_pool1d": "max_pool1d",
    "_max_pool2d": "max_pool2d",
    "_max_pool3d": "max_pool3d",
    "boolean_dispatch": "",
}


@dataclass(frozen=True, eq=False)
class Node:
    """One call: its kind, the nodes whose outputs it reads, the parameters it uses, what went in and came out."""

    index: int
    kind: str
    inputs: tuple[int, ...]
    parameters: dict[str, str]
    arguments: dict[str, Any]
    received: Tensor | None
    output: Tensor

    @property
    def layer(self) -> str:
        """The name of the layer whose weight it uses (empty for a bare layer), or its kind."""
        name = self.parameters.get("weight", self.kind)
        return "" if name == "weight" else name.removesuffix(".weight")


@dataclass(eq=False)
class Graph:
    """The nodes in the order of execution; the last one that made the network's output is `result`."""

    nodes: list[Node] = field(default_factory=list)
    result: int = -1

    def consumers(self, index: int) -> list[Node]:
        """Nodes that read the output of a node."""
        return [node for node in self.nodes if index in node.inputs]

    def uses(self, name: str) -> int:
        """How many nodes use a parameter."""
        return sum(name in node.parameters.values() for node in self.nodes)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)


class _Recorder(TorchFunctionMode):
    def __init__(self, parameters: dict[int, str]) -> None:
        super().__init__()
        self.graph = Graph()
        self._parameters = parameters
        self._made: dict[int, int] = {}
        # Kept alive: a freed tensor's identity would be given to another.
        self._alive: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [t for t in tensors_of(out if isinstance(out, Tensor | tuple | list) else ()) if t.is_floating_point()]
        if made:
            given = tensors_of((list(args), kwargs))
            names = {id(t): self._parameters[id(t)] for t in given if id(t) in self._parameters}
            inputs = tuple(dict.fromkeys(self._made.get(id(t), -1) for t in given if id(t) not in names))
            node = Node(
                len(self.graph.nodes),
                _kind(func),
                inputs,
                _roles(func, args, kwargs, self._parameters),
                _settings(func, args, kwargs),
                next((t for t in given if id(t) not in names), None),
                made[0],
            )
            self.graph.nodes.append(node)
            for t in made:
                self._made[id(t)] = node.index
            self._alive += [out, args, kwargs]
        return out

    def made(self, t: Tensor) -> int:
        return self._made.get(id(t), -1)


def record_graph(risk: EmpiricalRisk, batch: Batch) -> Graph:
    """Run one batch and record its operations.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(4, 3), torch.zeros(4, dtype=torch.long)
        >>> risk = bnp.EmpiricalRisk(bnp.models.mlp([3, 2, 2]), torch.nn.functional.cross_entropy, (x, y))
        >>> [node.kind for node in record_graph(risk, next(iter(risk.batches)))]
        ['linear', 'relu', 'linear']
    """
    tensors = risk.named_tensors()
    recorder = _Recorder({id(t): name for name, t in tensors.items()})
    with torch.no_grad(), recorder:
        out = risk.batch_outputs(tensors, batch)
    recorder.graph.result = recorder.made(out)
    return recorder.graph


def _kind(func: Any) -> str:
    if func in LAYERS:
        return LAYERS[func]
    name = str(getattr(func, "__name__", func))
    return _ALIASES.get(name, name)


def _roles(func: Any, args: Any, kwargs: Any, names: dict[int, str]) -> dict[str, str]:
    """Which parameter plays which part: weight and bias of a layer or norm, else by position."""
    kind = _kind(func)
    order = {
        "linear": ("input", "weight", "bias"),
        "conv": ("input", "weight", "bias"),
        "layer_norm": ("input", "shape", "weight", "bias"),
        "rms_norm": ("input", "shape", "weight"),
        "group_norm": ("input", "groups", "weight", "bias"),
        "batch_norm": ("input", "mean", "variance", "weight", "bias"),
    }.get(kind, ())
    named = dict(zip(order, args, strict=False)) | kwargs
    loose = {f"argument{i}": value for i, value in enumerate(args) if i >= len(order)}
    found = {role: names[id(t)] for role, t in {**named, **loose}.items() if id(t) in names}
    return found


def _settings(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The plain arguments: everything that is not a tensor."""
    kind = _kind(func)
    plain = {key: value for key, value in kwargs.items() if not isinstance(value, Tensor)}
    order = {
        "conv": ("", "", "", "stride", "padding", "dilation", "groups"),
        "group_norm": ("", "groups", "", "", "eps"),
        "layer_norm": ("", "shape", "", "", "eps"),
        "batch_norm": ("", "", "", "", "", "training", "momentum", "eps"),
        "leaky_relu": ("", "negative_slope"),
        "max_pool2d": ("", "kernel_size", "stride", "padding", "dilation", "ceil_mode"),
    }.get(kind, ())
    for name, value in zip(order, args, strict=False):
        if name and not isinstance(value, Tensor):
            plain[name] = value
    return plain
