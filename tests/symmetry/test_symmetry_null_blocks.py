"""What null directions are for: blocks of layers and units, two-sided condition numbers, the laws of T11.

Bugs that only these tests catch: a direction of a layer that is spread over units although each unit has its own; a
unit that gets a neighbour's direction; a complete null space that does not make a number two-sided, or an incomplete
one that does; directions that are not transported by a preconditioner; a Hessian annihilated where T11 says it is not.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from curvature_reference import Problem, classes, numbers, spread
from null_cases import CASES, solved
from null_models import hidden
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.symmetry.null_space import RecordedNetwork, search

LAYERED = (
    *("relu deep", "linear", "dead and always active", "constant features", "few rows", "ignored labels", "words"),
    *("batch norm", "batch norm eval", "layer norm", "conv", "conv depthwise", "residual", "spare"),
)
COMPLETE = [name for name in (*LAYERED, "functional", "tokens", "group norm") if CASES[name].unexplained == 0]


def nullity(factor: Tensor) -> int:
    sigma = torch.linalg.svdvals(factor)
    return factor.shape[1] - int((sigma > 10 * max(factor.shape) * 2.3e-16 * sigma[0]).sum())


def layers(problem: Problem) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[0] for name in problem.free if not name.startswith("gains")))


@pytest.mark.parametrize("name", LAYERED)
def test_directions_of_layers_and_units_are_null_for_their_dense_blocks(name: str) -> None:
    problem, risk, A, factor = solved(name).problem, solved(name).risk, solved(name).matrix, solved(name).factor
    for layer in layers(problem):
        names = [n for n in problem.free if n.rpartition(".")[0] == layer]
        where = problem.positions(names)
        N = bnp.null_directions(risk, block=layer)
        size = float(torch.linalg.matrix_norm(A[where][:, where], 2))
        assert float((A[where][:, where] @ N.basis).norm()) <= 1e-12 * size
        # With 6 examples a hidden layer has more parameters than independent outputs.
        missing = 9 if (name, layer) == ("few rows", "0") else 0
        assert nullity(factor[:, where]) == N.basis.shape[1] + missing
        for i in range(len(problem.free[names[0]])):
            unit = problem.positions(names, unit=i)
            inside = N.inside(torch.searchsorted(where, unit))
            block = A[unit][:, unit]
            assert float((block @ inside).norm()) <= 1e-12 * float(torch.linalg.matrix_norm(block, 2))
            assert nullity(factor[:, unit]) == inside.shape[1]
            assert float((inside.T @ inside - torch.eye(inside.shape[1], dtype=A.dtype)).norm()) < 1e-12


@pytest.mark.parametrize("name", [*LAYERED, "tokens"])
def test_one_reading_serves_every_layer(name: str) -> None:
    """Nodes of the graph, constraints and derivatives of the whole network, with the parameters of one layer free."""
    risk = solved(name).risk
    recorded = RecordedNetwork(risk)
    for layer in layers(solved(name).problem):
        own = bnp.null_directions(risk, block=layer)
        shared = search(risk.restrict(risk.space.layer_names(layer)), recorded=recorded)
        assert (shared.sources, shared.not_analysed) == (own.sources, own.not_analysed)
        assert {cause: count for cause, (count, _) in shared.rejected.items()} == {
            cause: count for cause, (count, _) in own.rejected.items()
        }
        assert float((shared.basis @ (shared.basis.T @ own.basis) - own.basis).norm()) < 1e-9
        assert [orbit.cause for orbit in shared.orbits] == [orbit.cause for orbit in own.orbits]
        for one, other in zip(shared.orbits, own.orbits, strict=True):
            inner = risk.restrict(risk.space.layer_names(layer)).theta
            torch.testing.assert_close(one.tangent(inner), other.tangent(inner))


def test_a_unit_as_block_is_what_is_inside_its_layer() -> None:
    problem = CASES["dead and always active"].problem()
    risk = problem.risk()
    layer = bnp.null_directions(risk, block="0")
    for i in range(5):
        unit = bnp.null_directions(risk, block=("0", i))
        positions = torch.tensor([4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3, 20 + i])
        assert torch.equal(unit.basis, layer.inside(positions))
        assert dict(unit.sources) == ({"dead units": 5} if i == 0 else {})
        assert unit.basis.shape == (5, 5 if i == 0 else 0)
    last = bnp.null_directions(risk, block=("2", 1))
    assert dict(last.sources) == {"dependent inputs": 1}
    # The outgoing weight of the dead unit.
    assert torch.equal(last.basis.abs().reshape(-1), torch.eye(6, dtype=torch.float64)[0])


def test_directions_inside_a_unit_have_exact_zeros_elsewhere() -> None:
    N = solved("constant features").null
    whole = torch.arange(58)
    assert torch.equal(N.inside(whole), N.basis)
    unit = torch.cat([torch.arange(7, 14), torch.tensor([36])])
    assert N.inside(unit).shape == (8, 3)
    assert N.inside(unit[:2]).shape == (2, 0)


def interval_contains(k: bnp.linalg.ConditionNumber, truth: float) -> bool:
    # The reference is a singular value decomposition with its own rounding.
    return k.lower * (1 - 1e-6) <= truth <= k.upper * (1 + 1e-6)


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_complete_accounting_makes_numbers_two_sided(name: str, preconditioned: bool) -> None:
    risk, N, factor = solved(name).risk, solved(name).null, solved(name).factor
    A = bnp.gauss_newton(risk)
    P = bnp.bnp_preconditioner(risk) if preconditioned and name != "functional" else None
    k = bnp.condition_number(A, preconditioner=P, null=N)
    sigma = torch.linalg.svdvals(factor if P is None else factor @ P.to_dense())
    rank = A.dim - N.basis.shape[1]
    assert k.two_sided
    assert k.rank == rank
    assert k.null_dim == N.basis.shape[1]
    assert k.null_sources == dict(N.sources)
    assert interval_contains(k, float(sigma[0] / sigma[rank - 1]) ** 2)
    assert k.upper <= 1.1 * k.lower


@pytest.mark.parametrize("name", ["residual", "words"])
def test_incomplete_accounting_leaves_numbers_one_sided(name: str) -> None:
    k = bnp.condition_number(bnp.gauss_newton(solved(name).risk), null=solved(name).null)
    assert not k.two_sided
    assert k.unresolved == CASES[name].unexplained


def test_undeclared_directions_leave_numbers_one_sided() -> None:
    k = bnp.condition_number(bnp.gauss_newton(solved("relu").risk))
    assert not k.two_sided
    assert k.unresolved == sum(CASES["relu"].sources.values())


def test_the_layer_table_is_two_sided_everywhere() -> None:
    for name in ("relu deep", "conv"):
        for row in bnp.layer_table(solved(name).risk).layers:
            for k in (row.block, row.block_with_P, *row.unit_blocks, *row.unit_blocks_with_P):
                assert k is None or k.two_sided


def test_homogeneity_moves_the_gradient_and_the_softmax_shift_nothing() -> None:
    """T11: `Hess t = -B^T grad` along a linear generator `t = B theta`, `Hess t = 0` along a translation."""
    problem = Problem(spread(hidden(nn.LeakyReLU(0.2))()), F.cross_entropy, [(numbers(60, 4), classes(60, 3))])
    H, gradient, theta = problem.hessian(), problem.gradient(problem.theta), problem.theta
    N = bnp.null_directions(problem.risk())
    size = float(torch.linalg.matrix_norm(H, 2))
    for i in range(5):
        # 0.weight, 0.bias, 2.weight, 2.bias of 4 inputs, 5 units, 3 outputs.
        signs = torch.zeros(43, dtype=torch.float64)
        signs[[*range(4 * i, 4 * i + 4), 20 + i]] = 1.0
        signs[[25 + i, 30 + i, 35 + i]] = -1.0
        t = signs * theta
        assert float((t - N.basis @ (N.basis.T @ t)).norm()) < 1e-12
        assert float((H @ t + signs * gradient).norm()) < 1e-12 * size
        assert float((H @ t).norm()) > 1e-3 * size * float(t.norm())
    for j in range(6):
        t = torch.zeros(43, dtype=torch.float64)
        t[[25 + j, 30 + j, 35 + j] if j < 5 else [40, 41, 42]] = 1.0
        assert float((t - N.basis @ (N.basis.T @ t)).norm()) < 1e-12
        assert float((H @ t).norm()) < 1e-13 * size


def test_the_hessian_keeps_what_only_the_gauss_newton_matrix_loses() -> None:
    problem = CASES["linear"].problem()
    N, H = bnp.null_directions(problem.risk()), problem.hessian()
    images = (H @ N.basis).norm(dim=0) / torch.linalg.matrix_norm(H, 2)
    assert float(images.max()) > 1e-2
