"""Moments of layer inputs in one forward pass (T4), and their running averages, in one flat tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from bnp_analysis.errors import NonFiniteError
from bnp_analysis.network.layer_kinds import Layer
from bnp_analysis.network.moments import update_moments, without_start
from bnp_analysis.training.bnp.settings import Settings

_ABLE = dist.is_available()
_PRECISE = (torch.float32, torch.float64)
_PART = 2**19  # numbers that are centred together


class BatchMoments(NamedTuple):
    """Mean and biased variance of what a layer saw.

    Attributes:
        samples: the values behind each mean.
        rows: `R`, rows of `H^`; the same for a dense layer, output positions for a convolution.
        examples: `N`; less than the rows of a convolution, or of a dense layer on sequences.
        mean, variance: `(width,)`, per feature, input channel or patch entry; no variance for that of one row, zero.
    """

    samples: int
    rows: int
    examples: int
    mean: Tensor
    variance: Tensor | None


def pool_moments(a: BatchMoments, b: BatchMoments) -> BatchMoments:
    """The moments of both together: micro-batches of one step, or several uses of a layer (T4)."""
    total = a.samples + b.samples
    one, two = (torch.zeros_like(m.mean) if m.variance is None else m.variance for m in (a, b))
    mean, variance = update_moments(a.mean, one, b.mean, two, a.samples / total)
    return BatchMoments(total, a.rows + b.rows, a.examples + b.examples, mean, variance)


def layer_width(layer: Layer, statistics: str) -> int:
    """How many means a layer has: per channel, or per entry of its patches, group by group."""
    return layer.groups * layer.features if statistics == "patch" else layer.channel_count


def batch_moments(layer: Layer, h: Tensor, kind: str) -> BatchMoments | None:
    """The moments of one input of a layer, in float32 or better.

    Args:
        layer: the layer.
        h: its input.
        kind: `"channel"`, or `"patch"` for one pair per entry of a convolution's patch (T6).

    Returns:
        The moments, or None for an input without rows.
    """
    h = h.detach()
    # First what most often comes: its Python is a part of a small network's step that one sees.
    if layer.rows_are_inputs and h.ndim == 2 and h.dtype in _PRECISE:
        return _table_moments(h)
    if not h.is_floating_point() and (counted := layer.counted(h)) is not None:
        return _frequencies(*counted, layer)._replace(examples=layer.example_count(h)) if h.numel() else None
    if h.dtype not in _PRECISE:
        h = h.float()
    if h.numel() == 0:
        return None
    if kind == "patch" or not layer.spatial:
        found = _table_moments(layer.rows(h).flatten(1))
        return None if found is None else found._replace(examples=layer.example_count(h))
    h = h if h.ndim == layer.spatial + 2 else h.unsqueeze(0)
    z = layer.image(h)
    found = _image_moments(z) if z.is_contiguous() and not z.is_cuda else _table_moments(layer.channels(h))
    return None if found is None else found._replace(rows=h.shape[0] * layer.positions(h), examples=h.shape[0])


def _frequencies(rows: int, counts: Tensor, layer: Layer) -> BatchMoments:
    """Of rows of zeros with a one: `p` and `p (1 - p)`."""
    dtype = layer.own_weight.dtype
    p = counts.to(dtype if dtype in _PRECISE else torch.float32) / rows
    return BatchMoments(rows, rows, rows, p, p * (1 - p) if rows > 1 else None)


def _table_moments(table: Tensor) -> BatchMoments | None:
    """Per column of `(R, d)`; the kernels differ by a factor of ten and more on CPU, see `benchmarks/bnp_step.py`."""
    count, width = table.shape
    if not count or not width:
        return None
    if count == 1:
        # A copy: whoever gave the input may reuse its memory before the step.
        return BatchMoments(1, 1, 1, table.clone().view(-1), None)
    if table.is_cuda:
        variance, mean = torch.var_mean(table, dim=0, correction=0)
    else:
        mean, variance = torch.batch_norm_update_stats(table, None, None, 0.0)
    return BatchMoments(count, count, count, mean, variance)


def _image_moments(h: Tensor) -> BatchMoments:
    """Per channel of `(N, c, ...)`, contiguous."""
    values = h.flatten(2)
    mean = values.mean((0, 2))
    column, squares = mean.unsqueeze(1), torch.zeros_like(mean)
    # In parts that stay in the cache: less time, and no second copy of the input in memory.
    for part in torch.split(values, max(1, _PART // max(values[0].numel(), 1))):
        squares += torch.linalg.vector_norm(part - column, dim=2).square_().sum(0)
    count = h.numel() // h.shape[1]
    return BatchMoments(count, count, count, mean, squares / count)


class Buffer:
    """Means and variances of all layers, `(2, sum of widths)`, with the views that each step needs.

    Attributes:
        values, flat: both rows, and one behind the other.
        mean, variance: the rows.
        means, variances: of each layer, views.
        largest: the largest variance of each layer.
        shaped: means in the shapes of the layers' weights, for who makes them.
    """

    def __init__(self, values: Tensor, widths: list[int]) -> None:
        self.values, self.flat = values, values.view(-1)
        self.mean, self.variance = values.unbind()
        self.means, self.variances = (list(torch.split(row, widths)) for row in (self.mean, self.variance))
        self.largest = torch.stack([v.amax() for v in self.variances])
        self.shaped: list[Tensor] = []


class RunningMoments:
    """Mean and variance of every layer's inputs, updated once per step (T4).

    Args:
        names, widths: of the layers, and how many means each has.
        settings: `rho`, `init`, `variance`, `reference_rows` and `check_every` of `BNP`.

    Attributes:
        now: the statistics; None before the first step.
        rows, examples: `R` and `N` of the last step of each layer, 0 for a layer never seen.
        start: weight of the start in each layer's statistics under constant `rho`.
        step: steps committed.
    """

    def __init__(self, names: Sequence[str], widths: Sequence[int], settings: Settings) -> None:
        self.names, self.widths, self._settings = tuple(names), list(widths), settings
        ends = list(accumulate(self.widths))
        self._slices = [slice(end - width, end) for end, width in zip(ends, self.widths, strict=True)]
        self.now: Buffer | None = None
        self.rows = [0] * len(self.names)
        self.examples = [0] * len(self.names)
        self.start = [1.0] * len(self.names)
        self.step = 0
        # The next step is computed beside the last one, and takes its place when it is known to be finite.
        self._next: Buffer | None = None
        self._batch: Buffer | None = None
        self._absent: list[BatchMoments] = []
        self._lengths, self._every = torch.tensor(self.widths), 1
        self._bad: tuple[Tensor, Tensor] | None = None

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of a layer, views."""
        assert self.now is not None
        return self.now.means[index], self.now.variances[index]

    def set(self, values: Tensor | None) -> None:
        """Put statistics in place of those there are."""
        self.now = None if values is None else Buffer(values, self.widths)
        self._next = None

    def commit(self, found: Mapping[int, BatchMoments]) -> None:
        """Take in what the layers saw in a step, over all processes where training is distributed.

        Raises:
            NonFiniteError: NaN or infinity, now or since the flag was last read; names the layer and the step.
        """
        batch, counts = self._gather(found)
        if distributed():
            values, counts = _all_reduced(batch.values, counts, self.widths)
            batch = Buffer(values, self.widths)
        samples, rows, examples = zip(*counts, strict=True)
        old, new = self._buffers(batch.values)
        if self._settings.variance == "paper" and 1 in samples:
            for i in (i for i, n in enumerate(samples) if n == 1):
                torch.sub(batch.means[i], old.means[i], out=batch.variances[i]).square_()
        past, start = self._weights(rows, batch.values)
        self._update(old, new, batch, past)
        new.largest = torch.segment_reduce(new.variance, "max", lengths=self._lengths, unsafe=True)
        every, step = self._every, self.step + 1
        # A mean that is not finite makes the variance of its layer so.
        if every == 1:
            if not math.isfinite(sum(new.largest.tolist())) and not bool(torch.isfinite(new.largest).all()):
                self._report(~torch.isfinite(new.largest), step)
        else:
            self._guard(old, new, step)
        self.now, self._next = new, old
        self.step = step
        self.rows = [n or before for n, before in zip(rows, self.rows, strict=True)]
        self.examples = [n or before for n, before in zip(examples, self.examples, strict=True)]
        self.start = start
        if every > 1 and step % every == 0:
            self.check()

    def check(self) -> None:
        """Read the device-side flag.

        Raises:
            NonFiniteError: it was raised; names the first layer and the step.
        """
        if self._bad is None:
            return
        when, layers = self._bad
        step = int(when)
        if step:
            self._bad = None
            self._report(layers, step)

    def _update(self, old: Buffer, new: Buffer, batch: Buffer, past: float | Tensor) -> None:
        """`update_moments` for all layers at once, in few operations; `past` weighs what was seen before."""
        delta = batch.mean - old.mean
        torch.lerp(old.values, batch.values, 1 - past, out=new.values)
        if self._settings.variance != "total":
            return
        if isinstance(past, float):
            new.variance.addcmul_(delta, delta, value=past * (1 - past))
        else:
            new.variance.addcmul_(delta.square_(), past * (1 - past))

    def _weights(self, rows: Sequence[int], like: Tensor) -> tuple[float | Tensor, list[float]]:
        """The weight of what was seen before, a number, or where layers differ one per entry; and that of the start."""
        count = len(rows)
        if rows.count(rows[0]) == self.start.count(self.start[0]) == count:
            past, start = self._weight(rows[0], self.start[0])
            return past, [start] * count
        weights = [self._weight(*pair) for pair in zip(rows, self.start, strict=True)]
        parts = [torch.full((n,), w, dtype=like.dtype) for (w, _), n in zip(weights, self.widths, strict=True)]
        return torch.cat(parts).to(like.device, non_blocking=True), [start for _, start in weights]

    def _weight(self, rows: int, start: float) -> tuple[float, float]:
        """What so many rows leave of what was seen before, and of the start."""
        if not rows:
            return 1.0, start
        rho, reference = self._settings.rho, self._settings.reference_rows
        rho = rho if reference is None else float(rho ** (rows / reference))
        return without_start(rho, start) if self._settings.init == "corrected" else rho, start * rho

    def _gather(self, found: Mapping[int, BatchMoments]) -> tuple[Buffer, list[tuple[int, int, int]]]:
        """What the layers saw, side by side, and counts; zeros, which weigh nothing, for those that did not run."""
        some = next(iter(found.values())).mean
        batch = self._batch
        if batch is None or batch.values.dtype is not some.dtype or batch.values.device != some.device:
            batch = self._batch = Buffer(some.new_zeros(2, sum(self.widths)), self.widths)
            self._absent = [
                BatchMoments(0, 0, 0, zero, zero) for zero in Buffer(batch.values.clone(), self.widths).means
            ]
            self._next = None
        # In the order of the layers, which need not be that of their forward passes.
        seen = [found.get(i, absent) for i, absent in enumerate(self._absent)]
        variances = [a.mean if m.variance is None else m.variance for m, a in zip(seen, self._absent, strict=True)]
        torch.cat([m.mean for m in seen] + variances, out=batch.flat)
        return batch, [m[:3] for m in seen]

    def _buffers(self, batch: Tensor) -> tuple[Buffer, Buffer]:
        """The statistics, `(0, 1)` at first, and a place for the next ones, as the batch's are."""
        if self.now is None:
            self.now = Buffer(torch.stack([torch.zeros_like(batch[0]), torch.ones_like(batch[1])]), self.widths)
        if self._next is None:
            self.set(self.now.values.to(batch))
            self._next = Buffer(torch.zeros_like(batch), self.widths)
            self._lengths = self._lengths.to(batch.device)
            self._every = self._settings.check_every or (1 if batch.device.type == "cpu" else 100)
        return self.now, self._next

    def _guard(self, old: Buffer, new: Buffer, step: int) -> None:
        """The old values again if some of the new are not finite, decided and noted on the device."""
        bad = ~torch.isfinite(new.largest)
        if self._bad is None:
            self._bad = torch.zeros((), dtype=torch.int64, device=bad.device), torch.zeros_like(bad)
        when, layers = self._bad
        any_bad = bad.any()
        first = any_bad & (when == 0)
        self._bad = torch.where(first, step, when), torch.where(first, bad, layers)
        torch.where(any_bad, old.values, new.values, out=new.values)
        new.largest = torch.where(any_bad, old.largest, new.largest)

    def _report(self, bad: Tensor, step: int) -> None:
        layers = [name for name, wrong in zip(self.names, bad.tolist(), strict=True) if wrong]
        others = f"; {len(layers)} layers in all" if len(layers) > 1 else ""
        raise NonFiniteError(
            f"the input of layer {layers[0]!r} has NaN or infinite entries at step {step}, or some whose squares are"
            f"{others}. The statistics of that step were left out; lower the learning rate, or look at the data, and "
            "call discard() where a loop skips a batch"
        )


def distributed() -> bool:
    """Whether training runs in several processes."""
    return _ABLE and dist.is_initialized() and dist.get_world_size() > 1


def _all_reduced(
    batch: Tensor, own_counts: list[tuple[int, int, int]], widths: Sequence[int]
) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Moments and counts of all processes together, as if one had seen every row (T4); samples come first."""
    sizes = torch.tensor(widths, device=batch.device)
    counts = torch.tensor(own_counts, dtype=torch.float64, device=batch.device)
    own = counts[:, 0].to(batch.dtype).repeat_interleave(sizes, output_size=batch.shape[1])
    dist.all_reduce(counts)
    everywhere = counts[:, 0].to(batch.dtype).repeat_interleave(sizes, output_size=batch.shape[1]).clamp_min(1)
    mean = batch[0] * (own / everywhere)
    dist.all_reduce(mean)
    variance = (batch[1] + (batch[0] - mean).square()) * (own / everywhere)
    dist.all_reduce(variance)
    return torch.stack([mean, variance]), [(int(s), int(r), int(n)) for s, r, n in counts.tolist()]
