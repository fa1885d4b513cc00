"""Training: BNP for any loop, and a reference trainer that can be stopped and resumed."""

from typing import NoReturn

from bnp_analysis.training.bnp import BNP
from bnp_analysis.training.langevin import SGLD
from bnp_analysis.training.probes import ConditionProbe, Sharpness, SharpnessTracker, stability_threshold
from bnp_analysis.training.run import Run
from bnp_analysis.training.trainer import fit, train

__all__ = [
    "BNP",
    "SGLD",
    "ConditionProbe",
    "Run",
    "Sharpness",
    "SharpnessTracker",
    "fit",
    "stability_threshold",
    "train",
]

_MOVED = ("MethodComparison", "compare_methods")


def __getattr__(name: str) -> NoReturn:
    moved = ": it is in paper_figures.comparison of a checkout" if name in _MOVED else ""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}{moved}")
