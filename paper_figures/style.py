"""One look for all figures: colours that colour-blind readers tell apart, sizes for a column of print."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito 2008.
BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, GREY, BLACK = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#777777", "#000000"),
)
COLOURS = {
    **{"vanilla": GREY, "BN": BLUE, "LN": GREEN, "GN": SKY, "renorm": PURPLE, "BNP": ORANGE, "BNP+GN": YELLOW},
}
MARKERS = {"vanilla": "o", "BN": "s", "LN": "^", "GN": "v", "renorm": "D", "BNP": "P", "BNP+GN": "X"}
COLUMN, PAGE = 3.3, 6.8  # widths in inches of one and of two columns of a journal

_SETTINGS: dict[str, Any] = {
    **{"font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 6.5, "xtick.labelsize": 7},
    **{"ytick.labelsize": 7, "lines.linewidth": 1.1, "lines.markersize": 3.5, "axes.linewidth": 0.6},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "pdf.fonttype": 42},
    **{"figure.dpi": 100, "savefig.dpi": 220, "axes.grid": True, "grid.linewidth": 0.3, "grid.alpha": 0.5},
    **{"axes.axisbelow": True, "legend.handlelength": 1.6, "mathtext.fontset": "dejavusans"},
}


def panels(
    rows: int = 1, columns: int = 1, *, width: float = PAGE, height: float = 2.3, extra: float = 0.0, **more: Any
) -> Any:
    """A figure and its axes as an array `(rows, columns)`, in the common style.

    `height` is that of a row, `extra` that of a legend above; both in inches.
    """
    mpl.rcParams.update(_SETTINGS)
    return plt.subplots(
        rows, columns, figsize=(width, rows * height + extra), layout="constrained", squeeze=False, **more
    )


def band(
    ax: Axes,
    x: Any,
    samples: Any,
    *,
    color: str,
    label: str | None = None,
    marker: str = "",
    line: str = "-",
    **look: Any,
) -> None:
    """Median over the first axis of `samples`, with the range from smallest to largest as a band."""
    values = np.asarray(samples, dtype=float)
    ax.plot(x, np.median(values, axis=0), line, color=color, label=label, marker=marker, **look)
    if len(values) > 1:
        ax.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)


def below(width: float = 3.2, size: float = 7.0) -> dict[str, Any]:
    """The look of a curve that others may cover: wide and pale, with open markers that show around theirs."""
    return {"linewidth": width, "alpha": 0.5, "markersize": size, "markerfacecolor": "none"}


def letters(axes: Sequence[Axes]) -> None:
    """(a), (b), ... in front of the panels' titles."""
    for letter, ax in zip("abcdefghijklmnop", axes, strict=False):
        ax.set_title(f"({letter}) {ax.get_title()}", loc="left", fontsize=8)
        ax.set_title("")


def finish(figure: Figure, note: str, failure: str = "") -> Figure:
    """A claim that fails in red above the panels, and `note`, where it is not empty, below them."""
    inches = figure.get_figwidth()
    if note:
        lines = textwrap.wrap(note, int(23 * inches))
        figure.supxlabel("\n".join(lines), fontsize=5.5, color=GREY, x=0.01, ha="left")
    if failure:
        lines = textwrap.wrap(f"The claim fails here: {failure}", int(15 * inches))
        text = "\n".join(lines)
        if figure.legends:  # a title would be drawn over a legend of the whole figure
            figure.legends[0].set_title(text, prop={"size": 8})
            figure.legends[0].get_title().set_color("red")
        else:
            figure.suptitle(text, color="red", fontsize=8)
    return figure
