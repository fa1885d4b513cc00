"""The law suites and the constructors refuse what is not what it claims to be.

Bugs that only these tests catch: a law suite that passes anything; an operator built from a matrix that is not
symmetric, a factor of another matrix, positions that repeat; a function that reuses its buffer, changes its argument
or answers in another dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import (
    CallableOperator,
    ColumnSubset,
    DenseOperator,
    DensePreconditioner,
    IdentityPreconditioner,
    LinearOperator,
    MatrixOperator,
    Preconditioner,
    Restriction,
    SymmetricOperator,
    congruence,
)
from bnp_analysis.testing import (
    KINDS,
    check_linear_operator,
    check_preconditioner,
    check_symmetric_operator,
    random_orthogonal,
    spectrum,
    symmetric_with_spectrum,
)

MATRIX = torch.tensor([[2.0, 1.0, 0.0], [1.0, 3.0, -1.0], [0.5, 0.0, 1.0]], dtype=torch.float64)
SYMMETRIC = MATRIX + MATRIX.T


class Rectangular(MatrixOperator):
    """Right, until a test replaces a formula."""


class Symmetric(DenseOperator):
    """Right, until a test replaces a formula."""


class Change(DensePreconditioner):
    """Right, until a test replaces a formula."""


def wrong_linear() -> dict[str, tuple[str, Callable[[Rectangular, Tensor], object]]]:
    return {
        "adjoint": ("_rmatmat", lambda op, y: 2 * (op._matrix.T @ y)),
        "linearity": ("_matmat", lambda op, x: op._matrix @ x + 1),
        "leaves its argument alone": ("_matmat", lambda op, x: op._matrix @ x.mul_(1.0).add_(1e-3)),
        "its columns": ("_matmat", lambda op, x: op._matrix @ (x if x.shape[1] == 1 else x.flip(1))),
        "(m, k)": ("_matmat", lambda op, x: torch.cat([op._matrix @ x, x[:1]])),
        "to_dense() @ v": ("to_dense", lambda op: op._matrix + 1e-6),
        "shape and dtype": ("to_dense", lambda op: op._matrix.T),
        "is refused": ("__matmul__", lambda op, x: op._matrix.to(x.dtype) @ x if x.ndim < 3 else None),
    }


@pytest.mark.parametrize("law", wrong_linear())
def test_a_wrong_operator_is_noticed(law: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    op = Rectangular(torch.randn(4, 3, generator=generator, dtype=torch.float64))
    check_linear_operator(op, generator)
    name, formula = wrong_linear()[law]
    monkeypatch.setattr(Rectangular, name, formula)
    with pytest.raises(AssertionError, match="broken law"):
        check_linear_operator(op, generator)


def test_the_broken_law_is_named(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rectangular, "_rmatmat", lambda op, y: 2 * (op._matrix.T @ y))
    with pytest.raises(AssertionError, match=r"to_dense\(\)\.T @ u = A\.T @ u .*differ by"):
        check_linear_operator(Rectangular(MATRIX[:2]), generator)
    monkeypatch.setattr(Rectangular, "rank_bound", property(lambda op: 1))
    with pytest.raises(AssertionError, match="broken law"):
        check_linear_operator(Rectangular(MATRIX[:2]), generator)


def test_a_rank_bound_below_the_rank_is_noticed(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rectangular, "rank_bound", property(lambda op: 1))
    with pytest.raises(AssertionError, match="rank is at most rank_bound"):
        check_linear_operator(Rectangular(MATRIX[:2]), generator)


def test_an_unsymmetric_operator_is_noticed(generator: torch.Generator) -> None:
    op = CallableOperator(lambda v: MATRIX @ v, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"A\.T|adjoint|symmetry"):
        check_symmetric_operator(op, generator)


def test_a_factor_of_another_matrix_is_noticed(generator: torch.Generator) -> None:
    factor = MatrixOperator(torch.eye(3, dtype=torch.float64))
    op = CallableOperator(lambda v: SYMMETRIC @ v, 3, dtype=torch.float64, factor=factor)
    with pytest.raises(AssertionError, match="the factor"):
        check_symmetric_operator(op, generator)


def test_other_products_for_scipy_are_noticed(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    other = DenseOperator(SYMMETRIC + torch.eye(3)).to_scipy()
    monkeypatch.setattr(Symmetric, "to_scipy", lambda op: other)
    with pytest.raises(AssertionError, match="to_scipy"):
        check_symmetric_operator(Symmetric(SYMMETRIC), generator)


@pytest.mark.parametrize(
    ("law", "name", "formula"),
    [
        ("solve", "_solve", lambda P, x: x / 2),
        ("transpose", "_rsolve", lambda P, y: P._solve(y)),
        ("direction", "direction", lambda P, g: P.apply_transpose(P.apply(g))),
        (r"absolute\(\)", "absolute", lambda P: MatrixOperator(P._matrix)),
        ("orthonormal", "transport", lambda P, N: P.solve(N)),
        ("spans", "transport", lambda P, N: torch.linalg.qr(P.apply(N))[0]),
    ],
)
def test_a_wrong_preconditioner_is_noticed(
    law: str, name: str, formula: object, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    P = Change(MATRIX - 4 * torch.eye(3))
    check_preconditioner(P, generator)
    monkeypatch.setattr(Change, name, formula)
    with pytest.raises(AssertionError, match=f"broken law: .*{law}"):
        check_preconditioner(P, generator)


def test_a_wrong_transpose_that_is_inverted_is_noticed(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Change, "apply_transpose", Change.apply)
    monkeypatch.setattr(Change, "solve_transpose", Change.solve)
    with pytest.raises(AssertionError, match=r"broken law: apply_transpose\(v\) = P\^T v"):
        check_preconditioner(Change(MATRIX - 4 * torch.eye(3)), generator)


@pytest.mark.parametrize(
    ("matrix", "words"),
    [
        (MATRIX, "not symmetric"),
        (MATRIX[:2], "square symmetric"),
        (SYMMETRIC[0], "square symmetric"),
        ([[1.0]], "list"),
        (SYMMETRIC.long(), "floating-point"),
        (SYMMETRIC.to(torch.complex128), "must be real"),
        (SYMMETRIC * math.nan, "NaN"),
        (SYMMETRIC * math.inf, "NaN"),
    ],
)
def test_what_is_no_symmetric_matrix_is_refused(matrix: Tensor, words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        DenseOperator(matrix)


def test_asymmetry_is_judged_relative_to_the_size(generator: torch.Generator) -> None:
    noise = 1e-13 * torch.randn(3, 3, generator=generator, dtype=torch.float64)
    for scale in (1e-14, 1.0, 1e14):
        DenseOperator(scale * (SYMMETRIC + noise))
        with pytest.raises(InvalidInputError, match="not symmetric"):
            DenseOperator(scale * (SYMMETRIC + 1e4 * noise))


@pytest.mark.parametrize(
    "factor",
    [
        torch.eye(3, dtype=torch.float64),
        torch.zeros(0, 3, dtype=torch.float64),
        torch.eye(3, 2, dtype=torch.float64),
        torch.eye(3),
        torch.full((3, 3), math.nan, dtype=torch.float64),
    ],
    ids=["of another matrix", "empty", "too narrow", "float32", "nan"],
)
def test_a_factor_that_is_none_is_refused(factor: Tensor) -> None:
    with pytest.raises(InvalidInputError, match="factor"):
        DenseOperator(SYMMETRIC, factor=factor)


def test_a_callable_checks_its_factor() -> None:
    with pytest.raises(InvalidInputError, match="factor"):
        CallableOperator(lambda v: v, 3, dtype=torch.float64, factor=MatrixOperator(torch.eye(2).double()))


@pytest.mark.parametrize(
    "matrix",
    [
        torch.ones(2, 2),
        torch.zeros(2, 2),
        torch.tensor([[1.0, 0.0], [0.0, 1e-9]]),
        torch.full((2, 2), math.nan),
        torch.tensor([[math.inf, 0.0], [0.0, 1.0]]),
        torch.ones(2, 3),
        torch.ones(2),
        torch.eye(2, dtype=torch.int64),
        3.0,
    ],
)
def test_a_preconditioner_must_be_invertible(matrix: Tensor) -> None:
    with pytest.raises(InvalidInputError):
        DensePreconditioner(matrix)


def test_a_preconditioner_keeps_its_own_copy() -> None:
    matrix = torch.eye(2)
    P = DensePreconditioner(matrix)
    matrix.zero_()
    assert P.apply(torch.ones(2)).tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([0, 0]),
        torch.tensor([3]),
        torch.tensor([-1]),
        torch.tensor([True, False, True]),
        torch.tensor([0.0]),
        torch.tensor([[0]]),
    ],
    ids=["repeated", "outside", "negative", "mask", "float", "matrix"],
)
def test_positions_are_distinct_and_inside(indices: Tensor) -> None:
    A = DenseOperator(SYMMETRIC)
    with pytest.raises(InvalidInputError, match="positions"):
        Restriction(A, indices)
    with pytest.raises(InvalidInputError, match="positions"):
        ColumnSubset(MatrixOperator(MATRIX), indices)
    assert Restriction(A, indices.long().flatten()[:0]).shape == (0, 0)


def test_a_function_may_reuse_its_buffer_and_its_argument() -> None:
    buffer = torch.empty(3, dtype=torch.float64)

    def product(v: Tensor) -> Tensor:
        torch.mv(SYMMETRIC, v, out=buffer)
        v.zero_()
        return buffer

    op = CallableOperator(product, 3, dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    assert torch.equal(op @ eye, SYMMETRIC)
    assert torch.equal(eye, torch.eye(3))


def test_a_function_may_answer_with_a_graph() -> None:
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert not (CallableOperator(lambda v: weight * v, 3, dtype=torch.float64) @ weight.detach()).requires_grad


@pytest.mark.parametrize("answer", [torch.ones(2), torch.ones(3), torch.ones(3, 1).double(), None, 1.0])
def test_a_function_with_another_answer_is_refused(answer: object) -> None:
    op = CallableOperator(lambda v: answer, 3, dtype=torch.float64)  # type: ignore[arg-type, return-value]
    with pytest.raises(InvalidInputError, match="the function must return"):
        op @ torch.ones(3, dtype=torch.float64)


def test_operators_that_do_not_fit_are_not_combined() -> None:
    A, P = DenseOperator(SYMMETRIC), IdentityPreconditioner(3, torch.float64)
    for other, words in (
        (IdentityPreconditioner(2, torch.float64), "acts on 2"),
        (IdentityPreconditioner(3, torch.float32), "float32"),
        (DenseOperator(SYMMETRIC), "must be a Preconditioner, not"),
        (MATRIX, "must be a Preconditioner, not"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            congruence(A, other)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="do not multiply"):
        MatrixOperator(MATRIX[:2]) @ MatrixOperator(MATRIX[:2])
    with pytest.raises(InvalidInputError, match="one dtype"):
        MatrixOperator(MATRIX) @ MatrixOperator(MATRIX.float())
    with pytest.raises(InvalidInputError, match="not ndarray"):
        A @ MATRIX.numpy()
    with pytest.raises(InvalidInputError, match="shape"):
        LinearOperatorOfSize((-1, 2))
    assert isinstance(A @ P, LinearOperator)
    assert isinstance(congruence(A, P), SymmetricOperator)


class LinearOperatorOfSize(LinearOperator):
    """Nothing but a shape."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__(shape, torch.float64, "cpu")

    def _matmat(self, x: Tensor) -> Tensor:
        return x

    def _rmatmat(self, y: Tensor) -> Tensor:
        return y


def test_the_dtype_of_a_preconditioner_changes_all_of_it(generator: torch.Generator) -> None:
    P: Preconditioner = DensePreconditioner(MATRIX)
    narrow = P.to(torch.float32)
    assert (narrow.dtype, P.dtype) == (torch.float32, torch.float64)
    check_preconditioner(narrow, generator)
    check_preconditioner(narrow.to(torch.float64), generator)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "rank"), [(1, 1), (2, 2), (3, 2), (7, 7), (50, 31)])
def test_prescribed_spectra(kind: str, n: int, rank: int) -> None:
    kappa = 1.0 if kind == "flat" or rank == 1 else 1e5
    values = spectrum(kind, n, kappa, rank=rank, scale=8.0)
    assert values.shape == (n,)
    assert torch.equal(values, values.sort(descending=True).values)
    assert values[0] == 8.0
    assert values[rank - 1] == 8.0 / kappa
    assert int((values > 0).sum()) == rank
    if rank == 31:
        distinct = values[:rank].unique().numel()
        assert distinct == {"flat": 1, "repeated": 3}.get(kind, 31)
        gaps = values[: rank - 1] / values[1:rank]
        assert {"isolated": gaps[-1] > 1e4, "two-scale": gaps.max() > 1e4}.get(kind, gaps.max() < 1e3)


@pytest.mark.parametrize(
    ("kind", "n", "kappa", "rank", "scale"),
    [
        ("linear", 3, 2.0, None, 1.0),
        ("log", 0, 1.0, None, 1.0),
        ("log", 3, 0.5, None, 1.0),
        ("log", 3, math.inf, None, 1.0),
        ("log", 3, 2.0, 4, 1.0),
        ("log", 3, 2.0, 0, 1.0),
        ("log", 3, 2.0, 1, 1.0),
        ("flat", 3, 2.0, None, 1.0),
        ("log", 3, 2.0, None, 0.0),
    ],
)
def test_spectra_that_do_not_exist(kind: str, n: int, kappa: float, rank: int | None, scale: float) -> None:
    with pytest.raises(InvalidInputError):
        spectrum(kind, n, kappa, rank=rank, scale=scale)


def test_prescribed_matrices(generator: torch.Generator) -> None:
    values = torch.tensor([3.0, -1.0, 0.0, 0.5])
    p = symmetric_with_spectrum(values, generator)
    found = torch.linalg.eigvalsh(p.operator.to_dense())
    assert torch.allclose(found, values.double().sort().values, atol=1e-14)
    assert (p.kappa, p.null.shape) == (6.0, (4, 1))
    assert float((p.operator @ p.null).abs().max()) < 1e-14
    for rows in (3, 9):
        q = symmetric_with_spectrum(values.abs(), generator, factor_rows=rows)
        assert q.operator.factor is not None
        assert q.operator.factor.shape == (rows, 4)
    for bad, rows in ((values, 4), (values.abs(), 2)):
        with pytest.raises(InvalidInputError, match="factor"):
            symmetric_with_spectrum(bad, generator, factor_rows=rows)
    with pytest.raises(InvalidInputError, match="vector"):
        symmetric_with_spectrum(values[None], generator)


def test_random_orthogonal_matrices_are_uniform(generator: torch.Generator) -> None:
    """Without the signs of `R` the diagonal of a QR factor is biased to one side."""
    diagonal = torch.stack([random_orthogonal(3, generator).diagonal() for _ in range(600)])
    assert float(diagonal.mean().abs()) < 0.06
    assert abs(float((diagonal**2).mean()) - 1 / 3) < 0.05
