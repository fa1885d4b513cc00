"""Catches: decisions that seldom fall the other way (random numbers, clocks, counters), and harmless uses refused."""

from __future__ import annotations

import gc
import itertools
import operator
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from random import random as imported
from typing import Any

import numpy as np
import pytest
import torch
from network_models import classify, drawn, table
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.errors import MeasurementWarning, StochasticModelError
from bnp_analysis.network.decisions import _open

KEPT: dict[str, Any] = {"passes": 0, "log": []}
TALLY = itertools.count()


def net(uses: Callable[[Tensor], Any]) -> nn.Module:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.uses = uses

        def forward(self, h: Tensor) -> Tensor:
            return torch.tanh(h) * (1 + self.uses(h))

    return drawn(lambda: nn.Sequential(nn.Linear(4, 6), Gate(), nn.Linear(6, 3)))


def every_fiftieth(h: Tensor) -> bool:
    KEPT["passes"] += 1
    return bool(KEPT["passes"] % 50 == 0)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, h: Tensor) -> float:
        self.calls += 1
        return min(1.0, self.calls / 1e9)


RARE: dict[str, Callable[[Tensor], Any]] = {
    "python, whole": lambda h: random.randint(0, 999) == 7,
    "python, choice": lambda h: random.choice(range(1000)) == 7,
    "python, between": lambda h: 0.5 < random.random() < 0.5001,
    "python, imported": lambda h: 0.5 < imported() < 0.5001,
    "numpy, whole": lambda h: np.random.randint(0, 1000) == 7,  # noqa: NPY002
    "torch, whole": lambda h: int(torch.randint(0, 1000, (1,))) == 7,
    "torch, number": lambda h: 0.5 < float(torch.rand(())) < 0.5001,
    "torch, item": lambda h: 0.5 < torch.rand(1).item() < 0.5001,
    "torch, tensor": lambda h: h.new_tensor(1.0) * (torch.randint(0, 1000, (1,)) == 7),
    "clock": lambda h: int(time.time()) % 3600 == 7,
    "clock, fraction": lambda h: time.perf_counter() % 1 < 1e-4,
    "counter, global": every_fiftieth,
    "counter, attribute": Counter(),
}


@pytest.mark.parametrize("name", RARE)
def test_decisions_that_seldom_fall_the_other_way_are_refused(name: str) -> None:
    with pytest.raises(StochasticModelError, match=r"the model decides by .* at test_network_decisions.py:\d+"):
        classify(net(RARE[name]), table())


def test_two_rare_decisions_one_inside_the_other() -> None:
    both = net(lambda h: random.randint(0, 999) == 7 and random.randint(0, 999) == 8)
    with pytest.raises(StochasticModelError, match="a comparison of a random number"):
        classify(both, table())


@pytest.mark.parametrize("name", ["python, whole", "clock", "counter, global"])
def test_losses_decide_too(name: str) -> None:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(output, y) * (1 + RARE[name](output))

    with pytest.raises(StochasticModelError, match="the loss decides by"):
        bnp.EmpiricalRisk(net(lambda h: 0), loss, table())


def numbers() -> Iterator[int]:
    while True:
        yield from (0,) * 60
        yield 1


RUNNING = numbers()
LOST: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "shuffled": (lambda h: random.sample(range(1000), 2)[0] == 7, "random.sample at"),
    "permutation": (lambda h: np.random.permutation(1000)[0] == 7, "numpy.permutation at"),  # noqa: NPY002
    "system": (lambda h: int.from_bytes(os.urandom(4), "big") % 1000 == 7, "urandom at"),
    "index": (
        lambda h: h.new_tensor(1.0) * torch.eye(1000)[500][torch.randint(0, 1000, ())],
        "an index that is",
    ),
    "iterator": (lambda h: next(TALLY) % 50 == 49, "an iterator"),
    "generator": (lambda h: next(RUNNING), "the generator numbers()"),
}


@pytest.mark.parametrize("name", LOST)
def test_what_cannot_be_followed_is_named(name: str) -> None:
    uses, words = LOST[name]
    with pytest.warns(MeasurementWarning) as caught:
        classify(net(uses), table())
    assert words in str(caught[0].message)
    assert "What was tried changed nothing" in str(caught[0].message)


class Timed(nn.Module):
    """Keeps how long it took and how often it ran, and says so now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds, self.calls, self.last = 0.0, 0, time.monotonic()

    def forward(self, h: Tensor) -> float:
        began = time.perf_counter()
        self.calls += 1
        if self.calls % 3 == 0 or time.monotonic() - self.last > 60:
            sys.stderr.write(f"{self.seconds:.3f} {self.calls}")
            self.last = time.monotonic()
        self.seconds += time.perf_counter() - began
        return 0.0


def logged(h: Tensor) -> float:
    KEPT["log"].append((time.time(), float(h.detach().mean())))
    return 0.0


def seeded(h: Tensor) -> float:
    torch.manual_seed(3)
    return 1.0 if torch.rand(()).item() < 0.5 else 0.0


HARMLESS: dict[str, Callable[[Tensor], Any]] = {
    "timed": Timed(),
    "logged": logged,
    "seeded": seeded,
    "unused": lambda h: 0.0 * (random.randint(0, 9) + torch.rand(3).sum().item()),
    "impossible": lambda h: float(random.random() < 0.0 or torch.rand(()).item() > 1.0),
    "own seed": lambda h: random.Random(3).random() * np.random.default_rng(3).random(),
    "kinds": lambda h: float(isinstance(random.randint(0, 3), int)) * int(True),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_harmless_uses_are_accepted_in_silence(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        risk = classify(net(HARMLESS[name]), table())
    assert not risk.coupled


def test_nothing_of_the_search_stays_behind() -> None:
    """Functions, kinds, counters and profilers are as before, also after an interrupt in the middle."""
    before = {name: value for name, value in vars(time).items() if callable(value)}
    draws, made = random.random, []

    def loss(output: Tensor, y: Tensor) -> Tensor:
        made.append(random.random() < 0.5 and time.time() < 0)
        if len(made) == stop:
            raise KeyboardInterrupt
        return F.cross_entropy(output, y)

    for stop in range(1, 40, 3):
        made.clear()
        with suppress(KeyboardInterrupt, StochasticModelError), warnings.catch_warnings():
            warnings.simplefilter("ignore", MeasurementWarning)  # of `made`, whose length the loss reads
            bnp.EmpiricalRisk(net(every_fiftieth if stop == 1 else Timed()), loss, table())
        assert {name: getattr(time, name) for name in before} == before
        assert random.random == draws
        assert "int" not in globals()
        assert sys.getprofile() is None
        assert type(KEPT["passes"]) is int
    assert type(made[0]) is bool


def test_what_runs_when_garbage_is_collected_is_not_the_models() -> None:
    def collected(phase: str, info: object) -> None:
        times.append(time.perf_counter())

    class Littering(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            gc.collect()
            return x * self.w

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))

    times: list[float] = []
    gc.callbacks.append(collected)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bnp.EmpiricalRisk(Littering(), F.mse_loss, (torch.ones(3, 2), torch.zeros(3, 2)))
    finally:
        gc.callbacks.remove(collected)
    assert times


@pytest.mark.parametrize("name", ["lt", "le", "gt", "ge", "eq", "ne"])
def test_a_comparison_is_open_where_numbers_within_bounds_fall_both_ways(name: str) -> None:
    bounds = [(low, high) for low in range(4) for high in range(low, 4)]
    for a, b in itertools.product(bounds, bounds):
        pairs = itertools.product(range(a[0], a[1] + 1), range(b[0], b[1] + 1))
        outcomes = {getattr(operator, name)(x, y) for x, y in pairs}
        assert _open(name, a, b) == (len(outcomes) == 2), (a, b)
