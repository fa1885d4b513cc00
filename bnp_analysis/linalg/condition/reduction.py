"""A factor `F` replaced by a small `R` with `R^T R = F^T F`, made once and measured many times (T13)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.condition.factor_svd import FACTOR_SVD, affordable, factor_work
from bnp_analysis.linalg.condition.methods import automatic
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.linalg.forming import UNIT, amplified, entry_rounding
from bnp_analysis.linalg.matrices import ReducedFactor, rank_from_zeros
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator
from bnp_analysis.linalg.scale import comfortable, times_power
from bnp_analysis.runtime.memory import available_memory

# As many rows as columns, times this, are gathered before a QR factorization.
_GATHERED = 4
# Of them, while they are factorized: the parts, all of them, and two of LAPACK's; one for what makes the next part.
_COPIES = 5
# Floating-point operations that a factor too large for memory may take.
_MOST_WORK = 5e12


def reduced(A: SymmetricOperator) -> SymmetricOperator:
    """The same operator with a factor of at most as many rows as columns, by Householder QR: `F = Q R`.

    Then `F P = Q (R P)`: one tall factorization serves `A` and every `P^T A P`. Householder QR is backward stable
    column by column, `F + E = Q R` with `|E e_j| <= c u |F e_j|`, so that `R P` is known to `c u || f^T |P| ||_2` with
    `f_j = |F e_j|`: no digits are lost by columns of different sizes, only by what cancels in `F P` itself. Where that
    is too much, form `F P`.

    Args:
        A: an operator with a factor that is not itself a product.

    Returns:
        A `SymmetricOperator` with a `ReducedFactor`.

    Raises:
        InvalidInputError: no factor, or one made by a preconditioner.

    Source: Higham 2002, theorem 19.4; T13.

    Example:
        >>> from bnp_analysis.linalg import GramOperator, MatrixOperator
        >>> tall = GramOperator(MatrixOperator(torch.ones(9, 2)))
        >>> reduced(tall).factor.shape
        (2, 2)
    """
    factor = A.factor
    if factor is None:
        raise InvalidInputError(f"{A!r} has no factor that could be reduced")
    return reduced_parts(factor, [slice(None)])[0]


def reducible(A: SymmetricOperator) -> bool:
    """Whether `reduced(A)` fits into memory and its singular values can be had: the operations of factor-svd (T13).

    Example:
        >>> from bnp_analysis.linalg import GramOperator, MatrixOperator
        >>> reducible(GramOperator(MatrixOperator(torch.ones(9, 2))))
        True
    """
    factor = A.factor
    if factor is None or amplified(factor):
        return False
    rows, columns = factor.shape
    held = 8 * _COPIES * min(rows, (_GATHERED + 1) * columns) * columns
    fits = held < available_memory(factor.device) and work_to_reduce((rows, columns))[1] is not None
    return automatic(A) is FACTOR_SVD or fits


def work_to_reduce(shape: tuple[int, int]) -> tuple[float, float | None]:
    """Operations to reduce a factor of some shape, and of the singular values afterwards; None where they are too many.

    Example:
        >>> work_to_reduce((1_000_000, 10_000))[1] is None
        True
    """
    small = min(shape)
    reduce, singular = 2.0 * shape[0] * shape[1] * small, factor_work((small, shape[1]))
    return reduce, singular if affordable((small, shape[1])) and reduce < _MOST_WORK else None


def reduced_parts(factor: LinearOperator, parts: Sequence[Tensor | slice]) -> list[SymmetricOperator]:
    """`reduced` for several sets of columns of one factor, whose rows are formed once and never held all.

    Args:
        factor: `F`, not a product with a preconditioner.
        parts: positions of columns.
    """
    if amplified(factor):
        raise InvalidInputError("a factor F P is not reduced: what P amplifies would be lost. Reduce F, then apply P")
    gathered = [_Gathered(part) for part in parts]
    for block in factor.row_blocks():
        rows = block.double()
        for one in gathered:
            one.add(rows)
    given = entry_rounding(factor)
    return [GramOperator(one.result(given, factor)) for one in gathered]


class _Gathered:
    """Rows of some columns of a factor, reduced whenever there are many."""

    def __init__(self, part: Tensor | slice) -> None:
        self._part = part
        self._rows: list[Tensor] = []
        self._norms: Tensor | None = None
        self._nonzero: Tensor | None = None
        self._all = 0
        self._count = self._factorized = 0

    def add(self, rows: Tensor) -> None:
        mine = rows[:, self._part]
        mine = mine[(mine != 0).any(dim=1)]
        size, e = comfortable(mine)
        norms = times_power(torch.linalg.vector_norm(size, dim=0), -e)
        self._norms = norms if self._norms is None else torch.hypot(self._norms, norms)
        nonzero = (mine != 0).any(dim=0)
        self._nonzero = nonzero if self._nonzero is None else self._nonzero | nonzero
        self._all += len(mine)
        self._rows.append(mine)
        self._count += len(mine)
        if self._count > _GATHERED * mine.shape[1]:
            self._factorize()

    def _factorize(self) -> None:
        rows = torch.cat(self._rows) if len(self._rows) > 1 else self._rows[0]
        self._rows = []  # not held beside the copies
        kept = (rows != 0).any(dim=0)
        if len(rows) > int(kept.sum()):
            self._factorized += len(rows)
            triangle = torch.linalg.qr(rows if bool(kept.all()) else rows[:, kept], mode="r")[1]
            rows = rows.new_zeros(len(triangle), rows.shape[1])
            rows[:, kept] = triangle
        self._rows, self._count = [rows], len(rows)

    def result(self, given: float, factor: LinearOperator) -> ReducedFactor:
        """What was added: its rows as they are where they are few."""
        assert self._norms is not None
        assert self._nonzero is not None
        if self._count > len(self._norms):
            self._factorize()
        rounding = given + UNIT * self._factorized
        # Of F, not of the triangle: what QR rounds to zero need not be zero.
        rank = rank_from_zeros(factor, self._all, int(self._nonzero.sum()))
        return ReducedFactor(torch.cat(self._rows), self._norms, rounding, rank, factor)
