"""Figure 5 of the paper: the convolutional network at batch sizes 128 and 2."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from paper_figures import training_panels
from paper_figures.frame import FigureData, Report, Settings

TITLE = "The paper's Figure 5: convolutional network at batch sizes 128 and 2"
CLAIM = (
    "Each method is within 2 points of its published test accuracy after as many epochs, and BNP is ahead of BN at "
    "batch size 2."
)
SHOWS = "T3, T6"
PANELS = ("fig5_cnn_128", "fig5_cnn_2")
PRESETS: dict[str, dict[str, Any]] = training_panels.presets(PANELS)
POINTS = 2.0


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Recorded runs and published curves, or small runs on digits."""
    return training_panels.compute(settings, report)


def failure(data: FigureData) -> str:
    """The accuracies beside the published ones, and BNP ahead of BN at batch size 2."""
    if data.settings.get("digits"):
        return training_panels.trained(data)
    apart = training_panels.beside(data, POINTS)
    if apart:
        return apart
    bnp, bn = (training_panels.last(data.arrays, PANELS[1], method) for method in ("BNP", "BN"))
    if not bnp > bn:
        return f"{training_panels.TITLES[PANELS[1]]}: BNP is not ahead of BN"
    return ""


def note(data: FigureData) -> str:
    """Data, seeds, epochs."""
    return training_panels.note(data)


def draw(data: FigureData) -> Figure:
    """Training loss above, test accuracy below."""
    return training_panels.draw(data)
