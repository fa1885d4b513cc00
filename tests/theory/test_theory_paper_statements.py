"""The published statements: each check holds, says why it does not apply, and fails when it is fed something wrong.

Bugs that only this file catches: a nearest point that is not the nearest, eigenvalues of another point, a null space
that passes for the tangent space, a strict inequality that cannot fail, a count of operations that misses some,
statistics of the wrong mini-batch, a bound used outside its domain.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from theory_check_problems import NETWORKS, inputs, relu, risk_of
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.curvature import hessian
from bnp_analysis.theory import problems
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.statements import (
    conditioning,
    normalization,
    rates,
)
from bnp_analysis.theory.statements import layers as coordinates
from bnp_analysis.theory.statements import layers as layer_curvature
from bnp_analysis.theory.statements import normalization as statistics
from bnp_analysis.theory.statements.conditioning import Inputs, least_gain
from bnp_analysis.theory.statements.rates import Orbit, contraction
from bnp_analysis.theory.statements.setting import Problem, first_examples, rewritten
from bnp_analysis.theory.statements.symmetry import logit_shifts, rescalings

Patch = pytest.MonkeyPatch


def failing(found: tuple[Check, ...] | list[Check], words: str) -> list[Check]:
    """The failing checks whose statement has these words; there must be one."""
    said = [check for check in found if words in check.statement]
    assert said, [str(check) for check in found]
    wrong = [check for check in said if check.holds is False]
    assert wrong, [str(check) for check in said]
    assert not any(math.isnan(check.observed) for check in wrong)
    return wrong


def reasons(found: tuple[Check, ...] | list[Check]) -> list[str]:
    assert not [str(check) for check in found if check.holds is False]
    return [check.reason for check in found if check.holds is None]


# Theorem 1


@functools.cache
def solved(widths: tuple[int, ...] = (4, 3, 2), *, n: int = 60, seed: int = 0) -> bnp.EmpiricalRisk:
    return problems.teacher_student(widths, n=n, seed=seed).solved


def orbit_of(risk: bnp.EmpiricalRisk) -> Orbit:
    given = Problem(risk)
    return Orbit(risk.theta, rescalings(given), logit_shifts(given))


def every_step(risk: bnp.EmpiricalRisk) -> list[Check]:
    return list(rates.every_step(Problem(risk), "test"))


def test_every_step_contracts() -> None:
    found = every_step(solved(seed=1))
    assert [check.holds for check in found] == [True, True, True]
    assert 0.05 < found[1].details["eps over the distance"] < 3
    assert found[1].details["null dimension"] == 3


def test_nearest_points_solve_a_quartic() -> None:
    """One hidden layer: `|a|^2 t^4 - (a.u) t^3 + (b.v) t - |b|^2 = 0` for each unit, solved by its companion matrix."""
    risk = solved()
    orbit = orbit_of(risk)
    g = torch.Generator().manual_seed(1)
    theta = risk.theta + 0.2 * torch.randn(risk.space.dim, generator=g, dtype=torch.float64)
    log_t, point = orbit.nearest(theta, torch.zeros(3, dtype=torch.float64))
    for unit in range(3):
        into, out = orbit.exponents[:, unit] > 0, orbit.exponents[:, unit] < 0
        a, b, u, v = risk.theta[into], risk.theta[out], theta[into], theta[out]
        roots = np.roots([float(a @ a), -float(a @ u), 0.0, float(b @ v), -float(b @ b)])
        real = [r.real for r in roots if abs(r.imag) < 1e-9 and r.real > 0]
        best = min(real, key=lambda t: float((t * a - u).square().sum() + (b / t - v).square().sum()))
        assert float(log_t[unit].exp()) == pytest.approx(best, rel=1e-12)
    tangent = orbit.tangent(log_t)
    assert float((tangent.T @ (theta - point)).abs().max()) < 1e-12


def test_shifts_are_projected_out() -> None:
    g = torch.Generator().manual_seed(0)
    exponents = torch.tensor([[1.0], [1.0], [-1.0], [0.0], [0.0]], dtype=torch.float64)
    shift = torch.tensor([[0.0], [0.0], [0.5], [0.5], [math.sqrt(0.5)]], dtype=torch.float64)
    orbit = Orbit(torch.tensor([1.0, 2.0, -1.0, 0.5, 0.3], dtype=torch.float64), exponents, shift)
    theta = orbit.origin + 0.1 * torch.randn(5, generator=g, dtype=torch.float64)
    _, point = orbit.nearest(theta, torch.zeros(1, dtype=torch.float64))
    distance = float((theta - point).norm())
    for log_t, c in product(torch.linspace(-0.3, 0.3, 61), torch.linspace(-0.5, 0.5, 101)):
        other = orbit.scales(log_t.double()[None]) * orbit.origin + c * shift[:, 0]
        assert float((theta - other).norm()) >= distance - 1e-12


def test_the_spectrum_at_the_nearest_point_is_that_of_the_hessian_there() -> None:
    risk = solved()
    orbit = orbit_of(risk)
    log_t = torch.tensor([0.7, -0.4, 1.1], dtype=torch.float64)
    scales = orbit.scales(log_t)
    there = hessian(risk.at(scales * risk.theta)).to_dense()
    here = hessian(risk).to_dense()
    torch.testing.assert_close(here / scales / scales[:, None], there, rtol=1e-10, atol=1e-12)


def test_points_beside_the_nearest(monkeypatch: Patch) -> None:
    def off(self: Orbit, theta: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
        there = log_t + 1e-4
        return there, self.scales(there) * self.origin

    monkeypatch.setattr(Orbit, "nearest", off)
    failing(every_step(solved()), "the largest ratio over r + eps")


def test_eigenvalues_of_a_smaller_r(monkeypatch: Patch) -> None:
    def wrong(*args: object) -> rates.Contraction:
        found = contraction(*args)  # type: ignore[arg-type]
        return dataclasses.replace(found, factors=[r - 0.01 for r in found.factors])

    monkeypatch.setattr(rates, "contraction", wrong)
    found = every_step(solved())
    failing(found, "the largest ratio over r + eps")
    failing(found, "eps shrinks like the distance")


def test_a_scaling_that_is_none(monkeypatch: Patch) -> None:
    monkeypatch.setattr(rates, "rescalings", lambda given: rescalings(given).abs())
    failing(every_step(solved()), "contains the tangent space")


@pytest.mark.parametrize("widths", [(4, 3, 2), (3, 3, 3, 2)])
def test_few_data_have_a_larger_null_space(widths: tuple[int, ...]) -> None:
    full = solved(widths)
    few = rewritten(full, batches=first_examples(full, 4))
    assert any("the null space is not the tangent space" in reason for reason in reasons(every_step(few)))


def test_a_duplicated_unit() -> None:
    """Two equal units share what goes out: one more flat direction than rescalings."""
    plain = solved()
    batch = next(iter(plain.batches))
    tensors = plain.named_tensors()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.cat([tensors["0.weight"], tensors["0.weight"][:1]]))
        model[0].bias.copy_(torch.cat([tensors["0.bias"], tensors["0.bias"][:1]]))
        out = tensors["2.weight"]
        model[2].weight.copy_(torch.cat([out[:, :1] / 2, out[:, 1:], out[:, :1] / 2], dim=1))
        model[2].bias.copy_(tensors["2.bias"])
    risk = bnp.EmpiricalRisk(model, nn.functional.mse_loss, (batch.x, batch.y))
    assert float(risk.value) < 1e-25
    assert any("the null space is not the tangent space" in reason for reason in reasons(every_step(risk)))


def test_softmax_needs_the_shifts_of_the_logits(monkeypatch: Patch) -> None:
    risk = next(risk for where, risk in rates.teachers(0) if "softmax" in where)
    assert [check.holds for check in every_step(risk)] == [True, True, True]
    monkeypatch.setattr(rates, "logit_shifts", lambda given: torch.zeros(given.risk.space.dim, 0, dtype=torch.float64))
    assert any("7 dimensions, 3 of rescalings" in reason for reason in reasons(every_step(risk)))


def test_points_that_are_no_minimizers() -> None:
    assert any("no minimizer" in reason for reason in reasons(every_step(relu())))
    # A convex loss away from its minimum.
    assert any("no minimizer: |grad|" in reason for reason in reasons(every_step(NETWORKS["bare"]())))


def test_a_kink_at_the_minimizer_is_said() -> None:
    risk = solved()
    batch, tensors = next(iter(risk.batches)), risk.named_tensors()
    with torch.no_grad():
        bias = tensors["0.bias"] - torch.nn.functional.linear(batch.x, tensors["0.weight"], tensors["0.bias"])[5]
        there = risk.at(tensors | {"0.bias": torch.cat([bias[:1], tensors["0.bias"][1:]])})
    kinked = rewritten(there, batches=[dataclasses.replace(batch, y=there.outputs)])
    assert any("1 at the input of 1" in reason or "not smooth" in reason for reason in reasons(every_step(kinked)))


def quadratic(*sizes: float) -> bnp.EmpiricalRisk:
    """Least squares without a symmetry."""
    x = torch.diag(torch.tensor(sizes, dtype=torch.float64))
    model = nn.Linear(len(sizes), 1, bias=False, dtype=torch.float64)
    return bnp.EmpiricalRisk(model, nn.functional.mse_loss, (x, torch.ones(len(sizes), 1, dtype=torch.float64)))


def test_a_quadratic_contracts_by_r_and_has_no_eps() -> None:
    """Nothing is scaled or shifted: the nearest point is the minimizer itself."""
    risk = quadratic(3.0, 2.0, 1.0)
    found = every_step(risk.at(torch.tensor([1 / 3, 1 / 2, 1.0], dtype=torch.float64)))
    assert [check.holds for check in found] == [True, None]
    assert found[0].observed == pytest.approx(1.0, abs=1e-9)
    assert found[0].details["r"] == pytest.approx(0.8)
    assert "eps is rounding" in found[1].reason


def test_a_step_that_ends_at_the_minimizer_has_no_ratios() -> None:
    found = every_step(quadratic(1.0, 1.0).at(torch.ones(2, dtype=torch.float64)))
    assert reasons(found) == ["kappa* is 1: a step or two end at the minimizer, to rounding"]


def test_steps_end_where_rounding_begins() -> None:
    risk = quadratic(2.0, 1.0).at(torch.tensor([0.5, 1.0], dtype=torch.float64))
    found = contraction(risk, orbit_of(risk), hessian(risk).to_dense(), 2, 0.2, risk.theta + 1e-9, 1000)
    assert 10 < len(found.ratios) < 100
    assert max(found.ratios) < 0.81


def test_rates_of_a_network_are_observed_at_its_minimizer() -> None:
    risk = quadratic(3.0, 2.0, 1.0)
    found = list(rates.rates_of(risk, bnp.bnp_preconditioner(risk, eps1=0.1)))
    assert not [str(check) for check in found if check.holds is False]
    assert [check.source for check in found] == ["Theorem 1 (T14)"] * 2 + ["T14", "T14", "T15", "T15"]
    assert all(check.holds for check in found[2:])
    assert "[this network, the given P, kappa*" in found[-1].statement
    assert found[-1].kappa < found[2].kappa
    assert len(list(rates.rates_of(risk))) == 5


# Theorem 4, Prop. 11


def test_strictness_is_known_exactly_where_the_covariance_is() -> None:
    """Covariance diag(4, 1), mean (a, 0): the squared ratio is `l/4`, `l^2 - (5 + a^2) l + 4 = 0`, the larger root."""
    white = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    for a in (0.1, 1.0, 30.0):
        given = Inputs(white * torch.tensor([2.0, 1.0]) + torch.tensor([a, 0.0], dtype=torch.float64), 0)
        t = 5 + a * a
        root = (t + math.sqrt(t * t - 16)) / 2
        assert least_gain(given) == (pytest.approx(math.sqrt(root / 4), rel=1e-12), pytest.approx(1.0))
        values = np.linalg.svd(np.column_stack([np.ones(4), given.H.numpy()]), compute_uv=False)
        assert values[0] / values[-1] / 2 >= math.sqrt(root / 4) * (1 - 1e-12)


def test_a_mean_that_is_zero_or_orthogonal_is_not_strict() -> None:
    white = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    for mean in ([0.0, 0.0], [0.0, 0.7]):
        given = Inputs(white * torch.tensor([2.0, 1.0]) + torch.tensor(mean, dtype=torch.float64), 0)
        check = conditioning.strictly(given)
        assert check.holds is None
        assert "orthogonal to the top eigenvector" in check.reason


def test_centering_that_does_nothing_is_not_strict(monkeypatch: Patch) -> None:
    monkeypatch.setattr(Inputs, "without_mean", property(lambda self: self.raw))
    found = conditioning.check_centering(relu())
    assert not [check for check in found if check.statement.startswith("centering") and check.holds is False]
    failing(found, "kappa(H^U) < kappa(H^)")
    failing(found, "sufficient, not necessary")


def test_strictness_where_it_is_not(monkeypatch: Patch) -> None:
    monkeypatch.setattr(conditioning, "least_gain", lambda given: (10 * given.raw.value, 1.0))
    failing(conditioning.check_centering(relu()), "kappa(H^U) < kappa(H^)")


def test_prop_11_without_the_square(monkeypatch: Patch) -> None:
    original = conditioning.kappa_of_rank
    monkeypatch.setattr(conditioning, "kappa_of_rank", lambda m, rank: original(m, rank) if m.shape[1] < 6 else 1.1)
    failing(conditioning.check_through_curvature(relu()), "random cases: S > 0")
    monkeypatch.setattr(conditioning, "kappa_of_rank", lambda m, rank: 1.0)
    failing(conditioning.check_through_curvature(relu()), "for singular S without full row rank")


# Prop. 5


def test_the_largest_row_of_the_sparse_law_is_exact() -> None:
    """By enumeration of binomials in fractions, for 3 rows of 4."""
    n, rows = 4, 3
    p = Fraction(1, n * n)
    law = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
    expected = sum(
        math.prod(law[k] for k in ks) * max(ks) * n * n for ks in product(range(n + 1), repeat=rows)
    ) / Fraction(n)  # fmt: skip
    assert conditioning.largest_row(n, rows) == pytest.approx(float(expected), rel=1e-12)


def test_the_sparse_law_has_variance_one() -> None:
    g = torch.Generator().manual_seed(0)
    entries = torch.cat([conditioning.sparse_entries(500, 5, g).flatten() for _ in range(40)])
    assert set(entries.unique().tolist()) == {-5.0, 0.0, 5.0}
    assert float(entries.square().mean()) == pytest.approx(1.0, abs=0.05)
    assert abs(float(entries.mean())) < 0.02


def test_laws_that_are_not_as_said(monkeypatch: Patch) -> None:
    def gaussian(rows: int, columns: int, g: torch.Generator) -> Tensor:
        return torch.randn(rows, columns, generator=g, dtype=torch.float64)

    monkeypatch.setattr(conditioning, "sparse_entries", gaussian)
    failing(conditioning.check_independent_entries(relu()), "no C is")
    monkeypatch.setattr(conditioning, "largest_row", lambda n, rows: 1.0)
    failing(conditioning.check_independent_entries(relu()), "the proof takes")
    monkeypatch.setattr(conditioning, "extended", lambda G: 2 * G)
    failing(conditioning.check_independent_entries(relu()), "C = 3 is enough")


# Prop. 6


def test_operations_that_are_not_counted(monkeypatch: Patch) -> None:
    counted = coordinates.algorithm_2

    def uncounted(H: Tensor, *args: Any) -> object:
        _ = H[0, 0] + 1
        return counted(H, *args)

    monkeypatch.setattr(coordinates, "algorithm_2", uncounted)
    failing(coordinates.check_cost(relu()), "counted, n_out - 1 fewer")
    monkeypatch.setattr(coordinates, "algorithm_2", lambda H, Gw, Gb, *rest: (counted(H, Gw, Gb, *rest)[0], Gb))
    failing(coordinates.check_cost(relu()), "what is counted is the update")
    monkeypatch.setattr(coordinates, "algorithm_2", counted)
    monkeypatch.setattr(coordinates, "batch_norm", lambda H, *rest: torch.zeros(10**6) + 1)
    failing(coordinates.check_cost(relu()), "BN costs at most")


def test_what_is_counted_for_bn_is_bn() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((6, 3), (6, 3), (3,), (3,), (3,), (3,))
    x, d, weight, bias, *moments = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)
    found, back = coordinates.batch_norm(x, d, weight, bias, *moments)
    expected = nn.functional.batch_norm(x.requires_grad_(), None, None, weight, bias, training=True, eps=1e-4)
    expected.backward(d)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back, x.grad, rtol=1e-12, atol=1e-12)


def test_only_dense_layers_have_a_count() -> None:
    assert "the count is of dense layers" in reasons(coordinates.check_cost(NETWORKS["conv"]()))


# Prop. 7


def test_a_step_that_rounding_hides_is_not_compared() -> None:
    """Inputs so far from the origin that `z` has no digits left for the step."""
    far = risk_of(lambda: nn.Linear(4, 3), 1e12 + inputs(24, 4))
    (check,) = normalization.check_one_step(far.at(1e12 * far.theta))
    assert check.holds is None
    assert "the parameters with BN are rounded by" in check.reason


def test_a_step_of_damped_bnp_is_not_bn(monkeypatch: Patch) -> None:
    monkeypatch.setattr(
        normalization, "bnp_preconditioner", lambda risk, q: bnp.bnp_preconditioner(risk, q=q, eps1=1e-3)
    )
    failing(normalization.check_one_step(relu()), "one step of gradient descent with BN")


def test_statistics_that_are_differentiated(monkeypatch: Patch) -> None:
    live = normalization.LiveNorm
    monkeypatch.setattr(normalization, "LiveNorm", lambda axis, through: live(axis, True))
    failing(normalization.check_one_step(relu()), "one step of gradient descent with BN")


def test_the_same_mini_batch_again(monkeypatch: Patch) -> None:
    """One layer: its inputs do not move, so that the second step is the same one while the mini-batch stays."""
    slice_batch = normalization.slice_batch
    bare = NETWORKS["bare"]()
    assert all(check.holds for check in normalization.check_one_step(bare))
    monkeypatch.setattr(normalization, "slice_batch", lambda batch, begin, end: slice_batch(batch, 0, 30))
    failing(normalization.check_one_step(bare), "the second step is another one")


# Lemma 8, Prop. 9, Prop. 10, p. 20


def test_rows_that_are_not_those_of_the_convolution(monkeypatch: Patch) -> None:
    given = Problem(NETWORKS["conv, groups, zero padding"]())
    given.__dict__["rows"] = {name: rows.flip(0) for name, rows in given.rows.items()}
    failing(layer_curvature.check_convolution_blocks(given), "the outputs of a convolution are H^ w^")
    rows = layer_curvature.layer_rows
    monkeypatch.setattr(layer_curvature, "layer_rows", lambda risk: {n: r.flip(0) for n, r in rows(risk).items()})
    failing(layer_curvature.check_convolution_blocks(given), "the layer's Hessian block")


def test_the_outputs_of_a_convolution_with_a_frozen_bias() -> None:
    risk = NETWORKS["conv"]()
    frozen = risk.restrict([name for name in risk.space.names if name != "0.bias"])
    lemma = layer_curvature.check_convolution_blocks(frozen)[0]
    assert lemma.holds


PADDED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d": (lambda: nn.Sequential(nn.Conv2d(2, 3, 5, padding=2), nn.Flatten(), nn.Linear(3 * 12, 3)), (2, 3, 4)),
    "same": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding="same"), nn.Flatten(), nn.Linear(36, 3)), (2, 3, 4)),
    "dilated": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=2, dilation=2), nn.Flatten(), nn.Linear(3 * 30, 3)),
        (2, 5, 6),
    ),
    "1d": (lambda: nn.Sequential(nn.Conv1d(2, 3, 5, padding=2), nn.Flatten(), nn.Linear(3 * 7, 3)), (2, 7)),
    "3d": (
        lambda: nn.Sequential(nn.Conv3d(1, 2, (3, 1, 3), padding=(1, 0, 1)), nn.Flatten(), nn.Linear(2 * 24, 3)),
        (1, 2, 3, 4),
    ),
}


@pytest.mark.parametrize("name", PADDED)
def test_the_bound_of_padded_means_on_layers(name: str) -> None:
    make, shape = PADDED[name]
    constant = torch.ones(8, *shape, dtype=torch.float64)
    for x, attained in ((inputs(8, *shape), False), (constant, True)):
        found = [c for c in statistics.check_padded_means(risk_of(make, x)) if "[0]" in c.statement]
        assert [check.holds for check in found] == [True]
        if attained:
            assert found[0].observed == pytest.approx(found[0].predicted, rel=1e-12)
            failing(statistics.check_padded_means(_with_larger_gap(risk_of(make, x))), "max|h| [0]")


def _with_larger_gap(risk: bnp.EmpiricalRisk) -> Problem:
    given = Problem(risk)
    given.__dict__["rows"] = {name: rows - 0.01 for name, rows in given.rows.items()}
    return given


@pytest.mark.parametrize("options", [{"stride": 2, "padding": 1}, {}, {"padding": 1, "padding_mode": "circular"}])
def test_other_paddings_are_not_spoken_of(options: dict[str, object]) -> None:
    risk = risk_of(
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3, **options), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)),  # type: ignore[arg-type]
        inputs(8, 2, 5, 5),
    )
    assert any("not a zero-padded convolution" in reason for reason in reasons(statistics.check_padded_means(risk)))


def padded(kernel: int, *sizes: tuple[int, int]) -> bnp.EmpiricalRisk:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = nn.Conv2d(2, 3, kernel, padding=kernel // 2)
        model = nn.Sequential(first, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)).double()
    data = [(inputs(8, 2, *size), torch.arange(8) % 3) for size in sizes]
    return bnp.EmpiricalRisk(model, nn.functional.cross_entropy, data)


def test_images_that_the_bound_does_not_speak_of() -> None:
    found = reasons(statistics.check_padded_means(padded(3, (5, 5), (4, 4))))
    assert "images of several sizes" in found
    found = reasons(statistics.check_padded_means(padded(5, (1, 1))))
    assert "the kernel reaches [2, 2], beyond the whole image (1, 1)" in found
    # Along one axis it may.
    assert not any("beyond" in reason for reason in reasons(statistics.check_padded_means(padded(5, (1, 4)))))


def test_a_bound_that_forgets_a_term(monkeypatch: Patch) -> None:
    monkeypatch.setattr(statistics, "mean_bound", lambda size, reach: 0.9 * sum(map(operator.truediv, reach, size)))
    failing(statistics.check_padded_means(relu()), "a constant map attains the bound")
    failing(statistics.check_padded_means(relu()), "the largest ratio")


def test_one_example_with_several_rows(monkeypatch: Patch) -> None:
    assert any("a sequence" in reason for reason in reasons(conditioning.check_one_example(NETWORKS["sequence"]())))
    monkeypatch.setattr(conditioning, "first_examples", lambda risk, count: list(risk.batches))
    assert any("cannot be cut" in reason for reason in reasons(conditioning.check_one_example(relu())))


def test_rows_of_one_example_that_are_not_its_positions(monkeypatch: Patch) -> None:
    rows = conditioning.layer_rows

    def twice(risk: bnp.EmpiricalRisk, layers: object) -> dict[str, Tensor]:
        return {name: torch.cat([r, r]) for name, r in rows(risk, layers).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(conditioning, "layer_rows", twice)
    failing(conditioning.check_one_example(NETWORKS["conv"]()), "keeps a row per position")


def test_a_condition_number_of_one_row(monkeypatch: Patch) -> None:
    original = conditioning.singular
    monkeypatch.setattr(
        conditioning, "singular", lambda m: dataclasses.replace(original(m), value=1.01, lower=1.0, upper=1.1)
    )
    failing(conditioning.check_one_example(relu()), "has one row")
