"""What a training run has done so far, and the two things it does with batches: a step and an evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.network.batches import arguments
from bnp_analysis.runtime.random import random_state
from bnp_analysis.training.batches import generators, is_pair_of_tensors, moved

_ROWS = 1000  # of one forward pass in an evaluation of data in memory


class StepsGradients(Protocol):
    """What the trainer asks of a preconditioner: `step()` between `backward()` and the optimizer, and a state."""

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass
class Progressed:
    """Where a run is, and its metrics.

    Args:
        epoch: finished epochs.
        batch: batches of the next epoch that are done.
        step: updates in all.
        total, count: sum of the loss over the examples of this epoch, and their number.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    total: float = 0.0
    count: int = 0
    loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    epoch_seconds: list[float] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    stopped: str = ""
    message: str = ""
    log_bytes: int = 0
    spent: float = 0.0
    began: float = 0.0
    pending: list[tuple[Tensor, int]] = field(default_factory=list)

    def note(self, loss: Tensor, count: int, rate: float) -> None:
        """Count a step; its loss stays on the device until it is read."""
        self.pending.append((loss, count))
        self.lr.append(rate)
        self.step += 1
        self.batch += 1

    def read(self) -> list[tuple[int, float, float]]:
        """Fetch the losses noted since the last read: step, loss and learning rate of each."""
        values = [] if not self.pending else torch.stack([loss for loss, _ in self.pending]).double().tolist()
        counts = [count for _, count in self.pending]
        self.pending.clear()
        first = len(self.loss)
        for value, count in zip(values, counts, strict=True):
            self.loss.append(value)
            self.total += value * count
            self.count += count
        return [(first + i + 1, value, self.lr[first + i]) for i, value in enumerate(values)]

    def end_epoch(self, rate: float) -> dict[str, Any]:
        """Close an epoch and return its row."""
        row = {"epoch": self.epoch + 1, "step": self.step, "train_loss": self.total / self.count, "lr": rate}
        self.epoch, self.batch, self.total, self.count = self.epoch + 1, 0, 0.0, 0
        self.epoch_seconds.append(self.seconds)
        return row

    @property
    def seconds(self) -> float:
        """Training time, resumed parts included, without what was done while paused."""
        return self.spent + time.perf_counter() - self.began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        self.spent, self.began = self.seconds, time.perf_counter()
        try:
            yield
        finally:
            self.began = time.perf_counter()

    def state(self) -> dict[str, Any]:
        """Everything but the clock, as tensors, numbers and words."""
        kept = {n: v for n, v in vars(self).items() if n not in ("began", "pending", "loss", "lr", "spent")}
        series = {
            "loss": torch.tensor(self.loss, dtype=torch.float64),
            "lr": torch.tensor(self.lr, dtype=torch.float64),
        }
        return kept | series | {"spent": self.seconds}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progressed:
        """The run that `state` describes, on its way again."""
        own = dict(state) | {"loss": state["loss"].tolist(), "lr": state["lr"].tolist()}
        return cls(**own | {"stopped": "", "message": ""})

    def series(self, name: str) -> npt.NDArray[np.float64]:
        """The values of `loss` or `lr`, one per step."""
        return np.array(getattr(self, name), dtype=np.float64)


@dataclass
class Step:
    """One update of a model."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    optimizer: torch.optim.Optimizer
    preconditioner: StepsGradients | None
    device: torch.device

    def to_device(self, t: Tensor) -> Tensor:
        """A tensor where the model is."""
        return t.to(self.device, non_blocking=True)

    def take(self, pair: Any, *, check: bool) -> tuple[Tensor, int, str]:
        """Do one update.

        Args:
            pair: the batch.
            check: whether to look at the loss before it is differentiated; no update follows a bad one.

        Returns:
            The loss before the update, the number of examples, and why no update was made, if none was.
        """
        x, y, count = moved(pair, self.to_device)
        self.optimizer.zero_grad(set_to_none=True)
        value = self.loss(self._output(x), y)
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
            raise InvalidInputError("loss(output, y) must be a scalar tensor that depends on the parameters")
        found = value.detach()
        if check and not bool(torch.isfinite(found)):
            return found, count, f"the loss is {float(found)}"
        torch.autograd.backward(value)
        if self.preconditioner is not None:
            try:
                self.preconditioner.step()
            except NonFiniteError as error:
                return found, count, str(error)
        self.optimizer.step()
        return found, count, ""

    def _output(self, x: Any) -> Any:
        args, kwargs = arguments(x)
        try:
            return self.model(*args, **kwargs)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise InvalidInputError(
                    "batch normalization in training needs more than one value per channel, and a batch has one "
                    "example. Use a larger batch, drop the last one, or a normalization of single examples (layer, "
                    "group)"
                ) from error
            raise


def evaluate(step: Step, data: Any) -> dict[str, float]:
    """Mean loss, and for class labels the accuracy, in evaluation mode; changes nothing.

    Args:
        step: whose model and loss.
        data: `(x, y)` in memory, or an iterable of such batches.

    Returns:
        `eval_loss`, and `accuracy` where outputs are `(N, C)` and targets `(N,)` integers.
    """
    modes = {module: module.training for module in step.model.modules()}
    step.model.eval()
    if is_pair_of_tensors(data):
        data = list(zip(*(part.split(_ROWS) for part in data), strict=True))
    total, correct, rows = 0.0, 0, 0
    classes = True
    try:
        with torch.no_grad(), random_state(device=step.device, generators=generators(data)):
            for pair in data:
                x, y, count = moved(pair, step.to_device)
                args, kwargs = arguments(x)
                output = step.model(*args, **kwargs)
                total += float(step.loss(output, y)) * count
                rows += count
                labels = isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point()
                classes = classes and labels and isinstance(output, Tensor) and output.ndim == 2
                if classes:
                    correct += int((output.argmax(1) == y).sum())
    finally:
        for module, mode in modes.items():
            module.training = mode
    if rows == 0:
        raise InvalidInputError("the evaluation data have no example")
    return {"eval_loss": total / rows} | ({"accuracy": correct / rows} if classes else {})
