"""Does the output of an example depend on other examples of its batch?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bnp_analysis.network.batches import Batch, with_examples
from bnp_analysis.network.kernels import recording
from bnp_analysis.runtime.trees import map_tensors, tensors_of

if TYPE_CHECKING:
    from bnp_analysis.network.risk import EmpiricalRisk


def couples(risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch, whole: Tensor) -> bool | None:
    """Whether some example's output depends on another example; None where examples cannot be exchanged.

    First the outputs of a random half beside copies of one of them, which shows batch statistics and decisions without
    derivative that many examples take part in. Then any two examples, by derivatives: for independent ones, whose
    Jacobian `J` has blocks on its diagonal alone, weights `a` of the examples come back as they are,
    `J^T (a r) = a J^T r` for cotangents `r`, and with random weights for no others. Inputs without derivative (tokens)
    are looked at where they first become numbers with one. Where this does not show independence (outputs in another
    order, nothing to differentiate by), examples are replaced by others, all pairs told apart by the binary digits of
    their index.
    """
    size = tensors_of(batch.x)[0].shape[0]
    rows = [whole, *(t for t in tensors_of(batch.y) if t.ndim)]
    if size < 2 or whole.ndim == 0 or any(t.shape[0] % size for t in rows) or not bool(torch.isfinite(whole).all()):
        return None
    index = torch.arange(size)
    half = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: (size + 1) // 2]
    alone = torch.full((size,), int(half[0])).scatter(0, half, half)
    if _changes(risk, tensors, batch, whole, alone, len(half)):
        return True
    with suppress(RuntimeError, ValueError, TypeError):  # an operation without derivative, or that refuses a gradient
        if _apart(risk, tensors, batch, whole, size):
            return False
    for bit in range((size - 1).bit_length()):
        for side in (0, 1):
            partner = index ^ (1 << bit)
            stays = (((index >> bit) & 1) == side) | (partner >= size)
            if _changes(risk, tensors, batch, whole, torch.where(stays, index, partner), int(stays.sum())):
                return True
    return False


def _changes(
    risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch, whole: Tensor, index: Tensor, kept: int
) -> bool:
    """Whether the outputs of the `kept` examples change when others are replaced.

    Rows of outputs may be in any order (examples may have several): as many must stay as belong to the kept ones.
    """
    with torch.no_grad():
        mixed = risk.batch_outputs(tensors, with_examples(batch, index))
    if mixed.shape != whole.shape:
        return True
    stays = (mixed - whole).abs() <= float(whole.abs().max()) * torch.finfo(whole.dtype).eps ** 0.5
    whole_rows = stays.reshape(whole.shape[0], -1).all(dim=1)
    return int(whole_rows.sum()) * len(index) < kept * whole.shape[0]


class _Entrances(TorchFunctionMode):
    """Finds where data first become floating-point numbers with one entry per example, and records from there on."""

    def __init__(self, data: list[Tensor], size: int) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self._size = size
        self._alive = data  # a freed tensor's identity would be given to another
        self._integers = {id(t) for t in data}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_of((list(args), kwargs))
        entering = any(id(t) in self._integers for t in given) and not any(t.requires_grad for t in given)
        out = func(*args, **kwargs)
        if entering and isinstance(out, Tensor) and out.ndim and out.shape[0] == self._size:
            if out.is_floating_point():
                self.found.append(out.requires_grad_())
            else:
                self._integers.add(id(out))
            self._alive.append(out)
        return out


@recording()
def _apart(risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch, whole: Tensor, size: int) -> bool:
    """Whether `J^T (a r) = a J^T r` for random `a` and `r`; False if there is nothing to differentiate by."""
    own: list[Tensor] = []
    integers: list[Tensor] = []

    def given(t: Tensor) -> Tensor:
        # Data are large: a copy only for a model that writes into them.
        t = t.clone() if risk.inputs.written else t.detach()
        if t.ndim and t.shape[0] == size:
            (own if t.is_floating_point() else integers).append(t)
        if not t.is_floating_point():
            return t
        t.requires_grad_()
        return t.view_as(t) if risk.inputs.written else t

    part = replace(batch, x=map_tensors(batch.x, given), own=True)
    entrances = _Entrances(integers, size)
    with entrances, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the model does with inputs that have a derivative
        outputs = risk.batch_outputs({name: t.detach() for name, t in tensors.items()}, part)
    sources = [*own, *entrances.found]
    if not sources or not outputs.requires_grad or outputs.shape != whole.shape:
        return False
    g = torch.Generator().manual_seed(0)
    r = torch.randn(outputs.shape, generator=g, dtype=torch.float64).to(outputs)
    a = (torch.rand(size, generator=g, dtype=torch.float64) + 0.5).to(outputs)
    directions = [torch.randn(t[0].numel(), generator=g, dtype=torch.float64).to(t) for t in sources]

    def pulled(u: Tensor) -> list[Tensor]:
        """`J^T u` along a direction, one number per example for each source."""
        found = torch.autograd.grad(outputs, sources, u, retain_graph=True, allow_unused=True)
        return [
            d.new_zeros(size) if t is None else t.reshape(size, -1) @ d for t, d in zip(found, directions, strict=True)
        ]

    plain = pulled(r)
    if not any(bool(t.any()) for t in plain):
        return False
    each, tolerance = outputs.shape[0] // size, torch.finfo(outputs.dtype).eps ** 0.5
    # Rows of outputs example by example, or position by position.
    for weights in {1: [a]}.get(each, [a.repeat_interleave(each), a.repeat(each)]):
        u = r * weights.view(-1, *[1] * (r.ndim - 1))
        pairs = zip(pulled(u), plain, strict=True)
        if all(float((p - a.to(q) * q).abs().max()) <= tolerance * float(q.abs().max()) for p, q in pairs):
            return True
    return False
