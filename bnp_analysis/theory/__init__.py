"""The convergence theory as checks: what a statement predicts, what is observed, and whether it holds."""

from __future__ import annotations

from bnp_analysis.theory import problems
from bnp_analysis.theory.check import Check, CheckTable
from bnp_analysis.theory.convergence import ConvergenceCheck, RateOptions, check_bnp_gain, check_convergence_rate
from bnp_analysis.theory.statements import check_theory

__all__ = [
    "Check",
    "CheckTable",
    "ConvergenceCheck",
    "RateOptions",
    "check_bnp_gain",
    "check_convergence_rate",
    "check_theory",
    "problems",
]
