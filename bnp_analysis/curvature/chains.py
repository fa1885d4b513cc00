"""Closed-form products for perceptrons, whose outputs are one chain of dense layers and activations.

A general graph is differentiated node by node as torch recorded it: every sum is a pass of its own, and the second
derivatives of piecewise linear activations are tensors of zeros. Along a chain the products are known (Pearlmutter's
R-operator): tangents run to the outputs, cotangents back, and sums happen inside matrix products. The chain is read
off the recorded graph, so that nothing a model does is missed; what is no chain is left to the general graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from bnp_analysis.network.kernels import derivative, explained
from bnp_analysis.network.smooth import Smooth

Node = Any  # of autograd: what it saves has no types

_DENSE = {"AddmmBackward0", "MmBackward0"}
# Operations that act entry by entry, piecewise linear or not, and those that only give the entries another shape.
_STRAIGHT = {f"{name}Backward0" for name in ("Relu", "LeakyRelu", "Threshold", "Hardtanh", "Softshrink", "Hardshrink")}
_CURVED = {
    f"{name}Backward0"
    for name in ("Tanh", "Sigmoid", "LogSigmoid", "Softplus", "Silu", "Gelu", "Mish", "Elu", "Celu", "Hardswish")
}
_RESHAPING = {f"{name}Backward{k}" for name, k in (("View", 0), ("UnsafeView", 0), ("Squeeze", 1), ("Unsqueeze", 0))}


@dataclass(frozen=True)
class Dense:
    """`y = x w + b`; `weight` and `bias` are places among the leaves, None for constants."""

    rows: int
    weight: int | None
    bias: int | None
    x: Tensor | None  # (rows, m), where the weight is free
    w: Tensor | None  # (m, u), where something before is free
    cotangent: Tensor | None  # of y; for second derivatives, where both are

    def push(self, tangent: Tensor | None, v: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """From the tangent of `x` to that of `y`, and what `pull` needs."""
        y = None if self.bias is None else v[self.bias]
        if self.weight is not None and self.x is not None:
            y = _plus(y, self.x, v[self.weight].T)
        if self.w is not None and tangent is not None:
            tangent = tangent.reshape(self.rows, -1)
            y = _plus(y, tangent, self.w)
        assert y is not None  # something is free, or it were no node
        return y if y.ndim == 2 else y.repeat(self.rows, 1), tangent

    def pull(self, g: Tensor, tangent: Tensor | None, v: Sequence[Tensor], found: dict[int, Tensor]) -> Tensor | None:
        """From the cotangent of `y` to that of `x`; with what `push` left, from and to the cotangents' tangents."""
        g = g.reshape(self.rows, -1)
        if self.bias is not None:
            total = g.sum(dim=0)
            found[self.bias] = total.add_(found[self.bias]) if self.bias in found else total
        if self.weight is not None and self.x is not None:
            found[self.weight] = _plus(found.get(self.weight), g.T, self.x)
        if self.w is None:
            return None
        if self.weight is None or self.cotangent is None or tangent is None:
            return g @ self.w.T
        _plus(found[self.weight], self.cotangent.T, tangent)
        # The tangent has served; its place is free.
        return _plus(torch.mm(g, self.w.T, out=tangent), self.cotangent, v[self.weight])


@dataclass(frozen=True)
class Bend:
    """`y = phi(x)`, entry by entry."""

    slope: Tensor | Node  # phi'(x), or what multiplies with it
    shape: Sequence[int]
    curve: Tensor | None  # the derivative of phi'(x) g in x, g the cotangent of y

    def push(self, tangent: Tensor, v: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """As of `Dense`."""
        tangent = tangent.reshape(self.shape)
        return self._times(tangent), None if self.curve is None else self.curve * tangent

    def pull(self, g: Tensor, bent: Tensor | None, v: Sequence[Tensor], found: dict[int, Tensor]) -> Tensor:
        """As of `Dense`."""
        below = self._times(g.reshape(self.shape))
        return below if bent is None else below.add_(bent)

    def _times(self, tangent: Tensor) -> Tensor:
        product: Tensor = self.slope * tangent if isinstance(self.slope, Tensor) else self.slope(tangent)
        return product


class Chain:
    """The derivatives of outputs in the leaves.

    Args:
        nodes: from `read_chain`.
        leaves: of the recorded graph.
        g: the gradient of a loss in the outputs, for its second derivatives.
    """

    def __init__(self, nodes: Sequence[Node], leaves: Sequence[Tensor], g: Tensor | None = None) -> None:
        self._leaves, self._shape = leaves, nodes[0]._input_metadata[0].shape
        steps: list[Any] = []
        for node in nodes:  # those that reshape are no steps: each step brings what it is given into its shape
            if node.name() in _DENSE:
                step = _dense(node, leaves, g)
                assert step is not None
                g = None if g is None or step.w is None else g.reshape(step.rows, -1) @ step.w.T
                steps.append(step)
            elif node.name() not in _RESHAPING:
                bend, g = _bend(node, g)
                steps.append(bend)
        self._steps = steps[::-1]

    @property
    def held(self) -> Iterator[Tensor]:
        """What is kept for the products."""
        return (t for step in self._steps for t in vars(step).values() if isinstance(t, Tensor))

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """`J v`."""
        return self._push(v, None)

    def vjp(self, u: Tensor) -> list[Tensor]:
        """`J^T u`, per leaf."""
        return self._pull(u, None, ())

    def product(self, v: Sequence[Tensor], output_hessian: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """The Hessian of the loss times `v`, per leaf, from products with its Hessian in the outputs."""
        kept: list[Tensor | None] = []
        return self._pull(output_hessian(self._push(v, kept)), kept, v)

    def _push(self, v: Sequence[Tensor], kept: list[Tensor | None] | None) -> Tensor:
        tangent: Any = None
        with torch.no_grad():
            for step in self._steps:
                tangent, needed = step.push(tangent, v)
                if kept is not None:
                    kept.append(needed)
        return cast(Tensor, tangent.reshape(self._shape))

    def _pull(self, g: Tensor, kept: list[Tensor | None] | None, v: Sequence[Tensor]) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        with torch.no_grad():
            for step in reversed(self._steps):
                g = step.pull(g, kept.pop() if kept else None, v, found)
        return [found[k] if k in found else torch.zeros_like(leaf) for k, leaf in enumerate(self._leaves)]


@explained("the products of a chain of layers")
def read_chain(outputs: Tensor, leaves: Sequence[Tensor]) -> list[Node]:
    """The recorded nodes from the outputs down to the first, if they are one chain; else none."""
    nodes: list[Node] = []
    node: Node = outputs.grad_fn
    while node is not None:
        nodes.append(node)
        if node.name() in _STRAIGHT | _CURVED | _RESHAPING or _is_smooth(node):
            node = node.next_functions[0][0]
        elif node.name() in _DENSE and _dense(node, leaves) is not None:
            node = node.next_functions[-2][0]
        else:
            return []
    return nodes


def _dense(node: Node, leaves: Sequence[Tensor], g: Tensor | None = None) -> Dense | None:
    """None for sums and products of matrices that are no layer of leaves and constants."""
    *added, (before, _), (transposed, _) = node.next_functions
    rows, width = node._input_metadata[0].shape
    weight = bias = x = w = None
    if transposed is not None:
        weight = _place(transposed.next_functions[0][0], leaves) if transposed.name() == "TBackward0" else None
        if weight is None:
            return None
        x = (node._saved_mat1 if added else node._saved_self).detach()
    if before is not None:
        w = node._saved_mat2.detach()
    if added and added[0][0] is not None:
        bias = _place(added[0][0], leaves)
        if bias is None or leaves[bias].shape != (width,):
            return None
    if added and not node._saved_alpha == node._saved_beta == 1:
        return None
    return Dense(rows, weight, bias, x, w, None if g is None or x is None or w is None else g.reshape(rows, width))


def _place(node: Node, leaves: Sequence[Tensor]) -> int | None:
    """Which leaf's gradient the node accumulates."""
    leaf = getattr(node, "variable", None)
    return next((k for k, other in enumerate(leaves) if other is leaf), None)


def _bend(node: Node, g: Tensor | None) -> tuple[Bend, Tensor | None]:
    """With the cotangent of `x`, if `g` is that of `y`."""
    shape = node._input_metadata[0].shape
    if _is_smooth(node):
        return _smooth_bend(node, shape, g)
    if g is None:
        return Bend(node, shape, None), None
    g = g.reshape(shape)
    if node.name() in _STRAIGHT:
        return Bend(node, shape, None), node(g).detach()
    below, before = node(g), GradientEdge(*node.next_functions[0])
    cotangent = below.new_ones(()).expand(shape)
    (curve,) = derivative(below, before, cotangent, retain_graph=True, what="the curvature of an activation")
    return Bend(node, shape, curve), below.detach()


def _is_smooth(node: Node) -> bool:
    return getattr(node, "_forward_cls", None) is Smooth


def _smooth_bend(node: Node, shape: Sequence[int], g: Tensor | None) -> tuple[Bend, Tensor | None]:
    with torch.no_grad():
        x = node.saved_tensors[0].detach()
        slope = node.f.slope(x)
        if g is None:
            return Bend(slope, shape, None), None
        g = g.reshape(shape)
        return Bend(slope, shape, node.f.curvature(x) * g), slope * g


def _plus(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """`total + a b`: into `total` if it is a matrix, in every row if it is a vector."""
    if total is None:
        return a @ b
    # Not `addmm_`: torch's flop counter does not know it.
    return torch.addmm(total, a, b, out=total if total.ndim == 2 else None)
