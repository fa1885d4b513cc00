"""What a user's model, loss, data and `count=` raise leaves as the project's error, with the place, from the original.

Only these tests would notice: a raw error of torch or Python from inside a verb, an operation that the symmetries
cannot read and that ends in an assertion, `count=` called in another way than documented, a state kept between calls
that is taken for randomness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from network_models import classes, classify, mlp, numbers, table
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, NoDerivativeError, StochasticModelError
from bnp_analysis.network.batches import Batches


class Odd(nn.Module):
    """Fails as `act` does, inside of `inner`."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = Act(act)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.inner(x))


class Act(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x)


def refuse(x: Tensor) -> Tensor:
    assert x.shape[0] == 3
    return x


@pytest.mark.parametrize(
    ("act", "kind"),
    [
        (lambda x: {}["missing"], KeyError),
        (lambda x: x + None, TypeError),
        (lambda x: x @ x.new_ones(7, 7), RuntimeError),
        (lambda x: x[:, torch.tensor([9])], IndexError),
        (refuse, AssertionError),
        (lambda x: x.nothing, AttributeError),
        (lambda x: 1 / 0, ZeroDivisionError),
    ],
)
def test_a_model_that_fails_is_told_with_the_module_and_the_batch(act: Any, kind: type[Exception]) -> None:
    with pytest.raises(
        InvalidInputError, match=rf"batch 0 cannot be computed: {kind.__name__} in inner \(Act\)"
    ) as seen:
        bnp.EmpiricalRisk(Odd(act), F.cross_entropy, table())
    assert isinstance(seen.value.__cause__, kind)


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (lambda o, y: F.mse_loss(o, y.view(3, 4)), RuntimeError),
        (lambda o, y: F.cross_entropy(o, y.float().unsqueeze(1)), RuntimeError),
        (lambda o, y: F.cross_entropy(o, y + 7), IndexError),
        (lambda o, y: y["labels"], IndexError),
        (lambda o: o.sum(), TypeError),
    ],
)
def test_a_loss_that_fails_is_told_with_the_batch_and_the_outputs(loss: Any, kind: type[Exception]) -> None:
    with pytest.raises(InvalidInputError, match=r"the loss of batch 0, of outputs \(\d+, 3\), cannot") as seen:
        bnp.EmpiricalRisk(mlp(), loss, table())
    assert isinstance(seen.value.__cause__, kind)


def test_an_output_that_is_not_there() -> None:
    with pytest.raises(InvalidInputError, match="outputs of the model for batch 0") as seen:
        classify(mlp(), table(), output=lambda o: o.logits)
    assert isinstance(seen.value.__cause__, AttributeError)


def test_data_that_fail_are_told_with_the_batch() -> None:
    class Broken(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> Any:
            return numbers(4), {0: 0, 1: 1, 2: 2, 3: 0, 4: 1}[i]

    with pytest.raises(InvalidInputError, match="batch 2 of the data cannot") as seen:
        classify(mlp(), torch.utils.data.DataLoader(Broken(), 2))
    assert isinstance(seen.value.__cause__, KeyError)


class Count(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise NotImplementedError("later")


def test_a_derivative_that_fails_is_told() -> None:
    model = nn.Sequential(mlp(), Act(Count.apply))
    risk = classify(model, table())
    for verb in (
        lambda: risk.gradient,
        lambda: bnp.hessian(risk) @ risk.theta,
        lambda: bnp.gauss_newton(risk).to_dense(),
    ):
        with pytest.raises(InvalidInputError, match="NotImplementedError: later") as seen:
            verb()
        assert isinstance(seen.value.__cause__, NotImplementedError)


def test_a_loss_without_a_second_derivative_is_told_by_every_verb() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, o: Tensor, y: Tensor) -> Tensor:
            ctx.save_for_backward(o, y)
            return (o - y).square().mean()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Any:
            o, y = ctx.saved_tensors
            return g * 2 * (o - y) / o.numel(), None

    risk = bnp.EmpiricalRisk(mlp(), Once.apply, (numbers(8, 4), numbers(8, 3, seed=1)))
    v = risk.theta
    verbs: list[Callable[[], Any]] = [
        lambda: bnp.hessian(risk) @ v,
        lambda: bnp.gauss_newton(risk) @ v,
        lambda: bnp.condition_number(bnp.gauss_newton(risk)),
        lambda: bnp.null_directions(risk),
        lambda: bnp.layer_table(risk),
        lambda: bnp.kfac_preconditioner(risk, damping=1e-3),
        lambda: bnp.diagonal_preconditioner(risk),
        lambda: bnp.bnp_preconditioner(risk, output_scale=True),
    ]
    for verb in verbs:
        with pytest.raises(NoDerivativeError, match="no second derivative in torch"):
            verb()


class Scaled(nn.Module):
    """A parameter and an activation, by an operation of the kind of DoRA's."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.m, self.how = nn.Linear(4, 5), nn.Linear(5, 3), nn.Parameter(1 + numbers(5).abs()), how

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.how(self.m, self.a(x)))


OPERATIONS: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda m, h: h * (m / (1 + h * h)),
    lambda m, h: torch.div(m, 2 + h.abs()),
    lambda m, h: (m * m) / (2 + h.tanh()) + h,
    lambda m, h: m**2 / (1 + h.exp()),
    torch.atan2,
    lambda m, h: torch.where(h > 0, m, h),
    lambda m, h: torch.pow(m.abs(), h.tanh()),
    lambda m, h: F.conv1d(h.unsqueeze(1), m.view(1, 1, 5), padding=2).squeeze(1),
    lambda m, h: torch.einsum("bi,i->bi", h, m),
    lambda m, h: h + torch.fft.rfft(m.expand_as(h)).abs().sum(dim=1, keepdim=True),
    lambda m, h: torch.stack([h, m.expand_as(h)]).amax(dim=0),
]


@pytest.mark.parametrize("how", OPERATIONS)
def test_operations_without_a_rule_are_not_analysed(how: Callable[[Tensor, Tensor], Tensor]) -> None:
    model = Scaled(how).double()
    with torch.no_grad():
        for k, p in enumerate(model.parameters()):
            p.copy_(0.5 + 0.3 * numbers(*p.shape, seed=k).abs())
    risk = bnp.EmpiricalRisk(model, F.cross_entropy, (numbers(12, 4), classes(12, 3)))
    null = bnp.null_directions(risk)
    A = bnp.gauss_newton(risk).to_dense()
    assert float((A @ null.basis).norm()) <= 1e-12 * float(A.norm())
    if how in (OPERATIONS[0], OPERATIONS[-1]):
        bnp.layer_table(risk)


@pytest.mark.parametrize(
    "count",
    [
        lambda x, y: float(2 * len(y)),
        lambda pair: float(2 * len(pair[1])),
        lambda x, y, scale=2.0: scale * len(y),
        lambda pair, scale=2.0: scale * len(pair[1]),
        lambda *both: 2.0 * len(both[1]),
    ],
)
def test_count_takes_x_and_y_or_the_pair(count: Callable[..., float]) -> None:
    x, y = numbers(9, 4), classes(9, 3)
    risk = classify(mlp(), [(x[:5], y[:5]), (x[5:], y[5:])], count=count)
    assert risk.batches.total == 18.0
    assert float(risk.value) == pytest.approx(float(classify(mlp(), (x, y)).value), rel=1e-6)


@pytest.mark.parametrize("count", [lambda: 3, lambda x, y, z: 3, lambda *, x, y: 3, 3])
def test_count_of_another_kind_is_refused(count: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"count= is a function of a batch, count=lambda x, y"):
        classify(mlp(), table(), count=count)


def test_count_that_does_not_say_what_it_takes_is_given_x_and_y() -> None:
    """Functions that are not written in Python may have no signature."""
    x, y = numbers(2, 5).abs()
    batches = Batches((x, y), torch.dot, torch.float64, torch.device("cpu"))
    assert batches.total == pytest.approx(float((x * y).sum()), rel=1e-12)


def test_count_that_fails_is_told() -> None:
    with pytest.raises(InvalidInputError, match="count= for batch 0 cannot") as seen:
        classify(mlp(), table(), count=lambda x, y: y["labels"])
    assert isinstance(seen.value.__cause__, IndexError)


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out, self.last = nn.RNNCell(4, 5), nn.Linear(5, 3), None

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x, self.last)
        self.last = h.detach()
        return self.out(h)


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 3), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


@pytest.mark.parametrize(("make", "name"), [(Remembering, "last"), (Counting, "calls")])
def test_a_state_between_calls_is_no_randomness(make: Callable[[], nn.Module], name: str) -> None:
    with pytest.raises(StochasticModelError, match=rf"keeps something between its calls \({name}\).*fixed state"):
        classify(make().eval(), table())


@pytest.mark.parametrize(
    ("batch", "kind"),
    [
        ({"x": numbers(6, 4), "y": classes(6, 3)}, "a dict"),
        ((numbers(6, 4), classes(6, 3), torch.ones(6)), "a tuple of 3"),
        ([numbers(6, 4)], "a list of 1"),
    ],
)
def test_batches_of_another_form_are_told_the_way_out(batch: Any, kind: str) -> None:
    with pytest.raises(InvalidInputError, match=f"batch 0 is {kind}.*, not a pair.*write "):
        classify(mlp(), [batch])
