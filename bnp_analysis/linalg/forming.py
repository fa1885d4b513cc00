"""Dense matrices of operators, formed in float64, with bounds on the rounding of their entries (T13)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.linalg.matrices import ReducedFactor, RowScaled, rank_from_zeros
from bnp_analysis.linalg.operators import (
    Derived,
    LinearOperator,
    Multiple,
    Product,
    Stacked,
    Sum,
    SymmetricOperator,
)
from bnp_analysis.linalg.preconditioner import Congruence, Preconditioner
from bnp_analysis.linalg.scale import binary_exponent, comfortable, exponent, scaled_preconditioner, times_power

UNIT = torch.finfo(torch.float64).eps
# A product of numbers may be off by this by underflow.
LEAST = torch.finfo(torch.float64).tiny
_PERRON_STEPS = 8
# A computed entry comes at the end of sums as long as a row, in a small block of longer ones before it.
_LEAST_LENGTH = 64
# Numbers up to this power of two are added.
_MOST_EXPONENT = 500


@dataclass(frozen=True, eq=False)
class Formed:
    """A matrix in float64 with `|matrix - exact| <= rounding * magnitude`, entry by entry.

    Attributes:
        matrix: the dense operator, times `2^exponent`.
        magnitude: `|F| |P1| |P2| ...` of a product, without which no interval survives `|P| = 1e5`; else
            None, which stands for `|matrix|`. Of a `ReducedFactor` one row, bounds of columns: then
            `|(matrix - exact) e_j| <= rounding * magnitude_j`.
        rounding: 0 where the entries are given.
        rank: a bound of the rank from structure. `P` is invertible, so that it is that of `F`: where a computed product
            is zero says nothing.
        exponent: 0 unless the entries are far from 1.
    """

    matrix: Tensor
    magnitude: Tensor | None
    rounding: float
    rank: int
    exponent: int = 0

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
        matrix, e = comfortable(operator.matrix)
        columns = times_power(operator.columns, e)
        return Formed(matrix, columns[None, :], operator.rounding, operator.rank_bound, e)
    if isinstance(operator, Product) and isinstance(operator.right, Preconditioner):
        return formed_times(operator.left, formed(operator.left), operator.right)
    if isinstance(operator, Congruence):
        inner, P = formed(operator.operator), scaled_preconditioner(_precise(operator.preconditioner))
        absolute = P.absolute()
        matrix, magnitude = _right(_right(inner.matrix, P).T, P).T, _right(_right(inner.sizes(), absolute).T, absolute)
        rounding, e = inner.rounding + P.roundings * UNIT, inner.exponent + 2 * exponent(P)
        return Formed(matrix, magnitude.T, rounding, inner.rank, e)
    if isinstance(operator, Multiple):
        inner, (c, power) = formed(operator.inner), math.frexp(operator.times)
        return Formed(
            c * inner.matrix, abs(c) * inner.sizes(), inner.rounding + UNIT, operator.rank_bound, inner.exponent - power
        )
    if isinstance(operator, Sum | Stacked):
        first, second, e = _alike(formed(operator.left), formed(operator.right))
        rounding, rank = max(first.rounding, second.rounding), min(first.rank + second.rank, *operator.shape)
        if isinstance(operator, Sum):
            sizes = first.sizes() + second.sizes()
            return Formed(first.matrix + second.matrix, sizes, rounding + UNIT, rank, e)
        sizes = torch.cat([first.sizes(), second.sizes()])
        return Formed(torch.cat([first.matrix, second.matrix]), sizes, rounding, rank, e)
    if isinstance(operator, Derived) and amplified(operator):
        inner = formed(operator.inner)
        e = inner.exponent
        if operator.added:
            # What is added may be far larger: it stays in the floats, what it hides may vanish.
            e = min(e, _MOST_EXPONENT - math.frexp(operator.added)[1])
        matrix, sizes = (times_power(x, e - inner.exponent) for x in (inner.matrix, inner.sizes()))
        rank = min(operator.shape) if operator.added else min(inner.rank, *operator.shape)
        return Formed(operator.of(matrix, e), operator.of(sizes, e), inner.rounding + UNIT, rank, e)
    if isinstance(operator, GramOperator) and (amplified(operator) or operator.factor.dense_cost == 0):
        inner = formed(operator.factor)
        sizes, length = inner.sizes(), inner.matrix.shape[0]
        rounding = 2 * inner.rounding + length * UNIT / 2
        return Formed(inner.matrix.T @ inner.matrix, sizes.T @ sizes, rounding, inner.rank, 2 * inner.exponent)
    dense = operator.to_dense()
    nonzero = dense != 0
    rank = rank_from_zeros(operator, int(nonzero.any(dim=1).sum()), int(nonzero.any(dim=0).sum()))
    matrix, e = comfortable(dense.double())
    return Formed(matrix, None, entry_rounding(operator), rank, e)


def _alike(first: Formed, second: Formed) -> tuple[Formed, Formed, int]:
    """Both in the units of the one whose entries are larger, so that no entry overflows; and their exponent."""
    sizes = [binary_exponent(x.matrix) - x.exponent for x in (first, second)]
    e = first.exponent if sizes[0] >= sizes[1] else second.exponent
    parts = []
    for x in (first, second):
        matrix, magnitude = times_power(x.matrix, e - x.exponent), times_power(x.sizes(), e - x.exponent)
        parts.append(replace(x, matrix=matrix, magnitude=magnitude, exponent=e))
    return parts[0], parts[1], e


def formed_times(left: LinearOperator, inner: Formed, P: Preconditioner) -> Formed:
    """`formed(left @ P)` for `inner = formed(left)`."""
    P = scaled_preconditioner(_precise(P))
    rounding, e = inner.rounding + P.roundings * UNIT / 2, inner.exponent + exponent(P)
    if isinstance(left, RowScaled):
        (rows, first), (scale, second) = comfortable(left.rows.double()), comfortable(left.scale.double()[:, None])
        matrix, magnitude = scale * _right(rows, P), scale.abs() * P.row_magnitude(rows)
        return Formed(matrix, magnitude, rounding + UNIT, inner.rank, first + second + exponent(P))
    return Formed(_right(inner.matrix, P), _right(inner.sizes(), P.absolute()), rounding, inner.rank, e)


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
    if isinstance(operator, Stacked):
        return amplified(operator.left) or amplified(operator.right)
    return isinstance(operator, Product | Congruence | ReducedFactor | Sum)


def cancels(operator: object) -> bool:
    """Whether products end in a sum that may cancel, so that they round relative to more than what is left (T13)."""
    if isinstance(operator, Derived):
        return cancels(operator.inner)
    if isinstance(operator, Congruence):
        return cancels(operator.operator)
    return isinstance(operator, Sum)


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
