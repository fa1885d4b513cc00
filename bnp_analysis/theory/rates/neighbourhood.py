"""Whether T14 may speak at a point: a smooth neighbourhood, a null space tangent to the minimizers, resolved ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.curvature.hessian import hessian
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.theory.rates.limit_point import Spectrum, both_sides

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


def remainder(
    risk: EmpiricalRisk, P: Preconditioner | None, spectrum: Spectrum, size: float, floor: float
) -> Remainder:
    """Compare the gradient with its linear part at perturbations `z` of length `size` and a tenth of it.

    For a C^3 risk the remainder falls by 100 when `d` is divided by 10. At a kink, a pre-activation that is zero or
    changes sign within `d`, it falls by 10. Random `d` of both signs are tried.
    """
    g = torch.Generator().manual_seed(0)
    base, nonlinear, kink = risk.gradient, 0.0, 0.0
    for _ in range(6):
        z = size * balanced(spectrum, g)
        for sign in (1.0, -1.0):
            rest = []
            for scale in (1.0, 0.1):
                d = sign * scale * z
                change = risk.at(risk.theta + (d if P is None else P.apply(d))).gradient - base
                change = change if P is None else P.apply_transpose(change)
                linear = spectrum.vectors @ (spectrum.values * (spectrum.vectors.T @ d))
                rest.append((float((change - linear).norm()), float(linear.norm())))
            (coarse, first), (fine, second) = rest
            nonlinear = max(nonlinear, coarse / first)
            kink = max(kink, (fine - 0.3 * coarse / first * second - 20 * floor) / second)
    return Remainder(nonlinear, kink)


def off_the_minimizers(risk: EmpiricalRisk, P: Preconditioner | None, spectrum: Spectrum, floor: float) -> str:
    """Whether the null space is tangent to a manifold of minimizers: empty if so, else what was seen.

    From a point a little along a random null direction, Newton steps on as many eigenvectors as the rank come back to
    a minimizer of the same rank, if there is one nearby. Where the risk grows like the fourth power along a null
    direction (redundant units), a gradient remains there and curvature appears.
    """
    if not spectrum.null_dim:
        return ""
    g = torch.Generator().manual_seed(1)
    seen = ""
    rank = len(spectrum.values)
    for part in (1e-3, 1e-4):
        t = spectrum.null @ torch.randn(spectrum.null_dim, generator=g, dtype=torch.float64).to(spectrum.null)
        t = t if P is None else P.apply(t)
        there = risk.at(risk.theta + part * risk.theta.norm() / t.norm() * t)
        for _ in range(4):
            values, vectors = _eigen(there, P)
            top = values.abs().argsort(descending=True)[:rank]
            z = there.gradient if P is None else P.apply_transpose(there.gradient)
            back = vectors[:, top] @ ((vectors[:, top].T @ z) / values[top])
            there = there.at(there.theta - (back if P is None else P.apply(back)))
        values, _ = _eigen(there, P)
        left = values.abs().sort(descending=True).values[rank:]
        z = there.gradient if P is None else P.apply_transpose(there.gradient)
        rest, curvature = float(z.norm()), float(left.max()) if len(left) else 0.0
        if rest <= 1e3 * floor and curvature <= 1000 * spectrum.noise:
            return ""
        seen = (
            f"{part:g} |theta| along the null space there is no minimizer of the same rank: after Newton steps |grad| "
            f"is {rest:.2g} (rounding {floor:.2g}) and the largest eigenvalue that was zero is {curvature:.2g} "
            f"(noise {spectrum.noise:.2g})"
        )
    return seen


def undetermined(risk: EmpiricalRisk, P: Preconditioner | None, spectrum: Spectrum, floor: float) -> str:
    """Whether rounding leaves the smallest eigenvalue open, as on the way to a singular minimizer.

    There the risk grows like the fourth power, its curvature like the square of a distance, and the search stops where
    the gradient is lost in rounding, still away from the point. The gradient then locates the point to
    `d = |grad| / lambda_min`, within which the curvature `lambda(s) = lambda_min + c s^2` changes noticeably.

    Returns:
        Empty if not; else what was seen.
    """
    if spectrum.kappa < 1e6:
        return ""
    z = spectrum.vectors[:, 0]
    v = z if P is None else P.apply(z)
    d = max(abs(float(v @ risk.gradient)), floor) / spectrum.smallest
    size = 1e-3 * float(risk.theta.norm() / v.norm())
    both = [float(v @ (hessian(risk.at(risk.theta + sign * size * v)) @ v)) for sign in (1, -1)]
    full = sum(both) / 2
    change = (full - spectrum.smallest) * (d / size) ** 2 / spectrum.smallest
    if change > 0.01:
        return (
            f"the smallest eigenvalue {spectrum.smallest:.2g} grows to {full:.2g} within 1e-3 |theta|, and by "
            f"{change:.2g} of itself within what rounding leaves open of the point"
        )
    return ""


def _eigen(risk: EmpiricalRisk, P: Preconditioner | None) -> tuple[Tensor, Tensor]:
    B = both_sides(hessian(risk).to_dense(), P)
    values, vectors = torch.linalg.eigh((B + B.T) / 2)
    return values, vectors


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
