"""Spectral densities and traces estimate what they say, with error bars that are honest.

Bugs that only these tests catch: a density whose mass is not one; weights that belong to other nodes; error bars that
shrink faster than the truth; padding that shows up as eigenvalues; null directions counted as zeros; an interrupt
that throws finished probes away.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from linalg_problems import counting, interrupt

from bnp_analysis.errors import InvalidInputError, NonFiniteError, NullSpaceError
from bnp_analysis.linalg import (
    DenseOperator,
    DensePreconditioner,
    SpectralDensity,
    Trace,
    spectral_density,
    trace,
)
from bnp_analysis.testing import KINDS, random_orthogonal, spectrum, symmetric_with_spectrum


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_mass_and_moments(kind: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    """A Gauss rule with k nodes is exact for `v.p(A)v` up to degree 2k - 1, here averaged over probes."""
    p = symmetric_with_spectrum(spectrum(kind, 60, 1.0 if kind == "flat" else 1e3), generator, dtype=dtype)
    found = spectral_density(p.operator, probes=40, steps=12, seed=2)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert found.weights.sum(axis=1) == pytest.approx(np.ones(40), abs=tolerance)
    assert float(found.mass(-9.0, 9.0)[0]) == pytest.approx(1.0, abs=tolerance)
    step = found.grid[1] - found.grid[0]
    assert float(found.density.sum() * step) == pytest.approx(1.0, abs=1e-4)
    probe = torch.randn(60, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for degree in (1, 2, 5):
        nodes = (found.nodes**degree * found.weights).sum(axis=1)
        A = torch.linalg.matrix_power(p.operator.to_dense().double(), degree)
        # The first probe, exactly.
        assert nodes[0] == pytest.approx(float(probe @ A @ probe / (probe @ probe)), rel=20 * tolerance)
        # All of them, within their error: mean over eigenvalues.
        error = nodes.std(ddof=1) / math.sqrt(40)
        assert abs(nodes.mean() - float((p.values**degree).mean())) <= 4 * error + tolerance


def test_mass_of_an_interval_within_its_error(generator: torch.Generator) -> None:
    values = torch.cat([torch.linspace(0.1, 1, 75), torch.linspace(3, 4, 25)])
    p = symmetric_with_spectrum(values, generator)
    inside = 0
    for seed in range(10):
        mass, error = spectral_density(p.operator, probes=8, steps=40, seed=seed, points=10).mass(2.0, 5.0)
        inside += abs(mass - 0.25) <= 2 * error
        assert 0.001 < error < 0.07
    # Student's t with 7 degrees of freedom: 92 % lie within two standard errors.
    assert inside >= 8


def test_error_bars_shrink_with_the_probes(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 100, 100.0), generator)
    few, many = (spectral_density(p.operator, probes=n, steps=20, points=100).error.mean() for n in (10, 160))
    assert 2.5 < few / many < 6.5
    single = spectral_density(p.operator, probes=1, steps=20)
    assert np.isnan(single.error).all()
    assert single.mass(0, 0.5).error > 0.05, "the distribution of one vector's share is known"


def test_the_grid_reaches_beyond_the_spectrum(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(-spectrum("log", 50, 10.0), generator)
    found = spectral_density(p.operator, points=64, width=0.05)
    assert (found.width, found.grid.shape, found.density.shape) == (0.05, (64,), (64,))
    assert found.grid[0] == pytest.approx(-1.25, abs=0.01)
    assert found.grid[-1] == pytest.approx(-0.1 + 0.25, abs=0.01)
    assert found.density[0] < 1e-4 * found.density.max()


def test_padding_is_no_eigenvalue(generator: torch.Generator) -> None:
    """A run that ends after three steps leaves rows of zeros, which are no nodes of a negative spectrum."""
    p = symmetric_with_spectrum(torch.tensor([-3.0] * 20 + [-2.0] * 20 + [-1.0] * 20), generator)
    found = spectral_density(p.operator, steps=20)
    assert int((found.weights > 0).sum(axis=1).max()) <= 6
    assert found.grid[-1] < -0.8
    assert str(found).startswith("spectral density on [-3, -1], mean -")
    assert found.mass(-0.5, 0.5)[0] == 0.0


def test_null_directions_leave_no_mass_at_zero(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 60, 10.0, rank=40), generator)
    assert spectral_density(p.operator, steps=40).mass(-1e-6, 1e-6)[0] == pytest.approx(1 / 3, abs=0.1)
    found = spectral_density(p.operator, null=p.null, steps=99)
    assert found.mass(-0.05, 0.05)[0] == 0.0
    assert (found.null_dim, found.dim, found.nodes.shape) == (20, 60, (8, 40))
    with pytest.raises(NullSpaceError):
        spectral_density(p.operator, null=p.vectors[:, :2])


def test_with_a_preconditioner(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 30, 10.0, rank=25), generator)
    P = DensePreconditioner(random_orthogonal(30, generator) * torch.linspace(1, 2, 30).double())
    dense = P.to_dense().T @ p.operator.to_dense() @ P.to_dense()
    nonzero = torch.linalg.eigvalsh(dense)[5:]
    found = spectral_density(p.operator, preconditioner=P, null=p.null, steps=25)
    for nodes in found.nodes:
        np.testing.assert_allclose(np.sort(nodes), nonzero.numpy(), atol=1e-12)
    assert trace(p.operator, preconditioner=P, probes=400).value == pytest.approx(float(dense.trace()), rel=0.05)


def test_interrupts_keep_finished_probes(generator: torch.Generator) -> None:
    A = symmetric_with_spectrum(spectrum("log", 50, 100.0), generator).operator
    whole = spectral_density(A, steps=10, probes=2)
    for product in (21, 25, 30):
        found = spectral_density(counting(A, {product: interrupt}), steps=10, probes=8)
        assert found.nodes.shape == (2, 10)
        np.testing.assert_array_equal(found.nodes, whole.nodes)
        assert found.matvecs == product - 1
    for product in (1, 9):
        with pytest.raises(KeyboardInterrupt):
            spectral_density(counting(A, {product: interrupt}), steps=10)
    assert trace(counting(A, {6: interrupt})).value == trace(A, probes=5).value
    with pytest.raises(KeyboardInterrupt):
        trace(counting(A, {2: interrupt}))


def test_a_trace_within_its_error(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 80, 1e3), generator)
    truth = float(p.values.sum())
    near = sum(abs((t := trace(p.operator, seed=seed)).value - truth) <= 2 * t.error for seed in range(60))
    assert near >= 50
    diagonal = DenseOperator(torch.diag(p.values))
    exact = trace(diagonal, probes=2)
    assert exact.value == pytest.approx(truth, rel=1e-12)
    assert exact.error < 1e-12, "random signs know a diagonal exactly"
    assert str(trace(p.operator)).startswith("trace = ")


def test_products_are_counted(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 50, 10.0, rank=45), generator)
    for null in (None, p.null):
        A = counting(p.operator)
        assert spectral_density(A, null=null, probes=3, steps=7).matvecs == len(A.calls)
    A = counting(p.operator)
    assert trace(A, probes=9).matvecs == len(A.calls) == 9


def test_refusals(generator: torch.Generator) -> None:
    A = symmetric_with_spectrum(spectrum("log", 9, 10.0), generator).operator
    for settings, words in (
        ({"probes": 0}, "probes must be"),
        ({"steps": 0}, "steps must be"),
        ({"points": 1}, "nothing to"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            spectral_density(A, **settings)  # type: ignore[arg-type]
    for width in (0.0, -1.0, math.nan):
        with pytest.raises(InvalidInputError, match="width"):
            spectral_density(A, width=width)
    for floor in (0.0, -1e-3, math.nan):
        with pytest.raises(InvalidInputError, match=f"floor must be positive, got {floor}"):
            spectral_density(A, steps=4, probes=1).symmetric_log(floor)
    with pytest.raises(InvalidInputError, match=r"R\^0 has no eigenvalues"):
        spectral_density(DenseOperator(torch.zeros(0, 0)))
    with pytest.raises(InvalidInputError, match="two probes"):
        trace(A, probes=1)
    for estimate in (spectral_density, trace):
        with pytest.raises(InvalidInputError, match=r"bnp.DenseOperator\(matrix\)"):
            estimate(torch.eye(3))  # type: ignore[operator]
        with pytest.raises(NonFiniteError, match="product 2 "):
            estimate(counting(A, {2: lambda v: v * math.nan}))  # type: ignore[operator]


def test_files_and_seeds(tmp_path: Path, generator: torch.Generator) -> None:
    A = symmetric_with_spectrum(spectrum("log", 40, 10.0), generator).operator
    density = spectral_density(A, steps=8, points=30)
    loaded = SpectralDensity.load(density.save(tmp_path / "density.json"))
    assert loaded == density
    assert loaded.nodes.tolist() == density.nodes.tolist()
    assert len(density.records()) == 30
    assert density == spectral_density(A, steps=8, points=30)
    assert density != spectral_density(A, steps=8, points=30, seed=1)
    estimate = trace(A)
    assert Trace.load(estimate.save(tmp_path / "trace.json")) == estimate


def test_no_error_bar_is_negative() -> None:
    """Where a jump of the distribution decides a quantile, the two bounds cross: nothing is left open by quadrature."""
    values = torch.linspace(-1, 1, 61, dtype=torch.float64)
    density = spectral_density(DenseOperator(torch.diag(values)), probes=8, steps=30, seed=1)
    for share in (0.01, 0.25, 0.5, 0.9, 1.0):
        found = density.quantile(share)
        assert found.quadrature >= 0
        assert found.sampling >= 0
        assert found.lower <= found.value <= found.upper
