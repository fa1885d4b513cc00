"""`diagonal`: entries, and error bars that are true.

Bugs that only this file catches: bars that are too short or too long, a diagonal of `A` in place of `P^T A P`, entries
under the name of another tensor, a dense side that is taken though probes are cheaper, or the other way round.
"""

from __future__ import annotations

import math

import pytest
import torch
from linalg_problems import counting, exact_problem
from torch import Tensor

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, MemoryLimitError, NonFiniteError
from bnp_analysis.linalg import CallableOperator, DensePreconditioner, GramOperator, MatrixOperator, Restriction


def random_symmetric(n: int, seed: int = 0) -> Tensor:
    half = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return half + half.T


def test_a_diagonal_matrix_needs_one_look_and_has_no_error() -> None:
    truth = torch.logspace(-9, 3, 20, dtype=torch.float64) * (-1) ** torch.arange(20)
    found = bnp.diagonal(CallableOperator(lambda v: truth * v, 20, dtype=torch.float64), method="stochastic", probes=3)
    assert torch.equal(found.value, truth)
    assert torch.equal(found.error, torch.zeros(20, dtype=torch.float64))


@pytest.mark.parametrize("name", ["dense", "low rank", "pairs"])
def test_bars_contain_the_truth_as_often_as_they_say(name: str) -> None:
    n, runs, probes = 30, 60, 24
    g = torch.Generator().manual_seed(1)
    tall = torch.randn(n, 2, generator=g, dtype=torch.float64)
    pairs = torch.block_diag(*(torch.tensor([[1.0, 0.7], [0.7, -2.0]], dtype=torch.float64) for _ in range(n // 2)))
    matrix = {"dense": random_symmetric(n), "low rank": tall @ tall.T, "pairs": pairs}[name]
    A, truth = bnp.DenseOperator(matrix), matrix.diagonal()
    inside, squares = {0.5: 0.0, 0.9: 0.0}, torch.zeros(n, dtype=torch.float64)
    for seed in range(runs):
        found = bnp.diagonal(A, method="stochastic", probes=probes, seed=seed)
        for confidence in inside:
            low, high = found.interval(confidence)
            inside[confidence] += float(((low <= truth) & (truth <= high)).double().mean()) / runs
        squares += found.error.square() / runs
    # Pairs have two-valued samples, for which no interval is exact; entries of one run depend on each other.
    slack = 0.1 if name == "pairs" else 0.06
    for confidence, share in inside.items():
        assert abs(share - confidence) < slack, (confidence, share)
    # The other oracle: the variance is known.
    variance = (matrix.square().sum(dim=1) - truth.square()) / probes
    assert torch.allclose(squares, variance, rtol=0.35, atol=0.1 * float(variance.mean()))


@pytest.mark.parametrize("spectrum", [(0, 1, 2, 3), (0, 0, 5, 9), (0, 3, 3, 12)])
def test_prescribed_spectra_by_every_side(spectrum: tuple[int, ...]) -> None:
    problem = exact_problem(spectrum * 4, torch.Generator().manual_seed(2))
    truth, n = problem.matrix.diagonal(), 16
    for A in (bnp.DenseOperator(problem.matrix), GramOperator(MatrixOperator(problem.factor))):
        exact = bnp.diagonal(A)
        assert exact.method == "exact"
        assert torch.all((exact.value - truth).abs() <= exact.rounding)
        assert exact.rounding <= 1e-14 * float(truth.max()) * n
        estimated = bnp.diagonal(A, method="stochastic", probes=400)
        assert torch.all((estimated.value - truth).abs() <= 5 * estimated.error + estimated.rounding)
        assert float(estimated.value.sum()) == pytest.approx(sum(4.0**-e for e in spectrum) * 4, rel=0.1)


def test_of_a_congruence_it_is_the_congruence_s() -> None:
    matrix, P = random_symmetric(12), random_symmetric(12, seed=3)
    A = bnp.DenseOperator(matrix)
    truth = torch.einsum("ji,jk,ki->i", P, matrix, P)
    exact = bnp.diagonal(A, preconditioner=DensePreconditioner(P))
    assert torch.allclose(exact.value, truth, rtol=0, atol=max(exact.rounding, 1e-12))
    estimated = bnp.diagonal(A, preconditioner=DensePreconditioner(P), method="stochastic", probes=300)
    assert torch.all((estimated.value - truth).abs() < 5 * estimated.error)


def test_of_a_network_it_is_the_derivative_of_the_gradient(tanh_risk: bnp.EmpiricalRisk) -> None:
    """Two oracles: difference quotients of the gradient, and for the Gauss-Newton matrix of the outputs, per class."""
    H = bnp.diagonal(bnp.hessian(tanh_risk))
    theta, h = tanh_risk.theta, 1e-5
    for i in range(0, tanh_risk.space.dim, 5):
        step = torch.zeros_like(theta)
        step[i] = h
        quotient = float((tanh_risk.at(theta + step).gradient - tanh_risk.at(theta - step).gradient)[i]) / (2 * h)
        assert float(H.value[i]) == pytest.approx(quotient, abs=1e-8)
    G, outputs = bnp.diagonal(bnp.gauss_newton(tanh_risk)), tanh_risk.outputs
    p = outputs.softmax(dim=1)
    for i in range(0, tanh_risk.space.dim, 5):
        step = torch.zeros_like(theta)
        step[i] = h
        slope = (tanh_risk.at(theta + step).outputs - tanh_risk.at(theta - step).outputs) / (2 * h)
        truth = float(((p * slope.square()).sum(1) - (p * slope).sum(1).square()).mean())
        assert float(G.value[i]) == pytest.approx(truth, abs=1e-8)
    assert "factor" in G.choice


def test_entries_come_back_under_the_names_of_their_tensors(tanh_risk: bnp.EmpiricalRisk) -> None:
    found = bnp.diagonal(bnp.hessian(tanh_risk))
    tensors = found.tensors()
    assert {name: value.shape for name, (value, _) in tensors.items()} == tanh_risk.space.shapes
    assert torch.equal(tanh_risk.space.flatten([value for value, _ in tensors.values()]), found.value)
    rows = found.records()
    assert len(rows) == tanh_risk.space.dim
    assert rows[21] == {"tensor": "fc1.bias", "index": 1, "value": float(tensors["fc1.bias"][0][1]), "error": 0.0}
    assert [row["entries"] for row in found.cells()] == [shape.numel() for shape in tanh_risk.space.shapes.values()]
    own = bnp.diagonal(bnp.hessian(tanh_risk, block="fc2"))
    assert torch.allclose(own.tensors()["fc2.weight"][0], tensors["fc2.weight"][0], rtol=1e-10)
    P = bnp.bnp_preconditioner(tanh_risk)
    assert bnp.diagonal(2 * bnp.hessian(tanh_risk), preconditioner=P).tensors().keys() == tanh_risk.space.shapes.keys()
    loose = bnp.diagonal(Restriction(bnp.hessian(tanh_risk), torch.arange(3)))
    with pytest.raises(InvalidInputError, match="flat"):
        loose.tensors()


def test_the_cheaper_side_is_taken_and_said() -> None:
    wide = CallableOperator(lambda v: 2 * v, 1500, dtype=torch.float64)
    found = bnp.diagonal(wide, probes=10)
    assert (found.method, found.probes, found.matvecs) == ("stochastic", 10, 10)
    assert "1500 products" in found.choice
    small = counting(bnp.DenseOperator(random_symmetric(20)))
    found = bnp.diagonal(small, probes=10)
    assert (found.method, found.probes, found.matvecs) == ("exact", 0, 20)
    assert len(small.calls) == 20
    assert "20 products" in str(found)
    thin = GramOperator(MatrixOperator(torch.ones(3, 1500, dtype=torch.float64)))
    assert bnp.diagonal(thin).method == "exact"


def test_a_diagonal_smaller_than_what_stands_beside_it_is_known_to_the_rounding_of_products() -> None:
    """Columns of length 1 cancel there in float32: a bound relative to the diagonal was 1e5 times too small."""
    g = torch.Generator().manual_seed(0)
    X = torch.randn(50, 30, generator=g, dtype=torch.float64)
    Y = torch.randn(50, 30, generator=g, dtype=torch.float64)
    X, Y = (Z / Z.norm(dim=0) for Z in (X, Y))
    x, y = X.float(), Y.float()
    A = CallableOperator(lambda v: x.T @ (x @ v) - y.T @ (y @ v), 30)
    found = bnp.diagonal(A)
    low, high = found.interval()
    true = x.double().square().sum(dim=0) - y.double().square().sum(dim=0)
    assert found.method == "exact"
    assert bool(((low <= true) & (true <= high)).all())
    assert found.rounding <= 1e-4


def test_far_scales_change_nothing_but_the_scale() -> None:
    matrix = random_symmetric(10)
    for method in ("exact", "stochastic"):
        plain = bnp.diagonal(bnp.DenseOperator(matrix), method=method, probes=5)
        far = bnp.diagonal(bnp.DenseOperator(2.0**-600 * matrix), method=method, probes=5)
        assert torch.equal(far.value * 2.0**600, plain.value)
        assert torch.equal(far.error * 2.0**600, plain.error)


def test_bad_input_is_refused_with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    A = bnp.DenseOperator(random_symmetric(4))
    with pytest.raises(InvalidInputError, match="two probes"):
        bnp.diagonal(A, probes=1)
    with pytest.raises(InvalidInputError, match="auto, exact, stochastic"):
        bnp.diagonal(A, method="dense")
    with pytest.raises(InvalidInputError, match="confidence"):
        bnp.diagonal(A).interval(1.0)
    for method in ("exact", "stochastic"):
        with pytest.raises(NonFiniteError):
            bnp.diagonal(CallableOperator(lambda v: v * math.nan, 4, dtype=torch.float64, eps=1e-15), method=method)
    huge = CallableOperator(lambda v: v, 40_000_000, dtype=torch.float32, eps=1e-7)
    with pytest.raises(MemoryLimitError):
        bnp.diagonal(huge, method="exact")


def test_an_interrupted_run_keeps_its_probes(tmp_path) -> None:
    def stop(answer: Tensor) -> Tensor:
        raise KeyboardInterrupt

    A = counting(bnp.DenseOperator(random_symmetric(6)), after={4: stop})
    found = bnp.diagonal(A, method="stochastic", probes=9)
    assert found.probes == 3
    # Three samples are equal by accident in a quarter of all draws.
    assert found.interval(0.7)[0].isfinite().all()
    assert bnp.linalg.Diagonal.load(found.save(tmp_path / "diagonal.json")) == found


def test_few_probes_give_no_high_confidence() -> None:
    """Beside one large entry samples are `a +- b`: eight of them are equal in 1 of 128 draws, and show no scatter."""
    matrix = torch.tensor([[1.0, 5.0], [5.0, 2.0]], dtype=torch.float64)
    draws = [bnp.diagonal(bnp.DenseOperator(matrix), method="stochastic", probes=8, seed=seed) for seed in range(400)]
    silent = [found for found in draws if float(found.error.max()) == 0]
    assert silent, "the case this test is about does not occur"
    assert len(silent) <= 400 * 2.0**-7 + 3 * (400 * 2.0**-7) ** 0.5
    with pytest.raises(InvalidInputError, match=r"8 probes give no interval at 99.9 %.*probes=11"):
        draws[0].interval(0.999)
    assert draws[0].interval(0.99)[0].shape == (2,)
    assert bnp.diagonal(bnp.DenseOperator(matrix)).interval(1 - 1e-12)[0].tolist() == pytest.approx([1.0, 2.0])
