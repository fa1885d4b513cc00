"""The limit point of a rate: the minimizer to rounding, its spectrum, and whether T14 applies there."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.curvature.hessian import hessian
from bnp_analysis.errors import NonFiniteError
from bnp_analysis.linalg.preconditioner import IdentityPreconditioner, Preconditioner
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.results import Result
from bnp_analysis.symmetry import null_directions

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


def given_or_identity(risk: EmpiricalRisk, P: Preconditioner | None) -> Preconditioner:
    """The preconditioner in whose variables `z`, `theta = P z`, an iteration is studied; `I` where none is given."""
    space = risk.space
    return IdentityPreconditioner(space.dim, space.dtype, space.device) if P is None else P


def gradient_floor(risk: EmpiricalRisk, preconditioner: Preconditioner | None = None, *, seed: int = 0) -> float:
    """What rounding alone makes of `|P^T grad|` at a critical point: its change under rounding-size perturbations.

    Where the gradient jumps, at a kink, the smallest perturbation changes it as much as a larger one: that is no
    rounding, which stays far below what perturbations `10^8` times as long do.

    Args:
        risk: at the point.
        preconditioner: `P`, the identity by default.
        seed: of the perturbations.

    Returns:
        The largest `|P^T (grad(theta + d) - grad(theta))|` over four random `d` of one unit in the last place, at most
        `10^-6` of the largest for `10^8 d`.
    """
    g = torch.Generator().manual_seed(seed)
    theta, base, P = risk.theta, risk.gradient, given_or_identity(risk, preconditioner)
    mean = float(theta.norm()) / theta.numel() ** 0.5
    size = _UNIT * (theta.abs() + (mean if mean > 0 else 1.0))
    near, far = list[float](), list[float]()
    for _ in range(4):
        d = size * torch.randn(theta.shape, generator=g, dtype=torch.float64).to(theta)
        for found, step in ((near, d), (far, 1e8 * d)):
            found.append(float(P.apply_transpose(risk.at(theta + step).gradient - base).norm()))
    return min(max(near), 1e-6 * max(far))


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
    from scipy.optimize import minimize

    worse = float(risk.value) + abs(float(risk.value)) + 1.0

    def objective(x: Any) -> Any:
        try:
            there = risk.at(torch.from_numpy(x.copy()))
            return float(there.value), there.gradient.cpu().numpy()
        except NonFiniteError:  # a trial step that overflows; from infinity the next one would not be interpolated
            return worse, torch.zeros(x.shape, dtype=torch.float64).numpy()

    options: Any = {"maxiter": 3000, "maxfun": 6000, "maxcor": 30, "ftol": 0.0, "gtol": 0.0}
    found = minimize(objective, risk.theta.cpu().numpy(), jac=True, method="L-BFGS-B", options=options)
    end = torch.from_numpy(found.x.copy())
    return risk.at(end) if bool(torch.isfinite(end).all()) else risk


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
        # From the origin, where nothing has a size, lengths are absolute; at it, relative to the start.
        length = max(float(risk.theta.norm()), 0.0 if history[0][2] > 0 else 1.0) or history[0][2]
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
    """Lower; or as low to rounding, with half the gradient. What overflows is not."""
    try:
        new, old = float(there.value), float(here.value)
        if new > old + 16 * _UNIT * abs(old):
            return False
        gradient = float(there.gradient.norm())
    except NonFiniteError:
        return False
    lower = new < old * (1 - 1e-12) if old > 0 else new < old
    return lower or gradient < 0.5 * float(here.gradient.norm())


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


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of `B = P^T Hess P` at a point, and which of them are zero.

    Attributes:
        risk, P: the risk at the point, and the preconditioner in whose variables `z`, `theta = P z`, it is studied.
        seed: of the perturbations that measure `floor`.
        values, vectors: the nonzero ones, ascending, `(r,)` and `(n, r)` in the variables `z`.
        null: `(n, n - r)`, orthonormal basis of the rest, in `z`.
        zeros: what was computed in place of the zero eigenvalues.
        noise: eigenvalues below it are rounding.
        negative: the most negative eigenvalue, 0 if none is below `-noise`.
        unresolved: eigenvalues that are neither clearly rounding nor clearly not.
        sources: cause -> null dimensions that symmetries and data explain, verified on this Hessian.
        products: Hessian products spent.
    """

    risk: EmpiricalRisk
    P: Preconditioner
    seed: int
    values: Tensor
    vectors: Tensor
    null: Tensor
    zeros: Tensor
    noise: float
    negative: float
    unresolved: int
    sources: Mapping[str, int]
    products: int

    @cached_property
    def floor(self) -> float:
        """What rounding alone makes of `|P^T grad|` here."""
        return gradient_floor(self.risk, self.P, seed=self.seed)

    @property
    def null_dim(self) -> int:
        return int(self.null.shape[1])

    @property
    def unexplained(self) -> int:
        """Null dimensions without a cause."""
        return self.null_dim - sum(self.sources.values())

    @property
    def largest(self) -> float:
        return float(self.values[-1])

    @property
    def smallest(self) -> float:
        return float(self.values[0])

    @property
    def kappa(self) -> float:
        return self.largest / self.smallest


def measure(risk: EmpiricalRisk, P: Preconditioner | None, *, null: bool = True, seed: int = 0) -> Spectrum:
    """Diagonalize `P^T Hess P` at a risk's point.

    The backward error is measured where it can be: by the asymmetry of the computed Hessian and by what it does to
    verified null directions. An eigenvalue is zero below ten times that, nonzero above a thousand times.

    Args:
        risk: at the point, in float64.
        P: the preconditioner, None for the identity.
        null: whether to look for the causes of the null space.
        seed: of the perturbations that measure the rounding of the gradient.
    """
    P, H = given_or_identity(risk, P), hessian(risk).to_dense()
    slack = float(both_sides(H - H.T, P).norm())
    B = both_sides((H + H.T) / 2, P)
    values, vectors = torch.linalg.eigh((B + B.T) / 2)
    noise = len(values) * _UNIT * float(values.abs().max()) + slack
    sources: Mapping[str, int] = {}
    if null:
        found = null_directions(risk)
        known = P.transport(found.basis)
        if known.shape[1]:
            seen = float((B @ known).norm(dim=0).max())
            if seen <= 1e-6 * float(values.abs().max()):
                noise, sources = max(noise, seen), found.sources
    size = values.abs()
    zero = size <= 10 * noise
    negative = float(values[0]) if float(values[0]) < -1000 * noise else 0.0
    between = ~zero & (size <= 1000 * noise)
    kept = values > 1000 * noise
    return Spectrum(
        risk=risk,
        P=P,
        seed=seed,
        values=values[kept],
        vectors=vectors[:, kept],
        null=vectors[:, zero],
        zeros=values[zero],
        noise=noise,
        negative=negative,
        unresolved=int(between.sum()) + max(0, sum(sources.values()) - int(zero.sum())),
        sources=sources,
        products=H.shape[0],
    )


def both_sides(H: Tensor, P: Preconditioner) -> Tensor:
    """`P^T H P` of a stored matrix."""
    return P._rmatmat(P._rmatmat(H).T)


#: A part of the gradient that is not differentiable, relative to its linear part: above it a kink is near.
KINK = 1e-3
_KINKED = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6, nn.Hardtanh, nn.RReLU, nn.Threshold)


def balanced(spectrum: Spectrum, generator: torch.Generator) -> Tensor:
    """A random unit vector `z` in the range whose image under the Hessian has all modes in the same proportion."""
    weights = torch.randn(len(spectrum.values), generator=generator, dtype=torch.float64)
    # Not too near to zero: every mode takes part.
    weights = torch.where(weights.abs() < 0.3, 0.3 * torch.sign(weights) + (weights == 0), weights)
    z: Tensor = spectrum.vectors @ (weights.to(spectrum.values) / spectrum.values)
    return torch.nn.functional.normalize(z, dim=0)


@dataclass(frozen=True)
class Remainder:
    """How far the gradient is from linear at perturbations of one size.

    Attributes:
        nonlinear: the largest `|g(theta + d) - g(theta) - Hess d| / |Hess d|`.
        kink: the largest part of it at `d/10` that neither a smooth risk nor rounding explains.
    """

    nonlinear: float
    kink: float


def remainder(spectrum: Spectrum, size: float) -> Remainder:
    """Compare the gradient with its linear part at perturbations `z` of length `size` and a tenth of it.

    For a C^3 risk the remainder falls by 100 when `d` is divided by 10. At a kink, a pre-activation that is zero or
    changes sign within `d`, it falls by 10. Random `d` of both signs are tried.
    """
    g, risk, P = torch.Generator().manual_seed(0), spectrum.risk, spectrum.P
    base, nonlinear, kink = risk.gradient, 0.0, 0.0
    for _ in range(6):
        z = size * balanced(spectrum, g)
        for sign in (1.0, -1.0):
            rest = []
            for scale in (1.0, 0.1):
                d = sign * scale * z
                change = P.apply_transpose(risk.at(risk.theta + P.apply(d)).gradient - base)
                linear = spectrum.vectors @ (spectrum.values * (spectrum.vectors.T @ d))
                rest.append((float((change - linear).norm()), float(linear.norm())))
            (coarse, first), (fine, second) = rest
            nonlinear = max(nonlinear, coarse / first)
            kink = max(kink, (fine - 0.3 * coarse / first * second - 20 * spectrum.floor) / second)
    return Remainder(nonlinear, kink)


def off_the_minimizers(spectrum: Spectrum) -> str:
    """Whether the null space is tangent to a manifold of minimizers: empty if so, else what was seen.

    From a point a little along a random null direction, Newton steps on as many eigenvectors as the rank come back to
    a minimizer of the same rank, if there is one nearby. Where the risk grows like the fourth power along a null
    direction (redundant units), a gradient remains there and curvature appears.
    """
    g, risk, chart = torch.Generator().manual_seed(1), spectrum.risk, spectrum.P
    seen, rank = "", len(spectrum.values)

    def by_size(there: EmpiricalRisk) -> tuple[Tensor, Tensor, Tensor]:
        """Eigenvalues, the largest first, eigenvectors and gradient in `z`."""
        B = both_sides(hessian(there).to_dense(), chart)
        values, vectors = torch.linalg.eigh((B + B.T) / 2)
        order = values.abs().argsort(descending=True)
        return values[order], vectors[:, order], chart.apply_transpose(there.gradient)

    for part in (1e-3, 1e-4):
        t = chart.apply(
            spectrum.null @ torch.randn(spectrum.null_dim, generator=g, dtype=torch.float64).to(spectrum.null)
        )
        there = risk.at(risk.theta + part * (float(risk.theta.norm()) or 1.0) / t.norm() * t)  # 1 at the origin
        for _ in range(4):
            values, vectors, z = by_size(there)
            top = vectors[:, :rank]
            there = there.at(there.theta - chart.apply(top @ ((top.T @ z) / values[:rank])))
        left, _, z = by_size(there)
        rest, curvature = float(z.norm()), float(left[rank:].abs().max())
        if rest <= 1e3 * spectrum.floor and curvature <= 1000 * spectrum.noise:
            return ""
        seen = (
            f"{part:g} |theta| along the null space there is no minimizer of the same rank: after Newton steps |grad| "
            f"is {rest:.2g} (rounding {spectrum.floor:.2g}) and the largest eigenvalue that was zero is "
            f"{curvature:.2g} (noise {spectrum.noise:.2g})"
        )
    return seen


def undetermined(spectrum: Spectrum) -> str:
    """Whether rounding leaves the smallest eigenvalue open, as on the way to a singular minimizer.

    There the risk grows like the fourth power, its curvature like the square of a distance, and the search stops where
    the gradient is lost in rounding, still away from the point. The gradient then locates the point to
    `d = |grad| / lambda_min`, within which the curvature `lambda(s) = lambda_min + c s^2` changes noticeably.

    Returns:
        Empty if not; else what was seen.
    """
    if spectrum.kappa < 1e6:
        return ""
    risk, v = spectrum.risk, spectrum.P.apply(spectrum.vectors[:, 0])
    d = max(abs(float(v @ risk.gradient)), spectrum.floor) / spectrum.smallest
    size = 1e-3 * (float(risk.theta.norm()) or 1.0) / float(v.norm())
    both = [float(v @ (hessian(risk.at(risk.theta + sign * size * v)) @ v)) for sign in (1, -1)]
    full = sum(both) / 2
    change = (full - spectrum.smallest) * (d / size) ** 2 / spectrum.smallest
    if change > 0.01:
        return (
            f"the smallest eigenvalue {spectrum.smallest:.2g} grows to {full:.2g} within 1e-3 |theta|, and by "
            f"{change:.2g} of itself within what rounding leaves open of the point"
        )
    return ""


def roughness(risk: EmpiricalRisk, kink: float, nonlinear: float) -> str:
    """Say why the gradient is not close to linear near the point."""
    if kink <= KINK:
        return (
            f"the gradient is not close to linear even at the smallest perturbation that rounding allows (remainder "
            f"{nonlinear:.2g}): the neighbourhood in which the rate is seen lies below the rounding floor"
        )
    zeros: dict[str, int] = {}

    def visit(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, _KINKED):
            zeros[name] = zeros.get(name, 0) + int((args[0] == 0).sum())

    risk.capture(visit)
    named = ", ".join(f"{count} at the input of {name}" for name, count in zeros.items() if count)
    exact = f" (pre-activations exactly zero: {named})" if named else ""
    return (
        f"the loss is not smooth at the limit point: at every perturbation down to the rounding floor the gradient has "
        f"a part ({kink:.2g} of its linear one) that is not differentiable{exact}"
    )
