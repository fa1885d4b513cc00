"""Losses along directions, sharpness along steps, masses of eigenvectors: against formulas and the loss itself.

Bugs that only this file catches: a direction that is not brought to length 1, a factor of two in a model or a critical
step, axes of a plane exchanged, the mass of one layer under the name of another.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.diagnose import directional_sharpness, eigenvector_mass
from bnp_analysis.errors import InvalidInputError


def quadratic(curvatures: list[float], seed: int = 0) -> tuple[bnp.EmpiricalRisk, Tensor]:
    """`L = mean_i (w . x_i)^2` with a Hessian of these eigenvalues, exactly its own model; and that Hessian."""
    n = len(curvatures)
    Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
    x = math.sqrt(n / 2) * torch.tensor(curvatures, dtype=torch.float64).sqrt()[:, None] * Q.T
    model = nn.Linear(n, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.linspace(-1, 2, n, dtype=torch.float64)[None])
    risk = bnp.EmpiricalRisk(model, nn.functional.mse_loss, (x, torch.zeros(n, 1, dtype=torch.float64)))
    return risk, (Q * torch.tensor(curvatures, dtype=torch.float64)) @ Q.T


@pytest.mark.parametrize("curvatures", [[4.0, 1.0, 0.25], [1e6, 1.0, 1e-6, 0.0]])
def test_of_a_quadratic_the_model_is_the_loss(curvatures: list[float]) -> None:
    risk, H = quadratic(curvatures)
    theta = risk.theta
    u = torch.arange(1.0, len(theta) + 1, dtype=torch.float64)
    found = bnp.slice(risk, 7 * u, points=9, radius=2.0)
    assert found.distances == pytest.approx(np.linspace(-2, 2, 9))
    unit = u / u.norm()
    for t, loss, model in zip(found.distances, found.loss, found.quadratic, strict=True):
        at = theta + t * unit
        assert loss == pytest.approx(float(at @ H @ at) / 2, rel=1e-9, abs=1e-9)
        assert model == pytest.approx(loss, rel=1e-8, abs=1e-8)
    assert found.slopes == pytest.approx([float(unit @ H @ theta)], rel=1e-9)
    assert found.curvatures[0, 0] == pytest.approx(float(unit @ H @ unit), rel=1e-9)


def test_in_a_plane_axes_are_where_they_say() -> None:
    risk, H = quadratic([9.0, 1.0, 0.5])
    first, second = torch.tensor([1.0, 0, 0]).double(), torch.tensor([1.0, 1, 0]).double()
    found = bnp.slice(risk, first, second, points=5, radius=1.0)
    v = torch.tensor([0.0, 1, 0]).double()  # what of the second is orthogonal to the first
    for i, a in enumerate(found.distances):
        for j, b in enumerate(found.distances):
            at = risk.theta + a * first + b * v
            assert found.loss[i, j] == pytest.approx(float(at @ H @ at) / 2, rel=1e-9)
    assert found.quadratic == pytest.approx(found.loss, rel=1e-9)
    assert found.curvatures == pytest.approx(H[:2, :2].numpy(), abs=1e-9)
    row = found.records()[1]
    assert (row["distance"], row["distance_2"], row["loss"]) == (-1.0, -0.5, found.loss[0, 1])


def test_along_an_eigenvector_the_curvature_is_the_eigenvalue(tanh_risk: bnp.EmpiricalRisk, tmp_path) -> None:
    pairs = bnp.eigenpairs(bnp.hessian(tanh_risk), k=1)
    flat = bnp.slice(tanh_risk, pairs.vectors[:, 0], radius=1e-3, points=3)
    assert flat.curvatures[0, 0] == pytest.approx(float(pairs.values[0]), rel=1e-8)
    # The other oracle: the loss's own second difference.
    second = (flat.loss[0] - 2 * flat.loss[1] + flat.loss[2]) / 1e-6
    assert second == pytest.approx(float(pairs.values[0]), rel=1e-4)
    tree = bnp.slice(tanh_risk, tanh_risk.space.unflatten(pairs.vectors[:, 0]), radius=1e-3, points=3)
    assert np.array_equal(tree.loss, flat.loss)
    assert flat.loss[1] == float(tanh_risk.value)
    assert bnp.diagnose.Slice.load(flat.save(tmp_path / "slice.json")) == flat
    assert "curvature" in str(flat)


def test_points_where_the_loss_is_infinite_are_left_out() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    one = torch.ones(2, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(1.0)
    risk = bnp.EmpiricalRisk(model, lambda o, y: -torch.log(o).mean() + (y * o).mean(), (one, one))
    found = bnp.slice(risk, torch.ones(1), radius=2.0, points=5)
    assert np.isnan(found.loss).tolist() == [True, True, False, False, False]
    assert found.loss[2:] == pytest.approx([1.0, 2 - math.log(2), 3 - math.log(3)])
    assert "not finite at 2 points" in str(found)


def test_both_sharpnesses_of_a_quadratic_are_its_rayleigh_quotient() -> None:
    risk, H = quadratic([8.0, 2.0, 0.1])
    g = risk.gradient
    truth = float(g @ H @ g / (g @ g))
    found = directional_sharpness(risk)
    assert found.value == pytest.approx(truth)
    assert found.critical_lower <= truth * (1 + 1e-9)
    assert truth <= found.critical_upper * (1 + 1e-9)
    assert found.critical == pytest.approx(truth, rel=1e-5)
    u = torch.tensor([0.1, 3.0, -0.2], dtype=torch.float64)
    u = u * torch.sign(u @ g)
    own = float(u @ H @ u / (u @ g))
    found = directional_sharpness(risk, u)
    assert (found.value, found.critical) == pytest.approx((own, own), rel=1e-5)


def test_a_critical_step_is_where_the_loss_is_back(tanh_risk: bnp.EmpiricalRisk) -> None:
    found = directional_sharpness(tanh_risk)
    for critical, grows in ((found.critical_lower * 0.999, True), (found.critical_upper * 1.001, False)):
        there = tanh_risk(tanh_risk.theta - 2 / critical * tanh_risk.gradient)
        assert bool(there > tanh_risk.value) is grows
    g, h = tanh_risk.gradient, 1e-5
    quotient = (
        (tanh_risk.at(tanh_risk.theta + h * g).gradient - tanh_risk.at(tanh_risk.theta - h * g).gradient) @ g / (2 * h)
    )
    assert found.value == pytest.approx(float(quotient / (g @ g)), rel=1e-6)


class Held(torch.autograd.Function):
    """The cube, with one derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * grad


class Cubed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Held.apply(x)


def test_without_a_second_derivative_the_loss_is_still_asked() -> None:
    """`L = w^6`: back at `-w`."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), Cubed()).double()
    one = torch.ones(2, 1, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    risk = bnp.EmpiricalRisk(model, nn.functional.mse_loss, (one, 0 * one))
    plain = bnp.slice(risk, "gradient", points=3, radius=0.5)
    assert plain.loss == pytest.approx([0.0, 0.5**6, 1.0])
    assert np.isnan(plain.curvatures).all()
    assert np.isnan(plain.quadratic).all()
    assert plain.matvecs == 0
    assert "not known" in str(plain)
    found = directional_sharpness(risk)
    assert math.isnan(found.value)
    assert found.matvecs == 0
    assert found.critical == pytest.approx(2 * 6 * 0.5**5, rel=1e-5)


def test_a_step_to_where_the_loss_is_infinite_is_too_long() -> None:
    """Of `w - log w` at 2 the quadratic model is back at -2, the loss itself where `w - log w` is `2 - log 2`."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    one = torch.ones(2, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(2.0)
    risk = bnp.EmpiricalRisk(model, lambda o, y: -torch.log(o).mean() + (y * o).mean(), (one, one))
    found = directional_sharpness(risk)
    back = 2 - found.critical**-1  # after a step 2 / critical of the slope 1/2
    assert back - math.log(back) == pytest.approx(2 - math.log(2), rel=1e-5)
    assert found.value == pytest.approx(0.25)


def test_where_rounding_hides_all_growth_the_bracket_is_open() -> None:
    """`L = c + w^2 / (1000 (1 + w^2))` never grows by what the rounding of `c` leaves."""
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    one = torch.ones(2, 1, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(0.1)
    risk = bnp.EmpiricalRisk(model, lambda o, y: (o * o / (1 + o * o)).mean() / 1000 + 1e12, (one, one))
    found = directional_sharpness(risk)
    assert found.critical > 0
    assert (found.critical_lower, found.critical_upper) == (0.0, math.inf)


def test_a_step_that_never_grows_the_loss_has_no_critical_size() -> None:
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    one = torch.ones(2, 1, dtype=torch.float64)
    risk = bnp.EmpiricalRisk(model, lambda o, y: (o * y).mean(), (one, one))
    found = directional_sharpness(risk)
    assert (found.critical, found.value) == (0.0, 0.0)
    assert "not reached" in str(found)


def test_mass_is_the_squared_length_in_each_layer(tanh_risk: bnp.EmpiricalRisk, tmp_path) -> None:
    pairs = bnp.eigenpairs(bnp.hessian(tanh_risk), k=3)
    found = eigenvector_mass(pairs, tanh_risk.space)
    assert found.names == ("fc1", "fc2")
    assert found.mass.sum(axis=1) == pytest.approx(np.ones(3))
    tensors = tanh_risk.space.unflatten(pairs.vectors[:, 1])
    own = float(tensors["fc2.weight"].norm() ** 2 + tensors["fc2.bias"].norm() ** 2)
    assert found.mass[1, 1] == pytest.approx(own)
    assert found.sizes == pytest.approx([25 / 43, 18 / 43])
    rows = found.records()
    assert rows[1]["fc2"] == pytest.approx(own)
    units = eigenvector_mass(pairs, tanh_risk.space, blocks={"first unit": ("fc1", 0), "biases": "*.bias"})
    assert units.mass[0, 0] == pytest.approx(
        float((pairs.vectors[:, 0][tanh_risk.space.indices(("fc1", 0))] ** 2).sum())
    )
    assert bnp.diagnose.EigenvectorMass.load(found.save(tmp_path / "mass.json")) == found


def test_mass_of_a_prescribed_spectrum_is_known() -> None:
    space = bnp.ParameterSpace({"a.w": (2,), "b.w": (2,)})
    rotated = torch.tensor([[0.6, 0, 0.8, 0], [0, 1, 0, 0], [-0.8, 0, 0.6, 0], [0, 0, 0, 1]], dtype=torch.float64)
    A = bnp.DenseOperator(rotated.T @ torch.diag(torch.arange(4.0, 0, -1, dtype=torch.float64)) @ rotated)
    found = eigenvector_mass(bnp.eigenpairs(A, k=3), space)
    assert found.mass == pytest.approx(np.array([[0.36, 0.64], [1, 0], [0.64, 0.36]]), abs=1e-9)
    assert found.summary() == "mass of 3 eigenvectors in 2 blocks; 4: b (0.64), 3: a (1.00), 2: a (0.64)"


def test_bad_input_is_refused_with_words(tanh_risk: bnp.EmpiricalRisk) -> None:
    n = tanh_risk.space.dim
    for direction, words in (
        ("hessian", "'gradient'"),
        (torch.zeros(n), "zero or not finite"),
        (torch.full((n,), math.nan), "not finite"),
        (torch.ones(n, 1), "one column"),
        (torch.ones(n + 1), "flat tensor"),
        ({"fc1.weight": torch.ones(5, 4)}, "missing"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            bnp.slice(tanh_risk, direction)
    with pytest.raises(InvalidInputError, match="parallel"):
        bnp.slice(tanh_risk, torch.ones(n), -3 * torch.ones(n))
    with pytest.raises(InvalidInputError, match="points"):
        bnp.slice(tanh_risk, "gradient", points=2)
    with pytest.raises(InvalidInputError, match="radius"):
        bnp.slice(tanh_risk, "gradient", radius=-1.0)
    with pytest.raises(InvalidInputError, match="other sign"):
        directional_sharpness(tanh_risk, -tanh_risk.gradient)
    pairs = bnp.eigenpairs(bnp.hessian(tanh_risk, block="fc1"), k=1)
    with pytest.raises(InvalidInputError, match="25 entries, the space 43"):
        eigenvector_mass(pairs, tanh_risk.space)
    for blocks in ([], {}):
        with pytest.raises(InvalidInputError, match="blocks is empty; leave it out for every layer"):
            eigenvector_mass(pairs, tanh_risk.space.restrict(["fc1.weight", "fc1.bias"]), blocks=blocks)


class Shifted(nn.Module):
    """`(w - 1)^2` behind a constant."""

    def __init__(self, w: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.w * x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("constant", [0.0, 1.0, 1e4, 1e12])
@pytest.mark.parametrize("away", [1.0, 1e-3, 1e-6])
def test_the_critical_bracket_holds_in_exact_numbers(constant: float, away: float, dtype: torch.dtype) -> None:
    """`c + (w - 1)^2` crosses where `w - eta g = 1 - (w - 1)`: rounding of `c` must not move the bracket beside it."""

    def loss(output: Tensor, y: Tensor) -> Tensor:
        return (output - y).square().mean() + constant

    x = torch.ones(3, 1, dtype=dtype)
    risk = bnp.EmpiricalRisk(Shifted(1 + away, dtype), loss, (x, x))
    w, g = (Fraction(float(v)) for v in (risk.theta, risk.gradient))
    truth = Fraction(2) * g / (2 * (w - 1))  # 2 / eta_c
    found = directional_sharpness(risk)
    assert found.critical_lower <= found.critical <= found.critical_upper
    assert Fraction(found.critical_lower) <= truth
    assert found.critical_upper == math.inf or truth <= Fraction(found.critical_upper)
    if constant <= 1 and away == 1:
        assert found.critical_upper <= (1 + 1e-4) * found.critical_lower


@pytest.mark.parametrize("scale", [1e-155, 1e-170])
def test_tiny_gradients_and_directions_have_a_length(scale: float) -> None:
    """Their squares vanish; unit vectors, slopes and curvatures are those of the loss without the factor."""
    x = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    y = torch.zeros(2, 1, dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1e-3, -2e-3]]))
    plain = bnp.slice(bnp.EmpiricalRisk(model, nn.functional.mse_loss, (x, y)), "gradient", points=3, radius=1.0)
    small = bnp.EmpiricalRisk(model, lambda o, t: scale * nn.functional.mse_loss(o, t), (x, y))
    found = bnp.slice(small, "gradient", points=3, radius=1.0)
    assert found.curvatures / scale == pytest.approx(plain.curvatures, rel=1e-12)
    assert found.slopes / scale == pytest.approx(plain.slopes, rel=1e-12)
    along = torch.tensor([3.0, 4.0], dtype=torch.float64)
    far, near = (bnp.slice(small, s * along, points=3, radius=1.0) for s in (1e-250, 1.0))
    assert far.loss == pytest.approx(near.loss, rel=1e-14)
    assert directional_sharpness(small).value / scale == pytest.approx(plain.curvatures.item(), rel=1e-9)
