"""Spectral densities of the Hessian and of the Gauss-Newton matrix, without and with `P`, beside exact eigenvalues."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

import bnp_analysis as bnp
from bnp_analysis.training import fit
from paper_figures import style
from paper_figures.frame import FigureData, Report, Settings

TITLE = "Spectral density of curvature matrices, without and with preconditioning"
CLAIM = (
    "The share of the eigenvalues above any bound lies in the interval from stochastic Lanczos quadrature (quadrature "
    "error by Chebyshev, Markov and Stieltjes, plus sampling error). The intervals are narrow for large eigenvalues "
    "only: a density gives no condition number. P narrows the Gauss-Newton spectrum: the ratio of the largest to the "
    "median eigenvalue decreases."
)
SHOWS = "T2, T7"
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {"samples": 200, "hidden": [8], "probes": 6, "steps": 40, "exact": True, "seed": 0},
    "full": {"samples": 1400, "hidden": [32, 32], "probes": 20, "steps": 100, "exact": True, "seed": 0},
}
MATRICES = ("Hessian", "Gauss-Newton")
CONFIDENCE = 1 - 1e-4  # of each of the hundred shares that are checked


def compute(settings: Settings, report: Report) -> dict[str, Any]:
    """Train shortly; the four densities, and the four spectra by dense decompositions."""
    digits = bnp.data.load("digits", n=settings["samples"])
    loss = torch.nn.functional.cross_entropy
    model = bnp.models.mlp([64, *settings["hidden"], 10], seed=settings["seed"])
    fit(model, loss, digits.tensors, epochs=3, lr=0.1, seed=settings["seed"])
    risk = bnp.EmpiricalRisk(model, loss, digits.tensors, dtype=torch.float64)
    P = bnp.bnp_preconditioner(risk)
    arrays: dict[str, Any] = {"dim": risk.space.dim}
    for i, (name, A) in enumerate(zip(MATRICES, (bnp.hessian(risk), bnp.gauss_newton(risk)), strict=True)):
        for j, preconditioner in enumerate((None, P)):
            found = bnp.spectral_density(
                A,
                preconditioner=preconditioner,
                probes=settings["probes"],
                steps=settings["steps"],
                scale="log",
                seed=settings["seed"],
            )
            key = f"{name}/{j}"
            lower, upper = found.band()
            arrays |= {f"{key}/grid": found.grid, f"{key}/density": found.density}
            arrays |= {f"{key}/lower": lower, f"{key}/upper": upper}
            operator = A if preconditioner is None else bnp.linalg.congruence(A, preconditioner)
            exact = torch.linalg.eigvalsh(operator.to_dense()).numpy()
            top = np.abs(exact).max()
            bounds = top * np.geomspace(1e-6, 1, 25)[:-1]
            masses = [found.mass(bound, np.inf, CONFIDENCE) for bound in bounds]
            arrays |= {f"{key}/exact": exact, f"{key}/width": found.width}
            arrays |= {f"{key}/mass_lower": [m.lower for m in masses], f"{key}/mass_upper": [m.upper for m in masses]}
            arrays |= {f"{key}/true_mass": [np.mean(exact >= bound) for bound in bounds]}
            report((2 * i + j + 1) / 4)
    return arrays


def spread(exact: np.ndarray) -> float:
    """The largest over the median of the eigenvalues above 1e-10 times the largest."""
    values = exact[exact > 1e-10 * exact.max()]
    return float(values.max() / np.median(values))


def failure(data: FigureData) -> str:
    """Shares within their error, and a narrower Gauss-Newton spectrum."""
    for name in MATRICES:
        for j in (0, 1):
            key = f"{name}/{j}"
            if not np.isfinite(data[f"{key}/exact"]).all():
                return f"{name}: an eigenvalue is not finite"
            truth = data[f"{key}/true_mass"]
            gap = float(np.maximum(data[f"{key}/mass_lower"] - truth, truth - data[f"{key}/mass_upper"]).max())
            if not gap <= 1e-9:
                return f"{name}, {'with' if j else 'without'} P: a share is {gap:.3f} outside its interval"
    without, with_p = (spread(data[f"Gauss-Newton/{j}/exact"]) for j in (0, 1))
    return "" if with_p < without else f"largest over median eigenvalue went from {without:.3g} to {with_p:.3g}"


def note(data: FigureData) -> str:
    """Data, network, probes, and the spread."""
    s = data.settings
    without, with_p = (spread(data[f"Gauss-Newton/{j}/exact"]) for j in (0, 1))
    widths = "-".join(map(str, [64, *s["hidden"], 10]))
    return (
        f"digits, {s['samples']} examples; ReLU perceptron {widths}, {int(data['dim'])} parameters, after 3 epochs, "
        f"seed {s['seed']}. Lines: {s['probes']} probes of {s['steps']} steps, bands at 95 %; bars: "
        f"eigvalsh of the dense matrix, float64 (zeros are left of the axis). Shaded: not "
        "resolved, peaks there are positions of quadrature nodes. Gauss-Newton: ratio of the largest to the median of "
        f"the nonzero eigenvalues {without:.3g} without, {with_p:.3g} with P."
    )


def draw(data: FigureData) -> Figure:
    """A row per matrix, without `P` on the left."""
    figure, axes = style.panels(2, 2, sharey=True, height=2.0)
    for i, name in enumerate(MATRICES):
        for j, colour in enumerate((style.BLUE, style.ORANGE)):
            ax, key = axes[i][j], f"{name}/{j}"
            grid, density = data[f"{key}/grid"], data[f"{key}/density"]
            exact = np.abs(data[f"{key}/exact"])
            top = np.log10(exact.max())
            seen = np.log10(np.maximum(exact, 10.0 ** (top - 12)))
            ax.hist(
                seen,
                bins=60,
                range=(top - 10, top + 0.5),
                density=False,
                color=style.GREY,
                alpha=0.45,
                linewidth=0,
                weights=np.full(len(seen), 60 / 10.5 / len(seen)),
                label="exact",
            )
            ax.plot(grid, density, color=colour, label="quadrature")
            lower, upper = (np.maximum(data[f"{key}/{end}"], 1e-6) for end in ("lower", "upper"))
            ax.fill_between(grid, lower, upper, color=colour, alpha=0.25, linewidth=0)
            ax.axvspan(
                top - 10,
                bnp.linalg.resolved_from(grid, density, data[f"{key}/lower"]),
                color=style.GREY,
                alpha=0.18,
                lw=0,
            )
            ax.set_yscale("log")
            ax.set_ylim(1e-3, 10)
            ax.set_xlim(top - 10, top + 0.5)
            ax.set_title(f"{name}, {'with' if j else 'without'} $P$")
            ax.set_xlabel(r"$\log_{10}|\lambda|$")
        axes[i][0].set_ylabel("density")
    axes[0][1].legend(loc="upper left")
    style.letters(axes.ravel())
    return figure
