"""`P^T A P` is measured with the rounding of its product counted, in every way to say it.

Bugs that only these tests catch: a certificate without its `|P|` term for one of `preconditioner=`,
`congruence`, rows that are conditioned directly, a product of operators; a null space that is refused because the
congruence cancels; null directions taken in the wrong coordinates. Truth comes from 60 digits.
"""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from bnp_analysis.errors import NullSpaceError, ZeroOperatorError
from bnp_analysis.linalg import (
    ConditionNumber,
    DenseOperator,
    DensePreconditioner,
    GramOperator,
    MatrixOperator,
    RowScaled,
    condition_number,
    condition_profile,
    congruence,
    eigenpairs,
    singular_condition_number,
    spectral_density,
)
from bnp_analysis.precondition import DiagonalPreconditioner
from bnp_analysis.testing import random_orthogonal, spectrum, symmetric_with_spectrum


def digits60(matrix: Tensor) -> mpmath.matrix:
    return mpmath.matrix(matrix.double().tolist())


def true_kappa(factor: Tensor, P: Tensor) -> float:
    """`kappa(P^T F^T F P)` of the stored numbers, in 60 digits."""
    with mpmath.workdps(60):
        sigma = mpmath.svd_r(digits60(factor) * digits60(P), compute_uv=False)
        return float((sigma[0] / sigma[len(sigma) - 1]) ** 2)


def true_kappa_dense(matrix: Tensor, P: Tensor) -> float:
    with mpmath.workdps(60):
        values = mpmath.eigsy(digits60(P).T * digits60(matrix) * digits60(P), eigvals_only=True)
        return float(values[len(values) - 1] / values[0])


def cancelling(g: torch.Generator, norm: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`F = G P^-1` and `P` with `|P| = norm`, so that `F P` is far smaller than `|F| |P|`."""
    n = int(torch.randint(2, 7, (1,), generator=g))
    P = random_orthogonal(n, g) * spectrum("log", n, norm, scale=norm) @ random_orthogonal(n, g)
    G = random_orthogonal(n + 2, g)[:, :n] * spectrum("log", n, 100.0).sqrt() @ random_orthogonal(n, g)
    return (G @ torch.linalg.inv(P)).to(dtype), P.to(dtype)


def ways(factor: Tensor, P: DensePreconditioner) -> dict[str, ConditionNumber]:
    """All ways to ask for `kappa*(P^T F^T F P)` by its factor."""
    rows = GramOperator(RowScaled(torch.ones(factor.shape[0], dtype=factor.dtype), factor))
    stored = GramOperator(MatrixOperator(factor))
    half = DensePreconditioner(0.5 * torch.eye(P.dim, dtype=P.dtype))
    return {
        "preconditioner=": condition_number(stored, preconditioner=P),
        "congruence": condition_number(congruence(stored, P)),
        "congruence twice": condition_number(congruence(congruence(stored, P), half)),
        "rows": condition_number(rows, preconditioner=P),
        "rows, congruence twice": condition_number(congruence(rows, P), preconditioner=half),
        "singular": singular_condition_number(MatrixOperator(factor) @ P),
        "golub-kahan": condition_number(stored, preconditioner=P, method="golub-kahan"),
    }


@pytest.mark.parametrize(("exponent", "dtype"), [(1, torch.float64), (5, torch.float64), (4, torch.float32)])
def test_the_interval_counts_the_rounding_of_the_product(
    exponent: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Without the `|P|` term 60 of 60 intervals missed the truth at `|P| = 1e5`."""
    norm = 10.0**exponent if dtype == torch.float64 else 10.0 ** (exponent / 2)
    resolved = 0
    for _ in range(12):
        factor, matrix = cancelling(generator, norm, dtype)
        truth = true_kappa(factor, matrix)
        for way, k in ways(factor, DensePreconditioner(matrix)).items():
            kappa = math.sqrt(truth) if way == "singular" else truth
            assert k.method == ("golub-kahan" if way == "golub-kahan" else "factor-svd"), way
            assert k.lower <= kappa <= k.upper, way
            resolved += k.two_sided
    assert resolved >= 60, "bounds that are never finite are no evidence"


@pytest.mark.parametrize("exponent", [0, 1, 2])
def test_dense_counts_the_rounding_of_the_product(exponent: int, generator: torch.Generator) -> None:
    resolved = 0
    for _ in range(15):
        factor, matrix = cancelling(generator, 10.0**exponent, torch.float64)
        square = factor.T @ factor
        square = (square + square.T) / 2
        A, P = DenseOperator(square), DensePreconditioner(matrix)
        truth = true_kappa_dense(square, matrix)
        for k in (condition_number(A, preconditioner=P, method="dense"), condition_number(congruence(A, P))):
            assert k.lower <= truth <= k.upper
            resolved += k.two_sided
    assert resolved >= 25


def test_one_congruence_said_in_two_ways(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 20, 1e4, rank=17), generator, factor_rows=25)
    left, right = random_orthogonal(20, generator), random_orthogonal(20, generator)
    P = DensePreconditioner(left * spectrum("log", 20, 1e3) @ right)
    for method in ("factor-svd", "golub-kahan", "dense", "lanczos"):
        inside = condition_number(p.operator, preconditioner=P, null=p.null, method=method)
        explicit = condition_number(congruence(p.operator, P), null=P.transport(p.null), method=method)
        assert explicit.value == pytest.approx(inside.value, rel=1e-6)
        assert explicit.noise_floor == pytest.approx(inside.noise_floor, rel=0.1)
        assert explicit.two_sided == inside.two_sided
        assert (explicit.rank, explicit.null_dim) == (inside.rank, 3)


@pytest.mark.parametrize("method", ["factor-svd", "dense", "lanczos"])
def test_null_directions_of_a_cancelling_congruence_are_believed(method: str, generator: torch.Generator) -> None:
    """`|P^T A P n|` is rounding of size `u |P|^2 |A|`, far above `u |P^T A P|`."""
    n, norm = 12, 1e4 if method == "factor-svd" else 300.0
    P = random_orthogonal(n, generator) * spectrum("log", n, norm, scale=norm) @ random_orthogonal(n, generator)
    inner = symmetric_with_spectrum(spectrum("log", n, 10.0, rank=n - 3), generator, factor_rows=n)
    assert inner.operator.factor is not None
    factor = inner.operator.factor.to_dense() @ torch.linalg.inv(P)
    square = factor.T @ factor
    A = DenseOperator((square + square.T) / 2, factor=factor)
    change = DensePreconditioner(P)
    k = condition_number(congruence(A, change), null=inner.null, method=method)
    assert (k.null_dim, k.two_sided) == (3, True)
    assert k.lower <= 10.0 <= k.upper


def test_a_product_that_cancels_to_noise_is_zero_to_rounding() -> None:
    factor = torch.ones(200, 2, dtype=torch.float64)
    P = DensePreconditioner(torch.tensor([[1e8, 0.0], [-1e8, 1e-6]], dtype=torch.float64))
    for A in (GramOperator(MatrixOperator(factor, exact=False)), DenseOperator(factor.T @ factor)):
        with pytest.raises(ZeroOperatorError, match=r"zero to rounding.* or a P with large entries"):
            condition_number(A, preconditioner=P)


def test_a_null_direction_in_the_wrong_coordinates_is_refused(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 12, 1e3, rank=10), generator, factor_rows=12)
    P = DensePreconditioner(torch.randn(12, 12, generator=generator, dtype=torch.float64))
    with pytest.raises(NullSpaceError):
        condition_number(p.operator, preconditioner=P, null=P.transport(p.null))
    with pytest.raises(NullSpaceError):
        condition_number(congruence(p.operator, P), null=p.null)


@pytest.mark.parametrize("method", ["lanczos", "inverse-lanczos"])
def test_krylov_counts_the_rounding_of_a_stored_congruence(method: str, generator: torch.Generator) -> None:
    """`u |P|^2 |A|`, far above `u |P^T A P|`: the stored `A` is what rounds."""
    resolved = 0
    for norm in (1e2, 1e3):
        for _ in range(6):
            factor, matrix = cancelling(generator, norm, torch.float64)
            square = factor.T @ factor
            square = (square + square.T) / 2
            n = matrix.shape[0]
            k = condition_number(
                DenseOperator(square),
                preconditioner=DensePreconditioner(matrix),
                null=torch.zeros(n, 0, dtype=torch.float64),
                method=method,
            )
            assert k.lower <= true_kappa_dense(square, matrix) <= k.upper
            resolved += k.two_sided
    assert resolved >= 6


@pytest.mark.parametrize("method", ["golub-kahan", "lanczos", "inverse-lanczos"])
@pytest.mark.parametrize(("dtype", "decades"), [(torch.float32, 4), (torch.float32, 6), (torch.float64, 8)])
def test_rounding_of_null_directions_that_P_amplifies_is_in_the_bounds(
    method: str, dtype: torch.dtype, decades: int
) -> None:
    """`P^-1` carries the last digits of declared directions into the range, where they hide eigenvalues: 11 for 1e5."""
    for A, P, null, factor in _badly_scaled(dtype, decades):
        true = true_kappa(factor, P.to_dense())
        try:
            k = condition_number(A, preconditioner=P, null=null, method=method)
            profile = condition_profile(A, preconditioner=P, null=null, method="lanczos")
        except ZeroOperatorError:
            continue
        assert not (k.lower > (1 + 1e-9) * true)
        assert not (k.upper < (1 - 1e-9) * true)
        second = profile.ranks == 2
        assert bool((profile.lower[second] <= (1 + 1e-9) * true).all())
        assert bool((profile.upper[second] >= (1 - 1e-9) * true).all())


@pytest.mark.parametrize(("dtype", "decades"), [(torch.float32, 6), (torch.float64, 4), (torch.float64, 8)])
def test_eigenpairs_and_densities_count_what_P_amplifies_of_null_directions(dtype: torch.dtype, decades: int) -> None:
    for A, P, null, factor in _badly_scaled(dtype, decades):
        rows = factor.double() @ P.to_dense().double()
        found = eigenpairs(A, 2, preconditioner=P, null=null)
        vectors = found.vectors.double()
        assert bool(((rows.T @ (rows @ vectors) - vectors * found.values).norm(dim=0) <= found.residuals).all())
        true = torch.cat([torch.linalg.svdvals(rows) ** 2, torch.zeros(1, dtype=torch.float64)])
        density = spectral_density(A, preconditioner=P, null=null, probes=2, steps=6)
        nodes, residuals = (torch.as_tensor(x[density.weights > 0]) for x in (density.nodes, density.residuals))
        apart = (nodes[:, None] - true).abs().amin(dim=1)
        assert bool((apart <= residuals + density.rounding).all())


def _badly_scaled(
    dtype: torch.dtype, decades: int
) -> list[tuple[GramOperator, DiagonalPreconditioner, Tensor, Tensor]]:
    """Two rows of integers, a diagonal `P` over so many decades to both sides, and the null space of the rows."""
    made = []
    for seed, n in ((2, 8), (3, 8), (5, 8), (5, 60)):
        g = torch.Generator().manual_seed(seed)
        factor = torch.randint(-9, 10, (2, n), generator=g).to(dtype)
        scales = torch.logspace(-decades, decades, n, dtype=torch.float64)[torch.randperm(n, generator=g)].to(dtype)
        null = torch.linalg.svd(factor.double())[2][2:].T.contiguous().to(dtype)
        made.append((GramOperator(MatrixOperator(factor)), DiagonalPreconditioner(scales), null, factor))
    return made
