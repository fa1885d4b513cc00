"""A private copy of a user's model, independent of the original; its state and its fingerprint."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from bnp_analysis.distributed.group import digest
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.parameters import NameIndex, ParameterSpace, clean_name
from bnp_analysis.runtime.kinds import require_kind
from bnp_analysis.runtime.memory import require_memory
from bnp_analysis.runtime.trees import counterpart, map_tensors

__all__ = ["brought", "clean_name", "snapshot", "snapshot_loss", "tied_names", "unwrap"]


def snapshot(model: nn.Module, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Module:
    """A deep copy of the model, unwrapped; its parameters still say which of them require a gradient.

    Raises:
        InvalidInputError: no model, or one that cannot be copied.
    """
    require_kind(model, "model", nn.Module)
    root = unwrap(model)
    if isinstance(root, torch.jit.ScriptModule):
        raise InvalidInputError(
            "a TorchScript module has no parameters to exchange; give the nn.Module it was made from"
        )
    if any(isinstance(p, UninitializedParameter) for p in root.parameters()):
        raise InvalidInputError("the model has lazy layers without a shape: run one forward pass first")
    if sharded := [name for name, p in root.named_parameters() if hasattr(p, "device_mesh")]:
        raise InvalidInputError(
            f"parameter {sharded[0]!r} is sharded (a DTensor: fully_shard, tensor parallelism), and a measurement "
            "needs whole ones: load full_state_dict of the model into one that is not sharded, and measure that; "
            "several processes then share its data with group="
        )
    own = [*root.parameters(), *root.buffers()]
    size = sum(t.numel() * (t.itemsize + 3 * (t.itemsize if dtype is None else dtype.itemsize)) for t in own)
    where = torch.device(device) if device is not None else next((t.device for t in own), None)
    what = "a copy of the model, its parameters as a vector, and their gradient"
    require_memory(size, what, "Use a smaller model, or float32", device=where)
    # Left by a forward pass, with histories that cannot be copied: features that are kept, weights that hooks compute.
    left = [t for m in root.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
    try:
        duplicate = copy.deepcopy(root, {id(t): t.detach().clone() for t in left})
    except Exception as error:
        raise InvalidInputError(
            f"the model cannot be copied ({error}), so a measurement could not be kept apart from it. Attributes that "
            "are locks, files or tensors inside containers must go, or be buffers"
        ) from error
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
    require_values(places)
    found: dict[torch.device, list[str]] = {}
    for name, device in places.items():
        found.setdefault(device, []).append(name)
    if len(found) > 1 and not moved:
        where = "; ".join(f"{device}: {len(names)}, {names[0]} first" for device, names in found.items())
        raise InvalidInputError(
            f"the tensors of the model lie on several devices ({where}), but a flat vector theta lives on one. Give "
            "device=, which moves a copy of the whole model there, or model.to(device); to divide the work, divide "
            "the data: group= of several processes"
        )


def require_values(places: Mapping[str, torch.device]) -> None:
    """Refuse tensors on the meta device.

    Args:
        places: the device of every tensor under its name.

    Raises:
        InvalidInputError: names the first of them and the way out.

    Example:
        >>> require_values({"weight": torch.device("cpu")})
    """
    empty = [name for name, device in places.items() if device.type == "meta"]
    if empty:
        raise InvalidInputError(
            f"{len(empty)} tensors of the model, {empty[0]} first, are on the meta device: they have shapes and no "
            "values. Load them first: model.to_empty(device='cpu'), then model.load_state_dict(...)"
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
    return wrappers(model)[-1]


def wrappers(model: nn.Module) -> list[nn.Module]:
    """A model, what it wraps, and so on to the user's module."""
    found = [model]
    while True:
        inner = getattr(found[-1], "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            if not isinstance(found[-1], nn.DataParallel | nn.parallel.DistributedDataParallel):
                return found
            inner = found[-1].module
        found.append(inner)


def _unwrap_children(module: nn.Module) -> None:
    """Products run eagerly: compiled second derivatives are not reliable."""
    # Not named_children(): it shows a module that is used twice once.
    for name, child in list(module._modules.items()):
        if child is None:
            continue
        inner = unwrap(child)
        if inner is not child:
            setattr(module, name, inner)
        _unwrap_children(inner)


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
    tied, index = tied_names(model), NameIndex(tensors)
    found: dict[str, Tensor] = {}
    unknown = []
    for given, value in state.items():
        name = index.find(given)
        if name is None or not isinstance(value, Tensor):
            if not given.endswith("_extra_state"):
                unknown.append(given)
            continue
        listed = space.canonical(name) if name in space else tied.get(name, name)
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
            + ": at= takes what state_dict() of this model gave"
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
            raise InvalidInputError(f"theta must be ({space.dim},), got {tuple(at.shape)}: at= takes a flat vector")
        return at.detach().to(dtype=space.dtype, device=space.device).clone(), {}
    if not isinstance(at, Mapping):
        raise InvalidInputError(f"at= must be a point, a flat tensor or a state dict, not {type(at).__name__}")
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


def fingerprint(model: nn.Module, loss: Callable[..., Any], theta: Tensor) -> dict[str, Any]:
    """Name -> a value to compare: of the model, its tensors and modes, the loss, and the point.

    What functions close over stays unseen.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "the model": f"{model!r} {_settings(model)}",
        "the train flags": "".join("te"[not m.training] for m in model.modules()),
        "the names and shapes of tensors": {name: tuple(t.shape) for name, t in tensors.items()},
        "the dtype and kind of device": f"{theta.dtype} on {theta.device.type}",
        "the loss": _described(loss),
        "the point theta": digest(theta),
        "what the tensors hold": [digest(t) for t in tensors.values()],
    }


def _described(loss: Callable[..., Any]) -> str:
    if isinstance(loss, nn.Module):
        return f"{_settings(loss)} {[digest(t) for t in loss.state_dict().values() if isinstance(t, Tensor)]}"
    if isinstance(loss, functools.partial):
        held = [digest(v) if isinstance(v, Tensor) else repr(v) for v in (*loss.args, *loss.keywords.values())]
        return f"{_described(loss.func)} {held} {[*loss.keywords]}"
    return str(getattr(loss, "__qualname__", type(loss).__qualname__))


def _settings(root: nn.Module) -> list[tuple[str, str, dict[str, Any]]]:
    """The numbers and words that modules hold beside their tensors: not all of them are in their `repr`."""
    plain = (bool, int, float, str, type(None))
    return [
        (name, type(m).__qualname__, {k: v for k, v in vars(m).items() if isinstance(v, plain) and k != "training"})
        for name, m in root.named_modules()
    ]
