"""Predict the asymptotic rate of an iteration from the spectrum at its limit point, run it, compare (T14, T15)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.precondition.bnp import BNPPreconditioner, bnp_preconditioner
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.progress import Progress, reporting
from bnp_analysis.symmetry import Cause
from bnp_analysis.theory.check import Check, Source
from bnp_analysis.theory.limit_point import (
    KINK,
    Minimizer,
    Spectrum,
    balanced,
    find_minimizer,
    given_or_identity,
    measure,
    off_the_minimizers,
    remainder,
    roughness,
    undetermined,
)
from bnp_analysis.theory.rates import (
    DIVERGED,
    DONE,
    INTERRUPTED,
    HeavyBallIteration,
    Iteration,
    Prediction,
    RateFit,
    RunningBNP,
    State,
    Trace,
    check_momentum,
    observe,
    perturbed,
    predict,
    seconds_per_iteration,
    time_constant,
    undeflated,
)

METHODS = {"gd": "gradient descent", "heavy_ball": "heavy ball", "bnp": "BNP with running statistics"}


class NotPredictable(Exception):
    """Why there is no prediction, or no observation."""


@dataclass(frozen=True)
class RateOptions:
    """What a rate check does beyond its arguments.

    Attributes:
        momentum: of heavy ball, `"optimal"` or `0 <= beta < 1`.
        rho: weight of the past in running statistics.
        weight_decay: of the optimizer; anything but 0 makes the statement not applicable.
        tolerance: relative, of `-1/log r`.
        perturbation: of the minimizer, times `|z|/kappa*`; made smaller as needed.
        max_iterations: of all runs together.
        max_parameters: a dense Hessian is diagonalized up to this size.

    Example:
        >>> RateOptions(rho=0.9).tolerance
        0.03
    """

    momentum: float | str = "optimal"
    rho: float = 0.99
    weight_decay: float = 0.0
    tolerance: float = 0.03
    perturbation: float = 0.1
    max_iterations: int = 400_000
    max_parameters: int = 2000

    def __post_init__(self) -> None:
        if isinstance(self.momentum, str) and self.momentum != "optimal":
            raise InvalidInputError(f"momentum must be 'optimal' or a number in [0, 1), got {self.momentum!r}")
        if not isinstance(self.momentum, str):
            check_momentum(self.momentum)
        if not 0 <= self.rho < 1:
            raise InvalidInputError(f"rho must be in [0, 1), got {self.rho}")
        if not min(self.tolerance, self.perturbation, self.max_iterations, self.max_parameters) > 0:
            raise InvalidInputError("tolerance, perturbation and the limits must be positive")


#: Causes that hold at a point and not along an orbit: two equal units, for instance, make columns of a layer dependent.
_AT_A_POINT = (Cause.DEPENDENT_INPUTS, Cause.UNREAD_OUTPUTS)
_SHIFT = 0.005  # by how much the move of the limit point may change the prediction
_LENGTH = 5.0  # time constants that a run has at least
_NONLINEAR = 0.1
_STATISTICS = 1e-3  # how far, relative, running statistics start from their limit at most
_FASTEST = 0.3  # time constants below are no rates: three digits or more in each iteration


@dataclass
class Study:
    """One rate check on its way; `known`, the fields of its result so far, survives whatever stops it."""

    risk: EmpiricalRisk
    given: Preconditioner | None
    method: str
    step: float | str
    seed: int
    deadline: float
    options: RateOptions
    known: dict[str, Any] = field(default_factory=lambda: {"hypotheses": {}, "details": {}, "iterations": 0})

    def __post_init__(self) -> None:
        fits = isinstance(self.given, BNPPreconditioner) and self.given.settings["q"] != "measured"
        if self.method == "bnp" and self.given is not None and not fits:
            raise InvalidInputError(
                "running statistics need the settings of a BNPPreconditioner with q='auto' or a number; make one with "
                "bnp_preconditioner, or use method='gd' for a fixed preconditioner"
            )
        self.risk = self.risk.gathered()

    def go(self, update: Callable[[int], None]) -> None:
        """Everything, in order.

        Raises:
            NotPredictable: with the reason.
        """
        self._check_input()
        found = find_minimizer(self.risk, seed=self.seed, deadline=self.deadline)
        self.known |= {"minimizer": found, "matvecs": found.matvecs}
        self._require("minimizer attained", found.attained, found.reason)
        here, size = self.risk.at(found.theta), self.options.perturbation
        for _ in range(4):
            spectrum, prediction = self._measure(here)
            seen, size = self._run(spectrum, prediction, size, update)
            if seen.stop == DIVERGED:
                size /= 30
                continue
            end = self.risk.at(seen.state[0])
            ended = seen.stop != DONE
            if (ended and not seen.straight) or self._moved(end, seen.state, spectrum, prediction) <= _SHIFT:
                self._judge(seen)
                return
            if ended:
                self._refuse(
                    f"the {seen.stop} came when the limit point had moved, before another run", outcome=seen.stop
                )
            here = self.risk.at(find_minimizer(end, seed=self.seed, deadline=self.deadline).theta)
            size /= 30
        self._refuse(
            "from no perturbation that rounding allows did the run stay where the prediction holds: it left the "
            "neighbourhood, or its limit point moved so far that the spectrum there predicts another rate"
        )

    def _refuse(self, reason: str, outcome: str = "not applicable") -> NoReturn:
        self.known["outcome"] = outcome
        raise NotPredictable(reason)

    def _require(self, hypothesis: str, holds: bool, reason: str) -> None:
        self.known["hypotheses"][hypothesis] = holds
        if not holds:
            self._refuse(reason)

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

    def _preconditioner(self, here: EmpiricalRisk) -> Preconditioner:
        """The fixed one, or that of the statistics at the point."""
        if self.method != "bnp":
            return given_or_identity(here, self.given)
        P: Preconditioner = bnp_preconditioner(here, **getattr(self.given, "settings", {}))
        return P

    def _spectrum(self, here: EmpiricalRisk, P: Preconditioner, *, null: bool = True) -> Spectrum:
        s = measure(here, P, null=null, seed=self.seed)
        self.known["matvecs"] += s.products
        return s

    def _measure(self, here: EmpiricalRisk) -> tuple[Spectrum, Prediction]:
        """Spectrum, hypotheses about it, prediction."""
        s = self._spectrum(here, self._preconditioner(here))
        if len(s.values):
            self.known |= {
                "kappa": s.kappa,
                "eigenvalues": s.values,
                "null_dim": s.null_dim,
                "null_sources": dict(s.sources),
                "unexplained": s.unexplained,
            }
        self._require(
            "Hessian positive semidefinite",
            s.negative == 0,
            f"the Hessian at the limit point is indefinite (eigenvalue {s.negative:.3g}, noise {s.noise:.1g}): a "
            "saddle, from which the iteration would leave",
        )
        self._require("Hessian not zero", len(s.values) > 0, "the Hessian at the limit point is zero to rounding")
        singular = undetermined(s)
        self._require(
            "eigenvalues resolved",
            s.unresolved == 0,
            singular
            or f"{s.unresolved} eigenvalues are neither zero nor nonzero beyond doubt: their size is within "
            f"1000 times the noise {s.noise:.1g} of the computed Hessian",
        )
        doubtful = s.unexplained or any(cause in s.sources for cause in _AT_A_POINT)
        why = singular or (off_the_minimizers(s) if doubtful else "")
        self._require(
            "null space tangent to the minimizers",
            not why,
            f"{why}: a singular minimizer (redundant units?), where convergence is sublinear",
        )
        p = predict(s, self.method, self.step, self.options.momentum)
        self.known |= {"step": p.step, "momentum": p.momentum, "factor": p.factor}
        if s.null_dim:
            self.known["without_deflation"] = undeflated(s, self.method)
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
        return s, p

    def _iteration(self, s: Spectrum, p: Prediction) -> Iteration:
        if self.method == "bnp":
            assert isinstance(s.P, BNPPreconditioner)
            return RunningBNP(s.risk, s.P, p.step, self.options.rho)
        return HeavyBallIteration(s.risk, s.P, p.step, p.momentum)

    def _run(self, s: Spectrum, p: Prediction, size: float, update: Callable[[int], None]) -> tuple[Trace, float]:
        iteration, known, theta = self._iteration(s, p), self.known, s.risk.theta
        below = 10 * s.floor * max(1.0, math.sqrt(s.kappa))
        length = float(s.P.solve(theta).norm()) or 1.0  # 1 at the origin
        smooth = self._smooth(s, length / s.kappa, size, below)
        left = self.options.max_iterations - known["iterations"]
        self._require_time(iteration, iteration.at_rest(theta), p, left)
        if smooth is None:
            self._refuse(
                f"the rounding floor of the gradient ({s.floor:.2g}) leaves no digits for a run: kappa* is "
                f"{s.kappa:.3g}"
            )
        z, part = balanced(s, torch.Generator().manual_seed(self.seed)), smooth / s.kappa
        start = perturbed(iteration, theta, length * part * z, min(part, _STATISTICS), self.seed)
        seen = observe(
            iteration,
            start,
            s,
            p,
            below=below,
            most=left,
            deadline=self.deadline,
            tolerance=self.options.tolerance,
            seen=update,
        )
        known["fit"] = seen.fit
        known["iterations"] += len(seen.norms)
        known["gradient_norms"] = torch.tensor(seen.norms, dtype=torch.float64)
        known["losses"] = torch.tensor(seen.losses, dtype=torch.float64).reshape(-1, 2)
        return seen, smooth

    def _smooth(self, s: Spectrum, unit: float, size: float, below: float) -> float | None:
        """The largest perturbation, from `size` down, with a nearly linear gradient; None if rounding hides all."""
        found = None
        # Equal gradients in all modes: |grad| is about lambda_min sqrt(rank) |z|.
        while s.smallest * math.sqrt(len(s.values)) * size * unit > 50 * below:
            found = remainder(s, size * unit)
            if found.nonlinear <= _NONLINEAR and found.kink <= KINK:
                self.known["hypotheses"]["smooth neighbourhood"] = True
                self.known["details"]["nonlinearity at the start"] = found.nonlinear
                return size
            size /= 10
        if found is not None:
            self._require("smooth neighbourhood", False, roughness(s.risk, found.kink, found.nonlinear))
        return None

    def _require_time(self, iteration: Iteration, start: State, p: Prediction, iterations: int) -> None:
        needed = _LENGTH * p.time_constant
        cost = seconds_per_iteration(iteration, start)
        left = self.deadline - time.monotonic()
        if needed > iterations or needed * cost > left:
            self._refuse(
                f"too slow to observe: {p.time_constant:.4g} iterations per factor of e are predicted, about "
                f"{needed:.2g} are needed for a tail, {needed * cost:.2g} s at {cost * 1e3:.2g} ms each; there are "
                f"{iterations} iterations and {max(left, 0):.3g} s",
                outcome="too slow",
            )

    def _moved(self, end: EmpiricalRisk, state: State, spectrum: Spectrum, p: Prediction) -> float:
        """Predict again where the run ended: that is the limit point. Running statistics must have got there, too."""
        P = self._preconditioner(end)
        used, factors = [P], []
        if isinstance(P, BNPPreconditioner) and self.method == "bnp":
            used.append(RunningBNP(end, P, p.step, self.options.rho).used_at(state))
        for one in used:
            s = self._spectrum(end, one, null=False)
            if len(s.values) != len(spectrum.values):
                return math.inf
            factors.append(predict(s, self.method, p.step, p.momentum).factor)
            self.known["factor"] = factors[0]
        changes = [time_constant(factor) / p.time_constant for factor in factors]
        self.known["details"]["prediction at the end over that at the start"] = changes[0]
        return max(abs(change - 1) for change in changes)

    def _judge(self, seen: Trace) -> None:
        stop = seen.stop
        self.known["details"] |= {"expected bias of the fit": seen.bias, "cycles": seen.cycles}
        if seen.straight:
            self.known["outcome"] = "observed"
            return
        shown = f"; so far {seen.fit.summary()}" if seen.fit is not None else ""
        predicted = f"-1/log r = {time_constant(self.known['factor']):.4g} is predicted"
        if stop == INTERRUPTED:
            self._refuse(f"interrupted after {len(seen.norms)} iterations{shown}", outcome=stop)
        if stop != DONE:
            self._refuse(f"the {stop} came before a straight tail, {predicted}{shown}", outcome=stop)
        self._refuse(
            f"no straight tail in {len(seen.norms)} iterations, {predicted}: modes near the slowest still took part "
            f"(expected bias of the fit {seen.bias:.2g}), or they swing{shown}",
            outcome="no tail",
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class ConvergenceCheck(Check):
    """A `Check` of `-1/log r`, iterations per factor of `e`, with what was measured on the way.

    Attributes:
        method: `"gd"`, `"heavy_ball"` or `"bnp"`.
        outcome: `"observed"`; or why there is no observation: `"not applicable"`, `"too slow"`, `"no tail"`,
            `"time limit"`, `"iteration limit"`, `"interrupted"`.
        step, momentum: of the iteration.
        factor: the predicted `r`.
        kappa: `lambda_max / lambda_min+` of `P^T Hess P` at the limit point, without its null space.
        eigenvalues: `(rank,)`, the nonzero ones, ascending.
        null_dim: dimension of the null space.
        null_sources: cause -> dimensions explained; the rest is `unexplained`.
        unexplained: null dimensions that are zero to rounding and that no cause explains.
        without_deflation: the time constant that the same spectrum predicts if its zeros count as eigenvalues.
        fit: what the run says, None without a tail.
        gradient_norms: `(k,)`, `|P^T grad|` at every iteration of the last run; where the displacement was enlarged
            to go on above the rounding floor, divided by the enlargement.
        losses: `(j, 2)`, rows `(iteration, L)`.
        minimizer: how the limit point was found.
        iterations: of all runs.
    """

    method: str = "gd"
    outcome: str = "not applicable"
    step: float = math.nan
    momentum: float = 0.0
    factor: float = math.nan
    kappa: float = math.nan
    eigenvalues: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    null_dim: int = 0
    null_sources: Mapping[str, int] = field(default_factory=dict)
    unexplained: int = 0
    without_deflation: float = math.nan
    fit: RateFit | None = None
    gradient_norms: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    losses: Tensor = field(default_factory=lambda: torch.zeros(0, 2, dtype=torch.float64))
    minimizer: Minimizer | None = None
    iterations: int = 0

    def records(self) -> list[dict[str, Any]]:
        """The check's row with method, kappa and interval."""
        (row,) = super().records()
        interval = {} if self.fit is None else {"low": self.fit.low, "high": self.fit.high}
        return [row | {"method": self.method, "outcome": self.outcome, "kappa": self.kappa} | interval]


@gated
def check_convergence_rate(
    risk: EmpiricalRisk,
    preconditioner: Preconditioner | None = None,
    *,
    method: str = "gd",
    step: float | str = "optimal",
    seed: int = 0,
    time_limit: float = 120.0,
    options: RateOptions | None = None,
    progress: Progress = False,
) -> ConvergenceCheck:
    """Check that an iteration converges as the spectrum at its limit point says.

    Finds the minimizer below the risk's point, measures `P^T Hess P` there, deflates its null space, predicts the
    asymptotic factor `r`, perturbs the minimizer by much less than `1/kappa*`, runs the nonlinear iteration, fits the
    tail of `log |P^T grad|` and compares `-1/log r`. If the limit point moved so far that the prediction changes, it
    measures there and starts again, nearer. Before the gradient reaches the rounding floor, the displacement is
    enlarged and the run goes on, until the fitted window is long enough for the measured spectrum.

    Args:
        risk: in float64, with an attained minimizer below its point.
        preconditioner: a fixed `P`, the identity by default. For `"bnp"`: a `BNPPreconditioner` whose damping, rule for
            `q` and statistics are used, undamped by default.
        method: `"gd"`; `"heavy_ball"`; `"bnp"`, full-batch gradient descent with BNP's running statistics (T15).
        step: `"optimal"` for the spectrum, or `alpha`.
        seed: of the perturbations.
        time_limit: seconds for everything.
        options: momentum, `rho`, tolerance, limits; see `RateOptions`.
        progress: True for a bar, or a callback `(done, total)`.

    Returns:
        A `ConvergenceCheck`: holds or fails with both time constants; *not applicable* with the reason where a
        hypothesis fails, where the run would be too slow to observe, or where no straight tail was reached.

    Raises:
        InvalidInputError: an unknown method, a step or momentum that is no number in range, a preconditioner of
            another size, or one for `"bnp"` that is not BNP's.

    Source: T14, T15.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
        >>> y = torch.ones(2, 1, dtype=torch.float64)
        >>> model = torch.nn.Linear(2, 1, bias=False, dtype=torch.float64)
        >>> risk = bnp.EmpiricalRisk(model, torch.nn.functional.mse_loss, (x, y))
        >>> check = check_convergence_rate(risk)
        >>> check.holds, round(check.kappa, 6), round(check.factor, 6)
        (True, 4.0, 0.6)
    """
    if method not in METHODS:
        raise InvalidInputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not (step == "optimal" or (isinstance(step, float | int) and 0 < step < math.inf)):
        raise InvalidInputError(f"step must be 'optimal' or a positive number, got {step!r}")
    if preconditioner is not None and preconditioner.dim != risk.space.dim:
        raise InvalidInputError(
            f"the preconditioner acts on {preconditioner.dim} parameters, the risk has {risk.space.dim}; build it from "
            "this risk"
        )
    options = RateOptions() if options is None else options
    began = time.perf_counter()
    study = Study(risk, preconditioner, method, step, seed, time.monotonic() + time_limit, options)
    statement = f"{METHODS[method]} at {'its best step' if step == 'optimal' else f'step {step:g}'} contracts by r"
    reason, known = "", study.known
    with reporting(progress, options.max_iterations, METHODS[method]) as update:
        try:
            study.go(update)
        except NotPredictable as refusal:
            reason = str(refusal)
        except KeyboardInterrupt:
            known["outcome"], reason = "interrupted", "interrupted before the run had a tail"
    known |= {
        "method": method,
        "seed": seed,
        "engine": risk.provenance,
        "settings": asdict(options) | {"step": step, "time_limit": time_limit},
        "seconds": time.perf_counter() - began,
    }
    source = Source.T15 if method == "bnp" or preconditioner is not None else Source.T14
    if reason:
        return ConvergenceCheck.not_applicable(statement, source, reason, **known)
    return ConvergenceCheck.compare(
        f"{statement}, -1/log r",
        source,
        observed=known["fit"].time_constant,
        predicted=time_constant(known["factor"]),
        tolerance=options.tolerance,
        **known,
    )


GAIN = "BNP is faster than gradient descent by the ratio of the predicted rates"
_NOTHING = 0.05  # a gain within this of 1 is none


@gated
def check_bnp_gain(
    risk: EmpiricalRisk,
    preconditioner: BNPPreconditioner | None = None,
    *,
    seed: int = 0,
    time_limit: float = 240.0,
    options: RateOptions | None = None,
    progress: Progress = False,
) -> Check:
    """Check that BNP shortens gradient descent by the ratio of the time constants, each at its best step.

    The gain is `tau(Hess) / tau(P^T Hess P)` with `tau = -1/log r`, about `kappa*(Hess) / kappa*(P^T Hess P)`. Both
    runs are real, BNP's with running statistics. A gain of 1 means that BNP does not help, below 1 that it slows down;
    the statement says so.

    Args:
        risk, seed, options, progress: see `check_convergence_rate`.
        preconditioner: whose damping, rule for `q` and statistics BNP uses; undamped by default.
        time_limit: seconds for both runs.

    Returns:
        A `Check` of the gain, with both condition numbers and time constants in `details`; *not applicable* where one
        of the runs is, with the predicted gain if there is one.

    Source: T7, T14, T15.

    Example:
        >>> from bnp_analysis.theory.problems import softmax_regression
        >>> print(check_bnp_gain(softmax_regression().risk).statement)
        BNP does not help: it needs as many iterations as gradient descent (gain 1)
    """
    more: dict[str, Any] = {"seed": seed, "options": options, "progress": progress, "time_limit": time_limit / 2}
    plain = check_convergence_rate(risk, **more)
    helped = check_convergence_rate(risk, preconditioner, method="bnp", **more)
    found = gain(plain, helped, tolerance=2 * (options or RateOptions()).tolerance)
    return replace(
        found,
        statement=_statement(found.details["predicted gain"]),
        settings={**plain.settings, "time_limit": time_limit},
        engine=plain.engine,
        seed=seed,
        seconds=plain.seconds + helped.seconds,
    )


def gain(plain: ConvergenceCheck, helped: ConvergenceCheck, *, tolerance: float) -> Check:
    """The ratio of the observed time constants against that of the predicted ones; of runs without a verdict, why."""
    slow, fast = (_predicted(run) for run in (plain, helped))
    details = {
        "kappa*": plain.kappa,
        "kappa* with BNP": helped.kappa,
        "time constant": slow,
        "time constant with BNP": fast,
        "predicted gain": slow / fast,
    }
    for run, name in ((plain, "gradient descent"), (helped, "BNP")):
        if run.holds is None:
            why, held = f"{name}: {run.reason}", run.hypotheses
            return Check.not_applicable(GAIN, Source.T15, why, details=details, hypotheses=held)
    return Check.compare(
        GAIN,
        Source.T15,
        observed=plain.observed / helped.observed,
        predicted=plain.predicted / helped.predicted,
        tolerance=tolerance,
        hypotheses={**plain.hypotheses, **helped.hypotheses},
        details=details,
        matvecs=plain.matvecs + helped.matvecs,
    )


def _predicted(run: ConvergenceCheck) -> float:
    return time_constant(run.factor) if run.factor >= 0 else run.factor


def _statement(gain: float) -> str:
    if gain > 1 + _NOTHING:
        return f"BNP helps: it needs {gain:.3g} times fewer iterations than gradient descent"
    if gain < 1 / (1 + _NOTHING):
        return f"BNP does not help: it needs {1 / gain:.3g} times more iterations than gradient descent"
    if not math.isnan(gain):
        return f"BNP does not help: it needs as many iterations as gradient descent (gain {gain:.3g})"
    return "BNP changes the number of iterations by the ratio of the time constants"
