"""The rates as pure functions: against spectral radii of iteration matrices, and against searches.

Bugs that only this file catches: a factor that sees one end of the spectrum, a heavy ball formula that is right at its
optimum alone, parameters that are not the best ones, a joint spectrum in which `rho` replaces the slowest mode.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.theory import rates

spectra = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)
steps = st.floats(1e-5, 10.0)


def spectral_radius(matrix: Any) -> float:
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def heavy_ball_matrix(values: list[float], step: float, momentum: float) -> Any:
    """The map of `(theta_k, theta_(k-1))` on a quadratic."""
    n = len(values)
    identity = np.eye(n)
    return np.block(
        [[(1 + momentum) * identity - step * np.diag(values), -momentum * identity], [identity, 0 * identity]]
    )


@given(spectra, steps)
def test_gradient_descent_is_the_spectral_radius(values: list[float], step: float) -> None:
    matrix = np.eye(len(values)) - step * np.diag(values)
    assert rates.contraction_factor(values, step) == pytest.approx(spectral_radius(matrix), rel=1e-12)


@given(spectra, steps, st.floats(0, 0.99))
def test_heavy_ball_is_the_spectral_radius(values: list[float], step: float, momentum: float) -> None:
    expected = spectral_radius(heavy_ball_matrix(values, step, momentum))
    # A double root moves by the square root of a rounding error.
    assert rates.heavy_ball_factor(values, step, momentum) == pytest.approx(expected, rel=1e-6)


@given(spectra, steps)
def test_without_momentum_heavy_ball_is_gradient_descent(values: list[float], step: float) -> None:
    factor = rates.heavy_ball_factor(values, step, 0.0)
    assert factor == pytest.approx(rates.contraction_factor(values, step), rel=1e-12)


@given(st.floats(1e-3, 1e3), st.floats(1, 1e6), st.floats(0.2, 5))
def test_no_step_is_better_than_the_best(smallest: float, kappa: float, away: float) -> None:
    ends = [smallest * kappa, smallest]
    best = rates.best_step(*ends)
    factor = rates.contraction_factor(ends, best)
    assert factor == pytest.approx(rates.best_factor(kappa), rel=1e-9, abs=1e-12)
    assert rates.contraction_factor(ends, best * away) >= factor * (1 - 1e-12)


@pytest.mark.parametrize("kappa", [1.0, 4.0, 37.0, 1e4])
def test_heavy_ball_parameters_are_the_best(kappa: float) -> None:
    """Against a search over both parameters."""
    ends = [kappa, 1.0]
    best = rates.best_heavy_ball(*ends)
    factor = rates.heavy_ball_factor(ends, *best)
    assert factor == pytest.approx(rates.best_heavy_ball_factor(kappa), rel=1e-6, abs=1e-7)

    def objective(x: Any) -> float:
        return rates.heavy_ball_factor(ends, math.exp(x[0]), (1 - 1e-12) * float(expit(x[1])))

    start = [math.log(best.step) + 0.3, 1.0]
    found = minimize(objective, start, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-12, "maxiter": 4000})
    assert found.fun >= factor - 1e-6


def test_interior_eigenvalues_do_not_matter_at_the_optimum() -> None:
    values = np.geomspace(1.0, 500.0, 40)
    best = rates.best_heavy_ball(500.0, 1.0)
    assert rates.heavy_ball_factor(values, *best) == pytest.approx(rates.best_heavy_ball_factor(500.0), rel=1e-6)
    assert rates.contraction_factor(values, rates.best_step(500.0, 1.0)) == pytest.approx(499 / 501)


def test_momentum_beats_gradient_descent_by_the_square_root() -> None:
    kappa = 1e4
    slow = rates.time_constant(rates.best_factor(kappa))
    fast = rates.time_constant(rates.best_heavy_ball_factor(kappa))
    assert slow / fast == pytest.approx(math.sqrt(kappa), rel=1e-3)
    assert slow == pytest.approx(kappa / 2, rel=1e-4)


@given(spectra, st.floats(1e-4, 1e-3), st.floats(0, 0.999))
def test_the_joint_spectrum_of_a_triangular_map(values: list[float], step: float, rho: float) -> None:
    """Whatever couples the parameters to the statistics, the eigenvalues are those of the diagonal blocks."""
    n = len(values)
    coupling = np.random.default_rng(n).standard_normal((2, n))
    joint = np.block([[np.eye(n) - step * np.diag(values), np.zeros((n, 2))], [coupling, rho * np.eye(2)]])
    found = rates.joint_spectrum(values, step, rho)
    assert set(found) == {1 - step * v for v in values} | {rho}
    assert abs(found[0]) == pytest.approx(spectral_radius(joint), rel=1e-9)
    assert (np.diff(np.abs(found)) <= 0).all()


def test_ends_of_the_scale() -> None:
    assert rates.time_constant(1.0) == math.inf
    assert rates.time_constant(0.0) == 0.0
    assert math.exp(-1 / rates.time_constant(0.9)) == pytest.approx(0.9, rel=1e-15)
    assert rates.best_factor(1.0) == 0.0
    assert rates.contraction_factor(torch.tensor([2.0, 1.0]), 2.0) == 3.0, "divergence is a factor above 1"


@pytest.mark.parametrize(
    "call",
    [
        lambda: rates.contraction_factor([], 0.1),
        lambda: rates.contraction_factor([1.0, 0.0], 0.1),
        lambda: rates.contraction_factor([1.0, -1e-9], 0.1),
        lambda: rates.contraction_factor([1.0, math.nan], 0.1),
        lambda: rates.contraction_factor([1.0], 0.0),
        lambda: rates.heavy_ball_factor([1.0], 0.1, 1.0),
        lambda: rates.best_step(1.0, 2.0),
        lambda: rates.best_factor(0.5),
        lambda: rates.joint_spectrum([1.0], 0.1, 1.0),
        lambda: rates.time_constant(-0.1),
    ],
)
def test_bad_numbers_are_refused(call: Any) -> None:
    with pytest.raises(InvalidInputError):
        call()


@given(spectra, steps)
def test_a_scale_of_the_loss_changes_nothing(values: list[float], step: float) -> None:
    assume(step * max(values) < 1e6)
    for scale in (2.0**-40, 2.0**40):
        scaled = [v * scale for v in values]
        assert rates.contraction_factor(scaled, step / scale) == rates.contraction_factor(values, step)
