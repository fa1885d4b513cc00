"""BNP's update of one layer: the published formulas, what it is invariant under, its damping, layers without bias.

Bugs that only these tests catch: statistics or damping that enter twice or not at all, `q` in place of `q^2`, a
variance that is not the biased one, a scale of a feature that depends on another feature's although nothing is
damped, a constant feature that becomes NaN or an enormous step, the mean direction of a layer without bias scaled
as if it had been centred away.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from precondition_networks import one_layer, relative, uneven
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.precondition.bnp import damped_variance

SHIFTS = st.floats(-100, 100)
EXPONENTS = st.floats(-3, 3)
SEEDS = st.integers(0, 2**16)


def rows(seed: int, count: int = 9, features: int = 4) -> Tensor:
    return torch.randn(count, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, damping: tuple[float, float]
) -> tuple[bnp.EmpiricalRisk, Tensor]:
    """A layer at given parameters, and its step `P P^T g` for a fixed target, as an extended weight matrix."""
    model = nn.Linear(x.shape[1], weight.shape[0], bias is not None).double()
    target = torch.linspace(-1, 1, x.shape[0] * weight.shape[0], dtype=torch.float64).view(x.shape[0], -1)
    theta = weight.flatten() if bias is None else torch.cat([weight.flatten(), bias])
    risk = bnp.EmpiricalRisk(model, nn.functional.mse_loss, (x, target), at=theta)
    step = bnp.bnp_preconditioner(risk, eps1=damping[0], eps2=damping[1]).direction(risk.gradient)
    tensors = risk.space.unflatten(step)
    parts = [tensors["weight"]] + ([tensors["bias"].unsqueeze(1)] if bias is not None else [])
    return risk, torch.cat(parts, dim=1)


@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("damping", [(0.0, 0.0), (1e-2, 1e-4), (0.5, 2.0)])
def test_the_step_is_the_published_one(count: int, damping: tuple[float, float]) -> None:
    """`Gw' = (Gw - Gb mu^T)/s2/q2`, `Gb' = Gb/q2 - Gw' mu`, with `s2 = sigma^2 + eps1 max sigma^2 + eps2`."""
    x = uneven((count, 5), 3)
    model = nn.Linear(5, 2).double()
    y = torch.arange(count) % 2
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    Gw, Gb = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), [model.weight, model.bias])
    mu, variance = x.sum(dim=0) / count, x.var(dim=0, correction=0)
    s2 = variance + damping[0] * variance.max() + damping[1]
    q2 = max(5 / count, 1.0)
    new_w = (Gw - Gb.unsqueeze(1) * mu) / s2 / q2
    new_b = Gb / q2 - new_w @ mu
    step = bnp.bnp_preconditioner(risk, eps1=damping[0], eps2=damping[1]).direction(risk.gradient)
    assert relative(step, torch.cat([new_w.flatten(), new_b])) < 1e-12


def test_undamped_it_is_the_inverse_second_moment_with_a_diagonal_covariance() -> None:
    """`P P^T = M^-1`, `M = [[mu mu^T + diag sigma^2, mu], [mu^T, 1]]` (T3), for each unit."""
    x = uneven((40, 5), 3)
    P = bnp.bnp_preconditioner(one_layer(x, 3), block=("", 1)).to_dense()
    mu, variance = x.mean(dim=0), x.var(dim=0, correction=0)
    covariance = torch.cov(x.T, correction=0)
    M = torch.cat(
        [torch.cat([torch.outer(mu, mu) + variance.diag(), mu.unsqueeze(1)], 1), torch.cat([mu, mu.new_ones(1)])[None]]
    )
    assert relative(P @ P.T, torch.linalg.inv(M)) < 1e-12
    extended = torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], dim=1)
    second = extended.T @ extended / 40
    second[:5, :5] -= covariance - variance.diag()
    assert relative(M, second) < 1e-12, "only the covariance differs from K-FAC's input factor"


@given(seed=SEEDS, eps=st.floats(0, 1))
def test_it_is_a_descent_direction(seed: int, eps: float) -> None:
    risk, _ = linear(rows(seed) + 3, rows(seed + 1, 2), rows(seed + 2, 1, 2)[0], (eps, eps))
    assert float(risk.gradient @ bnp.bnp_preconditioner(risk, eps1=eps).direction(risk.gradient)) > 0


@given(
    seed=SEEDS, exponents=st.lists(EXPONENTS, min_size=4, max_size=4), shift=st.lists(SHIFTS, min_size=4, max_size=4)
)
def test_the_undamped_step_is_invariant_under_every_affine_map_of_the_features(
    seed: int, exponents: list[float], shift: list[float]
) -> None:
    """Inputs `D h + c` and the weights of the same function: the step changes the function in the same way."""
    x, W, b = rows(seed), rows(seed + 1, 2), rows(seed + 2, 1, 2)[0]
    D, c = 10.0 ** torch.tensor(exponents, dtype=torch.float64), torch.tensor(shift, dtype=torch.float64)
    c = c * D
    plain, step = linear(x, W, b, (0.0, 0.0))
    other, moved = linear(x * D + c, W / D, b - (W / D) @ c, (0.0, 0.0))
    torch.testing.assert_close(other.outputs, plain.outputs, rtol=1e-9, atol=1e-9)
    expected = torch.cat([step[:, :4] / D, step[:, 4:] - (step[:, :4] / D) @ c.unsqueeze(1)], dim=1)
    # A shift by 100 deviations costs 4 digits of the variance.
    assert relative(moved * torch.cat([D, D.new_ones(1)]), expected * torch.cat([D, D.new_ones(1)])) < 1e-8


@given(seed=SEEDS, exponents=st.lists(EXPONENTS, min_size=4, max_size=4))
def test_without_a_bias_it_is_invariant_under_scales(seed: int, exponents: list[float]) -> None:
    x, W = rows(seed) + 1, rows(seed + 1, 2)
    D = 10.0 ** torch.tensor(exponents, dtype=torch.float64)
    _, step = linear(x, W, None, (0.0, 0.0))
    _, moved = linear(x * D, W / D, None, (0.0, 0.0))
    assert relative(moved * D, step) < 1e-10


@given(seed=SEEDS, shift=st.lists(SHIFTS, min_size=4, max_size=4), eps1=st.floats(0, 1), eps2=st.floats(0, 1))
def test_shifts_are_exact_under_any_damping(seed: int, shift: list[float], eps1: float, eps2: float) -> None:
    x, W, b = rows(seed), rows(seed + 1, 2), rows(seed + 2, 1, 2)[0]
    c = torch.tensor(shift, dtype=torch.float64)
    _, step = linear(x, W, b, (eps1, eps2))
    _, moved = linear(x + c, W, b - W @ c, (eps1, eps2))
    assert relative(moved[:, :4], step[:, :4]) < 1e-8


@pytest.mark.parametrize(("damping", "exact"), [((0.0, 0.0), True), ((1e-2, 0.0), True), ((1e-2, 1e-4), False)])
def test_one_common_scale_is_exact_only_without_eps2(damping: tuple[float, float], exact: bool) -> None:
    x, W, b = rows(5) + 2, rows(6, 2), rows(7, 1, 2)[0]
    _, step = linear(x, W, b, damping)
    _, moved = linear(1e-2 * x, W / 1e-2, b, damping)
    gap = relative(moved[:, :4] * 1e-2, step[:, :4])
    assert gap < 1e-12 if exact else gap > 0.1


def test_damping_breaks_the_invariance_to_the_scale_of_one_feature() -> None:
    """A theory check with damping would blame BNP. One feature measured in other units, factor 100."""
    x = rows(11, 60, 5) @ (torch.eye(5, dtype=torch.float64) + 0.1 * rows(12, 5, 5)) + 2
    D = torch.tensor([100.0, 1, 1, 1, 1], dtype=torch.float64)

    def kappa(inputs: Tensor, eps1: float) -> float:
        risk = one_layer(inputs)
        P = bnp.bnp_preconditioner(risk, eps1=eps1)
        return bnp.condition_number(bnp.gauss_newton(risk), preconditioner=P).value

    assert kappa(x * D, 0.0) == pytest.approx(kappa(x, 0.0), rel=1e-9)
    assert kappa(x * D, 1e-2) > 10 * kappa(x, 1e-2)
    assert kappa(x * D, 1e-2) < kappa(x * D, 0.0) * 101 * 1.01, "what is not corrected is bounded"


@given(
    exponents=st.lists(st.floats(-12, 12), min_size=2, max_size=8),
    eps1=st.floats(1e-6, 1),
    eps2=st.floats(0, 1e-3),
)
def test_damping_bounds_what_is_corrected(exponents: list[float], eps1: float, eps2: float) -> None:
    """`max s2 / min s2 <= (1 + eps1)/eps1`, 101 at the paper's damping."""
    variance = 10.0 ** torch.tensor([exponents], dtype=torch.float64)
    s2 = damped_variance(variance, eps1, eps2)
    assert float(s2.max() / s2.min()) <= (1 + eps1) / eps1 * (1 + 1e-12)
    assert torch.equal(damped_variance(variance, 0.0, 0.0), variance)


def test_damping_bound_is_attained() -> None:
    s2 = damped_variance(torch.tensor([[1.0, 0.0]], dtype=torch.float64), 1e-2, 0.0)
    assert float(s2.max() / s2.min()) == pytest.approx(101)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bias_free", ["rank-one", "diagonal"])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_a_feature_of_zero_variance(bias: bool, bias_free: str, damping: float) -> None:
    """It gets scale 1, is listed, gives no NaN; with a bias the step leaves its weight alone."""
    x = uneven((20, 4), 3)
    x[:, 1], x[:, 3] = 0.0, -5.0
    risk = one_layer(x, 2, bias=bias)
    P = bnp.bnp_preconditioner(risk, eps1=damping, bias_free=bias_free)
    assert P.constant_features == {"": (1, 3)}
    step = risk.space.unflatten(P.direction(risk.gradient))
    assert all(bool(torch.isfinite(t).all()) for t in step.values())
    if bias:
        assert float(step["weight"][:, [1, 3]].abs().max()) < 1e-10 * float(step["weight"].abs().max())
        scale = 1.0 if not damping else float(damping * x.var(dim=0, correction=0).max()) ** -0.5
        diagonal = P.block(("", 0)).to_dense().diagonal()
        assert diagonal[[1, 3]].tolist() == pytest.approx([scale, scale])


def test_a_layer_whose_inputs_are_all_constant() -> None:
    for x in (torch.zeros(6, 3, dtype=torch.float64), torch.full((6, 3), 1e-200, dtype=torch.float64)):
        for bias in (True, False):
            P = bnp.bnp_preconditioner(one_layer(x, 2, bias=bias))
            assert P.constant_features == {"": (0, 1, 2)}
            torch.testing.assert_close(P.to_dense(), torch.eye(P.dim, dtype=torch.float64))


def test_tiny_and_huge_features_survive_in_float32() -> None:
    """A deviation of 1e-25 has no variance in float32; moments are kept in float64."""
    scale = torch.tensor([1e-25, 1e25, 1.0])
    x = (rows(1, 30, 3).float() + 1) * scale
    data = (x, torch.zeros(30, 1))
    P = bnp.bnp_preconditioner(bnp.EmpiricalRisk(nn.Linear(3, 1), nn.functional.mse_loss, data, at=torch.zeros(4)))
    assert P.constant_features == {"": ()}
    diagonal = P.to_dense().diagonal()[:3] * scale
    torch.testing.assert_close(diagonal, 1 / (x.double() / scale.double()).std(dim=0, correction=0).float())
