"""Training: a plain loop that brings a network to the point where it is measured."""

from bnp_analysis.training.fit import fit

__all__ = ["fit"]
