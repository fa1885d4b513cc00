"""The method factor-svd: singular values of the dense factor, never of the Gram matrix (T13)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.linalg.condition.certificates import (
    all_magnitudes,
    factor_extremes,
    no_magnitudes,
    singular_value_radius,
    zero_matrix,
)
from bnp_analysis.linalg.condition.methods import Method, Price, Problem, register
from bnp_analysis.linalg.condition.number import Extremes, Magnitudes
from bnp_analysis.linalg.forming import LEAST, UNIT, formed, formed_times, norm_bound
from bnp_analysis.linalg.krylov.lanczos import Floats
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.scale import scaled
from bnp_analysis.linalg.spectra.checks import factor_rounding_norm, require_finite, require_null
from bnp_analysis.runtime.memory import require_memory

# Operations of a singular value decomposition that "auto" takes on: about a minute of one processor core.
FACTOR_WORK = 2e12


def factor_work(shape: tuple[int, int]) -> float:
    """Operations of the singular values of a matrix by QR and bidiagonalization, in those of a QR factorization.

    Half of a bidiagonalization are products with vectors: measured at a quarter of the speed of QR.

    Example:
        >>> f"{factor_work((5000, 100_000)):.0e}"  # a wide one takes minutes
        '6e+12'
    """
    small = float(min(shape))
    return 2.0 * shape[0] * shape[1] * small + 10 * small**3


def affordable(shape: tuple[int, int]) -> bool:
    """Whether `auto` takes the singular values of a matrix of some shape.

    Example:
        >>> affordable((5000, 5000)), affordable((5000, 100_000))
        (True, False)
    """
    return factor_work(shape) <= FACTOR_WORK


@dataclass(frozen=True, eq=False)
class SingularValues:
    """All singular values of a dense factor `F P`.

    Attributes:
        values: those of `2^exponent F P / scale`, descending; zero rows and columns are left out.
        radius: within which they are known.
        noise: the size of one rounding in them.
        structural: how many structure allows to be nonzero.
        matvecs: products spent.
    """

    values: Floats
    radius: float
    noise: float
    scale: float
    exponent: int
    structural: int
    matvecs: int


def singular_values(problem: Problem) -> SingularValues | None:
    """Singular values of the dense factor `F P`, by QR when tall, then SVD in float64; None for the zero matrix."""
    A, P, null = problem.A, problem.P, problem.null
    factor = problem.factor("factor-svd")
    require_memory(_memory(factor.shape), f"factor-svd of a {factor.shape} factor", device=factor.device)
    if null.dim:
        checked = scaled(factor)
        require_null(checked, null, factor_rounding_norm(checked), "F")
    rows = formed(factor)
    if P is not None:
        rows = formed_times(factor, rows, P)
    require_finite(rows.matrix, "the factor")
    scale = float(rows.matrix.abs().max()) if rows.matrix.numel() else 0.0
    if scale == 0.0:
        return None
    sigma = torch.linalg.svdvals(_square_root_of_gram(rows.matrix / scale)).cpu().numpy()
    size = norm_bound(rows.sizes()) / scale
    forming = rows.rounding * size + max(factor.shape) * LEAST / scale
    radius = singular_value_radius(float(sigma[0]), factor.shape, forming)
    # Declared directions are zero by evidence: what is left of them measures the rounding from below.
    if A.dim - null.dim < sigma.size:
        radius = max(radius, float(sigma[A.dim - null.dim]))
    noise = size * (UNIT if factor.exact else A.eps)
    return SingularValues(sigma, radius, noise, scale, rows.exponent, rows.rank, factor.dense_cost + null.cost)


def factor_svd(problem: Problem) -> Extremes:
    """The ends of the spectrum from the singular values of the dense factor `F P`."""
    found = singular_values(problem)
    if found is None:
        return zero_matrix(problem.factor("factor-svd").dense_cost + problem.null.cost)
    ends = factor_extremes(
        problem.A,
        problem.null,
        found.values,
        radius=found.radius,
        noise=found.noise,
        structural=found.structural,
        scale=found.scale,
        matvecs=found.matvecs,
    )
    return ends.times_power(-2 * found.exponent)


def factor_magnitudes(problem: Problem) -> Magnitudes:
    """All eigenvalues as squares of the singular values of the dense factor `F P`, each within their radius."""
    found = singular_values(problem)
    if found is None:
        return no_magnitudes(problem.factor("factor-svd").dense_cost + problem.null.cost)
    return all_magnitudes(
        problem.A,
        problem.null,
        found.values**2,
        lower=np.maximum(found.values - found.radius, 0.0) ** 2,
        upper=(found.values + found.radius) ** 2,
        rest=found.radius**2,
        structural=found.structural,
        scale=found.scale**2,
        exponent=-2 * found.exponent,
        matvecs=found.matvecs,
    )


def _square_root_of_gram(rows: Tensor) -> Tensor:
    """A matrix with the nonzero singular values of `rows`: without its zero rows and columns, tall ones by QR."""
    nonzero = rows != 0
    rows = rows[nonzero.any(dim=1)][:, nonzero.any(dim=0)]
    tall = rows if rows.shape[0] >= rows.shape[1] else rows.T
    if tall.shape[0] <= 1.5 * tall.shape[1]:
        return tall
    triangle: Tensor = torch.linalg.qr(tall, mode="r")[1]
    return triangle


def _memory(shape: tuple[int, int]) -> int:
    """Rows, their magnitudes and the copy that QR works on, in float64."""
    return 8 * 4 * shape[0] * shape[1]


def _price(A: SymmetricOperator, steps: int) -> Price:
    if A.factor is None:
        return Price(0.0, 0, 0.0)
    return Price(A.factor.dense_cost, _memory(A.factor.shape), factor_work(A.factor.shape))


FACTOR_SVD = register(
    Method(
        name="factor-svd",
        claim="both sides, if structure or known null directions explain every zero",
        price=_price,
        solve=factor_svd,
        magnitudes=factor_magnitudes,
        applies=lambda A: A.factor is not None and factor_work(A.factor.shape) <= 10 * FACTOR_WORK,
        automatic=lambda A: A.factor is not None and affordable(A.factor.shape),
        decides=True,
        order=10,
    )
)
