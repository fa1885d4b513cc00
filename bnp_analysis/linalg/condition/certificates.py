"""Certified bounds on the ends of a spectrum, given rounding and random starts (T13)."""

from __future__ import annotations

import math

import numpy as np
import torch

from bnp_analysis.errors import InvalidInputError, ZeroOperatorError
from bnp_analysis.linalg.condition.number import Extremes, Magnitudes
from bnp_analysis.linalg.forming import UNIT
from bnp_analysis.linalg.krylov.lanczos import Floats
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.linalg.spectra.checks import DeclaredNull

UNDECLARED = "null space not declared"


def singular_value_radius(largest: float, shape: tuple[int, int], forming: float) -> float:
    """`d = max(r, n) u sigma_1 + e`: no singular value moved further, in the SVD and in forming the factor.

    Args:
        largest: the largest computed singular value.
        shape: of the factor.
        forming: `e`, what forming the factor has rounded, `c u || |F| |P| ||_2`; 0 for one that is given.

    Example:
        >>> singular_value_radius(1.0, (10, 10), 0.0) < 1e-14
        True
    """
    return max(shape) * UNIT * largest + forming


def apparent_rank(sigma: Floats, structural: int, noise: float) -> int | None:
    """The structural rank, where the singular values end there by all appearance: a clear gap, above the noise.

    That is no evidence (an isolated value at `1e-8 sigma_1` looks the same), but a better estimate than the values
    that the radius certifies.

    Args:
        sigma: singular values, descending.
        structural: how many structure allows.
        noise: `u || |F| |P| ||_2`, the size of one rounding.

    Returns:
        `structural`, or None where there is no gap of 100 or the value is below 10 roundings.

    Example:
        >>> apparent_rank(np.array([1.0, 1e-5, 1e-9]), 2, 1e-7)
        2
    """
    if not 0 < structural <= sigma.size:
        return None
    following = float(sigma[structural]) if structural < sigma.size else 0.0
    return structural if sigma[structural - 1] > max(10 * noise, 100 * following) else None


def require_probability(failure_probability: float) -> None:
    if not 0 < failure_probability < 1:
        raise InvalidInputError(f"failure_probability must lie in (0, 1), got {failure_probability}")


def kuczynski_wozniakowski(
    theta_max: float, theta_min: float, steps: int, dim: int, failure_probability: float
) -> tuple[float, float]:
    """Probabilistic outer bounds of the spectrum from extreme Ritz values of a random start.

    With `eps = (ln(1.648 sqrt(n)/delta)/(2k-1))^2`, `e = eps/(1 - 2 eps)` and `w = theta_max - theta_min`,
    `lambda_max <= theta_max + e w` and `lambda_min >= theta_min - e w`, each except with probability
    `delta`.

    Args:
        theta_max, theta_min: extreme Ritz values.
        steps: Lanczos steps `k`, with full reorthogonalization.
        dim: dimension `n` of the space searched, after deflation.
        failure_probability: of both claims together, `2 delta`.

    Returns:
        Upper bound of `lambda_max`, lower bound of `lambda_min`; infinite while `k` is too small.

    Raises:
        InvalidInputError: a probability outside (0, 1).

    Source: Kuczynski and Wozniakowski 1992; T13.

    Example:
        >>> kuczynski_wozniakowski(1.0, 0.1, 3, 1000, 1e-3)
        (inf, -inf)
        >>> upper, lower = kuczynski_wozniakowski(1.0, 0.1, 400, 1000, 1e-3)
        >>> round(upper, 3), round(lower, 3)
        (1.0, 0.1)
    """
    require_probability(failure_probability)
    if steps >= dim:
        return theta_max, theta_min
    eps = (math.log(1.648 * math.sqrt(dim) / (failure_probability / 2)) / (2 * steps - 1)) ** 2
    if eps >= 0.5:
        return math.inf, -math.inf
    slack = eps / (1 - 2 * eps) * (theta_max - theta_min)
    return theta_max + slack, theta_min - slack


def invariance_slack(residual: float, dim: int, failure_probability: float) -> float:
    """How far beyond the extreme Ritz values the spectrum can reach when the residual is small.

    `A Q = Q T + r e_k^T` gives for an eigenvector `u` that `(T - lambda) Q^T u = -(u.r) e_k`, so that some Ritz value
    lies within `|r| / |Q^T u| <= |r| / |u.q_1|` of `lambda`. The component of a random unit start vector is at least
    `delta sqrt(pi / 2n)` except with probability `delta`: a space that is invariant to rounding only may have missed
    an eigenvector that it hardly met.

    Args:
        residual: `|r|`, rounding included.
        dim: dimension `n` of the space searched, after deflation.
        failure_probability: of the claims about both ends together, `2 delta`.

    Returns:
        The slack, in units of eigenvalues.

    Source: derived here.

    Example:
        >>> invariance_slack(1e-12, 200, 1e-3) < 1e-7
        True
    """
    return residual * math.sqrt(2 * dim / math.pi) / (failure_probability / 2)


def null_contamination(alpha: Floats, beta: Floats, error: float, initial: float) -> Floats:
    """Bounds `nu_j` of the part of each Lanczos vector that rounding has put into an undeclared null space.

    A start in the range, `v0 = A g`, keeps the basis in the range in exact arithmetic only. A product's
    rounding error of size `error` enters every step and then follows the three-term recurrence
    `beta_j nu_(j+1) = -alpha_j nu_j - beta_(j-1) nu_(j-1) + error`, which amplifies it; the bound sums the
    magnitudes of all these responses (the idea of Simon's recurrence for lost orthogonality).

    Args:
        alpha: `(k,)` diagonal of `T`.
        beta: `(k - 1,)` off-diagonal of `T`.
        error: `|fl(A q) - A q|`, absolute.
        initial: the null part of the unit start vector.

    Returns:
        `(k,)` bounds, the first `initial`.

    Source: derived here; Simon 1984 for the technique.

    Example:
        >>> null_contamination(np.ones(3), np.full(2, 0.1), 1e-16, 1e-16).round(18).tolist()
        [1e-16, 2e-15, 2.09e-14]
    """
    k = alpha.size
    response = np.zeros((k, k))
    response[0, 0] = initial
    for j in range(k - 1):
        if beta[j] == 0.0:
            response[j + 1 :] = np.inf
            break
        row = -alpha[j] * response[j] - (beta[j - 1] * response[j - 1] if j else 0.0)
        row[j + 1] += error
        response[j + 1] = row / beta[j]
    bounds: Floats = np.abs(response).sum(axis=1)
    return bounds


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
        matvecs, stop: of the method.
    """
    rank = int((sigma > radius).sum())
    if rank == 0:
        return zero_matrix(matvecs)
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


def all_magnitudes(
    A: SymmetricOperator,
    null: DeclaredNull,
    values: Floats,
    *,
    lower: Floats,
    upper: Floats,
    rest: float,
    structural: int,
    scale: float = 1.0,
    exponent: int = 0,
    matvecs: int,
) -> Magnitudes:
    """What all eigenvalues of `A` allow one to claim of each: Weyl's theorem bounds every value by itself (T13).

    Args:
        A: the operator.
        null: its declared null directions.
        values: eigenvalues divided by `scale`, by descending magnitude; those that are missing are zero.
        lower, upper: bounds of the magnitude at each rank.
        rest: no eigenvalue that counts as zero is larger.
        structural: how many structure allows to be nonzero, declared directions not counted.
        scale, exponent: of the values: the eigenvalues are `2^exponent scale` times these.
        matvecs: of the method.
    """
    resolved = int((lower > 0).sum())
    unresolved, on_word = unexplained_zeros(resolved, structural, null, A)
    return Magnitudes(
        value=np.abs(values) * scale,
        lower=lower * scale,
        upper=upper * scale,
        rest=rest * scale,
        rank=None if unresolved or on_word else resolved,
        trace=float(values.sum()) * scale,
        trace_error=0.0,
        negative=int(((values < 0) & (lower > 0)).sum()),
        matvecs=matvecs,
        exponent=exponent,
    )


def no_magnitudes(matvecs: int) -> Magnitudes:
    """Of the zero matrix."""
    none = np.zeros(0)
    return Magnitudes(
        value=none, lower=none, upper=none, rest=0.0, rank=0, trace=0.0, trace_error=0.0, negative=0, matvecs=matvecs
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


def zero_matrix(matvecs: int) -> Extremes:
    return Extremes(lambda_max=0.0, lambda_min=0.0, lower=math.nan, upper=math.inf, matvecs=matvecs, rank=0)


def zero_operator(A: SymmetricOperator, P: Preconditioner | None = None) -> ZeroOperatorError:
    """What is said where no eigenvalue stands above rounding."""
    known = "" if A.eps <= torch.finfo(A.dtype).eps else f", its products being known to {A.eps:.1g} only"
    large = "" if P is None else ", or a P with large entries, whose squares multiply the rounding of A"
    wide = "" if A.dtype == torch.float64 else "; an operator built in float64 has a lower floor"
    return ZeroOperatorError(
        f"the operator is zero to rounding{known}, and a condition number compares nonzero eigenvalues; "
        "look for saturated or dead units, a loss that does not depend on these parameters, one that is linear in the "
        "outputs, piece by piece, whose Gauss-Newton matrix is zero where its Hessian is not, or one whose "
        f"derivative is a difference of nearly equal numbers, as that of log(cosh(z)) is at large z{large}{wide}"
    )
