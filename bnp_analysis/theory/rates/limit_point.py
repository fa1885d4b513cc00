"""The spectrum of `P^T Hess P` at the limit point, and what is known of its null space."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.curvature.hessian import hessian
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.symmetry import null_directions

_UNIT = float(torch.finfo(torch.float64).eps)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues and eigenvectors of `B = P^T Hess P` at a point, and which of them are zero.

    Attributes:
        values, vectors: the nonzero ones, ascending, `(r,)` and `(n, r)` in the variables `z`.
        null: `(n, n - r)`, orthonormal basis of the rest, in `z`.
        zeros: what was computed in place of the zero eigenvalues.
        noise: eigenvalues below it are rounding.
        negative: the most negative eigenvalue, 0 if none is below `-noise`.
        unresolved: eigenvalues that are neither clearly rounding nor clearly not.
        sources: cause -> null dimensions that symmetries and data explain, verified on this Hessian.
        products: Hessian products spent.
    """

    values: Tensor
    vectors: Tensor
    null: Tensor
    zeros: Tensor
    noise: float
    negative: float
    unresolved: int
    sources: Mapping[str, int]
    products: int

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


def measure(risk: EmpiricalRisk, P: Preconditioner | None, *, null: bool = True) -> Spectrum:
    """Diagonalize `P^T Hess P` at a risk's point.

    The backward error is measured where it can be: by the asymmetry of the computed Hessian and by what it does to
    verified null directions. An eigenvalue is zero below ten times that, nonzero above a thousand times.

    Args:
        risk: at the point, in float64.
        P: the preconditioner, None for the identity.
        null: whether to look for the causes of the null space.
    """
    H = hessian(risk).to_dense()
    slack = float(both_sides(H - H.T, P).norm())
    H = (H + H.T) / 2
    B = both_sides(H, P)
    values, vectors = torch.linalg.eigh((B + B.T) / 2)
    noise = len(values) * _UNIT * float(values.abs().max()) + slack
    sources: Mapping[str, int] = {}
    if null:
        found = null_directions(risk)
        known = found.basis if P is None else P.transport(found.basis)
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


def both_sides(H: Tensor, P: Preconditioner | None) -> Tensor:
    """`P^T H P` of a stored matrix."""
    if P is None:
        return H
    half = P._rmatmat(H)
    return P._rmatmat(half.T)


def length_of(theta: Tensor, P: Preconditioner | None) -> float:
    """`|P^-1 theta|`, the length of a point in the variables of the iteration; 1 at the origin."""
    z = theta if P is None else P.solve(theta)
    return float(z.norm()) or 1.0
