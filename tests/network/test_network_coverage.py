"""Catches: layers called covered whose forward never runs, whose weight another layer shares, or whose weight or input
is changed on the way; and parameters that are neither covered nor named with a reason."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from network_models import classes, classify, drawn, mlp, numbers, risk_of, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import Coverage, coverage


def found(model: nn.Module, x: Tensor, **options: Any) -> Coverage:
    risk = bnp.EmpiricalRisk(model, lambda o, y: o.flatten(1).square().mean(), (x, torch.zeros(len(x))), **options)
    result = coverage(risk)
    named = {n for layer in result for n in (layer.weight, layer.bias) if n} | set(result.uncovered)
    assert named == set(risk.space.names)  # nothing is forgotten, nothing counted twice
    return result


def names(result: Coverage) -> list[str]:
    return [layer.name for layer in result]


def test_layers_and_their_sizes() -> None:
    model = drawn(lambda: bnp.models.cnn((2, 4, 4), 3, channels=(4, 2, 2), hidden=5))
    result = found(model, numbers(3, 2, 4, 4))
    assert names(result) == ["conv1", "conv2", "conv3", "fc4", "fc5"]
    assert not result.uncovered
    conv = result["conv2"]
    assert (conv.units, conv.features, conv.groups, conv.patch) == (2, 4 * 9, 1, 9)
    assert (conv.weight, conv.bias) == ("conv2.weight", "conv2.bias")
    assert (result["fc4"].units, result["fc4"].features, result["fc4"].patch) == (5, 2, 1)
    with pytest.raises(KeyError):
        result["relu"]


def test_groups() -> None:
    result = found(drawn(lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2), nn.Flatten())), numbers(2, 4, 5))
    assert (result["0"].units, result["0"].features, result["0"].groups) == (6, 2 * 3, 2)


def test_a_bare_layer_has_the_empty_name() -> None:
    result = found(drawn(lambda: nn.Linear(3, 2)), numbers(4, 3))
    assert names(result) == [""]
    assert (result[""].weight, result[""].bias) == ("weight", "bias")


def test_norm_parameters_are_named() -> None:
    model = drawn(lambda: bnp.models.mlp([4, 5, 3], norm="layer"))
    result = found(model, numbers(6, 4))
    assert names(result) == ["fc1", "fc2"]
    said = "covered where it is asked for, also=[LayerNorm]"
    assert result.uncovered == dict.fromkeys(("norm1.weight", "norm1.bias"), said)


def test_attention_whose_output_layer_never_runs() -> None:
    """It has the type of a covered layer and gets a gradient, from a function that is given its weight."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x)[0])

    for train in (True, False):
        result = found(drawn(Model).train(train), numbers(3, 5, 4))
        assert names(result) == ["head"]
        assert result.uncovered["attention.out_proj.weight"] == "the forward of attention.out_proj never runs"
        assert set(result.uncovered) == {f"attention.{n}" for n in dict(Model().attention.named_parameters())}


def test_a_layer_that_is_never_reached() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    result = found(drawn(Model), numbers(4, 3))
    assert names(result) == ["used"]
    assert result.uncovered["unused.weight"] == "the forward of unused never runs"
    assert "unused.bias" in result.uncovered


class TiedModel(nn.Module):
    """Embedding and head share a tensor; two layers share a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(6, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.b.bias = self.a.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(self.embed(x))))))


def test_tied_tensors_are_left_alone() -> None:
    risk = classify(drawn(TiedModel), (classes(5, 6), classes(5, 6, seed=2)))
    result = coverage(risk)
    assert [(layer.name, layer.bias) for layer in result] == [("a", None), ("b", None)]
    assert result.uncovered == {
        "embed.weight": "tied: shared by embed, head, whose inputs differ",
        "a.bias": "tied: shared by a, b, whose inputs differ",
    }


def test_a_layer_that_is_two_modules_attributes_is_one_layer() -> None:
    shared = nn.Linear(3, 3)
    result = found(drawn(lambda: nn.Sequential(shared, nn.Tanh(), shared)), numbers(4, 3))
    assert names(result) == ["0"]


def test_frozen_tensors() -> None:
    model = mlp()
    model.fc1.weight.requires_grad_(False)
    model.fc2.bias.requires_grad_(False)
    result = found(model, numbers(5, 4))
    assert names(result) == ["fc2"]
    assert result["fc2"].bias is None
    assert result.uncovered == {"fc1.bias": "Linear whose weight is frozen or not covered"}
    assert names(found(mlp(), numbers(5, 4), params=["fc1"])) == ["fc1"]


def test_parameters_that_no_layer_holds() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.fc = nn.Parameter(torch.ones(2)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) * self.scale

    result = found(drawn(Model), numbers(4, 3))
    assert names(result) == ["fc"]
    assert result.uncovered == {"scale": "Model is not a covered layer type"}


def test_other_layers_with_weights() -> None:
    model = nn.Sequential(
        nn.PReLU(), nn.LocalResponseNorm(2), nn.InstanceNorm1d(2, affine=True), nn.Flatten(), nn.LazyLinear(2)
    )
    model(torch.zeros(1, 2, 4))
    result = found(drawn(lambda: model), numbers(3, 2, 4))
    assert names(result) == ["4"]
    assert result.uncovered["0.weight"] == "PReLU is not a covered layer type"


def test_reparametrized_weights() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))
    result = found(drawn(lambda: model), numbers(5, 3))
    assert names(result) == ["2"]
    assert set(result.uncovered) == {
        "0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1",
    }  # fmt: skip


class Gained(nn.Linear):
    """Multiplies its input by its weight, and does more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Standardized(nn.Linear):
    """Multiplies by something made of its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(dim=1, keepdim=True), self.bias)


class Shifted(nn.Linear):
    """Multiplies another input by its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 1)


class LowRank(nn.Linear):
    """A layer with layers inside, called after its own product."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__(m, n)
        self.down, self.up = nn.Linear(m, 1, bias=False), nn.Linear(1, n, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class StandardizedConv(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.norm(), bias)


@pytest.mark.parametrize(
    ("kind", "covered"),
    [(Gained, ["0"]), (Standardized, []), (Shifted, []), (LowRank, ["0", "0.down", "0.up"])],
)
def test_subclasses_are_covered_where_their_rows_are_their_input(
    kind: Callable[[int, int], nn.Module], covered: list[str]
) -> None:
    result = found(drawn(lambda: nn.Sequential(kind(3, 2))), numbers(5, 3))
    assert names(result) == covered
    if not covered:
        assert result.uncovered["0.weight"] == f"{kind.__name__} computes something else with its weight or its input"
        assert "0.bias" in result.uncovered


def test_subclasses_of_convolutions() -> None:
    model = nn.Sequential(StandardizedConv(2, 3, 2), nn.Conv1d(3, 2, 2))
    assert names(found(drawn(lambda: model), numbers(4, 2, 5))) == ["1"]


def test_a_forward_that_an_instance_was_given() -> None:
    model = drawn(lambda: nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    model[0].forward = lambda x: F.linear(x, model[0].weight.detach() * 2)
    assert names(found(model, numbers(5, 3))) == ["1"]


@pytest.mark.parametrize(
    ("use", "covered"),
    [
        (lambda m, h: h, ["a", "b"]),
        (lambda m, h: h @ m.a.weight, ["b"]),  # a head tied by a function
        (lambda m, h: F.linear(h, m.a.weight.T), ["b"]),
        (lambda m, h: m.a(m.a(h)), ["a", "b"]),  # again, but as the same layer
        (lambda m, h: h * (m.a.weight.shape[0] + m.a.bias.ndim), ["a", "b"]),
    ],
    ids=["once", "transposed", "linear", "reused", "shape"],
)
def test_weights_used_outside_of_their_layer(use: Callable[[Any, Tensor], Tensor], covered: list[str]) -> None:
    """Their Hessian has more terms than the rows of the layer explain."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(use(self, torch.tanh(self.a(x))))

    result = found(drawn(Model), numbers(5, 3))
    assert names(result) == covered
    if "a" not in covered:
        assert result.uncovered["a.weight"] == "its weight is also used outside of its own product"


def test_looking_leaves_no_hook_behind() -> None:
    risk = classify(mlp(), table())
    coverage(risk)
    assert all(not module._forward_hooks for _, module in risk.modules())

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.raises(InvalidInputError, match="stop"):
        risk.capture(fail)
    assert all(not module._forward_hooks for _, module in risk.modules())


def test_lazily_made_and_copied_models_are_the_same() -> None:
    model = drawn(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x = numbers(4, 3)
    assert names(coverage(risk_of(model, x))) == names(coverage(risk_of(copy.deepcopy(model), x))) == ["0", "2"]
