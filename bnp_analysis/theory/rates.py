"""How fast gradient descent, heavy ball and BNP contract near a minimizer: predicted, run, fitted (T14, T15).

First formulas, numbers in and numbers out; then the real iterations, nonlinear as they are, run near their fixed point
until the tail is long enough to fit. All eigenvalues are the *nonzero* ones of the Hessian in the variables of the
iteration, `P^T Hess P`: along the null space nothing moves, so its zeros do not slow the iteration down.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.layers import coverage
from bnp_analysis.network.moments import Moments, layer_moments, update_moments
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.precondition.base import BlockDiagonal, layer_positions
from bnp_analysis.precondition.bnp import BNPPreconditioner, layer_block
from bnp_analysis.results import Result
from bnp_analysis.theory.limit_point import Spectrum, given_or_identity

Values = Tensor | npt.NDArray[np.float64] | Sequence[float]


class HeavyBall(NamedTuple):
    """Step size `alpha` and momentum `beta` of `theta_(k+1) = theta_k - alpha grad + beta (theta_k - theta_(k-1))`."""

    step: float
    momentum: float


def contraction_factor(eigenvalues: Values, step: float) -> float:
    """The asymptotic factor of gradient descent, `r(alpha) = max_i |1 - alpha lambda_i|` over nonzero eigenvalues.

    Args:
        eigenvalues: the nonzero ones, all positive, in any order.
        step: `alpha > 0`.

    Returns:
        The factor; 1 or more means that the iteration does not converge.

    Raises:
        InvalidInputError: no eigenvalue, one that is not positive and finite, or such a step.

    Source: T14.

    Example:
        >>> contraction_factor([4.0, 1.0], 0.25)
        0.75
    """
    values = positive(eigenvalues)
    return float(np.abs(1 - _positive_number(step, "step") * values).max())


def best_step(largest: float, smallest: float) -> float:
    """The step at which gradient descent contracts fastest, `alpha = 2 / (lambda_max + lambda_min+)`.

    Example:
        >>> best_step(4.0, 1.0)
        0.4
    """
    largest, smallest = _ends(largest, smallest)
    return 2 / (largest + smallest)


def best_factor(kappa: float) -> float:
    """The factor at the best step, `r = (kappa* - 1) / (kappa* + 1)`.

    Example:
        >>> best_factor(4.0)
        0.6
    """
    return (_condition(kappa) - 1) / (kappa + 1)


def best_heavy_ball(largest: float, smallest: float) -> HeavyBall:
    """The best step and momentum: `alpha = (2/(sqrt lambda_max + sqrt lambda_min+))^2`, `beta = r^2`.

    There `r = (sqrt kappa* - 1)/(sqrt kappa* + 1)`, both ends of the spectrum have a double root, and the decay is
    `k r^k`.

    Example:
        >>> best_heavy_ball(9.0, 1.0)
        HeavyBall(step=0.25, momentum=0.25)
    """
    largest, smallest = _ends(largest, smallest)
    high, low = math.sqrt(largest), math.sqrt(smallest)
    return HeavyBall((2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2)


def best_heavy_ball_factor(kappa: float) -> float:
    """The factor of heavy ball at its optimum, `(sqrt kappa* - 1) / (sqrt kappa* + 1)`.

    Example:
        >>> best_heavy_ball_factor(9.0)
        0.5
    """
    return best_factor(math.sqrt(_condition(kappa)))


def heavy_ball_factor(eigenvalues: Values, step: float, momentum: float) -> float:
    """The asymptotic factor of heavy ball at any step and momentum.

    The largest modulus of a root of `x^2 - (1 + beta - alpha lambda) x + beta` over the nonzero eigenvalues:
    `sqrt beta` where `(1 + beta - alpha lambda)^2 <= 4 beta`, else
    `(|1 + beta - alpha lambda| + sqrt((1 + beta - alpha lambda)^2 - 4 beta)) / 2`.

    Args:
        eigenvalues: the nonzero ones, all positive.
        step: `alpha > 0`.
        momentum: `0 <= beta < 1`; 0 is gradient descent.

    Raises:
        InvalidInputError: see `contraction_factor`; a momentum outside `[0, 1)`.

    Source: T14.

    Example:
        >>> heavy_ball_factor([9.0, 1.0], 0.25, 0.25)
        0.5
    """
    values = positive(eigenvalues)
    beta = check_momentum(momentum)
    trace = np.abs(1 + beta - _positive_number(step, "step") * values)
    excess = trace**2 - 4 * beta
    roots = np.where(excess <= 0, math.sqrt(beta), (trace + np.sqrt(np.maximum(excess, 0))) / 2)
    return float(roots.max())


def joint_spectrum(eigenvalues: Values, step: float, rho: float) -> npt.NDArray[np.float64]:
    """The eigenvalues of full-batch BNP with running statistics, `{1 - alpha lambda_i} u {rho}`, by magnitude.

    The map of parameters and statistics is block triangular at a minimizer, since the preconditioner multiplies a
    gradient that vanishes there: the parameters keep the factor of the limit preconditioner even if `rho` is larger.

    Args:
        eigenvalues: the nonzero ones of `P^T Hess P` with the preconditioner of the limit statistics.
        step: `alpha > 0`.
        rho: `0 <= rho < 1`, the weight of the past in the statistics.

    Returns:
        The distinct values in descending magnitude, `rho` once for all statistics.

    Source: T15.

    Example:
        >>> joint_spectrum([4.0, 1.0], 0.25, 0.9)
        array([0.9 , 0.75, 0.  ])
    """
    if not 0 <= rho < 1:
        raise InvalidInputError(f"rho must be in [0, 1), got {rho}")
    values = 1 - _positive_number(step, "step") * positive(eigenvalues)
    values = np.unique(np.append(values, rho))
    return values[np.argsort(-np.abs(values), kind="stable")]


def time_constant(factor: float) -> float:
    """Iterations in which an error that contracts by `r` falls by the factor `e`: `-1 / log r`.

    Returns:
        The number, infinite for `r >= 1`, 0 for `r = 0`.

    Example:
        >>> round(time_constant(0.9), 4)
        9.4912
    """
    if not factor >= 0:
        raise InvalidInputError(f"a contraction factor is not negative, got {factor}")
    if factor >= 1:
        return math.inf
    return 0.0 if factor == 0 else -1 / math.log(factor)


def check_momentum(momentum: float) -> float:
    """Refuse a momentum outside `[0, 1)`."""
    if not 0 <= momentum < 1:
        raise InvalidInputError(f"momentum must be in [0, 1), got {momentum}")
    return float(momentum)


def positive(eigenvalues: Values) -> npt.NDArray[np.float64]:
    """The values as a flat array, refused unless all are positive and finite."""
    given: Any = eigenvalues.detach().cpu() if isinstance(eigenvalues, Tensor) else eigenvalues
    values = np.asarray(given, dtype=np.float64).reshape(-1)
    if not values.size or not bool(np.isfinite(values).all()) or not bool((values > 0).all()):
        raise InvalidInputError(
            f"the nonzero eigenvalues must be positive and finite, got {values.size} of them"
            + (f" from {values.min():.3g} to {values.max():.3g}" if values.size else "")
            + "; zeros belong to the null space, and a negative one means that the point is no minimizer"
        )
    return values


def _positive_number(value: float, name: str) -> float:
    if not 0 < value < math.inf:
        raise InvalidInputError(f"{name} must be positive and finite, got {value}")
    return float(value)


def _ends(largest: float, smallest: float) -> tuple[float, float]:
    if not 0 < smallest <= largest < math.inf:
        raise InvalidInputError(f"0 < smallest <= largest is needed, got {smallest} and {largest}")
    return float(largest), float(smallest)


def _condition(kappa: float) -> float:
    if not 1 <= kappa < math.inf:
        raise InvalidInputError(f"a condition number is at least 1 and finite, got {kappa}")
    return float(kappa)


RULE = (
    "least squares through log|grad| over the second half of the iterations above the rounding floor, minus log k "
    "where the decay is k r^k; 95 % interval from the slopes of 8 consecutive blocks"
)
_BLOCKS = 8
_SAMPLES = 400


@dataclass(frozen=True, kw_only=True, repr=False)
class RateFit(Result):
    """What the tail of a run says about its contraction factor.

    Attributes:
        factor: `r`.
        time_constant: `-1/log r`, infinite where nothing falls.
        low, high: 95 % interval of the time constant; `high` is infinite where the slopes do not exclude it.
        drift: `|slope of the second half / slope of the first half - 1|` of the tail: small in a straight tail.
        first, last: iterations of the tail, `last` excluded.
        e_folds: by how many factors of `e` the norm falls over the tail.
        power: 1 for `k r^k`, else 0.
        rule: how it was fitted.
    """

    factor: float
    time_constant: float
    low: float
    high: float
    drift: float
    first: int
    last: int
    e_folds: float
    power: int = 0
    rule: str = RULE

    @property
    def half_width(self) -> float:
        """Of the interval, relative to the time constant."""
        return max(self.high - self.time_constant, self.time_constant - self.low) / self.time_constant

    def summary(self) -> str:
        """The factor, its time constant and the interval."""
        return (
            f"r = {self.factor:.8g}, -1/log r = {self.time_constant:.5g} ({self.low:.5g} .. {self.high:.5g}), "
            f"iterations {self.first} to {self.last}, {self.e_folds:.1f} e-folds"
        )


def fit_rate(norms: Values, *, floor: float = 0.0, power: int = 0) -> RateFit:
    """Fit `|g_k| ~ C r^k`, or `C k r^k`, to the tail of a run.

    The rule: of the iterations before the norm first falls to `floor`, the second half; a straight line by least
    squares through `log|g_k|` (minus `log k` for `power=1`). The interval is that of a mean of 8 slopes of
    consecutive blocks, which does not pretend that neighbouring iterations are independent.

    Args:
        norms: `(n,)`, one per iteration.
        floor: at and below it rounding decides.
        power: 1 where a double root makes the decay `k r^k`.

    Returns:
        A `RateFit`.

    Raises:
        InvalidInputError: fewer than 32 iterations above the floor, or norms there that are no numbers.

    Source: T14.

    Example:
        >>> fit = fit_rate([0.9**k for k in range(100)])
        >>> round(fit.factor, 10), round(fit.time_constant, 4), fit.first
        (0.9, 9.4912, 50)
    """
    if power not in (0, 1):
        raise InvalidInputError(f"power must be 0 or 1, got {power}")
    given = np.asarray(norms.detach().cpu() if isinstance(norms, Tensor) else norms, dtype=np.float64)
    below = np.flatnonzero(given <= floor)
    last = int(below[0]) if below.size else given.size
    first = last // 2
    if last - first < 2 * _BLOCKS:
        raise InvalidInputError(
            f"{last} iterations above the rounding floor {floor:.2g} are too few to fit; 32 are needed"
        )
    values = positive(given[:last])
    k = np.arange(first, last, dtype=np.float64)
    y = np.log(values[first:last])
    y -= power * np.log(k)
    slope = _slope(k, y)
    blocks = np.array([_slope(a, b) for a, b in zip(*(np.array_split(v, _BLOCKS) for v in (k, y)), strict=True)])
    # Here, since it takes longer to import than all else together.
    from scipy.stats import t as student

    spread = float(student.ppf(0.975, _BLOCKS - 1) * blocks.std(ddof=1) / math.sqrt(_BLOCKS))
    half = len(k) // 2
    early, late = _slope(k[:half], y[:half]), _slope(k[half:], y[half:])
    return RateFit(
        factor=math.exp(slope),
        time_constant=_constant(slope),
        low=_constant(slope - spread),
        high=_constant(slope + spread),
        drift=abs(late / early - 1) if early else math.inf,
        first=first,
        last=last,
        e_folds=float(np.log(values[first] / values[last - 1])),
        power=power,
    )


def expected_bias(eigenvalues: Values, step: float, momentum: float, *, first: int, last: int, power: int = 0) -> float:
    """How far the fit would be off if every mode of the spectrum took part equally: is the run long enough?

    On a quadratic with these eigenvalues, started with equal gradients in all modes, the norms at the iterations of the
    tail are fitted by the same rule and compared with the asymptotic factor. Modes that are nearly as slow as the
    slowest make it large; then a fitted slope decides nothing. It judges the length of a run and is no observation.

    Args:
        eigenvalues: the nonzero ones.
        step, momentum: of the iteration; momentum 0 for gradient descent.
        first, last: the tail.
        power: as in `fit_rate`.

    Returns:
        `|fitted / asymptotic - 1|` of the time constants.

    Example:
        >>> expected_bias([4.0, 1.0], 0.4, 0.0, first=50, last=100) < 1e-6
        True
    """
    values, beta = positive(eigenvalues), check_momentum(momentum)
    k = np.unique(np.linspace(first, last - 1, _SAMPLES).astype(np.int64))
    # (e_(k+1), e_k) = M (e_k, e_(k-1)) for every mode, over the asymptotic factor r; started at rest, e_(-1) = e_0.
    M = np.zeros((len(values), 2, 2))
    M[:, 0, 0], M[:, 0, 1], M[:, 1, 0] = 1 + beta - step * values, -beta, 1
    r = heavy_ball_factor(values, step, beta)
    if r == 0:
        return 0.0
    gaps = np.diff(k, prepend=0)
    powers = {int(gap): np.linalg.matrix_power(M / r, int(gap)) for gap in set(gaps)}
    e, norms = np.ones((len(values), 2, 1)), []
    for gap in gaps:
        e = powers[int(gap)] @ e
        norms.append(np.linalg.norm(e[:, 0]))
    trace = np.log(np.maximum(norms, np.finfo(np.float64).tiny))
    slope = _slope(k.astype(np.float64), trace - power * np.log(np.maximum(k, 1)))
    shift = math.log(r)
    return abs(shift / (shift + slope) - 1) if shift + slope < 0 else math.inf


def _slope(k: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    centred = k - k.mean()
    return float(centred @ (y - y.mean()) / (centred @ centred))


def _constant(slope: float) -> float:
    return -1 / slope if slope < 0 else math.inf


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
        return time_constant(self.factor)


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
        alpha = best_step(*ends) if isinstance(step, str) else float(step)
        return Prediction(alpha, 0.0, contraction_factor(values, alpha))
    best = best_heavy_ball(*ends)
    alpha = best.step if isinstance(step, str) else float(step)
    beta = best.momentum if isinstance(momentum, str) else float(momentum)
    r = heavy_ball_factor(values, alpha, beta)
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
