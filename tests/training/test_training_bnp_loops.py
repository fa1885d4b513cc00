"""BNP in loops of every sort: one's own, others', accumulated, scaled, clipped, checkpointed, compiled, distributed.

Bugs that only these tests catch: `P P^T` applied twice or to stale gradients where an optimizer gets a closure,
micro-batches that are not one batch, statistics counted again when checkpointing repeats a forward pass, or lost
where the first one ran without gradients, forward passes of an evaluation that leak into the statistics, a scaled
gradient preconditioned to something else than the scaled direction, processes that keep statistics of their own.
"""

from __future__ import annotations

import copy
import faulthandler
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bnp_loops import backward, gradient, loss_of, network, parameters, relative, stepped
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.training.bnp import BNP


def twins(kind: str = "dense", rows: int = 12) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model, x, y = network(kind, rows=rows)
    return model, copy.deepcopy(model), x, y


@pytest.mark.parametrize("kind", ["dense", "padding"])
@pytest.mark.parametrize("sizes", [[6, 6], [1, 3, 8]])
def test_micro_batches_are_one_batch(kind: str, sizes: list[int]) -> None:
    model, twin, x, y = twins(kind)
    pre, other = BNP(model), BNP(twin)
    for _ in range(3):
        _, expected = stepped(model, x, y, pre)
        twin.zero_grad()
        for part, labels in zip(x.split(sizes), y.split(sizes), strict=True):
            backward(twin, part, labels, len(part) / len(x))
        other.step()
        assert relative(gradient(twin), expected) < 1e-12
    assert other.state_dict()["layers"]["0"]["rows"] == pre.state_dict()["layers"]["0"]["rows"]


def own_loop(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    pre, optimizer = BNP(model), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for _ in range(6):
        optimizer.zero_grad()
        backward(model, x, y)
        pre.step()
        optimizer.step()
        schedule.step()
    return parameters(model)


def trainer_like(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A loop that is handed an optimizer and steps it where we do not see it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    BNP(model).attach(optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for _ in range(6):
        backward(model, x, y)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return parameters(model)


def lightning_like(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """A loop whose forward and backward pass happen inside `optimizer.step(closure)`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    BNP(model).attach(optimizer)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    for k in range(6):
        loss = optimizer.step(closure) if k % 2 else optimizer.step(closure=closure)
        assert loss.requires_grad
        schedule.step()
    return parameters(model)


@pytest.mark.parametrize("loop", [trainer_like, lightning_like])
def test_attached_it_is_the_loop_of_ones_own(loop: Any) -> None:
    model, twin, x, y = twins()
    assert torch.equal(loop(twin, x, y), own_loop(model, x, y))


def test_attach_refuses() -> None:
    model, twin, _, _ = twins()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InvalidInputError, match="another model"):
        BNP(model).attach(torch.optim.SGD(twin.parameters(), lr=0.1))
    with pytest.raises(InvalidInputError, match="LBFGS"):
        BNP(model).attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(InvalidInputError, match="torch optimizer"):
        BNP(model).attach(object())  # type: ignore[arg-type]
    pre = BNP(model).attach(sgd)
    with pytest.raises(InvalidInputError, match="already"):
        pre.attach(sgd)


def test_forward_passes_without_gradients_or_in_eval_mode_do_not_count() -> None:
    model, twin, x, y = twins()
    pre, other = BNP(model), BNP(twin)
    for _ in range(2):
        with torch.no_grad():
            model(100 * x)
        model.eval()
        loss_of(model, 100 * x, y)
        model.train()
        assert torch.equal(stepped(model, x, y, pre)[1], stepped(twin, x, y, other)[1])
    with torch.inference_mode():
        model(x)
    assert not pre._pending


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_once(reentrant: bool) -> None:
    model, twin, x, y = twins("padding")
    pre, other = BNP(model), BNP(twin)
    for _ in range(2):
        _, expected = stepped(model, x, y, pre)
        twin.zero_grad()
        h = x.clone().requires_grad_()
        h = checkpoint(twin[:3], h, use_reentrant=reentrant)
        nn.functional.cross_entropy(checkpoint(twin[3], h, use_reentrant=reentrant), y).backward()
        other.step()
        assert torch.equal(gradient(twin), expected)
    assert [e["rows"] for e in other.state_dict()["layers"].values()] == [
        e["rows"] for e in pre.state_dict()["layers"].values()
    ]


class Reused(nn.Module):
    """One layer used twice in a forward pass, once by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(torch.tanh(self.inner(input=x)))


def test_a_layer_used_twice_sees_the_rows_of_both() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Reused().double()
    _, x, y = network()
    pre = BNP(model)
    stepped(model, x, y, pre)
    rows = torch.cat([x, torch.tanh(model.inner(x))]).detach()
    kept = pre.state_dict()["layers"]["inner"]
    assert kept["rows"] == 24
    assert relative(kept["mean"], rows.mean(0)) < 1e-12
    assert relative(kept["variance"], rows.var(0, correction=0)) < 1e-12


@pytest.mark.parametrize("unscale", [True, False])
def test_a_gradient_scaler(unscale: bool) -> None:
    """`P P^T` is linear: before or after `unscale_`; overflowed steps are still recognized and left out."""
    model, twin, x, y = twins()
    sgd, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    pre, second = BNP(model), BNP(twin)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        stepped(model, x, y, pre)
        sgd.step()
        twin.zero_grad()
        scaler.scale(loss_of(twin, x, y)).backward()
        if unscale:
            scaler.unscale_(other)
        second.step()
        scaler.step(other)
        scaler.update()
        assert relative(parameters(twin), parameters(model)) < 1e-12
    before = parameters(twin).clone()
    twin.zero_grad()
    scaler.scale(loss_of(twin, x, y)).backward()
    twin[0].weight.grad[0, 0] = torch.inf
    if unscale:
        scaler.unscale_(other)
    second.step()
    scaler.step(other)
    scaler.update()
    assert torch.equal(parameters(twin), before)
    assert scaler.get_scale() == 512


def test_a_gradient_scaler_in_a_loop_that_only_attach_reaches() -> None:
    """A step that the scaler leaves out is not seen; its rows are pooled with the next."""
    model, x, y = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pre = BNP(model).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, x, y)).backward()
        if bad:
            model[0].bias.grad[0] = torch.nan
        scaler.step(optimizer)
        scaler.update()
    kept = pre.state_dict()
    assert (kept["step"], kept["layers"]["0"]["rows"]) == (1, 24)
    assert bool(torch.isfinite(parameters(model)).all())


def test_autocast_keeps_statistics_in_float32() -> None:
    model, x, y = network()
    model.float()
    pre = BNP(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, x.float(), y)
    loss.backward()
    pre.step()
    kept = pre.state_dict()["layers"]
    assert {e["mean"].dtype for e in kept.values()} == {torch.float32}
    assert relative(kept["0"]["mean"].double(), x.mean(0)) < 1e-6
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_clipping_before_and_after() -> None:
    """Before: the length of the gradient is bounded; after: that of the step. Both are legal, and differ."""
    norms = {}
    for order in ("before", "after"):
        model, x, y = network()
        pre = BNP(model)
        backward(model, x, y)
        if order == "before":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        unclipped = gradient(model).clone()
        pre.step()
        if order == "after":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            assert float(gradient(model).norm()) == pytest.approx(1e-3, rel=1e-3)
        else:
            P = pre.preconditioner()
            assert relative(gradient(model), P.direction(unclipped)) < 1e-12
        norms[order] = float(gradient(model).norm())
    assert norms["before"] != pytest.approx(norms["after"], rel=1e-3)


def test_weight_decay_in_the_optimizer_is_not_preconditioned() -> None:
    """Coupled (SGD): `P P^T g + decay w`; a penalty in the loss: `P P^T (g + decay w)`."""
    model, twin, x, y = twins()
    pre, other = BNP(model), BNP(twin)
    start = parameters(model).clone()
    before, after = stepped(model, x, y, pre)
    torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1).step()
    assert relative(start - parameters(model), after + 0.1 * start) < 1e-12
    (loss_of(twin, x, y) + 0.05 * sum(p.square().sum() for p in twin.parameters())).backward()
    other.step()
    assert relative(gradient(twin), other.preconditioner().direction(before + 0.1 * start)) < 1e-12


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_parameter_groups_and_other_optimizers(make: type[torch.optim.Optimizer]) -> None:
    model, twin, x, y = twins()
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.01}]
    optimizer = make(groups, weight_decay=0.1)  # type: ignore[call-arg]
    pre = BNP(model).attach(optimizer)
    backward(model, x, y)
    optimizer.step()
    backward(twin, x, y)
    direction = pre.preconditioner().direction(gradient(twin))
    assert relative(gradient(model), direction) < 1e-12


@pytest.mark.parametrize("order", ["compiled and run first", "compiled first", "compiled last"])
def test_a_compiled_model(order: str) -> None:
    """The graph breaks at each covered layer; what was compiled before is compiled anew with the hooks."""
    model, twin, x, y = twins()
    graph = torch.compile(twin, backend="eager")
    if order == "compiled and run first":
        graph(x)
    pre, other = BNP(model), BNP(twin if order == "compiled last" else graph)
    twin = graph
    for k in range(5):
        assert relative(stepped(twin, x + k, y, other)[1], stepped(model, x + k, y, pre)[1]) < 1e-12
    assert other.covered == pre.covered == ("0", "2")
    pre.load_state_dict(other.state_dict())
    torch.compiler.reset()


def test_a_compiled_model_cannot_be_one_graph() -> None:
    """Said by torch: the hooks count, outside of graphs."""
    model, _, x, _ = twins()
    pre = BNP(model)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    assert not pre._pending
    torch.compiler.reset()


def test_data_parallel_on_several_devices_is_refused() -> None:
    model, twin, x, y = twins()
    wrapped = nn.DataParallel(model)
    pre, other = BNP(wrapped), BNP(twin)
    assert torch.equal(stepped(wrapped, x, y, pre)[1], stepped(twin, x, y, other)[1]), "one device runs no copies"
    wrapped.device_ids = [0, 1]
    with pytest.raises(InvalidInputError, match="use DistributedDataParallel"):
        BNP(wrapped)


def _join(rank: int, folder: str) -> None:
    """Two processes meet; a hang ends, and says where."""
    faulthandler.dump_traceback_later(100, exit=True)
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))


def _failing_worker(rank: int, folder: str) -> None:
    _join(rank, folder)
    if rank:
        raise ValueError("this rank fails")
    dist.barrier()


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(tmp_path: Path) -> None:
    """No rank waits for one that is gone: the parent hears of it, in bounded time."""
    begin = time.monotonic()
    with pytest.raises(Exception, match=r"this rank fails|Connection|closed by peer|terminated"):
        mp.spawn(_failing_worker, (str(tmp_path),), nprocs=2)
    assert time.monotonic() - begin < 150


def _worker(rank: int, folder: str, sharded: bool) -> None:
    _join(rank, folder)
    torch.manual_seed(0)
    model, x, y = network("padding")
    if sharded:
        mesh = init_device_mesh("cpu", (2,))
        for layer in (model[0], model[3], model):
            parallel = fully_shard(layer, mesh=mesh)
        parts = [slice(rank * 6, rank * 6 + 6)]  # gradients are averaged over processes at each backward pass
    else:
        parallel = DistributedDataParallel(model)
        parts = [slice(rank * 6, rank * 6 + 2), slice(rank * 6 + 2, rank * 6 + 6)]
    pre, optimizer = BNP(parallel), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        for i, part in enumerate(parts):
            last = i == len(parts) - 1
            with nullcontext() if last else parallel.no_sync():
                backward(parallel, x[part], y[part], len(x[part]) / 6)
        pre.step()
        optimizer.step()
    whole = [p.full_tensor() if sharded else p for p in model.parameters()]
    flat = torch.cat([p.detach().flatten() for p in whole])
    torch.save({"parameters": flat, "state": pre.state_dict()}, f"{folder}/{rank}.pt")
    dist.barrier()  # neither leaves while the other still talks to it
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_two_processes_are_one(tmp_path: Path, sharded: bool) -> None:
    mp.spawn(_worker, (str(tmp_path), sharded), nprocs=2)
    model, x, y = network("padding")
    pre, optimizer = BNP(model), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        stepped(model, x, y, pre)
        optimizer.step()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert relative(found["parameters"], parameters(model)) < 1e-12
        assert found["state"]["layers"]["0"]["rows"] == pre.state_dict()["layers"]["0"]["rows"]
        pre.load_state_dict(found["state"])


class Recurrent(nn.Module):
    """Two recurrent layers on packed sequences, and a dense one."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, lengths: list[int]) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(out.sum(1))


def _recurrent(wrap: Callable[[nn.Module], nn.Module], part: slice) -> Tensor:
    """The parameters after three steps on a part of the sequences."""
    x = torch.randn(8, 4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, lengths = torch.arange(8) % 3, [4, 3, 4, 1, 2, 4, 4, 2]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Recurrent().double()
    outer = wrap(model)
    pre, optimizer = BNP(outer), torch.optim.SGD(model.parameters(), lr=0.1)
    assert len(pre.covered) == 9
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(outer(x[part], lengths[part]), y[part]).backward()
        pre.step()
        optimizer.step()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in whole])


def _recurrent_worker(rank: int, folder: str) -> None:
    _join(rank, folder)
    mesh, part = init_device_mesh("cpu", (2,)), slice(rank * 4, rank * 4 + 4)

    def sharded(model: Any) -> nn.Module:
        fully_shard(model.rnn, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    found = [_recurrent(wrap, part) for wrap in (DistributedDataParallel, sharded)]
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_recurrent_layers_in_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """Replicated, and sharded by a wrapper of their own, which takes weights away behind the forward pass."""
    mp.spawn(_recurrent_worker, (str(tmp_path),), nprocs=2)
    expected = _recurrent(lambda model: model, slice(None))
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            assert relative(found, expected) < 1e-12


def test_parts_of_units_are_refused(tmp_path: Path) -> None:
    """A layer split by its inputs sees no whole rows; a measurement needs whole parameters."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x, y = network()
        mesh = init_device_mesh("cpu", (1,))
        model = parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        with pytest.raises(InvalidInputError, match=r"layer '2' is sharded as .*exclude="):
            BNP(model)
        with pytest.raises(InvalidInputError, match="sharded"):
            bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    finally:
        dist.destroy_process_group()
