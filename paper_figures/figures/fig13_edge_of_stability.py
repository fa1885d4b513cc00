"""The largest eigenvalues of `P^T H P` along full-batch training rise to the threshold of stability and stay there."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.runtime.files import saved_run
from paper_figures import style
from paper_figures.frame import FigureData, Report, Settings, scratch

TITLE = "The edge of stability, for three optimizers and their own preconditioners"
CLAIM = (
    "With the P of the optimizer, the largest eigenvalue of P^T H P rises to the stability threshold (2/lr for "
    "gradient descent and RMSprop, 38/lr for Adam) and stays near it."
)
SHOWS = "T15"
_RUNS = {
    "gradient descent": {"optimizer": "SGD", "lr": 0.02, "steps": 500, "every": 20},
    "RMSprop": {"optimizer": "RMSprop", "lr": 2e-5, "steps": 300, "every": 20},
    "Adam": {"optimizer": "Adam", "lr": 2e-4, "steps": 300, "every": 20},
}
_QUICK = {
    "gradient descent": {"optimizer": "SGD", "lr": 0.12, "steps": 200, "every": 20},
    "RMSprop": {"optimizer": "RMSprop", "lr": 5e-4, "steps": 200, "every": 20},
    "Adam": {"optimizer": "Adam", "lr": 0.03, "steps": 450, "every": 15},
}
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"data": "digits", "examples": 100, "classes": 10, "hidden": 24, "runs": _QUICK, "seed": 0},
    "full": {"data": "cifar10", "examples": 1000, "classes": 4, "hidden": 256, "runs": _RUNS, "seed": 0},
}
NEAR = (0.8, 1.25)


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The squared error, summed over classes, mean over examples."""
    return (outputs - targets).square().sum(1).mean()


def problem(settings: Settings) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Two hidden layers of GELU; standardized inputs of the first classes, targets one-hot."""
    pixels, labels = bnp.data.load(settings["data"]).tensors
    kept = torch.nonzero(labels < settings["classes"]).flatten()[: settings["examples"]]
    x = pixels[kept].float().flatten(2 if pixels.ndim == 4 else 1)  # channels apart
    over = (0, 2) if x.ndim == 3 else (0, 1)
    x = ((x - x.mean(over, keepdim=True)) / x.std(over, keepdim=True)).flatten(1)
    hidden, classes = settings["hidden"], settings["classes"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        model = nn.Sequential(
            *(nn.Linear(x.shape[1], hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()),
            nn.Linear(hidden, classes),
        )
    return model, (x, nn.functional.one_hot(labels[kept].long(), classes).float())


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Each run in turn; one that was interrupted goes on from its last measurement."""
    arrays: dict[str, Any] = {"runs": list(settings["runs"])}
    for place, (name, own) in enumerate(settings["runs"].items()):
        found, losses = run(settings, own, lambda part, before=place: report((before + part) / len(settings["runs"])))
        arrays |= {
            f"steps {name}": found.steps,
            f"values {name}": found.values,
            f"residuals {name}": found.residuals,
            f"threshold {name}": found.threshold,
            f"products {name}": found.products,
            f"loss {name}": losses,
        }
    return arrays


def run(settings: Settings, own: Settings, report: Report) -> tuple[bnp.training.Sharpness, list[float]]:
    """Full-batch training with a tracker."""
    model, data = problem(settings)
    optimizer = getattr(torch.optim, own["optimizer"])(model.parameters(), lr=own["lr"])
    tracker = bnp.SharpnessTracker(model, loss, data, optimizer, every=own["every"], k=2, most=4)
    losses: list[float] = []
    key = json.dumps([dict(settings), dict(own)], sort_keys=True)
    path = scratch("fig13_edge_of_stability", settings) / f"{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"
    with saved_run(path, key) as saved:
        state = saved.restore(dict)
        if state:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            tracker.load_state_dict(state["tracker"])
            losses = state["losses"]
        for step in range(len(losses), own["steps"]):
            optimizer.zero_grad()
            value = loss(model(data[0]), data[1])
            value.backward()
            optimizer.step()
            losses.append(float(value.detach()))
            if tracker.step() is not None:
                parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                saved.save(parts | {"tracker": tracker.state_dict(), "losses": losses})
            report((step + 1) / own["steps"])
    return tracker.result(), losses


def at_the_end(data: FigureData, name: str) -> np.ndarray:
    """The tracked values in units of the threshold, the median over the last third of the run."""
    ratios = data[f"values {name}"] / data[f"threshold {name}"][:, None]
    last = ratios[-max(1, len(ratios) // 3) :]
    there = np.isfinite(last).any(axis=0)
    return np.asarray(np.nanmedian(last[:, there], axis=0))


def failure(data: FigureData) -> str:
    found = []
    for name in data.words("runs"):
        values = at_the_end(data, name)
        if not values.size or not NEAR[0] <= values[0] <= NEAR[1]:
            shown = f"{values[0]:.3g}" if values.size else "nothing"
            found.append(f"{name} is at {shown} of its threshold")
    return "; ".join(found)


def note(data: FigureData) -> str:
    own = data.settings
    ends = "; ".join(
        f"{name}: lr {run['lr']:g}, {run['steps']} steps, at the end "
        + ", ".join(f"{v:.2f}" for v in at_the_end(data, name))
        for name, run in own["runs"].items()
    )
    return (
        f"{own['examples']} examples of {own['classes']} classes of {own['data']}, MLP {own['hidden']}-{own['hidden']} "
        f"with GELU, squared error, full batch, seed {own['seed']}. In units of the threshold (median of the last "
        f"third): {ends}. Tracked in float64 to residuals of 1 %, every {own['runs']['Adam']['every']} steps; the runs "
        "are short, so that the number of eigenvalues at the threshold is a lower bound. Runs may have been resumed: "
        "the recorded time is that of the last part."
    )


def draw(data: FigureData) -> Figure:
    names = data.words("runs")
    figure, grid = style.panels(1, len(names))
    for ax, name in zip(grid[0], names, strict=True):
        limit = data[f"threshold {name}"]
        for i, column in enumerate(data[f"values {name}"].T):
            ax.plot(data[f"steps {name}"], column / limit, color=style.BLUE, alpha=max(0.3, 1 - 0.2 * i))
        ax.axhline(1, color=style.ORANGE, linestyle="--", label="threshold")
        lr = data.settings["runs"][name]["lr"]
        ax.set_title(f"{name}, lr {lr:g}: threshold {limit[-1]:.3g}")
        ax.set_xlabel("steps")
    grid[0, 0].set_ylabel(r"eigenvalues / threshold")
    grid[0, 0].legend(frameon=False)
    return figure
