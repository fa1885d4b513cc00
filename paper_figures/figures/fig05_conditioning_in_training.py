"""Condition numbers of layer blocks during training, for vanilla, BatchNorm and BNP."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import bnp_analysis as bnp
from bnp_analysis.training.experiment import Experiment, run_experiment
from bnp_analysis.training.probes import ConditionProbe
from paper_figures import style
from paper_figures.frame import FigureData, Report, Settings

TITLE = "Conditioning of layers during training"
CLAIM = (
    "At every measured point of the run with BNP, the P of that run lowers the condition number of each layer's block "
    "(median over the seeds)."
)
SHOWS = "T2, T7, T9"
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        **{"hidden": [12, 12], "epochs": 2, "every": 24, "layers": ["fc2", "fc3"], "measured": 100, "seeds": [0]},
        **{"rates": {"vanilla": 0.3, "BN": 0.3, "BNP": 0.03}, "batch": 60},
    },
    "full": {
        **{
            "hidden": [24, 24],
            "epochs": 15,
            "every": 48,
            "layers": ["fc2", "fc3"],
            "measured": 400,
            "seeds": [0, 1, 2],
        },
        **{"rates": {"vanilla": 0.3, "BN": 0.3, "BNP": 0.03}, "batch": 60},
    },
}
METHODS: dict[str, dict[str, Any]] = {"vanilla": {}, "BN": {"norm": "batch"}, "BNP": {"preconditioner": "bnp"}}
LINES = ("vanilla", "BN", "BNP", "BNP's run, without P")


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Runs with probes; BN is measured with its running statistics, BNP with its damped running `P`."""
    x, y = bnp.data.load("digits", n=settings["measured"]).tensors
    numbers: list[Any] = []
    losses: list[Any] = []
    steps: list[int] = []
    done, total = 0, len(METHODS) * len(settings["seeds"])
    for method, change in METHODS.items():
        own: list[Any] = []
        without: list[Any] = []
        for seed in settings["seeds"]:
            experiment = Experiment(
                hidden=tuple(settings["hidden"]),
                epochs=settings["epochs"],
                batch_size=settings["batch"],
                lr=settings["rates"][method],
                seed=seed,
                **change,
            )
            probes = [
                ConditionProbe(layer, settings["every"], (x, y), torch.nn.functional.cross_entropy)
                for layer in settings["layers"]
            ]
            run = run_experiment(experiment, probes=probes)
            found = [[row for row in run.probes if row["probe"] == probe.name] for probe in probes]
            plain, with_p = (
                [[[row[key], row[f"{key}_upper"]] for row in rows] for rows in found]
                for key in ("condition", "condition_with_p")
            )
            own.append(with_p if method == "BNP" else plain)
            without.append(plain)
            steps = [row["step"] for row in found[0]]
            losses.append([run.loss[max(step - 1, 0)] for step in steps])
            done += 1
            report(done / total)
        numbers += [own, without] if method == "BNP" else [own]
    found_all = np.array(numbers, dtype=float)  # (line, seed, layer, measurement, value and bound)
    shape = (len(METHODS), len(settings["seeds"]), -1)
    return {
        **{"steps": steps, "value": found_all[..., 0], "upper": found_all[..., 1]},
        "loss": np.array(losses).reshape(shape),
    }


def failure(data: FigureData) -> str:
    """With P below without P along BNP's run, medians over the seeds."""
    middle = np.median(data["value"], axis=1)
    better = middle[LINES.index("BNP")] < middle[LINES.index("BNP's run, without P")]
    return "" if better.all() else f"P does not lower the number in {int((~better).sum())} of {better.size} places"


def note(data: FigureData) -> str:
    """Data, networks, rates, seeds."""
    s = data.settings
    two_sided = np.isfinite(data["upper"]).mean()
    widths = "-".join(map(str, [64, *s["hidden"], 10]))
    rates = ", ".join(f"{name} {rate:g}" for name, rate in s["rates"].items())
    return (
        f"digits; ReLU perceptron {widths}, SGD, batch {s['batch']}, rates {rates}; "
        f"Gauss-Newton blocks on {s['measured']} examples in float64, BN with its running statistics in its own "
        f"parameters, BNP with its damped running P (exact moments at step 0). Median and range over seeds "
        f"{s['seeds']}; {two_sided:.0%} of the numbers are two-sided, the others lower bounds (open marks)."
    )


def draw(data: FigureData) -> Figure:
    """A panel per layer, and the training loss."""
    layers = data.settings["layers"]
    figure, (axes,) = style.panels(1, len(layers) + 1, height=2.3)
    for m, line in enumerate(LINES):
        dashed = line not in METHODS
        colour, marker = (style.COLOURS["BNP"], "x") if dashed else (style.COLOURS[line], style.MARKERS[line])
        for i, ax in enumerate(axes[:-1]):
            values = data["value"][m, :, i]
            style.band(ax, data["steps"], values, color=colour, label=line, line="--" if dashed else "-")
            known = np.isfinite(data["upper"][m, :, i]).all(axis=0)
            middle = np.median(values, axis=0)
            ax.plot(data["steps"][known], middle[known], marker, color=colour)
            ax.plot(data["steps"][~known], middle[~known], marker, color=colour, markerfacecolor="white")
        if not dashed:
            style.band(axes[-1], data["steps"], data["loss"][m], color=colour, label=line, marker=marker)
    for i, ax in enumerate(axes[:-1]):
        ax.set_title(f"{layers[i]}: $\\kappa^*$ of its block")
        ax.set_yscale("log")
    axes[-1].set_yscale("log")
    axes[-1].set_title("training loss of the batch")
    for ax in axes:
        ax.set_xlabel("step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=len(LINES))
    style.letters(list(axes))
    return figure
