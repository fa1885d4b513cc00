"""Rates inside `check_theory`: on small problems with a known minimizer (T14, T15), and on a user's if asked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from bnp_analysis.linalg import Preconditioner
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.precondition import bnp_preconditioner
from bnp_analysis.theory import problems
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.rates.convergence import ConvergenceCheck, check_convergence_rate
from bnp_analysis.theory.statements.setting import Problem, statement

_T14 = "gradient descent and heavy ball contract as the spectrum at the limit point says"
_T15 = "BNP contracts as the spectrum of P^T Hess P at the limit point says"
_GAIN = "BNP is faster than gradient descent by the ratio of the predicted rates"
_WHERE = "teacher-student network on digits"
_KAPPA = 300.0
_SECONDS = 60.0


def _embedded(problem: Problem) -> problems.KnownProblem:
    return problems.teacher_student((4, 3, 2), kappa=_KAPPA, n=60, seed=problem.seed)


def _named(found: ConvergenceCheck, where: str) -> ConvergenceCheck:
    kappa = f", kappa* {found.kappa:.4g}" if math.isfinite(found.kappa) else ""
    return dataclasses.replace(found, statement=f"{found.statement} [{where}{kappa}]")


@statement("T14", _T14)
def check_descent(problem: Problem) -> Iterator[Check]:
    """T14 on an embedded problem with zero residual and a known null dimension."""
    risk = _embedded(problem).risk
    for method in ("gd", "heavy_ball"):
        found = check_convergence_rate(risk, method=method, seed=problem.seed, time_limit=_SECONDS)
        problem.results[method] = found
        yield _named(found, _WHERE)


@statement("T15", _T15)
def check_preconditioned_descent(problem: Problem) -> Iterator[Check]:
    """T15 on the same problem: a fixed `P`, running statistics, and what they gain."""
    made = _embedded(problem)
    P = bnp_preconditioner(made.solved)
    fixed = check_convergence_rate(made.risk, P, seed=problem.seed, time_limit=_SECONDS)
    yield dataclasses.replace(_named(fixed, f"{_WHERE}, fixed P of BNP"), source="T15")
    running = check_convergence_rate(made.risk, method="bnp", seed=problem.seed, time_limit=_SECONDS)
    yield _named(running, _WHERE)
    plain = problem.results.get("gd") or check_convergence_rate(made.risk, seed=problem.seed, time_limit=_SECONDS)
    if plain.holds is None or running.holds is None:
        slow = next(one for one in (plain, running) if one.holds is None)
        yield Check.not_applicable(f"{_GAIN} [{_WHERE}]", "T15", slow.reason)
        return
    yield Check.compare(
        f"{_GAIN} [{_WHERE}]",
        "T15",
        observed=plain.observed / running.observed,
        predicted=plain.predicted / running.predicted,
        tolerance=plain.tolerance + running.tolerance,
        details={"kappa* without P": plain.kappa, "kappa* with P": running.kappa},
    )


def rates_of(
    risk: EmpiricalRisk, preconditioner: Preconditioner | None = None, *, seed: int = 0, time_limit: float = 60.0
) -> Iterator[Check]:
    """Rates on a user's own risk: gradient descent, heavy ball, BNP; and gradient descent with a given `P`.

    Args:
        risk: the empirical risk, in float64.
        preconditioner: a fixed `P` to try as well.
        seed: of the perturbations.
        time_limit: seconds for each.

    Returns:
        The checks, *not applicable* with the reason where no rate can be predicted or observed.
    """
    for method in ("gd", "heavy_ball", "bnp"):
        yield _named(check_convergence_rate(risk, method=method, seed=seed, time_limit=time_limit), "this network")
    if preconditioner is not None:
        found = check_convergence_rate(risk, preconditioner, seed=seed, time_limit=time_limit)
        yield dataclasses.replace(_named(found, "this network, the given P"), source="T15")
