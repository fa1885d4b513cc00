"""Figure 8 of the paper, certified: the Hessian of one output unit on a mini-batch, as plotted and certified."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.linalg import MatrixOperator, condition_number
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.precondition import BNPBlock
from bnp_analysis.runtime.files import whole_file
from paper_figures import style
from paper_figures.frame import FigureData, Report, Settings, scratch

TITLE = "The paper's Figure 8, certified: conditioning of one output unit's Hessian"
CLAIM = (
    "The rank of the Hessian is at most the batch size, so that the condition number computed in float32 exceeds the "
    "certified one by a factor of more than a thousand (median). BNP with exact and with running statistics lowers the "
    "certified condition number (medians of each run), by a factor far below the squared condition number of D."
)
SHOWS = "Theorem 4, T7, T13"
_COMMON = {"published": "paper_figures/data/published.json", "inputs": ["paper_figures/data/published.json"]}
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        **_COMMON,
        **{"data": "digits", "epochs": 8, "every": 24, "seeds": {"vanilla": [0], "BNP": [0]}},
        **{"batch": 60, "hidden": [100, 100], "rates": {"vanilla": 0.01, "BNP": 0.1}},
    },
    "full": {
        **_COMMON,
        **{"data": "cifar10", "epochs": 20, "every": 100, "seeds": {"vanilla": [0], "BNP": [0, 1, 2]}},
        **{"batch": 60, "hidden": [100, 100], "rates": {"vanilla": 0.01, "BNP": 0.1}},
    },
}
# What is measured at a point; the last four with P of the run, so in the run with BNP alone.
NUMBERS = ("float32", "float64", "threshold", "certified", "upper", "exact", "exact upper", "kappa(D)", "floored",
           "rank", "dead", "float32, P", "running", "running upper", "damped")  # fmt: skip
FLOOR = 1e-5
METHODS = ("vanilla", "BNP")


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """`steps`, and `measured/METHOD` `(seeds, points, numbers)`; and the published curves.

    A training that was finished is kept until the figure is made: an interrupted computation goes on after it.
    """
    x, y = bnp.data.load(settings["data"], standardize=True, flatten=True).tensors
    jobs = [(method, seed) for method in METHODS for seed in settings["seeds"][method]]
    folder = scratch("paper_fig8", settings)
    found: dict[str, list[np.ndarray]] = {method: [] for method in METHODS}
    for k, (method, seed) in enumerate(jobs):
        kept = folder / f"{method}.{seed}.npy"
        if not kept.exists():
            rows = np.array(list(_trained(x, y, method, seed, settings)))
            with whole_file(kept) as file:
                np.save(file, rows)
        found[method].append(np.load(kept))
        report((k + 1) / len(jobs))
    published = json.loads((Path(__file__).parents[2] / settings["published"]).read_text())["figure_8"]
    curves = {
        name: published[panel]["curves"][curve]["log10_condition_number"]
        for name, panel, curve in (
            ("vanilla", "centre_hessian_condition", "Vanilla"),
            ("BNP", "centre_hessian_condition", "BNP"),
            ("kappa(D)", "right_kappa_D", "D"),
        )
    }
    return {
        "steps": found["BNP"][0][:, 0],
        **{f"measured/{method}": np.stack(rows)[:, :, 1:] for method, rows in found.items()},
        **{f"published/{name}": np.array([c["x"], c["y"]], dtype=float) for name, c in curves.items()},
    }


def _trained(x: Tensor, y: Tensor, method: str, seed: int, settings: Settings) -> Iterator[list[float]]:
    """Train by SGD, Glorot uniform, zero biases; the step and the numbers at every measured point."""
    g = torch.Generator().manual_seed(seed)
    model = bnp.models.mlp([x.shape[1], *settings["hidden"], 10], seed=seed)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight, generator=g)
        nn.init.zeros_(layer.bias)
    pre = bnp.BNP.paper(model) if method == "BNP" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=settings["rates"][method])
    last = next(name for name, module in model.named_modules() if module is layers[-1])
    step, size = 0, settings["batch"]
    for _ in range(settings["epochs"]):
        order = torch.randperm(len(x), generator=g)
        for begin in range(0, len(x) - size + 1, size):
            picked = order[begin : begin + size]
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[picked]), y[picked]).backward()
            if pre is not None:
                pre.step()
            if step % settings["every"] == 0:
                block = None if pre is None else pre.preconditioner().blocks[last][1]
                assert block is None or isinstance(block, BNPBlock)
                yield [step, *measure(layers, x[picked], block)]
            optimizer.step()
            step += 1


def measure(layers: list[nn.Linear], x: Tensor, block: BNPBlock | None) -> list[float]:
    """The `NUMBERS` of the first output unit of a ReLU network on a mini-batch, with the `P` of the run, if any.

    `kappa*` is that of `A = diag(s)^(1/2) H^`, squared, `s = p (1 - p)/N`; features that are constant on the batch
    (dead units) are set aside there, and are part of what is plotted.
    """
    plain = {dtype: _inputs(layers, x.to(dtype), dtype) for dtype in (torch.float32, torch.float64)}
    h, p = plain[torch.float64]
    mean, sigma = h.mean(dim=0), h.std(dim=0, unbiased=False)
    live = h.amax(dim=0) > h.amin(dim=0)
    root = (p * (1 - p) / len(x)).sqrt()[:, None]
    certified = _certified(root, h[:, live])
    exact = _certified(root, ((h - mean) / sigma)[:, live])
    found = [
        _plotted(*plain[torch.float32], None),
        _plotted(h, p, None),
        _plotted(*plain[torch.float32], None, threshold=True),
        *certified[:2],
        *exact[:2],
        _spread(sigma[live]),
        _spread(sigma.clamp_min(FLOOR)),
        certified[2],
        float((~live).sum()),
    ]
    if block is None:
        return [*found, *[float("nan")] * (len(NUMBERS) - len(found))]
    center, scale = block.mean[0].double(), block.variance[0].double().sqrt()
    running = _certified(root, ((h - center) / scale)[:, live])
    return [*found, _plotted(*plain[torch.float32], (center, scale)), *running[:2], _spread(scale)]


def _inputs(layers: list[nn.Linear], h: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The inputs of the last layer, and the probability of the first class."""
    with torch.no_grad():
        for layer in layers[:-1]:
            h = torch.relu(h @ layer.weight.to(dtype).T + layer.bias.to(dtype))
        logits = h @ layers[-1].weight.to(dtype).T + layers[-1].bias.to(dtype)
    return h, logits.softmax(dim=1)[:, 0]


def _plotted(h: Tensor, p: Tensor, P: tuple[Tensor, Tensor] | None, *, threshold: bool = False) -> float:
    """The largest over the smallest singular value of the matrix itself, in its dtype; or above the usual threshold."""
    hat = torch.cat([h.new_ones(len(h), 1), h], dim=1)
    A = hat.T @ ((p * (1 - p) / len(h))[:, None] * hat)
    if P is not None:
        center, scale = (t.to(h.dtype) for t in P)
        M = torch.diag(torch.cat([scale.new_ones(1), 1 / scale]))
        M[0, 1:] = -center / scale
        A = M.T @ A @ M
    values = torch.linalg.svdvals(A)
    kept = values > len(A) * torch.finfo(A.dtype).eps * values[0] if threshold else values > 0
    return float(values[0] / values[kept][-1])


def _certified(root: Tensor, rows: Tensor) -> tuple[float, float, float]:
    """`kappa*` with its upper bound, and the rank."""
    factor = root * torch.cat([rows.new_ones(len(rows), 1), rows], dim=1)
    found = condition_number(GramOperator(MatrixOperator(factor, exact=False)), method="factor-svd")
    return found.value, found.upper, float(found.rank or 0)


def _spread(sigma: Tensor) -> float:
    """The condition number of `D = diag(1, 1/sigma)`."""
    d = torch.cat([sigma.new_ones(1), 1 / sigma])
    return float(d.max() / d.min())


def _of(data: FigureData, method: str, number: str) -> np.ndarray:
    """`(seeds, points)`."""
    return np.asarray(data[f"measured/{method}"][..., NUMBERS.index(number)])


def failure(data: FigureData) -> str:
    """Ranks, the size of what is plotted, both gains in every run, and what is left of `kappa(D)^2`."""
    for method in METHODS:
        rank = _of(data, method, "rank")
        if not (rank <= data.settings["batch"]).all():
            return f"a rank of {rank.max():g}"
    excess = np.median(_of(data, "vanilla", "float32") / _of(data, "vanilla", "certified"))
    if not excess > 1e3:
        return f"what is plotted is {excess:.3g} times the certified number"
    for word in ("exact", "running"):
        gains = np.median(_of(data, "BNP", "certified") / _of(data, "BNP", word), axis=1)
        if not (gains > 1).all():
            return f"the median gain with {word} statistics is {gains.min():.3g}"
    share = np.median(_of(data, "BNP", "certified") / _of(data, "BNP", "exact") / _of(data, "BNP", "kappa(D)") ** 2)
    return "" if share < 0.5 else f"the gain is {share:.3g} times kappa(D)^2"


def _summary(data: FigureData) -> str:
    """Gains, certified share, correlation with `kappa(D)`."""
    gain, running = (_of(data, "BNP", "certified") / _of(data, "BNP", word) for word in ("exact", "running"))
    spread = _of(data, "BNP", "kappa(D)")
    pairs = np.log(np.stack([gain.ravel(), spread.ravel()]))
    share = gain / spread**2
    uppers = np.stack([_of(data, "BNP", word) for word in ("upper", "exact upper", "running upper")])
    rank, dead = (_of(data, "BNP", word).max() for word in ("rank", "dead"))
    return (
        f"gain with exact statistics {np.median(gain):.3g} (median; {gain.min():.3g} to {gain.max():.3g}), with "
        f"running ones {np.median(running):.3g} ({running.min():.3g} to {running.max():.3g}); correlation of log gain "
        f"and log kappa(D) {np.corrcoef(pairs)[0, 1]:.2f}; gain over kappa(D)^2 {share.min():.1g} to "
        f"{share.max():.1g}; rank at most {rank:g} of 101, dead units 0 to {dead:g}; "
        f"{np.isfinite(uppers).mean():.0%} of the certified numbers two-sided"
    )


def note(data: FigureData) -> str:
    """What is confirmed, what is not, and that the procedure behind the published curves is inferred."""
    s = data.settings
    rates = ", ".join(f"{name} {rate:g}" for name, rate in s["rates"].items())
    theirs = {name: data[f"published/{name}"][1] for name in ("vanilla", "BNP", "kappa(D)")}
    ours = {
        "vanilla": np.log10(_of(data, "vanilla", "float32")),
        "BNP": np.log10(_of(data, "BNP", "float32, P")),
        "kappa(D)": np.log10(_of(data, "BNP", "floored")),
    }
    beside = "; ".join(
        f"{name} 1e{np.nanmedian(ours[name]):.1f} (to 1e{np.nanmax(ours[name]):.0f}) against 1e"
        f"{np.nanmedian(theirs[name]):.1f} (to 1e{np.nanmax(theirs[name]):.0f})"
        for name in ("vanilla", "BNP")
    )
    shares = [(v[np.isfinite(v)] > 4).mean() for v in (ours["kappa(D)"], theirs["kappa(D)"])]
    return (
        f"{s['data']}, standardized; dense 100-100-10, Glorot uniform, SGD at {rates}, batch {s['batch']}, "
        f"{s['epochs']} epochs, seeds {s['seeds']['BNP']}; first output unit on the current mini-batch, every "
        f"{s['every']} iterations. Confirmed: P lowers the condition number. Not confirmed: the published values, "
        "which are determined by rounding errors of zero eigenvalues, and kappa(D)^2 as the explanation. "
        f"{_summary(data)}. Published curves in grey (CIFAR-10), read off the figure; the paper does not state how "
        "they were computed. From their shape (two clusters of kappa(D) and of the plotted numbers) we infer a Hessian "
        "formed in float32, cond by SVD, and standard deviations of at least 1e-5; this reproduces only the shape: "
        f"medians, ours against published, {beside}; a dead unit in {shares[0]:.0%} of the points against "
        f"{shares[1]:.0%}."
    )


def draw(data: FigureData) -> Figure:
    """As plotted, certified, `kappa(D)`, gain against `kappa(D)^2`."""
    figure, axes = style.panels(2, 2, height=2.4)
    plotted, certified, spread, gain = axes.ravel()
    steps, grey = data["steps"], {"color": style.GREY, "alpha": 0.5, "linewidth": 0.7}
    for name, ax, line in (("vanilla", plotted, "-"), ("BNP", plotted, ":"), ("kappa(D)", spread, "-")):
        x, y = data[f"published/{name}"]
        inside = x <= max(steps) + 1 if data.settings["data"] == "cifar10" else slice(None)
        scale = 1.0 if data.settings["data"] == "cifar10" else max(steps) / np.nanmax(x)
        ax.plot(
            x[inside] * scale,
            10.0 ** y[inside],
            line,
            label="published, " + ("$\\kappa(D)$" if name == "kappa(D)" else name),
            **grey,
        )
    for number, method, colour in (
        ("float32", "vanilla", style.BLACK),
        ("float64", "vanilla", style.SKY),
        ("threshold", "vanilla", style.GREEN),
        ("float32, P", "BNP", style.ORANGE),
    ):
        plotted.plot(steps, _of(data, method, number)[0], ".", color=colour, markersize=2, label=f"{number}, {method}")
    for number, words, colour in (
        ("certified", "without P", style.BLACK),
        ("running", "with P, running, damped", style.BLUE),
        ("exact", "with P, exact", style.ORANGE),
    ):
        style.band(certified, steps, _of(data, "BNP", number), color=colour, label=words)
    for number, words, colour in (
        ("floored", f"floored at {FLOOR:g}", style.BLACK),
        ("kappa(D)", "undamped, without dead units", style.ORANGE),
        ("damped", "damped, running", style.BLUE),
    ):
        spread.plot(steps, _of(data, "BNP", number)[0], ".", color=colour, markersize=2, label=words)
    ratio, d = _of(data, "BNP", "certified") / _of(data, "BNP", "exact"), _of(data, "BNP", "kappa(D)") ** 2
    for k, seed in enumerate(data.settings["seeds"]["BNP"]):
        gain.plot(d[k], ratio[k], ".", markersize=2, label=f"seed {seed}")
    gain.set_xscale("log")
    ends = np.array([d.min(), d.max()])
    gain.plot(ends, ends, **grey, label="gain = $\\kappa(D)^2$")
    gain.xaxis.set_minor_formatter(NullFormatter())
    for ax, title in (
        (plotted, "as plotted: a ratio of rounding errors"),
        (certified, "certified $\\kappa^*$ (range over seeds)"),
        (spread, "$\\kappa(D)$"),
        (gain, "gain of exact $P$"),
    ):
        ax.set_title(title)
        ax.set_yscale("log")
        ax.set_xlabel("$\\kappa(D)^2$" if ax is gain else "iteration")
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** 0.4)  # room for the legend above the curves
        ax.legend(fontsize=5, ncol=2, loc="upper left")
    style.letters(list(axes.ravel()))
    return figure
