"""Dense matrices of operators, formed in float64, with what forming them has rounded (T13)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.linalg.derived import Derived, GramOperator
from bnp_analysis.linalg.matrices import ReducedFactor, RowScaled
from bnp_analysis.linalg.operators import LinearOperator, Product, SymmetricOperator
from bnp_analysis.linalg.preconditioner import Congruence, Preconditioner

UNIT = torch.finfo(torch.float64).eps
_PERRON_STEPS = 8
# A computed entry comes at the end of sums as long as a row, in a small block of longer ones before it.
_LEAST_LENGTH = 64


@dataclass(frozen=True, eq=False)
class Formed:
    """A matrix in float64 with `|matrix - exact| <= rounding * magnitude`, entry by entry.

    Attributes:
        matrix: the dense operator.
        magnitude: `|F| |P1| |P2| ...` of a product, without which no interval survives `|P| = 1e5` (trap 11); else
            None, which stands for `|matrix|`. Of a `ReducedFactor` one row, bounds of columns: then
            `|(matrix - exact) e_j| <= rounding * magnitude_j`.
        rounding: 0 where the entries are given.
    """

    matrix: Tensor
    magnitude: Tensor | None
    rounding: float

    def sizes(self) -> Tensor:
        """The magnitude, never None."""
        return self.matrix.abs() if self.magnitude is None else self.magnitude


def formed(operator: LinearOperator) -> Formed:
    """The dense matrix of an operator. Entries are computed in the operator's dtype, products of matrices in float64.

    Example:
        >>> from bnp_analysis.linalg import MatrixOperator
        >>> formed(MatrixOperator(torch.eye(2))).rounding
        0.0
    """
    if isinstance(operator, ReducedFactor):
        return Formed(operator.matrix, operator.columns[None, :], operator.rounding)
    if isinstance(operator, Product) and isinstance(operator.right, Preconditioner):
        inner, P = formed(operator.left), _precise(operator.right)
        rounding = inner.rounding + P.roundings * UNIT / 2
        if isinstance(operator.left, RowScaled):
            scale, rows = operator.left.scale.double()[:, None], operator.left.rows.double()
            return Formed(scale * _right(rows, P), scale.abs() * P.row_magnitude(rows), rounding + UNIT)
        return Formed(_right(inner.matrix, P), _right(inner.sizes(), P.absolute()), rounding)
    if isinstance(operator, Congruence):
        inner, P = formed(operator.operator), _precise(operator.preconditioner)
        absolute = P.absolute()
        matrix, magnitude = _right(_right(inner.matrix, P).T, P).T, _right(_right(inner.sizes(), absolute).T, absolute)
        return Formed(matrix, magnitude.T, inner.rounding + P.roundings * UNIT)
    if isinstance(operator, Derived) and amplified(operator):
        inner = formed(operator.inner)
        return Formed(operator.of(inner.matrix), operator.of(inner.sizes()), inner.rounding + UNIT)
    if isinstance(operator, GramOperator) and (amplified(operator) or operator.factor.dense_cost == 0):
        inner = formed(operator.factor)
        sizes, length = inner.sizes(), inner.matrix.shape[0]
        rounding = 2 * inner.rounding + length * UNIT / 2
        return Formed(inner.matrix.T @ inner.matrix, sizes.T @ sizes, rounding)
    return Formed(operator.to_dense().double(), None, entry_rounding(operator))


def entry_rounding(operator: LinearOperator) -> float:
    """How far entries may be off, relative to their sizes: `max(n, 64)` unit roundoffs, twice that for `A = F^T F`.

    A convention for what is computed, not a bound: automatic differentiation gives none (T13).
    """
    if operator.exact:
        return 0.0
    passes = 2 if isinstance(operator, SymmetricOperator) else 1
    return passes * max(operator.shape[1], _LEAST_LENGTH) * operator.eps / 2


def amplified(operator: object) -> bool:
    """Whether a product rounds relative to more than the operator's own norm: it multiplies operators (T13)."""
    if isinstance(operator, Derived):
        return amplified(operator.inner)
    if isinstance(operator, GramOperator):
        return amplified(operator.factor)
    return isinstance(operator, Product | Congruence | ReducedFactor)


def norm_bound(matrix: Tensor) -> float:
    """A bound of `|| |A| ||_2`, which is at least `|A|_2`: for `M = |A|` and any `x > 0`, `max_i (M^T M x)_i / x_i`.

    A few power steps bring `x` to the Perron vector, where the bound is sharp; it holds before, up to the rounding of
    the quotients, and is never worse than `sqrt(|A|_1 |A|_inf)`.

    Source: Collatz 1942, Wielandt 1950.

    Example:
        >>> norm_bound(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        4.0
    """
    size = float(matrix.abs().max()) if matrix.numel() else 0.0
    if size == 0.0 or not math.isfinite(size):
        return size
    M = matrix.abs().double() / size
    M = M[:, M.sum(dim=0) > 0]
    x = M.sum(dim=0)
    bound = math.sqrt(float(x.max()) * float(M.sum(dim=1).max()))
    for _ in range(_PERRON_STEPS):
        x = x / x.max()
        following = M.T @ (M @ x)
        # Where x underflows, in a part far smaller than the rest, 0/0 bounds nothing: min keeps what it had.
        bound = min(bound, math.sqrt(float((following / x).max())))
        x = following
    return size * bound


def _precise(P: Preconditioner) -> Preconditioner:
    return P if P.dtype == torch.float64 else P.to(torch.float64)


def _right(matrix: Tensor, P: LinearOperator) -> Tensor:
    """`matrix @ P`, row by row through `P^T`."""
    return P._rmatmat(matrix.T).T
