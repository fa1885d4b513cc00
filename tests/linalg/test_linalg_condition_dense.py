"""The dense methods: their intervals hold the exact answer, are tight, and count what they cannot explain.

Bugs that only these tests catch: small eigenvalues decided on `F^T F` in place of `F`; noise counted as rank, or a
small eigenvalue counted as zero without a word; an undeclared null space that passes as resolved; a declared
one that is not believed; a negative eigenvalue that is clamped. The problems are free of rounding.
"""

from __future__ import annotations

import math

import pytest
import torch
from linalg_problems import Exact, exact_problem, none_null

from bnp_analysis.errors import NotConvexError, NullSpaceError
from bnp_analysis.linalg import (
    CallableOperator,
    ConditionNumber,
    DenseOperator,
    DensePreconditioner,
    GramOperator,
    MatrixOperator,
    Restriction,
    SymmetricOperator,
    condition_number,
    magnitude_condition_number,
    singular_condition_number,
)
from bnp_analysis.testing import random_orthogonal, spectrum, symmetric_with_spectrum

# Exponents e of the singular values 2^-e; kappa is 4^(max - min).
SHAPES: dict[str, list[int]] = {
    "log-spaced": list(range(16)),
    "one isolated": [0, 0, 1, 0, 1, 1, 0, 1, 0, 0, 0, 1, 0, 0, 1, 15],
    "clustered": [0] * 5 + [1] * 3 + [14] * 3 + [15] * 5,
    "repeated": [0] * 8 + [15] * 8,
    "flat": [3] * 16,
    "two large": [0, 0] + [15] * 14,
}


def holds(k: ConditionNumber, kappa: float) -> bool:
    return k.two_sided and k.lower <= kappa <= k.upper


def width(k: ConditionNumber) -> float:
    return (k.upper - k.lower) / k.value


def gram(problem: Exact) -> GramOperator:
    return GramOperator(MatrixOperator(problem.factor))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [-46, 0, 46])
def test_factor_svd_holds_the_exact_answer(shape: str, scale: int, generator: torch.Generator) -> None:
    p = exact_problem([e + scale for e in SHAPES[shape]], generator)
    for null in (None, none_null(16)):
        k = condition_number(gram(p), null=null)
        assert k.method == "factor-svd"
        assert holds(k, p.kappa)
        assert k.value == pytest.approx(p.kappa, rel=1e-9)
        assert width(k) <= 1e-6
        assert (k.rank, k.unresolved, k.zero, k.null_dim) == (16, 0, 0, 0)
        top = 4.0 ** -min(e + scale for e in SHAPES[shape])
        assert k.lambda_max == pytest.approx(top, rel=1e-12)
        assert k.lambda_min == pytest.approx(top / p.kappa, rel=1e-9)


@pytest.mark.parametrize("kappa_exponent", [5, 10, 15, 20, 22])
def test_factor_svd_up_to_kappa_1e13(kappa_exponent: int, generator: torch.Generator) -> None:
    """From the eigenvalues of `F^T F` the error would be `u kappa`, up to 1 %."""
    exponents = [round(i * kappa_exponent / 63) for i in range(64)]
    p = exact_problem(exponents, generator)
    k = condition_number(gram(p))
    assert holds(k, p.kappa)
    assert abs(k.value / p.kappa - 1) <= 1e-8
    assert width(k) <= 1e-12 * 2.0**kappa_exponent


@pytest.mark.parametrize("zeros", [1, 6, 15])
def test_zero_singular_values_are_resolved_by_declaring_them(zeros: int, generator: torch.Generator) -> None:
    exponents = [round(i * 12 / max(15 - zeros, 1)) for i in range(16 - zeros)]
    p = exact_problem(exponents, generator, zeros=zeros)
    silent = condition_number(gram(p))
    assert not silent.two_sided
    assert silent.upper == math.inf
    assert silent.lower <= p.kappa
    assert (silent.rank, silent.unresolved, silent.zero) == (16 - zeros, zeros, zeros)
    assert "null space not declared" in str(silent)
    assert f"{zeros} eigenvalues below the noise floor" in silent.note
    declared = condition_number(gram(p), null=p.null)
    assert holds(declared, p.kappa)
    assert width(declared) <= 1e-9
    assert (declared.rank, declared.unresolved, declared.null_dim) == (16 - zeros, 0, zeros)
    assert declared.null_sources == {"declared": zeros}
    assert declared.note == ""
    if zeros > 1:
        part = condition_number(gram(p), null=p.null[:, 1:])
        assert (part.unresolved, part.two_sided, part.null_dim) == (1, False, zeros - 1)
        assert "not explained as zero" in part.note
        assert "not declared" not in part.note


def test_zeros_that_the_shape_forces_need_no_declaration(generator: torch.Generator) -> None:
    p = exact_problem(SHAPES["log-spaced"], generator)
    wide = GramOperator(MatrixOperator(p.factor[:5]))
    k = condition_number(wide)
    assert (k.rank, k.unresolved, k.zero, k.two_sided) == (5, 0, 11, True)
    dead = p.factor.clone()
    dead[3] = 0.0
    dead = torch.cat([dead, torch.zeros(16, 2)], dim=1)
    k = condition_number(GramOperator(MatrixOperator(dead)))
    assert (k.rank, k.unresolved, k.zero, k.two_sided) == (15, 0, 3, True)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [-23, 0, 23])
def test_dense_holds_the_exact_answer(shape: str, scale: int, generator: torch.Generator) -> None:
    p = exact_problem([min(e, 12) + scale for e in SHAPES[shape]], generator)
    k = condition_number(DenseOperator(p.matrix))
    assert k.method == "dense"
    assert holds(k, p.kappa)
    assert width(k) <= 5 * 16 * 2.3e-16 * p.kappa
    assert (k.rank, k.unresolved, k.zero, k.matvecs) == (16, 0, 0, 0)


def test_dense_beyond_its_floor_says_so(generator: torch.Generator) -> None:
    """At kappa = 4^24 the smallest eigenvalue, 4e-15, is not told from zero in float64: no false bound, a count."""
    p = exact_problem([0] * 15 + [24], generator)
    k = condition_number(DenseOperator(p.matrix))
    assert (k.rank, k.unresolved, k.zero, k.upper) == (15, 1, 1, math.inf)
    assert k.lower <= 1.0
    assert holds(condition_number(gram(p)), p.kappa), "the factor decides it"


@pytest.mark.parametrize("zeros", [1, 7])
def test_dense_counts_undeclared_zeros(zeros: int, generator: torch.Generator) -> None:
    p = exact_problem([i % 8 for i in range(16 - zeros)], generator, zeros=zeros)
    silent = condition_number(DenseOperator(p.matrix))
    assert (silent.two_sided, silent.unresolved, silent.upper) == (False, zeros, math.inf)
    assert silent.lower <= p.kappa
    assert "null space not declared" in str(silent)
    declared = condition_number(DenseOperator(p.matrix), null=p.null)
    assert holds(declared, p.kappa)
    assert (declared.rank, declared.unresolved, declared.zero) == (16 - zeros, 0, zeros)


@pytest.mark.parametrize("method", ["factor-svd", "dense"])
def test_float32(method: str, generator: torch.Generator) -> None:
    """Stored float32 numbers are exact; what counts is that the work on them is done in float64."""
    p = exact_problem([i % 10 for i in range(16)], generator, dtype=torch.float32)
    A = gram(p) if method == "factor-svd" else DenseOperator(p.matrix)
    k = condition_number(A, method=method)
    assert holds(k, p.kappa)
    assert width(k) <= 1e-4
    assert k.dtype == "float32"


def test_a_restricted_operator_keeps_its_factor(generator: torch.Generator) -> None:
    p = exact_problem(SHAPES["log-spaced"], generator)
    some = torch.arange(0, 16, 3)
    k = condition_number(Restriction(gram(p), some))
    expected = torch.linalg.svdvals(p.factor[:, some])
    assert k.method == "factor-svd"
    assert holds(k, float((expected[0] / expected[-1]) ** 2))


def test_computed_entries_widen_the_interval(generator: torch.Generator) -> None:
    p = exact_problem(SHAPES["log-spaced"], generator)
    given = condition_number(gram(p))
    computed = condition_number(GramOperator(MatrixOperator(p.factor, exact=False)))
    assert width(computed) > width(given)
    stored, called = DenseOperator(p.matrix), CallableOperator(lambda v: p.matrix @ v, 16, dtype=torch.float64)
    k = condition_number(called)
    assert k.noise_floor > condition_number(stored).noise_floor
    assert k.matvecs == 16


def test_the_value_is_taken_where_the_spectrum_ends_by_all_appearance(generator: torch.Generator) -> None:
    """Computed float32 rows certify less than they show: the value uses the gap, the bounds do not."""
    p = symmetric_with_spectrum(spectrum("log", 270, 1e10, rank=260), generator, factor_rows=300)
    assert p.operator.factor is not None
    rows, null = p.operator.factor.to_dense().float(), p.null.float()
    A = GramOperator(MatrixOperator(rows, exact=False))
    k = condition_number(A, null=null)
    assert (k.two_sided, k.upper) == (False, math.inf)
    assert k.rank is not None
    assert k.unresolved == 260 - k.rank > 0
    assert k.lower < 0.5 * p.kappa
    assert k.value == pytest.approx(p.kappa, rel=0.1)
    assert k.gap_ratio > 1e4
    assert "built in float64 has a lower floor" in k.note
    undeclared = condition_number(A)
    assert undeclared.value < 0.5 * p.kappa, "without an end of the spectrum, what is certified"
    in_float64 = condition_number(GramOperator(MatrixOperator(rows.double())), null=None)
    assert "float64" not in in_float64.note


@pytest.mark.parametrize("method", ["factor-svd", "dense", "lanczos"])
def test_declared_directions_set_the_noise_floor(method: str, generator: torch.Generator) -> None:
    """What is left of a known null direction is rounding, so that nothing below it counts as an eigenvalue.

    Here the products are noisier than the dtype suggests. Without this rule the leftovers of the null directions
    would count as the smallest nonzero eigenvalues, against the declaration.
    """
    n = 20
    noise = 3e-15  # below n u
    p = symmetric_with_spectrum(spectrum("log", n, 10.0, rank=n - 2), generator, factor_rows=n)
    assert p.operator.factor is not None
    left = random_orthogonal(n, generator)[:, :2]
    factor = p.operator.factor.to_dense() + noise * left @ p.null.T
    A: SymmetricOperator = GramOperator(MatrixOperator(factor))
    if method != "factor-svd":
        A = DenseOperator(p.operator.to_dense() + noise * p.null @ p.null.T)
    k = condition_number(A, null=p.null, method=method)
    assert (k.null_dim, k.two_sided) == (2, True)
    assert k.rank in (n - 2, None)
    assert k.lower <= 10.0 <= k.upper


@pytest.mark.parametrize("method", ["factor-svd", "dense", "lanczos"])
def test_directions_that_are_not_null_are_refused(method: str, generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 12, 1e3, rank=10), generator, factor_rows=12)
    wrong = torch.cat([p.null[:, :1], p.vectors[:, 4:5]], dim=1)
    with pytest.raises(NullSpaceError, match=r"null direction 1 is not null: .* hide a nonzero eigenvalue"):
        condition_number(p.operator, null=wrong, method=method)
    tilted = p.null + 1e-9 * p.vectors[:, :2]
    with pytest.raises(NullSpaceError, match=r"e-10|e-09"):
        condition_number(p.operator, null=tilted, method=method)
    scaled = symmetric_with_spectrum(1e-20 * p.values, generator, factor_rows=12)
    with pytest.raises(NullSpaceError):
        condition_number(scaled.operator, null=p.null, method=method)


def test_an_indefinite_matrix_has_no_kappa(generator: torch.Generator) -> None:
    """One negative eigenvalue, however small beside the largest, is refused."""
    values = torch.cat([spectrum("log", 15, 1e3), torch.tensor([-1e-6], dtype=torch.float64)])
    for scale in (1e-14, 1.0, 1e14):
        A = symmetric_with_spectrum(scale * values, generator).operator
        with pytest.raises(NotConvexError, match=r"smallest eigenvalue is -1e.*magnitude_condition_number"):
            condition_number(A)
    k = magnitude_condition_number(A)
    assert holds(k, 1e6)
    assert (k.negative, k.zero, k.unresolved, k.rank) == (1, 0, 0, 16)


def test_rounding_below_zero_is_not_indefinite(generator: torch.Generator) -> None:
    for _ in range(20):
        p = symmetric_with_spectrum(spectrum("log", 30, 1e3, rank=20), generator)
        k = condition_number(p.operator)
        assert (k.rank, k.unresolved) == (20, 10)


def test_magnitudes_count_signs_zeros_and_the_unexplained(generator: torch.Generator) -> None:
    values = torch.tensor([5.0, 2.0, 0.5, -0.25, -4.0, -8.0, 0.0, 0.0, 0.0])
    p = symmetric_with_spectrum(values, generator)
    k = magnitude_condition_number(p.operator, null=p.null)
    assert holds(k, 32.0)
    assert (k.negative, k.zero, k.rank, k.unresolved, k.null_dim) == (3, 3, 6, 0, 3)
    assert str(k).startswith("max|lambda|/min|lambda| = 32 (32 .. 32), dense float64, rank 6 of 9, 3 negative, 3 zero")
    silent = magnitude_condition_number(p.operator)
    assert (silent.negative, silent.zero, silent.unresolved, silent.upper) == (3, 3, 3, math.inf)
    assert silent.lower <= 32.0
    P = DensePreconditioner(torch.diag(torch.linspace(1, 2, 9, dtype=torch.float64)))
    inertia = magnitude_condition_number(p.operator, preconditioner=P, null=p.null)
    assert (inertia.negative, inertia.zero, inertia.two_sided) == (3, 3, True), "Sylvester"


def test_the_gap_says_how_clear_the_rank_is(generator: torch.Generator) -> None:
    p = exact_problem(list(range(12)), generator, zeros=4)
    k = condition_number(gram(p), null=p.null)
    assert k.gap_ratio > 1e18
    noisy = p.factor + 1e-17 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
    k = condition_number(GramOperator(MatrixOperator(noisy)))
    assert (k.rank, k.unresolved) == (12, 4)
    assert 1e18 < k.gap_ratio < 1e30
    assert "gap" in str(k)


def test_singular_values(generator: torch.Generator) -> None:
    p = exact_problem(SHAPES["log-spaced"], generator)
    k = singular_condition_number(MatrixOperator(p.factor))
    assert k.lower <= 2.0**15 <= k.upper
    assert (k.lambda_max, k.lambda_min) == (pytest.approx(1.0), pytest.approx(2.0**-15))
    assert str(k).startswith("sigma_max/sigma_min+ = 3.277e+04")
    tall = torch.cat([p.factor, torch.zeros(100, 16)])
    assert singular_condition_number(MatrixOperator(tall)).value == pytest.approx(2.0**15)


def test_one_eigenvalue_has_condition_one() -> None:
    for A in (DenseOperator(torch.tensor([[-0.0, 0.0], [0.0, 3e-7]])), DenseOperator(torch.tensor([[5.0]]))):
        k = condition_number(A)
        assert (k.value, k.rank, k.two_sided) == (1.0, 1, True)
        assert k.lower <= 1.0 <= k.upper
