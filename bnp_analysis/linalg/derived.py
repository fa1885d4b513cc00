"""Operators made from other operators: Gram matrices, shifts, parts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator, describe


class Derived(ABC):
    """What is made of the entries of one other operator: its rounding is what that operator rounds (T13)."""

    added: float = 0.0

    @property
    @abstractmethod
    def inner(self) -> LinearOperator:
        """The other operator."""

    @property
    def eps(self) -> float:
        return self.inner.eps

    @property
    def zeros_are_structural(self) -> bool:
        return self.inner.zeros_are_structural

    @abstractmethod
    def of(self, matrix: Tensor) -> Tensor:
        """The same made of a matrix: `to_dense()` where that is `inner.to_dense()`."""


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
        self._factor = factor

    @property
    def factor(self) -> LinearOperator:
        return self._factor

    @property
    def eps(self) -> float:
        return self._factor.eps

    @property
    def zeros_are_structural(self) -> bool:
        return self._factor.zeros_are_structural

    @property
    def record(self) -> Mapping[str, Any]:
        return self._factor.record

    def _matmat(self, x: Tensor) -> Tensor:
        return self._factor._rmatmat(self._factor._matmat(x))


class Shifted(Derived, SymmetricOperator):
    """`A + delta I`.

    Example:
        >>> import torch
        >>> from bnp_analysis.linalg import DenseOperator
        >>> Shifted(DenseOperator(torch.eye(2)), 0.5).to_dense()
        tensor([[1.5000, 0.0000],
                [0.0000, 1.5000]])
    """

    def __init__(self, operator: SymmetricOperator, delta: float) -> None:
        super().__init__(operator.dim, operator.dtype, operator.device)
        self._operator, self._delta = operator, float(delta)
        self.added = abs(self._delta)

    @property
    def inner(self) -> SymmetricOperator:
        return self._operator

    def of(self, matrix: Tensor) -> Tensor:
        return matrix + self._delta * torch.eye(self.dim, dtype=matrix.dtype, device=self.device)

    @property
    def start(self) -> Tensor | None:
        return self._operator.start

    @property
    def factor(self) -> LinearOperator | None:
        inner = self._operator.factor
        return None if inner is None or self._delta < 0 else WithMultipleOfIdentity(inner, self._delta**0.5)

    @property
    def dense_cost(self) -> int:
        return self._operator.dense_cost

    def _matmat(self, x: Tensor) -> Tensor:
        return self._operator._matmat(x) + self._delta * x

    def to_dense(self) -> Tensor:
        return self.of(self._operator.to_dense())


class WithMultipleOfIdentity(Derived, LinearOperator):
    """`[F; c I]`, the factor of `F^T F + c^2 I`."""

    def __init__(self, factor: LinearOperator, c: float) -> None:
        super().__init__((factor.shape[0] + factor.shape[1], factor.shape[1]), factor.dtype, factor.device)
        self._factor, self._c, self.added = factor, c, c

    @property
    def inner(self) -> LinearOperator:
        return self._factor

    def of(self, matrix: Tensor) -> Tensor:
        return torch.cat([matrix, self._c * torch.eye(self.shape[1], dtype=matrix.dtype, device=self.device)])

    @property
    def dense_cost(self) -> int:
        return self._factor.dense_cost

    def _matmat(self, x: Tensor) -> Tensor:
        return torch.cat([self._factor._matmat(x), self._c * x])

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._factor._rmatmat(y[: self._factor.shape[0]]) + self._c * y[self._factor.shape[0] :]

    def to_dense(self) -> Tensor:
        return self.of(self._factor.to_dense())


class Restriction(Derived, SymmetricOperator):
    """The principal submatrix `A[indices, indices]`, for instance one unit inside its layer."""

    def __init__(self, operator: SymmetricOperator, indices: Tensor) -> None:
        check_positions(indices, operator.dim)
        super().__init__(indices.numel(), operator.dtype, operator.device)
        self._operator = operator
        self._indices = indices.to(operator.device)

    @property
    def inner(self) -> SymmetricOperator:
        return self._operator

    def of(self, matrix: Tensor) -> Tensor:
        return matrix[self._indices][:, self._indices]

    @property
    def start(self) -> Tensor | None:
        inner = self._operator.start
        return None if inner is None else inner[self._indices]

    @property
    def factor(self) -> LinearOperator | None:
        inner = self._operator.factor
        return None if inner is None else ColumnSubset(inner, self._indices)

    def _matmat(self, x: Tensor) -> Tensor:
        full = x.new_zeros(self._operator.dim, x.shape[1])
        full[self._indices] = x
        return self._operator._matmat(full)[self._indices]


class ColumnSubset(Derived, LinearOperator):
    """The columns `F[:, indices]` of an operator."""

    def __init__(self, operator: LinearOperator, indices: Tensor) -> None:
        check_positions(indices, operator.shape[1])
        super().__init__((operator.shape[0], indices.numel()), operator.dtype, operator.device)
        self._operator = operator
        self._indices = indices.to(operator.device)

    @property
    def inner(self) -> LinearOperator:
        return self._operator

    def of(self, matrix: Tensor) -> Tensor:
        return matrix[:, self._indices]

    @property
    def rank_bound(self) -> int:
        return min(self._operator.rank_bound, self.shape[1])

    @property
    def dense_cost(self) -> int:
        return self._operator.dense_cost

    def _matmat(self, x: Tensor) -> Tensor:
        full = x.new_zeros(self._operator.shape[1], x.shape[1])
        full[self._indices] = x
        return self._operator._matmat(full)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._operator._rmatmat(y)[self._indices]

    def to_dense(self) -> Tensor:
        return self.of(self._operator.to_dense())


def check_positions(indices: Tensor, n: int) -> None:
    """Refuse what does not pick distinct rows of `0..n-1`: a mask, a repeated or a missing position."""
    if indices.ndim != 1 or indices.dtype != torch.int64:
        raise InvalidInputError(f"positions must be a vector of int64 (not a mask), got {describe(indices)}")
    distinct = bool((indices.sort().values.diff() > 0).all())
    if not distinct or (indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < n):
        raise InvalidInputError(f"positions must be distinct and lie in 0..{n - 1}, got {indices.tolist()[:20]}")
