"""Find the minimizer that a rate speaks of, to the rounding floor of its gradient; or say that there is none."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

from bnp_analysis.curvature.hessian import hessian
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.results import Result

_UNIT = float(torch.finfo(torch.float64).eps)
#: A Newton step below this, relative to the point, means that the point is known to about eight digits.
_CLOSE = 1e-8
_NEWTON_STEPS = 200


@dataclass(frozen=True, kw_only=True, repr=False)
class Minimizer(Result):
    """Where the search ended.

    Attributes:
        theta: the point `(n,)`.
        value: the risk there.
        gradient_norm: `|grad|` there.
        floor: what rounding alone makes of `|grad|` near it.
        newton_step: length of the next Newton step on the range of the Hessian, relative to `|theta|`.
        attained: whether this is a critical point to rounding.
        reason: if not, what was seen.
        history: rows `(loss, |grad|, |theta|)`, before and after L-BFGS and after each Newton step.
    """

    theta: Tensor
    value: float
    gradient_norm: float
    floor: float
    newton_step: float
    attained: bool
    reason: str
    history: tuple[tuple[float, float, float], ...]

    def summary(self) -> str:
        """Attained or not, and how well."""
        if not self.attained:
            return f"no minimizer: {self.reason}"
        return (
            f"minimizer with loss {self.value:.6g}, |grad| {self.gradient_norm:.2g} (rounding {self.floor:.2g}), "
            f"Newton step {self.newton_step:.1g} relative"
        )


def gradient_floor(risk: EmpiricalRisk, preconditioner: Preconditioner | None = None, *, seed: int = 0) -> float:
    """What rounding alone makes of `|P^T grad|` at a critical point: its change under rounding-size perturbations.

    Args:
        risk: at the point.
        preconditioner: `P`, the identity by default.
        seed: of the perturbations.

    Returns:
        The largest `|P^T (grad(theta + d) - grad(theta))|` over four random `d` of one unit in the last place.
    """
    g = torch.Generator().manual_seed(seed)
    theta, base = risk.theta, risk.gradient
    mean = float(theta.norm()) / theta.numel() ** 0.5
    size = theta.abs() + (mean if mean > 0 else 1.0)
    found = []
    for _ in range(4):
        noise = torch.randn(theta.shape, generator=g, dtype=torch.float64).to(theta)
        change = risk.at(theta + _UNIT * size * noise).gradient - base
        found.append(float((change if preconditioner is None else preconditioner.apply_transpose(change)).norm()))
    return max(found)


def find_minimizer(risk: EmpiricalRisk, *, seed: int = 0, deadline: float = math.inf) -> Minimizer:
    """Descend from the risk's point to a critical point, until the gradient is at the rounding floor.

    L-BFGS first; then Newton steps with the eigenvalues' magnitudes, damped as by Levenberg and Marquardt, on the range
    of the Hessian. The point is accepted when the *Newton step* vanishes. A small gradient is not enough: where the
    minimizer is at infinity (cross-entropy on separable data) gradient and curvature vanish together and the Newton
    step keeps its length.

    Args:
        risk: in float64; small enough for a dense Hessian.
        seed: of the perturbations that measure the floor.
        deadline: `time.monotonic()` after which to stop.

    Returns:
        A `Minimizer`; `attained=False` with the reason where there is none, or none was reached.

    Source: T14.

    Example:
        >>> import bnp_analysis as bnp
        >>> x, y = torch.eye(3, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
        >>> model = torch.nn.Linear(3, 1, dtype=torch.float64)
        >>> found = find_minimizer(bnp.EmpiricalRisk(model, torch.nn.functional.mse_loss, (x, y)))
        >>> found.attained, found.value < 1e-25
        (True, True)
    """
    began = time.perf_counter()
    history = [_row(risk)]
    here = risk
    if history[0][1] > 100 * gradient_floor(risk, seed=seed):
        here = _lbfgs(risk)
        history.append(_row(here))
    here, newton, products = _newton(here, history, deadline)
    floor = gradient_floor(here, seed=seed)
    norm = float(here.gradient.norm())
    attained = newton <= _CLOSE and norm <= max(1e3 * floor, _UNIT)
    return Minimizer(
        theta=here.theta,
        value=float(here.value),
        gradient_norm=norm,
        floor=floor,
        newton_step=newton,
        attained=attained,
        reason="" if attained else _why(history, newton, floor, deadline),
        history=tuple(history),
        seed=seed,
        matvecs=products,
        seconds=time.perf_counter() - began,
    )


def _row(risk: EmpiricalRisk) -> tuple[float, float, float]:
    return float(risk.value), float(risk.gradient.norm()), float(risk.theta.norm())


def _lbfgs(risk: EmpiricalRisk) -> EmpiricalRisk:
    def objective(x: Any) -> Any:
        there = risk.at(torch.from_numpy(x.copy()))
        return float(there.value), there.gradient.cpu().numpy()

    options: Any = {"maxiter": 3000, "maxfun": 6000, "maxcor": 30, "ftol": 0.0, "gtol": 0.0}
    found = minimize(objective, risk.theta.cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
    return risk.at(torch.from_numpy(found.x.copy()))


def _newton(
    risk: EmpiricalRisk, history: list[tuple[float, float, float]], deadline: float
) -> tuple[EmpiricalRisk, float, int]:
    """Damped Newton steps until none helps; the point, the relative length of the next step, the products spent."""
    damping, products, newton = 0.0, 0, math.inf
    for _ in range(_NEWTON_STEPS):
        H = hessian(risk).to_dense()
        products += H.shape[0]
        values, vectors = torch.linalg.eigh((H + H.T) / 2)
        scale = float(values.abs().max())
        kept = values.abs() > 100 * len(values) * _UNIT * scale
        along = (vectors.T @ risk.gradient)[kept]
        sizes, vectors = values[kept].abs(), vectors[:, kept]
        # From the origin, where nothing has a size, lengths are absolute.
        length = max(float(risk.theta.norm()), 0.0 if history[0][2] > 0 else 1.0)
        newton = float((along / sizes).norm()) / length if len(sizes) else 0.0
        if time.monotonic() > deadline:
            break
        for _attempt in range(14):
            there = risk.at(risk.theta - vectors @ (along / (sizes + damping * scale)))
            if _better(there, risk):
                damping = damping / 10 if damping > 1e-11 else 0.0
                break
            damping = max(10 * damping, 1e-10)
        else:
            break
        risk = there
        history.append(_row(risk))
    return risk, newton, products


def _better(there: EmpiricalRisk, here: EmpiricalRisk) -> bool:
    """Lower; or as low to rounding, with half the gradient."""
    new, old = float(there.value), float(here.value)
    if not math.isfinite(new):
        return False
    if new < old * (1 - 1e-12) if old > 0 else new < old:
        return True
    return new <= old + 16 * _UNIT * abs(old) and float(there.gradient.norm()) < 0.5 * float(here.gradient.norm())


def _why(history: list[tuple[float, float, float]], newton: float, floor: float, deadline: float) -> str:
    (loss, grad, size), (last_loss, last_grad, last_size) = history[0], history[-1]
    seen = (
        f"the loss went from {loss:.3g} to {last_loss:.3g}, |grad| from {grad:.3g} to {last_grad:.3g}, |theta| from "
        f"{size:.3g} to {last_size:.3g}"
    )
    if time.monotonic() > deadline:
        return f"the time limit came first; {seen}"
    if newton > 1e-4 and last_size > 1.2 * size and last_grad < 1e-8 * grad:
        return (
            f"the loss has no attained minimizer here: {seen}, and the Newton step is still {newton:.2g} of |theta|, "
            "as gradient and curvature vanish together. Smooth the labels, or add a penalty to the loss"
        )
    return (
        f"no critical point was reached: {seen}. A descent ends like this at a kink, where the gradient is not zero, "
        "on the way to a singular minimizer, or where what remains of the gradient lies along nearly flat directions; "
        f"Newton step {newton:.2g} of |theta|, rounding alone makes |grad| {floor:.2g}"
    )
