"""Tensors inside tuples, lists and dicts: how a batch or a shard is held."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def counterpart(t: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor where real numbers have `dtype`: complex ones have two of them, whole ones stay.

    Example:
        >>> counterpart(torch.zeros(1, dtype=torch.complex64), torch.float64)
        torch.complex128
    """
    if t.is_complex():
        # Not complex32, for which torch has few operations.
        return torch.complex128 if dtype == torch.float64 else torch.complex64
    return dtype if t.is_floating_point() else t.dtype


def map_tensors(value: Any, fn: Callable[[Tensor], Any]) -> Any:
    """`value` with `fn` applied to every tensor inside tuples, lists and dicts."""
    return map_leaves(value, lambda leaf: fn(leaf) if isinstance(leaf, Tensor) else leaf)


def map_leaves(value: Any, fn: Callable[[Any], Any]) -> Any:
    """`value` with `fn` applied to everything inside tuples, lists and dicts.

    Example:
        >>> map_leaves({"a": [1, (2, 3)]}, str)
        {'a': ['1', ('2', '3')]}
    """
    if isinstance(value, Mapping):
        return {k: map_leaves(v, fn) for k, v in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(v, fn) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(map_leaves(v, fn) for v in value)
    return fn(value)


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor inside tuples, lists and dicts, in order."""
    found: list[Tensor] = []
    _collect(value, found)
    return found


def all_finite(t: Tensor) -> bool:
    """Whether no entry is NaN or infinite: their sum, which is read once, says so unless it overflows.

    Example:
        >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([0.0, torch.nan]))
        (True, False)
    """
    if not (t.is_floating_point() or t.is_complex()):
        return True
    return bool(torch.isfinite(t.sum())) or bool(torch.isfinite(t).all())


# Most of what is looked at are a call's arguments: tensors and numbers, told apart without asking for ancestors.
_LEAVES = frozenset((bool, int, float, str, type(None), torch.dtype, torch.device))


def _collect(value: Any, found: list[Tensor]) -> None:
    kind = type(value)
    if kind is Tensor or isinstance(value, Tensor):
        found.append(value)
    elif kind is tuple or kind is list or isinstance(value, tuple | list):
        for part in value:
            if type(part) is Tensor:
                found.append(part)
            elif type(part) not in _LEAVES:
                _collect(part, found)
    elif kind in _LEAVES:
        return
    elif isinstance(value, Mapping):
        for part in value.values():
            _collect(part, found)
