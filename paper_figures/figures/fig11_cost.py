"""Costs: a training step with BatchNorm and with BNP, and products with curvature matrices."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import bnp_analysis as bnp
from bnp_analysis.training.experiment import Experiment
from paper_figures import style
from paper_figures.cost import measure_cost
from paper_figures.frame import FigureData, Report, Settings

TITLE = "Cost of a training step and of a product with a curvature matrix"
CLAIM = (
    "A product with the Hessian or the Gauss-Newton matrix costs less than five gradients, and a training "
    "step with BNP less than three steps without."
)
SHOWS = "T3"
TIMED = True
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        **{"batches": {"mlp": [1, 60], "cnn": [16]}, "rounds": 5, "steps": 5, "repeats": 5, "seed": 0},
        **{"products": {"mlp": 512, "cnn": 16}},
    },
    "full": {
        **{"batches": {"mlp": [1, 60, 512], "cnn": [2, 128]}, "rounds": 30, "steps": 10, "repeats": 15, "seed": 0},
        **{"products": {"mlp": 2048, "cnn": 128}},
    },
}
METHODS: dict[str, dict[str, Any]] = {"vanilla": {}, "BN": {"norm": "batch"}, "BNP": {"preconditioner": "bnp"}}
SHAPES = {"mlp": (784,), "cnn": (3, 32, 32)}
HIDDEN = (100, 100, 100)
MATRICES: dict[str, Callable[[Any], Any]] = {"Hessian": bnp.hessian, "Gauss-Newton": bnp.gauss_newton}
PEERS = {"hessian-eigenthings": "hessian_eigenthings", "pyhessian": "pyhessian"}  # name -> module, of Hessian products


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Steps in turns in one fresh process; gradients and products in turns, medians and quartiles."""
    labels, milliseconds = [], []
    cases = [(model, batch) for model, sizes in settings["batches"].items() for batch in sizes]
    for place, (model, batch) in enumerate(cases):
        own = [
            Experiment(data="mnist", model=model, hidden=HIDDEN, batch_size=batch, seed=settings["seed"], **change)
            for change in METHODS.values()
        ]
        found = measure_cost(own, SHAPES[model], 10, rounds=settings["rounds"], steps=settings["steps"])
        labels.append(f"{model}, {batch}")
        milliseconds.append([cost.get("step_ms", np.nan) for cost in found])
        report(0.7 * (place + 1) / len(cases))
    ratios = []
    for place, (model, n) in enumerate(settings["products"].items()):
        ratios.append(_products(model, n, settings))
        report(0.7 + 0.3 * (place + 1) / len(settings["products"]))
    return {
        **{"labels": labels, "milliseconds": milliseconds, "ratios": ratios},
        "models": [f"{model}, N {n}" for model, n in settings["products"].items()],
        "tools": [*MATRICES, *(name for name, package in PEERS.items() if importlib.util.find_spec(package))],
    }


def _peers(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, v: torch.Tensor) -> list[Callable[[], Any]]:
    """Hessian products of the packages that are installed, each in its fastest documented form for one batch."""
    loss = torch.nn.functional.cross_entropy
    works: list[Callable[[], Any]] = []
    if importlib.util.find_spec("hessian_eigenthings"):
        from hessian_eigenthings import HessianOperator

        operator = HessianOperator(model, [(x, y)], lambda m, batch: loss(m(batch[0]), batch[1]))
        works.append(lambda: operator @ v)
    if importlib.util.find_spec("pyhessian"):
        import pyhessian
        from pyhessian.utils import hessian_vector_product

        kept = pyhessian.hessian(copy.deepcopy(model), loss, data=(x, y), cuda=False)
        parts = [
            part.view_as(p) for part, p in zip(v.split([p.numel() for p in kept.params]), kept.params, strict=True)
        ]
        works.append(lambda: hessian_vector_product(kept.gradsH, kept.params, parts))
    return works


def _products(name: str, n: int, settings: Settings) -> list[list[float]]:
    """Matrix by (first quartile, median, third quartile) of a product's time over a gradient's."""
    g = torch.Generator().manual_seed(settings["seed"])
    widths = {"hidden": HIDDEN} if name == "mlp" else {}
    model = bnp.models.build_for(name, SHAPES[name], 10, seed=settings["seed"], **widths)
    x, y = torch.rand(n, *SHAPES[name], generator=g), torch.randint(0, 10, (n,), generator=g)
    risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, y))
    operators = [make(risk) for make in MATRICES.values()]
    v = torch.randn(risk.space.dim, generator=g)
    products = [lambda A=A: A @ v for A in operators] + _peers(model, x, y, v)
    loss = torch.nn.functional.cross_entropy

    def gradient() -> None:
        torch.autograd.grad(loss(model(x), y), list(model.parameters()))

    def seconds(work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    works, rounds = [gradient, *products], []
    for turn in range(settings["repeats"] + 1):
        times = np.zeros(len(works))
        for place in range(len(works)):  # what follows another work finds the caches and the heap as that left them
            k = (place + turn) % len(works)
            times[k] = min(seconds(works[k]) for _ in range(2))
        if turn:  # the first turn builds graphs
            rounds.append(times[1:] / times[0])
    return np.quantile(rounds, [0.25, 0.5, 0.75], axis=0).T.tolist()


def failure(data: FigureData) -> str:
    """Generous bounds: a busy machine must not turn a figure red; benchmarks hold the sharp ones."""
    ours = data["ratios"][:, : len(MATRICES), 1]
    if not (ours < 5).all():
        return f"a product costs {np.max(ours):.1f} gradients"
    names = list(METHODS)
    ratio = data["milliseconds"][:, names.index("BNP")] / data["milliseconds"][:, names.index("vanilla")]
    return "" if (ratio < 3).all() else f"a step with BNP costs {np.max(ratio):.1f} plain ones"


def note(data: FigureData) -> str:
    """How it was timed."""
    s = data.settings
    absent = [name for name in PEERS if name not in data.words("tools")]
    others = f" Not installed here: {', '.join(absent)}." if absent else ""
    return (
        f"Perceptron 784-100-100-100-10 and five-layer CNN on 3 x 32 x 32, random data, float32, one CPU thread; "
        f"BatchNorm cannot run at batch 1. Steps: median of {s['rounds']} interleaved rounds. Products: median and "
        f"quartiles of {s['repeats']} rounds, in units of one gradient of the same round; other packages compute the "
        f"Hessian's. Times depend on the machine and its load.{others}"
    )


def draw(data: FigureData) -> Figure:
    """Steps on the left, relative to the plain one; products on the right."""
    figure, ((left, right),) = style.panels(1, 2, height=2.4, width_ratios=(3, 2))
    x = np.arange(len(data["labels"]))
    for m, method in enumerate(METHODS):
        heights = data["milliseconds"][:, m] / data["milliseconds"][:, 0]
        bars = left.bar(x + 0.27 * (m - 1), heights, 0.25, color=style.COLOURS[method], label=method)
        absolute = ["" if np.isnan(t) else f"{t:.2g}" for t in data["milliseconds"][:, m]]
        left.bar_label(bars, absolute, fontsize=5.5)
    left.set_xticks(x, data.words("labels"))
    left.set_ylabel("time of a step over the plain one")
    left.set_title("training step, model and batch (ms above the bars)")
    places = np.arange(len(data["models"]))
    tools = data.words("tools")
    width = 0.8 / len(tools)
    for i, (name, colour) in enumerate(zip(tools, (style.BLUE, style.GREEN, style.GREY, style.YELLOW), strict=False)):
        low, middle, high = data["ratios"][:, i].T
        error, x = [middle - low, high - middle], places + width * (i - (len(tools) - 1) / 2)
        right.bar(x, middle, 0.93 * width, yerr=error, capsize=2, color=colour, label=name)
    right.set_xticks(places, data.words("models"))
    right.set_ylabel("time of a product over a gradient")
    right.set_title("products")
    for ax, room in ((left, 0.4), (right, 0.2 * len(tools))):
        ax.legend(loc="upper right")
        ax.margins(y=room)
    style.letters([left, right])
    return figure
