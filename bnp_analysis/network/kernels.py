"""The state of torch around a forward pass: recorded, uncompiled, with kernels that have second derivatives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.full_float32 import full_float32
from bnp_analysis.network.smooth import Accurate


@contextmanager
def recording() -> Iterator[None]:
    """Derivatives are recorded even where the caller has turned that off, with `no_grad` or `inference_mode`."""
    with full_float32, torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def differentiable_kernels(*, recurrent: bool) -> Iterator[None]:
    """Only kernels that have a second derivative: math attention, native recurrent layers (trap 12), no compilation.

    Smooth functions get derivatives that keep their digits where they saturate.
    """
    with ExitStack() as stack:
        stack.enter_context(Accurate())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            # Only the switch: naming the other flags would make torch warn about hardware that is not there.
            stack.enter_context(
                torch.backends.mkldnn.flags(enabled=False, deterministic=None, allow_tf32=None, fp32_precision=None)
            )
        # Functions compiled inside forward() run eagerly (trap 13). Who compiled one has loaded the compiler.
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


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
