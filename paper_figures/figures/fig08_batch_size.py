"""Final test accuracy against the size of the batch, each method at its own best learning rate."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bnp_analysis.errors import DataNotFoundError
from paper_figures import style
from paper_figures.comparison import MethodComparison
from paper_figures.frame import ROOT, FigureData, Report, Settings

TITLE = "Final accuracy against the size of the batch"
CLAIM = (
    "BNP trains at every batch size, including 1, where BatchNorm and Batch Renormalization cannot run. At each batch "
    "size its final accuracy is above that of the vanilla network; it is not always the best method."
)
SHOWS = "T3, T4"
SERIES = {"digits": (60, 6, 1), "mnist": (60, 6, 1), "cifar": (128, 2)}
FILES = [f"benchmarks/results/training_{data}-{batch}.json" for data, sizes in SERIES.items() for batch in sizes]
PRESETS: dict[str, dict[str, Any]] = {"quick": {"inputs": FILES}, "full": {"inputs": FILES}}
METHODS = ("vanilla", "BN", "LN", "GN", "renorm", "BNP", "BNP+GN")


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Read the recorded comparisons, `benchmarks/compare_training.py`."""
    arrays: dict[str, Any] = {"series": []}
    for place, (series, sizes) in enumerate(SERIES.items()):
        there = [size for size in sizes if (ROOT / _file(series, size)).exists()]
        if there:
            arrays["series"].append(series)
            arrays[f"{series}/batch"] = there
            arrays[f"{series}/accuracy"] = [_accuracies(_file(series, size)) for size in there]
        report((place + 1) / len(SERIES))
    if not arrays["series"]:
        raise DataNotFoundError(f"none of {', '.join(FILES)} is there: run benchmarks/compare_training.py first")
    return arrays


def _file(series: str, size: int) -> str:
    return f"benchmarks/results/training_{series}-{size}.json"


def _accuracies(path: str) -> list[list[float]]:
    """Method by (mean, smallest, largest), NaN for a method that cannot run."""
    rows = {row["method"]: row for row in MethodComparison.load(ROOT / path).rows}
    names = ("accuracy", "accuracy_min", "accuracy_max")
    absent = [np.nan] * len(names)
    return [
        [rows[method][name] for name in names] if rows.get(method, {}).get("accuracy") is not None else absent
        for method in METHODS
    ]


def failure(data: FigureData) -> str:
    """BNP present everywhere, and above vanilla."""
    for series in data.words("series"):
        for batch, found in zip(data[f"{series}/batch"], data[f"{series}/accuracy"][..., 0], strict=True):
            gain = found[METHODS.index("BNP")] - found[METHODS.index("vanilla")]
            if not gain > 0:
                return f"{series}, batch {batch}: BNP is {100 * -gain:.1f} points below the vanilla network"
    return ""


def note(data: FigureData) -> str:
    """Where the data come from."""
    return (
        "Recorded results of benchmarks/compare_training.py, the same in every preset: perceptron of 3 x 100 units "
        "on digits (10 epochs) and MNIST, CNN on CIFAR-10 (3 epochs; 10,000 images, 5,000 at batch 2); "
        "epochs on MNIST 5, 3, and 3 on 10,000 examples at batch 1. Mean and range over 3 seeds."
    )


def draw(data: FigureData) -> Figure:
    """A panel per data set."""
    series = data.words("series")
    figure, (axes,) = style.panels(1, len(series), height=2.4)
    for ax, name in zip(axes, series, strict=True):
        batch = data[f"{name}/batch"]
        for m, method in enumerate(METHODS):
            mean, low, high = 100 * data[f"{name}/accuracy"][:, m].T
            # Side by side, so that error bars can be told apart.
            x = batch * 1.06 ** (m - len(METHODS) // 2)
            look = {"color": style.COLOURS[method], "marker": style.MARKERS[method], "label": method}
            ax.errorbar(x, mean, yerr=[mean - low, high - mean], capsize=1.5, **look)
        ax.set_xscale("log")
        ax.set_xticks(batch, [str(size) for size in batch], minor=False)
        ax.minorticks_off()
        ax.set_xlabel("batch size")
        ax.set_title(name)
    axes[0].set_ylabel("test accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(METHODS))
    style.letters(list(axes))
    return figure
