"""Condition numbers of neural-network losses, with evidence, with and without BNP.

import bnp_analysis as bnp
risk = bnp.EmpiricalRisk(model, loss, (x, y))
A, P = bnp.gauss_newton(risk), bnp.bnp_preconditioner(risk)
print(bnp.condition_number(A), bnp.condition_number(A, preconditioner=P))
"""

# What is public stands in `__init__.pyi`: each name is imported when it is first used, so that what a program does not
# use (figures, data sets, theory) costs it no time.
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
