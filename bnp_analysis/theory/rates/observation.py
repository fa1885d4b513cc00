"""Run an iteration near its fixed point until its tail is long enough to fit, above the rounding floor throughout."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.theory import rates
from bnp_analysis.theory.rates.descent import DIVERGED, DONE, Iteration, State, run
from bnp_analysis.theory.rates.fit import RateFit, expected_bias, fit_rate
from bnp_analysis.theory.rates.limit_point import Spectrum

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
        alpha = rates.best_step(*ends) if isinstance(step, str) else float(step)
        r = rates.contraction_factor(values, alpha)
        return Prediction(alpha, 0.0, r, rates.time_constant(r))
    best = rates.best_heavy_ball(*ends)
    alpha = best.step if isinstance(step, str) else float(step)
    beta = best.momentum if isinstance(momentum, str) else float(momentum)
    r = rates.heavy_ball_factor(values, alpha, beta)
    at_best = math.isclose(alpha, best.step, rel_tol=1e-6) and math.isclose(beta, best.momentum, rel_tol=1e-6)
    return Prediction(alpha, beta, r, rates.time_constant(r), int(at_best and best.momentum > 0))


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
