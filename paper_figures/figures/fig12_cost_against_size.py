"""How costs grow: products with the number of examples and of parameters, a Lanczos step with its basis."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import bnp_analysis as bnp
from bnp_analysis.linalg import CallableOperator
from paper_figures import style
from paper_figures.frame import FigureData, Report, Settings

TITLE = "Cost against size"
CLAIM = (
    "The time of a product grows linearly with the number of examples and of parameters, as the time of a gradient "
    "does. The time of a Lanczos step beyond its product grows no faster than the number of basis vectors."
)
SHOWS = "T3"
TIMED = True
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        **{"examples": [64, 256, 1024], "widths": [64, 128, 256], "batch": 64, "steps": [8, 16, 32], "fixed": 512},
        **{"repeats": 3, "last": 3, "slack": 0.6, "seed": 0},
    },
    "full": {
        **{"examples": [128, 512, 2048, 8192], "widths": [128, 256, 512, 1024, 2048], "batch": 256},
        **{"steps": [10, 20, 40, 80, 160], "fixed": 2048, "repeats": 9, "last": 3, "slack": 0.15, "seed": 0},
    },
}
WORKS = ("gradient", "Hessian", "Gauss-Newton")
RUNS = ("reorthogonalized", "recurrence alone")
HIDDEN = (100, 100, 100)


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Least processor times of gradients and products, taken in turns, and of Lanczos runs on a diagonal matrix."""
    samples = [_times(n, HIDDEN, settings) for n in settings["examples"]]
    report(0.4)
    sizes = [_times(settings["batch"], (width, width), settings) for width in settings["widths"]]
    report(0.8)
    dim, unit = _times(settings["fixed"], HIDDEN, settings)[:2]
    overhead = [[t / unit for t in _steps(int(dim), m, settings)] for m in settings["steps"]]
    return {
        **{"sample_seconds": [row[1:] for row in samples], "parameters": [row[0] for row in sizes]},
        **{"size_seconds": [row[1:] for row in sizes], "overhead": overhead},
    }


def _times(n: int, hidden: tuple[int, ...], settings: Settings) -> list[float]:
    """Parameters of a perceptron, and the seconds of its `WORKS` on `n` examples."""
    g = torch.Generator().manual_seed(settings["seed"])
    model = bnp.models.mlp([784, *hidden, 10], seed=settings["seed"], dtype=torch.float32)
    x, y = torch.rand(n, 784, generator=g), torch.randint(0, 10, (n,), generator=g)
    loss = torch.nn.functional.cross_entropy
    risk = bnp.EmpiricalRisk(model, loss, (x, y))
    v, parameters = torch.randn(risk.space.dim, generator=g), list(model.parameters())
    products = [partial(make(risk).__matmul__, v) for make in (bnp.hessian, bnp.gauss_newton)]
    works = [lambda: torch.autograd.grad(loss(model(x), y), parameters), *products]
    return [float(risk.space.dim), *_least(works, settings["repeats"])]


def _steps(dim: int, steps: int, settings: Settings) -> list[float]:
    """Seconds of one Lanczos step of so many in dimension `dim`, for a matrix that costs next to nothing."""
    diagonal = torch.linspace(0, 1, dim)
    A = CallableOperator(lambda v: diagonal * v, dim, dtype=torch.float32)

    def run(reorthogonalize: bool) -> None:
        bnp.spectral_density(A, probes=1, steps=steps, points=2, reorthogonalize=reorthogonalize)

    return [t / steps for t in _least([lambda: run(True), lambda: run(False)], max(2, settings["repeats"] // 3))]


def _least(works: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Processor seconds: what others do delays a program, but not its least time."""
    found = np.full(len(works), np.inf)
    for _ in range(repeats + 1):  # the first calls record graphs
        for i, work in enumerate(works):
            began = time.process_time()
            work()
            found[i] = min(found[i], time.process_time() - began)
    return [float(t) for t in found]


def slope(x: Any, seconds: Any, last: int) -> float:
    """The exponent fitted to the largest sizes."""
    return float(np.polyfit(np.log(x[-last:]), np.log(seconds[-last:]), 1)[0])


def slopes(data: FigureData) -> dict[str, list[float]]:
    """Exponents of `WORKS` in examples and in parameters, and of `RUNS` in steps."""
    s = data.settings
    lines = {
        "examples": (s["examples"], data["sample_seconds"]),
        "parameters": (data["parameters"], data["size_seconds"]),
        "steps": (s["steps"], data["overhead"]),
    }
    with np.errstate(all="ignore"):
        return {word: [slope(x, y[:, i], s["last"]) for i in range(y.shape[1])] for word, (x, y) in lines.items()}


def failure(data: FigureData) -> str:
    """Exponents of products near one, of the overhead at most one."""
    slack, finite = data.settings["slack"], all(np.isfinite(a).all() for a in data.arrays.values())
    if not finite:
        return "a number is missing"
    found = slopes(data)
    for word in ("examples", "parameters"):
        for work, exponent in zip(WORKS[1:], found[word][1:], strict=True):
            if not abs(exponent - 1) <= slack:
                return f"the {work} product grows like {word} to the power {exponent:.2f}"
    for run, exponent in zip(RUNS, found["steps"], strict=True):
        if not exponent <= 1 + slack:
            return f"a step, {run}, grows like the basis to the power {exponent:.2f}"
    return ""


def note(data: FigureData) -> str:
    """Networks and clocks."""
    s = data.settings
    return (
        f"Random data, float32, one CPU thread, processor time, minimum of {s['repeats']} repetitions. Left: "
        f"perceptron 784-100-100-100-10. Middle: 784-w-w-10 on {s['batch']} examples. Right: a diagonal matrix of the "
        f"left network's size, in gradients of {s['fixed']} examples. Slopes: the {s['last']} largest sizes."
    )


def draw(data: FigureData) -> Figure:
    """Three panels on logarithmic axes."""
    figure, (axes,) = style.panels(1, 3, height=2.3)
    found, s = slopes(data), data.settings
    colours = (style.GREY, style.BLUE, style.GREEN)
    _lines(axes[0], s["examples"], 1e3 * data["sample_seconds"], found["examples"], WORKS, colours)
    _lines(axes[1], data["parameters"], 1e3 * data["size_seconds"], found["parameters"], WORKS, colours)
    _lines(axes[2], s["steps"], data["overhead"], found["steps"], RUNS, (style.ORANGE, style.SKY))
    for ax, word, unit in zip(
        axes, ("examples", "parameters", "steps of the run"), ("ms", "ms", "gradients"), strict=True
    ):
        ax.set_xlabel(word)
        ax.set_ylabel(f"time, {unit}")
    for ax, title in zip(axes, ("against examples", "against parameters", "Lanczos, per step"), strict=True):
        ax.set_title(title)
    style.letters(list(axes))
    return figure


def _lines(ax: Axes, x: Any, y: Any, exponents: list[float], labels: Any, colours: Any) -> None:
    for i, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        ax.loglog(x, y[:, i], "o-", color=colour, label=f"{label}, slope {exponents[i]:.2f}")
    ax.legend(loc="upper left")
    ax.margins(y=0.45)
