"""What a density says of masses, quantiles and heights contains the truth as often as it says.

Bugs that only these tests catch: an error bar that forgets the quadrature, or counts it for another node; a bracket
that is not certain for the vectors drawn; one that never shrinks; ghosts counted as eigenvalues; small samples taken
for large ones. Truths are prescribed eigenvalues and dense decompositions.
"""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import CallableOperator, DenseOperator, DensePreconditioner, SpectralDensity, spectral_density
from bnp_analysis.linalg.spectra.quadrature import _bracket, christoffel
from bnp_analysis.runtime.random import generator as stream
from bnp_analysis.runtime.random import normal
from bnp_analysis.testing import random_orthogonal, symmetric_with_spectrum

KINDS = ("clusters", "gaps", "tails", "zeros", "outliers", "both", "log", "few", "tiny")


def prescribed(kind: str, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    values = {
        "clusters": lambda: rng.choice(rng.normal(size=4), n) + 1e-9 * rng.normal(size=n),
        "gaps": lambda: np.concatenate([rng.uniform(0.1, 1, n // 2), rng.uniform(3, 4, n - n // 2)]),
        "tails": lambda: rng.standard_cauchy(n),
        "zeros": lambda: np.where(rng.random(n) < 0.5, 0.0, rng.uniform(0.5, 2, n)),
        "outliers": lambda: np.concatenate([rng.normal(size=n - 3) ** 2, [30.0, 50.0, 100.0]]),
        "both": lambda: rng.normal(size=n),
        "log": lambda: 10 ** rng.uniform(-6, 0, n),
        "few": lambda: rng.choice([1.0, 2.0, 5.0], n),
        "tiny": lambda: 10 ** rng.uniform(-12, 0, n) * rng.choice([-1, 1], n),
    }[kind]()
    return np.sort(values)


def tried(i: int, counts: Counter[str]) -> None:
    """One spectrum under one choice of everything; counts claims, and those that miss the truth."""
    rng = np.random.default_rng(i)
    g = torch.Generator().manual_seed(i)
    values = prescribed(KINDS[i % len(KINDS)], int(rng.integers(20, 100)), rng)
    A = symmetric_with_spectrum(torch.tensor(values), g).operator
    settings: dict[str, Any] = {"probes": int(rng.choice([1, 2, 8, 30])), "steps": int(rng.choice([3, 10, 30, 120]))}
    settings |= {"reorthogonalize": bool(rng.integers(2)), "scale": str(rng.choice(["linear", "log"])), "points": 300}
    n, P, dense = A.dim, None, A.to_dense()
    if rng.random() < 0.3:
        P = DensePreconditioner(random_orthogonal(n, g) * torch.linspace(0.5, 2, n).double())
        dense = P.to_dense().T @ dense @ P.to_dense()
        values = torch.linalg.eigvalsh(dense).numpy()
    density = spectral_density(A, preconditioner=P, seed=i, **settings)
    certain(density, dense, i)
    for _ in range(3):
        ends = rng.uniform(values[0] - 0.1, values[-1] + 0.1, 2) if rng.random() < 0.5 else rng.choice(values, 2) + 1e-4
        low, high = -np.inf if rng.random() < 0.3 else ends.min(), ends.max()
        found, truth = density.mass(low, high), float(np.mean((values >= low) & (values <= high)))
        counts["mass"] += 1
        counts["mass missed"] += not found.lower - 1e-9 <= truth <= found.upper + 1e-9
        share = rng.uniform(0.001, 1)
        quantile, truth = density.quantile(share), values[math.ceil(share * n - 1e-9) - 1]
        counts["quantile"] += 1
        counts["quantile missed"] += not quantile.lower - density.rounding <= truth <= quantile.upper + density.rounding
        for x in (found, quantile):
            assert x.lower <= x.value <= x.upper
    axis = values
    if settings["scale"] == "log":
        axis = np.log10(np.maximum(np.abs(values), np.finfo(float).eps * np.abs(density.nodes).max()))
    peak = 1 / (density.width * math.sqrt(2 * math.pi))
    exact = peak * np.exp(-0.5 * ((density.grid[:, None] - axis) / density.width) ** 2).mean(axis=1)
    lower, upper = density.band()
    inside = (lower - 1e-9 * peak <= exact) & (exact <= upper + 1e-9 * peak)
    counts["height"] += 1
    counts["height missed"] += not inside[rng.integers(300)]


def certain(density: SpectralDensity, dense: torch.Tensor, seed: int) -> None:
    """The brackets of the first probe hold for its own measure, at every place."""
    values, vectors = (x.numpy() for x in torch.linalg.eigh(dense))
    start = normal((len(values),), stream(seed), dense).numpy()
    weights = (vectors.T @ start) ** 2 / (start @ start)
    places = np.linspace(values[0] - 0.1, values[-1] + 0.1, 101)
    places = np.concatenate([places, values + 1e-5, (values[1:] + values[:-1]) / 2, density.nodes[0]])
    # Rounding turns eigenvectors whose values are closer by its size over their distance, here 1e-6.
    places = places[np.abs(places[:, None] - values).min(axis=1) > 1e-9 * np.abs(values).max()]
    truth = np.array([weights[values <= x].sum() for x in places])
    _, lower, upper = _bracket(places, density.nodes[0], density.weights[0], density.residuals[0], density.rounding)
    slack = 1e-6
    assert (lower <= truth + slack).all(), seed
    assert (upper >= truth - slack).all(), seed


def covered(counts: Counter[str]) -> None:
    for kind in ("mass", "quantile", "height"):
        allowed = 0.05 * counts[kind] + 2.6 * math.sqrt(0.05 * 0.95 * counts[kind])
        assert counts[f"{kind} missed"] <= allowed, (kind, counts)


def test_intervals_contain_the_truth_as_often_as_they_say() -> None:
    counts: Counter[str] = Counter()
    for i in range(9):
        tried(i, counts)
    covered(counts)


@pytest.mark.slow
def test_intervals_contain_the_truth_on_hundreds_of_spectra() -> None:
    counts: Counter[str] = Counter()
    for i in range(1000, 1360):
        tried(i, counts)
    covered(counts)


def test_a_christoffel_function_by_exact_polynomials() -> None:
    """Lanczos and the orthonormal polynomials in fractions: `1 / sum p_j(x)^2` for a measure on 0, 1, ..., 5."""
    atoms = [Fraction(j) for j in range(6)]
    basis: list[list[Fraction]] = []  # monic orthogonal polynomials by their values at the atoms, and at x
    x, k = Fraction(7, 3), 3
    for degree in range(k + 1):
        values = [a**degree for a in [*atoms, x]]
        for p in basis:
            shift = sum(u * v for u, v in zip(values[:6], p[:6], strict=True)) / sum(v * v for v in p[:6])
            values = [u - shift * v for u, v in zip(values, p, strict=True)]
        basis.append(values)
    exact = 1 / sum(p[6] ** 2 / (sum(v * v for v in p[:6]) / 6) for p in basis)
    start = torch.ones(6, dtype=torch.float64)
    from bnp_analysis.linalg import lanczos
    from bnp_analysis.linalg.krylov.lanczos import tridiagonal_eigh

    run = lanczos(DenseOperator(torch.diag(torch.arange(6.0, dtype=torch.float64))), k, start=start)
    nodes, vectors = tridiagonal_eigh(run.alpha, run.beta)
    residuals = run.residual_norm * np.abs(vectors[-1])
    found = christoffel(np.array([float(x), nodes[1]]), nodes, vectors[0] ** 2, residuals)
    assert found[0] == pytest.approx(float(exact), rel=1e-12)
    assert found[1] == pytest.approx(vectors[0, 1] ** 2, rel=1e-9), "at a node it is the weight"


def test_intervals_shrink_with_steps_and_probes_and_are_sharp_in_gaps(generator: torch.Generator) -> None:
    values = torch.cat([torch.linspace(0.1, 1, 150), torch.linspace(3, 4, 50)]).double()
    A = symmetric_with_spectrum(values, generator).operator
    dull, sharp = (spectral_density(A, steps=steps).mass(-math.inf, 0.5) for steps in (5, 60))
    assert sharp.quadrature < 0.2 * dull.quadrature
    few, many = (spectral_density(A, probes=probes, steps=40).mass(2, 3.5) for probes in (4, 64))
    assert many.sampling < 0.4 * few.sampling
    gap = spectral_density(A, steps=40).mass(2, math.inf)
    assert gap.quadrature < 1e-9
    assert str(gap).endswith(f"quadrature +- {gap.quadrature:.2g}, sampling +- {gap.sampling:.2g})")
    value, error = gap
    assert (value, error) == (gap[0], gap[1]) == (gap.value, gap.error)
    whole = spectral_density(A, steps=200)
    assert whole.mass(-math.inf, 0.5).quadrature < 1e-9, "a run that found the whole spectrum leaves nothing open"


def test_single_precision_and_zeros_beside_a_bound(generator: torch.Generator) -> None:
    values = torch.cat([torch.zeros(40), torch.linspace(0.5, 2, 60)]).double()
    A = symmetric_with_spectrum(values, generator, dtype=torch.float32).operator
    density = spectral_density(A, steps=60)
    at_zero = density.mass(0.0, 1.0)
    inside = float((values <= 1).double().mean())
    assert at_zero.lower <= inside - 0.4 + 1e-9 <= inside <= at_zero.upper, "rounding may put the zeros on either side"
    assert density.mass(-math.inf, 1.0).lower > 0.45


@pytest.mark.parametrize("reorthogonalize", [True, False])
def test_what_may_be_rounding_is_in_the_quadrature(reorthogonalize: bool) -> None:
    """Of spectra narrower than a bound of rounding certain masses were said to be 0, or 0.254 where it was 0.315."""
    values = (1 + 1e-4 * torch.randn(20_000, generator=stream(0))).float()
    half = torch.linspace(0.9, 1.1, 100)
    near = CallableOperator(lambda v: values * v, 20_000)
    coarse = CallableOperator(lambda v: (half * v).half().float(), 100, eps=2.0**-10)
    for A, true, place in ((near, values, 1 - 5e-5), (coarse, half, 0.95)):
        found = spectral_density(A, probes=2, steps=20, reorthogonalize=reorthogonalize).mass(-math.inf, place)
        share = float((true <= place).double().mean())
        assert found.lower <= share <= found.upper
        assert abs(found.value - share) <= found.quadrature + 0.1


@pytest.mark.parametrize("exponent", [-1000, -530, 530, 960])
def test_a_band_has_the_scale_of_the_density(exponent: int) -> None:
    """Squares of densities left the floats: lower ends were NaN, or 0."""
    values = torch.linspace(1, 2, 100, dtype=torch.float64)
    plain, scaled = (
        spectral_density(DenseOperator(torch.diag(2.0**e * values)), probes=20, steps=100, points=50).band()
        for e in (0, exponent)
    )
    assert plain[0].max() > 0.5
    for expected, found in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(np.ldexp(found, exponent), expected, rtol=1e-9, atol=1e-9)


def test_refusals() -> None:
    density = spectral_density(DenseOperator(torch.diag(torch.arange(1.0, 9.0).double())), probes=2)
    for confidence in (0.0, 1.0, math.nan):
        with pytest.raises(InvalidInputError, match="confidence"):
            density.mass(0, 1, confidence)
    for share in (0.0, 1.1, math.nan):
        with pytest.raises(InvalidInputError, match="share"):
            density.quantile(share)
    assert density.quantile(1.0).value == pytest.approx(8.0)
