"""The state of torch around a forward pass: recorded, uncompiled, with kernels that have second derivatives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from bnp_analysis.errors import InvalidInputError


@contextmanager
def recording() -> Iterator[None]:
    """Derivatives are recorded even where the caller has turned that off, with `no_grad` or `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


class _Primitives(TorchFunctionMode):
    """Weight normalization by its formula: the second derivative of torch's fused kernel is wrong (CPU, torch 2.13)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_weight_norm if func is torch._weight_norm else func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


@contextmanager
def differentiable_kernels(*, recurrent: bool, weight_norms: bool = False) -> Iterator[None]:
    """Only kernels that have a right second derivative.

    Math attention, native recurrent layers (trap 12), weight normalization by its formula, no compilation.
    """
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if weight_norms:
            stack.enter_context(_Primitives())
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
