"""Layer conditioning over training: raw, centred, normalized inputs, and the Hessian's blocks without and with `P`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import bnp_analysis as bnp
from paper_figures import style
from paper_figures.frame import FigureData, Report, Settings

TITLE = "Conditioning of each layer over training"
CLAIM = (
    "Centring does not increase the condition number of a layer's inputs with full column rank, and normalization is "
    "within sqrt(m) of the best column scaling; the median over the unit blocks of the Hessian decreases as well."
)
SHOWS = "T1, T1', T7a, T7b"
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"samples": 200, "hidden": [8, 8], "steps": [0, 100], "lr": 0.1, "batch": 60, "seed": 0},
    "full": {
        "samples": 1400,
        "hidden": [32, 32, 32],
        "steps": [0, 10, 50, 200, 1000],
        "lr": 0.1,
        "batch": 60,
        "seed": 0,
    },
}
FORMS = ("inputs", "centered", "normalized")


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Train a perceptron on digits; at each of the steps a table of its layers."""
    digits = bnp.data.load("digits", n=settings["samples"])
    x, y = digits.tensors
    loss = torch.nn.functional.cross_entropy
    model = bnp.models.mlp([64, *settings["hidden"], 10], seed=settings["seed"], dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["lr"])
    generator = torch.Generator().manual_seed(settings["seed"])
    rows: list[list[Any]] = []
    done = 0
    for place, step in enumerate(settings["steps"]):
        for _ in range(step - done):
            chosen = torch.randint(0, len(y), (settings["batch"],), generator=generator)
            optimizer.zero_grad()
            loss(model(x[chosen].double()), y[chosen]).backward()
            optimizer.step()
        done = step
        risk = bnp.EmpiricalRisk(model, loss, (x.double(), y))
        rows.append([*bnp.layer_table(risk).layers])
        report((place + 1) / len(settings["steps"]))
    names = [row.layer for row in rows[0]]
    numbers = {form: [[getattr(row, form).value for row in table] for table in rows] for form in FORMS}
    units = {
        f"{side}_{what}": [[_quantile(getattr(row, side), q) for row in table] for table in rows]
        for side in ("unit_blocks", "unit_blocks_with_P")
        for what, q in (("median", 0.5), ("low", 0.1), ("high", 0.9))
    }
    return {
        **{"layers": names, "steps": settings["steps"], "features": [row.features for row in rows[0]]},
        "full_rank": [[row.inputs.rank == row.inputs.dim for row in table] for table in rows],
        "centered_full_rank": [[row.centered.rank == row.centered.dim for row in table] for table in rows],
        "two_sided": [
            [
                np.mean([k.two_sided for k in (*row.unit_blocks, *row.unit_blocks_with_P) if k is not None])
                for row in table
            ]
            for table in rows
        ],
        **numbers,
        **units,
    }


def _quantile(found: Any, q: float) -> float:
    values = [k.value for k in found if k is not None]
    return float(np.quantile(values, q)) if values else float("nan")


def failure(data: FigureData) -> str:
    """Centering at full column rank must not hurt."""
    full = data["full_rank"] & data["centered_full_rank"]
    good = data["centered"] <= data["inputs"] * (1 + 1e-9)
    if not good[full].all():
        return f"centering raised the condition number of {int((~good)[full].sum())} inputs of full column rank"
    near = data["normalized"] <= np.sqrt(data["features"]) * data["centered"] * (1 + 1e-9)
    bad = int((~near)[data["centered_full_rank"]].sum())
    return f"{bad} normalized inputs exceed sqrt(m) times the centred ones" if bad else ""


def note(data: FigureData) -> str:
    """Data, network, seed."""
    s = data.settings
    return (
        f"digits, {s['samples']} examples; ReLU perceptron 64-{'-'.join(map(str, s['hidden']))}-10, SGD with rate "
        f"{s['lr']} and batch {s['batch']}, seed {s['seed']}. Constant pixels are excluded. Below: median and 10 to "
        f"90 % of the units' Hessian blocks (equal to the Gauss-Newton blocks for ReLU), float64, "
        f"{data['two_sided'].mean():.0%} of them with two-sided intervals."
    )


def draw(data: FigureData) -> Figure:
    """Inputs above, blocks below; a column of panels per layer."""
    layers = data.words("layers")
    figure, axes = style.panels(2, len(layers), sharex=True, sharey="row", height=1.9, extra=0.3)
    steps = data["steps"]
    for i, layer in enumerate(layers):
        top, bottom = axes[0][i], axes[1][i]
        forms = zip(FORMS, ("raw $\\hat H$", "centred $\\hat HU$", "normalized $\\hat G$"), strict=True)
        for (form, label), colour, marker in zip(forms, (style.GREY, style.BLUE, style.ORANGE), "os^", strict=True):
            top.plot(steps, data[form][:, i], color=colour, marker=marker, label=label)
        sides = (("unit_blocks", "without $P$", style.GREY), ("unit_blocks_with_P", "with $P$", style.ORANGE))
        for side, label, colour in sides:
            bottom.plot(steps, data[f"{side}_median"][:, i], color=colour, marker="o", label=label)
            low, high = data[f"{side}_low"][:, i], data[f"{side}_high"][:, i]
            bottom.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        top.set_title(f"{layer}, {data['features'][i]} inputs")
        for ax in (top, bottom):
            ax.set_yscale("log")
            ax.set_xscale("symlog", linthresh=10)
        bottom.set_xlabel("step")
    axes[0][0].set_ylabel(r"$\sigma_{\max}/\sigma_{\min}^{+}$ of the inputs")
    axes[1][0].set_ylabel(r"$\kappa^*$ of unit blocks")
    handles, labels = axes[0][0].get_legend_handles_labels()
    below = axes[1][0].get_legend_handles_labels()
    words = [*labels, *(f"blocks {label}" for label in below[1])]
    figure.legend([*handles, *below[0]], words, loc="outside upper center", ncols=len(words))
    return figure
