"""A private copy of a user's model: nothing done to it reaches the original, and the other way round."""

from __future__ import annotations

import copy

import torch
from torch import nn

from bnp_analysis.errors import InvalidInputError


def clean_name(name: str) -> str:
    """A state name without the prefixes of compiled and data-parallel wrappers.

    Example:
        >>> clean_name("module._orig_mod.fc.weight")
        'fc.weight'
    """
    name = name.replace("_orig_mod.", "")
    return name.removeprefix("module.")


def snapshot(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Module:
    """A deep copy of the model, unwrapped, with its own parameters that record no gradient.

    Raises:
        InvalidInputError: a model that cannot be copied, or a dtype that is not floating point.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InvalidInputError(f"dtype must be a floating-point type, got {dtype}")
    root = unwrap(model)
    gradients = {p: p.grad for p in root.parameters()}
    try:
        # Gradients are neither needed nor always copyable.
        for p in gradients:
            p.grad = None
        duplicate = copy.deepcopy(root)
    except Exception as error:
        raise InvalidInputError(
            f"the model cannot be copied ({error}), so a measurement could not be kept apart from it. Uninitialized "
            "lazy layers need one forward pass first; attributes that are not leaf tensors should be buffers"
        ) from error
    finally:
        for p, gradient in gradients.items():
            p.grad = gradient
    _unwrap_children(duplicate)
    duplicate.requires_grad_(False)
    if device is not None:
        duplicate.to(device=device)
    return duplicate if dtype is None else duplicate.to(dtype=dtype)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(inner, nn.Module):
            model = inner
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


def _unwrap_children(module: nn.Module) -> None:
    """Products run eagerly: compiled second derivatives are not reliable (trap 13)."""
    for name, child in module.named_children():
        inner = unwrap(child)
        if inner is not child:
            setattr(module, name, inner)
        _unwrap_children(inner)
