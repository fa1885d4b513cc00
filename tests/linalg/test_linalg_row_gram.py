"""Wide factors whose rows are Kronecker products, by the Gram matrix of their scaled rows, against 60 digits.

Bugs that only these tests catch: bounds relative to the largest eigenvalue, which say nothing of a graded matrix;
errors of entries, of the factorization or of `F P` left out of what is subtracted from the diagonal; a largest
eigenvalue bounded by Ritz values alone; rows that structure makes dependent and that are counted; a preconditioner
that couples units taken for one that does not.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, ZeroOperatorError
from bnp_analysis.linalg import (
    DensePreconditioner,
    GramOperator,
    IdentityPreconditioner,
    LinearOperator,
    MatrixOperator,
    condition_number,
    methods,
)
from bnp_analysis.linalg.condition import factor_svd, row_gram
from bnp_analysis.linalg.condition.methods import automatic
from bnp_analysis.linalg.operators import RowProducts
from bnp_analysis.precondition.bnp import BNPBlock
from bnp_analysis.runtime.random import generator as seeded


class Rows(LinearOperator):
    """`g_jr (x) h_j`, columns unit after unit and those of the last feature, where that is the bias, at the end."""

    def __init__(self, left: Tensor, right: Tensor, *, bias: bool = True) -> None:
        (examples, each, units), features = left.shape, right.shape[1]
        super().__init__((examples * each, units * features), left.dtype, "cpu")
        self.parts = [RowProducts(left, right, torch.arange(units * features))]
        g, h = left.flatten(0, 1), right.repeat_interleave(each, 0)
        whole = g[:, :, None] * h[:, None, :]
        self.matrix = whole.flatten(1) if not bias else torch.cat([whole[:, :, :-1].flatten(1), whole[:, :, -1]], dim=1)

    @property
    def row_parts(self) -> list[RowProducts]:
        return self.parts

    @property
    def exact(self) -> bool:
        return True

    def _matmat(self, x: Tensor) -> Tensor:
        return self.matrix @ x

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self.matrix.T @ y


def rows(seed: int, examples: int = 6, each: int = 2, units: int = 3, features: int = 7) -> tuple[Tensor, Tensor]:
    g = seeded(seed)
    left = torch.randn(examples, each, units, generator=g, dtype=torch.float64)
    right = torch.randn(examples, features, generator=g, dtype=torch.float64)
    right[:, -1] = 1.0
    return left, right


def exact(value: float) -> mpmath.mpf:
    return mpmath.mpf(value)


def truth(left: Tensor, right: Tensor, P: mpmath.matrix | None = None) -> tuple[mpmath.mpf, int]:
    """`kappa*` in 60 digits, of the exact products of the stored numbers, and the rank."""
    with mpmath.workdps(150):
        units, features = left.shape[2], right.shape[1]
        table = []
        for j, example in enumerate(left.tolist()):
            h = [exact(v) for v in right[j].tolist()]
            for g in example:
                weights = [exact(a) * b for a in g for b in h[:-1]]
                table.append(weights + [exact(a) * h[-1] for a in g])
        F = mpmath.matrix(table)
        assert F.cols == units * features
        F = F if P is None else F * P
        values = sorted(mpmath.eigsy(F * F.T, eigvals_only=True), reverse=True)
        kept = [v for v in values if v > values[0] * mpmath.mpf(10) ** -80]
        return kept[0] / kept[-1], len(kept)


def measured(left: Tensor, right: Tensor, **options: object):
    return condition_number(GramOperator(Rows(left, right)), method="row-gram", **options)


@pytest.mark.parametrize("steps", [0.0, 1.0, 2.5])
def test_rows_of_any_sizes_are_measured_relative_to_themselves(steps):
    """`kappa*` up to 1e50, of which no other method has a digit."""
    left, right = rows(1)
    left = left * 10.0 ** (-steps * torch.arange(12, dtype=torch.float64).view(6, 2, 1))
    kappa, rank = truth(left, right)
    found = measured(left, right)
    assert found.two_sided
    assert found.rank == rank == 12
    assert found.lower <= kappa <= found.upper
    assert found.upper <= (1 + 1e-7) * found.lower


@pytest.mark.parametrize("seed", range(2))
def test_nearly_dependent_rows_are_bounded_as_far_as_rounding_allows(seed):
    known = []
    for digits in range(2, 13, 2):
        left, right = rows(seed)
        left[1], right[1] = left[0], right[0] + 10.0**-digits * right[1]
        right[1, -1] = 1.0
        kappa, _ = truth(left, right)
        found = measured(left, right)
        assert found.lower <= kappa <= found.upper, digits
        known.append(found.two_sided)
        if not found.two_sided:
            assert "row-gram refused: rows of the factor are dependent to rounding" in found.note
    assert known[:2] == [True, True]
    assert not known[-1]


@pytest.mark.parametrize("scales", [False, True])
def test_with_a_preconditioner_that_is_the_same_for_all_units(scales):
    left, right = rows(3)
    right[:, :-1] = 1e3 + 10.0 ** -torch.arange(6, dtype=torch.float64) * right[:, :-1]
    mean, variance = right[:, :-1].mean(0)[None], right[:, :-1].var(0, correction=0)[None]
    s = torch.tensor([1.0, 1e-3, 7.0], dtype=torch.float64) if scales else None
    block = BNPBlock(mean, variance, 1.3, units=3, bias=True, output_scales=s)
    with mpmath.workdps(150):
        P = mpmath.zeros(21)
        for unit in range(3):
            over = exact(1.3) * exact(1.0 if s is None else float(s[unit]))
            P[18 + unit, 18 + unit] = 1 / over
            for f in range(6):
                sigma = mpmath.sqrt(exact(float(variance[0, f])))
                P[6 * unit + f, 6 * unit + f] = 1 / sigma / over
                P[18 + unit, 6 * unit + f] = -exact(float(mean[0, f])) / sigma / over
    kappa, rank = truth(left, right, P)
    found = measured(left, right, preconditioner=block)
    assert found.rank == rank
    assert found.lower <= kappa <= found.upper
    assert found.upper <= 1.1 * found.lower


@pytest.mark.parametrize("seed", range(3))
def test_what_cancels_in_the_rows_of_a_preconditioned_layer_is_counted(seed):
    """Without a bias `P` subtracts the mean direction from rows that are a million times longer than what is left."""
    left, right = rows(seed)
    right[:, -1] = torch.linspace(-1, 2, 6, dtype=torch.float64)
    right = 1e6 + right
    mean, variance = right.mean(0)[None], right.var(0, correction=0)[None]
    block = BNPBlock(mean, variance, 1.0, units=3, bias=False)
    found = condition_number(GramOperator(Rows(left, right, bias=False)), preconditioner=block, method="row-gram")
    with mpmath.workdps(150):
        sigma = [mpmath.sqrt(exact(v)) for v in variance[0].tolist()]
        v = mpmath.matrix([exact(m) / s for m, s in zip(mean[0].tolist(), sigma, strict=True)])
        size = (v.T * v)[0]
        inner = mpmath.eye(7) - (1 - 1 / mpmath.sqrt(1 + size)) / size * (v * v.T)
        H = mpmath.matrix(right.tolist()) * mpmath.diag([1 / s for s in sigma]) * inner
        table = [[exact(a) * H[j, f] for a in g for f in range(7)] for j in range(6) for g in left[j].tolist()]
        F = mpmath.matrix(table)
        values = sorted(mpmath.eigsy(F * F.T, eigvals_only=True))
        kappa = values[-1] / values[0]
    assert found.lower <= kappa <= found.upper


def test_a_preconditioner_that_couples_units_leaves_it_to_lanczos():
    left, right = rows(4)
    P = DensePreconditioner(torch.eye(21, dtype=torch.float64) + 0.1)
    found = measured(left, right, preconditioner=P)
    assert "row-gram refused: P is not the same for every unit of a layer" in found.note
    assert not found.two_sided
    assert found.lower <= condition_number(GramOperator(Rows(left, right)), preconditioner=P, method="factor-svd").upper


def test_a_factor_of_other_rows_is_refused():
    with pytest.raises(
        InvalidInputError, match=r"row-gram needs a factor whose rows are Kronecker products.*'factor-svd'"
    ):
        condition_number(GramOperator(MatrixOperator(torch.eye(3))), method="row-gram")


def test_rows_that_structure_makes_dependent_are_not_counted():
    """Two rows in one unit, a dead example, an input of zeros."""
    left, right = rows(5)
    left[0, :, 1:] = 0.0
    left[1] = 0.0
    right[2] = 0.0
    kappa, rank = truth(left, right)
    found = measured(left, right)
    assert found.rank == rank == 7
    assert found.two_sided
    assert found.lower <= kappa <= found.upper
    assert found.upper <= (1 + 1e-7) * found.lower


def test_rows_of_zeros_have_no_condition_number():
    left, right = rows(6)
    with pytest.raises(ZeroOperatorError, match="the operator is zero to rounding"):
        measured(0 * left, right)


def test_the_identity_is_the_same_for_every_unit():
    left, right = rows(7)
    found, plain = (
        measured(left, right, preconditioner=IdentityPreconditioner(21, torch.float64)),
        measured(left, right),
    )
    assert found.two_sided
    assert (found.method, found.note) == ("row-gram", "")
    assert found.value == pytest.approx(plain.value, rel=1e-12)


def test_nothing_is_certified_where_rows_cancel():
    """Of two equal rows the difference is zero."""
    ones = torch.ones(2, dtype=torch.float64)
    same = row_gram._Rows([(ones[:, None], ones[:1, None])], torch.zeros(2, dtype=torch.int64), ones, ones, 1e-16, 0, 2)
    assert row_gram._bottom(same, torch.tensor([1.0, -1.0], dtype=torch.float64)) is None


def test_equal_largest_eigenvalues_and_a_scale_far_from_one():
    left, right = torch.eye(4, dtype=torch.float64)[:, None, :], torch.ones(4, 2, dtype=torch.float64)
    found = measured(1e-120 * left, right)
    assert found.lower <= 1 <= found.upper <= 1 + 1e-7
    assert found.lambda_max == pytest.approx(2e-240, rel=1e-12, abs=0)


def test_the_largest_eigenvalue_is_bounded_before_lanczos_has_found_it(monkeypatch):
    monkeypatch.setattr(row_gram, "_TOP", 2)
    left, right = rows(6)
    kappa, _ = truth(left, right)
    found = measured(left, right)
    assert found.lambda_max < float(kappa) * found.lambda_min * (1 - 1e-6)
    assert found.lower <= kappa <= found.upper < math.inf


def test_auto_takes_it_where_the_singular_values_cost_too_much(monkeypatch):
    A = GramOperator(Rows(*rows(7)))
    assert automatic(A).name == "factor-svd"
    monkeypatch.setattr(row_gram, "affordable", lambda shape: False)
    monkeypatch.setattr("bnp_analysis.linalg.condition.factor_svd.affordable", lambda shape: False)
    assert automatic(A).name == "row-gram"


def test_the_gram_matrix_and_its_norm_are_the_same_a_few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(row_gram, "_TOGETHER", 5)
    factor = Rows(*rows(8))
    made = row_gram._rows(factor, factor.row_parts, None)
    F = factor.matrix / factor.matrix.norm(dim=1, keepdim=True)
    K = made.gram()
    torch.testing.assert_close(K.tril(), (F @ F.T).tril())
    whole = (factor.matrix @ factor.matrix.T).square().sum()
    assert row_gram._square(K, made.length) * 2.0 ** (-4 * made.exponent) == pytest.approx(float(whole), rel=1e-13)


@pytest.mark.parametrize(("examples", "applies"), [(6, True), (10, True), (11, False), (90, False)])
def test_rows_are_taken_where_they_are_fewer_than_columns(examples, applies, monkeypatch):
    """Priced by a rank that the 21 columns bound, a Gram matrix of far more rows would not fit when it is made."""
    A = GramOperator(Rows(*rows(3, examples=examples)))
    for module in (row_gram, factor_svd):
        monkeypatch.setattr(module, "affordable", lambda shape: False)
    assert (automatic(A).name == "row-gram") == applies
    assert [cost.applies for cost in methods(A) if cost.method == "row-gram"] == [applies]
