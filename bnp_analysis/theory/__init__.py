"""The convergence theory as checks: what a statement predicts, what is observed, and whether it holds."""

from bnp_analysis.theory.check import Check, CheckTable
from bnp_analysis.theory.suite import check_theory

__all__ = ["Check", "CheckTable", "check_theory"]
