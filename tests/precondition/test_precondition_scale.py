"""The scale `q` of a layer: what the inputs put into the largest eigenvalue (T8), patches included (T6).

Bugs that only these tests catch: `q` left out, squared or taken of another layer's rows; `q="measured"` of other rows
than those that `P` leaves (without the bias column, without damping, of the first group only); channel statistics
that take padding for data; a convolution whose patches are not those of its dense equivalent.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from precondition_networks import classification, one_layer, relative
from sklearn.datasets import load_digits
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.network import coverage, layer_rows

SLACK = 1 + 1e-9


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def squared_norm(risk: bnp.EmpiricalRisk, name: str = "", **options: Any) -> float:
    """`|H^ P|^2 / R` at `q = 1`, dense, the largest over the groups."""
    P = bnp.bnp_preconditioner(risk, q=1.0, **options)
    layer, rows = coverage(risk)[name], layer_rows(risk)[name]
    found = []
    for group in range(layer.groups):
        unit = P.block((name, group * layer.units // layer.groups)).to_dense()
        h = rows[:, group]
        if layer.bias is not None:
            h = torch.cat([h, h.new_ones(h.shape[0], 1)], dim=1)
        found.append(float(torch.linalg.matrix_norm(h @ unit, 2)) ** 2 / h.shape[0])
    return max(found)


@given(seed=st.integers(0, 2**20), rows=st.integers(2, 20), features=st.integers(1, 30), mixed=st.booleans())
def test_the_largest_eigenvalue_of_normalized_inputs_is_bounded(
    seed: int, rows: int, features: int, mixed: bool
) -> None:
    """`max(1, m/(R-1)) <= |G^|^2/R <= m` for every input without constant features."""
    H = normal(seed, rows, features) * 10 ** normal(seed + 1, features) + 10 * normal(seed + 2, features)
    if mixed:
        H = H @ normal(seed + 3, features, features)
    found = squared_norm(one_layer(H))
    assert max(1.0, features / (rows - 1)) <= found * SLACK
    assert found <= max(features, 1) * SLACK


def test_both_bounds_are_attained() -> None:
    equal = normal(0, 6, 1).expand(6, 5)
    assert squared_norm(one_layer(equal)) == pytest.approx(5)
    two_rows = normal(0, 2, 7)
    assert squared_norm(one_layer(two_rows)) == pytest.approx(7)
    square = torch.linalg.qr(torch.cat([torch.ones(6, 1, dtype=torch.float64), normal(0, 6, 5)], dim=1))[0][:, 1:]
    assert squared_norm(one_layer(square)) == pytest.approx(1)


@pytest.mark.parametrize("rows", [32, 512])
def test_q_removes_the_factor_of_independent_inputs(rows: int) -> None:
    """About `(1 + sqrt(m/R))^2`, in `[q^2, 4 q^2]`: with `q` the largest eigenvalue is between 1 and 4."""
    features = 256
    risk = one_layer(normal(1, rows, features) * 7 + 3)
    P = bnp.bnp_preconditioner(risk)
    found = squared_norm(risk)
    assert P.q[""] ** 2 == pytest.approx(max(features / rows, 1.0))
    assert found == pytest.approx((1 + (features / rows) ** 0.5) ** 2, rel=0.1)
    assert 1 <= found / P.q[""] ** 2 <= 4
    top = bnp.condition_number(bnp.gauss_newton(risk), preconditioner=P).lambda_max
    assert top == pytest.approx(2 * found / P.q[""] ** 2, rel=1e-9), "least squares: S = 2 I / R"


@pytest.mark.parametrize(
    "options",
    [{}, {"statistics": "patch"}, {"eps1": 0.1, "eps2": 0.3}, {"bias_free": "diagonal"}],
    ids=["channel", "patch", "damped", "diagonal"],
)
@pytest.mark.parametrize(("kind", "bias"), [("dense", True), ("sequence", False), ("groups", True), ("groups", False)])
def test_the_measured_q_is_the_dense_norm(kind: str, bias: bool, options: dict[str, Any]) -> None:
    risk = classification(kind, bias=bias)
    measured = bnp.bnp_preconditioner(risk, q="measured", **options)
    for layer in coverage(risk):
        assert measured.q[layer.name] ** 2 == pytest.approx(squared_norm(risk, layer.name, **options), rel=1e-10)


@pytest.mark.parametrize("kind", ["dense", "groups"])
def test_q_divides_and_nothing_else(kind: str) -> None:
    risk = classification(kind)
    off = bnp.bnp_preconditioner(risk, q=1.0)
    given_q = bnp.bnp_preconditioner(risk, q=2.5)
    assert given_q.q == {"0": 2.5, coverage(risk).covered[1].name: 2.5}
    assert relative(2.5 * given_q.to_dense(), off.to_dense()) < 1e-14
    auto = bnp.bnp_preconditioner(risk)
    for layer in coverage(risk):
        rows = layer_rows(risk)[layer.name].shape[0]
        assert auto.q[layer.name] == max(layer.features / rows, 1.0) ** 0.5
        part = auto.block(layer.name).to_dense() * auto.q[layer.name]
        assert relative(part, off.block(layer.name).to_dense()) < 1e-14


# Convolutions (T6)


def digits(count: int = 200) -> Tensor:
    return torch.tensor(load_digits().data[:count] / 16.0).view(-1, 1, 8, 8)


def convolution(x: Tensor, **options: Any) -> bnp.EmpiricalRisk:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Conv2d(x.shape[1], 2, **options).double()
    return bnp.EmpiricalRisk(model, nn.functional.mse_loss, (x, torch.zeros_like(model(x))))


def patch_moments(risk: bnp.EmpiricalRisk, statistics: str) -> tuple[Tensor, Tensor]:
    """Mean and variance of every entry of the normalized patches."""
    P = bnp.bnp_preconditioner(risk, statistics=statistics, q=1.0)
    rows = layer_rows(risk)[""][:, 0]
    extended = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1)
    G = P.block(("", 0)).apply_transpose(extended.T.contiguous()).T[:, :-1]
    return G.mean(dim=0), G.var(dim=0, correction=0)


GEOMETRIES: dict[str, dict[str, Any]] = {
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "zero padding": {"kernel_size": 3, "padding": 1},
    "valid": {"kernel_size": 3},
    "stride": {"kernel_size": 3, "padding": 1, "padding_mode": "circular", "stride": 2},
}
# Largest mean of a normalized patch entry, in deviations, on 200 digits.
OFF_CENTRE = {"circular": 0.0, "zero padding": 0.095, "valid": 0.295, "stride": 0.036}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_patches_are_centred_exactly_by_channel_only_if_circular_with_stride_one(geometry: str) -> None:
    risk = convolution(digits(), **GEOMETRIES[geometry])
    mean, variance = patch_moments(risk, "patch")
    assert float(mean.abs().max()) < 1e-13
    torch.testing.assert_close(variance, torch.ones_like(variance))
    by_channel = float(patch_moments(risk, "channel")[0].abs().max())
    assert by_channel == pytest.approx(OFF_CENTRE[geometry], abs=1e-13 if geometry == "circular" else 1e-3)


def test_circular_convolutions_do_not_distinguish_the_statistics() -> None:
    risk = convolution(digits(), **GEOMETRIES["circular"])
    channel, patch = (bnp.bnp_preconditioner(risk, statistics=s).to_dense() for s in ("channel", "patch"))
    assert relative(patch, channel) < 1e-13


def test_equal_neighbours_make_the_norm_the_area_of_the_kernel() -> None:
    """Images of one value each: all `k^2` columns are equal, `|G^|^2/R = k^2`, far from the `q = 1` of the rule."""
    x = normal(0, 50, 1, 1, 1).expand(50, 1, 6, 6)
    risk = convolution(x, kernel_size=3)
    assert bnp.bnp_preconditioner(risk).q[""] == 1.0
    assert bnp.bnp_preconditioner(risk, q="measured").q[""] == pytest.approx(3.0)


def test_a_convolution_of_one_pixel_is_a_dense_layer_on_positions() -> None:
    x = normal(0, 6, 3, 4, 5) * 3 + 1
    conv = convolution(x, kernel_size=1)
    dense = bnp.EmpiricalRisk(
        nn.Linear(3, 2).double(), nn.functional.mse_loss, (x.movedim(1, -1), torch.zeros(6, 4, 5, 2).double())
    )
    for options in ({}, {"statistics": "patch"}, {"q": "measured"}, {"eps1": 0.1}):
        pair = [bnp.bnp_preconditioner(risk, **options).to_dense() for risk in (conv, dense)]
        assert relative(pair[0], pair[1]) < 1e-13


def test_the_groups_of_a_layer_share_its_damping_and_its_scale() -> None:
    """`max(sigma^2)` is the layer's, and without a bias the diagonal form's `q` is that of its worst group."""
    x = normal(0, 60, 2, 1) * torch.tensor([[[10.0], [1.0]]]).double() + torch.tensor([[[0.0], [5.0]]]).double()
    variance = x.var(dim=(0, 2), correction=0)
    grouped = convolution_1d(x, bias=True)
    diagonal = bnp.bnp_preconditioner(grouped, eps1=0.1).to_dense().diagonal()[:2]
    torch.testing.assert_close(diagonal, (variance + 0.1 * variance.max()).rsqrt())
    square = bnp.bnp_preconditioner(convolution_1d(x, bias=False), bias_free="diagonal").q[""] ** 2
    survives = x.mean(dim=(0, 2)).square() / x.square().mean(dim=(0, 2))
    assert square == pytest.approx(1 + float(survives.max()))
    assert float(survives.max()) > 10 * float(survives.min())


def convolution_1d(x: Tensor, *, bias: bool) -> bnp.EmpiricalRisk:
    model = nn.Conv1d(2, 2, 1, groups=2, bias=bias).double()
    return bnp.EmpiricalRisk(model, nn.functional.mse_loss, (x, torch.zeros_like(x)))


def test_a_grouped_convolution_is_its_groups_side_by_side() -> None:
    """Undamped, and with `q` by the rule, which depends on shapes alone."""
    x = normal(0, 6, 4, 5, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0]).view(1, 4, 1, 1).double() + 1
    whole = bnp.bnp_preconditioner(
        bnp.EmpiricalRisk(
            nn.Conv2d(4, 4, 2, groups=2).double(), lambda o, y: o.square().mean(), (x, torch.zeros(6).double())
        )
    )
    for group in range(2):
        part = bnp.bnp_preconditioner(
            bnp.EmpiricalRisk(
                nn.Conv2d(2, 2, 2).double(),
                lambda o, y: o.square().mean(),
                (x[:, 2 * group : 2 * group + 2], torch.zeros(6).double()),
            )
        )
        for unit in range(2):
            found = whole.block(("", 2 * group + unit)).to_dense()
            assert relative(found, part.block(("", unit)).to_dense()) < 1e-13
