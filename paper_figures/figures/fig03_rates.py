"""Convergence near a minimizer: gradient norms with predicted slopes, and predicted against observed time constants."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import bnp_analysis as bnp
from bnp_analysis.theory import check_convergence_rate
from bnp_analysis.theory.problems import teacher_student
from paper_figures import style
from paper_figures.frame import ROOT, FigureData, Report, Settings

TITLE = "Rates of convergence, predicted by the effective condition number"
CLAIM = (
    "Near a minimizer with null directions, gradient descent, heavy ball and BNP contract at the rates predicted by "
    "the effective condition number at the limit point: the time constants agree within 3 % for every run that reaches "
    "its tail. With badly scaled and shifted inputs BNP is faster by the predicted factor."
)
SHOWS = "T14, T15"
RECORDED = "benchmarks/results/convergence_rates.json"
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "widths": [3, 3, 2],
        "shift": 1.0,
        "kappa": 300.0,
        "seeds": [0],
        "n": 80,
        "inputs": [RECORDED],
        "time_limit": 60,
    },
    "full": {
        "widths": [3, 3, 2],
        "shift": 1.0,
        "kappa": 500.0,
        "seeds": [0, 1, 2, 3],
        "n": 80,
        "inputs": [RECORDED],
        "time_limit": 120,
    },
}
CURVES = ("gd", "heavy_ball", "gd with BNP", "bnp")
KINDS = ("gd", "heavy_ball", "bnp_fixed", "bnp", "bnp_heavy_ball")  # of the recorded study, the first as in CURVES
LABELS = ("gradient descent", "heavy ball", "BNP, fixed statistics", "BNP, running statistics", "BNP, heavy ball")
COLOURS = (style.GREY, style.BLUE, style.ORANGE, style.PURPLE, style.GREEN)
TOLERANCE = 0.03


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """The four iterations on a teacher-student problem per seed; then the recorded study of many problems."""
    rows: list[list[float]] = []
    arrays: dict[str, Any] = {}
    total = len(settings["seeds"]) * len(CURVES)
    for s, seed in enumerate(settings["seeds"]):
        problem = teacher_student(
            settings["widths"], shift=settings["shift"], kappa=settings["kappa"], n=settings["n"], seed=seed
        )
        P = bnp.bnp_preconditioner(problem.solved)
        for c, name in enumerate(CURVES):
            check = check_convergence_rate(
                problem.risk,
                P if name == "gd with BNP" else None,
                method=name.split()[0],
                seed=seed,
                time_limit=settings["time_limit"],
            )
            observed = check.fit.time_constant if check.outcome == "observed" else np.nan
            rows.append([c, -1 / np.log(check.factor), observed, check.kappa])
            if s == 0:
                arrays |= {f"norms{c}": check.gradient_norms.numpy(), f"factor{c}": check.factor}
            report((s * len(CURVES) + c + 1) / total)
    recorded = json.loads((ROOT / RECORDED).read_text())["rows"] if (ROOT / RECORDED).exists() else []
    known = [
        [
            KINDS.index(row["method"]),
            *(np.nan if row[x] is None else row[x] for x in ("predicted", "observed", "kappa")),
        ]
        for row in recorded
    ]
    return arrays | {"live": rows, "recorded": np.array(known, dtype=float).reshape(-1, 4)}


def failure(data: FigureData) -> str:
    """Within the tolerance wherever observed, and enough observed."""
    rows = np.concatenate([data["live"], data["recorded"]])
    seen = np.isfinite(rows[:, 2])
    if seen.mean() < 0.5:
        return f"only {int(seen.sum())} of {len(rows)} runs reached their tail"
    error = np.abs(rows[seen, 2] / rows[seen, 1] - 1)
    if not error.max() <= TOLERANCE:
        return f"{int((~(error <= TOLERANCE)).sum())} of {int(seen.sum())} time constants are off by more than 3 %"
    gain = speedup(data)
    return "" if gain > 1 else f"BNP is not faster than gradient descent (factor {gain:.2g})"


def speedup(data: FigureData) -> float:
    """Time constant of gradient descent over that of BNP with fixed statistics, predicted, smallest over the seeds."""
    rows = data["live"].reshape(-1, len(CURVES), 4)
    return float((rows[:, 0, 1] / rows[:, 2, 1]).min())


def note(data: FigureData) -> str:
    """Problems, seeds, what was observed."""
    s = data.settings
    rows = np.concatenate([data["live"], data["recorded"]])
    seen = np.isfinite(rows[:, 2])
    error = np.abs(rows[seen, 2] / rows[seen, 1] - 1).max()
    widths = "-".join(map(str, s["widths"]))
    return (
        f"(a) ReLU teacher-student network {widths} on {s['n']} images of digits reduced to {s['widths'][0]} features, "
        f"mean over deviation {s['shift']}, scales chosen for kappa* = {s['kappa']:g}; float64, best steps, perturbed "
        f"from the minimizer, seed {s['seeds'][0]}; dashed: r^k (heavy ball k r^k) with the predicted r. (b, c) "
        f"The same for seeds {s['seeds']} (filled) and the recorded study {RECORDED} (open): {int(seen.sum())} of "
        f"{len(rows)} runs reached their tail, largest error {error:.1%}. Smallest predicted gain of BNP in (a): "
        f"{speedup(data):.3g} times."
    )


def draw(data: FigureData) -> Figure:
    """Curves on the left, the scatter on the right."""
    figure, ((left, right, error),) = style.panels(1, 3, height=2.4, extra=0.3)
    for c, (label, colour) in enumerate(zip(LABELS, COLOURS, strict=True)):
        for rows, face in ((data["recorded"], "white"), (data["live"], colour)):
            own = rows[rows[:, 0] == c]
            look = {"color": colour, "markerfacecolor": face, "marker": "osD^v"[c], "linestyle": "none"}
            right.plot(own[:, 1], own[:, 2], label=label, **look)
            error.plot(own[:, 1], 100 * (own[:, 2] / own[:, 1] - 1), **look)
        norms = data.arrays.get(f"norms{c}", [])
        if not len(norms):  # too slow to observe, or in the recorded study only
            continue
        k = np.arange(1, len(norms) + 1)
        left.plot(k, norms / norms[0], color=colour, label=label, **(style.below() if c == 2 else {}))
        slope = np.log(float(data[f"factor{c}"])) * k + (np.log(k) if c == 1 else 0)
        anchor = len(norms) - 1
        if anchor > 0:
            line = np.exp(slope - slope[anchor]) * norms[anchor] / norms[0]
            left.plot(k[len(k) // 4 :], line[len(k) // 4 :], "--", color=style.BLACK, linewidth=0.8)
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xlabel("iteration")
    left.set_ylabel(r"$\|P^T\nabla L\|$ over its first value")
    left.set_title("gradient norms, slopes")
    everything = np.concatenate([data["live"], data["recorded"]])[:, 1:3]
    everything = everything[np.isfinite(everything).all(axis=1)]
    limits = [np.nanmin(everything) / 2, np.nanmax(everything) * 2]
    right.plot(limits, limits, color=style.BLACK, linewidth=0.7)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel(r"predicted $-1/\log r$")
    right.set_ylabel(r"observed $-1/\log r$")
    right.set_title("time constants")
    error.axhspan(-3, 3, color=style.GREY, alpha=0.2, linewidth=0)
    error.set_xscale("log")
    error.set_xlabel(r"predicted $-1/\log r$")
    error.set_ylabel("deviation, %")
    error.set_title("observed against predicted")
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles[1::2], labels[1::2], loc="outside upper center", ncols=len(LABELS))
    style.letters([left, right, error])
    return figure
