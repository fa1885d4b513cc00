"""How many eigenvalues are not zero, by stochastic quadrature."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.linalg.spectra.checks import products_known_to, provenance
from bnp_analysis.linalg.spectra.quadrature import spectral_density
from bnp_analysis.results import Result
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.progress import Progress


@dataclass(frozen=True, kw_only=True, repr=False)
class RankEstimate(Result):
    """A stochastic count of the eigenvalues above a threshold; an estimate, never evidence for a null space.

    Attributes:
        value, lower, upper: the count, in an interval for quadrature and sampling with probability `confidence`.
        error: the distance of the value to the farther end.
        threshold: magnitudes above it are counted.
        unresolved: how much of the count lies within a factor 100 of the threshold, where it depends on the choice.
        dim: `n`.
    """

    value: float
    lower: float
    upper: float
    confidence: float
    error: float
    threshold: float
    unresolved: float
    dim: int

    def summary(self) -> str:
        """The count with its doubt."""
        span = f"{self.lower:.4g} .. {self.upper:.4g} at {100 * self.confidence:.4g} %"
        return (
            f"about {self.value:.1f} ({span}) of {self.dim} eigenvalues above {self.threshold:.2g}, "
            f"{self.unresolved:.1f} of them within a factor 100 of it; {self.matvecs} products"
            f"{products_known_to(self)}"
        )


@full_float32
def rank_estimate(
    A: SymmetricOperator,
    *,
    preconditioner: Preconditioner | None = None,
    threshold: float | None = None,
    probes: int = 16,
    steps: int = 64,
    seed: int = 0,
    progress: Progress = False,
) -> RankEstimate:
    """The number of eigenvalues of `P^T A P` with `|lambda| > threshold`, `n` times the mass of the quadrature there.

    Args:
        A: symmetric operator on `R^n`.
        preconditioner: `P`.
        threshold: in units of eigenvalues; default `n u` times the largest Ritz value.
        probes, steps: of the quadrature.
        seed: of the probes.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `RankEstimate`. Eigenvalues that `steps` cannot tell from zero are counted by where their node falls;
        `condition_number` decides ranks, this only estimates them.

    Raises:
        InvalidInputError: a threshold that is not positive, or sizes that do not fit.

    Source: Ubaru and Saad 2016.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> values = torch.cat([torch.linspace(1, 2, 40), torch.zeros(60)]).double()
        >>> found = bnp.rank_estimate(bnp.DenseOperator(torch.diag(values)), probes=64)
        >>> abs(found.value - 40) < 4 * found.error + 1e-9
        True
    """
    if threshold is not None and not threshold > 0:
        raise InvalidInputError(f"threshold must be positive, got {threshold}: every rounding error would count")
    began = time.perf_counter()
    density = spectral_density(
        A, preconditioner=preconditioner, probes=probes, steps=steps, seed=seed, progress=progress
    )
    sizes = np.abs(density.nodes)
    least = threshold or A.dim * A.eps * float(sizes.max())
    small = density.mass(-least, least)
    near = A.dim * np.where((sizes > least / 100) & (sizes < 100 * least), density.weights, 0.0).sum(axis=1)
    return RankEstimate(
        value=A.dim * (1 - small.value),
        lower=A.dim * (1 - small.upper),
        upper=A.dim * (1 - small.lower),
        confidence=small.confidence,
        error=A.dim * small.error,
        threshold=least,
        unresolved=float(near.mean()),
        dim=A.dim,
        matvecs=density.matvecs,
        **provenance(A, preconditioner, dict(density.settings), seed, began),
    )
