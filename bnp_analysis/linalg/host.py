"""Operators whose vectors are in host memory though they compute elsewhere."""

from __future__ import annotations

from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.derived import Derived
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator, describe


class _OnHost(Derived, LinearOperator):
    """What both kinds share: vectors come and go, the operator stays."""

    _operator: LinearOperator

    def of(self, matrix: Tensor, exponent: int = 0) -> Tensor:
        return matrix.cpu()

    @property
    def dense_cost(self) -> int:
        return self._operator.dense_cost

    @property
    def exact(self) -> bool:
        return self._operator.exact

    def _matmat(self, x: Tensor) -> Tensor:
        return self._operator._matmat(x.to(self._operator.device)).cpu()

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._operator._rmatmat(y.to(self._operator.device)).cpu()

    def to_dense(self) -> Tensor:
        return self.of(self._operator.to_dense())


class HostFactor(_OnHost):
    """A rectangular operator with its vectors on the host."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator.shape, operator.dtype, "cpu")
        self._operator = operator

    @property
    def inner(self) -> LinearOperator:
        return self._operator

    @property
    def rank_bound(self) -> int:
        return self._operator.rank_bound


class HostOperator(_OnHost, SymmetricOperator):
    """A symmetric operator with its vectors on the host; made by `on_host`."""

    _operator: SymmetricOperator

    def __init__(self, operator: SymmetricOperator) -> None:
        SymmetricOperator.__init__(self, operator.dim, operator.dtype, "cpu")
        self._operator = operator

    @property
    def inner(self) -> SymmetricOperator:
        return self._operator

    @property
    def factor(self) -> LinearOperator | None:
        inner = self._operator.factor
        return None if inner is None else HostFactor(inner)

    @property
    def start(self) -> Tensor | None:
        inner = self._operator.start
        return None if inner is None else inner.cpu()


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
    if not isinstance(A, SymmetricOperator):
        raise InvalidInputError(f"on_host moves a SymmetricOperator, got {describe(A)}; wrap a matrix in DenseOperator")
    return A if A.device.type == "cpu" else HostOperator(A)
