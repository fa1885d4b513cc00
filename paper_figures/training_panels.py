"""The paper's training figures: its curves as published, in grey with their reading error, behind ours.

`data/published.json` holds readings of the published figures, `data/curves.json` our runs
(`python -m paper_figures.experiments`). The quick preset trains small networks on the digits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bnp_analysis.errors import DataNotFoundError
from paper_figures import style
from paper_figures.experiments import CURVES, RATES, Job, Panel, curve, load, run, steps_an_epoch
from paper_figures.frame import ROOT, FigureData, Report, Settings

PUBLISHED = Path(__file__).resolve().parent / "data" / "published.json"
INPUTS = [str(path.relative_to(ROOT)) for path in (PUBLISHED, CURVES)]
QUANTITIES = ("test_accuracy", "train_loss")
#: Which of our three training losses is set beside the published one: at the point, in evaluation mode.
LOSS = "train_loss_eval"
TITLES = {
    "fig3_mnist_60": "dense, MNIST, batch 60",
    "fig3_cifar_60": "dense, CIFAR-10, batch 60",
    "fig4_cifar_6": "dense, CIFAR-10, batch 6",
    "fig4_dense_1": "dense, CIFAR-10, batch 1",
    "fig4_cnn_1": "CNN, CIFAR-10, batch 1",
    "fig5_cnn_128": "CNN, CIFAR-10, batch 128",
    "fig5_cnn_2": "CNN, CIFAR-10, batch 2",
}
LOOKS = {"Vanilla": "vanilla", "BN": "BN", "LN": "LN", "BN Renorm": "renorm", "BNP": "BNP"}
TESTS = 5  # runs behind a published mean
RANGE = 2.326  # expected range of five normal numbers, in standard deviations
#: Of the difference of two means: what counts as agreement.
AGREES = 3.0


def presets(panels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Of a figure: full, from the recorded runs; quick, small networks on the digits."""
    small = {"digits": True, "panels": list(panels), "epochs": 3, "seeds": [0]}
    return {"quick": small, "full": {"inputs": INPUTS, "panels": list(panels)}}


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Arrays by panel: `PANEL/methods`, and of each method `PANEL/METHOD/ours/QUANTITY` `(seeds, points)`, its
    `ours/x`, and `published/QUANTITY` `(mean, low, high) x points`, with `published/x`; NaN where there is nothing."""
    if settings.get("digits"):
        return _small(settings, report)
    ours, theirs = (json.loads(path.read_text()) if path.exists() else {} for path in (CURVES, PUBLISHED))
    arrays: dict[str, Any] = {"panels": [name for name in settings["panels"] if ours.get(name)]}
    if not arrays["panels"]:
        raise DataNotFoundError(f"{CURVES} has no run of {', '.join(settings['panels'])}: see paper_figures/README.md")
    for name in arrays["panels"]:
        arrays[f"{name}/methods"] = [method for method in RATES[name] if method in ours[name]]
        arrays[f"{name}/error"] = [theirs["panels"][name]["reading_error"][q] for q in QUANTITIES]
        for method in arrays[f"{name}/methods"]:
            arrays |= _own(f"{name}/{method}", list(ours[name][method]["seeds"].values()))
            there = theirs["panels"][name]["curves"][method]
            arrays[f"{name}/{method}/published/x"] = there["x"]
            for q in QUANTITIES:
                arrays[f"{name}/{method}/published/{q}"] = np.array([there[q][k] for k in ("y", "low", "high")], float)
    report(1.0)
    return arrays


def _own(place: str, runs: Sequence[Mapping[str, Any]], loss: str = LOSS) -> dict[str, Any]:
    """Our curves of a method, the shorter ones filled with NaN."""
    x = max((r["x"] for r in runs), key=len)
    found: dict[str, Any] = {f"{place}/ours/x": x}
    for q, word in zip(QUANTITIES, ("test_accuracy", loss), strict=True):
        found[f"{place}/ours/{q}"] = [[*r[word], *[math.nan] * (len(x) - len(r[word]))] for r in runs]
    return found


def _small(settings: Settings, report: Report) -> dict[str, Any]:
    """The same methods and batch sizes on digits, at small rates, with small networks."""
    arrays: dict[str, Any] = {"panels": list(settings["panels"])}
    total, done = sum(len(RATES[name]) for name in settings["panels"]) * len(settings["seeds"]), 0
    torch.set_num_threads(1)
    for name in settings["panels"]:
        panel = small(name)
        sets = load(panel, "train"), load(panel, "test")
        arrays[f"{name}/methods"] = list(RATES[name])
        for method in RATES[name]:
            runs = []
            for seed in settings["seeds"]:
                lr = 0.02 if panel.batch < 10 else 0.1
                made = run(Job(name, method, seed, lr, panel), settings["epochs"], *sets)
                runs.append(curve(made, every=0, steps=steps_an_epoch(panel, sets[0])))
                done += 1
                report(done / total)
            # Running statistics of BN are not those of the data after so few steps, so not in evaluation mode.
            arrays |= _own(f"{name}/{method}", runs, "train_loss")
    return arrays


def small(name: str) -> Panel:
    """A panel's like on the digits."""
    full = TITLES[name]
    batch = int(full.split()[-1])
    samples = {128: 400, 60: 600}.get(batch, 150)  # of 60, BN at 2 does not learn for every seed
    return Panel(
        "cnn" if full.startswith("CNN") else "dense",
        "digits",
        min(batch, 32),
        4,
        samples=samples,
        hidden=(16,) if full.startswith("CNN") else (32, 32, 32),
        channels=(4, 8, 4),
    )


@dataclass(frozen=True)
class Comparison:
    """Ours beside the published mean of a curve at one point.

    Args:
        panel, method, quantity, x: where.
        ours, published: means.
        seeds: of ours.
        spread: the standard deviation of the difference of the two means: `sqrt(s^2 (1/n + 1/5) + e^2)` with the
            pooled variance `s^2` of single runs (ours over the seeds, the published one from its range of five, where
            that is unreadable from the median of the curve's ranges), and the reading error `e`.
    """

    panel: str
    method: str
    quantity: str
    x: int
    ours: float
    published: float
    seeds: int
    spread: float

    @property
    def difference(self) -> float:
        """Ours less the published mean."""
        return self.ours - self.published

    @property
    def agrees(self) -> bool:
        """Within three spreads."""
        return abs(self.difference) <= AGREES * self.spread


def compare(arrays: Mapping[str, Any], panel: str, method: str, quantity: str) -> list[Comparison]:
    """At every point that both have and all our seeds reach."""
    place = f"{panel}/{method}"
    theirs = np.asarray(arrays[f"{place}/published/{quantity}"], float)
    error = float(np.asarray(arrays[f"{panel}/error"])[QUANTITIES.index(quantity)])
    ours = np.asarray(arrays[f"{place}/ours/{quantity}"], float)
    at = {int(x): i for i, x in enumerate(arrays[f"{place}/ours/x"])}
    ranges = theirs[2] - theirs[1]
    typical = float(np.median(ranges[np.isfinite(ranges)])) if np.isfinite(ranges).any() else math.nan
    found = []
    for j, x in enumerate(int(x) for x in arrays[f"{place}/published/x"]):
        if x not in at or math.isnan(theirs[0, j]):
            continue
        own = ours[:, at[x]]
        own = own[np.isfinite(own)]
        if not len(own):
            continue
        ranged = ranges[j] if math.isfinite(ranges[j]) else typical
        known = math.isfinite(ranged)
        freedom = len(own) - 1 + (TESTS - 1 if known else 0)
        squares = float(((own - own.mean()) ** 2).sum()) + ((TESTS - 1) * (ranged / RANGE) ** 2 if known else 0.0)
        variance = squares / freedom if freedom else 0.0
        spread = math.sqrt(variance * (1 / len(own) + 1 / TESTS) + error**2)
        found.append(Comparison(panel, method, quantity, x, float(own.mean()), float(theirs[0, j]), len(own), spread))
    return found


def last(arrays: Mapping[str, Any], panel: str, method: str, quantity: str = "test_accuracy") -> float:
    """Our mean at the last point."""
    return float(np.nanmean(np.asarray(arrays[f"{panel}/{method}/ours/{quantity}"], float)[:, -1]))


def beside(data: FigureData, points: float) -> str:
    """Which test accuracies are further from the published ones than that, at the last point of both."""
    for panel in data.settings["panels"]:
        for method in RATES[panel]:
            if panel not in data.words("panels") or method not in data.words(f"{panel}/methods"):
                return f"{TITLES[panel]}, {method}: not run"
            found = compare(data.arrays, panel, method, "test_accuracy")
            if not found or not abs(found[-1].difference) <= points / 100:
                said = f"{100 * found[-1].difference:+.2f} points at {found[-1].x}" if found else "nothing to compare"
                return f"{TITLES[panel]}, {method}: {said} against the published curve"
    return ""


def trained(data: FigureData) -> str:
    """On digits: which methods do not train."""
    for panel in data.words("panels"):
        for method in data.words(f"{panel}/methods"):
            losses = np.nanmean(data[f"{panel}/{method}/ours/train_loss"], axis=0)
            if not losses[-1] < losses[0]:
                return f"{TITLES[panel]}, {method}: training loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last"
    return ""


def note(data: FigureData) -> str:
    """Data, seeds, epochs, and what is grey."""
    if data.settings.get("digits"):
        return f"Digits, small networks, {data.settings['epochs']} epochs, rates of the trial; not the paper's data."
    parts = []
    for panel in data.words("panels"):
        counts = {
            m: np.isfinite(data[f"{panel}/{m}/ours/test_accuracy"]).sum(axis=1) for m in data.words(f"{panel}/methods")
        }
        said = ", ".join(f"{m} {len(c)} x {int(data[f'{panel}/{m}/ours/x'][c.min() - 1])}" for m, c in counts.items())
        parts.append(f"{TITLES[panel]}, seeds x {unit(data, panel)}s: {said}")
    return (
        "Grey, hollow marks: the published curves (Lange, Helfrich and Ye 2022, CC-BY 4.0), read from the figures; "
        "bands: range of 5 tests plus reading error. Colours: ours, float32, mean and range over seeds. "
        f"{'. '.join(parts)}. The training loss is the mean over 10,000 training examples in evaluation mode; the "
        "paper does not say which loss it plots. BN with 4 things was not run."
    )


def extent(data: FigureData, panel: str, method: str) -> str:
    """Seeds, and how far all of them got."""
    reached = np.isfinite(data[f"{panel}/{method}/ours/test_accuracy"]).sum(axis=1)
    return f"{len(reached)} x {int(data[f'{panel}/{method}/ours/x'][reached.min() - 1])}"


def draw(data: FigureData) -> Figure:
    """A column per panel: training loss above, test accuracy below."""
    names = data.words("panels")
    figure, axes = style.panels(2, len(names), height=2.1, extra=0.5, sharex="col")
    for column, name in enumerate(names):
        for ax, q in zip(axes[:, column], ("train_loss", "test_accuracy"), strict=True):
            for method in data.words(f"{name}/methods"):
                _published(ax, data, name, method, q)
            for method in data.words(f"{name}/methods"):
                _ours(ax, data, name, method, q)
            _limits(ax, data, name, q)
        axes[0, column].set_title(TITLES[name] if "inputs" in data.settings else _small_title(name))
        axes[1, column].xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes[1, column].set_xlabel(unit(data, name))
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("test accuracy, %")
    handles = {text: line for ax in axes[0] for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    style.letters([ax for row in axes for ax in row])
    return figure


def _small_title(name: str) -> str:
    kind, _, _ = TITLES[name].split(", ")
    return f"{kind}, digits, batch {small(name).batch}"


def unit(data: FigureData, panel: str) -> str:
    """What a panel is drawn against."""
    return "iteration" if panel == "fig3_mnist_60" and not data.settings.get("digits") else "epoch"


def _published(ax: Axes, data: FigureData, panel: str, method: str, quantity: str) -> None:
    place = f"{panel}/{method}/published"
    if f"{place}/x" not in data.arrays:
        return
    x, (mean, low, high) = data[f"{place}/x"], data[f"{place}/{quantity}"] * _factor(quantity)
    error = float(data[f"{panel}/error"][QUANTITIES.index(quantity)]) * _factor(quantity)
    low, high = np.fmin(low, mean) - error, np.fmax(high, mean) + error
    ax.fill_between(x, low, high, color="#bbbbbb", alpha=0.5, linewidth=0)
    hollow: dict[str, Any] = {"marker": style.MARKERS[LOOKS[method]], "markersize": 3, "markerfacecolor": "white"}
    grey: dict[str, Any] = {"color": "#999999", "linewidth": 0.8}
    ax.plot(x, mean, markevery=max(len(x) // 7, 1), markeredgewidth=0.6, **hollow, **grey)
    ax.plot([], [], label="published", **grey)


def _ours(ax: Axes, data: FigureData, panel: str, method: str, quantity: str) -> None:
    place, look = f"{panel}/{method}/ours", LOOKS[method]
    color = style.BLACK if look == "vanilla" else style.COLOURS[look]  # grey is the published curves'
    x, runs = data[f"{place}/x"], data[f"{place}/{quantity}"] * _factor(quantity)
    every = max(len(x) // 10, 1)
    style_of = {"color": color, "marker": style.MARKERS[look], "markevery": every, "markersize": 2.5}
    ax.plot(x, _over_seeds(np.nanmean, runs), label=method, linewidth=0.9, **style_of)
    low, high = (_over_seeds(f, runs) for f in (np.nanmin, np.nanmax))
    ax.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)


def _over_seeds(what: Any, runs: np.ndarray) -> np.ndarray:
    """Over those seeds that got as far; some always did."""
    return np.array([what(column[np.isfinite(column)]) if np.isfinite(column).any() else np.nan for column in runs.T])


def _factor(quantity: str) -> float:
    return 100.0 if quantity == "test_accuracy" else 1.0


def _limits(ax: Axes, data: FigureData, panel: str, quantity: str) -> None:
    """Without the first steps of slow methods, as in the published figures."""
    if quantity == "train_loss" and panel == "fig3_mnist_60" and not data.settings.get("digits"):
        ax.set_yscale("log")
        ax.set_ylim(0.0005, 0.5)
    elif quantity == "test_accuracy" and panel == "fig3_mnist_60" and not data.settings.get("digits"):
        ax.set_ylim(94, 98.6)
