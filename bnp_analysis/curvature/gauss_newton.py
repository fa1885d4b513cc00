"""The Gauss-Newton matrix: the part of the Hessian that the curvature of the loss alone explains."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from bnp_analysis.curvature.blocks import restricted
from bnp_analysis.curvature.factors import JacobianFactor, batch_roots
from bnp_analysis.curvature.output_curvature import hessian_product, loss_gradient, output_root
from bnp_analysis.curvature.products import GraphCache, OutputGraph, output_graph
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator
from bnp_analysis.network.batches import Batch
from bnp_analysis.network.parameters import Block
from bnp_analysis.network.risk import EmpiricalRisk


class GaussNewton(SymmetricOperator):
    """`J^T S J` of a risk; made by `gauss_newton`."""

    def __init__(self, risk: EmpiricalRisk) -> None:
        super().__init__(risk.space.dim, risk.space.dtype, risk.space.device)
        self._risk = risk
        self._graphs = GraphCache(risk, _with_loss)

    @cached_property
    def factor(self) -> LinearOperator | None:
        """`F = S^(1/2) J`, where the loss is convex and separate over examples in the outputs."""

        def make(risk: EmpiricalRisk, batch: Batch, outputs: Tensor) -> tuple[Tensor, int] | None:
            found = output_root(risk, batch, outputs, positions=True)
            return None if found is None else (found.root, found.rank)

        made = batch_roots(self._risk, make)
        return None if made is None else JacobianFactor(self._risk, *made)

    def _matmat(self, x: Tensor) -> Tensor:
        space = self._risk.space
        vectors = [list(space.unflatten(column).values()) for column in x.T.contiguous().unbind()]
        total = torch.zeros_like(x)
        for graph, z, g in self._graphs:
            for k, v in enumerate(vectors):
                u = hessian_product(z, g, graph.jvp(v)) * graph.weight
                total[:, k] += space.flatten(graph.vjp(u))
        return total


def _with_loss(risk: EmpiricalRisk, batch: Batch) -> tuple[OutputGraph, Tensor, Tensor]:
    graph = output_graph(risk, batch)
    return graph, *loss_gradient(risk, batch, graph.outputs)


def gauss_newton(risk: EmpiricalRisk, *, block: Block | None = None) -> SymmetricOperator:
    """The Gauss-Newton matrix `A = (1/N) sum_j J_j^T (d^2 l_j / d f_j^2) J_j`, or its block of a layer or unit.

    Where activations are piecewise linear, a layer's or unit's block equals the Hessian's (T1').

    Args:
        risk: the empirical risk; any loss that is twice differentiable in the outputs.
        block: a layer's name, or `(layer, i)` for output unit `i`.

    Returns:
        A `SymmetricOperator`. It has a `factor` `S^(1/2) J` where the loss is convex in the outputs and separate
        over examples, and the data keep their order.

    Raises:
        InvalidInputError: no such block.

    Source: T1, T1', T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(2, 1, bias=False), torch.nn.functional.mse_loss, (x, y))
        >>> A = bnp.gauss_newton(risk)
        >>> A.factor.shape, bool(torch.allclose(A.to_dense(), torch.eye(2)))
        ((2, 2), True)
    """
    return restricted(risk, block, GaussNewton)
