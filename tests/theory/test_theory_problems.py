"""Problems are what they say: minimizer, null dimension, effective condition number, margins, dials.

Bugs that only this file catches: a dial that changes the function that is learned, a null dimension from a formula that
the network does not have, a minimizer whose gradient is not rounding, kinks on the data, a shift that is not in
standard deviations, problems that differ from call to call.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.moments import layer_moments
from bnp_analysis.theory.limit_point import find_minimizer, gradient_floor
from bnp_analysis.theory.problems import KnownProblem, convolutional, linear_chain, softmax_regression, teacher_student

MAKERS: dict[str, Callable[[], KnownProblem]] = {
    "relu": lambda: teacher_student((4, 3, 2), kappa=3e3),
    "leaky, orbit": lambda: teacher_student((4, 3, 2), activation="leaky_relu", kappa=1e4, by="orbit"),
    "tanh": lambda: teacher_student((4, 3, 2), activation="tanh", kappa=1e3),
    "deep relu": lambda: teacher_student((3, 3, 3, 2), kappa=1e4, n=60),
    "shifted": lambda: teacher_student((4, 2, 2), shift=10.0),
    "chain": lambda: linear_chain((4, 3, 2), kappa=5.0),
    "narrow chain": lambda: linear_chain((6, 2, 4), kappa=50.0, shift=1.0),
    "convolutional": lambda: convolutional(2, kappa=1e3),
    "softmax": lambda: softmax_regression(kappa=20.0),
    "softmax, shifted": lambda: softmax_regression(shift=1.0),
}
ASKED = {"relu": 3e3, "leaky, orbit": 1e4, "tanh": 1e3, "deep relu": 1e4, "chain": 5.0, "narrow chain": 50.0}
ASKED |= {"convolutional": 1e3, "softmax": 20.0}


@pytest.mark.parametrize("name", MAKERS)
def test_a_problem_is_what_it_says(name: str) -> None:
    problem = MAKERS[name]()
    risk = problem.solved
    assert float(risk.gradient.norm()) <= 30 * gradient_floor(risk) + 1e-16
    values = np.linalg.eigvalsh(bnp.hessian(risk).to_dense().numpy())
    floor = 1e-11 * values[-1]
    assert int((np.abs(values) <= floor).sum()) == problem.null_dimension
    assert problem.kappa == pytest.approx(values[-1] / values[problem.null_dimension], rel=1e-6)
    assert problem.kappa == pytest.approx(ASKED.get(name, problem.kappa), rel=1e-6)
    assert bnp.null_directions(risk).basis.shape[1] == problem.null_dimension, "all of it has a cause"
    apart = (problem.risk.theta / problem.minimizer - 1)[problem.minimizer != 0]
    assert float(apart.square().mean().sqrt()) == pytest.approx(1e-5, rel=0.5), "in each number, at random"
    started = find_minimizer(problem.risk)
    assert started.attained
    assert started.value == pytest.approx(float(risk.value), rel=1e-12, abs=1e-20)


def test_a_problem_is_shown_in_a_line() -> None:
    problem = linear_chain((4, 3, 2), kappa=5.0)
    assert repr(problem) == f"<KnownProblem: {problem.description}>"


@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_the_shift_is_in_standard_deviations(shift: float) -> None:
    risk = linear_chain((6, 6, 6), shift=shift, kappa=None).risk
    m = layer_moments(risk)["0"]
    assert torch.allclose(m.mean / m.variance.sqrt(), torch.full_like(m.mean, shift), rtol=1e-9, atol=1e-9)
    scaled = teacher_student((6, 4, 3), shift=1.0, kappa=1e4).risk
    m = layer_moments(scaled)["0"]
    assert torch.allclose(m.mean / m.variance.sqrt(), torch.ones_like(m.mean), rtol=1e-9)
    assert float(m.variance.max() / m.variance.min()) > 2, "and the dial made the scales differ"


def test_dials_keep_the_function() -> None:
    plain = teacher_student((6, 3, 3))
    for other in (
        teacher_student((6, 3, 3), kappa=5e3),
        teacher_student((6, 3, 3), kappa=5e3, by="orbit"),
        teacher_student((6, 3, 3), shift=30.0),
    ):
        assert torch.allclose(other.solved.outputs, plain.solved.outputs, atol=1e-10)
        assert other.kappa > 10 * plain.kappa


def test_kinks_stay_away_from_the_data() -> None:
    for problem in (teacher_student((5, 4, 4, 2)), convolutional(2)):
        smallest = []

        def visit(name: str, module: nn.Module, args: object, output: object, seen: list[float] = smallest) -> None:
            if isinstance(module, nn.ReLU | nn.LeakyReLU):
                a = args[0]  # type: ignore[index]
                assert ((a > 0).any(dim=0) & (a < 0).any(dim=0)).all(), "no unit dead or always active"
                seen.append(float(a.abs().min() / a.abs().mean()))

        problem.solved.capture(visit)
        assert smallest
        assert min(smallest) > 1e-3


def test_seeds_are_local_and_reproducible() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, three = teacher_student(seed=1), teacher_student(seed=1), teacher_student(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one.minimizer, two.minimizer)
    assert torch.equal(one.risk.theta, two.risk.theta)
    assert not torch.equal(one.minimizer, three.minimizer)


@pytest.mark.parametrize(
    "make",
    [
        lambda: teacher_student(activation="gelu"),
        lambda: teacher_student(activation="tanh", by="orbit"),
        lambda: teacher_student(by="luck"),
        lambda: teacher_student(kappa=2.0),
        lambda: teacher_student((60, 3, 2)),
        lambda: linear_chain((5, 3)),
        lambda: convolutional(activation="tanh"),
        lambda: softmax_regression(smoothing=0.0),
        lambda: softmax_regression(classes=1),
        lambda: softmax_regression(n=5000),
    ],
)
def test_what_cannot_be_made_is_refused(make: Callable[[], KnownProblem]) -> None:
    with pytest.raises(InvalidInputError):
        make()
