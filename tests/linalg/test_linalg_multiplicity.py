"""Searches and densities that save products: what they must not lose.

Bugs that only these tests catch: a look for further copies that is too short, or that is made where nothing can be
missed; a search that spends more products than its Krylov space needs; residuals that follow from products which
contradict one another; ghosts that distort a density; a recurrence that leaves the complement of the null space.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from linalg_problems import counting
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg import CallableOperator, DenseOperator, eigenpairs, lanczos, spectral_density
from bnp_analysis.linalg.krylov.lanczos import three_term
from bnp_analysis.linalg.krylov.thick_restart import products_that_show
from bnp_analysis.testing import symmetric_with_spectrum


def diagonal(values: Tensor) -> CallableOperator:
    return CallableOperator(lambda v: values * v, values.numel(), dtype=values.dtype)


def separated(n: int, copies: int) -> Tensor:
    """A bulk in [-1, 1] and five outliers, the second largest `copies`-fold."""
    outliers = [9.0, *[7.0] * copies, 5.0, 4.0, 3.0]
    return torch.cat([torch.linspace(-1, 1, n - len(outliers)), torch.tensor(outliers)]).double()


@pytest.mark.parametrize("copies", [2, 3])
def test_a_check_finds_what_trust_misses(copies: int) -> None:
    A = diagonal(separated(4000, copies))
    wanted = [9.0, *[7.0] * copies, 5.0, 4.0][: 3 + copies]
    trusting = 0
    for seed in range(4):
        found = eigenpairs(A, len(wanted), tol=1e-4, seed=seed)
        assert found.values.tolist() == pytest.approx(wanted, rel=1e-4)
        trusted = eigenpairs(A, len(wanted), tol=1e-4, seed=seed, multiplicity="trust")
        assert (trusted.stop, trusted.converged) == ("converged", len(wanted))
        trusting += trusted.values.tolist() == pytest.approx(wanted, rel=1e-4)
    assert trusting == 0, "this problem does not tell one from the other"
    with pytest.raises(InvalidInputError, match="multiplicity"):
        eigenpairs(A, 2, multiplicity="maybe")


@given(gap=st.floats(0.05, 5.0), seed=st.integers(0, 10**6), below=st.floats(0.01, 0.9))
def test_the_length_of_a_check_is_enough(gap: float, seed: int, below: float) -> None:
    """A copy at `1 + gap` above a bulk in [-1, 1]: after so many steps a random direction shows it."""
    n, last = 300, 1 + below * gap
    bulk = np.linspace(-1, 1, n - 1)
    steps = products_that_show(np.array([1 + gap, last]), bulk, bulk, n, 1e-6, 1e-12)
    values = torch.cat([torch.as_tensor(bulk), torch.tensor([1 + gap], dtype=torch.float64)])
    run = lanczos(diagonal(values), int(steps), seed=seed)
    assert run.ritz()[0][-1] > last
    longer = products_that_show(np.array([1 + gap / 2, 1 + below * gap / 2]), bulk, bulk, n, 1e-6, 1e-12)
    assert longer >= steps


def test_where_no_check_is_needed_or_none_is_long_enough() -> None:
    bulk = np.array([0.0, 1.0])
    assert products_that_show(np.array([2.0]), bulk, bulk, 100, 1e-6, 0.0) == 0
    assert products_that_show(np.array([0.5, 0.4]), bulk, bulk, 100, 1e-6, 0.0) == float("inf")
    assert products_that_show(np.array([2.0, 1.5]), bulk[:0], bulk[:0], 100, 1e-6, 0.0) == float("inf")
    assert products_that_show(np.array([0.0, 0.0]), -bulk - 1, -bulk - 1, 100, 1e-6, 0.0) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_no_more_products_than_the_krylov_space_needs(dtype: torch.dtype) -> None:
    """The same start without restarts is the best that one vector can do."""
    values = torch.cat([torch.linspace(-1, 1, 5000), torch.linspace(2, 12, 10)]).to(dtype)
    for k in (1, 10):
        A = diagonal(values)
        found = eigenpairs(A, k, tol=1e-3, seed=3)
        run = lanczos(A, 60, seed=3)
        best = next(
            m
            for m in range(k, 60)
            if _settled(run.alpha[:m], run.beta[: m - 1], run.beta[m - 1], k)
        )  # fmt: skip
        assert best <= found.matvecs <= best + (0 if k == 1 else 10) + 2
        rows = found.vectors.double().T
        measured = (values.double() * rows - found.values[:, None] * rows).norm(dim=1)
        rounded = math.sqrt(1000) * torch.finfo(dtype).eps * 12  # of products in general; these are exact
        assert bool((measured <= found.residuals).all())
        assert bool((found.residuals <= 1.02 * measured + rounded).all())
        assert bool((measured <= 1e-3 * found.values).all())


def _settled(alpha: np.ndarray, beta: np.ndarray, following: float, k: int) -> bool:
    values, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1))
    return bool((np.abs(vectors[-1, -k:]) * following <= 1e-3 * values[-k:]).all())


def test_products_that_contradict_one_another_are_found_out() -> None:
    """A noise of 1e-5 in every product: the residuals are measured, and the pairs not called converged."""
    values, g = separated(500, 1), torch.Generator().manual_seed(0)

    def product(v: Tensor) -> Tensor:
        return values * v + 1e-5 * torch.randn(500, generator=g).double()

    # Said to be precise: else the noise is found out before the search.
    A = CallableOperator(product, 500, dtype=torch.float64, eps=torch.finfo(torch.float64).eps)
    A_counted = counting(A)
    found = eigenpairs(A_counted, 3, tol=1e-8, max_matvecs=120)
    assert found.matvecs == len(A_counted.calls)
    assert found.stop in ("rounding", "steps")
    assert found.converged == 0
    assert float(found.residuals.min()) > 1e-6


def test_ghosts_share_the_weight_of_their_eigenvalue() -> None:
    values = torch.cat([torch.logspace(-6, 0, 300), torch.tensor([30.0, 50.0, 100.0])]).double()
    A = diagonal(values)
    settings = {"probes": 2, "steps": 150, "seed": 4, "width": 0.5}
    ghosts, whole = (spectral_density(A, reorthogonalize=flag, **settings) for flag in (False, True))
    assert (ghosts.nodes[0] > 99.9).sum() > 1 == (whole.nodes[0] > 99.9).sum()
    np.testing.assert_allclose(ghosts.density, whole.density, rtol=1e-3, atol=1e-9)
    for low, high in ((99.0, 101.0), (40.0, 60.0), (-1.0, 2.0)):
        assert ghosts.mass(low, high)[0] == pytest.approx(whole.mass(low, high)[0], abs=1e-10)
    assert ghosts.matvecs == whole.matvecs
    assert not ghosts.settings["reorthogonalize"]


def test_the_recurrence_stays_outside_the_null_space(generator: torch.Generator) -> None:
    values = torch.cat([torch.linspace(5, 6, 100), torch.zeros(3)]).double()
    p = symmetric_with_spectrum(values, generator)
    found = spectral_density(p.operator, null=p.null, probes=2, steps=60, reorthogonalize=False)
    assert found.nodes.min() > 4.99, "zeros far from the rest come in by rounding, and stretch the axis"
    flat = spectral_density(DenseOperator(3 * torch.eye(9, dtype=torch.float64)), steps=5, reorthogonalize=False)
    assert flat.nodes[flat.weights > 0].tolist() == pytest.approx([3.0] * 8)
    with pytest.raises(NonFiniteError):
        spectral_density(counting(p.operator, {4: lambda v: v / 0}), reorthogonalize=False)


@pytest.mark.parametrize("every", [1, 4, 100])
def test_reading_seldom_changes_nothing(every: int) -> None:
    """As on a GPU: what was computed after an invariant subspace or a NaN is thrown away."""
    none, start = torch.zeros(40, 0, dtype=torch.float64), torch.arange(1.0, 41.0, dtype=torch.float64)
    A = diagonal(torch.linspace(1, 2, 40, dtype=torch.float64))
    alpha, beta, spent = three_term(A, 13, start, none, every=every)
    plain = lanczos(A, 13, start=start)
    np.testing.assert_allclose(alpha, plain.alpha, rtol=1e-9)
    np.testing.assert_allclose(beta, [*plain.beta, plain.residual_norm], rtol=1e-6)
    assert spent == 13
    levels = diagonal(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).repeat_interleave(14)[:40])
    alpha, beta, spent = three_term(levels, 13, start, none, every=every)
    assert (alpha.size, beta.size) == (3, 3)
    assert beta[-1] == pytest.approx(0.0, abs=1e-14)
    assert spent == min(-(-3 // every) * every, 13)
    zero = three_term(diagonal(torch.zeros(40, dtype=torch.float64)), 13, start, none, every=every)
    assert zero[0].tolist() == [0.0]
    with pytest.raises(NonFiniteError):
        three_term(counting(A, {4: lambda v: v / 0}), 13, start, none, every=every)
