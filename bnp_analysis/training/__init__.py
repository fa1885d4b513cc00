"""Training: BNP for any loop, a reference trainer, and fair comparisons of methods."""

from bnp_analysis.training.bnp import BNP
from bnp_analysis.training.comparison import MethodComparison, compare_methods
from bnp_analysis.training.fit import fit
from bnp_analysis.training.probes import ConditionProbe
from bnp_analysis.training.run import Run
from bnp_analysis.training.trainer import train

__all__ = ["BNP", "ConditionProbe", "MethodComparison", "Run", "compare_methods", "fit", "train"]
