"""Does the output of an example depend on other examples of its batch?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bnp_analysis.distributed.nested import map_tensors, tensors_of
from bnp_analysis.network.batches import Batch, with_examples
from bnp_analysis.network.kernels import recording

if TYPE_CHECKING:
    from bnp_analysis.network.risk import EmpiricalRisk


def couples(risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch, whole: Tensor) -> bool:
    """Whether some example's output depends on another example.

    First the outputs of one or two examples beside copies of themselves, which shows batch statistics and decisions
    without derivative. Then any two examples, by derivatives: for independent ones, whose Jacobian `J` has blocks `J_j`
    on its diagonal alone, weights `a_j` of the outputs' cotangents `r` come back as they are,
    `J^T (a r) = a J^T r`, and with random weights for no others. Inputs without derivative (tokens) are looked at
    where they first become numbers with one. Where this does not show independence (outputs in another order, nothing
    to differentiate by), examples are replaced by others, all pairs told apart by the binary digits of their index.
    """
    size = tensors_of(batch.x)[0].shape[0]
    rows = [whole, *(t for t in tensors_of(batch.y) if t.ndim)]
    if size < 2 or whole.ndim == 0 or any(t.shape[0] % size for t in rows) or not bool(torch.isfinite(whole).all()):
        return False
    index = torch.arange(size)
    if _changes(risk, tensors, batch, whole, index % (2 if size > 2 else 1), 2 if size > 2 else 1):
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
    given = with_examples(batch, torch.arange(size))
    per_example = [t for t in tensors_of(given.x) if t.ndim and t.shape[0] == size]
    own = [t.requires_grad_() for t in per_example if t.is_floating_point()]
    entrances = _Entrances([t for t in per_example if not t.is_floating_point()], size)
    # A view of each, since a model may write into its inputs.
    x = map_tensors(given.x, lambda t: t.view_as(t) if t.requires_grad else t)
    with entrances:
        constant = {name: t.detach() for name, t in tensors.items()}
        outputs = risk.batch_outputs(constant, Batch(x, given.y, given.count, given.index, own=True))
    sources = [*own, *entrances.found]
    if not sources or not outputs.requires_grad or outputs.shape != whole.shape:
        return False
    g = torch.Generator().manual_seed(0)
    r = torch.randn(outputs.shape, generator=g, dtype=torch.float64).to(outputs)
    a = (torch.rand(size, generator=g, dtype=torch.float64) + 0.5).to(outputs)
    plain = torch.autograd.grad(outputs, sources, r, retain_graph=True, allow_unused=True, materialize_grads=True)
    if not any(bool(t.any()) for t in plain):
        return False
    each = outputs.shape[0] // size
    # Rows of outputs example by example, or position by position.
    for weights in {1: [a]}.get(each, [a.repeat_interleave(each), a.repeat(each)]):
        u = r * weights.view(-1, *[1] * (r.ndim - 1))
        pulled = torch.autograd.grad(outputs, sources, u, retain_graph=True, allow_unused=True, materialize_grads=True)
        if all(_scaled(p, q, a) for p, q in zip(pulled, plain, strict=True)):
            return True
    return False


def _scaled(pulled: Tensor, plain: Tensor, a: Tensor) -> bool:
    """Whether `pulled` is `a plain`, example by example, up to rounding."""
    expected = a.view(-1, *[1] * (plain.ndim - 1)).to(plain) * plain
    size = float(plain.abs().max())
    return bool(((pulled - expected).abs() <= torch.finfo(plain.dtype).eps ** 0.5 * size).all())
