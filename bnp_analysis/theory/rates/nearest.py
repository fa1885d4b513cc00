"""Theorem 1 step by step: the distance to the nearest point of the manifold of rescalings."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bnp_analysis.network.risk import EmpiricalRisk

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
            if float(step.abs().max()) <= 4 * _UNIT:
                break
        x = self.scales(log_t) * self.origin
        return log_t, x + self.shifts @ (self.shifts.T @ (theta - x))


@dataclass
class Contraction:
    """A run of gradient descent, seen from the manifold.

    Attributes:
        start: the distance at the start.
        ratios: `|theta_{k+1} - theta*_{k+1}| / |theta_k - theta*_k|`.
        factors: `r` with the eigenvalues at `theta*_k`.
        remainders: `alpha |grad L(theta_k) - Hess(theta*_k) (theta_k - theta*_k)| / |theta_k - theta*_k|`.
    """

    start: float
    ratios: list[float] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)
    remainders: list[float] = field(default_factory=list)

    @property
    def excess(self) -> float:
        """The smallest `eps` for which every step has ratio at most `r + eps`."""
        return max(ratio - r for ratio, r in zip(self.ratios, self.factors, strict=True))


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
    theta = start
    log_t, point = orbit.nearest(theta, torch.zeros_like(orbit.exponents[0]))
    found = Contraction(float((theta - point).norm()))
    distance = found.start
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
        distance = new
    return found
