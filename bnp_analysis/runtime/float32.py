"""Products of float32 numbers in float32: what lets kernels round them to TF32 or bfloat16 is off meanwhile."""

from __future__ import annotations

import threading
from contextlib import ContextDecorator
from functools import cache

import torch

_OPERATIONS = ("matmul", "conv", "rnn")
_FULL = ("ieee", "none")


class FullFloat32(ContextDecorator):
    """`set_float32_matmul_precision`, `allow_tf32` and `fp32_precision` are without effect inside, and as before after.

    They change no function, only how its products are rounded, and float32 would be a name for ten or seven bits.
    They belong to the process, so the first thread that enters switches them off and the last that leaves restores.

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

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: dict[tuple[str, str], str] = {}

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                for place in _places():
                    found = torch._C._get_fp32_precision_getter(*place)
                    if found not in _FULL:
                        self._before[place] = found
                        torch._C._set_fp32_precision_setter(*place, "ieee")
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._before:
                for place, found in self._before.items():
                    # What was inherited from the backend's own or torch's setting is inherited again.
                    torch._C._set_fp32_precision_setter(*place, "none")
                    if torch._C._get_fp32_precision_getter(*place) != found:
                        torch._C._set_fp32_precision_setter(*place, found)
                self._before.clear()


full_float32 = FullFloat32()


@cache
def _places() -> list[tuple[str, str]]:
    backends = ("mkldnn", "cuda") if torch.cuda.is_available() else ("mkldnn",)
    return [(backend, operation) for backend in backends for operation in _OPERATIONS]
