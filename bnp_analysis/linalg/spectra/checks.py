"""What is checked before an operator is measured: that it is one, symmetric, finite; and how large it is."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.linalg.forming import amplified, cancels
from bnp_analysis.linalg.krylov.lanczos import lanczos
from bnp_analysis.linalg.matrices import CallableOperator
from bnp_analysis.linalg.operators import (
    Derived,
    LinearOperator,
    Product,
    Stacked,
    Sum,
    SymmetricOperator,
    SymmetricSum,
    coarse,
    computed_in,
    require_digits,
)
from bnp_analysis.linalg.preconditioner import Congruence, Preconditioner, check_fits, congruence
from bnp_analysis.linalg.scale import Scaled, ScaledSymmetric, scaled
from bnp_analysis.linalg.spectra.null import NORM_STEPS, DeclaredNull, HasBasis, read_null, require_null
from bnp_analysis.results import Result
from bnp_analysis.runtime.kinds import require_kind
from bnp_analysis.runtime.random import generator, normal


def norm_estimate(A: SymmetricOperator, seed: int = 0) -> float:
    """`|A|_2` to within a small factor, from `NORM_STEPS` Lanczos steps."""
    run = lanczos(A, NORM_STEPS, seed=seed)
    if run.stop == "interrupted":
        # Preparation only: there is no bound yet that could be kept.
        raise KeyboardInterrupt
    return float(np.abs(run.ritz()[0]).max())


def rounding_norm(A: SymmetricOperator, seed: int = 0) -> float:
    """What the rounding of a product with `A` is relative to: `|A|`, for `P^T A P` it is `|P|^2 |A|` (T13)."""
    if isinstance(A, ScaledSymmetric) and amplified(A):
        return rounding_norm(A.inner, seed) * 2.0**A.exponent
    if isinstance(A, Congruence):
        size = factor_rounding_norm(A.preconditioner, seed)
        return rounding_norm(A.operator, seed) * size * size
    if isinstance(A, GramOperator) and amplified(A):
        size = factor_rounding_norm(A.factor, seed)
        return size * size
    if isinstance(A, Derived) and isinstance(A.inner, SymmetricOperator) and amplified(A):
        return rounding_norm(A.inner, seed) * abs(A.times) + A.added
    if isinstance(A, SymmetricSum):
        return rounding_norm(A.left, seed) + rounding_norm(A.right, seed)
    return norm_estimate(A, seed)


def rounding_of_sums(A: SymmetricOperator, seed: int) -> tuple[float, int]:
    """`eps` times what products round relative to where a sum may cancel, else 0; and the products spent."""
    return (A.eps * rounding_norm(A, seed), 2 * NORM_STEPS) if cancels(A) else (0.0, 0)


def factor_rounding_norm(F: LinearOperator, seed: int = 0) -> float:
    """The same for a factor: `|F|`, for `F P` it is `|F| |P|`."""
    if isinstance(F, Scaled) and amplified(F):
        return factor_rounding_norm(F.inner, seed) * 2.0**F.exponent
    if isinstance(F, Product):
        return factor_rounding_norm(F.left, seed) * factor_rounding_norm(F.right, seed)
    if isinstance(F, Derived) and amplified(F):
        return math.hypot(factor_rounding_norm(F.inner, seed) * abs(F.times), F.added)
    if isinstance(F, Sum):
        return factor_rounding_norm(F.left, seed) + factor_rounding_norm(F.right, seed)
    if isinstance(F, Stacked) and amplified(F):
        return math.hypot(factor_rounding_norm(F.left, seed), factor_rounding_norm(F.right, seed))
    return math.sqrt(norm_estimate(GramOperator(F), seed))


def require_operator(A: SymmetricOperator) -> None:
    """Refuse what is no symmetric operator, and computed products too coarse for its spectrum.

    Entries that are given are as they are, and the spacing of a function's products is measured: there radii say it.
    """
    require_kind(A, "A", SymmetricOperator)
    inside = _innermost(A)
    if inside.exact or isinstance(inside, CallableOperator):
        return
    found = inside.record.get("precision")
    cast = found is not None or not coarse(inside)
    require_digits(A.eps, found or computed_in(A), "its eigenvalues and their ratios", cast=cast)


def measured(
    A: SymmetricOperator, P: Preconditioner | None, null: Tensor | HasBasis | None, seed: int
) -> tuple[SymmetricOperator, DeclaredNull]:
    """The operator that is measured, `A` or `P^T A P`, and its declared null directions, checked against it."""
    require_operator(A)
    declared = read_null(null, A)
    if P is not None:
        check_fits(A, P)
    if declared.dim:
        checked = scaled(A)
        require_null(checked, declared, rounding_norm(checked, seed), "A")
    if P is None:
        return A, declared
    return congruence(A, P), replace(declared, basis=scaled(P).transport(declared.basis))


def provenance(
    A: SymmetricOperator, P: Preconditioner | None, settings: dict[str, Any], seed: int, began: float
) -> dict[str, Any]:
    """What every result of `A` or `P^T A P` says of how it came about, once the products have been made."""
    return {
        "settings": settings | {"preconditioned": P is not None},
        "seed": seed,
        "seconds": time.perf_counter() - began,
        "engine": dict(_innermost(A).record) | ({"eps": A.eps} if coarse(A) else {}),
    }


def products_known_to(result: Result) -> str:
    """The precision of the products in words, where it is lower than that of the dtype."""
    return f" (products to {result.engine['eps']:.1g})" if "eps" in result.engine else ""


def require_symmetric(A: SymmetricOperator, seed: int) -> None:
    """Two random vectors: `u.Av = v.Au` up to rounding; a congruence, shift or sum is as symmetric as its parts."""
    A = _innermost(A)
    inner = A.inner if isinstance(A, ScaledSymmetric) else A
    if isinstance(inner, SymmetricSum):
        for part in (inner.left, inner.right):
            require_symmetric(scaled(part), seed)
        return
    like = torch.empty(0, dtype=A.dtype, device=A.device)
    pair = normal((A.dim, 2), generator(seed), like)
    image = A @ pair
    require_finite(image, "a product")
    if isinstance(A, GramOperator):
        return
    u, v, Au, Av = (x.double() for x in (pair[:, 0], pair[:, 1], image[:, 0], image[:, 1]))
    gap, size = abs(float(u @ Av) - float(v @ Au)), float(u.norm() * Av.norm() + v.norm() * Au.norm())
    # Random vectors meet rounding errors at random: the gap does not grow with n.
    if gap > 1e3 * A.eps * size:
        raise InvalidInputError(
            f"{A!r} is not symmetric: u.Av and v.Au differ by {gap / size:.2g} relative, for random u, v. Lanczos "
            "would report eigenvalues of no matrix at all; check the function that computes the products"
        )


def _innermost(A: SymmetricOperator) -> SymmetricOperator:
    if isinstance(A, Congruence):
        return _innermost(A.operator)
    if isinstance(A, Derived) and isinstance(A.inner, SymmetricOperator):
        # What scales an operator that is made of no other is where its products are in range.
        whole = isinstance(A, Scaled) and not isinstance(A.inner, Derived | Congruence)
        return A if whole else _innermost(A.inner)
    return A


def require_finite(x: Tensor, what: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            f"{what} has NaN or infinite entries, so no eigenvalue of it is defined; look at the parameters, "
            "the loss and the dtype"
        )
