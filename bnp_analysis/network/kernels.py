"""The state of torch around a forward pass: recorded, uncompiled, with kernels that have second derivatives."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from bnp_analysis.errors import InvalidInputError

Found = TypeVar("Found")
_Switch = tuple[Callable[[], bool], Callable[[bool], None]]

# Kernels, the global random state and the hooks of a shared model belong to the process: threads take turns with them.
# Never held while other processes are waited for.
LOCK = threading.RLock()

_KERNELS = ("math", "flash", "mem_efficient", "cudnn", "overrideable")
_ATTENTION: list[_Switch] = [
    (getattr(torch._C, f"_get_{name}_sdp_enabled"), getattr(torch._C, f"_set_sdp_use_{name}"))
    for name in _KERNELS
    if hasattr(torch._C, f"_get_{name}_sdp_enabled")  # older versions know fewer
]
_RECURRENT: list[_Switch] = [
    (torch._C._get_cudnn_enabled, torch._C._set_cudnn_enabled),
    (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
]


@contextmanager
def recording() -> Iterator[None]:
    """Derivatives are recorded even where the caller has turned that off, with `no_grad` or `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def with_differentiable_kernels(run: Callable[[], Found], *, recurrent: bool) -> Found:
    """`run()` by kernels that have a second derivative: math attention, native recurrent layers (trap 12), uncompiled.

    Which kernels torch takes belongs to the process: other threads wait, and an interrupt cannot leave it changed.
    """
    switches = [*_ATTENTION, *(_RECURRENT if recurrent else [])]
    # Functions compiled inside forward() run eagerly (trap 13). Who compiled one has loaded the compiler.
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame") if hasattr(torch.compiler, "set_stance") else None
    with LOCK:
        before = [is_on() for is_on, _ in switches]
        stance = None if dynamo is None else dynamo._stance

        def restore() -> None:
            for (_, switch), on in zip(switches, before, strict=True):
                switch(on)
            if dynamo is not None:
                dynamo._set_stance(stance)

        try:
            for i, (_, switch) in enumerate(switches):
                switch(i == 0)
            if dynamo is not None:
                torch.compiler.set_stance("force_eager")
            return run()
        finally:
            try:
                restore()
            except KeyboardInterrupt:
                restore()
                raise


@contextmanager
def explained() -> Iterator[None]:
    """What torch says of operations that cannot be differentiated (again), with the ways out.

    Raises:
        InvalidInputError: an operation without a second derivative, named; activation checkpointing.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if "torch.utils.checkpoint" in text:
            raise InvalidInputError(
                "the model recomputes activations (torch.utils.checkpoint) from its own parameters, not from the point "
                "that is differentiated; turn activation checkpointing off for a measurement"
            ) from error
        if "not implemented" in text or "does not require grad" in text or "once_differentiable" in text:
            raise not_twice(text.splitlines()[0]) from error
        raise


def not_twice(what: str) -> InvalidInputError:
    """The error for an operation without a second derivative."""
    return InvalidInputError(
        f"an operation of the model has no second derivative in torch: {what} Replace it (math attention, unfused "
        "recurrent cells), or freeze the parameters below it"
    )
