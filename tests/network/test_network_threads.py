"""Measurements in several threads are those of one, and nothing that belongs to the process stays changed.

Bugs that only these tests catch: hooks of one thread's pass that see another's; kernels or random states that two
threads save and restore crosswise; an interrupt anywhere that leaves attention, mkldnn or a generator switched.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from linecache import getline
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bnp_analysis as bnp
from bnp_analysis.network import kernels, observation, purity
from bnp_analysis.runtime.threads import each, one_blas_thread


def state() -> tuple[Any, ...]:
    """What belongs to the process."""
    switches = (*kernels._ATTENTION, *kernels._RECURRENT)
    return (
        [is_on() for is_on, _ in switches],
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        torch.is_grad_enabled(),
    )


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.mix(x, x, x, need_weights=False)[0].mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 3, batch_first=True)
        self.out = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cell(x)[0][:, -1])


def risks() -> list[bnp.EmpiricalRisk]:
    found = []
    for i, make in enumerate((lambda: bnp.models.mlp([4, 5, 2], seed=3), Attention, Recurrent)):
        g = torch.Generator().manual_seed(i)
        shape = (12, 4) if i == 0 else (12, 3, 4)
        x, y = torch.randn(shape, generator=g), torch.randint(0, 2, (12,), generator=g)
        with torch.random.fork_rng():
            torch.manual_seed(i)
            model = make()
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5, shuffle=i == 1)
        data: Any = (x, y) if i == 0 else loader
        found.append(bnp.EmpiricalRisk(model, nn.functional.cross_entropy, data, dtype=torch.float64))
    return found


def measure(risk: bnp.EmpiricalRisk) -> tuple[int, torch.Tensor, torch.Tensor]:
    null = bnp.null_directions(risk).basis.shape[1] if risk.space.dim < 40 else -1
    H = bnp.hessian(risk)
    v = torch.linspace(-1, 1, risk.space.dim, dtype=torch.float64)
    fresh = risk.at(risk.theta)
    return null, fresh.gradient, H @ v


@pytest.mark.parametrize("threads", [2, 4])
def test_threads_measure_what_one_thread_does(threads: int) -> None:
    own = risks()
    alone = [measure(risk) for risk in own]
    shared = bnp.hessian(own[1])
    v = torch.linspace(1, 2, own[1].space.dim, dtype=torch.float64)
    product, before = shared @ v, state()
    jobs = [(risk, k) for k, risk in enumerate(own)] * 2
    start = Barrier(threads)

    def work(rank: int) -> list[tuple[int, Any, Any]]:
        start.wait()
        found = []
        for risk, k in jobs[rank % 2 :: 2]:
            found.append((k, measure(risk), shared @ v))
        return found

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(threads) as pool:
            results = [r for part in pool.map(work, range(threads)) for r in part]
    finally:
        sys.setswitchinterval(interval)
    assert state() == before
    for k, (dim, gradient, image), again in results:
        assert dim == alone[k][0]
        torch.testing.assert_close(gradient, alone[k][1], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(image, alone[k][2], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(again, product, rtol=1e-10, atol=1e-13)


def interrupted(run: Callable[[], object], at: int) -> bool:
    """Whether a KeyboardInterrupt before the `at`-th line of the rooms that change states came out of `run`."""
    files = {module.__file__ for module in (kernels, purity, observation)}
    count = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in files:
            return None
        # Python handles no signal at the two ends of a block, which are lines to a tracer. In comprehensions, which are
        # part of their function from 3.12 on, signals leave a block by its end, and what a tracer raises does not.
        text = getline(frame.f_code.co_filename, frame.f_lineno).lstrip()
        skipped = text.startswith(("with ", "try:")) or (sys.version_info >= (3, 12) and " for " in text)
        if event == "line" and not skipped:
            count += 1
            if count == at:
                raise KeyboardInterrupt
        return trace

    tracer = sys.gettrace()  # of coverage, if that is measured
    sys.settrace(trace)
    try:
        run()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(tracer)
    return False


@pytest.mark.parametrize("kind", [1, 2], ids=["attention", "recurrent"])
def test_an_interrupt_anywhere_leaves_the_process_as_it_was(kind: int) -> None:
    risk = risks()[kind]
    batch = next(iter(risk.batches))
    tensors = risk.space.unflatten(risk.theta)

    def run() -> None:
        with purity.random_state(seed=5):
            risk.capture(lambda *_: None)
            risk.batch_outputs(tensors, batch)
            sum(b.count for b in risk.batches)

    before, hooks = state(), [len(m._forward_hooks) for _, m in risk.modules()]
    at = 0
    while interrupted(run, at := at + 1):
        assert state() == before, f"line {at}"
        assert [len(m._forward_hooks) for _, m in risk.modules()] == hooks, f"line {at}"
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(kernels.LOCK.acquire, timeout=5).result(), f"line {at}: the lock is held"
            pool.submit(kernels.LOCK.release).result()
    assert at > 60


def test_an_interrupt_in_the_model_leaves_the_process_as_it_was() -> None:
    class Stopped(Attention):
        stop = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if Stopped.stop:
                assert torch.backends.cuda.math_sdp_enabled()
                assert not torch.backends.cuda.flash_sdp_enabled()
                raise KeyboardInterrupt
            return super().forward(x)

    x, y = torch.ones(3, 2, 4), torch.tensor([0, 1, 1])
    risk = bnp.EmpiricalRisk(Stopped(), nn.functional.cross_entropy, (x, y))
    before = state()
    Stopped.stop = True
    with pytest.raises(KeyboardInterrupt):
        _ = risk.gradient
    assert state() == before


def test_numbers_of_threads_come_back_when_two_shared_them_out() -> None:
    before, inside, leave = torch.get_num_threads(), Barrier(2), Barrier(2)
    seen = []

    def first(_: int) -> None:
        inside.wait()
        leave.wait()

    def second(_: int) -> None:
        seen.append(torch.get_num_threads())

    def early() -> None:
        each(first, [0], 2, lambda done: None)

    def late() -> None:
        with one_blas_thread():
            inside.wait()
            each(second, [0, 1], 2, lambda done: leave.wait() if done == 1 else None)

    torch.set_num_threads(4)
    try:
        with ThreadPoolExecutor(2) as pool:
            for future in [pool.submit(early), pool.submit(late)]:
                future.result(timeout=60)
        assert torch.get_num_threads() == 4
        assert seen == [2, 2]
    finally:
        torch.set_num_threads(before)
