"""Published condition numbers and ranks beside certified ones; the sources are in `paper_figures/gallery`."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from paper_figures import style
from paper_figures.frame import FigureData, Report, Settings
from paper_figures.gallery import DIGITS, WIDE, entries

TITLE = "Reported and certified condition numbers and ranks"
CLAIM = (
    "Every certified interval is two-sided and contains the result of exact arithmetic or of 50 digits, where one was "
    "computed. The sources' routines agree with the interval to six digits where they are stable (ranks and "
    "regressions in float64, whitened inputs), and differ by more than a tenth where they are not (deflated power "
    "iteration, eigenvalues of a nonsymmetric product, float32)."
)
SHOWS = "T13"
_INPUTS = [f"paper_figures/gallery/{name}.py" for name in entries()]
PRESETS: dict[str, dict[str, Any]] = {
    preset: {
        "entries": {name: dict(entry.presets[preset]) for name, entry in entries().items()},
        "inputs": [*_INPUTS, "paper_figures/full/paper_fig8.npz"],
    }
    for preset in ("quick", "full")
}
NUMBERS = ("printed", "reported", "lower", "upper", "exact")
AGREES = {True: "yes", False: "no", None: "open"}


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """One element of each array per row; `numbers` `(rows, 5)`."""
    rows, names = [], []
    for k, (name, own) in enumerate(settings["entries"].items()):
        found = list(entries()[name].measure(own))
        rows += found
        names += [name] * len(found)
        report((k + 1) / len(settings["entries"]))
    return {
        **{"entry": names, "case": [row.case for row in rows], "quantity": [row.quantity for row in rows]},
        "agrees": [AGREES[row.agrees] for row in rows],
        "numbers": np.array([[getattr(row, word) for word in NUMBERS] for row in rows]),
    }


def distance(reported: float, lower: float, upper: float) -> float:
    """How far outside of the interval, relative to its nearer end."""
    if lower <= reported <= upper:
        return 0.0
    return abs(reported - lower) / lower if reported < lower else (reported - upper) / upper


def failure(data: FigureData) -> str:
    """Each interval against the exact number, and each reported number against what is claimed of it."""
    words = zip(data.words("entry"), data.words("case"), data.words("agrees"), data["numbers"], strict=True)
    for entry, case, agrees, (_, reported, lower, upper, exact) in words:
        what = f"{entry}, {case}"
        if not (0 < lower <= upper < np.inf):
            return f"{what}: no two-sided interval but {lower:.6g} .. {upper:.6g}"
        if exact < lower or exact > upper:
            return f"{what}: {lower:.10g} .. {upper:.10g} does not contain {exact:.10g}"
        apart = distance(reported, lower, upper)
        if agrees == "yes" and not apart <= DIGITS:
            return f"{what}: reported {reported:.10g} differs by {apart:.2g}"
        if agrees == "no" and not apart > WIDE:
            return f"{what}: reported {reported:.6g} agrees to {apart:.2g}"
    return ""


def note(data: FigureData) -> str:
    """Numbers, checks, and where sources and settings are described."""
    checked = np.isfinite(data["numbers"][:, NUMBERS.index("exact")]).sum()
    return (
        f"{len(data['numbers'])} numbers of {len(set(data.words('entry')))} sources, {checked} of them checked in "
        "exact arithmetic or with 50 digits; sources, settings and reasons are in docs/reported.md."
    )


def draw(data: FigureData) -> Figure:
    """One line per number, under the title of its source: reported and printed marks, certified bar."""
    titles = entries()
    names = [titles[e].title if e in titles else e for e in data.words("entry")]
    firsts = [k for k in range(len(names)) if k == 0 or names[k] != names[k - 1]]
    # A line of its own for every title.
    places = np.array([k + sum(first <= k for first in firsts) for k in range(len(names))])
    lines = len(names) + len(firsts)
    figure, axes = style.panels(1, 1, height=0.19 * lines + 0.9)
    ax = axes[0, 0]
    printed, reported, lower, upper, exact = data["numbers"].T
    ax.hlines(places, np.minimum(reported, lower), np.maximum(reported, upper), color=style.GREY, linewidth=0.6)
    ax.barh(places, upper - lower, 0.7, lower, color=style.BLUE)
    ax.plot(np.sqrt(lower * upper), places, "|", color=style.BLUE, markersize=9, markeredgewidth=2, label="certified")
    ax.plot(exact, places, "+", color=style.BLACK, label="exact, or with 50 digits")
    ax.plot(reported, places, "o", color=style.ORANGE, fillstyle="none", label="the source's routine, here")
    ax.plot(printed, places, "x", color=style.PURPLE, label="printed in the source")
    ax.set_xscale("log")
    ax.set_xlim(np.nanmin(data["numbers"]) / 3, np.nanmax(data["numbers"]) * 3)
    ax.set_yticks(places, data.words("case"), fontsize=6)
    for first in firsts:
        line = places[first] - 1
        ax.axhline(line - 0.5, color=style.GREY, linewidth=0.4)
        ax.annotate(names[first], (0.01, line), xycoords=("axes fraction", "data"), fontsize=6, va="center")
    ax.set_ylim(lines - 0.5, -0.5)
    ax.set_xlabel("condition number, or rank")
    figure.legend(*ax.get_legend_handles_labels(), ncol=4, loc="outside upper center")
    return figure
