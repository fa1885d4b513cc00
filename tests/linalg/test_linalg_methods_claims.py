"""What each method may claim: true two-sided statements, honest one-sided ones, reasons where it refuses.

Bugs that only these tests catch: null directions that were found taken for all that there are; a certificate that
confirms a wrong eigenvalue; an inner solve that did not converge and is used all the same; a probability that does
not hold over seeds; a shift that is trusted to bound what it does not.
"""

from __future__ import annotations

import math

import pytest
import torch
from linalg_problems import exact_problem, none_null
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import (
    ConditionNumber,
    DenseOperator,
    DensePreconditioner,
    GramOperator,
    MatrixOperator,
    condition_number,
    magnitude_condition_number,
    methods,
    regularized_condition_number,
)
from bnp_analysis.linalg.condition import factor_svd, inverse_lanczos
from bnp_analysis.linalg.condition.methods import registered
from bnp_analysis.runtime.memory import available_memory
from bnp_analysis.testing import random_orthogonal, spectrum, symmetric_with_spectrum

MATRIX_FREE = ("golub-kahan", "lanczos", "inverse-lanczos")


class Found:
    """Null directions that were found: perhaps not all."""

    def __init__(self, basis: Tensor) -> None:
        self.basis, self.sources = basis, {"found": basis.shape[1]}


def holds(k: ConditionNumber, truth: float, slack: float = 0.0) -> bool:
    low = math.isnan(k.lower) or k.lower <= truth * (1 + slack)
    return low and k.upper >= truth * (1 - slack)


@pytest.mark.parametrize("method", MATRIX_FREE)
@pytest.mark.parametrize("steps", [60, 100, 150])
@pytest.mark.parametrize("missing", [1, 25])
def test_directions_that_were_found_may_not_be_all(
    method: str, steps: int, missing: int, generator: torch.Generator
) -> None:
    """With 25 of 50 found, Lanczos claimed `kappa* >= 1.2e5` after 100 steps, truth 1e4."""
    p = symmetric_with_spectrum(spectrum("log", 400, 1e4, rank=350), generator, factor_rows=400)
    plain = DenseOperator(p.operator.to_dense())
    if method == "inverse-lanczos":
        with pytest.raises(InvalidInputError, match="whole null space must be declared"):
            condition_number(plain, null=Found(p.null[:, missing:]), method=method, steps=steps)
        return
    for seed in range(2):
        for A in (p.operator, plain) if method != "golub-kahan" else (p.operator,):
            k = condition_number(A, null=Found(p.null[:, missing:]), method=method, steps=steps, seed=seed)
            assert holds(k, 1e4), str(k)
            assert not k.two_sided
            assert k.lower >= 300, "valid, but of no use"
    if method == "lanczos":
        assert "the known null directions need not be all" in k.note
        m = magnitude_condition_number(plain, null=Found(p.null[:, missing:]), method=method, steps=steps)
        assert holds(m, 1e4)


@pytest.mark.parametrize("method", MATRIX_FREE)
def test_a_declaration_that_structure_contradicts_is_not_taken_at_its_word(
    method: str, generator: torch.Generator
) -> None:
    """A factor with 350 rows has at least 50 null directions; a tensor with 25 cannot be the whole null space."""
    p = symmetric_with_spectrum(spectrum("log", 400, 1e4, rank=350), generator, factor_rows=350)
    for steps in (100, 150):
        if method == "inverse-lanczos":
            with pytest.raises(InvalidInputError, match="whole null space must be declared"):
                condition_number(p.operator, null=p.null[:, 25:], method=method, steps=steps)
            continue
        k = condition_number(p.operator, null=p.null[:, 25:], method=method, steps=steps)
        assert holds(k, 1e4), str(k)
        assert not k.two_sided


def test_a_run_to_the_end_needs_no_promise(generator: torch.Generator) -> None:
    """Counting decides whether the directions found are all: Golub-Kahan says both sides, or what is unresolved."""
    p = symmetric_with_spectrum(spectrum("log", 120, 1e3, rank=100), generator, factor_rows=120)
    k = condition_number(p.operator, null=Found(p.null), method="golub-kahan")
    assert k.two_sided
    assert holds(k, 1e3, 1e-9)
    assert k.null_sources == {"found": 20}
    part = condition_number(p.operator, null=Found(p.null[:, 1:]), method="golub-kahan")
    assert (part.two_sided, part.unresolved) == (False, 1)


@pytest.mark.parametrize("indefinite", [False, True])
def test_a_wrong_eigenvalue_is_not_confirmed(
    indefinite: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """The counts are independent of the routine that found the eigenvalues."""
    values = spectrum("log", 20, 1e4)
    values[3:9] *= -1.0 if indefinite else 1.0
    A = symmetric_with_spectrum(values, generator).operator
    measure = magnitude_condition_number if indefinite else condition_number
    right = measure(A, null=none_null(20), method="inertia")
    assert right.two_sided
    assert holds(right, 1e4)
    assert right.upper / right.lower - 1 <= 1e-7
    true_values = torch.linalg.eigvalsh
    smallest = int(values.abs().argmin())
    assert smallest == 19
    for factor in (1 + 1e-6, 1 - 1e-6, 2.0):

        def wrong(matrix: Tensor, factor: float = factor) -> Tensor:
            found = true_values(matrix)
            found[found.abs().argmin()] *= factor
            return found

        monkeypatch.setattr(torch.linalg, "eigvalsh", wrong)
        k = measure(A, null=none_null(20), method="inertia")
        monkeypatch.undo()
        assert not k.two_sided
        assert "do not confirm" in k.note


def test_inertia_beside_the_noise_floor(generator: torch.Generator) -> None:
    """Where the radius is half of the smallest eigenvalue, counts decide nothing, and it says so."""
    p = exact_problem([0] * 15 + [23], generator)
    A = DenseOperator(p.matrix)
    P = DensePreconditioner(random_orthogonal(16, generator) * spectrum("log", 16, 10.0))
    for k in (
        condition_number(A, null=none_null(16), method="inertia"),
        condition_number(A, preconditioner=P, null=none_null(16), method="inertia"),
    ):
        assert k.lower <= p.kappa * 100
        assert k.upper >= p.kappa / 100
        assert k.two_sided or "confirm" in k.note or k.unresolved


def test_inverse_lanczos_over_seeds(generator: torch.Generator) -> None:
    """At `failure_probability` 0.2 and 10 starts, 2 misses would be allowed; the bounds are far safer than that."""
    p = symmetric_with_spectrum(spectrum("clustered", 60, 1e4, rank=50), generator)
    ks = [
        condition_number(
            p.operator, null=p.null, method="inverse-lanczos", steps=20, failure_probability=0.2, seed=seed
        )
        for seed in range(10)
    ]
    assert all(k.two_sided for k in ks)
    assert sum(not holds(k, 1e4) for k in ks) <= 2
    assert max(k.upper for k in ks) <= 2e4
    assert {k.failure_probability for k in ks} == {0.2}


def test_inverse_lanczos_refuses_where_solves_do_not_converge(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    p = symmetric_with_spectrum(spectrum("log", 150, 1e6), generator)
    monkeypatch.setattr(inverse_lanczos, "_INNER", 20)
    k = condition_number(p.operator, null=none_null(150), method="inverse-lanczos")
    assert not k.two_sided
    assert k.note.startswith("inverse-lanczos refused: an inner solve stopped at relative residual")
    assert "after 20 products" in k.note
    assert k.matvecs > 120, "what was tried is paid for"
    assert holds(k, 1e6)


def test_a_shift_bounds_nothing_below_zero(generator: torch.Generator) -> None:
    """`lambda_min(A + delta I) >= delta` needs a semidefinite `A`."""
    values = torch.cat([spectrum("log", 199, 1e3), torch.tensor([-5e-4], dtype=torch.float64)])
    A = symmetric_with_spectrum(values, generator).operator
    truth = (1 + 1e-3) / (1e-3 - 5e-4)
    k = regularized_condition_number(A, 1e-3, method="lanczos", steps=150)
    assert holds(k, truth, 1e-9)
    assert not k.two_sided
    assert "A is indefinite, delta bounds nothing" in k.note
    assert holds(regularized_condition_number(A, 1e-3), truth, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_regularized_on_every_route(dtype: torch.dtype, generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 90, 1e6, rank=60), generator, factor_rows=90, dtype=dtype)
    for delta in (1e-3, 0.1):
        truth = (1 + delta) / delta
        for method in ("auto", *(method.name for method in registered() if method.name != "row-gram")):
            k = regularized_condition_number(p.operator, delta, method=method)
            assert holds(k, truth, 1e-3 if dtype == torch.float32 else 1e-9), str(k)
            assert k.two_sided
            assert k.upper / k.lower <= 2.0
            assert k.null_dim == 0


def test_costs_before_a_run(generator: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    p = symmetric_with_spectrum(spectrum("log", 60, 1e3, rank=20), generator, factor_rows=20)
    table = {cost.method: cost for cost in methods(p.operator, steps=30)}
    assert list(table) == ["factor-svd", "row-gram", "golub-kahan", "dense", "inertia", "inverse-lanczos", "lanczos"]
    assert table["golub-kahan"].products == 22
    assert table["golub-kahan"].memory == 8 * 21 * 80
    assert condition_number(p.operator, method="golub-kahan").matvecs <= 22
    assert not table.pop("row-gram").applies  # its rows are no Kronecker products
    assert all(cost.applies == (cost.memory < available_memory()) for cost in table.values())
    assert "22 products" in str(table["golub-kahan"])
    assert "depends on the spectrum" in str(table["inverse-lanczos"])
    large = GramOperator(MatrixOperator(torch.ones(1, 1).expand(120, 150)))
    for most, applies in ((1e9, True), (1e5, False)):
        monkeypatch.setattr(factor_svd, "FACTOR_WORK", most)
        assert {cost.method: cost for cost in methods(large)}["factor-svd"].applies == applies
