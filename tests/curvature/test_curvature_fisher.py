"""Catches: a sampled Fisher matrix whose mean is another matrix, draws that depend on global state or on the block that
is asked for, and an empirical one that weighs examples by the wrong share."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from curvature_reference import Problem, classes, numbers, relative, split, spread
from test_curvature_products import PROBLEMS, log_cosh, margins, tanh_mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError

LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[int], Tensor]]] = {
    "cross_entropy": (F.cross_entropy, lambda n: classes(n, 3)),
    "label_smoothing": (lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1), lambda n: classes(n, 3)),
    "mse": (F.mse_loss, lambda n: numbers(n, 3, seed=2)),
    "bce": (F.binary_cross_entropy_with_logits, lambda n: F.one_hot(classes(n, 3), 3).double()),
    "log_cosh": (log_cosh, lambda n: numbers(n, 3, seed=2)),
}


def problem_of(name: str) -> Problem:
    loss, targets = LOSSES[name]
    return Problem(tanh_mlp(4, 5, 3), loss, split(numbers(8, 4), targets(8), (5, 3)))


# sampled


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "bce", "log_cosh"])
def test_the_expectation_of_samples_is_gauss_newton(name: str) -> None:
    """16 seeds of 20 draws: every mean of v^T F v lies within 4.5 standard errors of v^T G v."""
    problem = problem_of(name)
    risk = problem.risk()
    V = numbers(risk.space.dim, 3, seed=4)
    expected = (V * (problem.gauss_newton() @ V)).sum(dim=0)
    factors = (bnp.fisher(risk, samples=20, seed=k).factor for k in range(16))
    drawn = torch.stack([(F_ @ V).square().sum(dim=0) for F_ in factors])
    error = drawn.std(dim=0) / len(drawn) ** 0.5
    assert bool(((drawn.mean(dim=0) - expected).abs() < 4.5 * error).all())
    assert bool((error < 0.1 * expected).all())  # else the bound would hold for anything


@pytest.mark.parametrize("name", ["label_smoothing", "mse"])
def test_more_samples_come_closer(name: str) -> None:
    problem = problem_of(name)
    risk, G = problem.risk(), problem.gauss_newton()
    few, many = (float((bnp.fisher(risk, samples=s, seed=1).to_dense() - G).norm() / G.norm()) for s in (10, 4000))
    assert many < 0.06
    assert few > 3 * many


def test_class_weights_enter_the_expectation() -> None:
    problem = PROBLEMS["class weights, count="]()
    F_ = bnp.fisher(problem.risk(), samples=6000, seed=1).to_dense()
    G = problem.gauss_newton()
    assert float((F_ - G).norm() / G.norm()) < 0.06


def test_tokens_draw_a_class_each() -> None:
    problem = PROBLEMS["tokens, classes last"]()
    F_ = bnp.fisher(problem.risk(), samples=1500, seed=1).to_dense()
    G = problem.gauss_newton()
    assert float((F_ - G).norm() / G.norm()) < 0.06


def test_a_seed_is_one_matrix() -> None:
    risk = problem_of("cross_entropy").risk()
    first, again, other = (bnp.fisher(risk, seed=s).to_dense() for s in (3, 3, 4))
    assert torch.equal(first, again)
    assert relative(first, other) > 0.1
    A = bnp.fisher(risk, seed=3)
    torch.manual_seed(0)
    v = numbers(A.dim)
    assert torch.equal(A @ v, A @ v)
    assert torch.equal(bnp.fisher(risk.to(torch.float64), seed=3).to_dense(), first)


def test_draws_leave_global_random_states_alone() -> None:
    risk = problem_of("mse").risk()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    bnp.fisher(risk, seed=3).to_dense()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    np.testing.assert_array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002


# empirical


def example_gradients(problem: Problem) -> list[Tensor]:
    found = []
    for x, y in problem.batches:
        for j in range(len(x)):
            single = Problem(problem.model, problem.loss, [(x[j : j + 1], y[j : j + 1])], output=problem.output)
            found.append(single.gradient(problem.theta))
    return found


@pytest.mark.parametrize("name", LOSSES)
def test_empirical_is_the_mean_of_outer_products(name: str) -> None:
    problem = problem_of(name)
    gradients = example_gradients(problem)
    expected = sum(torch.outer(g, g) for g in gradients) / 8
    A = bnp.fisher(problem.risk(), "empirical")
    assert relative(A.to_dense(), expected) <= 1e-12
    assert A.factor.shape == (8, len(problem.theta))
    assert relative(A.factor.to_dense(), torch.stack(gradients) / 8**0.5) <= 1e-12
    assert relative(expected, problem.gauss_newton()) > 0.05


@pytest.mark.parametrize("name", ["ignore_index, count=", "class weights, count="])
def test_empirical_shares_follow_count(name: str) -> None:
    """Examples weighed by their number, though half of them do not count, gave twice the matrix."""
    problem = PROBLEMS[name]()
    assert problem.count is not None
    total, expected = 0.0, 0.0
    for x, y in problem.batches:
        for j in range(len(x)):
            pair = (x[j : j + 1], y[j : j + 1])
            share = float(problem.count(pair))
            if share > 0:
                g = Problem(problem.model, problem.loss, [pair]).gradient(problem.theta)
                total, expected = total + share, expected + share * torch.outer(g, g)
    assert relative(bnp.fisher(problem.risk(), "empirical").to_dense(), expected / total) <= 1e-12


def test_rows_of_outputs_that_are_no_examples_have_equal_shares() -> None:
    """Of two sequences in one tensor: a gradient for each token."""
    single = tanh_mlp(4, 5, 3)
    x, y = numbers(2, 3, 4), classes(2, 3, 3)
    gradients = example_gradients(Problem(single, F.cross_entropy, [(x.flatten(0, 1), y.flatten())]))
    flat = nn.Sequential(nn.Flatten(0, 1), single)
    A = bnp.fisher(bnp.EmpiricalRisk(flat, lambda o, y: F.cross_entropy(o, y.flatten()), (x, y)), "empirical")
    assert relative(A.to_dense(), sum(torch.outer(g, g) for g in gradients) / 6) <= 1e-12


def test_empirical_of_batch_coupled_networks() -> None:
    """The gradient of an example's loss, through its output alone, with the whole batch behind it."""
    problem = PROBLEMS["mlp, BatchNorm, train"]()
    z = problem.outputs(problem.theta, 0).requires_grad_()
    losses = F.cross_entropy(z, problem.batches[0][1], reduction="none")
    slopes = torch.autograd.grad(losses.sum(), z)[0]
    J = problem.jacobian(0).view(*z.shape, -1)
    G = torch.einsum("nk,nkp->np", slopes, J)
    assert relative(bnp.fisher(problem.risk(), "empirical").to_dense(), G.T @ G / len(z)) <= 1e-10


# refused


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": "exact"}, "kind must be 'mc' or 'empirical'"),
        ({"samples": 0}, "samples must be positive"),
        ({"seed": 1.5}, "seed must be an integer"),
    ],
)
def test_options_that_do_not_exist(options: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        bnp.fisher(problem_of("mse").risk(), **options)


def test_losses_without_a_distribution() -> None:
    problem = Problem(tanh_mlp(4, 3), margins, [(numbers(5, 4), numbers(5, 3, seed=1))])
    with pytest.raises(InvalidInputError, match="no distribution is known"):
        bnp.fisher(problem.risk(), "mc")
    assert bnp.fisher(problem.risk(), "empirical").dim == 15


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda o, y: torch.cos(o).mean(), "no distribution is known for this loss: it bends down in the outputs"),
        (lambda o, y: o.var(), "a loss that is separate over examples"),
    ],
)
def test_losses_without_a_root(loss: Callable[..., Tensor], match: str) -> None:
    """Of one that is not convex it was said that it is not separate over examples."""
    with pytest.raises(InvalidInputError, match=match):
        bnp.fisher(Problem(tanh_mlp(4, 3), loss, [(numbers(5, 4), numbers(5, 3, seed=1))]).risk(), "mc")


def test_a_sum_has_no_examples() -> None:
    loss = nn.MSELoss(reduction="sum")
    problem = Problem(tanh_mlp(4, 3), loss, [(numbers(5, 4), numbers(5, 3, seed=1))])
    with pytest.raises(InvalidInputError, match="not a mean over the batch"):
        bnp.fisher(problem.risk(), "empirical")


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_data_without_an_order(kind: str) -> None:
    data = TensorDataset(numbers(8, 4), classes(8, 3))
    risk = bnp.EmpiricalRisk(tanh_mlp(4, 3), F.cross_entropy, DataLoader(data, batch_size=4, shuffle=True))
    with pytest.raises(InvalidInputError, match=r"keep their order: give list\(loader\)"):
        bnp.fisher(risk, kind)


def test_float32() -> None:
    problem = problem_of("cross_entropy")
    single, double = problem.risk(dtype=torch.float32), problem.risk()
    for kind in ("mc", "empirical"):
        A = bnp.fisher(single, kind, seed=2)
        assert A.dtype == torch.float32
        assert relative(A.to_dense().double(), bnp.fisher(double, kind, seed=2).to_dense()) <= 1e-4


def test_nearly_certain_networks_still_sample() -> None:
    """A trained classifier was refused: its weights could not be read off its curvature."""
    model = spread(nn.Linear(4, 3), scale=15.0)
    w = torch.tensor([1.0, 10.0, 0.1], dtype=torch.float64)
    risk = bnp.EmpiricalRisk(model, nn.CrossEntropyLoss(weight=w), (numbers(12, 4), classes(12, 3)))
    assert float(torch.softmax(risk.outputs, 1).amax(dim=1).median()) > 1 - 1e-6
    assert bnp.fisher(risk, "mc").dim == 15
