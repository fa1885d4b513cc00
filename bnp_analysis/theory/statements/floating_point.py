"""What floating point and random starts allow one to claim, on problems with known answers and on a user's (T13)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

from bnp_analysis.errors import ZeroOperatorError
from bnp_analysis.linalg import (
    CallableOperator,
    ConditionNumber,
    DensePreconditioner,
    MatrixOperator,
    condition_number,
    lanczos,
)
from bnp_analysis.linalg.condition.certificates import kuczynski_wozniakowski
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.testing import random_orthogonal, spectrum
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, statement

_T13 = "what a computed condition number may claim in floating point"
_UNIT = torch.finfo(torch.float64).eps
_KAPPA = 1e12
_SHAPE = (40, 20)
_CASES = 12
_STARTS = 60
_STEPS = 40
_CHANCE = 0.2


@statement(Source.T13, _T13)
def check_floating_point(problem: Problem) -> Iterator[Check]:
    """T13: factor against Gram matrix, the `|P|` term, Ritz values, random starts."""
    yield from _factor_and_gram(problem)
    yield from _product(problem)
    yield from _ritz(problem)
    yield from _starts(problem)


def _gram(F: Tensor) -> GramOperator:
    return GramOperator(MatrixOperator(F))


def _factor_and_gram(problem: Problem) -> Iterator[Check]:
    """Errors of `lambda_min+` from the two routes, the worst of a few matrices with prescribed singular values."""
    g, worst = problem.random(13), {"factor-svd": 0.0, "dense": 0.0}
    rows, columns = _SHAPE
    for _ in range(_CASES):
        sigma = spectrum("log", columns, _KAPPA).sqrt()
        F = random_orthogonal(rows, g)[:, :columns] * sigma @ random_orthogonal(columns, g)
        true = float(sigma[-1] ** 2)
        worst["factor-svd"] = max(worst["factor-svd"], abs(condition_number(_gram(F)).lambda_min / true - 1))
        gram = torch.linalg.eigvalsh(F.T @ F)
        worst["dense"] = max(worst["dense"], abs(float(gram[0]) / true - 1))
    u = _UNIT
    details = {"kappa": _KAPPA, "matrices": _CASES, "factor": worst["factor-svd"], "Gram matrix": worst["dense"]}
    yield Check.compare(
        "from the factor the relative error of lambda_min+ is of order u sqrt(kappa)",
        Source.T13,
        observed=worst["factor-svd"],
        predicted=2 * rows * u * math.sqrt(_KAPPA),
        tolerance=0.0,
        relation="<=",
        details=details,
    )
    yield Check.compare(
        "from the Gram matrix it is of order u kappa: more than sqrt(kappa)/1000 times as large",
        Source.T13,
        observed=worst["dense"] / max(worst["factor-svd"], u),
        predicted=math.sqrt(_KAPPA) / 1000,
        tolerance=0.0,
        relation=">=",
        details=details,
    )


def _product(problem: Problem) -> Iterator[Check]:
    """Intervals for `F P`, `|P| = 1e5`, against singular values of the product in exact arithmetic."""
    g, with_term, without = problem.random(14), 0, 0
    for _ in range(_CASES):
        n = int(torch.randint(3, 7, (1,), generator=g))
        P = random_orthogonal(n, g) * spectrum("log", n, 1e5, scale=1e5) @ random_orthogonal(n, g)
        G = random_orthogonal(n + 2, g)[:, :n] * spectrum("log", n, 100.0).sqrt() @ random_orthogonal(n, g)
        F = G @ torch.linalg.inv(P)
        sigma = torch.linalg.svdvals(_exact_product(F, P))
        true = float((sigma[0] / sigma[-1]) ** 2)
        with_term += not _contains(condition_number(_gram(F), preconditioner=DensePreconditioner(P)), true)
        computed = torch.linalg.svdvals(F @ P)
        top, bottom = float(computed[0]), float(computed[-1])
        d = radius_without_product(top, (n + 2, n))
        without += not ((top - d) / (bottom + d)) ** 2 <= true <= ((top + d) / max(bottom - d, 1e-300)) ** 2
    details = {"intervals": _CASES, "|P|": 1e5, "missed with the term": with_term, "missed without": without}
    yield Check.compare(
        "with the |P| term the interval of kappa*(P^T A P) holds the truth: intervals that miss it",
        Source.T13,
        observed=float(with_term),
        predicted=0.0,
        tolerance=0.0,
        details=details,
    )
    yield Check.compare(
        "without the |P| term most intervals miss it",
        Source.T13,
        observed=float(without),
        predicted=_CASES / 2,
        tolerance=0.0,
        relation=">=",
        details=details,
    )


def radius_without_product(largest: float, shape: tuple[int, int]) -> float:
    """`max(r, n) u sigma_1`: how far the SVD alone moves singular values, the product left out."""
    return max(shape) * _UNIT * largest


def _contains(k: ConditionNumber, true: float) -> bool:
    return k.lower <= true <= k.upper


def _exact_product(F: Tensor, P: Tensor) -> Tensor:
    """`F P` in rational arithmetic, rounded once."""
    left, right = ([[Fraction(x) for x in row] for row in matrix.tolist()] for matrix in (F, P))
    columns = list(zip(*right, strict=True))
    rows = [[float(sum(a * b for a, b in zip(row, col, strict=True))) for col in columns] for row in left]
    return torch.tensor(rows, dtype=torch.float64)


def _ritz(problem: Problem) -> Iterator[Check]:
    """The ratio of extreme Ritz values, start in the range, against all singular values of the user's factor."""
    words = "the ratio of extreme Ritz values from a start in the range is at most kappa*"
    try:
        A = GramOperator(MatrixOperator(problem.factor, exact=False))
        dense = condition_number(A)
    except (NotApplicable, ZeroOperatorError) as refusal:
        yield Check.not_applicable(words, Source.T13, str(refusal))
        return
    for steps in (15, 60):
        if steps >= A.dim:
            continue
        found = condition_number(A, method="lanczos", steps=steps, seed=problem.seed)
        if math.isnan(found.lower):
            yield Check.not_applicable(f"{words} [{steps} steps]", Source.T13, f"no bound was issued: {found.note}")
            continue
        yield Check.compare(
            f"{words} [{steps} steps]",
            Source.T13,
            observed=found.lower,
            predicted=dense.value,
            tolerance=2 * math.sqrt(dense.noise_floor / dense.lambda_min),
            relation="<=",
            hypotheses={"start in the range": True, "Ritz values above the floor": True},
            details={"rank": dense.rank, "unresolved": dense.unresolved},
        )


def _starts(problem: Problem) -> Iterator[Check]:
    """How often the Kuczynski-Wozniakowski bounds fail over random starts, on the user's own nonzero spectrum."""
    words = "Kuczynski-Wozniakowski bounds fail no more often than they say"
    try:
        F = problem.factor
        values = torch.linalg.svdvals(torch.linalg.qr(F, mode="r")[1] if F.shape[0] > F.shape[1] else F)
    except NotApplicable as refusal:
        yield Check.not_applicable(words, Source.T13, str(refusal))
        return
    values = values[values > 1e-6 * values[:1]].square()
    n = len(values)
    steps = min(_STEPS, n // 2)
    if steps < 5:
        yield Check.not_applicable(words, Source.T13, f"{n} nonzero eigenvalues: Lanczos finds them all")
        return
    A = CallableOperator(lambda v: values * v, n, dtype=torch.float64)
    failed, finite = 0, 0
    for k in range(_STARTS):
        ritz = lanczos(A, steps, seed=1000 * problem.seed + k).ritz()[0]
        high, low = kuczynski_wozniakowski(float(ritz[-1]), float(ritz[0]), steps, n, _CHANCE)
        finite += math.isfinite(high)
        failed += not (low <= float(values[-1]) * (1 + 1e-12) and float(values[0]) <= high * (1 + 1e-12))
    if not finite:
        yield Check.not_applicable(words, Source.T13, f"{steps} steps are too few for a bound in dimension {n}")
        return
    yield Check.compare(
        words,
        Source.T13,
        observed=failed / _STARTS,
        predicted=_CHANCE + 3 * math.sqrt(_CHANCE * (1 - _CHANCE) / _STARTS),
        tolerance=0.0,
        relation="<=",
        reason=f"stated {_CHANCE}, with three standard errors of {_STARTS} starts",
        details={"dimension": n, "steps": steps, "failed": failed},
    )
