"""The dense routes: singular values of the factor, eigenvalues of the matrix (T13)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NotConvexError
from bnp_analysis.linalg.condition.certificates import singular_value_radius
from bnp_analysis.linalg.condition.extremes import factor_extremes, unexplained, unexplained_zeros, zero_matrix
from bnp_analysis.linalg.condition.inertia import confirm_ends
from bnp_analysis.linalg.condition.number import Extremes
from bnp_analysis.linalg.forming import LEAST, UNIT, formed, formed_times, norm_bound
from bnp_analysis.linalg.krylov.lanczos import Floats
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.preconditioner import Preconditioner, congruence
from bnp_analysis.linalg.scale import scaled
from bnp_analysis.linalg.spectra.checks import factor_rounding_norm, require_finite, rounding_norm
from bnp_analysis.linalg.spectra.null import DeclaredNull, require_null
from bnp_analysis.runtime.memory import require_memory


@dataclass(frozen=True, eq=False)
class SingularValues:
    """All singular values of a dense factor `F P` divided by `scale`, descending, and how well they are known.

    Attributes:
        values: `(min(r, n),)`, those of zero rows and columns left out.
        radius: no value is farther from its computed one, in units of `scale`.
        noise: the size of one rounding, in the same units.
        structural: how many structure allows to be nonzero.
        exponent: they are those of `2^exponent F P`.
    """

    values: Floats
    scale: float
    radius: float
    noise: float
    structural: int
    exponent: int
    matvecs: int


def singular_values(A: SymmetricOperator, P: Preconditioner | None, null: DeclaredNull) -> SingularValues | None:
    """Singular values of the dense factor `F P`, by QR when tall, then SVD in float64; None for the zero matrix."""
    factor = A.factor
    if factor is None:
        raise InvalidInputError(
            f"{A!r} has no factor, so factor-svd cannot run; use method='dense' or 'lanczos', or a Gauss-Newton "
            "operator, whose factor is known"
        )
    require_memory(
        8 * 4 * factor.shape[0] * factor.shape[1], f"factor-svd of a {factor.shape} factor", device=factor.device
    )
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
    return SingularValues(sigma, scale, radius, noise, rows.rank, rows.exponent, factor.dense_cost + null.cost)


def factor_svd(A: SymmetricOperator, P: Preconditioner | None, null: DeclaredNull) -> Extremes:
    """The ends of the spectrum from the singular values of the dense factor `F P`; never from the Gram matrix."""
    found = singular_values(A, P, null)
    if found is None:
        return zero_matrix(null, (0 if A.factor is None else A.factor.dense_cost) + null.cost)
    ends = factor_extremes(
        A,
        null,
        found.values,
        radius=found.radius,
        noise=found.noise,
        structural=found.structural,
        scale=found.scale,
        matvecs=found.matvecs,
    )
    return ends.times_power(-2 * found.exponent)


def _square_root_of_gram(rows: Tensor) -> Tensor:
    """A matrix with the nonzero singular values of `rows`: without its zero rows and columns, tall ones by QR."""
    nonzero = rows != 0
    rows = rows[nonzero.any(dim=1)][:, nonzero.any(dim=0)]
    tall = rows if rows.shape[0] >= rows.shape[1] else rows.T
    if tall.shape[0] <= 1.5 * tall.shape[1]:
        return tall
    triangle: Tensor = torch.linalg.qr(tall, mode="r")[1]
    return triangle


@dataclass(frozen=True, eq=False)
class Spectrum:
    """All eigenvalues of a dense `P^T A P` divided by `scale`, ascending, and within which radius they are known."""

    matrix: Tensor
    scale: float
    values: Floats
    radius: float
    rounding: float
    matvecs: int
    rank: int
    exponent: int


def spectrum(A: SymmetricOperator, P: Preconditioner | None, null: DeclaredNull) -> Spectrum | None:
    """The spectrum in float64; None for the zero matrix."""
    require_memory(8 * 6 * A.dim**2, f"the dense {A.dim} x {A.dim} matrix and its eigenvalues", device=A.device)
    if null.dim:
        checked = scaled(A)
        require_null(checked, null, rounding_norm(checked), "A")
    operator = A if P is None else congruence(A, P)
    found = formed(operator)
    require_finite(found.matrix, "the matrix")
    scale = float(found.matrix.abs().max())
    if scale == 0.0:
        return None
    matrix = found.matrix / scale
    asymmetry = float((matrix - matrix.T).norm()) / 2
    unit = A.eps
    bound = norm_bound(found.sizes()) / scale
    if asymmetry > 1e3 * A.dim * unit * bound:
        raise InvalidInputError(
            f"{A!r} is not symmetric: |A - A^T|/2 = {asymmetry:.3g} relative to its largest entry. Eigenvalues "
            "would be those of another matrix; check the products with two random vectors"
        )
    matrix = (matrix + matrix.T) / 2
    values = np.sort(torch.linalg.eigvalsh(matrix).cpu().numpy())
    rounding = asymmetry + found.rounding * bound + A.dim * LEAST / scale
    radius = A.dim * UNIT * float(np.abs(values).max()) + rounding
    # Declared directions are zero by evidence: what is left of them measures the rounding from below.
    radius = max(radius, float(np.sort(np.abs(values))[null.dim - 1])) if null.dim else radius
    spent = operator.dense_cost + null.cost
    return Spectrum(matrix, scale, values, radius, rounding, spent, found.rank, found.exponent)


def dense_symmetric(
    A: SymmetricOperator, P: Preconditioner | None, null: DeclaredNull, *, indefinite: bool, inertia: bool = False
) -> Extremes:
    """All eigenvalues of the dense `P^T A P` in float64; with `inertia` the two ends are decided by counts instead."""
    found = spectrum(A, P, null)
    if found is None:
        return zero_matrix(null, A.dense_cost + null.cost)
    values, radius, scale = found.values, found.radius, found.scale
    if not indefinite and values[0] < -radius:
        units = f", both in units of 2^{-found.exponent}" if found.exponent else ""
        raise NotConvexError(
            f"the operator is indefinite: its smallest eigenvalue is {values[0] * scale:.4g}, rounding explains "
            f"{radius * scale:.2g}{units}. kappa* compares the nonzero eigenvalues of a semidefinite matrix; use "
            "magnitude_condition_number(A) for max|lambda|/min|lambda|, or the Gauss-Newton matrix"
        )
    sizes = np.sort(np.abs(values))
    nonzero = sizes[sizes > radius]
    rank = int(nonzero.size)
    if rank == 0:
        return zero_matrix(null, found.matvecs)
    unresolved, on_your_word = unexplained_zeros(rank, found.rank, null, A)
    top, bottom = float(nonzero[-1]), float(nonzero[0])
    zeros = sizes[: A.dim - rank]
    note = unexplained(unresolved, null, A)
    ends: tuple[float, float, float, float] | None = (bottom - radius, bottom + radius, top - radius, top + radius)
    if inertia:
        ends = _confirmed(found, bottom, top, A.dim - rank)
        note = note or ("" if ends else "the inertia counts do not confirm the computed ends")
    low, high, top_low, top_high = ends or (0.0, bottom + radius, max(top - radius, 0.0), math.inf)
    ends_found = Extremes(
        lambda_max=top * scale,
        lambda_min=bottom * scale,
        lower=max(top_low, 0.0) / high,
        upper=top_high / low if unresolved == 0 and low > 0 else math.inf,
        rank=rank,
        null_dim=null.dim,
        null_sources=null.sources,
        on_your_word=on_your_word,
        unresolved=unresolved,
        negative=int((values < -radius).sum()),
        zero=A.dim - rank,
        gap_ratio=bottom / float(zeros[-1]) if zeros.size and zeros[-1] > 0 else math.inf,
        noise_floor=radius * scale,
        residual_max=radius * scale,
        residual_min=radius * scale,
        matvecs=found.matvecs,
        note=note,
    )
    return ends_found.times_power(-found.exponent)


def _confirmed(found: Spectrum, bottom: float, top: float, zeros: int) -> tuple[float, float, float, float] | None:
    """Both ends by inertia counts, widened by what forming the matrix rounded; None where a count disagrees."""
    tolerance = max(1e-9, 2 * found.radius / bottom)
    if tolerance >= 0.5:
        return None
    ends = confirm_ends(found.matrix.cpu().numpy(), bottom, top, zeros, tolerance)
    if ends is None:
        return None
    extra = found.rounding
    return ends[0] - extra, ends[1] + extra, ends[2] - extra, ends[3] + extra
