"""Predicted against observed rates of real runs, and what must get no verdict.

Bugs that only this file catches: zeros of the Hessian that enter the prediction, a rate of the transient or of rounding
reported as asymptotic, a check that cannot fail, running statistics that change the factor, a verdict where the
hypotheses of T14 do not hold, an interrupted run that loses what it has.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bnp_analysis as bnp
from bnp_analysis import EmpiricalRisk
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models import mlp
from bnp_analysis.theory import convergence as convergence_study
from bnp_analysis.theory import rates
from bnp_analysis.theory.convergence import (
    ConvergenceCheck,
    RateOptions,
    check_bnp_gain,
    check_convergence_rate,
)
from bnp_analysis.theory.limit_point import measure
from bnp_analysis.theory.problems import KnownProblem, convolutional, linear_chain, softmax_regression, teacher_student
from bnp_analysis.theory.rates import RunningBNP, Trace, fit_rate, run

D = torch.float64
mse = nn.functional.mse_loss


@functools.cache
def softmax(**dials: Any) -> KnownProblem:
    """Small, and 14 directions that are not null."""
    return softmax_regression(**({"n": 60} | dials))


@functools.cache
def relu(**dials: Any) -> KnownProblem:
    return teacher_student((4, 2, 2), **({"n": 60} | dials))


PROBLEMS: dict[str, Callable[[], KnownProblem]] = {
    "chain": lambda: linear_chain((4, 3, 2), kappa=5.0, n=60),
    "softmax": lambda: softmax(kappa=10.0),
    "relu": lambda: relu(kappa=30.0),
    "tanh": lambda: teacher_student((3, 2, 2), activation="tanh", kappa=100.0, n=60),
    "convolutional": lambda: convolutional(2, kappa=400.0, n=50),
}


# Every problem and every method; the other pairs are slow and of the same code.
QUICK = {("chain", "gd"), ("softmax", "bnp"), ("relu", "gd"), ("tanh", "heavy_ball"), ("convolutional", "heavy_ball")}


@functools.cache
def softmax_by_gradient_descent() -> ConvergenceCheck:
    """One run for the tests that look at what a check holds."""
    return check_convergence_rate(softmax(kappa=10.0).risk)


def largest_of(problem: KnownProblem) -> float:
    return float(torch.linalg.eigvalsh(bnp.hessian(problem.solved).to_dense())[-1])


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=[] if (name, method) in QUICK else [pytest.mark.slow])
        for name in PROBLEMS
        for method in ("gd", "heavy_ball", "bnp")
    ],
)
def test_runs_contract_as_predicted(name: str, method: str) -> None:
    problem = PROBLEMS[name]()
    check = check_convergence_rate(problem.risk, method=method)
    assert check.holds, check
    assert check.outcome == "observed"
    assert check.observed == pytest.approx(check.predicted, rel=0.015), "half of what is tolerated"
    assert check.null_dim == problem.null_dimension
    assert check.unexplained == 0
    assert check.fit is not None
    assert check.fit.half_width < 0.03
    assert all(check.hypotheses.values())
    if method != "bnp":
        assert check.kappa == pytest.approx(problem.kappa, rel=1e-2), "another point of the same manifold"
    best = rates.best_heavy_ball_factor if method == "heavy_ball" else rates.best_factor
    assert check.factor == pytest.approx(best(check.kappa), rel=1e-2)


def test_against_a_spectrum_known_by_hand() -> None:
    """`L = |X w - y|^2 / N` with orthogonal columns: eigenvalues 2 |x_j|^2 / N."""
    x = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=D))
    risk = EmpiricalRisk(nn.Linear(3, 1, bias=False, dtype=D), mse, (x, torch.ones(3, 1, dtype=D)))
    check = check_convergence_rate(risk)
    assert check.eigenvalues.tolist() == pytest.approx([2 / 3, 8 / 3, 6.0], rel=1e-12)
    assert check.observed == pytest.approx(-1 / np.log(0.8), rel=1e-3)


def test_a_step_and_a_momentum_of_ones_own() -> None:
    problem = softmax(kappa=10.0)
    step = 0.5 / largest_of(problem)
    check = check_convergence_rate(problem.risk, method="heavy_ball", step=step, options=RateOptions(momentum=0.6))
    expected = rates.heavy_ball_factor(check.eigenvalues, step, 0.6)
    assert check.holds, check
    assert check.predicted == pytest.approx(rates.time_constant(expected), rel=1e-6)
    assert check.step == step


def test_without_deflation_the_prediction_is_wrong() -> None:
    check = softmax_by_gradient_descent()
    assert check.null_dim == 7
    assert check.without_deflation > 1e10 * check.observed


def test_a_wrong_prediction_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the slowest direction belonged to the null space."""
    problem = softmax(kappa=10.0)
    risk, step = problem.risk, 0.5 / largest_of(problem)
    honest = check_convergence_rate(risk, step=step)
    assert honest.holds
    expected = rates.contraction_factor(honest.eigenvalues, step)
    assert honest.predicted == pytest.approx(rates.time_constant(expected), rel=1e-6)
    true = convergence_study.predict

    def optimistic(spectrum: Any, *arguments: Any) -> Any:
        return true(dataclasses.replace(spectrum, values=spectrum.values[1:]), *arguments)

    monkeypatch.setattr(convergence_study, "predict", optimistic)
    check = check_convergence_rate(risk, step=step)
    assert check.holds is False, check
    assert check.observed == pytest.approx(honest.observed, rel=1e-3)


def test_the_rate_does_not_depend_on_the_perturbation() -> None:
    other = check_convergence_rate(softmax(kappa=10.0).risk, seed=1)
    assert other.observed == pytest.approx(softmax_by_gradient_descent().observed, rel=0.01)


@pytest.mark.parametrize("make", [softmax, pytest.param(relu, marks=pytest.mark.slow)])
def test_bnp_undoes_shifts_and_scales(make: Callable[..., KnownProblem]) -> None:
    """Undamped BNP sees the same problem; gradient descent pays for both, by the predicted factor."""
    white, moved = make().risk, make(shift=1.0, kappa=150.0).risk
    with_bnp = [check_convergence_rate(risk, method="bnp") for risk in (white, moved)]
    assert all(check.holds for check in with_bnp)
    assert with_bnp[0].observed == pytest.approx(with_bnp[1].observed, rel=0.02)
    plain = check_convergence_rate(moved)
    assert plain.holds
    found = convergence_study.gain(plain, with_bnp[1], tolerance=0.03)
    assert found.holds, found
    assert found.observed == plain.observed / with_bnp[1].observed > 5
    assert found.observed == pytest.approx(found.details["kappa*"] / found.details["kappa* with BNP"], rel=0.05)
    assert convergence_study._statement(found.details["predicted gain"]).startswith("BNP helps")


def test_a_fixed_preconditioner_is_its_own_congruence() -> None:
    problem = relu(kappa=200.0)
    P = bnp.bnp_preconditioner(problem.solved, eps1=1e-2)
    check = check_convergence_rate(problem.risk, P)
    B = bnp.linalg.congruence(bnp.hessian(problem.solved), P).to_dense()
    values = torch.linalg.eigvalsh(B)
    assert check.holds, check
    assert check.kappa == pytest.approx(float(values[-1] / values[problem.null_dimension]), rel=1e-2)
    assert check.source == "T15"


@pytest.mark.parametrize("rho", [0.3, 0.95])
def test_the_joint_map_has_the_joint_spectrum(rho: float) -> None:
    """T15 by finite differences of the iteration itself, parameters and statistics together."""
    problem = teacher_student((3, 2, 2))
    P = bnp.bnp_preconditioner(problem.solved)
    B = bnp.linalg.congruence(bnp.hessian(problem.solved), P).to_dense()
    values = torch.linalg.eigvalsh(B)[problem.null_dimension :]
    step = rates.best_step(float(values[-1]), float(values[0]))
    iteration = RunningBNP(problem.risk, P, step, rho)
    rest = iteration.at_rest(problem.minimizer)
    sizes = [t.numel() for t in rest]

    def advanced(flat: torch.Tensor) -> torch.Tensor:
        state = tuple(p.view(t.shape) for p, t in zip(flat.split(sizes), rest, strict=True))
        return torch.cat([t.flatten() for t in iteration.advance(state)[0]])

    flat = torch.cat([t.flatten() for t in rest])
    h = 1e-5
    columns = [(advanced(flat + h * e) - advanced(flat - h * e)) / (2 * h) for e in torch.eye(len(flat), dtype=D)]
    found = np.sort(np.linalg.eigvals(torch.stack(columns, dim=1).numpy()).real)
    moments = len(flat) - len(problem.minimizer)
    expected = [*(1 - step * values).tolist(), *[1.0] * problem.null_dimension, *[rho] * moments]
    assert np.allclose(found, np.sort(expected), atol=1e-4)
    assert {round(v, 6) for v in rates.joint_spectrum(values, step, rho)} <= {round(v, 6) for v in expected}


@pytest.mark.parametrize("rho", [0.0, 0.99])
def test_the_memory_does_not_change_the_factor(rho: float) -> None:
    check = check_convergence_rate(softmax(kappa=10.0).risk, method="bnp", options=RateOptions(rho=rho, tolerance=0.02))
    assert check.holds, check


def separable() -> EmpiricalRisk:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20, 2, generator=g, dtype=D)
    y = (x @ torch.randn(2, 2, generator=g, dtype=D)).argmax(dim=1)
    return EmpiricalRisk(mlp([2, 2], dtype=D), nn.functional.cross_entropy, (x, y))


def redundant() -> EmpiricalRisk:
    """Two tanh units where the teacher has one: at the doubled teacher the loss grows like a fourth power."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=g, dtype=D)
    one, two = mlp([4, 1, 2], activation="tanh", dtype=D), mlp([4, 2, 2], activation="tanh", dtype=D)
    with torch.no_grad():
        two[0].weight.copy_(one[0].weight.expand(2, -1))
        two[0].bias.copy_(one[0].bias.expand(2))
        two[2].weight.copy_(one[2].weight.expand(-1, 2) / 2)
        two[2].bias.copy_(one[2].bias)
        y = one(x)
    return EmpiricalRisk(two, mse, (x, y))


def kink() -> EmpiricalRisk:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=g, dtype=D)
    model = mlp([4, 3, 2], dtype=D)
    with torch.no_grad():
        model[0].bias[0] -= model[0](x)[5, 0]
    return EmpiricalRisk(model, mse, (x, model(x).detach()))


def saddle() -> EmpiricalRisk:
    problem = linear_chain((4, 2, 3))
    return problem.risk.at(torch.zeros(problem.risk.space.dim, dtype=D))


def functional_kink() -> EmpiricalRisk:
    """The same without a module that could be seen."""

    class Absolute(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2, dtype=D))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x @ self.w).abs().unsqueeze(1) + self.w[0]

    x = torch.tensor([[1.0, -1.0], [1.0, 2.0], [3.0, 1.0]], dtype=D)
    model = Absolute()
    return EmpiricalRisk(model, mse, (x, model(x).detach()))


BAD: dict[str, tuple[Callable[[], EmpiricalRisk], dict[str, Any], str, str]] = {
    "separable": (separable, {}, "no attained minimizer", "minimizer attained"),
    "redundant": (redundant, {}, "sublinear", "null space tangent to the minimizers"),
    "kink": (kink, {}, "1 at the input of act1", "smooth neighbourhood"),
    "functional kink": (functional_kink, {}, "not smooth", "smooth neighbourhood"),
    "saddle": (saddle, {}, "indefinite", "Hessian positive semidefinite"),
    "float32": (lambda: softmax().risk.to(torch.float32), {}, "float32", "float64"),
    "penalty": (
        lambda: softmax().risk,
        {"options": RateOptions(weight_decay=1e-4)},
        "penalty",
        "no penalty outside of the loss",
    ),
    "step": (lambda: softmax().risk, {"step": 100.0}, "not below 1", "step below 2/lambda_max"),
    "large": (
        lambda: softmax().risk,
        {"options": RateOptions(max_parameters=20)},
        "eigenvalues were not computed",
        "spectrum within reach",
    ),
    "one step": (
        lambda: EmpiricalRisk(
            nn.Linear(2, 1, bias=False, dtype=D), mse, (torch.eye(2, dtype=D), torch.ones(2, 1).to(D))
        ),
        {},
        "an iteration or two",
        "a rate to observe",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_no_verdict(name: str) -> None:
    make, arguments, words, hypothesis = BAD[name]
    check = check_convergence_rate(make(), time_limit=3600.0, **arguments)  # no case ends by the clock
    assert check.holds is None
    assert words in check.reason
    assert check.hypotheses[hypothesis] is False


@pytest.mark.parametrize(
    "arguments",
    [{"options": RateOptions(max_iterations=500)}, {"time_limit": 1.0}],
)
def test_what_would_be_too_slow_is_said_before_it_runs(arguments: dict[str, Any]) -> None:
    check = check_convergence_rate(relu(kappa=1e5).solved, **arguments)
    assert check.holds is None
    assert check.outcome == "too slow"
    assert "iterations per factor of e are predicted" in check.reason
    assert check.iterations == 0
    assert check.kappa == pytest.approx(1e5, rel=1e-2), "what is known is reported"


@pytest.mark.parametrize("moved", [0.0, 1.0])
def test_an_interrupt_keeps_what_was_done(moved: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And ends the check, also where the limit point has moved and another run would begin."""
    monkeypatch.setattr(convergence_study.Study, "_moved", lambda *ignored: moved)

    def impatient(done: int, total: int) -> None:
        if done >= 100:
            raise KeyboardInterrupt

    check = check_convergence_rate(relu(kappa=200.0).solved, progress=impatient)
    assert check.holds is None
    assert check.outcome == "interrupted"
    assert 100 <= len(check.gradient_norms) < 160
    assert "interrupted after" in check.reason
    assert check.fit is not None


def test_an_interrupt_of_the_search_ends_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convergence_study, "find_minimizer", interrupted)
    check = check_convergence_rate(softmax().risk)
    assert check.holds is None
    assert check.outcome == "interrupted"
    assert check.reason == "interrupted before the run had a tail"


def test_a_limit_that_comes_when_the_limit_point_has_moved_ends_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tail is straight already, but of a run whose prediction is another one now."""
    x = torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=D))
    risk = EmpiricalRisk(nn.Linear(3, 1, bias=False, dtype=D), mse, (x, torch.ones(3, 1, dtype=D)))
    most = check_convergence_rate(risk).iterations - 3
    monkeypatch.setattr(convergence_study.Study, "_moved", lambda *ignored: 1.0)
    check = check_convergence_rate(risk, options=RateOptions(max_iterations=most))
    assert check.holds is None
    assert check.outcome == "iteration limit"
    assert check.reason == "the iteration limit came when the limit point had moved, before another run"
    assert check.iterations == most


def test_a_run_that_diverges_begins_again_from_nearer(monkeypatch: pytest.MonkeyPatch) -> None:
    true, sizes = convergence_study.perturbed, list[float]()

    def far(iteration: Any, theta: Any, z: Any, *rest: Any) -> Any:
        sizes.append(float(z.norm()))
        return true(iteration, theta, 1e6 * z / z.norm() if len(sizes) <= times else z, *rest)

    monkeypatch.setattr(convergence_study, "perturbed", far)
    problem = linear_chain((2, 2, 2), kappa=3.0, n=12)
    times = 1
    check = check_convergence_rate(problem.risk)
    assert check.holds, check
    assert len(sizes) == 2
    assert sizes[1] < sizes[0] / 20
    times = 4
    sizes.clear()
    never = check_convergence_rate(problem.risk)
    assert never.holds is None
    assert never.outcome == "not applicable"
    assert "from no perturbation that rounding allows did the run stay" in never.reason
    assert len(sizes) == times


def test_another_rank_at_the_end_is_another_limit() -> None:
    risk = linear_chain((3, 2, 2), kappa=5.0, n=30).solved
    study = convergence_study.Study(risk, None, "gd", "optimal", 0, float("inf"), RateOptions())
    study.known["matvecs"] = 0
    spectrum, prediction = study._measure(risk)
    assert study._moved(risk, (risk.theta,), spectrum, prediction) < 1e-9
    there = risk.at(torch.zeros_like(risk.theta))
    assert study._moved(there, (there.theta,), spectrum, prediction) == float("inf")


def test_a_perturbation_below_rounding_leaves_no_digits() -> None:
    check = check_convergence_rate(softmax(kappa=10.0).risk, options=RateOptions(perturbation=1e-16))
    assert check.holds is None
    assert "leaves no digits for a run: kappa* is 10" in check.reason
    assert check.iterations == 0


def test_a_check_survives_a_file(tmp_path: Path) -> None:
    check = softmax_by_gradient_descent()
    check.save(tmp_path / "check.json")
    assert ConvergenceCheck.load(tmp_path / "check.json") == check
    (row,) = check.records()
    assert row["low"] <= row["observed"] <= row["high"]
    assert (check.gradient_norms > 0).all()
    assert (check.losses[:, 1].diff() <= 0).all()


def test_the_risk_is_left_alone() -> None:
    risk = softmax(kappa=10.0).risk
    before = risk.theta.clone()
    check_convergence_rate(risk, method="bnp")
    assert torch.equal(risk.theta, before)


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "adam"},
        {"step": "best"},
        {"step": -1.0},
        {"preconditioner": bnp.identity_preconditioner(bnp.ParameterSpace({"w": (3,)}))},
        {"method": "bnp", "preconditioner": bnp.identity_preconditioner(bnp.ParameterSpace({"w": (6,)}))},
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        check_convergence_rate(separable(), **arguments)


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": "some"}, {"rho": 1.0}, {"tolerance": 0.0}])
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        RateOptions(**options)


def test_the_gain_says_whether_bnp_helps() -> None:
    none = check_bnp_gain(softmax().risk)
    assert none.holds
    assert none.statement.startswith("BNP does not help")
    assert none.observed == pytest.approx(1.0, rel=0.02), "on white inputs"
    hopeless = check_bnp_gain(softmax(shift=30.0).risk, options=RateOptions(max_iterations=500))
    assert hopeless.holds is None
    assert "too slow" in hopeless.reason
    assert hopeless.details["predicted gain"] > 1e3, "the prediction is told all the same"


def test_the_gain_says_when_bnp_slows_down_and_when_nothing_is_known() -> None:
    slower = convergence_study._statement(0.5)
    assert slower == "BNP does not help: it needs 2 times more iterations than gradient descent"
    unknown = check_bnp_gain(softmax().risk.to(torch.float32))
    assert unknown.holds is None
    assert unknown.statement == "BNP changes the number of iterations by the ratio of the time constants"


@pytest.mark.parametrize("make", [softmax, pytest.param(relu, marks=pytest.mark.slow)])
def test_statistics_far_from_the_origin_do_not_disturb(make: Callable[..., KnownProblem]) -> None:
    """Means a hundred deviations from zero: what is small relative to the mean is not small to `P`."""
    check = check_convergence_rate(make(shift=100.0).risk, method="bnp")
    assert check.holds
    assert check.observed == pytest.approx(check.predicted, rel=0.015)


def test_statistics_that_have_not_settled_give_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A preconditioner that is not yet that of the limit contracts at another rate."""
    options = RateOptions(rho=0.9999, max_iterations=300)
    true = convergence_study.perturbed
    monkeypatch.setattr(convergence_study, "perturbed", lambda i, theta, z, size, seed: true(i, theta, z, 0.05, seed))
    check = check_convergence_rate(softmax().risk, method="bnp", options=options)
    assert check.holds is None, check
    assert check.iterations > 0


def bnp_run(
    problem: KnownProblem, rho: float, moved: float, count: int, *, from_zero: bool = False
) -> tuple[float, Trace]:
    """The best factor, and a run of BNP with running statistics from near its fixed point."""
    P = bnp.bnp_preconditioner(problem.solved)
    s = measure(problem.solved, P, null=False)
    iteration = RunningBNP(problem.risk, P, rates.best_step(s.largest, s.smallest), rho)
    theta, *rest = iteration.at_rest(problem.minimizer)
    z = s.vectors @ (1 / s.values)
    statistics = [t * (1 + moved) for t in rest]
    if from_zero:
        statistics = [torch.zeros_like(rest[0]), torch.ones_like(rest[1])]
    state = (theta + moved * P.apply(z) / z.norm(), *statistics)
    return rates.best_factor(s.kappa), run(iteration, state, below=0.0, most=count, deadline=1e18)


@pytest.mark.parametrize(("rho", "count"), [(0.5, 300), (0.98, 450)])
def test_parameters_and_statistics_have_their_own_rates(rho: float, count: int) -> None:
    """T15's triangular map: gradients keep the factor of the limit, statistics the slower of both."""
    factor, trace = bnp_run(relu(), rho, 1e-4, count)
    assert fit_rate(trace.norms, floor=1e-13).factor == pytest.approx(factor, rel=1e-3)
    assert fit_rate(trace.moved, floor=1e-12).factor == pytest.approx(max(factor, rho), rel=1e-3)


def test_the_start_from_zero_and_one_is_not_protected() -> None:
    """T15: `alpha < 2 / lambda_max(P_inf)` says nothing of the transient."""
    problem = softmax(shift=3.0)
    _, near = bnp_run(problem, 0.99, 1e-6, 40)
    _, far = bnp_run(problem, 0.99, 1e-6, 40, from_zero=True)
    assert near.norms[-1] < 1e-4 * near.norms[0]
    assert max(far.norms) > 100 * far.norms[0]


def clustered() -> EmpiricalRisk:
    values = torch.cat([torch.linspace(1.0, 1.06, 8, dtype=D), torch.tensor([5.0], dtype=D)])
    x = torch.diag((values * len(values) / 2).sqrt())
    return EmpiricalRisk(nn.Linear(9, 1, bias=False, dtype=D), mse, (x, torch.ones(9, 1, dtype=D)))


def test_a_run_without_a_straight_tail_says_what_ended_it(monkeypatch: pytest.MonkeyPatch) -> None:
    short = check_convergence_rate(clustered(), step=0.1, options=RateOptions(max_iterations=100))
    assert short.holds is None
    assert short.outcome == "iteration limit"
    assert short.reason.startswith("the iteration limit came before a straight tail, -1/log r = 9.491 is predicted; so")
    monkeypatch.setattr(rates, "_CYCLES", 1)
    swings = check_convergence_rate(clustered(), step=0.1)
    assert swings.holds is None
    assert swings.outcome == "no tail"
    assert f"no straight tail in {swings.iterations} iterations, -1/log r = 9.491 is predicted" in swings.reason
    assert "expected bias of the fit 0.0" in swings.reason


def test_clustered_eigenvalues_wait_for_the_slowest() -> None:
    """Straight lines in a plot long before the slowest mode is alone; a verdict needs it to be."""
    risk = clustered()
    check = check_convergence_rate(risk, step=0.1)
    assert check.holds, check
    assert check.details["cycles"] > 1
    short = check_convergence_rate(risk, step=0.1, options=RateOptions(max_iterations=300))
    assert short.holds is None
    assert "expected bias" in short.reason or "iteration limit" in short.reason


class Scalar(nn.Module):
    """A function of its three parameters, whatever the data."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], start: list[float]) -> None:
        super().__init__()
        self.function, self.p = function, nn.Parameter(torch.tensor(start, dtype=D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.p) * x


@pytest.mark.parametrize("start", [[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
def test_the_origin_as_a_singular_minimizer(start: list[float]) -> None:
    """`a^2 + b^4 + 5 c^2`: the null space at 0 is no manifold of minimizers, and the way there has lengths."""
    model = Scalar(lambda p: p[0] ** 2 + p[1] ** 4 + 5 * p[2] ** 2, start)
    risk = EmpiricalRisk(model, lambda output, y: (output - y).mean(), (torch.ones(2, 1, dtype=D), torch.zeros(2, 1)))
    check = check_convergence_rate(risk, time_limit=10.0)
    assert check.holds is None
    assert "singular minimizer" in check.reason
