"""The gradients that BNP is about to change: which there are, and whether a backward pass made them since."""

from __future__ import annotations

import weakref
from collections.abc import Container, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.layers import Layer

Mark = tuple[weakref.ref[Tensor], int]


class Gradients(NamedTuple):
    """The gradients of the layer at a place, `bias` None where it has none that is free."""

    place: int
    layer: Layer
    weight: Tensor
    bias: Tensor | None


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
        weight, bias = owner.grad, None
        free = own is not None and own.requires_grad
        if own is not None and free:
            bias = own.grad
        if weight is None or (free and bias is None):
            if i in seen:
                missing += [layer.weight] if weight is None else []
                missing += [layer.bias] if free and bias is None and layer.bias is not None else []
            continue
        if weight.layout is not torch.strided or (bias is not None and bias.layout is not torch.strided):
            raise InvalidInputError(f"the gradient of layer {layer.name!r} is sparse; BNP needs dense gradients")
        found.append(Gradients(i, layer, weight, bias))
    if not found:
        raise InvalidInputError("step() before any backward pass: no covered layer has a gradient")
    if missing:
        raise InvalidInputError(
            f"layers ran in the forward pass but have no gradient: {', '.join(missing)}. Let the loss depend on them, "
            "run such forward passes under torch.no_grad(), or leave the layers out with exclude="
        )
    return found


def marks(gradients: Sequence[Gradients]) -> list[Mark]:
    """What tells these gradients from those that a later backward pass leaves."""
    return [(weakref.ref(g.weight), g.weight._version) for g in gradients]


def unchanged(gradients: Sequence[Gradients], before: Sequence[Mark]) -> bool:
    """Whether every gradient is one that was marked, and was not written to since."""
    for g in gradients:
        for ref, version in before:
            if ref() is g.weight and version == g.weight._version:
                break
        else:
            return False
    return True
