"""Symmetries of networks: the recorded operations, what they let through, and the null directions that follow."""

from bnp_analysis.symmetry.candidates import Cause, Orbit
from bnp_analysis.symmetry.null_space import NullDirections, null_directions

__all__ = ["Cause", "NullDirections", "Orbit", "null_directions"]
