"""Problems for the tests of `linalg` whose answer is known exactly, and operators that misbehave on purpose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.linalg import CallableOperator, SymmetricOperator


def none_null(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The declaration that there is no null space."""
    return torch.zeros(n, 0, dtype=dtype)


def signs(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix with entries `+-1/sqrt(n)`, all exact: a Hadamard matrix, shuffled; `n = 4^k`."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0) / 2**0.5
    assert matrix.shape[0] == n
    exact = torch.where(matrix > 0, 1.0, -1.0).double() / round(n**0.5)
    flips = torch.randint(0, 2, (2, n), generator=generator) * 2.0 - 1
    rows, columns = torch.randperm(n, generator=generator), torch.randperm(n, generator=generator)
    return (flips[0][:, None] * exact * flips[1])[rows][:, columns]


@dataclass(frozen=True, eq=False)
class Exact:
    """`F = W diag(sigma) Q^T` and `A = F^T F`, free of rounding while `n kappa < 2^53`.

    Attributes:
        factor: `F`, `(n, n)`, dense: which singular values vanish cannot be seen from its shape.
        matrix: `A`.
        null: its null space, `(n, r)`.
        kappa: the effective condition number, a power of four.
    """

    factor: Tensor
    matrix: Tensor
    null: Tensor
    kappa: float


def exact_problem(
    exponents: Sequence[int], generator: torch.Generator, *, zeros: int = 0, dtype: torch.dtype = torch.float64
) -> Exact:
    """Singular values `2^-e` for each exponent, then zeros; `len(exponents) + zeros` is a power of four."""
    n = len(exponents) + zeros
    sigma = torch.cat([2.0 ** -torch.tensor(exponents, dtype=torch.float64), torch.zeros(zeros, dtype=torch.float64)])
    W, Q = signs(n, generator), signs(n, generator)
    factor, matrix = (W * sigma) @ Q.T, (Q * sigma**2) @ Q.T
    for made in (factor, matrix):
        assert torch.equal(made.to(dtype).double(), made), "the numbers do not fit into the dtype"
    kappa = 4.0 ** (max(exponents) - min(exponents))
    return Exact(factor.to(dtype), matrix.to(dtype), Q[:, len(exponents) :].to(dtype), kappa)


class Counting(CallableOperator):
    """An operator that counts its products in `.calls`; `after[i]` replaces the answer of product `i`."""

    def __init__(self, A: SymmetricOperator, after: dict[int, Callable[[Tensor], Tensor]]) -> None:
        super().__init__(self._product, A.dim, dtype=A.dtype, eps=A.eps)
        self.calls: list[int] = []
        self._inside, self._after = A, after

    def _product(self, v: Tensor) -> Tensor:
        self.calls.append(len(self.calls) + 1)
        answer = self._inside @ v
        change = self._after.get(len(self.calls))
        return answer if change is None else change(answer)


def counting(A: SymmetricOperator, after: dict[int, Callable[[Tensor], Tensor]] | None = None) -> Counting:
    return Counting(A, after or {})


def interrupt(_: Tensor) -> Tensor:
    raise KeyboardInterrupt
