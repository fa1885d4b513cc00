"""Catches: a normalization at the wrong place, over the wrong axes, missing before the first or present after
the last layer, an affine part that was not asked for, and group counts that are silently changed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bnp_analysis import models
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models.parts import NORMS, Normalization

NORM_TYPES = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
LAYER_TYPES = (nn.Linear, nn.Conv2d)


def make(name: str, **options: Any) -> nn.Module:
    match name:
        case "mlp":
            return models.mlp([6, 8, 8, 8], **options)
        case "cnn":
            return models.cnn((4, 8, 8), 3, channels=(4, 8, 4), hidden=8, **options)
        case _:
            shortcut = "projection" if name == "projection" else "pad"
            return models.resnet(8, in_channels=4, num_classes=3, width=4, shortcut=shortcut, **options)


def inputs(name: str) -> Tensor:
    shape = (16, 6) if name == "mlp" else (16, 4, 8, 8)
    return 5 + 3 * torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def seen(model: nn.Module, x: Tensor) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Every leaf module in order of execution, with what went in and what came out."""
    record: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [
        module.register_forward_hook(lambda m, args, out: record.append((m, args[0], out)))
        for module in model.modules()
        if not list(module.children())
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return record


NAMES = ["mlp", "cnn", "resnet", "projection"]
KINDS = ["batch", "layer", "group"]


@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_input_norms_stand_before_every_layer(name: str, norm: str) -> None:
    model = make(name, norm=norm, norm_at="input", dtype=torch.float64)
    record = seen(model, inputs(name))
    count = 0
    for before, (module, x, _) in zip([None, *record[:-1]], record, strict=True):
        if isinstance(module, LAYER_TYPES):
            assert before is not None
            assert isinstance(before[0], NORM_TYPES)
            assert before[2] is x, "something stands between the norm and its layer"
            count += 1
    assert count == sum(isinstance(m, LAYER_TYPES) for m in model.modules())
    assert count == sum(isinstance(m, NORM_TYPES) for m in model.modules())


@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_preactivation_norms_stand_behind_every_layer_but_the_last(name: str, norm: str) -> None:
    model = make(name, norm=norm, dtype=torch.float64)
    record = seen(model, inputs(name))
    kinds = [module for module, *_ in record]
    assert isinstance(kinds[0], LAYER_TYPES)
    assert isinstance(kinds[-1], nn.Linear)
    for (module, _, out), (following, x, _) in pairwise(record):
        if isinstance(module, LAYER_TYPES):
            assert isinstance(following, NORM_TYPES)
            assert x is out, "something stands between the layer and its norm"
    layers = sum(isinstance(m, LAYER_TYPES) for m in kinds)
    assert sum(isinstance(m, NORM_TYPES) for m in kinds) == layers - 1


@pytest.mark.parametrize("name", NAMES)
def test_none_inserts_nothing(name: str) -> None:
    assert not [m for m in make(name).modules() if isinstance(m, NORM_TYPES)]


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_batch_norm_of_the_input_normalizes_each_feature_or_channel(name: str) -> None:
    model = make(name, norm="batch", norm_at="input", norm_affine=False, dtype=torch.float64)
    _, _, out = seen(model, inputs(name))[0]
    axes = [0] if name == "mlp" else [0, 2, 3]
    assert out.mean(axes).abs().max() < 1e-10
    assert (out.var(axes, correction=0) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("spatial", [False, True])
def test_layer_norm_normalizes_each_example(spatial: bool) -> None:
    module = Normalization("layer").at_place("preactivation", 8, spatial=spatial)
    assert module is not None
    x = torch.rand((5, 8, 3, 3) if spatial else (5, 8), generator=torch.Generator().manual_seed(0))
    x = x + torch.arange(8.0).view(8, 1, 1) if spatial else x
    out = module(x).flatten(1)
    assert out.mean(1).abs().max() < 1e-5
    assert (out.var(1, correction=0) - 1).abs().max() < 1e-3
    # Over channels and space together: each channel keeps a mean of its own.
    assert out.view(5, 8, -1).mean(2).abs().max() > 0.5


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("norm_at", models.NORM_PLACES)
@pytest.mark.parametrize("name", NAMES)
def test_affine_parts_are_there_only_if_asked_for(name: str, norm_at: str, norm: str, affine: bool) -> None:
    model = make(name, norm=norm, norm_at=norm_at, norm_affine=affine)
    norms = [m for m in model.modules() if isinstance(m, NORM_TYPES)]
    assert norms
    for module in norms:
        assert len(list(module.parameters())) == (2 if affine else 0)


def test_layers_keep_their_names_under_every_normalization() -> None:
    """A layer is addressed by name: turning a norm on must not rename it."""
    for name in NAMES:
        plain = [n for n, m in make(name).named_modules() if isinstance(m, LAYER_TYPES)]
        for norm in KINDS:
            for norm_at in models.NORM_PLACES:
                model = make(name, norm=norm, norm_at=norm_at)
                found = [n for n, m in model.named_modules() if isinstance(m, LAYER_TYPES)]
                assert found == plain


def test_norms_share_the_number_of_their_layer() -> None:
    after = list(dict(models.mlp([6, 8, 8], norm="batch").named_children()))
    before = list(dict(models.mlp([6, 8, 8], norm="batch", norm_at="input").named_children()))
    assert after == ["fc1", "norm1", "act1", "fc2"]
    assert before == ["norm1", "fc1", "act1", "norm2", "fc2"]


@pytest.mark.parametrize(
    ("channels", "groups"), [(64, 8), (32, 8), (16, 4), (10, 2), (12, 2), (8, 2), (6, 1), (3, 1), (1, 1)]
)
def test_fitting_groups_divide_and_are_not_tiny(channels: int, groups: int) -> None:
    module = Normalization("group").at_place("preactivation", channels, spatial=True)
    assert isinstance(module, nn.GroupNorm)
    assert module.num_groups == groups


def test_given_groups_are_taken_or_refused() -> None:
    model = models.mlp([6, 8, 12, 2], norm="group", norm_groups=4)
    assert model.norm1.num_groups == model.norm2.num_groups == 4
    for groups in (3, 5, 0, -2):
        with pytest.raises(InvalidInputError, match="do not divide 8 channels"):
            models.mlp([6, 8, 12, 2], norm="group", norm_groups=groups)
    with pytest.raises(InvalidInputError, match="do not divide 3 channels"):
        models.cnn(norm="group", norm_groups=4, norm_at="input")


def test_a_norm_that_could_only_give_zero_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="zero for any input"):
        models.mlp([6, 8, 2], norm="group", norm_groups=8)
    for norm in ("layer", "group"):
        with pytest.raises(InvalidInputError, match="zero for any input"):
            models.mlp([6, 1, 2], norm=norm)


def test_a_new_normalization_needs_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NORMS, "mine", lambda site: nn.BatchNorm1d(site.channels, affine=site.affine))
    assert isinstance(models.mlp([3, 4, 2], norm="mine").norm1, nn.BatchNorm1d)
