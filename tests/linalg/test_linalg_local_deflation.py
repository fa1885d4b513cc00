"""Null directions that live on few coordinates are deflated as they are: without a dense basis, with the same numbers.

Bugs that only these tests catch: a basis that is not orthonormal after `P^-1`; directions of other blocks lost where
blocks overlap; a direction that is not null believed because many are checked together; a dense basis formed after all.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, NullSpaceError
from bnp_analysis.linalg import DenseOperator, DensePreconditioner, LinearOperator, condition_number, eigenpairs
from bnp_analysis.linalg.bases import orthonormal_blocks
from bnp_analysis.linalg.krylov.bidiagonal import golub_kahan
from bnp_analysis.linalg.krylov.lanczos import lanczos
from bnp_analysis.linalg.matrices import CallableOperator, LocalColumns, MatrixOperator, beside
from bnp_analysis.linalg.spectra.checks import COMBINED, SomeNullDirections
from bnp_analysis.runtime.random import generator

SIZE, BLOCK = 360, 4


@dataclass(frozen=True, eq=False)
class Local:
    """What has `columns` and no basis."""

    columns: LocalColumns
    sources: dict[str, int] = field(default_factory=lambda: {"a cause": 90})


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def blocks() -> list[tuple[Tensor, Tensor]]:
    """90 orthonormal columns, one in each block of four coordinates."""
    return [
        (torch.arange(BLOCK * b, BLOCK * (b + 1)), torch.nn.functional.normalize(numbers(BLOCK, 1, seed=b), dim=0))
        for b in range(SIZE // BLOCK)
    ]


@pytest.fixture(scope="module")
def N(blocks) -> Tensor:
    assert len(blocks) > COMBINED
    return LocalColumns(SIZE, blocks).to_dense()


@pytest.fixture(scope="module")
def matrix(N) -> Tensor:
    """Semidefinite, with just these null directions and eigenvalues from 1 to 1e4."""
    Q = torch.linalg.qr(numbers(SIZE, SIZE, seed=1000) - N @ (N.T @ numbers(SIZE, SIZE, seed=1000)))[0]
    Q = torch.linalg.qr(torch.cat([N, Q], dim=1)[:, :SIZE])[0][:, N.shape[1] :]
    return (Q * torch.logspace(0, 4, Q.shape[1], dtype=torch.float64)) @ Q.T


@pytest.fixture
def operator(matrix) -> CallableOperator:
    return CallableOperator(lambda v: matrix @ v, SIZE, dtype=torch.float64)


@pytest.fixture(scope="module")
def P() -> DensePreconditioner:
    """Mixes the coordinates of a block, and no others."""
    parts = [
        torch.eye(BLOCK, dtype=torch.float64) + 0.4 * numbers(BLOCK, BLOCK, seed=500 + b).tril(-1) for b in range(90)
    ]
    return DensePreconditioner(torch.block_diag(*(3.0 ** -(b % 5) * part for b, part in enumerate(parts))))


@pytest.fixture
def never_dense(monkeypatch) -> None:
    def refuse(self):
        raise AssertionError("a dense basis was formed")

    monkeypatch.setattr(LocalColumns, "to_dense", refuse)


def same_span(A: Tensor, B: Tensor) -> float:
    return float((A @ A.T - B @ B.T).abs().max())


@pytest.mark.parametrize("seed", range(3))
def test_an_orthonormal_basis_of_blocks_that_overlap(seed):
    g = generator(seed)
    given = []
    for b in range(40):
        where = torch.randperm(30, generator=g)[: 3 + b % 4].sort().values + 30 * (b % 3)
        given.append(
            (where, 10.0 ** (b % 7 - 3) * torch.randn(len(where), 1 + b % 2, generator=g, dtype=torch.float64))
        )
    dense = LocalColumns(90, given).to_dense()
    made = orthonormal_blocks(90, given)
    Q = LocalColumns(90, made).to_dense()
    assert Q.shape == dense.shape
    assert float((Q.T @ Q - torch.eye(Q.shape[1], dtype=Q.dtype)).abs().max()) < 1e-14
    assert same_span(Q, torch.linalg.qr(dense / dense.norm(dim=0))[0]) < 1e-9


def test_nearly_parallel_blocks_are_orthogonal_and_parallel_ones_have_no_basis():
    where, v, w = torch.arange(5), numbers(5, 1, seed=0), numbers(5, 1, seed=1)
    made = orthonormal_blocks(9, [(where, v), (where + 1, w), (where, v + 1e-8 * w)])
    Q = LocalColumns(9, made).to_dense()
    assert float((Q.T @ Q - torch.eye(3, dtype=Q.dtype)).abs().max()) < 1e-14
    assert orthonormal_blocks(9, [(where, v), (where + 1, w), (where, 3.0 * v)]) is None


def test_blocks_that_share_nothing_stay_where_they_are(blocks):
    made = orthonormal_blocks(SIZE, blocks)
    assert [where.tolist() for where, _ in made] == [where.tolist() for where, _ in blocks]


def test_columns_beside_others(blocks, N):
    Y = numbers(SIZE, 3, seed=7)
    both, whole = beside(LocalColumns(SIZE, blocks), Y), torch.cat([N, Y], dim=1)
    assert both.shape == whole.shape
    c, v = numbers(whole.shape[1], 2, seed=8), numbers(SIZE, 2, seed=9)
    torch.testing.assert_close(both @ c, whole @ c)
    torch.testing.assert_close(both.T @ v, whole.T @ v)
    assert torch.equal(both.to_dense(), whole)
    assert torch.equal(LocalColumns(SIZE, both.blocks).to_dense(), whole)
    assert both.to(torch.float32).dtype == torch.float32


def test_transported_they_span_what_dense_ones_do(blocks, N, P):
    found = P.transport(LocalColumns(SIZE, blocks))
    assert isinstance(found, LocalColumns)
    assert found.held <= 4 * N.shape[1] * BLOCK
    assert same_span(found.to_dense(), P.transport(N)) < 1e-13


def test_transported_by_what_mixes_all_they_are_dense(blocks, N):
    P = DensePreconditioner(torch.eye(SIZE, dtype=torch.float64) + 0.01 * numbers(SIZE, SIZE, seed=7))
    found = P.transport(LocalColumns(SIZE, blocks))
    assert isinstance(found, Tensor)
    assert same_span(found, torch.linalg.qr(torch.linalg.solve(P.to_dense(), N))[0]) < 1e-12


@pytest.mark.parametrize("preconditioned", [False, True])
def test_numbers_of_krylov_methods_are_those_of_a_dense_basis(blocks, N, operator, P, preconditioned, never_dense):
    P = P if preconditioned else None
    local, plain = Local(LocalColumns(SIZE, blocks)), SomeNullDirections(N, {"a cause": 90})
    one, other = (
        condition_number(operator, preconditioner=P, null=n, method="lanczos", steps=60) for n in (local, plain)
    )
    assert one.null_dim == other.null_dim == 90
    assert one.null_sources == {"a cause": 90}
    assert one.lower == pytest.approx(other.lower, rel=1e-9)
    assert one.matvecs < other.matvecs
    local_ones, dense = (bnp.condition_profile(operator, preconditioner=P, null=n, steps=90) for n in (local, plain))
    assert local_ones.ranks.tolist() == dense.ranks.tolist()
    assert local_ones.upper == pytest.approx(dense.upper, rel=1e-6)
    pairs = [eigenpairs(operator, 3, preconditioner=P, null=n).values for n in (local, plain)]
    assert pairs[0] == pytest.approx(pairs[1], rel=1e-6)
    density = [bnp.spectral_density(operator, preconditioner=P, null=n, steps=20, probes=2) for n in (local, plain)]
    assert density[0].mass(1.0, 50.0)[0] == pytest.approx(density[1].mass(1.0, 50.0)[0], rel=1e-6)


def test_a_bidiagonalization_keeps_them_out(blocks, N, matrix, never_dense):
    F = MatrixOperator(torch.linalg.cholesky(matrix + N @ N.T).T @ (torch.eye(SIZE, dtype=torch.float64) - N @ N.T))
    run = golub_kahan(F, 30, null=LocalColumns(SIZE, blocks))
    assert float((run.right.T @ N).norm()) < 1e-12
    assert run.singular_values()[0] == pytest.approx(100.0, rel=1e-3)


def test_a_lanczos_basis_has_no_part_in_them(blocks, N, operator):
    run = lanczos(operator, 40, null=LocalColumns(SIZE, blocks))
    assert float((N.T @ run.basis).abs().max()) < 1e-14


@pytest.mark.parametrize("size", [1e-9, 1e-3])
def test_one_direction_among_many_that_is_not_null_is_refused(blocks, operator, matrix, size):
    spoilt = [(w, v) for w, v in blocks]
    w, v = spoilt[17]
    turned = v + size * torch.nn.functional.normalize(numbers(BLOCK, 1, seed=4), dim=0)
    spoilt[17] = (w, turned / turned.norm())
    with pytest.raises(NullSpaceError, match="declared null direction 17 is not null"):
        condition_number(operator, null=Local(LocalColumns(SIZE, spoilt)), method="lanczos")


@dataclass(frozen=True, eq=False)
class Both(Local):
    @property
    def basis(self) -> Tensor:
        return self.columns.to_dense()


def test_columns_of_another_operator_are_refused(blocks, matrix):
    null = Both(LocalColumns(SIZE, blocks))
    larger = CallableOperator(lambda v: v, SIZE + 1, dtype=torch.float64)
    with pytest.raises(InvalidInputError, match=r"null directions must be \(361, r\), got \(360, 90\)"):
        condition_number(larger, null=null, method="lanczos")
    with pytest.raises(InvalidInputError, match=r"null directions are in torch.float64 .*, the operator in .*32"):
        condition_number(DenseOperator(matrix.float()), null=null, method="lanczos")


def test_columns_that_are_not_orthonormal_are_made_so(blocks, operator):
    longer = LocalColumns(SIZE, [(w, 3.0 * v) for w, v in blocks])
    found = condition_number(operator, null=Both(longer), method="lanczos", steps=60)
    assert found.lower == pytest.approx(
        condition_number(operator, null=Local(LocalColumns(SIZE, blocks)), method="lanczos", steps=60).lower, rel=1e-9
    )


def test_a_stored_matrix_is_checked_with_all_its_digits(blocks, matrix):
    found = condition_number(DenseOperator(matrix), null=Local(LocalColumns(SIZE, blocks)))
    assert found.two_sided
    assert found.rank == 270
    assert found.lower <= 1e4 * (1 + 1e-9)
    assert found.upper >= 1e4 * (1 - 1e-9)


def test_directions_of_a_network_are_deflated_as_they_are(never_dense):
    x, y = torch.rand(40, 12, generator=generator(0), dtype=torch.float64), torch.arange(40) % 3
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bnp.models.mlp([12, 30, 3], dtype=torch.float64)
    risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, y))
    known, A = bnp.null_directions(risk), bnp.gauss_newton(risk)
    assert known.columns.shape[1] > COMBINED
    assert isinstance(A, LinearOperator)
    P = bnp.bnp_preconditioner(risk)
    for p in (None, P):
        with_null, without = (
            bnp.condition_profile(A, preconditioner=p, null=n, method="lanczos", ranks=[2, 5, 10])
            for n in (known, None)
        )
        assert with_null.ranks.tolist() == without.ranks.tolist()
        assert (with_null.lower <= without.upper).all()
        assert (without.lower <= with_null.upper).all()
        assert with_null.value == pytest.approx(without.value, rel=1e-6)
