"""Figure 3 of the paper: the dense network on MNIST and CIFAR-10 at batch size 60."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from paper_figures import training_panels
from paper_figures.experiments import RATES
from paper_figures.frame import FigureData, Report, Settings

TITLE = "The paper's Figure 3: dense network at batch size 60"
CLAIM = (
    "Each method ends within 0.5 points of its published test accuracy, and the training loss of BNP ends below those "
    "of the others on MNIST, as published."
)
SHOWS = "T3, T4"
PANELS = ("fig3_mnist_60", "fig3_cifar_60")
PRESETS: dict[str, dict[str, Any]] = training_panels.presets(PANELS)
POINTS = 0.5


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Recorded runs and published curves, or small runs on digits."""
    return training_panels.compute(settings, report)


def failure(data: FigureData) -> str:
    """The accuracies beside the published ones, and BNP's loss below the others on MNIST."""
    if data.settings.get("digits"):
        return training_panels.trained(data)
    apart = training_panels.beside(data, POINTS)
    if apart:
        return apart
    losses = {m: training_panels.last(data.arrays, PANELS[0], m, "train_loss") for m in RATES[PANELS[0]]}
    above = [m for m, found in losses.items() if m != "BNP" and not losses["BNP"] < found]
    if above:
        return f"{training_panels.TITLES[PANELS[0]]}: the loss of BNP does not end below that of {', '.join(above)}"
    return ""


def note(data: FigureData) -> str:
    """Data, seeds, epochs."""
    return training_panels.note(data)


def draw(data: FigureData) -> Figure:
    """Training loss above, test accuracy below."""
    return training_panels.draw(data)
