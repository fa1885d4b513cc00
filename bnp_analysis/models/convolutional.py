"""The five-layer convolutional network."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models.activations import check_activation
from bnp_analysis.models.construction import add_layer, check_size, seeded
from bnp_analysis.models.normalization import Normalization

_POOLS = {"max": nn.MaxPool2d, "avg": nn.AvgPool2d}
_HALVINGS = 2


def cnn(
    input_shape: Sequence[int] = (3, 32, 32),
    num_classes: int = 10,
    *,
    channels: Sequence[int] = (32, 64, 64),
    hidden: int = 64,
    pool: Literal["max", "avg"] = "max",
    padding_mode: Literal["zeros", "circular"] = "zeros",
    activation: str = "relu",
    norm: str = "none",
    norm_at: str = "preactivation",
    norm_affine: bool = True,
    norm_groups: int | None = None,
    bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Build the five-layer network: three 3 x 3 convolutions, two poolings by 2, two dense layers.

    `conv1 act1 pool1 conv2 act2 pool2 conv3 act3 flatten fc4 act4 fc5`, stride 1 and padding 1.

    Args:
        input_shape: (C, H, W) of one image; H and W divisible by 4. (1, 8, 8) fits the digits.
        num_classes: number of outputs.
        channels: outputs of the three convolutions.
        hidden: outputs of the first dense layer.
        pool: "max" or "avg".
        padding_mode: "zeros" or "circular".
        activation: a key of `ACTIVATIONS`.
        norm: a key of `NORMS`.
        norm_at: "preactivation" (layer, norm, activation) or "input" (norm before all five layers).
        norm_affine: whether the normalization has a gain and a shift of its own.
        norm_groups: of norm="group"; None fits it to each number of channels.
        bias: whether the five layers have one.
        seed: of the initialization, which is torch's default; global random state stays as it is.
        dtype: of the parameters, by default torch's.

    Returns:
        A sequential model from (N, C, H, W) to (N, num_classes); `norm<k>` belongs to layer `k`.

    Raises:
        InvalidInputError: for sizes that do not fit, or unknown names.

    Example:
        >>> model = cnn((1, 8, 8), channels=(2, 3, 4), hidden=5)
        >>> model(torch.zeros(6, 1, 8, 8)).shape
        torch.Size([6, 10])
        >>> [name for name, _ in model.named_children() if name.startswith(("conv", "fc"))]
        ['conv1', 'conv2', 'conv3', 'fc4', 'fc5']
    """
    in_channels, height, width = _check_sizes(input_shape, channels, hidden, num_classes)
    if pool not in _POOLS:
        raise InvalidInputError(f"unknown pool {pool!r}; known: {', '.join(_POOLS)}")
    if padding_mode not in {"zeros", "circular"}:
        raise InvalidInputError(f"unknown padding_mode {padding_mode!r}; known: zeros, circular")
    check_activation(activation)
    placed = Normalization(norm, norm_at, norm_affine, norm_groups)

    def make() -> nn.Sequential:
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        inputs = in_channels
        for k, outputs in enumerate(channels, start=1):
            layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias, padding_mode=padding_mode)
            add_layer(modules, str(k), layer, norm=placed, activation=activation)
            if k <= _HALVINGS:
                modules[f"pool{k}"] = _POOLS[pool](2)
            inputs = outputs
        modules["flatten"] = nn.Flatten()
        features = inputs * (height // 2**_HALVINGS) * (width // 2**_HALVINGS)
        add_layer(modules, "4", nn.Linear(features, hidden, bias), norm=placed, activation=activation)
        add_layer(modules, "5", nn.Linear(hidden, num_classes, bias), norm=placed, output=True)
        return nn.Sequential(modules)

    return seeded(make, seed, dtype)


def _check_sizes(
    input_shape: Sequence[int], channels: Sequence[int], hidden: int, num_classes: int
) -> tuple[int, int, int]:
    if len(input_shape) != 3:
        raise InvalidInputError(
            f"input_shape must be (C, H, W), not {tuple(input_shape)}; load images with flatten=False"
        )
    if len(channels) != 3:
        raise InvalidInputError(f"channels must name three convolutions, not {tuple(channels)}")
    for size in input_shape:
        check_size(size, "each of input_shape")
    for size in channels:
        check_size(size, "each of channels")
    check_size(hidden, "hidden")
    check_size(num_classes, "num_classes")
    in_channels, height, width = input_shape
    if height % 2**_HALVINGS or width % 2**_HALVINGS:
        raise InvalidInputError(f"image size {height} x {width} is not divisible by {2**_HALVINGS}")
    return in_channels, height, width
