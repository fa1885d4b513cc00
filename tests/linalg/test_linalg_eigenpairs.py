"""`eigenpairs` finds the ends of a spectrum with their multiplicity, or says that it did not.

Bugs that only these tests catch: one copy of a repeated eigenvalue where there are five; "converged" while a residual
is not; a residual that is estimated, not measured, after the basis stopped being a Krylov space; null directions that
come back as eigenvectors; a search that never gives up; a start, given or proposed by the operator, that hides what it
is orthogonal to, is in other coordinates, or ends the search because it is zero.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linalg_problems import counting, interrupt
from scipy.sparse.linalg import eigsh
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, MemoryLimitError, NonFiniteError, NullSpaceError
from bnp_analysis.linalg import (
    CallableOperator,
    DenseOperator,
    DensePreconditioner,
    Eigenpairs,
    GramOperator,
    MatrixOperator,
    congruence,
    eigenpairs,
)
from bnp_analysis.linalg.derived import Restriction, Shifted
from bnp_analysis.runtime import memory as memory_module
from bnp_analysis.testing import random_orthogonal, spectrum, symmetric_with_spectrum

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
WHICH = pytest.mark.parametrize("which", ["largest", "smallest", "both"])


def expected(values: Tensor, k: int, which: str) -> Tensor:
    down = values.double().sort(descending=True).values
    if which == "largest":
        return down[:k]
    if which == "smallest":
        return down.flip(0)[:k]
    upper = (k + 1) // 2
    return torch.cat([down[:upper], down.flip(0)[: k - upper]])


def noise(found: Eigenpairs, values: Tensor, dtype: torch.dtype) -> float:
    return 20 * math.sqrt(values.numel()) * torch.finfo(dtype).eps * float(values.abs().max())


@DTYPES
@WHICH
@pytest.mark.parametrize("k", [1, 4, 7])
@pytest.mark.parametrize("n", [8, 40, 300])
def test_values_vectors_and_residuals(
    n: int, k: int, which: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    values = torch.randn(n, generator=generator, dtype=torch.float64)
    p = symmetric_with_spectrum(values, generator, dtype=dtype)
    found = eigenpairs(p.operator, k, which=which, max_matvecs=3000)
    assert (found.stop, found.converged) == ("converged", k)
    small = noise(found, values, dtype)
    torch.testing.assert_close(found.values, expected(values, k, which), atol=small, rtol=1e-6)
    V = found.vectors.double()
    assert float((V.T @ V - torch.eye(k)).abs().max()) <= 30 * torch.finfo(dtype).eps
    residuals = (p.operator.to_dense().double() @ V - V * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals, atol=small, rtol=1e-3)
    # Some eigenvalue lies within the residual of each value.
    assert bool(((found.values[:, None] - values).abs().min(dim=1).values <= found.residuals + small).all())


@pytest.mark.parametrize(("which", "copies"), [("largest", 2), ("smallest", 8), ("both", 3)])
def test_repeated_eigenvalues_come_with_all_their_copies(which: str, copies: int, generator: torch.Generator) -> None:
    inner = torch.linspace(1, 2, 150, dtype=torch.float64)
    values = torch.cat([torch.full((copies,), 0.5), inner, torch.full((copies,), 2.5)])
    p = symmetric_with_spectrum(values, generator)
    for seed in range(3):
        for k in (copies, copies + 1):
            found = eigenpairs(p.operator, k, which=which, seed=seed)
            assert found.stop == "converged"
            torch.testing.assert_close(found.values, expected(values, k, which), rtol=1e-6, atol=0)


@given(
    levels=st.lists(st.integers(-3, 3), min_size=1, max_size=120),
    k=st.integers(1, 9),
    which=st.sampled_from(["largest", "smallest", "both"]),
    seed=st.integers(0, 1000),
)
def test_few_levels_with_many_copies(levels: list[int], k: int, which: str, seed: int) -> None:
    """One start vector meets one copy of each level: at most seven of up to 120 eigenvectors."""
    values = torch.tensor(levels, dtype=torch.float64)
    k = min(k, len(levels))
    p = symmetric_with_spectrum(values, torch.Generator().manual_seed(seed))
    found = eigenpairs(p.operator, k, which=which, seed=seed)
    assert (found.stop, found.converged) == ("converged", k)
    torch.testing.assert_close(found.values, expected(values, k, which), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_agreement_with_scipy(which: str, generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("two-scale", 120, 30.0), generator)
    found = eigenpairs(p.operator, 5, which=which, tol=1e-10)
    side = {"largest": "LA", "smallest": "SA"}[which]
    theirs = eigsh(p.operator.to_scipy(), k=5, which=side, return_eigenvectors=False, v0=np.ones(120))
    np.testing.assert_allclose(found.values.sort().values.numpy(), np.sort(theirs), rtol=1e-9)


@WHICH
def test_null_directions_are_left_out(which: str, generator: torch.Generator) -> None:
    values = torch.cat([spectrum("log", 60, 50.0), torch.zeros(20)])
    p = symmetric_with_spectrum(values, generator)
    found = eigenpairs(p.operator, 4, which=which, null=p.null)
    torch.testing.assert_close(found.values, expected(values[:60], 4, which), rtol=1e-6, atol=0)
    assert float((p.null.T @ found.vectors).abs().max()) <= 1e-12
    with pytest.raises(NullSpaceError):
        eigenpairs(p.operator, 4, null=p.vectors[:, :1])
    everything = eigenpairs(p.operator, 60, null=p.null)
    torch.testing.assert_close(everything.values, values[:60], atol=1e-12, rtol=0)
    with pytest.raises(InvalidInputError, match="60 dimensions outside the null space"):
        eigenpairs(p.operator, 61, null=p.null)


def test_with_a_preconditioner(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 40, 1e3, rank=37), generator)
    P = DensePreconditioner(random_orthogonal(40, generator) * torch.linspace(1, 3, 40).double())
    found = eigenpairs(p.operator, 3, preconditioner=P, null=p.null)
    dense = torch.linalg.eigvalsh(congruence(p.operator, P).to_dense())
    torch.testing.assert_close(found.values, dense.flip(0)[:3], rtol=1e-6, atol=0)
    assert float((P.transport(p.null).T @ found.vectors).abs().max()) < 1e-12


@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_scale(scale: float, generator: torch.Generator) -> None:
    values = torch.cat([spectrum("log", 100, 100.0), torch.ones(3)])
    p = symmetric_with_spectrum(scale * values, generator)
    found = eigenpairs(p.operator, 5)
    assert found.stop == "converged"
    torch.testing.assert_close(found.values, scale * expected(values, 5, "largest"), rtol=1e-6, atol=0)


def test_the_zero_matrix_and_one_dimension() -> None:
    zero = eigenpairs(DenseOperator(torch.zeros(50, 50)), 3)
    assert (zero.values.tolist(), zero.stop) == ([0.0, 0.0, 0.0], "converged")
    one = eigenpairs(DenseOperator(torch.tensor([[-2.0]])), 1, which="smallest")
    assert (one.values.tolist(), one.residuals.tolist()) == ([-2.0], [0.0])


@pytest.mark.parametrize("seed", [33, 67])
def test_residuals_count_what_products_and_vectors_round_in_float32(seed: int) -> None:
    """`Q D Q^T` of two reflections in 20,000 dimensions: `4 eps |A|` beside the search's own residual was a third."""
    n, rank = 20_000, 3_000
    g = torch.Generator().manual_seed(seed)
    torch.rand(1, generator=g)
    values = torch.zeros(n)
    values[:rank] = (1 + 1e-4 * torch.randn(rank, generator=g, dtype=torch.float64)).float()
    U = torch.randn(n, 2, generator=g, dtype=torch.float64)
    U = (U / U.norm(dim=0)).float()

    def product(v: Tensor) -> Tensor:
        d, first, second = values.to(v.dtype)[:, None], *U.to(v.dtype).split(1, dim=1)
        v = v.view(n, -1)
        for u in (first, second):
            v = v - 2 * u * (u.T @ v)
        v = d * v
        for u in (second, first):
            v = v - 2 * u * (u.T @ v)
        return v

    A = CallableOperator(lambda v: product(v)[:, 0], n)
    found = eigenpairs(A, 3, which="smallest", seed=seed)
    vectors = found.vectors.double()
    assert bool(((product(vectors) - vectors * found.values).norm(dim=0) <= found.residuals).all())
    assert float(found.residuals.max()) <= 50 * A.eps


@pytest.mark.parametrize("budget", [1, 10, 40, 100])
def test_it_gives_up_and_says_so(budget: int, generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 500, 1e8), generator)
    A = counting(p.operator)
    found = eigenpairs(A, 3, which="smallest", max_matvecs=budget)
    assert found.stop == "steps"
    assert found.converged < 3
    assert f"{found.converged} of 3 converged" in str(found)
    assert found.matvecs == len(A.calls) <= max(budget, 3) + 3
    residuals = (p.operator @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-6, atol=1e-14)


def test_unconfirmed_multiplicity_is_not_called_converged(generator: torch.Generator) -> None:
    values = torch.cat([torch.linspace(0, 1, 200), torch.full((4,), 3.0)])
    p = symmetric_with_spectrum(values, generator)
    whole = eigenpairs(p.operator, 4)
    assert whole.values.tolist() == pytest.approx([3.0] * 4)
    for budget in range(12, whole.matvecs, 5):
        found = eigenpairs(p.operator, 4, max_matvecs=budget)
        assert found.stop == "steps" or found.values.tolist() == pytest.approx([3.0] * 4)


def test_a_bound_of_the_rounding_does_not_end_the_search(generator: torch.Generator) -> None:
    """Products may be far better than they are certain to be: what was asked for is reached, and said no better."""
    values = spectrum("log", 300, 1e3)
    A = CallableOperator(lambda v: values.float() * v, 300, dtype=torch.float32, eps=3e-6)
    found = eigenpairs(A, 10, tol=1e-4)
    exact = (values[:, None] * found.vectors.double() - found.vectors.double() * found.values).norm(dim=0)
    asked = 1e-4 * found.values
    assert A.eps * 10 * math.sqrt(300) > 2e-4, "the bound alone would explain more than was asked for"
    assert bool((exact <= 1.01 * asked).all())
    assert bool((found.residuals >= exact).all())
    assert found.stop == "converged"


@pytest.mark.parametrize("seed", [7, 8, 14, 31])
@pytest.mark.parametrize(
    ("low", "eps"),
    [(torch.float32, 2.0**-22), (torch.float16, 2.0**-10), (torch.bfloat16, 2.0**-7)],
    ids=["float32", "float16", "bfloat16"],
)
def test_what_counts_as_rounding_is_in_the_residuals(low: torch.dtype, eps: float, seed: int) -> None:
    """Products as coarse as they say: residuals that the search let go as rounding are no zeros."""
    g = torch.Generator().manual_seed(seed)
    rank = 2 + seed % 30
    n = rank + 25 + seed % 17
    values = torch.zeros(n, dtype=torch.float64)
    values[:rank] = spectrum("log", rank, 10.0 ** (1 + seed % 5))
    Q = random_orthogonal(n, g)
    M = Q * values @ Q.T
    A = CallableOperator(lambda v: (M @ v.to(low).double()).to(low).float(), n, dtype=torch.float32, eps=eps)
    found = eigenpairs(A, 3, tol=1e-4)
    X = found.vectors.double()
    assert bool(((M @ X - X * found.values).norm(dim=0) <= found.residuals).all())


@pytest.mark.parametrize("kappa", [1e2, 1e6])
def test_at_the_last_digits_residuals_are_still_bounds(kappa: float) -> None:
    """There the products contradict one another by more than what is left of the residuals."""
    values = spectrum("log", 2000, kappa)
    found = eigenpairs(CallableOperator(lambda v: values * v, 2000, dtype=torch.float64), 4, tol=1e-14)
    exact = ((values[:, None] - found.values) * found.vectors).norm(dim=0)
    assert found.stop == "converged"
    assert bool((exact <= found.residuals).all())
    assert float(found.residuals.max()) < 10 * math.sqrt(1000) * 2.0**-52, "what counts as converged"


def test_every_product_is_counted(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 90, 100.0, rank=80), generator)
    for null in (None, p.null):
        A = counting(p.operator)
        assert eigenpairs(A, 3, null=null).matvecs == len(A.calls)


def test_an_interrupt_keeps_what_is_there(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 200, 1e6), generator)
    A = counting(p.operator, dict.fromkeys(range(35, 500), interrupt))
    found = eigenpairs(A, 3)
    assert (found.stop, found.matvecs) == ("interrupted", 34)
    residuals = (p.operator @ found.vectors - found.vectors * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, residuals, rtol=1e-6, atol=1e-13)
    with pytest.raises(KeyboardInterrupt):
        eigenpairs(counting(p.operator, {2: interrupt}), 3)


def test_a_second_interrupt_ends_the_search_at_once(generator: torch.Generator) -> None:
    def ask(times: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def product(v: torch.Tensor) -> torch.Tensor:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
            return v

        return product

    A = symmetric_with_spectrum(spectrum("log", 200, 1e6), generator).operator
    assert eigenpairs(counting(A, {35: ask(1)}), 3).stop == "interrupted"
    with pytest.raises(KeyboardInterrupt):
        eigenpairs(counting(A, {35: ask(2)}), 3)


def test_refusals(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 30, 10.0), generator)
    asked = "eigenpairs asked of an operator with 30 dimensions"
    for k, words in ((0, "k must be positive"), (-1, "k must be positive"), (31, asked)):
        with pytest.raises(InvalidInputError, match=words):
            eigenpairs(p.operator, k)
    with pytest.raises(InvalidInputError, match="which must be one of"):
        eigenpairs(p.operator, 1, which="LM")
    with pytest.raises(InvalidInputError, match=r"bnp.DenseOperator\(matrix\)"):
        eigenpairs(p.operator.to_dense(), 1)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="product 4 "):
        eigenpairs(counting(p.operator, {4: lambda v: v / 0}), 2)
    monkeypatch.setattr(memory_module, "available_memory", lambda *_: 1000)
    with pytest.raises(MemoryLimitError, match="basis of"):
        eigenpairs(p.operator, 2)


def test_progress_and_records(tmp_path: Path, generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 60, 10.0), generator)
    seen: list[tuple[int, int]] = []
    found = eigenpairs(p.operator, 2, max_matvecs=99, progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1))
    assert {total for _, total in seen} == {99}
    assert [row["eigenvalue"] for row in found.records()] == found.values.tolist()
    assert str(found).startswith("largest eigenvalues 1 +- ")
    loaded = Eigenpairs.load(found.save(tmp_path / "pairs.json"))
    assert loaded == found
    assert torch.equal(loaded.vectors, found.vectors)
    assert found == eigenpairs(p.operator, 2, max_matvecs=99)
    assert found != eigenpairs(p.operator, 2, max_matvecs=99, seed=1)


def test_a_start_saves_products_and_hides_nothing(generator: torch.Generator) -> None:
    """An eigenvector as a start: of the value wanted, it ends the search; of another one, it must not."""
    p = symmetric_with_spectrum(spectrum("log", 200, 1e4), generator)
    values, vectors = torch.linalg.eigh(p.operator.to_dense())
    plain = eigenpairs(p.operator, 1, tol=1e-8)
    near = eigenpairs(p.operator, 1, tol=1e-8, start=vectors[:, -1] + 1e-3 * vectors[:, 0])
    far = eigenpairs(p.operator, 1, tol=1e-8, start=vectors[:, 3])
    for found in (plain, near, far):
        assert found.stop == "converged"
        assert found.values.item() == pytest.approx(float(values[-1]), rel=1e-8)
    assert near.matvecs < plain.matvecs
    assert near.settings["start"] == "given, and random"


class _Proposing(DenseOperator):
    """A matrix that proposes a start."""

    def __init__(self, matrix: torch.Tensor, proposal: torch.Tensor) -> None:
        super().__init__(matrix)
        self._proposal = proposal

    @property
    def start(self) -> torch.Tensor:
        return self._proposal


def test_what_an_operator_proposes_is_used_where_it_can_be(generator: torch.Generator) -> None:
    """For the largest values only; zero, not finite or inside the null space it is no start, and no error either."""
    p = symmetric_with_spectrum(spectrum("log", 200, 1e4, rank=190), generator)
    values, vectors = torch.linalg.eigh(p.operator.to_dense())
    A = _Proposing(p.operator.to_dense(), vectors[:, -1] + 1e-3 * vectors[:, 20])
    found, plain = (eigenpairs(A, 1, null=p.null, start=how) for how in ("auto", "random"))
    assert found.matvecs < plain.matvecs
    assert found.settings["start"] == "what the operator proposes, and random"
    assert found.values.item() == pytest.approx(float(values[-1]), rel=1e-5)
    assert eigenpairs(A, 1, null=p.null, which="smallest", max_matvecs=9).settings["start"] == "random"
    for proposal in (0 * A.start, A.start / 0, p.null[:, 0]):
        other = eigenpairs(_Proposing(p.operator.to_dense(), proposal), 1, null=p.null)
        assert (other.settings["start"], other.matvecs) == ("random", plain.matvecs)
    with pytest.raises(InvalidInputError, match="start must be 'auto', 'random' or a tensor"):
        eigenpairs(A, 1, start="gradient")


def test_a_proposal_is_in_the_coordinates_of_what_is_made_of_the_operator(generator: torch.Generator) -> None:
    n = 12
    M, P = torch.randn(2, n, n, generator=generator, dtype=torch.float64)
    g = torch.randn(n, generator=generator, dtype=torch.float64)
    A, places = _Proposing(M.T @ M, g), torch.tensor([7, 2, 3])
    made = (congruence(A, DensePreconditioner(P)), Shifted(A, 2.0), Restriction(A, places))
    for B, expected in zip(made, (P.T @ g, g, g[places]), strict=True):
        assert B.start is not None
        torch.testing.assert_close(B.start, expected)
    assert Shifted(DenseOperator(M.T @ M), 2.0).start is None
    assert congruence(DenseOperator(M.T @ M), DensePreconditioner(P)).start is None
    assert Restriction(DenseOperator(M.T @ M), places).start is None


def test_a_start_of_no_use_is_refused(tmp_path: Path, generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 30, 1e2, rank=27), generator)
    ones = torch.ones(30, dtype=torch.float64)
    for start, words in (
        (torch.ones(29, dtype=torch.float64), r"start must be 'auto', 'random' or a tensor \(30,\), got \(29,\)"),
        (torch.ones(30), "start is in torch.float32"),
        (0 * ones, "zero, not finite or a null direction"),
        (ones / 0, "zero, not finite or a null direction"),
        (p.null[:, 0], "zero, not finite or a null direction"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            eigenpairs(p.operator, 2, null=p.null, start=start)
    eigenpairs(p.operator, 2, checkpoint=tmp_path / "run.pt")
    with pytest.raises(InvalidInputError, match="another run"):
        eigenpairs(p.operator, 2, start=ones, checkpoint=tmp_path / "run.pt")


@DTYPES
@pytest.mark.parametrize("k", [1, 3])
def test_a_search_goes_on_from_the_vectors_of_one_nearby(
    k: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Residuals follow from several open ones; here they are measured."""
    values = torch.cat([torch.tensor([9.0, 8.5, 8.0, 5.0]), torch.rand(76, generator=generator) - 0.5]).double()
    p = symmetric_with_spectrum(values, generator, dtype=dtype)
    moved = 0.01 * torch.randn(80, 80, generator=generator, dtype=torch.float64).to(dtype)
    A = DenseOperator(p.operator.to_dense() + moved + moved.T)
    exact = torch.linalg.eigvalsh(A.to_dense().double()).flip(0)[:k]
    start = p.vectors[:, :k].contiguous()
    warm = eigenpairs(A, k, start=start, tol=2e-2, multiplicity="trust", max_matvecs=60)
    cold = eigenpairs(A, k, start="random", tol=2e-2)
    assert (warm.stop, warm.converged) == ("converged", k)
    assert warm.matvecs < cold.matvecs
    assert bool(((warm.values - exact).abs() <= warm.residuals + 1e-5).all())
    measured = (A @ warm.vectors - warm.vectors * warm.values.to(dtype)).double().norm(dim=0)
    torch.testing.assert_close(warm.residuals, measured, atol=1e-4 if dtype == torch.float32 else 1e-12, rtol=1e-3)
    fine = eigenpairs(A, k, start=start, tol=1e-5, max_matvecs=300)
    torch.testing.assert_close(fine.values, exact, atol=1e-3, rtol=1e-5)


def test_several_starts_hide_nothing_and_may_be_dependent(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(torch.arange(40.0, dtype=torch.float64), generator)
    wrong = p.vectors[:, [3, 4, 3, 5]].contiguous()  # orthogonal to what is wanted, one of them twice
    found = eigenpairs(p.operator, 2, start=wrong, tol=1e-8, max_matvecs=400)
    torch.testing.assert_close(found.values, torch.tensor([39.0, 38.0], dtype=torch.float64))
    restarted = eigenpairs(p.operator, 2, start=p.vectors[:, -2:].contiguous(), null=p.vectors[:, :1].contiguous())
    torch.testing.assert_close(restarted.values, torch.tensor([39.0, 38.0], dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="zero, not finite or a null direction"):
        eigenpairs(p.operator, 2, start=torch.zeros(40, 2, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match=r"several are \(40, b\)"):
        eigenpairs(p.operator, 2, start=torch.ones(3, 2, dtype=torch.float64))


@pytest.mark.parametrize("through_factor", [True, False])
def test_residuals_count_what_a_preconditioner_amplifies(through_factor: bool, generator: torch.Generator) -> None:
    """Inputs of mean 100 and deviation 1, normalized by `P`: a product in float32 loses what `P` cancels."""
    h = 100 + torch.randn(200, 5, generator=generator, dtype=torch.float64)
    rows = torch.cat([torch.ones(200, 1, dtype=torch.float64), h], dim=1).float() / 16
    A = GramOperator(MatrixOperator(rows)) if through_factor else DenseOperator(rows.T @ rows)
    P = torch.eye(6)
    P[0, 1:] = -100.0
    found = eigenpairs(A, 3, preconditioner=DensePreconditioner(P))
    M = rows.double().T @ rows.double() if through_factor else (rows.T @ rows).double()
    exact = P.double().T @ M @ P.double()
    vectors = found.vectors.double()
    true = (exact @ vectors - vectors * found.values).norm(dim=0)
    assert float(true.max()) > 10 * torch.finfo(torch.float32).eps * float(found.values[0]), "or nothing was amplified"
    assert bool((true <= found.residuals).all())
    if through_factor:
        assert float(found.residuals.max()) < 0.1 * float(found.values.min()), "a bound that says something"
