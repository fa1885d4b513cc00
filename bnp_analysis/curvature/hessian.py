"""The Hessian of the risk."""

from __future__ import annotations

import torch
from torch import Tensor

from bnp_analysis.curvature.blocks import restricted
from bnp_analysis.curvature.products import GraphCache, gradient_graph
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.network.parameters import Block
from bnp_analysis.network.risk import EmpiricalRisk


class Hessian(SymmetricOperator):
    """`Hess L(theta)` of a risk; made by `hessian`."""

    def __init__(self, risk: EmpiricalRisk) -> None:
        super().__init__(risk.space.dim, risk.space.dtype, risk.space.device)
        self._space = risk.space
        self._graphs = GraphCache(risk, gradient_graph)

    def _matmat(self, x: Tensor) -> Tensor:
        vectors = [list(self._space.unflatten(column).values()) for column in x.T.contiguous().unbind()]
        total = torch.zeros_like(x)
        for graph in self._graphs:
            for k, v in enumerate(vectors):
                total[:, k] += self._space.flatten(graph.product(v))
        return total


def hessian(risk: EmpiricalRisk, *, block: Block | None = None) -> SymmetricOperator:
    """The Hessian of the risk, `A = d^2 L / d theta^2`, or its diagonal block of a layer or unit.

    Args:
        risk: the empirical risk.
        block: a layer's name, or `(layer, i)` for output unit `i`; the flat order is that of the space.

    Returns:
        A `SymmetricOperator`; it is indefinite in general and has no factor.

    Raises:
        InvalidInputError: no such block, or an operation without a second derivative.

    Source: T1.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(2, 1, bias=False), torch.nn.functional.mse_loss, (x, y))
        >>> bnp.hessian(risk).to_dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    return restricted(risk, block, Hessian)
