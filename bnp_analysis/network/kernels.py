"""The state of torch around a forward pass: recorded, uncompiled, with kernels that have second derivatives."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def recording() -> Iterator[None]:
    """Derivatives are recorded even where the caller has turned that off, with `no_grad` or `inference_mode`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def differentiable_kernels(*, recurrent: bool) -> Iterator[None]:
    """Only kernels that have a second derivative: math attention, native recurrent layers (trap 12), no compilation."""
    with ExitStack() as stack:
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
