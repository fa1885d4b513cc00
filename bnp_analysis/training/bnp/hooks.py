"""The hooks through which BNP sees what a layer sees."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointFunction


class InputHook:
    """A forward pre-hook that hands on a layer's inputs in training, once for each use.

    A copy of the model, or a pickle, gets a hook that does nothing: measurements work on copies.

    Args:
        module: the layer.
        owner: what collects, by a weak reference: a forgotten one is not kept alive.
        index: of the layer, for its owner.
    """

    def __init__(self, module: nn.Module, owner: weakref.ref[Any], index: int) -> None:
        self._module, self._owner, self._index = module, owner, index

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            # A compiled model breaks its graph here: what follows counts, which a graph must not.
            from bnp_analysis.training.bnp.outside_of_graphs import see

            see(self, module, args, kwargs)
        else:
            self.see(module, args, kwargs)

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hand on the input if this is a forward pass that trains."""
        # Shallow copies share the table of hooks: replicas of DataParallel.
        if not module.training or module is not self._module or not torch.is_grad_enabled() or _recomputed():
            return
        owner = self._owner()
        if owner is not None:
            owner.receive(self._index, args[0] if args else kwargs["input"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return _make_inert, ()


def inert(module: nn.Module, args: Any, kwargs: Any) -> None:
    """What remains of a hook on a copied model."""


def _make_inert() -> Callable[..., None]:
    return inert


def _recomputed() -> bool:
    """Whether this forward repeats one that was seen: activation checkpointing, inside a backward pass.

    The reentrant form runs its first forward without gradients, where nothing is collected; there the repetition
    is the one to see.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    frame = sys._getframe()
    reentrant = CheckpointFunction.backward.__code__
    above: Any = frame
    while above is not None:
        if above.f_code is reentrant:
            return False
        above = above.f_back
    return True
