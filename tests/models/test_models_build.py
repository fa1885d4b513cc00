"""Catches: a wrong layer count or shape, an activation or a bias too many or too few, initialization that
reads or changes global random state, in-place modules, and arguments that fail late or silently."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnp_analysis import models
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models.networks import PadShortcut

SMALL: dict[str, Callable[..., nn.Module]] = {
    "mlp": lambda **kw: models.mlp([6, 5, 8, 3], **kw),
    "cnn": lambda **kw: models.cnn((2, 8, 8), 3, channels=(4, 8, 4), hidden=8, **kw),
    "resnet": lambda **kw: models.resnet(8, in_channels=2, num_classes=3, width=4, **kw),
    "projection": lambda **kw: models.resnet(14, in_channels=2, num_classes=3, width=4, shortcut="projection", **kw),
}
LAYERS = {"mlp": 3, "cnn": 5, "resnet": 8, "projection": 16}


def inputs(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    shape = (7, 6) if name == "mlp" else (7, 2, 8, 8)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def layers(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


# structure


def test_mlp_computes_what_it_says() -> None:
    model = models.mlp([3, 4, 5, 2], activation="tanh", dtype=torch.float64)
    h = x = torch.rand(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for k in (1, 2):
        fc = getattr(model, f"fc{k}")
        h = torch.tanh(h @ fc.weight.T + fc.bias)
    torch.testing.assert_close(model(x), h @ model.fc3.weight.T + model.fc3.bias)


def test_mlp_of_two_widths_is_one_linear_layer() -> None:
    model = models.mlp([4, 2])
    assert [name for name, _ in model.named_children()] == ["fc1"]


def test_cnn_computes_what_it_says() -> None:
    model = models.cnn((2, 8, 8), 3, channels=(4, 8, 4), hidden=8)
    h = x = inputs("cnn")
    for k in (1, 2, 3):
        conv = getattr(model, f"conv{k}")
        h = F.relu(F.conv2d(h, conv.weight, conv.bias, padding=1))
        h = F.max_pool2d(h, 2) if k < 3 else h
    h = F.relu(h.flatten(1) @ model.fc4.weight.T + model.fc4.bias)
    torch.testing.assert_close(model(x), h @ model.fc5.weight.T + model.fc5.bias)


@pytest.mark.parametrize(("pool", "module"), [("max", nn.MaxPool2d), ("avg", nn.AvgPool2d)])
def test_cnn_pools(pool: Any, module: type[nn.Module]) -> None:
    model = models.cnn((1, 8, 8), pool=pool, padding_mode="circular")
    assert sum(isinstance(m, module) for m in model.modules()) == 2
    assert model.conv1.padding_mode == "circular"


@pytest.mark.parametrize(
    ("depth", "parameters"),
    # He et al. list 0.27M, 0.46M, 0.66M, 0.85M, 1.7M; ours have biases and, here, no normalization.
    [(20, 0.27e6), (32, 0.46e6), (44, 0.66e6), (56, 0.85e6), (110, 1.7e6)],
)
def test_resnet_has_its_published_size_and_depth(depth: int, parameters: float) -> None:
    model = models.build(f"resnet{depth}")
    assert len(layers(model)) == depth
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=0.02)
    assert all(layer.bias is not None for layer in layers(model))


def test_resnet_computes_what_it_says() -> None:
    model = SMALL["resnet"](dtype=torch.float64)
    x = inputs("resnet", torch.float64)

    def conv(h: torch.Tensor, layer: nn.Conv2d, stride: int = 1) -> torch.Tensor:
        return F.conv2d(h, layer.weight, layer.bias, stride=stride, padding=1)

    h = F.relu(conv(x, model.conv1))
    for stage, stride in ((model.stage1, 1), (model.stage2, 2), (model.stage3, 2)):
        branch = stage.block1.branch
        out = conv(F.relu(conv(h, branch.conv1, stride)), branch.conv2)
        short = torch.zeros_like(out)
        short[:, : h.shape[1]] = h[:, :, ::stride, ::stride]
        h = F.relu(out + short)
    assert h.shape == (7, 16, 2, 2)
    expected = h.mean((2, 3)) @ model.fc.weight.T + model.fc.bias
    torch.testing.assert_close(model(x), expected)


def test_pad_shortcut_has_no_parameters_and_the_projection_has() -> None:
    pad, projection = models.resnet(8, width=4), models.resnet(8, width=4, shortcut="projection")
    assert sum(isinstance(m, PadShortcut) for m in pad.modules()) == 2
    extra = set(dict(projection.named_parameters())) - set(dict(pad.named_parameters()))
    assert extra == {f"stage{s}.block1.shortcut.conv.{p}" for s in (2, 3) for p in ("weight", "bias")}
    assert repr(pad.stage2.block1.shortcut) == "PadShortcut(stride=2, extra_channels=4)"


@pytest.mark.parametrize("name", SMALL)
def test_every_network_has_its_layers_with_and_without_biases(name: str) -> None:
    with_bias, without = layers(SMALL[name]()), layers(SMALL[name](bias=False))
    assert len(with_bias) == len(without) == LAYERS[name]
    assert all(layer.bias is not None for layer in with_bias)
    assert all(layer.bias is None for layer in without)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", models.NORMS)
@pytest.mark.parametrize("norm_at", models.NORM_PLACES)
@pytest.mark.parametrize("name", SMALL)
def test_every_variant_runs_and_every_parameter_has_a_gradient(
    name: str, norm_at: str, norm: str, dtype: torch.dtype
) -> None:
    model = SMALL[name](norm=norm, norm_at=norm_at, activation="tanh", dtype=dtype)
    output = model(inputs(name, dtype))
    assert output.shape == (7, 3)
    assert output.dtype == dtype
    output.square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.dtype == dtype
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
        if not (norm == "batch" and norm_at == "preactivation" and "bias" in parameter_name):
            assert parameter.grad.any(), parameter_name  # such a bias has gradient 0 in exact arithmetic


@pytest.mark.parametrize("activation", models.ACTIVATIONS)
def test_activations_are_not_in_place_and_absent_from_the_output(activation: str) -> None:
    model = models.mlp([4, 3, 2], activation=activation)
    assert not getattr(model.act1, "inplace", False)
    assert list(dict(model.named_children())) == ["fc1", "act1", "fc2"]
    x = torch.linspace(-2, 2, 5)
    before = x.clone()
    model.act1(x)
    assert torch.equal(x, before)


def test_every_activation_of_a_network_is_its_own_module() -> None:
    for make in SMALL.values():
        activations = [m for m in make().modules() if isinstance(m, nn.ReLU)]
        assert len(activations) >= 2
    assert len([m for m in SMALL["mlp"]().modules() if isinstance(m, nn.ReLU)]) == 2


# initialization


@pytest.mark.parametrize("name", SMALL)
def test_building_leaves_global_random_state(name: str) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    python_state, seed = random.getstate(), torch.initial_seed()
    SMALL[name](norm="batch", seed=3)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert torch.initial_seed() == seed
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
    assert python_state == random.getstate()


def test_global_random_state_is_restored_after_a_failure() -> None:
    state = torch.get_rng_state()
    with pytest.raises(InvalidInputError):
        models.mlp([4, 6, 6, 2], norm="group", norm_groups=4)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", SMALL)
def test_the_seed_alone_decides(name: str) -> None:
    first = SMALL[name](seed=1)
    torch.rand(5)
    again, other = SMALL[name](seed=1), SMALL[name](seed=2)
    for a, b, c in zip(first.parameters(), again.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_a_default_device_and_accelerators_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = models.mlp([3, 4, 2])

    def never(_: int) -> None:
        raise AssertionError("building a network reseeded the accelerators")

    monkeypatch.setattr("torch.cuda.manual_seed_all", never)
    with torch.device("meta"):
        model = models.mlp([3, 4, 2])
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b)


def test_initialization_is_that_of_torch() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        expected = [nn.Linear(3, 4), nn.Linear(4, 2)]
    model = models.mlp([3, 4, 2], seed=11)
    for ours, theirs in zip(layers(model), expected, strict=True):
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)


def test_one_seed_is_one_network_in_every_precision() -> None:
    single, double = models.mlp([3, 4, 2]), models.mlp([3, 4, 2], dtype=torch.float64)
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        assert torch.equal(a.double(), b)


# bad input, registry


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lenet", {}, "known: mlp, cnn, resnet, resnet8"),
        ("mlp", {"widths": [5]}, "input and an output"),
        ("mlp", {"widths": []}, "input and an output"),
        ("mlp", {"widths": [5, 0, 2]}, "positive integer"),
        ("mlp", {"widths": [5, 2.0]}, "positive integer"),
        ("mlp", {"widths": [5, True, 2]}, "positive integer"),
        ("mlp", {}, "widths"),
        ("mlp", {"widths": [5, 2], "depth": 3}, "depth"),
        ("mlp", {"widths": [5, 2], "activation": "swish"}, "known: relu, leaky_relu"),
        ("mlp", {"widths": [5, 2], "norm": "spectral"}, "known: none, batch, layer, group"),
        ("mlp", {"widths": [5, 2], "norm_at": "output"}, "known: preactivation, input"),
        ("mlp", {"widths": [5, 2], "dtype": torch.int64}, "floating-point"),
        ("cnn", {"input_shape": (64,)}, "flatten=False"),
        ("cnn", {"input_shape": (1, 10, 8)}, "10 x 8 is not divisible by 4"),
        ("cnn", {"input_shape": (0, 8, 8)}, "positive integer"),
        ("cnn", {"channels": (4, 4)}, "three convolutions"),
        ("cnn", {"channels": (4, 4, 0)}, "positive integer"),
        ("cnn", {"hidden": 0}, "hidden"),
        ("cnn", {"num_classes": 0}, "num_classes"),
        ("cnn", {"pool": "median"}, "known: max, avg"),
        ("cnn", {"padding_mode": "mirror"}, "known: zeros, circular"),
        ("cnn", {"activation": "swish"}, "known: relu"),
        ("resnet", {"depth": 18}, "6 n \\+ 2"),
        ("resnet", {"depth": 2}, "6 n \\+ 2"),
        ("resnet", {"depth": "20"}, "depth"),
        ("resnet", {"width": 0}, "width"),
        ("resnet", {"shortcut": "B"}, "known: pad, projection"),
        ("resnet20", {"activation": "swish"}, "known: relu"),
        ("resnet20", {"widths": 3}, "widths"),
    ],
)
def test_bad_arguments_are_refused(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        models.build(name, **arguments)


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet8", "resnet14", "resnet", "transformer"])
def test_build_for_fits_the_data(name: str) -> None:
    shape = (64,) if name == "mlp" else (1, 8, 8)
    model = models.build_for(name, shape, 4, seed=1)
    assert model(torch.zeros(2, *shape)).shape == (2, 4)


def test_build_for_says_how_to_load_the_data() -> None:
    with pytest.raises(InvalidInputError, match="flatten=True"):
        models.build_for("mlp", (1, 8, 8), 10)
    with pytest.raises(InvalidInputError, match="flatten=False"):
        models.build_for("cnn", (64,), 10)
    with pytest.raises(InvalidInputError, match="known: mlp"):
        models.build_for("lenet", (64,), 10)


def test_a_state_dict_fits_the_same_network_only() -> None:
    model = models.build_for("mlp", (6,), 3, hidden=[5], norm="batch")
    models.build_for("mlp", (6,), 3, hidden=[5], norm="batch", seed=9).load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match="norm1"):
        models.build_for("mlp", (6,), 3, hidden=[5]).load_state_dict(model.state_dict())
