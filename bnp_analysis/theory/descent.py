"""The real iterations, nonlinear as they are, run near their fixed point until the tail is long enough to fit."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.layers import coverage
from bnp_analysis.network.moments import Moments, layer_moments, update_moments
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.precondition.base import BlockDiagonal, layer_positions
from bnp_analysis.precondition.bnp import BNPPreconditioner, layer_block
from bnp_analysis.theory import rates as formulas
from bnp_analysis.theory.limit_point import Spectrum, given_or_identity
from bnp_analysis.theory.rates import RateFit, expected_bias, fit_rate

State = tuple[Tensor, ...]

DONE, DIVERGED, TIME, INTERRUPTED, LIMIT = "done", "diverged", "time limit", "interrupted", "iteration limit"
_SEEN_EVERY = 16


class Iteration(ABC):
    """A map on states whose first tensor is `theta`; its fixed point has a vanishing gradient.

    Args:
        risk: gives the gradients.
        P: the preconditioner in whose variables gradients are measured, None for the identity.
        step: `alpha`.
    """

    def __init__(self, risk: EmpiricalRisk, P: Preconditioner | None, step: float) -> None:
        self.risk, self.P, self.step = risk, given_or_identity(risk, P), step

    @abstractmethod
    def at_rest(self, theta: Tensor) -> State:
        """The state that would stay where it is if the gradient vanished at `theta`."""

    @abstractmethod
    def advance(self, state: State) -> tuple[State, float]:
        """The next state, and `|P^T grad|` at the present one."""

    def gradient(self, theta: Tensor) -> Tensor:
        """`P^T grad L(theta)`."""
        return self.P.apply_transpose(self.risk.at(theta).gradient)


class HeavyBallIteration(Iteration):
    """`theta <- theta - alpha P P^T grad + beta (theta - theta_previous)`; gradient descent for `beta = 0`."""

    def __init__(self, risk: EmpiricalRisk, P: Preconditioner | None, step: float, momentum: float = 0.0) -> None:
        super().__init__(risk, P, step)
        self.momentum = momentum

    def at_rest(self, theta: Tensor) -> State:
        return (theta, theta) if self.momentum else (theta,)

    def advance(self, state: State) -> tuple[State, float]:
        theta = state[0]
        g = self.gradient(theta)
        new = theta - self.step * self.P.apply(g)
        following = (new + self.momentum * (theta - state[1]), theta) if self.momentum else (new,)
        return following, float(g.norm())


class RunningBNP(Iteration):
    """Full-batch BNP whose statistics follow the iterates: `mu <- rho mu + (1-rho) mu_batch` (T15).

    The state is `theta`, then mean and variance of each covered layer's inputs. A step first takes in the statistics
    at the present point, then uses them, as in training.

    Args:
        risk, step: as above.
        limit: the preconditioner of the limit statistics; its damping, rule for `q` and form are used at every step.
        rho: the weight of the past.
    """

    def __init__(self, risk: EmpiricalRisk, limit: BNPPreconditioner, step: float, rho: float) -> None:
        super().__init__(risk, limit, step)
        self.rho = rho
        self.layers = coverage(risk)
        self.positions = {layer.name: layer_positions(layer, risk.space) for layer in self.layers}
        self.settings = limit.settings
        self.moments = self._moments(risk.theta)

    def _moments(self, theta: Tensor) -> dict[str, Moments]:
        return layer_moments(self.risk.at(theta), statistics=self.settings["statistics"], layers=self.layers)

    def at_rest(self, theta: Tensor) -> State:
        return (theta, *(t for m in self._moments(theta).values() for t in (m.mean, m.variance)))

    def used_at(self, state: State) -> Preconditioner:
        """The preconditioner of a state's statistics."""
        theta, *statistics = state
        settings, blocks = {name: self.settings[name] for name in ("eps1", "eps2", "q", "bias_free")}, {}
        for layer, mean, variance in zip(self.layers, statistics[::2], statistics[1::2], strict=True):
            moments = replace(self.moments[layer.name], mean=mean, variance=variance)
            block = layer_block(layer, moments, **settings, dtype=theta.dtype)
            blocks[layer.name] = (self.positions[layer.name], block)
        return BlockDiagonal(theta.numel(), blocks, theta.dtype, theta.device)

    def advance(self, state: State) -> tuple[State, float]:
        theta, *statistics = state
        following: list[Tensor] = []
        for m, mean, variance in zip(self._moments(theta).values(), statistics[::2], statistics[1::2], strict=True):
            following += update_moments(mean, variance, m.mean, m.variance, self.rho)
        P, g = self.used_at((theta, *following)), self.risk.at(theta).gradient
        return (theta - self.step * P.direction(g), *following), float(self.P.apply_transpose(g).norm())


@dataclass
class Trace:
    """What a run leaves.

    Attributes:
        state: the last one.
        norms: `|P^T grad|` at each iteration; after the displacement was enlarged, divided by the enlargement.
        losses: rows `(iteration, L)`, now and then, as they were.
        moved: how far the statistics moved in each iteration; empty without any.
        stop: why it ended.
        fit: of the tail, None where it is too short.
        bias: of the fit, as the measured spectrum expects it at this length.
        straight: whether the tail decides the rate.
        cycles: how often the displacement was enlarged, plus 1.
    """

    state: State
    norms: list[float] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    stop: str = DONE
    fit: RateFit | None = None
    bias: float = math.inf
    straight: bool = False
    cycles: int = 0


def run(
    iteration: Iteration,
    state: State,
    *,
    below: float,
    most: int,
    deadline: float,
    first: int = 0,
    seen: Callable[[int], None] = lambda done: None,
) -> Trace:
    """Iterate until the gradient norm falls to `below`; what was done is kept whatever ends it.

    Args:
        iteration: the map.
        state: where to start.
        below: the norm at which to stop.
        most: iterations at most.
        deadline: `time.monotonic()` after which to stop.
        first: the number of the first iteration.
        seen: told the number of iterations from time to time.
    """
    trace = Trace(state)
    every = max(1, most // 200)
    try:
        for k in range(most):
            following, norm = iteration.advance(trace.state)
            trace.norms.append(norm)
            if k % every == 0:
                trace.losses.append((first + k, float(iteration.risk(trace.state[0]))))
            if not math.isfinite(norm) or norm > 1e4 * trace.norms[0]:
                trace.stop = DIVERGED
                return trace
            if len(state) > 2:
                pairs = zip(following[1:], trace.state[1:], strict=True)
                trace.moved.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs)))
            if norm <= below:
                return trace
            trace.state = following
            if k % _SEEN_EVERY == 0:
                seen(first + k)
                if time.monotonic() > deadline:
                    trace.stop = TIME
                    return trace
        trace.stop = LIMIT
    except NonFiniteError:
        trace.stop = DIVERGED
    except KeyboardInterrupt:
        trace.stop = INTERRUPTED
    return trace


_BIAS = 0.01  # what the length of the fitted window may cost, by the measured spectrum
_DRIFT = 0.02  # by how much the slopes of the tail's halves may differ
_E_FOLDS = 2.0  # over which a tail must fall at least
_CYCLES = 40


@dataclass(frozen=True)
class Prediction:
    """What a spectrum says of an iteration.

    Attributes:
        step, momentum: of the iteration.
        factor: `r`.
        power: 1 where the decay is `k r^k`.
    """

    step: float
    momentum: float
    factor: float
    power: int = 0

    @property
    def time_constant(self) -> float:
        """`-1/log r`."""
        return formulas.time_constant(self.factor)


def predict(spectrum: Spectrum, method: str, step: float | str, momentum: float | str) -> Prediction:
    """Choose what is `"optimal"` and predict `r` from the nonzero eigenvalues.

    Args:
        spectrum: at the limit point.
        method: `"heavy_ball"`, or anything else for no momentum.
        step, momentum: numbers, or `"optimal"`: the best step at this momentum, the best momentum at the best step.
    """
    values = spectrum.values
    ends = spectrum.largest, spectrum.smallest
    if method != "heavy_ball":
        alpha = formulas.best_step(*ends) if isinstance(step, str) else float(step)
        return Prediction(alpha, 0.0, formulas.contraction_factor(values, alpha))
    best = formulas.best_heavy_ball(*ends)
    alpha = best.step if isinstance(step, str) else float(step)
    beta = best.momentum if isinstance(momentum, str) else float(momentum)
    r = formulas.heavy_ball_factor(values, alpha, beta)
    at_best = math.isclose(alpha, best.step, rel_tol=1e-6) and math.isclose(beta, best.momentum, rel_tol=1e-6)
    return Prediction(alpha, beta, r, int(at_best and best.momentum > 0))


def undeflated(spectrum: Spectrum, method: str) -> float:
    """The time constant at the best parameters if the zeros of the spectrum counted as eigenvalues, as computed.

    A rounding error in place of a zero makes it about `1e16`; an exact zero makes it infinite.
    """
    smallest = float(spectrum.zeros.abs().min()) if spectrum.null_dim else spectrum.smallest
    kappa = spectrum.largest / smallest if smallest > 0 else math.inf
    return (math.sqrt(kappa) if method == "heavy_ball" else kappa) / 2


def observe(
    iteration: Iteration,
    start: State,
    spectrum: Spectrum,
    prediction: Prediction,
    *,
    below: float,
    most: int,
    deadline: float,
    tolerance: float,
    seen: Callable[[int], None],
) -> Trace:
    """Run in cycles: down to `below`, then the displacement from the limit enlarged to its first size, and on.

    Each cycle is the nonlinear iteration, begun where the last one pointed to; so the tail may be longer than the
    digits of one run. The norms of the cycles continue each other after division by the enlargements.
    """
    whole, scale = Trace(start), 1.0
    for whole.cycles in range(1, _CYCLES + 1):
        done = len(whole.norms)
        cycle = run(iteration, whole.state, below=below, most=most - done, deadline=deadline, first=done, seen=seen)
        if whole.norms and cycle.norms:
            scale *= whole.norms.pop() / scale / cycle.norms[0]  # the same iterate, enlarged
        whole.norms += [scale * norm for norm in cycle.norms]
        whole.losses += cycle.losses
        whole.state = cycle.state
        whole.stop = cycle.stop
        diverged = whole.stop == DIVERGED
        whole.fit, whole.bias = (None, math.inf) if diverged else _fit(whole.norms, spectrum, prediction)
        whole.straight = (
            whole.fit is not None
            and whole.bias <= _BIAS
            and whole.fit.drift <= _DRIFT
            and whole.fit.half_width <= tolerance
            and whole.fit.e_folds >= _E_FOLDS
        )
        if whole.stop != DONE or whole.straight or len(whole.norms) >= most or cycle.norms[-1] == 0:
            break
        whole.state = _enlarged(iteration, whole.state, spectrum, cycle.norms[0] / cycle.norms[-1])
    return whole


def _fit(norms: list[float], spectrum: Spectrum, p: Prediction) -> tuple[RateFit | None, float]:
    try:
        fit = fit_rate(norms, power=p.power)
    except InvalidInputError:
        return None, math.inf
    tail = {"first": fit.first, "last": fit.last, "power": p.power}
    return fit, expected_bias(spectrum.values, p.step, p.momentum, **tail)


def _enlarged(iteration: Iteration, state: State, spectrum: Spectrum, factor: float) -> State:
    """The state with its displacement from the limit multiplied.

    The limit is a Newton step away, in the range; what the run has drifted along the minimizers is left behind.
    Statistics stay where they are: with `rho` near 1 they have hardly moved.
    """
    theta, *rest = state
    z = spectrum.vectors @ ((spectrum.vectors.T @ iteration.gradient(theta)) / spectrum.values)
    P = iteration.P
    limit = theta - P.apply(z)
    enlarged = limit + factor * P.apply(z)
    if len(state) == 2:  # heavy ball remembers one more point
        d = P.solve(rest[0] - limit)
        return enlarged, limit + factor * P.apply(spectrum.vectors @ (spectrum.vectors.T @ d))
    return (enlarged, *rest)


def seconds_per_iteration(iteration: Iteration, state: State) -> float:
    """Measured on a few."""
    iteration.advance(state)
    began = time.perf_counter()
    for _ in range(5):
        state, _ = iteration.advance(state)
    return (time.perf_counter() - began) / 5


def perturbed(iteration: Iteration, theta: Tensor, z: Tensor, size: float, seed: int) -> State:
    """The state of rest moved by `P z`; means by `size` deviations, variances by `size` of themselves."""
    g = torch.Generator().manual_seed(seed)
    fixed, d = iteration.at_rest(theta), iteration.P.apply(z)
    parameters = 2 if len(fixed) == 2 else 1
    moved = [t + d for t in fixed[:parameters]]
    for mean, variance in zip(fixed[parameters::2], fixed[parameters + 1 :: 2], strict=True):
        noise = torch.randn(2, *mean.shape, generator=g, dtype=torch.float64).to(mean)
        moved += [mean + size * variance.sqrt() * noise[0], variance * (1 + size * noise[1])]
    return tuple(moved)
