"""BNP inside loops that others own: a hook before `optimizer.step`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.layers import Layer


def attach_to(optimizer: Optimizer, layers: Iterable[Layer], step: Callable[[], None]) -> RemovableHandle:
    """Call `step` before each step of an optimizer, or after its closure where it is given one.

    Raises:
        InvalidInputError: not a torch optimizer, one that evaluates its closure several times, or one that holds no
            weight of the layers.
    """
    # Wrappers of other libraries keep the optimizer that steps.
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        raise InvalidInputError(f"attach needs a torch optimizer, got {type(optimizer).__name__}; call step() yourself")
    if isinstance(inner, LBFGS):
        raise InvalidInputError("LBFGS searches along its own direction with several evaluations; BNP would break it")
    held = {id(p) for group in inner.param_groups for p in group["params"]}
    if not any(id(layer.module.weight) in held for layer in layers):
        raise InvalidInputError(
            "the optimizer holds no weight of a covered layer: it was made for another model, or from a copy"
        )

    def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            step()
            return None

        def closed() -> Any:
            with torch.enable_grad():
                loss = closure()
            step()
            return loss

        # The optimizer itself is the first positional argument.
        return args[:1], kwargs | {"closure": closed}

    return inner.register_step_pre_hook(before)
