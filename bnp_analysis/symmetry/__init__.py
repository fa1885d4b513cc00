"""Symmetries of networks, from their recorded operations, and the null directions that follow."""

from bnp_analysis.symmetry.candidates import Cause, Orbit
from bnp_analysis.symmetry.null_space import NullDirections, null_directions

__all__ = ["Cause", "NullDirections", "Orbit", "null_directions"]
