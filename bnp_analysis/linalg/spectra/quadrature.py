"""Stochastic Lanczos quadrature: the spectral density."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.checkpoint import load_state, save_state
from bnp_analysis.linalg.full_float32 import full_float32
from bnp_analysis.linalg.krylov.lanczos import Floats, lanczos, tridiagonal_eigh
from bnp_analysis.linalg.krylov.three_term import three_term
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.linalg.progress import Progress, reporting
from bnp_analysis.linalg.random import generator, normal, orthonormal, project_out
from bnp_analysis.linalg.spectra.checks import measured, provenance
from bnp_analysis.linalg.spectra.null import HasBasis
from bnp_analysis.results import Result


@dataclass(frozen=True, kw_only=True, repr=False)
class SpectralDensity(Result):
    """The density of the eigenvalues of `P^T A P`, outside the declared null space.

    Attributes:
        grid: `(m,)` eigenvalue axis.
        density: `(m,)` mean over probes of the quadrature, each node widened to a Gaussian; integrates to one.
        error: `(m,)` standard error over probes.
        nodes, weights: `(probes, steps)` quadrature nodes and weights; a run that ended early is padded with
            zero weights.
        width: standard deviation of the Gaussian, in units of eigenvalues.
        dim, null_dim: size of the operator, and of what was left out.
    """

    grid: Floats
    density: Floats
    error: Floats
    nodes: Floats
    weights: Floats
    width: float
    dim: int
    null_dim: int

    def summary(self) -> str:
        """Range and mean of the spectrum."""
        mean = float((self.nodes * self.weights).sum() / len(self.weights))
        found = self.nodes[self.weights > 0]  # the rest is padding
        return (
            f"spectral density on [{found.min():.4g}, {found.max():.4g}], mean {mean:.4g}, "
            f"{len(self.nodes)} probes x {self.nodes.shape[1]} steps, {self.matvecs} products"
        )

    def mass(self, low: float, high: float) -> tuple[float, float]:
        """The fraction of eigenvalues in `[low, high]` with its standard error over probes."""
        inside = np.where((self.nodes >= low) & (self.nodes <= high), self.weights, 0.0).sum(axis=1)
        return float(inside.mean()), standard_error(inside)

    def records(self) -> list[dict[str, float]]:
        """One row per grid point."""
        columns = zip(self.grid.tolist(), self.density.tolist(), self.error.tolist(), strict=True)
        return [{"eigenvalue": x, "density": y, "error": e} for x, y, e in columns]


@full_float32
def spectral_density(
    A: SymmetricOperator,
    *,
    preconditioner: Preconditioner | None = None,
    null: Tensor | HasBasis | None = None,
    deflate: Tensor | None = None,
    probes: int = 8,
    steps: int = 64,
    points: int = 1000,
    width: float | None = None,
    scale: str = "linear",
    reorthogonalize: bool = True,
    checkpoint: str | Path | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> SpectralDensity:
    """The spectral density `(1/n) sum_i delta(x - lambda_i)` by stochastic Lanczos quadrature.

    Each probe `v` gives a Gauss rule with nodes the Ritz values and weights the squared first components of the
    eigenvectors of its tridiagonal matrix.

    Args:
        A: symmetric operator on `R^n`.
        preconditioner: `P`; the density of `P^T A P`.
        null: known null directions in the coordinates of `A`, left out of the density.
        deflate: vectors `(n, k)` whose span is left out as well, in the coordinates of the operator measured: for
            instance `eigenpairs(...).vectors`, so that outliers do not stretch the axis.
        probes: number of random vectors; the error bars are over them.
        steps: Lanczos steps each.
        points: size of the grid.
        width: standard deviation of the Gaussian that widens a node, in units of eigenvalues; default 1 % of
            the range, of the eigenvalue itself where there is but one.
        scale: `"linear"`, or `"log"` for the density of `log10 |lambda|` (nodes below rounding are put there).
        reorthogonalize: True leaves no ghost nodes and keeps `steps` vectors; False keeps three and saves the time of
            reorthogonalization: converged eigenvalues come again as ghosts, whose weights add up to that of the
            eigenvalue, so that density, mass and moments are right and the number of distinct nodes means nothing.
        checkpoint: a file written after every probe and resumed from when it exists.
        seed: of the probes.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `SpectralDensity`.

    Raises:
        InvalidInputError: sizes that do not fit; NullSpaceError: declared directions that are not null;
        NonFiniteError: a product with NaN or infinity.

    Source: Golub and Meurant 2010; Ghorbani, Krishnan and Xiao 2019.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(torch.linspace(1, 2, 100, dtype=torch.float64)))
        >>> density = bnp.spectral_density(A, steps=20, seed=1)
        >>> abs(density.mass(0.9, 2.1)[0] - 1) < 1e-12
        True
    """
    operator, declared = measured(A, preconditioner, null, seed)
    basis = declared.basis if deflate is None else orthonormal(torch.cat([declared.basis, deflate], dim=1), "deflate=")
    room = A.dim - basis.shape[1]
    if scale not in ("linear", "log"):
        raise InvalidInputError(f"scale must be 'linear' or 'log', got {scale!r}")
    if probes < 1 or steps < 1 or points < 2 or room < 1:
        raise InvalidInputError(f"probes={probes}, steps={steps}, points={points} for {room} dimensions: nothing to do")
    if width is not None and not width > 0:
        raise InvalidInputError(f"width must be positive, got {width}")
    began = time.perf_counter()
    steps = min(steps, room)
    g = generator(seed)
    like = torch.empty(0, dtype=A.dtype, device=A.device)
    starts = [normal((A.dim,), g, like) for _ in range(probes)]
    nodes, weights = np.zeros((probes, steps)), np.zeros((probes, steps))
    matvecs, done = declared.cost, 0
    key = (
        f"density of dimension {A.dim} in {A.dtype}, {probes} probes x {steps}, {basis.shape[1]} left out, seed {seed}"
        + ("" if reorthogonalize else ", not reorthogonalized")
    )
    if checkpoint is not None and Path(checkpoint).exists():
        state = load_state(checkpoint, key)
        nodes, weights, done, matvecs = (
            state["nodes"].numpy(),
            state["weights"].numpy(),
            state["done"],
            state["matvecs"],
        )
        _require_same(operator, starts[0], basis, nodes[0] @ weights[0])
        matvecs += 1
    with reporting(progress, probes, "spectral density") as update:
        try:
            for i in range(done, probes):
                alpha, beta, spent, stop = _run(operator, steps, starts[i], basis, reorthogonalize)
                matvecs += spent
                if stop == "interrupted":
                    raise KeyboardInterrupt
                values, vectors = tridiagonal_eigh(alpha, beta)
                nodes[i, : values.size], weights[i, : values.size] = values, vectors[0] ** 2
                done = i + 1
                update(done)
                if checkpoint is not None:
                    state = {"nodes": torch.from_numpy(nodes), "weights": torch.from_numpy(weights)}
                    save_state(checkpoint, key, state | {"done": done, "matvecs": matvecs})
        except KeyboardInterrupt:
            # The probe in hand is incomplete; the finished ones are a result of their own.
            if done == 0:
                raise
    nodes, weights = nodes[:done], weights[:done]
    settings = {
        "probes": probes,
        "steps": steps,
        "width": width,
        "scale": scale,
        "reorthogonalize": reorthogonalize,
        "deflated": basis.shape[1] - declared.dim,
    }
    axis = _logarithms(nodes) if scale == "log" else nodes
    low, high = float(axis[weights > 0].min()), float(axis[weights > 0].max())
    size = max(abs(low), abs(high))
    # Of a multiple of the identity the range is rounding: its size stands in.
    spread = high - low if high - low > 1e-8 * size else size or 1.0
    sigma = width or 0.01 * spread
    grid = np.linspace(low - 5 * sigma, high + 5 * sigma, points)
    kernels = np.exp(-0.5 * ((grid[None, None] - axis[..., None]) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    each = (kernels * weights[..., None]).sum(axis=1)
    return SpectralDensity(
        grid=grid,
        density=each.mean(axis=0),
        error=np.array([standard_error(each[:, j]) for j in range(points)]),
        nodes=nodes,
        weights=weights,
        width=sigma,
        dim=A.dim,
        null_dim=declared.dim,
        matvecs=matvecs,
        **provenance(A, preconditioner, settings, seed, began),
    )


def _run(
    operator: SymmetricOperator, steps: int, start: Tensor, null: Tensor, reorthogonalize: bool
) -> tuple[Floats, Floats, int, str]:
    """The tridiagonal matrix of a probe, the products it took and why it ended."""
    if reorthogonalize:
        run = lanczos(operator, steps, start=start, null=null)
        return run.alpha, run.beta, run.matvecs, run.stop
    return *three_term(operator, steps, start, null), "steps"


def _logarithms(nodes: Floats) -> Floats:
    """`log10 |lambda|`, no lower than rounding."""
    sizes = np.abs(nodes)
    return np.asarray(np.log10(np.maximum(sizes, np.finfo(np.float64).eps * sizes.max())))


def _require_same(operator: SymmetricOperator, start: Tensor, basis: Tensor, mean: float) -> None:
    """The first probe's Rayleigh quotient, which its quadrature integrates exactly, tells one operator from another."""
    v = project_out(start.unsqueeze(1), basis).squeeze(1)
    v = v / v.norm()
    image = operator @ v
    quotient, size = float(v.double() @ image.double()), float(image.double().norm())
    if abs(quotient - mean) > 1e3 * math.sqrt(operator.dim) * operator.eps * size:
        raise InvalidInputError(
            "the saved density belongs to another operator of the same size; delete the file, or give another "
            "checkpoint="
        )


def standard_error(samples: Floats) -> float:
    """Of the mean; NaN for a single probe, which has no spread."""
    if samples.size < 2:
        return math.nan
    # Squares of the samples may leave the floats.
    power = math.frexp(float(np.abs(samples).max()))[1]
    return math.ldexp(float(np.ldexp(samples, -power).std(ddof=1)) / math.sqrt(samples.size), power)


__all__ = ["SpectralDensity", "spectral_density", "standard_error"]
