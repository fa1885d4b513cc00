"""The real iterations, nonlinear as they are, run near their fixed point until the tail is long enough to fit."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.layers import coverage
from bnp_analysis.network.moments import Moments, layer_moments, update_moments
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.precondition.base import BlockDiagonal, layer_positions
from bnp_analysis.precondition.bnp import BNPPreconditioner, layer_block
from bnp_analysis.theory.rates import formulas
from bnp_analysis.theory.rates.formulas import RateFit, expected_bias, fit_rate
from bnp_analysis.theory.rates.limit_point import Spectrum

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
        self.risk, self.P, self.step = risk, P, step

    @abstractmethod
    def at_rest(self, theta: Tensor) -> State:
        """The state that would stay where it is if the gradient vanished at `theta`."""

    @abstractmethod
    def advance(self, state: State) -> tuple[State, float]:
        """The next state, and `|P^T grad|` at the present one."""

    def gradient(self, theta: Tensor) -> Tensor:
        """`P^T grad L(theta)`."""
        g = self.risk.at(theta).gradient
        return g if self.P is None else self.P.apply_transpose(g)

    def forward(self, z: Tensor) -> Tensor:
        """`P z`."""
        return z if self.P is None else self.P.apply(z)


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
        new = theta - self.step * self.forward(g)
        if not self.momentum:
            return (new,), float(g.norm())
        return (new + self.momentum * (theta - state[1]), theta), float(g.norm())


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
        blocks = {}
        for i, layer in enumerate(self.layers):
            rest = self.moments[layer.name]
            block = layer_block(
                layer,
                replace(rest, mean=statistics[2 * i], variance=statistics[2 * i + 1]),
                eps1=self.settings["eps1"],
                eps2=self.settings["eps2"],
                q=self.settings["q"],
                bias_free=self.settings["bias_free"],
                dtype=theta.dtype,
            )
            blocks[layer.name] = (self.positions[layer.name], block)
        return BlockDiagonal(theta.numel(), blocks, theta.dtype, theta.device)

    def advance(self, state: State) -> tuple[State, float]:
        theta, *statistics = state
        batch = self._moments(theta)
        following: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            m = batch[layer.name]
            following += update_moments(statistics[2 * i], statistics[2 * i + 1], m.mean, m.variance, self.rho)
        P = self.used_at((theta, *following))
        g = self.risk.at(theta).gradient
        measured = g if self.P is None else self.P.apply_transpose(g)
        return (theta - self.step * P.direction(g), *following), float(measured.norm())


@dataclass
class Trace:
    """What a run leaves.

    Attributes:
        norms: `|P^T grad|` at each iteration.
        losses: rows `(iteration, L)`, now and then.
        state: the last one.
        moved: how far the statistics moved in each iteration; empty without any.
        stop: why it ended.
    """

    norms: list[float]
    losses: list[tuple[int, float]]
    state: State
    moved: list[float]
    stop: str = DONE


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
    trace = Trace([], [], state, [])
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
                trace.moved.append(math.sqrt(sum(float((a - b).square().sum()) for a, b in _pairs(following, trace))))
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


def _pairs(following: State, trace: Trace) -> zip[tuple[Tensor, Tensor]]:
    return zip(following[1:], trace.state[1:], strict=True)


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
        time_constant: `-1/log r`.
        power: 1 where the decay is `k r^k`.
    """

    step: float
    momentum: float
    factor: float
    time_constant: float
    power: int = 0


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
        r = formulas.contraction_factor(values, alpha)
        return Prediction(alpha, 0.0, r, formulas.time_constant(r))
    best = formulas.best_heavy_ball(*ends)
    alpha = best.step if isinstance(step, str) else float(step)
    beta = best.momentum if isinstance(momentum, str) else float(momentum)
    r = formulas.heavy_ball_factor(values, alpha, beta)
    at_best = math.isclose(alpha, best.step, rel_tol=1e-6) and math.isclose(beta, best.momentum, rel_tol=1e-6)
    return Prediction(alpha, beta, r, formulas.time_constant(r), int(at_best and best.momentum > 0))


def undeflated(spectrum: Spectrum, method: str) -> float:
    """The time constant at the best parameters if the zeros of the spectrum counted as eigenvalues, as computed.

    A rounding error in place of a zero makes it about `1e16`; an exact zero makes it infinite.
    """
    smallest = float(spectrum.zeros.abs().min()) if spectrum.null_dim else spectrum.smallest
    kappa = spectrum.largest / smallest if smallest > 0 else math.inf
    return (math.sqrt(kappa) if method == "heavy_ball" else kappa) / 2


@dataclass(frozen=True)
class Observation:
    """What a run showed.

    Attributes:
        norms: `|P^T grad|` at each iteration; after the displacement was enlarged, divided by the enlargement.
        losses: rows `(iteration, L)`, as they were.
        state: the last one.
        stop: why the run ended.
        fit: of the tail, None where it is too short.
        bias: of the fit, as the measured spectrum expects it at this length.
        straight: whether the tail decides the rate.
        cycles: how often the displacement was enlarged, plus 1.
    """

    norms: list[float]
    losses: list[tuple[int, float]]
    state: State
    stop: str
    fit: RateFit | None
    bias: float
    straight: bool
    cycles: int


@dataclass(frozen=True)
class Limits:
    """How long a run may be: the tolerance it serves, iterations, and a `time.monotonic()`."""

    tolerance: float
    iterations: int
    deadline: float


def observe(
    iteration: Iteration,
    start: State,
    spectrum: Spectrum,
    prediction: Prediction,
    below: float,
    limits: Limits,
    seen: Callable[[int], None],
) -> Observation:
    """Run in cycles: down to `below`, then the displacement from the limit enlarged to its first size, and on.

    Each cycle is the nonlinear iteration, begun where the last one pointed to; so the tail may be longer than the
    digits of one run. The norms of the cycles continue each other after division by the enlargements.
    """
    state, scale = start, 1.0
    norms: list[float] = []
    losses: list[tuple[int, float]] = []
    for cycle in range(1, _CYCLES + 1):
        most = limits.iterations - len(norms)
        trace = run(iteration, state, below=below, most=most, deadline=limits.deadline, first=len(norms), seen=seen)
        if norms and trace.norms:
            scale *= norms.pop() / scale / trace.norms[0]  # the same iterate, enlarged
        norms += [scale * norm for norm in trace.norms]
        losses += trace.losses
        fit, bias = (None, math.inf) if trace.stop == DIVERGED else _fit(norms, spectrum, prediction)
        straight = (
            fit is not None
            and bias <= _BIAS
            and fit.drift <= _DRIFT
            and fit.half_width <= limits.tolerance
            and fit.e_folds >= _E_FOLDS
        )
        seen_so_far = Observation(norms, losses, trace.state, trace.stop, fit, bias, straight, cycle)
        if trace.stop != DONE or straight or len(norms) >= limits.iterations or trace.norms[-1] == 0:
            break
        state = _enlarged(iteration, trace.state, spectrum, trace.norms[0] / trace.norms[-1])
    return seen_so_far


def _fit(norms: list[float], spectrum: Spectrum, prediction: Prediction) -> tuple[RateFit | None, float]:
    try:
        fit = fit_rate(norms, power=prediction.power)
    except InvalidInputError:
        return None, math.inf
    bias = expected_bias(
        spectrum.values,
        prediction.step,
        prediction.momentum,
        first=fit.first,
        last=fit.last,
        power=prediction.power,
    )
    return fit, bias


def _enlarged(iteration: Iteration, state: State, spectrum: Spectrum, factor: float) -> State:
    """The state with its displacement from the limit multiplied.

    The limit is a Newton step away, in the range; what the run has drifted along the minimizers is left behind.
    Statistics stay where they are: with `rho` near 1 they have hardly moved.
    """
    theta, *rest = state
    z = spectrum.vectors @ ((spectrum.vectors.T @ iteration.gradient(theta)) / spectrum.values)
    limit = theta - iteration.forward(z)
    enlarged = limit + factor * iteration.forward(z)
    if len(state) == 2:  # heavy ball remembers one more point
        d = rest[0] - limit
        d = d if iteration.P is None else iteration.P.solve(d)
        return enlarged, limit + factor * iteration.forward(spectrum.vectors @ (spectrum.vectors.T @ d))
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
    fixed, d = iteration.at_rest(theta), iteration.forward(z)
    parameters = 2 if len(fixed) == 2 else 1
    moved = [t + d for t in fixed[:parameters]]
    for mean, variance in zip(fixed[parameters::2], fixed[parameters + 1 :: 2], strict=True):
        noise = torch.randn(2, *mean.shape, generator=g, dtype=torch.float64).to(mean)
        moved += [mean + size * variance.sqrt() * noise[0], variance * (1 + size * noise[1])]
    return tuple(moved)
