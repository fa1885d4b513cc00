"""Null directions of the Hessian: those of the Gauss-Newton matrix that it annihilates too, and what is left of others.

Bugs that only these tests catch: a linear generator taken for null away from critical points; combinations of
generators that are null though none of them is, forgotten; a small residual that passes for none, in float32 too.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from curvature_reference import Problem, classes, numbers, spread
from null_cases import CASES, solved
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.symmetry import Cause


def linear(*widths: int) -> nn.Module:
    return spread(nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))), 0)


def worst(matrix: Tensor, basis: Tensor) -> float:
    return float((matrix @ basis).norm(dim=0).max() / torch.linalg.matrix_norm(matrix, 2)) if basis.shape[1] else 0.0


def rank(matrix: Tensor) -> int:
    sigma = torch.linalg.svdvals(matrix)
    found = int((sigma > 1e-11 * sigma[0]).sum())
    assert found == len(sigma) or sigma[found] < 1e-3 * sigma[found - 1]
    return found


@pytest.mark.parametrize("name", ["prelu", "linear", "linear narrow mse", "layer norm", "dead and always active"])
def test_they_are_all_that_the_hessian_annihilates_of_the_others(name: str) -> None:
    """The oracle: second derivatives by double backward, restricted to the span of the Gauss-Newton directions."""
    problem, known = solved(name).problem, solved(name).null
    H, found = problem.hessian(), bnp.null_directions(solved(name).risk, curvature="hessian")
    assert worst(H, found.basis) < 1e-12
    assert float((found.basis.T @ found.basis - torch.eye(found.basis.shape[1], dtype=torch.float64)).norm()) < 1e-12
    assert worst(torch.eye(len(H), dtype=torch.float64) - known.basis @ known.basis.T, found.basis) < 1e-12
    restricted = H @ known.basis
    sigma = torch.linalg.svdvals(restricted) / torch.linalg.matrix_norm(H, 2)
    assert int((sigma < 1e-12).sum()) == found.basis.shape[1] == sum(found.sources.values())
    left = sum(count for count, _ in found.residual.values())
    assert left + found.basis.shape[1] == known.basis.shape[1]


@pytest.mark.parametrize(
    ("activation", "distance"), [(nn.ReLU(), 1e-6), (nn.LeakyReLU(), 1e-4)], ids=["near a minimizer", "further away"]
)
def test_float32_takes_no_small_curvature_for_none(activation: nn.Module, distance: float) -> None:
    """In float32 products show nothing along rescalings near a minimizer: kappa* came two-sided, far too small."""
    x, model = numbers(40, 2).float(), spread(nn.Sequential(nn.Linear(2, 3), activation, nn.Linear(3, 2)), 0).float()
    y = model(x).detach() + distance * numbers(40, 2, seed=5).float()
    problem = Problem(model.double(), F.mse_loss, [(x.double(), y.double())])
    H, risk = problem.hessian(), bnp.EmpiricalRisk(model.float(), F.mse_loss, (x, y))
    assert risk.space.dtype == torch.float32
    N = bnp.null_directions(risk, curvature="hessian")
    sizes = torch.linalg.eigvalsh(H).abs().sort(descending=True).values
    nonzero = sizes[sizes > 1e-13 * sizes[0]]
    assert N.basis.dtype == torch.float32
    assert N.basis.shape[1] <= len(sizes) - len(nonzero)
    assert N.residual["homogeneity"][0] == 3
    found = bnp.condition_number(bnp.hessian(risk), null=N)
    assert found.lower <= float(sizes[0] / nonzero[-1]) <= found.upper


def test_ranks_of_a_linear_network() -> None:
    """25-5-10-10 with squared error: the published ranks, 250 of the Hessian and 150 of the Gauss-Newton matrix."""
    problem = Problem(linear(25, 5, 10, 10), F.mse_loss, [(numbers(50, 25), numbers(50, 10, seed=2))])
    risk = problem.risk()
    found = bnp.condition(risk, curvature="hessian", preconditioner=None)
    assert found.without_P.rank == 250
    assert bnp.condition(risk, preconditioner=None).without_P.rank == 150
    values = torch.linalg.eigvalsh(problem.hessian()).abs().sort(descending=True).values
    assert found.without_P.value[-1] == pytest.approx(float(values[0] / values[249]), rel=1e-8)


def test_what_is_left_is_the_gradient_under_the_generator() -> None:
    """`H B theta = -B^T grad`, with the gradient from autograd and `B` from the finite symmetry."""
    problem = CASES["relu"].problem()
    found = bnp.null_directions(problem.risk(), curvature="hessian")
    H, gradient = problem.hessian(), problem.gradient(problem.theta)
    orbits = [orbit for orbit in found.orbits if orbit.cause == Cause.HOMOGENEITY]
    sizes = []
    for orbit in orbits:
        expected = torch.zeros_like(gradient)
        expected[orbit.scaled] = -orbit.exponents * gradient[orbit.scaled]
        tangent = orbit.tangent(problem.theta)
        torch.testing.assert_close(H @ tangent, expected, rtol=0, atol=1e-13)
        sizes.append(float((expected / tangent.norm()).norm() / torch.linalg.matrix_norm(H, 2)))
    count, size = found.residual[Cause.HOMOGENEITY]
    assert count == len(orbits) == 5
    assert min(sizes) / 2 < size < 2 * max(sizes)
    assert "Gauss-Newton matrix only: homogeneity 5" in str(found)


@pytest.mark.parametrize("offset", [0.0, 1e-7])
def test_at_a_critical_point_linear_generators_are_null(offset: float) -> None:
    """Targets that the network meets: the Hessian is the Gauss-Newton matrix there, and near it is not."""
    model, x = spread(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))), numbers(40, 4)
    problem = Problem(model, F.mse_loss, [(x, model(x).detach() + offset * numbers(40, 3, seed=3))])
    both = [bnp.null_directions(problem.risk(), curvature=c) for c in ("gauss_newton", "hessian")]
    assert both[0].sources["homogeneity"] == 5
    if offset:
        assert "homogeneity" not in both[1].sources
        assert 1e-9 < both[1].residual["homogeneity"][1] < 1e-6
    else:
        assert dict(both[0].sources) == dict(both[1].sources)
        assert not both[1].residual


def test_a_convolutional_network_gets_a_two_sided_number() -> None:
    """Given all directions of the Gauss-Newton matrix, the Hessian's number was refused."""
    layers = [nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten()]
    model = spread(nn.Sequential(*layers, nn.Linear(12, 4)), 0, 0.3)
    problem = Problem(model, F.cross_entropy, [(numbers(30, 1, 8, 8), classes(30, 4))])
    risk, H = problem.risk(), problem.hessian()
    N = bnp.null_directions(risk, curvature="hessian")
    assert N.residual["homogeneity"][0] == 5
    number = bnp.linalg.magnitude_condition_number(bnp.hessian(risk), null=N)
    assert number.two_sided
    assert number.rank == rank(H) == len(H) - N.basis.shape[1]


def test_blocks_and_other_matrices() -> None:
    problem = CASES["relu"].problem()
    risk, H = problem.risk(), problem.hessian()
    layer = risk.space.names[0].rpartition(".")[0]
    for block in (layer, (layer, 0)):
        at = risk.space.indices(block)
        found = bnp.null_directions(risk, curvature="hessian", block=block)
        assert worst(H[at][:, at], found.basis) < 1e-12
        assert sum(found.sources.values()) == found.basis.shape[1]
    fisher = bnp.null_directions(risk, curvature="fisher_empirical")
    assert fisher.basis.shape == bnp.null_directions(risk).basis.shape
    with pytest.raises(InvalidInputError, match="unknown curvature 'newton'; there are: gauss_newton, "):
        bnp.null_directions(risk, curvature="newton")
