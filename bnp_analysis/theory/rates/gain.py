"""Does BNP help here, and by as much as the condition numbers say?"""

from __future__ import annotations

import math

from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.precondition.bnp import BNPPreconditioner
from bnp_analysis.runtime.progress import Progress
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.rates.convergence import ConvergenceCheck, check_convergence_rate
from bnp_analysis.theory.rates.formulas import time_constant
from bnp_analysis.theory.rates.options import RateOptions
from bnp_analysis.theory.sources import Source

_NOTHING = 0.05  # a gain within this of 1 is none


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
    plain, helped = (
        check_convergence_rate(
            risk, P, method=method, seed=seed, time_limit=time_limit / 2, options=options, progress=progress
        )
        for method, P in (("gd", None), ("bnp", preconditioner))
    )
    details = {
        "kappa*": plain.kappa,
        "kappa* with BNP": helped.kappa,
        "time constant": _predicted(plain),
        "time constant with BNP": _predicted(helped),
    }
    gain = details["time constant"] / details["time constant with BNP"]
    details["predicted gain"] = gain
    settings = {**plain.settings, "time_limit": time_limit}
    seconds = plain.seconds + helped.seconds
    for run, name in ((plain, "gradient descent"), (helped, "BNP")):
        if run.holds is None:
            return Check.not_applicable(
                _statement(gain),
                Source.T15,
                f"{name}: {run.reason}",
                details=details,
                hypotheses=run.hypotheses,
                settings=settings,
                engine=plain.engine,
                seed=seed,
                seconds=seconds,
            )
    return Check.compare(
        _statement(gain),
        Source.T15,
        observed=plain.observed / helped.observed,
        predicted=gain,
        tolerance=2 * (options or RateOptions()).tolerance,
        hypotheses={**plain.hypotheses, **helped.hypotheses},
        details=details,
        settings=settings,
        engine=plain.engine,
        seed=seed,
        matvecs=plain.matvecs + helped.matvecs,
        seconds=seconds,
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
