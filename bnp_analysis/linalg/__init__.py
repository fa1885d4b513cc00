"""Numerical linear algebra on flat vectors; it knows no networks.

`operators` are matrices known by their products, `preconditioner` the invertible maps `P` and `P^T A P`,
`lanczos` the process, `condition` the condition number with its routes and certificates, `eigen` a few
eigenpairs, `quadrature` densities, `hutchinson` traces.
"""

from bnp_analysis.linalg.condition.methods import Method, Price, Problem, Route, choose_method, methods, register
from bnp_analysis.linalg.condition.number import ConditionNumber
from bnp_analysis.linalg.condition.verbs import (
    condition_number,
    magnitude_condition_number,
    regularized_condition_number,
    singular_condition_number,
)
from bnp_analysis.linalg.derived import ColumnSubset, GramOperator, Restriction, Shifted
from bnp_analysis.linalg.host import on_host
from bnp_analysis.linalg.krylov.bidiagonal import Bidiagonalization, golub_kahan
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

routes = methods  # as it was called before; `bnp.routes`

_SUCCESSORS = {
    "block_lanczos": "eigenpairs(A, k), which finds repeated eigenvalues with their multiplicity",
    "BlockTridiagonalization": "Eigenpairs, which eigenpairs returns",
    "rank_estimate": "condition_number(A).rank, which is decided, or n (1 - spectral_density(A).mass(-x, x).value)",
    "RankEstimate": "ConditionNumber.rank",
    "choose_route": "choose_method",
}


def __getattr__(name: str) -> object:
    if name in _SUCCESSORS:
        raise AttributeError(f"bnp_analysis.linalg.{name} is gone; use {_SUCCESSORS[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Bidiagonalization",
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
    "Method",
    "Preconditioner",
    "Price",
    "Problem",
    "Product",
    "Restriction",
    "Route",
    "RowScaled",
    "Shifted",
    "SpectralDensity",
    "SymmetricOperator",
    "Trace",
    "Tridiagonalization",
    "choose_method",
    "condition_number",
    "congruence",
    "eigenpairs",
    "golub_kahan",
    "lanczos",
    "magnitude_condition_number",
    "methods",
    "on_host",
    "register",
    "regularized_condition_number",
    "routes",
    "singular_condition_number",
    "spectral_density",
    "trace",
]
