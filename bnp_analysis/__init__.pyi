"""The public names; `__init__.py` imports each one when it is first asked for."""

from . import (
    curvature,
    data,
    diagnose,
    distributed,
    errors,
    linalg,
    models,
    network,
    plotting,
    precondition,
    results,
    symmetry,
    theory,
    training,
)
from .curvature import fisher, gauss_newton, hessian
from .diagnose import block_spectra, compare, condition, layer_table, slice
from .linalg import (
    CallableOperator,
    DenseOperator,
    LinearOperator,
    condition_number,
    condition_profile,
    diagonal,
    eigenpairs,
    spectral_density,
    trace,
)
from .network import EmpiricalRisk, ParameterSpace, register_layer
from .precondition import (
    bnp_preconditioner,
    diagonal_preconditioner,
    identity_preconditioner,
    kfac_preconditioner,
    optimizer_preconditioner,
)
from .symmetry import null_directions
from .theory import check_convergence_rate, check_theory
from .training import BNP, SGLD, SharpnessTracker, train

__version__: str

__all__ = [
    "BNP",
    "SGLD",
    "CallableOperator",
    "DenseOperator",
    "EmpiricalRisk",
    "LinearOperator",
    "ParameterSpace",
    "SharpnessTracker",
    "block_spectra",
    "bnp_preconditioner",
    "check_convergence_rate",
    "check_theory",
    "compare",
    "condition",
    "condition_number",
    "condition_profile",
    "curvature",
    "data",
    "diagnose",
    "diagonal",
    "diagonal_preconditioner",
    "distributed",
    "eigenpairs",
    "errors",
    "fisher",
    "gauss_newton",
    "hessian",
    "identity_preconditioner",
    "kfac_preconditioner",
    "layer_table",
    "linalg",
    "models",
    "network",
    "null_directions",
    "optimizer_preconditioner",
    "plotting",
    "precondition",
    "register_layer",
    "results",
    "slice",
    "spectral_density",
    "symmetry",
    "theory",
    "trace",
    "train",
    "training",
]
