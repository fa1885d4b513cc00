"""All derivative products of the package: with the Hessian, the Jacobian and its transpose.

All are reverse mode over reverse mode: torch's fused BatchNorm, LayerNorm and InstanceNorm give silently wrong
second derivatives under `grad(jvp)` and nested `jvp`, and `jvp(grad)` fails for some losses. The
graph of a batch is recorded once; then a Hessian product costs one backward pass through it, and a Jacobian product
one through the graph of `u -> J^T u`, which is linear in `u`. Its last use need not `retain` it: what was saved is
freed on the way. Where the outputs are a chain of dense layers, both are written out instead (`chains`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.curvature.chains import Chain, read_chain
from bnp_analysis.curvature.convolutions import TwiceDifferentiable
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.batches import Batch
from bnp_analysis.network.kernels import derivative, nodes_of, recording
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.runtime.trees import tensors_of

# At most this many numbers of cotangents are pulled back together.
TOGETHER = 2**22
# Roundings by which rows from a stack may differ from single ones: of all sums on the way, large ones may cancel.
_STACKED = 1e4


@dataclass(frozen=True)
class GradientGraph:
    """The recorded gradient of a batch's weighted loss."""

    leaves: list[Tensor]
    gradients: list[Tensor]

    def product(self, v: list[Tensor], *, retain: bool = True) -> list[Tensor]:
        """The Hessian of the weighted batch loss times `v`, per tensor."""
        pairs = [(g, w) for g, w in zip(self.gradients, v, strict=True) if g.requires_grad]
        if not pairs:
            # The loss is linear in these parameters.
            return [torch.zeros_like(t) for t in self.leaves]
        return backward([g for g, _ in pairs], self.leaves, [w for _, w in pairs], retain=retain)


@dataclass(frozen=True)
class ChainGradient:
    """The same for a chain: its outputs are the loss's leaf."""

    chain: Chain
    loss: GradientGraph

    @property
    def held(self) -> Iterator[Tensor]:
        """Tensors that autograd does not know of."""
        return self.chain.held

    @property
    def gradients(self) -> list[Tensor]:
        """Of the weighted batch loss, per tensor."""
        return self.chain.vjp(self.loss.gradients[0].detach())

    def product(self, v: list[Tensor], *, retain: bool = True) -> list[Tensor]:
        """The Hessian of the weighted batch loss times `v`, per tensor."""
        return self.chain.product(v, lambda u: self.loss.product([u], retain=retain)[0])


@dataclass(eq=False)
class OutputGraph:
    """The recorded outputs `f` of a batch, and `u -> J^T u` as a recorded function of `u`; or both as a chain.

    Where an operation has a first derivative only, nothing is `pulled`: `J v` is formed from the rows of `J`.
    """

    batch: Batch
    weight: float
    leaves: list[Tensor]
    outputs: Tensor
    cotangent: Tensor
    pulled: list[Tensor] | None
    chain: Chain | None = None

    @property
    def held(self) -> Iterator[Tensor]:
        """Tensors that autograd does not know of."""
        return iter(()) if self.chain is None else self.chain.held

    def jvp(self, v: list[Tensor], *, retain: bool = True) -> Tensor:
        """`J v`, in the shape of the outputs."""
        if self.chain is not None:
            return self.chain.jvp(v)
        if self.pulled is None:
            return self._by_rows(v)
        pairs = [(g, w) for g, w in zip(self.pulled, v, strict=True) if g.requires_grad]
        if not pairs:
            return torch.zeros_like(self.outputs)
        try:
            return backward([g for g, _ in pairs], [self.cotangent], [w for _, w in pairs], retain=retain)[0]
        except InvalidInputError:
            # Torch finds out what has no formula when it gets there.
            self.pulled = None
            return self._by_rows(v)

    def _by_rows(self, v: list[Tensor]) -> Tensor:
        count = self.outputs.numel()
        image = self.outputs.new_empty(count)
        step = max(1, TOGETHER // max(count, sum(t.numel() for t in v)))
        for begin in range(0, count, step):
            rows = torch.arange(begin, min(begin + step, count), device=image.device)
            cotangents = image.new_zeros(len(rows), count)
            cotangents[rows - begin, rows] = 1.0
            parts = self.vjp_rows(cotangents.view(-1, *self.outputs.shape))
            image[rows] = sum(
                (p.flatten(1) @ t.reshape(-1) for p, t in zip(parts, v, strict=True)), image.new_zeros(())
            )
        return image.view(self.outputs.shape)

    def vjp(self, u: Tensor, *, retain: bool = True) -> list[Tensor]:
        """`J^T u`, per tensor."""
        if self.chain is not None:
            return self.chain.vjp(u)
        if not self.outputs.requires_grad:
            return [torch.zeros_like(t) for t in self.leaves]
        return backward([self.outputs], self.leaves, [u], retain=retain)

    def vjp_rows(self, u: Tensor) -> list[Tensor]:
        """`J^T u` for a stack of cotangents `(k, *outputs.shape)`, per tensor `(k, ...)`."""
        if not self.outputs.requires_grad:
            return [t.new_zeros(u.shape[0], *t.shape) for t in self.leaves]
        # An operation whose backward pass cannot run on a stack; what fails for single rows too is raised there.
        with suppress(RuntimeError, InvalidInputError):
            stacked = backward([self.outputs], self.leaves, [u], batched=True)
            if self._additive(u, stacked):
                return stacked
        rows = [backward([self.outputs], self.leaves, [row]) for row in u]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    def _additive(self, u: Tensor, stacked: list[Tensor]) -> bool:
        """Whether a combination of the rows is that of their cotangents pulled back.

        torch's rules for stacks are wrong for some operations, without a word (`cdist`, torch 2.13).
        """
        weights = torch.linspace(1, 2, len(u), dtype=u.dtype, device=u.device)
        single = backward([self.outputs], self.leaves, [torch.tensordot(weights, u, 1)])
        pairs = list(zip(stacked, single, strict=True))
        gaps = [(torch.tensordot(weights, rows, 1) - whole).abs().sum() for rows, whole in pairs]
        # Of all tensors: those that a softmax or a norm does not see have derivatives of rounding alone.
        sizes = [torch.tensordot(weights, rows.abs(), 1).sum() + whole.abs().sum() for rows, whole in pairs]
        return bool(torch.stack(gaps).max() <= _STACKED * torch.finfo(u.dtype).eps * torch.stack(sizes).max())


def backward(
    outputs: list[Tensor],
    inputs: list[Tensor],
    cotangents: list[Tensor],
    *,
    batched: bool = False,
    retain: bool = True,
) -> list[Tensor]:
    """`torch.autograd.grad` on a recorded graph; zero where an input is unused."""
    what = "a product"
    if not batched:
        # Not materialize_grads: a zero that nobody reads takes memory.
        found = derivative(outputs, inputs, cotangents, what=what, retain_graph=retain, materialize_grads=False)
        # Before torch 2.13 a derivative that the model takes itself leaves its graph on the result.
        return [torch.zeros_like(t) if g is None else g.detach() for g, t in zip(found, inputs, strict=True)]
    used: list[int] = []

    def pulled(*u: Tensor) -> tuple[Tensor, ...]:
        grads = derivative(outputs, inputs, u, what=what, retain_graph=True, materialize_grads=False)
        used[:] = [i for i, g in enumerate(grads) if g is not None]
        return tuple(grads[i] for i in used)

    # Not is_grads_batched, whose older vmap runs norms, GELU, softmax and embeddings one cotangent after the other.
    parts = dict(zip(used, torch.func.vmap(pulled)(*cotangents), strict=True))
    return [
        parts[i].detach() if i in parts else t.new_zeros((*cotangents[0].shape[:1], *t.shape))
        for i, t in enumerate(inputs)
    ]


def saved_tensors(graph: object) -> Iterator[Tensor]:
    """What the nodes hold behind the tensors of a recorded graph, as far as they show it."""
    parts = graph if isinstance(graph, tuple) else (graph,)
    roots = tensors_of([part if isinstance(part, Tensor) else list(vars(part).values()) for part in parts])
    for node in nodes_of(roots):
        for name in dir(node):
            if name.startswith("_saved_") and isinstance(value := getattr(node, name), Tensor):
                yield value


@recording()
def gradient_graph(risk: EmpiricalRisk, batch: Batch) -> GradientGraph | ChainGradient:
    """Record the gradient of `(count / total) * loss` of a batch."""
    tensors = risk.leaves()
    leaves = list(tensors.values())
    with TwiceDifferentiable():
        # Held until the chain is made: in torch 2.9 a node written in Python ends with the tensor that it made.
        recorded = outputs = risk.batch_outputs(tensors, batch)
        nodes = None if risk.with_model else read_chain(recorded, leaves)
        inputs = leaves
        if nodes:
            # A leaf at the outputs that takes no memory. The sum is a copy: a loss may write into it.
            inputs = [outputs.new_zeros(()).expand_as(outputs).requires_grad_()]
            outputs = outputs.detach() + inputs[0]
        loss = risk.batch_loss(outputs, batch, tensors) * (batch.count / risk.batches.total)
    gradients = [torch.zeros_like(t) for t in inputs]
    if loss.requires_grad:
        gradients = derivative(loss, inputs, create_graph=True, what=f"the gradient of batch {batch.index}")
    graph = GradientGraph(inputs, gradients)
    return ChainGradient(Chain(nodes, leaves, gradients[0].detach()), graph) if nodes else graph


@recording()
def output_graph(risk: EmpiricalRisk, batch: Batch, *, forward: bool = True) -> OutputGraph:
    """Record the outputs of a batch; with `forward` also `u -> J^T u`, which Jacobian-vector products need."""
    tensors = risk.leaves()
    leaves = list(tensors.values())
    with TwiceDifferentiable(linear=True) if forward else nullcontext():
        outputs = risk.batch_outputs(tensors, batch)
    weight = batch.count / risk.batches.total
    if forward and (nodes := read_chain(outputs, leaves)):
        chain, outputs = Chain(nodes, leaves), outputs.detach()
        return OutputGraph(batch, weight, leaves, outputs, outputs.new_zeros(0), [], chain)
    cotangent = torch.zeros_like(outputs, requires_grad=True)
    pulled: list[Tensor] | None = [torch.zeros_like(t) for t in leaves]
    if forward and outputs.requires_grad:
        pulled = _pulled(outputs, leaves, cotangent)
    return OutputGraph(batch, weight, leaves, outputs, cotangent, pulled)


def _pulled(outputs: Tensor, leaves: list[Tensor], cotangent: Tensor) -> list[Tensor] | None:
    """`J^T u`, recorded; None where an operation on the way cannot be differentiated a second time."""
    try:
        return derivative(outputs, leaves, cotangent, create_graph=True, what="a product")
    except InvalidInputError:
        return None
