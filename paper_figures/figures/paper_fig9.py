"""Figure 9 and Table 1 of the paper: the time of an epoch with BNP over that with BatchNorm."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from bnp_analysis.training.bnp import BNP
from paper_figures import style
from paper_figures.experiments import Job, Panel, network
from paper_figures.frame import FigureData, Report, Settings
from paper_figures.training_panels import PUBLISHED

TITLE = "The paper's Figure 9 and Table 1: time of BNP over that of BN"
CLAIM = (
    "A training step of the dense 100-100-10 network with BNP takes at most 1.5 times as long as with BatchNorm, at "
    "batch sizes 16, 256 and 512."
)
SHOWS = "T3, T9"
TIMED = True
BATCHES = (16, 256, 512)
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"batches": list(BATCHES), "rounds": 3, "steps": 5, "features": 64, "seed": 0},
    "full": {"batches": list(BATCHES), "rounds": 40, "steps": 20, "features": 3072, "seed": 0},
}
METHODS = ("Vanilla", "BN", "BNP")
MOST = 1.5


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Milliseconds a step, `(batches, methods, rounds)`: the methods take turns, so that all meet the same machine."""
    published = json.loads(PUBLISHED.read_text())["table_1"]["rows"]
    found = np.zeros((len(settings["batches"]), len(METHODS), settings["rounds"]))
    generator = torch.Generator().manual_seed(settings["seed"])
    for b, batch in enumerate(settings["batches"]):
        x = torch.rand(batch, settings["features"], generator=generator)
        y = torch.randint(10, (batch,), generator=generator)
        steps = [_step(method, batch, x, y) for method in METHODS]
        for step in steps:
            step()
        for r in range(settings["rounds"]):
            for m, step in enumerate(steps):
                began = time.perf_counter()
                for _ in range(settings["steps"]):
                    step()
                found[b, m, r] = 1e3 * (time.perf_counter() - began) / settings["steps"]
        report((b + 1) / len(settings["batches"]))
    return {"batch": settings["batches"], "ms": found, "published": [published["BN"], published["BNP"]]}


def _step(method: str, batch: int, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """One training step of the network by a method."""
    panel = Panel("dense", "", batch, 1, hidden=(100, 100))
    model = network(Job("fig9", method, 0, 0.01, panel), x.shape[1:])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pre = BNP.paper(model) if method == "BNP" else None

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        if pre is not None:
            pre.step()
        optimizer.step()

    return step


def ratios(data: FigureData) -> np.ndarray:
    """Of BNP to BN, a batch size at a time, of each round: `(batches, rounds)`."""
    ms = data["ms"]
    return np.asarray(ms[:, METHODS.index("BNP")] / ms[:, METHODS.index("BN")])


def failure(data: FigureData) -> str:
    """The median of the rounds' ratios."""
    for batch, found in zip(data["batch"], np.median(ratios(data), axis=1), strict=True):
        if not 0 < found <= MOST:
            return f"batch {batch}: BNP takes {found:.2f} times as long as BN"
    return ""


def note(data: FigureData) -> str:
    """The network, the turns, and the published machine."""
    s = data.settings
    return (
        f"Dense 100-100-10 on {s['features']} random inputs, one CPU thread, float32; {s['rounds']} rounds of "
        f"{s['steps']} steps, in which the methods alternate; medians, bars from the first to the third quartile. "
        "Grey: seconds per epoch from Table 1, on a V100."
    )


def draw(data: FigureData) -> Figure:
    """Milliseconds, and the ratio beside the published one."""
    figure, (axes,) = style.panels(1, 2, height=2.3)
    batch = np.asarray(data["batch"])
    looks = {"Vanilla": "vanilla", "BN": "BN", "BNP": "BNP"}
    for m, method in enumerate(METHODS):
        low, mid, high = np.quantile(data["ms"][:, m], (0.25, 0.5, 0.75), axis=1)
        look = {"color": style.COLOURS[looks[method]], "marker": style.MARKERS[looks[method]], "label": method}
        axes[0].errorbar(batch, mid, yerr=[mid - low, high - mid], capsize=1.5, **look)
    low, mid, high = np.quantile(ratios(data), (0.25, 0.5, 0.75), axis=1)
    axes[1].errorbar(
        batch, mid, yerr=[mid - low, high - mid], capsize=1.5, color=style.ORANGE, marker="P", label="ours"
    )
    bn, bnp = data["published"]
    axes[1].plot(batch, bnp / bn, color="#999999", marker="o", label="published")
    axes[1].axhline(1, color=style.BLACK, linewidth=0.5)
    axes[0].set_ylabel("milliseconds a step")
    axes[0].set_yscale("log")
    axes[1].set_ylabel("BNP over BN")
    axes[1].set_ylim(0, None)
    for ax in axes:
        ax.set_xscale("log")
        ax.set_xticks(batch, [str(size) for size in batch], minor=False)
        ax.minorticks_off()
        ax.set_xlabel("batch size")
        ax.legend()
    style.letters(list(axes))
    return figure
