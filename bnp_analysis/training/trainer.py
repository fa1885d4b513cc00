"""The reference trainer: one loop, reproducible from its seed, that can be stopped and resumed bit for bit."""

from __future__ import annotations

import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.network.snapshot import unwrap
from bnp_analysis.runtime.files import clear_read_errors, sole_writer
from bnp_analysis.runtime.kinds import gated, require_loss
from bnp_analysis.runtime.progress import Progress, Update, reporting, stop_requests
from bnp_analysis.runtime.random import random_state
from bnp_analysis.runtime.trees import tensors_of
from bnp_analysis.training.probes import Probe, bound, period
from bnp_analysis.training.run import (
    DIVERGED,
    FINISHED,
    SIGNALS,
    Log,
    Parts,
    Run,
    copied,
    describe_groups,
    describe_model,
    describe_tensors,
    load_state,
    plain_settings,
    random_states,
    require_same,
    save_state,
    set_random_states,
)
from bnp_analysis.training.steps import (
    Step,
    StepsGradients,
    TensorBatches,
    as_batches,
    begin_epoch,
    evaluate,
    generators,
    is_pair_of_tensors,
    kept_modes,
    require_same_model,
)

READ_EVERY = 50  # steps between reads of the loss on an accelerator, and between copies of the last good state


@gated
def train(
    model: nn.Module,
    loss: Callable[[Any, Any], torch.Tensor],
    loader: Any,
    optimizer: torch.optim.Optimizer,
    *,
    preconditioner: StepsGradients | None = None,
    scheduler: Any = None,
    schedule_by: str = "epoch",
    epochs: int = 10,
    batch_size: int | None = None,
    probes: Sequence[Probe] = (),
    eval_data: Any = None,
    log: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> Run:
    """Train a model in place, with or without a preconditioner, and leave a record of it.

    One step is: zero the gradients, forward, loss, backward, `preconditioner.step()`, `optimizer.step()`.

    Args:
        model: trained in place; its modules are left in the modes they were in.
        loss: `loss(output, y)`, the mean over the batch.
        loader: `(x, y)` in memory, or an iterable of such batches that can be read again (`DataLoader`, list). `x`
            is a tensor, a tuple (`model(*x)`) or a dict (`model(**x)`). Batches are moved to the model's device.
        optimizer: any of `torch.optim`.
        preconditioner: `bnp.BNP(model)`, not attached to the optimizer.
        scheduler: of the learning rate; `ReduceLROnPlateau` sees `eval_loss`, without evaluation data `train_loss`.
        schedule_by: when the scheduler steps, "epoch" or "step".
        epochs: passes over the data in all, those before a resumed checkpoint included.
        batch_size: rows of a mini-batch of `(x, y)`, 32 by default; 1 is allowed.
        probes: callables `probe(step, model) -> dict`, called before step 0, then each `probe.every` steps (each
            step where there is no such attribute), in evaluation mode and with random states kept. See
            `ConditionProbe`, `every`.
        eval_data: like `loader`, evaluated after each epoch in evaluation mode.
        log: file of JSON lines: the start, each step, epoch and probe, the end. A fresh run overwrites it.
        checkpoint: file of the whole state, written atomically after each epoch, at a signal and at the end. Where
            it exists the run goes on from it, bit for bit as if it had not stopped.
        checkpoint_every: also after this many steps.
        seed: of the order of `(x, y)`, and of torch's global random numbers during the run (dropout, a loader's
            shuffling), whose state is as before afterwards.
        progress: True draws a bar, a callable gets `(done, total)` steps.

    Returns:
        A `Run`. Its `stopped` is "finished"; "diverged": a loss was NaN or infinite, the model and the checkpoint
        hold the last good state, at most 50 steps old; "SIGINT" or "SIGTERM": the run saved and left. On an
        accelerator the loss is read every 50 steps, so that no step waits for it.

    Raises:
        InvalidInputError: settings that do not fit, a checkpoint of another run.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> from bnp_analysis.training.trainer import train
        >>> data, model = bnp.data.load("digits", n=100), bnp.models.mlp([64, 10])
        >>> loss, optimizer = torch.nn.functional.cross_entropy, torch.optim.SGD(model.parameters(), lr=0.1)
        >>> run = train(model, loss, data.tensors, optimizer, batch_size=10, epochs=2, eval_data=data.tensors)
        >>> run.stopped, len(run.loss), run.final["accuracy"] > 0.5
        ('finished', 20, True)
    """
    if schedule_by not in ("epoch", "step"):
        raise InvalidInputError(f"schedule_by must be 'epoch' or 'step', not {schedule_by!r}")
    require_loss(loss)
    require_same_model(model, loss, optimizer, preconditioner)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    source = as_batches(loader, batch_size, seed, device)
    others = {"optimizer": optimizer, "scheduler": scheduler, "preconditioner": preconditioner}
    parts = Parts(model, {n: o for n, o in others.items() if o is not None}, generators(source))
    settings = _settings(loss, source, parts, {"schedule_by": schedule_by, "seed": seed})
    step = Step(model, loss, optimizer, preconditioner, device)
    loop = _Loop(
        step,
        parts,
        settings,
        _identity(settings, source, parts) if checkpoint is not None else {},
        source,
        [bound(p, loss, preconditioner) for p in probes],
        eval_data,
        epochs=epochs,
        by_step=schedule_by == "step",
        path=None if checkpoint is None else Path(checkpoint),
        save_every=checkpoint_every,
    )
    with (
        sole_writer(checkpoint),
        sole_writer(log, "log"),
        kept_modes(model),
        random_state(seed=seed, device=device),
    ):
        return loop.run(log, progress, seed)


@gated
def fit(
    model: nn.Module,
    loss: Callable[[Tensor, Any], Tensor],
    data: tuple[Tensor, Tensor],
    *,
    epochs: int = 5,
    batch_size: int = 32,
    lr: float = 0.1,
    momentum: float = 0.9,
    seed: int = 0,
    progress: Progress = False,
) -> list[float]:
    """Train a model in place by stochastic gradient descent with momentum; `train` with nothing else.

    Args:
        model: trained in place, left in the mode it was in.
        loss: `loss(output, y)`, the mean over the batch.
        data: `(x, y)`, `(N, ...)` each.
        epochs: passes over the data; 0 leaves the model as it is.
        batch_size: rows of a mini-batch; the last one of an epoch may be smaller.
        lr, momentum: of the optimizer.
        seed: of the order of the examples; the global random state is as before afterwards.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        The mean loss of each epoch.

    Raises:
        InvalidInputError: sizes that do not fit; NonFiniteError: the loss diverged, with the step and the rate.
        KeyboardInterrupt: interrupted.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> losses = fit(model, torch.nn.functional.mse_loss, (x, x[:, :1]), epochs=20, batch_size=2)
        >>> losses[-1] < losses[0]
        True
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    run = train(model, loss, data, optimizer, epochs=epochs, batch_size=batch_size, seed=seed, progress=progress)
    if run.stopped == DIVERGED:
        raise NonFiniteError(run.message)
    if run.stopped in SIGNALS:
        raise KeyboardInterrupt(run.message)
    return [float(row["train_loss"]) for row in run.epochs]


def _settings(loss: Callable[..., Any], source: Any, parts: Parts, given: dict[str, Any]) -> dict[str, Any]:
    """What a run is: it must be the same for a resumed one."""
    own: dict[str, Any] = {"data": type(source).__name__, "loss": getattr(loss, "__name__", type(loss).__name__)}
    if is_pair_of_tensors((getattr(source, "x", None), getattr(source, "y", None))):
        own["batch_size"] = source.batch_size
        own["inputs"] = [list(source.x.shape), str(source.x.dtype), float(source.x.double().sum())]
    elif hasattr(source, "__len__"):
        own["batches"] = len(source)
    for name, other in parts.others.items():
        own[name] = type(other).__name__
    optimizer, scheduler = parts.others["optimizer"], parts.others.get("scheduler")
    own["groups"] = describe_groups(getattr(optimizer, "param_groups", []))
    if scheduler is not None:
        own["schedule"] = plain_settings(scheduler.state_dict())
    shapes = {name: [list(p.shape), str(p.dtype)] for name, p in parts.model.named_parameters()}
    return own | {"parameters": shapes} | given


def _identity(settings: dict[str, Any], source: Any, parts: Parts) -> dict[str, Any]:
    """What a resumed run must have in common with the saved one, beside its settings: network, options, examples."""
    own: dict[str, Any] = {"model": describe_model(unwrap(parts.model))}
    for name, other in parts.others.items():
        options = getattr(other, "settings", None)
        if is_dataclass(options) and not isinstance(options, type):
            own[f"{name} options"] = plain_settings(asdict(options))
    data = getattr(source, "dataset", None)
    held = (source.x, source.y) if isinstance(source, TensorBatches) else getattr(data, "tensors", ())
    own["examples"] = describe_tensors(tensors_of(held))
    sampler = getattr(source, "sampler", None)
    own["order"] = None if sampler is None else [type(sampler).__name__, getattr(source, "batch_size", None)]
    return settings | own


@dataclass
class _Loop:
    """A run under way: the parts, where it is, and what becomes of it."""

    step: Step
    parts: Parts
    settings: dict[str, Any]
    identity: dict[str, Any]
    source: Iterable[Any]
    probes: list[Probe]
    eval_data: Any
    epochs: int
    by_step: bool
    path: Path | None
    save_every: int | None
    good: dict[str, Any] | None = None
    candidate: dict[str, Any] | None = None
    order: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.at, self.log = _Progressed(), Log(None)
        self.scheduler: Any = self.parts.others.get("scheduler")
        self.last: Any = None  # the batch of the last step
        self.read_every = 1 if self.step.device.type == "cpu" else READ_EVERY

    def run(self, log: str | os.PathLike[str] | None, progress: Progress, seed: int) -> Run:
        resumed = self._resume()
        length = len(self.source) if isinstance(self.source, Sized) else 0
        with (
            closing(Log(log, self.at.log_bytes)) as self.log,
            stop_requests(signal.SIGINT, signal.SIGTERM) as request,
            reporting(progress, self.epochs * length, "training") as update,
        ):
            if not resumed:
                self.log.write(kind="start", seed=seed, settings=self.settings)
            self.at.began = time.perf_counter()
            if self.at.step == 0 and not self.at.probes:
                self._probe()
            while self.at.epoch < self.epochs and not self.at.stopped and request.signal is None:
                self._epoch(lambda: request.signal, update)
            self._stop(request.signal)
        return self._result(seed)

    def _resume(self) -> bool:
        if self.path is None or not self.path.exists():
            return False
        state = load_state(self.path)
        with clear_read_errors(self.path, "the checkpoint of a training run"):
            require_same(self.path, state["settings"], self.identity)
            at, self.order = _Progressed.from_state(state["progress"]), state["order"]
        if state["progress"]["stopped"] == DIVERGED:
            raise InvalidInputError(
                f"{self.path} holds a run that diverged ({state['progress']['message']}); going on would repeat it. "
                "Start with a lower learning rate and another checkpoint=, or delete the file. Its last good "
                "parameters are torch.load(FILE)['model']"
            )
        with clear_read_errors(self.path, "the checkpoint of a training run"):
            self.parts.put_back(state)
            if at.batch == 0:
                self.parts.set_order(self.order)
        self.at = at
        return True

    def _epoch(self, asked: Callable[[], str | None], update: Update) -> None:
        """The rest of an epoch, from where the run stands."""
        self.step.model.train()
        begin_epoch(self.source, self.at.epoch)
        now = random_states()
        if self.at.batch:
            self.parts.set_order(self.order)
        else:
            self.order = self.parts.order()
        batches = iter(self.source)
        if self.at.batch:
            skipped = 0
            for pair in itertools.islice(batches, self.at.batch):
                self.last, skipped = pair, skipped + 1
            if skipped < self.at.batch:
                raise InvalidInputError(
                    f"the loader has {skipped} batches, the checkpoint was saved after {self.at.batch} of them"
                )
            if self.at.targets and self._targets() != self.at.targets:
                raise InvalidInputError(
                    f"{self.path} holds a run on other data: the targets of batch {self.at.batch} of epoch "
                    f"{self.at.epoch + 1} are not those that it was trained with, so their order or the labels are "
                    "others. Resuming would mix two runs: delete it, or give another checkpoint="
                )
            set_random_states(now)
        for pair in batches:
            if not self._one(pair, update):
                return
            if asked() is not None:
                return
        if self.at.batch == 0:
            raise InvalidInputError("the loader has no batch: with drop_last=True one shorter than a batch is empty")
        self._read()
        if not self.at.stopped:
            self._end_epoch()

    def _one(self, pair: Any, update: Update) -> bool:
        """One step with what hangs on it; False where the run diverged."""
        if self.at.step % READ_EVERY == 0:
            # Promoted to the good state when the loss of this step is known to be finite.
            self.candidate = copied(self.parts.take()) | {"after": self.at.step}
        rate = float(self.step.optimizer.param_groups[0]["lr"])
        value, count, problem = self.step.take(pair, check=self.read_every == 1)
        self.at.note(value, count, rate)
        self.last = pair
        if problem or self.at.step % self.read_every == 0:
            self._read(problem)
        if self.at.stopped:
            return False
        if self.by_step and self.scheduler is not None:
            self.scheduler.step()
        update(self.at.step)
        self._probe()
        if self.save_every and self.at.step % self.save_every == 0:
            self._save()
        return True

    def _read(self, problem: str = "") -> None:
        """Fetch the losses that the device still holds, log them, and notice divergence."""
        for step, loss, rate in self.at.read():
            self.log.write(kind="step", step=step, epoch=self.at.epoch + 1, loss=loss, lr=rate)
            if not math.isfinite(loss) or (problem and step == self.at.step):
                self._diverged(step, loss, rate, problem)
                return
        if self.candidate is not None:
            self.good, self.candidate = self.candidate, None

    def _diverged(self, step: int, loss: float, rate: float, problem: str) -> None:
        self.at.stopped = DIVERGED
        where = "the run diverged at its start; the model is as the failing step left it"
        if self.good is not None:
            self.parts.put_back(self.good)
            where = f"the model is back in its last good state, after {self.good['after']} steps"
        what = problem or f"the loss is {loss}"
        self.at.message = f"{what} at step {step}, learning rate {rate:g}; {where}. Lower the learning rate"

    def _end_epoch(self) -> None:
        row = self.at.end_epoch(float(self.step.optimizer.param_groups[0]["lr"]))
        with self.at.paused():
            if self.eval_data is not None:
                row |= evaluate(self.step, self.eval_data)
        if not self.by_step and self.scheduler is not None:
            plateau = isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            self.scheduler.step(*([row.get("eval_loss", row["train_loss"])] if plateau else []))
        self.at.epochs.append(row)
        self.log.write(kind="epoch", **row, seconds=self.at.epoch_seconds[-1])
        self.order = self.parts.order()
        self._save()

    def _probe(self) -> None:
        due = [probe for probe in self.probes if self.at.step % period(probe) == 0]
        if not due:
            return
        with self.at.paused(), random_state(device=self.step.device), kept_modes(self.step.model):
            self.step.model.eval()
            for probe in due:
                found = probe(self.at.step, self.step.model)
                name = getattr(probe, "name", getattr(probe, "__name__", type(probe).__name__))
                row = {"probe": str(name), "step": self.at.step} | dict(found)
                self.at.probes.append(row)
                self.log.write(kind="probe", **row)

    def _state(self) -> dict[str, Any]:
        self.at.log_bytes = self.log.size
        self.at.targets = self._targets() if self.at.batch else []
        return {"order": self.order or self.parts.order(), "settings": self.identity, "progress": self.at.state()}

    def _targets(self) -> list[str]:
        """Of the batch of the last step, in short."""
        return [] if self.last is None else describe_tensors(tensors_of(self.last[1]))

    def _save(self) -> None:
        if self.path is None:
            return
        with self.at.paused():
            self._read()
            if not self.at.stopped:
                save_state(self.path, self.parts.take() | self._state())

    def _stop(self, signal: str | None) -> None:
        """The last words and the last save."""
        with self.at.paused():
            if self.at.stopped == DIVERGED:
                if self.path is not None and self.good is not None:
                    save_state(self.path, self.good | self._state())
                    self.at.message += f"; saved in {self.path}"
            elif signal is not None and self.at.epoch < self.epochs:
                self._save()
                self.at.stopped = signal
                saved = f"saved in {self.path}; the same call goes on from there" if self.path else "nothing was saved"
                self.at.message = f"{signal} after step {self.at.step}: {saved}"
            else:
                self.at.stopped, self.at.message = FINISHED, f"{self.at.epoch} epochs done"
                if not self.order:
                    self._save()
            self.log.write(kind="end", stopped=self.at.stopped, message=self.at.message, step=self.at.step)

    def _result(self, seed: int) -> Run:
        return Run(
            loss=np.array(self.at.loss, dtype=np.float64),
            lr=np.array(self.at.lr, dtype=np.float64),
            epochs=tuple(self.at.epochs),
            epoch_seconds=tuple(self.at.epoch_seconds),
            probes=tuple(self.at.probes),
            stopped=self.at.stopped,
            message=self.at.message,
            checkpoint=None if self.path is None else str(self.path),
            settings=self.settings,
            seed=seed,
            seconds=self.at.seconds,
        )


@dataclass
class _Progressed:
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
    targets: list[str] = field(default_factory=list)
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
        series = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("loss", "lr")}
        return kept | series | {"spent": self.seconds}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> _Progressed:
        """The run that `state` describes, on its way again."""
        own = dict(state) | {"loss": state["loss"].tolist(), "lr": state["lr"].tolist()}
        return cls(**own | {"stopped": "", "message": ""})
