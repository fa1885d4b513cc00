"""What every route to the ends of a spectrum returns, and the checks that routes share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.lanczos import lanczos
from bnp_analysis.linalg.null import DeclaredNull
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.linalg.random import generator, normal

UNDECLARED = "null space not declared"


@dataclass(frozen=True, kw_only=True)
class Extremes:
    """What a route found: the ends of the nonzero spectrum, counts, and the bounds of their ratio."""

    lambda_max: float
    lambda_min: float
    lower: float
    upper: float
    rank: int | None = None
    null_dim: int = 0
    null_sources: Mapping[str, int] = field(default_factory=dict)
    unresolved: int | None = None
    negative: int = 0
    zero: int | None = None
    gap_ratio: float = math.inf
    noise_floor: float = 0.0
    failure_probability: float = 0.0
    matvecs: int = 0
    stop: str = "done"
    note: str = ""


class Gram(SymmetricOperator):
    """`P P^T`, whose norm is `|P|^2`."""

    def __init__(self, P: Preconditioner) -> None:
        super().__init__(P.dim, P.dtype, P.device)
        self._P = P

    def _matmat(self, x: Tensor) -> Tensor:
        return self._P._matmat(self._P._rmatmat(x))


def norm_estimate(A: SymmetricOperator, seed: int = 0) -> float:
    """`|A|_2` to within a small factor, from eight Lanczos steps."""
    values, _ = lanczos(A, 8, seed=seed).ritz()
    return float(np.abs(values).max())


def require_symmetric(A: SymmetricOperator, seed: int) -> None:
    """Two random vectors: `u.Av = v.Au` up to rounding, relative."""
    like = torch.empty(0, dtype=A.dtype, device=A.device)
    pair = normal((A.dim, 2), generator(seed), like)
    image = A @ pair
    require_finite(image, "a product")
    u, v, Au, Av = (x.double() for x in (pair[:, 0], pair[:, 1], image[:, 0], image[:, 1]))
    gap, size = abs(float(u @ Av) - float(v @ Au)), float(u.norm() * Av.norm() + v.norm() * Au.norm())
    if gap > 1e3 * math.sqrt(A.dim) * torch.finfo(A.dtype).eps * size:
        raise InvalidInputError(
            f"{A!r} is not symmetric: u.Av and v.Au differ by {gap / size:.2g} relative, for random u, v. Lanczos "
            "would report eigenvalues of no matrix at all; check the function that computes the products"
        )


def require_finite(x: Tensor, what: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            f"{what} has NaN or infinite entries, so no eigenvalue of it is defined; look at the parameters, "
            "the loss and the dtype"
        )


def unexplained(unresolved: int, null: DeclaredNull) -> str:
    if unresolved == 0:
        return ""
    why = "" if null.declared else f" ({UNDECLARED})"
    return f"{unresolved} eigenvalues below the noise floor are not explained as zero{why}"


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
