"""What routes to the ends of a spectrum share: claims from singular values, norms, and checks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.certificates import apparent_rank
from bnp_analysis.linalg.derived import Derived, GramOperator
from bnp_analysis.linalg.forming import amplified
from bnp_analysis.linalg.lanczos import Floats, lanczos
from bnp_analysis.linalg.null import NORM_STEPS, DeclaredNull, HasBasis, read_null, require_null
from bnp_analysis.linalg.number import Extremes
from bnp_analysis.linalg.operators import LinearOperator, Product, SymmetricOperator
from bnp_analysis.linalg.preconditioner import Congruence, Preconditioner, congruence
from bnp_analysis.linalg.random import generator, normal

UNDECLARED = "null space not declared"


def factor_extremes(
    A: SymmetricOperator,
    null: DeclaredNull,
    sigma: Floats,
    *,
    radius: float,
    noise: float,
    structural: int,
    scale: float = 1.0,
    matvecs: int,
    stop: str = "done",
) -> Extremes:
    """What all singular values of a factor of `A` allow one to claim (T13).

    Args:
        A: the operator.
        null: its declared null directions.
        sigma: singular values divided by `scale`, descending; those that are missing are zero.
        radius: within which they are known.
        noise: the size of one rounding in them.
        structural: how many structure allows to be nonzero.
        scale: of `sigma`, `radius` and `noise`.
        matvecs, stop: of the route.
    """
    rank = int((sigma > radius).sum())
    if rank == 0:
        return zero_matrix(null, matvecs)
    unresolved = max(structural - rank, 0)
    apparent = (apparent_rank(sigma, structural, noise) if unresolved else None) or rank
    top, certain, bottom = (float(sigma[i]) for i in (0, rank - 1, apparent - 1))
    zero = float(sigma[apparent]) if apparent < sigma.size else 0.0
    return Extremes(
        lambda_max=(top * scale) ** 2,
        lambda_min=(bottom * scale) ** 2,
        lower=(max(top - radius, 0.0) / (certain + radius)) ** 2,
        upper=((top + radius) / (certain - radius)) ** 2 if unresolved == 0 else math.inf,
        rank=rank,
        null_dim=null.dim,
        null_sources=null.sources,
        unresolved=unresolved,
        zero=A.dim - rank,
        gap_ratio=(bottom / zero) ** 2 if zero > 0 else math.inf,
        noise_floor=(radius * scale) ** 2,
        residual_max=scale**2 * radius * (2 * top + radius),
        residual_min=scale**2 * radius * (2 * bottom + radius),
        matvecs=matvecs,
        stop=stop,
        note=unexplained(unresolved, null, A),
    )


def norm_estimate(A: SymmetricOperator, seed: int = 0) -> float:
    """`|A|_2` to within a small factor, from `NORM_STEPS` Lanczos steps."""
    run = lanczos(A, NORM_STEPS, seed=seed)
    if run.stop == "interrupted":
        # Preparation only: there is no bound yet that could be kept.
        raise KeyboardInterrupt
    return float(np.abs(run.ritz()[0]).max())


def rounding_norm(A: SymmetricOperator, seed: int = 0) -> float:
    """What the rounding of a product with `A` is relative to: `|A|`, for `P^T A P` it is `|P|^2 |A|` (T13)."""
    if isinstance(A, Congruence):
        return rounding_norm(A.operator, seed) * factor_rounding_norm(A.preconditioner, seed) ** 2
    if isinstance(A, GramOperator) and amplified(A):
        return factor_rounding_norm(A.factor, seed) ** 2
    if isinstance(A, Derived) and isinstance(A.inner, SymmetricOperator) and amplified(A):
        return rounding_norm(A.inner, seed) + A.added
    return norm_estimate(A, seed)


def factor_rounding_norm(F: LinearOperator, seed: int = 0) -> float:
    """The same for a factor: `|F|`, for `F P` it is `|F| |P|`."""
    if isinstance(F, Product):
        return factor_rounding_norm(F.left, seed) * factor_rounding_norm(F.right, seed)
    if isinstance(F, Derived) and amplified(F):
        return math.hypot(factor_rounding_norm(F.inner, seed), F.added)
    return math.sqrt(norm_estimate(GramOperator(F), seed))


def require_operator(A: object) -> None:
    if not isinstance(A, SymmetricOperator):
        raise InvalidInputError(f"expected a SymmetricOperator, got {type(A).__name__}; wrap a matrix in DenseOperator")


def measured(
    A: SymmetricOperator, P: Preconditioner | None, null: Tensor | HasBasis | None, seed: int
) -> tuple[SymmetricOperator, DeclaredNull]:
    """The operator that is measured, `A` or `P^T A P`, and its declared null directions, checked against it."""
    require_operator(A)
    declared = read_null(null, A)
    if declared.dim:
        require_null(A, declared, rounding_norm(A, seed), "A")
    if P is None:
        return A, declared
    return congruence(A, P), replace(declared, basis=P.transport(declared.basis))


def require_symmetric(A: SymmetricOperator, seed: int) -> None:
    """Two random vectors: `u.Av = v.Au` up to rounding; a congruence or shift is as symmetric as what is inside."""
    A = _innermost(A)
    like = torch.empty(0, dtype=A.dtype, device=A.device)
    pair = normal((A.dim, 2), generator(seed), like)
    image = A @ pair
    require_finite(image, "a product")
    if isinstance(A, GramOperator):
        return
    u, v, Au, Av = (x.double() for x in (pair[:, 0], pair[:, 1], image[:, 0], image[:, 1]))
    gap, size = abs(float(u @ Av) - float(v @ Au)), float(u.norm() * Av.norm() + v.norm() * Au.norm())
    # Random vectors meet rounding errors at random: the gap does not grow with n.
    if gap > 1e3 * torch.finfo(A.dtype).eps * size:
        raise InvalidInputError(
            f"{A!r} is not symmetric: u.Av and v.Au differ by {gap / size:.2g} relative, for random u, v. Lanczos "
            "would report eigenvalues of no matrix at all; check the function that computes the products"
        )


def _innermost(A: SymmetricOperator) -> SymmetricOperator:
    if isinstance(A, Congruence):
        return _innermost(A.operator)
    if isinstance(A, Derived) and isinstance(A.inner, SymmetricOperator):
        return _innermost(A.inner)
    return A


def require_finite(x: Tensor, what: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            f"{what} has NaN or infinite entries, so no eigenvalue of it is defined; look at the parameters, "
            "the loss and the dtype"
        )


def incomplete(null: DeclaredNull) -> str:
    """Why a random start supports no bound."""
    return "the known null directions need not be all" if null.declared else UNDECLARED


def unexplained(unresolved: int, null: DeclaredNull, A: SymmetricOperator) -> str:
    if unresolved == 0:
        return ""
    why = "" if null.declared else f" ({UNDECLARED})"
    exact = A.exact if A.factor is None else A.factor.exact
    more = "; an operator built in float64 has a lower floor" if A.dtype != torch.float64 and not exact else ""
    return f"{unresolved} eigenvalues below the noise floor are not explained as zero{why}{more}"


def zero_matrix(null: DeclaredNull, matvecs: int) -> Extremes:
    return Extremes(
        lambda_max=0.0,
        lambda_min=0.0,
        lower=math.nan,
        upper=math.inf,
        null_dim=null.dim,
        matvecs=matvecs,
        rank=0,
    )
