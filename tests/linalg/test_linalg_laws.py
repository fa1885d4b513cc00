"""Every operator and preconditioner obeys the laws of its kind, and the laws notice who does not.

Bugs that only these tests catch: an operator whose transpose, blocks or dense matrix belong to another matrix; a
factor that is not one; a silent cast; a preconditioner whose inverse, `|P|` or transported null space is wrong;
a law suite that passes anything.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bnp_analysis.linalg import (
    CallableOperator,
    ColumnSubset,
    DenseOperator,
    DensePreconditioner,
    GramOperator,
    IdentityPreconditioner,
    LinearOperator,
    MatrixOperator,
    Preconditioner,
    Restriction,
    RowScaled,
    Shifted,
    SymmetricOperator,
    congruence,
)
from bnp_analysis.linalg.derived import OnHost, SymmetricOnHost
from bnp_analysis.linalg.scale import ScaledPreconditioner
from bnp_analysis.testing import (
    check_linear_operator,
    check_preconditioner,
    check_symmetric_operator,
    random_orthogonal,
    spectrum,
    symmetric_with_spectrum,
)

Made = Callable[[torch.Generator, torch.dtype], LinearOperator]


def matrix(g: torch.Generator, dtype: torch.dtype, m: int, n: int) -> Tensor:
    return torch.randn(m, n, generator=g, dtype=torch.float64).to(dtype)


def dense(g: torch.Generator, dtype: torch.dtype, n: int = 7, rows: int | None = None) -> DenseOperator:
    values = spectrum("log", n, 100.0, rank=n - 2)
    return symmetric_with_spectrum(values, g, dtype=dtype, factor_rows=rows).operator


def invertible(g: torch.Generator, dtype: torch.dtype, n: int = 7) -> DensePreconditioner:
    return DensePreconditioner(matrix(g, dtype, n, n) + 3 * torch.eye(n, dtype=dtype))


def called(g: torch.Generator, dtype: torch.dtype) -> CallableOperator:
    A = dense(g, dtype, rows=9)
    return CallableOperator(lambda v: A @ v, 7, dtype=dtype, factor=A.factor)


SOME = torch.tensor([5, 0, 3])
RECTANGULAR: dict[str, Made] = {
    "matrix, tall": lambda g, t: MatrixOperator(matrix(g, t, 9, 4)),
    "matrix, wide": lambda g, t: MatrixOperator(matrix(g, t, 3, 8), exact=False),
    "matrix, one row": lambda g, t: MatrixOperator(matrix(g, t, 1, 5)),
    "matrix with zero rows and columns": lambda g, t: MatrixOperator(
        matrix(g, t, 6, 5) * torch.tensor([1, 0, 1, 0, 1], dtype=t)
    ),
    "matrix, empty": lambda g, t: MatrixOperator(matrix(g, t, 0, 4)),
    "matrix, more columns than a chunk": lambda g, t: MatrixOperator(matrix(g, t, 150, 140)),
    "transposed": lambda g, t: MatrixOperator(matrix(g, t, 9, 4)).T,
    "product": lambda g, t: MatrixOperator(matrix(g, t, 9, 4)) @ MatrixOperator(matrix(g, t, 4, 6)),
    "restriction times a matrix": lambda g, t: Restriction(dense(g, t), SOME) @ MatrixOperator(matrix(g, t, 3, 4)),
    "transposed product": lambda g, t: (MatrixOperator(matrix(g, t, 9, 4)) @ MatrixOperator(matrix(g, t, 4, 6))).T,
    "factor times preconditioner": lambda g, t: MatrixOperator(matrix(g, t, 9, 7)) @ invertible(g, t),
    "columns of a matrix": lambda g, t: ColumnSubset(MatrixOperator(matrix(g, t, 9, 7)), SOME),
    "columns of a product": lambda g, t: ColumnSubset(MatrixOperator(matrix(g, t, 4, 7)) @ invertible(g, t), SOME),
    "factor on the host": lambda g, t: OnHost(MatrixOperator(matrix(g, t, 9, 4))),
    "scaled rows": lambda g, t: RowScaled(
        matrix(g, t, 6, 1).squeeze(1) * torch.tensor([1, 0, 1, 1, 1, 1]), matrix(g, t, 6, 5)
    ),
    "scaled rows, conditioned": lambda g, t: RowScaled(matrix(g, t, 6, 1).squeeze(1), matrix(g, t, 6, 7)).conditioned(
        invertible(g, t)
    ),
}
SYMMETRIC: dict[str, Made] = {
    "dense": dense,
    "dense, n = 1": lambda g, t: DenseOperator(torch.tensor([[3.0]], dtype=t)),
    "dense, n = 0": lambda g, t: DenseOperator(torch.zeros(0, 0, dtype=t)),
    "callable, n = 0": lambda g, t: CallableOperator(lambda v: v, 0, dtype=t),
    "dense with factor": lambda g, t: dense(g, t, rows=9),
    "dense with wide factor": lambda g, t: dense(g, t, rows=5),
    "callable": called,
    "Gram": lambda g, t: GramOperator(MatrixOperator(matrix(g, t, 5, 7))),
    "Gram of a transposed matrix": lambda g, t: GramOperator(MatrixOperator(matrix(g, t, 7, 5)).T),
    "shifted": lambda g, t: Shifted(dense(g, t), 0.5),
    "restriction": lambda g, t: Restriction(dense(g, t, rows=9), SOME),
    "restriction of a callable": lambda g, t: Restriction(called(g, t), SOME),
    "congruence": lambda g, t: congruence(dense(g, t), invertible(g, t)),
    "congruence with factor": lambda g, t: congruence(dense(g, t, rows=9), invertible(g, t)),
    "congruence of a Gram matrix of scaled rows": lambda g, t: congruence(
        GramOperator(RowScaled(matrix(g, t, 6, 1).squeeze(1), matrix(g, t, 6, 7))), invertible(g, t)
    ),
    "congruence of a congruence": lambda g, t: congruence(
        congruence(dense(g, t, rows=9), invertible(g, t)), invertible(g, t)
    ),
    "on the host": lambda g, t: SymmetricOnHost(dense(g, t, rows=9)),
    "restriction of a congruence": lambda g, t: Restriction(congruence(dense(g, t, rows=9), invertible(g, t)), SOME),
}
PRECONDITIONERS: dict[str, Callable[[torch.Generator, torch.dtype], Preconditioner]] = {
    "identity": lambda g, t: IdentityPreconditioner(5, t),
    "identity, n = 1": lambda g, t: IdentityPreconditioner(1, t),
    "dense": invertible,
    "dense, condition 1e3": lambda g, t: DensePreconditioner(
        (random_orthogonal(6, g) * spectrum("log", 6, 1e3, scale=1e5) @ random_orthogonal(6, g)).to(t)
    ),
    "dense, scaled": lambda g, t: ScaledPreconditioner(invertible(g, t), -5),
    "dense, norm 1e-9": lambda g, t: DensePreconditioner(1e-9 * matrix(g, t, 5, 5)),
    "dense, dtype changed": lambda g, t: invertible(g, torch.float32 if t == torch.float64 else torch.float64).to(t),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@DTYPES
@pytest.mark.parametrize("name", RECTANGULAR | SYMMETRIC | PRECONDITIONERS)
def test_linear_operators(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    check_linear_operator((RECTANGULAR | SYMMETRIC | PRECONDITIONERS)[name](generator, dtype), generator)


@DTYPES
@pytest.mark.parametrize("name", SYMMETRIC)
def test_symmetric_operators(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    op = SYMMETRIC[name](generator, dtype)
    assert isinstance(op, SymmetricOperator)
    assert op.T is op
    check_symmetric_operator(op, generator)


@DTYPES
@pytest.mark.parametrize("name", PRECONDITIONERS)
def test_preconditioners(name: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    check_preconditioner(PRECONDITIONERS[name](generator, dtype), generator)
