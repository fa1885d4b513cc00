"""The reference trainer: one loop, reproducible from its seed, that can be stopped and resumed bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.runtime.progress import Progress
from bnp_analysis.runtime.random import random_state
from bnp_analysis.training import checkpointing
from bnp_analysis.training.batches import as_batches, generators, is_pair_of_tensors
from bnp_analysis.training.loop import Loop
from bnp_analysis.training.probes import Probe, bound
from bnp_analysis.training.run import Run
from bnp_analysis.training.state import Step, StepsGradients


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
    if epochs < 0 or schedule_by not in ("epoch", "step") or (checkpoint_every is not None and checkpoint_every < 1):
        raise InvalidInputError(
            f"epochs={epochs} >= 0, schedule_by={schedule_by!r} in ('epoch', 'step') and "
            f"checkpoint_every={checkpoint_every} >= 1 must hold"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    source = as_batches(loader, batch_size, seed, device)
    others = {"optimizer": optimizer, "scheduler": scheduler, "preconditioner": preconditioner}
    parts = checkpointing.Parts(model, {n: o for n, o in others.items() if o is not None}, generators(source))
    settings = _settings(loss, source, parts, {"schedule_by": schedule_by, "seed": seed})
    step = Step(model, loss, optimizer, preconditioner, device)
    loop = Loop(step, parts, settings, source, [bound(p, loss, preconditioner) for p in probes])
    loop.eval_data, loop.epochs, loop.by_step = eval_data, epochs, schedule_by == "step"
    loop.path, loop.save_every = None if checkpoint is None else Path(checkpoint), checkpoint_every
    modes = {module: module.training for module in model.modules()}
    try:
        with random_state(seed=seed, device=device):
            return loop.run(log, progress, seed)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _settings(
    loss: Callable[..., Any], source: Any, parts: checkpointing.Parts, given: dict[str, Any]
) -> dict[str, Any]:
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
    own["groups"] = checkpointing.describe_groups(getattr(optimizer, "param_groups", []))
    if scheduler is not None:
        own["schedule"] = checkpointing.plain_settings(scheduler.state_dict())
    shapes = {name: [list(p.shape), str(p.dtype)] for name, p in parts.model.named_parameters()}
    return own | {"parameters": shapes} | given
