"""The reference trainer: an update that is not the hand-written one, an order that depends on global random numbers, a
wrong mean over unequal batches, divergence that goes unnoticed or keeps a bad state, probes that change the run, and a
preconditioner that is asked at the wrong moment are caught here."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, MemoryLimitError, NonFiniteError
from bnp_analysis.training.probes import ConditionProbe, Every
from bnp_analysis.training.run import Run
from bnp_analysis.training.trainer import train


def data(n: int = 50) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, generator=g, dtype=torch.float64)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def network(*, dropout: float = 0.0) -> torch.nn.Module:
    model = bnp.models.mlp([4, 6, 3], norm="batch", dtype=torch.float64, seed=2)
    model.add_module("drop", torch.nn.Dropout(dropout))
    return model


def sgd(model: torch.nn.Module, lr: float = 0.1, **options) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


class Doubled:
    """A preconditioner that doubles gradients and notes when it was asked."""

    def __init__(self, model: torch.nn.Module, bad_at: int = -1) -> None:
        self.model, self.calls, self.bad_at = model, 0, bad_at

    def step(self) -> None:
        if self.calls == self.bad_at:
            raise NonFiniteError("layer fc1 has infinite statistics")
        self.calls += 1
        for p in self.model.parameters():
            p.grad *= 2

    def state_dict(self) -> dict:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict) -> None:
        self.calls = state["calls"]


def test_steps_order_rates_and_epoch_means_are_the_hand_written_ones():
    x, y = data()
    model, twin = network(), network()
    pre = Doubled(model)
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    options = {"preconditioner": pre, "scheduler": schedule, "epochs": 2, "batch_size": 16, "seed": 3}
    run = train(model, F.cross_entropy, (x, y), optimizer, **options)
    order = torch.Generator().manual_seed(3)
    losses, means = [], []
    for epoch in range(2):
        total = 0.0
        for rows in torch.randperm(50, generator=order).split(16):
            loss = F.cross_entropy(twin(x[rows]), y[rows])
            grads = torch.autograd.grad(loss, list(twin.parameters()))
            losses.append(loss.item())
            total += loss.item() * len(rows)
            with torch.no_grad():
                for p, g in zip(twin.parameters(), grads, strict=True):
                    p.sub_(0.1 * 0.5**epoch * 2 * g)
        means.append(total / 50)
    for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert run.loss == pytest.approx(losses, rel=1e-10)
    assert [row["train_loss"] for row in run.epochs] == pytest.approx(means, rel=1e-10)
    assert run.lr.tolist() == [0.1] * 4 + [0.05] * 4
    assert pre.calls == 8


@pytest.mark.parametrize("make", [lambda pair: pair, lambda pair: torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(*pair), batch_size=10, shuffle=True)])  # fmt: skip
def test_the_seed_alone_decides_and_nothing_global_is_changed(make):
    size = {"batch_size": 10} if isinstance(make(data()), tuple) else {}
    found = []
    for seed, disturbance in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(disturbance)
        model = network(dropout=0.5).eval()
        model.norm1.train()
        state = torch.get_rng_state()
        found.append(train(model, F.cross_entropy, make(data()), sgd(model), epochs=2, seed=seed, **size))
        assert torch.equal(state, torch.get_rng_state())
        assert [m.training for m in (model, model.fc1, model.norm1)] == [False, False, True]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_batch_size_one_tuples_and_dicts():
    class Both(torch.nn.Linear):
        def forward(self, a, b):
            return super().forward(a + b)

    x, y = data(6)
    model = Both(4, 3, dtype=torch.float64)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    runs = []
    for pack in (lambda t: (t, t), lambda t: {"a": t, "b": t}):
        model.load_state_dict(initial)
        loader = [(pack(a), b) for a, b in zip(x.split(1), y.split(1), strict=True)]
        runs.append(train(model, F.cross_entropy, loader, sgd(model), epochs=2, eval_data=loader))
    assert runs[0] == runs[1]
    assert len(runs[0].loss) == 12


def test_evaluation_weighs_examples_and_uses_evaluation_mode():
    x, y = data()
    model = network(dropout=0.5)
    loader = [(x[:7], y[:7]), (x[7:], y[7:])]
    run = train(model, F.cross_entropy, (x, y), sgd(model), epochs=1, eval_data=loader)
    model.eval()
    with torch.no_grad():
        output = model(x)
    assert run.final["eval_loss"] == pytest.approx(F.cross_entropy(output, y).item(), rel=1e-10)
    assert run.final["accuracy"] == (output.argmax(1) == y).double().mean().item()
    assert run.records()[0].keys() >= {"epoch", "train_loss", "eval_loss", "accuracy", "seconds"}


def test_divergence_stops_with_the_last_good_state(tmp_path):
    x, y = data()
    model = torch.nn.Linear(4, 3, dtype=torch.float64)

    def loss(output, target):
        return (output**2).mean() * 1e3 + F.cross_entropy(output, target)

    log, file = tmp_path / "log.jsonl", tmp_path / "run.pt"
    optimizer = sgd(model, lr=1.0)
    call = {"epochs": 99, "batch_size": 25, "log": log, "checkpoint": file}
    run = train(model, loss, (x, y), optimizer, **call)
    assert run.stopped == "diverged"
    assert not run.finished
    assert not math.isfinite(run.loss[-1])
    assert all(math.isfinite(value) for value in run.loss[:-1])
    assert f"step {len(run.loss)}, learning rate 1;" in run.message
    good = (len(run.loss) - 1) // 50 * 50
    assert f"after {good} steps" in run.message
    assert all(p.isfinite().all() for p in model.parameters())
    assert loss(model(x), y).isfinite()
    saved = torch.load(file, weights_only=True)
    assert all(torch.equal(a, b) for a, b in zip(saved["model"].values(), model.state_dict().values(), strict=True))
    assert [json.loads(line)["kind"] for line in log.read_text().splitlines()][-1] == "end"
    with pytest.raises(InvalidInputError, match=r"diverged.*lower learning rate"):
        train(model, loss, (x, y), sgd(model, lr=1.0), **call)


def test_what_a_preconditioner_cannot_use_is_divergence_too():
    model = network()
    run = train(model, F.cross_entropy, data(), sgd(model), preconditioner=Doubled(model, bad_at=5), batch_size=10)
    assert run.stopped == "diverged"
    assert "layer fc1 has infinite statistics at step 6" in run.message


def test_probes_are_called_when_due_and_change_nothing(tmp_path):
    def greedy(step: int, model: torch.nn.Module) -> dict:
        torch.rand(step + 1)
        assert not model.training
        return {"value": torch.tensor(float("inf"))}

    runs = []
    for probes in ([], [Every(4, greedy), ConditionProbe("fc1", 5, data(20))]):
        model = network(dropout=0.5)
        log = tmp_path / "log.jsonl"
        runs.append(train(model, F.cross_entropy, data(), sgd(model), epochs=2, batch_size=10, probes=probes, log=log))
    assert runs[0].loss.tolist() == runs[1].loss.tolist()
    assert runs[0].epochs == runs[1].epochs
    found = [(row["probe"], row["step"]) for row in runs[1].probes]
    assert [step for name, step in found if name == "greedy"] == [0, 4, 8]
    assert [step for name, step in found if name == "condition of fc1"] == [0, 5, 10]
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [e["kind"] for e in entries].count("step") == 10
    assert [e["value"] for e in entries if e.get("probe") == "greedy"] == ["inf"] * 3
    assert Run.load(runs[1].save(tmp_path / "run.json")) == runs[1]


def test_the_condition_probe_measures_what_a_direct_measurement_gives():
    model = bnp.models.mlp([4, 6, 3], seed=2, activation="tanh")
    x, y = data(40)
    model.fc1(x.float())
    found = ConditionProbe("fc2", 1, (x, y), F.cross_entropy)(0, model)
    risk = bnp.EmpiricalRisk(model, F.cross_entropy, (x, y), dtype=torch.float64)
    null = bnp.null_directions(risk, block="fc2")
    A, P = bnp.gauss_newton(risk, block="fc2"), bnp.bnp_preconditioner(risk).block("fc2")
    assert found["condition"] == bnp.condition_number(A, null=null).value
    assert found["condition_with_p"] == bnp.condition_number(A, preconditioner=P, null=null).value
    assert found["condition_with_p"] < found["condition"]

    with pytest.raises(InvalidInputError, match="needs loss= outside of a training run"):
        ConditionProbe("fc2", 1, (x, y))(0, model)

    class Trained:
        def preconditioner(self):
            return bnp.identity_preconditioner(bnp.EmpiricalRisk(model, F.cross_entropy, (x.float(), y)))

    bound = ConditionProbe("fc2", 1, (x, y)).bind(F.cross_entropy, Trained())
    assert bound(0, model)["preconditioner"] == "exact"
    assert bound(1, model)["preconditioner"] == "trained"
    assert bound(1, model)["condition_with_p"] == pytest.approx(found["condition"])


def test_a_probe_measures_without_null_directions_where_memory_has_no_room_for_them(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryLimitError("too many")

    model = bnp.models.mlp([4, 3], seed=2, dtype=torch.float64)
    A = bnp.gauss_newton(bnp.EmpiricalRisk(model, F.cross_entropy, data(40)), block="fc1")
    monkeypatch.setattr("bnp_analysis.training.probes.null_directions", refuse)
    found = ConditionProbe("fc1", 1, data(40), F.cross_entropy)(0, model)
    assert found["condition"] == bnp.condition_number(A).value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": -1}, "epochs=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"loader": iter([])}, "cannot be read again"),
        ({"loader": []}, "no batch"),
        ({"loader": [(1, 2)]}, "no input tensor"),
        ({"loader": [data()], "batch_size": 3}, "a loader has its own"),
        ({"loader": 3}, "iterable of such batches, not int"),
        ({"loader": {"x": data()}}, "iterable of such batches, not dict"),
        ({"loader": data()[0]}, "iterable of such batches, not Tensor"),
        ({"loader": "digits"}, "iterable of such batches, not str"),
        ({"loader": (data()[0][:4], data()[1])}, "on 4 inputs and 50 targets do not fit"),
        ({"loader": (data()[0][:0], data()[1][:0])}, "on 0 inputs and 0 targets do not fit"),
        ({"eval_data": []}, "evaluation data have no example"),
        ({"probes": ["fc1"]}, "probes must be functions .*, not 'fc1'"),
        ({"loader": torch.utils.data.TensorDataset(*data())}, "DataLoader"),
        ({"loss": lambda output, y: output}, "scalar"),
        ({"loss": lambda output, y: output.detach().mean()}, "depends on the parameters"),
        ({"schedule_by": "minute"}, "minute"),
        ({"probes": [Every(0, lambda step, model: {})]}, "every"),
    ],
)
def test_bad_input_is_refused(change, message):
    model = network()
    call = {"loss": F.cross_entropy, "loader": data()} | change
    with pytest.raises(InvalidInputError, match=message):
        train(model, call.pop("loss"), call.pop("loader"), sgd(model), **call)


def test_a_sampler_that_shuffles_by_the_epoch_is_told_which_one_begins() -> None:
    class Rotated(torch.utils.data.Sampler):
        epochs: tuple[int, ...] = ()

        def set_epoch(self, epoch: int) -> None:
            self.epochs += (epoch,)

        def __iter__(self):
            return iter(torch.arange(50).roll(self.epochs[-1]).tolist())

        def __len__(self) -> int:
            return 50

    for inner in (False, True):
        sampler = Rotated()
        how = {"sampler": sampler, "batch_size": 25}
        if inner:
            how = {"batch_sampler": torch.utils.data.BatchSampler(sampler, 25, drop_last=False)}
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), **how)
        train(model := network(), F.cross_entropy, loader, sgd(model), epochs=3)
        assert set(sampler.epochs) == {0, 1, 2}
        assert list(sampler.epochs) == sorted(sampler.epochs)


def test_a_summary_says_how_good_the_last_epoch_was() -> None:
    final = {"epoch": 1, "step": 1, "train_loss": 0.5, "lr": 0.1, "eval_loss": 0.75, "accuracy": 0.25}
    run = Run(loss=torch.tensor([2.0]).numpy(), lr=torch.tensor([0.1]).numpy(), epochs=(final,), seed=0)
    assert run.summary() == (
        "finished after 1 steps, 1 epochs; last loss 2, train_loss 0.5, eval_loss 0.75, accuracy 0.25"
    )


def test_a_preconditioner_that_cannot_step_is_refused_before_anything_is_done() -> None:
    """Of another model, closed, attached, or stepped by the optimizer itself."""
    model, other = network(), network()
    optimizer, closed = sgd(model), bnp.BNP(model)
    closed.close()
    attached = bnp.BNP(model).attach(sgd(model))
    sampler = bnp.SGLD(model.parameters(), lr=0.1, preconditioner=(own := bnp.BNP(model)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for pre, steps, words in (
        (bnp.BNP(other), optimizer, "made for another model"),
        (closed, optimizer, "is closed"),
        (attached, optimizer, "attached to an optimizer already"),
        (own, sampler, "stepped by the optimizer already"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            train(model, F.cross_entropy, data(), steps, preconditioner=pre, epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_an_optimizer_of_another_model_is_refused_by_what_reads_it() -> None:
    model, optimizer = network(), sgd(network())
    with pytest.raises(InvalidInputError, match="holds no parameter"):
        bnp.SharpnessTracker(model, F.cross_entropy, data(), optimizer)
    with pytest.raises(InvalidInputError, match="holds no parameter"):
        bnp.optimizer_preconditioner(optimizer, model)
    optimizer.param_groups.clear()
    assert bnp.training.stability_threshold(optimizer)[1] == "the optimizer has no parameter groups"
