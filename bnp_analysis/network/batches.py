"""The data of a risk: batches in one form, read the same way in every pass."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InconsistentDataError, InvalidInputError, NonFiniteError

Count = Callable[[Any], float]


@dataclass(frozen=True)
class Batch:
    """One batch: inputs (tensor, tuple or dict), targets, its weight in the mean, its place in the pass."""

    x: Any
    y: Any
    count: float
    index: int


class Batches:
    """Batches of a pair `(x, y)`, of a list of pairs, or of a loader that can be read again and again.

    A loader may change its order between passes, not its contents: every pass is compared with the first by
    an order-independent hash of its examples.
    """

    def __init__(self, data: Any, count: Count | None, dtype: torch.dtype, device: torch.device) -> None:
        self._count, self._dtype, self._device = count, dtype, device
        self._stored: list[Batch] | None = None
        self._fingerprint: tuple[int, int] | None = None
        if isinstance(data, torch.utils.data.Dataset):
            raise InvalidInputError(
                f"{type(data).__name__} yields single examples; wrap it: DataLoader(dataset, batch_size=...)"
            )
        if isinstance(data, tuple) and len(data) == 2:
            self._source: Any = [data]
        elif isinstance(data, Iterable) and not isinstance(data, Tensor | dict | str):
            self._source = data
        else:
            raise InvalidInputError(f"data is (x, y) or an iterable of such batches, not {type(data).__name__}")
        if isinstance(self._source, Iterator):
            raise InvalidInputError(
                "data is a one-shot iterator: the second pass over it would see nothing. Give a list, or a DataLoader"
            )
        if isinstance(self._source, list | tuple):
            # In memory: a copy, so that what happens to the caller's tensors later changes nothing here.
            self._stored = [self._prepare(pair, i, copy=True) for i, pair in enumerate(self._source)]
            self._source = None
        counts = []
        first = (0, 0)
        with _preserved_random_state(self._source):
            for batch in self._read():
                _require_finite_batch(batch)
                counts.append(batch.count)
                first = _add(first, _hash(batch))
        if not counts:
            raise InvalidInputError(
                "the data has no batch: an empty loader has no mean. With drop_last=True a loader shorter than one "
                "batch is empty"
            )
        # In memory, or a loader without shuffling: rows of a factor belong to the same examples in every pass.
        sampler = getattr(self._source, "sampler", None)
        self.ordered = self._stored is not None or isinstance(sampler, torch.utils.data.SequentialSampler)
        self.total = float(sum(counts))
        self.number = len(counts)
        if not self.total > 0:
            raise InvalidInputError(f"the batches weigh {self.total} in total; count= must be positive")
        if self._stored is None:
            self._fingerprint = first
            # Under other random numbers: an order may depend on them, contents may not.
            for _ in self._pass(perturb=True):
                pass

    def _read(self) -> Iterator[Batch]:
        if self._stored is not None:
            yield from self._stored
            return
        for i, pair in enumerate(self._source):
            yield self._prepare(pair, i, copy=False)

    def to(self, dtype: torch.dtype, device: torch.device) -> Batches:
        """The same data in another dtype, on another device."""
        other = copy.copy(self)
        other._dtype, other._device = dtype, device
        if self._stored is not None:
            other._stored = [
                replace(b, x=map_tensors(b.x, other._moved), y=map_tensors(b.y, other._moved)) for b in self._stored
            ]
        else:
            # Other digits, another hash: the next pass sets it.
            other._fingerprint = None
        return other

    def _moved(self, t: Tensor) -> Tensor:
        return self._cast(t, False)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._stored) if self._stored is not None else self._pass(perturb=False)

    def _pass(self, *, perturb: bool) -> Iterator[Batch]:
        seen = (0, 0)
        with _preserved_random_state(self._source, perturb=perturb):
            for batch in self._read():
                seen = _add(seen, _hash(batch))
                yield batch
        if self._fingerprint is None:
            self._fingerprint = seen
        if seen != self._fingerprint:
            raise InconsistentDataError(
                "two passes over the loader saw different examples, so products with the curvature matrix would "
                "belong to different matrices. Turn off random augmentation and drop_last, or give list(loader)"
            )

    def _prepare(self, pair: Any, index: int, *, copy: bool) -> Batch:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidInputError(f"batch {index} is {type(pair).__name__}, not a pair (x, y)")
        x, y = (map_tensors(part, lambda t: self._cast(t, copy)) for part in pair)
        leaves = tensors_of(x)
        if not leaves or leaves[0].ndim == 0:
            raise InvalidInputError(f"batch {index} has no input tensor with a batch dimension")
        count = float(leaves[0].shape[0] if self._count is None else self._count(pair))
        if not np.isfinite(count) or count < 0:
            raise InvalidInputError(f"count= gave {count} for batch {index}; weights are finite and not negative")
        if leaves[0].shape[0] == 0:
            raise InvalidInputError(f"batch {index} has no example: the mean over it is 0/0")
        return Batch(x, y, count, index)

    def weigh(self, part: Batch) -> float:
        """The weight that a part of a batch would have as a batch of its own."""
        return part.count if self._count is None else float(self._count((part.x, part.y)))

    def _cast(self, t: Tensor, copy: bool) -> Tensor:
        dtype = self._dtype if t.is_floating_point() else t.dtype
        return t.detach().to(device=self._device, dtype=dtype, copy=copy)


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `fn` applied to every tensor inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, dict):
        return {k: map_tensors(v, fn) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(v, fn) for v in value)
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """Every tensor inside tuples, lists and dicts, in order."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    map_tensors(value, note)
    return found


def slice_batch(batch: Batch, begin: int, end: int) -> Batch | None:
    """Examples `begin:end` of a batch, or None if its tensors do not share their first dimension."""
    leaves = tensors_of(batch.x) + tensors_of(batch.y)
    size = leaves[0].shape[0]
    if any(t.ndim == 0 or t.shape[0] != size for t in leaves):
        return None

    def part(t: Tensor) -> Tensor:
        return t[begin:end]

    share = (min(end, size) - begin) / size
    return Batch(map_tensors(batch.x, part), map_tensors(batch.y, part), batch.count * share, batch.index)


def _require_finite_batch(batch: Batch) -> None:
    for part, value in (("inputs", batch.x), ("targets", batch.y)):
        for t in tensors_of(value):
            if t.is_floating_point() and not bool(torch.isfinite(t).all()):
                raise NonFiniteError(
                    f"batch {batch.index} has NaN or infinite {part}: {int((~torch.isfinite(t)).sum())} of "
                    f"{t.numel()} entries. The loss, and every product, would be NaN"
                )


_MIX = 0x5851F42D4C957F2D


def _hash(batch: Batch) -> tuple[int, int]:
    """A number per example that depends on all its tensors, summed modulo 2^64 over the examples."""
    leaves = tensors_of(batch.x) + tensors_of(batch.y)
    size = leaves[0].shape[0]
    total = torch.zeros(size, dtype=torch.int64, device=leaves[0].device)
    for position, t in enumerate(leaves):
        rows = t if t.ndim and t.shape[0] == size else t.expand(size, *t.shape)
        flat = rows.reshape(size, -1)
        if flat.is_floating_point():
            flat = flat.double().contiguous().view(torch.int64)
        else:
            flat = flat.to(torch.int64)
        key = torch.Generator().manual_seed(position)
        weights = torch.randint(-(2**62), 2**62, (flat.shape[1],), generator=key).to(flat.device)
        total = total + (flat * weights).sum(dim=1)
        total = (total ^ (total >> 29)) * _MIX
        total = total ^ (total >> 32)
    return int(total.sum()) % 2**64, size


def _add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return (a[0] + b[0]) % 2**64, a[1] + b[1]


@contextmanager
def _preserved_random_state(source: Any, *, perturb: bool = False) -> Iterator[None]:
    """Reading a shuffling loader draws random numbers; the global states, and the loader's, come back."""
    own = getattr(source, "generator", None)
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state())  # noqa: NPY002
    kept = own.get_state() if isinstance(own, torch.Generator) else None
    try:
        if perturb:
            torch.manual_seed(_MIX)
            random.seed(_MIX)
            np.random.seed(_MIX % 2**32)  # noqa: NPY002
            if kept is not None and own is not None:
                own.manual_seed(_MIX)
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])  # noqa: NPY002
        if kept is not None and own is not None:
            own.set_state(kept)
