"""The Lanczos recurrence alone: no basis is kept, nothing is orthogonalized again."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import NonFiniteError
from bnp_analysis.linalg.bases import project_out
from bnp_analysis.linalg.krylov.lanczos import Floats
from bnp_analysis.linalg.krylov.rows import dots, length
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.scale import exponent, in_floats, require_resolution, scaled


def three_term(
    A: SymmetricOperator, steps: int, start: Tensor, null: Tensor, *, every: int | None = None
) -> tuple[Floats, Floats, int]:
    """The tridiagonal matrix of a run that stores three vectors.

    Rounding brings back directions that have converged: their eigenvalues come again, as *ghosts*. The weights of a
    value's copies add up to its own, so quadrature stays right; single Ritz values, their number and vectors do not.

    Args:
        A: symmetric operator on `R^n`.
        steps: largest size of the matrix.
        start: start vector `(n,)`.
        null: orthonormal `(n, r)`, projected out of every vector.
        every: steps between two looks at the numbers; default 1 on the CPU, 10 where looking means waiting.

    Returns:
        Diagonal `(k,)`; off-diagonal and, last, the norm of the residual, `(k,)`; the products spent. `k < steps` for
        an invariant subspace, whose residual is rounding and given as zero.

    Raises:
        NonFiniteError: a product with NaN or infinity.

    Source: Greenbaum 1989; Golub and Strakos 1994.

    Example:
        >>> import torch
        >>> from bnp_analysis.linalg import DenseOperator
        >>> A = DenseOperator(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
        >>> alpha, beta, products = three_term(A, 2, torch.ones(2).double(), torch.zeros(2, 0).double())
        >>> alpha.round(6).tolist(), beta.round(6).tolist(), products
        ([2.0, 2.0], [1.0, 0.0], 2)
    """
    given, A = A, scaled(A)
    require_resolution(A, A.dim)
    start, null = start.to(A.dtype), null.to(A.dtype)
    coefficients = torch.zeros(2, steps, dtype=torch.float64, device=A.device)
    alpha, beta = coefficients
    v = project_out(start.unsqueeze(1), null).squeeze(1)
    v, previous = v / length(v), torch.zeros_like(v)
    every = every or (1 if A.device.type == "cpu" else 10)
    eps = A.eps
    for k in range(steps):
        w = A @ v
        alpha[k] = dots(v[None], w)[0]
        w = w - alpha[k] * v
        if k:
            w = w - beta[k - 1] * previous
        w = project_out(w.unsqueeze(1), null).squeeze(1)
        beta[k] = length(w)
        if (k + 1) % every == 0 or k + 1 == steps:
            found = coefficients[:, : k + 1].cpu().numpy()
            scale = np.maximum.accumulate(np.abs(found).max(axis=0))  # NaN from the first one on
            small = (found[1] <= 10 * math.sqrt(A.dim) * eps * scale).nonzero()[0]
            if small.size:  # an invariant subspace; what was computed after it is of no use
                last = int(small[0]) + 1
                kept = np.stack([found[0, :last], np.append(found[1, : last - 1], 0.0)])
                return *_in_units(kept, exponent(given) - exponent(A)), k + 1
            if not np.isfinite(scale[-1]):
                raise NonFiniteError(
                    f"one of the first {k + 1} products with {A!r} has NaN or infinite entries; look at the "
                    "parameters, the loss and the dtype"
                )
        previous, v = v, w / beta[k]
    return *_in_units(found, exponent(given) - exponent(A)), steps


def _in_units(found: Floats, power: int) -> tuple[Floats, Floats]:
    in_floats(float(np.abs(found).max()), power, "the tridiagonal matrix")
    return np.ldexp(found[0], power), np.ldexp(found[1], power)
