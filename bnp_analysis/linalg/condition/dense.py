"""The methods dense (all eigenvalues of the matrix) and inertia (its ends, by eigenvalue counts) (T13)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.linalg import ldl
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NotConvexError
from bnp_analysis.linalg.condition.certificates import (
    all_magnitudes,
    no_magnitudes,
    unexplained,
    unexplained_zeros,
    zero_matrix,
)
from bnp_analysis.linalg.condition.methods import Method, Price, Problem, register
from bnp_analysis.linalg.condition.number import Extremes, Magnitudes
from bnp_analysis.linalg.forming import LEAST, UNIT, formed, norm_bound
from bnp_analysis.linalg.krylov.lanczos import Floats
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.preconditioner import congruence
from bnp_analysis.linalg.scale import scaled
from bnp_analysis.linalg.spectra.checks import require_finite, require_null, rounding_norm
from bnp_analysis.runtime.memory import require_memory

DENSE_LIMIT = 3_000

#: `(bottom_low, bottom_high, top_low, top_high)`, intervals of the least nonzero magnitude and of the largest one.
Ends = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """All eigenvalues of a dense symmetric matrix, its magnitudes of about 1.

    Attributes:
        matrix: in float64.
        values: ascending.
        radius: within which they are known.
        rounding: what forming the matrix has rounded.
        scale, exponent: they are those of `2^exponent P^T A P / scale`.
        structural: how many structure allows to be nonzero.
        matvecs: products spent.
    """

    matrix: Tensor
    values: Floats
    radius: float
    rounding: float
    scale: float
    exponent: int
    structural: int
    matvecs: int


def within_radius(found: Spectrum, bottom: float, top: float, zeros: int) -> Ends | None:
    """The ends as far as the radius knows them."""
    radius = found.radius
    return bottom - radius, bottom + radius, top - radius, top + radius


def dense_ends(
    problem: Problem, decided: Callable[[Spectrum, float, float, int], Ends | None] = within_radius
) -> Extremes:
    """All eigenvalues of the dense `P^T A P` in float64.

    Args:
        problem: what is asked.
        decided: gives intervals of the computed ends `bottom`, `top` of a spectrum with so many zeros, or None where
            it cannot confirm them.
    """
    A, null = problem.A, problem.null
    found = spectrum(problem)
    if found is None:
        return zero_matrix(A.dense_cost + null.cost)
    values, radius, scale = found.values, found.radius, found.scale
    if problem.semidefinite and values[0] < -radius:
        units = f", both in units of 2^{-found.exponent}" if found.exponent else ""
        raise NotConvexError(
            f"the operator is indefinite: its smallest eigenvalue is {values[0] * scale:.4g}, rounding explains "
            f"{radius * scale:.2g}{units}. kappa* compares the nonzero eigenvalues of a semidefinite matrix; use "
            "magnitude_condition_number(A) for max|lambda|/min|lambda|, or a Gauss-Newton matrix of a convex loss"
        )
    sizes = np.sort(np.abs(values))
    rank = int((sizes > radius).sum())
    if rank == 0:
        return zero_matrix(found.matvecs)
    unresolved, on_your_word = unexplained_zeros(rank, found.structural, null, A)
    zeros = A.dim - rank
    top, bottom, zero = float(sizes[-1]), float(sizes[zeros]), float(sizes[zeros - 1]) if zeros else 0.0
    ends = decided(found, bottom, top, zeros)
    note = unexplained(unresolved, null, A) or ("" if ends else "the inertia counts do not confirm the computed ends")
    low, high, top_low, top_high = ends or (0.0, bottom + radius, top - radius, math.inf)
    extremes = Extremes(
        lambda_max=top * scale,
        lambda_min=bottom * scale,
        lower=max(top_low, 0.0) / high,
        upper=top_high / low if unresolved == 0 and low > 0 else math.inf,
        rank=rank,
        on_your_word=on_your_word,
        unresolved=unresolved,
        negative=int((values < -radius).sum()),
        zero=zeros,
        gap_ratio=bottom / zero if zero > 0 else math.inf,
        noise_floor=radius * scale,
        residual_max=radius * scale,
        residual_min=radius * scale,
        matvecs=found.matvecs,
        note=note,
    )
    return extremes.times_power(-found.exponent)


def dense_magnitudes(problem: Problem) -> Magnitudes:
    """All `|lambda|` of the dense `P^T A P`, each within the radius of its rounding."""
    found = spectrum(problem)
    if found is None:
        return no_magnitudes(problem.A.dense_cost + problem.null.cost)
    values = found.values[np.argsort(-np.abs(found.values), kind="stable")]
    return all_magnitudes(
        problem.A,
        problem.null,
        values,
        lower=np.maximum(np.abs(values) - found.radius, 0.0),
        upper=np.abs(values) + found.radius,
        rest=found.radius,
        structural=found.structural,
        scale=found.scale,
        exponent=-found.exponent,
        matvecs=found.matvecs,
    )


def spectrum(problem: Problem) -> Spectrum | None:
    """All eigenvalues of the dense `P^T A P` in float64; None for the zero matrix."""
    A, null = problem.A, problem.null
    require_memory(8 * 6 * A.dim**2, f"the dense {A.dim} x {A.dim} matrix and its eigenvalues", device=A.device)
    if null.dim:
        checked = scaled(A)
        require_null(checked, null, rounding_norm(checked), "A")
    operator = A if problem.P is None else congruence(A, problem.P)
    dense = formed(operator)
    require_finite(dense.matrix, "the matrix")
    scale = float(dense.matrix.abs().max())
    if scale == 0.0:
        return None
    matrix, size = dense.matrix / scale, norm_bound(dense.sizes()) / scale
    asymmetry = float((matrix - matrix.T).norm()) / 2
    if asymmetry > 1e3 * A.dim * A.eps * size:
        raise InvalidInputError(
            f"{A!r} is not symmetric: |A - A^T|/2 = {asymmetry:.3g} relative to its largest entry. Eigenvalues "
            "would be those of another matrix; check the products with two random vectors"
        )
    matrix = (matrix + matrix.T) / 2
    values = np.sort(torch.linalg.eigvalsh(matrix).cpu().numpy())
    rounding = asymmetry + dense.rounding * size + A.dim * LEAST / scale
    radius = A.dim * UNIT * float(np.abs(values).max()) + rounding
    # Declared directions are zero by evidence: what is left of them measures the rounding from below.
    radius = max(radius, float(np.sort(np.abs(values))[null.dim - 1])) if null.dim else radius
    matvecs = operator.dense_cost + null.cost
    return Spectrum(matrix, values, radius, rounding, scale, dense.exponent, dense.rank, matvecs)


def _price(A: SymmetricOperator, steps: int) -> Price:
    return Price(float(A.dense_cost), 8 * 6 * A.dim**2, 4.0 / 3 * A.dim**3)


DENSE = register(
    Method(
        name="dense",
        claim="both sides, to n u |A|",
        price=_price,
        solve=dense_ends,
        magnitudes=dense_magnitudes,
        automatic=lambda A: A.dim <= DENSE_LIMIT,
        decides=True,
        indefinite=True,
        order=30,
    )
)


def count_below(matrix: Floats, shift: float) -> tuple[int, float]:
    """The number of eigenvalues below a shift, for a matrix that differs by at most the returned radius.

    `A - s I = L D L^T + R`: by Sylvester's law the inertia of `D` counts the eigenvalues of `A - R` below `s`, and by
    Weyl's theorem none of `A` lies farther than `|R|` from one of those. `|R|` is measured, not assumed.

    Args:
        matrix: symmetric, `(n, n)`, float64.
        shift: `s`.

    Returns:
        The count, and a bound of `|R|_2`.

    Source: T13; Sylvester, Weyl; Bunch and Kaufman 1977.

    Example:
        >>> count_below(np.diag([1.0, 2.0, 5.0]), 3.0)[0]
        2
    """
    shifted = matrix - shift * np.eye(len(matrix))
    lower, diagonal, _ = ldl(shifted, check_finite=False)
    remainder = np.abs(lower @ diagonal @ lower.T - shifted)
    # What the product that measures R rounds itself.
    magnitude = np.abs(lower) @ np.abs(diagonal) @ np.abs(lower).T
    unit = float(np.finfo(np.float64).eps)
    radius = float((remainder + 2 * len(matrix) * unit * magnitude).sum(axis=1).max())
    return _blocks_below(np.asarray(diagonal, dtype=np.float64)), radius


def _blocks_below(diagonal: Floats) -> int:
    """Negative eigenvalues of `D`: a block of size two is a pivot of Bunch and Kaufman, with one of each sign."""
    pairs = np.diagonal(diagonal, -1) != 0.0
    single = np.ones(len(diagonal), dtype=bool)
    single[:-1] &= ~pairs
    single[1:] &= ~pairs
    return int(pairs.sum() + (np.diagonal(diagonal)[single] < 0).sum())


def confirm_ends(matrix: Floats, bottom: float, top: float, zeros: int, tolerance: float) -> Ends | None:
    """Intervals of `min|lambda|` over the nonzero eigenvalues and of `max|lambda|`, decided by counts.

    Exactly `zeros` eigenvalues must lie within `bottom (1 - tolerance)` of zero, more within `bottom (1 + tolerance)`;
    all within `top (1 + tolerance)`, not all within `top (1 - tolerance)`.

    Args:
        matrix: symmetric, `(n, n)`, float64.
        bottom, top: the magnitudes to confirm.
        zeros: how many eigenvalues count as zero.
        tolerance: relative half-width.

    Returns:
        `(bottom_low, bottom_high, top_low, top_high)` with the radii of the counts included, or None if a count
        disagrees.

    Example:
        >>> low, high, _, _ = confirm_ends(np.diag([0.0, 2.0, -5.0]), 2.0, 5.0, 1, 1e-6)
        >>> low < 2.0 < high
        True
    """
    n = len(matrix)

    def within(size: float) -> tuple[int, float]:
        above, first = count_below(matrix, size)
        below, second = count_below(matrix, -size)
        return above - below, max(first, second)

    inner, r1 = within(bottom * (1 - tolerance))
    outer, r2 = within(bottom * (1 + tolerance))
    almost, r3 = within(top * (1 - tolerance))
    every, r4 = within(top * (1 + tolerance))
    if inner != zeros or outer <= zeros or almost >= n or every != n or bottom * (1 - tolerance) <= r1:
        return None
    return (
        bottom * (1 - tolerance) - r1,
        bottom * (1 + tolerance) + r2,
        top * (1 - tolerance) - r3,
        top * (1 + tolerance) + r4,
    )


def _confirmed(found: Spectrum, bottom: float, top: float, zeros: int) -> Ends | None:
    """Both ends by counts, widened by what forming the matrix rounded; None where a count disagrees."""
    tolerance = max(1e-9, 2 * found.radius / bottom)
    ends = None if tolerance >= 0.5 else confirm_ends(found.matrix.cpu().numpy(), bottom, top, zeros, tolerance)
    if ends is None:
        return None
    extra = found.rounding
    return ends[0] - extra, ends[1] + extra, ends[2] - extra, ends[3] + extra


def _price_of_counts(A: SymmetricOperator, steps: int) -> Price:
    return Price(float(A.dense_cost), 8 * 8 * A.dim**2, 12.0 * A.dim**3)


INERTIA = register(
    Method(
        name="inertia",
        claim="both ends decided by counts",
        price=_price_of_counts,
        solve=partial(dense_ends, decided=_confirmed),
        indefinite=True,
        order=40,
    )
)
