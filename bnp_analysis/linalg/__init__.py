"""Numerical linear algebra on flat vectors; it knows no networks.

`operators` are matrices known by their products, `preconditioner` the invertible maps `P` and `P^T A P`,
`lanczos` the process, `condition` the condition number with its routes and certificates, `eigen` a few
eigenpairs, `quadrature` densities and traces.
"""

from bnp_analysis.linalg.block_lanczos import BlockTridiagonalization, block_lanczos
from bnp_analysis.linalg.condition import (
    choose_route,
    condition_number,
    magnitude_condition_number,
    singular_condition_number,
)
from bnp_analysis.linalg.eigen import Eigenpairs, eigenpairs
from bnp_analysis.linalg.lanczos import Tridiagonalization, lanczos
from bnp_analysis.linalg.matrices import (
    CallableOperator,
    ColumnSubset,
    DenseOperator,
    GramOperator,
    MatrixOperator,
    Restriction,
    RowScaled,
)
from bnp_analysis.linalg.number import ConditionNumber
from bnp_analysis.linalg.operators import LinearOperator, Product, SymmetricOperator
from bnp_analysis.linalg.preconditioner import (
    Congruence,
    DensePreconditioner,
    IdentityPreconditioner,
    Preconditioner,
    congruence,
)
from bnp_analysis.linalg.quadrature import SpectralDensity, Trace, spectral_density, trace

__all__ = [
    "BlockTridiagonalization",
    "CallableOperator",
    "ColumnSubset",
    "ConditionNumber",
    "Congruence",
    "DenseOperator",
    "DensePreconditioner",
    "Eigenpairs",
    "GramOperator",
    "IdentityPreconditioner",
    "LinearOperator",
    "MatrixOperator",
    "Preconditioner",
    "Product",
    "Restriction",
    "RowScaled",
    "SpectralDensity",
    "SymmetricOperator",
    "Trace",
    "Tridiagonalization",
    "block_lanczos",
    "choose_route",
    "condition_number",
    "congruence",
    "eigenpairs",
    "lanczos",
    "magnitude_condition_number",
    "singular_condition_number",
    "spectral_density",
    "trace",
]
