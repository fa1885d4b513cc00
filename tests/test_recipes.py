"""The recipes of CONTRIBUTING.md, followed literally. Catches: a kind of layer that some part of the package does not
know, or knows by its type; a weight that is stored transposed and read as if it were not."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.curvature import CURVATURES
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.condition import methods
from bnp_analysis.network import coverage, layer_moments, register_layer
from bnp_analysis.network.layer_kinds import KINDS, Layer

RECIPES = (Path(__file__).resolve().parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _registries() -> Iterator[None]:
    """What a recipe registers is taken out again."""
    registries: list[dict[Any, Any]] = [KINDS, CURVATURES, methods._REGISTERED]
    before = [dict(registry) for registry in registries]
    yield
    for registry, entries in zip(registries, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_every_recipe_runs_as_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", RECIPES, flags=re.DOTALL)
    assert len(blocks) == 6
    names: dict[str, object] = {"__name__": "recipes"}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "With Diagonal" in printed
    assert "kappa* ~ 4, no bound: eigvalsh states no error" in printed


class EmbeddingLayer(Layer):
    """The recipe's new file: rows of zeros with a one, times a table `(vocabulary, units)`."""

    def rows(self, h: Tensor) -> Tensor:
        return F.one_hot(h.long(), self.features).to(self.own_weight.dtype).reshape(-1, 1, self.features)

    def example_count(self, h: Tensor) -> int:
        return h.shape[0]


class Transposed(nn.Module):
    """A dense layer as some public models store it."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.zeros(m, n)), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x.view(-1, x.shape[-1]), self.w).view(*x.shape[:-1], -1)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def same(twin: nn.Linear, own: nn.Module, weight: str, bias: str = "bias") -> nn.Module:
    """The layer with the parameters of the dense layer that it is like, transposed."""
    with torch.no_grad():
        own.get_parameter(weight).copy_(twin.weight.T)
        if twin.bias is not None:
            own.get_parameter(bias).copy_(twin.bias)
    return own


def agree(found: nn.Module, x: Tensor, twin: nn.Module, x_of_twin: Tensor, y: Tensor) -> None:
    """Tables, preconditioned directions and training of a network and of its twin with `nn.Linear` first."""
    risks = [bnp.EmpiricalRisk(m, F.cross_entropy, (a, y)) for m, a in ((found, x), (twin, x_of_twin))]
    first = [next(iter(coverage(risk))) for risk in risks]
    moments = [layer_moments(risk)[layer.name] for risk, layer in zip(risks, first, strict=True)]
    torch.testing.assert_close(moments[0].mean, moments[1].mean)
    assert (moments[0].rows, moments[0].examples) == (moments[1].rows, moments[1].examples)
    tables = [bnp.layer_table(risk).layers for risk in risks]
    for mine, other in zip(*tables, strict=True):
        assert (mine.rows, mine.features, mine.units) == (other.rows, other.features, other.units)
        for a, b in (*zip(mine.unit_blocks_with_P, other.unit_blocks_with_P, strict=True), (mine.block, other.block)):
            assert a is not None
            assert b is not None
            assert a.value == pytest.approx(b.value, rel=1e-6)
    for make in (bnp.bnp_preconditioner, bnp.kfac_preconditioner):
        parts = [
            make(risk).direction(risk.gradient)[risk.space.slice_of(layer.weight)].view(layer.own_weight.shape)
            for risk, layer in zip(risks, first, strict=True)
        ]
        torch.testing.assert_close(parts[0].T, parts[1])
    block = bnp.bnp_preconditioner(risks[0]).block((first[0].name, 1))
    torch.testing.assert_close(
        block.to_dense(), bnp.bnp_preconditioner(risks[1]).block((first[1].name, 1)).to_dense()
    )  # fmt: skip
    for options in ({}, {"output_scale": "estimated"}):
        weights = []
        for model, inputs, layer in ((found, x, first[0]), (twin, x_of_twin, first[1])):
            trained = copy.deepcopy(model)
            pre = bnp.BNP(trained, **options).attach(optimizer := torch.optim.SGD(trained.parameters(), lr=0.1))
            assert set(pre.covered) == {one.name for one in coverage(risks[0])}
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(trained(inputs), y).backward()
                optimizer.step()
            weights.append(trained.get_parameter(layer.weight))
        torch.testing.assert_close(weights[0].T, weights[1])


def test_layer_kind() -> None:
    """An embedding is a dense layer on indicators; the file above and this line are all that it takes."""
    register_layer(nn.Embedding, like=EmbeddingLayer, transposed=True)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(6, 4, bias=False), Mean(), nn.Tanh(), nn.Linear(4, 3)).double()
    tokens = nn.Sequential(same(dense[0], nn.Embedding(6, 4).double(), "weight"), *copy.deepcopy(dense)[1:])
    x, y = torch.randint(6, (20, 2)), torch.arange(20) % 3
    agree(tokens, x, dense, F.one_hot(x, 6).double(), y)


def test_a_layer_of_ones_own() -> None:
    """One line, for a module that is like one that is known."""
    bnp.register_layer(Transposed, like=nn.Linear, weight="w", bias="b", transposed=True)
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    own = nn.Sequential(same(dense[0], Transposed(5, 4).double(), "w", "b"), *copy.deepcopy(dense)[1:])
    x, y = 2 + torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 3
    agree(own, x, dense, x, y)


class Twice(Transposed):
    """Not the product that it is registered for."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_layer_that_is_not_what_it_was_registered_for_is_left_out() -> None:
    register_layer(Twice, like=nn.Linear, weight="w", bias="b", transposed=True)
    model = nn.Sequential(Twice(3, 2), nn.Linear(2, 2)).double()
    nn.init.ones_(model[0].w)
    risk = bnp.EmpiricalRisk(model, F.mse_loss, (torch.eye(3).double(), torch.ones(3, 2).double()))
    found = coverage(risk)
    assert [layer.name for layer in found] == ["1"]
    assert found.uncovered["0.w"] == "Twice does not compute the product that it was registered for"


@pytest.mark.parametrize(("shape", "transposed"), [((3,), False), ((3, 2, 1), True)])
def test_a_weight_that_is_no_matrix_is_named(shape: tuple[int, ...], transposed: bool) -> None:
    class Gains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(shape))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.w.flatten()[:3]

    register_layer(Gains, like=nn.Linear, weight="w", transposed=transposed)
    try:
        risk = bnp.EmpiricalRisk(Gains(), F.mse_loss, (torch.eye(3), torch.ones(3, 3)))
        said = f"a Gains has a weight 'w' of shape {shape}, which is no matrix of units and features"
        with pytest.raises(InvalidInputError, match=f"^{re.escape(said)}$"):
            coverage(risk)
    finally:
        del KINDS[Gains]


def test_a_layer_inside_a_module_that_does_not_show_its_product_is_left_out() -> None:
    class Hidden(nn.Linear):
        pass

    class HiddenLayer(KINDS[nn.Linear].layer):  # type: ignore[misc]
        inner = True

    register_layer(Hidden, like=HiddenLayer)
    try:
        model = nn.Sequential(Hidden(3, 2), nn.Linear(2, 2))
        found = coverage(bnp.EmpiricalRisk(model, F.mse_loss, (torch.eye(3), torch.ones(3, 2))))
        assert [layer.name for layer in found] == ["1"]
        assert found.uncovered["0.weight"] == "Hidden does not compute what a loop over its steps does"
    finally:
        del KINDS[Hidden]


class Convolution(nn.Module):
    pass


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (Transposed, {"like": nn.ReLU}, "ReLU is no registered layer"),
        (Convolution, {"like": nn.Conv1d}, "no subclass of Conv1d"),
        (nn.Conv1d, {"like": nn.Conv1d, "transposed": True}, "is a convolution that is stored transposed"),
        (nn.ConvTranspose1d, {"like": nn.ConvTranspose1d}, "transposed convolution, whose weight is stored transposed"),
        (Convolution, {"like": nn.ConvTranspose1d, "transposed": True}, "no subclass of ConvTranspose1d"),
        (int, {"like": nn.Linear}, "a class of modules is registered"),
    ],
)
def test_what_cannot_be_registered(kind: type, options: dict[str, object], said: str) -> None:
    before = dict(KINDS)
    with pytest.raises(InvalidInputError, match=said):
        register_layer(kind, **options)  # type: ignore[arg-type]
    assert before == KINDS
