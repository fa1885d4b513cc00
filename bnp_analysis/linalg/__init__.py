"""Numerical linear algebra on flat vectors; it knows no networks.

`operators` are matrices known by their products, `preconditioner` the invertible maps `P` and `P^T A P`,
`lanczos` the process, `condition` the condition number with its routes and certificates, `eigen` a few
eigenpairs, `quadrature` densities, `hutchinson` traces.
"""

from bnp_analysis.linalg.condition.number import ConditionNumber
from bnp_analysis.linalg.condition.profile import ConditionProfile, condition_profile
from bnp_analysis.linalg.condition.routes import Route, choose_route, routes
from bnp_analysis.linalg.condition.verbs import (
    condition_number,
    magnitude_condition_number,
    regularized_condition_number,
    singular_condition_number,
)
from bnp_analysis.linalg.derived import ColumnSubset, GramOperator, Restriction, Shifted
from bnp_analysis.linalg.host import on_host
from bnp_analysis.linalg.krylov.bidiagonal import Bidiagonalization, golub_kahan
from bnp_analysis.linalg.krylov.block_lanczos import BlockTridiagonalization, block_lanczos
from bnp_analysis.linalg.krylov.lanczos import Tridiagonalization, lanczos
from bnp_analysis.linalg.matrices import CallableOperator, DenseOperator, MatrixOperator, RowScaled
from bnp_analysis.linalg.operators import LinearOperator, Product, SymmetricOperator
from bnp_analysis.linalg.preconditioner import (
    Congruence,
    DensePreconditioner,
    IdentityPreconditioner,
    Preconditioner,
    congruence,
)
from bnp_analysis.linalg.spectra.eigen import Eigenpairs, eigenpairs
from bnp_analysis.linalg.spectra.hutchinson import Trace, trace
from bnp_analysis.linalg.spectra.quadrature import SpectralDensity, spectral_density
from bnp_analysis.linalg.spectra.rank import RankEstimate, rank_estimate

__all__ = [
    "Bidiagonalization",
    "BlockTridiagonalization",
    "CallableOperator",
    "ColumnSubset",
    "ConditionNumber",
    "ConditionProfile",
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
    "RankEstimate",
    "Restriction",
    "Route",
    "RowScaled",
    "Shifted",
    "SpectralDensity",
    "SymmetricOperator",
    "Trace",
    "Tridiagonalization",
    "block_lanczos",
    "choose_route",
    "condition_number",
    "condition_profile",
    "congruence",
    "eigenpairs",
    "golub_kahan",
    "lanczos",
    "magnitude_condition_number",
    "on_host",
    "rank_estimate",
    "regularized_condition_number",
    "routes",
    "singular_condition_number",
    "spectral_density",
    "trace",
]
