"""The effective condition number of a symmetric operator, as an interval that says how it knows."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, ZeroOperatorError
from bnp_analysis.linalg.condition import dense_routes, krylov_routes
from bnp_analysis.linalg.condition.certificates import kuczynski_wozniakowski
from bnp_analysis.linalg.condition.golub_kahan_route import golub_kahan_ends
from bnp_analysis.linalg.condition.inverse_route import inverse_lanczos
from bnp_analysis.linalg.condition.number import MAGNITUDE, SINGULAR, ConditionNumber, Extremes
from bnp_analysis.linalg.condition.routes import LANCZOS_STEPS, METHODS, choose_route, next_route
from bnp_analysis.linalg.derived import GramOperator, Shifted
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator, computed_in
from bnp_analysis.linalg.preconditioner import Preconditioner, check_fits, congruence
from bnp_analysis.linalg.scale import exponent, scaled
from bnp_analysis.linalg.spectra.checks import provenance, require_operator
from bnp_analysis.linalg.spectra.null import HasBasis, read_null
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.progress import Progress


def singular_condition_number(F: LinearOperator, null: Tensor | None = None) -> ConditionNumber:
    """The effective condition number `sigma_max / sigma_min+` of a rectangular operator, by factor-svd.

    Args:
        F: `(r, n)`, dense in memory.
        null: known null directions of `F`, `(n, k)`.

    Returns:
        A `ConditionNumber`: the square root of that of `F^T F`, with singular values as `lambda_max, lambda_min`.

    Raises:
        InvalidInputError: a zero or empty operator; MemoryLimitError: it does not fit.

    Source: T7, T13.

    Example:
        >>> import torch
        >>> from bnp_analysis.linalg import MatrixOperator
        >>> singular_condition_number(MatrixOperator(torch.tensor([[3.0, 0.0], [0.0, 2.0]]))).value
        1.5
    """
    found = condition_number(GramOperator(F), null=null, method="factor-svd")
    roots = {name: math.sqrt(getattr(found, name)) for name in ("lambda_max", "lambda_min", "gap_ratio", "noise_floor")}
    # Eigenvalues beyond the floats are in units of an even power of two, and their roots are floats.
    singular = Extremes(**{f.name: roots.get(f.name, getattr(found, f.name)) for f in dataclasses.fields(Extremes)})
    singular = dataclasses.replace(
        singular,
        exponent=0,
        residual_max=found.residual_max / singular.lambda_max,
        residual_min=found.residual_min / singular.lambda_min,
    ).times_power(found.exponent // 2)
    return dataclasses.replace(
        found,
        **(vars(singular) | {"lower": math.sqrt(found.lower), "upper": math.sqrt(found.upper)}),
        quantity=SINGULAR,
        value=math.sqrt(found.value),
    )


def condition_number(
    A: SymmetricOperator,
    *,
    preconditioner: Preconditioner | None = None,
    null: Tensor | HasBasis | None = None,
    method: str = "auto",
    steps: int | None = None,
    failure_probability: float = 1e-3,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> ConditionNumber:
    """The effective condition number `kappa*(P^T A P) = lambda_max / lambda_min+` of a semidefinite operator.

    Args:
        A: symmetric positive semidefinite operator on `R^n`. Where it has a `factor`, eigenvalues are decided
            on the factor's singular values.
        preconditioner: `P` with `theta = P z`; the curvature measured is `P^T A P`.
        null: known null directions `(n, r)` in the coordinates of `A` (they are transported by `P`), or an
            object with `.basis` and `.sources`; shape `(n, 0)` declares a nonsingular `A`. None: nothing known.
        method: `"auto"`, which takes the first of factor-svd, dense, lanczos that fits, or by name:
            `"factor-svd"`, the dense factor; `"golub-kahan"`, the factor by products, to breakdown; `"dense"`, all
            eigenvalues; `"inertia"`, the same with both ends decided by LDL^T counts; `"lanczos"`, Ritz values;
            `"inverse-lanczos"`, both ends with an inner conjugate gradient. `routes(A)` lists their costs.
        steps: of Lanczos (100 by default) or Golub-Kahan (by default until nothing is left).
        failure_probability: of the bounds that rest on a random start.
        checkpoint: file from which a Golub-Kahan or Lanczos run resumes, and to which it writes.
        seed: of the random start.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `ConditionNumber`, two-sided where the evidence allows it.

    Raises:
        NotConvexError: a negative eigenvalue beyond rounding; `magnitude_condition_number` is the way on.
        NullSpaceError: declared directions that are not null.
        InvalidInputError: a zero or empty operator, or one that is not symmetric.
        MemoryLimitError: the route does not fit into memory.

    Source: T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64)))
        >>> k = bnp.condition_number(A)
        >>> round(k.value, 12), k.rank, k.two_sided
        (2.0, 2, True)
    """
    settings = {"steps": steps, "failure_probability": failure_probability}
    krylov = LANCZOS_STEPS if steps is None else steps

    def solve(route: str) -> Extremes:
        declared = read_null(null, A)
        if route == "factor-svd":
            return dense_routes.factor_svd(A, preconditioner, declared)
        if route in ("dense", "inertia"):
            return dense_routes.dense_symmetric(
                A, preconditioner, declared, indefinite=False, inertia=route == "inertia"
            )
        P = None if preconditioner is None else scaled(preconditioner)
        if route == "golub-kahan":
            B = GramOperator(scaled(_factor(A, route)))
            ends = golub_kahan_ends(B, P, declared, steps=steps, seed=seed, checkpoint=checkpoint, progress=progress)
        elif route == "inverse-lanczos":
            B = scaled(A)
            ends = inverse_lanczos(
                B, P, declared, steps=krylov, failure_probability=failure_probability, seed=seed, progress=progress
            )
        else:
            B = scaled(A)
            ends = krylov_routes.lanczos_ends(B, P, declared, krylov, failure_probability, seed, checkpoint, progress)
        return _in_units_of(ends, B, P)

    return _measure(A, preconditioner, method, settings, seed, solve, indefinite=False)


def regularized_condition_number(
    A: SymmetricOperator,
    delta: float,
    *,
    preconditioner: Preconditioner | None = None,
    method: str = "auto",
    steps: int | None = None,
    failure_probability: float = 1e-3,
    seed: int = 0,
    progress: Progress = False,
) -> ConditionNumber:
    """The condition number of `P^T A P + delta I`, a number of its own: it depends on `delta` and is named with it.

    Args:
        A: symmetric positive semidefinite operator on `R^n`.
        delta: the regularization, positive, in units of the eigenvalues of `P^T A P`.
        preconditioner, method, steps, failure_probability, seed, progress: as for `condition_number`.

    Returns:
        A `ConditionNumber` whose `quantity` names `delta`. No null space is involved: with Lanczos, `delta` itself
        bounds the smallest eigenvalue from below.

    Raises:
        InvalidInputError: `delta` is not positive; otherwise as `condition_number`.

    Source: T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64)))
        >>> print(bnp.regularized_condition_number(A, 0.5))
        kappa(A + 0.5 I) = 7 (7 .. 7), dense float64, rank 3 of 3
    """
    if not (delta > 0 and math.isfinite(delta)):
        raise InvalidInputError(f"delta must be positive and finite, got {delta}; for delta = 0 use condition_number")
    B = Shifted(A if preconditioner is None else congruence(A, preconditioner), delta)
    found = condition_number(
        B,
        null=torch.zeros(B.dim, 0, dtype=B.dtype, device=B.device),
        method=method,
        steps=steps,
        failure_probability=failure_probability,
        seed=seed,
        progress=progress,
    )
    unit = math.ldexp(delta, -found.exponent)
    if found.method == "lanczos" and found.lambda_min < unit - found.noise_floor:
        found = dataclasses.replace(found, note=f"A is indefinite, delta bounds nothing; {found.note}".rstrip("; "))
    elif not found.two_sided and found.method == "lanczos" and found.stop != "interrupted":
        # Both sides of the top end; the bottom end is at least delta because A is semidefinite.
        taken = LANCZOS_STEPS if steps is None else steps
        high, _ = kuczynski_wozniakowski(found.lambda_max, 0.0, taken, B.dim, failure_probability)
        upper = (high + found.noise_floor) / unit
        sure = math.isfinite(upper)
        found = dataclasses.replace(
            found, upper=upper, two_sided=sure, note="" if sure else found.note, failure_probability=failure_probability
        )
    name = "P^T A P" if preconditioner is not None else "A"
    return dataclasses.replace(found, quantity=f"kappa({name} + {delta:g} I)")


def magnitude_condition_number(
    A: SymmetricOperator,
    *,
    preconditioner: Preconditioner | None = None,
    null: Tensor | HasBasis | None = None,
    method: str = "auto",
    steps: int = 100,
    seed: int = 0,
    progress: Progress = False,
) -> ConditionNumber:
    """`max|lambda| / min|lambda|` over the nonzero eigenvalues of `P^T A P`, for indefinite operators.

    Args:
        A: symmetric operator on `R^n`, for instance the Hessian of a network's loss.
        preconditioner, null, method, steps, seed, progress: as for `condition_number`; the routes are
            `"dense"`, `"inertia"` and `"lanczos"`, the last gives a lower bound only.

    Returns:
        A `ConditionNumber` of that `quantity`, with the counts `negative`, `zero`, `unresolved`.

    Raises:
        NullSpaceError, InvalidInputError, MemoryLimitError: as for `condition_number`.

    Source: T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(torch.tensor([-4.0, 2.0, 1.0], dtype=torch.float64)))
        >>> k = bnp.magnitude_condition_number(A)
        >>> round(k.value, 12), k.negative
        (4.0, 1)
    """
    settings = {"steps": steps}
    if method in ("factor-svd", "golub-kahan", "inverse-lanczos"):
        raise InvalidInputError(f"{method} is for semidefinite operators; use condition_number, or method='dense'")

    def solve(route: str) -> Extremes:
        declared = read_null(null, A)
        if route in ("dense", "inertia"):
            return dense_routes.dense_symmetric(
                A, preconditioner, declared, indefinite=True, inertia=route == "inertia"
            )
        B, P = scaled(A), None if preconditioner is None else scaled(preconditioner)
        return _in_units_of(krylov_routes.lanczos_magnitudes(B, P, declared, steps, seed, progress), B, P)

    return _measure(A, preconditioner, method, settings, seed, solve, indefinite=True)


def _factor(A: SymmetricOperator, route: str) -> LinearOperator:
    if A.factor is None:
        raise InvalidInputError(
            f"{A!r} has no factor, so {route} cannot run; use method='dense' or 'lanczos', or a Gauss-Newton operator, "
            "whose factor is known"
        )
    return A.factor


def _in_units_of(ends: Extremes, A: SymmetricOperator, P: Preconditioner | None) -> Extremes:
    """What was found of `scaled(A)` and `scaled(P)`, in the units of `P^T A P`."""
    return ends.times_power(-exponent(A) - (0 if P is None else 2 * exponent(P)))


@full_float32
def _measure(
    A: SymmetricOperator,
    preconditioner: Preconditioner | None,
    method: str,
    settings: dict[str, Any],
    seed: int,
    solve: Callable[[str], Extremes],
    *,
    indefinite: bool,
) -> ConditionNumber:
    require_operator(A)
    if A.dim == 0:
        raise InvalidInputError("an operator on R^0 has no eigenvalues, hence no condition number")
    if method not in METHODS:
        raise InvalidInputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if preconditioner is not None:
        check_fits(A, preconditioner)
    route = choose_route(A, indefinite=indefinite) if method == "auto" else method
    began = time.perf_counter()
    ends = solve(route)
    if ends.lambda_max == 0.0:
        known = "" if A.eps <= torch.finfo(A.dtype).eps else f", its products being known to {A.eps:.1g} only"
        raise ZeroOperatorError(
            f"the operator is zero to rounding{known}, and a condition number compares nonzero eigenvalues; "
            "look for saturated or dead units, a loss that does not depend on these parameters, or one whose "
            "derivative is a difference of nearly equal numbers, as that of log(cosh(z)) is at large z"
        )
    value = ends.lambda_max / ends.lambda_min if ends.lambda_min > 0 else math.inf
    note = ends.note + (next_route(A) if route == "lanczos" and not math.isfinite(ends.upper) else "")
    if ends.rank is None:  # nothing is counted: every declared direction is believed
        ends = dataclasses.replace(ends, on_your_word=ends.null_sources.get("declared", 0))
    bounds = {"note": note, "failure_probability": ends.failure_probability if math.isfinite(ends.upper) else 0.0}
    return ConditionNumber(
        **(vars(ends) | bounds),
        value=value,
        two_sided=math.isfinite(ends.upper) and math.isfinite(ends.lower),
        method=route,
        dim=A.dim,
        dtype=computed_in(A),
        quantity=MAGNITUDE if indefinite else "kappa*",
        **provenance(A, preconditioner, {"method": method} | settings, seed, began),
    )
