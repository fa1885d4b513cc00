"""The fitted rate of a run, and the search for the minimizer that it speaks of.

Bugs that only this file catches: a heavy ball fit without its `log k` (4 % off at any length), an interval that trusts
correlated points, a tail below the rounding floor, a mixture of modes taken for an asymptotic rate, a minimizer at
infinity taken for an attained one, a search that stops short of the rounding floor.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bnp_analysis import EmpiricalRisk
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models import mlp
from bnp_analysis.theory import rates
from bnp_analysis.theory.limit_point import find_minimizer, gradient_floor
from bnp_analysis.theory.rates import expected_bias, fit_rate

D = torch.float64


def quadratic(values: Any, step: float, momentum: float, count: int) -> Any:
    """Gradient norms of the iteration on a quadratic, equal gradients in all modes at the start."""
    values = np.asarray(values, dtype=float)
    e = before = 1 / values
    norms = []
    for _ in range(count):
        norms.append(float(np.linalg.norm(values * e)))
        e, before = e - step * values * e + momentum * (e - before), e
    return np.array(norms)


@given(st.floats(0.5, 0.999), st.floats(1e-8, 1e8))
def test_an_exact_line_is_recovered(factor: float, scale: float) -> None:
    fit = fit_rate(scale * factor ** np.arange(200.0))
    assert fit.factor == pytest.approx(factor, rel=1e-9)
    assert fit.low <= fit.time_constant * (1 + 1e-9)
    assert fit.high >= fit.time_constant * (1 - 1e-9)
    assert fit.drift < 1e-6


@pytest.mark.parametrize("kappa", [100.0, 1e3, 1e5])
def test_heavy_ball_needs_the_logarithm(kappa: float) -> None:
    values = np.geomspace(1, kappa, 12)
    best = rates.best_heavy_ball(kappa, 1.0)
    constant = rates.time_constant(rates.best_heavy_ball_factor(kappa))
    norms = quadratic(values, *best, int(14 * constant) + 32)
    right, wrong = fit_rate(norms, power=1), fit_rate(norms)
    assert right.time_constant == pytest.approx(constant, rel=0.02)
    assert abs(wrong.time_constant / constant - 1) > 0.03


def test_what_lies_below_the_floor_is_not_fitted() -> None:
    norms = np.maximum(0.9 ** np.arange(400.0), 1e-12)
    assert fit_rate(norms, floor=2e-12).factor == pytest.approx(0.9, rel=1e-9)
    assert fit_rate(norms).factor > 0.95


@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_the_interval_covers_the_truth(noise: float) -> None:
    """With noise that neighbours share, as in a run: at least nine times in ten."""
    g = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        shared = np.repeat(g.standard_normal(60), 10) * noise
        fit = fit_rate(np.exp(-0.01 * np.arange(600.0) + shared))
        covered += fit.low <= 100 <= fit.high
    assert covered >= 180


@pytest.mark.parametrize(
    ("values", "step", "momentum", "count"),
    [
        ([1.0, 1.02, 4.0], 0.3, 0.0, 120),
        ([1.0, 1.3, 50.0], 0.01, 0.0, 900),
        (np.geomspace(1, 100, 9), 0.0198, 0.0, 400),
        (np.geomspace(1, 100, 9), 0.01, 0.5, 300),
        ([1.0, 4.0], 0.25, 0.25, 100),
    ],
)
def test_the_expected_bias_is_the_bias_of_the_fit(values: Any, step: float, momentum: float, count: int) -> None:
    """The closed forms against the recurrence, by the same rule."""
    fit = fit_rate(quadratic(values, step, momentum, count))
    factor = rates.heavy_ball_factor(values, step, momentum)
    bias = abs(fit.time_constant / rates.time_constant(factor) - 1)
    assert expected_bias(values, step, momentum, first=fit.first, last=fit.last) == pytest.approx(
        bias, rel=0.1, abs=2e-3
    )


def test_a_mixture_of_modes_is_no_tail() -> None:
    values = np.append(np.linspace(1.0, 1.1, 20), 30.0)
    assert expected_bias(values, 0.06, 0.0, first=60, last=120) > 0.02


def test_too_short_a_run_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="too few"):
        fit_rate([0.5**k for k in range(20)])
    with pytest.raises(InvalidInputError):
        fit_rate([1.0, math.nan] * 40)


def labelled(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(20, 2, generator=generator, dtype=D)
    return x, (x @ torch.randn(2, 2, generator=generator, dtype=D)).argmax(dim=1)


def test_separable_data_have_no_minimizer(generator: torch.Generator) -> None:
    found = find_minimizer(EmpiricalRisk(mlp([2, 2], dtype=D), nn.functional.cross_entropy, labelled(generator)))
    assert not found.attained
    assert "no attained minimizer" in found.reason
    assert found.gradient_norm < 1e-15, "a small gradient alone would have said that it is one"


def test_smoothed_labels_have_one(generator: torch.Generator) -> None:
    risk = EmpiricalRisk(mlp([2, 2], dtype=D), nn.CrossEntropyLoss(label_smoothing=0.1), labelled(generator))
    found = find_minimizer(risk)
    assert found.attained
    assert found.gradient_norm <= 30 * found.floor
    # Another start ends at the same loss: the problem is convex.
    other = find_minimizer(risk.at(torch.randn(risk.space.dim, generator=generator, dtype=D)))
    assert other.value == pytest.approx(found.value, rel=1e-13)


def test_least_squares_against_its_solution(generator: torch.Generator) -> None:
    x = torch.randn(30, 6, generator=generator, dtype=D)
    y = torch.randn(30, 2, generator=generator, dtype=D)
    found = find_minimizer(EmpiricalRisk(nn.Linear(6, 2, bias=False, dtype=D), nn.functional.mse_loss, (x, y)))
    solution = torch.linalg.lstsq(x, y).solution.T.flatten()
    assert torch.allclose(found.theta, solution, atol=1e-13)


def test_a_nonlinear_network_is_fitted_to_rounding(generator: torch.Generator) -> None:
    x = torch.randn(60, 4, generator=generator, dtype=D)
    teacher = mlp([4, 3, 2], activation="tanh", seed=1, dtype=D)
    risk = EmpiricalRisk(mlp([4, 3, 2], activation="tanh", seed=2, dtype=D), nn.functional.mse_loss, (x, teacher(x)))
    found = find_minimizer(risk)
    assert found.attained
    assert found.gradient_norm <= 30 * found.floor
    assert found.newton_step < 1e-10
    assert gradient_floor(risk.at(found.theta)) < 1e-14
