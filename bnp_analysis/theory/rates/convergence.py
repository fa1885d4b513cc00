"""Predict the asymptotic rate of an iteration from the spectrum at its limit point, run it, and compare (T14, T15)."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.runtime.progress import Progress, reporting
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.rates.fit import RateFit
from bnp_analysis.theory.rates.minimizer import Minimizer
from bnp_analysis.theory.rates.observation import undeflated
from bnp_analysis.theory.rates.options import METHODS, NotPredictable, RateOptions
from bnp_analysis.theory.rates.study import Study
from bnp_analysis.theory.sources import Source


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
    reason = ""
    with reporting(progress, options.max_iterations, METHODS[method]) as update:
        try:
            study.go(update)
        except NotPredictable as refusal:
            reason = str(refusal)
        except KeyboardInterrupt:
            study.outcome, reason = "interrupted", "interrupted before the run had a tail"
    common = _measured(study) | {
        "hypotheses": dict(study.hypotheses),
        "method": method,
        "seed": seed,
        "engine": risk.provenance,
        "settings": options.as_settings() | {"step": step, "time_limit": time_limit},
        "seconds": time.perf_counter() - began,
    }
    source = Source.T15 if method == "bnp" or preconditioner is not None else Source.T14
    if reason or study.seen is None or study.seen.fit is None or study.prediction is None:
        return cast(ConvergenceCheck, ConvergenceCheck.not_applicable(statement, source, reason or "no tail", **common))
    check = ConvergenceCheck.compare(
        f"{statement}, -1/log r",
        source,
        observed=study.seen.fit.time_constant,
        predicted=study.prediction.time_constant,
        tolerance=options.tolerance,
        **common,
    )
    return cast(ConvergenceCheck, check)


def _measured(study: Study) -> dict[str, Any]:
    """What a study knows, as fields of the result."""
    known: dict[str, Any] = {
        "outcome": study.outcome,
        "minimizer": study.minimizer,
        "iterations": study.iterations,
        "matvecs": study.products + (0 if study.minimizer is None else study.minimizer.matvecs),
        "details": dict(study.details),
    }
    s, p, seen = study.spectrum, study.prediction, study.seen
    if s is not None and len(s.values):
        known |= {
            "kappa": s.kappa,
            "eigenvalues": s.values,
            "null_dim": s.null_dim,
            "null_sources": dict(s.sources),
            "unexplained": s.unexplained,
        }
    if p is not None and s is not None:
        known |= {"step": p.step, "momentum": p.momentum, "factor": p.factor}
        if s.null_dim:
            known["without_deflation"] = undeflated(s, study.method)
    if seen is not None:
        known |= {
            "fit": seen.fit,
            "gradient_norms": torch.tensor(seen.norms, dtype=torch.float64),
            "losses": torch.tensor(seen.losses, dtype=torch.float64).reshape(-1, 2),
        }
    return known
