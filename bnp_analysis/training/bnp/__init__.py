"""BNP in training: hooks that record layer inputs, running statistics, and the change of gradients."""

from bnp_analysis.training.bnp.bnp import BNP

__all__ = ["BNP"]
