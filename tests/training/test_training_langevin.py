"""Langevin dynamics against laws in closed form: of a quadratic, at the rate at which it runs.

Each output unit of one dense layer with a quadratic loss is a chain of its own, so that thousands run at once. Bugs
that only these tests catch: noise of another covariance than the drift's `P P^T`, a factor 2 between rate and noise,
`P^T` in place of `P`, a generator that does not go on where a saved chain stopped, a running `P` applied twice.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bnp_loops import backward, network, parameters
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError

CHAINS, ROWS, T = 3000, 12, 0.5


class Quadratic:
    """`U = |H^ w - y|^2 / 2` of each unit of a dense layer: its matrix `A`, mean and law at a rate are known."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(5)
        h = torch.randn(ROWS, 2, generator=g, dtype=torch.float64) * torch.tensor([0.3, 2.0]) + 1.5
        self.x = h.double()
        y = torch.randn(ROWS, generator=g, dtype=torch.float64)
        self.y = y[:, None].expand(ROWS, CHAINS)
        self.rows = torch.cat([self.x, torch.ones(ROWS, 1, dtype=torch.float64)], 1)  # the bias stands last here
        self.A = self.rows.T @ self.rows
        self.mean = torch.linalg.solve(self.A, self.rows.T @ y)
        self.model = nn.Linear(2, CHAINS).double()

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        return ROWS * (out - y).square().sum(1).mean() / 2

    def P(self, **options: Any) -> Any:
        return bnp.bnp_preconditioner(bnp.EmpiricalRisk(self.model, self.loss, (self.x, self.y)), **options)

    def one(self, P: Any) -> Tensor:
        """`P` of one unit, dense, in the order weights, bias."""
        if P is None:
            return torch.eye(3, dtype=torch.float64)
        return P.block(("", 0)).apply(torch.eye(3, dtype=torch.float64))

    def covariance(self, lr: float, P: Tensor) -> Tensor:
        """That of the invariant law of the steps, T2 and the variance of a first-order autoregression."""
        B = P.T @ self.A @ P
        return T * P @ torch.linalg.inv(B - lr / 4 * B @ B) @ P.T

    def put(self, w: Tensor) -> None:
        with torch.no_grad():
            self.model.weight.copy_(w[:, :2])
            self.model.bias.copy_(w[:, 2])

    def units(self) -> Tensor:
        return torch.cat([self.model.weight, self.model.bias[:, None]], 1).detach().clone()

    def run(self, sampler: torch.optim.Optimizer, steps: int) -> Tensor:
        for _ in range(steps):
            sampler.zero_grad()
            self.loss(self.model(self.x), self.y).backward()
            sampler.step()
        return self.units()


def whitened(w: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (w - mean).T, upper=False).T


def assert_standard_normal(z: Tensor) -> None:
    """Means and second moments within five standard errors."""
    count, dim = z.shape
    assert float(z.mean(0).abs().max()) < 5 / math.sqrt(count)
    second = z.T @ z / count
    assert float((second - torch.eye(dim)).abs().max()) < 5 * math.sqrt(2 / count)


@pytest.mark.parametrize("which", ["plain", "fixed", "running"])
def test_the_law_of_a_quadratic_is_invariant(which: str) -> None:
    problem = Quadratic()
    P = None if which == "plain" else problem.P(eps1=1e-2, eps2=1e-4)
    dense = problem.one(P)
    # Half of the largest stable rate: the covariance along the stiffest direction is twice that of exp(-U/T).
    lr = 2 / float(torch.linalg.eigvalsh(dense.T @ problem.A @ dense)[-1])
    given = bnp.BNP(problem.model) if which == "running" else P
    sampler = bnp.SGLD(problem.model.parameters(), lr=lr, preconditioner=given, temperature=T, seed=3)
    law = problem.covariance(lr, dense)
    z = torch.randn(CHAINS, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    problem.put(problem.mean + z @ torch.linalg.cholesky(law).T)
    end = whitened(problem.run(sampler, 25), problem.mean, law)
    assert_standard_normal(end)
    # The draws are new ones, which a chain that stands still would not have.
    slowest = 1 - lr * float(torch.linalg.eigvalsh(dense.T @ problem.A @ dense)[0]) / 2
    expected = torch.tensor(slowest) ** 25
    assert float((end * z).mean(0).abs().max()) < float(expected) + 5 / math.sqrt(CHAINS)


def test_the_condition_number_predicts_how_fast_it_mixes() -> None:
    problem, lag = Quadratic(), 12
    kappas = []
    for P in (None, problem.P()):
        dense = problem.one(P)
        values, vectors = torch.linalg.eigh(dense.T @ problem.A @ dense)
        kappa = bnp.condition_number(bnp.DenseOperator(dense.T @ problem.A @ dense)).value
        lr = 1 / float(values[-1])
        sampler = bnp.SGLD(problem.model.parameters(), lr=lr, preconditioner=P, temperature=T)
        law = problem.covariance(lr, dense)
        z = torch.randn(CHAINS, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        start = problem.mean + z @ torch.linalg.cholesky(law).T
        problem.put(start)
        end = problem.run(sampler, lag)

        def slow(w: Tensor, dense: Tensor = dense, along: Tensor = vectors[:, 0]) -> Tensor:
            return torch.linalg.solve(dense, (w - problem.mean).T).T @ along

        found = float(torch.corrcoef(torch.stack([slow(start), slow(end)]))[0, 1])
        assert abs(found - (1 - 1 / (2 * kappa)) ** lag) < 5 / math.sqrt(CHAINS)
        kappas.append(kappa)
    # Steps until a correlation of 1/e: in the ratio of the condition numbers.
    assert kappas[0] > 20 * kappas[1]


def test_a_running_P_of_fixed_data_is_the_fixed_one() -> None:
    ends = []
    for running in (False, True):
        problem = Quadratic()
        problem.put(torch.zeros(CHAINS, 3, dtype=torch.float64))
        P = bnp.BNP(problem.model) if running else problem.P(eps1=1e-2, eps2=1e-4)
        ends.append(problem.run(bnp.SGLD(problem.model.parameters(), lr=0.1, preconditioner=P, seed=1), 5))
    assert float((ends[0] - ends[1]).abs().max()) < 1e-10


@pytest.mark.parametrize("kind", ["dense", "padding", "groups"])
@pytest.mark.parametrize("bias", [True, False])
def test_without_temperature_it_is_descent_at_half_the_rate(kind: str, bias: bool) -> None:
    model, x, y = network(kind, bias=bias)
    twin = copy.deepcopy(model)
    pre, sgd = bnp.BNP(model), torch.optim.SGD(model.parameters(), lr=0.05)
    sampler = bnp.SGLD(twin.parameters(), lr=0.1, preconditioner=bnp.BNP(twin), temperature=0)
    for _ in range(3):
        for net, steps in ((model, (pre.step, sgd.step)), (twin, (sampler.step,))):
            net.zero_grad()
            backward(net, x, y)
            for step in steps:
                step()
    assert torch.equal(parameters(model), parameters(twin))


def test_the_noise_of_a_running_P_has_its_covariance() -> None:
    """One step without a gradient is `sqrt(lr) P xi`, with the `P` that `preconditioner()` gives."""
    model, x, y = network("groups")
    pre = bnp.BNP(model)
    sampler = bnp.SGLD(model.parameters(), lr=0.3, preconditioner=pre, temperature=2.0, seed=7)
    before = parameters(model)
    (0 * nn.functional.cross_entropy(model(x), y)).backward()
    sampler.step()
    xi = torch.randn(len(before), generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = math.sqrt(0.6) * pre.preconditioner().apply(xi)
    assert float((parameters(model) - before - expected).abs().max()) < 1e-12


def makers() -> dict[str, Callable[[nn.Module, Tensor, Tensor], Any]]:
    def fixed(model: nn.Module, x: Tensor, y: Tensor) -> Any:
        return bnp.bnp_preconditioner(bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y)))

    return {"plain": lambda *_: None, "fixed": fixed, "running": lambda model, *_: bnp.BNP(model, q="measured")}


@pytest.mark.parametrize("which", ["plain", "fixed", "running"])
def test_a_saved_chain_goes_on_bit_for_bit(which: str) -> None:
    model, x, y = network()
    P = makers()[which](model, x, y)
    sampler = bnp.SGLD(model.parameters(), lr=0.1, preconditioner=P, temperature=0.1, seed=4)
    schedule = torch.optim.lr_scheduler.StepLR(sampler, 2, 0.5)

    def go(net: nn.Module, chain: Any, plan: Any, steps: int) -> Tensor:
        for _ in range(steps):
            chain.zero_grad()
            backward(net, x, y)
            chain.step()
            plan.step()
        return parameters(net)

    go(model, sampler, schedule, 3)
    saved = copy.deepcopy((model.state_dict(), sampler.state_dict(), schedule.state_dict()))
    other_model, other = copy.deepcopy((model, sampler))
    expected = go(model, sampler, schedule, 4)
    again, _, _ = network()
    resumed = bnp.SGLD(again.parameters(), lr=0.1, preconditioner=makers()[which](again, x, y), seed=99)
    plan = torch.optim.lr_scheduler.StepLR(resumed, 2, 0.5)
    for target, state in zip((again, resumed, plan), saved, strict=True):
        target.load_state_dict(state)
    assert torch.equal(go(again, resumed, plan, 4), expected)
    plan = torch.optim.lr_scheduler.StepLR(other, 2, 0.5)
    plan.load_state_dict(saved[2])
    assert torch.equal(go(other_model, other, plan, 4), expected)


def test_a_closure_and_groups_of_their_own_rates() -> None:
    model, x, y = network()
    twin = copy.deepcopy(model)
    first, *rest = model.parameters()
    sampler = bnp.SGLD([{"params": [first], "lr": 0.01}, {"params": rest}], lr=0.1, temperature=0)

    def closure() -> Tensor:
        sampler.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    loss = sampler.step(closure)
    assert float(loss.detach()) > 0
    backward(twin, x, y)
    for p, moved, rate in zip(twin.parameters(), model.parameters(), (0.005, *[0.05] * len(rest)), strict=True):
        assert torch.allclose(p - rate * p.grad, moved, atol=1e-15)  # type: ignore[operator]


def test_what_it_refuses() -> None:
    model, x, y = network()
    twin = copy.deepcopy(model)
    P, of = makers()["fixed"](model, x, y), model.parameters
    wrong: list[tuple[str, Callable[[], Any]]] = [
        ("lr", lambda: bnp.SGLD(of(), lr=0)),
        ("lr", lambda: bnp.SGLD(of(), lr=math.nan)),
        ("temperature", lambda: bnp.SGLD(of(), lr=1, temperature=-1)),
        ("seed", lambda: bnp.SGLD(of(), lr=1, seed=0.5)),  # type: ignore[arg-type]
        ("params", lambda: bnp.SGLD([], lr=1)),
        ("params", lambda: bnp.SGLD(next(of()), lr=1)),
        ("params", lambda: bnp.SGLD(["weight"], lr=1)),
        ("preconditioner", lambda: bnp.SGLD(of(), lr=1, preconditioner=0.5)),  # type: ignore[arg-type]
        ("preconditioner", lambda: bnp.SGLD([next(of())], lr=1, preconditioner=P)),
        ("real and whole", lambda: bnp.SGLD([nn.Parameter(torch.zeros(2, dtype=torch.complex64))], lr=1)),
        ("same parameters", lambda: bnp.SGLD(of(), lr=1, preconditioner=bnp.BNP(twin))),
    ]
    for named, call in wrong:
        with pytest.raises(InvalidInputError, match=named):
            call()
    pre = bnp.BNP(model).attach(torch.optim.SGD(of(), lr=0.1))
    with pytest.raises(InvalidInputError, match="attached"):
        bnp.SGLD(of(), lr=1, preconditioner=pre)
    pre.close()
    first, *rest = of()
    mixed = bnp.SGLD([{"params": [first], "lr": 0.01}, {"params": rest}], lr=0.1, preconditioner=P)
    backward(model, x, y)
    with pytest.raises(InvalidInputError, match="one lr="):
        mixed.step()
    sampler = bnp.SGLD(of(), lr=0.1, preconditioner=P)
    first.grad = None
    with pytest.raises(InvalidInputError, match="have gradients"):
        sampler.step()
    table = nn.Embedding(3, 2, sparse=True)
    sampler = bnp.SGLD(table.parameters(), lr=0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(InvalidInputError, match=r"needs dense gradients.*sparse=False"):
        sampler.step()
    # The loop calls step() too: P P^T would be applied twice.
    running = bnp.BNP(twin)
    sampler = bnp.SGLD(twin.parameters(), lr=0.1, preconditioner=running)
    backward(twin, x, y)
    running.step()
    with pytest.raises(InvalidInputError, match="applied twice"):
        sampler.step()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s.pop("generator"), "no state of SGLD"),
        (lambda s: s.update(generator=torch.zeros(3, dtype=torch.uint8)), "generator"),
        (lambda s: s.update(preconditioner=None), "running preconditioner"),
        (lambda s: s["param_groups"].append(s["param_groups"][0]), "groups"),
        (lambda s: s["param_groups"][0].update(lr=math.nan), "lr"),
        (lambda s: s["preconditioner"].pop("layers"), "BNP"),
    ],
)
def test_a_damaged_state_changes_nothing(change: Callable[[Any], Any], named: str) -> None:
    model, x, y = network()
    sampler = bnp.SGLD(model.parameters(), lr=0.1, preconditioner=bnp.BNP(model))
    backward(model, x, y)
    sampler.step()
    before = copy.deepcopy(sampler.state_dict())
    damaged = copy.deepcopy(before)
    change(damaged)
    with pytest.raises(InvalidInputError, match=named):
        sampler.load_state_dict(damaged)
    after = sampler.state_dict()
    assert torch.equal(before["generator"], after["generator"])
    assert before["param_groups"] == after["param_groups"]
    assert before["preconditioner"]["layers"]["0"]["mean"].equal(after["preconditioner"]["layers"]["0"]["mean"])


def divergence(model: nn.Module, x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """`sum_j d(P P^T)_ij / d theta_j` of the moments at `theta`, by central differences."""
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    theta, step = parameters(model), 1e-5
    total = torch.zeros_like(theta)
    for j in range(len(theta)):
        e = torch.zeros_like(theta)
        e[j] = 1.0
        ahead, back = (bnp.bnp_preconditioner(risk.at(theta + s * step * e), **options) for s in (1, -1))
        total += (ahead.direction(e) - back.direction(e)) / (2 * step)
    return total


def test_the_neglected_drift_is_zero_in_feed_forward_networks_and_only_there() -> None:
    class Net(nn.Module):
        def __init__(self, uses: int) -> None:
            super().__init__()
            self.first, self.last, self.uses = nn.Linear(2, 2), nn.Linear(2, 2), uses

        def forward(self, h: Tensor) -> Tensor:
            for _ in range(self.uses):
                h = self.first(h).tanh()
            return self.last(h)

    x, y = network("dense")[1][:, :2], torch.arange(12) % 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        once, twice = Net(1).double(), Net(2).double()
    damping = {"eps1": 1e-2, "eps2": 1e-4}
    assert float(divergence(once, x, y, **damping).abs().max()) < 1e-7
    assert float(divergence(once, x, y, **damping, output_scale=True).abs().max()) > 1e-2
    assert float(divergence(twice, x, y, **damping).abs().max()) > 1e-2


def test_noise_that_would_not_fit_is_refused() -> None:
    """A schedule that sets a negative rate; BNP attached to a sampler, which would precondition the gradient alone."""
    model = torch.nn.Linear(3, 2)
    sampler = bnp.SGLD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match="another law"):
        bnp.BNP(model).attach(sampler)
    sampler.param_groups[0]["lr"] = -1.0
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(InvalidInputError, match="lr must be a number of at least 0"):
        sampler.step()
