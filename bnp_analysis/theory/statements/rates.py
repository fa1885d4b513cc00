"""Rates inside `check_theory`: on problems with a known minimizer (Theorem 1, T14, T15), and on a user's if asked."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor

from bnp_analysis.curvature import hessian
from bnp_analysis.linalg import Preconditioner
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.network.batches import Batch
from bnp_analysis.precondition import bnp_preconditioner
from bnp_analysis.theory import problems
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.rates.convergence import ConvergenceCheck, check_convergence_rate
from bnp_analysis.theory.rates.formulas import best_step
from bnp_analysis.theory.rates.limit_point import measure
from bnp_analysis.theory.rates.minimizer import find_minimizer, gradient_floor
from bnp_analysis.theory.rates.nearest import Orbit, contraction
from bnp_analysis.theory.rates.neighbourhood import KINK, remainder, roughness
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.generators import logit_shifts, rescalings
from bnp_analysis.theory.statements.rewriting import rewritten
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, statement

_EVERY = "every step of gradient descent contracts the distance to the nearest rescaling by r + eps"
_T14 = "gradient descent and heavy ball contract as the spectrum at the limit point says"
_T15 = "BNP contracts as the spectrum of P^T Hess P at the limit point says"
_GAIN = "BNP is faster than gradient descent by the ratio of the predicted rates"
_WHERE = "teacher-student network on digits"
_KAPPA = 300.0
_SECONDS = 60.0
_RADIUS = 0.1  # of 1/kappa*, in lengths of the minimizer
_STEPS = 25


def _embedded(problem: Problem) -> problems.KnownProblem:
    return problems.teacher_student((4, 3, 2), kappa=_KAPPA, n=60, seed=problem.seed)


def _named(found: ConvergenceCheck, where: str) -> ConvergenceCheck:
    kappa = f", kappa* {found.kappa:.4g}" if math.isfinite(found.kappa) else ""
    return dataclasses.replace(found, statement=f"{found.statement} [{where}{kappa}]")


@statement(Source.THEOREM_1, _EVERY)
def check_every_step(problem: Problem) -> Iterator[Check]:
    """Theorem 1 on teacher-student networks of one and two hidden layers, squared loss and softmax.

    Their seeds are such that the null space is the tangent space: units that are never on one side of their kink for
    all data. It is verified, not assumed.
    """
    for where, risk in _teachers(problem.seed):
        yield from every_step(Problem(risk, seed=problem.seed), where)


def _teachers(seed: int) -> Iterator[tuple[str, EmpiricalRisk]]:
    for widths in ((4, 3, 2), (3, 3, 3, 2)):
        shape = "-".join(map(str, widths))
        solved = problems.teacher_student(widths, n=60, seed=seed).solved
        yield f"teacher-student {shape}, squared loss", solved
        if len(widths) == 3:
            batch = next(iter(solved.batches))
            soft = Batch(batch.x, solved.outputs.softmax(dim=1), batch.count, 0)
            yield (
                f"teacher-student {shape}, softmax: with the shifts of all logits",
                rewritten(solved, batches=[soft], loss=torch.nn.functional.cross_entropy),
            )


def every_step(problem: Problem, where: str) -> Iterator[Check]:
    """Theorem 1 at a minimizer: the tangent space is null, and every step contracts by `r + eps`.

    With `theta*_k` the nearest point, the displacement lies in the range of the Hessian there, so that
    `|theta_{k+1} - theta*_k| <= (r + eps_k) |theta_k - theta*_k|` with `eps_k` the step times what the gradient has
    beside its linear part, over the distance; and the next nearest point is no farther. So `eps_k` is measured.

    Args:
        problem: its risk at a minimizer, in float64.
        where: in words.

    Returns:
        The checks, *not applicable* with the reason where a hypothesis fails.

    Source: Lange, Helfrich and Ye 2022, Theorem 1 (p. 7, 27).
    """
    risk = problem.risk
    orbit = Orbit(risk.theta, rescalings(problem), logit_shifts(problem))
    try:
        yield from _every_step(problem, orbit, where)
    except NotApplicable as refusal:
        yield Check.not_applicable(f"{_EVERY} [{where}]", Source.THEOREM_1, str(refusal))


def _every_step(problem: Problem, orbit: Orbit, where: str) -> Iterator[Check]:
    risk = problem.risk
    problem.require_size(risk.space.dim)
    spectrum = measure(risk, None)
    floor = gradient_floor(risk)
    if not len(spectrum.values) or spectrum.negative:
        raise NotApplicable("the Hessian is zero, or has a negative eigenvalue: no minimizer")
    if float(risk.gradient.norm()) > max(1e3 * floor, 1e-12 * spectrum.largest):
        raise NotApplicable(f"no minimizer: |grad| {float(risk.gradient.norm()):.2g}, rounding {floor:.2g}")
    hessian_there = _symmetric(hessian(risk).to_dense())
    tangent = orbit.tangent(torch.zeros_like(orbit.exponents[0]))
    if tangent.shape[1]:
        images = (hessian_there @ tangent).norm(dim=0) / tangent.norm(dim=0)
        yield Check.compare(
            f"the null space of the Hessian contains the tangent space [{where}]",
            Source.THEOREM_1,
            observed=float(images.max()) / spectrum.largest,
            predicted=1e-10,
            tolerance=0.0,
            relation="<=",
            hypotheses={"a minimizer": True, "positively scale-invariant": True},
            details={"tangent vectors": tangent.shape[1]},
        )
    dimension = int(torch.linalg.matrix_rank(tangent)) if tangent.shape[1] else 0
    if spectrum.unresolved or spectrum.null_dim != dimension:
        raise NotApplicable(
            f"the null space is not the tangent space: {spectrum.null_dim} dimensions, {dimension} of rescalings"
            f"{' and logit shifts' if orbit.shifts.shape[1] else ''}, {spectrum.unresolved} eigenvalues unresolved; "
            + "; ".join(f"{cause}: {count}" for cause, count in spectrum.sources.items())
        )
    radius = _RADIUS / spectrum.kappa * float(risk.theta.norm())
    found = remainder(risk, None, spectrum, radius, floor)
    if found.kink > KINK:
        raise NotApplicable(roughness(risk, found.kink, found.nonlinear))
    runs = {}
    alpha = best_step(spectrum.largest, spectrum.smallest)
    for d in (radius, radius / 10):
        runs[d] = [
            contraction(risk, orbit, hessian_there, len(spectrum.values), alpha, risk.theta + d * v, _STEPS)
            for end in (0, -1)
            for v in (spectrum.vectors[:, end], -spectrum.vectors[:, end])
        ]
    hypotheses = {"null space = tangent space": True, "a minimizer": True, "no kink within the ball": True}
    far, near = (max(run.excess for run in runs[d]) for d in runs)
    details = {
        "r": runs[radius][0].factors[0],
        "kappa*": spectrum.kappa,
        "null dimension": dimension,
        "distance": radius,
        "eps over the distance": near / (radius / 10),
        "steps": sum(len(run.ratios) for d in runs for run in runs[d]),
    }
    yield Check.compare(
        f"{_EVERY}: the largest ratio over r + eps [{where}]",
        Source.THEOREM_1,
        observed=max(
            ratio / (r + eps)
            for d in runs
            for run in runs[d]
            for ratio, r, eps in zip(run.ratios, run.factors, run.remainders, strict=True)
        ),
        predicted=1.0,
        tolerance=1e-9,
        relation="<=",
        hypotheses=hypotheses,
        details=details,
    )
    yield Check.compare(
        f"eps shrinks like the distance: the slope in logarithms [{where}]",
        Source.THEOREM_1,
        observed=math.log10(far / near) if near > 0 and far > 0 else math.nan,
        predicted=1.0,
        tolerance=0.05,
        hypotheses=hypotheses,
        reason="without eps the statement is false" if near > 0 else "",
        details=details,
    )


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


@statement(Source.T14, _T14)
def check_descent(problem: Problem) -> Iterator[Check]:
    """T14 on an embedded problem with zero residual and a known null dimension."""
    risk = _embedded(problem).risk
    for method in ("gd", "heavy_ball"):
        found = check_convergence_rate(risk, method=method, seed=problem.seed, time_limit=_SECONDS)
        problem.results[method] = found
        yield _named(found, _WHERE)


@statement(Source.T15, _T15)
def check_preconditioned_descent(problem: Problem) -> Iterator[Check]:
    """T15 on the same problem: a fixed `P`, running statistics, and what they gain."""
    made = _embedded(problem)
    P = bnp_preconditioner(made.solved)
    fixed = check_convergence_rate(made.risk, P, seed=problem.seed, time_limit=_SECONDS)
    yield _named(fixed, f"{_WHERE}, fixed P of BNP")
    running = check_convergence_rate(made.risk, method="bnp", seed=problem.seed, time_limit=_SECONDS)
    yield _named(running, _WHERE)
    plain = problem.results.get("gd") or check_convergence_rate(made.risk, seed=problem.seed, time_limit=_SECONDS)
    if plain.holds is None or running.holds is None:
        slow = next(one for one in (plain, running) if one.holds is None)
        yield Check.not_applicable(f"{_GAIN} [{_WHERE}]", Source.T15, slow.reason)
        return
    yield Check.compare(
        f"{_GAIN} [{_WHERE}]",
        Source.T15,
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
    minimizer = find_minimizer(risk, seed=seed, deadline=time.monotonic() + time_limit)
    if minimizer.attained:
        yield from every_step(Problem(risk.at(minimizer.theta), seed=seed), "this network")
    else:
        yield Check.not_applicable(f"{_EVERY} [this network]", Source.THEOREM_1, minimizer.reason)
    for method in ("gd", "heavy_ball", "bnp"):
        yield _named(check_convergence_rate(risk, method=method, seed=seed, time_limit=time_limit), "this network")
    if preconditioner is not None:
        found = check_convergence_rate(risk, preconditioner, seed=seed, time_limit=time_limit)
        yield _named(found, "this network, the given P")
