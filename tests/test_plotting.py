"""Figures: one that draws other numbers than its result holds, hides that a number is one-sided, or does not draw on
the axes it was given is caught here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.integrate
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox
from torch.nn.functional import cross_entropy

import bnp_analysis as bnp
from bnp_analysis import plotting


@pytest.fixture(scope="module")
def result() -> bnp.diagnose.Comparison:
    g = torch.Generator().manual_seed(0)
    x, y = 1 + torch.rand(40, 4, generator=g), torch.randint(0, 3, (40,), generator=g)
    found = bnp.compare(bnp.EmpiricalRisk(bnp.models.mlp([4, 5, 3]), cross_entropy, (x, y)))
    one_sided = replace(found.network["hessian"][0], two_sided=False, upper=np.inf)  # as where null directions lack
    return replace(found, network=found.network | {"hessian": (one_sided, found.network["hessian"][1])})


def test_bars_have_the_heights_of_the_result(result):
    _, ax = plt.subplots()
    assert plotting.plot_inputs(result.layers, ax) is ax
    heights = sorted(patch.get_height() for patch in ax.patches)
    expected = [
        getattr(row, form).value for row in result.layers.layers for form in ("inputs", "centered", "normalized")
    ]
    assert heights == pytest.approx(sorted(expected))
    assert ax.get_yscale() == "log"


def test_bars_that_are_bounds_say_so(result):
    first, *rest = result.layers.layers
    bound = replace(first, centered=replace(first.centered, two_sided=False))
    ax = plotting.plot_inputs(replace(result.layers, layers=(bound, *rest)))
    assert [(text.get_text(), text.xy) for text in ax.texts] == [("≥", (0.0, first.centered.value))]
    plt.close("all")


def test_profiles_show_the_last_nonzero_eigenvalue_and_one_side_may_lack():
    x, y = torch.eye(4, dtype=torch.float64)[:3], torch.zeros(3, 1, dtype=torch.float64)
    risk = bnp.EmpiricalRisk(torch.nn.Linear(4, 1, bias=False).double(), torch.nn.functional.mse_loss, (x, y))
    found = bnp.condition(risk, preconditioner=None)
    assert found.with_P is None
    ax = plotting.plot_profile(found)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["without $P$"]
    whole = replace(found.without_P, rank=int(found.without_P.ranks[-1]))
    ax = plotting.plot_profile(whole)
    (square,) = [line for line in ax.lines if line.get_marker() == "s"]
    assert (square.get_xdata()[0], square.get_ydata()[0]) == (whole.ranks[-1], whole.value[-1])
    assert ax.get_xlabel() == "rank $r$ (square: the last nonzero eigenvalue)"
    ax = plotting.plot_profile(replace(whole, rank=None))
    assert [line.get_marker() for line in ax.lines] == ["o"]
    assert ax.get_xlabel() == "rank $r$"
    plt.close("all")


def test_every_number_is_drawn_and_bounds_look_different(result):
    ax = plotting.plot_blocks(result)
    markers = [(line.get_marker(), y) for line in ax.lines for y in np.atleast_1d(line.get_ydata())]
    drawn = [row_block for row in result.layers.layers for row_block in (row.block, row.block_with_P)]
    drawn += [k for pair in result.network.values() for k in pair]
    for k in drawn:
        assert ("s" if k.two_sided else "^", k.value) in markers
    assert any(not k.two_sided for k in drawn)
    units = sum(len(row.unit_blocks) - row.dead for row in result.layers.layers)
    assert sum(marker == "." for marker, _ in markers) == 2 * units
    plt.close("all")


@pytest.mark.parametrize("draw", [plotting.plot_blocks, lambda result: plotting.plot_inputs(result.layers)])
def test_no_marker_of_a_legend_is_among_the_data(result, draw):
    ax = draw(result)
    ax.figure.draw_without_rendering()
    assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1
    plt.close("all")


def test_density_keeps_its_values_and_files_are_written(result, tmp_path):
    A = bnp.DenseOperator(torch.diag(torch.linspace(1, 3, 50, dtype=torch.float64)))
    density = bnp.spectral_density(A, steps=20)
    ax = plotting.plot_spectral_density(density, label="A")
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.maximum(density.density, 1e-9 * density.density.max()))
    plotting.save_densities([("A", density)], tmp_path / "deep" / "d.pdf")
    plotting.save_comparison(result, tmp_path / "c.png", "title")
    assert (tmp_path / "deep" / "d.pdf").stat().st_size > 1000
    assert (tmp_path / "c.png").read_bytes()[:4] == b"\x89PNG"
    assert not plt.get_fignums() or plt.close("all") is None


def test_sharpness_is_drawn_with_its_threshold() -> None:
    found = bnp.training.Sharpness(
        steps=np.array([1, 2]),
        values=np.array([[3.0, np.nan], [4.0, 2.0]]),
        residuals=np.zeros((2, 2)),
        threshold=np.array([5.0, 5.0]),
        products=np.array([9, 3]),
        preconditioner="Adam's",
    )
    ax = plotting.plot_sharpness(found)
    lines = [line.get_ydata() for line in ax.lines]
    assert np.array_equal(lines[0], [3.0, 4.0])
    assert np.array_equal(lines[-1], [5.0, 5.0])
    assert "P" in ax.get_ylabel()


def test_diagonal_entries_are_drawn_and_those_not_told_from_zero_are_grey() -> None:
    found = bnp.linalg.Diagonal(
        value=torch.tensor([1.0, -3.0, 0.1], dtype=torch.float64),
        error=torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64),
        rounding=0.0,
        method="stochastic",
        probes=30,
        shapes={"w": (2,), "b": (1,)},
        choice="",
    )
    ax = plotting.plot_diagonal(found)
    drawn = sorted((float(y), line.get_color()) for line in ax.lines for y in line.get_ydata())
    assert drawn == [(-3.0, plotting.BLUE), (0.1, plotting.GREY), (1.0, plotting.BLUE)]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["w", "b"]
    assert ax.get_yscale() == "symlog"
    plt.close("all")


def test_blocks_are_drawn_with_their_distances_and_all_their_nodes() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(20, 4, generator=g), torch.randint(0, 3, (20,), generator=g)
    risk = bnp.EmpiricalRisk(bnp.models.mlp([4, 3, 3]), cross_entropy, (x, y))
    found = bnp.block_spectra(risk, blocks=["fc1", "fc2"], profiles=False, probes=2, steps=4)
    ax = plotting.plot_block_distances(found)
    np.testing.assert_array_equal(ax.images[0].get_array(), found.distance + np.diag(found.noise))
    assert [text.get_text() for text in ax.get_xticklabels()] == ["fc1", "fc2"]
    ax = plotting.plot_block_densities(found)
    for line, density in zip(ax.lines, found.densities, strict=True):
        np.testing.assert_array_equal(line.get_xdata(), np.sort(density.nodes.ravel()))
        assert line.get_ydata()[-1] == pytest.approx(1)
    assert ax.get_xscale() == "symlog"
    plt.close("all")


def test_slices_and_masses_are_drawn_as_they_are() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(20, 4, generator=g), torch.randint(0, 3, (20,), generator=g)
    risk = bnp.EmpiricalRisk(bnp.models.mlp([4, 3, 3]), cross_entropy, (x, y))
    line = bnp.slice(risk, "gradient", points=5)
    ax = plotting.plot_slice(line)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), line.loss)
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), line.quadratic)
    pairs = bnp.eigenpairs(bnp.hessian(risk), k=2, tol=1e-3)
    plane = bnp.slice(risk, "gradient", pairs.vectors[:, 0], points=5)
    ax = plotting.plot_slice(plane)
    assert "gradient" in ax.get_xlabel()
    assert len(ax.collections) >= 2
    mass = bnp.diagnose.eigenvector_mass(pairs, risk.space)
    ax = plotting.plot_eigenvector_mass(mass)
    np.testing.assert_array_equal(ax.images[0].get_array(), mass.mass.T)
    plt.close("all")


def grey(ax: Axes) -> Bbox:
    """Where the first patch lies, in the coordinates of the data: a rectangle, or a polygon in matplotlib 3.8."""
    return ax.transData.inverted().transform_bbox(ax.patches[0].get_window_extent())


def test_what_a_density_does_not_resolve_is_grey() -> None:
    values = torch.cat([-torch.logspace(-3, -1, 40), torch.logspace(-4, 1, 160)]).double()
    A = bnp.DenseOperator(torch.diag(values))
    logarithmic = bnp.spectral_density(A, steps=20, scale="log")
    end = logarithmic.resolved()
    lower = logarithmic.band()[0]
    assert not (lower[logarithmic.grid < end] > 0.01 * logarithmic.density[logarithmic.grid < end]).any()
    assert logarithmic.grid[0] < end < 1
    ax = plotting.plot_spectral_density(logarithmic)
    assert grey(ax).x1 == pytest.approx(end)
    every = bnp.spectral_density(A, method="dense")
    ax = plotting.plot_spectral_density(every, axis="symlog", floor=1e-4)
    assert ax.get_xscale() == "symlog"
    assert grey(ax).width == pytest.approx(2e-4)
    places, heights = every.symmetric_log(1e-4)
    decades = np.sign(places) * np.log10(1 + np.abs(places) / 1e-4)
    negative = places < 0
    assert scipy.integrate.trapezoid(heights, decades) == pytest.approx(1, abs=1e-6)
    assert scipy.integrate.trapezoid(heights[negative], decades[negative]) == pytest.approx(0.2, abs=0.01)
    rough = bnp.spectral_density(A, steps=20)
    assert grey(plotting.plot_spectral_density(rough, axis="symlog")).width > 1e-3  # its small nodes
    with pytest.raises(bnp.errors.InvalidInputError, match="symlog"):
        plotting.plot_spectral_density(rough, axis="log")
    with pytest.raises(bnp.errors.InvalidInputError, match="scale='log'"):
        rough.resolved()
    plt.close("all")
