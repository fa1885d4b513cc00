"""BatchNorm against BNP: the same trajectory with fixed statistics, another one when the statistics move."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnp_analysis as bnp
from paper_figures import style
from paper_figures.frame import FigureData, Report, Settings

TITLE = "BatchNorm on the layers' inputs against BNP"
CLAIM = (
    "With fixed statistics, gradient descent with BatchNorm on the layers' inputs and with BNP (q = 1) gives the same "
    "function at every step, up to rounding; with updated statistics the two trajectories differ."
)
SHOWS = "T9"
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"samples": 200, "hidden": [16], "steps": 50, "lr": 0.01, "seeds": [0]},
    "full": {"samples": 500, "hidden": [32, 32], "steps": 500, "lr": 0.0003, "seeds": [0, 1, 2, 3, 4]},
}
LOSS = nn.functional.cross_entropy


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Full-batch gradient descent of the two networks from one function, statistics fixed, then live."""
    x, y = bnp.data.load("digits", n=settings["samples"]).tensors
    x = x.double()
    widths = [64, *settings["hidden"], 10]
    shape = (2, len(settings["seeds"]), settings["steps"] + 1)
    difference, losses = np.zeros(shape), np.zeros((2, *shape))
    for s, seed in enumerate(settings["seeds"]):
        for live in (0, 1):
            plain = bnp.models.mlp(widths, seed=seed, dtype=torch.float64)
            normal = normalized_twin(plain, x)
            for step in range(settings["steps"] + 1):
                outputs = [evaluate(normal, x, live), plain(x).detach()]
                difference[live, s, step] = float((outputs[0] - outputs[1]).norm() / outputs[1].norm())
                losses[:, live, s, step] = [float(LOSS(out, y)) for out in outputs]
                if step == settings["steps"]:
                    break
                descend(normal, x, y, settings["lr"], live)
                if live or step == 0:
                    risk = bnp.EmpiricalRisk(plain, LOSS, (x, y))
                    P = bnp.bnp_preconditioner(risk, q=1)
                precondition_step(plain, P, x, y, settings["lr"])
            report((2 * s + live + 1) / (2 * len(settings["seeds"])))
    return {"difference": difference, "losses": losses}


def normalized_twin(plain: nn.Sequential, x: Tensor) -> nn.Sequential:
    """The network of the same function with BatchNorm, without gain and shift, in front of every linear layer."""
    layers: list[nn.Module] = []
    h = x
    for module in copy.deepcopy(plain):
        if isinstance(module, nn.Linear):
            norm = nn.BatchNorm1d(module.in_features, eps=0.0, affine=False, dtype=h.dtype)
            norm.running_mean = h.mean(dim=0).detach()
            variance = h.var(dim=0, correction=0).detach()
            norm.running_var = torch.where(variance > 0, variance, torch.ones_like(variance))
            h = module(h)
            with torch.no_grad():
                module.bias += module.weight @ norm.running_mean
                module.weight *= norm.running_var.sqrt()
            layers += [norm, module]
        else:
            h = module(h)
            layers.append(module)
    return nn.Sequential(*layers)


def set_statistics(model: nn.Sequential, x: Tensor) -> None:
    """The statistics of the whole batch at the present weights; a constant feature keeps scale 1."""
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.BatchNorm1d):
                variance = x.var(dim=0, correction=0)
                module.running_mean = x.mean(dim=0)
                module.running_var = torch.where(variance > 0, variance, torch.ones_like(variance))
            x = module.eval()(x)


def evaluate(model: nn.Sequential, x: Tensor, live: int) -> Tensor:
    """The outputs, with the statistics of the present weights if they are live."""
    if live:
        set_statistics(model, x)
    return model.eval()(x).detach()


def batch_forward(model: nn.Sequential, x: Tensor) -> Tensor:
    """A pass through which the statistics are differentiated, as BatchNorm does in training."""
    for module in model:
        if isinstance(module, nn.BatchNorm1d):
            variance = x.var(dim=0, correction=0)
            x = (x - x.mean(dim=0)) / torch.where(variance > 0, variance, torch.ones_like(variance)).sqrt()
        else:
            x = module(x)
    return x


def descend(model: nn.Sequential, x: Tensor, y: Tensor, lr: float, live: int) -> None:
    """One step of gradient descent of the normalized network."""
    model.zero_grad()
    LOSS(batch_forward(model, x) if live else model.eval()(x), y).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(lr * parameter.grad)


def precondition_step(model: nn.Sequential, P: Any, x: Tensor, y: Tensor, lr: float) -> None:
    """One step along `-P P^T grad`."""
    model.zero_grad()
    LOSS(model(x), y).backward()
    direction = P.direction(torch.cat([p.grad.flatten() for p in model.parameters()]))
    with torch.no_grad():
        parameters = list(model.parameters())
        for parameter, part in zip(parameters, direction.split([p.numel() for p in parameters]), strict=True):
            parameter.sub_(lr * part.view_as(parameter))


def failure(data: FigureData) -> str:
    """Equal to rounding with fixed statistics, apart with live ones."""
    fixed, live = data["difference"]
    if not fixed.max() <= 1e-10:
        return f"with fixed statistics the outputs differ by {fixed.max():.1e}"
    return "" if live[:, -1].min() > 1e-3 else "with live statistics the outputs agree as well"


def note(data: FigureData) -> str:
    """Data, network, seeds."""
    s = data.settings
    widths = "-".join(map(str, [64, *s["hidden"], 10]))
    return (
        f"digits, {s['samples']} examples in one batch; ReLU perceptron {widths}, float64, rate {s['lr']}, median and "
        f"range over seeds {s['seeds']}. Fixed: statistics at the initial weights. Live: statistics at the current "
        f"weights, differentiated in BatchNorm as in training. Largest difference with fixed statistics: "
        f"{data['difference'][0].max():.1e}."
    )


def draw(data: FigureData) -> Figure:
    """Distance of the outputs on the left, losses on the right."""
    figure, ((left, right),) = style.panels(1, 2, height=2.4)
    steps = np.arange(data["difference"].shape[-1])
    floor = np.maximum(data["difference"], 1e-17)
    style.band(left, steps, floor[0], color=style.BLUE, label="fixed statistics")
    style.band(left, steps, floor[1], color=style.ORANGE, label="live statistics")
    left.set_yscale("log")
    left.set_ylabel("relative distance of the outputs")
    left.set_title("BatchNorm against BNP")
    for method, (name, dash) in enumerate((("BatchNorm", "-"), ("BNP", "--"))):
        for live, colour in enumerate((style.BLUE, style.ORANGE)):
            label = f"{name}, {'live' if live else 'fixed'}"
            look = {} if method else style.below()
            right.plot(steps, np.median(data["losses"][method, live], axis=0), dash, color=colour, label=label, **look)
    right.set_ylabel("training loss")
    right.set_title("loss, median over seeds")
    for ax in (left, right):
        ax.set_xlabel("step")
        ax.legend()
    style.letters([left, right])
    return figure
