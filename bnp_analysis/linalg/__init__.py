"""Numerical linear algebra on flat vectors, independent of networks.

`operators` defines matrices by their products, `preconditioner` invertible maps `P` and `P^T A P`, `krylov` Krylov
processes, `spectra` eigenpairs, densities and traces, `condition` the condition number and its methods.
"""

import lazy_loader

# What is public stands in `__init__.pyi`, as for the package: each name is imported when it is first used.
_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_SUCCESSORS = {
    "block_lanczos": "eigenpairs(A, k), which finds repeated eigenvalues with their multiplicity",
    "BlockTridiagonalization": "Eigenpairs, which eigenpairs returns",
    "rank_estimate": "condition_number(A).rank, which is decided, or n * (1 - spectral_density(A).mass(-x, x).value)",
    "RankEstimate": "ConditionNumber.rank",
    "choose_route": "choose_method",
    "routes": "methods",
    "Route": "MethodCost",
}


def __getattr__(name: str) -> object:
    if name in _SUCCESSORS:
        raise AttributeError(f"{__name__}.{name} is gone; use {_SUCCESSORS[name]}")
    return _load(name)
