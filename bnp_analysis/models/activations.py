"""The activations of the networks, by name. None works in place: derivatives need the pre-activations."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from bnp_analysis.errors import InvalidInputError

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
