"""Condition profiles: every interval holds the ratio of its own rank, whatever the spectrum.

Bugs that only this file catches: an upper bound that a repeated or hidden eigenvalue escapes, ratios shifted by one,
magnitudes of the two ends merged wrongly, a bound that forgets the coupling of the Ritz vectors to the rest.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, ZeroOperatorError
from bnp_analysis.linalg import CallableOperator, GramOperator, MatrixOperator, lanczos
from bnp_analysis.linalg.condition import methods
from bnp_analysis.linalg.condition.certificates import all_magnitudes
from bnp_analysis.linalg.condition.lanczos import _certifying, _ends, _upper_bounds, krylov_magnitudes
from bnp_analysis.linalg.condition.number import Magnitudes
from bnp_analysis.linalg.condition.profile import ConditionProfile

N = 160


def spectra(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Prescribed eigenvalues of which Lanczos has to make something."""
    return {
        "geometric": 0.9 ** np.arange(N),
        "harmonic": 1 / (1.0 + np.arange(N)),
        "repeated": np.concatenate([np.repeat([10.0, 5, 3, 1], [3, 5, 2, 4]), rng.uniform(0, 0.3, N - 14)]),
        "outliers": np.concatenate([1e4 * rng.uniform(0.5, 1, 6), rng.uniform(0, 1, N - 6)]),
        "clustered": 1 + 1e-3 * rng.standard_normal(N),
        "indefinite": rng.standard_normal(N) * np.exp(2 * rng.standard_normal(N)),
        "two copies at both ends": np.concatenate([np.repeat([1.0, -0.9], 10), rng.uniform(-0.5, 0.5, N - 20)]),
        "low rank": np.concatenate([rng.uniform(1, 2, 7), np.zeros(N - 7)]),
    }


def matrix_with(values: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    Q = np.linalg.qr(rng.standard_normal((N, N)))[0]
    M = torch.from_numpy((Q * values) @ Q.T)
    return (M + M.T) / 2


def ratios(values: np.ndarray) -> np.ndarray:
    sizes = np.sort(np.abs(values))[::-1]
    with np.errstate(divide="ignore"):
        return np.asarray(sizes[0] / sizes)


def assert_true(profile: ConditionProfile, truth: np.ndarray, rounding: float = 1e-9) -> None:
    wanted = truth[profile.ranks - 1]
    assert np.all(profile.lower * (1 - rounding) <= wanted)
    assert np.all(wanted <= profile.upper * (1 + rounding))
    assert np.all((profile.lower <= profile.value) & (profile.value <= profile.upper))


def test_where_nothing_was_missed_there_are_two_runs() -> None:
    """One to find, one to certify, and the vectors of the trace; nothing that the second meets is followed up."""
    values = np.concatenate([2.0 ** -np.arange(12), 1e-4 * np.random.default_rng(0).uniform(0, 1, N - 12)])
    A = bnp.DenseOperator(torch.diag(torch.from_numpy(values)))
    found = krylov_magnitudes(
        A, torch.zeros(N, 0, dtype=torch.float64), 8, steps=60, noise=1e-12, failure_probability=1e-6, probes=5, seed=0
    )
    assert found.matvecs <= 60 + _certifying(N) + 5
    np.testing.assert_allclose(found.value, values[:8])


@pytest.mark.parametrize("kind", spectra(np.random.default_rng(0)))
@pytest.mark.parametrize("method", ["lanczos", "dense"])
def test_every_rank_has_its_ratio(kind: str, method: str) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        values = spectra(rng)[kind]
        profile = bnp.condition_profile(
            bnp.DenseOperator(matrix_with(values, rng)), ranks=range(2, 31), method=method, seed=seed
        )
        assert_true(profile, ratios(values))
        sizes = np.abs(values) / np.abs(values).max()
        counts = np.array([(sizes >= t).sum() for t in profile.thresholds])
        assert np.all((profile.at_least <= counts) & (counts <= profile.at_most))
        trace = values.sum() / np.abs(values).max()
        assert abs(profile.effective_rank - trace) <= 5 * profile.effective_rank_error + 1e-8 * N


@pytest.mark.parametrize(("kind", "known"), [("geometric", 29), ("repeated", 29), ("outliers", 29), ("low rank", 6)])
def test_rungs_that_can_be_known_are(kind: str, known: int) -> None:
    rng = np.random.default_rng(1)
    A = bnp.DenseOperator(matrix_with(spectra(rng)[kind], rng))
    profile = bnp.condition_profile(A, ranks=range(2, 31), method="lanczos")
    assert len(profile.ranks) == known
    assert np.median(profile.upper / profile.lower) < 1.05


def test_an_eigenvector_that_the_first_start_does_not_meet_is_found() -> None:
    """The start of the first run has no part along the second eigenvector: a certificate from it would say so."""
    first = torch.randn(N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden = torch.randn(N, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    hidden -= first * (first @ hidden) / (first @ first)
    hidden /= hidden.norm()
    base = matrix_with(0.5 ** np.arange(N), np.random.default_rng(3))
    keep = torch.eye(N, dtype=torch.float64) - torch.outer(hidden, hidden)
    M = keep @ base @ keep + 0.9 * torch.outer(hidden, hidden)
    profile = bnp.condition_profile(bnp.DenseOperator((M + M.T) / 2), ranks=range(2, 8), method="lanczos", seed=0)
    assert_true(profile, ratios(torch.linalg.eigvalsh(M).numpy()))
    assert len(profile.ranks) == 6


@pytest.mark.parametrize(("count", "steps"), [(8, 10), (20, 24), (30, 60)])
def test_bounds_of_runs_that_have_not_converged(count: int, steps: int) -> None:
    """Neither run has converged, several vectors couple to the rest, eigenvalues are missed: the bounds hold."""
    n = 400
    for seed, values in enumerate((np.linspace(1, 0, n), 1 / (1.0 + np.arange(n)), np.linspace(1, -0.9, n))):
        A = CallableOperator(torch.from_numpy(values).mul, n, dtype=torch.float64)
        found = krylov_magnitudes(
            A,
            torch.zeros(n, 0, dtype=torch.float64),
            count,
            steps=steps,
            noise=1e-13,
            failure_probability=1e-3,
            probes=2,
            seed=seed,
        )
        truth = np.sort(np.abs(values))[::-1]
        assert np.all(found.lower <= truth[:count])
        assert np.all(truth[:count] <= found.upper)
        assert truth[count] <= found.rest


@pytest.mark.parametrize("seed", range(20))
def test_upper_bounds_hold_for_arrow_matrices(seed: int) -> None:
    """`[[diag theta, c], [c^T, b]]` has the coordinate vectors for Ritz vectors, coupled to one direction."""
    rng = np.random.default_rng(seed)
    theta, c, b = rng.standard_normal(6), rng.standard_normal(6), float(rng.standard_normal())
    theta = np.round(theta, seed % 2)  # with repeated values too
    matrix = np.diag(np.append(theta, b))
    matrix[-1, :-1] = matrix[:-1, -1] = c
    bounds, rest = _upper_bounds(theta, np.abs(c), (max(b, 0.0), min(b, 0.0)))
    sizes = np.sort(np.abs(np.linalg.eigvalsh(matrix)))[::-1]
    assert np.all(sizes[:6] <= bounds * (1 + 1e-12))
    assert sizes[6] <= rest * (1 + 1e-12)


def test_the_bound_of_equal_ritz_values_is_attained() -> None:
    bounds, _ = _upper_bounds(np.ones(3), np.full(3, 0.3), (0.5, 0.0))
    matrix = np.diag([1.0, 1, 1, 0.5])
    matrix[-1, :-1] = matrix[:-1, -1] = 0.3
    assert bounds[0] == pytest.approx(np.linalg.eigvalsh(matrix)[-1], rel=1e-14)


def test_the_ends_of_the_rest_lie_beyond_its_ritz_values() -> None:
    """Of equally spaced eigenvalues no Ritz value has converged."""
    values = torch.linspace(-1, 1, 3_000, dtype=torch.float64)
    run = lanczos(CallableOperator(values.mul, len(values), dtype=torch.float64), 60, seed=0)
    high, low = _ends(run, len(values), 1e-3, 0.0)
    assert run.ritz()[0][-1] < 1 <= high < 1.2
    assert -1.2 < low <= -1 < run.ritz()[0][0]


def test_the_dense_profile_ends_in_the_condition_number() -> None:
    F = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1e-3], dtype=torch.float64))
    A = GramOperator(MatrixOperator(torch.cat([F, F])))
    profile, kappa = bnp.condition_profile(A), bnp.condition_number(A)
    assert profile.rank == kappa.rank == profile.ranks[-1]
    assert profile.value[-1] == pytest.approx(kappa.value, rel=1e-12)
    assert (profile.lower[-1], profile.upper[-1]) == pytest.approx((kappa.lower, kappa.upper), rel=1e-12)
    assert "kappa*" in str(profile)


def test_a_preconditioner_and_a_scale_change_what_they_should() -> None:
    M = torch.diag(torch.logspace(0, -6, 30, dtype=torch.float64))
    P = bnp.linalg.DensePreconditioner(torch.diag(torch.logspace(0, 1, 30, dtype=torch.float64)))
    flatter = bnp.condition_profile(bnp.DenseOperator(M), preconditioner=P, ranks=[2, 10, 30], method="lanczos")
    assert flatter.value == pytest.approx([10 ** (4 * (r - 1) / 29) for r in (2, 10, 30)], rel=1e-9)
    plain = bnp.condition_profile(bnp.DenseOperator(M), ranks=[2, 10], method="lanczos")
    for power in (-700, 400):
        other = bnp.condition_profile(bnp.DenseOperator(M * 2.0**power), ranks=[2, 10], method="lanczos")
        assert other.value == pytest.approx(plain.value, rel=1e-12)
        assert other.lambda_max == pytest.approx(2.0**power, rel=1e-12)


def test_single_precision_says_what_it_knows() -> None:
    rng = np.random.default_rng(5)
    values = 0.7 ** np.arange(N)
    A = bnp.DenseOperator(matrix_with(values, rng).float())
    for method in ("lanczos", "dense"):
        profile = bnp.condition_profile(A, ranks=range(2, 60), method=method)
        truth = ratios(torch.linalg.eigvalsh(A.to_dense().double()).numpy())
        assert_true(profile, truth)
        # Entries that are given are exact, products in single precision are not.
        assert bool(profile.ranks[-1] == 59) is (method == "dense")


def test_bad_input_is_answered() -> None:
    A = bnp.DenseOperator(torch.eye(4, dtype=torch.float64))
    whole, between = "ranks must be a list of integers", "from 2 to the dimension 4"
    for ranks, words in (([1], between), ([5], between), ([], between), ([2.5], whole), ([True], whole)):
        with pytest.raises(InvalidInputError, match=words):
            bnp.condition_profile(A, ranks=ranks)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="method must be one of"):
        bnp.condition_profile(A, method="svd")
    with pytest.raises(InvalidInputError, match=r"ends of a spectrum only.*auto, factor-svd, dense, lanczos"):
        bnp.condition_profile(A, method="inertia")
    with pytest.raises(InvalidInputError, match="ranks must be a list of integers"):
        bnp.condition_profile(A, ranks=3)  # type: ignore[arg-type]
    real, share = "thresholds must be a list of real numbers", "fractions of the largest"
    for thresholds, words in (([0.0], share), ([1.5], share), ([float("nan")], real), (0.1, real)):
        with pytest.raises(InvalidInputError, match=words):
            bnp.condition_profile(A, thresholds=thresholds)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="two probes"):
        bnp.condition_profile(A, probes=1)
    for method in ("dense", "lanczos"):
        with pytest.raises(ZeroOperatorError):
            bnp.condition_profile(bnp.DenseOperator(torch.zeros(4, 4, dtype=torch.float64)), method=method)
    rows = bnp.linalg.MatrixOperator(torch.zeros(3, 4, dtype=torch.float64))
    with pytest.raises(ZeroOperatorError, match="the operator is zero to rounding"):
        bnp.condition_profile(bnp.linalg.GramOperator(rows), method="factor-svd")
    with pytest.raises(InvalidInputError, match="SymmetricOperator"):
        bnp.condition_profile(torch.eye(3))  # type: ignore[arg-type]


def test_a_newly_registered_method_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_REGISTERED", dict(methods._REGISTERED))
    dense, price = methods.named("dense"), methods.Price(0.0, 1, 5e3)

    def exact(problem: methods.Problem) -> Magnitudes:
        values = np.arange(problem.A.dim, 0.0, -1.0)
        return all_magnitudes(
            problem.A, problem.null, values, lower=values, upper=values, rest=0.0, structural=problem.A.dim, matvecs=0
        )

    ends_only = methods.Method(
        name="ends", claim="", price=lambda A, s: price, solve=dense.solve, automatic=lambda A: True, order=1
    )
    methods.register(ends_only)
    methods.register(dataclasses.replace(ends_only, name="known", order=2, magnitudes=exact, decides=True))
    A = bnp.DenseOperator(torch.diag(torch.arange(6.0, 0, -1, dtype=torch.float64)))
    profile = bnp.condition_profile(A)
    assert (profile.method, profile.value.tolist()) == ("known", [1.2, 3.0, 6.0])
    # Beyond its price, the next one that bounds every rank.
    assert methods.automatic(A, magnitudes=True, flops=4e3).name == "dense"
    assert methods.automatic(A, magnitudes=True, products=-1).name == "lanczos"


def test_an_interrupt_leaves_no_rung_that_nothing_certifies() -> None:
    calls = 0

    def product(v: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt
        return torch.linspace(0.1, 1, N, dtype=torch.float64) * v

    profile = bnp.condition_profile(CallableOperator(product, N, dtype=torch.float64), method="lanczos")
    assert profile.stop == "interrupted"
    assert len(profile.ranks) == 0


def test_ritz_values_of_exactly_zero() -> None:
    A = bnp.DenseOperator(torch.diag(torch.tensor([4.0, 2.0, 1.0] + [0.0] * 60, dtype=torch.float64)))
    profile = bnp.condition_profile(A, ranks=[2, 3, 4, 50], method="lanczos")
    assert profile.ranks.tolist() == [2, 3]
    assert profile.value == pytest.approx([2.0, 4.0], rel=1e-12)
