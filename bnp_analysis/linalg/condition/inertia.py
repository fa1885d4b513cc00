"""The method inertia: the ends of a dense spectrum decided by counts of LDL^T factorizations (T13)."""

from __future__ import annotations

import numpy as np
from scipy.linalg import ldl

from bnp_analysis.linalg.condition.dense import Ends, Spectrum, dense_ends
from bnp_analysis.linalg.condition.methods import Method, Price, Problem, register
from bnp_analysis.linalg.condition.number import Extremes
from bnp_analysis.linalg.krylov.lanczos import Floats
from bnp_analysis.linalg.operators import SymmetricOperator


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


def inertia_ends(problem: Problem) -> Extremes:
    """All eigenvalues of the dense `P^T A P`; its two ends are decided by counts."""
    return dense_ends(problem, _confirmed)


def _price(A: SymmetricOperator, steps: int) -> Price:
    return Price(float(A.dense_cost), 8 * 8 * A.dim**2, 12.0 * A.dim**3)


INERTIA = register(
    Method(
        name="inertia",
        claim="both ends decided by counts",
        price=_price,
        solve=inertia_ends,
        indefinite=True,
        order=40,
    )
)
