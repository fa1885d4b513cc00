"""The running statistics of a model's layers, side by side in one flat tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from bnp_analysis.errors import NonFiniteError
from bnp_analysis.precondition.running import update_moments, without_start
from bnp_analysis.training.bnp.batch_moments import BatchMoments


class RunningMoments:
    """Mean and variance of every layer's inputs, updated once per step (T4).

    Args:
        names, widths: of the layers, and how many means each has.
        rho: weight of the past under constant `rho`.
        corrected: whether the start `(0, 1)` is left out of the averages.
        total: whether the variance is the total one, or the average of those within batches.
        reference_rows: a batch of `R` rows leaves the past `rho^(R / reference_rows)`; None for `rho` at any size.
        check_every: steps between reading the flag of non-finite values; None for 1 on CPU, 100 elsewhere.

    Attributes:
        values: `(2, sum of widths)`, means and variances; None before the first step.
        rows: `R` of the last step of each layer, 0 for a layer never seen.
        start: weight of the start in each layer's statistics under constant `rho`.
        step: steps committed.
    """

    def __init__(
        self,
        names: Sequence[str],
        widths: Sequence[int],
        *,
        rho: float,
        corrected: bool,
        total: bool,
        reference_rows: float | None,
        check_every: int | None,
    ) -> None:
        self.names, self.widths = tuple(names), list(widths)
        self.rho, self.corrected, self.total = rho, corrected, total
        self.reference_rows, self.check_every = reference_rows, check_every
        ends = list(accumulate(self.widths))
        self.slices = [slice(end - width, end) for end, width in zip(ends, self.widths, strict=True)]
        self.values: Tensor | None = None
        self.rows = [0] * len(self.names)
        self.start = [1.0] * len(self.names)
        self.step = 0
        self._views: tuple[Tensor, list[tuple[Tensor, Tensor]]] | None = None
        self._bad: tuple[Tensor, Tensor] | None = None

    def of(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of a layer, views."""
        assert self.values is not None
        if self._views is None or self._views[0] is not self.values:
            parts = [self.values[:, part] for part in self.slices]
            self._views = self.values, [(part[0], part[1]) for part in parts]
        return self._views[1][index]

    @property
    def variances(self) -> Tensor:
        """Of all layers, side by side."""
        assert self.values is not None
        return self.values[1]

    def commit(self, found: Mapping[int, BatchMoments]) -> None:
        """Take in what the layers saw in a step, over all processes where training is distributed.

        Raises:
            NonFiniteError: NaN or infinity, now or since the flag was last read; names the layer and the step.
        """
        batch = self._gather(found)
        rows = [found[i].rows if i in found else 0 for i in range(len(self.names))]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            samples = [found[i].samples if i in found else 0 for i in range(len(self.names))]
            batch, rows = _all_reduced(batch, samples, rows, self.widths)
        every = self.check_every or (1 if batch.device.type == "cpu" else 100)
        step = self.step + 1
        if every == 1:
            self._refuse(batch, step)
        old = self._values_like(batch)
        weights = [self._weight(i, count) for i, count in enumerate(rows)]
        rho = self._spread(weights, batch)
        if every == 1 and isinstance(rho, float):
            self.values = self._updated_(old, batch, rho)
        else:
            mean, variance = update_moments(old[0], old[1], batch[0], batch[1], rho)
            if not self.total:
                variance = old[1] + (1 - rho) * (batch[1] - old[1])
            new = torch.stack([mean, variance])
            self.values = new if every == 1 else self._guarded(old, new, batch, step)
        self.step = step
        for i, count in enumerate(rows):
            if count:
                self.rows[i] = count
                self.start[i] *= self._constant(count)
        if every > 1 and step % every == 0:
            self.check()

    def check(self) -> None:
        """Read the device-side flag.

        Raises:
            NonFiniteError: it was raised; names the first layer and the step.
        """
        if self._bad is None:
            return
        when, entries = self._bad
        step = int(when)
        if step:
            self._bad = None
            self._report(entries, step)

    def _updated_(self, old: Tensor, batch: Tensor, rho: float) -> Tensor:
        """`update_moments` in place, for a number `rho`."""
        delta = batch[0] - old[0]
        old.lerp_(batch, 1 - rho)
        if self.total:
            old[1].addcmul_(delta, delta, value=rho * (1 - rho))
        return old

    def _constant(self, rows: int) -> float:
        return self.rho if self.reference_rows is None else float(self.rho ** (rows / self.reference_rows))

    def _weight(self, index: int, rows: int) -> float:
        if not rows:
            return 1.0
        rho = self._constant(rows)
        return without_start(rho, self.start[index]) if self.corrected else rho

    def _spread(self, weights: list[float], like: Tensor) -> float | Tensor:
        if len(set(weights)) == 1:
            return weights[0]
        parts = [torch.full((n,), w, dtype=like.dtype) for w, n in zip(weights, self.widths, strict=True)]
        return torch.cat(parts).to(like.device, non_blocking=True)

    def _gather(self, found: Mapping[int, BatchMoments]) -> Tensor:
        some = next(iter(found.values())).mean
        zeros = {i: some.new_zeros(w) for i, w in enumerate(self.widths) if i not in found}
        means = [found[i].mean if i in found else zeros[i] for i in range(len(self.widths))]
        variances = [found[i].variance if i in found else zeros[i] for i in range(len(self.widths))]
        return torch.cat([*means, *variances]).view(2, -1)

    def _values_like(self, batch: Tensor) -> Tensor:
        if self.values is None:
            return torch.stack([torch.zeros_like(batch[0]), torch.ones_like(batch[1])])
        same = self.values.dtype == batch.dtype and self.values.device == batch.device
        return self.values if same else self.values.to(batch)

    def _refuse(self, batch: Tensor, step: int) -> None:
        total = float(batch.sum())
        # A sum that overflows although no entry is infinite is looked at again.
        if total - total != 0.0 and not bool(torch.isfinite(batch).all()):
            self._report(~torch.isfinite(batch).all(dim=0), step)

    def _guarded(self, old: Tensor, new: Tensor, batch: Tensor, step: int) -> Tensor:
        """The new values unless some are not finite, decided and noted on the device."""
        bad = ~torch.isfinite(batch).all(dim=0)
        if self._bad is None:
            self._bad = torch.zeros((), dtype=torch.int64, device=batch.device), torch.zeros_like(bad)
        when, entries = self._bad
        any_bad = bad.any()
        first = any_bad & (when == 0)
        self._bad = torch.where(first, step, when), torch.where(first, bad, entries)
        return torch.where(any_bad, old, new)

    def _report(self, entries: Tensor, step: int) -> None:
        layers = [name for name, part in zip(self.names, self.slices, strict=True) if bool(entries[part].any())]
        raise NonFiniteError(
            f"the input of layer {layers[0]!r} has NaN or infinite entries at step {step}"
            + (f" (and those of {len(layers) - 1} layers more)" if len(layers) > 1 else "")
            + ". The statistics of that step were left out; lower the learning rate, or look at the data"
        )


def _all_reduced(batch: Tensor, samples: list[int], rows: list[int], widths: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Moments and rows of all processes together, as if one had seen every row (T4)."""
    sizes = torch.tensor(widths, device=batch.device)
    counts = torch.tensor([samples, rows], dtype=torch.float64, device=batch.device)
    own = counts[0].to(batch.dtype).repeat_interleave(sizes, output_size=batch.shape[1])
    dist.all_reduce(counts)
    everywhere = counts[0].to(batch.dtype).repeat_interleave(sizes, output_size=batch.shape[1]).clamp_min(1)
    mean = batch[0] * (own / everywhere)
    dist.all_reduce(mean)
    variance = (batch[1] + (batch[0] - mean).square()) * (own / everywhere)
    dist.all_reduce(variance)
    return torch.stack([mean, variance]), [int(n) for n in counts[1].tolist()]
