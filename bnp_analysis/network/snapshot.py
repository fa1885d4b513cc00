"""A private copy of a user's model: nothing done to it reaches the original, and the other way round."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.names import clean_name
from bnp_analysis.runtime.trees import counterpart, map_tensors

__all__ = ["brought", "clean_name", "snapshot", "snapshot_loss", "tied_names", "unwrap"]


def snapshot(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Module:
    """A deep copy of the model, unwrapped; its parameters still say which of them require a gradient.

    Raises:
        InvalidInputError: no model, one that cannot be copied, or a dtype that is not floating point.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInputError(f"model must be an nn.Module, got {type(model).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise InvalidInputError(f"dtype must be a floating-point type, got {dtype}")
    root = unwrap(model)
    if isinstance(root, torch.jit.ScriptModule):
        raise InvalidInputError(
            "a TorchScript module has no parameters to exchange; give the nn.Module it was made from"
        )
    if any(isinstance(p, UninitializedParameter) for p in root.parameters()):
        raise InvalidInputError("the model has lazy layers without a shape: run one forward pass first")
    gradients = {p: p.grad for p in root.parameters()}
    # Left by a forward pass: features that were kept, weights that a hook computes.
    histories = [
        (m, k, t) for m in root.modules() for k, t in vars(m).items() if isinstance(t, Tensor) and not t.is_leaf
    ]
    try:
        # Neither gradients nor histories are needed, and not all of them can be copied.
        for p in gradients:
            p.grad = None
        for module, name, t in histories:
            vars(module)[name] = t.detach()
        duplicate = copy.deepcopy(root)
    except Exception as error:
        raise InvalidInputError(
            f"the model cannot be copied ({error}), so a measurement could not be kept apart from it. Attributes that "
            "are locks, files or tensors inside containers must go, or be buffers"
        ) from error
    finally:
        for p, gradient in gradients.items():
            p.grad = gradient
        for module, name, t in histories:
            vars(module)[name] = t
    _unwrap_children(duplicate)
    for module in duplicate.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            # Sparse gradients cannot be differentiated again; dense ones are the same numbers.
            module.sparse = False
        if isinstance(module, nn.Embedding):
            # It stops the gradient of a row that the outputs do depend on.
            module.padding_idx = None
    tensors = dict(duplicate.named_parameters()) | dict(duplicate.named_buffers())
    require_one_device({name: t.device for name, t in tensors.items()}, moved=device is not None)
    return brought(duplicate, dtype, None if device is None else torch.device(device))


def brought(module: nn.Module, dtype: torch.dtype | None, device: torch.device | None) -> nn.Module:
    """A module in another dtype and on another device, in place; complex tensors stay complex, which `.to` forgets.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> layer.register_buffer("phase", torch.zeros(1, dtype=torch.complex64))
        >>> brought(layer, torch.float64, None).phase.dtype
        torch.complex128
    """

    def move(t: Tensor) -> Tensor:
        return t.to(device=device, dtype=None if dtype is None else counterpart(t, dtype))

    if dtype is not None or device is not None:
        module._apply(move)  # type: ignore[no-untyped-call]
    return module


def require_one_device(places: Mapping[str, torch.device], *, moved: bool) -> None:
    """Refuse tensors without values, and, unless they will be moved, tensors on several devices.

    Args:
        places: the device of every parameter and buffer under its name.
        moved: whether `device=` was given.

    Raises:
        InvalidInputError: names some of them and the ways out.

    Example:
        >>> require_one_device({"weight": torch.device("cpu")}, moved=False)
    """
    found: dict[torch.device, list[str]] = {}
    for name, device in places.items():
        found.setdefault(device, []).append(name)
    if empty := found.get(torch.device("meta")):
        raise InvalidInputError(
            f"{len(empty)} tensors of the model, {empty[0]} first, are on the meta device: they have shapes and no "
            "values. Load them first: model.to_empty(device='cpu'), then model.load_state_dict(...)"
        )
    if len(found) > 1 and not moved:
        where = "; ".join(f"{device}: {len(names)}, {names[0]} first" for device, names in found.items())
        raise InvalidInputError(
            f"the tensors of the model lie on several devices ({where}), but a flat vector theta lives on one. Give "
            "device=, which moves a copy of the whole model there, or model.to(device); to divide the work, divide "
            "the data: group= of several processes"
        )


def snapshot_loss(loss: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> Callable[..., Any]:
    """A loss with its own copy of the tensors it holds (class weights), in the dtype of the outputs.

    Those of modules and of `functools.partial`; what a function closes over stays the caller's.
    """

    def own(t: Tensor) -> Tensor:
        return t.detach().to(device=device, dtype=counterpart(t, dtype), copy=True)

    if isinstance(loss, nn.Module):
        return snapshot(loss, dtype, device).requires_grad_(False)
    if isinstance(loss, functools.partial):
        return functools.partial(
            snapshot_loss(loss.func, dtype, device), *map_tensors(loss.args, own), **map_tensors(loss.keywords, own)
        )
    return loss


def tied_names(model: nn.Module) -> dict[str, str]:
    """Further names of parameters and buffers that have several -> the first.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> tied_names(nn.Sequential(layer, layer))
        {'1.weight': '0.weight', '1.bias': '0.bias'}
    """
    first: dict[int, str] = {}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: first[id(t)] for name, t in named if first.setdefault(id(t), name) != name}


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
    # Not named_children(): it shows a module that is used twice once.
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        inner = unwrap(child)
        if inner is not child:
            setattr(module, name, inner)
        _unwrap_children(inner)
