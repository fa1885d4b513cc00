"""Numbers near the ends of the floats, in every verb and by every method, against exact fractions.

Only these tests catch: squares and norms that vanish or overflow, an underflow or a cancellation that is taken for
structure, raw `OverflowError` and `ZeroDivisionError`, half precision in a basis, a value outside its own interval.
"""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linalg_problems import none_null
from torch import Tensor

from bnp_analysis.errors import BNPAnalysisError, InvalidInputError
from bnp_analysis.linalg import (
    CallableOperator,
    ConditionNumber,
    DenseOperator,
    DensePreconditioner,
    GramOperator,
    LinearOperator,
    MatrixOperator,
    RowScaled,
    SymmetricOperator,
    condition_number,
    congruence,
    eigenpairs,
    golub_kahan,
    lanczos,
    magnitude_condition_number,
    regularized_condition_number,
    singular_condition_number,
    spectral_density,
    trace,
)
from bnp_analysis.linalg.condition.reduction import reduced
from bnp_analysis.linalg.scale import ScaledPreconditioner, scaled_preconditioner

TWO = [[2.0, 1.0], [1.0, 2.0]]  # eigenvalues 3 and 1
SCALES = (-1040, -540, -300, 300, 990, 1022)
METHODS = ("dense", "inertia", "lanczos", "inverse-lanczos")


def times(matrix: Tensor, power: int) -> Tensor:
    return torch.ldexp(torch.ldexp(matrix, torch.tensor(power // 2)), torch.tensor(power - power // 2))


def stored(rows: list[list[float]], power: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return times(torch.tensor(rows, dtype=torch.float64), power).to(dtype)


def operators(matrix: Tensor) -> list[SymmetricOperator]:
    function = CallableOperator(lambda v: matrix @ v, len(matrix), dtype=matrix.dtype)
    return [DenseOperator(matrix), function]


def holds(k: ConditionNumber, truth: float, rel: float = 1e-9) -> bool:
    below = math.isnan(k.lower) or k.lower <= truth * (1 + 1e-14)
    return below and truth * (1 - 1e-14) <= k.upper and (not k.two_sided or abs(k.value / truth - 1) <= rel)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("power", SCALES)
def test_a_multiple_has_the_same_condition_number(power: int, method: str) -> None:
    for A in operators(stored(TWO, power)):
        k = condition_number(A, null=none_null(2), method=method)
        assert k.two_sided, (A, k)
        assert holds(k, 3.0), (A, k)
        assert k.lambda_max * 2.0 ** (k.exponent // 2) * 2.0 ** (k.exponent - k.exponent // 2) == pytest.approx(
            float(3 * Fraction(2) ** power), rel=1e-9
        )


@pytest.mark.parametrize("method", ["factor-svd", "golub-kahan", *METHODS])
@pytest.mark.parametrize("power", SCALES)
def test_a_multiple_of_a_factor(power: int, method: str) -> None:
    """`F = 2^power [[2, 1], [1, 2]]`: the eigenvalues `9, 1` times `4^power` are no floats, their ratio is one."""
    F = MatrixOperator(stored(TWO, power))
    k = condition_number(GramOperator(F), null=none_null(2), method=method)
    assert k.two_sided, k
    assert holds(k, 9.0), k
    exact = 9 * Fraction(4) ** power / Fraction(2) ** k.exponent
    assert k.lambda_max == pytest.approx(float(exact), rel=1e-9), "eigenvalues are in units of 2^exponent"
    if method == "factor-svd":
        assert holds(condition_number(reduced(GramOperator(F)), method=method), 9.0)
        singular = singular_condition_number(F)
        assert holds(singular, 3.0)
        exact = 3 * Fraction(2) ** power / Fraction(2) ** singular.exponent
        assert singular.lambda_max == pytest.approx(float(exact), rel=1e-9)


@pytest.mark.parametrize("power", [-140, -90, 60, 120])
def test_single_precision(power: int) -> None:
    matrix = stored(TWO, power, torch.float32)
    for A in operators(matrix):
        for method in ("dense", "lanczos"):
            assert holds(condition_number(A, null=none_null(2, torch.float32), method=method), 3.0, 1e-4)
        assert float(eigenpairs(A, 1).values) == pytest.approx(float(3 * Fraction(2) ** power), rel=1e-4)
    for method in ("factor-svd", "golub-kahan", "dense", "lanczos"):
        F = GramOperator(MatrixOperator(matrix))
        assert holds(condition_number(F, null=none_null(2, torch.float32), method=method), 9.0, 1e-4)
    assert float(eigenpairs(F, 1).values) == pytest.approx(float(9 * Fraction(4) ** power), rel=1e-4)


@pytest.mark.parametrize("power", SCALES[1:-1])
def test_the_other_verbs(power: int) -> None:
    top = float(3 * Fraction(2) ** power)
    for A in operators(stored(TWO, power)):
        pairs = eigenpairs(A, 2)
        assert pairs.values.tolist() == pytest.approx([top, top / 3], rel=1e-9)
        assert trace(A, probes=4).value == pytest.approx(4 * top / 3, abs=2 * top)
        assert lanczos(A, 2).ritz()[0][-1] == pytest.approx(top, rel=1e-9)
        assert lanczos(A, 2).ritz_vectors().isfinite().all()
        assert spectral_density(A, probes=2, steps=2).nodes.max() == pytest.approx(top, rel=1e-9)
        assert holds(magnitude_condition_number(A), 3.0)
        delta = top / 3
        assert holds(regularized_condition_number(A, delta), 2.0)
        assert holds(regularized_condition_number(A, delta, method="lanczos"), 2.0)
    sigma = golub_kahan(MatrixOperator(stored(TWO, power)), 2).singular_values()
    assert sigma.tolist() == pytest.approx([top, top / 3], rel=1e-9)


@pytest.mark.parametrize("power", [-700, 700])
def test_eigenvalues_that_are_no_floats_are_refused(power: int) -> None:
    A = GramOperator(MatrixOperator(stored(TWO, power)))
    for measure in (
        lambda: eigenpairs(A, 1),
        lambda: trace(A, probes=2),
        lambda: spectral_density(A, probes=1, steps=2),
        lambda: lanczos(A, 2),
    ):
        with pytest.raises(InvalidInputError, match=r"10\^.*no float64 number"):
            measure()
    assert holds(regularized_condition_number(A, 1.0, method="lanczos"), 1.0 if power < 0 else 9.0)


def test_a_run_resumes_in_the_units_of_its_operator(tmp_path) -> None:  # type: ignore[no-untyped-def]
    A = DenseOperator(stored([[4.0, 1.0, 0.0], [1.0, 3.0, 1.0], [0.0, 1.0, 2.0]], -900))
    whole = lanczos(A, 3, seed=1)
    part = lanczos(A, 2, seed=1)
    torch.testing.assert_close(torch.tensor(lanczos(A, 3, resume=part).alpha), torch.tensor(whole.alpha))
    lanczos(A, 2, seed=1, checkpoint=tmp_path / "run.pt")
    again = lanczos(A, 3, seed=1, checkpoint=tmp_path / "run.pt")
    torch.testing.assert_close(torch.tensor(again.alpha), torch.tensor(whole.alpha))


@pytest.mark.parametrize("values", [(1e200, 1e-150), (1.0, 0.5, 1e-60), (1e300, 1e-300, 1e-200), (1e-150, 1e-300)])
@pytest.mark.parametrize("scale", [1.0, 1e-140, 1e140])
def test_what_is_lost_beside_the_largest_is_not_zero(values: tuple[float, ...], scale: float) -> None:
    D, P = torch.diag(torch.tensor(values, dtype=torch.float64)), scale * torch.eye(len(values), dtype=torch.float64)
    ratio = Fraction(max(values)) / Fraction(min(values))
    for A in (DenseOperator(D), GramOperator(MatrixOperator(D))):
        names = (
            ("dense", "inertia", "lanczos") if A.factor is None else ("factor-svd", "golub-kahan", "dense", "lanczos")
        )
        for method in names:
            k = condition_number(A, preconditioner=DensePreconditioner(P), method=method)
            assert not k.two_sided, k
            assert math.isnan(k.lower) or Fraction(k.lower) <= ratio ** (1 if A.factor is None else 2)
            assert k.unresolved in (None, len(values) - (k.rank or 0))


K = 1e16
F = [[K, 1.0, -K], [K, 0.0, -K], [K, -K, 0.0]]
P = [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]]


@pytest.mark.parametrize("method", ["factor-svd", "golub-kahan", "dense", "inertia", "lanczos"])
def test_a_computed_zero_is_no_structure(method: str) -> None:
    """`F P` loses a column to cancellation: the truth, in 100 digits, is 4e32."""
    with mpmath.workdps(100):
        sigma = mpmath.svd_r(mpmath.matrix(F) * mpmath.matrix(P), compute_uv=False)
        truth = float((max(sigma) / min(sigma)) ** 2)
    assert truth == pytest.approx(4e32, rel=1e-3)
    A, T = GramOperator(MatrixOperator(stored(F))), DensePreconditioner(stored(P))
    assert holds(condition_number(A, preconditioner=T, method=method), truth)
    assert holds(condition_number(congruence(A, T), method=method), truth)
    if method == "factor-svd":
        assert holds(condition_number(reduced(A), preconditioner=T, method=method), truth)
        unit = GramOperator(RowScaled(torch.ones(3, dtype=torch.float64), stored(F)))
        assert holds(condition_number(unit, preconditioner=T, method=method), truth)


@pytest.mark.parametrize("method", ["dense", "inertia", "lanczos"])
def test_a_symmetric_matrix_in_other_variables(method: str) -> None:
    """`P^T A P` of `[[1, 1], [1, 1 + 2^-52]]` and a shear is computed as `diag(1, 2^-52)` or with a zero row."""
    A = DenseOperator(stored([[1.0, 1.0], [1.0, 1 + 2.0**-52]]))
    T = DensePreconditioner(stored([[1.0, -1 + 2.0**-53], [0.0, 1.0]]))
    a, b, c = Fraction(1), Fraction(1, 2**53), Fraction(1, 2**52) + Fraction(1, 2**106)
    trace_, det = a + c, a * c - b * b
    truth = float(trace_**2 / det)  # kappa + 2 + 1/kappa
    k = condition_number(A, preconditioner=T, method=method)
    assert math.isnan(k.lower) or k.lower <= truth
    assert k.upper >= truth - 3


def test_magnitudes_of_rows_outlive_the_scale_of_a_preconditioner() -> None:
    """Rows times a power of two before the product would lose their small entries."""
    P = scaled_preconditioner(DensePreconditioner(stored([[1.0, 0.0], [-3.0, 2.0]], 900)))
    assert isinstance(P, ScaledPreconditioner)
    found = P.row_magnitude(stored([[1.0, 0.0], [0.0, -(2.0**-300)]]))
    assert torch.equal(times(found, -900 - P.exponent), stored([[1.0, 0.0], [3 * 2.0**-300, 2.0**-299]]))


def test_qr_that_rounds_to_zero_leaves_the_rank() -> None:
    """Columns that differ in the last bit: the triangle may lose one, `F` has rank 2."""
    rows = stored([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0 + 2.0**-52]])
    k = condition_number(reduced(GramOperator(MatrixOperator(rows))), method="factor-svd")
    assert (k.rank, k.unresolved, k.two_sided) == (1, 1, False)


class Underflowed(MatrixOperator):
    """A factor that does not vouch for its zeros."""

    @property
    def zeros_are_structural(self) -> bool:
        return False

    @property
    def rank_bound(self) -> int:
        return min(self.shape)


def test_zeros_count_where_the_operator_vouches_for_them() -> None:
    rows = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    given: list[LinearOperator] = [MatrixOperator(rows), RowScaled(torch.ones(3, dtype=torch.float64), rows)]
    for one in given:
        for A in (GramOperator(one), reduced(GramOperator(one))):
            assert condition_number(A, method="factor-svd").two_sided
    doubted: list[LinearOperator] = [
        Underflowed(rows),
        MatrixOperator(rows, exact=False),
        RowScaled(torch.ones(3, dtype=torch.float64), rows, zeros_are_structural=False),
    ]
    for one in doubted:
        for A in (GramOperator(one), reduced(GramOperator(one))):
            for method in ("factor-svd", "golub-kahan", "dense"):
                k = condition_number(A, method=method)
                assert (k.two_sided, k.unresolved) == (False, 1), (A, method, k)
    assert (
        condition_number(CallableOperator(lambda v: rows @ v, 3, dtype=torch.float64), method="dense").unresolved == 1
    )


@settings(max_examples=40, deadline=None)
@given(
    entries=st.lists(st.integers(-4, 4), min_size=4, max_size=4),
    powers=st.tuples(st.integers(-500, 500), st.integers(-500, 500)),
    shear=st.integers(-3, 3),
    method=st.sampled_from(["factor-svd", "golub-kahan", "dense", "inertia", "lanczos"]),
)
def test_claims_contain_the_truth(entries: list[int], powers: tuple[int, int], shear: int, method: str) -> None:
    """Two by two, any scale: trace and determinant of `(F P)^T F P` are exact."""
    a, b, c, d = (Fraction(x) for x in entries)
    square = [[a, a * shear + b], [c, c * shear + d]]
    t = sum((x * x for row in square for x in row), Fraction(0))
    det = (square[0][0] * square[1][1] - square[0][1] * square[1][0]) ** 2
    rows = stored([[float(a), float(b)], [float(c), float(d)]], powers[0])
    T = DensePreconditioner(stored([[1.0, float(shear)], [0.0, 1.0]], powers[1]))
    try:
        k = condition_number(GramOperator(MatrixOperator(rows)), preconditioner=T, method=method)
    except BNPAnalysisError:
        assert t == 0
        return
    with mpmath.workdps(60):
        root = mpmath.sqrt(mpmath.mpf(int(t * t - 4 * det)))
        truth = 1.0 if det == 0 else float((int(t) + root) ** 2 / (4 * int(det)))
    assert holds(k, truth, 1e-6), (k, truth)
    assert math.isnan(k.lower) or k.lower <= k.value <= k.upper


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_vectors_in_single(dtype: torch.dtype) -> None:
    """Eigenvalues of a stored matrix whose entries are exact in half precision; `n = 16`."""
    values = torch.tensor([8.0, 4.0, 2.0] + 13 * [0.5])
    A = DenseOperator(torch.diag(values).to(dtype))
    found = eigenpairs(A, 2)
    assert bool(((found.values - values[:2].double()).abs() <= found.residuals).all())
    assert found.residuals.min() > 0.5 * torch.finfo(dtype).eps
    assert abs(trace(A).value - float(values.sum())) <= 3 * trace(A).error
    assert spectral_density(A, probes=2, steps=6).nodes.max() == pytest.approx(8.0, rel=0.1)
    k = condition_number(A, method="lanczos", null=none_null(16, dtype))
    assert math.isnan(k.lower) or k.lower <= 16.0 <= k.upper
    assert holds(condition_number(A), 16.0)
    assert (A.to_scipy() @ torch.ones(16).numpy()).tolist() == values.tolist()


def test_searches_that_rounding_decides_are_refused() -> None:
    A = DenseOperator(torch.eye(400).to(torch.bfloat16))
    for measure in (lambda: eigenpairs(A, 1), lambda: lanczos(A, 3), lambda: spectral_density(A, probes=2, steps=3)):
        with pytest.raises(InvalidInputError, match=r"known to 0\.008 only"):
            measure()
    with pytest.raises(InvalidInputError, match="float32 or float64"):
        DensePreconditioner(torch.eye(3).half())


def test_a_value_lies_in_its_interval() -> None:
    k = condition_number(DenseOperator(stored(TWO)))
    inside = ConditionNumber(**(vars(k) | {"value": k.upper + 1}))
    assert inside.value == k.upper
    with pytest.raises(AssertionError, match="exclude each other"):
        ConditionNumber(**(vars(k) | {"lower": k.upper + 1}))


@pytest.mark.parametrize("power", [-300, -130, 0, 300])
@pytest.mark.parametrize("scale", [0, -40])
def test_a_matrix_is_inverted_at_any_scale(power: int, scale: int) -> None:
    """Eigenvalues 9, 1 and 1/16 of `F^T F`, with a null direction that leaves nothing of some solutions."""
    F = times(torch.diag(torch.tensor([3.0, 1.0, 0.25, 0.0], dtype=torch.float64)), power)
    P = None if not scale else DensePreconditioner(2.0**scale * torch.eye(4, dtype=torch.float64))
    A = GramOperator(MatrixOperator(F))
    k = condition_number(A, preconditioner=P, null=torch.eye(4, dtype=torch.float64)[:, 3:], method="inverse-lanczos")
    assert k.lower <= 144 <= k.upper
    one = GramOperator(MatrixOperator(times(torch.tensor([[32.0, -(2.0**38)]], dtype=torch.float64), power)))
    null = torch.tensor([[2.0**33], [1.0]], dtype=torch.float64)
    Q = DensePreconditioner(torch.diag(torch.tensor([2.0**scale, 2.0**-20], dtype=torch.float64)))
    k = condition_number(one, preconditioner=Q, null=null, method="inverse-lanczos")
    assert k.lower <= 1 <= k.upper
