"""Largest eigenvalue of normalized inputs: `|G^|^2 / R` against `m / R`, and the factor `q^2 = max(m/R, 1)`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import bnp_analysis as bnp
from bnp_analysis.network import layer_rows
from bnp_analysis.training import fit
from paper_figures import style
from paper_figures.frame import FigureData, Report, Settings

TITLE = "Largest eigenvalue of normalized inputs against the size of the batch"
CLAIM = (
    "max(1, m/(R-1)) <= |G^|^2/R <= m always. For independent features the mean of |G^|^2/R over batches lies in "
    "[q^2, 4 q^2], q^2 = max(m/R, 1); correlated features exceed this interval."
)
SHOWS = "T8"
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"features": 64, "rows": [4, 8, 16, 32, 64, 128, 256, 1024], "draws": 5, "seed": 0},
    "full": {
        "features": 64,
        "rows": [3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1400],
        "draws": 20,
        "seed": 0,
    },
}
INDEPENDENT = ("normal", "uniform")
SOURCES = (*INDEPENDENT, "correlation 0.3", "digits, pixels", "digits, ReLU layer")


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Random rows of each source, normalized by their own mean and variance; the squared norm over `R`."""
    rng = np.random.default_rng(settings["seed"])
    m, draws = settings["features"], settings["draws"]
    digits = bnp.data.load("digits")
    model = bnp.models.mlp([64, m, 10], seed=settings["seed"])
    fit(model, torch.nn.functional.cross_entropy, digits.tensors, epochs=3, lr=0.1, seed=settings["seed"])
    risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, digits.tensors, dtype=torch.float64)
    hidden = list(layer_rows(risk).values())[1].flatten(1).numpy()
    seen = {"digits, pixels": digits.tensors[0].double().numpy(), "digits, ReLU layer": hidden}

    def sample(source: str, rows: int) -> np.ndarray:
        if source in seen:
            return seen[source][rng.choice(len(seen[source]), rows, replace=False)]
        if source == "uniform":
            return rng.uniform(size=(rows, m))
        noise = rng.normal(size=(rows, m))
        return noise if source == "normal" else np.sqrt(0.7) * noise + np.sqrt(0.3) * rng.normal(size=(rows, 1))

    shape = (len(SOURCES), len(settings["rows"]), draws)
    observed, features = np.zeros(shape), np.zeros(shape)
    for i, source in enumerate(SOURCES):
        for k, rows in enumerate(settings["rows"]):
            for d in range(draws):
                observed[i, k, d], features[i, k, d] = squared_norm(sample(source, rows))
        report((i + 1) / len(SOURCES))
    return {"sources": SOURCES, "rows": settings["rows"], "observed": observed, "features": features}


def squared_norm(h: np.ndarray) -> tuple[float, int]:
    """`|G^|_2^2 / R` with the constant features left out, and how many features remain."""
    centred = h - h.mean(axis=0)
    deviation = np.sqrt((centred**2).mean(axis=0))
    live = deviation > 1e-12 * max(np.abs(h).max(), 1e-300)
    extended = np.column_stack([np.ones(len(h)), centred[:, live] / deviation[live]])
    return float(np.linalg.norm(extended, 2) ** 2 / len(h)), int(live.sum())


def failure(data: FigureData) -> str:
    """The bounds for all, the band for independent features."""
    rows, m, found = data["rows"][None, :, None], data["features"], data["observed"]
    above = found >= np.maximum(1, m / (rows - 1)) * (1 - 1e-9)
    if not (above & (found <= np.maximum(m, 1) * (1 + 1e-9))).all():
        return "a value leaves [max(1, m/(R-1)), m]"
    square = np.maximum(m / rows, 1)
    independent = np.isin(data.words("sources"), INDEPENDENT)
    mean = (found / square).mean(axis=2)[independent]
    return (
        "" if (mean >= 1 - 1e-9).all() and (mean <= 4).all() else "independent features leave [q^2, 4 q^2] on average"
    )


def note(data: FigureData) -> str:
    """Sources and draws."""
    s = data.settings
    return (
        f"m = {s['features']} features (pixels: those that vary in the batch), median and range of {s['draws']} random "
        f"batches of R rows, seed {s['seed']}; ReLU layer: inputs of the second layer of "
        f"64-{s['features']}-10, trained for 3 epochs."
    )


def draw(data: FigureData) -> Figure:
    """Left against `m/R`; right divided by `q^2`."""
    figure, ((left, right),) = style.panels(1, 2, height=2.6)
    colours = (style.BLUE, style.SKY, style.PURPLE, style.GREEN, style.ORANGE)
    for i, (source, colour) in enumerate(zip(data.words("sources"), colours, strict=True)):
        m = data["features"][i].mean(axis=1)
        x = m / data["rows"]
        look: dict[str, Any] = {"color": colour, "marker": "os^vD"[i], **(style.below() if i == 0 else {})}
        style.band(left, x, data["observed"][i].T, label=source, **look)
        ratio = data["observed"][i] / np.maximum(data["features"][i] / data["rows"][:, None], 1)
        style.band(right, x, ratio.T, **look)
    grid = np.geomspace(0.03, 25, 200)
    left.plot(grid, np.maximum(grid, 1), color=style.BLACK, linestyle="--", label="$q^2=\\max(m/R,1)$")
    left.plot(grid, (1 + np.sqrt(grid)) ** 2, color=style.BLACK, linestyle=":", label=r"$(1+\sqrt{m/R})^2$")
    right.axhspan(1, 4, color=style.GREY, alpha=0.2, linewidth=0)
    right.annotate("$[q^2,4q^2]$", (0.035, 1.12), fontsize=7)
    left.set_ylabel(r"$\|\hat G\|^2/R$")
    right.set_ylabel(r"$\|\hat G\|^2/(R\,q^2)$")
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("$m/R$")
    figure.legend(loc="outside right upper")
    left.set_title("observed")
    right.set_title("after division by $q^2$")
    style.letters([left, right])
    return figure
