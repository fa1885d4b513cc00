"""The operations of a forward pass, recorded while they run.

Calls are seen at the level of `torch.nn.functional`, so a network written with functions is read like one made of
modules. Tensors are told apart by identity, parameters by the names under which they were passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from bnp_analysis.network.batches import Batch
from bnp_analysis.network.kernels import derivative, recording
from bnp_analysis.network.observation import transformed
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.smooth import monitoring
from bnp_analysis.runtime.trees import map_tensors, tensors_of
from bnp_analysis.symmetry.graph import Call, Graph, Name, Node, Operation, Slot
from bnp_analysis.symmetry.operations import ARGUMENTS, OPERATIONS

_KINDS = {name: kind for kind, operation in OPERATIONS.items() for name in (*operation.names, kind)}
_UNKNOWN = Operation()
_COMPUTED = " with computed weights"


def kind_of(function: Any) -> str:
    """The name in the table of a function of torch, or its own: `__iadd__`, `__add__` and `add_` are `add`."""
    name = str(getattr(function, "__name__", function))
    if name == "__get__":  # of an attribute such as `x.T`
        name = str(getattr(function.__self__, "__name__", name))
    plain = name.strip("_")
    return next((_KINDS[n] for n in (name, plain, plain.removeprefix("i")) if n in _KINDS), name)


def _by_name(kind: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by the parts they play."""
    order = OPERATIONS.get(kind, _UNKNOWN).arguments
    given = {(order[i] if i < len(order) else f"argument{i}"): value for i, value in enumerate(args)}
    return given | {ARGUMENTS.get(key, key): value for key, value in kwargs.items()}


def arguments_by_name(node: Node) -> dict[str, Any]:
    """The arguments of a node that keeps its call, by the parts they play."""
    assert node.call is not None
    return _by_name(node.kind.removesuffix(_COMPUTED), node.call.positional, node.call.keywords)


class _Recorder(TorchFunctionMode):
    def __init__(self, risk: EmpiricalRisk, batch: Batch, *, calls: bool = False, structural: bool = False) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        # Where the gradient of an output arrives, before anything is written into that output.
        self.edges: dict[int, Any] = {}
        self.transformed = False
        self.leaves = risk.leaves()
        tensors = risk.named_tensors() | self.leaves
        self._names, self._calls = {id(t): name for name, t in tensors.items()}, calls
        self.made: dict[int, Slot] = {}
        # Kept alive: a freed tensor's identity would be given to another.
        self._alive: list[Any] = []
        # Derivatives of ordinary size: one that saturation has made tiny is no missing edge.
        with self, monitoring(structural=True) if structural else nullcontext():
            self.out = risk.batch_outputs(tensors, batch)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_of((list(args), kwargs))
        # What backward() leaves in `.grad` depends on tensors that are not among the arguments.
        if any(transformed(t) for t in given) or func == Tensor.grad.__get__:  # type: ignore[union-attr]
            self.transformed = True
            return func(*args, **kwargs)
        node = self._node(func, args, kwargs, given)
        out = func(*args, **kwargs)
        changed = args[0] if node.kind == "__setitem__" else out
        made = tensors_of(changed if isinstance(changed, Tensor | tuple | list) else ())
        if any(t.is_floating_point() for t in made):
            copy = None if node.received is None else made[0].detach().clone()
            node = replace(node, shape=made[0].shape, outputs=len(made), output=copy)
            if node.operation.role and made[0].requires_grad:
                self.edges[node.index] = get_gradient_edge(made[0])
            self.nodes.append(node)
            self.made |= {id(t): Slot(node.index, k) for k, t in enumerate(made) if t.is_floating_point()}
            self._alive += [out, args, kwargs]
        return out

    def _node(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Node:
        """The node of a call, as far as it is known before it runs."""
        kind, names = kind_of(func), self._names
        parts = _by_name(kind, args, kwargs)
        used = [names[id(t)] for t in given if id(t) in names]
        parameters = {role: names[id(value)] for role, value in parts.items() if id(value) in names}
        parameters |= {f"tensor{i}": name for i, name in enumerate(used) if name not in parameters.values()}
        arguments = {
            role: value.clone() if isinstance(value, Tensor) else value
            for role, value in parts.items()
            if id(value) not in names and (role in ("mean", "variance") or not tensors_of(value))
        }
        operation = OPERATIONS.get(kind, _UNKNOWN)
        if operation.role == "layer":
            weight, bias = parts.get("weight"), parts.get("bias")
            arguments["weight_shape"] = tuple(weight.shape) if isinstance(weight, Tensor) else ()
            if id(weight) not in names or (bias is not None and id(bias) not in names):
                kind, operation = kind + _COMPUTED, replace(operation, role="")
        others = [t for t in given if id(t) not in names]
        slots = [self.made.get(id(t)) for t in others]
        first = others[0].detach() if others else None
        keep = operation.role in ("layer", "norm")
        return Node(
            len(self.nodes),
            kind,
            operation,
            tuple(dict.fromkeys(-1 if slot is None else slot.node for slot in slots)),
            parameters,
            arguments,
            before=torch.Size() if first is None else first.shape,
            shape=torch.Size(),
            outputs=1,
            call=self._call(func, args, kwargs) if self._calls else None,
            received=first.clone() if keep and first is not None else None,
            signs=first.sign().to(torch.int8).cpu() if operation.role == "relu" and first is not None else None,
        )

    def _call(self, func: Any, args: Any, kwargs: Any) -> Call:
        def written(t: Tensor) -> Any:
            name = self._names.get(id(t))
            return (self.made.get(id(t)) or t.detach().cpu().clone()) if name is None else Name(name)

        return Call(func, map_tensors(list(args), written), map_tensors(dict(kwargs), written))


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
    run = _Recorder(risk, batch, calls=calls, structural=True)
    out, reached, moved = run.out, dict.fromkeys(run.edges), dict.fromkeys(run.leaves)
    if out.requires_grad:
        # One random combination of all outputs: what it does not depend on, none of them does.
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(out)
        weights = weights if counted is None else weights * counted
        wanted = [*run.edges.values(), *run.leaves.values()]
        grads = derivative(out, wanted, weights, materialize_grads=False, what=_what(batch))
        reached |= zip(run.edges, grads, strict=False)
        moved |= zip(run.leaves, grads[len(run.edges) :], strict=True)
    nodes = [
        replace(node, reach=_nonzero(reached.get(node.index), node.shape))
        if node.operation.role in ("layer", "norm", "relu")
        else node
        for node in run.nodes
    ]
    found = {name: _nonzero(grad, run.leaves[name].shape) for name, grad in moved.items()}
    return Graph(nodes, run.made.get(id(run.out)), found, run.transformed)


@recording()
def sensitivities(risk: EmpiricalRisk, batch: Batch, covectors: Sequence[Tensor]) -> Iterator[dict[int, Tensor]]:
    """For each covector of the outputs, its derivatives by what layers and other users of parameters make, by node."""
    run = _Recorder(risk, batch)
    for covector in covectors if run.out.requires_grad else ():
        wanted = [*run.edges.values()]
        grads = derivative(run.out, wanted, covector, retain_graph=True, materialize_grads=False, what=_what(batch))
        yield {k: g.detach().cpu() for k, g in zip(run.edges, grads, strict=True) if g is not None}


def _what(batch: Batch) -> str:
    return f"what the outputs of batch {batch.index} depend on"


def _nonzero(grad: Tensor | None, shape: torch.Size) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool) if grad is None else (grad != 0).cpu()
