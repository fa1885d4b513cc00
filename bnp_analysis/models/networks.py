"""Perceptron, five-layer convolutional network, CIFAR ResNet, a small transformer, and all networks by name."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models.parts import (
    ACTIVATIONS,
    Normalization,
    add_layer,
    check_known,
    check_sizes,
    make_activation,
    seeded,
)


def mlp(
    widths: Sequence[int],
    *,
    activation: str = "relu",
    norm: str = "none",
    norm_at: str = "preactivation",
    norm_affine: bool = True,
    norm_groups: int | None = None,
    bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Build a multilayer perceptron, `h_k = act(W_k h_(k-1) + b_k)`, the last layer without activation.

    Args:
        widths: features of the input, of each hidden layer, and of the output; two or more.
        activation: a key of `ACTIVATIONS`.
        norm: a key of `NORMS`.
        norm_at: "preactivation" (linear, norm, activation) or "input" (norm before every linear layer).
        norm_affine: whether the normalization has a gain and a shift of its own.
        norm_groups: of norm="group"; None fits it to each width.
        bias: whether the linear layers have one.
        seed: of the initialization, which is torch's default; global random state stays as it is.
        dtype: of the parameters, by default torch's.

    Returns:
        A sequential model from (N, widths[0]) to (N, widths[-1]) with modules `fc1, norm1, act1, fc2, ...`;
        `norm<k>` belongs to `fc<k>`.

    Raises:
        InvalidInputError: for fewer than two widths, a width that is not positive, unknown names, or a
            normalization that does not fit a width.

    Example:
        >>> model = mlp([64, 32, 10], norm="batch")
        >>> [name for name, _ in model.named_children()]
        ['fc1', 'norm1', 'act1', 'fc2']
        >>> model(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """
    sizes = list(widths)
    if len(sizes) < 2:
        raise InvalidInputError(f"widths needs an input and an output size, not {sizes}")
    check_sizes(widths=sizes)
    check_known("activation", activation, ACTIVATIONS)
    placed = Normalization(norm, norm_at, norm_affine, norm_groups)

    def make() -> nn.Sequential:
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        for k, (inputs, outputs) in enumerate(pairwise(sizes[:-1]), start=1):
            layer = nn.Linear(inputs, outputs, bias)
            add_layer(modules, str(k), layer, norm=placed, activation=activation)
        head = nn.Linear(sizes[-2], sizes[-1], bias)
        add_layer(modules, str(len(sizes) - 1), head, norm=placed, output=True)
        return nn.Sequential(modules)

    return seeded(make, seed, dtype)


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
    shape = tuple(input_shape)
    if len(shape) != 3:
        raise InvalidInputError(f"input_shape must be (C, H, W), not {shape}; load images with flatten=False")
    if len(channels) != 3:
        raise InvalidInputError(f"channels must name three convolutions, not {tuple(channels)}")
    check_sizes(input_shape=shape, channels=tuple(channels), hidden=hidden, num_classes=num_classes)
    in_channels, height, width = shape
    if height % 2**_HALVINGS or width % 2**_HALVINGS:
        raise InvalidInputError(f"image size {height} x {width} is not divisible by {2**_HALVINGS}")
    check_known("pool", pool, _POOLS)
    check_known("padding_mode", padding_mode, ("zeros", "circular"))
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


class PadShortcut(nn.Module):
    """The shortcut without parameters ("option A"): every second pixel, new channels zero.

    Args:
        stride: 1 or 2.
        extra_channels: how many zero channels are appended.

    Example:
        >>> PadShortcut(2, 3)(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 6, 4, 4])
    """

    def __init__(self, stride: int, extra_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.extra_channels = extra_channels

    def forward(self, x: Tensor) -> Tensor:
        kept = x[..., :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, 0, self.extra_channels))

    def extra_repr(self) -> str:
        return f"stride={self.stride}, extra_channels={self.extra_channels}"


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut, `act(branch(x) + shortcut(x))`.

    Args:
        branch: convolutions, norms and the inner activation.
        shortcut: what the input passes through.
        activation: applied to the sum.

    Example:
        >>> ResidualBlock(nn.Identity(), nn.Identity(), nn.ReLU())(torch.tensor([-1.0, 2.0]))
        tensor([0., 4.])
    """

    def __init__(self, branch: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut
        self.act = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.branch(x) + self.shortcut(x))
        return out


def resnet(
    depth: int = 20,
    *,
    in_channels: int = 3,
    num_classes: int = 10,
    width: int = 16,
    shortcut: str = "pad",
    activation: str = "relu",
    norm: str = "none",
    norm_at: str = "preactivation",
    norm_affine: bool = True,
    norm_groups: int | None = None,
    bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Build the CIFAR ResNet of depth `6 n + 2`: a convolution, three stages of `n` blocks, one dense layer.

    The stages have `width, 2 width, 4 width` channels; the second and third begin with stride 2. The mean
    over space goes into the dense layer, so any image size from 4 x 4 on fits.

    Args:
        depth: 8, 14, 20, 32, 44, 56, 110, ...
        in_channels: channels of the images.
        num_classes: number of outputs.
        width: channels of the first stage.
        shortcut: where the shape changes, "pad" (no parameters) or "projection" (1 x 1 convolution with its
            own normalization); the identity elsewhere.
        activation: a key of `ACTIVATIONS`.
        norm: a key of `NORMS`.
        norm_at: "preactivation" (behind every convolution) or "input" (before every convolution and before
            the dense layer).
        norm_affine: whether the normalization has a gain and a shift of its own.
        norm_groups: of norm="group"; None fits it to each number of channels.
        bias: whether the convolutions and the dense layer have one.
        seed: of the initialization, which is torch's default; global random state stays as it is.
        dtype: of the parameters, by default torch's.

    Returns:
        A sequential model from (N, in_channels, H, W) to (N, num_classes), with modules `conv1`, `norm1`,
        `act1`, `stage<s>.block<b>.branch.conv<k>`, ..., `pool`, `flatten`, `fc`.

    Raises:
        InvalidInputError: for a depth that is not 6 n + 2, sizes that are not positive, unknown names.

    Example:
        >>> model = resnet(8, in_channels=1, width=4, norm="batch")
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
        >>> [name for name, _ in model.stage2.block1.branch.named_children()]
        ['conv1', 'norm1', 'act1', 'conv2', 'norm2']
    """
    check_sizes(depth=depth)
    if depth < 8 or (depth - 2) % 6:
        raise InvalidInputError(f"depth must be 6 n + 2 with n >= 1 (8, 14, 20, 32, 56, ...), not {depth}")
    check_sizes(in_channels=in_channels, num_classes=num_classes, width=width)
    check_known("shortcut", shortcut, ("pad", "projection"))
    placed = Normalization(norm, norm_at, norm_affine, norm_groups)

    def block(inputs: int, outputs: int) -> ResidualBlock:
        stride = 1 if inputs == outputs else 2
        branch: OrderedDict[str, nn.Module] = OrderedDict()
        first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)
        second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=bias)
        add_layer(branch, "1", first, norm=placed, activation=activation)
        add_layer(branch, "2", second, norm=placed)
        return ResidualBlock(nn.Sequential(branch), beside(inputs, outputs, stride), make_activation(activation))

    def beside(inputs: int, outputs: int, stride: int) -> nn.Module:
        if inputs == outputs:
            return nn.Identity()
        if shortcut == "pad":
            return PadShortcut(stride, outputs - inputs)
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        add_layer(modules, "", nn.Conv2d(inputs, outputs, 1, stride, bias=bias), norm=placed)
        return nn.Sequential(modules)

    def make() -> nn.Sequential:
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        first = nn.Conv2d(in_channels, width, 3, padding=1, bias=bias)
        add_layer(modules, "1", first, norm=placed, activation=activation)
        inputs = width
        for s in (1, 2, 3):
            stage: OrderedDict[str, nn.Module] = OrderedDict()
            for b in range(1, (depth - 2) // 6 + 1):
                outputs = width * 2 ** (s - 1)
                stage[f"block{b}"] = block(inputs, outputs)
                inputs = outputs
            modules[f"stage{s}"] = nn.Sequential(stage)
        modules["pool"] = nn.AdaptiveAvgPool2d(1)
        modules["flatten"] = nn.Flatten()
        add_layer(modules, "", nn.Linear(inputs, num_classes, bias), norm=placed, output=True)
        return nn.Sequential(modules)

    return seeded(make, seed, dtype)


_NORMS = ("layer", "none")


class Patches(nn.Module):
    """Images cut into squares, each mapped to a token, plus a learned vector for its place.

    Args:
        input_shape: (C, H, W).
        patch: side of a square.
        width: features of a token.
        bias: whether the map has one.

    Example:
        >>> Patches((3, 8, 8), 4, 16, True)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4, 16])
    """

    def __init__(self, input_shape: Sequence[int], patch: int, width: int, bias: bool) -> None:
        super().__init__()
        channels, height, breadth = input_shape
        self.patch = patch
        self.fc = nn.Linear(channels * patch**2, width, bias)
        self.place = nn.Parameter(0.02 * torch.randn(height * breadth // patch**2, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)) + self.place
        return out


class Attention(nn.Module):
    """Multi-head self-attention, `softmax(Q K^T / sqrt(d)) V` per head, then one dense layer.

    Queries, keys and values have layers of their own, so that each layer has one input and one curvature block.

    Args:
        width: features of a token.
        heads: how many; divides the width.
        bias: whether the dense layers have one.

    Example:
        >>> Attention(8, 2, True)(torch.zeros(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Branch(nn.Module):
    """`x + f(norm(x))`.

    Args:
        norm: of the branch's input.
        inner: `f`.

    Example:
        >>> Branch(nn.Identity(), nn.ReLU())(torch.tensor([-1.0, 2.0]))
        tensor([-1.,  4.])
    """

    def __init__(self, norm: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = norm, inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(self.norm(x))
        return out


class TokenMean(nn.Module):
    """The mean over tokens.

    Example:
        >>> TokenMean()(torch.ones(2, 5, 3)).shape
        torch.Size([2, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


def transformer(
    input_shape: Sequence[int] = (3, 32, 32),
    num_classes: int = 10,
    *,
    patch: int = 4,
    width: int = 64,
    depth: int = 2,
    heads: int = 4,
    hidden: int = 128,
    activation: str = "gelu",
    norm: str = "layer",
    norm_at: str = "input",
    bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Build a transformer over image patches (Dosovitskiy et al. 2021) that averages its tokens before one dense layer.

    Each block is attention and a two-layer perceptron, each beside an identity: `h + f(norm(h))`.

    Args:
        input_shape: (C, H, W).
        num_classes: number of outputs.
        patch: side of the square patches; divides H and W.
        width: features of a token.
        depth: blocks.
        heads: of each attention; divides `width`.
        hidden: units of each block's perceptron.
        activation: a key of `ACTIVATIONS`.
        norm: "layer" or "none"; other normalizations do not fit sequences of tokens.
        norm_at: "input", where transformers have it; of no account without norms.
        bias: whether the dense layers have one.
        seed: of the initialization, which is torch's default; global random state stays as it is.
        dtype: of the parameters, by default torch's.

    Returns:
        A sequential model from (N, C, H, W) to (N, num_classes) with modules `patches`, `block<b>.attention`,
        `block<b>.perceptron`, `norm`, `pool`, `fc`.

    Raises:
        InvalidInputError: sizes that are not positive or do not divide, unknown names.

    Example:
        >>> model = transformer((1, 8, 8), 3, width=8, heads=2, hidden=16)
        >>> model(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 3])
    """
    shape = tuple(input_shape)
    if len(shape) != 3:
        raise InvalidInputError(f"input_shape must be (C, H, W), not {shape}; load the data with flatten=False")
    check_sizes(patch=patch, width=width, depth=depth, heads=heads, hidden=hidden, num_classes=num_classes)
    check_sizes(input_shape=shape)
    if shape[1] % patch or shape[2] % patch:
        raise InvalidInputError(f"patch={patch} does not divide images of {shape[1]} x {shape[2]}")
    if width % heads:
        raise InvalidInputError(f"heads={heads} does not divide width={width}")
    if norm not in _NORMS:
        raise InvalidInputError(f"a transformer has norm 'layer' or 'none', not {norm!r}")
    if norm != "none" and norm_at != "input":
        raise InvalidInputError(f"a transformer's norms stand before its layers: norm_at='input', not {norm_at!r}")

    def normalization() -> nn.Module:
        return nn.LayerNorm(width) if norm == "layer" else nn.Identity()

    def perceptron() -> nn.Sequential:
        layers = {"fc1": nn.Linear(width, hidden, bias), "act": make_activation(activation)}
        return nn.Sequential(OrderedDict({**layers, "fc2": nn.Linear(hidden, width, bias)}))

    def block() -> nn.Sequential:
        attention = Branch(normalization(), Attention(width, heads, bias))
        return nn.Sequential(OrderedDict(attention=attention, perceptron=Branch(normalization(), perceptron())))

    def make() -> nn.Sequential:
        modules: OrderedDict[str, nn.Module] = OrderedDict(patches=Patches(shape, patch, width, bias))
        for b in range(1, depth + 1):
            modules[f"block{b}"] = block()
        modules |= {"norm": normalization(), "pool": TokenMean(), "fc": nn.Linear(width, num_classes, bias)}
        return nn.Sequential(modules)

    return seeded(make, seed, dtype)


_DEPTHS = (8, 14, 20, 32, 44, 56, 110)

#: Name to factory; `resnet` takes the depth as an argument, `resnet20` is `resnet` of depth 20.
MODELS: Mapping[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "resnet": resnet,
    **{f"resnet{depth}": partial(resnet, depth) for depth in _DEPTHS},
    "transformer": transformer,
}


def build(name: str, **kwargs: Any) -> nn.Module:
    """Build a network by name.

    Args:
        name: a key of `MODELS`.
        **kwargs: what its factory takes; see `mlp`, `cnn`, `resnet`, `transformer`.

    Returns:
        The network, in training mode.

    Raises:
        InvalidInputError: for an unknown name, an argument that the factory does not take, or one that it
            refuses.

    Example:
        >>> build("mlp", widths=[4, 3, 2])
        Sequential(
          (fc1): Linear(in_features=4, out_features=3, bias=True)
          (act1): ReLU()
          (fc2): Linear(in_features=3, out_features=2, bias=True)
        )
    """
    factory = _factory(name)
    try:
        inspect.signature(factory).bind(**kwargs)
    except TypeError as error:
        raise InvalidInputError(f"model {name!r}: {error}") from error
    return factory(**kwargs)


def build_for(name: str, input_shape: Sequence[int], num_classes: int, **kwargs: Any) -> nn.Module:
    """Build a network by name that fits given inputs and labels.

    Args:
        name: a key of `MODELS`.
        input_shape: of one input, without the batch: (features,) for "mlp", (C, H, W) for the others.
        num_classes: number of outputs.
        **kwargs: further arguments of the factory; for "mlp" also `hidden`, the widths of the hidden layers,
            (32, 32) by default.

    Returns:
        The network, in training mode.

    Raises:
        InvalidInputError: where the shape is of the wrong kind, and for what `build` refuses.

    Example:
        >>> [tuple(p.shape) for p in build_for("mlp", (64,), 10, hidden=[8]).parameters()]
        [(8, 64), (8,), (10, 8), (10,)]
    """
    _factory(name)
    images = name != "mlp"
    if len(input_shape) != (3 if images else 1):
        raise InvalidInputError(
            f"model {name!r} takes {'images (C, H, W)' if images else 'flat inputs (features,)'}, "
            f"not inputs of shape {tuple(input_shape)}; load the data with flatten={not images}"
        )
    if name == "mlp":
        widths = [input_shape[0], *kwargs.pop("hidden", (32, 32)), num_classes]
        return build(name, widths=widths, **kwargs)
    if name in ("cnn", "transformer"):
        return build(name, input_shape=tuple(input_shape), num_classes=num_classes, **kwargs)
    return build(name, in_channels=input_shape[0], num_classes=num_classes, **kwargs)


def _factory(name: str) -> Callable[..., nn.Module]:
    check_known("model", name, MODELS)
    return MODELS[name]
