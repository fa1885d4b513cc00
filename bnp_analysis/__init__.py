"""Condition numbers of neural-network losses, with certified bounds, with and without BNP.

import bnp_analysis as bnp
risk = bnp.EmpiricalRisk(model, loss, (x, y))
A, P = bnp.gauss_newton(risk), bnp.bnp_preconditioner(risk)
print(bnp.condition_number(A), bnp.condition_number(A, preconditioner=P))
"""

# What is public stands in `__init__.pyi`: each name is imported when it is first used, so that what a program does not
# use (figures, data sets, theory) costs it no time.
import lazy_loader

_load, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_SUCCESSORS = {
    "rank_estimate": "condition_number(A).rank, which is decided, or n * (1 - spectral_density(A).mass(-x, x).value)",
    "routes": "linalg.methods",
}
# Names of 0.1 that now stand in their rooms: types of results, and what few programs ask for. They work as before, and
# are not listed.
_ROOMS = {
    "diagnose": ("Comparison", "LayerRow", "LayerTable"),
    "linalg": (
        *("ConditionNumber", "DensePreconditioner", "Eigenpairs", "Preconditioner", "SpectralDensity"),
        *("SymmetricOperator", "congruence", "lanczos", "magnitude_condition_number"),
        "regularized_condition_number",
    ),
    "results": ("Result",),
    "symmetry": ("NullDirections",),
    "theory": ("Check", "CheckTable", "ConvergenceCheck"),
    "training": ("Run",),
}


def __getattr__(name: str) -> object:
    if name in _SUCCESSORS:
        raise AttributeError(f"{__name__}.{name} is gone; use {_SUCCESSORS[name]}")
    room = next((room for room, names in _ROOMS.items() if name in names), None)
    return _load(name) if room is None else getattr(_load(room), name)


__version__ = "0.2.0"
