"""How far rounding may move what a model or a loss computes: every operation is repeated with a unit more or less."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnp_analysis.runtime.trees import map_tensors, tensors_of


class Perturbed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every number that an operation computes is moved by one unit roundoff, up or down at random (CESTAC).

    Source: Vignes 1993.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)
        # Whether finite numbers gave an infinite one: its reciprocal is a zero that means nothing.
        self.overflowed = False

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would load its compiler

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # Zeros without memory, which autograd makes, cannot be looked at.
        inputs = [t for t in tensors_of((list(args), kwargs or {})) if not (t._is_zerotensor() or t.is_meta)]
        given = {id(t) for t in inputs}
        if any(bool(t.isinf().any()) for t in tensors_of([out]) if _has_numbers(t)):
            numbers = [a for a in args if isinstance(a, float)]
            finite = all(map(math.isfinite, numbers)) and not any(bool(t.isinf().any()) for t in inputs)
            self.overflowed = self.overflowed or finite
        if any(r.alias_info is not None for r in func._schema.returns) or not given:
            return out
        product = func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.div)
        factors = [t for t in inputs if t.ndim] if product else []

        def moved(t: Tensor) -> Tensor:
            if id(t) in given or not _has_numbers(t):
                return t
            signs = torch.randint(0, 2, t.shape, generator=self._generator, dtype=torch.int8).to(t.device) * 2 - 1
            number = torch.finfo(t.dtype)
            # What underflows has an error as large as the least number, which a large factor may bring back.
            lost = t.abs() < number.tiny
            for factor in factors:
                lost = lost & (factor != 0)
            return t + signs * (t * number.eps + number.tiny * lost.to(t) * bool(factors))

        return map_tensors(out, moved)


def _has_numbers(t: Tensor) -> bool:
    return t.is_floating_point() and not t._is_zerotensor() and not t.is_meta
