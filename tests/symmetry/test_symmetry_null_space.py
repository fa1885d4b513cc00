"""Null directions: every one is null, no cause is forgotten, and nothing passes for explained that is not.

Bugs that only these tests catch: a sign or a bias forgotten in a tangent vector; a direction that is null only at
eps = 0 taken for null; candidates that are believed without a look; a cause counted twice; rows that a ReLU or a
max-pooling cuts, taken as cut too often; a network that was misread and not called so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from curvature_reference import Problem, classes, numbers, split, spread
from null_cases import CASES, solved
from null_models import Case, hidden, net
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, MemoryLimitError
from bnp_analysis.linalg import MatrixOperator
from bnp_analysis.linalg.matrices import LocalColumns
from bnp_analysis.linalg.spectra import checks
from bnp_analysis.linalg.spectra.checks import CAUTION, COMBINED, NORM_STEPS
from bnp_analysis.symmetry import Cause, null_space
from bnp_analysis.symmetry.candidates import Candidate, NullBasis, Part

every = pytest.mark.parametrize("name", CASES)


def nullity(factor: Tensor) -> int:
    """Columns minus singular values above rounding; the gap between the two kinds must be wide."""
    sigma = torch.linalg.svdvals(factor)
    rank = int((sigma > 10 * max(factor.shape) * torch.finfo(factor.dtype).eps * sigma[0]).sum())
    if rank < len(sigma):
        assert sigma[rank - 1] > 1e6 * sigma[rank]
    return factor.shape[1] - rank


def worst(matrix: Tensor, basis: Tensor) -> float:
    """The largest image of a direction, relative to the matrix."""
    return float((matrix @ basis).norm(dim=0).max() / torch.linalg.matrix_norm(matrix, 2)) if basis.shape[1] else 0.0


@every
def test_the_causes_explain_the_nullity_of_the_dense_matrix(name: str) -> None:
    case, case_solved = CASES[name], solved(name)
    N, factor = case_solved.null, case_solved.factor
    assert worst(case_solved.matrix, N.basis) < 1e-12
    assert worst(factor, N.basis) < 1e-12
    assert float((N.basis.T @ N.basis - torch.eye(N.basis.shape[1], dtype=torch.float64)).norm()) < 1e-12
    assert sum(N.sources.values()) == N.basis.shape[1]
    assert dict(N.sources) == case.sources
    assert {cause: count for cause, (count, _) in N.approximate.items()} == case.approximate
    assert not N.rejected
    assert nullity(factor) == N.basis.shape[1] + case.unexplained, case.why
    assert bool(N.not_analysed) == bool(case.skipped)
    assert case.skipped in "; ".join(N.not_analysed)


def test_causes_print_and_are_written_as_words(tmp_path: Path) -> None:
    N = solved("relu").null
    assert str(dict(N.sources)) == "{'softmax shift': 6, 'homogeneity': 5}"
    assert N.sources[Cause.HOMOGENEITY] == N.sources["homogeneity"] == 5
    stored = json.loads(N.save(tmp_path / "null.json").read_text())
    assert stored["fields"]["sources"] == {"softmax shift": 6, "homogeneity": 5}


def test_records_have_a_row_for_each_cause() -> None:
    assert solved("relu").null.records() == [
        {"cause": "softmax shift", "dimensions": 6},
        {"cause": "homogeneity", "dimensions": 5},
    ]


def test_a_factor_of_another_size_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="the factor has 5 columns, the parameters are 43"):
        bnp.null_directions(solved("relu").risk, factor=MatrixOperator(numbers(7, 5)))


@pytest.mark.parametrize("norm", ["layer", "group", "batch"])
def test_scales_before_a_norm_are_measured_and_null_only_without_eps(norm: str) -> None:
    make = {
        "layer": lambda eps: nn.LayerNorm(6, eps=eps),
        "group": lambda eps: nn.GroupNorm(2, 6, eps=eps),
        "batch": lambda eps: nn.BatchNorm1d(6, eps=eps, affine=False),
    }[norm]
    kind, count = f"{norm}_norm scale", {"layer": 1, "group": 2, "batch": 6}[norm]
    sizes = []
    for eps in (1e-4, 1e-6, 1e-30):
        N = bnp.null_directions(Case(hidden(make(eps), nn.ReLU(), width=6), DATA, {}).problem().risk())
        assert N.approximate[kind][0] == count
        assert kind not in N.sources
        sizes.append(N.approximate[kind][1])
    assert 50 < sizes[0] / sizes[1] < 200
    # Below rounding it is still no null direction: at another dtype, or in other coordinates, it shows.
    assert sizes[2] < 1e-15
    if norm != "batch":  # torch has no BatchNorm without eps
        N = bnp.null_directions(Case(hidden(make(0.0), nn.ReLU(), width=6), DATA, {}).problem().risk())
        assert N.sources[kind] == count
        assert not N.approximate


DATA = (numbers(60, 4), classes(60, 3))


@pytest.mark.parametrize("name", ["leaky", "relu mse", "batch norm", "batch norm eval", "conv", "ignored labels"])
def test_float32_has_the_same_directions(name: str) -> None:
    risk = solved(name).risk
    N = bnp.null_directions(risk.to(torch.float32))
    assert N.basis.dtype == torch.float32
    assert N.sources == CASES[name].sources
    assert worst(solved(name).factor, N.basis.double()) < 1e-5


def test_float32_does_not_believe_what_only_its_rounding_shows() -> None:
    # The scale before the LayerNorm is far below float32 rounding, relative to F, and the inputs of the last layer
    # are dependent but for rounding.
    risk = CASES["layer norm of inputs"].problem().risk(dtype=torch.float32)
    assert "dependent inputs" not in bnp.null_directions(risk).sources
    N = bnp.null_directions(CASES["layer norm"].problem().risk(dtype=torch.float32))
    assert N.approximate["layer_norm scale"][1] < N.settings["tolerance"]
    assert "layer_norm scale" not in N.sources


@pytest.mark.parametrize("name", ["relu deep", "conv", "layer norm", "few rows", "batch norm eval"])
def test_batches_of_any_size_give_the_same_directions(name: str) -> None:
    problem, whole = solved(name).problem, solved(name).null
    x, y = problem.batches[0]
    half = len(x) // 2
    parts = Problem(problem.model, problem.loss, split(x, y, [1, half, len(x) - half - 1]))
    N = bnp.null_directions(parts.risk())
    assert N.sources == whole.sources
    assert float((N.basis @ (N.basis.T @ whole.basis) - whole.basis).norm()) < 1e-9


def test_a_wrong_candidate_is_rejected_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    risk = CASES["relu"].problem().risk()
    found = null_space.candidate_directions(risk, None)
    wrong = Candidate("invented", (Part(torch.tensor([0, 7]), torch.tensor([[1.0, 0.0], [1.0, 1.0]]).double()),))
    monkeypatch.setattr(null_space, "candidate_directions", lambda *_: ([wrong, *found[0]], []))
    N = bnp.null_directions(risk)
    assert dict(N.sources) == CASES["relu"].sources
    count, size = N.rejected["invented"]
    assert count == 2
    columns = torch.zeros(43, 2, dtype=torch.float64)
    columns[[0, 7]] = wrong.parts[0].values / wrong.parts[0].values.norm(dim=0)
    factor = bnp.gauss_newton(risk).factor.to_dense()
    # The norm is an estimate.
    assert size == pytest.approx(worst(factor, columns), rel=0.05)
    assert "rejected: invented 2" in N.summary()


def test_nearly_dependent_candidates_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    risk = CASES["bare"].problem().risk()
    (shift,), _ = null_space.candidate_directions(risk, None)
    again = Candidate("again", tuple(Part(p.positions, p.values * (1 + 1e-12)) for p in shift.parts))
    both = Part(
        torch.cat([p.positions for p in shift.parts[:2]]),
        torch.cat([shift.parts[0].values, 1e-9 * shift.parts[1].values]),
    )
    monkeypatch.setattr(null_space, "candidate_directions", lambda *_: ([shift, again, Candidate("both", (both,))], []))
    assert dict(bnp.null_directions(risk).sources) == {"softmax shift": 5}


def test_rows_are_formed_again_where_they_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("relu deep", "layer norm", "conv"):
        risk, dense = solved(name).risk, solved(name).null
        with monkeypatch.context() as patch:
            patch.setattr(checks, "available_memory", lambda *_: 0)
            again = bnp.null_directions(risk)
        assert again.sources == dense.sources
        assert again.matvecs > dense.matvecs
        assert float((again.basis @ (again.basis.T @ dense.basis) - dense.basis).norm()) < 1e-9


def test_sizes_by_rows_kept_or_not_and_by_products_are_those_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = MatrixOperator(numbers(40, 25), exact=False)
    parts = [(torch.tensor([3, 24]), numbers(2, 1, seed=2)), (torch.arange(5, 20), numbers(15, checks._WIDE, seed=3))]
    parts.append((torch.tensor([7]), torch.zeros(1, 0, dtype=torch.float64)))
    wanted = [(factor.to_dense()[:, where] @ columns).norm(dim=0) / columns.norm(dim=0) for where, columns in parts]
    for count, room in ((1, 0), (1, 2**40), (0, 2**40)):
        monkeypatch.setattr(checks, "available_memory", lambda *_, room=room: room)
        verifier = checks.Verifier(factor, count)
        found = verifier.sizes(parts)
        assert (verifier._kept is None) == (not (count and room))
        for size, exact in zip(found, wanted, strict=True):
            assert size.shape == exact.shape
            assert torch.allclose(size * verifier._scale, exact, rtol=1e-13, atol=0)


def test_products_with_directions_are_those_of_their_dense_matrix(tmp_path: Path) -> None:
    N, g = solved("layer norm").null, torch.Generator().manual_seed(0)
    n, r = N.basis.shape
    assert len(N.blocks) > 1
    assert sum(columns.numel() for _, columns in N.blocks) < n * r
    c, v = (torch.randn(k, 3, generator=g, dtype=torch.float64) for k in (r, n))
    assert torch.allclose(N.columns @ c, N.basis @ c, rtol=0, atol=1e-14)
    assert torch.allclose(N.columns.T @ v, N.basis.T @ v, rtol=0, atol=1e-14)
    assert torch.equal(N.columns @ c[:, 0], (N.columns @ c)[:, 0])
    read = bnp.symmetry.NullDirections.load(N.save(tmp_path / "null.json"))
    assert read == N
    assert torch.equal(read.basis, N.basis)


def test_combined_rows_tell_null_from_not_and_what_is_near_is_measured() -> None:
    class Costly(MatrixOperator):
        dense_cost = 120

    matrix = numbers(200, 120) / 200**0.5
    null = torch.linalg.qr(numbers(120, 9, seed=1))[0]
    matrix -= (matrix @ null) @ null.T
    verifier = checks.Verifier(Costly(matrix, exact=False), 100)
    # Lengths of images across the tolerance, in between of what is null and what is not.
    across = verifier.tolerance * torch.tensor([0.3, 0.9, 1.1, 12.0], dtype=torch.float64)
    other = numbers(120, 6, seed=2)
    parts = [null, null[:, :4] + across * verifier._scale * other[:, :4] / (matrix @ other[:, :4]).norm(dim=0), other]
    everywhere = torch.arange(120)
    found = verifier.sizes([(everywhere, columns) for columns in parts])
    exact = [(matrix @ columns).norm(dim=0) / columns.norm(dim=0) / verifier._scale for columns in parts]
    assert float(found[0].max()) <= verifier.tolerance / CAUTION
    assert torch.allclose(found[1], exact[1], rtol=1e-9, atol=1e-4 * verifier.tolerance)
    assert torch.equal(found[1] <= verifier.tolerance, torch.tensor([True, True, False, False]))
    assert torch.allclose(found[2], exact[2], rtol=0.5)
    assert not torch.allclose(found[2], exact[2], rtol=1e-9)
    assert verifier.matvecs == NORM_STEPS + COMBINED + 4
    assert 0 < verifier.doubt < 1e-18


def test_what_is_not_null_once_cleaned_is_dropped_and_what_came_later_made_again() -> None:
    # e_0 is null and e_1 is not: what is left of (e_0 + 1e-3 e_1) beside e_0 is e_1.
    diagonal = torch.ones(6, dtype=torch.float64)
    diagonal[[0, 2, 3]] = 0.0
    verifier = checks.Verifier(MatrixOperator(torch.diag(diagonal)), 9)
    basis = NullBasis(6)
    column = torch.tensor([[1.0]], dtype=torch.float64)
    basis.add("first", [Part(torch.tensor([0]), column)], 0)
    basis.add("false", [Part(torch.tensor([0, 1]), torch.tensor([[1.0], [1e-3]], dtype=torch.float64))], 1)
    basis.add("later", [Part(torch.tensor([2]), column)], 2)
    assert basis.settle(verifier) == 1
    assert basis.counts() == {"first": 1}
    basis.add("later", [Part(torch.tensor([2, 3]), torch.eye(2, dtype=torch.float64))], 2)
    basis.add("again", [Part(torch.tensor([0, 3]), torch.ones(2, 1, dtype=torch.float64))], 3)
    assert basis.settle(verifier) is None
    assert basis.counts() == {"first": 1, "later": 2}
    dense = LocalColumns(6, basis.blocks(diagonal)).to_dense()
    assert torch.equal(dense.abs().sum(dim=1), (diagonal == 0).double())


def test_memory_is_looked_at_before_the_basis_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    risk = CASES["constant features"].problem().risk()

    def never(*_: object) -> None:
        pytest.fail("a dense basis was built")

    monkeypatch.setattr(null_space, "NullBasis", never)
    require = null_space.require_memory

    def little_for_the_basis(size: int, what: str, **options: object) -> None:
        if "basis" in what:
            with monkeypatch.context() as little:
                # Not enough for 26 columns on their coordinates and what comes with them.
                little.setattr("bnp_analysis.runtime.memory.available_memory", lambda *_: 8 * 26)
                require(size, what, **options)

    monkeypatch.setattr(null_space, "require_memory", little_for_the_basis)
    with pytest.raises(MemoryLimitError, match="the candidate null directions"):
        bnp.null_directions(risk)


def test_a_loader_in_any_order_and_a_loss_without_a_root() -> None:
    x, y = DATA
    model = spread(hidden(nn.ReLU())())
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=25, shuffle=True)
    assert dict(bnp.null_directions(bnp.EmpiricalRisk(model, F.cross_entropy, shuffled)).sources) == {
        "softmax shift": 6,
        "homogeneity": 5,
    }

    def concave(z: Tensor, t: Tensor) -> Tensor:
        return (z.square() - 0.1 * z**4).mean()

    risk = bnp.EmpiricalRisk(model, concave, (x, y))
    assert bnp.gauss_newton(risk).factor is None
    assert dict(bnp.null_directions(risk).sources) == {"homogeneity": 5}


def test_saturated_examples_do_not_pass_for_cut_rows() -> None:
    risk = bnp.EmpiricalRisk(spread(nn.Linear(4, 3), seed=2, scale=600.0), F.cross_entropy, DATA)
    # 53 of 60 examples have no curvature to float64; in higher precision they have.
    assert int((bnp.gauss_newton(risk).factor.to_dense() == 0).all(dim=1).sum()) == 113
    assert dict(bnp.null_directions(risk).sources) == {"softmax shift": 5}


def test_features_of_tiny_scale_are_not_zero() -> None:
    x, y = DATA
    risk = bnp.EmpiricalRisk(nn.Linear(4, 3).double(), F.cross_entropy, (x * torch.tensor([1e8, 1, 1e-8, 1e-12]), y))
    assert dict(bnp.null_directions(risk).sources) == {"softmax shift": 5}


@pytest.mark.parametrize("activation", [nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.Softplus])
def test_networks_without_symmetry_have_no_directions(activation: Callable[[], nn.Module]) -> None:
    x, y = DATA[0], numbers(60, 3, seed=3)
    model = spread(net(nn.Linear(4, 3), activation(), nn.Linear(3, 3), activation(), nn.Linear(3, 3))())
    N = bnp.null_directions(bnp.EmpiricalRisk(model, F.mse_loss, (x, y)))
    assert N.basis.shape == (39, 0)
    assert not N.rejected
    assert "0 null directions of 39 (none)" in N.summary()
