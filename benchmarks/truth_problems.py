"""Matrix problems whose condition number is known: by construction, free of rounding, or in extended precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import torch
from torch import Tensor
from truth_arithmetic import Long, error, exact_product, long, singular_values

from bnp_analysis.linalg import (
    CallableOperator,
    DenseOperator,
    GramOperator,
    MatrixOperator,
    Preconditioner,
    SymmetricOperator,
)
from bnp_analysis.linalg.preconditioner import DensePreconditioner
from bnp_analysis.linalg.spectra.checks import HasBasis, SomeNullDirections
from bnp_analysis.precondition import DiagonalPreconditioner
from bnp_analysis.testing import random_orthogonal, spectrum

BOTH = ("factor-svd", "golub-kahan")
ALL = (*BOTH, "dense", "inertia", "lanczos")


@dataclass(frozen=True)
class Truth:
    """The condition number lies in `[low, high]`; `source` says how that is known, `rank` how many values are nonzero.

    `gap` is the smallest nonzero eigenvalue over the largest that vanishes in theory, infinite where none is stored.
    """

    low: float
    high: float
    source: str
    rank: int
    top: float = 1.0
    gap: float = math.inf

    @property
    def value(self) -> float:
        return math.sqrt(self.low * self.high)


@dataclass(frozen=True, eq=False)
class Case:
    """What is measured, what is said about it, and the answer."""

    A: SymmetricOperator
    truth: Truth
    methods: tuple[str, ...] = ALL
    P: Preconditioner | None = None
    null: Tensor | HasBasis | None = None
    steps: int | None = None
    delta: float | None = None
    indefinite: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Problem:
    """A name, the group of the table, whether the quick subset has it, and how it is made."""

    group: str
    name: str
    make: Callable[[], Case]
    quick: bool = False


def signs(n: int, g: torch.Generator) -> Tensor:
    """An orthogonal matrix whose entries `0, +-2^-k` are exact: Hadamard blocks of sizes `4^k`, shuffled."""
    blocks, left = [], n
    while left:
        size = 4 ** int(math.log(left, 4) + 1e-9)
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while matrix.shape[0] < size:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
        blocks.append(matrix / round(math.sqrt(size)))
        left -= size
    flips = torch.randint(0, 2, (2, n), generator=g) * 2.0 - 1
    order = torch.randperm(n, generator=g), torch.randperm(n, generator=g)
    return (flips[0].double()[:, None] * torch.block_diag(*blocks) * flips[1])[order[0]][:, order[1]]


def sigmas(kind: str, r: int, e: int) -> list[Fraction]:
    """Singular values between 1 and `2^-e`, dyadic, so that products with `signs` are exact."""
    third = [3 * i // r for i in range(r)]
    half = [0 if i < r / 2 else e for i in range(r)]
    if kind == "log":
        values = [Fraction(1, 2 ** round(i * e / max(r - 1, 1))) for i in range(r)]
    elif kind == "isolated":
        values = [Fraction(1, 2 ** (i % 2)) for i in range(r - 1)] + [Fraction(1, 2**e)]
    elif kind == "clustered":
        values = [Fraction(1024 - i % 4, 1024 * 2 ** (t * (e // 2))) for i, t in enumerate(third)]
    elif kind == "repeated":
        values = [Fraction(1, 2 ** (t * (e // 2))) for t in third]
    elif kind == "two-scale":
        values = [Fraction(1, 2 ** max(h - (i % 2), 0)) for i, h in enumerate(half)]
    else:
        values = [Fraction(1)] * r
    return sorted(values, reverse=True)


def exact_factor(
    values: list[Fraction], rows: int, columns: int, g: torch.Generator, shift: int = 0
) -> tuple[Tensor, Tensor]:
    """`F = W diag(sigma) Q^T` without rounding, and its null space."""
    sigma = torch.tensor([float(s) for s in values], dtype=torch.float64) * 2.0**shift
    W, Q = signs(rows, g)[:, : len(values)], signs(columns, g)
    F = (W * sigma) @ Q[:, : len(values)].T
    if max(rows, columns) <= 256:
        exact = long(W * sigma) @ long(Q[:, : len(values)].T)
        assert np.array_equal(exact, long(F)), "the product rounds: the construction is wrong"
    return F, Q[:, len(values) :]


def constructed(
    kind: str,
    n: int,
    e: int,
    *,
    rank: int | None = None,
    rows: int | None = None,
    shift: int = 0,
    declared: bool = False,
    dtype: torch.dtype = torch.float64,
    methods: tuple[str, ...] = ALL,
) -> Callable[[], Case]:
    """A stored factor with exactly known singular values; `shift` scales them by a power of two."""

    def make() -> Case:
        values = sigmas(kind, n if rank is None else rank, e)
        F, null = exact_factor(values, rows or n, n, torch.Generator().manual_seed(7), shift)
        assert torch.equal(F.to(dtype).double(), F), "the numbers do not fit into the dtype"
        kappa = float((values[0] / values[-1]) ** 2)
        truth = Truth(kappa, kappa, "construction", len(values), float(values[0]) ** 2 * 4.0**shift)
        return Case(
            GramOperator(MatrixOperator(F.to(dtype))), truth, methods, null=null.to(dtype) if declared else None
        )

    return make


def stored_matrix(kind: str, n: int, e: int, negative: int = 0) -> Callable[[], Case]:
    """A stored symmetric matrix with exactly known eigenvalues, `negative` of them below zero; no factor."""

    def make() -> Case:
        values = [s * s for s in sigmas(kind, n, e)]
        Q = signs(n, torch.Generator().manual_seed(8))
        flips = torch.ones(n, dtype=torch.float64)
        flips[: 2 * negative : 2] = -1.0
        A = (Q * torch.tensor([float(v) for v in values], dtype=torch.float64) * flips) @ Q.T
        exact = long(Q) * np.array([np.longdouble(float(v)) for v in values]) * long(flips) @ long(Q.T)
        assert np.array_equal(exact, long(A)), "the product rounds: the construction is wrong"
        kappa = float(values[0] / values[-1])
        truth = Truth(kappa, kappa, "construction", n)
        return Case(DenseOperator(A), truth, ("dense", "inertia", "lanczos"), indefinite=bool(negative))

    return make


def truth_of(
    product: Long, magnitude: float, rank: int | None = None, source: str = "extended precision", delta: float = 0.0
) -> Truth:
    """The answer from extended-precision singular values; if no rank is given, those above the doubt count."""
    values = singular_values(product)
    doubt = error(values, (product.shape[0], product.shape[1]), magnitude)
    if rank is None:
        rank = int((values > 100 * doubt).sum())
    top, least = float(values[0]), float(values[rank - 1])
    if delta and product.shape[1] > rank:
        least = 0.0
    low = ((max(top - doubt, 0.0)) ** 2 + delta) / ((least + doubt) ** 2 + delta)
    high = ((top + doubt) ** 2 + delta) / (max(least - doubt, 0.0) ** 2 + delta) if least > doubt or delta else math.inf
    gap = (least / float(values[rank])) ** 2 if rank < len(values) and values[rank] > 0 else math.inf
    return Truth(low, high, source, rank, top**2, gap)


def random_factor(
    kind: str, kappa: float, shape: tuple[int, int], rank: int, seed: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A stored factor with random singular vectors; its singular values are near the prescribed ones."""
    g = torch.Generator().manual_seed(seed)
    values = spectrum(kind, rank, 1.0 if kind == "flat" else kappa).sqrt()
    return (random_orthogonal(shape[0], g)[:, :rank] * values @ random_orthogonal(shape[1], g)[:rank]).to(dtype)


def random_problem(
    kind: str,
    kappa: float,
    shape: tuple[int, int] = (50, 40),
    *,
    dtype: torch.dtype = torch.float64,
    given: bool = True,
    delta: float | None = None,
    methods: tuple[str, ...] = ALL,
) -> Callable[[], Case]:
    """Full rank, random singular vectors; the truth is that of the stored numbers. `given` False widens by rounding."""

    def make() -> Case:
        F = random_factor(kind, kappa, shape, min(shape), 11, dtype)
        truth = truth_of(long(F), 0.0, min(shape), delta=delta or 0.0)
        null = torch.zeros(shape[1], 0, dtype=dtype) if "inverse-lanczos" in methods else None
        A = GramOperator(MatrixOperator(F, exact=given))
        return Case(A, truth, methods, null=null, delta=delta)

    return make


def conditioned(
    norm: float, kappa: float, seed: int, *, diagonal: bool = False, dtype: torch.dtype = torch.float64
) -> Callable[[], Case]:
    """`F = G P^-1` and `P` with `|P| = norm`: `F P` is far smaller than `|F| |P|`."""

    def make() -> Case:
        n, g = 24, torch.Generator().manual_seed(seed)
        G = random_factor("log", kappa, (n + 6, n), n, seed)
        scales = spectrum("log", n, norm, scale=norm)[torch.randperm(n, generator=g)]
        matrix = torch.diag(scales) if diagonal else random_orthogonal(n, g) * scales @ random_orthogonal(n, g)
        F, stored = (G @ torch.linalg.inv(matrix)).to(dtype), matrix.to(dtype)
        P: Preconditioner = DiagonalPreconditioner(stored.diagonal()) if diagonal else DensePreconditioner(stored)
        truth = truth_of(exact_product(F, stored), 0.0, n)
        return Case(GramOperator(MatrixOperator(F)), truth, (*BOTH, "dense", "lanczos"), P=P)

    return make


def undeclared_null_space(steps: int, known: int) -> Callable[[], Case]:
    """Truth 1e4, 50 null directions of which `known` are declared: 50 as all of them, fewer as what was found."""

    def make() -> Case:
        g = torch.Generator().manual_seed(3)
        values, Q = spectrum("log", 400, 1e4, rank=350), random_orthogonal(400, g)
        F = random_orthogonal(400, g)[:, :350] * values[:350].sqrt() @ Q[:, :350].T
        blur = 400 * 2.3e-16
        truth = Truth((1 - blur) / (1e-4 + blur), (1 + blur) / (1e-4 - blur), "construction to rounding", 350)
        null = Q[:, 350:]
        said = None if known == 0 else (null if known == 50 else SomeNullDirections(null[:, :known], {"found": known}))
        return Case(GramOperator(MatrixOperator(F)), truth, ("lanczos", "golub-kahan"), null=said, steps=steps)

    return make


def far_from_one(
    kind: str, power: int, *, dtype: torch.dtype = torch.float64, stored: str = "factor"
) -> Callable[[], Case]:
    """`2^power` times an exact problem: the condition number is the same, squares of the numbers are none."""

    def make() -> Case:
        values = sigmas(kind, 16, 9)
        F, _ = exact_factor(values, 16, 16, torch.Generator().manual_seed(5))
        kappa = float((values[0] / values[-1]) ** 2)
        truth = Truth(kappa, kappa, "construction", 16)
        unit = torch.tensor(power - power // 2), torch.tensor(power // 2)
        if stored == "factor":
            F = torch.ldexp(torch.ldexp(F, unit[0]), unit[1]).to(dtype)
            return Case(GramOperator(MatrixOperator(F)), truth, ALL)
        A = torch.ldexp(torch.ldexp(F.T @ F, unit[0]), unit[1]).to(dtype)
        operator: SymmetricOperator = DenseOperator(A)
        if stored == "function":
            operator = CallableOperator(lambda v: A @ v, 16, dtype=dtype)
        return Case(operator, truth, ("dense", "inertia", "lanczos"))

    return make


def far_apart(values: tuple[float, ...], scale: float = 1.0, *, factor: bool = False) -> Callable[[], Case]:
    """`diag(values)` with `P = scale I`: what is lost beside the largest entry is neither zero nor counted."""

    def make() -> Case:
        D = torch.diag(torch.tensor(values, dtype=torch.float64))
        exact = [Fraction(v) ** (2 if factor else 1) for v in values]
        ratio = max(exact) / min(exact)
        kappa = float(ratio) if ratio < 10**300 else math.inf
        A: SymmetricOperator = GramOperator(MatrixOperator(D)) if factor else DenseOperator(D)
        P = None if scale == 1.0 else DensePreconditioner(scale * torch.eye(len(values), dtype=torch.float64))
        methods = (*BOTH, "dense", "lanczos") if factor else ("dense", "inertia", "lanczos")
        return Case(A, Truth(kappa, kappa, "exact fractions", len(values)), methods, P=P)

    return make


def cancelling(K: float) -> Callable[[], Case]:
    """`F P` cancels in float64 to a matrix of rank 2; `F` has rank 3, and `P` is invertible."""

    def make() -> Case:
        F = torch.tensor([[K, 1.0, -K], [K, 0.0, -K], [K, -K, 0.0]], dtype=torch.float64)
        P = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0]], dtype=torch.float64)
        with mpmath.workdps(150):
            product = mpmath.matrix(F.tolist()) * mpmath.matrix(P.tolist())
            sigma = mpmath.svd_r(product, compute_uv=False)
            kappa = float((max(sigma) / min(sigma)) ** 2)
        truth = Truth(kappa, kappa, "150 digits", 3)
        return Case(GramOperator(MatrixOperator(F)), truth, (*BOTH, "dense", "lanczos"), P=DensePreconditioner(P))

    return make


def hidden_cast(kappa_exponent: int, dtype: torch.dtype) -> Callable[[], Case]:
    """A float64 function that computes in lower precision: intervals must be as wide as its products are imprecise."""

    def make() -> Case:
        values = [s * s for s in sigmas("log", 16, kappa_exponent)]
        Q = signs(16, torch.Generator().manual_seed(9))
        A = (Q * torch.tensor([float(v) for v in values], dtype=torch.float64)) @ Q.T
        kappa = float(values[0] / values[-1])
        operator = CallableOperator(lambda v: A @ v.to(dtype).double(), 16, dtype=torch.float64)
        return Case(operator, Truth(kappa, kappa, "construction", 16), ("dense", "inertia", "lanczos"))

    return make


def declared_small(small: float, *, factor: bool, dtype: torch.dtype = torch.float64) -> Callable[[], Case]:
    """`diag(1, 1/2, small)` with the third direction declared null, which it is not."""

    def make() -> Case:
        D = torch.diag(torch.tensor([1.0, 0.5, small], dtype=dtype))
        null = torch.tensor([[0.0], [0.0], [1.0]], dtype=dtype)
        kappa = float(1 / Fraction(float(D[2, 2])) ** (2 if factor else 1))
        A: SymmetricOperator = GramOperator(MatrixOperator(D)) if factor else DenseOperator(D)
        methods = (*BOTH, "dense", "lanczos") if factor else ("dense", "inertia", "lanczos")
        return Case(A, Truth(kappa, kappa, "construction", 3), methods, null=null)

    return make


def badly_given(offset: float, length: float) -> Callable[[], Case]:
    """A true null space of two dimensions by nearly parallel columns `1` and `offset + b`, times `length`."""

    def make() -> Case:
        one, b = torch.ones(16, dtype=torch.float64), (torch.arange(16) % 2).double()
        # Differences of neighbours of equal parity: exact, and zero on both.
        D = torch.zeros(14, 16, dtype=torch.float64)
        D[torch.arange(14), torch.arange(14)], D[torch.arange(14), torch.arange(14) + 2] = 1.0, -1.0
        # D D^T is two paths of seven: eigenvalues 2 - 2 cos(pi j / 8).
        kappa = (1 + math.cos(math.pi / 8)) / (1 - math.cos(math.pi / 8))
        truth = Truth(kappa * (1 - 1e-14), kappa * (1 + 1e-14), "closed form", 14)
        null = torch.stack([one, offset + b], dim=1) * length
        return Case(GramOperator(MatrixOperator(D)), truth, (*BOTH, "dense", "lanczos"), null=null)

    return make
