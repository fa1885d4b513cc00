"""The Hessian of the risk."""

from __future__ import annotations

from torch import Tensor

from bnp_analysis.curvature.engines import CURVATURES, Engine, EngineOperator, restricted
from bnp_analysis.curvature.output_curvature import products_of_loss
from bnp_analysis.curvature.products import ChainGradient, GradientGraph, gradient_graph
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.network.batches import Batch
from bnp_analysis.network.derivatives import require_second
from bnp_analysis.network.parameters import Block
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.saturation import has_vanished
from bnp_analysis.runtime.kinds import gated


class Hessian(EngineOperator[GradientGraph | ChainGradient]):
    """`Hess L(theta)` of a risk; made by `hessian`."""

    def __init__(self, risk: EmpiricalRisk, engine: str = "auto", max_memory: int | None = None) -> None:
        super().__init__(risk, Engine(risk, gradient_graph, engine, max_memory))

    def product(self, graph: GradientGraph | ChainGradient, batch: int, v: list[Tensor], retain: bool) -> list[Tensor]:
        return graph.product(v, retain=retain)

    @property
    def eps(self) -> float:
        return products_of_loss(self._risk)[0]

    @property
    def zeros_are_structural(self) -> bool:
        return not (products_of_loss(self._risk)[1] or has_vanished(self._risk))

    @property
    def semidefinite(self) -> bool:
        """No: away from a minimum eigenvalues are negative."""
        return False

    @property
    def start(self) -> Tensor:
        """The risk's gradient, which the graphs hold: the same bits, whichever of them are kept."""

        def gradients(graph: GradientGraph | ChainGradient, *_: object) -> list[Tensor]:
            return [g.detach() for g in graph.gradients]

        return self.group.sum(lambda: self._engine.total(1, gradients)[:, 0], "the gradient", of=self._risk.theta)


@gated
def hessian(
    risk: EmpiricalRisk, *, block: Block | None = None, engine: str = "auto", max_memory: int | None = None
) -> SymmetricOperator:
    """The Hessian of the risk, `A = d^2 L / d theta^2`, or its diagonal block of a layer or unit.

    Args:
        risk: the empirical risk.
        block: a layer's name, a pattern of names (`"*.weight"`), `(layer, i)` for output unit `i` or
            `(layer, slice(a, b))` for some of them; the flat order is that of the space.
        engine: `"retained"` keeps the recorded graph of every batch, `"recompute"` none, `"auto"` those that fit.
        max_memory: bytes that kept graphs and one product may take together; default what is free, 40 % of it for
            kept graphs. Checked, from an estimate, before the first product.

    Returns:
        A `SymmetricOperator`; it is indefinite in general and has no factor. Its `engine` says what is kept.

    Raises:
        MemoryLimitError: at the first product: not even one batch fits.
        DerivativeError: products are not the derivative of the gradient; tried once per risk.
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
    require_second(risk, "Hessian", _product, _gradient)
    return restricted(risk, block, lambda r: Hessian(r, engine, max_memory))


CURVATURES["hessian"] = lambda risk, seed, **engine: hessian(risk, **engine)


def _product(risk: EmpiricalRisk, batch: Batch, v: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip(risk.space.names, gradient_graph(risk, batch).product(v, retain=False), strict=True))


def _gradient(risk: EmpiricalRisk, batch: Batch) -> dict[str, Tensor]:
    return risk.space.unflatten(risk.gradient)
