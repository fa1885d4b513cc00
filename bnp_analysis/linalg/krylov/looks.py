"""How long a search must look in a random direction before it may say that an eigenvalue has no further copy."""

from __future__ import annotations

import math

from bnp_analysis.linalg.krylov.lanczos import Floats

#: The chance that a look misses a copy, by Chebyshev's bound.
OVERLOOKED = 1e-3


def products_that_show(levels: Floats, low: Floats, high: Floats, dim: int, tol: float, noise: float) -> float:
    """Products after which a random direction shows a further copy of a wanted value, but for a rare chance.

    The hardest to see is a copy of the last wanted value but one; one of the last itself changes no value. A Chebyshev
    polynomial of degree `d` for the other eigenvalues enlarges the direction's part along the copy, which is less than
    `delta / sqrt(n)` with probability `delta sqrt(2 / pi)`, `cosh(d acosh(1 + 2 gap / width))` times; a Rayleigh
    quotient above the last wanted value then shows it.

    Args:
        levels: the wanted values of an upper end, largest first.
        low, high: between which each of the other eigenvalues lies.
        dim: `n`.
        tol: what counts as a difference, relative to a wanted value.
        noise: what counts as one at all.

    Returns:
        The number of products; infinite where the copy would not stand out.

    Example:
        >>> import numpy as np
        >>> products_that_show(np.array([9.0, 8.0, 7.0]), np.array([0.0]), np.array([1.0]), 10**5, 1e-3, 1e-12)
        6.0
    """
    if levels.size < 2:
        return 0.0
    level, last = float(levels[-2]), float(levels[-1])
    gap = level - float(high.max(initial=-math.inf))
    if low.size == 0 or gap <= 0:
        return math.inf
    least = float(low.min())
    above = max(level - last, tol * abs(level), noise)
    if above <= 0:
        return math.inf
    delta = OVERLOOKED * math.sqrt(math.pi / 2)
    wanted = math.sqrt(dim * max(last - least, above) / above) / delta
    width = max(float(high.max()) - least, 1e-6 * gap)
    return 1.0 + math.ceil(math.acosh(wanted) / math.acosh(1 + 2 * gap / width))
