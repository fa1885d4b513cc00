"""What the networks share: activations, a layer with its norm, a seed of their own, checks of sizes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models.normalization import Normalization

#: Name to factory.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "identity": nn.Identity,
}


def check_activation(name: str) -> None:
    """Refuse a name that is no key of `ACTIVATIONS`.

    Args:
        name: the name.

    Raises:
        InvalidInputError: listing the known names.

    Example:
        >>> check_activation("relu")
    """
    if name not in ACTIVATIONS:
        raise InvalidInputError(f"unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}")


def make_activation(name: str) -> nn.Module:
    """Build an activation by name.

    Args:
        name: a key of `ACTIVATIONS`.

    Returns:
        A new module without parameters.

    Raises:
        InvalidInputError: for an unknown name.

    Example:
        >>> make_activation("tanh")
        Tanh()
    """
    check_activation(name)
    return ACTIVATIONS[name]()


M = TypeVar("M", bound=nn.Module)


def seeded(make: Callable[[], M], seed: int, dtype: torch.dtype | None) -> M:
    """Build a module with torch's default initialization, drawn from a seed and from nothing else.

    Values are drawn on the CPU in torch's default dtype and converted afterwards, so that one seed means
    one network in every precision and on every device.

    Args:
        make: builds the module.
        seed: of the draw. The global random state is bit-identical before and after.
        dtype: of the floating-point parameters and buffers, by default torch's.

    Returns:
        The module, on the CPU, in training mode.

    Raises:
        InvalidInputError: if `dtype` is not floating point.

    Example:
        >>> layer = seeded(lambda: nn.Linear(2, 1), 0, torch.float64)
        >>> torch.equal(layer.weight, seeded(lambda: nn.Linear(2, 1), 0, torch.float64).weight)
        True
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InvalidInputError(f"dtype must be a floating-point torch.dtype, not {dtype!r}")
    # torch.manual_seed would also reseed every accelerator, which fork_rng(devices=[]) does not restore.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        module = make()
    return module if dtype is None else module.to(dtype)


def check_sizes(**sizes: object) -> None:
    """Refuse anything but positive integers.

    Args:
        sizes: the arguments by their names; a sequence is looked at entry by entry.

    Raises:
        InvalidInputError: naming the argument and its value.

    Example:
        >>> check_sizes(in_channels=3, widths=[4, 2])
    """
    for name, value in sizes.items():
        several = isinstance(value, Sequence)
        for size in value if isinstance(value, Sequence) else [value]:
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                what = f"each of {name}" if several else name
                raise InvalidInputError(f"{what} must be a positive integer, not {size!r}")


def add_layer(
    modules: OrderedDict[str, nn.Module],
    suffix: str,
    layer: nn.Linear | nn.Conv2d,
    *,
    norm: Normalization,
    activation: str | None = None,
    output: bool = False,
) -> None:
    """Append a layer with the normalization that belongs to it, and its activation.

    Args:
        modules: the network so far; gets `fc<suffix>` or `conv<suffix>`, `norm<suffix>`, `act<suffix>`.
        suffix: the number of the layer, or nothing.
        layer: the layer.
        norm: what to normalize, and where.
        activation: a key of `ACTIVATIONS`, or None.
        output: whether it is the last layer, behind which nothing is normalized.

    Example:
        >>> modules = OrderedDict()
        >>> add_layer(modules, "1", nn.Linear(2, 3), norm=Normalization("batch"), activation="relu")
        >>> list(modules)
        ['fc1', 'norm1', 'act1']
    """
    # The two kinds that networks are built of here; `models` knows nothing of the registry, which is above it.
    if isinstance(layer, nn.Conv2d):
        kind, spatial, inputs, outputs = "conv", True, layer.in_channels, layer.out_channels
    else:
        kind, spatial, inputs, outputs = "fc", False, layer.in_features, layer.out_features
    if (before := norm.at_place("input", inputs, spatial=spatial)) is not None:
        modules[f"norm{suffix}"] = before
    modules[f"{kind}{suffix}"] = layer
    after = None if output else norm.at_place("preactivation", outputs, spatial=spatial)
    if after is not None:
        modules[f"norm{suffix}"] = after
    if activation is not None:
        modules[f"act{suffix}"] = make_activation(activation)
