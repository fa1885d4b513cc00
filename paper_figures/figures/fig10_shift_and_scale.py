"""Input shift and scale against the condition number of the first layer, without and with normalization."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import bnp_analysis as bnp
from paper_figures import style
from paper_figures.frame import FigureData, Report, Settings

TITLE = "Shift and scale of the inputs against the condition number"
CLAIM = (
    "The condition number of the first layer's block grows with the fourth power of the inputs' shift and the square "
    "of the spread of their scales; with BNP it depends on neither; with diagonal scaling it depends on the shift, "
    "and with K-FAC it depends on the shift once the damping is no longer negligible."
)
SHOWS = "T3, T7d"
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"samples": 150, "features": 8, "dials": [0, 1, 10, 100], "seeds": [0]},
    "full": {"samples": 1000, "features": 24, "dials": [0, 0.1, 0.3, 1, 3, 10, 30, 100], "seeds": [0, 1, 2, 3, 4]},
}
WAYS = ("none", "diagonal", "BNP", "K-FAC")
KINDS = ("shift", "scale")


def inputs(settings: Settings, kind: str, dial: float, rng: np.random.Generator) -> np.ndarray:
    """Correlated Gaussian features of unit variance, shifted by `dial`, or scaled from 1 to `1 + dial`."""
    n, m = settings["samples"], settings["features"]
    mixing = np.linalg.qr(rng.normal(size=(m, m)))[0] * np.linspace(0.7, 1.3, m)
    h = rng.normal(size=(n, m)) @ mixing
    h = (h - h.mean(axis=0)) / h.std(axis=0)
    return h + dial if kind == "shift" else h * np.geomspace(1, 1 + dial, m)


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """The Gauss-Newton block of one unit of the first layer, teacher labels fixed while the inputs move."""
    shape = (len(KINDS), len(WAYS), len(settings["seeds"]), len(settings["dials"]))
    value, lower, upper = (np.full(shape, np.nan) for _ in range(3))
    total = len(KINDS) * len(settings["seeds"]) * len(settings["dials"])
    done = 0
    for k, kind in enumerate(KINDS):
        for s, seed in enumerate(settings["seeds"]):
            for d, dial in enumerate(settings["dials"]):
                x = torch.from_numpy(inputs(settings, kind, dial, np.random.default_rng(seed)))
                model = _network(settings["features"], x, seed)
                y = torch.zeros(len(x), 1, dtype=torch.float64)
                risk = bnp.EmpiricalRisk(model, torch.nn.functional.mse_loss, (x, y))
                A = bnp.gauss_newton(risk, block="0")
                made = {
                    "none": None,
                    "diagonal": bnp.diagonal_preconditioner(risk, block="0"),
                    "BNP": bnp.bnp_preconditioner(risk, block="0"),
                    "K-FAC": bnp.kfac_preconditioner(risk).block("0"),
                }
                for w, way in enumerate(WAYS):
                    found = bnp.condition_number(A, preconditioner=made[way])
                    value[k, w, s, d], lower[k, w, s, d], upper[k, w, s, d] = found.value, found.lower, found.upper
                done += 1
                report(done / total)
    return {"dials": settings["dials"], "value": value, "lower": lower, "upper": upper}


def _network(m: int, x: torch.Tensor, seed: int) -> torch.nn.Sequential:
    """One tanh unit whose pre-activations do not depend on the inputs' shift and scale: `a = w . (x - mu)/sigma`."""
    g = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(m, 1), torch.nn.Tanh()).double()
    w = torch.randn(m, generator=g, dtype=torch.float64) / m**0.5
    deviation, mean = x.std(dim=0, correction=0), x.mean(dim=0)
    with torch.no_grad():
        model[0].weight[0] = w / deviation
        model[0].bias[0] = -(w / deviation) @ mean
    return model


def failure(data: FigureData) -> str:
    """BNP constant along both dials, the raw number at least a tenth of its law at the end."""
    flat = data["value"][:, WAYS.index("BNP")]
    drift = (flat.max(axis=-1) / flat.min(axis=-1)).max() - 1
    if not drift <= 1e-6:
        return f"with BNP the number drifts by {drift:.2g} along a dial"
    raw = data["value"][:, WAYS.index("none")]
    growth = raw[..., -1] / raw[..., 0]
    return (
        "" if (growth > 0.1 * data["dials"][-1] ** 2).all() else "without P the number grows less than the square law"
    )


def note(data: FigureData) -> str:
    """Inputs, network, seeds."""
    s = data.settings
    flat = data["value"][:, WAYS.index("BNP")]
    return (
        f"Gauss-Newton block of one tanh unit with {s['features']} correlated Gaussian inputs, {s['samples']} "
        f"examples, squared loss; the outputs of the unit are the same at every point of a curve. Median and range "
        f"over seeds {s['seeds']}; all intervals two-sided: {bool(np.isfinite(data['upper']).all())}. With BNP the "
        f"largest relative change along a curve is {(flat.max(axis=-1) / flat.min(axis=-1)).max() - 1:.1g}."
    )


def draw(data: FigureData) -> Figure:
    """Shift on the left, scale on the right."""
    figure, ((left, right),) = style.panels(1, 2, height=2.5, sharey=True)
    colours = dict(zip(WAYS, (style.GREY, style.BLUE, style.ORANGE, style.GREEN), strict=True))
    for k, ax in enumerate((left, right)):
        for w, way in enumerate(WAYS):
            look = style.below(4.5 - 1.2 * w, 9 - 2 * w) if w < len(WAYS) - 1 else {}
            style.band(ax, data["dials"], data["value"][k, w], color=colours[way], label=way, marker="os^D"[w], **look)
        ax.set_xscale("symlog", linthresh=0.3)
        ax.set_yscale("log")
    left.set_xlabel("mean / standard deviation")
    right.set_xlabel("largest over smallest scale, minus one")
    left.set_ylabel(r"$\kappa^*$ of the unit's block")
    left.set_title("shift")
    right.set_title("scale")
    left.legend(title="preconditioner", title_fontsize=7)
    style.letters([left, right])
    return figure
