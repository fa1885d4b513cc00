"""The Gauss-Newton matrix: the part of the Hessian that comes from the curvature of the loss alone."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from bnp_analysis.curvature.engines import CURVATURES, Engine, EngineOperator, restricted
from bnp_analysis.curvature.factors import JacobianFactor, batch_roots
from bnp_analysis.curvature.output_curvature import (
    bends_down,
    hessian_product,
    loss_gradient,
    output_root,
    products_of_loss,
)
from bnp_analysis.curvature.products import OutputGraph, output_graph
from bnp_analysis.curvature.units import row_products
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.network.batches import Batch
from bnp_analysis.network.derivatives import require_second
from bnp_analysis.network.parameters import Block
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.saturation import has_vanished, product_eps
from bnp_analysis.runtime.kinds import gated

# Products whose derivatives have lost so many roundings more go through the factor, if that has not.
_LOST = 100


_Recorded = tuple[OutputGraph, Tensor, Tensor]


class GaussNewton(EngineOperator[_Recorded]):
    """`J^T S J` of a risk; made by `gauss_newton`."""

    def __init__(self, risk: EmpiricalRisk, engine: str = "auto", max_memory: int | None = None) -> None:
        super().__init__(risk, Engine(risk, _with_loss, engine, max_memory))

    def product(self, graph: _Recorded, batch: int, v: list[Tensor], retain: bool) -> list[Tensor]:
        outputs, z, g = graph
        u = hessian_product(z, g, outputs.jvp(v, retain=retain)) * outputs.weight
        return outputs.vjp(u, retain=retain)

    @property
    def record(self) -> Mapping[str, Any]:
        """Of the matrix's own products, or else of its factor's."""
        own, factor = self._engine.record, vars(self).get("factor")
        return own if factor is None or "engine" in own else factor.record

    @cached_property
    def factor(self) -> JacobianFactor | None:
        """`F = S^(1/2) J`, where the loss is convex and separate over examples in the outputs."""
        made = batch_roots(self._risk, partial(output_root, positions=True))
        if made is None:
            return None
        return JacobianFactor(self._risk, made, self._engine.name, self._engine.max_memory, row_products)

    @property
    def semidefinite(self) -> bool:
        """Whether no loss is seen to bend down in the outputs: else eigenvalues may be negative."""
        return self.factor is not None or not bends_down(self._risk)

    @property
    def eps(self) -> float:
        return self.factor.eps if self._by_factor and self.factor else products_of_loss(self._risk)[0]

    @property
    def zeros_are_structural(self) -> bool:
        return not (products_of_loss(self._risk)[1] or has_vanished(self._risk))

    @cached_property
    def _by_factor(self) -> bool:
        """Whether products go through the factor, whose root is in closed form where the loss's derivatives cancel."""
        eps = products_of_loss(self._risk)[0]
        lost = eps > _LOST * product_eps(self._risk)
        return lost and self.factor is not None and self.factor.eps < eps

    def _own_matmat(self, x: Tensor) -> Tensor:
        if self._by_factor and self.factor is not None:
            return self.factor.graphs.matmat(x, self.factor.gram_product)
        return super()._own_matmat(x)


def _with_loss(risk: EmpiricalRisk, batch: Batch) -> _Recorded:
    graph = output_graph(risk, batch)
    return graph, *loss_gradient(risk, batch, graph.outputs)


@gated
def gauss_newton(
    risk: EmpiricalRisk, *, block: Block | None = None, engine: str = "auto", max_memory: int | None = None
) -> SymmetricOperator:
    """The Gauss-Newton matrix `A = (1/N) sum_j J_j^T (d^2 l_j / d f_j^2) J_j`, or its block of a layer or unit.

    Where activations are piecewise linear, a layer's or unit's block equals the Hessian's (T1').

    Args:
        risk: the empirical risk; any loss that is twice differentiable in the outputs.
        block: as in `hessian`.
        engine, max_memory: as in `hessian`; the operator and its factor hold graphs of their own.

    Returns:
        A `SymmetricOperator`. It has a `factor` `S^(1/2) J` where the loss is convex in the outputs and separate
        over examples, and the data keep their order.

    Raises:
        DerivativeError: products are not those derivatives; tried once per risk.
        InvalidInputError: no such block, or a loss that gets the network as well.
        MemoryLimitError: at the first product: not even one batch fits.

    Source: T1, T1', T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(2, 1, bias=False), torch.nn.functional.mse_loss, (x, y))
        >>> A = bnp.gauss_newton(risk)
        >>> A.factor.shape, bool(torch.allclose(A.to_dense(), torch.eye(2)))
        ((2, 2), True)
    """
    require_output_curvature(risk, "gauss_newton")
    return restricted(risk, block, lambda r: GaussNewton(r, engine, max_memory))


CURVATURES["gauss_newton"] = lambda risk, seed, **engine: gauss_newton(risk, **engine)


def require_output_curvature(risk: EmpiricalRisk, what: str) -> None:
    """Refuse a risk whose Jacobian products, or the loss's curvature in the outputs, are not what they should be.

    Raises:
        DerivativeError, InvalidInputError: as `gauss_newton`.
    """
    risk.require_loss_of_outputs(what)
    require_second(risk, "derivative of the outputs, or of the loss's gradient in them,", _pushed, _outputs)


def _pushed(risk: EmpiricalRisk, batch: Batch, v: list[Tensor]) -> dict[str, Tensor]:
    """`J v` and `S J v`."""
    graph, z, g = _with_loss(risk, batch)
    image = graph.jvp(v, retain=False)
    return {"the outputs": image, "the loss's gradient in the outputs": hessian_product(z, g, image)}


def _outputs(risk: EmpiricalRisk, batch: Batch) -> dict[str, Tensor]:
    outputs = risk.outputs
    gradient = loss_gradient(risk, batch, outputs)[1]
    return {"the outputs": outputs, "the loss's gradient in the outputs": gradient}
