"""A factor reduced once gives the numbers of the factor, with bounds that hold, and zeros explained by their places.

Bugs that only these tests catch: a triangle of other columns; an error of QR that is not counted, or counted against
the norm of the whole factor, which loses small columns; zeros called structural that are not, or structural ones
missed; pieces of work in the wrong order, or torch's threads not given back. Truth comes from 60 digits, ranks from
fractions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import (
    CallableOperator,
    ColumnSubset,
    ConditionNumber,
    DensePreconditioner,
    GramOperator,
    MatrixOperator,
    Restriction,
    RowScaled,
    condition_number,
)
from bnp_analysis.linalg.condition import factor_svd
from bnp_analysis.linalg.condition.reduction import reduced, reduced_parts, reducible
from bnp_analysis.linalg.forming import UNIT
from bnp_analysis.linalg.matrices import ReducedFactor, structural_rank
from bnp_analysis.runtime.threads import each
from bnp_analysis.testing import check_symmetric_operator, random_orthogonal, spectrum


class Streamed(MatrixOperator):
    """A matrix whose rows come a few at a time."""

    def row_blocks(self) -> Iterator[Tensor]:
        yield from self.to_dense().split(7)


def tall(g: torch.Generator, r: int = 60, n: int = 6, kappa: float = 1e4) -> Tensor:
    return random_orthogonal(r, g)[:, :n] * spectrum("log", n, kappa).sqrt() @ random_orthogonal(n, g)


def truth(factor: Tensor, P: Tensor) -> float:
    with mpmath.workdps(60):
        product = mpmath.matrix(factor.tolist()) * mpmath.matrix(P.tolist())
        sigma = mpmath.svd_r(product, compute_uv=False)
        return float((sigma[0] / sigma[len(sigma) - 1]) ** 2)


def holds(k: ConditionNumber, kappa: float) -> bool:
    return k.lower <= kappa * (1 + 1e-14) and kappa * (1 - 1e-14) <= k.upper


# what structure says


def matched(pattern: list[list[bool]]) -> int:
    """The size of a maximum matching, path by path."""
    owner: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column, nonzero in enumerate(pattern[row]):
            if nonzero and column not in seen:
                seen.add(column)
                if column not in owner or place(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    return sum(place(row, set()) for row in range(len(pattern)))


def exact_rank(rows: list[list[int]]) -> int:
    work, rank = [[Fraction(x) for x in row] for row in rows], 0
    for column in range(len(rows[0])):
        pivot = next((i for i in range(rank, len(work)) if work[i][column]), None)
        if pivot is None:
            continue
        work[rank], work[pivot] = work[pivot], work[rank]
        for i in range(rank + 1, len(work)):
            ratio = work[i][column] / work[rank][column]
            work[i] = [a - ratio * b for a, b in zip(work[i], work[rank], strict=True)]
        rank += 1
    return rank


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 0.9), st.integers(0, 2**31))
def test_the_structural_rank_is_a_matching_and_the_rank_of_almost_every_matrix(r, n, density, seed):
    g = torch.Generator().manual_seed(seed)
    nonzero = torch.rand(r, n, generator=g) < density
    values = torch.randint(1, 2**40, (r, n), generator=g) * nonzero
    assert structural_rank(nonzero) == matched(nonzero.tolist()) == exact_rank(values.tolist())


def test_columns_that_share_too_few_rows_are_explained(generator):
    """Three columns in two rows, as near the border of images: no null direction need be declared."""
    F = torch.rand(40, 8, generator=generator, dtype=torch.float64)
    F[2:, :3] = 0
    for factor in (MatrixOperator(F), RowScaled(torch.ones(40, dtype=torch.float64), F)):
        k = condition_number(GramOperator(factor))
        assert (k.rank, k.unresolved, k.two_sided) == (7, 0, True)
    computed = condition_number(GramOperator(MatrixOperator(F, exact=False)))
    assert not computed.two_sided, "of computed entries a zero may be rounding"


def test_scales_of_zero_take_their_rows_out(generator):
    """Of the rows that count only two have entries in three of the columns; the others do not make up for them."""
    rows = torch.rand(30, 5, generator=generator, dtype=torch.float64)
    rows[5:20, :3] = 0
    scale = torch.zeros(30, dtype=torch.float64)
    scale[3:20] = 1.0
    k = condition_number(GramOperator(RowScaled(scale, rows)))
    assert (k.rank, k.two_sided) == (4, True)
    assert condition_number(GramOperator(MatrixOperator(rows[3:20]))).value == pytest.approx(k.value, rel=1e-12)


# the reduced factor


@pytest.mark.parametrize("kind", [MatrixOperator, Streamed])
@pytest.mark.parametrize("shape", [(60, 6), (40, 40), (5, 9), (9, 8)])
def test_a_reduced_operator_is_the_operator(generator, kind, shape):
    F = torch.randn(shape, generator=generator, dtype=torch.float64)
    F[:, 2] = 0
    A = GramOperator(kind(F))
    B = reduced(A)
    assert isinstance(B.factor, ReducedFactor)
    assert B.factor.shape[0] <= min(shape)
    assert float((B.to_dense() - F.T @ F).abs().max()) <= 1e-13 * float((F.T @ F).abs().max())
    assert B.factor.columns == pytest.approx(F.norm(dim=0))
    # As many roundings as QR had rows, by convention; none where the rows are kept as they are.
    assert (B.factor.rounding >= shape[0] * UNIT) == (shape[0] > shape[1])
    check_symmetric_operator(B, generator)
    found, direct = condition_number(B), condition_number(A)
    assert found.value == pytest.approx(direct.value, rel=1e-9)
    assert (found.rank, found.two_sided) == (direct.rank, direct.two_sided)


def test_parts_are_those_of_the_columns(generator):
    F = tall(generator, n=9)
    parts = [torch.tensor([0, 4, 8]), torch.tensor([7, 1])]
    for part, A in zip(parts, reduced_parts(Streamed(F), parts), strict=True):
        direct = GramOperator(ColumnSubset(MatrixOperator(F), part))
        assert condition_number(A).value == pytest.approx(condition_number(direct).value, rel=1e-10)
    inner = Restriction(reduced(GramOperator(Streamed(F))), parts[1])
    assert holds(condition_number(inner), truth(F[:, parts[1]], torch.eye(2, dtype=torch.float64)))


@pytest.mark.parametrize("norm", [1e2, 1e5, 1e8, 1e11])
@pytest.mark.parametrize("kind", [MatrixOperator, Streamed])
def test_intervals_hold_however_large_the_preconditioner(generator, norm, kind):
    """`F P` is far smaller than `|F| |P|`, so that the digits of the triangle are lost: the interval must say so."""
    for _ in range(5):
        P = random_orthogonal(4, generator) * spectrum("log", 4, norm, scale=norm) @ random_orthogonal(4, generator)
        F = tall(generator, 30, 4, 100.0) @ torch.linalg.inv(P)
        k = condition_number(reduced(GramOperator(kind(F))), preconditioner=DensePreconditioner(P))
        assert holds(k, truth(F, P))


def test_without_the_columns_some_intervals_would_be_false(generator, monkeypatch):
    init = ReducedFactor.__init__

    def careless(self, matrix, columns, rounding, rank, factor):
        init(self, matrix, torch.zeros_like(columns), rounding, rank, factor)

    monkeypatch.setattr(ReducedFactor, "__init__", careless)
    with pytest.raises(AssertionError):
        test_intervals_hold_however_large_the_preconditioner(generator, 1e8, MatrixOperator)


def test_small_columns_keep_their_digits(generator):
    """Columns from 1 to 1e-12, which `P` brings to one size: an error relative to `|F|` would leave nothing of them."""
    G = tall(generator, 60, 6, 25.0)
    sizes = torch.logspace(0, -12, 6, dtype=torch.float64)
    P = torch.diag(1 / sizes)
    k = condition_number(reduced(GramOperator(MatrixOperator(G * sizes))), preconditioner=DensePreconditioner(P))
    assert holds(k, truth(G * sizes, P))
    assert k.upper <= (1 + 1e-10) * k.lower


def test_what_cannot_be_reduced_is_refused(generator, monkeypatch):
    F, P = tall(generator), DensePreconditioner(torch.eye(6, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="Reduce F, then apply P"):
        reduced(GramOperator(MatrixOperator(F) @ P))
    with pytest.raises(InvalidInputError, match="no factor"):
        reduced(CallableOperator(lambda v: v, 3, dtype=torch.float64))
    assert not reducible(GramOperator(MatrixOperator(F) @ P))
    assert reducible(GramOperator(MatrixOperator(F)))
    monkeypatch.setattr(factor_svd, "FACTOR_WORK", 100)
    assert not reducible(GramOperator(MatrixOperator(F)))


# side by side


@pytest.mark.parametrize("workers", [1, 3])
def test_pieces_come_back_in_order_and_threads_are_given_back(workers):
    counts: list[int] = []
    threads = torch.get_num_threads()
    assert each(lambda x: x * x, range(20), workers, counts.append) == [x * x for x in range(20)]
    assert counts == list(range(1, 21))
    with pytest.raises(ZeroDivisionError):
        each(lambda x: 1 // (x - 5), range(20), workers, counts.append)
    assert torch.get_num_threads() == threads


def test_an_interrupt_drops_what_has_not_begun():
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        time.sleep(1e-3)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        each(work, range(2_000), 2, stop)
    assert len(begun) < 2_000
