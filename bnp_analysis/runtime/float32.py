"""Products of float32 numbers in float32: what lets kernels round them to TF32 or bfloat16 is off meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from functools import cache, partial
from typing import Any, NamedTuple

import torch


class FullFloat32(ContextDecorator):
    """`set_float32_matmul_precision`, `allow_tf32` and `fp32_precision` are without effect inside, and as before after.

    They change no function, only how its products are rounded, and float32 would be a name for ten or seven bits.
    They belong to the process, so the first thread that enters switches them off and the last that leaves restores.

    Source: PyTorch, *Numerical accuracy*: TF32, `torch.set_float32_matmul_precision`.

    Example:
        >>> torch.set_float32_matmul_precision("medium")
        >>> with full_float32:
        ...     reduced = [setting for setting in settings() if setting.read() not in setting.full]
        >>> reduced, torch.get_float32_matmul_precision()
        ([], 'medium')
        >>> torch.set_float32_matmul_precision("highest")
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: list[tuple[Setting, Any]] = []

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                for setting in settings():
                    found = setting.read()
                    if found not in setting.full:
                        self._before.append((setting, found))
                        setting.write(setting.full[0])
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                while self._before:
                    setting, found = self._before.pop()
                    # What was inherited from the backend's own or torch's setting is inherited again.
                    setting.write(setting.full[-1])
                    if setting.read() != found:
                        setting.write(found)


full_float32 = FullFloat32()


class Setting(NamedTuple):
    """A switch of the process that decides how products of float32 numbers are rounded.

    Attributes:
        read: its value.
        write: gives it a value.
        full: the values that leave float32 as it is; the last leaves that to a setting above, where there is one.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]
    full: tuple[Any, ...]


@cache
def settings() -> list[Setting]:
    """Every setting of this version of torch: one per backend and operation from 2.9 on, two before."""
    if not hasattr(torch._C, "_get_fp32_precision_getter"):
        allowed = partial(setattr, torch.backends.cudnn, "allow_tf32")
        return [
            Setting(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, ("highest",)),
            Setting(lambda: torch.backends.cudnn.allow_tf32, allowed, (False,)),
        ]
    get, put = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    backends = ("mkldnn", "cuda") if torch.cuda.is_available() else ("mkldnn",)
    return [
        Setting(partial(get, backend, operation), partial(put, backend, operation), ("ieee", "none"))
        for backend in backends
        for operation in ("matmul", "conv", "rnn")
    ]
