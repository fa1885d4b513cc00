"""Figure 4 of the paper: small batches, 6 and 1, of CIFAR-10."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from paper_figures import training_panels
from paper_figures.frame import FigureData, Report, Settings

TITLE = "The paper's Figure 4: batches of 6 and of one"
CLAIM = "Each method is within 1 point of its published test accuracy after as many epochs, at batch size 6 and at 1."
SHOWS = "T3, T4"
PANELS = ("fig4_cifar_6", "fig4_dense_1", "fig4_cnn_1")
PRESETS: dict[str, dict[str, Any]] = training_panels.presets(PANELS)
POINTS = 1.0


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Recorded runs and published curves, or small runs on digits."""
    return training_panels.compute(settings, report)


def failure(data: FigureData) -> str:
    """The accuracies beside the published ones."""
    if data.settings.get("digits"):
        return training_panels.trained(data)
    return training_panels.beside(data, POINTS)


def note(data: FigureData) -> str:
    """Data, seeds, epochs."""
    return training_panels.note(data)


def draw(data: FigureData) -> Figure:
    """Training loss above, test accuracy below."""
    return training_panels.draw(data)
