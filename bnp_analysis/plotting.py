"""Figures of results: `plot_*(result, ax=None) -> ax`. The only file that imports matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import SymmetricalLogLocator

from bnp_analysis.diagnose import BlockSpectra, Comparison, Conditioning, EigenvectorMass, LayerTable, Slice
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import ConditionNumber, ConditionProfile, Diagonal, SpectralDensity
from bnp_analysis.runtime.files import whole_file
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.training import Sharpness

# Okabe and Ito 2008: told apart by colour-blind readers, and in grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
# Entries of one tensor that are drawn one by one.
_DRAWN = 400


@gated
def plot_inputs(table: LayerTable, ax: Axes | None = None) -> Axes:
    """Bars of `kappa(H^)`, `kappa(H^U)`, `kappa(G^)` per layer: raw, centred, normalized inputs (T7).

    Args:
        table: from `layer_table`.
        ax: axes to draw on; default new ones.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    forms = [("inputs", "raw", GREY), ("centered", "centred", BLUE), ("normalized", "normalized", ORANGE)]
    for shift, (name, label, colour) in enumerate(forms):
        numbers = [getattr(row, name) for row in table.layers]
        places = np.arange(len(numbers)) + (shift - 1) * 0.25
        ax.bar(places, [k.value for k in numbers], width=0.23, color=colour, label=label)
        for x, k in zip(places, numbers, strict=True):
            if not k.two_sided:
                ax.annotate("≥", (x, k.value), ha="center", va="bottom")
    _layer_axis(ax, table)
    ax.set_ylabel(r"$\sigma_{\max}/\sigma_{\min}^{+}$ of the layer's inputs")
    _legend_above(ax, columns=3)
    return ax


@gated
def plot_blocks(result: Comparison | LayerTable, ax: Axes | None = None) -> Axes:
    """Effective condition numbers of unit blocks (dots), layer blocks and the network, without and with `P`.

    Args:
        result: from `compare` or `layer_table`.
        ax: axes to draw on; default new ones.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    table = result.layers if isinstance(result, Comparison) else result
    sides = [
        ("unit_blocks", "block", "without $P$", BLUE, -0.15),
        ("unit_blocks_with_P", "block_with_P", "with $P$", ORANGE, 0.15),
    ]
    for units, block, label, colour, shift in sides:
        for i, row in enumerate(table.layers):
            live = [k for k in getattr(row, units) if k is not None]
            x = i + shift + np.linspace(-0.08, 0.08, len(live))
            ax.plot(x, [k.value for k in live], ".", color=colour, alpha=0.45, markersize=4)
        _points(ax, [getattr(row, block) for row in table.layers], colour, f"layer block {label}", shift)
    network = result.network if isinstance(result, Comparison) else {}
    for side, colour, shift in ((0, BLUE, -0.15), (1, ORANGE, 0.15)):
        _points(ax, [pair[side] for pair in network.values()], colour, None, shift, first=len(table.layers))
    _layer_axis(ax, table, [f"network\n{name}" for name in network])
    ax.set_ylabel(r"$\kappa^*$ of the curvature")
    ax.plot([], [], ".", color=GREY, label="unit blocks")
    ax.plot([], [], "^", color=GREY, markerfacecolor="none", label="lower bound")
    _legend_above(ax, columns=2)
    return ax


@gated
def plot_spectral_density(
    density: SpectralDensity,
    ax: Axes | None = None,
    *,
    label: str | None = None,
    color: str = BLUE,
    axis: str = "own",
    floor: float | None = None,
) -> Axes:
    """The density with a band that contains the true density at 95 % of the points, on a logarithmic vertical axis.

    The band includes quadrature and sampling errors; where it reaches the axis there may be no eigenvalues. On a
    logarithmic axis the range that is not resolved is grey: peaks there are positions of quadrature nodes, not of
    eigenvalues.

    Args:
        density: from `spectral_density`.
        ax: axes to draw on; default new ones.
        label: for the legend.
        color: of the line.
        axis: `"own"`, that of the density, or `"symlog"`: logarithms of both signs, linear below `floor`, without band.
        floor: sizes below count as zero there; default a millionth of the largest one.

    Returns:
        The axes.
    """
    if axis not in ("own", "symlog"):
        raise InvalidInputError(f"axis must be 'own' or 'symlog', got {axis!r}")
    ax = _axes(ax)
    if axis == "symlog":
        _on_both_signs(density, ax, label, color, floor)
    else:
        _on_own_axis(density, ax, label, color)
    if label is not None:
        ax.legend(frameon=False)
    return ax


def _on_own_axis(density: SpectralDensity, ax: Axes, label: str | None, color: str) -> None:
    """The density with its band; grey: the range that a logarithmic axis does not resolve."""
    top = float(density.density.max())
    ax.semilogy(density.grid, np.maximum(density.density, 1e-9 * top), color=color, label=label)
    low, high = (np.maximum(end, 1e-9 * top) for end in density.band())
    ax.fill_between(density.grid, low, high, color=color, alpha=0.2, linewidth=0)
    ax.set_ylim(bottom=1e-7 * top)
    logarithmic = density.settings.get("scale") == "log"
    if logarithmic:
        rounding = math.log10(density.rounding) if density.rounding else -math.inf
        end = max(min(density.resolved(), density.grid[-1]), rounding)
        if end > density.grid[0]:
            ax.axvspan(density.grid[0], end, color=GREY, alpha=0.15, linewidth=0)
    ax.set(xlabel=r"$\log_{10}|\lambda|$" if logarithmic else r"eigenvalue $\lambda$", ylabel="density")


def _on_both_signs(density: SpectralDensity, ax: Axes, label: str | None, color: str, floor: float | None) -> None:
    """The density per decade of both signs; grey: below the floor, and nodes of eigenvalues of unknown size."""
    some = density.weights > 0
    sizes = np.abs(density.nodes[some])
    largest = float(sizes.max())
    floor = 1e-6 * largest if floor is None else floor
    places, heights = density.symmetric_log(floor)
    top = float(heights.max())
    ax.semilogy(places, np.maximum(heights, 1e-9 * top), color=color, label=label)
    ax.set_ylim(bottom=1e-5 * top)
    _symmetric_log(ax, "x", floor, largest)
    unknown = max(floor, float(sizes[density.residuals[some] + density.rounding > sizes / 2].max(initial=0.0)))
    ax.axvspan(-unknown, unknown, color=GREY, alpha=0.15, linewidth=0)
    ax.set(xlabel=r"eigenvalue $\lambda$", ylabel="density per decade")


@gated
def plot_profile(
    result: Conditioning | ConditionProfile, ax: Axes | None = None, *, label: str | None = None, color: str = BLUE
) -> Axes:
    """The ratio of the largest eigenvalue to the r-th against `r`, with its bounds as a band.

    Args:
        result: from `condition` (two curves, without and with `P`) or `condition_profile` (one).
        ax: axes to draw on; default new ones.
        label, color: of a single curve.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    sides: list[tuple[ConditionProfile | None, str | None, str]]
    if isinstance(result, Conditioning):
        sides = [
            (result.without_P, "without $P$", BLUE),
            (result.with_P, f"with $P$ ({result.preconditioner})", ORANGE),
        ]
    else:
        sides = [(result, label, color)]
    negative = whole = False
    for profile, name, colour in sides:
        if profile is None:
            continue
        negative = negative or profile.negative > 0
        ax.loglog(profile.ranks, profile.value, "o-", markersize=3, color=colour, label=name)
        ax.fill_between(profile.ranks, profile.lower, profile.upper, color=colour, alpha=0.25, linewidth=0)
        if profile.rank is not None and profile.rank in profile.ranks:
            whole = True
            ax.loglog(profile.ranks[-1:], profile.value[-1:], "s", markersize=5, color=colour)
    ax.set_xlabel("rank $r$ (square: the last nonzero eigenvalue)" if whole else "rank $r$")
    ax.set_ylabel(r"$|\lambda|_1/|\lambda|_r$" if negative else r"$\lambda_1/\lambda_r$")
    if any(name for _, name, _ in sides):
        ax.legend(frameon=False)
    return ax


@gated
def plot_block_distances(result: BlockSpectra, ax: Axes | None = None) -> Axes:
    """A heat map of the Jensen-Shannon distances between the spectra of blocks; the diagonal shows their noise.

    Args:
        result: from `block_spectra`.
        ax: axes to draw on; default new ones.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    shown = result.distance + np.diag(result.noise)
    image = ax.imshow(shown, vmin=0.0, vmax=1.0, cmap="viridis")
    places = range(len(result.names))
    ax.set_xticks(places, list(result.names), rotation=90)
    ax.set_yticks(places, list(result.names))
    if len(result.names) <= 12:
        for (i, j), value in np.ndenumerate(shown):
            seen = "white" if value < 0.6 else "black"
            ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize="small", color=seen)
    ax.figure.colorbar(image, ax=ax, label="Jensen-Shannon distance (diagonal: noise)")
    return ax


@gated
def plot_block_densities(result: BlockSpectra, ax: Axes | None = None) -> Axes:
    """The share of each block's eigenvalues up to a value, on a logarithmic axis for both signs.

    Args:
        result: from `block_spectra`.
        ax: axes to draw on; default new ones.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    largest = max(float(np.abs(density.nodes).max()) for density in result.densities)
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(result.names)))
    for name, density, colour in zip(result.names, result.densities, colours, strict=True):
        order = np.argsort(density.nodes, axis=None)
        shares = np.cumsum(density.weights.ravel()[order]) / len(density.nodes)
        ax.step(density.nodes.ravel()[order], shares, where="post", color=colour, label=name, linewidth=1.2)
    _symmetric_log(ax, "x", 1e-6 * largest, largest)
    ax.set(xlabel=r"eigenvalue $\lambda$", ylabel=r"share of eigenvalues $\leq\lambda$")
    if len(result.names) <= 16:
        ax.legend(frameon=False, fontsize="small")
    return ax


@gated
def plot_diagonal(result: Diagonal, ax: Axes | None = None) -> Axes:
    """Every diagonal entry, tensor by tensor, with a 95 % bar; those whose bar contains zero are grey.

    The vertical axis is linear around zero, up to the smallest entry that is told from zero, and logarithmic beyond.

    Args:
        result: from `diagonal`.
        ax: axes to draw on; default new ones.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    named = result.tensors() if result.shapes else {"": (result.value, result.error)}
    value, (low, high) = result.value.numpy(), (end.numpy() for end in result.interval())
    told = (low > 0) | (high < 0)
    begin = 0
    for place, count in enumerate(v.numel() for v, _ in named.values()):
        # Entries of a large tensor would cover each other: every k-th is drawn.
        own = np.arange(begin, begin + count, max(1, count // _DRAWN))
        x = place + 0.8 * ((own - begin + 0.5) / max(count, 1) - 0.5)
        for some, colour in ((~told[own], GREY), (told[own], BLUE)):
            at = own[some]
            ax.vlines(x[some], low[at], high[at], color=colour, alpha=0.25, linewidth=0.8)
            ax.plot(x[some], value[at], ".", color=colour, markersize=3)
        begin += count
    _symmetric_log(ax, "y", float(np.abs(value[told]).min(initial=np.inf)), float(np.abs(value).max()))
    ax.set_xticks(range(len(named)), list(named), rotation=0 if len(named) <= 4 else 90)
    ax.set_ylabel("diagonal of the curvature")
    return ax


@gated
def plot_slice(result: Slice, ax: Axes | None = None) -> Axes:
    """The loss along a direction beside its quadratic model, or its level lines in a plane, the model's dashed.

    Args:
        result: from `slice`.
        ax: axes to draw on; default new ones.

    Returns:
        The axes.
    """
    ax, x = _axes(ax), result.distances
    line = result.loss.ndim == 1
    ax.plot(x if line else [], result.loss if line else [], color=BLUE, label="loss")
    ax.plot(x if line else [], result.quadratic if line else [], "--", color=ORANGE, label="quadratic model")
    if not line:
        finite = result.loss[np.isfinite(result.loss)]
        # Closer where the loss is small: around a minimum a quadratic has its lines at equal distances.
        levels = finite.min() + (finite.max() - finite.min()) * np.linspace(0, 1, 13) ** 2
        ax.clabel(ax.contour(x, x, result.loss.T, levels, colors=BLUE, linewidths=1.2), fontsize="x-small")
        if np.isfinite(result.quadratic).all():
            ax.contour(x, x, result.quadratic.T, levels, colors=ORANGE, linestyles="dashed", linewidths=1.0)
        ax.plot([0], [0], "k+")
    first, *second = (f"distance along {label}" for label in result.labels)
    ax.set(xlabel=first, ylabel="loss" if line else second[0])
    ax.legend(frameon=not line, fontsize="small")
    return ax


@gated
def plot_eigenvector_mass(result: EigenvectorMass, ax: Axes | None = None) -> Axes:
    """A heat map of the share of each eigenvector's squared length in each layer.

    Args:
        result: from `eigenvector_mass`.
        ax: axes to draw on; default new ones.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    image = ax.imshow(result.mass.T, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto")
    ax.set_xticks(range(len(result.values)), [f"{v:.3g}" for v in result.values], rotation=90)
    ax.set_yticks(range(len(result.names)), list(result.names))
    ax.set_xlabel("eigenvalue")
    ax.figure.colorbar(image, ax=ax, label="share of the eigenvector's squared length")
    return ax


@gated
def plot_sharpness(result: Sharpness, ax: Axes | None = None) -> Axes:
    """The tracked eigenvalues along training, with the threshold above which steps on a quadratic are unstable.

    Args:
        result: from `SharpnessTracker.result()`.
        ax: axes to draw on; default new ones.

    Returns:
        The axes.
    """
    ax = _axes(ax)
    for i, column in enumerate(result.values.T):
        ax.plot(result.steps, column, "-", color=BLUE, alpha=max(0.25, 1 - 0.2 * i), linewidth=1.2)
    ax.plot(result.steps, result.threshold, "--", color=ORANGE, label="threshold")
    matrix = "$H$" if result.preconditioner in ("I", "SGD's") else r"$P^\top H P$"
    ax.set(xlabel="steps", ylabel=f"largest eigenvalues of {matrix}")
    if np.isfinite(result.threshold).any():
        ax.legend(frameon=False)
    return ax


@gated
def save_comparison(result: Comparison, path: str | Path, title: str = "") -> None:
    """Draw inputs and blocks side by side and write them to a file whose suffix selects the format.

    Args:
        result: from `compare`.
        path: for instance `condition.png` or `condition.pdf`; missing folders are made.
        title: above both panels.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(2, 3), layout="constrained")
    plot_inputs(result.layers, left)
    plot_blocks(result, right)
    _write(figure, path, title)


@gated
def save_densities(densities: Sequence[tuple[str, SpectralDensity]], path: str | Path, title: str = "") -> None:
    """Draw labelled densities in panels of their own and write them to a file."""
    figure, axes = plt.subplots(
        1, len(densities), figsize=(5 * len(densities), 3.6), squeeze=False, layout="constrained"
    )
    for ax, (label, density), colour in zip(axes[0], densities, (BLUE, ORANGE, GREEN), strict=False):
        plot_spectral_density(density, ax, label=label, color=colour)
    _write(figure, path, title)


@gated
def save_block_spectra(result: BlockSpectra, path: str | Path, title: str = "") -> None:
    """Draw the spectra of blocks and their distances side by side and write them to a file."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    plot_block_densities(result, left)
    plot_block_distances(result, right)
    _write(figure, path, title)


def _write(figure: Any, path: str | Path, title: str) -> None:
    if title:
        figure.suptitle(title)
    try:
        with whole_file(path) as file:
            figure.savefig(file, dpi=150, format=Path(path).suffix.lower().removeprefix(".") or None)
    finally:
        plt.close(figure)


def _symmetric_log(ax: Axes, side: str, smallest: float, largest: float) -> None:
    """Logarithms of both signs, and a linear piece for sizes below the smallest one; linear where these are all."""
    floor = max(smallest, 1e-12 * largest)
    if 0 < floor < largest:
        {"x": ax.set_xscale, "y": ax.set_yscale}[side]("symlog", linthresh=floor, linscale=1.0)
        axis = {"x": ax.xaxis, "y": ax.yaxis}[side]
        ticks = SymmetricalLogLocator(base=10, linthresh=floor)
        ticks.set_params(numticks=7)
        axis.set_major_locator(ticks)


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots(layout="constrained")[1] if ax is None else ax


def _layer_axis(ax: Axes, table: LayerTable, more: Sequence[str] = ()) -> None:
    names = [row.layer or row.kind for row in table.layers] + list(more)
    ax.set_xticks(range(len(names)), names, rotation=0 if len(names) <= 8 else 90)
    ax.set_yscale("log")
    ax.set_ylim(bottom=0.7)  # no condition number is below one


def _legend_above(ax: Axes, columns: int) -> None:
    """Draw the legend outside of the axes, so that its markers are not mistaken for data."""
    ax.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns)


def _points(
    ax: Axes, numbers: Sequence[ConditionNumber | None], colour: str, label: str | None, shift: float, first: int = 0
) -> None:
    """A filled square for a two-sided number, an open triangle on a lower bound."""
    ax.plot([], [], "s", color=colour, label=label) if label else None
    for i, k in enumerate(numbers, start=first):
        if k is not None and math.isfinite(k.value):
            marker, face = ("s", colour) if k.two_sided else ("^", "white")
            ax.plot(i + shift, k.value, marker, color=colour, markerfacecolor=face, markersize=8, zorder=3)


__all__ = [name for name in list(globals()) if name.startswith(("plot_", "save_"))]
