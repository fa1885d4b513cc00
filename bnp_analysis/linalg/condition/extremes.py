"""What routes to the ends of a spectrum share: claims from singular values, norms, and checks."""

from __future__ import annotations

import math

import torch

from bnp_analysis.linalg.condition.certificates import apparent_rank
from bnp_analysis.linalg.condition.number import Extremes
from bnp_analysis.linalg.krylov.lanczos import Floats
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.spectra.null import DeclaredNull

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
        structural: how many structure allows to be nonzero, declared directions not counted.
        scale: of `sigma`, `radius` and `noise`.
        matvecs, stop: of the route.
    """
    rank = int((sigma > radius).sum())
    if rank == 0:
        return zero_matrix(null, matvecs)
    unresolved, on_your_word = unexplained_zeros(rank, structural, null, A)
    structural = min(structural, A.dim - null.dim)
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
        on_your_word=on_your_word,
        unresolved=unresolved,
        zero=A.dim - rank,
        gap_ratio=min(bottom / zero, 1e150) ** 2 if zero > 0 else math.inf,
        noise_floor=(radius * scale) ** 2,
        residual_max=scale**2 * radius * (2 * top + radius),
        residual_min=scale**2 * radius * (2 * bottom + radius),
        matvecs=matvecs,
        stop=stop,
        note=unexplained(unresolved, null, A),
    )


def unexplained_zeros(rank: int, structural: int, null: DeclaredNull, A: SymmetricOperator) -> tuple[int, int]:
    """Of the eigenvalues that do not stand out: how many nothing explains, how many the caller's declaration alone."""
    explained = min(structural, A.dim - null.dim)
    on_word = max(structural - max(explained, rank), 0) if null.on_word else 0
    return max(explained - rank, 0), on_word


def incomplete(null: DeclaredNull) -> str:
    """Why a random start supports no bound."""
    return "the known null directions need not be all" if null.declared else UNDECLARED


def unexplained(unresolved: int, null: DeclaredNull, A: SymmetricOperator) -> str:
    if unresolved == 0:
        return ""
    why = "" if null.declared else f" ({UNDECLARED})"
    exact = A.exact if A.factor is None else A.factor.exact
    coarse = not exact and A.eps > torch.finfo(torch.float64).eps
    more = "; an operator built in float64 has a lower floor" if coarse and A.dtype != torch.float64 else ""
    if not A.zeros_are_structural:
        more = f"; zeros among its entries may be rounding, as where derivatives saturate{more}"
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
