"""Operators from a stored matrix or a function, and the structural rank that their zeros allow."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from scipy.sparse import csgraph, csr_matrix
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator, describe
from bnp_analysis.runtime.kinds import gated, require_plain
from bnp_analysis.runtime.random import generator


class MatrixOperator(LinearOperator):
    """A rectangular matrix that is stored.

    Args:
        matrix: `(m, n)`.
        exact: whether its entries are given; False if they were computed in its dtype, which widens the bounds.
        rank_bound: of the operator that it was formed from, where that knows more than the places of zeros.
        zeros_are_structural: of that operator; by default of entries that are given.
        eps: of the operator that it was formed from, where that is coarser than the dtype's.

    Example:
        >>> import torch
        >>> F = MatrixOperator(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
        >>> F.T @ torch.ones(3)
        tensor([ 9., 12.])
    """

    dense_cost = 0

    def __init__(
        self,
        matrix: Tensor,
        *,
        exact: bool = True,
        rank_bound: int | None = None,
        zeros_are_structural: bool | None = None,
        eps: float | None = None,
    ) -> None:
        if not isinstance(matrix, Tensor) or matrix.ndim != 2:
            raise InvalidInputError(f"expected a matrix (m, n), got {describe(matrix)}")
        require_plain(matrix, "the matrix")
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, matrix.device, eps)
        self._matrix = matrix.detach()
        self._exact, self._rank = exact, rank_bound
        self._structural = exact if zeros_are_structural is None else zeros_are_structural

    @property
    def exact(self) -> bool:
        return self._exact

    @property
    def rank_bound(self) -> int:
        if self._rank is not None:
            return self._rank
        return structural_rank(self._matrix != 0) if self._structural else min(self.shape)

    @property
    def zeros_are_structural(self) -> bool:
        return self._structural

    def _matmat(self, x: Tensor) -> Tensor:
        return self._matrix @ x

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._matrix.T @ y

    def to_dense(self) -> Tensor:
        return self._matrix


class LocalColumns(LinearOperator):
    """A matrix whose columns live on few coordinates: blocks of columns, each dense on coordinates of its own.

    `N c = sum_b E_b V_b c_b`, with `E_b` the columns of the identity at the coordinates of block `b`: what is held and
    what a product costs is the size of the blocks, not `n k`.

    Args:
        rows: `n`.
        blocks: at least one pair of coordinates `(p,)` and columns `(p, k)`, in the order of the columns of `N`.

    Example:
        >>> import torch
        >>> one = torch.ones(2, 1, dtype=torch.float64)
        >>> N = LocalColumns(5, [(torch.tensor([0, 3]), one), (torch.tensor([3, 4]), 2 * one)])
        >>> N @ torch.ones(2, dtype=torch.float64)
        tensor([1., 0., 0., 3., 2.], dtype=torch.float64)
        >>> N.T @ torch.ones(5, dtype=torch.float64)
        tensor([2., 4.], dtype=torch.float64)
    """

    def __init__(self, rows: int, blocks: Sequence[tuple[Tensor, Tensor]]) -> None:
        counts = [columns.shape[1] for _, columns in blocks]
        super().__init__((rows, sum(counts)), blocks[0][1].dtype, blocks[0][1].device)
        alike: dict[torch.Size, list[int]] = {}
        for b, (_, columns) in enumerate(blocks):
            if columns.numel():
                alike.setdefault(columns.shape, []).append(b)
        begins = [0, *accumulate(counts)]
        # Blocks of one shape are multiplied together: coordinates (b, p), columns (b, p, k), their numbers (b, k).
        self._groups: list[tuple[Tensor, Tensor, Tensor]] = [
            (
                torch.stack([blocks[b][0] for b in some]),
                torch.stack([blocks[b][1] for b in some]),
                torch.stack([torch.arange(begins[b], begins[b + 1], device=self.device) for b in some]),
            )
            for some in alike.values()
        ]

    @property
    def held(self) -> int:
        """Numbers in the blocks."""
        return sum(columns.numel() for _, columns, _ in self._groups)

    @property
    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        """The blocks that have columns, in the order of these."""
        found = [
            (int(first), where[b], columns[b])
            for where, columns, numbers in self._groups
            for b, first in enumerate(numbers[:, 0])
        ]
        return [(where, columns) for _, where, columns in sorted(found, key=lambda block: block[0])]

    def to(self, dtype: torch.dtype) -> LocalColumns:
        """The same in another dtype, like a tensor's."""
        return self if dtype == self.dtype else LocalColumns(self.shape[0], [(w, v.to(dtype)) for w, v in self.blocks])

    def beside(self, columns: Tensor) -> LocalColumns:
        """`[N Y]` for a dense `Y` `(n, k)`; the blocks are shared."""
        (rows, first), one = self.shape, columns.unsqueeze(0)
        other = copy.copy(self)
        other.shape = (rows, first + columns.shape[1])
        places = torch.arange(max(other.shape), device=self.device)
        other._groups = [*self._groups, (places[None, :rows], one, places[None, first : other.shape[1]])]
        return other

    def _matmat(self, x: Tensor) -> Tensor:
        out = x.new_zeros(self.shape[0], x.shape[1])
        for where, columns, numbers in self._groups:
            out.index_add_(0, where.reshape(-1), (columns @ x[numbers]).flatten(0, 1))
        return out

    def _rmatmat(self, y: Tensor) -> Tensor:
        out = y.new_zeros(self.shape[1], y.shape[1])
        for where, columns, numbers in self._groups:
            out[numbers.reshape(-1)] = (columns.mT @ y[where]).flatten(0, 1)
        return out

    def to_dense(self) -> Tensor:
        dense = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for where, columns, numbers in self._groups:
            dense[where.unsqueeze(2), numbers.unsqueeze(1)] = columns
        return dense


# An orthonormal basis as the columns of a matrix: `N @ c`, `N.T @ v`, `.to(dtype)`, `.shape`.
Columns = Tensor | LocalColumns


def beside(basis: Columns, columns: Tensor) -> Columns:
    """`[N Y]`.

    Example:
        >>> import torch
        >>> beside(torch.eye(3)[:, :1], torch.eye(3)[:, 1:]).shape
        torch.Size([3, 3])
    """
    return torch.cat([basis, columns], dim=1) if isinstance(basis, Tensor) else basis.beside(columns)


def as_tensor(basis: Columns) -> Tensor:
    """The same as a tensor."""
    return basis if isinstance(basis, Tensor) else basis.to_dense()


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

    dense_cost, exact = 0, True

    def __init__(self, matrix: Tensor, factor: Tensor | None = None) -> None:
        if not isinstance(matrix, Tensor) or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InvalidInputError(f"expected a square symmetric matrix (n, n), got {describe(matrix)}")
        require_plain(matrix, "the matrix")
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
        unit = (float(factor.abs().max()) if factor.numel() else 0.0) or 1.0
        factor, matrix = factor / unit, self._matrix / unit / unit
        gap = float((factor.T @ (factor @ v) - matrix @ v).norm())
        size = (float(factor.norm()) ** 2 + float(matrix.norm())) * float(v.norm())
        if not gap <= 100 * max(factor.shape) * torch.finfo(self.dtype).eps * size:
            raise InvalidInputError(
                f"the factor is not one of this matrix: F^T F v and A v differ by {gap / size:.2g} relative"
            )

    @property
    def factor(self) -> LinearOperator | None:
        return self._factor

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

    dense_cost = 0

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

    def conditioned(self, P: LinearOperator) -> RowScaled:
        """`diag(s) (H P)`."""
        return RowScaled(self.scale, P._rmatmat(self.rows.T).T, self.eps, zeros_are_structural=False)

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
        rank: a structural bound of the rank of `F`.
        factor: `F`, whose dtype and precision are kept.

    Attributes:
        norms: seed -> an estimate of `|R|`, kept since every part of it is judged against the whole.
    """

    dense_cost = 0
    zeros_are_structural = False  # a factorization may round to 0; zero rows and columns of `F` are in its rank

    def __init__(self, matrix: Tensor, columns: Tensor, rounding: float, rank: int, factor: LinearOperator) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), factor.dtype, matrix.device, factor.eps)
        self.matrix, self.columns, self.rounding, self._rank, self.given = matrix, columns, rounding, rank, factor.exact
        self.norms: dict[int, float] = {}

    @property
    def rank_bound(self) -> int:
        return min(self.shape[1], self._rank)  # rows that rounding made zero may be missing

    def _matmat(self, x: Tensor) -> Tensor:
        return (self.matrix @ x.double()).to(x.dtype)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return (self.matrix.T @ y.double()).to(y.dtype)

    def to_dense(self) -> Tensor:
        return self.matrix.to(self.dtype)


class CallableOperator(SymmetricOperator):
    """A symmetric operator given by a function `v -> A v` on vectors `(n,)`.

    The function gets a copy of the vector and its answer is copied, so it may reuse one buffer.

    Args:
        fn: the function.
        n: the dimension.
        dtype, device: of vectors.
        factor: an operator `F`, `(r, n)`, with `F^T F = A`, if one is known.
        eps: the precision of the function's products; found out by three of them if None: a function may compute in
            lower precision inside than its vectors have.

    Example:
        >>> import torch
        >>> A = CallableOperator(lambda v: 3 * v, 2, dtype=torch.float64)
        >>> (A @ torch.ones(2, dtype=torch.float64)).tolist()
        [3.0, 3.0]
    """

    zeros_are_structural = False  # a function computes its zeros

    @gated
    def __init__(
        self,
        fn: Callable[[Tensor], Tensor],
        n: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        factor: LinearOperator | None = None,
        eps: float | None = None,
    ) -> None:
        super().__init__(n, dtype, device)
        if eps is not None and not eps > 0:
            raise InvalidInputError(f"eps is the spacing of numbers at 1, positive, got {eps}")
        if factor is not None and (factor.shape[1] != n or factor.dtype != dtype):
            raise InvalidInputError(f"the factor must be an operator (r, {n}) in {dtype}, got {factor!r}")
        self._fn = fn
        self._factor = factor
        self._known_eps = eps

    @property
    def factor(self) -> LinearOperator | None:
        return self._factor

    @property
    def eps(self) -> float:
        """What the dtype says, or where products are less additive than that, four times the defect."""
        own = float(torch.finfo(self.dtype).eps)
        if self._known_eps is None:
            self._known_eps = max(own, self._found_eps(own))
        return self._known_eps

    def _found_eps(self, own: float) -> float:
        """`|A(v + w) - A v - A w|` for random `v`, `w` whose sum is exact and whose digits fill the dtype.

        Rounding in the dtype leaves a few units of it, which are not looked at closely.
        """
        digits = 2 - math.frexp(own)[1]  # with the sign a number of the dtype has so many
        if digits < 12 or self.dim == 0:
            return own
        g = generator(0)
        whole = torch.randint(-(2 ** (digits - 2)), 2 ** (digits - 2), (self.dim, 2), generator=g, dtype=torch.int64)
        unit = 2.0 ** -(digits - 1 + round(math.log2(self.dim) / 2))
        pair = (whole.double() * unit).to(dtype=self.dtype, device=self.device)
        images = self._matmat(torch.cat([pair, pair.sum(dim=1, keepdim=True)], dim=1)).double()
        images = images / images.abs().max()
        defect = float((images[:, 2] - images[:, 0] - images[:, 1]).norm() / images.norm(dim=0).sum())
        # Of the zero matrix, or of numbers that are refused elsewhere, it is NaN.
        return 4 * defect if defect > 32 * own else own

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
    scale = float(matrix.abs().max()) if matrix.numel() else 0.0
    if scale == 0.0:
        return
    asymmetry = float((matrix / scale - matrix.T / scale).abs().max())
    if asymmetry > 100 * matrix.shape[0] * torch.finfo(matrix.dtype).eps:
        raise InvalidInputError(
            f"{what} is not symmetric: max|A - A^T| / max|A| = {asymmetry:.3g}, max|A| = {scale:.3g}; "
            "its eigenvalues would be those of another matrix. Pass (A + A.T) / 2 if that is what you mean"
        )


def rank_from_zeros(operator: LinearOperator, rows: int, columns: int) -> int:
    """The structural rank of an operator: its own bound, and where its zeros are structural how many lines hold others.

    Args:
        operator: `F`.
        rows, columns: how many rows and columns of `F` are not all zero.

    Example:
        >>> import torch
        >>> from bnp_analysis.linalg import MatrixOperator
        >>> rank_from_zeros(MatrixOperator(torch.ones(2, 2)), 2, 1)
        1
    """
    return min(operator.rank_bound, rows, columns) if operator.zeros_are_structural else operator.rank_bound


def structural_rank(nonzero: Tensor) -> int:
    """The largest rank of a matrix with this pattern: the size of a maximum matching of its rows and columns.

    Three columns whose nonzero entries lie in two rows are dependent, whatever the entries: images of digits have
    such columns near the border. A column with at least as many nonzero entries as there are columns finds a row
    of its own after all others have theirs, so only sparse columns are matched.

    Args:
        nonzero: `(r, n)`, bool.

    Returns:
        The bound; almost every matrix of the pattern attains it.

    Source: Koenig 1931, Hall 1935; Hopcroft and Karp 1973.

    Example:
        >>> import torch
        >>> structural_rank(torch.tensor([[True, True, True], [True, False, False], [True, False, False]]))
        2
    """
    tall = nonzero if nonzero.shape[0] >= nonzero.shape[1] else nonzero.T
    counts = tall.sum(dim=0)
    left = counts > 0
    size = matched = int(left.sum())
    while True:
        left &= counts < size
        if size == int(left.sum()):
            break
        size = int(left.sum())
    sparse = tall[:, left]
    sparse = sparse[sparse.any(dim=1)]
    return matched - size + (int(csgraph.structural_rank(csr_matrix(sparse.cpu().numpy()))) if size else 0)
