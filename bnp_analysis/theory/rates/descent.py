"""The real iterations, nonlinear as they are: gradient descent, heavy ball, BNP with running statistics."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from bnp_analysis.errors import NonFiniteError
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.layers import coverage
from bnp_analysis.network.moments import Moments, layer_moments, update_moments
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.precondition.base import BlockDiagonal, layer_positions
from bnp_analysis.precondition.bnp import BNPPreconditioner, layer_block

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
