"""The tracker's eigenvalues are those of `P^T H P` at each point, and its thresholds are where training diverges.

Bugs that only these tests catch: a measurement at a stale point or with a stale `P`; a threshold with the wrong sign of
a momentum term; weight decay that is forgotten; a warm start that hides a new largest eigenvalue; a resumed tracker
that begins anew; a measurement that changes the training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.derived import Shifted
from bnp_analysis.training import stability_threshold

Make = Callable[[Any], torch.optim.Optimizer]
LOSS = nn.functional.cross_entropy


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.randn(40, 6, dtype=torch.float64, generator=g)
    return bnp.models.mlp([6, 5, 3], activation="tanh", dtype=torch.float64), x, torch.arange(40) % 3


def trained(make: Make, steps: int = 12, **options: Any) -> tuple[bnp.SharpnessTracker, nn.Module, Any]:
    model, x, y = problem()
    optimizer = make(model.parameters())
    tracker = bnp.SharpnessTracker(model, LOSS, (x, y), optimizer, every=4, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
        tracker.step()
    return tracker, model, optimizer


OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd with decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_last_values_are_those_of_the_dense_matrix(kind: str) -> None:
    tracker, model, optimizer = trained(OPTIMIZERS[kind], k=3, tol=1e-4)
    _, x, y = problem()
    risk = bnp.EmpiricalRisk(model, LOSS, (x, y))
    H = bnp.hessian(risk)
    B = bnp.linalg.congruence(
        Shifted(H, 0.3) if "decay" in kind else H, bnp.optimizer_preconditioner(optimizer, model, space=risk)
    )
    exact = torch.linalg.eigvalsh(B.to_dense()).flip(0)
    found = tracker.result()
    assert found.steps.tolist() == [4, 8, 12]
    values, radius = torch.from_numpy(found.values[-1][:3]), torch.from_numpy(found.residuals[-1][:3])
    assert bool(((values - exact[:3]).abs() <= radius + 1e-9 * exact[0]).all())
    assert len(found.records()) == found.values.size


@pytest.mark.parametrize(
    "make",
    [
        lambda p, lr: torch.optim.SGD(p, lr=lr),
        lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.7),
        lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.7, dampening=0.5),
        lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.7, nesterov=True),
        lambda p, lr: torch.optim.SGD(p, lr=lr, weight_decay=0.5),
    ],
)
def test_training_diverges_above_the_threshold_and_not_below(make: Callable[..., torch.optim.Optimizer]) -> None:
    """On `c theta^2 / 2`, whose Hessian is `c`: the rate that puts `c` 1 % below and above the threshold."""
    for factor, diverges in ((0.99, False), (1.01, True)):
        theta = nn.Parameter(torch.ones(1, dtype=torch.float64))
        at_one, _ = stability_threshold(make([theta], 1.0))
        optimizer = make([theta], 1.0)
        decay = optimizer.param_groups[0]["weight_decay"]
        c = factor * at_one - decay
        for _ in range(1500):
            theta.grad = c * theta.detach()
            optimizer.step()
        assert (float(theta.detach().abs()) > 1) is diverges


def test_adam_diverges_above_its_threshold_and_not_below() -> None:
    """With a frozen second moment Adam averages gradients only: `P` is one, and `38 / lr` the edge."""
    for factor, diverges in ((0.99, False), (1.01, True)):
        theta = m = 1.0
        limit, _ = stability_threshold(torch.optim.Adam([nn.Parameter(torch.ones(1))], lr=0.1))
        assert limit == pytest.approx(380)
        for _ in range(4000):
            m = 0.9 * m + 0.1 * factor * limit * theta
            theta -= 0.1 * m
        assert (abs(theta) > 1) is diverges


def test_adagrad_has_that_of_gradient_descent_under_its_own_P() -> None:
    assert stability_threshold(torch.optim.Adagrad([nn.Parameter(torch.ones(1))], lr=0.1))[0] == pytest.approx(20)


def test_decoupled_decay_moves_the_threshold() -> None:
    p = [nn.Parameter(torch.ones(1))]
    plain, _ = stability_threshold(torch.optim.AdamW(p, lr=0.1, weight_decay=0.0))
    decayed, _ = stability_threshold(torch.optim.AdamW(p, lr=0.1, weight_decay=1.0))
    assert plain == pytest.approx(380)
    assert decayed == pytest.approx(19 * 1.9 / 0.1)


def test_where_there_is_no_threshold_the_reason_is_said() -> None:
    a, b = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    for optimizer, words in (
        (torch.optim.SGD([{"params": [a]}, {"params": [b], "lr": 0.2}], lr=0.1), "different rates"),
        (torch.optim.Adadelta([a]), "none is known for Adadelta"),
        (torch.optim.SGD([a], lr=0.0), "rate of zero"),
        (torch.optim.Adagrad([a], lr=0.1, lr_decay=0.1), "a rate that decays by itself"),
    ):
        value, why = stability_threshold(optimizer)
        assert math.isnan(value)
        assert words in why
    tracker, *_ = trained(OPTIMIZERS["adam"], preconditioner=None, steps=4)
    assert "is not what Adam applies" in str(tracker.result())


def test_more_values_are_tracked_as_they_come_near_the_threshold() -> None:
    tracker, *_ = trained(lambda p: torch.optim.SGD(p, lr=0.1), k=1, grow=1e-3, most=3, steps=16)
    values = tracker.result().values
    assert (values < math.inf).sum(axis=1).tolist() == [1, 2, 3, 3]


def test_a_resumed_tracker_has_the_measurements_of_one_run() -> None:
    whole, *_ = trained(OPTIMIZERS["adam"], k=2)
    model, x, y = problem()
    optimizer = OPTIMIZERS["adam"](model.parameters())
    tracker = bnp.SharpnessTracker(model, LOSS, (x, y), optimizer, every=4, k=2)
    for done in range(1, 13):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
        tracker.step()
        if done == 6:
            state = tracker.state_dict()
            tracker = bnp.SharpnessTracker(model, LOSS, (x, y), optimizer, every=4, k=2)
            tracker.load_state_dict(state)
    torch.testing.assert_close(torch.from_numpy(tracker.result().values), torch.from_numpy(whole.result().values))
    assert tracker.result().steps.tolist() == [4, 8, 12]
    with pytest.raises(InvalidInputError, match="no state"):
        tracker.load_state_dict({"k": 1})
    other = bnp.models.mlp([6, 3], dtype=torch.float64)
    tracker = bnp.SharpnessTracker(other, LOSS, (x, y), torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(InvalidInputError, match="the saved eigenvectors have 53 entries, the model 21"):
        tracker.load_state_dict(whole.state_dict())


def test_it_is_a_probe_of_train_and_changes_nothing() -> None:
    def run(probes: bool) -> tuple[Any, nn.Module, bnp.SharpnessTracker]:
        model, x, y = problem()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        tracker = bnp.SharpnessTracker(model, LOSS, (x, y), optimizer, every=2)
        found = bnp.train(model, LOSS, (x, y), optimizer, epochs=2, batch_size=10, probes=[tracker] if probes else [])
        return found, model, tracker

    _, plain, _ = run(False)
    found, watched, tracker = run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert tracker.result().steps.tolist() == [2, 4, 6, 8]  # nothing before the first step: Adam has no P yet
    assert "sharpness" in str(found.probes)


def test_the_preconditioner_that_trains_may_be_given() -> None:
    """A `BNP`: its `P` of the last step, under which gradient descent has a threshold."""
    model, x, y = problem()
    pre, optimizer = bnp.BNP(model), torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = bnp.SharpnessTracker(model, LOSS, (x, y), optimizer, preconditioner=pre, tol=1e-4)
    LOSS(model(x), y).backward()
    pre.step()
    optimizer.step()
    tracker.measure()
    risk = bnp.EmpiricalRisk(model, LOSS, (x, y))
    B = bnp.linalg.congruence(bnp.hessian(risk), pre.preconditioner(risk.space))
    found = tracker.result()
    assert found.values[-1, 0] == pytest.approx(float(torch.linalg.eigvalsh(B.to_dense())[-1]), rel=1e-4)
    assert found.threshold.tolist() == pytest.approx([20.0])
    assert "P = BNP" in str(found)


def test_before_the_first_measurement_it_says_so() -> None:
    tracker, *_ = trained(OPTIMIZERS["sgd"], steps=3)
    found = tracker.result()
    assert str(found) == "sharpness: nothing measured yet"
    assert found.records() == []


@pytest.mark.parametrize("preconditioner", ["bnp", None])
def test_other_preconditioners(preconditioner: str | None) -> None:
    tracker, model, _ = trained(OPTIMIZERS["sgd"], preconditioner=preconditioner, tol=1e-4)
    _, x, y = problem()
    risk = bnp.EmpiricalRisk(model, LOSS, (x, y))
    B = bnp.hessian(risk)
    B = B if preconditioner is None else bnp.linalg.congruence(B, bnp.bnp_preconditioner(risk))
    exact = float(torch.linalg.eigvalsh(B.to_dense())[-1])
    assert tracker.result().values[-1, 0] == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, "must be positive"),
        ({"tol": 2.0}, "between 0 and 1"),
        ({"curvature": "x"}, "unknown curvature"),
        ({"preconditioner": "adam"}, "must be 'optimizer'"),
        ({"preconditioner": 3}, "must be 'optimizer'"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], words: str) -> None:
    model, x, y = problem()
    with pytest.raises(InvalidInputError, match=words):
        bnp.SharpnessTracker(model, LOSS, (x, y), torch.optim.SGD(model.parameters(), lr=0.1), **options)
