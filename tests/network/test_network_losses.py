"""Catches: a loss that reads the caller's parameters and loses that term's derivatives; a penalty or residual in the
supported form with other values or derivatives than by hand; a Gauss-Newton matrix that leaves it out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from network_models import classify, mlp, numbers, split, table
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.errors import DerivativeError, InvalidInputError


def slope(net: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    with torch.enable_grad():
        points = points.clone().requires_grad_()
        (found,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
    return found


class Penalized(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o, y) + self.model.fc1.weight.square().sum()


class Task(nn.Sequential):
    def loss(self, o: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(o, y) + self[0].weight.square().sum()


class Size(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: Tensor) -> Tensor:
        ctx.save_for_backward(w)
        return w.square().sum()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


def with_list(o: Tensor, y: Tensor, weights: list[Tensor]) -> Tensor:
    return F.cross_entropy(o, y) + sum(w.square().sum() for w in weights)


LIVE: dict[str, Callable[[nn.Module], Any]] = {
    "penalty": lambda m: lambda o, y: F.cross_entropy(o, y) + sum(p.square().sum() for p in m.parameters()),
    "one bias": lambda m: lambda o, y: F.cross_entropy(o, y) + m.fc1.bias.abs().sum(),
    "data": lambda m: lambda o, y: F.cross_entropy(o, y) * m.fc1.weight.data.norm(),
    "custom function": lambda m: lambda o, y: F.cross_entropy(o, y) + Size.apply(m.fc1.weight),
    "residual": lambda m: lambda o, y: slope(m, torch.ones(3, 4, dtype=torch.float64)).square().mean(),
    "features": lambda m: lambda o, y: F.cross_entropy(o, y) + m.fc1(numbers(3, 4)).square().mean(),
    "module": Penalized,
    "partial": lambda m: functools.partial(with_list, weights=list(m.parameters())),
}


@pytest.mark.parametrize("name", LIVE)
def test_a_loss_that_reads_the_callers_parameters_is_refused(name: str) -> None:
    model = mlp()
    with pytest.raises(DerivativeError, match=r"fc1\.(weight|bias).*would lack.*loss\(output, y, model\)"):
        bnp.EmpiricalRisk(model, LIVE[name](model), table())


def test_a_method_of_the_model_as_its_loss() -> None:
    model = Task(nn.Linear(4, 3)).double()
    with pytest.raises(DerivativeError, match=r"0\.weight"):
        bnp.EmpiricalRisk(model, model.loss, table())


def test_other_tensors_of_a_loss_are_constants() -> None:
    """Another network, learned weights of the loss, a frozen copy of the model."""
    import copy

    model = mlp()
    teacher, factor = copy.deepcopy(model), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    inputs = table()[0]
    risk = bnp.EmpiricalRisk(model, lambda o, y: factor * F.mse_loss(o, teacher(inputs) + 1), table())
    assert risk.value.item() == pytest.approx(2.0, rel=1e-12)


def by_hand(risk: bnp.EmpiricalRisk, theta: Tensor, x: Tensor) -> Tensor:
    t = risk.space.unflatten(theta)
    return torch.tanh(x @ t["fc1.weight"].T + t["fc1.bias"]) @ t["fc2.weight"].T + t["fc2.bias"]


POINTS = numbers(7, 4, seed=3)
Truth = Callable[[bnp.EmpiricalRisk, Tensor], Tensor]
GIVEN: dict[str, tuple[Any, Truth]] = {
    "penalty": (
        lambda o, y, model: F.cross_entropy(o, y) + 0.1 * sum(p.square().sum() for p in model.parameters()),
        lambda risk, theta: 0.1 * theta.square().sum(),
    ),
    "some of them": (
        lambda o, y, model: F.cross_entropy(o, y) + (model.fc1.weight**4).sum(),
        lambda risk, theta: (risk.space.unflatten(theta)["fc1.weight"] ** 4).sum(),
    ),
    "residual": (
        lambda o, y, net: F.cross_entropy(o, y) + (slope(net, POINTS) - 1).square().mean(),
        lambda risk, theta: (slope(lambda x: by_hand(risk, theta, x), POINTS) - 1).square().mean(),
    ),
    "features": (
        lambda o, y, net: F.cross_entropy(o, y) + torch.tanh(net.fc1(POINTS)).square().mean(),
        lambda risk, theta: (
            torch.tanh(POINTS @ (t := risk.space.unflatten(theta))["fc1.weight"].T + t["fc1.bias"]).square().mean()
        ),
    ),
}


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("name", GIVEN)
def test_a_loss_with_the_network_has_all_derivatives(name: str, batches: int) -> None:
    loss, extra = GIVEN[name]
    x, y = table()
    risk = bnp.EmpiricalRisk(mlp(), loss, (x, y) if batches == 1 else split(x, y, (5, 4)))

    def truth(theta: Tensor) -> Tensor:
        return F.cross_entropy(by_hand(risk, theta, x), y) + extra(risk, theta)

    for at in (risk, risk.at(1.3 * risk.theta + 0.1)):
        torch.testing.assert_close(at.value, truth(at.theta).detach(), rtol=1e-12, atol=0)
        expected = torch.autograd.functional.jacobian(truth, at.theta)
        torch.testing.assert_close(at.gradient, expected, rtol=1e-11, atol=1e-13)
        H = torch.autograd.functional.hessian(truth, at.theta)
        torch.testing.assert_close(bnp.hessian(at).to_dense(), H, rtol=1e-10, atol=1e-12)
        rows = at.space.indices("fc1")
        torch.testing.assert_close(bnp.hessian(at, block="fc1").to_dense(), H[rows][:, rows], rtol=1e-10, atol=1e-12)


def test_a_loss_module_may_take_the_network_too() -> None:
    class Loss(nn.Module):
        def forward(self, o: Tensor, y: Tensor, model: nn.Module) -> Tensor:
            return F.cross_entropy(o, y) + model.fc2.bias.square().sum()

    risk = bnp.EmpiricalRisk(mlp(), Loss(), table())
    difference = risk.gradient - classify(mlp(), table()).gradient
    own = risk.space.unflatten(risk.theta)["fc2.bias"]
    torch.testing.assert_close(difference[risk.space.slice_of("fc2.bias")], 2 * own, rtol=1e-11, atol=0)


def test_a_loss_that_does_not_say_what_it_takes_gets_outputs_and_targets() -> None:
    """`torch.dist` is not written in Python, and has no signature."""
    x, y = numbers(9, 4), numbers(9, 3)
    assert bnp.EmpiricalRisk(mlp(), torch.dist, (x, y)).value.item() == pytest.approx(
        float((mlp()(x) - y).norm().detach()), rel=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_of_targets_alone_has_derivatives_of_zero(dtype: torch.dtype) -> None:
    risk = bnp.EmpiricalRisk(mlp(), lambda o, y: (2.0 * y).mean(), table(), dtype=dtype)
    assert risk.gradient.dtype == dtype
    assert risk.gradient.tolist() == [0.0] * risk.space.dim
    assert not bnp.hessian(risk).to_dense().any()


@pytest.mark.parametrize(
    "verb",
    [
        bnp.gauss_newton,
        bnp.fisher,
        bnp.null_directions,
        bnp.layer_table,
        bnp.check_theory,
        lambda r: bnp.bnp_preconditioner(r, output_scale=True),
    ],
)
def test_matrices_of_the_outputs_curvature_refuse_such_a_loss(verb: Any) -> None:
    risk = bnp.EmpiricalRisk(mlp(), GIVEN["penalty"][0], table())
    with pytest.raises(InvalidInputError, match=r"would be left out\. hessian\(risk\).*shift"):
        verb(risk)
