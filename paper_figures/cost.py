"""What a training step costs: time, measured side by side and alone, and memory, measured in a fresh process."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.runtime.memory import peak_memory
from bnp_analysis.training.experiment import Experiment, build
from bnp_analysis.training.steps import Step

Shape = tuple[int, ...]


def measure_cost(
    experiments: Sequence[Experiment],
    input_shape: Shape,
    num_classes: int,
    *,
    rounds: int = 30,
    steps: int = 10,
    memory: bool = False,
) -> list[dict[str, float]]:
    """Time, and on request memory, of the training steps of several experiments, with nothing else of ours running.

    Times come from one fresh process with one thread, in which the experiments take turns, so that a machine that
    slows down slows all of them. For its memory each has a fresh process, which loads everything anew.

    Args:
        experiments: whose steps.
        input_shape, num_classes: of the data, which are random numbers here.
        rounds: turns of each experiment.
        steps: of one turn.
        memory: also `peak_mb`.

    Returns:
        Per experiment `step_ms`, the median over the rounds, and on request `peak_mb`, by how much the largest resident
        memory of the process (on an accelerator: its largest allocated memory) grew with network, optimizer and
        steps. Empty where the experiment cannot run.
    """
    size = (tuple(input_shape), num_classes)
    with fresh_processes(1) as pool:
        times = pool.submit(_times, list(experiments), *size, rounds, steps).result()
    found: list[dict[str, float]] = []
    for experiment, milliseconds in zip(experiments, times, strict=True):
        if milliseconds is None:
            found.append({})
            continue
        found.append({"step_ms": milliseconds})
        if memory:
            with fresh_processes(1) as pool:
                found[-1]["peak_mb"] = pool.submit(_memory, experiment, *size, steps).result()
    return found


def _times(
    experiments: list[Experiment], input_shape: Shape, num_classes: int, rounds: int, steps: int
) -> list[float | None]:
    with one_thread():
        runners = [_Runner(experiment, input_shape, num_classes) for experiment in experiments]
        seconds: list[list[float]] = [[] for _ in runners]
        able = [runner.able() for runner in runners]
        for turn in range(rounds + 1):
            for i, runner in enumerate(runners):
                if not able[i]:
                    continue
                began = time.perf_counter()
                runner.run(steps)
                if turn:  # the first turn warms up
                    seconds[i].append((time.perf_counter() - began) / steps)
    return [1e3 * statistics.median(own) if own else None for own in seconds]


def _memory(experiment: Experiment, input_shape: Shape, num_classes: int, steps: int) -> float:
    with one_thread():
        _Runner(Experiment(hidden=(2,)), (2,), 2).run(2)  # libraries that load on first use
        before = peak_memory(experiment.device, reset=True)
        _Runner(experiment, input_shape, num_classes).run(steps)
        return peak_memory(experiment.device) - before


class _Runner:
    """Training steps on one batch of random numbers."""

    def __init__(self, experiment: Experiment, input_shape: Shape, num_classes: int) -> None:
        g = torch.Generator().manual_seed(0)
        size = experiment.batch_size
        device = torch.device(experiment.device)
        x = torch.rand(size, *input_shape, generator=g).to(device)
        y = torch.randint(0, num_classes, (size,), generator=g).to(device)
        self.pair: Any = (x, y)
        made = build(experiment, input_shape, num_classes)
        for group in made.optimizer.param_groups:
            group["lr"] = 1e-6  # the same work, without divergence on random labels
        self.step = Step(made.model.train(), made.loss, made.optimizer, made.preconditioner, device)

    def able(self) -> bool:
        try:
            self.run(1)
        except InvalidInputError:
            return False
        return True

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.step.take(self.pair, check=False)
        if self.step.device.type == "cuda":
            torch.cuda.synchronize(self.step.device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch computes on one thread: sums add up in the same order, and processes do not compete."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fresh_processes(number: int) -> ProcessPoolExecutor:
    """Processes that start from nothing: a forked one would inherit torch's threads in an unknown state."""
    return ProcessPoolExecutor(number, mp_context=multiprocessing.get_context("spawn"))
