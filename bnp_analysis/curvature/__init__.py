"""Curvature matrices of a risk as operators: Hessian, Gauss-Newton, Fisher, and their blocks."""

from bnp_analysis.curvature.engines import CURVATURES
from bnp_analysis.curvature.fisher import fisher
from bnp_analysis.curvature.gauss_newton import gauss_newton
from bnp_analysis.curvature.hessian import hessian

__all__ = ["CURVATURES", "fisher", "gauss_newton", "hessian"]
