"""The method inverse-lanczos: matrix-free bounds on both ends by an inner conjugate gradient (T13)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NotConvexError
from bnp_analysis.linalg.bases import project_out
from bnp_analysis.linalg.condition.certificates import invariance_slack, kuczynski_wozniakowski
from bnp_analysis.linalg.condition.lanczos import conditioned, lanczos_instead
from bnp_analysis.linalg.condition.methods import Method, Price, Problem, register
from bnp_analysis.linalg.condition.number import Extremes
from bnp_analysis.linalg.krylov.lanczos import lanczos
from bnp_analysis.linalg.matrices import CallableOperator, Columns
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.scale import comfortable, times_power

# Lanczos steps on the pseudo-inverse: its top end stands apart, few are enough.
_OUTER = 24
# Products that one inner solve may take.
_INNER = 5_000


@dataclass
class _Solver:
    """Conjugate gradients for `B x = b` on the complement of the null space, re-projected at every step."""

    B: SymmetricOperator
    null: Columns
    tolerance: float
    limit: int
    floor: float
    products: int = 0
    worst: float = 0.0
    failed: str = ""

    def __call__(self, b: Tensor) -> Tensor:
        # Squares of what is far from 1 leave the floats.
        b, power = comfortable(self._clean(b.double()))
        x, r = torch.zeros_like(b), b.clone()
        p, rr, size = r.clone(), float(r @ r), float(b.norm())
        for _ in range(self.limit):
            if math.sqrt(rr) <= self.tolerance * size or self.failed:
                break
            image = self._clean((self.B @ p.to(self.B.dtype)).double())
            self.products += 1
            curvature = float(p @ image)
            if not curvature > self.floor * float(p @ p):
                quotient = curvature / float(p @ p)
                self.failed = f"a direction of curvature {quotient:.2g} was met, rounding explains {self.floor:.2g}"
                break
            step = rr / curvature
            x, r = x + step * p, self._clean(r - step * image)
            following = float(r @ r)
            p, rr = r + (following / rr) * p, following
        # The recursive residual drifts; the true one is what the bound needs.
        true = float((b - self._clean((self.B @ x.to(self.B.dtype)).double())).norm()) / size
        self.products += 1
        self.worst = max(self.worst, true)
        if true > math.sqrt(self.tolerance) and not self.failed:
            self.failed = f"an inner solve stopped at relative residual {true:.2g} after {self.limit} products"
        return times_power(x, -power).to(self.B.dtype)

    def _clean(self, v: Tensor) -> Tensor:
        return project_out(v.unsqueeze(1), self.null.to(torch.float64)).squeeze(1)


def inverse_lanczos(problem: Problem) -> Extremes:
    """Bounds of `lambda_max` from Lanczos on `B`, of `1/lambda_min+` from Lanczos on its pseudo-inverse.

    Both ends by Kuczynski and Wozniakowski, each with half of the failure probability; an inner residual `rho` adds
    the relative perturbation `2 rho sqrt(k)` to the second. Where an inner solve does not converge, what Lanczos alone
    allows is returned with the reason.
    """
    A, null, steps, seed = problem.A, problem.null, problem.krylov_steps, problem.seed
    if not null.complete:
        raise InvalidInputError(
            "inverse-lanczos inverts the operator, so its whole null space must be declared, by a tensor: (n, 0) for a "
            "nonsingular operator, null_directions(risk).basis where you know that nothing is missing"
        )
    B, basis, noise, checks = conditioned(problem)
    dim = A.dim - null.dim
    top_run = lanczos(B, min(steps, dim), seed=seed, null=basis)
    if top_run.stop == "interrupted":
        raise KeyboardInterrupt
    values, _ = top_run.ritz()
    unit = A.eps
    if values[0] < -noise * float(np.abs(values).max()):
        raise NotConvexError(f"the operator is indefinite: Ritz value {values[0]:.4g}; use magnitude_condition_number")
    top = float(values[-1])
    floor = noise * top
    solve = _Solver(B, basis, max(1e-12, 100 * unit), _INNER, floor)
    inverse = CallableOperator(solve, A.dim, dtype=A.dtype, device=A.device, eps=unit)
    run = lanczos(
        inverse,
        min(_OUTER, dim),
        seed=seed + 1,
        null=basis,
        until=lambda _: bool(solve.failed),
        progress=problem.progress,
    )
    spent = top_run.matvecs + solve.products + checks
    if solve.failed:
        problem = replace(problem, checkpoint=None, progress=False)
        return lanczos_instead(problem, "inverse-lanczos", solve.failed, spent)
    # Two ends, and two bounds of each.
    chance = problem.failure_probability / 4
    high, _ = kuczynski_wozniakowski(float(values[-1]), min(float(values[0]), 0.0), len(top_run.alpha), dim, chance)
    theta = float(np.max(run.ritz()[0]))
    raw, _ = kuczynski_wozniakowski(theta, 0.0, len(run.alpha), dim, chance)
    # An invariant space of a random start holds both ends, up to its residual.
    high = min(high, top + invariance_slack(top_run.residual_norm + floor, dim, chance))
    raw = min(raw, theta + invariance_slack(run.residual_norm + theta * (solve.worst + floor / top), dim, chance))
    slack = 2 * solve.worst * math.sqrt(len(run.alpha))
    inverse_high = raw / (1 - slack) if slack < 1 else math.inf
    bottom = 1 / theta
    lower = (top - floor) / (bottom / (1 - slack) + floor) if slack < 1 else math.nan
    # The noise of the products hides eigenvalues below the floor.
    trusted = math.isfinite(high) and math.isfinite(inverse_high) and 1 / inverse_high > floor
    return Extremes(
        lambda_max=top,
        lambda_min=bottom,
        lower=lower,
        upper=(high + floor) / (1 / inverse_high - floor) if trusted else math.inf,
        noise_floor=floor,
        failure_probability=problem.failure_probability,
        matvecs=spent,
        stop=run.stop,
        note=""
        if trusted
        else f"after {len(top_run.alpha)} and {len(run.alpha)} steps the bound of Kuczynski and "
        "Wozniakowski is still infinite, or lambda_min+ is below the noise of a product",
    )


def _solve(problem: Problem) -> Extremes:
    inner = problem.scaled()
    return inner.in_units(inverse_lanczos(inner))


def _price(A: SymmetricOperator, steps: int) -> Price:
    return Price(math.nan, 8 * (steps + 30) * A.dim, 4.0 * steps**2 * A.dim)


INVERSE_LANCZOS = register(
    Method(
        name="inverse-lanczos",
        claim="both sides but for a stated probability; needs the whole null space, and inner solves that converge",
        price=_price,
        solve=_solve,
        order=50,
    )
)
