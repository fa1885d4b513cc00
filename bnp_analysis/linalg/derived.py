"""Operators derived from others: Gram matrices, shifts, submatrices, vectors in host memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import Derived, LinearOperator, SymmetricOperator, describe
from bnp_analysis.runtime.kinds import gated


class GramOperator(SymmetricOperator):
    """`A = F^T F` for any operator `F`.

    Example:
        >>> import torch
        >>> from bnp_analysis.linalg import MatrixOperator
        >>> A = GramOperator(MatrixOperator(torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])))
        >>> A.to_dense()
        tensor([[9., 0.],
                [0., 4.]])
    """

    def __init__(self, factor: LinearOperator) -> None:
        super().__init__(factor.shape[1], factor.dtype, factor.device)
        self.made_of = (factor,)

    @property
    def factor(self) -> LinearOperator:
        return self.made_of[0]

    @property
    def rank_bound(self) -> int:
        return self.factor.rank_bound

    def _matmat(self, x: Tensor) -> Tensor:
        return self.factor._rmatmat(self.factor._matmat(x))


class Shifted(Derived, SymmetricOperator):
    """`A + delta I`.

    Example:
        >>> import torch
        >>> from bnp_analysis.linalg import DenseOperator
        >>> Shifted(DenseOperator(torch.eye(2)), 0.5).to_dense()
        tensor([[1.5000, 0.0000],
                [0.0000, 1.5000]])
    """

    inner: SymmetricOperator

    def __init__(self, operator: SymmetricOperator, delta: float) -> None:
        super().__init__(operator)
        self.delta = float(delta)

    @property
    def added(self) -> float:
        return abs(self.delta)

    @property
    def semidefinite(self) -> bool:
        return self.delta >= 0 and self.inner.semidefinite

    @property
    def start(self) -> Tensor | None:
        return self.inner.start

    @property
    def factor(self) -> LinearOperator | None:
        inner = self.inner.factor
        return None if inner is None or self.delta < 0 else WithMultipleOfIdentity(inner, self.delta**0.5)

    def of(self, matrix: Tensor, exponent: int = 0) -> Tensor:
        return matrix + math.ldexp(self.delta, exponent) * torch.eye(self.dim, dtype=matrix.dtype, device=self.device)

    def _matmat(self, x: Tensor) -> Tensor:
        return self.inner._matmat(x) + self.delta * x


class WithMultipleOfIdentity(Derived):
    """`[F; c I]`, the factor of `F^T F + c^2 I`."""

    def __init__(self, factor: LinearOperator, c: float) -> None:
        super().__init__(factor, (sum(factor.shape), factor.shape[1]))
        self._c = c

    @property
    def added(self) -> float:
        return self._c

    def of(self, matrix: Tensor, exponent: int = 0) -> Tensor:
        c = math.ldexp(self._c, exponent)
        return torch.cat([matrix, c * torch.eye(self.shape[1], dtype=matrix.dtype, device=self.device)])

    def _matmat(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner._matmat(x), self._c * x])

    def _rmatmat(self, y: Tensor) -> Tensor:
        rows = self.inner.shape[0]
        return self.inner._rmatmat(y[:rows]) + self._c * y[rows:]


class ColumnSubset(Derived):
    """The columns `F[:, indices]` of an operator."""

    def __init__(self, operator: LinearOperator, indices: Tensor) -> None:
        check_positions(indices, operator.shape[1])
        super().__init__(operator, (operator.shape[0], indices.numel()))
        self.indices = indices.to(operator.device)

    @property
    def rank_bound(self) -> int:
        return min(self.inner.rank_bound, self.shape[1])

    def of(self, matrix: Tensor, exponent: int = 0) -> Tensor:
        return matrix[:, self.indices]

    def _matmat(self, x: Tensor) -> Tensor:
        full = x.new_zeros(self.inner.shape[1], x.shape[1])
        full[self.indices] = x
        return self.inner._matmat(full)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self.inner._rmatmat(y)[self.indices]


class Restriction(ColumnSubset, SymmetricOperator):
    """The principal submatrix `A[indices, indices]`, for instance one unit inside its layer."""

    inner: SymmetricOperator

    def __init__(self, operator: SymmetricOperator, indices: Tensor) -> None:
        super().__init__(operator, indices)
        self.shape = (indices.numel(), indices.numel())

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """None: what is left of the tensors has no shape."""
        return {}

    @property
    def start(self) -> Tensor | None:
        inner = self.inner.start
        return None if inner is None else inner[self.indices]

    @property
    def factor(self) -> LinearOperator | None:
        inner = self.inner.factor
        return None if inner is None else ColumnSubset(inner, self.indices)

    @property
    def dense_cost(self) -> int:
        return self.dim

    def of(self, matrix: Tensor, exponent: int = 0) -> Tensor:
        return matrix[self.indices][:, self.indices]

    def _matmat(self, x: Tensor) -> Tensor:
        return super()._matmat(x)[self.indices]

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._matmat(y)

    def to_dense(self) -> Tensor:
        """By products, as many as there are positions."""
        return LinearOperator.to_dense(self)


class OnHost(Derived):
    """An operator whose vectors are in host memory though it computes elsewhere: they come and go, it stays."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator, device="cpu")

    @property
    def exact(self) -> bool:
        return self.inner.exact

    def of(self, matrix: Tensor, exponent: int = 0) -> Tensor:
        return matrix.cpu()

    def _matmat(self, x: Tensor) -> Tensor:
        return self.inner._matmat(x.to(self.inner.device)).cpu()

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self.inner._rmatmat(y.to(self.inner.device)).cpu()


class SymmetricOnHost(OnHost, SymmetricOperator):
    """The same of a symmetric operator; made by `on_host`."""

    inner: SymmetricOperator

    @property
    def factor(self) -> LinearOperator | None:
        inner = self.inner.factor
        return None if inner is None else OnHost(inner)

    @property
    def start(self) -> Tensor | None:
        inner = self.inner.start
        return None if inner is None else inner.cpu()


def check_positions(indices: Tensor, n: int) -> None:
    """Refuse what does not pick distinct rows of `0..n-1`: a mask, a repeated or a missing position."""
    if indices.ndim != 1 or indices.dtype != torch.int64:
        raise InvalidInputError(f"positions must be a vector of int64 (not a mask), got {describe(indices)}")
    distinct = bool((indices.sort().values.diff() > 0).all())
    if not distinct or (indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < n):
        raise InvalidInputError(f"positions must be distinct and lie in 0..{n - 1}, got {indices.tolist()[:20]}")


@gated
def on_host(A: SymmetricOperator) -> SymmetricOperator:
    """The operator `A` with vectors and everything made of them in host memory; products stay where they are.

    A Krylov basis holds `k` vectors of `n` numbers, which an accelerator may have no room for beside the network. Each
    product then sends one vector there and one back, and reorthogonalization runs on the host.

    Args:
        A: symmetric operator on any device. A preconditioner is part of it: `on_host(congruence(A, P))`.

    Returns:
        A `SymmetricOperator` on the CPU; `A` itself if it is there already.

    Raises:
        InvalidInputError: not an operator.

    Source: none; a convenience.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 5.0])))
        >>> round(bnp.eigenpairs(bnp.linalg.on_host(A), k=1).values.item(), 4)
        5.0
    """
    return A if A.device.type == "cpu" else SymmetricOnHost(A)
