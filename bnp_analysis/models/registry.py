"""The networks by name, for those who choose one with a string."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models.convolutional import cnn
from bnp_analysis.models.perceptron import mlp
from bnp_analysis.models.residual import resnet
from bnp_analysis.models.transformer import transformer

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
    if name not in MODELS:
        raise InvalidInputError(f"unknown model {name!r}; known: {', '.join(MODELS)}")
    return MODELS[name]
