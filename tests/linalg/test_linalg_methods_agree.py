"""Every method tells the truth about the same problems, at the cost it announces.

Bugs that only these tests catch: a method that disagrees with the others; eigenvalue counts off by one block; a
regularized number that forgets `|P|`, or claims a bound after Ctrl-C; a method chosen that does not fit into memory.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from linalg_problems import counting, exact_problem, interrupt, none_null
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, MemoryLimitError, NotConvexError
from bnp_analysis.linalg import (
    CallableOperator,
    DenseOperator,
    DensePreconditioner,
    GramOperator,
    MatrixOperator,
    choose_method,
    condition_number,
    magnitude_condition_number,
    methods,
    regularized_condition_number,
)
from bnp_analysis.linalg.condition import methods as methods_module
from bnp_analysis.linalg.condition.dense import confirm_ends, count_below
from bnp_analysis.linalg.spectra.checks import SomeNullDirections
from bnp_analysis.runtime import memory as memory_module
from bnp_analysis.testing import KINDS, random_orthogonal, spectrum, symmetric_with_spectrum

FACTORED = ("factor-svd", "golub-kahan")
DENSE = ("dense", "inertia")
KRYLOV = ("lanczos", "inverse-lanczos")


def stored(factor: Tensor) -> DenseOperator:
    square = factor.T @ factor
    return DenseOperator((square + square.T) / 2, factor=factor)


@pytest.mark.parametrize("method", [*FACTORED, *DENSE, *KRYLOV])
@pytest.mark.parametrize("scale", [-23, 0, 23])
@pytest.mark.parametrize("zeros", [0, 5])
def test_all_routes_hold_the_exact_answer(method: str, scale: int, zeros: int, generator: torch.Generator) -> None:
    exponents = [i % 11 + scale for i in range(16 - zeros)]
    p = exact_problem(exponents, generator, zeros=zeros)
    k = condition_number(stored(p.factor), null=p.null, method=method, steps=16)
    assert k.method == method
    assert k.two_sided
    assert k.lower <= p.kappa <= k.upper
    assert k.upper - k.lower <= 1e-3 * p.kappa
    assert k.value == pytest.approx(p.kappa, rel=1e-5)
    assert k.rank in (16 - zeros, None)
    assert k.failure_probability == (1e-3 if method in KRYLOV else 0.0)


@pytest.mark.parametrize("method", ["golub-kahan", *DENSE, "lanczos"])
def test_no_route_is_two_sided_about_an_undeclared_null_space(method: str, generator: torch.Generator) -> None:
    p = exact_problem([i % 6 for i in range(11)], generator, zeros=5)
    k = condition_number(stored(p.factor), method=method)
    assert (k.two_sided, k.upper) == (False, math.inf)
    assert k.lower <= p.kappa
    assert "null space not declared" in str(k)
    if method != "lanczos":
        assert (k.rank, k.unresolved) == (11, 5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["golub-kahan", "inertia", "inverse-lanczos"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_bounds_of_the_other_routes(kind: str, method: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    kappa = 1.0 if kind == "flat" else (1e4 if dtype == torch.float64 else 100.0)
    p = symmetric_with_spectrum(spectrum(kind, 50, kappa, rank=40), generator, dtype=dtype, factor_rows=60)
    blur = 100 * torch.finfo(dtype).eps
    least = (1 - blur) / (1 / kappa + blur)
    most = (1 + blur) / (1 / kappa - blur)
    resolved = 0
    for steps in (10, 50):
        k = condition_number(p.operator, null=p.null, method=method, steps=steps)
        assert math.isnan(k.lower) or k.lower <= most
        assert k.upper >= least
        resolved += k.two_sided
    assert resolved >= 1 or dtype == torch.float32


@pytest.mark.parametrize("shift", [-5.0, -2.0, -1e-9, 0.5, 1.0 + 1e-9, 3.0, 99.0])
def test_inertia_counts_eigenvalues(shift: float, generator: torch.Generator) -> None:
    values = torch.tensor([-4.0, -2.0 - 1e-6, -1.0, 0.0, 0.0, 1.0, 1.0, 2.0, 7.0, 7.0], dtype=torch.float64)
    matrix = symmetric_with_spectrum(values, generator).operator.to_dense().numpy()
    count, radius = count_below(matrix, shift)
    assert count == int((values < shift).sum())
    assert 0 < radius < 1e-11
    assert count_below(np.array([[0.0, 1.0], [1.0, 0.0]]), 0.0)[0] == 1, "a block of size two"
    assert count_below(-np.eye(3), 0.0)[0] == 3


def test_inertia_counts_pivots_of_both_sizes() -> None:
    """Small diagonals make blocks of size two, whose position and number vary."""
    random = np.random.default_rng(0)
    for trial in range(300):
        n = 1 + trial % 9
        matrix = random.standard_normal((n, n))
        matrix = matrix + matrix.T - np.diag(2.0 * np.diag(matrix)) * (1.0 - 1e-3) * (trial % 2)
        shift = 0.3 * random.standard_normal()
        assert count_below(matrix, shift)[0] == int((np.linalg.eigvalsh(matrix) < shift).sum())


def test_inertia_confirms_what_is_true_only() -> None:
    matrix = np.diag([0.0, 0.0, 2.0, -3.0, 5.0])
    ends = confirm_ends(matrix, 2.0, 5.0, 2, 1e-6)
    assert ends is not None
    assert ends[0] < 2.0 < ends[1]
    assert ends[2] < 5.0 < ends[3]
    for bottom, top, zeros in (
        (2.1, 5.0, 2),
        (1.9, 5.0, 2),
        (2.0, 4.9, 2),
        (2.0, 5.1, 2),
        (2.0, 5.0, 1),
        (2.0, 5.0, 3),
    ):
        assert confirm_ends(matrix, bottom, top, zeros, 1e-6) is None


def test_inverse_lanczos_says_what_it_needs(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 40, 1e3, rank=36), generator)
    with pytest.raises(InvalidInputError, match="whole null space must be declared"):
        condition_number(p.operator, method="inverse-lanczos")
    with pytest.raises(InvalidInputError, match="whole null space must be declared"):
        condition_number(p.operator, null=SomeNullDirections(p.null), method="inverse-lanczos")
    wrong = condition_number(p.operator, null=p.null[:, 1:], method="inverse-lanczos")
    assert not wrong.two_sided
    assert "inverse-lanczos refused" in wrong.note
    values = torch.cat([spectrum("log", 20, 10.0), torch.tensor([-0.5])])
    indefinite = symmetric_with_spectrum(values, generator).operator
    with pytest.raises(NotConvexError):
        condition_number(indefinite, null=none_null(21), method="inverse-lanczos")


def test_inverse_lanczos_needs_fewer_steps_than_lanczos(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 120, 1e4), generator)
    found = {m: condition_number(p.operator, null=none_null(120), method=m, steps=30) for m in KRYLOV}
    assert not found["lanczos"].two_sided
    assert found["inverse-lanczos"].lower <= 1e4 <= found["inverse-lanczos"].upper < 2e4


@pytest.mark.parametrize("method", ["auto", *DENSE, *KRYLOV])
@pytest.mark.parametrize("delta", [1e-6, 1e-2, 10.0])
def test_regularized_numbers(method: str, delta: float, generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 60, 1e5, rank=40), generator, factor_rows=50)
    k = regularized_condition_number(p.operator, delta, method=method, steps=60)
    truth = (1 + delta) / delta
    assert k.two_sided
    assert k.lower <= truth * (1 + 1e-8)
    assert k.upper >= truth * (1 - 1e-8)
    assert str(k).startswith(f"kappa(A + {delta:g} I) = ")
    half = DensePreconditioner(0.5 * torch.eye(60, dtype=torch.float64))
    k = regularized_condition_number(p.operator, delta, preconditioner=half, method=method, steps=60)
    assert k.value == pytest.approx((0.25 + delta) / delta, rel=1e-3)
    assert "P^T A P" in str(k)


@pytest.mark.parametrize("delta", [0.0, -1.0, math.nan, math.inf])
def test_delta_is_positive(delta: float) -> None:
    with pytest.raises(InvalidInputError, match="delta"):
        regularized_condition_number(DenseOperator(torch.eye(2)), delta)


@pytest.mark.parametrize("method", ["auto", "dense", "lanczos"])
def test_a_regularized_number_counts_the_norm_of_p(method: str, generator: torch.Generator) -> None:
    n, norm = 6, 1e4
    for _ in range(10):
        P = random_orthogonal(n, generator) * spectrum("log", n, norm, scale=norm) @ random_orthogonal(n, generator)
        factor = random_orthogonal(n, generator) @ torch.linalg.inv(P)
        k = regularized_condition_number(stored(factor), 1e-4, preconditioner=DensePreconditioner(P), method=method)
        # B = P^T F^T F P is the identity up to u |F| |P|, in B by the stored matrix up to u |P|^2 |A|.
        exact = torch.linalg.svdvals(factor @ P) ** 2
        truth = float((exact[0] + 1e-4) / (exact[-1] + 1e-4))
        reach = 1e-9 if method == "auto" else 1e-6
        assert k.lower <= truth * (1 + reach)
        assert k.upper >= truth * (1 - reach)
        assert k.noise_floor > 100 * n * 2.2e-16 or method == "auto"


def test_an_interrupted_regularized_number_claims_nothing(generator: torch.Generator) -> None:
    A = symmetric_with_spectrum(spectrum("log", 300, 1e3), generator).operator
    k = regularized_condition_number(counting(A, {30: interrupt}), 1e-3, method="lanczos")
    assert (k.stop, k.two_sided) == ("interrupted", False)
    for early in (1, 12):
        with pytest.raises(KeyboardInterrupt):
            regularized_condition_number(counting(A, {early: interrupt}), 1e-3, method="lanczos")


def test_an_inverse_is_not_begun_after_ctrl_c(generator: torch.Generator) -> None:
    A = symmetric_with_spectrum(spectrum("log", 60, 1e3), generator).operator
    for early in (3, 12):
        with pytest.raises(KeyboardInterrupt):
            condition_number(counting(A, {early: interrupt}), null=none_null(60), method="inverse-lanczos")


def test_routes_announce_their_products(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 24, 1e3), generator)
    A = counting(p.operator)
    announced = {cost.method: cost for cost in methods(A, steps=15)}
    assert not announced["factor-svd"].applies
    for method in ("dense", "lanczos"):
        before = len(A.calls)
        condition_number(A, method=method, steps=15)
        spent = len(A.calls) - before
        assert spent == pytest.approx(announced[method].products, abs=5)


def test_the_route_follows_size_factor_and_memory(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 30, 10.0), generator, factor_rows=40)
    gram = GramOperator(MatrixOperator(torch.randn(4, 200, generator=generator)))
    large = CallableOperator(lambda v: v, 4000)
    assert choose_method(p.operator) == "factor-svd"
    assert choose_method(p.operator, indefinite=True) == "dense"
    assert choose_method(DenseOperator(p.operator.to_dense())) == "dense"
    assert choose_method(gram) == "factor-svd"
    assert choose_method(large) == "lanczos"
    for module in (memory_module, methods_module):
        monkeypatch.setattr(module, "available_memory", lambda *_: 60_000)
    assert choose_method(gram) == "factor-svd"
    assert choose_method(DenseOperator(p.operator.to_dense())) == "dense"
    assert choose_method(Wide(60)) == "lanczos"
    with pytest.raises(MemoryLimitError, match=r"GiB.*available"):
        condition_number(Wide(60), method="dense")
    assert condition_number(Wide(60), steps=20).method == "lanczos"
    with pytest.raises(MemoryLimitError):
        condition_number(GramOperator(MatrixOperator(torch.ones(100, 100))), method="factor-svd")
    with pytest.raises(MemoryLimitError):
        condition_number(GramOperator(MatrixOperator(torch.ones(100, 100))), method="golub-kahan")


@pytest.mark.parametrize("method", ["lanczos", "inverse-lanczos"])
def test_memory_is_asked_for_before_the_probes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two random vectors of a huge operator, to test its symmetry, once took all there was."""
    asked: list[Tensor] = []
    A = CallableOperator(lambda v: asked.append(v) or v, 1000)
    monkeypatch.setattr(memory_module, "available_memory", lambda *_: 60_000)
    with pytest.raises(MemoryLimitError, match="32 vectors of length 1000 for 20 Lanczos steps"):
        condition_number(A, null=torch.zeros(1000, 0), method=method, steps=20)
    assert not asked


class Wide(CallableOperator):
    """A diagonal operator."""

    def __init__(self, n: int) -> None:
        super().__init__(lambda v: torch.arange(1.0, n + 1) * v, n)


@pytest.mark.parametrize("method", ["svd", "", "DENSE", None])
def test_unknown_methods(method: str) -> None:
    for measure in (condition_number, magnitude_condition_number):
        words = "a word" if method is None else "one of"
        with pytest.raises(InvalidInputError, match=f"method must be {words}"):
            measure(DenseOperator(torch.eye(2)), method=method)  # type: ignore[operator]


@pytest.mark.parametrize("method", FACTORED)
def test_routes_that_need_a_factor(method: str) -> None:
    with pytest.raises(InvalidInputError, match=f"no factor, so {method} cannot run"):
        condition_number(DenseOperator(torch.eye(2)), method=method)
    with pytest.raises(InvalidInputError, match="semidefinite"):
        magnitude_condition_number(DenseOperator(torch.eye(2)), method=method)
