"""The effective condition number of a symmetric operator, as a certified interval."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.condition.certificates import zero_operator
from bnp_analysis.linalg.condition.methods import Problem, candidates, first_that_fits, named
from bnp_analysis.linalg.condition.number import MAGNITUDE, SINGULAR, ConditionNumber, Extremes
from bnp_analysis.linalg.derived import GramOperator, Shifted
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator, computed_in
from bnp_analysis.linalg.preconditioner import Preconditioner, check_fits, congruence
from bnp_analysis.linalg.spectra.checks import HasBasis, provenance, read_null, require_operator
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.progress import Progress


@gated
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


@gated
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
        method: `"auto"`, which takes the first of factor-svd, row-gram, dense, lanczos that fits, or by name:
            `"factor-svd"`, the dense factor; `"row-gram"`, the Gram matrix of rows that are Kronecker products, as
            those of dense layers; `"golub-kahan"`, the factor by products, to breakdown; `"dense"`, all eigenvalues;
            `"inertia"`, the same with both ends decided by LDL^T counts; `"lanczos"`, Ritz values;
            `"inverse-lanczos"`, both ends with an inner conjugate gradient. `methods(A)` lists their costs.
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
        MemoryLimitError: the method does not fit into memory.

    Source: T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(torch.tensor([4.0, 2.0, 0.0], dtype=torch.float64)))
        >>> k = bnp.condition_number(A)
        >>> round(k.value, 12), k.rank, k.two_sided
        (2.0, 2, True)
    """
    problem: dict[str, Any] = {"steps": steps, "failure_probability": failure_probability}
    return _measure(A, preconditioner, null, method, problem, seed, checkpoint=checkpoint, progress=progress)


@gated
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
        >>> print(bnp.linalg.regularized_condition_number(A, 0.5))
        kappa(A + 0.5 I) = 7 (7 .. 7), dense float64, rank 3 of 3
    """
    if not (delta > 0 and math.isfinite(delta)):
        raise InvalidInputError(f"delta must be positive and finite, got {delta}; for delta = 0 use condition_number")
    B = Shifted(A if preconditioner is None else congruence(A, preconditioner), delta)
    none = torch.zeros(B.dim, 0, dtype=B.dtype, device=B.device)
    problem: dict[str, Any] = {"steps": steps, "failure_probability": failure_probability}
    found = _measure(B, None, none, method, problem, seed, semidefinite=True, least=delta, progress=progress)
    name = "P^T A P" if preconditioner is not None else "A"
    return dataclasses.replace(found, quantity=f"kappa({name} + {delta:g} I)")


@gated
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
        preconditioner, null, method, steps, seed, progress: as for `condition_number`; the methods are
            `"dense"`, `"inertia"` and `"lanczos"`, the last gives a lower bound only.

    Returns:
        A `ConditionNumber` of that `quantity`, with the counts `negative`, `zero`, `unresolved`.

    Raises:
        NullSpaceError, InvalidInputError, MemoryLimitError: as for `condition_number`.

    Source: T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(torch.tensor([-4.0, 2.0, 1.0], dtype=torch.float64)))
        >>> k = bnp.linalg.magnitude_condition_number(A)
        >>> round(k.value, 12), k.negative
        (4.0, 1)
    """
    return _measure(A, preconditioner, null, method, {"steps": steps}, seed, semidefinite=False, progress=progress)


@full_float32
def _measure(
    A: SymmetricOperator,
    P: Preconditioner | None,
    null: Tensor | HasBasis | None,
    method: str,
    settings: dict[str, Any],
    seed: int,
    *,
    semidefinite: bool | None = None,
    least: float = 0.0,
    checkpoint: str | Path | None = None,
    progress: Progress = False,
) -> ConditionNumber:
    """What a method finds, as a result; by default magnitudes are compared where `A` may have negative eigenvalues."""
    require_operator(A)
    semidefinite = A.semidefinite if semidefinite is None else semidefinite
    tried = candidates(A, indefinite=not semidefinite) if method == "auto" else [named(method)]
    if not (semidefinite or tried[0].indefinite):
        other = "condition_number, or " if A.semidefinite else ""
        raise InvalidInputError(f"{method} is for semidefinite operators; use {other}method='dense'")
    if P is not None:
        check_fits(A, P)
    began = time.perf_counter()
    problem = Problem(
        A=A,
        P=P,
        null=read_null(null, A),
        semidefinite=semidefinite,
        least=least,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
        **settings,
    )
    chosen, ends = first_that_fits(tried, lambda method: method.solve(problem))
    if ends.lambda_max == 0.0:
        raise zero_operator(A, P)
    declared = {"null_dim": problem.null.dim, "null_sources": problem.null.sources}
    if ends.rank is None:  # nothing is counted: every declared direction is believed
        declared["on_your_word"] = problem.null.sources.get("declared", 0)
    two_sided = math.isfinite(ends.upper) and math.isfinite(ends.lower)
    chance = ends.failure_probability if math.isfinite(ends.upper) else 0.0
    return ConditionNumber(
        **(vars(ends) | declared | {"failure_probability": chance}),
        value=ends.lambda_max / ends.lambda_min if ends.lambda_min > 0 else math.inf,
        two_sided=two_sided,
        method=chosen.name,
        dim=A.dim,
        dtype=computed_in(A),
        quantity="kappa*" if semidefinite else MAGNITUDE,
        **provenance(A, P, {"method": method} | settings, seed, began),
    )
