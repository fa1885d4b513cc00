"""Catches: a point, a state or a choice of parameters that goes to the wrong tensors, wrapped, tied or clashing names
that do not resolve, and bad input that is not refused, or refused without saying what and where."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from network_models import classes, classify, drawn, mlp, numbers, split, table
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.errors import BNPAnalysisError, InvalidInputError, NonFiniteError
from bnp_analysis.network.parameters import NameIndex, clean_name
from bnp_analysis.network.snapshot import require_one_device

# the point


def test_the_risk_is_a_function_of_theta() -> None:
    model, (x, y) = mlp(), table()
    risk = classify(model, split(x, y, (4, 5)))
    theta = numbers(risk.space.dim, seed=4)
    other = mlp()
    torch.nn.utils.vector_to_parameters(theta, other.parameters())
    expected = F.cross_entropy(other(x), y)
    expected.backward()
    gradient = torch.cat([p.grad.flatten() for p in other.parameters()])
    assert risk(theta).item() == pytest.approx(expected.item(), rel=1e-13)
    moved = risk.at(theta)
    assert moved.value.item() == pytest.approx(expected.item(), rel=1e-13)
    torch.testing.assert_close(moved.gradient, gradient, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(moved.outputs, other(x).detach(), rtol=1e-12, atol=1e-14)
    assert torch.equal(moved.theta, theta)
    assert torch.equal(classify(model, (x, y), at=theta).theta, theta)
    assert risk(theta.float()).item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(risk.theta, torch.nn.utils.parameters_to_vector(model.parameters()))
    assert float((moved.value - risk.value).abs()) > 1e-3


def test_operators_keep_the_point_they_were_made_at() -> None:
    risk = classify(mlp(), table())
    H = bnp.hessian(risk)
    before = H.to_dense()
    moved = bnp.hessian(risk.at(2 * risk.theta)).to_dense()
    assert torch.equal(H.to_dense(), before)
    assert float((moved - before).abs().max()) > 1e-3


def test_restricted_risks_hold_the_rest_at_the_point() -> None:
    risk = classify(mlp(), table()).at(numbers(43, seed=3))
    part = risk.restrict(["fc2.bias", "fc1.weight"])
    assert part.space.names == ("fc1.weight", "fc2.bias")
    keep = torch.cat([risk.space.indices("fc1.weight"), risk.space.indices("fc2.bias")])
    assert torch.equal(part.theta, risk.theta[keep])
    assert part.value == risk.value
    torch.testing.assert_close(part.gradient, risk.gradient[keep])
    theta = risk.theta.clone()
    theta[keep] = 0.5
    assert torch.equal(part(torch.full((len(keep),), 0.5, dtype=torch.float64)), risk(theta))
    state = {"fc1.weight": numbers(5, 4, seed=8), "fc2.bias": numbers(3, seed=9)}
    theta[risk.space.indices("fc1.weight")] = state["fc1.weight"].flatten()
    theta[risk.space.indices("fc2.bias")] = state["fc2.bias"]
    assert torch.equal(part.at(state).value, risk(theta))


def test_a_restricted_risk_keeps_its_constants_when_buffers_are_loaded() -> None:
    model = drawn(lambda: bnp.models.mlp([4, 5, 3], norm="batch")).eval()
    risk = classify(model, table()).at(numbers(len(classify(model, table()).theta), seed=3))
    part = risk.restrict(["fc1.weight"])
    state = {"fc1.weight": part.theta.view(5, 4), "norm1.running_mean": model.norm1.running_mean}
    assert torch.equal(part.at(state).value, risk.value)


def test_another_dtype_is_the_same_risk() -> None:
    risk = classify(mlp(norm="layer"), split(*table(), (4, 5))).at(numbers(53, seed=2))
    single = risk.to(torch.float32)
    assert single.value.dtype == single.gradient.dtype == torch.float32
    torch.testing.assert_close(single.gradient.double(), risk.gradient, rtol=1e-4, atol=1e-6)
    assert risk.to(torch.float64) is risk
    back = single.to(torch.float64)
    assert torch.equal(back.theta, risk.theta.float().double())
    assert torch.equal(back.value, back.at(back.theta).value)


# states


def small() -> nn.Module:
    model = drawn(lambda: bnp.models.mlp([4, 5, 3], norm="batch"))
    with torch.no_grad():
        model.norm1.running_mean.copy_(numbers(5, seed=3))
    return model.eval()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda m: m,
        nn.DataParallel,
        nn.Sequential,
        torch.optim.swa_utils.AveragedModel,
    ],
    ids=["plain", "DataParallel", "inside", "AveragedModel"],
)
def test_a_state_moves_parameters_and_buffers(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model, later = wrap(small()).eval(), wrap(small()).eval()
    with torch.no_grad():
        for t in (*later.parameters(), *later.buffers()):
            if t.is_floating_point():
                t.add_(0.1)
    risk = classify(model, table())
    expected = classify(later, table())
    for moved in (risk.at(later.state_dict()), classify(model, table(), at=later.state_dict())):
        assert torch.equal(moved.value, expected.value)
        assert torch.equal(moved.theta, expected.theta)
        assert torch.equal(bnp.hessian(moved).to_dense(), bnp.hessian(expected).to_dense())


def test_parameters_alone_are_a_state() -> None:
    risk = classify(small(), table())
    state = dict(small().named_parameters())
    assert torch.equal(risk.at({n: p * 2 for n, p in state.items()}).theta, 2 * risk.theta)


class OwnModule(nn.Module):
    """Its own parts have the names of wrappers."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self._orig_mod_ = nn.Linear(4, 5), nn.Linear(5, 3)
        self.fc = nn.ModuleDict({"module": nn.Linear(3, 3)})

    def forward(self, x: Tensor) -> Tensor:
        return self.fc["module"](torch.tanh(self._orig_mod_(torch.tanh(self.module(x)))))


def test_a_part_that_is_called_module() -> None:
    """Stripping `module.` from names that have it by right lost all parameters of averaged models."""
    model = drawn(OwnModule)
    risk = classify(model, table())
    assert risk.space.names == tuple(n for n, _ in model.named_parameters())
    assert torch.equal(risk.at(model.state_dict()).theta, risk.theta)
    assert torch.equal(risk.at(nn.DataParallel(model).state_dict()).theta, risk.theta)
    assert classify(model, table(), params=["module"]).space.names == ("module.weight", "module.bias")
    assert bnp.hessian(risk, block="module").dim == 25
    averaged = classify(torch.optim.swa_utils.AveragedModel(mlp()), table())
    assert averaged.space.names[0] == "module.fc1.weight"
    assert averaged.space.dim == 43


def test_names_with_and_without_wrappers() -> None:
    assert clean_name("module._orig_mod.a.module.b") == "a.b"
    index = NameIndex(["module.a", "b.a", "b.module.c", "b.c"])
    assert index.find("module.a") == "module.a"
    assert index.find("a") == "module.a"
    assert index.find("module.b.a") == "b.a"
    assert index.find("b.c") == "b.c"  # an exact match comes first
    assert index.find("module.b.c") is None  # two tensors would answer
    assert index.find("c") is None
    assert index.under("b") == ["b.a", "b.module.c", "b.c"]
    assert index.under("module.b") == ["b.a", "b.module.c", "b.c"]
    assert index.under("a") == ["module.a"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("params", [None, ["head"]], ids=["free", "frozen"])
def test_states_of_tied_models(params: list[str] | None) -> None:
    """A state has all names of a tied tensor, or only the last one."""
    model, later = drawn(Tied), drawn(Tied, seed=3)
    risk, expected = (classify(m, table(), params=params) for m in (model, later))
    state = later.state_dict()
    assert torch.equal(risk.at(state).value, expected.value)
    only_b = {n: t for n, t in state.items() if n != "a.weight"}
    assert torch.equal(risk.at(only_b).value, expected.value)
    state["b.weight"] = state["b.weight"] + 1
    with pytest.raises(InvalidInputError, match=r"b.weight is tied to a.weight.*two values"):
        risk.at(state)


@pytest.mark.parametrize("move", [True, False], ids=["at()", "at="])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("fc1.weight"), r"does not fit the model. Missing: fc1.weight.*another architecture"),
        (lambda s: s.update(extra=torch.ones(2)), r"Unknown: extra"),
        (lambda s: s.update({"fc1.weight": torch.ones(5, 3)}), r"fc1.weight has shape \(5, 3\) in the state, \(5, 4\)"),
        (lambda s: s.update({"norm1.running_mean": torch.ones(4)}), r"norm1.running_mean has shape \(4,\)"),
        (lambda s: s.update({"fc1.weight": [1.0]}), r"Missing: fc1.weight. Unknown: fc1.weight"),
    ],
    ids=["missing", "unknown", "shape", "buffer", "no tensor"],
)
def test_a_checkpoint_that_does_not_fit(change: Callable[[dict[str, Any]], Any], match: str, move: bool) -> None:
    model = small()
    state = dict(model.state_dict())
    change(state)
    risk = classify(model, table())
    before = risk.value
    with pytest.raises(InvalidInputError, match=match):
        risk.at(state) if move else classify(model, table(), at=state)
    assert torch.equal(risk.at(risk.theta).value, before)


@pytest.mark.parametrize(
    ("theta", "match"),
    [
        (torch.zeros(42), r"theta must be \(43,\), got \(42,\)"),
        (torch.zeros(43, 1), r"got \(43, 1\)"),
        ([0.0] * 43, "flat tensor or a state dict, not list"),
    ],
)
def test_points_that_do_not_fit(theta: Any, match: str) -> None:
    risk = classify(mlp(), table())
    with pytest.raises(InvalidInputError, match=match):
        risk.at(theta)
    if isinstance(theta, Tensor):
        with pytest.raises(InvalidInputError, match=r"\(43,\)"):
            risk(theta)


# which parameters


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (None, ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"]),
        (["fc2", "fc1.bias"], ["fc1.bias", "fc2.weight", "fc2.bias"]),
        ("fc1", ["fc1.weight", "fc1.bias"]),
        (lambda n, p: p.ndim == 1, ["fc1.bias", "fc2.bias"]),
        (lambda n, p: p.requires_grad and n != "fc2.bias", ["fc1.weight", "fc1.bias", "fc2.weight"]),
        (["module.fc1"], ["fc1.weight", "fc1.bias"]),
    ],
)
def test_chosen_parameters(params: Any, names: list[str]) -> None:
    """In the order of the model, not of the request; a filter sees which parameters require a gradient."""
    risk = classify(mlp(), table(), params=params)
    whole = classify(mlp(), table())
    assert list(risk.space.names) == names
    keep = torch.cat([whole.space.indices(n) for n in names])
    torch.testing.assert_close(risk.gradient, whole.gradient[keep])


def test_tied_names_choose_the_tensor() -> None:
    assert classify(drawn(Tied), table(), params=["b.weight"]).space.names == ("a.weight",)


def test_frozen_parameters_can_be_asked_for() -> None:
    model = mlp()
    model.fc1.requires_grad_(False)
    assert classify(model, table()).space.names == ("fc2.weight", "fc2.bias")
    assert classify(model, table(), params=["fc1"]).space.names == ("fc1.weight", "fc1.bias")
    assert not model.fc1.weight.requires_grad


@pytest.mark.parametrize(
    ("params", "match"),
    [
        (["fc3"], r"params= names 'fc3', which match no parameter; there are: fc1.weight"),
        (["fc"], r"names 'fc'"),
        (lambda n, p: False, r"the filter params= matches none.*There are: fc1.weight"),
        ([], r"params= is empty"),
    ],
)
def test_a_filter_that_matches_nothing(params: Any, match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        classify(mlp(), table(), params=params)


def test_models_without_anything_to_differentiate() -> None:
    with pytest.raises(InvalidInputError, match="none requires a gradient"):
        classify(mlp().requires_grad_(False), table())
    with pytest.raises(InvalidInputError, match="There are: none"):
        classify(nn.Identity(), (numbers(3, 3), classes(3, 3)))
    with pytest.raises(InvalidInputError, match=r"model must be a Module, not a function: write a torch.nn.Module"):
        classify(lambda x: x, table())


def test_parameters_without_a_derivative() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)
            self.steps = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    model = Counting().double()
    assert classify(model, table()).space.names == ("fc.weight", "fc.bias")
    for params in (["steps", "fc"], lambda n, p: True):
        with pytest.raises(InvalidInputError, match=r"no derivative: steps \(torch.int64\); leave them out"):
            classify(model, table(), params=params)
    with pytest.raises(InvalidInputError, match=r"weight \(torch.complex64\)"):
        classify(nn.Linear(4, 3, dtype=torch.complex64), table())


def test_parameters_of_several_dtypes() -> None:
    model = mlp()
    model.fc2.float()
    with pytest.raises(InvalidInputError, match=r"several dtypes.*choose with dtype="):
        classify(model, table())
    assert classify(model, table(), dtype=torch.float64).value.dtype == torch.float64


@pytest.mark.parametrize("part", ["", "fc2", "norm1"])
@pytest.mark.parametrize("free", [True, False])
def test_tensors_without_values(part: str, free: bool) -> None:
    """Also frozen ones, and buffers: the first product with them used to fail inside torch."""
    model = mlp(norm="batch").eval()
    model.get_submodule(part).to("meta").requires_grad_(free or part == "")
    for options in ({}, {"device": "cpu"}):
        with pytest.raises(InvalidInputError, match=r"on the meta device.*model.to_empty"):
            classify(model, table(), **options)


def test_tensors_on_several_devices() -> None:
    places = {"a.weight": torch.device("cuda:0"), "a.bias": torch.device("cuda:0"), "b": torch.device("cuda:1")}
    with pytest.raises(InvalidInputError, match=r"cuda:0: 2, a.weight first; cuda:1: 1, b first.*Give device="):
        require_one_device(places, moved=False)
    require_one_device(places, moved=True)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
def test_dtypes_that_have_no_derivative(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidInputError, match="dtype must be a floating-point type"):
        classify(mlp(), table(), dtype=dtype)


# outputs and losses


@pytest.mark.parametrize(
    ("forward", "output", "match"),
    [
        (lambda h: {"logits": h}, None, r"the model returns dict, not a tensor; pick one with output="),
        (lambda h: (h, h), None, r"the model returns tuple"),
        (lambda h: h.argmax(dim=1), None, r"torch.int64 outputs, which have no derivative"),
        (lambda h: h, lambda o: None, r"the model returns NoneType"),
    ],
)
def test_outputs_that_are_none(forward: Callable[[Tensor], Any], output: Any, match: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return forward(self.fc(x))

    with pytest.raises(InvalidInputError, match=match):
        classify(drawn(Model), table(), output=output)


@pytest.mark.parametrize("kind", [dict, tuple])
def test_several_outputs_are_joined_as_the_refusal_says(kind: type) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            heads = {"size": self.a(x), "kind": self.b(x)}
            return heads if kind is dict else tuple(heads.values())

    def both(o: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(o[:, 0], y.to(o)) + F.cross_entropy(o[:, 1:], y)

    x, y = table()
    model = drawn(Heads)
    with pytest.raises(InvalidInputError, match="or join several") as refused:
        bnp.EmpiricalRisk(model, both, (x, y))
    way_out = str(refused.value).partition("splits again: output=")[2]
    risk = bnp.EmpiricalRisk(model, both, (x, y), output=eval(way_out))
    assert risk.outputs.shape == (len(x), 4)


def test_outputs_that_are_one_number_for_a_batch_are_these_numbers() -> None:
    (x, y), model = table(), mlp()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    risk = bnp.EmpiricalRisk(model, lambda o, y: o, batches, output=lambda o: o.square().mean())
    expected = torch.stack([model(part).square().mean() for part, _ in batches]).detach()
    torch.testing.assert_close(risk.outputs, expected, rtol=1e-12, atol=0, check_dtype=False)


@pytest.mark.parametrize(
    ("loss", "match"),
    [
        (lambda o, y: F.cross_entropy(o, y, reduction="none"), r"loss\(output, y\) gave \(9,\), not a scalar"),
        (lambda o, y: 1.0, r"gave float, not a scalar"),
        (lambda o, y: None, r"gave NoneType, not a scalar"),
    ],
)
def test_losses_that_are_no_scalar(loss: Callable[..., Any], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        bnp.EmpiricalRisk(mlp(), loss, table())


def test_a_loss_of_shape_one_is_a_scalar() -> None:
    risk = bnp.EmpiricalRisk(mlp(), lambda o, y: F.cross_entropy(o, y).view(1, 1), table())
    assert risk.value.shape == ()
    assert bnp.hessian(risk).dim == 43


# not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_parameters_that_are_not_finite_are_named(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model.fc2.bias[1] = value
        model.fc1.weight[0, 0] = value
    for params in (None, ["fc2.weight"]):  # constants count too
        with pytest.raises(NonFiniteError, match=r"NaN or infinite entries: .*fc1.weight"):
            classify(model, table(), params=params)
    with pytest.raises(NonFiniteError, match=r"fc2.bias"):
        classify(model, table())
    risk = classify(mlp(), table())
    theta = risk.theta
    theta = theta.clone()
    theta[-1] = value
    with pytest.raises(NonFiniteError, match=r"fc2.bias$"):
        risk.at(theta)


def test_a_loss_that_is_not_finite_names_the_batch() -> None:
    x, y = numbers(9, 4), numbers(9, 3)
    y[6] = -5.0
    with pytest.raises(NonFiniteError, match=r"the loss of batch 1 is nan at this theta"):
        bnp.EmpiricalRisk(mlp(), lambda o, y: torch.log(y + 4).mean() + o.mean(), split(x, y, (4, 5)))
    risk = bnp.EmpiricalRisk(mlp(), lambda o, y: (o * 1e200).square().mean(), [(x, y)], at=torch.zeros(43))
    with pytest.raises(NonFiniteError, match="loss of batch 0 is inf"):
        risk(torch.ones(43, dtype=torch.float64))


def test_a_gradient_that_is_not_finite() -> None:
    """sqrt(0): the loss is zero and its slope is not a number."""
    model = drawn(lambda: nn.Linear(2, 1, bias=False))
    nn.init.zeros_(model.weight)
    risk = bnp.EmpiricalRisk(model, lambda o, y: o.square().sqrt().mean(), (numbers(3, 2), numbers(3, 1)))
    with pytest.raises(NonFiniteError, match="gradient has NaN"):
        _ = risk.gradient


# every refusal leaves the model as it was


def test_refusals_change_nothing() -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]
    for options in ({"params": ["x"]}, {"at": torch.zeros(3)}, {"dtype": torch.int8}, {"count": lambda b: -1.0}):
        with pytest.raises(BNPAnalysisError):
            classify(model, table(), **options)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())


def test_what_it_says_of_itself() -> None:
    risk = classify(mlp(), split(*table(), (4, 5)))
    assert repr(risk) == "<EmpiricalRisk of Sequential, 43 parameters, 9 examples in 2 batches, torch.float64>"
