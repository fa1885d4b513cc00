"""The numbers of a layer table are those of each block measured by itself, however the table gets them.

Bugs that only these tests catch: a unit measured on another unit's rows or with another's `P`; a number that the shared
triangle blurs and that stays blurred; units whose inputs depend on each other left one-sided in large layers; a result
that depends on how many threads there are; a layer's Jacobian computed again for every unit.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import bnp_analysis as bnp
from bnp_analysis.curvature.factors import JacobianFactor
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.diagnose import blocks
from bnp_analysis.diagnose.blocks import pair
from bnp_analysis.linalg import (
    CallableOperator,
    ConditionNumber,
    DenseOperator,
    DensePreconditioner,
    GramOperator,
    MatrixOperator,
    condition_number,
)
from bnp_analysis.linalg.condition import dense, factor_svd, row_gram
from bnp_analysis.linalg.matrices import ReducedFactor, RowScaled
from bnp_analysis.network import coverage

Found = ConditionNumber | None


@pytest.fixture
def data(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs of several scales, some of them hardly ever nonzero."""
    x = torch.rand(70, 9, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1, 9, dtype=torch.float64)
    x[2:, :3] = 0
    return x, torch.randint(0, 3, (70,), generator=generator)


@pytest.fixture
def images(generator: torch.Generator) -> bnp.EmpiricalRisk:
    x = torch.rand(40, 2, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 3, (40,), generator=generator)
    layers = [nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    model = nn.Sequential(*layers).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return bnp.EmpiricalRisk(model, cross_entropy, (x, y))


def perceptron(x: Tensor, y: Tensor, activation: str = "relu") -> bnp.EmpiricalRisk:
    model = bnp.models.mlp([x.shape[1], 6, 5, 3], activation=activation, dtype=torch.float64)
    return bnp.EmpiricalRisk(model, cross_entropy, (x, y))


def numbers(table: bnp.diagnose.LayerTable) -> Iterator[tuple[str | tuple[str, int], tuple[Found, Found]]]:
    for row in table.layers:
        yield row.layer, (row.block, row.block_with_P)
        for i in range(row.units):
            yield (row.layer, i), (row.unit_blocks[i], row.unit_blocks_with_P[i])


def require_same(risk: bnp.EmpiricalRisk, table: bnp.diagnose.LayerTable) -> int:
    """Every number of the table against the block measured by itself; how many of them are two-sided."""
    P, two_sided = bnp.bnp_preconditioner(risk), 0
    for block, found in numbers(table):
        if found[0] is None:
            continue
        A, null = bnp.gauss_newton(risk, block=block), bnp.null_directions(risk, block=block)
        for k, inner in zip(found, (None, P.block(block)), strict=True):
            assert k is not None
            direct = condition_number(A, preconditioner=inner, null=null)
            assert k.value == pytest.approx(direct.value, rel=1e-6) or not direct.two_sided
            assert max(k.lower, direct.lower) <= min(k.upper, direct.upper)
            assert k.two_sided >= direct.two_sided
            assert k.rank == direct.rank or not direct.two_sided
            two_sided += k.two_sided
    return two_sided


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_dense_layers_have_the_numbers_of_their_blocks(data, activation):
    risk = perceptron(*data, activation)
    assert require_same(risk, bnp.layer_table(risk)) >= 15


def test_convolutions_have_the_numbers_of_their_blocks(images):
    assert require_same(images, bnp.layer_table(images)) >= 10


def test_units_of_a_layer_too_large_by_itself_are_still_two_sided(images, data, monkeypatch):
    risks = (images, perceptron(*data))
    known = [dict(numbers(bnp.layer_table(risk))) for risk in risks]
    monkeypatch.setattr(factor_svd, "FACTOR_WORK", 1e5)
    monkeypatch.setattr(row_gram, "FACTOR_WORK", 0.0)
    monkeypatch.setattr(dense, "DENSE_LIMIT", 20)
    monkeypatch.setattr(blocks, "SEARCHED", 0)
    for risk, before in zip(risks, known, strict=True):
        for block, found in numbers(bnp.layer_table(risk)):
            for k, other in zip(found, before[block], strict=True):
                if k is not None and isinstance(block, tuple):
                    assert k.two_sided
                    assert k.value == pytest.approx(other.value, rel=1e-6)
                elif k is not None and k.dim > 20:
                    assert k.method == "lanczos"


def test_a_layer_forms_its_jacobian_once(images, monkeypatch):
    formed = []
    rows = JacobianFactor.row_blocks

    def counted(self):
        formed.append(self.shape)
        yield from rows(self)

    monkeypatch.setattr(JacobianFactor, "row_blocks", counted)
    monkeypatch.setattr(JacobianFactor, "to_dense", lambda self: pytest.fail("the factor is formed once more"))
    monkeypatch.setattr(blocks, "known_null", lambda risk, block, factor=None, recorded=None: None)
    bnp.layer_table(images, off_block=False)  # which forms that of the whole network
    assert len(formed) == 1
    # Also where every number with P is measured once more on the rows themselves.
    monkeypatch.setattr(blocks, "_WIDTH", -1.0)
    bnp.layer_table(images, off_block=False)
    assert len(formed) == 2


@pytest.mark.parametrize("frozen", [False, True])
def test_layers_that_are_differentiated_share_one_sweep(generator, monkeypatch, frozen):
    """Two convolutions and a map over positions; in the second case one of them is not among the parameters."""
    x, y = torch.rand(12, 2, 6, 6, generator=generator).double(), torch.randint(0, 3, (12, 4), generator=generator)
    layers = [nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Flatten(2), nn.Linear(4, 3)]
    model = nn.Sequential(*layers).double()
    if frozen:
        model[2].requires_grad_(False)
    risk = bnp.EmpiricalRisk(model, lambda z, t: cross_entropy(z.flatten(0, 1), t.flatten()), (x, y))
    formed, rows = [], JacobianFactor.row_blocks

    def counted(self):
        formed.append(self.shape)
        yield from rows(self)

    monkeypatch.setattr(JacobianFactor, "row_blocks", counted)
    table = bnp.layer_table(risk, off_block=True)
    assert formed == [(12 * 4 * 3, risk.space.dim)]
    assert table.matvecs == sum(row.matvecs for row in table.layers) + bnp.gauss_newton(risk).factor.dense_cost
    A, names = bnp.gauss_newton(risk).to_dense(), [row.layer for row in table.layers]
    inside = sum(A[p][:, p].square().sum() for p in map(risk.space.indices, names))
    assert table.off_block.value == pytest.approx(float((1 - inside / A.square().sum()).sqrt()), rel=1e-9)
    monkeypatch.setattr(blocks, "available_memory", lambda device=None: 0)
    for row, apart in zip(table.layers, bnp.layer_table(risk).layers, strict=True):
        assert row.block.value == pytest.approx(apart.block.value, rel=1e-6)
        assert row.block.two_sided == apart.block.two_sided
        assert row.is_hessian == apart.is_hessian
    monkeypatch.undo()
    assert require_same(risk, table) > 0


def test_numbers_do_not_depend_on_the_threads(data):
    risk, threads = perceptron(*data), torch.get_num_threads()
    one = bnp.layer_table(risk)
    try:
        torch.set_num_threads(3)
        three = bnp.layer_table(risk)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    for (_, a), (_, b) in zip(numbers(one), numbers(three), strict=True):
        for k, other in zip(a, b, strict=True):
            assert (k is None) == (other is None)
            if k is not None and other is not None:
                assert k.value == pytest.approx(other.value, rel=1e-9)
                assert (k.rank, k.two_sided) == (other.rank, other.two_sided)


def test_far_means_are_measured_on_the_centred_rows(data, monkeypatch):
    """Inputs at 1e7 +- 1: the triangle of the raw rows has lost more than the rows minus their mean."""
    x, y = data
    x = 1e7 + torch.rand(70, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = bnp.models.mlp([6, 12, 3], activation="tanh", dtype=torch.float64)
    with torch.no_grad():
        model.fc1.weight *= 1e-7
    risk = bnp.EmpiricalRisk(model, cross_entropy, (x, y))
    P = bnp.bnp_preconditioner(risk)
    swept = unit_blocks(risk, coverage(risk))["fc1"]
    direct = [condition_number(swept[i], preconditioner=P.block(("fc1", i))) for i in range(12)]
    found = bnp.layer_table(risk, P, layers=["fc1"]).layers[0].unit_blocks_with_P
    monkeypatch.setattr(blocks, "_WIDTH", 1.0)
    blurred = bnp.layer_table(risk, P, layers=["fc1"]).layers[0].unit_blocks_with_P
    for k, best, worse in zip(found, direct, blurred, strict=True):
        assert k is not None
        assert worse is not None
        assert k.two_sided
        assert k.upper / k.lower <= 1.000001 * best.upper / best.lower < 0.99999 * worse.upper / worse.lower
        assert max(k.lower, best.lower, worse.lower) <= min(k.upper, best.upper, worse.upper)


@pytest.mark.parametrize("rounding", [1e-3, 1.0, 1e3])
def test_what_a_reduced_factor_hides_is_measured_directly(rounding, generator, monkeypatch):
    """Rounding that leaves a wide interval, unresolved values, or nothing at all."""
    F = torch.randn(9, 4, generator=generator, dtype=torch.float64)
    own = GramOperator(MatrixOperator(F))
    P = DensePreconditioner(torch.eye(4, dtype=torch.float64))
    careless = ReducedFactor(torch.linalg.qr(F)[1], F.norm(dim=0), rounding, 4, MatrixOperator(F))
    plain = condition_number(own)

    def measure(A, **words):
        return condition_number(A, **words) if "preconditioner" in words else plain

    monkeypatch.setattr(blocks, "condition_number", measure)
    found = pair(GramOperator(careless), P, None, 0, direct=own)[1]
    assert found is not None
    assert found.two_sided
    assert found.value == pytest.approx(plain.value, rel=1e-10)
    assert pair(own, None, None, 0)[1] is None


def test_what_is_unresolved_with_p_alone_is_measured_directly():
    matrix, P = (torch.diag(torch.tensor([1.0, small], dtype=torch.float64)) for small in (1e-3, 1e-4))
    careless = CallableOperator(lambda v: matrix @ v, 2, dtype=torch.float64, eps=1e-8)
    plain, found = pair(careless, DensePreconditioner(P), None, 0, direct=DenseOperator(matrix))
    assert (plain.unresolved, found.unresolved) == (0, 0)
    assert found.value == pytest.approx(1e11, rel=1e-3)
    assert pair(careless, DensePreconditioner(P), None, 0)[1].unresolved == 1


def test_dependent_inputs_are_found_in_layers_too_large_to_search(data, monkeypatch):
    """A column that is a sum of others: no place of a zero shows it."""
    x, y = data
    x = torch.cat([x[:, 3:], x[:, 3:5].sum(dim=1, keepdim=True)], dim=1)
    monkeypatch.setattr(blocks, "SEARCHED", 0)
    found = [k for k in bnp.layer_table(perceptron(x, y), layers=["fc1"]).layers[0].unit_blocks if k is not None]
    assert all(k.two_sided for k in found)
    assert sum(k.null_sources == {"dependent inputs": 1} for k in found) >= 3


def test_progress_counts_every_block_once(data):
    seen: list[tuple[int, int]] = []
    bnp.layer_table(perceptron(*data), progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {6 + 5 + 3 + 2 * 3}
    assert [done for done, _ in seen] == list(range(1, 21))


def test_rows_that_are_held_may_leave_zero_rows_out() -> None:
    """A layer's rows come in parts, of which those that are zero may be missing: the matrix is the same."""

    class Sparse(RowScaled):
        @property
        def dense_cost(self) -> int:
            return 3

    rows = torch.randn(3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    F = Sparse(torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64), rows)
    A = GramOperator(F)
    held = blocks.held(A, F)
    assert held is not A
    assert held.factor is not None
    assert (held.factor.dense_cost, held.factor.rank_bound, held.factor.exact) == (0, F.rank_bound, F.exact)
    torch.testing.assert_close(held.to_dense(), A.to_dense())
    torch.testing.assert_close(held @ rows[0], A @ rows[0])
