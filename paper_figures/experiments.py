"""The paper's training experiments: `python -m paper_figures.experiments run|status|collect`.

    python -m paper_figures.experiments run OUT [--only fig3 ...]  # goes on where it was stopped
    python -m paper_figures.experiments status OUT
    python -m paper_figures.experiments collect OUT                # add to what is committed: curves, figures, the page

A curve is one method in one panel, at the learning rate of the paper's Tables 2 and 3; a job is a curve with a seed. A
job leaves `OUT/PANEL.METHOD.SEED.json` after each epoch, written atomically, and its checkpoint beside it. A queue of
(job, epochs) runs shortest first, so that every curve has some epochs soon, and is extended later. The data sets are
found as `bnp_analysis.data` finds them (`BNP_ANALYSIS_DATA`).

Networks, data, batch sizes, lengths, initialization and rates are those of Lange, Helfrich and Ye 2022, section 5 and
appendix B. The paper does not state, and we chose: "same" padding and 64 hidden units of the convolutional network,
pixels in [0, 1], normalization of the network's input too, and TensorFlow's defaults for BN and Batch Renormalization,
momentum 0.99 and epsilon 1e-3 (with torch's 0.9 and 1e-5 the loss of BN on MNIST after 5,000 iterations is three times
the published one).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models import cnn, mlp
from bnp_analysis.models.parts import BatchRenorm
from bnp_analysis.results import package_versions
from bnp_analysis.runtime.files import require_output, write_text
from bnp_analysis.training.bnp import BNP
from bnp_analysis.training.probes import Every
from bnp_analysis.training.run import SIGNALS, Run
from bnp_analysis.training.trainer import train
from paper_figures.frame import revision

Pair = tuple[torch.Tensor, torch.Tensor]

CURVES = Path(__file__).resolve().parent / "data" / "curves.json"
MOMENTUM, EPS = 0.01, 1e-3  # of BN: weight of a batch in its running statistics, and what is added to the variance
EVALUATED = 10_000  # examples of either set that an evaluation looks at
INTERRUPTED = 130


@dataclass(frozen=True)
class Panel:
    """One panel of a figure: a network and a data set.

    Args:
        network: "dense", 100-100-100-10, or "cnn", 3x3 convolutions 32-64-32 and dense layers 64-10.
        data: name of the data set; `samples` of it, all by default.
        batch, epochs: of a full run.
        every: iterations between two points of a curve; 0 for one point an epoch.
        hidden, channels, padding: of dense and of convolutional layers; "valid" for none.
    """

    network: str
    data: str
    batch: int
    epochs: int
    every: int = 0
    samples: int | None = None
    hidden: tuple[int, ...] = (100, 100, 100)
    channels: tuple[int, ...] = (32, 64, 32)
    padding: str = "same"


PANELS: dict[str, Panel] = {
    "fig3_mnist_60": Panel("dense", "mnist", 60, 10, every=100),
    "fig3_cifar_60": Panel("dense", "cifar10", 60, 20),
    "fig4_cifar_6": Panel("dense", "cifar10", 6, 20),
    "fig4_dense_1": Panel("dense", "cifar10", 1, 20),
    "fig4_cnn_1": Panel("cnn", "cifar10", 1, 20, hidden=(64,)),
    "fig5_cnn_128": Panel("cnn", "cifar10", 128, 20, hidden=(64,)),
    "fig5_cnn_2": Panel("cnn", "cifar10", 2, 20, hidden=(64,)),
    # The convolutional network with other choices where the paper states none.
    "valid_cnn_128": Panel("cnn", "cifar10", 128, 20, hidden=(64,), padding="valid"),
    "wide_cnn_128": Panel("cnn", "cifar10", 128, 20, hidden=(128,)),
    # Ours, for the choice of the rule for q: 300, 540 and 1,438 steps on digits, 200, 600 and 2,000 on CIFAR-10.
    "q_digits_128": Panel("cnn", "digits", 128, 25, every=300, hidden=(32,), channels=(16, 32, 16)),
    "q_digits_16": Panel("cnn", "digits", 16, 6, every=540, hidden=(32,), channels=(16, 32, 16)),
    "q_digits_2": Panel("cnn", "digits", 2, 2, every=1_438, hidden=(32,), channels=(16, 32, 16)),
    "q_128": Panel("cnn", "cifar10", 128, 2, every=200, samples=12_800, hidden=(64,)),
    "q_16": Panel("cnn", "cifar10", 16, 1, samples=9_600, hidden=(64,)),
    "q_2": Panel("cnn", "cifar10", 2, 1, samples=4_000, hidden=(64,)),
}
#: Rules for q that are compared, each at its own best rate of a grid of half decades.
Q_RULES, Q_START, Q_SEEDS = ("rows", "paper", "measured"), -3, (0, 1, 2)
#: Tables 2 and 3. "BN with 4 things" is left out.
RATES: dict[str, dict[str, float]] = {
    "fig3_mnist_60": {"Vanilla": 0.1, "BN": 0.5, "BNP": 0.5, "LN": 0.1},
    "fig3_cifar_60": {"Vanilla": 0.01, "BN": 0.5, "BNP": 0.1, "LN": 0.5},
    "fig4_cifar_6": {"Vanilla": 0.005, "BN": 0.05, "BNP": 0.05, "LN": 0.05, "BN Renorm": 0.05},
    "fig4_dense_1": {"Vanilla": 0.0005, "BNP": 0.1, "LN": 0.01},
    "fig4_cnn_1": {"Vanilla": 0.001, "BNP": 0.1},
    "fig5_cnn_128": {"Vanilla": 0.1, "BN": 0.1, "BNP": 0.1},
    "fig5_cnn_2": {"Vanilla": 0.001, "BN": 0.001, "BNP": 0.01, "BN Renorm": 0.01},
}
#: Panels at the rates of another.
LIKE = {"valid_cnn_128": "fig5_cnn_128", "wide_cnn_128": "fig5_cnn_128"}
NORMS = {"BN": "batch", "LN": "layer", "BN Renorm": "renorm"}
#: (panels, methods or None for all, seeds, epochs), in the order in which they run.
QUEUE: tuple[tuple[str, tuple[str, ...] | None, tuple[int, ...], int], ...] = (
    *((f"q_digits_{b}", (rule,), Q_SEEDS, PANELS[f"q_digits_{b}"].epochs) for b in (128, 16, 2) for rule in Q_RULES),
    ("fig3_mnist_60", None, (0, 1), 10),
    ("fig3_cifar_60", None, (0, 1), 20),
    ("fig5_cnn_128", None, (0, 1), 5),
    ("fig3_mnist_60", None, (2, 3, 4), 10),
    ("fig4_cifar_6", None, (0, 1), 5),
    ("fig5_cnn_2", None, (0, 1), 5),
    ("fig4_dense_1", None, (0, 1), 5),
    ("fig4_cnn_1", None, (0, 1), 5),
    *((panel, (rule,), Q_SEEDS, PANELS[panel].epochs) for panel in ("q_128", "q_16", "q_2") for rule in Q_RULES),
    *((panel, ("Vanilla", "BNP"), (0, 1), 5) for panel in LIKE),
    ("fig3_cifar_60", None, (2, 3, 4), 20),
    ("fig5_cnn_128", None, (0, 1), 20),
    ("fig4_cifar_6", None, (0, 1), 20),
    ("fig5_cnn_2", None, (0, 1), 20),
    ("fig4_dense_1", None, (0, 1), 20),
    ("fig4_cnn_1", None, (0, 1), 20),
    ("fig4_cifar_6", None, (2, 3, 4), 20),
    ("fig5_cnn_128", None, (2, 3, 4), 20),
    ("fig5_cnn_2", None, (2, 3, 4), 20),
    ("fig4_dense_1", None, (2, 3, 4), 20),
    ("fig4_cnn_1", None, (2, 3, 4), 20),
)


@dataclass(frozen=True)
class Job:
    """A curve with a seed.

    Args:
        panel, method, seed: what to run; the seed is that of the weights and of the order of examples.
        lr: the learning rate.
        bnp: options of `BNP.paper` in place of the preset's.
        setting: of the panel.
    """

    panel: str
    method: str
    seed: int
    lr: float
    setting: Panel
    bnp: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Of its files."""
        label = label_of(self.method, dict(self.bnp), self.lr)
        return f"{self.panel}.{label.replace(' ', '_')}.{self.seed}"

    def settings(self) -> dict[str, Any]:
        """Everything that decides the curve but its length, as JSON data."""
        own = asdict(self) | {"bnp": dict(self.bnp)}
        own["setting"].pop("epochs")
        padding = own["setting"].pop("padding")
        preset = "" if self.method != "BNP" else str(BNP.paper(nn.Linear(1, 1), **dict(self.bnp)).settings)
        chosen = {"initialization": "Glorot uniform, zero biases", "optimizer": "SGD", "dtype": "float32"}
        chosen |= {"normalization": NORMS.get(self.method, "none"), "norm_at": "input", "padding": padding}
        chosen |= {"momentum": MOMENTUM, "eps": EPS} if self.method in ("BN", "BN Renorm") else {}
        return json.loads(json.dumps(own | {"BNP": preset} | chosen))  # type: ignore[no-any-return]


def label_of(method: str, options: Mapping[str, Any], lr: float) -> str:
    """What a curve is called: its method, and where `q` is not the paper's that and the rate."""
    return f"{method} q={options['q']} lr={lr:g}" if options else method


def job(panel: str, method: str, seed: int) -> Job:
    """The job of a curve of the paper."""
    return Job(panel, method, seed, RATES[LIKE.get(panel, panel)][method], PANELS[panel])


def queue(out: Path, only: Sequence[str] = ()) -> Iterator[tuple[Job, int]]:
    """Jobs and epochs in the order in which they run; `only` those whose panel begins with one of the words."""
    for panel, methods, seeds, epochs in QUEUE:
        if only and not panel.startswith(tuple(only)):
            continue
        if panel not in RATES and panel not in LIKE:
            yield from ((what, epochs) for rule in methods or () for what in tuned(panel, rule, seeds, out))
            continue
        for seed in seeds:
            for method in methods or RATES[panel]:
                yield job(panel, method, seed), epochs


def tuned(panel: str, rule: str, seeds: Sequence[int], out: Path) -> Iterator[Job]:
    """A rule for `q` at its own best rate: rates outward from the first, then the other seeds at the best.

    The best has the smallest training loss after all steps, and both its neighbours were tried.
    """

    def made(k: int, seed: int) -> Job:
        rate = float(f"{(1, 3)[k % 2]}e{k // 2}")
        return Job(panel, "BNP", seed, rate, PANELS[panel], (("q", rule),))

    losses: dict[int, float] = {}
    best = Q_START
    while missing := [k for k in (best, best - 1, best + 1) if k not in losses]:
        for k in missing:
            what = made(k, seeds[0])
            yield what
            found = read(out / f"{what.name}.json", what)
            if found is None:
                return  # another process has it
            done = found["stopped"] == "finished" and found["curve"]["train_loss_eval"]
            losses[k] = found["curve"]["train_loss_eval"][-1] if done else math.inf
        best = min(losses, key=lambda k: losses[k])
    yield from (made(best, seed) for seed in seeds[1:])


def load(panel: Panel, split: str) -> Pair:
    """Pixels in [0, 1] and labels."""
    return _load(panel.data, split, panel.samples if split == "train" else None, panel.network == "dense")


@lru_cache(maxsize=2)
def _load(name: str, split: str, n: int | None, flatten: bool) -> Pair:
    # One read for the jobs of a queue that follow each other; nothing of a run changes the tensors.
    return bnp.data.load(name, split=split, n=n, flatten=flatten).tensors


def network(what: Job, shape: Sequence[int]) -> nn.Module:
    """The network of a job: Glorot uniform weights drawn from the seed, zero biases."""
    norm, sizes = NORMS.get(what.method, "none"), what.setting
    if sizes.network == "dense":
        model = mlp([shape[0], *sizes.hidden, 10], norm=norm, norm_at="input")
    else:
        model = cnn(shape, channels=sizes.channels, hidden=sizes.hidden[0], norm=norm, norm_at="input")
        if sizes.padding == "valid":
            _unpad(model, shape)
    generator = torch.Generator().manual_seed(what.seed)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d | BatchRenorm):
            layer.momentum, layer.eps = MOMENTUM, EPS
    return model


def _unpad(model: nn.Sequential, shape: Sequence[int]) -> None:
    """Take the padding of a network without normalization away; the first dense layer then sees fewer features."""
    convolutions = [layer for layer in model if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        layer.padding, layer._reversed_padding_repeated_twice = (0, 0), [0] * 4
    side = ((shape[1] - 2) // 2 - 2) // 2 - 2
    model.fc4 = nn.Linear(convolutions[-1].out_channels * side**2, model.fc4.out_features)


def run(what: Job, epochs: int, train_data: Pair, test_data: Pair, checkpoint: Path | None = None) -> Run:
    """Train a job until it has that many epochs in all, or as its checkpoint has more."""
    model = network(what, train_data[0].shape[1:])
    pre = BNP.paper(model, **dict(what.bnp)) if what.method == "BNP" else None
    every = what.setting.every or steps_an_epoch(what.setting, train_data)
    try:
        return train(
            model,
            nn.functional.cross_entropy,
            train_data,
            torch.optim.SGD(model.parameters(), lr=what.lr),
            preconditioner=pre,
            epochs=epochs,
            batch_size=what.setting.batch,
            probes=[Every(every, evaluation(train_data, test_data))],
            checkpoint=checkpoint,
            checkpoint_every=5_000,
            seed=what.seed,
        )
    finally:
        if pre is not None:
            pre.close()


def steps_an_epoch(setting: Panel, data: Pair) -> int:
    """Mini-batches of a pass, the last of which may be smaller."""
    return math.ceil(len(data[1]) / setting.batch)


def evaluation(train_data: Pair, test_data: Pair) -> Callable[[int, nn.Module], Mapping[str, float]]:
    """A probe of the test accuracy, and of the loss of the first training examples, in evaluation mode."""
    sets = [[part[:EVALUATED].split(1000) for part in pair] for pair in (train_data, test_data)]

    def evaluated(step: int, model: nn.Module) -> Mapping[str, float]:
        losses, counts = [], []
        with torch.no_grad():
            for x, y in zip(*sets[0], strict=True):
                losses.append(float(nn.functional.cross_entropy(model(x), y, reduction="sum")))
                counts.append(len(y))
            hits = [int((model(x).argmax(1) == y).sum()) for x, y in zip(*sets[1], strict=True)]
        tested = sum(len(y) for y in sets[1][1])
        return {"test_accuracy": sum(hits) / tested, "train_loss_eval": sum(losses) / sum(counts)}

    return evaluated


def curve(done: Run, *, every: int, steps: int) -> dict[str, list[float]]:
    """The points of a curve: `x`, `test_accuracy`, and three training losses.

    `train_loss` is the mean over the epoch so far, `train_loss_last` that over the last tenth of an epoch,
    `train_loss_eval` that of 10,000 training examples at the point, in evaluation mode. The paper does not say which
    it plots.
    """
    rows = [row for row in done.probes if row["step"]]
    ends = [row["step"] for row in rows]
    begins = [(end - 1) // steps * steps for end in ends]
    return {
        "x": [end if every else end // steps for end in ends],
        "test_accuracy": [round(row["test_accuracy"], 5) for row in rows],
        "train_loss": [_rounded(done.loss[a:b].mean()) for a, b in zip(begins, ends, strict=True)],
        "train_loss_last": [_rounded(done.loss[max(end - max(steps // 10, 1), 0) : end].mean()) for end in ends],
        "train_loss_eval": [_rounded(row["train_loss_eval"]) for row in rows],
    }


def _rounded(x: float) -> float:
    return float(f"{x:.5g}")


def write(path: Path, record: Mapping[str, Any]) -> None:
    """A JSON file, whole or not at all."""
    write_text(path, json.dumps(record, indent=1, sort_keys=True) + "\n")


def read(path: Path, what: Job) -> dict[str, Any] | None:
    """What a job has left, None where it has not begun.

    Raises:
        InvalidInputError: it was run with other settings.
    """
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    own = what.settings()
    there = found["settings"]
    differing = sorted(name for name in own.keys() | there.keys() if own.get(name) != there.get(name))
    if differing:
        listed = "; ".join(f"{n}: {there.get(n)!r} there, {own.get(n)!r} here" for n in differing)
        raise InvalidInputError(
            f"{path} holds another run ({listed}): delete it and its checkpoint, or name another folder"
        )
    return found


def advance(what: Job, epochs: int, out: Path) -> bool:
    """Bring a job to that many epochs, one at a time; False where a signal asked to stop."""
    path = out / f"{what.name}.json"
    found = read(path, what)
    done = 0 if found is None else found["epochs"]
    if done >= epochs or (found is not None and found["stopped"] == "diverged"):
        return True
    sets = load(what.setting, "train"), load(what.setting, "test")
    steps = steps_an_epoch(what.setting, sets[0])
    for until in range(done + 1, epochs + 1):
        result = run(what, until, *sets, checkpoint=out / f"{what.name}.pt")
        if result.stopped in SIGNALS:
            return False
        record = {
            "settings": what.settings(),
            "epochs": len(result.epochs),
            "stopped": result.stopped,
            "seconds": round(result.seconds, 1),
            "versions": package_versions() | {"bnp_analysis": bnp.__version__},
            "revision": revision(),
            "curve": curve(result, every=what.setting.every, steps=steps),
        }
        write(path, record)
        last = (record["curve"]["test_accuracy"] or [math.nan])[-1]
        print(f"{what.name} {len(result.epochs)}/{epochs} {last:.4f} {result.seconds:.0f} s", flush=True)
        if result.stopped == "diverged":
            break
    return True


def run_queue(out: Path, only: Sequence[str]) -> int:
    """All jobs, one after another; a job that another process has in hand is passed over."""
    require_output(out / "any.json", "OUT")
    for what, epochs in queue(out, only):
        lock = out / f"{what.name}.lock"
        if _held(lock):
            continue
        write_text(lock, str(os.getpid()))
        try:
            if not advance(what, epochs, out):
                return INTERRUPTED
        finally:
            lock.unlink(missing_ok=True)
    return 0


def _held(lock: Path) -> bool:
    """Whether a process that is alive has the job."""
    try:
        os.kill(int(lock.read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def status(out: Path) -> None:
    """What there is of each curve."""
    there = {path.stem: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    wanted = [job(panel, method, seed).name for panel in RATES for method in RATES[panel] for seed in range(5)]
    for name in [*wanted, *(name for name in there if name not in wanted)]:
        record = there.get(name)
        if record is None:
            print(f"{name:32} not begun")
            continue
        last = (record["curve"]["test_accuracy"] or [math.nan])[-1]
        print(
            f"{name:32} {record['epochs']} epochs, {100 * last:.2f} %, {record['seconds']:.0f} s, {record['stopped']}"
        )


def collect(out: Path) -> None:
    """Add the curves that there are to the small file that is committed.

    A run there stays where `out` has none of its name, or a shorter one; runs with settings that have changed go.
    """
    found: dict[str, Any] = json.loads(CURVES.read_text()) if CURVES.exists() else {}
    for path in sorted(out.glob("*.json")):
        record = json.loads(path.read_text())
        own = {n: v for n, v in record["settings"].items() if n != "seed"}
        methods, label = found.setdefault(own["panel"], {}), label_of(own["method"], own["bnp"], own["lr"])
        if methods.get(label, {}).get("settings") != own:
            methods[label] = {"settings": own, "seeds": {}}
        seeds, seed = methods[label]["seeds"], str(record["settings"]["seed"])
        if len(record["curve"]["x"]) >= len(seeds.get(seed, {"x": ()})["x"]):
            seeds[seed] = record["curve"] | {n: record[n] for n in ("stopped", "seconds", "versions", "revision")}
    text = json.dumps(found, sort_keys=True, separators=(",", ":")).replace('"seeds":', '\n"seeds":')
    write_text(CURVES, text + "\n")
    print(f"{CURVES}: {sum(len(m['seeds']) for p in found.values() for m in p.values())} runs, {len(text) // 1024} kB")


def publish() -> int:
    """Draw the figures of which there are runs, in full, and write the page."""
    from paper_figures import __main__ as figures
    from paper_figures import reproduction

    there = json.loads(CURVES.read_text())
    drawn = [f"paper_fig{k}" for k in (3, 4, 5) if any(name.startswith(f"fig{k}_") for name in there)]
    figures.main([*drawn, "--preset", "full"])
    return reproduction.main([])


def main(argv: Sequence[str] | None = None) -> int:
    """Run, say how far, or collect; 0 done, 2 bad input, 130 interrupted."""
    return answered(lambda: do(argv), "paper_figures.experiments")


def do(argv: Sequence[str] | None) -> int:
    """Parse the words and do what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "status", "collect"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="*", default=(), help="panels, by the beginnings of their names")
    arguments = parser.parse_args(argv)
    unknown = [word for word in arguments.only if not any(panel.startswith(word) for panel in PANELS)]
    if unknown:
        raise InvalidInputError(f"no panel begins with {' or '.join(unknown)}; there are {', '.join(PANELS)}")
    if arguments.what != "run" and not any(arguments.out.glob("*.json")):
        raise InvalidInputError(f"{arguments.out} holds no runs: `run {arguments.out}` makes some")
    if arguments.what == "status":
        status(arguments.out)
        return 0
    if arguments.what == "collect":
        collect(arguments.out)
        return publish()
    torch.set_num_threads(1)
    return run_queue(arguments.out, arguments.only)


if __name__ == "__main__":
    sys.exit(main())
