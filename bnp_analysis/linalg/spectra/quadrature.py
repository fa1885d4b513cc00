"""The spectral density by stochastic Lanczos quadrature, with bounds on masses and quantiles."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betainc
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.bases import project_out
from bnp_analysis.linalg.forming import UNIT, formed, norm_bound
from bnp_analysis.linalg.krylov.lanczos import Floats, lanczos, require_same, three_term, tridiagonal_eigh
from bnp_analysis.linalg.matrices import Columns, as_tensor
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.preconditioner import Congruence, Preconditioner
from bnp_analysis.linalg.spectra.checks import (
    HasBasis,
    amplification,
    left_of,
    measured,
    products_known_to,
    provenance,
    require_finite,
)
from bnp_analysis.results import Result
from bnp_analysis.runtime.files import saved_run
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.memory import require_memory
from bnp_analysis.runtime.progress import Progress, reporting
from bnp_analysis.runtime.random import generator, normal

_ROUNDING = 1e-12  # of sums of weights, in float64
_SAVED = ("nodes", "weights", "residuals")
_TENTH = 0.1  # of a decade, by which eigenvalues are widened on an axis of logarithms of both signs


@dataclass(frozen=True)
class Estimate:
    """A number from random vectors, with an interval that counts every error; unpacks as `value, error`.

    Attributes:
        value: the estimate, inside the interval.
        lower, upper: contain the truth with probability `confidence`.
        quadrature: half the width of what the quadrature leaves open for the vectors drawn: certain, and smaller with
            more steps.
        sampling: what the choice of the vectors adds to half the width: smaller with more of them.
        confidence: of the interval.

    Example:
        >>> value, error = Estimate(0.5, 0.4, 0.7, 0.05, 0.1, 0.95)
        >>> round(error, 6)
        0.2
        >>> print(Estimate(0.5, 0.4, 0.7, 0.05, 0.1, 0.95))
        0.5 (0.4 .. 0.7 at 95 %; quadrature +- 0.05, sampling +- 0.1)
    """

    value: float
    lower: float
    upper: float
    quadrature: float
    sampling: float
    confidence: float

    @property
    def error(self) -> float:
        """The distance to the farther end of the interval."""
        return max(self.upper - self.value, self.value - self.lower)

    def __iter__(self) -> Iterator[float]:
        return iter((self.value, self.error))

    def __getitem__(self, place: int) -> float:
        return (self.value, self.error)[place]

    def __str__(self) -> str:
        return (
            f"{self.value:.4g} ({self.lower:.4g} .. {self.upper:.4g} at {100 * self.confidence:.4g} %; "
            f"quadrature +- {self.quadrature:.2g}, sampling +- {self.sampling:.2g})"
        )


def christoffel(x: Floats, nodes: Floats, weights: Floats, residuals: Floats) -> Floats:
    """The Christoffel function of a Lanczos run, `1 / sum_{j <= k} p_j(x)^2` with its orthonormal polynomials.

    The measure of the start vector below `x` and the sum of the weights of the Gauss nodes below `x` differ by no more:
    both lie between the weights below `x` of the rule of `k + 1` nodes, one of them at `x`, and these with the weight
    at `x`, which is this function (Chebyshev, Markov, Stieltjes). It is computed from the rule's matrix in the basis of
    Ritz vectors, `diag(nodes)` with a border of residuals.

    Args:
        x: `(m,)` places.
        nodes, weights: `(k,)` of the Gauss rule, nodes ascending.
        residuals: `(k,)` norms of the Ritz vectors' residuals; zeros where the space is invariant: the rule is exact.

    Returns:
        `(m,)`.

    Source: Golub and Meurant 2010, chapter 6; Karlin and Studden 1966.

    Example:
        >>> two = np.array([-1.0, 1.0])
        >>> christoffel(np.array([0.0, 1e6]), two, np.array([0.5, 0.5]), np.array([0.1, 0.1])).round(3).tolist()
        [0.02, 0.0]
    """
    gaps = x[:, None] - nodes
    # At a node the function is its weight, the limit.
    gaps[gaps == 0] = np.finfo(np.float64).eps * max(float(np.abs(nodes).max()), np.finfo(np.float64).tiny)
    signs = 1.0 - 2.0 * (np.arange(nodes.size) % 2)
    ratios = residuals / gaps
    found: Floats = (ratios @ (signs * np.sqrt(weights))) ** 2 / (1 + (ratios**2).sum(axis=1))
    return found


def chance(share: Floats | float, observed: Floats, probes: int, dim: int) -> Floats:
    """The probability that a mean over random vectors is at most `observed`, where the share of eigenvalues is `share`.

    For Gaussian vectors the share of their length in an eigenspace of dimension `s` has the distribution
    `Beta(s / 2, (n - s) / 2)`, known without a variance estimated from the sample. The mean of `p` of them is in the
    convex order below `Beta(p s / 2, p (n - s) / 2)`, the distribution of the mean weighted by the vectors' lengths,
    which is taken.

    Args:
        share: between 0 and 1.
        observed: `(m,)` means, between 0 and 1.
        probes, dim: `p` and `n`.

    Returns:
        `(m,)`.

    Example:
        >>> chance(0.5, np.array([0.4, 0.5, 0.6]), 8, 400).round(4).tolist()
        [0.0, 0.5, 1.0]
    """
    size = probes * dim / 2
    a, b = np.broadcast_arrays(size * np.asarray(share), size * (1 - np.asarray(share)))
    found = betainc(np.maximum(a, 1e-300), np.maximum(b, 1e-300), np.clip(observed + _ROUNDING, 0.0, 1.0))
    return np.asarray(np.where(a <= 0, 1.0, np.where(b <= 0, observed >= 1 - _ROUNDING, found)))


def shares(lower: Floats, upper: Floats, probes: int, dim: int, confidence: float) -> tuple[Floats, Floats]:
    """Which shares of `dim` eigenvalues a mean over random vectors within `[lower, upper]` is compatible with.

    Args:
        lower, upper: `(m,)` bounds of the mean, between 0 and 1.
        probes, dim: number and length of the vectors.
        confidence: two-sided.

    Returns:
        Bounds `(m,)`.

    Source: Clopper and Pearson 1934, for this distribution.

    Example:
        >>> low, high = shares(np.array([0.5]), np.array([0.5]), 8, 400, 0.95)
        >>> (low.round(3).item(), high.round(3).item())
        (0.476, 0.524)
    """
    tail = (1 - confidence) / 2

    def most(observed: Floats) -> Floats:
        low, high = np.zeros_like(observed), np.ones_like(observed)
        for _ in range(40):
            middle = (low + high) / 2
            likely = chance(middle, observed, probes, dim) >= tail
            low, high = np.where(likely, middle, low), np.where(likely, high, middle)
        return high

    return 1 - most(1 - lower), most(upper)


def whole(least: Floats, most: Floats, dim: int) -> tuple[Floats, Floats]:
    """Bounds of shares rounded inwards to whole numbers of eigenvalues, where any is left between them."""
    low, high = np.ceil(least * dim - 1e-6) / dim, np.floor(most * dim + 1e-6) / dim
    some = low <= high
    return np.where(some, low, least), np.where(some, high, most)


@dataclass(frozen=True, kw_only=True, repr=False)
class SpectralDensity(Result):
    """The density of the eigenvalues of `P^T A P`, outside the declared null space.

    Attributes:
        grid: `(m,)` eigenvalue axis.
        density: `(m,)` mean over probes of the quadrature, each node widened to a Gaussian; integrates to one.
        error: `(m,)` standard error over probes.
        quadrature: `(m,)` what the quadrature of the probes drawn may be off by, as far as the grid resolves it.
        nodes, weights: `(probes, steps)` quadrature nodes and weights; a run that ended early is padded with
            zero weights.
        residuals: `(probes, steps)` residual norms of the Ritz vectors: an eigenvalue is as near to each node.
        rounding: eigenvalues are known to within this distance; between vectors whose values are `d` apart a part
            `rounding / d` of a probe may be exchanged, which changes no count.
        width: standard deviation of the Gaussian, in units of eigenvalues.
        dim, null_dim: size of the operator, and of what was left out.
    """

    grid: Floats
    density: Floats
    error: Floats
    quadrature: Floats
    nodes: Floats
    weights: Floats
    residuals: Floats
    rounding: float
    width: float
    dim: int
    null_dim: int

    def summary(self) -> str:
        """Range and mean of the spectrum, and what masses are uncertain by."""
        mean = float((self.nodes * self.weights).sum() / len(self.weights))
        found = np.sort(self.nodes[self.weights > 0])  # the rest is padding
        places = (found[:-1] + found[1:])[:: max(1, found.size // 200)] / 2
        _, below, above = self._below(places)
        open_ = float((above - below).max(initial=0.0)) / 2
        return (
            f"spectral density on [{found[0]:.4g}, {found[-1]:.4g}], mean {mean:.4g}, "
            + (
                f"all {self._room} eigenvalues"
                if self._complete
                else f"{len(self.nodes)} probes x {self.nodes.shape[1]} steps (masses below a bound: quadrature +- "
                f"{open_:.2g})"
            )
            + f", {self.matvecs} products{products_known_to(self)}"
        )

    def mass(self, low: float, high: float, confidence: float = 0.95) -> Estimate:
        """The fraction of eigenvalues in `[low, high]`, with an interval that counts quadrature and sampling.

        Args:
            low, high: ends, perhaps infinite. Eigenvalues within `rounding` of an end may be on either side: ask for
                `mass(-inf, x)` where zeros are to count and no eigenvalue is negative.
            confidence: of the interval, for these ends (not for many at once).

        Returns:
            An `Estimate`; the truth is a number of eigenvalues over `n`, and so are the ends of the interval.

        Source: the Chebyshev-Markov-Stieltjes inequalities for the quadrature; for sampling the Beta distribution of a
        Gaussian vector's share in a space.
        """
        _require_confidence(confidence)
        inside = np.where((self.nodes >= low) & (self.nodes <= high), self.weights, 0.0).sum(axis=1)
        _, below, above = self._below(np.array([np.nextafter(low, -np.inf), high]))
        least = np.clip(below[1:] - above[:1], 0.0, 1.0)
        most = np.clip(above[1:] - below[:1], 0.0, 1.0)
        lower, upper = (float(x[0]) for x in whole(*self._shares(least, most, confidence), self._room))
        value, open_ = min(max(float(inside.mean()), lower), upper), float(most[0] - least[0]) / 2
        return Estimate(value, lower, upper, open_, max(0.0, (upper - lower) / 2 - open_), confidence)

    def quantile(self, share: float, confidence: float = 0.95) -> Estimate:
        """The smallest value that `share` of the eigenvalues do not exceed, from the bounds of `mass(-inf, x)`.

        Args:
            share: above 0, at most 1; 0.5 is the median.
            confidence: of the interval.

        Returns:
            An `Estimate` in units of eigenvalues; an end that no bound reaches is infinite.

        Raises:
            InvalidInputError: a share or a confidence outside (0, 1].
        """
        if not 0 < share <= 1:
            raise InvalidInputError(f"share must lie in (0, 1], got {share}")
        _require_confidence(confidence)
        real = self.weights > 0
        found, near = self.nodes[real], np.maximum(self.residuals[real], 2 * self.rounding)
        span = max(float(np.ptp(found)), float(np.abs(found).max()), self.rounding) * 2.0 ** np.arange(-40, 2)
        places = np.unique(np.concatenate([found, found - near, found + near]))
        places = places[:: max(1, places.size // 2000)]
        between = (places[:-1] + places[1:]) / 2
        places = np.sort(np.concatenate([found.min() - span, places, between, found.max() + span]))
        value, below, above = self._below(places)
        wanted = math.ceil(share * self._room - 1e-9)  # this eigenvalue in their order
        likely = _certainly if self._complete else partial(chance, probes=len(self.nodes), dim=self._room)
        tail = (1 - confidence) / 2

        def ends(too_few: NDArray[np.bool_], enough: NDArray[np.bool_]) -> tuple[float, float]:
            return float(places[too_few].max(initial=-np.inf)), float(places[enough].min(initial=np.inf))

        inner, outer = ends(above < wanted / self._room, below > (wanted - 1) / self._room)
        # Where neither number of eigenvalues is likely, the ends change places.
        lower, upper = sorted(
            ends(likely(wanted / self._room, above) < tail, likely(1 - (wanted - 1) / self._room, 1 - below) < tail)
        )
        middle = min(max(float(places[value >= min(share, value[-1])].min()), lower), upper)
        half, open_ = (upper - lower) / 2, max(0.0, outer - inner) / 2  # bounds that a jump decides cross
        return Estimate(middle, lower, upper, min(half, open_), max(0.0, half - open_), confidence)

    def band(self, confidence: float = 0.95) -> tuple[Floats, Floats]:
        """Bounds `(m,)` of the density, pointwise: widened eigenvalues are counted as by `mass`.

        Where the lower one is zero, the density says nothing about whether there are eigenvalues.
        """
        _require_confidence(confidence)
        # In units of the width: squares of densities leave the floats.
        peak, density, open_ = 1 / math.sqrt(2 * math.pi), self.density * self.width, self.quadrature * self.width
        most = np.clip((density + open_) / peak, 0.0, 1.0)
        upper = self._shares(most, most, confidence)[1]
        # An eigenvalue far off counts little, and scatters as little: its height here is the unit (Satterthwaite 1946).
        each = _gaussians(self.grid / self.width, self._axis() / self.width, 1.0)
        heights = each * self.weights[..., None]
        squares = (each * heights).sum(axis=(0, 1))
        own = np.maximum(squares / np.maximum(heights.sum(axis=(0, 1)), 1e-300), 1e-300)
        least = np.clip((density - open_) / own, 0.0, 1.0)
        lower = own * self._shares(least, least, confidence)[0]
        return lower / self.width, peak * upper / self.width

    def resolved(self, confidence: float = 0.95) -> float:
        """Where a logarithmic axis begins to say something: peaks below are places of nodes, not of eigenvalues.

        Args:
            confidence: of the band that decides.

        Returns:
            The first point of the grid at which the band excludes that there is nothing; infinite if none does.

        Raises:
            InvalidInputError: the axis is linear.
        """
        if self.settings.get("scale") != "log":
            raise InvalidInputError("only a density of scale='log' has a part that is too small to be resolved")
        return resolved_from(self.grid, self.density, self.band(confidence)[0])

    def symmetric_log(self, floor: float | None = None, points: int = 1000) -> tuple[Floats, Floats]:
        """The density on the axis `sign(x) log10(1 + |x| / floor)`, which has room for eigenvalues of both signs.

        Args:
            floor: sizes below count as zero; default a millionth of the largest one.
            points: size of the grid.

        Returns:
            Grid `(m,)`, in units of eigenvalues, and the density per unit of the axis, each eigenvalue being widened by
            a tenth of a decade.
        """
        largest = float(np.abs(self.nodes[self.weights > 0]).max()) or 1.0
        floor = 1e-6 * largest if floor is None else floor
        if not floor > 0:
            raise InvalidInputError(f"floor must be positive, got {floor}")
        grid = symmetric_grid(largest, floor, points)
        heights = on_symmetric_axis(grid, self.nodes, self.weights, floor) / len(self.nodes)
        return np.sign(grid) * floor * np.expm1(np.abs(grid) * math.log(10)), heights

    def records(self) -> list[dict[str, float]]:
        """One row per grid point."""
        columns = zip(*(x.tolist() for x in (self.grid, self.density, self.error, self.quadrature)), strict=True)
        return [{"eigenvalue": x, "density": y, "error": e, "quadrature": q} for x, y, e, q in columns]

    @property
    def _room(self) -> int:
        """The dimension in which the probes were drawn."""
        return self.dim - self.null_dim

    @property
    def _complete(self) -> bool:
        """Whether all eigenvalues are nodes, so that nothing was sampled."""
        return bool(self.settings.get("method") == "dense")

    def _axis(self) -> Floats:
        return _logarithms(self.nodes) if self.settings["scale"] == "log" else self.nodes

    def _below(self, places: Floats) -> tuple[Floats, Floats, Floats]:
        """The share of eigenvalues up to each place as the quadrature has it, and what it can be for these probes."""
        found = [
            _bracket(places, *own, self.rounding) for own in zip(self.nodes, self.weights, self.residuals, strict=True)
        ]
        value, below, above = (np.mean(x, axis=0) for x in zip(*found, strict=True))
        return value, below, above

    def _shares(self, lower: Floats, upper: Floats, confidence: float) -> tuple[Floats, Floats]:
        return (lower, upper) if self._complete else shares(lower, upper, len(self.nodes), self._room, confidence)


@full_float32
@gated
def spectral_density(
    A: SymmetricOperator,
    *,
    preconditioner: Preconditioner | None = None,
    null: Tensor | HasBasis | None = None,
    probes: int = 8,
    steps: int = 64,
    points: int = 1000,
    width: float | None = None,
    scale: str = "linear",
    method: str = "quadrature",
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
        probes: number of random vectors; with more of them the sampling error is smaller.
        steps: Lanczos steps each; with more of them the quadrature error is smaller.
        points: size of the grid.
        width: standard deviation of the Gaussian that widens a node, in units of eigenvalues; default 1 % of
            the range, of the eigenvalue itself where there is but one.
        scale: `"linear"`, or `"log"` for the density of `log10 |lambda|` (nodes below rounding are put there).
        method: `"quadrature"`, or `"dense"`: all eigenvalues of the dense matrix, each of the same weight. Nothing is
            sampled then, `probes`, `steps` and `checkpoint` mean nothing.
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
        NonFiniteError: a product with NaN or infinity; MemoryLimitError: a dense matrix does not fit.

    Source: Golub and Meurant 2010; Ghorbani, Krishnan and Xiao 2019.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(torch.linspace(1, 2, 100, dtype=torch.float64)))
        >>> density = bnp.spectral_density(A, steps=20, seed=1)
        >>> abs(density.mass(0.9, 2.1)[0] - 1) < 1e-12
        True
    """
    operator, declared = measured(A, preconditioner, null, seed)
    room = A.dim - declared.dim
    if scale not in ("linear", "log"):
        raise InvalidInputError(f"scale must be 'linear' or 'log', got {scale!r}")
    if method not in ("quadrature", "dense"):
        raise InvalidInputError(f"method must be 'quadrature' or 'dense', got {method!r}")
    if points < 2 or room < 1:
        raise InvalidInputError(f"probes={probes}, steps={steps}, points={points} for {room} dimensions: nothing to do")
    nodes_in_all = room if method == "dense" else probes * min(steps, room)
    require_memory(8 * 3 * nodes_in_all * points, f"a density at points={points} from {nodes_in_all} nodes")
    began = time.perf_counter()
    if method == "dense":
        (nodes, weights, residuals), rounding = _all_eigenvalues(operator, declared.basis)
        matvecs = operator.dense_cost
    else:
        run = _Probes(operator, declared.basis, min(steps, room), reorthogonalize)
        (nodes, weights, residuals), rounding, matvecs = run.rules(probes, seed, checkpoint, progress)
    if isinstance(operator, Congruence) and declared.dim:
        rounding, matvecs = rounding + 2 * left_of(operator, declared.basis), matvecs + declared.combined
    settings = {
        "probes": probes,
        "steps": steps,
        "width": width,
        "scale": scale,
        "method": method,
        "reorthogonalize": reorthogonalize,
    }
    axis = _logarithms(nodes) if scale == "log" else nodes
    grid, sigma = _grid(axis[weights > 0], width, points)
    each = (_gaussians(grid, axis, sigma) * weights[..., None]).sum(axis=1)
    return SpectralDensity(
        grid=grid,
        density=each.mean(axis=0),
        error=np.array([standard_error(each[:, j]) for j in range(points)]),
        quadrature=_smoothed(grid, sigma, _open(grid, nodes, weights, residuals, rounding, scale)),
        nodes=nodes,
        weights=weights,
        residuals=residuals,
        rounding=rounding,
        width=sigma,
        dim=A.dim,
        null_dim=declared.dim,
        matvecs=matvecs + declared.cost,
        **provenance(A, preconditioner, settings, seed, began),
    )


@dataclass(frozen=True)
class _Probes:
    """Gauss rules of an operator outside a basis, by so many steps from each of some random vectors."""

    operator: SymmetricOperator
    basis: Columns
    steps: int
    reorthogonalize: bool

    def rules(
        self, probes: int, seed: int, checkpoint: str | Path | None, progress: Progress
    ) -> tuple[Floats, float, int]:
        """Nodes, weights and residuals `(3, probes, steps)`, the rounding of the nodes, and the products spent."""
        A, g = self.operator, generator(seed)
        starts = [normal((A.dim,), g, A) for _ in range(probes)]
        found, done = np.zeros((3, probes, self.steps)), 0
        size, matvecs = amplification(A, seed)
        key = (
            f"density with residuals of dimension {A.dim} in {A.dtype}, {probes} probes x {self.steps}, "
            f"{self.basis.shape[1]} left out, seed {seed}" + ("" if self.reorthogonalize else ", not reorthogonalized")
        )
        with saved_run(checkpoint, key) as saved, reporting(progress, probes, "spectral density") as update:
            if (state := saved.restore(lambda state: self._resumed(state, starts[0]))) is not None:
                found, done, matvecs = state
            try:
                while done < probes:
                    rule, products, stop = self._rule(starts[done])
                    matvecs += products
                    if stop == "interrupted":
                        raise KeyboardInterrupt
                    found[:, done, : rule.shape[1]], done = rule, done + 1
                    update(done)
                    arrays = dict(zip(_SAVED, map(torch.from_numpy, found), strict=True))
                    saved.save(arrays | {"done": done, "matvecs": matvecs})
            except KeyboardInterrupt:
                # The probe in hand is incomplete; the finished ones are a result of their own.
                if done == 0:
                    raise
        found = found[:, :done]
        return found, math.sqrt(A.dim) * A.eps * max(float(np.abs(found[0]).max()), size), matvecs

    def _rule(self, start: Tensor) -> tuple[Floats, int, str]:
        """Nodes, weights and residuals of one vector, `(3, k)`, the products and why it ended."""
        if self.reorthogonalize:
            run = lanczos(self.operator, self.steps, start=start, null=self.basis)
            alpha, beta, products, stop = run.alpha, np.append(run.beta, run.residual_norm), run.matvecs, run.stop
        else:
            (alpha, beta, products), stop = three_term(self.operator, self.steps, start, self.basis), "steps"
        values, vectors = tridiagonal_eigh(alpha, beta[:-1])
        return np.stack([values, vectors[0] ** 2, np.abs(vectors[-1]) * beta[-1]]), products, stop

    def _resumed(self, state: dict[str, Any], start: Tensor) -> tuple[Floats, int, int]:
        """What a saved run holds, if its first probe's Rayleigh quotient, which its rule integrates, is that of now."""
        found = np.stack([state[name].numpy() for name in _SAVED])
        v = project_out(start.unsqueeze(1), self.basis).squeeze(1)
        v = v / v.norm()
        image = self.operator @ v
        quotient, size = float(v.double() @ image.double()), float(image.double().norm())
        off = abs(quotient - found[0, 0] @ found[1, 0])
        require_same(off <= 1e3 * math.sqrt(self.operator.dim) * self.operator.eps * size, "density")
        return found, int(state["done"]), int(state["matvecs"]) + 1


def _all_eigenvalues(operator: SymmetricOperator, basis: Columns) -> tuple[Floats, float]:
    """All eigenvalues in the complement of a basis as a rule of equal weights, and what they are rounded by."""
    n = operator.dim
    require_memory(8 * 6 * n * n, f"the dense matrix of {operator!r}", "Use method='quadrature', or a smaller block")
    dense = formed(operator)
    matrix = dense.matrix.cpu()
    require_finite(matrix, "the dense matrix")
    if basis.shape[1]:
        outside = torch.linalg.qr(as_tensor(basis).double().cpu(), mode="complete")[0][:, basis.shape[1] :]
        matrix = outside.T @ matrix @ outside
    found = np.ldexp(torch.linalg.eigvalsh(matrix).numpy(), -dense.exponent)
    rounding = dense.rounding * norm_bound(dense.sizes().cpu()) + n * UNIT * norm_bound(matrix)
    rule = np.stack([found, np.full(found.shape, 1 / found.size), np.zeros(found.size)])
    return rule[:, None], math.ldexp(rounding, -dense.exponent)


def _grid(found: Floats, width: float | None, points: int) -> tuple[Floats, float]:
    """The axis of a density over the nodes found, and the width of a Gaussian."""
    low, high = float(found.min()), float(found.max())
    size = max(abs(low), abs(high))
    # Of a multiple of the identity the range is rounding: its size stands in.
    sigma = width or 0.01 * (high - low if high - low > 1e-8 * size else size or 1.0)
    return np.linspace(low - 5 * sigma, high + 5 * sigma, points), sigma


def _bracket(
    places: Floats, nodes: Floats, weights: Floats, residuals: Floats, rounding: float
) -> tuple[Floats, Floats, Floats]:
    """The weights of the nodes up to each place, and bounds of the measure they stand for."""
    nodes, weights, residuals = (x[weights > 0] for x in (nodes, weights, residuals))
    sums = np.concatenate([[0.0], np.cumsum(weights)])
    value, least, most = (
        sums[np.searchsorted(nodes, at, side="right")] for at in (places, places - rounding, places + rounding)
    )
    lower = least - christoffel(places - rounding, nodes, weights, residuals)
    upper = most + christoffel(places + rounding, nodes, weights, residuals)
    return value, np.clip(lower, 0.0, 1.0), np.clip(upper, 0.0, 1.0)


def _open(grid: Floats, nodes: Floats, weights: Floats, residuals: Floats, rounding: float, scale: str) -> Floats:
    """What the distribution of the eigenvalues, on the axis of a density, may be off by between its points."""
    found = np.zeros(grid.size - 1)
    for own in zip(nodes, weights, residuals, strict=True):
        gaps = np.zeros_like(grid)
        for places in (10.0**grid, -(10.0**grid)) if scale == "log" else (grid,):
            value, lower, upper = _bracket(places, *own, rounding)
            gaps += np.maximum(value - lower, upper - value)
        # A node's peak is as wide as its residual, and may lie between two points.
        axis, near = own[0], 4 * (own[2] + rounding)
        if scale == "log":
            axis, near = _logarithms(axis), near / np.maximum(np.abs(axis), near)
        peaks = own[1] * np.minimum(near / (grid[1] - grid[0]), 1.0)
        found += np.maximum(gaps[1:], gaps[:-1]) + np.histogram(axis, grid, weights=peaks)[0]
    return np.asarray(np.minimum(found / len(nodes), 1.0))


def _smoothed(grid: Floats, sigma: float, gaps: Floats) -> Floats:
    """`int |g'(x - t)| gap(t) dt` with the Gaussian `g`: what a widened density may be off by."""
    return np.asarray(np.abs(np.diff(_gaussians(grid, grid, sigma), axis=0)).T @ gaps)


def _gaussians(grid: Floats, centres: Floats, sigma: float) -> Floats:
    """Normal densities around each centre, `(..., m)`."""
    return np.exp(-0.5 * ((grid - centres[..., None]) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))


def resolved_from(grid: Floats, density: Floats, lower: Floats) -> float:
    """The first point at which the lower end of a band is at least a hundredth of the density; infinite if none is.

    Example:
        >>> resolved_from(np.arange(3.0), np.ones(3), np.array([0.0, 0.0, 0.5]))
        2.0
    """
    return float(grid[(lower > 0) & (lower >= density / 100)].min(initial=np.inf))


def symmetric_grid(largest: float, floor: float, points: int) -> Floats:
    """Points of the axis `sign(x) log10(1 + |x| / floor)` from `-largest` to `largest`, and a little beyond."""
    end = math.log10(1 + largest / floor) + 5 * _TENTH
    return np.linspace(-end, end, points)


def on_symmetric_axis(grid: Floats, nodes: Floats, weights: Floats, floor: float) -> Floats:
    """The sum of the weights, each widened by a tenth of a decade, on a `symmetric_grid`: per unit of the axis.

    Example:
        >>> grid = symmetric_grid(1.0, 1e-3, 600)
        >>> heights = on_symmetric_axis(grid, np.array([[-1.0, 1e-9]]), np.array([[0.5, 0.5]]), 1e-3)
        >>> round(float(heights.sum() * (grid[1] - grid[0])), 6)
        1.0
    """
    found = np.zeros_like(grid)
    for x, w in zip(nodes, weights, strict=True):
        some = w > 0
        centres = np.sign(x[some]) * np.log10(1 + np.abs(x[some]) / floor)
        found += w[some] @ _gaussians(grid, centres, _TENTH)
    return found


def _certainly(share: Floats | float, observed: Floats) -> Floats:
    """`chance` where nothing was sampled: 1 or 0."""
    return np.where(observed + _ROUNDING >= share, 1.0, 0.0)


def _require_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise InvalidInputError(f"confidence must lie in (0, 1), got {confidence}")


def _logarithms(nodes: Floats) -> Floats:
    """`log10 |lambda|`, no lower than rounding."""
    sizes = np.abs(nodes)
    return np.asarray(np.log10(np.maximum(sizes, np.finfo(np.float64).eps * sizes.max())))


def standard_error(samples: Floats) -> float:
    """Of the mean; NaN for a single probe, which has no spread."""
    if samples.size < 2:
        return math.nan
    # Squares of the samples may leave the floats.
    power = math.frexp(float(np.abs(samples).max()))[1]
    return math.ldexp(float(np.ldexp(samples, -power).std(ddof=1)) / math.sqrt(samples.size), power)
