"""Every method counts the rounding of `F P`, however the product is wrapped.

Bugs that only these tests catch: a certificate that sees `|F P|` where the rounding is that of `|F| |P|`, because the
product hides inside a shift, a part, a stack or a Gram matrix; an asymmetry of rounding that is refused as a wrong
operator. Truth comes from 60 digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mpmath
import pytest
import torch
from torch import Tensor

from bnp_analysis.linalg import (
    ColumnSubset,
    ConditionNumber,
    DensePreconditioner,
    GramOperator,
    MatrixOperator,
    Restriction,
    SymmetricOperator,
    condition_number,
    congruence,
    regularized_condition_number,
)
from bnp_analysis.testing import random_orthogonal, spectrum

METHODS = ("factor-svd", "golub-kahan", "dense", "inertia", "lanczos", "inverse-lanczos")
PART = [0, 2, 3]


@dataclass(frozen=True, eq=False)
class Cancelling:
    """`F = G P^-1` and `P` with `|P| = norm`: `F P` is far smaller than `|F| |P|`."""

    factor: Tensor
    P: Tensor

    def singular_values(self, columns: list[int]) -> list[mpmath.mpf]:
        """Of `F P[:, columns]`, in 60 digits."""
        with mpmath.workdps(60):
            product = mpmath.matrix(self.factor.tolist()) * mpmath.matrix(self.P.tolist())
            rows = [[product[i, j] for j in columns] for i in range(product.rows)]
            return list(mpmath.svd_r(mpmath.matrix(rows), compute_uv=False))

    def kappa(self, columns: list[int], delta: float = 0.0) -> float:
        sigma = self.singular_values(columns)
        with mpmath.workdps(60):
            return float((sigma[0] ** 2 + mpmath.mpf(delta)) / (sigma[-1] ** 2 + mpmath.mpf(delta)))


def cancelling(norm: float, g: torch.Generator) -> Cancelling:
    n = 5
    P = random_orthogonal(n, g) * spectrum("log", n, norm, scale=norm) @ random_orthogonal(n, g)
    G = random_orthogonal(n + 2, g)[:, :n] * spectrum("log", n, 100.0).sqrt() @ random_orthogonal(n, g)
    return Cancelling(G @ torch.linalg.inv(P), P)


def holds(k: ConditionNumber, truth: float) -> bool:
    return (math.isnan(k.lower) or k.lower <= truth) and truth <= k.upper


def everything(n: int) -> Tensor:
    return torch.zeros(n, 0, dtype=torch.float64)


WRAPPED: dict[str, Callable[[MatrixOperator, DensePreconditioner], SymmetricOperator]] = {
    "congruence": lambda F, P: congruence(GramOperator(F), P),
    "a part of a congruence": lambda F, P: Restriction(congruence(GramOperator(F), P), torch.tensor(PART)),
    "the Gram matrix of a product": lambda F, P: GramOperator(F @ P),
    "the Gram matrix of columns of a product": lambda F, P: GramOperator(ColumnSubset(F @ P, torch.tensor(PART))),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", WRAPPED)
def test_bounds_hold_up_to_norm_1e5(way: str, method: str, generator: torch.Generator) -> None:
    """Without the `|P|` term two-sided intervals missed the truth, most of them at `1e4` and beyond."""
    both = 0
    for norm in (1e2, 1e3, 1e4, 1e5):
        for _ in range(3):
            problem = cancelling(norm, generator)
            A = WRAPPED[way](MatrixOperator(problem.factor), DensePreconditioner(problem.P))
            k = condition_number(A, null=everything(A.dim), method=method)
            assert holds(k, problem.kappa(PART if A.dim == len(PART) else list(range(5)))), (norm, str(k))
            both += k.two_sided
    assert both >= 5, "bounds that are never finite are no evidence"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("delta", [1e-8, 1e-3])
def test_regularized_bounds_hold_up_to_norm_1e5(method: str, delta: float, generator: torch.Generator) -> None:
    """`P^T A P + delta I` and its factor `[F P; sqrt(delta) I]` round like `P^T A P` and `F P`."""
    for norm in (10.0, 1e3, 1e5):
        for _ in range(4):
            problem = cancelling(norm, generator)
            A, P = GramOperator(MatrixOperator(problem.factor)), DensePreconditioner(problem.P)
            k = regularized_condition_number(A, delta, preconditioner=P, method=method)
            assert holds(k, problem.kappa(list(range(5)), delta)), (norm, str(k))
            assert k.two_sided or norm > 1e3


def test_a_preconditioned_factor_costs_what_it_says(generator: torch.Generator) -> None:
    """The norms that the radius needs are products as well."""
    problem = cancelling(10.0, generator)
    A = GramOperator(MatrixOperator(problem.factor))
    plain = condition_number(A, null=everything(5), method="golub-kahan")
    assert plain.matvecs <= plain.rank + 2 if plain.rank else False
    with_p = condition_number(
        A, null=everything(5), preconditioner=DensePreconditioner(problem.P), method="golub-kahan"
    )
    assert plain.matvecs < with_p.matvecs <= plain.matvecs + 10
