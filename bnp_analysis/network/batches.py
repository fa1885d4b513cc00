"""The data of a risk: uniform batches, read the same way in every pass; inputs and outputs of the model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.distributed import ALONE, Group
from bnp_analysis.errors import InconsistentDataError, InvalidInputError, NonFiniteError
from bnp_analysis.network.kernels import explained
from bnp_analysis.runtime.kinds import article
from bnp_analysis.runtime.memory import require_memory
from bnp_analysis.runtime.random import apart, random_state
from bnp_analysis.runtime.trees import all_finite, counterpart, map_tensors, tensors_of

Count = Callable[..., float]


@dataclass(frozen=True)
class Batch:
    """One batch: inputs (tensor, tuple or dict), targets, its weight in the mean, its place in the pass.

    `own`: whether its inputs are a copy already, which a model may spoil.
    """

    x: Any
    y: Any
    count: float
    index: int
    own: bool = False


class Batches:
    """Batches of a pair `(x, y)`, of a list of pairs, or of a loader that can be read again and again.

    A loader may change its order between passes, not its contents: every pass is compared with the first by
    an order-independent hash of its examples. A batch of weight 0 is left out: its own mean may be 0/0.

    Attributes:
        total: the weight of all batches of all processes.
        number: of batches that count, of this process; `everywhere` of all processes.
        before: examples of the processes with lower ranks; `examples` of all processes.
        ordered: whether every pass, on every process, sees the same examples in the same order.
    """

    def __init__(
        self, data: Any, count: Count | None, dtype: torch.dtype, device: torch.device, group: Group = ALONE
    ) -> None:
        self._count, self._dtype, self._device, self._group = count, dtype, device, group
        self._splits = count is not None and _takes_two(count)
        self._stored: list[Batch] | None = None
        self._whole: Batches | None = None
        self._fingerprint: tuple[int, int] | None = None
        if isinstance(data, torch.utils.data.Dataset):
            raise InvalidInputError(
                f"{type(data).__name__} yields single examples; wrap it: DataLoader(dataset, batch_size=...)"
            )
        # Several tensors are one batch that was not paired, or else each of them would be asked to be a batch.
        if isinstance(data, tuple) and len(data) > 2 and all(isinstance(part, Tensor) for part in data):
            raise InvalidInputError(f"data is (x, y), not {described(data)} tensors: {way_to_pair(data)}")
        if isinstance(data, tuple) and len(data) == 2:
            self._source: Any = [data]
        elif isinstance(data, Iterable) and not isinstance(data, Tensor | Mapping | str):
            self._source = data
        else:
            raise InvalidInputError(
                f"data is (x, y) or an iterable of such batches, not {described(data)}: {way_to_pair(data)}"
            )
        if isinstance(self._source, Iterator):
            raise InvalidInputError(
                "data is a one-shot iterator: the second pass over it would see nothing. Give a list, or a DataLoader"
            )
        if isinstance(self._source, list | tuple):
            # In memory: a copy, so that what happens to the caller's tensors later changes nothing here.
            self._stored = [self._prepare(pair, i, copy=True) for i, pair in enumerate(self._source)]
            self._source = None
        counts = []
        first, examples = (0, 0), 0
        with random_state(generators=_generators(self._source)):
            for batch in self._read():
                counts.append(batch.count)
                if batch.count > 0:
                    examples += tensors_of(batch.x)[0].shape[0]
                    _require_finite_batch(batch)
                    if self._stored is None:
                        first = add(first, hash_of(tensors_of((batch.x, batch.y))))
        if not counts and group.size == 1:
            raise InvalidInputError(
                "the data has no batch: an empty loader has no mean. With drop_last=True a loader shorter than one "
                "batch is empty"
            )
        # In memory, or a loader without shuffling: rows of a factor belong to the same examples in every pass.
        ordered = self._stored is not None or _repeats_order(self._source)
        self.number = sum(count > 0 for count in counts)
        parts = group.share(lambda: (float(sum(counts)), self.number, ordered, examples), "counting the data")
        totals, numbers, orders, sizes = zip(*parts, strict=True)
        self.total, self.everywhere, self.ordered = float(sum(totals)), int(sum(numbers)), all(orders)
        self.before, self.examples = int(sum(sizes[: group.rank])), int(sum(sizes))
        if not self.total > 0:
            raise InvalidInputError(f"the batches weigh {self.total} in total; count= must be positive")
        if self._stored is not None:
            self._stored = [batch for batch in self._stored if batch.count > 0]
        else:
            self._fingerprint = first
            # Under other random numbers: an order may depend on them, contents may not.
            for _ in self._pass(perturb=True):
                pass

    @property
    def in_memory(self) -> bool:
        """Whether the data are held here, not read anew in every pass."""
        return self._stored is not None

    def _read(self) -> Iterator[Batch]:
        if self._stored is not None:
            yield from self._stored
            return
        passing, i = iter(self._source), 0
        while True:
            with explained(f"batch {i} of the data"):
                try:
                    pair = next(passing)
                except StopIteration:
                    return
            yield self._prepare(pair, i, copy=False)
            i += 1

    def to(self, dtype: torch.dtype, device: torch.device) -> Batches:
        """The same data in another dtype, on another device."""
        other = copy.copy(self)
        other._dtype, other._device, other._whole = dtype, device, None
        if self._stored is not None:
            other._stored = [other._brought(b) for b in self._stored]
        else:
            # Other digits, another hash: the next pass sets it.
            other._fingerprint = None
        return other

    def alone(self, batch: Batch) -> Batches:
        """One batch, in this process alone."""
        other = copy.copy(self)
        other._stored, other._source, other._whole, other._group = [batch], None, None, ALONE
        other.number = other.everywhere = 1
        other.examples, other.before = tensors_of(batch.x)[0].shape[0], 0
        other.total, other.ordered = batch.count, True
        return other

    def gathered(self) -> Batches:
        """The batches of all processes, in the order of ranks, held by each of them.

        Raises:
            MemoryLimitError: they do not fit.
        """
        if self._whole is not None:
            return self._whole
        other = copy.copy(self)
        found = self._group.share(self._portable, "gathering the data")
        batches = [replace(b, index=i) for i, b in enumerate(b for part in found for b in part)]
        other._group, other._source, other.number, other.before = ALONE, None, len(batches), 0
        other._stored = [other._brought(b) for b in batches]
        self._whole = other
        return other

    def _brought(self, b: Batch) -> Batch:
        return replace(b, x=map_tensors(b.x, self._moved), y=map_tensors(b.y, self._moved))

    def _portable(self) -> list[Batch]:
        own = [replace(b, x=map_tensors(b.x, Tensor.cpu), y=map_tensors(b.y, Tensor.cpu)) for b in self]
        size = sum(t.numel() * t.element_size() for b in own for t in tensors_of((b.x, b.y)))
        share = sum(b.count for b in own) / self.total
        require_memory(int(3 * size / share) if share else 0, "the data of all processes in one")
        return own

    def _moved(self, t: Tensor) -> Tensor:
        return self._cast(t, False)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._stored) if self._stored is not None else self._pass(perturb=False)

    def _pass(self, *, perturb: bool) -> Iterator[Batch]:
        seen = (0, 0)
        for batch in apart(self._read(), seed=MIX if perturb else None, generators=_generators(self._source)):
            if batch.count > 0:
                seen = add(seen, hash_of(tensors_of((batch.x, batch.y))))
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
            raise InvalidInputError(
                f"batch {index} is {described(pair)}, not a pair (x, y), which are the model's inputs and what the "
                f"loss is given: loss(model(x), y); {way_to_pair(pair)}. Several inputs make x a tuple "
                "or a dict, several targets or weights make y one"
            )
        if any(t.is_meta for t in tensors_of(tuple(pair))):
            raise InvalidInputError(f"batch {index} is on the meta device: it has a shape and no values")
        x, y = (map_tensors(part, lambda t: self._cast(t, copy)) for part in pair)
        if any(t.layout != torch.strided for t in tensors_of((x, y))):
            raise InvalidInputError(
                f"batch {index} has a sparse or nested tensor, which cannot be cut into examples; make it dense by "
                "t.to_dense(), or padded. A sparse matrix that belongs to no example can be a buffer of the model"
            )
        leaves = tensors_of(x)
        if not leaves or leaves[0].ndim == 0:
            raise InvalidInputError(
                f"batch {index} has no input tensor with a batch dimension but {type(pair[0]).__name__}; arrays become "
                "tensors by torch.as_tensor"
            )
        count = leaves[0].shape[0] if self._count is None else self._counted(pair[0], pair[1], index)
        if not np.isfinite(count) or count < 0:
            raise InvalidInputError(f"count= gave {count} for batch {index}; weights are finite and not negative")
        if leaves[0].shape[0] == 0:
            raise InvalidInputError(f"batch {index} has no example: the mean over it is 0/0")
        return Batch(x, y, count, index)

    def weigh(self, part: Batch) -> float:
        """The weight that a part of a batch would have as a batch of its own."""
        return part.count if self._count is None else self._counted(part.x, part.y, part.index)

    def _counted(self, x: Any, y: Any, index: int) -> float:
        with explained(f"count= for batch {index}"):
            assert self._count is not None
            return float(self._count(x, y) if self._splits else self._count((x, y)))

    def _cast(self, t: Tensor, copy: bool) -> Tensor:
        return t.detach().to(device=self._device, dtype=counterpart(t, self._dtype), copy=copy)


def described(data: Any) -> str:
    """What stands in place of a pair, in words: its type, and how many parts or which keys it has."""
    if isinstance(data, Mapping):
        return f"a dict with the keys {', '.join(map(repr, list(data)[:6]))}"
    if isinstance(data, tuple | list):
        return f"a {type(data).__name__} of {len(data)}"
    name = type(data).__name__
    return f"{article(name)} {name}"


def way_to_pair(batch: Any) -> str:
    """The code that makes a pair `(x, y)` from what was given as a batch.

    Example:
        >>> way_to_pair((torch.ones(2, 3), torch.ones(2, 1), torch.ones(2)))
        'write ((a, b), y) for each batch a, b, y'
        >>> way_to_pair({"ids": torch.ones(2, 3), "labels": torch.ones(2)})
        "write ({k: v for k, v in batch.items() if k != 'labels'}, batch['labels']) for each batch"
    """
    if isinstance(batch, Mapping):
        target = next((key for key in batch if str(key).lower() in ("labels", "label", "target", "targets")), "y")
        return f"write ({{k: v for k, v in batch.items() if k != {target!r}}}, batch[{target!r}]) for each batch"
    if isinstance(batch, tuple | list) and len(batch) > 2:
        names = ", ".join("abcdefgh"[: len(batch) - 1])
        return f"write (({names}), y) for each batch {names}, y"
    return "write (x, y), or [(x, y), ...] for several batches"


def arguments(x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called with an input: `model(*x)`, `model(**x)` or `model(x)`."""
    if isinstance(x, Mapping):
        return (), dict(x)
    return (tuple(x), {}) if isinstance(x, tuple | list) else ((x,), {})


def with_examples(batch: Batch, index: Tensor) -> Batch:
    """The batch with example `index[j]` in place of example `j`; what is not one entry per example stays."""
    size = tensors_of(batch.x)[0].shape[0]

    def take(t: Tensor) -> Tensor:
        return t[index.to(t.device)] if t.ndim and t.shape[0] == size else t.clone()

    return replace(batch, x=map_tensors(batch.x, take), y=map_tensors(batch.y, take), own=True)


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


def _takes_two(count: Callable[..., float]) -> bool:
    """Whether a weight is asked as `count(x, y)`, which it is unless it takes a single argument, the pair.

    Raises:
        InvalidInputError: no function of one or of two arguments.
    """
    none, one, two = (_fits(count, number) for number in range(3))
    if not callable(count) or not (one or two):
        raise InvalidInputError(
            f"count= is a function of a batch, count=lambda x, y: ..., or of the pair, not {count!r}: it says what a "
            "batch weighs in the mean"
        )
    return two and (none or not one)


def _fits(function: Callable[..., Any], number: int) -> bool:
    """Whether a function can be called with so many arguments, as far as it says."""
    try:
        inspect.signature(function).bind(*[None] * number)
    except TypeError:
        return False
    except ValueError:  # what is not written in Python may have no signature
        return True
    return True


def _parts(t: Tensor) -> list[Tensor]:
    return [part for piece in pieces([t]) for part in piece] if t.ndim else [t]


def _require_finite_batch(batch: Batch) -> None:
    for part, value in (("inputs", batch.x), ("targets", batch.y)):
        for t in tensors_of(value):
            if not all(map(all_finite, _parts(t))):
                raise NonFiniteError(
                    f"batch {batch.index} has NaN or infinite {part}: {int((~torch.isfinite(t)).sum())} of "
                    f"{t.numel()} entries. The loss, and every product, would be NaN"
                )


def _generators(source: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers draw from."""
    batches = getattr(source, "batch_sampler", None)
    parts = (source, getattr(source, "sampler", None), batches, getattr(batches, "sampler", None))
    found = {id(g): g for part in parts if isinstance(g := getattr(part, "generator", None), torch.Generator)}
    return list(found.values())


def _repeats_order(source: Any) -> bool:
    """Whether a loader is known to give the same batches in the same order in every pass."""
    sampler = getattr(source, "sampler", None)
    batches = getattr(source, "batch_sampler", None)
    if batches is not None:
        # With a batch sampler of one's own, `sampler` is a SequentialSampler that nobody asks.
        if type(batches) is not torch.utils.data.BatchSampler:
            return False
        sampler = batches.sampler
    return type(sampler) is torch.utils.data.SequentialSampler and bool(getattr(source, "in_order", True))


MIX = 0x5851F42D4C957F2D
# Numbers that are looked at together.
_TOGETHER = 2**20


def pieces(leaves: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors of a batch cut into a few examples each; what is not one entry per example is repeated.

    Example:
        >>> [[t.shape[0] for t in piece] for piece in pieces([torch.ones(3, 2**19), torch.ones(3), torch.ones(1)])]
        [[2, 2, 1], [1, 1, 1]]
    """
    leaves, each = _real(leaves)
    size = len(leaves[0])
    step = max(1, _TOGETHER // max(1, *(t[0].numel() for t, cut in zip(leaves, each, strict=True) if cut)))
    for begin in range(0, size, step):
        yield [t[begin : begin + step] if cut else t for t, cut in zip(leaves, each, strict=True)]


def hash_of(leaves: list[Tensor]) -> tuple[int, int]:
    """A number per example that depends on all tensors of its batch, summed modulo 2^64 over the examples; how many."""
    leaves, each = _real(leaves)
    weights = []
    for position, (t, cut) in enumerate(zip(leaves, each, strict=True)):
        key = torch.Generator().manual_seed(position)
        count = t[0].numel() if cut else t.numel()
        weights.append(torch.randint(-(2**62), 2**62, (count,), generator=key).to(t.device))
    total = torch.zeros((), dtype=torch.int64, device=leaves[0].device)
    for piece in pieces(leaves):
        rows = len(piece[0])
        mixed = torch.zeros(rows, dtype=torch.int64, device=total.device)
        for t, cut, w in zip(piece, each, weights, strict=True):
            flat = (t if cut else t.expand(rows, *t.shape)).reshape(rows, -1)
            if flat.is_floating_point():
                flat = flat.double().contiguous().view(torch.int64)
            mixed = mixed + (flat.to(torch.int64) * w).sum(dim=1)
            mixed = (mixed ^ (mixed >> 29)) * MIX
            mixed = mixed ^ (mixed >> 32)
        total += mixed.sum()
    return int(total) % 2**64, len(leaves[0])


def _real(leaves: list[Tensor]) -> tuple[list[Tensor], list[bool]]:
    """Tensors of real numbers, and which of them have one entry per example."""
    leaves = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in leaves]
    return leaves, [t.ndim > 0 and len(t) == len(leaves[0]) for t in leaves]


def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return (a[0] + b[0]) % 2**64, a[1] + b[1]


class Inputs:
    """Gives a model its inputs: copies to one that writes into them, else the data themselves.

    A recorded graph holds its inputs, so copies would be kept once per graph. Which it is shows while the risk is
    constructed, where every batch is given as a copy and compared afterwards.
    """

    def __init__(self) -> None:
        self._copies, self._settled = True, False
        self.written = False

    def settle(self) -> None:
        """Every batch has been seen."""
        self._copies, self._settled = self.written, True

    @contextmanager
    def given(self, x: Any, own: bool = False) -> Iterator[Any]:
        """`x` for one forward pass; as it is where it is a copy of its own.

        Raises:
            InconsistentDataError: a model that left its inputs alone so far has written into them.
        """
        if own:
            yield x
            return
        leaves = tensors_of(x)
        if self._copies or any(t.is_inference() for t in leaves):
            with torch._C.DisableTorchFunction():
                copies = map_tensors(x, torch.clone)
            yield copies
            if not self._settled:
                with torch._C.DisableTorchFunction():
                    pairs = zip(leaves, tensors_of(copies), strict=True)
                    self.written = self.written or not all(torch.equal(a, b) for a, b in pairs)
            return
        with torch._C.DisableTorchFunction():
            # The same numbers: a model that asks for the gradient of its input asks it of a tensor of its own.
            aliases = map_tensors(x, Tensor.detach)
        with self.kept(x):
            yield aliases

    @contextmanager
    def kept(self, x: Any) -> Iterator[None]:
        """For a forward pass that gets the data themselves, or aliases of them.

        Raises:
            InconsistentDataError: it has written into them.
        """
        leaves = [t for t in tensors_of(x) if not t.is_inference()]
        versions = [t._version for t in leaves]
        yield
        if versions != [t._version for t in leaves]:
            raise InconsistentDataError(
                "the model wrote into its inputs, which it had not done when the risk was made: the data are no longer "
                "what they were. Let forward() begin with x = x.clone(), and make the risk again"
            )


def one_tensor(raw: Any, pick: Callable[[Any], Tensor] | None) -> Tensor:
    """The outputs of a model as the tensor that has derivatives.

    Raises:
        InvalidInputError: something else.
    """
    out = raw if pick is None else pick(raw)
    if not isinstance(out, Tensor):
        several = "[*o.values()]" if isinstance(out, Mapping) else "[*o]" if isinstance(out, tuple | list) else ""
        join = several and f", or join several, which the loss splits again: output=lambda o: torch.cat({several}, 1)"
        raise InvalidInputError(
            f"the model returns {type(out).__name__}, not a tensor; pick one with output=, for instance "
            f"output=lambda o: o.logits{join}"
        )
    if not out.is_floating_point():
        raise InvalidInputError(f"the model returns {out.dtype} outputs, which have no derivative")
    return out
