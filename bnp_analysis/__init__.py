"""Condition numbers of neural-network losses, with evidence, with and without BNP.

import bnp_analysis as bnp
risk = bnp.EmpiricalRisk(model, loss, (x, y))
A, P = bnp.gauss_newton(risk), bnp.bnp_preconditioner(risk)
print(bnp.condition_number(A), bnp.condition_number(A, preconditioner=P))
"""

from bnp_analysis import data, distributed, errors, models, plotting, training
from bnp_analysis.curvature import NullDirections, fisher, gauss_newton, hessian, null_directions
from bnp_analysis.diagnose import Comparison, LayerRow, LayerTable, compare, layer_table
from bnp_analysis.linalg import (
    CallableOperator,
    ConditionNumber,
    DenseOperator,
    DensePreconditioner,
    Eigenpairs,
    LinearOperator,
    Preconditioner,
    SpectralDensity,
    SymmetricOperator,
    condition_number,
    congruence,
    eigenpairs,
    lanczos,
    magnitude_condition_number,
    rank_estimate,
    regularized_condition_number,
    routes,
    spectral_density,
    trace,
)
from bnp_analysis.network import EmpiricalRisk, ParameterSpace
from bnp_analysis.precondition import (
    bnp_preconditioner,
    diagonal_preconditioner,
    identity_preconditioner,
    kfac_preconditioner,
)
from bnp_analysis.results import Result
from bnp_analysis.theory import Check, CheckTable, ConvergenceCheck, check_convergence_rate, check_theory
from bnp_analysis.training import BNP, Run, train

__version__ = "0.1.0"

__all__ = [
    "BNP",
    "CallableOperator",
    "Check",
    "CheckTable",
    "Comparison",
    "ConditionNumber",
    "ConvergenceCheck",
    "DenseOperator",
    "DensePreconditioner",
    "Eigenpairs",
    "EmpiricalRisk",
    "LayerRow",
    "LayerTable",
    "LinearOperator",
    "NullDirections",
    "ParameterSpace",
    "Preconditioner",
    "Result",
    "Run",
    "SpectralDensity",
    "SymmetricOperator",
    "bnp_preconditioner",
    "check_convergence_rate",
    "check_theory",
    "compare",
    "condition_number",
    "congruence",
    "data",
    "diagonal_preconditioner",
    "distributed",
    "eigenpairs",
    "errors",
    "fisher",
    "gauss_newton",
    "hessian",
    "identity_preconditioner",
    "kfac_preconditioner",
    "lanczos",
    "layer_table",
    "magnitude_condition_number",
    "models",
    "null_directions",
    "plotting",
    "rank_estimate",
    "regularized_condition_number",
    "routes",
    "spectral_density",
    "trace",
    "train",
    "training",
]
