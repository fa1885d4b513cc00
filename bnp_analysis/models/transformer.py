"""A small transformer over the patches of images, with dense layers of its own for every map it learns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models.parts import check_activation, check_sizes, make_activation, seeded

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
    check_activation(activation)
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
