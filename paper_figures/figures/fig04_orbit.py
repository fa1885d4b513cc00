"""The condition number along an orbit of scale invariance: plain, with BNP, with BNP and output scaling."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

import bnp_analysis as bnp
from paper_figures import style
from paper_figures.frame import FigureData, Report, Settings

TITLE = "The condition number along an orbit of scale invariance"
CLAIM = (
    "Rescaling a ReLU unit does not change the function of the network, and kappa* of the Gauss-Newton matrix follows "
    "kappa*(T^-T A T^-1) over many decades. BNP removes the effect of the scale of the outgoing layer's inputs; with "
    "output scaling kappa* is constant to 1e-6."
)
SHOWS = "T10, T12"
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"widths": [6, 5, 3], "samples": 60, "decades": 3, "points": 5, "seeds": [0]},
    "full": {"widths": [6, 5, 3], "samples": 200, "decades": 3, "points": 25, "seeds": [0, 1, 2, 3, 4]},
}
WAYS = ("plain", "BNP", "BNP, output scaling")
LOSS = torch.nn.functional.cross_entropy


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """One hidden unit scaled by `t`, its outgoing weights by `1/t`; every matrix at its own `P`."""
    scales = np.geomspace(10.0 ** -settings["decades"], 10.0 ** settings["decades"], settings["points"])
    shape = (len(WAYS), len(settings["seeds"]), len(scales))
    value, lower, upper = (np.full(shape, np.nan) for _ in range(3))
    law, outputs = np.zeros(shape[1:]), np.zeros(shape[1:])
    for s, seed in enumerate(settings["seeds"]):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(settings["samples"], settings["widths"][0], generator=g, dtype=torch.float64)
        y = torch.randint(0, settings["widths"][-1], (settings["samples"],), generator=g)
        model = bnp.models.mlp(settings["widths"], seed=seed, dtype=torch.float64)
        risk = bnp.EmpiricalRisk(model, LOSS, (x, y))
        unit = _most_active(risk)
        F = bnp.gauss_newton(risk).factor.to_dense()
        for k, t in enumerate(scales):
            stretch = scaling(risk, unit, float(t))
            moved = risk.at(risk.theta * stretch)
            A, N = bnp.gauss_newton(moved), bnp.null_directions(moved)
            ways = (None, bnp.bnp_preconditioner(moved), bnp.bnp_preconditioner(moved, output_scale=True))
            for w, P in enumerate(ways):
                found = bnp.condition_number(A, preconditioner=P, null=N)
                value[w, s, k], lower[w, s, k], upper[w, s, k] = found.value, found.lower, found.upper
            sigma = torch.linalg.svdvals(F / stretch)[: found.rank]
            law[s, k] = float((sigma[0] / sigma[-1]) ** 2)
            outputs[s, k] = float((moved.outputs[0] - risk.outputs[0]).abs().max() / risk.outputs[0].abs().max())
            report((s * len(scales) + k + 1) / (len(scales) * len(settings["seeds"])))
    return {"t": scales, "value": value, "lower": lower, "upper": upper, "law": law, "outputs": outputs}


def _most_active(risk: Any) -> int:
    """The hidden unit with the largest mean input to the next layer."""
    rows = list(bnp.network.layer_rows(risk).values())[1]
    return int(rows.flatten(1).mean(dim=0).argmax())


def scaling(risk: Any, unit: int, t: float) -> Tensor:
    """The diagonal of `T`: `t` on the unit's bias and incoming weights, `1/t` on its outgoing weights."""
    first, second = (risk.space.layer_names(name) for name in ("fc1", "fc2"))
    tensors = {name: torch.ones_like(part) for name, part in risk.space.unflatten(risk.theta).items()}
    for name in first:
        tensors[name][unit] = t
    for name in second:
        if tensors[name].ndim == 2:
            tensors[name][:, unit] = 1 / t
    return risk.space.flatten(tensors)


def failure(data: FigureData) -> str:
    """Two-sided everywhere, the law met, and constancy with output scaling."""
    if not np.isfinite(data["upper"]).all():
        return f"{int((~np.isfinite(data['upper'])).sum())} numbers are one-sided"
    if not data["outputs"].max() < 1e-10:
        return f"the outputs change by {data['outputs'].max():.1e} along the orbit"
    error = np.abs(data["value"][0] / data["law"] - 1).max()
    if not error < 1e-4:
        return f"the plain number leaves its law by {error:.1e}"
    constant = data["value"][2]
    drift = (constant.max(axis=1) / constant.min(axis=1)).max() - 1
    return "" if drift < 1e-6 else f"with output scaling the number drifts by {drift:.1e}"


def note(data: FigureData) -> str:
    """Network, data, seeds, the largest deviations."""
    s = data.settings
    constant = data["value"][2]
    drift = (constant.max(axis=1) / constant.min(axis=1)).max() - 1
    error = np.abs(data["value"][0] / data["law"] - 1).max()
    return (
        f"ReLU perceptron {'-'.join(map(str, s['widths']))} at its initialization, softmax cross-entropy, "
        f"{s['samples']} normal inputs, float64; median and range over seeds {s['seeds']}. All intervals two-sided "
        f"with the null directions declared. Largest relative deviation from the formula "
        f"{error:.0e}, change of kappa* with output scaling {drift:.0e}, of the outputs {data['outputs'].max():.0e}."
    )


def draw(data: FigureData) -> Figure:
    """All curves in one panel, and on the right relative to their value at `t = 1`."""
    figure, ((left, right),) = style.panels(1, 2, height=2.6)
    t, middle = data["t"], len(data["t"]) // 2
    for w, (way, colour) in enumerate(zip(WAYS, (style.GREY, style.BLUE, style.ORANGE), strict=True)):
        values = data["value"][w]
        style.band(left, t, values, color=colour, label=way, marker="os^"[w])
        style.band(right, t, values / values[:, [middle]], color=colour, marker="os^"[w])
    left.plot(t, np.median(data["law"], axis=0), ":", color=style.BLACK, label=r"law $\kappa^*(T^{-T}AT^{-1})$")
    left.set_ylabel(r"$\kappa^*$ of the Gauss-Newton matrix")
    right.set_ylabel(r"$\kappa^*(t)/\kappa^*(1)$")
    left.set_title("along the orbit")
    right.set_title("relative to $t=1$")
    for ax in (left, right):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlabel("scale $t$ of one hidden unit")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    style.letters([left, right])
    return figure
