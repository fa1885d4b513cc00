"""Full-precision float32 products: rounding to TF32 or bfloat16 is switched off meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch

from bnp_analysis.runtime.threads import Switch

_OPERATIONS = ("matmul", "conv", "rnn")
_FULL = ("ieee", "none")


def _switched_off() -> Callable[[], None]:
    """`set_float32_matmul_precision`, `allow_tf32` and `fp32_precision` without effect; returns what restores them.

    They change no function, only how its products are rounded, and float32 would be a name for ten or seven bits.

    Source: PyTorch, *Numerical accuracy*: TF32, `torch.set_float32_matmul_precision`.

    Example:
        >>> torch.set_float32_matmul_precision("medium")
        >>> with full_float32:
        ...     torch.backends.mkldnn.matmul.fp32_precision
        'ieee'
        >>> torch.get_float32_matmul_precision()
        'medium'
        >>> torch.set_float32_matmul_precision("highest")
    """
    before = {}
    for place in _places():
        found = torch._C._get_fp32_precision_getter(*place)
        if found not in _FULL:
            before[place] = found
            torch._C._set_fp32_precision_setter(*place, "ieee")

    def restore() -> None:
        for place, precision in before.items():
            # What was inherited from the backend's own or torch's setting is inherited again.
            torch._C._set_fp32_precision_setter(*place, "none")
            if torch._C._get_fp32_precision_getter(*place) != precision:
                torch._C._set_fp32_precision_setter(*place, precision)

    return restore


full_float32 = Switch(_switched_off)


@cache
def _places() -> list[tuple[str, str]]:
    backends = ("mkldnn", "cuda") if torch.cuda.is_available() else ("mkldnn",)
    return [(backend, operation) for backend in backends for operation in _OPERATIONS]
