"""A checkpoint against a model: which tensor goes where, and whether all of them fit."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.names import NameIndex
from bnp_analysis.network.parameters import ParameterSpace

_MISFIT = "It comes from another architecture, or under other names"


def fit_state(
    state: Mapping[str, Any], model: nn.Module, space: ParameterSpace
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sort a state dict by the tensors of a model: those of the space, and the rest (constants, buffers).

    Names lose wrappers (`module.`, `_orig_mod.`); the names of a tied tensor count as one.

    Raises:
        InvalidInputError: missing, unknown or ambiguous names, other shapes, tied tensors that differ.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    canonical = {name: first.setdefault(id(t), name) for name, t in tensors.items()}
    index = NameIndex(tensors)
    found: dict[str, Tensor] = {}
    unknown = []
    for given, value in state.items():
        name = index.find(given)
        if name is None or not isinstance(value, Tensor):
            if not given.endswith("_extra_state"):
                unknown.append(given)
            continue
        listed = space.canonical(name) if name in space else canonical[name]
        if value.shape != tensors[name].shape:
            shapes = f"{tuple(value.shape)} in the state, {tuple(tensors[name].shape)} in the model"
            raise InvalidInputError(f"{name} has shape {shapes}. {_MISFIT}")
        if listed in found and not torch.equal(found[listed], value):
            raise InvalidInputError(f"{given} is tied to {listed} in the model, but the state has two values for them")
        found[listed] = value.detach()
    missing = [name for name in space.names if name not in found]
    if unknown or missing:
        raise InvalidInputError(
            "the state does not fit the model. "
            + (f"Missing: {', '.join(missing)}. " if missing else "")
            + (f"Unknown: {', '.join(unknown)}. " if unknown else "")
            + _MISFIT
        )
    return (
        {name: t for name, t in found.items() if name in space},
        {name: t.clone() for name, t in found.items() if name not in space},
    )


def point(
    at: Tensor | Mapping[str, Tensor], model: nn.Module, space: ParameterSpace
) -> tuple[Tensor, dict[str, Tensor]]:
    """A point `(n,)` of the space, from a flat vector or a state dict; and the rest of the state."""
    if isinstance(at, Tensor):
        if at.shape != (space.dim,):
            raise InvalidInputError(f"theta must be ({space.dim},), got {tuple(at.shape)}")
        return at.detach().to(dtype=space.dtype, device=space.device).clone(), {}
    if not isinstance(at, Mapping):
        raise InvalidInputError(f"a point is a flat tensor or a state dict, not {type(at).__name__}")
    free, rest = fit_state(at, model, space)
    return space.flatten(free).to(dtype=space.dtype, device=space.device).clone(), rest


def with_tensors(model: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with other values in some of its parameters and buffers."""
    other = copy.deepcopy(model)
    tensors = dict(other.named_parameters()) | dict(other.named_buffers())
    with torch.no_grad():
        for name, t in values.items():
            tensors[name].copy_(t)
    return other
