"""The Lanczos process leaves what it promises: a decomposition, an orthonormal basis, true eigenvalues.

Bugs that only these tests catch: a lost second pass of Gram-Schmidt; a breakdown test that is absolute, so
that a small matrix loses eigenvalues; null directions taken out of the operator in place of the basis;
copies of a repeated eigenvalue that never appear, or appear twice; a resumed run that differs from an
uninterrupted one; an interrupt that leaves a half-finished step; NaN that ends up in a Ritz value.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from linalg_problems import counting, interrupt
from scipy.sparse.linalg import eigsh
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, MemoryLimitError, NonFiniteError
from bnp_analysis.linalg import CallableOperator, DenseOperator, SymmetricOperator, Tridiagonalization, lanczos
from bnp_analysis.runtime import memory as memory_module
from bnp_analysis.testing import KINDS, PrescribedOperator, spectrum, symmetric_with_spectrum

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def problem(
    kind: str, n: int, kappa: float, g: torch.Generator, *, rank: int | None = None, dtype: torch.dtype = torch.float64
) -> PrescribedOperator:
    values = spectrum(kind, n, 1.0 if kind == "flat" else kappa, rank=rank)
    return symmetric_with_spectrum(values, g, dtype=dtype)


def defect(A: SymmetricOperator, run: Tridiagonalization) -> float:
    """`|A Q - Q T - r e_k^T|`."""
    T = torch.as_tensor(np.diag(run.alpha) + np.diag(run.beta, 1) + np.diag(run.beta, -1))
    basis = run.basis.double()
    gap = (A @ run.basis).double() - basis @ T
    gap[:, -1] -= run.residual.double()
    return float(gap.norm())


def loss_of_orthogonality(basis: Tensor) -> float:
    Q = basis.double()
    return float((Q.T @ Q - torch.eye(Q.shape[1])).abs().max())


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 7, 60])
def test_decomposition_and_orthogonality(kind: str, steps: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    p = problem(kind, 80, 1e6, generator, rank=70, dtype=dtype)
    eps = torch.finfo(dtype).eps
    for restart in (False, True):
        run = lanczos(p.operator, steps, seed=3, restart=restart)
        assert defect(p.operator, run) <= 100 * math.sqrt(80) * eps
        assert loss_of_orthogonality(run.basis) <= 20 * eps
        assert run.matvecs == len(run.alpha) <= steps
        assert len(run.beta) == len(run.alpha) - 1
        assert run.residual_norm == 0.0 or abs(run.basis.T @ run.residual).max() <= 20 * eps * run.residual_norm + eps
        if restart:
            assert len(run.alpha) == steps


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
def test_a_full_run_finds_every_eigenvalue_with_its_multiplicity(
    kind: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    p = problem(kind, 30, 1e4, generator, rank=24, dtype=dtype)
    run = lanczos(p.operator, 30, restart=True)
    assert run.stop == "exhausted"
    assert run.residual_norm == 0.0
    found, residuals = run.ritz()
    tolerance = 30 * torch.finfo(dtype).eps
    np.testing.assert_allclose(found, p.values.flip(0).numpy(), atol=tolerance, rtol=0)
    assert residuals.max() == 0.0
    vectors = run.ritz_vectors()
    image = (p.operator @ vectors).double() - vectors.double() * torch.as_tensor(found)
    assert float(image.norm(dim=0).max()) <= 10 * tolerance


def test_without_restart_it_stops_when_the_space_is_invariant(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(torch.tensor([3.0] * 5 + [1.0] * 4 + [0.0] * 3), generator)
    run = lanczos(p.operator, 12)
    assert (run.stop, len(run.alpha)) == ("invariant subspace", 3)
    assert run.residual_norm <= 1e-14
    np.testing.assert_allclose(run.ritz()[0], [0, 1, 3], atol=1e-13)
    again = lanczos(p.operator, 12, resume=run)
    assert (again.stop, again.matvecs) == ("invariant subspace", 3)


def test_residuals_are_true_where_a_run_ends_by_what_may_be_rounding() -> None:
    """Eigenvalues within 1e-4 of one another, in float32 and 20,000 dimensions: residuals were stated as 0."""
    values = 1 + 1e-4 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    run = lanczos(CallableOperator(lambda v: values * v, 20_000), 20)
    assert run.stop == "invariant subspace"
    vectors = run.ritz_vectors().double()
    true = values.double()[:, None] * vectors - vectors * torch.from_numpy(run.ritz()[0])
    np.testing.assert_allclose(run.ritz()[1], true.norm(dim=0).numpy(), rtol=1e-2)


@pytest.mark.parametrize("exponent", [-330, -46, -1, 46, 330])
@pytest.mark.parametrize("kind", [*KINDS, "three values"])
def test_a_scaled_matrix_has_scaled_ritz_values(exponent: int, kind: str, generator: torch.Generator) -> None:
    """An absolute breakdown test returned one of five eigenvalues of 1e-14 A, 64 % too low."""
    if kind == "three values":
        A = symmetric_with_spectrum(torch.tensor([2.0] * 9 + [1.0] * 9 + [0.5] * 9), generator).operator
    else:
        A = problem(kind, 40, 1e4, generator, rank=35).operator
    plain, scaled = (lanczos(DenseOperator(s * A.to_dense()), 25, seed=1) for s in (1.0, 2.0**exponent))
    assert (scaled.stop, scaled.matvecs) == (plain.stop, plain.matvecs)
    # A power of two commutes with rounding: equal to the last bit.
    assert (scaled.alpha * 2.0**-exponent).tolist() == plain.alpha.tolist()
    assert (scaled.beta * 2.0**-exponent).tolist() == plain.beta.tolist()


@pytest.mark.parametrize("scale", [1e-14, 1e14])
@pytest.mark.parametrize("kind", KINDS)
def test_all_eigenvalues_of_a_scaled_matrix(scale: float, kind: str, generator: torch.Generator) -> None:
    p = problem(kind, 25, 1e4, generator, rank=20)
    for restart in (True, False):
        found = lanczos(DenseOperator(scale * p.operator.to_dense()), 25, restart=restart).ritz()[0] / scale
        assert found[-1] == pytest.approx(1.0, rel=1e-12)
        assert found[found > 1e-10].min() == pytest.approx(1 / p.kappa, rel=1e-9)
        if restart:
            np.testing.assert_allclose(found, p.values.flip(0).numpy(), atol=1e-14)


def test_scale_in_float32(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(torch.tensor([2.0] * 9 + [1.0] * 9), generator, dtype=torch.float32)
    runs = [lanczos(DenseOperator(s * p.operator.to_dense()), 18, seed=1) for s in (1.0, 1e-14, 1e14)]
    assert {(run.stop, run.matvecs) for run in runs} == {("invariant subspace", 2)}


@DTYPES
def test_one_dimension(dtype: torch.dtype) -> None:
    run = lanczos(DenseOperator(torch.tensor([[-3.0]], dtype=dtype)), 5)
    assert (run.ritz()[0].tolist(), run.stop, run.residual_norm) == ([-3.0], "exhausted", 0.0)


def test_the_zero_matrix() -> None:
    zero = DenseOperator(torch.zeros(4, 4))
    assert lanczos(zero, 4).ritz()[0].tolist() == [0.0]
    assert lanczos(zero, 4, restart=True).ritz()[0].tolist() == [0.0] * 4


@pytest.mark.parametrize("which", ["LA", "SA", "LM"])
def test_eigenvalues_equal_those_of_scipy(which: str, generator: torch.Generator) -> None:
    values = torch.cat([spectrum("log", 40, 1e3), -spectrum("log", 20, 50.0)])
    p = symmetric_with_spectrum(values, generator)
    found = lanczos(p.operator, 60).ritz()[0]
    start = np.ones(60)
    expected = np.sort(eigsh(p.operator.to_scipy(), k=5, which=which, return_eigenvectors=False, v0=start, tol=1e-12))
    ours = {"LA": found[-5:], "SA": found[:5], "LM": np.sort(found[np.argsort(-np.abs(found))[:5]])}[which]
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    np.testing.assert_allclose(found, torch.linalg.eigvalsh(p.operator.to_dense()).numpy(), atol=1e-13)


def test_null_directions_stay_out_of_the_basis(generator: torch.Generator) -> None:
    """With the projection in the operator the smallest Ritz value was 1e-18 in place of 1e-3."""
    p = problem("log", 120, 1e3, generator, rank=100)
    null = p.null
    kept = lanczos(p.operator, 100, null=null)
    assert kept.stop == "exhausted"
    assert kept.ritz()[0][0] == pytest.approx(1e-3, rel=1e-9)
    assert float((null.T @ kept.basis).abs().max()) <= 1e-14

    def project(v: Tensor) -> Tensor:
        return v - null @ (null.T @ v)

    projected = CallableOperator(lambda v: project(p.operator @ project(v)), 120, dtype=torch.float64)
    start = project(torch.randn(120, dtype=torch.float64, generator=generator))
    leaked = lanczos(projected, 110, start=start).ritz()[0][0]
    assert leaked < 1e-12, "the difficulty is gone: this test shows nothing any more"


def test_null_directions_shorten_the_run(generator: torch.Generator) -> None:
    p = problem("log", 10, 10.0, generator, rank=6)
    assert len(lanczos(p.operator, 10, null=p.null).alpha) == 6
    with pytest.raises(InvalidInputError, match="at least one step"):
        lanczos(p.operator, 5, null=torch.eye(10, dtype=torch.float64))


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("cut", [1, 3, 6, 17, 20])
def test_a_resumed_run_equals_an_uninterrupted_one(restart: bool, cut: int, generator: torch.Generator) -> None:
    kind = "repeated" if restart else "log"
    p = problem(kind, 20, 1e3, generator)
    whole = lanczos(p.operator, 20, seed=5, restart=restart)
    part = lanczos(p.operator, cut, seed=5, restart=restart)
    assert len(part.alpha) == cut
    resumed = lanczos(p.operator, 20, seed=5, restart=restart, resume=part)
    np.testing.assert_allclose(resumed.alpha, whole.alpha, atol=1e-12)
    np.testing.assert_allclose(resumed.beta, whole.beta, atol=1e-12)
    assert (resumed.stop, resumed.matvecs) == (whole.stop, whole.matvecs)
    assert loss_of_orthogonality(resumed.basis) <= 1e-14
    assert defect(p.operator, resumed) <= 1e-13


@pytest.mark.parametrize("scale", [1.0, 2.0**-700])
def test_a_run_that_is_longer_already_comes_back_whole(scale: float, generator: torch.Generator) -> None:
    A = counting(DenseOperator(scale * problem("log", 20, 1e3, generator).operator.to_dense()))
    whole = lanczos(A, 8, seed=5)
    again = lanczos(A, 5, resume=whole)
    np.testing.assert_array_equal(again.alpha, whole.alpha)
    np.testing.assert_array_equal(again.beta, whole.beta)
    assert torch.equal(again.basis, whole.basis)
    assert again.matvecs == whole.matvecs == 8


def test_a_restart_does_not_draw_the_start_vector_again(generator: torch.Generator) -> None:
    """A start drawn outside from the same seed lies in the basis: drawn again, only rounding would be left of it."""
    p = problem("repeated", 9, 4.0, generator)
    start = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    run = lanczos(p.operator, 9, start=start, seed=0, restart=True)
    np.testing.assert_allclose(run.ritz()[0], p.values.flip(0).numpy(), atol=1e-13)


def test_a_run_of_another_operator_is_not_resumed(generator: torch.Generator) -> None:
    run = lanczos(problem("log", 8, 10.0, generator).operator, 3)
    with pytest.raises(InvalidInputError, match="length 8"):
        lanczos(problem("log", 9, 10.0, generator).operator, 5, resume=run)
    with pytest.raises(InvalidInputError, match="float64"):
        lanczos(problem("log", 8, 10.0, generator, dtype=torch.float32).operator, 5, resume=run)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("product", [2, 5, 11])
def test_an_interrupt_keeps_what_is_there(product: int, restart: bool, generator: torch.Generator) -> None:
    p = problem("repeated" if restart else "log", 20, 1e3, generator)
    broken = counting(p.operator, {product: interrupt})
    run = lanczos(broken, 20, seed=5, restart=restart)
    assert (run.stop, run.matvecs, len(run.alpha)) == ("interrupted", product - 1, product - 1)
    assert defect(p.operator, run) <= 1e-13
    values, residuals = run.ritz()
    nearest = (torch.as_tensor(values)[:, None] - p.values).abs().min(dim=1).values.numpy()
    assert np.all(nearest <= residuals + 1e-13)
    whole = lanczos(p.operator, 20, seed=5, restart=restart)
    resumed = lanczos(broken, 20, seed=5, restart=restart, resume=run)
    np.testing.assert_allclose(resumed.ritz()[0], whole.ritz()[0], atol=1e-12)


def test_an_interrupt_before_anything_is_an_interrupt(generator: torch.Generator) -> None:
    with pytest.raises(KeyboardInterrupt):
        lanczos(counting(problem("log", 9, 10.0, generator).operator, {1: interrupt}), 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_product_that_is_not_finite_is_named(bad: float, everywhere: bool, generator: torch.Generator) -> None:
    def spoil(v: Tensor) -> Tensor:
        v[slice(None) if everywhere else 4] = bad
        return v

    with pytest.raises(NonFiniteError, match="product 3 "):
        lanczos(counting(problem("log", 9, 10.0, generator).operator, {3: spoil}), 5)


def test_progress_and_until(generator: torch.Generator) -> None:
    A = problem("log", 30, 10.0, generator).operator
    seen: list[tuple[int, int]] = []
    lanczos(A, 4, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    sizes: list[int] = []

    def enough(run: Tridiagonalization) -> bool:
        assert defect(A, run) <= 1e-13
        sizes.append(len(run.alpha))
        return len(run.alpha) == 15

    assert lanczos(A, 30, until=enough).stop == "converged"
    assert sizes == [5, 10, 15]
    lanczos(A, 2, progress=True)


def test_memory_is_checked_before_the_first_product(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    A = counting(problem("log", 50, 10.0, generator).operator)
    monkeypatch.setattr(memory_module, "available_memory", lambda *_: 50 * 8 * 11 - 1)
    with pytest.raises(MemoryLimitError, match="Lanczos basis of 10 vectors of length 50"):
        lanczos(A, 10)
    assert A.calls == []
    assert len(lanczos(A, 9).alpha) == 9


@pytest.mark.parametrize(
    "start",
    [
        torch.zeros(6, dtype=torch.float64),
        torch.full((6,), math.nan, dtype=torch.float64),
        torch.full((6,), math.inf, dtype=torch.float64),
        torch.ones(5, dtype=torch.float64),
        torch.ones(6, 1, dtype=torch.float64),
        torch.ones(6),
    ],
    ids=["zero", "nan", "inf", "short", "block", "float32"],
)
def test_a_start_that_cannot_start_is_refused(start: Tensor, generator: torch.Generator) -> None:
    with pytest.raises(InvalidInputError, match="start vector"):
        lanczos(problem("log", 6, 10.0, generator).operator, 3, start=start)


def test_a_start_inside_the_null_space_is_refused(generator: torch.Generator) -> None:
    p = problem("log", 6, 10.0, generator, rank=4)
    with pytest.raises(InvalidInputError, match="null space"):
        lanczos(p.operator, 3, start=p.null[:, 0] * 7, null=p.null)


def test_the_length_of_the_start_does_not_matter(generator: torch.Generator) -> None:
    p = problem("log", 6, 10.0, generator)
    start = torch.randn(6, dtype=torch.float64, generator=generator)
    runs = [lanczos(p.operator, 4, start=s * start).ritz()[0] for s in (1.0, 1e-200, 1e200)]
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-10)
    np.testing.assert_allclose(runs[2], runs[0], rtol=1e-10)


@pytest.mark.parametrize("seed", [True, 1.0, "0", None])
def test_a_seed_is_an_integer(seed: object, generator: torch.Generator) -> None:
    with pytest.raises(InvalidInputError, match="seed"):
        lanczos(problem("log", 6, 10.0, generator).operator, 3, seed=seed)  # type: ignore[arg-type]


def test_runs_depend_on_their_seed_alone(generator: torch.Generator) -> None:
    p = problem("repeated", 12, 10.0, generator)
    before = torch.get_rng_state()
    runs = [lanczos(p.operator, 12, seed=s, restart=True) for s in (4, 4, -5)]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0].alpha.tolist() == runs[1].alpha.tolist()
    assert torch.equal(runs[0].basis, runs[1].basis)
    assert not torch.equal(runs[0].basis, runs[2].basis)


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_must_be_positive(steps: int, generator: torch.Generator) -> None:
    with pytest.raises(InvalidInputError, match="steps must be positive"):
        lanczos(problem("log", 6, 10.0, generator).operator, steps)
