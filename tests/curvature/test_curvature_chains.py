"""Catches: a product that is written out for a chain of layers and is wrong where the general graph is right (no bias,
frozen or tied tensors, positions, an activation at the end), a network taken for a chain that is none, an activation
that torch records under a new name (then products are silently slow), products that change what they were given."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvature_reference import Problem, numbers, relative, split, spread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.curvature import chains, engines
from bnp_analysis.curvature.chains import read_chain
from bnp_analysis.curvature.hessian import Hessian
from bnp_analysis.curvature.products import ChainGradient, gradient_graph, output_graph

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "Relu": nn.ReLU,
    "LeakyRelu": nn.LeakyReLU,
    "Threshold": lambda: nn.Threshold(0.1, 0.2),
    "Hardtanh": nn.Hardtanh,
    "Hardswish": nn.Hardswish,
    "Softshrink": lambda: nn.Softshrink(0.1),
    "Hardshrink": lambda: nn.Hardshrink(0.1),
    "Elu": nn.ELU,
    "Celu": lambda: nn.CELU(0.7),
    "Tanh": nn.Tanh,
    "Sigmoid": nn.Sigmoid,
    "LogSigmoid": nn.LogSigmoid,
    "Softplus": lambda: nn.Softplus(2.0),
    "Silu": nn.SiLU,
    "Gelu": nn.GELU,
    "Mish": nn.Mish,
}


def sharp(out: Tensor, y: Tensor) -> Tensor:
    """Couples the outputs of an example, and its Hessian depends on them."""
    return ((out - y).square().sum(dim=-1) + 0.1 * out.sum(dim=-1) ** 4).mean()


def problem_of(model: nn.Module, *shape: int) -> Problem:
    """Two uneven batches, with targets in the shape of the outputs."""
    model, x = spread(model), numbers(7, *shape)
    with torch.no_grad():
        y = numbers(*model(x).shape, seed=2)
    return Problem(model, sharp, split(x, y, (4, 3)))


def is_chain(risk: bnp.EmpiricalRisk) -> bool:
    batch = next(iter(risk.batches))
    chain = output_graph(risk, batch).chain
    assert isinstance(gradient_graph(risk, batch), ChainGradient) == (chain is not None)
    return chain is not None


def check(problem: Problem, *, chain: bool = True) -> None:
    risk = problem.risk()
    assert is_chain(risk) == chain
    V = numbers(risk.space.dim, 2, seed=3)
    given_ = V.clone()
    HV, GV = problem.hessian_product(V), problem.gauss_newton() @ V
    made: list[tuple[Any, Tensor]] = []
    for engine in ("retained", "recompute"):
        made.append((bnp.hessian(risk, engine=engine), HV))
        made.append((bnp.gauss_newton(risk, engine=engine), GV))
    for A, product in made:
        for _ in range(2):  # the first leaves nothing behind
            assert relative(A @ V, product) <= 1e-12
    assert relative(made[0][0].start, problem.gradient(problem.theta)) <= 1e-12
    assert torch.equal(V, given_)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), ACTIVATIONS[name](), nn.Linear(4, 4), ACTIVATIONS[name](), nn.Linear(4, 2))
    problem = problem_of(model, 3)
    check(problem)
    assert problem.model(numbers(7, 3)).grad_fn.next_functions[1][0].name() == f"{name}Backward0"


def test_no_activation_is_left_out() -> None:
    assert {f"{name}Backward0" for name in ACTIVATIONS} == chains._STRAIGHT | chains._CURVED


@pytest.mark.parametrize("name", bnp.models.ACTIVATIONS)
def test_the_perceptrons_of_the_package_are_chains(name: str) -> None:
    check(problem_of(bnp.models.mlp([3, 4, 4, 2], activation=name), 3))


class Ordered(nn.Module):
    """Layers in an order in which one may come again."""

    def __init__(self, layers: list[nn.Module], order: list[int]) -> None:
        super().__init__()
        self.layers, self.order = nn.ModuleList(layers), order

    def forward(self, x: Tensor) -> Tensor:
        for k in self.order:
            x = self.layers[k](x)
        return x


@st.composite
def networks(draw: st.DrawFn) -> Problem:
    """Any depth, biases, activations (also at the end, or none), some tensors frozen, a layer used again."""
    layers: list[nn.Module] = [ACTIVATIONS[name]() for name in ("Relu", "Tanh", "Silu")]
    order: list[int] = []
    depth = draw(st.integers(1, 3))
    for last in [False] * (depth - 1) + [True]:
        order.append(len(layers))
        layers.append(nn.Linear(3, 2 if last else 3, bias=draw(st.booleans())))
        order += draw(st.lists(st.integers(0, 2), max_size=2))
        if not last and draw(st.booleans()):
            order += [3, 1]
    model = Ordered(layers, order)
    names = [name for name, _ in model.named_parameters()]
    free = draw(st.sets(st.sampled_from(names), min_size=1))
    for name, p in model.named_parameters():
        p.requires_grad_(name in free)
    return problem_of(model, *draw(st.sampled_from([(3,), (2, 3)])))


@given(networks())
@settings(max_examples=10)
def test_any_chain(problem: Problem) -> None:
    check(problem)


class Calls(nn.Module):
    """Two layers and what a function makes of them."""

    def __init__(self, call: Callable[[Calls, Tensor], Tensor], bias: bool = True) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3, bias=bias), nn.Linear(3, 1, bias=bias)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self, x)


RESHAPED = {
    "squeezed": lambda m, x: torch.tanh(m.b(torch.tanh(m.a(x))).squeeze(-1)).view(len(x), 1),
    "flattened between, and folded": lambda m, x: m.b(torch.tanh(m.a(x).flatten()).view(-1, 3)),
    "unsqueezed between": lambda m, x: m.b(torch.tanh(m.a(x).unsqueeze(1))),
    "no shape, an unused layer": lambda m, x: torch.tanh(m.b(x)),
    "activation after the shape": lambda m, x: torch.sigmoid(m.b(m.a(x)).view(-1)).unsqueeze(1),
}


@pytest.mark.parametrize("name", RESHAPED)
def test_other_shapes_of_the_same_entries(name: str) -> None:
    for bias in (True, False):
        check(problem_of(Calls(RESHAPED[name], bias), 3))


NO_CHAINS: dict[str, Callable[[Calls, Tensor], Tensor]] = {
    "residual": lambda m, x: m.b(torch.tanh(m.a(x)) + x),
    "residual of the layer": lambda m, x: m.b((h := m.a(x)) + torch.tanh(h)),
    "two readings": lambda m, x: m.b(torch.tanh(m.a(x))) + m.b(x),
    "product of two activations": lambda m, x: m.b(torch.tanh(m.a(x)) * m.a(x)),
    "weight without transposition": lambda m, x: m.b(torch.tanh(x @ m.a.weight)),
    "weight that is computed": lambda m, x: m.b(torch.tanh(F.linear(x, 2 * m.a.weight, m.a.bias))),
    "bias that is computed": lambda m, x: m.b(torch.tanh(F.linear(x, m.a.weight, 2 * m.a.bias))),
    "bias for all outputs": lambda m, x: m.b(torch.tanh(torch.addmm(m.b.bias, x, m.a.weight.t()))),
    "layer times 2": lambda m, x: m.b(torch.tanh(torch.addmm(m.a.bias, x, m.a.weight.t(), alpha=2))),
    "bias times 3": lambda m, x: m.b(torch.tanh(torch.addmm(m.a.bias, x, m.a.weight.t(), beta=3))),
    "batch of matrices": lambda m, x: m.b(torch.tanh(torch.bmm(x.unsqueeze(1), m.a.weight.expand(len(x), 3, 3))[:, 0])),
    "sorted": lambda m, x: m.b(torch.tanh(m.a(x)).sort(dim=1).values),
    "transposed": lambda m, x: m.b(torch.tanh(m.a(x).T).T),
    "both factors": lambda m, x: m.b(torch.tanh(F.linear(m.a(x), m.a(torch.eye(3).to(x)), m.a.bias))),
}


@pytest.mark.parametrize("name", NO_CHAINS)
def test_what_is_no_chain_is_left_to_the_general_graph(name: str) -> None:
    check(problem_of(Calls(NO_CHAINS[name]), 3), chain=False)


def test_no_free_parameter_in_reach_is_no_chain() -> None:
    model = Calls(lambda m, x: m.b(x))
    model.b.requires_grad_(False)
    assert read_chain(model(numbers(5, 3).float()), list(model.a.parameters())) == []


def test_a_bias_for_every_row_is_no_chain() -> None:
    layer, every = nn.Linear(3, 4), nn.Parameter(torch.zeros(5, 4))
    outputs = torch.addmm(every, torch.ones(5, 3), layer.weight.t())
    assert read_chain(outputs, [layer.weight, every]) == []


def test_one_bias_is_the_tangent_of_every_row() -> None:
    """Of rows that are one number seen everywhere the place cannot be taken by what comes back."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    check(problem_of(model, 3))


def test_a_loss_may_write_into_the_outputs() -> None:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        return out.sub_(y).square().mul_(0.5).sum(dim=1).mean()

    model = spread(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    x, y = numbers(5, 3), numbers(5, 2, seed=2)
    expected = Problem(model, lambda out, y: (out - y).square().sum(dim=1).mean() / 2, [(x, y)]).hessian()
    risk = bnp.EmpiricalRisk(model, loss, (x, y))
    assert is_chain(risk)
    assert relative(bnp.hessian(risk).to_dense(), expected) <= 1e-12


@pytest.mark.parametrize(
    "loss", [lambda out, y: out.mean() ** 2, lambda out, y: out.sum(), lambda out, y: 0 * out.sum()]
)
def test_products_of_the_loss_that_share_memory_or_vanish(loss: Callable[..., Tensor]) -> None:
    """The mean's cotangent is one number seen everywhere: an activation at the end cannot be applied in its place."""
    problem = Problem(spread(nn.Sequential(nn.Linear(3, 2), nn.Tanh())), loss, [(numbers(5, 3), numbers(5, 2))])
    A = bnp.hessian(problem.risk())
    assert float((A.to_dense() - problem.hessian()).abs().max()) <= 1e-14
    assert float((bnp.gauss_newton(problem.risk()).to_dense() - problem.gauss_newton()).abs().max()) <= 1e-14


def test_cotangents_are_not_written_into() -> None:
    problem = problem_of(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), 3)
    risk = problem.risk()
    graph = output_graph(risk, next(iter(risk.batches)))
    u = numbers(*graph.outputs.shape, seed=4)
    before = u.clone()
    found = torch.cat([t.reshape(-1) for t in graph.vjp(u)])
    assert torch.equal(u, before)
    assert relative(found, problem.jacobian(0).T @ u.reshape(-1)) <= 1e-12


# memory


def perceptron(activation: str) -> bnp.EmpiricalRisk:
    model = spread(bnp.models.mlp([3, 40, 40, 40, 2], activation=activation), scale=0.1)
    return bnp.EmpiricalRisk(model, F.mse_loss, (numbers(300, 3), numbers(300, 2)))


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("build", [bnp.hessian, bnp.gauss_newton])
def test_what_a_chain_holds_is_counted(
    build: Callable[..., Any], activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cotangents and curvatures are nothing that autograd saves. GELU's slopes are held, ReLU's by none."""
    risk = perceptron(activation)
    A = build(risk)
    extrapolated = A.engine.graph_bytes
    A @ torch.ones(A.dim, dtype=A.dtype)
    data = next(iter(risk.batches)).x.untyped_storage().data_ptr()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held_by(A._engine._kept[0])}
    held, hidden = sum(size for place, size in storages.items() if place != data), 300 * 40 * 8
    slopes = 3 * (activation == "gelu")
    assert held >= (3 if build is bnp.gauss_newton else 5 + slopes) * hidden
    assert held <= extrapolated <= held + (slopes + 1) * hidden
    monkeypatch.setattr(engines, "_FEW", (1000, 2000))  # the whole batch is counted
    assert extrapolated == pytest.approx(build(perceptron(activation)).engine.graph_bytes, rel=0.02)


def held_by(graph: Any) -> list[Tensor]:
    return [t for part in (graph if isinstance(graph, tuple) else (graph,)) for t in getattr(part, "held", ())]


def test_a_recomputed_chain_is_gone_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    def build(risk: Any, batch: Any) -> Any:
        gc.collect()
        assert all(ref() is None for ref in alive)
        graph = gradient_graph(risk, batch)
        alive.extend(weakref.ref(t) for t in held_by(graph) if t.shape[0] == len(batch.x))
        return graph

    monkeypatch.setattr(sys.modules[Hessian.__module__], "gradient_graph", build)
    risk = problem_of(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), 3).risk()
    bnp.hessian(risk, engine="recompute") @ numbers(risk.space.dim)
    assert alive
