"""Loops that clip gradients where an attached BNP does not see it, and optimizers that are not what they seem.

Bugs that only these tests catch: a step longer than the loop's bound, gradients preconditioned twice where they are
accumulated, not at all where an accumulation ends early, or before processes have averaged them.
"""

from __future__ import annotations

import gc
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bnp_loops import backward, gradient, loss_of, network, parameters, relative, stepped
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bnp_analysis.errors import InvalidInputError, TrainingWarning
from bnp_analysis.training.bnp import BNP

BOUND, RATE = 1e-2, 0.5


def by_hand(parts: list[list[int]], *, steps: int = 3) -> Tensor:
    """`backward()` of the parts, `pre.step()`, clipping and a step."""
    model, x, y = network()
    pre, optimizer = BNP(model), torch.optim.SGD(model.parameters(), lr=RATE)
    for k in range(steps):
        optimizer.zero_grad()
        sizes = parts[k % len(parts)]
        for rows, labels in zip(x.split(sizes), y.split(sizes), strict=True):
            backward(model, rows, labels, len(rows) / len(x))
        pre.step()
        nn.utils.clip_grad_norm_(model.parameters(), BOUND)
        before = parameters(model)
        optimizer.step()
        assert float((parameters(model) - before).norm()) <= RATE * BOUND * (1 + 1e-4)
    return parameters(model)


@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("to_none", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_the_loops_clipping_bounds_the_step(passes: int, to_none: bool, scaled: bool) -> None:
    sizes = {1: [12], 2: [5, 7], 3: [2, 4, 6]}[passes]
    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    BNP(model).attach(optimizer, before_clipping=True if passes == 1 else passes)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
    for _ in range(3):
        for rows, labels in zip(x.split(sizes), y.split(sizes), strict=True):
            scaler.scale(len(rows) / len(x) * loss_of(model, rows, labels)).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), BOUND)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=to_none)
    assert relative(parameters(model), by_hand([sizes])) < 1e-13


def test_without_it_the_step_is_longer() -> None:
    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    BNP(model).attach(optimizer)
    backward(model, x, y)
    nn.utils.clip_grad_norm_(model.parameters(), BOUND)
    before = parameters(model)
    optimizer.step()
    assert float((parameters(model) - before).norm()) > 2 * RATE * BOUND


def test_a_closure_that_clips() -> None:
    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    BNP(model).attach(optimizer, before_clipping=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), BOUND)
        return loss

    for _ in range(3):
        optimizer.step(closure)
    assert torch.equal(parameters(model), by_hand([[12]]))


def test_an_accumulation_that_ends_early_is_preconditioned_before_the_step() -> None:
    model, x, y = network()
    twin, _, _ = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    pre, other = BNP(model).attach(optimizer, before_clipping=3), BNP(twin)
    backward(model, x, y)
    optimizer.step()
    stepped(twin, x, y, other)
    torch.optim.SGD(twin.parameters(), lr=RATE).step()
    assert torch.equal(parameters(model), parameters(twin))
    # And the count begins anew.
    for k in range(3):
        assert pre.state_dict()["step"] == 1, k
        backward(model, x, y)
    assert pre.state_dict()["step"] == 2


def test_more_passes_than_said_are_refused() -> None:
    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    pre = BNP(model).attach(optimizer, before_clipping=True)
    backward(model, x, y)
    with pytest.raises(InvalidInputError, match="before_clipping=n"):
        backward(model, x, y)
    # A step that a loop skips, as a scaler does, is another matter.
    optimizer.zero_grad()
    backward(model, x, y)
    optimizer.zero_grad()
    backward(model, x, y)
    pre.close()
    backward(model, x, y)
    for wrong in (0, -1, 1.0, "yes", None):
        with pytest.raises(InvalidInputError, match="before_clipping"):
            BNP(model).attach(optimizer, before_clipping=wrong)  # type: ignore[arg-type]


def test_a_backward_pass_that_fails_does_not_stop_the_next() -> None:
    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    pre = BNP(model).attach(optimizer, before_clipping=True)

    def fail(_: Tensor) -> None:
        raise RuntimeError("out of memory")

    handle = model[0].weight.register_post_accumulate_grad_hook(fail)  # type: ignore[index, operator]
    with pytest.raises(RuntimeError, match="out of memory"):
        backward(model, x, y)
    handle.remove()
    pre.discard()
    optimizer.zero_grad()
    backward(model, x, y)
    assert pre.state_dict()["step"] == 1


def test_a_forgotten_object_leaves_backward_passes_alone() -> None:
    model, x, y = network()
    BNP(model).attach(torch.optim.SGD(model.parameters(), lr=RATE), before_clipping=True)
    gc.collect()
    backward(model, x, y)
    expected, _, _ = network()
    backward(expected, x, y)
    assert torch.equal(gradient(model), gradient(expected))


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1, timeout=timedelta(seconds=30)
    )
    yield
    dist.destroy_process_group()


def test_averages_over_processes_come_first(one_process: None) -> None:
    """What averages gradients writes them when the pass ends: a bucket of its own is copied over `.grad`."""
    model, x, y = network()
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, halved)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    BNP(wrapped).attach(optimizer, before_clipping=True)
    backward(wrapped, x, y)
    found = gradient(model)
    twin, _, _ = network()
    pre = BNP(twin)
    backward(twin, x, y, 0.5)
    pre.step()
    assert relative(found, gradient(twin)) < 1e-13


def halved(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer() / 2)
    return done


# torch compares the classes, which annotations of this file are not.
halved.__annotations__.update({"bucket": dist.GradBucket, "return": torch.futures.Future[torch.Tensor]})


def test_torchs_wrapper_for_local_steps(one_process: None) -> None:
    from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
    from torch.distributed.optim import PostLocalSGDOptimizer

    model, x, y = network()
    twin, _, _ = network()
    inner = torch.optim.SGD(model.parameters(), lr=RATE)
    wrapped = PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=4))
    BNP(model).attach(wrapped)
    backward(model, x, y)
    wrapped.step()
    stepped(twin, x, y, BNP(twin))
    torch.optim.SGD(twin.parameters(), lr=RATE).step()
    assert relative(parameters(model), parameters(twin)) < 1e-14


class Twice:
    """A wrapper that steps twice on the same gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.step()


@pytest.mark.parametrize("early", [True, False])
def test_a_wrapper_that_steps_twice_on_one_gradient_is_named(early: bool) -> None:
    model, x, y = network()
    optimizer = Twice(torch.optim.SGD(model.parameters(), lr=RATE))
    BNP(model).attach(optimizer, before_clipping=early)  # type: ignore[arg-type]
    backward(model, x, y)
    with pytest.raises(InvalidInputError, match="applied twice"):
        optimizer.step()


def test_a_wrapper_that_ascends_first_is_right() -> None:
    """Sharpness-aware: two backward passes, of which the optimizer steps on the second."""
    model, x, y = network()
    twin, _, _ = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    pre, other = BNP(model).attach(optimizer), BNP(twin)
    for net in (model, twin):
        backward(net, x, y)
        with torch.no_grad():
            for p in net.parameters():
                p.add_(p.grad, alpha=0.01)  # type: ignore[arg-type]
        (pre if net is model else other).discard()
        net.zero_grad()
        backward(net, 2 * x, y)
    optimizer.step()
    other.step()
    assert torch.equal(gradient(model), gradient(twin))


def test_two_optimizers_are_named() -> None:
    model, _, _ = network()
    first, second = model[0], model[2]  # type: ignore[index]
    with pytest.warns(TrainingWarning, match="weights of 2: another one") as seen:
        BNP(model).attach(torch.optim.SGD(first.parameters(), lr=RATE))
    assert seen[0].filename == __file__, "the line to change is the caller's"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BNP(model, include="0").attach(torch.optim.SGD(first.parameters(), lr=RATE))
        second.requires_grad_(False)
        BNP(model).attach(torch.optim.SGD(first.parameters(), lr=RATE))


def test_two_attached_to_one_optimizer_are_refused_at_the_step() -> None:
    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    BNP(model).attach(optimizer)
    BNP(model).attach(optimizer)
    backward(model, x, y)
    with pytest.raises(InvalidInputError, match="another BNP object"):
        optimizer.step()
