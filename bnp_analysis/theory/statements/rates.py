"""Rates: Theorem 1 step by step, T14 and T15 on problems with a known minimizer or a user's."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnp_analysis.curvature import hessian
from bnp_analysis.linalg import Preconditioner
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.network.batches import Batch
from bnp_analysis.precondition import bnp_preconditioner
from bnp_analysis.theory import problems
from bnp_analysis.theory.check import Check, Source
from bnp_analysis.theory.convergence import ConvergenceCheck, check_convergence_rate, gain
from bnp_analysis.theory.limit_point import KINK, find_minimizer, measure, remainder, roughness
from bnp_analysis.theory.rates import best_step
from bnp_analysis.theory.statements.setting import (
    NotApplicable,
    Problem,
    at_most,
    attempted,
    equals,
    located,
    refused,
    rewritten,
    signed,
    statement,
)
from bnp_analysis.theory.statements.symmetry import logit_shifts, rescalings

_EVERY = "every step of gradient descent contracts the distance to the nearest rescaling by r + eps"
_T14 = "gradient descent and heavy ball contract as the spectrum at the limit point says"
_T15 = "BNP contracts as the spectrum of P^T Hess P at the limit point says"
_WHERE = "teacher-student network on digits"
_WIDTHS, _KAPPA = (4, 3, 2), 300.0
_SECONDS = 60.0
_RADIUS = 0.1  # of 1/kappa*, in lengths of the minimizer
_STEPS = 25
_UNIT = float(torch.finfo(torch.float64).eps)
_ROUNDING = 1e4  # a distance of so many roundings is known to four digits


@dataclass(frozen=True, eq=False)
class Orbit:
    """The points `theta* t^E + B c`, `t > 0`: rescalings of units, and shifts of all logits where the loss has them.

    Attributes:
        origin: `theta*`, `(n,)`.
        exponents: `E`, `(n, u)`: 1 for what comes into a unit, -1 for what goes out, 0 elsewhere.
        shifts: `B`, `(n, c)`, orthonormal columns.
    """

    origin: Tensor
    exponents: Tensor
    shifts: Tensor

    def scales(self, log_t: Tensor) -> Tensor:
        """The diagonal of the rescaling, `t^E`."""
        return (self.exponents @ log_t).exp()

    def tangent(self, log_t: Tensor) -> Tensor:
        """Tangent vectors at a point, `(n, u + c)`."""
        return torch.cat([(self.scales(log_t) * self.origin)[:, None] * self.exponents, self.shifts], dim=1)

    def _across(self, x: Tensor) -> Tensor:
        return x - self.shifts @ (self.shifts.T @ x)

    def nearest(self, theta: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest point, by Newton's method for least squares in `log t`; shifts are projected out.

        Args:
            theta: `(n,)`, near the manifold.
            log_t: where to begin, `(u,)`.

        Returns:
            `log t`, and the point.
        """
        for _ in range(50):
            x = self.scales(log_t) * self.origin
            J, rest = x[:, None] * self.exponents, self._across(x - theta)
            across = self._across(J)
            H = J.T @ across + self.exponents.T @ ((x * rest)[:, None] * self.exponents)
            step = torch.linalg.solve(H, J.T @ rest)
            log_t = log_t - step
            if not bool((step.abs() > 4 * _UNIT).any()):  # nothing is scaled, or nothing is left to do
                break
        x = self.scales(log_t) * self.origin
        return log_t, x + self.shifts @ (self.shifts.T @ (theta - x))


@dataclass
class Contraction:
    """A run of gradient descent, seen from the manifold.

    Attributes:
        ratios: `|theta_{k+1} - theta*_{k+1}| / |theta_k - theta*_k|`.
        factors: `r` with the eigenvalues at `theta*_k`.
        remainders: `alpha |grad L(theta_k) - Hess(theta*_k) (theta_k - theta*_k)| / |theta_k - theta*_k|`.
        roundings: of the ratios.
    """

    ratios: list[float] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    remainders: list[float] = field(default_factory=list)
    roundings: list[float] = field(default_factory=list)

    @property
    def excess(self) -> float:
        """The smallest `eps` for which every step has ratio at most `r + eps`."""
        return self._largest[0]

    @property
    def resolved(self) -> bool:
        """Whether it stands above rounding."""
        excess, rounding = self._largest
        return excess > 100 * rounding

    @property
    def _largest(self) -> tuple[float, float]:
        steps = zip(self.ratios, self.factors, self.roundings, strict=True)
        return max((ratio - r, rounding) for ratio, r, rounding in steps)

    @property
    def worst(self) -> float:
        """The largest ratio over `r + eps_k`, `eps_k` from the measured remainder."""
        steps = zip(self.ratios, self.factors, self.remainders, strict=True)
        return max(ratio / (r + eps) for ratio, r, eps in steps)


def contraction(
    risk: EmpiricalRisk, orbit: Orbit, hessian: Tensor, rank: int, alpha: float, start: Tensor, steps: int
) -> Contraction:
    """Run gradient descent and compare every step with the spectrum at the nearest point.

    Args:
        risk: any point.
        orbit: of a minimizer.
        hessian: `(n, n)`, at its origin; elsewhere on the orbit it is `t^-E Hess t^-E`.
        rank: of the Hessian.
        alpha: the step.
        start: `(n,)`.
        steps: at most; fewer where rounding comes first.

    Returns:
        What every step did.

    Source: Lange, Helfrich and Ye 2022, Theorem 1 (p. 7, 27).
    """
    theta, found = start, Contraction()
    log_t, point = orbit.nearest(theta, torch.zeros_like(orbit.exponents[0]))
    distance = float((theta - point).norm())
    for _ in range(steps):
        scales = 1 / orbit.scales(log_t)
        there = scales[:, None] * hessian * scales
        values = torch.linalg.eigvalsh(there)
        gradient = risk.at(theta).gradient
        rest = float((gradient - there @ (theta - point)).norm())
        theta = theta - alpha * gradient
        log_t, point = orbit.nearest(theta, log_t)
        new = float((theta - point).norm())
        if new < _ROUNDING * _UNIT * float(theta.norm()):
            break
        found.ratios.append(new / distance)
        found.factors.append(max(abs(1 - alpha * float(values[-rank])), abs(1 - alpha * float(values[-1]))))
        found.remainders.append(alpha * rest / distance)
        found.roundings.append(_UNIT * float(theta.norm()) / distance)
        distance = new
    return found


@statement(Source.THEOREM_1, _EVERY)
def check_every_step(problem: Problem) -> Iterator[Check]:
    """Theorem 1 on teacher-student networks of one and two hidden layers, squared loss and softmax.

    Their seeds are such that the null space is the tangent space: units that are never on one side of their kink for
    all data. It is verified, not assumed.
    """
    for where, risk in teachers(problem.seed):
        yield from every_step(Problem(risk, seed=problem.seed), where)


def teachers(seed: int) -> Iterator[tuple[str, EmpiricalRisk]]:
    """The problems of Theorem 1 with their names."""
    for widths in ((4, 3, 2), (3, 3, 3, 2)):
        shape = "-".join(map(str, widths))
        solved = problems.teacher_student(widths, n=60, seed=seed).solved
        yield f"teacher-student {shape}, squared loss", solved
        if len(widths) == 3:
            batch = next(iter(solved.batches))
            soft = [Batch(batch.x, solved.outputs.softmax(dim=1), batch.count, 0)]
            made = rewritten(solved, batches=soft, loss=torch.nn.functional.cross_entropy)
            yield f"teacher-student {shape}, softmax: with the shifts of all logits", made


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
    orbit = Orbit(problem.risk.theta, rescalings(problem), logit_shifts(problem))
    yield from signed(Source.THEOREM_1, located(where, attempted(_EVERY, _every_step(problem, orbit))))


def _every_step(problem: Problem, orbit: Orbit) -> Iterator[Check]:
    risk = problem.risk
    problem.require_size(risk.space.dim)
    spectrum = measure(risk, None)
    if not len(spectrum.values) or spectrum.negative:
        raise NotApplicable("the Hessian is zero, or has a negative eigenvalue: no minimizer")
    if float(risk.gradient.norm()) > max(1e3 * spectrum.floor, 1e-12 * spectrum.largest):
        raise NotApplicable(f"no minimizer: |grad| {float(risk.gradient.norm()):.2g}, rounding {spectrum.floor:.2g}")
    H = hessian(risk).to_dense()
    H = (H + H.T) / 2
    tangent, dimension = orbit.tangent(torch.zeros_like(orbit.exponents[0])), 0
    if tangent.shape[1]:
        dimension = int(torch.linalg.matrix_rank(tangent))
        images = (H @ tangent).norm(dim=0) / tangent.norm(dim=0)
        yield at_most(
            "the null space of the Hessian contains the tangent space",
            float(images.max()) / spectrum.largest,
            1e-10,
            given=("a minimizer", "positively scale-invariant"),
            details={"tangent vectors": tangent.shape[1]},
        )
    if spectrum.unresolved or spectrum.null_dim != dimension:
        raise NotApplicable(
            f"the null space is not the tangent space: {spectrum.null_dim} dimensions, {dimension} of rescalings"
            f"{' and logit shifts' if orbit.shifts.shape[1] else ''}, {spectrum.unresolved} eigenvalues unresolved; "
            + "; ".join(f"{cause}: {count}" for cause, count in spectrum.sources.items())
        )
    radius = _RADIUS / spectrum.kappa * float(risk.theta.norm())
    found = remainder(spectrum, radius)
    if found.kink > KINK:
        raise NotApplicable(roughness(risk, found.kink, found.nonlinear))
    alpha, rank = best_step(spectrum.largest, spectrum.smallest), len(spectrum.values)
    ends = [sign * spectrum.vectors[:, end] for end in (0, -1) for sign in (1, -1)]
    far_runs, near_runs = (
        [contraction(risk, orbit, H, rank, alpha, risk.theta + d * v, _STEPS) for v in ends]
        for d in (radius, radius / 10)
    )
    if not all(run.ratios for run in (*far_runs, *near_runs)):
        raise NotApplicable(f"kappa* is {spectrum.kappa:.6g}: a step or two end at the minimizer, to rounding")
    farthest, nearest = (max(runs, key=lambda run: run.excess) for runs in (far_runs, near_runs))
    far, near = farthest.excess, nearest.excess
    given = ("null space = tangent space", "a minimizer", "no kink within the ball")
    details = {
        "r": far_runs[0].factors[0],
        "kappa*": spectrum.kappa,
        "null dimension": dimension,
        "distance": radius,
        "eps over the distance": near / (radius / 10),
        "steps": sum(len(run.ratios) for run in (*far_runs, *near_runs)),
    }
    worst = max(run.worst for run in (*far_runs, *near_runs))
    words = f"{_EVERY}: the largest ratio over r + eps"
    yield at_most(words, worst, 1.0, tolerance=1e-9, given=given, details=details)
    words = "eps shrinks like the distance: the slope in logarithms"
    if not (farthest.resolved and nearest.resolved):
        yield refused(words, "eps is rounding: the risk is quadratic here, to its digits", details=details)
        return
    yield equals(
        words,
        math.log10(far / near),
        1.0,
        tolerance=0.05,
        given=given,
        reason="without eps the statement is false",
        details=details,
    )


def _embedded(problem: Problem) -> problems.KnownProblem:
    return problems.teacher_student(_WIDTHS, kappa=_KAPPA, n=60, seed=problem.seed)


def _named(found: ConvergenceCheck, where: str) -> ConvergenceCheck:
    kappa = f", kappa* {found.kappa:.4g}" if math.isfinite(found.kappa) else ""
    return dataclasses.replace(found, statement=f"{found.statement} [{where}{kappa}]")


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
    yield from located(_WHERE, [gain(plain, running, tolerance=plain.tolerance + running.tolerance)])


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
        yield refused(f"{_EVERY} [this network]", minimizer.reason, source=Source.THEOREM_1)
    for method in ("gd", "heavy_ball", "bnp"):
        yield _named(check_convergence_rate(risk, method=method, seed=seed, time_limit=time_limit), "this network")
    if preconditioner is not None:
        found = check_convergence_rate(risk, preconditioner, seed=seed, time_limit=time_limit)
        yield _named(found, "this network, the given P")
