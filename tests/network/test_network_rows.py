"""Catches: patches in another order than the weight, padding, stride, dilation or groups that differ from the layer's,
moments of something else than the rows, and streams whose result depends on how the data are split."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from network_models import classify, drawn, mlp, numbers, risk_of, table
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.network import Layer, coverage, layer_moments, layer_rows
from bnp_analysis.network.moments import input_triangles


def product_of_rows(layer: Layer, h: Tensor) -> Tensor:
    """`rows @ weight^T + bias`, `(R, units)`, group by group."""
    module = layer.module
    weights = module.weight.detach().view(layer.groups, layer.units // layer.groups, layer.features)
    out = torch.einsum("rgm,gum->rgu", layer.rows(h), weights).flatten(1)
    return out if module.bias is None else out + module.bias.detach()


def as_rows(output: Tensor, units: int) -> Tensor:
    """A layer's output `(N, units, ...)` as one row per example and position."""
    return output.detach().movedim(1, -1).reshape(-1, units)


def conv1d(*args: int, **options: object) -> Callable[[], nn.Module]:
    return lambda: nn.Conv1d(*args, **options)


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (conv1d(3, 4, 3), (5, 3, 8)),
    "1d, stride, zeros": (conv1d(3, 4, 3, stride=2, padding=2), (5, 3, 8)),
    "1d, same, dilation": (conv1d(3, 4, 3, padding="same", dilation=2), (5, 3, 8)),
    "1d, same, even kernel": (conv1d(3, 4, 4, padding="same"), (5, 3, 8)),
    "1d, same, even kernel, circular": (conv1d(3, 4, 4, padding="same", padding_mode="circular"), (5, 3, 8)),
    "1d, valid": (conv1d(3, 4, 3, padding="valid"), (5, 3, 8)),
    "2d": (lambda: nn.Conv2d(2, 3, (2, 3)), (4, 2, 5, 6)),
    "2d, uneven everything": (
        lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2),
        (4, 2, 6, 7),
    ),
    "2d, circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (4, 2, 5, 6)),
    "2d, reflect": (lambda: nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="reflect"), (4, 2, 5, 6)),
    "2d, replicate": (lambda: nn.Conv2d(2, 3, 3, padding=2, padding_mode="replicate"), (4, 2, 5, 6)),
    "2d, depthwise": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=False), (4, 3, 5, 5)),
    "2d, 1 x 1": (lambda: nn.Conv2d(3, 4, 1), (4, 3, 5, 5)),
    "3d": (
        lambda: nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2), groups=2),
        (3, 2, 4, 5, 6),
    ),
    "3d, circular": (lambda: nn.Conv3d(1, 2, 3, padding=1, padding_mode="circular"), (2, 1, 4, 4, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_rows_times_weights_are_the_layers_output(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    module, x = drawn(make), numbers(*shape)
    layer = next(iter(coverage(risk_of(module, x))))
    output = module(x)
    torch.testing.assert_close(product_of_rows(layer, x), as_rows(output, layer.units))
    assert layer.rows(x).shape == (output.numel() // layer.units, layer.groups, layer.features)
    assert layer.output_rows(output) == len(layer.rows(x))
    torch.testing.assert_close(layer.rows(x[0]), layer.rows(x[:1]))  # an unbatched input


@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3),
    dilation=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    length=st.integers(4, 9),
)
def test_rows_of_any_convolution(
    kernel: int, stride: int, padding: int, dilation: int, groups: int, mode: str, length: int
) -> None:
    assume(length + 2 * padding >= dilation * (kernel - 1) + 1)
    assume(padding < length)
    module = drawn(lambda: nn.Conv1d(2, 4, kernel, stride, padding, dilation, groups, padding_mode=mode))
    x = numbers(3, 2, length)
    layer = next(iter(coverage(risk_of(module, x))))
    torch.testing.assert_close(product_of_rows(layer, x), as_rows(module(x), 4))


def test_rows_of_a_dense_layer_are_its_positions() -> None:
    module, x = drawn(lambda: nn.Linear(3, 2)), numbers(4, 5, 6, 3)
    layer = next(iter(coverage(risk_of(module, x))))
    torch.testing.assert_close(product_of_rows(layer, x), module(x).detach().view(-1, 2))
    assert layer.rows(x).shape == (4 * 5 * 6, 1, 3)
    assert layer.rows(x[0, 0, 0]).shape == (1, 1, 3)


# moments


def expected_moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return values.mean(axis=0), values.var(axis=0)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_patch_moments_are_those_of_the_rows(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    risk = risk_of(drawn(make), 3 + 2 * numbers(*shape))
    found = layer_moments(risk, statistics="patch")[""]
    mean, variance = expected_moments(layer_rows(risk)[""].numpy())
    np.testing.assert_allclose(found.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-12)
    assert found.rows == len(layer_rows(risk)[""])


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_channel_moments_are_those_of_the_channels(name: str) -> None:
    """Over batch and space, before padding, spread over the patch in the order of the weight."""
    make, shape = CONVOLUTIONS[name]
    module, x = drawn(make), 3 + 2 * numbers(*shape)
    risk = risk_of(module, x)
    layer = next(iter(coverage(risk)))
    found = layer_moments(risk)[""]
    mean, variance = expected_moments(x.movedim(1, -1).reshape(-1, x.shape[1]).numpy())
    patch = math.prod(module.kernel_size)
    shaped = (layer.groups, layer.features)
    np.testing.assert_allclose(found.mean, np.repeat(mean, patch).reshape(shaped), rtol=1e-12)
    np.testing.assert_allclose(found.variance, np.repeat(variance, patch).reshape(shaped), rtol=1e-12)
    np.testing.assert_allclose(layer.channels(x).mean(dim=0), mean, rtol=1e-12)
    assert found.rows == len(layer_rows(risk)[""])


def test_channel_and_patch_agree_for_circular_padding_and_differ_for_zeros() -> None:
    x = 2 + numbers(5, 2, 6, 6)
    for mode, agree in (("circular", True), ("zeros", False)):
        risk = risk_of(drawn(lambda mode=mode: nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)), x)
        channel, patch = (layer_moments(risk, statistics=s)[""] for s in ("channel", "patch"))
        assert torch.allclose(channel.mean, patch.mean, rtol=1e-12) == agree
        assert torch.allclose(channel.variance, patch.variance, rtol=1e-12) == agree
        assert (float((channel.mean - patch.mean).abs().max()) > 0.1) != agree


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.sampled_from([0.0, 1e4, -1e7]))
def test_a_stream_has_the_moments_of_the_whole(sizes: list[int], offset: float) -> None:
    """Also far from zero, where sums of squares lose all digits."""
    x = offset + numbers(sum(sizes), 4)
    found = layer_moments(risk_of(drawn(lambda: nn.Linear(4, 2)), x, tuple(sizes)))[""]
    mean, variance = expected_moments(x.numpy())
    np.testing.assert_allclose(found.mean[0], mean, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(found.variance[0], variance, rtol=1e-8 if offset else 1e-12, atol=1e-16)
    assert found.rows == sum(sizes)


def test_moments_are_float64_whatever_the_model_is() -> None:
    x = 1000 + numbers(50, 3, dtype=torch.float32)
    found = layer_moments(risk_of(nn.Linear(3, 2), x))[""]
    assert found.mean.dtype == found.variance.dtype == torch.float64
    np.testing.assert_allclose(found.variance[0], x.double().var(dim=0, correction=0), rtol=1e-10)


def test_constant_features_are_found_by_their_extremes() -> None:
    """By a variance of zero they would not: the mean of many 0.1 is not 0.1."""
    x = numbers(11, 4)
    x[:, 1], x[:, 3] = 0.1, 0.0
    linear = drawn(lambda: nn.Linear(4, 2))
    found = layer_moments(risk_of(linear, x, (3, 7, 1)))[""]
    assert found.constant.tolist() == [[False, True, False, True]]
    assert found.variance[0, [1, 3]].tolist() == [0, 0]
    assert bool((found.variance[0, [0, 2]] > 0.1).all())
    x[10, 1] = 0.1 + 1e-12
    assert not layer_moments(risk_of(linear, x, (3, 7, 1)))[""].constant[0, 1]


def test_a_constant_channel_is_constant_in_its_patches_only_without_zero_padding() -> None:
    x = numbers(4, 2, 5, 5)
    x[:, 0] = 3.0
    for padding, patch_constant in ((0, True), (1, False)):
        risk = risk_of(drawn(lambda padding=padding: nn.Conv2d(2, 3, 3, padding=padding)), x)
        assert layer_moments(risk)[""].constant[0].tolist() == [True] * 9 + [False] * 9
        by_patch = layer_moments(risk, statistics="patch")[""].constant[0]
        assert bool(by_patch[:9].all()) == patch_constant
        assert not bool(by_patch[9:].any())


def test_expanded_channels_follow_groups() -> None:
    layer = next(iter(coverage(risk_of(drawn(conv1d(4, 4, 3, groups=2)), numbers(3, 4, 6)))))
    found = layer.expand(torch.arange(4.0))
    assert found.tolist() == [[0, 0, 0, 1, 1, 1], [2, 2, 2, 3, 3, 3]]


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(torch.tanh(self.cell(x)))


def test_a_layer_that_runs_twice_has_the_rows_of_both_runs() -> None:
    model, x = drawn(Reused), numbers(6, 3)
    risk = risk_of(model, x)
    both = torch.cat([x, torch.tanh(model.cell(x)).detach()])
    found = layer_moments(risk)["cell"]
    torch.testing.assert_close(layer_rows(risk)["cell"].squeeze(1), both)
    np.testing.assert_allclose(found.mean[0], both.mean(dim=0), rtol=1e-12)
    np.testing.assert_allclose(found.variance[0], both.var(dim=0, correction=0), rtol=1e-12)
    assert found.rows == 12


def test_sequences_have_a_row_per_position() -> None:
    x = numbers(4, 7, 3)
    found = layer_moments(risk_of(drawn(lambda: nn.Linear(3, 2)), x))[""]
    assert found.rows == 28
    np.testing.assert_allclose(found.mean[0], x.view(28, 3).mean(dim=0), rtol=1e-12)


class OverwritesItsInput(nn.Module):
    """A layer reads, by keyword, a tensor that is overwritten afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x * 2
        out = self.a(input=h)
        h += out
        return self.b(h)


def test_rows_are_what_the_layer_saw() -> None:
    model, x = drawn(OverwritesItsInput), numbers(6, 3)
    risk = risk_of(model, x)
    torch.testing.assert_close(layer_rows(risk)["a"].squeeze(1), 2 * x)
    np.testing.assert_allclose(layer_moments(risk)["a"].mean[0], 2 * x.mean(dim=0), rtol=1e-12)


def test_moments_belong_to_the_point() -> None:
    """Inputs of the second layer move with the first one's weights."""
    risk = classify(mlp(), table())
    first, moved = layer_moments(risk), layer_moments(risk.at(2 * risk.theta))
    assert torch.equal(first["fc1"].mean, moved["fc1"].mean)
    assert not torch.allclose(first["fc2"].mean, moved["fc2"].mean)


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(self.fc(torch.where(x > 0, x, float("nan"))))


def test_what_is_refused() -> None:
    risk = risk_of(drawn(lambda: nn.Linear(3, 2)), numbers(6, 3))
    with pytest.raises(InvalidInputError, match="'channel' or 'patch', got 'pixel'"):
        layer_moments(risk, statistics="pixel")
    with pytest.raises(NonFiniteError, match="input of layer 'fc' has NaN"):
        layer_moments(risk_of(drawn(Masked), numbers(6, 3)))


# what is made of the rows


@pytest.mark.parametrize("name", ["2d, uneven everything", "1d, stride, zeros", "2d, 1 x 1"])
def test_triangles_have_the_singular_values_of_the_inputs(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    risk = risk_of(drawn(make), 1 + numbers(*shape), (1, shape[0] - 1))
    found = input_triangles(risk, layer_moments(risk, statistics="patch"), coverage(risk))[""]
    for g, h in enumerate(layer_rows(risk)[""].transpose(0, 1)):
        mean, deviation = h.mean(dim=0), h.std(dim=0, correction=0)
        forms = (h, h - mean, (h - mean) / deviation)
        for triangles, form in zip((found.raw, found.centered, found.normalized), forms, strict=True):
            expected = torch.linalg.svdvals(torch.cat([form.new_ones(len(form), 1), form], dim=1))
            torch.testing.assert_close(torch.linalg.svdvals(triangles[g]), expected)


def test_a_feature_that_differs_by_rounding_only_is_constant() -> None:
    x = torch.full((50, 2), 0.3, dtype=torch.float64)
    x[::2, 0] = torch.nextafter(x[0, 0], torch.tensor(1.0, dtype=torch.float64))
    x[7, 1] += 1e-12
    risk = risk_of(nn.Linear(2, 1).double(), x)
    found = layer_moments(risk)[""]
    assert found.constant.tolist() == [[True, False]]
    assert found.variance[0, 0] == 0.0
