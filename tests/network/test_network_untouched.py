"""Catches: a measurement that leaves a trace (buffers of BatchNorm, gradients, train flags, random states, generators
of loaders, the caller's data), and a risk that is not a snapshot of the model, the loss and the data."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from network_models import classes, classify, drawn, mlp, numbers, split, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset

import bnp_analysis as bnp
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.errors import BNPAnalysisError
from bnp_analysis.network import coverage, layer_moments, layer_rows
from bnp_analysis.network.snapshot import fingerprint

State = dict[str, Any]


def state_of(model: nn.Module) -> State:
    """Everything a measurement might touch, as values."""
    return {
        "parameters": {n: (p.detach().clone(), id(p), p._version) for n, p in model.named_parameters()},
        "buffers": {n: (b.clone(), id(b), b._version) for n, b in model.named_buffers()},
        "gradients": {n: None if p.grad is None else (p.grad.clone(), id(p.grad)) for n, p in model.named_parameters()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "hooks": {n: len(m._forward_hooks) + len(m._forward_pre_hooks) for n, m in model.named_modules()},
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),  # noqa: NPY002
        "grad": torch.is_grad_enabled(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, np.ndarray):
        return bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def trained(norm: str = "batch") -> nn.Module:
    """A model in the middle of training: gradients, some frozen, mixed train flags, filled statistics."""
    model = drawn(lambda: bnp.models.mlp([4, 5, 5, 3], activation="tanh", norm=norm))
    x, y = table()
    model(x)
    F.cross_entropy(model(x), y).backward()
    model.fc2.weight.requires_grad_(False)
    model.fc3.bias.grad = None
    model.act1.eval()
    return model


OPERATIONS: dict[str, Callable[[bnp.EmpiricalRisk], Any]] = {
    "value": lambda r: (r.value, r(r.theta), r.outputs),
    "gradient": lambda r: r.gradient,
    "hessian": lambda r: bnp.hessian(r) @ r.theta,
    "gauss_newton": lambda r: bnp.gauss_newton(r).to_dense(),
    "factor": lambda r: bnp.gauss_newton(r).factor.to_dense(),
    "fisher": lambda r: (bnp.fisher(r).to_dense(), bnp.fisher(r, "empirical").to_dense()),
    "block": lambda r: (bnp.hessian(r, block="fc1").to_dense(), bnp.hessian(r, block=("fc1", 0)).to_dense()),
    "layers": lambda r: (coverage(r), layer_moments(r), layer_rows(r), unit_blocks(r, coverage(r))),
    "preconditioner": lambda r: bnp.bnp_preconditioner(r).direction(r.gradient),
    "another point": lambda r: (r.at(r.theta + 1).gradient, r.restrict(["fc1.weight"]).gradient),
    "another dtype": lambda r: bnp.hessian(r.to(torch.float32)) @ r.theta.float(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_measurement_changes_nothing(operation: str) -> None:
    """`num_batches_tracked` and the running statistics of BatchNorm move with every forward pass in training mode."""
    model = trained()
    x, y = table()
    given = x.clone(), y.clone()
    before = state_of(model)
    risk = classify(model, (x, y))
    assert same(state_of(model), before)
    OPERATIONS[operation](risk)
    after = state_of(model)
    assert [part for part in before if not same(before[part], after[part])] == []
    assert torch.equal(x, given[0])
    assert torch.equal(y, given[1])
    first, second = OPERATIONS[operation](risk), OPERATIONS[operation](risk)
    if isinstance(first, Tensor):
        assert torch.equal(first, second)  # nor does it change the snapshot


class Slowing(nn.Module):
    """Its output depends on how often it has run, which a buffer counts."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.fc(x) / self.runs


@pytest.mark.parametrize(
    "make", [Slowing, lambda: nn.utils.spectral_norm(nn.Linear(4, 3))], ids=["counter", "power iteration"]
)
def test_every_pass_begins_with_the_buffers_of_the_snapshot(make: Callable[[], nn.Module]) -> None:
    """Running statistics have no say in training mode; these buffers do."""
    model = drawn(make)
    before = state_of(model)
    # A power iteration is a function of the weight, and has no derivative by it.
    risk = classify(model, table(), derivatives="surrogate")
    expected = F.cross_entropy(model(table()[0]), table()[1])
    for _ in range(3):
        torch.testing.assert_close(risk(risk.theta), expected.detach(), rtol=1e-12, atol=0)
    for name in ("gradient", "hessian", "gauss_newton", "layers"):
        OPERATIONS[name](risk)
    torch.testing.assert_close(risk(risk.theta), expected.detach(), rtol=1e-12, atol=0)
    model.load_state_dict({n: t for n, (t, *_) in (before["parameters"] | before["buffers"]).items()})
    assert torch.equal(risk.at(model.state_dict()).value, risk.value)


def loaders() -> dict[str, Callable[[torch.Generator], DataLoader[Any]]]:
    data = TensorDataset(*table(10))
    return {
        "in order": lambda g: DataLoader(data, batch_size=4),
        "shuffled": lambda g: DataLoader(data, batch_size=4, shuffle=True),
        "shuffled by a generator": lambda g: DataLoader(data, batch_size=4, shuffle=True, generator=g),
        "a sampler's generator": lambda g: DataLoader(data, batch_size=4, sampler=RandomSampler(data, generator=g)),
        "a batch sampler's generator": lambda g: DataLoader(
            data, batch_sampler=BatchSampler(RandomSampler(data, generator=g), 4, False)
        ),
    }


@pytest.mark.parametrize("kind", loaders())
def test_reading_a_loader_draws_nothing(kind: str) -> None:
    """Neither from the global generators nor from the loader's own: the next epoch is what it would have been."""
    torch.manual_seed(3)
    g = torch.Generator().manual_seed(4)
    model, loader = trained("layer"), loaders()[kind](g)
    before, own = state_of(model), g.get_state()
    risk = classify(model, loader)
    for operation in ("value", "gradient", "hessian", "gauss_newton", "layers"):
        OPERATIONS[operation](risk)
        assert same(state_of(model), before), operation
        assert torch.equal(g.get_state(), own), operation


def test_accelerators_are_not_reseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` seeds every accelerator too, and nothing brings those states back."""
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    loader = loaders()["shuffled"](torch.Generator())
    OPERATIONS["hessian"](classify(trained("layer"), loader))
    assert not seeded


class FailsLate(Dataset[Any]):
    """Its third batch is broken, or is from the second pass on."""

    def __init__(self, passes: int) -> None:
        self.reads, self.passes = 0, passes

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.reads += 1
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        x = numbers(4, seed=index)
        return (x * float("nan") if self.reads > 10 * self.passes + 8 else x), torch.tensor(index % 3)


@pytest.mark.parametrize("passes", [0, 1, 2, 4])
def test_failures_leave_nothing_either(passes: int) -> None:
    """Errors in the middle of a pass: states come back before the error is seen."""
    model = trained("layer")
    before = state_of(model)
    loader = DataLoader(FailsLate(passes), batch_size=3)

    def measure() -> None:
        risk = classify(model, loader)
        for _ in range(6):
            risk(risk.theta)

    with pytest.raises(BNPAnalysisError) as caught:
        measure()
    after = state_of(model)
    assert [part for part in before if not same(before[part], after[part])] == []
    assert caught.value is not None  # its traceback, with the frames of the pass, is still alive


class Noisy(nn.Module):
    """Random by way of Python and NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * random.random() + np.random.rand()  # noqa: NPY002


@pytest.mark.parametrize("make", [Noisy, lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))])
def test_looking_for_randomness_restores_every_state(make: Callable[[], nn.Module]) -> None:
    model = drawn(make)
    before = state_of(model)
    with pytest.raises(BNPAnalysisError, match="random"):
        classify(model, table())
    after = state_of(model)
    assert [part for part in before if not same(before[part], after[part])] == []


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x -= x.mean(dim=1, keepdim=True)
        return self.fc(x.mul_(2))


class Stored:
    """Gives the caller's own tensors in every pass."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.batches)


@pytest.mark.parametrize("wrap", [list, Stored])
def test_a_model_that_writes_into_its_input(wrap: Callable[[Any], Any]) -> None:
    """Every pass must see the data as they were given, and so must the caller afterwards."""
    x, y = table()
    kept = x.clone()
    model = drawn(WritesIntoItsInput)
    batches = split(x, y, (5, 4))
    risk = classify(model, wrap(batches))
    expected = F.cross_entropy(model(kept.clone()), y)
    for _ in range(2):
        torch.testing.assert_close(risk(risk.theta), expected.detach())
    bnp.hessian(risk) @ risk.theta
    assert torch.equal(x, kept)


# snapshots


def measured(risk: bnp.EmpiricalRisk) -> list[Tensor]:
    return [
        risk(risk.theta),
        risk.at(risk.theta).gradient,
        bnp.hessian(risk).to_dense(),
        bnp.gauss_newton(risk).to_dense(),
    ]


def test_later_training_changes_nothing() -> None:
    for norm, train in (("batch", True), ("batch", False), ("layer", True)):
        model = trained(norm).train(train)
        x, y = table()
        risk = classify(model, (x, y))
        operator = bnp.hessian(risk)
        before, product = measured(risk), operator @ risk.theta
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(3):
            F.cross_entropy(model.train()(x), y).backward()
            optimizer.step()
        model.requires_grad_(False).eval().float()
        assert all(torch.equal(a, b) for a, b in zip(measured(risk), before, strict=True))
        assert torch.equal(operator @ risk.theta, product)


def test_the_callers_tensors_may_change_afterwards() -> None:
    x, y = table()
    theta = drawn(mlp, seed=5).fc1.weight.new_ones(43)
    w = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    for loss in (nn.CrossEntropyLoss(weight=w), functools.partial(F.cross_entropy, weight=w)):
        risk = bnp.EmpiricalRisk(mlp(), loss, (x, y), at=theta)
        before = measured(risk)
        for t in (x, theta, w):
            t.mul_(3).add_(1)
        y.zero_()
        risk.gradient.zero_()
        risk.value.zero_()
        assert all(torch.equal(a, b) for a, b in zip(measured(risk), before, strict=True))
        assert torch.equal(risk.value, before[0])
        assert torch.equal(risk.gradient, before[1])


def test_a_loss_in_another_dtype_follows_the_risk() -> None:
    """Class weights in float32 and outputs in float64 do not mix in torch."""
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]))
    risk = bnp.EmpiricalRisk(mlp(), loss, table())
    assert risk.value.dtype == torch.float64
    assert risk.to(torch.float32).value.dtype == torch.float32
    assert loss.weight.dtype == torch.float32
    part = functools.partial(F.cross_entropy, weight=torch.tensor([1.0, 2.0, 0.5]))
    assert torch.equal(bnp.EmpiricalRisk(mlp(), part, table()).value, risk.value)


def test_a_state_that_is_loaded_is_copied() -> None:
    model = trained()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    risk = classify(trained(), table(), at=state)
    before = measured(risk)
    for t in state.values():
        t.add_(1)
    assert all(torch.equal(a, b) for a, b in zip(measured(risk), before, strict=True))


def test_points_of_one_risk_do_not_share() -> None:
    risk = classify(trained().eval(), table())
    state = risk._model.state_dict() | {"norm1.running_mean": numbers(5, seed=9)}
    before = measured(risk)
    moved = risk.at({n: t + 0.1 if t.is_floating_point() else t for n, t in state.items()})
    assert float((moved.value - risk.value).abs()) > 1e-3
    assert all(torch.equal(a, b) for a, b in zip(measured(risk), before, strict=True))


def test_a_model_with_a_gradient_in_its_graph_can_be_measured() -> None:
    """Gradients that carry a graph cannot be copied: they are set aside, and put back."""
    model = mlp()
    x, y = table()
    loss = F.cross_entropy(model(x), y)
    loss.backward(create_graph=True)
    kept = [p.grad for p in model.parameters()]
    assert classify(model, (x, y)).value.item() == pytest.approx(loss.item())
    assert all(p.grad is g for p, g in zip(model.parameters(), kept, strict=True))
    for p in model.parameters():
        p.grad = None


@pytest.mark.parametrize("kind", ["features", "power iteration"])
def test_a_model_that_keeps_tensors_with_a_history(kind: str) -> None:
    """Features for later, or a weight that a hook computes: such tensors cannot be copied as they are."""
    model = mlp()
    if kind == "power iteration":
        nn.utils.spectral_norm(model.fc1)
    out = model(table()[0])
    if kind == "features":
        model.fc1.kept = out
    kept = model.fc1.kept if kind == "features" else model.fc1.weight
    before = state_of(model)
    risk = classify(model.eval(), table())
    assert risk.value.item() == pytest.approx(F.cross_entropy(model(table()[0]), table()[1]).item(), rel=1e-12)
    after = state_of(model.train())
    assert [part for part in before if not same(before[part], after[part])] == []
    assert kept is (model.fc1.kept if kind == "features" else kept)
    assert kept.grad_fn is not None


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda m: setattr(m, "lock", threading.Lock()), r"cannot be copied \(.*lock.*kept apart"),
        (lambda m: m.append(nn.LazyLinear(3)), "lazy layers without a shape: run one forward pass"),
        (lambda m: m.append(torch.jit.script(nn.Tanh())) and None, "none"),
    ],
    ids=["lock", "lazy", "scripted part"],
)
def test_models_that_cannot_be_copied(spoil: Callable[[nn.Sequential], Any], match: str) -> None:
    model = mlp()
    model.fc1.weight.grad = torch.ones_like(model.fc1.weight)
    spoil(model)
    if match == "none":
        assert classify(model, table()).space.dim == 43
    else:
        with pytest.raises(BNPAnalysisError, match=match):
            classify(model, table())
    assert torch.equal(model.fc1.weight.grad, torch.ones_like(model.fc1.weight))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_models_are_refused() -> None:
    with pytest.raises(BNPAnalysisError, match=r"give the nn\.Module it was made from"):
        classify(torch.jit.script(mlp()), table())


def test_a_place_for_a_part_may_be_empty() -> None:
    model = mlp()
    model.fc1.register_module("norm", None)
    assert torch.equal(classify(model, table()).gradient, classify(mlp(), table()).gradient)


def test_sparse_gradients_become_dense_ones() -> None:
    make = lambda sparse: nn.Sequential(nn.Embedding(6, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))  # noqa: E731
    data = (classes(5, 6, 2), classes(5, 3))
    sparse, dense = (classify(drawn(lambda s=s: make(s)), data) for s in (True, False))
    assert torch.equal(sparse.gradient, dense.gradient)
    assert torch.equal(bnp.hessian(sparse).to_dense(), bnp.hessian(dense).to_dense())


def test_data_of_another_kind_are_copied_too() -> None:
    x, y = numbers(6, 4, dtype=torch.float32), classes(6, 3)
    risk = classify(mlp(), (x, y))
    before = risk.value
    x.zero_()
    assert torch.equal(risk(risk.theta), before)


def test_what_processes_compare_of_a_loss() -> None:
    """Each of these is another loss, to every other one and not to itself."""
    losses = [
        lambda: F.cross_entropy,
        lambda: F.mse_loss,
        nn.CrossEntropyLoss,
        lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
        lambda: nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0])),
        lambda: functools.partial(F.cross_entropy, label_smoothing=0.1),
        lambda: functools.partial(F.cross_entropy, label_smoothing=0.2),
        lambda: functools.partial(F.cross_entropy, weight=torch.tensor([1.0, 2.0, 1.0])),
        lambda: functools.partial(F.mse_loss, label_smoothing=0.1),
    ]
    found = [[fingerprint(nn.Linear(2, 3), make(), torch.zeros(9))["the loss"] for make in losses] for _ in range(2)]
    assert found[0] == found[1]
    assert len(set(found[0])) == len(losses)
