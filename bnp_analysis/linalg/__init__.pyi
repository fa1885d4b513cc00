"""The public names; `__init__.py` imports each one when it is first asked for."""

from .condition.methods import Method, MethodCost, Price, Problem, choose_method, methods, register
from .condition.number import ConditionNumber
from .condition.profile import ConditionProfile, condition_profile
from .condition.verbs import (
    condition_number,
    magnitude_condition_number,
    regularized_condition_number,
    singular_condition_number,
)
from .derived import ColumnSubset, GramOperator, Restriction, Shifted, on_host
from .krylov.bidiagonal import Bidiagonalization, golub_kahan
from .krylov.lanczos import Tridiagonalization, lanczos
from .matrices import CallableOperator, DenseOperator, MatrixOperator, RowScaled
from .operators import LinearOperator, Product, SymmetricOperator
from .preconditioner import (
    Congruence,
    DensePreconditioner,
    IdentityPreconditioner,
    Preconditioner,
    congruence,
)
from .spectra.eigen import Eigenpairs, eigenpairs
from .spectra.entries import Diagonal, OffBlockShare, Trace, diagonal, off_block_share, trace
from .spectra.quadrature import SpectralDensity, resolved_from, spectral_density

__all__ = [
    "Bidiagonalization",
    "CallableOperator",
    "ColumnSubset",
    "ConditionNumber",
    "ConditionProfile",
    "Congruence",
    "DenseOperator",
    "DensePreconditioner",
    "Diagonal",
    "Eigenpairs",
    "GramOperator",
    "IdentityPreconditioner",
    "LinearOperator",
    "MatrixOperator",
    "Method",
    "MethodCost",
    "OffBlockShare",
    "Preconditioner",
    "Price",
    "Problem",
    "Product",
    "Restriction",
    "RowScaled",
    "Shifted",
    "SpectralDensity",
    "SymmetricOperator",
    "Trace",
    "Tridiagonalization",
    "choose_method",
    "condition_number",
    "condition_profile",
    "congruence",
    "diagonal",
    "eigenpairs",
    "golub_kahan",
    "lanczos",
    "magnitude_condition_number",
    "methods",
    "off_block_share",
    "on_host",
    "register",
    "regularized_condition_number",
    "resolved_from",
    "singular_condition_number",
    "spectral_density",
    "trace",
]
