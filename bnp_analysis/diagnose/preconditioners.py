"""A report on a preconditioner: condition number, stable rank, cosine with the inverse curvature."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from bnp_analysis.errors import InvalidInputError, NotConvexError
from bnp_analysis.linalg import ConditionNumber, Preconditioner, SymmetricOperator, singular_condition_number
from bnp_analysis.linalg.preconditioner import check_fits
from bnp_analysis.results import Result
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.memory import require_memory


@dataclass(frozen=True, kw_only=True, repr=False)
class PreconditionerReport(Result):
    """A preconditioner by itself.

    Attributes:
        condition: the ratio of the ends of the singular values of `P`; that of `P P^T` is its square.
        stable_rank: `|P|_F^2 / |P|_2^2`, between 1 and `dim`: in how many directions `P` is as long as in its longest.
        cosine: of `P P^T` with the inverse curvature, `<P P^T, A^-1> / (|P P^T|_F |A^-1|_F)`; 1 for multiples of it;
            None without a curvature.
        dim: the number of parameters.
    """

    condition: ConditionNumber
    stable_rank: float
    cosine: float | None
    dim: int

    def summary(self) -> str:
        """The three numbers in a line."""
        near = "" if self.cosine is None else f", cosine of P P^T with the inverse curvature {self.cosine:.4g}"
        k = self.condition
        return f"P of {self.dim} parameters: |P| |P^-1| = {k.value:.4g}, stable rank {self.stable_rank:.4g}{near}"


@gated
def preconditioner_report(
    P: Preconditioner, A: SymmetricOperator | None = None, *, damping: float = 0.0
) -> PreconditionerReport:
    """How uneven a preconditioner is, and how near `P P^T` is to the inverse of a curvature.

    `|P|_F^2 / |P|_2^2` and `<P P^T, A^-1> / (|P P^T|_F |A^-1|_F)` are formed from the dense `P` and `A`, in float64.

    Args:
        P: for instance from `optimizer_preconditioner`.
        A: a positive definite curvature of the same parameters.
        damping: relative to the largest eigenvalue: `A + damping |A| I` is inverted.

    Returns:
        A `PreconditionerReport`.

    Raises:
        NotConvexError: `A` has a negative eigenvalue beyond `damping`.
        InvalidInputError: `A` is singular to rounding, so that its inverse would be noise; sizes that do not fit.
        MemoryLimitError: dense matrices do not fit.

    Source: T2 for what a good `P` is: `P^T A P = c I` exactly where the cosine is 1.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64)))
        >>> P = bnp.linalg.DensePreconditioner(torch.diag(torch.tensor([0.5, 1.0], dtype=torch.float64)))
        >>> round(preconditioner_report(P, A).cosine, 12)
        1.0
    """
    began, products, cosine = time.perf_counter(), 0, None
    require_memory(8 * 5 * P.dim**2, f"dense matrices of {P.dim} parameters")
    dense = P.to_dense().double().cpu()
    singular = torch.linalg.svdvals(dense)
    if A is not None:
        check_fits(A, P)
        values, vectors = torch.linalg.eigh(A.to_dense().double().cpu())
        products = A.dense_cost
        size = float(values.abs().max())
        noise = P.dim * A.eps * size
        damped = values + damping * size
        if float(damped[0]) < -10 * noise:
            raise NotConvexError(
                f"the curvature has a negative eigenvalue {float(values[0]):.3g} (the largest size is {size:.3g}): its "
                "inverse is no positive definite map, to which P P^T could be compared. Take gauss_newton(risk), or "
                "damping= above that share of the largest"
            )
        if float(damped[0]) <= 10 * noise:
            raise InvalidInputError(
                f"the curvature is singular to rounding (smallest eigenvalue {float(values[0]):.3g} of "
                f"{size:.3g}), so that the largest part of its inverse is noise; give damping=, for instance 1e-6"
            )
        turned = vectors.T @ dense
        square = turned @ turned.T
        inverse = 1 / damped
        cosine = float((square.diagonal() * inverse).sum() / (square.norm() * inverse.norm()))
    condition = singular_condition_number(P)
    return PreconditionerReport(
        condition=condition,
        stable_rank=float(singular.square().sum() / singular[0].square()),
        cosine=cosine,
        dim=P.dim,
        settings={"damping": damping, "preconditioner": dict(getattr(P, "settings", {}))},
        matvecs=products,
        seconds=time.perf_counter() - began,
    )
