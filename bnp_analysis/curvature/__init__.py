"""Curvature matrices of a risk as operators: Hessian, Gauss-Newton, Fisher, and their blocks."""

from bnp_analysis.curvature.engines import CURVATURES
from bnp_analysis.curvature.fisher import fisher
from bnp_analysis.curvature.gauss_newton import gauss_newton
from bnp_analysis.curvature.hessian import hessian
from bnp_analysis.curvature.null_space import NullDirections, null_directions

__all__ = ["CURVATURES", "NullDirections", "fisher", "gauss_newton", "hessian", "null_directions"]
