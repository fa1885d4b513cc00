"""The steps of a rate check: hypotheses, limit point, prediction, run; each may say why it cannot go on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.precondition.bnp import BNPPreconditioner, bnp_preconditioner
from bnp_analysis.symmetry import Cause
from bnp_analysis.theory.rates.descent import (
    DIVERGED,
    DONE,
    INTERRUPTED,
    HeavyBallIteration,
    Iteration,
    RunningBNP,
    State,
)
from bnp_analysis.theory.rates.limit_point import Spectrum, length_of, measure
from bnp_analysis.theory.rates.minimizer import Minimizer, find_minimizer, gradient_floor
from bnp_analysis.theory.rates.neighbourhood import (
    KINK,
    balanced,
    off_the_minimizers,
    remainder,
    roughness,
    undetermined,
)
from bnp_analysis.theory.rates.observation import (
    Limits,
    Observation,
    Prediction,
    observe,
    perturbed,
    predict,
    seconds_per_iteration,
)
from bnp_analysis.theory.rates.options import NotPredictable, RateOptions

#: Causes that hold at a point and not along an orbit: two equal units, for instance, make columns of a layer dependent.
_AT_A_POINT = (Cause.DEPENDENT_INPUTS, Cause.UNREAD_OUTPUTS)
_SHIFT = 0.005  # by how much the move of the limit point may change the prediction
_LENGTH = 5.0  # time constants that a run has at least
_NONLINEAR = 0.1
_STATISTICS = 1e-3  # how far, relative, running statistics start from their limit at most
_FASTEST = 0.3  # time constants below are no rates: three digits or more in each iteration


class Study:
    """One rate check on its way; what is known so far survives whatever stops it."""

    def __init__(
        self,
        risk: EmpiricalRisk,
        given: Preconditioner | None,
        method: str,
        step: float | str,
        seed: int,
        deadline: float,
        options: RateOptions,
    ) -> None:
        fits = isinstance(given, BNPPreconditioner) and given.settings["q"] != "measured"
        if method == "bnp" and given is not None and not fits:
            raise InvalidInputError(
                "running statistics need the settings of a BNPPreconditioner with q='auto' or a number; make one with "
                "bnp_preconditioner, or use method='gd' for a fixed preconditioner"
            )
        self.risk, self.given, self.method, self.step = risk.gathered(), given, method, step
        self.seed, self.deadline, self.options = seed, deadline, options
        self.hypotheses: dict[str, bool] = {}
        self.details: dict[str, Any] = {}
        self.outcome = "not applicable"
        self.minimizer: Minimizer | None = None
        self.spectrum: Spectrum | None = None
        self.prediction: Prediction | None = None
        self.seen: Observation | None = None
        self.products = self.iterations = 0

    def go(self, update: Callable[[int], None]) -> None:
        """Everything, in order.

        Raises:
            NotPredictable: with the reason.
        """
        self._check_input()
        self.minimizer = find_minimizer(self.risk, seed=self.seed, deadline=self.deadline)
        self._require("minimizer attained", self.minimizer.attained, self.minimizer.reason)
        here, size = self.risk.at(self.minimizer.theta), self.options.perturbation
        for _ in range(4):
            P = self._preconditioner(here)
            self._measure(here, P)
            observation, size = self._run(here, P, size, update)
            if observation.stop == DIVERGED:
                size /= 30
                continue
            end = self.risk.at(observation.state[0])
            ended = observation.stop != DONE
            if (ended and not observation.straight) or self._moved(end, observation.state) <= _SHIFT:
                self._judge(observation)
                return
            if ended:
                self.outcome = observation.stop
                raise NotPredictable(f"the {observation.stop} came when the limit point had moved, before another run")
            here = self.risk.at(find_minimizer(end, seed=self.seed, deadline=self.deadline).theta)
            size /= 30
        raise NotPredictable(
            "from no perturbation that rounding allows did the run stay where the prediction holds: it left the "
            "neighbourhood, or its limit point moved so far that the spectrum there predicts another rate"
        )

    def _check_input(self) -> None:
        risk, options = self.risk, self.options
        dtype, n = risk.space.dtype, risk.space.dim
        self._require(
            "float64",
            dtype == torch.float64,
            f"the risk is in {dtype}, whose rounding floor leaves no tail to fit; use risk.to(torch.float64)",
        )
        self._require(
            "no penalty outside of the loss",
            options.weight_decay == 0,
            f"a penalty kept in the optimizer (weight_decay={options.weight_decay:g}) is not preconditioned and moves "
            "the fixed point away from the minimizer of the loss; put it into the loss",
        )
        self._require(
            "spectrum within reach",
            n <= options.max_parameters,
            f"{n} parameters: eigenvalues were not computed, the dense Hessian is diagonalized up to "
            f"{options.max_parameters} (RateOptions.max_parameters)",
        )
        first, second = risk.at(risk.theta).gradient, risk.at(risk.theta).gradient
        same = float((first - second).norm()) <= 1e-12 * float(first.norm())
        self._require("deterministic risk", same, "two gradients at one point differ by more than rounding")

    def _require(self, hypothesis: str, holds: bool, reason: str) -> None:
        self.hypotheses[hypothesis] = holds
        if not holds:
            raise NotPredictable(reason)

    def _preconditioner(self, here: EmpiricalRisk) -> Preconditioner | None:
        """The fixed one, or that of the statistics at the point."""
        if self.method != "bnp":
            return self.given
        settings = self.given.settings if isinstance(self.given, BNPPreconditioner) else {}
        P: Preconditioner = bnp_preconditioner(here, **settings)
        return P

    def _measure(self, here: EmpiricalRisk, P: Preconditioner | None) -> None:
        """Spectrum, hypotheses about it, prediction."""
        s = measure(here, P)
        self.spectrum = s
        self.products += s.products
        self._require(
            "Hessian positive semidefinite",
            s.negative == 0,
            f"the Hessian at the limit point is indefinite (eigenvalue {s.negative:.3g}, noise {s.noise:.1g}): a "
            "saddle, from which the iteration would leave",
        )
        self._require("Hessian not zero", len(s.values) > 0, "the Hessian at the limit point is zero to rounding")
        floor = gradient_floor(here, P, seed=self.seed)
        singular = undetermined(here, P, s, floor)
        self._require(
            "eigenvalues resolved",
            s.unresolved == 0,
            singular
            or f"{s.unresolved} eigenvalues are neither zero nor nonzero beyond doubt: their size is within "
            f"1000 times the noise {s.noise:.1g} of the computed Hessian",
        )
        doubtful = s.unexplained or any(cause in s.sources for cause in _AT_A_POINT)
        why = singular or (off_the_minimizers(here, P, s, floor) if doubtful else "")
        self._require(
            "null space tangent to the minimizers",
            not why,
            f"{why}: a singular minimizer (redundant units?), where convergence is sublinear",
        )
        self.prediction = predict(s, self.method, self.step, self.options.momentum)
        p = self.prediction
        self._require(
            "step below 2/lambda_max",
            p.factor < 1,
            f"at step {p.step:.4g} the factor is {p.factor:.6g}: not below 1, as the step is not below "
            f"{2 * (1 + p.momentum) / s.largest:.4g}",
        )
        self._require(
            "a rate to observe",
            p.time_constant > _FASTEST,
            f"kappa* is {s.kappa:.6g} and r is {p.factor:.2g}: an iteration or two are at the rounding floor",
        )

    def _iteration(self, here: EmpiricalRisk, P: Preconditioner | None) -> Iteration:
        assert self.prediction is not None
        if self.method == "bnp":
            assert isinstance(P, BNPPreconditioner)
            return RunningBNP(here, P, self.prediction.step, self.options.rho)
        return HeavyBallIteration(here, P, self.prediction.step, self.prediction.momentum)

    def _run(
        self, here: EmpiricalRisk, P: Preconditioner | None, size: float, update: Callable[[int], None]
    ) -> tuple[Observation, float]:
        s, p = self.spectrum, self.prediction
        assert s is not None
        assert p is not None
        iteration = self._iteration(here, P)
        floor = gradient_floor(here, P, seed=self.seed)
        below = 10 * floor * max(1.0, math.sqrt(s.kappa))
        smooth = self._smooth(here, P, size, floor, below)
        self._require_time(iteration, iteration.at_rest(here.theta), p)
        if smooth is None:
            raise NotPredictable(
                f"the rounding floor of the gradient ({floor:.2g}) leaves no digits for a run: kappa* is {s.kappa:.3g}"
            )
        size = smooth
        z = balanced(s, torch.Generator().manual_seed(self.seed))
        part = size / s.kappa
        start = perturbed(iteration, here.theta, length_of(here.theta, P) * part * z, min(part, _STATISTICS), self.seed)
        limits = Limits(self.options.tolerance, self.options.max_iterations - self.iterations, self.deadline)
        seen = observe(iteration, start, s, p, below, limits, update)
        self.seen = seen
        self.iterations += len(seen.norms)
        return seen, size

    def _smooth(
        self, here: EmpiricalRisk, P: Preconditioner | None, size: float, floor: float, below: float
    ) -> float | None:
        """The largest perturbation, from `size` down, with a nearly linear gradient; None if rounding hides all."""
        s = self.spectrum
        assert s is not None
        unit = length_of(here.theta, P) / s.kappa
        found = None
        # Equal gradients in all modes: |grad| is about lambda_min sqrt(rank) |z|.
        while s.smallest * math.sqrt(len(s.values)) * size * unit > 50 * below:
            found = remainder(here, P, s, size * unit, floor)
            if found.nonlinear <= _NONLINEAR and found.kink <= KINK:
                self.hypotheses["smooth neighbourhood"] = True
                self.details["nonlinearity at the start"] = found.nonlinear
                return size
            size /= 10
        if found is None:
            return None
        self._require("smooth neighbourhood", False, roughness(here, found.kink, found.nonlinear))
        raise AssertionError

    def _require_time(self, iteration: Iteration, start: Any, p: Prediction) -> None:
        needed = _LENGTH * p.time_constant
        cost = seconds_per_iteration(iteration, start)
        left = self.deadline - time.monotonic()
        if needed > self.options.max_iterations - self.iterations or needed * cost > left:
            self.outcome = "too slow"
            raise NotPredictable(
                f"too slow to observe: {p.time_constant:.4g} iterations per factor of e are predicted, about "
                f"{needed:.2g} are needed for a tail, {needed * cost:.2g} s at {cost * 1e3:.2g} ms each; there are "
                f"{self.options.max_iterations - self.iterations} iterations and {max(left, 0):.3g} s"
            )

    def _moved(self, end: EmpiricalRisk, state: State) -> float:
        """Predict again where the run ended: that is the limit point. Running statistics must have got there, too."""
        assert self.prediction is not None
        assert self.spectrum is not None
        p, P = self.prediction, self._preconditioner(end)
        used = [P]
        if isinstance(P, BNPPreconditioner) and self.method == "bnp":
            used.append(RunningBNP(end, P, p.step, self.options.rho).used_at(state))
        constants = []
        for one in used:
            s = measure(end, one, null=False)
            self.products += s.products
            if len(s.values) != len(self.spectrum.values):
                return math.inf
            there = predict(s, self.method, p.step, p.momentum)
            constants.append(there.time_constant)
            if one is P:
                self.prediction = replace(p, factor=there.factor, time_constant=there.time_constant)
        self.details["prediction at the end over that at the start"] = constants[0] / p.time_constant
        return max(abs(constant / p.time_constant - 1) for constant in constants)

    def _judge(self, seen: Observation) -> None:
        stop = seen.stop
        self.details |= {"expected bias of the fit": seen.bias, "cycles": seen.cycles}
        if seen.straight:
            self.outcome = "observed"
            return
        self.outcome = stop if stop not in (DONE, DIVERGED) else "no tail"
        shown = f"; so far {seen.fit.summary()}" if seen.fit is not None else ""
        if stop == INTERRUPTED:
            raise NotPredictable(f"interrupted after {len(seen.norms)} iterations{shown}")
        assert self.prediction is not None
        predicted = f"-1/log r = {self.prediction.time_constant:.4g} is predicted"
        if stop != DONE:
            raise NotPredictable(f"the {stop} came before a straight tail, {predicted}{shown}")
        raise NotPredictable(
            f"no straight tail in {len(seen.norms)} iterations, {predicted}: modes near the slowest still took part "
            f"(expected bias of the fit {seen.bias:.2g}), or they swing{shown}"
        )
