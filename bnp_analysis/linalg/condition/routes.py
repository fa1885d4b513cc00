"""Which route a condition number takes, and what each would cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.results import Result
from bnp_analysis.runtime.memory import available_memory

METHODS = ("auto", "factor-svd", "golub-kahan", "dense", "inertia", "inverse-lanczos", "lanczos")
# Operations of a singular value decomposition that "auto" takes on: about a minute of one processor core.
FACTOR_WORK = 2e12
DENSE_LIMIT = 3_000
LANCZOS_STEPS = 100


@dataclass(frozen=True, kw_only=True, repr=False)
class Route(Result):
    """A way to a condition number of one operator, and its cost.

    Attributes:
        method: its name.
        products: with the operator; NaN where it depends on the spectrum.
        memory: bytes.
        flops: of the dense algebra.
        applies: whether it can run here and now.
        claim: what it can say.
    """

    method: str
    products: float
    memory: int
    flops: float
    applies: bool
    claim: str

    def summary(self) -> str:
        """The route in one line."""
        products = (
            "a number of products that depends on the spectrum"
            if math.isnan(self.products)
            else f"{self.products:.0f} products"
        )
        cost = f"{products}, {self.memory / 2**30:.2g} GiB, {self.flops:.1e} flops"
        return f"{self.method:<16} {'' if self.applies else 'does not apply; '}{cost}: {self.claim}"


def routes(A: SymmetricOperator, steps: int = LANCZOS_STEPS) -> list[Route]:
    """Every route to the condition number of an operator, with its cost and memory, before anything runs.

    Args:
        A: symmetric operator on `R^n`.
        steps: of Lanczos.

    Returns:
        A list of `Route`; the first that applies among factor-svd, dense, lanczos is what `"auto"` takes.

    Source: T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> [route.method for route in bnp.routes(bnp.DenseOperator(torch.eye(3))) if route.applies]
        ['dense', 'inertia', 'inverse-lanczos', 'lanczos']
    """
    n, free = A.dim, available_memory(A.device)
    factor = A.factor
    r = 0 if factor is None else factor.shape[0]
    rank = 0 if factor is None else factor.rank_bound
    table = [
        (
            "factor-svd",
            0.0 if factor is None else factor.dense_cost,
            8 * 4 * r * n,
            factor_work((r, n)),
            factor is not None and factor_work((r, n)) <= 10 * FACTOR_WORK,
            "both sides, if structure or known null directions explain every zero",
        ),
        (
            "golub-kahan",
            float(rank + 2),
            8 * (rank + 1) * (r + n),
            4.0 * rank**2 * (r + n),
            factor is not None,
            "the same, without holding the factor; a lower bound when stopped early; resumes",
        ),
        ("dense", float(A.dense_cost), 8 * 6 * n * n, 4.0 / 3 * n**3, True, "both sides, to n u |A|"),
        ("inertia", float(A.dense_cost), 8 * 8 * n * n, 12.0 * n**3, True, "both ends decided by counts"),
        (
            "inverse-lanczos",
            math.nan,
            8 * (steps + 30) * n,
            4.0 * steps**2 * n,
            True,
            "both sides but for a stated probability; needs the whole null space, and inner solves that converge",
        ),
        ("lanczos", float(steps + 3), (steps + 1) * n * A.dtype.itemsize, 4.0 * steps**2 * n, True, "a lower bound"),
    ]
    return [
        Route(
            method=method,
            products=products,
            memory=memory,
            flops=flops,
            applies=possible and memory < free,
            claim=claim,
            settings={"dim": n, "steps": steps},
        )
        for method, products, memory, flops, possible, claim in table
    ]


def choose_route(A: SymmetricOperator, *, indefinite: bool = False) -> str:
    """The first route whose operations and memory fit: factor-svd, then dense, then lanczos.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> choose_route(bnp.DenseOperator(torch.eye(3)))
        'dense'
    """
    free = available_memory(A.device)
    factor = None if indefinite else A.factor
    # Rows, their magnitudes and the copy that QR works on, in float64.
    if factor and factor_work(factor.shape) <= FACTOR_WORK and 8 * 4 * factor.shape[0] * factor.shape[1] < free:
        return "factor-svd"
    if A.dim <= DENSE_LIMIT and 8 * 6 * A.dim**2 < free:
        return "dense"
    return "lanczos"


def factor_work(shape: tuple[int, int]) -> float:
    """Operations of the singular values of a matrix by QR and bidiagonalization, in those of a QR factorization.

    Half of a bidiagonalization are products with vectors: measured at a quarter of the speed of QR.

    Example:
        >>> f"{factor_work((5000, 100_000)):.0e}"  # a wide one takes minutes
        '6e+12'
    """
    small = float(min(shape))
    return 2.0 * shape[0] * shape[1] * small + 10 * small**3


def next_route(A: SymmetricOperator) -> str:
    """What would close a one-sided answer, with its cost."""
    table = {route.method: route for route in routes(A) if route.applies}
    for method in ("factor-svd", "golub-kahan", "dense"):
        if method in table:
            route = table[method]
            return f"; next: method={method!r}, about {route.products:.0f} products, {route.memory / 2**30:.2g} GiB"
    return ""
