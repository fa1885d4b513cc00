"""One method on one problem: what it said, what that cost, and whether it is true."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from truth_problems import Case, Problem

from bnp_analysis.errors import BNPAnalysisError
from bnp_analysis.linalg import (
    ConditionNumber,
    condition_number,
    magnitude_condition_number,
    regularized_condition_number,
)
from bnp_analysis.linalg.condition.reduction import reduced, reducible

# The accuracy lines speak of condition numbers up to this.
KAPPA = 1e12


def methods(case: Case) -> tuple[str, ...]:
    """The methods of a case; `reduced` is factor-svd on the triangle of its factor, as tables measure blocks."""
    more = "factor-svd" in case.methods and case.delta is None and not case.indefinite and reducible(case.A)
    return (*case.methods, "reduced") if more else case.methods


def measure(case: Case, method: str) -> ConditionNumber:
    """The public verb that fits the case."""
    if method == "reduced":
        return condition_number(reduced(case.A), preconditioner=case.P, null=case.null, method="factor-svd")
    steps = {} if case.steps is None else {"steps": case.steps}
    if case.delta is not None:
        return regularized_condition_number(case.A, case.delta, preconditioner=case.P, method=method, **steps)
    verb: Any = magnitude_condition_number if case.indefinite else condition_number
    return verb(case.A, preconditioner=case.P, null=case.null, method=method, **steps)


def _share(k: ConditionNumber, truth: float) -> float:
    """The part of the interval, from its value to the nearer bound, that the error used: above one is a false claim."""
    if not k.two_sided or truth == k.value:
        return 0.0
    room = k.upper - k.value if truth > k.value else k.value - k.lower
    return abs(truth - k.value) / room if room > 0 else math.inf


def run(problem: Problem, case: Case, method: str) -> dict[str, Any]:
    """A row of the table."""
    truth = case.truth
    row: dict[str, Any] = {
        "group": problem.group,
        "problem": problem.name,
        "method": method,
        "dtype": str(case.A.dtype).removeprefix("torch."),
        "shape": list(case.A.factor.shape) if case.A.factor is not None else [case.A.dim, case.A.dim],
        "truth": truth.value,
        "truth_low": truth.low,
        "truth_high": truth.high,
        "truth_source": truth.source,
        "truth_rank": truth.rank,
        "single": case.A.dtype == torch.float32,
        "given": case.P is None and case.A.factor is not None and case.A.factor.exact,
        "kind": "regularized" if case.delta is not None else "magnitude" if case.indefinite else "kappa*",
        **case.facts,
    }
    began = time.perf_counter()
    try:
        k = measure(case, method)
    except BNPAnalysisError as refusal:
        return row | {"refused": str(refusal)[:200], "seconds": time.perf_counter() - began}
    lower_holds = math.isnan(k.lower) or k.lower <= truth.high
    upper_holds = k.upper >= truth.low
    return row | {
        "value": k.value,
        "lower": k.lower,
        "upper": k.upper,
        "two_sided": k.two_sided,
        "failure_probability": k.failure_probability,
        "relative_error": abs(k.value / truth.value - 1) if math.isfinite(truth.high) else math.nan,
        "width": (k.upper - k.lower) / k.value if k.two_sided else math.inf,
        "share": _share(k, truth.value),
        "holds": lower_holds and upper_holds,
        "lower_holds": lower_holds,
        "upper_holds": upper_holds,
        "rank": k.rank,
        "unresolved": k.unresolved,
        "gap_ratio": k.gap_ratio,
        "products": k.matvecs,
        "null_dim": k.null_dim,
        "note": k.note,
        "seconds": time.perf_counter() - began,
    }
