"""The loop of a training run: steps, epochs, what hangs on them, and leaving in order."""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Sized
from pathlib import Path
from typing import Any

import torch

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.runtime.progress import Progress, Update, reporting
from bnp_analysis.runtime.random import random_state
from bnp_analysis.training import checkpointing
from bnp_analysis.training.batches import begin_epoch
from bnp_analysis.training.probes import Probe, period
from bnp_analysis.training.run import DIVERGED, FINISHED, Log, Run
from bnp_analysis.training.signals import stop_requests
from bnp_analysis.training.state import Progressed, Step, evaluate

READ_EVERY = 50  # steps between reads of the loss on an accelerator, and between copies of the last good state


class Loop:
    """A run under way: the parts, where it is, and what becomes of it."""

    eval_data: Any = None
    epochs = 0
    by_step = False
    path: Path | None = None
    save_every: int | None = None

    def __init__(
        self,
        step: Step,
        parts: checkpointing.Parts,
        settings: dict[str, Any],
        source: Iterable[Any],
        probes: list[Probe],
    ) -> None:
        self.step, self.parts, self.settings, self.source, self.probes = step, parts, settings, source, probes
        self.at = Progressed()
        self.read_every = 1 if step.device.type == "cpu" else READ_EVERY
        self.good: dict[str, Any] | None = None
        self.candidate: dict[str, Any] | None = None
        self.order: dict[str, Any] = {}
        self.log = Log(None)

    def run(self, log: str | os.PathLike[str] | None, progress: Progress, seed: int) -> Run:
        resumed = self._resume()
        self.log = Log(log, self.at.log_bytes)
        if not resumed:
            self.log.write(kind="start", seed=seed, settings=self.settings)
        length = len(self.source) if isinstance(self.source, Sized) else 0
        try:
            with stop_requests() as request, reporting(progress, self.epochs * length, "training") as update:
                self.at.began = time.perf_counter()
                if self.at.step == 0 and not self.at.probes:
                    self._probe()
                while self.at.epoch < self.epochs and not self.at.stopped and request.signal is None:
                    self._epoch(lambda: request.signal, update)
                self._stop(request.signal)
            return self._result(seed)
        finally:
            self.log.close()

    def _resume(self) -> bool:
        if self.path is None or not self.path.exists():
            return False
        state = checkpointing.load(self.path)
        checkpointing.require_same(self.path, state["settings"], self.settings)
        if state["progress"]["stopped"] == DIVERGED:
            raise InvalidInputError(
                f"{self.path} holds a run that diverged ({state['progress']['message']}); going on would repeat it. "
                "Start with a lower learning rate and another checkpoint=, or delete the file. Its last good "
                "parameters are torch.load(FILE)['model']"
            )
        self.at = Progressed.from_state(state["progress"])
        self.parts.put_back(state)
        if self.at.batch == 0:
            self.parts.set_order(state["order"])
        self.order = state["order"]
        return True

    def _epoch(self, asked: Callable[[], str | None], update: Update) -> None:
        """The rest of an epoch, from where the run stands."""
        self.step.model.train()
        begin_epoch(self.source, self.at.epoch)
        now = checkpointing.random_states()
        if self.at.batch:
            self.parts.set_order(self.order)
        else:
            self.order = self.parts.order()
        batches = iter(self.source)
        if self.at.batch:
            skipped = sum(1 for _ in itertools.islice(batches, self.at.batch))
            if skipped < self.at.batch:
                raise InvalidInputError(
                    f"the loader has {skipped} batches, the checkpoint was saved after {self.at.batch} of them"
                )
            checkpointing.set_random_states(now)
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
            self.candidate = checkpointing.copied(self.parts.take()) | {"after": self.at.step}
        rate = float(self.step.optimizer.param_groups[0]["lr"])
        value, count, problem = self.step.take(pair, check=self.read_every == 1)
        self.at.note(value, count, rate)
        if problem or self.at.step % self.read_every == 0:
            self._read(problem)
        if self.at.stopped:
            return False
        if self.by_step and "scheduler" in self.parts.others:
            scheduler: Any = self.parts.others["scheduler"]
            scheduler.step()
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
        if not self.by_step and "scheduler" in self.parts.others:
            scheduler: Any = self.parts.others["scheduler"]
            plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
            scheduler.step(*([row.get("eval_loss", row["train_loss"])] if plateau else []))
        self.at.epochs.append(row)
        self.log.write(kind="epoch", **row, seconds=self.at.epoch_seconds[-1])
        self.order = self.parts.order()
        self._save()

    def _probe(self) -> None:
        due = [probe for probe in self.probes if self.at.step % period(probe) == 0]
        if not due:
            return
        modes = {module: module.training for module in self.step.model.modules()}
        with self.at.paused(), random_state(device=self.step.device):
            self.step.model.eval()
            for probe in due:
                found = probe(self.at.step, self.step.model)
                name = getattr(probe, "name", getattr(probe, "__name__", type(probe).__name__))
                row = {"probe": str(name), "step": self.at.step} | dict(found)
                self.at.probes.append(row)
                self.log.write(kind="probe", **row)
        for module, mode in modes.items():
            module.training = mode

    def _state(self) -> dict[str, Any]:
        self.at.log_bytes = self.log.size
        return {"order": self.order, "settings": self.settings, "progress": self.at.state()}

    def _save(self) -> None:
        if self.path is None:
            return
        with self.at.paused():
            self._read()
            if not self.at.stopped:
                checkpointing.save(self.path, self.parts.take() | self._state())

    def _stop(self, signal: str | None) -> None:
        """The last words and the last save."""
        with self.at.paused():
            if self.at.stopped == DIVERGED:
                if self.path is not None and self.good is not None:
                    checkpointing.save(self.path, self.good | self._state())
                    self.at.message += f"; saved in {self.path}"
            elif signal is not None and self.at.epoch < self.epochs:
                if not self.order:
                    self.order = self.parts.order()
                self._save()
                self.at.stopped = signal
                saved = f"saved in {self.path}; the same call goes on from there" if self.path else "nothing was saved"
                self.at.message = f"{signal} after step {self.at.step}: {saved}"
            else:
                self.at.stopped, self.at.message = FINISHED, f"{self.at.epoch} epochs done"
                if not self.order:
                    self.order = self.parts.order()
                    self._save()
            self.log.write(kind="end", stopped=self.at.stopped, message=self.at.message, step=self.at.step)

    def _result(self, seed: int) -> Run:
        return Run(
            loss=self.at.series("loss"),
            lr=self.at.series("lr"),
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
