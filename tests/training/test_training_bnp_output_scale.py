"""Output scales while training: an estimate from squared gradients, the same for every way to run a step.

Bugs that only these tests catch: squares of summed gradients for summed squares, rows of a convolution dealt to the
wrong unit, a step that is scaled by another `s` than the `P` that is reported, an estimate that depends on a gradient
scaler or on how a batch was split, one that an overflow destroys, one that activation checkpointing counts twice, a
state that forgets it.
"""

from __future__ import annotations

import copy

import pytest
import torch
from bnp_loops import backward, gradient, loss_of, network, relative, stepped
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.training.bnp import BNP

EPS1 = 1e-2


def sums_of_squares(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    """`sum_r (dL/da_ir)^2` of each covered layer, by `autograd.grad` at outputs that were kept."""
    kept: list[Tensor] = []
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    handles = [m.register_forward_hook(lambda module, args, out: kept.append(out)) for m in layers]
    loss = loss_of(model, x, y)
    for handle in handles:
        handle.remove()
    found = []
    for layer, g in zip(layers, torch.autograd.grad(loss, kept), strict=True):
        axis = -1 if isinstance(layer, nn.Linear) else 1
        found.append(g.movedim(axis, -1).flatten(0, -2).square().sum(0))
    return found


@pytest.mark.parametrize("kind", ["dense", "sequence", "padding", "groups", "1d"])
def test_it_is_the_average_of_the_relative_squares(kind: str) -> None:
    model, x, y = network(kind)
    pre = BNP(model, output_scale="estimated", rho=0.9)
    past = None
    for k in range(3):
        own = sums_of_squares(model, x + k, y)
        pre._forget()
        before, after = stepped(model, x + k, y, pre)
        flat = torch.cat(own)
        past = flat / flat.mean() if past is None else past + (flat / flat.mean() - past) * (0.1 / (1 - 0.9 ** (k + 1)))
    P = pre.preconditioner()
    expected = (past + EPS1).sqrt()
    assert relative(torch.cat(list(P.output_scales.values())), expected) < 1e-12
    dense = P.to_dense()
    assert relative(after, dense @ (dense.T @ before)) < 1e-12


def test_the_scale_of_the_loss_drops_out() -> None:
    model, x, y = network()
    found = []
    for factor in (1.0, 1024.0):
        twin = copy.deepcopy(model)
        pre = BNP(twin, output_scale="estimated")
        backward(twin, x, y, factor)
        pre.step()
        found.append(gradient(twin) / factor)
    assert relative(found[1], found[0]) < 1e-13


@pytest.mark.parametrize("kind", ["dense", "padding"])
def test_micro_batches_are_one_batch(kind: str) -> None:
    model, x, y = network(kind)
    twin = copy.deepcopy(model)
    pre, other = (BNP(m, output_scale="estimated") for m in (model, twin))
    _, expected = stepped(model, x, y, pre)
    for part, labels in zip(x.split([1, 3, 8]), y.split([1, 3, 8]), strict=True):
        backward(twin, part, labels, len(part) / len(x))
    other.step()
    assert relative(gradient(twin), expected) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_once(reentrant: bool) -> None:
    model, x, y = network("padding")
    twin = copy.deepcopy(model)
    pre, other = (BNP(m, output_scale="estimated") for m in (model, twin))
    _, expected = stepped(model, x, y, pre)
    h = checkpoint(twin[:3], x.clone().requires_grad_(), use_reentrant=reentrant)
    nn.functional.cross_entropy(checkpoint(twin[3], h, use_reentrant=reentrant), y).backward()
    other.step()
    assert relative(gradient(twin), expected) < 1e-13


def test_a_compiled_model() -> None:
    model, x, y = network()
    twin = copy.deepcopy(model)
    pre, other = (BNP(m, output_scale="estimated") for m in (model, twin))
    graph = torch.compile(twin, backend="eager")
    for k in range(3):
        assert relative(stepped(graph, x + k, y, other)[1], stepped(model, x + k, y, pre)[1]) < 1e-12
    torch.compiler.reset()


@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 0.0])
def test_gradients_that_say_nothing_leave_the_estimate(bad: float) -> None:
    model, x, y = network()
    pre = BNP(model, output_scale="estimated")
    stepped(model, x, y, pre)
    before = pre.preconditioner().output_scales["0"]
    model.zero_grad()
    (bad * loss_of(model, x, y)).backward()
    pre.step()
    torch.testing.assert_close(pre.preconditioner().output_scales["0"], before, rtol=1e-14, atol=0)
    stepped(model, x, y, pre)
    assert bool(torch.isfinite(gradient(model)).all())


def test_gradients_written_by_hand_leave_the_estimate() -> None:
    """Nothing passed through the outputs: at first every scale is one, later what it was."""
    model, x, y = network()
    twin = copy.deepcopy(model)
    pre, plain = BNP(model, output_scale="estimated"), BNP(twin)

    def by_hand(m: nn.Module, own: BNP) -> Tensor:
        with torch.no_grad():
            m.zero_grad()
        m(x)
        for k, p in enumerate(m.parameters()):
            p.grad = torch.ones_like(p) + k
        own.step()
        return gradient(m)

    assert torch.equal(by_hand(model, pre), by_hand(twin, plain))
    stepped(model, x, y, pre)
    before = {n: e["output_squares"].clone() for n, e in pre.state_dict()["layers"].items()}
    by_hand(model, pre)
    for name, entry in pre.state_dict()["layers"].items():
        assert torch.equal(entry["output_squares"], before[name])
    assert float((before["0"] - 1).abs().max()) > 0.1


def test_a_dead_unit_gets_the_damping_alone() -> None:
    model, x, y = network()
    model[1] = nn.ReLU()
    with torch.no_grad():
        model[0].bias[1] = -100.0
    pre = BNP(model, output_scale="estimated")
    before, after = stepped(model, x, y, pre)
    assert float(pre.preconditioner().output_scales["0"][1]) == pytest.approx(EPS1**0.5)
    assert float(after.norm() / before.norm()) < 1e4
    off = BNP(model, output_scale="estimated", eps1=0, eps2=0)
    stepped(model, x, y, off)
    assert float(off.preconditioner().output_scales["0"][1]) == 1.0


def test_a_resumed_run_and_a_copy_go_on() -> None:
    model, x, y = network("padding")
    pre = BNP(model, output_scale="estimated")
    for k in range(2):
        stepped(model, x + k, y, pre)
    twin, other = copy.deepcopy((model, pre))
    again, third = copy.deepcopy(model), None
    third = BNP(again, output_scale="estimated")
    third.load_state_dict(pre.state_dict())
    expected = stepped(model, x - 1, y, pre)[1]
    assert torch.equal(stepped(twin, x - 1, y, other)[1], expected)
    assert torch.equal(stepped(again, x - 1, y, third)[1], expected)
    plain = BNP(copy.deepcopy(model))
    with pytest.raises(InvalidInputError, match="without output_scale='estimated'"):
        third.load_state_dict(plain.state_dict())


def test_hooks_go_and_copies_have_none() -> None:
    model, x, y = network()
    with BNP(model, output_scale="estimated") as pre:
        twin = copy.deepcopy(model)
        loss_of(twin, x, y).backward()
        assert not pre._outputs._sums
        bnp.bnp_preconditioner(bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y)), output_scale=True)
        assert not pre._outputs._sums
    assert not any(m._forward_hooks for m in model.modules())


def test_exact_scales_are_pointed_to() -> None:
    with pytest.raises(InvalidInputError, match=r"one of none, estimated, got True; exact .* bnp_preconditioner"):
        BNP(nn.Linear(2, 2), output_scale=True)  # type: ignore[arg-type]
