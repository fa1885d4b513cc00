"""BNP in training: hooks that see what layers see, running statistics, and the step that changes gradients."""

from bnp_analysis.training.bnp.bnp import BNP

__all__ = ["BNP"]
