"""Operators made from what one has: a stored matrix, or a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator, describe
from bnp_analysis.linalg.structure import structural_rank


class MatrixOperator(LinearOperator):
    """A rectangular matrix that is stored.

    Args:
        matrix: `(m, n)`.
        exact: whether its entries are given; False if they were computed in its dtype, which widens the bounds.
        rank_bound: of the operator that it was formed from, where that knows more than the places of zeros.
        zeros_are_structural: of that operator.
        eps: of the operator that it was formed from, where that is coarser than the dtype's.

    Example:
        >>> import torch
        >>> F = MatrixOperator(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        >>> F.T @ torch.ones(3)
        tensor([ 9., 12.])
    """

    def __init__(
        self,
        matrix: Tensor,
        *,
        exact: bool = True,
        rank_bound: int | None = None,
        zeros_are_structural: bool = True,
        eps: float | None = None,
    ) -> None:
        if not isinstance(matrix, Tensor) or matrix.ndim != 2:
            raise InvalidInputError(f"expected a matrix (m, n), got {describe(matrix)}")
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device, eps)
        self._matrix = matrix.detach()
        self._exact, self._rank = exact, rank_bound
        self._structural = zeros_are_structural

    @property
    def exact(self) -> bool:
        return self._exact

    @property
    def rank_bound(self) -> int:
        if self._rank is not None:
            return self._rank
        if not self._structural:
            return min(self.shape)
        nonzero = self._matrix != 0
        if self._exact:
            return structural_rank(nonzero)
        # Of computed entries only whole rows and columns count as zero by structure.
        return min(int(nonzero.any(dim=1).sum()), int(nonzero.any(dim=0).sum()))

    @property
    def zeros_are_structural(self) -> bool:
        return self._structural

    @property
    def dense_cost(self) -> int:
        return 0

    def _matmat(self, x: Tensor) -> Tensor:
        return self._matrix @ x

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._matrix.T @ y

    def to_dense(self) -> Tensor:
        return self._matrix


class DenseOperator(SymmetricOperator):
    """A symmetric matrix that is stored.

    Args:
        matrix: `(n, n)`, symmetric to rounding (checked relative to its largest entry).
        factor: optionally `(r, n)` with `factor^T factor = matrix`.

    Raises:
        InvalidInputError: not square, not symmetric, not finite, or a factor that does not fit.

    Example:
        >>> import torch
        >>> A = DenseOperator(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        >>> A @ torch.tensor([1.0, -1.0])
        tensor([ 1., -1.])
    """

    def __init__(self, matrix: Tensor, factor: Tensor | None = None) -> None:
        if not isinstance(matrix, Tensor) or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InvalidInputError(f"expected a square symmetric matrix (n, n), got {describe(matrix)}")
        if not bool(torch.isfinite(matrix).all()):
            raise InvalidInputError("the matrix has NaN or infinite entries; no product of it would mean anything")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self._matrix = matrix.detach()
        check_symmetric(self._matrix, "the matrix")
        if factor is None:
            self._factor = None
        else:
            if factor.ndim != 2 or factor.shape[1] != self.dim or factor.dtype != self.dtype:
                raise InvalidInputError(
                    f"the factor must be a matrix (r, {self.dim}) in {self.dtype}, got {describe(factor)}"
                )
            self._factor = MatrixOperator(factor)
            self._check_factor(factor)

    def _check_factor(self, factor: Tensor) -> None:
        """`F^T F v = A v` for one vector, relative to `|F|^2`."""
        v = torch.linspace(-1, 2, self.dim, dtype=self.dtype, device=self.device)
        gap = float((factor.T @ (factor @ v) - self._matrix @ v).norm())
        size = (float(factor.norm()) ** 2 + float(self._matrix.norm())) * float(v.norm())
        if not gap <= 100 * max(factor.shape) * torch.finfo(self.dtype).eps * size:
            raise InvalidInputError(
                f"the factor is not one of this matrix: F^T F v and A v differ by {gap / size:.2g} relative"
            )

    @property
    def factor(self) -> LinearOperator | None:
        return self._factor

    @property
    def dense_cost(self) -> int:
        return 0

    @property
    def exact(self) -> bool:
        return True

    def _matmat(self, x: Tensor) -> Tensor:
        return self._matrix @ x

    def to_dense(self) -> Tensor:
        return self._matrix


class RowScaled(LinearOperator):
    """`diag(s) H` for stored rows `H`; times a preconditioner it stays of this form, `diag(s) (H P)`.

    So `H P` is formed directly: for BNP `h - mu` is then one subtraction of the data, not the difference of two
    scaled numbers (T13).

    Args:
        scale: `s`, `(r,)`.
        rows: `H`, `(r, n)`.
        eps: of what both were computed in, where that is coarser than the dtype's.
        zeros_are_structural: False where zeros may be rounding.

    Example:
        >>> import torch
        >>> (RowScaled(torch.tensor([2.0, 0.0]), torch.ones(2, 3)) @ torch.ones(3)).tolist()
        [6.0, 0.0]
    """

    def __init__(
        self, scale: Tensor, rows: Tensor, eps: float | None = None, *, zeros_are_structural: bool = True
    ) -> None:
        super().__init__((rows.shape[0], rows.shape[1]), rows.dtype, rows.device, eps)
        self.scale, self.rows, self._structural = scale, rows, zeros_are_structural

    @property
    def rank_bound(self) -> int:
        return structural_rank(self.rows[self.scale != 0] != 0) if self._structural else min(self.shape)

    @property
    def zeros_are_structural(self) -> bool:
        return self._structural

    @property
    def dense_cost(self) -> int:
        return 0

    def conditioned(self, P: LinearOperator) -> RowScaled:
        """`diag(s) (H P)`."""
        rows = P._rmatmat(self.rows.T).T
        return RowScaled(self.scale, rows, self.eps, zeros_are_structural=self._structural)

    def _matmat(self, x: Tensor) -> Tensor:
        return self.scale[:, None] * (self.rows @ x)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self.rows.T @ (self.scale[:, None] * y)

    def to_dense(self) -> Tensor:
        return self.scale[:, None] * self.rows

    def row_blocks(self) -> Iterator[Tensor]:
        kept = self.scale != 0
        yield self.scale[kept, None] * self.rows[kept]


class ReducedFactor(LinearOperator):
    """`R` with `R^T R = F^T F` and few rows, in float64; made by `reduced`.

    Args:
        matrix: `R`, `(k, n)`.
        columns: `|F e_j|`, `(n,)`, to which the error of column `j` of `R` is relative.
        rounding: that error: `R = Q^T (F + E)` with orthonormal columns `Q` and `|E e_j| <= rounding |F e_j|`.
        factor: `F`, whose dtype, precision and bound of the rank are kept.
    """

    def __init__(self, matrix: Tensor, columns: Tensor, rounding: float, factor: LinearOperator) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), factor.dtype, matrix.device, factor.eps)
        self.matrix, self.columns, self.rounding, self._rank = matrix, columns, rounding, factor.rank_bound
        self._structural = factor.zeros_are_structural

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, self._rank)

    @property
    def zeros_are_structural(self) -> bool:
        return self._structural

    @property
    def dense_cost(self) -> int:
        return 0

    def _matmat(self, x: Tensor) -> Tensor:
        return (self.matrix @ x.double()).to(x.dtype)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return (self.matrix.T @ y.double()).to(y.dtype)

    def to_dense(self) -> Tensor:
        return self.matrix.to(self.dtype)


class CallableOperator(SymmetricOperator):
    """A symmetric operator given by a function `v -> A v` on vectors `(n,)`.

    The function gets a copy of the vector and its answer is copied, so it may reuse one buffer.

    Example:
        >>> import torch
        >>> A = CallableOperator(lambda v: 3 * v, 2, dtype=torch.float64)
        >>> (A @ torch.ones(2, dtype=torch.float64)).tolist()
        [3.0, 3.0]
    """

    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        n: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        factor: LinearOperator | None = None,
    ) -> None:
        super().__init__(n, dtype, device)
        if factor is not None and (factor.shape[1] != n or factor.dtype != dtype):
            raise InvalidInputError(f"the factor must be an operator (r, {n}) in {dtype}, got {factor!r}")
        self._fn = fn
        self._factor = factor

    @property
    def factor(self) -> LinearOperator | None:
        return self._factor

    def _matmat(self, x: Tensor) -> Tensor:
        product = torch.empty_like(x)
        for j in range(x.shape[1]):
            column = self._fn(x[:, j].clone())
            if not isinstance(column, Tensor) or column.shape != (self.dim,) or column.dtype != self.dtype:
                raise InvalidInputError(
                    f"the function must return a tensor ({self.dim},) in {self.dtype}, got {describe(column)}"
                )
            product[:, j] = column.detach()
        return product


def check_symmetric(matrix: Tensor, what: str) -> None:
    """Refuse a matrix whose asymmetry exceeds rounding, relative to its largest entry."""
    if matrix.numel() == 0:
        return
    scale = float(matrix.abs().max())
    asymmetry = float((matrix - matrix.T).abs().max())
    if asymmetry > 100 * matrix.shape[0] * torch.finfo(matrix.dtype).eps * scale:
        raise InvalidInputError(
            f"{what} is not symmetric: max|A - A^T| = {asymmetry:.3g} against max|A| = {scale:.3g}; "
            "its eigenvalues would be those of another matrix. Pass (A + A.T) / 2 if that is what you mean"
        )
