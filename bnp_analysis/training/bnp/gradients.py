"""The gradients that BNP is about to change: which there are, and whether a backward pass made them since."""

from __future__ import annotations

import weakref
from collections.abc import Container, Sequence

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.layers import Layer

# A layer's place among all, the layer, and the gradients of its weight and of its bias, None where that is not free.
Gradients = tuple[int, Layer, Tensor, Tensor | None]
Marks = dict[int, tuple[weakref.ref[Tensor], int]]


def find_gradients(layers: Sequence[Layer], seen: Container[int], rows: Sequence[int]) -> list[Gradients]:
    """The gradients of the layers that took part.

    Args:
        layers: the candidates.
        seen: those with statistics in this step.
        rows: of each layer when it was last seen before, 0 for never.

    Raises:
        InvalidInputError: some of the layers seen have none, which are named, or all; sparse ones.
    """
    found: list[Gradients] = []
    missing: list[str] = []
    for i, layer in enumerate(layers):
        # Attributes of modules are slow; each is looked up once.
        held = layer.module._parameters
        owner, own = held["weight"], held["bias"] if layer.bias is not None else None
        if owner is None or not owner.requires_grad or not (rows[i] or i in seen):
            continue
        free = own is not None and own.requires_grad
        weight, bias = owner.grad, own.grad if own is not None and free else None
        if weight is None or (free and bias is None):
            if i in seen:
                missing += [layer.weight] if weight is None else []
                missing += [layer.bias] if free and bias is None and layer.bias is not None else []
            continue
        if weight.layout is not torch.strided or (bias is not None and bias.layout is not torch.strided):
            raise InvalidInputError(f"the gradient of layer {layer.name!r} is sparse; BNP needs dense gradients")
        found.append((i, layer, weight, bias))
    if not found:
        raise InvalidInputError("step() before any backward pass: no covered layer has a gradient")
    if missing:
        raise InvalidInputError(
            f"layers ran in the forward pass but have no gradient: {', '.join(missing)}. Let the loss depend on them, "
            "run such forward passes under torch.no_grad(), or leave the layers out with exclude="
        )
    return found


def marks(gradients: Sequence[Gradients]) -> Marks:
    """What tells these gradients from those that a later backward pass leaves."""
    return {place: (weakref.ref(weight), weight._version) for place, _, weight, _ in gradients}


def unchanged(gradients: Sequence[Gradients], before: Marks) -> bool:
    """Whether every gradient is the one that was marked, and was not written to since."""
    for place, _, weight, _ in gradients:
        ref, version = before.get(place, (None, 0))
        if ref is None or ref() is not weight or version != weight._version:
            return False
    return True
