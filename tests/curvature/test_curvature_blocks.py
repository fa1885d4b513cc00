"""Catches: a block with another unit's rows or without its bias, a block that forgets what lies downstream, and a
Gauss-Newton block of a piecewise linear layer that is not the Hessian's (T1, T1')."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvature_reference import Problem, classes, numbers, relative, split, spread
from test_curvature_products import PROBLEMS, Tied
from torch import Tensor, nn
from torch.autograd.functional import hessian
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import coverage

BUILDS: dict[str, Callable[..., Any]] = {
    "hessian": bnp.hessian,
    "gauss_newton": bnp.gauss_newton,
    "fisher, mc": lambda r, **kw: bnp.fisher(r, "mc", samples=3, seed=5, **kw),
    "fisher, empirical": lambda r, **kw: bnp.fisher(r, "empirical", **kw),
}


def mlp(activation: str, *, bias: bool = True, norm: str = "none", train: bool = True) -> Problem:
    model = spread(bnp.models.mlp([4, 6, 5, 3], activation=activation, bias=bias, norm=norm)).train(train)
    return Problem(model, F.cross_entropy, [(numbers(12, 4), classes(12, 3))])


def cnn(activation: str, pool: str = "max") -> Problem:
    model = spread(bnp.models.cnn((2, 4, 4), 3, channels=(2, 2, 2), hidden=3, activation=activation, pool=pool))
    return Problem(model, F.cross_entropy, split(numbers(5, 2, 4, 4), classes(5, 3), (3, 2)))


# blocks are principal submatrices


WHERE: dict[str, tuple[Callable[[], Problem], str, int]] = {
    "mlp": (lambda: mlp("tanh"), "fc2", 3),
    "no bias": (lambda: mlp("tanh", bias=False), "fc1", 5),
    "BatchNorm downstream": (lambda: mlp("tanh", norm="batch"), "fc1", 0),
    "conv": (lambda: cnn("tanh"), "conv2", 1),
}


@pytest.mark.parametrize(
    ("where", "build"),
    [
        *(("mlp", build) for build in BUILDS),
        ("no bias", "fisher, mc"),
        ("BatchNorm downstream", "hessian"),
        ("BatchNorm downstream", "gauss_newton"),
        ("conv", "hessian"),
        ("conv", "fisher, empirical"),
    ],
)
def test_blocks_are_principal_submatrices(where: str, build: str) -> None:
    make, layer, unit = WHERE[where]
    problem = make()
    risk = problem.risk()
    whole = BUILDS[build](risk).to_dense()
    names = [name for name in problem.free if name.startswith(f"{layer}.")]
    for block, keep in (
        (layer, problem.positions(names)),
        ((layer, unit), problem.positions(names, unit)),
        (names[0], problem.positions(names[:1])),
    ):
        A = BUILDS[build](risk, block=block)
        assert torch.equal(risk.space.indices(block), keep)
        assert A.shape == (len(keep), len(keep))
        assert relative(A.to_dense(), whole[keep][:, keep]) <= 1e-12
        v = numbers(len(keep), 2)
        assert relative(A @ v, whole[keep][:, keep] @ v) <= 1e-12
        if build != "hessian":
            assert A.factor is not None
            F_ = A.factor.to_dense()
            assert relative(F_.T @ F_, whole[keep][:, keep]) <= 1e-12
            assert relative(A.factor @ v, F_ @ v) <= 1e-12


def test_the_empty_name_is_the_whole_of_a_bare_layer() -> None:
    problem = Problem(spread(nn.Linear(4, 3)), F.mse_loss, [(numbers(5, 4), numbers(5, 3, seed=1))])
    risk = problem.risk()
    assert relative(bnp.hessian(risk, block="").to_dense(), problem.hessian()) <= 1e-12
    keep = problem.positions(["weight", "bias"], 2)
    assert relative(bnp.hessian(risk, block=("", 2)).to_dense(), problem.hessian()[keep][:, keep]) <= 1e-12


def test_a_tied_tensor_is_a_block_under_each_of_its_names() -> None:
    problem = Problem(spread(Tied()), F.mse_loss, [(numbers(7, 4), numbers(7, 4, seed=2))])
    risk = problem.risk()
    keep = problem.positions(["embed.weight"])
    reference = problem.hessian()[keep][:, keep]
    assert relative(bnp.hessian(risk, block="embed").to_dense(), reference) <= 1e-10
    assert relative(bnp.hessian(risk, block="head.weight").to_dense(), reference) <= 1e-10


@pytest.mark.parametrize(
    ("block", "match"),
    [("fc", "no parameter belongs to 'fc'"), (("fc1", 6), "no output unit 6"), (("fc1", -1), "no output unit -1")],
)
def test_blocks_that_do_not_exist(block: Any, match: str) -> None:
    risk = mlp("tanh").risk()
    for build in BUILDS.values():
        with pytest.raises(InvalidInputError, match=match):
            build(risk, block=block)


# T1': piecewise linear networks

LEAKY = nn.LeakyReLU(0.2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp("relu"),
        lambda: mlp("leaky_relu"),
        lambda: mlp("relu", norm="batch", train=False),
        lambda: cnn("relu"),
    ],
    ids=["relu", "leaky", "relu, BatchNorm, eval", "conv"],
)
def test_blocks_of_piecewise_linear_layers_are_the_hessians(make: Callable[[], Problem]) -> None:
    risk = make().risk()
    H, G = bnp.hessian(risk).to_dense(), bnp.gauss_newton(risk).to_dense()
    for layer in coverage(risk):
        for block in (layer.name, (layer.name, layer.units - 1)):
            keep = risk.space.indices(block)
            assert relative(H[keep][:, keep], G[keep][:, keep]) <= 1e-12, layer.name


def test_smooth_activations_and_whole_networks_differ() -> None:
    for problem, layers in ((mlp("tanh"), ("fc1", "fc2")), (cnn("tanh"), ("conv1", "fc4"))):
        risk = problem.risk()
        for layer in layers:
            H, G = (build(risk, block=layer).to_dense() for build in (bnp.hessian, bnp.gauss_newton))
            assert relative(H, G) > 0.01, layer
    risk = mlp("relu").risk()
    assert relative(bnp.hessian(risk).to_dense(), bnp.gauss_newton(risk).to_dense()) > 0.01
    coupled = mlp("relu", norm="batch").risk()
    H, G = (build(coupled, block="fc1").to_dense() for build in (bnp.hessian, bnp.gauss_newton))
    assert relative(H, G) > 0.01  # statistics of the batch are not piecewise linear


# T1: H^T S H


def pre_activation_hessian(problem: Problem, layer: str, unit: int) -> Tensor:
    """`d^2 L / da_i da_i^T` over the rows of a layer's output, by shifting what the layer gives on."""
    model = copy.deepcopy(problem.model)
    x, y = problem.batches[0]
    shift: list[Tensor] = []

    def add(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        flat = shift[0].view(out.shape[0], *out.shape[2:])
        return torch.cat([out[:, :unit], (out[:, unit] + flat).unsqueeze(1), out[:, unit + 1 :]], dim=1)

    model.get_submodule(layer).register_forward_hook(add)
    out = problem.model.get_submodule(layer)
    seen: list[Tensor] = []
    handle = out.register_forward_hook(lambda m, a, o: seen.append(o))
    with torch.no_grad():
        copy.deepcopy(problem.model)(x)
        problem.model(x)
    handle.remove()
    count = seen[-1].numel() // seen[-1].shape[1]

    def loss(delta: Tensor) -> Tensor:
        shift[:] = [delta]
        return problem.loss(model(x), y)

    return hessian(loss, torch.zeros(count, dtype=torch.float64))


@pytest.mark.parametrize(
    ("make", "layer", "unit", "structure"),
    [
        (lambda: mlp("tanh"), "fc1", 2, "diagonal"),
        (lambda: mlp("tanh"), "fc3", 1, "diagonal"),
        (lambda: mlp("tanh", norm="batch"), "fc1", 2, "full"),
        (lambda: cnn("tanh"), "conv1", 1, "blocks"),
        (lambda: cnn("tanh"), "conv3", 0, "blocks"),
    ],
    ids=["dense", "last", "BatchNorm downstream", "conv", "last conv"],
)
def test_unit_blocks_are_inputs_around_the_curvature_of_pre_activations(
    make: Callable[[], Problem], layer: str, unit: int, structure: str
) -> None:
    problem = make()
    problem.batches = problem.batches[:1]
    risk = problem.risk()
    found = coverage(risk)[layer]
    inputs: list[Tensor] = []
    risk.capture(lambda name, module, args, output: inputs.append(args[0]), [layer])
    h = found.rows(inputs[0]).squeeze(1)
    H = torch.cat([h.new_ones(len(h), 1), h], dim=1)
    H = torch.cat([H[:, 1:], H[:, :1]], dim=1)  # torch: weights first
    S = pre_activation_hessian(problem, layer, unit)
    assert H.shape == (len(S), found.features + 1)
    assert relative(bnp.hessian(risk, block=(layer, unit)).to_dense(), H.T @ S @ H) <= 1e-10
    examples = len(problem.batches[0][0])
    each = torch.arange(len(S)) // (len(S) // examples)
    outside = {
        "diagonal": S - torch.diag(torch.diag(S)),
        "blocks": S * (each[:, None] != each[None]),
        "full": S,
    }[structure]
    assert (float(outside.abs().max()) == 0) == (structure != "full")


# all unit blocks in one sweep


@pytest.mark.parametrize(
    "name", ["cross_entropy", "mse", "margins", "dropout off", "mlp, LayerNorm", "mlp, BatchNorm, eval"]
)
def test_unit_blocks_in_one_sweep_are_the_units_blocks(name: str) -> None:
    problem = PROBLEMS[name]()
    risk = problem.risk()
    layers = coverage(risk)
    swept = unit_blocks(risk, layers)
    assert set(swept) == {layer.name for layer in layers}
    whole = bnp.gauss_newton(risk).to_dense()
    for layer in layers:
        assert len(swept[layer.name]) == layer.units
        for unit in range(layer.units):
            keep = risk.space.indices((layer.name, unit))
            assert relative(swept[layer.name][unit].to_dense(), whole[keep][:, keep]) <= 1e-10


@pytest.mark.parametrize("name", ["mlp, BatchNorm, train", "tokens, classes last", "tokens, flattened", "cnn"])
def test_unit_blocks_in_one_sweep_only_where_rows_are_examples(name: str) -> None:
    risk = PROBLEMS[name]().risk()
    swept = unit_blocks(risk, coverage(risk))
    whole = bnp.gauss_newton(risk).to_dense()
    for layer, blocks in swept.items():
        for unit in range(len(blocks)):
            keep = risk.space.indices((layer, unit))
            assert relative(blocks[unit].to_dense(), whole[keep][:, keep]) <= 1e-10
    if name != "cnn":
        assert not swept


def test_unit_blocks_of_activations_in_place() -> None:
    """`ReLU(inplace=True)` overwrites the pre-activations that are differentiated."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    problem = Problem(spread(model), F.mse_loss, [(numbers(6, 3), numbers(6, 2, seed=1))])
    risk = problem.risk()
    swept = unit_blocks(risk, coverage(risk))
    for layer, blocks in swept.items():
        keep = problem.positions([f"{layer}.weight", f"{layer}.bias"], 1)
        assert relative(blocks[1].to_dense(), problem.gauss_newton()[keep][:, keep]) <= 1e-10
    assert len(swept) == 3
