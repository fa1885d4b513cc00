"""The CIFAR ResNet of depth 6n + 2 (He et al. 2016), with biases in its convolutions."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models.activations import check_activation, make_activation
from bnp_analysis.models.construction import add_layer, check_size, seeded
from bnp_analysis.models.normalization import Normalization

_SHORTCUTS = ("pad", "projection")


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
    check_size(depth, "depth")
    if depth < 8 or (depth - 2) % 6:
        raise InvalidInputError(f"depth must be 6 n + 2 with n >= 1 (8, 14, 20, 32, 56, ...), not {depth}")
    for size, what in ((in_channels, "in_channels"), (num_classes, "num_classes"), (width, "width")):
        check_size(size, what)
    if shortcut not in _SHORTCUTS:
        raise InvalidInputError(f"unknown shortcut {shortcut!r}; known: {', '.join(_SHORTCUTS)}")
    check_activation(activation)
    style = _Style(Normalization(norm, norm_at, norm_affine, norm_groups), activation, shortcut, bias)

    def make() -> nn.Sequential:
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        first = nn.Conv2d(in_channels, width, 3, padding=1, bias=bias)
        add_layer(modules, "1", first, norm=style.norm, activation=activation)
        inputs = width
        for s in (1, 2, 3):
            outputs = width * 2 ** (s - 1)
            modules[f"stage{s}"] = _stage(inputs, outputs, (depth - 2) // 6, style)
            inputs = outputs
        modules["pool"] = nn.AdaptiveAvgPool2d(1)
        modules["flatten"] = nn.Flatten()
        add_layer(modules, "", nn.Linear(inputs, num_classes, bias), norm=style.norm, output=True)
        return nn.Sequential(modules)

    return seeded(make, seed, dtype)


@dataclass(frozen=True)
class _Style:
    """What all blocks of one network share."""

    norm: Normalization
    activation: str
    shortcut: str
    bias: bool


def _stage(inputs: int, outputs: int, blocks: int, style: _Style) -> nn.Sequential:
    stage: OrderedDict[str, nn.Module] = OrderedDict()
    for b in range(1, blocks + 1):
        stage[f"block{b}"] = _block(inputs if b == 1 else outputs, outputs, style)
    return nn.Sequential(stage)


def _block(inputs: int, outputs: int, style: _Style) -> ResidualBlock:
    stride = 1 if inputs == outputs else 2
    branch: OrderedDict[str, nn.Module] = OrderedDict()
    first = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=style.bias)
    second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=style.bias)
    add_layer(branch, "1", first, norm=style.norm, activation=style.activation)
    add_layer(branch, "2", second, norm=style.norm)
    return ResidualBlock(
        nn.Sequential(branch), _shortcut(inputs, outputs, stride, style), make_activation(style.activation)
    )


def _shortcut(inputs: int, outputs: int, stride: int, style: _Style) -> nn.Module:
    if inputs == outputs:
        return nn.Identity()
    if style.shortcut == "pad":
        return PadShortcut(stride, outputs - inputs)
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    add_layer(modules, "", nn.Conv2d(inputs, outputs, 1, stride, bias=style.bias), norm=style.norm)
    return nn.Sequential(modules)
