"""Operators add, scale and compose, and say no more of the result than its parts allow.

Bugs that only these tests catch: a sum that forgets a part, or rounds relative to what is left after cancellation; a
multiple whose factor is off by a square root; a difference that passes for semidefinite.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, NotConvexError
from bnp_analysis.linalg import (
    CallableOperator,
    ColumnSubset,
    DenseOperator,
    DensePreconditioner,
    GramOperator,
    LinearOperator,
    MatrixOperator,
    Restriction,
    Shifted,
    SymmetricOperator,
    condition_number,
    congruence,
    magnitude_condition_number,
    on_host,
)
from bnp_analysis.linalg.forming import formed
from bnp_analysis.linalg.scale import scaled
from bnp_analysis.testing import (
    check_linear_operator,
    check_symmetric_operator,
    random_orthogonal,
    spectrum,
    symmetric_with_spectrum,
)

N = 9


@pytest.fixture
def parts(generator: torch.Generator) -> tuple[SymmetricOperator, SymmetricOperator, SymmetricOperator]:
    """A singular matrix with a factor, a congruence, and a matrix without a factor."""
    A = symmetric_with_spectrum(spectrum("log", N, 1e3, rank=6), generator, factor_rows=11).operator
    B = symmetric_with_spectrum(spectrum("log", N, 1e2), generator, factor_rows=N).operator
    P = DensePreconditioner(torch.randn(N, N, generator=generator, dtype=torch.float64))
    return A, congruence(B, P), DenseOperator(B.to_dense())


def test_sums_and_multiples_obey_the_laws(parts: tuple[SymmetricOperator, ...], generator: torch.Generator) -> None:
    A, B, C = parts
    a, b, c = (op.to_dense() for op in parts)
    for made, dense in {
        A + B: a + b,
        A - C: a - c,
        2 * A: 2 * a,
        B * 0.3: 0.3 * b,
        -A: -a,
        np.float64(0.5) * (A + B) + C: 0.5 * (a + b) + c,
        2 * (3 * A) - (-B): 6 * a + b,
        congruence(A + B, DensePreconditioner(2 * torch.eye(N).double())): 4 * (a + b),
    }.items():
        assert isinstance(made, SymmetricOperator)
        check_symmetric_operator(made, generator)
        torch.testing.assert_close(made.to_dense(), dense, rtol=1e-12, atol=1e-12)
    F = A.factor
    assert F is not None
    other = MatrixOperator(torch.randn(11, N, generator=generator, dtype=torch.float64))
    rectangular: list[LinearOperator] = [F + other, F - other, -3 * F, (F + other) @ A, A @ B, A + MatrixOperator(c)]
    for op in rectangular:
        check_linear_operator(op, generator)


def test_bounds_of_sums_contain_the_truth(parts: tuple[SymmetricOperator, ...]) -> None:
    A, B, C = parts
    for made in (A + B, A + C, 3 * (A + B), 1e-150 * (1e-100 * (A + B))):
        matrix = (A.to_dense() + (C if made.factor is None else B).to_dense()).numpy()
        truth = np.linalg.cond(matrix)
        for method in ("auto", "dense", "lanczos"):
            k = condition_number(made, method=method, null=torch.zeros(N, 0, dtype=torch.float64))
            assert k.lower * (1 - 1e-9) <= truth <= k.upper * (1 + 1e-9), str(k)
            assert k.two_sided


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_a_difference_rounds_relative_to_its_parts(method: str, generator: torch.Generator) -> None:
    """`(A + 1e12 I) - 1e12 I` has lost twelve digits: small eigenvalues are rounding, and are not claimed."""
    p = symmetric_with_spectrum(spectrum("log", 30, 1e8), generator)
    large = DenseOperator(1e12 * torch.eye(30, dtype=torch.float64))
    made = DenseOperator(p.operator.to_dense() + large.to_dense()) - large
    k = magnitude_condition_number(made, method=method)
    assert k.lower <= p.kappa * 1.01
    assert k.noise_floor > 1e-6
    found = formed(made)
    assert float((found.rounding * found.sizes()).max()) > 1e-5
    pairs = bnp.eigenpairs(made, 3)
    assert bool((pairs.residuals > 1e-6).all())
    assert bnp.trace(made, probes=4).error > 1e-6


def test_factors_and_signs(parts: tuple[SymmetricOperator, ...]) -> None:
    A, B, C = parts
    assert (A + B).factor is not None
    assert (A + C).factor is None
    assert (A - B).factor is None
    assert (2 * A).factor is not None
    doubled = congruence(-A, DensePreconditioner(2 * torch.eye(N).double()))
    assert all(op.semidefinite for op in (A + B, 2 * A, 0 * A))
    assert not any(op.semidefinite for op in (A - B, -A, doubled))
    assert (0 * A).rank_bound == 0
    exact = GramOperator(MatrixOperator(torch.eye(3).double())) + GramOperator(
        MatrixOperator(torch.ones(1, 3).double())
    )
    k = condition_number(exact)
    assert (k.method, k.rank, k.two_sided) == ("factor-svd", 3, True)
    assert k.value == pytest.approx(4.0, rel=1e-14)


def test_a_sum_of_factors_rounds_relative_to_its_parts(generator: torch.Generator) -> None:
    """By Golub-Kahan from the stacked factor, with and without a product in it that cancels."""
    F, G = (MatrixOperator(torch.randn(n, 4, generator=generator, dtype=torch.float64)) for n in (5, 3))
    P = DensePreconditioner(torch.diag(torch.tensor([1e6, 1.0, 1.0, 1.0], dtype=torch.float64)))
    plain = GramOperator(F) + GramOperator(G)
    for A, size in ((plain, 1.0), (GramOperator(F @ P) + GramOperator(G), 1e6), (plain + GramOperator(F @ P), 1e6)):
        k = condition_number(A, method="golub-kahan")
        truth = torch.linalg.svdvals(A.factor.to_dense())
        assert k.value == pytest.approx(float(truth[0] / truth[-1]) ** 2, rel=1e-6)
        assert k.noise_floor**0.5 > 10 * 2.2e-16 * size


def test_a_transposed_matrix_costs_no_product_either(generator: torch.Generator) -> None:
    F = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    found, other = (condition_number(GramOperator(op)) for op in (MatrixOperator(F).T, MatrixOperator(F.T)))
    for k in (found, other):
        assert (k.method, k.rank, k.matvecs) == ("factor-svd", 4, 0)
    assert found.value == pytest.approx(other.value, rel=1e-12)


def test_a_sum_has_the_tensors_of_its_parts(tanh_risk: bnp.EmpiricalRisk) -> None:
    H, loose = bnp.hessian(tanh_risk), CallableOperator(lambda v: v, tanh_risk.space.dim, dtype=torch.float64)
    for A in (H + loose, loose + H):
        assert A.shapes == tanh_risk.space.shapes
    assert (loose + loose).shapes == {}


def test_precision_is_that_of_the_coarser_part() -> None:
    rough = CallableOperator(lambda v: v, 4, dtype=torch.float64, eps=1e-6)
    assert (rough + DenseOperator(torch.eye(4).double())).eps == (2 * rough).eps == 1e-6


class Rough(MatrixOperator):
    """A factor with a precision and a record of its own, and zeros that count or not."""

    def __init__(self, *, structural: bool) -> None:
        super().__init__(torch.eye(4).double(), zeros_are_structural=structural, eps=1e-6)

    @property
    def record(self) -> dict[str, str]:
        return {"engine": "by hand"}


@pytest.mark.parametrize("structural", [True, False])
def test_precision_zeros_and_record_are_those_of_what_an_operator_is_made_of(structural: bool) -> None:
    """Sums may cancel: zeros of a product, a sum or a congruence are never structural."""
    F = Rough(structural=structural)
    A, P = GramOperator(F), DensePreconditioner(torch.eye(4).double())
    kept = (F.T, 2 * F, ColumnSubset(F, torch.arange(2)), A, 2 * A, Shifted(A, 1.0), Restriction(A, torch.arange(2)))
    kept += (on_host(A), scaled(A), scaled(F))
    for made, zeros in (
        *((one, structural) for one in kept),
        *((one, False) for one in (A + A, F @ F, congruence(A, P))),
    ):
        assert (made.eps, made.zeros_are_structural) == (1e-6, zeros), made
        assert made.record == {"engine": "by hand"}, made


def test_what_does_not_fit_is_refused() -> None:
    A = DenseOperator(torch.eye(3).double())
    with pytest.raises(InvalidInputError, match=r"do not add"):
        A + DenseOperator(torch.eye(4).double())
    with pytest.raises(InvalidInputError, match="one dtype"):
        A + DenseOperator(torch.eye(3))
    for c in (math.nan, math.inf):
        with pytest.raises(InvalidInputError, match="finite number"):
            c * A
    with pytest.raises(TypeError):
        A + 1  # type: ignore[operator]
    with pytest.raises(InvalidInputError, match=r"expected a matrix \(m, n\), got a tensor of shape \(3,\)"):
        MatrixOperator(torch.ones(3))
    with pytest.raises(InvalidInputError, match=r"expected a matrix \(m, n\), got list"):
        MatrixOperator([[1.0]])  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match=r"the vector must be a dense tensor, not .*: write \.to_dense\(\)"):
        A @ torch.ones(3).double().to_sparse()
    for eps in (0.0, -1e-3):
        with pytest.raises(InvalidInputError, match=f"eps is the spacing of numbers at 1, positive, got {eps}"):
            CallableOperator(lambda v: v, 3, eps=eps)


def test_one_condition_number_serves_both_kinds(generator: torch.Generator) -> None:
    """Magnitudes where the operator says that eigenvalues may be negative, a refusal where it says that none is."""
    Q = random_orthogonal(4, generator)
    values = torch.tensor([-4.0, 2.0, 1.0, 3.0]).double()
    A = DenseOperator((Q * values) @ Q.T)
    with pytest.raises(NotConvexError, match="magnitude_condition_number"):
        condition_number(A)
    made = A - DenseOperator(torch.zeros(4, 4).double())
    k = condition_number(made)
    assert (k.quantity, k.negative) == ("max|lambda|/min|lambda|", 1)
    assert k.value == pytest.approx(4.0) == magnitude_condition_number(A).value
    with pytest.raises(InvalidInputError, match="semidefinite"):
        condition_number(made, method="inverse-lanczos")
