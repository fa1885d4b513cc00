"""Methods of training side by side: vanilla, BN, LN, GN, Batch Renormalization, BNP, BNP + GN.

    python benchmarks/compare_training.py NAME [NAME ...] [--data-dir FOLDER] [--cost] [--out benchmarks/results]

Names: `digits-60`, `digits-6`, `digits-1`, `mnist-60`, `mnist-6`, `mnist-1`, `cifar-128`, `cifar-2`; the number is the
batch size. Each method runs at its own best rate of one grid, chosen with one seed on held-out training examples, then
with three seeds on all of them. Finished runs are kept in `OUT/training_runs.jsonl`: a stopped comparison goes on, and
what is there is not repeated. Without `--cost` steps are not timed; call again with it when the machine is quiet.
Writes `OUT/training_NAME.json` (a `MethodComparison`) and all tables to `OUT/training.md`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnp_analysis.cli import answered
from bnp_analysis.runtime.files import require_outputs, write_text
from bnp_analysis.training.experiment import Experiment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # started as a file, it finds its neighbours alone
from paper_figures.comparison import MethodComparison, compare_methods

SIXTH = 1 / 6
#: Name -> (what the methods share, epochs of the search, part held out in it). BatchNorm cannot end on a batch of one.
COMPARISONS: dict[str, tuple[dict[str, Any], int, float]] = {
    "digits-60": ({"data": "digits", "batch_size": 60, "epochs": 10}, 3, SIXTH),
    "digits-6": ({"data": "digits", "batch_size": 6, "epochs": 10}, 3, SIXTH),
    "digits-1": ({"data": "digits", "batch_size": 1, "epochs": 10}, 3, SIXTH),
    "mnist-60": ({"data": "mnist", "batch_size": 60, "epochs": 5}, 1, SIXTH),
    "mnist-6": ({"data": "mnist", "batch_size": 6, "epochs": 3}, 1, SIXTH),
    "mnist-1": ({"data": "mnist", "samples": 10_000, "batch_size": 1, "epochs": 3}, 1, SIXTH),
    "cifar-128": ({"data": "cifar10", "model": "cnn", "samples": 10_000, "batch_size": 128, "epochs": 3}, 1, SIXTH),
    "cifar-2": ({"data": "cifar10", "model": "cnn", "samples": 5_000, "batch_size": 2, "epochs": 3}, 1, 0.16),
}
COLUMNS = (
    *("method", "best rate", "test accuracy %: mean ± sd (min .. max)", "test loss", "train loss, last epoch"),
    *("test accuracy % after epoch 1", "rates within 2 points of its best, held out", "step ms", "over vanilla"),
    "memory MB",
)


def number(value: Any, form: str, factor: float = 1.0) -> str:
    """A number in a cell; a dash where there is none."""
    absent = value is None or (isinstance(value, float) and math.isnan(value))
    return "-" if absent else format(factor * value, form)


def after_one_epoch(found: MethodComparison, method: str) -> float | None:
    """Mean test accuracy of the final runs after their first epoch."""
    firsts: dict[int, float] = {}
    for row in found.curves:
        if row["method"] == method and row.get("accuracy") is not None:
            firsts.setdefault(row["seed"], row["accuracy"])
    return sum(firsts.values()) / len(firsts) if firsts else None


def tolerated(found: MethodComparison, method: str) -> str:
    """Which rates of the search came within two points of the method's best, and which diverged."""
    tried = [row for row in found.search if row["method"] == method]
    best = max((row["accuracy"] for row in tried if row["accuracy"] is not None), default=math.nan)
    good = [f"{row['lr']:g}" for row in tried if row["accuracy"] is not None and row["accuracy"] >= best - 0.02]
    lost = [f"{row['lr']:g}" for row in tried if row["stopped"] == "diverged"]
    return ", ".join(good) + (f"; diverged at {', '.join(lost)}" if lost else "")


def cells(found: MethodComparison, row: Mapping[str, Any]) -> list[str]:
    """The line of a method."""
    if row["lr"] is None:
        return [row["method"], f"none: {row['note'].split(':')[0]}", *[""] * (len(COLUMNS) - 2)]
    spread = f"{number(row['accuracy'], '.2f', 100)} ± {number(row['accuracy_std'], '.2f', 100)}"
    return [
        row["method"],
        f"{row['lr']:g}" + (" (edge)" if row["lr_at_edge"] else ""),
        f"{spread} ({number(row['accuracy_min'], '.2f', 100)} .. {number(row['accuracy_max'], '.2f', 100)})",
        f"{number(row['eval_loss'], '.3f')} ± {number(row['eval_loss_std'], '.3f')}",
        number(row["train_loss"], ".4f"),
        number(after_one_epoch(found, row["method"]), ".1f", 100),
        tolerated(found, row["method"]),
        *(number(row.get("step_ms"), ".2f"), number(row.get("step_ratio"), ".2f"), number(row.get("peak_mb"), ".0f")),
    ]


def table(name: str, found: MethodComparison) -> str:
    """The table of one comparison."""
    s = found.settings
    base = s["base"]
    network = f"MLP {base['hidden']}" if base["model"] == "mlp" else f"model `{base['model']}`"
    rates = ", ".join(f"{r:g}" for r in s["rates"])
    head = (
        f"## {name}\n\n{base['data']}, {base['samples'] or 'all'} training examples, {network}, batch "
        f"{base['batch_size']}, {base['optimizer']}, {base['epochs']} epochs (search: {s['search_epochs']} on "
        f"{1 - s['holdout']:.0%} of the examples), seeds {s['seeds']}, rates {rates}; "
        f"torch {found.versions['torch']}.\n"
    )
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(cells(found, row) for row in found.rows)]
    return head + "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write(out: Path) -> None:
    """All tables of what is recorded so far, in the order of `COMPARISONS`."""
    stored = {name: out / f"training_{name}.json" for name in COMPARISONS}
    parts = [table(name, MethodComparison.load(path)) for name, path in stored.items() if path.exists()]
    reading = out / "training_reading.md"
    tail = [reading.read_text()] if reading.exists() else []
    head = (
        "# Methods of training, each at its own best learning rate\n\n"
        "Command: `python benchmarks/compare_training.py NAME` (`--cost` for times, alone on the machine). Raw pixels "
        "in [0, 1], no momentum, no decay, constant rate; normalizations before the activation. Means and sample "
        "standard deviations over the seeds; *edge*: the best rate is the smallest or largest searched. Step times "
        "are medians of interleaved turns in one process with one thread; memory is the growth of a fresh process.\n"
    )
    write_text(out / "training.md", "\n".join([head, *parts, *tail]))


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[*COMPARISONS, []])
    parser.add_argument("--data-dir", help="where the files of MNIST and CIFAR-10 are")
    parser.add_argument("--cost", action="store_true", help="time the steps, when nothing else runs")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    files = ["training.md", "training_runs.jsonl", *(f"training_{name}.json" for name in arguments.names)]
    require_outputs({"--out": [arguments.out / file for file in files]})
    for name in arguments.names:
        shared, search_epochs, holdout = COMPARISONS[name]
        found = compare_methods(
            Experiment(**shared),
            search_epochs=search_epochs,
            holdout=holdout,
            results=arguments.out / "training_runs.jsonl",
            workers=arguments.workers,
            cost=arguments.cost,
            data_dir=arguments.data_dir,
            progress=True,
        )
        found.save(arguments.out / f"training_{name}.json")
        print(name, found, flush=True)
    write(arguments.out)


if __name__ == "__main__":
    sys.exit(answered(main))
