"""Output scaling: what the loss's curvature puts in front of a unit's block, taken out of it (T10)."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from bnp_analysis.curvature.output_curvature import root_cotangents
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.network.kernels import derivative
from bnp_analysis.network.layers import Coverage, by_unit
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.precondition.blocks import SplitsByUnit
from bnp_analysis.precondition.bnp_block import BNPBlock

_NEEDS = (
    "output_scale needs the curvature of the loss in the outputs, which must be convex there, a mean over examples, "
    "and small enough to be formed; leave output_scale off"
)


def output_scales(risk: EmpiricalRisk, layers: Coverage) -> dict[str, Tensor]:
    """`s_i = sqrt(sum_r d^2 L / da_ir^2)` of each unit of each layer, by the Gauss-Newton matrix of the loss.

    The sum is over all rows of the layer: examples, positions and uses. For a dense layer that runs once per example
    it is `mean_j d^2 l_j / da_ij^2`; for a convolution the diagonal is summed over output positions.

    Args:
        risk: the empirical risk; its loss convex in the outputs, and a mean over examples (or positions).
        layers: the covered layers.

    Returns:
        Layer name -> `(units,)`, float64; 0 for a unit without curvature.

    Raises:
        InvalidInputError: a loss without a square root of its output Hessian.

    Source: T10. Exact; one backward pass per output, and per example where a batch couples its examples.
    """
    total = risk.group.sum(lambda: torch.cat(_own_squares(risk, layers)), "output scales")
    parts = torch.split(total, [layer.units for layer in layers])
    return {layer.name: part.sqrt() for layer, part in zip(layers, parts, strict=True)}


def _own_squares(risk: EmpiricalRisk, layers: Coverage) -> list[Tensor]:
    """The sum over this process's batches, layer by layer."""
    squares = {layer.name: torch.zeros(layer.units, dtype=torch.float64, device=risk.space.device) for layer in layers}
    for batch in risk.batches:
        outputs, seen = risk.record(batch, squares)
        activations = [(layer, output) for layer in layers for _, output in seen[layer.name] if output.requires_grad]
        weight = batch.count / risk.batches.total
        if not (activations and outputs.requires_grad):
            continue
        for cotangent in root_cotangents(risk, batch, outputs, _NEEDS):
            leaves = [a for _, a in activations]
            gradients = derivative(outputs, leaves, cotangent, retain_graph=True, what="output_scale")
            for (layer, _), g in zip(activations, gradients, strict=True):
                squares[layer.name] += weight * by_unit(layer, g).double().square().sum(dim=0)
    return list(squares.values())


def unit_scaled(block: BNPBlock, scales: Tensor) -> UnitScaled:
    """The block with each unit divided by its scale, by 1 where that is 0."""
    return UnitScaled(block, torch.where(scales > 0, scales, torch.ones_like(scales)))


class UnitScaled(SplitsByUnit):
    """A layer's block with unit `i` divided by `s_i`, `P diag(1/s)` (T10).

    Args:
        inner: the layer's block.
        scales: `s > 0`, one per unit; may be more precise than the block.

    Raises:
        InvalidInputError: another number of scales, or some that are not positive and finite.

    Example:
        >>> zero, one = torch.zeros(1, 1), torch.ones(1, 1)
        >>> P = UnitScaled(BNPBlock(zero, one, 1.0, units=2, bias=False), torch.tensor([1.0, 4.0]))
        >>> P.direction(torch.ones(2)).tolist()
        [1.0, 0.0625]
    """

    def __init__(self, inner: BNPBlock, scales: Tensor) -> None:
        super().__init__(inner.dim, inner.dtype, inner.device)
        if scales.shape != (inner.units,) or not bool((scales > 0).all() and torch.isfinite(scales).all()):
            raise InvalidInputError(f"scales must be {inner.units} positive and finite numbers, one for each unit")
        self.inner, self.scales = inner, scales
        one = scales.to(inner.dtype)
        parts = [one.repeat_interleave(inner.features)] + ([one] if inner.bias else [])
        self._spread = torch.cat(parts).unsqueeze(1)
        if not bool((self._spread > 0).all() and torch.isfinite(self._spread).all()):
            raise InvalidInputError(f"a scale is zero or infinite in {self.dtype}; measure in float64")

    @property
    def q(self) -> float:
        """The scale of the layer."""
        return self.inner.q

    def unit_positions(self, i: int) -> Tensor:
        return self.inner.unit_positions(i)

    def unit(self, i: int) -> UnitScaled:
        return UnitScaled(self.inner.unit(i), self.scales[i : i + 1])

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Self:
        """Made anew from the scales, which keep their precision."""
        inner = self.inner.to(dtype, device)
        return type(self)(inner, self.scales.to(inner.device))

    def _matmat(self, x: Tensor) -> Tensor:
        return self.inner._matmat(x / self._spread)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self.inner._rmatmat(y) / self._spread

    def _solve(self, x: Tensor) -> Tensor:
        return self.inner._solve(x) * self._spread

    def _rsolve(self, y: Tensor) -> Tensor:
        return self.inner._rsolve(y * self._spread)

    def row_magnitude(self, rows: Tensor) -> Tensor:
        # The division rounds once more than the block.
        return self.inner.row_magnitude(rows) * ((self.dim + 1) / self.dim) / self._spread.T

    def absolute(self) -> LinearOperator:
        return _UnitScaledMagnitude(self)


class _UnitScaledMagnitude(LinearOperator):
    """`|P diag(1/s)| = |P| diag(1/s)`."""

    def __init__(self, P: UnitScaled) -> None:
        super().__init__(P.shape, P.dtype, P.device)
        self._inner, self._spread = P.inner.absolute(), P._spread

    def _matmat(self, x: Tensor) -> Tensor:
        return self._inner._matmat(x / self._spread)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._inner._rmatmat(y) / self._spread
