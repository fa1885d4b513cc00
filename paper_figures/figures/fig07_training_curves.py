"""Training curves of all methods, each at its own best learning rate, against epochs and against time."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from bnp_analysis.errors import DataNotFoundError
from paper_figures import style
from paper_figures.comparison import MethodComparison
from paper_figures.frame import ROOT, FigureData, Report, Settings

TITLE = "Training curves, each method at its own best learning rate"
CLAIM = (
    "On MNIST BNP reaches a lower loss in fewer epochs than the vanilla network at every batch size, including 1, "
    "where BatchNorm cannot run. Accuracy and time are shown without a claim."
)
SHOWS = "T2, T3, T4"
PANELS = ("mnist-60", "mnist-6", "mnist-1", "cifar-128", "cifar-2")
FILES = [f"benchmarks/results/training_{name}.json" for name in PANELS]
PRESETS: dict[str, dict[str, Any]] = {"quick": {"inputs": FILES}, "full": {"inputs": FILES}}
METRICS = ("train_loss", "accuracy")


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Read the recorded comparisons, `benchmarks/compare_training.py`; they took hours."""
    arrays: dict[str, Any] = {"panels": []}
    for place, (name, path) in enumerate(zip(PANELS, settings["inputs"], strict=True)):
        if not (ROOT / path).exists():
            continue
        found = MethodComparison.load(ROOT / path)
        able = [row for row in found.rows if row["lr"] is not None and row["seeds"]]
        arrays["panels"].append(name)
        arrays |= {f"{name}/methods": [row["method"] for row in able], f"{name}/lr": [row["lr"] for row in able]}
        arrays[f"{name}/step_ms"] = [row.get("step_ms", np.nan) for row in able]
        for metric in ("step", *METRICS):
            arrays[f"{name}/{metric}"] = [_curves(found, row["method"], metric) for row in able]
        base = found.settings["base"]
        arrays[f"{name}/about"] = (
            f"{base['data']} ({base['samples'] or 'all'} examples), {base['model']}, batch {base['batch_size']}"
        )
        report((place + 1) / len(PANELS))
    if not arrays["panels"]:
        raise DataNotFoundError(f"none of {', '.join(FILES)} is there: run benchmarks/compare_training.py first")
    return arrays


def _curves(found: MethodComparison, method: str, metric: str) -> list[list[float]]:
    """Rows are seeds, columns epochs."""
    own = [row for row in found.curves if row["method"] == method]
    return [[row[metric] for row in own if row["seed"] == seed] for seed in sorted({row["seed"] for row in own})]


def failure(data: FigureData) -> str:
    """BNP's training loss below vanilla's after every epoch on MNIST, medians over the seeds."""
    for name in data.words("panels"):
        if name.startswith("mnist"):
            methods = data.words(f"{name}/methods")
            losses = np.median(data[f"{name}/train_loss"], axis=1)
            better = losses[methods.index("BNP")] < losses[methods.index("vanilla")]
            if not better.all():
                return (
                    f"{name}: vanilla has the lower training loss after {int((~better).sum())} of {better.size} epochs"
                )
    return ""


def note(data: FigureData) -> str:
    """Where the data come from."""
    timed = [name for name in data.words("panels") if np.isfinite(data[f"{name}/step_ms"]).all()]
    return (
        "Recorded results of benchmarks/compare_training.py, the same in every preset: "
        + "; ".join(str(data[f"{name}/about"]) for name in data.words("panels"))
        + ". SGD, constant rate, best of a common grid for each method on held-out examples; median and range over 3 "
        "seeds. Time: steps times the time of a step measured alone with one thread"
        + ("." if timed else " (not measured yet).")
    )


def draw(data: FigureData) -> Figure:
    """A row per comparison: loss and accuracy against epochs, loss and accuracy against time."""
    panels = data.words("panels")
    figure, axes = style.panels(len(panels), 4, height=1.4, extra=0.7)
    for row, name in zip(axes, panels, strict=True):
        for m, method in enumerate(data.words(f"{name}/methods")):
            steps = data[f"{name}/step"][m][0]
            seconds = steps * data[f"{name}/step_ms"][m] / 1e3
            for k, metric in enumerate(METRICS):
                values = data[f"{name}/{metric}"][m] * (100 if metric == "accuracy" else 1)
                look = {"color": style.COLOURS[method], "marker": style.MARKERS[method]}
                style.band(row[k], np.arange(1, len(steps) + 1), values, label=method, **look)
                if np.isfinite(seconds).all():
                    style.band(row[2 + k], seconds, values, **look)
        for k in (0, 2):
            if row[k].has_data():
                row[k].set_yscale("log")
                row[k].yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5)))
                row[k].yaxis.set_major_formatter(ScalarFormatter())
                row[k].yaxis.set_minor_formatter(NullFormatter())
        row[0].set_ylabel(name)
        row[0].set_xticks(np.arange(1, len(steps) + 1))
        row[1].set_xticks(np.arange(1, len(steps) + 1))
    for k, (what, label) in enumerate(product(("epoch", "seconds of training"), ("training loss", "test accuracy, %"))):
        axes[-1][k].set_xlabel(what)
        axes[0][k].set_title(label)
    handles: dict[str, Any] = {}
    for row in axes:
        handles |= dict(zip(*reversed(row[0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    return figure
