"""The formulas behind the bounds, each against what it bounds.

Bugs that only these tests catch: a constant or a factor two lost in a certificate; a bound of rounding below the
rounding; a contamination bound that a run exceeds; the loss of a term that matters only for rare inputs.
"""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnp_analysis.errors import InvalidInputError, NullSpaceError
from bnp_analysis.linalg import (
    Congruence,
    DenseOperator,
    DensePreconditioner,
    GramOperator,
    MatrixOperator,
    RowScaled,
    Shifted,
    SymmetricOperator,
    lanczos,
)
from bnp_analysis.linalg.bases import orthonormal, project_out
from bnp_analysis.linalg.condition.certificates import (
    apparent_rank,
    invariance_slack,
    kuczynski_wozniakowski,
    null_contamination,
    singular_value_radius,
)
from bnp_analysis.linalg.forming import UNIT, entry_rounding, formed, norm_bound
from bnp_analysis.linalg.krylov.lanczos import tridiagonal_eigh
from bnp_analysis.linalg.spectra.checks import factor_rounding_norm, norm_estimate, rounding_norm
from bnp_analysis.testing import random_orthogonal, spectrum, symmetric_with_spectrum


@given(rows=st.integers(0, 6), columns=st.integers(0, 6), seed=st.integers(0, 99))
def test_the_norm_bound_bounds(rows: int, columns: int, seed: int) -> None:
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    norm = float(torch.linalg.matrix_norm(matrix.double(), 2)) if matrix.numel() else 0.0
    assert norm * (1 - 1e-12) <= norm_bound(matrix) <= norm * math.sqrt(max(rows, 1) * max(columns, 1)) * (1 + 1e-12)


@given(rows=st.integers(1, 30), columns=st.integers(1, 30), decades=st.floats(0, 300), seed=st.integers(0, 99))
def test_the_norm_bound_is_never_below_the_perron_root(rows: int, columns: int, decades: float, seed: int) -> None:
    """Zero columns, entries over hundreds of decades and blocks that do not meet included."""
    g = torch.Generator().manual_seed(seed)
    exponents = decades * (torch.rand(rows, columns, generator=g, dtype=torch.float64) - 0.5)
    matrix = torch.where(torch.rand(rows, columns, generator=g) < 0.7, 10**exponents, 0.0)
    size = float(matrix.max())
    norm = size * float(torch.linalg.matrix_norm(matrix / size, 2)) if size else 0.0
    simple = math.sqrt(float((matrix / (size or 1)).sum(dim=0).max()) * float((matrix / (size or 1)).sum(dim=1).max()))
    assert norm * (1 - 1e-12) <= norm_bound(matrix) <= size * simple * (1 + 1e-12)


def test_the_norm_bound_is_sharp(generator: torch.Generator) -> None:
    """Where rows and columns differ in size, `sqrt(|A|_1 |A|_inf)` is too large."""
    scales = torch.logspace(0, -3, 40, dtype=torch.float64)
    matrix = torch.rand(40, 40, generator=generator, dtype=torch.float64) * scales * scales[:, None]
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    assert norm_bound(matrix) == pytest.approx(norm, rel=1e-3)
    assert norm_bound(torch.diag(torch.tensor([3.0, 1e-200], dtype=torch.float64))) == 3.0
    assert math.sqrt(float(matrix.sum(dim=0).max()) * float(matrix.sum(dim=1).max())) > 1.7 * norm


def test_the_radius_has_its_two_terms() -> None:
    assert singular_value_radius(2.0, (3, 7), 5 * UNIT) == pytest.approx(19 * UNIT, abs=0.0)


def test_entries_that_are_given_have_no_rounding() -> None:
    F = torch.eye(3, 100)
    single = torch.finfo(torch.float32).eps / 2
    assert entry_rounding(MatrixOperator(F)) == 0.0
    assert entry_rounding(MatrixOperator(F, exact=False)) == 100 * single
    assert entry_rounding(MatrixOperator(F.T, exact=False)) == 64 * single, "upstream of a small block are other sums"
    assert entry_rounding(GramOperator(MatrixOperator(F))) == 200 * single


def test_the_apparent_rank_needs_a_clear_gap() -> None:
    sigma = np.array([1.0, 1e-3, 2e-6, 1e-9])
    assert apparent_rank(sigma, 3, 1e-7) == 3
    assert apparent_rank(sigma, 3, 3e-7) is None, "within ten roundings"
    assert apparent_rank(sigma * [1, 1, 1, 30], 3, 1e-8) is None, "no gap"
    assert apparent_rank(sigma, 4, 1e-11) == 4, "the shape ends the spectrum"
    assert apparent_rank(sigma, 5, 1e-11) is None


def test_kuczynski_wozniakowski_by_hand() -> None:
    """n = 100, k = 50, 2 delta = 0.02: eps = (ln(1.648 * 10 / 0.01) / 99)^2 = 0.0055982, e = 0.0056616."""
    high, low = kuczynski_wozniakowski(3.0, 1.0, 50, 100, 0.02)
    assert high == pytest.approx(3.0 + 2 * 0.0056616, rel=1e-6)
    assert low == pytest.approx(1.0 - 2 * 0.0056616, rel=1e-6)
    assert kuczynski_wozniakowski(3.0, 1.0, 100, 100, 0.02) == (3.0, 1.0)
    assert kuczynski_wozniakowski(3.0, 1.0, 2, 100, 0.02) == (math.inf, -math.inf)
    with pytest.raises(InvalidInputError):
        kuczynski_wozniakowski(3.0, 1.0, 50, 100, 0.0)


def test_the_component_of_a_random_start() -> None:
    """`invariance_slack` rests on `P(|u.q| < delta sqrt(pi / 2n)) <= delta`; the rate is nearly met."""
    n, delta = 30, 0.1
    g = torch.Generator().manual_seed(1)
    starts = torch.randn(20_000, n, generator=g, dtype=torch.float64)
    component = starts[:, 0].abs() / starts.norm(dim=1)
    rate = float((component < delta * math.sqrt(math.pi / (2 * n))).double().mean())
    assert 0.7 * delta < rate <= delta
    assert invariance_slack(1.0, n, 2 * delta) == pytest.approx(1 / (delta * math.sqrt(math.pi / (2 * n))))


def test_no_eigenvalue_lies_farther_than_the_residual_over_the_component(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("clustered", 50, 100.0), generator)
    for seed in range(5):
        for steps in (3, 6, 12):
            run = lanczos(p.operator, steps, seed=seed)
            components = (p.vectors.T @ run.basis[:, 0]).abs()
            reach = run.residual_norm / components + 1e-13
            distance = (p.values[:, None] - torch.as_tensor(run.ritz()[0])).abs().min(dim=1).values
            assert bool((distance <= reach).all())


def test_contamination_by_hand() -> None:
    bounds = null_contamination(np.array([2.0, 3.0]), np.array([0.5]), 1e-3, 1e-2)
    assert bounds.tolist() == pytest.approx([1e-2, (2.0 * 1e-2 + 1e-3) / 0.5])
    broken = null_contamination(np.ones(4), np.array([0.5, 0.0, 0.5]), 1e-3, 1e-2)
    assert broken[1] < math.inf
    assert broken[2:].tolist() == [math.inf, math.inf]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", ["log", "isolated", "clustered"])
def test_contamination_bounds_what_happens(kind: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """A start in the range picks up the undeclared null space; the bound stays above, and is of some use."""
    p = symmetric_with_spectrum(spectrum(kind, 150, 1e3, rank=100), generator, dtype=dtype)
    start = p.operator @ torch.randn(150, generator=generator, dtype=torch.float64).to(dtype)
    run = lanczos(p.operator, 120, start=start)
    # Null vectors of the matrix that the process sees, not of the one that was prescribed.
    values, vectors = torch.linalg.eigh(p.operator.to_dense().double())
    null = vectors[:, values.abs().argsort()[:50]]
    actual = (null.T @ run.basis.double()).norm(dim=0).numpy()
    noise = 10 * math.sqrt(150) * torch.finfo(dtype).eps
    scale = float(np.abs(run.alpha).max() + np.abs(run.beta).max())
    bounds = null_contamination(run.alpha, run.beta, noise * scale, noise)
    assert np.all(actual <= bounds)
    clean = int((bounds < 1e-2).sum())
    assert 2 <= clean < int((actual < 1e-2).sum())
    assert actual.max() > 0.5, "nothing leaked: this test shows nothing any more"


def rounded(operator: SymmetricOperator | MatrixOperator, exact: mpmath.matrix) -> None:
    """The dense matrix differs from the exact product by at most its rounding times its magnitude, entry by entry."""
    found = formed(operator)
    assert found.magnitude is not None
    assert 0 < found.rounding <= 5 * max(operator.shape) * UNIT
    for i in range(found.matrix.shape[0]):
        for j in range(found.matrix.shape[1]):
            allowed = found.rounding * float(found.magnitude[i, j])
            assert abs(mpmath.mpf(float(found.matrix[i, j])) - exact[i, j]) <= allowed
    assert bool((found.magnitude >= found.matrix.abs() * (1 - 1e-12)).all())


def test_the_magnitude_bounds_the_rounding_of_a_product(generator: torch.Generator) -> None:
    n = 5
    for _ in range(10):
        P = (
            random_orthogonal(n, generator)
            * torch.logspace(0, 6, n, dtype=torch.float64)
            @ random_orthogonal(n, generator)
        )
        F = random_orthogonal(n, generator) @ torch.linalg.inv(P)
        A = F.T @ F
        A = (A + A.T) / 2
        change = DensePreconditioner(P)
        with mpmath.workdps(50):
            f, q, a = (mpmath.matrix(x.tolist()) for x in (F, P, A))
            rounded(MatrixOperator(F) @ change, f * q)
            rounded(MatrixOperator(F) @ change @ change, f * q * q)
            rounded(Congruence(DenseOperator(A), change), q.T * a * q)
            rounded(Shifted(Congruence(DenseOperator(A), change), 0.5), q.T * a * q + mpmath.mpf(0.5) * mpmath.eye(n))
            rounded(GramOperator(MatrixOperator(F) @ change), (f * q).T * (f * q))


def test_rows_that_are_scaled_and_conditioned(generator: torch.Generator) -> None:
    n = 5
    P = random_orthogonal(n, generator) * torch.logspace(0, 6, n, dtype=torch.float64) @ random_orthogonal(n, generator)
    F, scales = random_orthogonal(n, generator) @ torch.linalg.inv(P), torch.rand(n, generator=generator).double()
    found = formed(RowScaled(scales, F) @ DensePreconditioner(P))
    assert found.magnitude is not None
    torch.testing.assert_close(found.magnitude, scales[:, None] * (F.abs() @ P.abs()))
    exact = scales[:, None] * (F @ P)
    assert bool(((found.matrix - exact).abs() <= n * UNIT * found.magnitude).all())


def test_products_of_float32_numbers_are_formed_in_float64(generator: torch.Generator) -> None:
    """Stored numbers are exact in every dtype: a product in float32 would lose what they have."""
    F, P = torch.randn(6, 4, generator=generator), torch.randn(4, 4, generator=generator)
    A = DenseOperator(P + P.T)
    for operator, exact in (
        (MatrixOperator(F) @ DensePreconditioner(P), F.double() @ P.double()),
        (Congruence(A, DensePreconditioner(P)), P.double().T @ A.to_dense().double() @ P.double()),
    ):
        found = formed(operator)
        assert found.matrix.dtype == torch.float64
        assert found.rounding <= 1e-14
        torch.testing.assert_close(found.matrix, exact, rtol=1e-13, atol=1e-13)
    shifted = formed(Shifted(Congruence(A, DensePreconditioner(P)), 0.1)).matrix
    plain = formed(Congruence(A, DensePreconditioner(P))).matrix
    torch.testing.assert_close(shifted - plain, 0.1 * torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-14)


def test_what_no_product_formed_has_no_magnitude() -> None:
    eye = torch.eye(3)
    for operator in (DenseOperator(eye), MatrixOperator(eye), Shifted(DenseOperator(eye), 1.0)):
        assert formed(operator).magnitude is None


def test_norms(generator: torch.Generator) -> None:
    for kind in ("log", "flat", "isolated"):
        values = -3.0 * spectrum(kind, 200, 1.0 if kind == "flat" else 1e3)
        A = symmetric_with_spectrum(values, generator).operator
        assert 2.0 <= norm_estimate(A) <= 3.0 + 1e-12
    P = DensePreconditioner(torch.diag(torch.tensor([10.0, 1.0])))
    A = DenseOperator(torch.diag(torch.tensor([0.01, 1.0])))
    assert norm_estimate(Congruence(A, P)) == pytest.approx(1.0)
    assert rounding_norm(Congruence(A, P)) == pytest.approx(100.0)
    assert rounding_norm(Shifted(Congruence(A, P), 5.0)) == pytest.approx(105.0)
    assert rounding_norm(Congruence(Congruence(A, P), P)) == pytest.approx(1e4)
    F = MatrixOperator(torch.diag(torch.tensor([0.1, 1.0])))
    assert factor_rounding_norm(F @ P) == pytest.approx(10.0)
    factor = Shifted(GramOperator(F @ P), 9.0).factor
    assert factor is not None
    assert factor_rounding_norm(factor) == pytest.approx(math.hypot(10.0, 3.0))
    assert factor_rounding_norm((F @ P) - (F @ P)) == pytest.approx(20.0)
    stacked = (GramOperator(F @ P) + GramOperator(F)).factor
    assert stacked is not None
    assert factor_rounding_norm(stacked) == pytest.approx(math.hypot(10.0, 1.0))


@pytest.mark.parametrize("scale", [1e-300, 1.0, 1e300])
def test_the_tridiagonal_problem_is_solved_in_its_own_scale(scale: float) -> None:
    alpha, beta = np.array([2.0, 1.0, 4.0]) * scale, np.array([1.0, 0.5]) * scale
    values, vectors = tridiagonal_eigh(alpha, beta)
    assert values.dtype == vectors.dtype == np.float64
    T = (np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1)) / scale
    np.testing.assert_allclose(T @ vectors, vectors * (values / scale), atol=1e-14)
    assert tridiagonal_eigh(np.zeros(3), np.zeros(2))[0].tolist() == [0.0, 0.0, 0.0]


def test_projection_and_orthonormal_bases(generator: torch.Generator) -> None:
    basis = random_orthogonal(20, generator)[:, :5]
    x = 1e8 * basis[:, :1] + torch.randn(20, 1, generator=generator, dtype=torch.float64)
    assert float((basis.T @ project_out(x, basis)).abs().max()) <= 1e-14
    assert project_out(x, None) is x
    mixed = basis @ torch.randn(5, 5, generator=generator, dtype=torch.float64)
    skewed = mixed * torch.logspace(-100, 100, 5, dtype=torch.float64)
    found = orthonormal(skewed)
    assert float((found.T @ found - torch.eye(5)).abs().max()) <= 1e-14
    assert float((found - basis @ (basis.T @ found)).norm()) <= 1e-12
    assert orthonormal(basis[:, :0]).shape == (20, 0)
    dependent = torch.cat([basis, basis @ torch.ones(5, 1, dtype=torch.float64)], dim=1)
    for bad in (dependent, basis * 0, basis * math.nan, random_orthogonal(3, generator).repeat(1, 2)):
        with pytest.raises(NullSpaceError):
            orthonormal(bad)
