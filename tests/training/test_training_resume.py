"""Stopping and going on: any state that a checkpoint forgets (parameters, buffers, preconditioner, optimizer, schedule,
place in the data order, global random numbers of dropout, metrics, log) makes a resumed run differ, and is caught here;
so are signals that lose work, leave their handlers behind, or end in another run's file."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, OutputError
from bnp_analysis.training import run as checkpointing
from bnp_analysis.training.run import Run
from bnp_analysis.training.trainer import train

# Also run as a program: `python this_file folder` trains until it is done or killed, see `main`.


class Scale:
    """A preconditioner with a state: gradients divided by a running norm and noise from the global generator."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.norm, self.steps = model, torch.ones(()), 0

    def step(self) -> None:
        found = torch.stack([p.grad.norm() for p in self.model.parameters()]).norm()
        self.norm = 0.9 * self.norm + 0.1 * found
        self.steps += 1
        for p in self.model.parameters():
            p.grad /= self.norm + 0.01 * torch.rand(())

    def state_dict(self) -> dict:
        return {"norm": self.norm, "steps": self.steps}

    def load_state_dict(self, state: dict) -> None:
        self.norm, self.steps = state["norm"].clone(), state["steps"]


class Augmented(torch.utils.data.TensorDataset):
    """Examples with noise from the global generator, drawn where they are read."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(x.shape), y


def network() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(5, 8),
            torch.nn.BatchNorm1d(8),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.3),
            torch.nn.Linear(8, 3),
        )
    model.register_buffer("hidden", torch.zeros(1), persistent=False)
    return model


def source(kind: str):
    g = torch.Generator().manual_seed(7)
    x, y = torch.randn(50, 5, generator=g), torch.randint(0, 3, (50,), generator=g)
    if kind == "tensors":
        return (x, y), 8
    own = torch.Generator().manual_seed(3) if kind == "generator" else None
    return torch.utils.data.DataLoader(Augmented(x, y), batch_size=8, shuffle=True, generator=own), None


def start(
    folder: Path, kind: str, *, probe=None, epochs: int = 4, lr: float = 0.05, every: int = 3, **options
) -> tuple:
    """A run, and the bytes of everything that it leaves."""
    model = network()
    loader, batch_size = source(kind)
    optimizer = torch.optim.SGD([*model.parameters()], lr=lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 28)
    options = {"schedule_by": "step", "seed": 11, "checkpoint_every": every} | options
    files = {"checkpoint": folder / "run.pt", "log": folder / "run.jsonl"}
    pre = Scale(model)

    def norm(step: int, model: torch.nn.Module) -> dict:
        if probe is not None:
            probe(step)
        model.hidden += 1
        return {"norm": float(model[0].weight.detach().norm()), "noise": float(torch.rand(()))}

    run = train(
        model, torch.nn.functional.cross_entropy, loader, optimizer, preconditioner=pre, scheduler=scheduler,
        epochs=epochs, batch_size=batch_size, probes=[norm], eval_data=source("tensors")[0], **files, **options,
    )  # fmt: skip
    state = [*model.state_dict().values(), model.hidden, pre.norm]
    state += [s["momentum_buffer"] for s in optimizer.state_dict()["state"].values()]
    return run, state, [scheduler.state_dict(), pre.steps, optimizer.param_groups[0]["lr"]]


def lines(folder: Path) -> list[str]:
    """The log without what a clock wrote."""
    text = (folder / "run.jsonl").read_text().splitlines()
    return [line.split(', "seconds"')[0] for line in text]


def assert_same(found: tuple, wanted: tuple) -> None:
    assert found[0] == wanted[0]
    assert all(torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True))
    assert found[2] == wanted[2]


ENDS = {
    "killed": ("tensors", signal.SIGKILL),
    "lost": ("loader", signal.SIGKILL),
    "stopped": ("tensors", signal.SIGTERM),
}


def main(folder: Path) -> None:
    """Train in one process for each of `ENDS`, forked from one that has loaded torch, and note how each ended."""
    torch.set_num_threads(1)
    (folder / "modules").write_text("\n".join(sys.modules))
    start(folder / "first", "loader", epochs=1)  # loads what optimizers import when they are used, once for all
    pids = {}
    for name, (kind, _) in ENDS.items():
        own = folder / name
        own.mkdir()
        pids[name] = os.fork()
        if not pids[name]:

            def hold(step: int, own: Path = own) -> None:
                """Slow down from step 17 on, so that a signal meets a step between two checkpoints."""
                if step == 17:
                    (own / "reached").write_text(str(os.getpid()))
                if step >= 17:
                    time.sleep(0.5)

            os._exit(0 if start(own, kind, probe=hold)[0].finished else 42)
    for name, pid in pids.items():
        (folder / name / "status").write_text(str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that got their signals in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("ended")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, __file__, str(folder)], env=environment)
    limit = time.monotonic() + 200
    for name, (_, sent) in ENDS.items():
        reached = folder / name / "reached"
        while not (reached.exists() and reached.read_text()):
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)
        os.kill(int(reached.read_text()), sent)
    assert process.wait() == 0
    return folder


@pytest.mark.parametrize("name", ["killed", "lost"])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, ended, name):
    killed, kind = ended / name, ENDS[name][0]
    assert (killed / "status").read_text() == str(-signal.SIGKILL)
    saved = torch.load(killed / "run.pt", weights_only=True)["progress"]
    assert saved["step"] == 15, "the last checkpoint lies in the middle of an epoch, before the kill"
    assert len(lines(killed)) > 15, "the log has lines that belong to no checkpoint"
    found, wanted = start(killed, kind), start(tmp_path, kind)
    assert_same(found, wanted)
    assert found[0].finished
    assert len(found[0].loss) == 28
    assert lines(killed) == lines(tmp_path)
    assert_same(start(killed, kind), wanted)


def test_sigterm_saves_and_leaves_and_the_rest_equals_the_uninterrupted_run(tmp_path, ended):
    stopped = ended / "stopped"
    assert (stopped / "status").read_text() == "42"
    saved = torch.load(stopped / "run.pt", weights_only=True)["progress"]
    assert saved["step"] in (17, 18), "saved where the signal met it, not at the last regular checkpoint"
    assert '"stopped": "SIGTERM"' in lines(stopped)[-1]
    assert_same(start(stopped, "tensors"), start(tmp_path, "tensors"))
    assert lines(stopped) == lines(tmp_path)


def test_importing_the_training_room_does_not_load_the_compiler(ended):
    """It takes longer than torch itself."""
    loaded = (ended / "modules").read_text().split()
    assert "bnp_analysis.training.trainer" in loaded
    assert "bnp_analysis.training.bnp.bnp" in loaded
    assert "torch._dynamo" not in loaded


@pytest.mark.parametrize(("name", "at"), [("SIGINT", 0), ("SIGTERM", 7), ("SIGINT", 12)])
def test_signals_are_stop_reasons_and_handlers_come_back(tmp_path, name, at):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    asked = []

    def ask(step: int) -> None:
        if step == at and not asked:
            asked.append(step)
            signal.raise_signal(getattr(signal, name))

    run, *_ = start(tmp_path / "a", "generator", probe=ask)
    assert run.stopped == name
    assert len(run.loss) == at
    assert "the same call goes on" in run.message
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    assert_same(start(tmp_path / "a", "generator"), start(tmp_path / "b", "generator"))


def test_more_epochs_go_on_from_a_finished_run(tmp_path):
    start(tmp_path / "a", "tensors", epochs=2)
    assert_same(start(tmp_path / "a", "tensors"), start(tmp_path / "b", "tensors"))
    run, *_ = start(tmp_path / "a", "tensors")
    assert Run.load(run.save(tmp_path / "run.json")) == run


def test_files_of_other_runs_and_damaged_ones_are_refused(tmp_path):
    start(tmp_path, "tensors", epochs=1)
    with pytest.raises(InvalidInputError, match=r"another run.*groups.*0\.05.*there.*0\.1.*here"):
        start(tmp_path, "tensors", lr=0.1)
    with pytest.raises(InvalidInputError, match="seed: 11 there, 12 here"):
        start(tmp_path, "tensors", seed=12)
    with pytest.raises(InvalidInputError, match="data: 'TensorBatches' there, 'DataLoader' here"):
        start(tmp_path, "loader")
    checkpointing.write_state(tmp_path / "old.pt", {"format": "bnp_analysis.training/1"})
    with pytest.raises(InvalidInputError, match=r"old\.pt has the format .*/1; this version reads .*/2"):
        checkpointing.load_state(tmp_path / "old.pt")
    whole = (tmp_path / "run.pt").read_bytes()
    (tmp_path / "run.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInputError, match="not the checkpoint of a training run"):
        start(tmp_path, "tensors", epochs=1)


def perceptron(
    folder: Path, *, activation: str = "relu", labels: int = 0, order: int = 1, epochs: int = 3, probe=None, **options
) -> tuple[Run, torch.nn.Module]:
    """A run with BNP, whose scale is measured by power steps that go on from the last ones."""
    g = torch.Generator().manual_seed(2)
    x, y = torch.randn(24, 5, generator=g)[::order], (torch.arange(24) + labels)[::order] % 3
    model = bnp.models.mlp([5, 4, 3], activation=activation)
    run = train(
        model, torch.nn.functional.cross_entropy, (x.contiguous(), y), torch.optim.SGD(model.parameters(), lr=0.1),
        preconditioner=bnp.BNP(model, **{"q": "measured"} | options), epochs=epochs, batch_size=5,
        checkpoint=folder / "run.pt", checkpoint_every=2, probes=[] if probe is None else [probe],
    )  # fmt: skip
    return run, model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "tanh"}, r"model \S+: 'ReLU\(\)' there, 'Tanh\(\)' here"),
        ({"rho": 0.5}, "preconditioner options rho: 0.99 there, 0.5 here"),
        ({"labels": 1}, "examples: .*int64"),
    ],
)
def test_another_run_on_the_same_sizes_is_refused(tmp_path, change, words):
    perceptron(tmp_path, epochs=1)
    with pytest.raises(InvalidInputError, match=f"holds another run .*{words}"):
        perceptron(tmp_path, **change)
    assert perceptron(tmp_path)[0].finished


def test_another_order_of_the_same_examples_is_refused(tmp_path):
    pairs = [(torch.eye(3)[[i]], torch.tensor([i])) for i in range(3)]

    def follow(loader: list, **options) -> Run:
        model = bnp.models.mlp([3, 3])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = torch.nn.functional.cross_entropy
        return train(model, loss, loader, optimizer, checkpoint=tmp_path / "r.pt", **options)

    def ask(step: int, model: object) -> dict:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return {}

    assert follow(pairs, probes=[ask]).stopped == "SIGINT"
    with pytest.raises(InvalidInputError, match="the targets of batch 2 of epoch 1 are not those"):
        follow(pairs[1:] + pairs[:1])
    assert follow(pairs).finished


def test_a_loader_that_draws_its_order_from_elsewhere_is_refused(tmp_path):
    start(tmp_path, "generator", epochs=1)
    with pytest.raises(InvalidInputError, match="a loader with other generators"):
        start(tmp_path, "loader")
    assert start(tmp_path, "generator")[0].finished


def test_a_stream_that_ends_before_the_place_of_the_checkpoint_is_refused(tmp_path):
    class Stream:
        def __init__(self, batches: int) -> None:
            self.batches = batches

        def __iter__(self):
            return iter([(torch.eye(3)[[i]], torch.tensor([i])) for i in range(self.batches)])

    def follow(batches: int, **options) -> Run:
        model = bnp.models.mlp([3, 3])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = torch.nn.functional.cross_entropy
        return train(model, loss, Stream(batches), optimizer, checkpoint=tmp_path / "r.pt", epochs=2, **options)

    def ask(step: int, model: object) -> dict:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return {}

    assert follow(3, probes=[ask]).stopped == "SIGINT"
    with pytest.raises(InvalidInputError, match="the loader has 1 batches, the checkpoint was saved after 2 of them"):
        follow(1)
    assert follow(3).finished


def test_a_measured_scale_goes_on_bit_for_bit(tmp_path):
    def ask(step: int, model: object) -> dict:
        if step == 7:
            signal.raise_signal(signal.SIGTERM)
        return {}

    assert perceptron(tmp_path, probe=ask)[0].stopped == "SIGTERM"
    (found, model), (wanted, other) = perceptron(tmp_path), perceptron(tmp_path / "whole")
    assert found.loss.tolist() == wanted.loss.tolist()
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: int, model: object) -> dict:
        if step == 5:  # every file that grows beyond this is refused by the system
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
        return {}

    try:
        with pytest.raises(OutputError, match=r"run\.pt could not be written: File too large"):
            perceptron(tmp_path, probe=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]
    assert torch.load(tmp_path / "run.pt")["progress"]["step"] == 4
    (_, model), (_, other) = perceptron(tmp_path), perceptron(tmp_path / "whole")
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    perceptron(tmp_path, epochs=1)
    saved = torch.load(tmp_path / "run.pt")
    layers = saved["preconditioner"]["layers"]
    layers["fc2"]["variance"] -= 5
    torch.save(saved, tmp_path / "run.pt")
    model = bnp.models.mlp([5, 4, 3])
    pre, optimizer = bnp.BNP(model, q="measured"), torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    parts = checkpointing.Parts(model, {"optimizer": optimizer, "preconditioner": pre})
    with pytest.raises(InvalidInputError, match=r"nothing was changed: .*'fc2' has a variance that is not finite"):
        parts.put_back(saved)
    assert all(map(torch.equal, model.parameters(), before))
    assert pre.state_dict()["step"] == 0


def test_two_runs_do_not_write_one_checkpoint(tmp_path):
    def second(step: int, model: object) -> dict:
        with pytest.raises(InvalidInputError, match=r"run\.pt is being written by another run \(this process\)"):
            perceptron(tmp_path)
        return {}

    assert perceptron(tmp_path, probe=second)[0].finished
    assert [path.name for path in tmp_path.iterdir()] == ["run.pt"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
