"""What BNP acts on, what it leaves alone and says so, and what it refuses.

Bugs that only these tests catch: a layer that gets a gradient but never runs is preconditioned with another layer's
statistics, tied tensors are preconditioned twice, a reused layer sees only its last input, a parameter is skipped
without a word, a measurement moves the model, a misspelt option is read as the default.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from precondition_networks import classification, network, one_layer, relative, uneven
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import layer_rows
from bnp_analysis.precondition import BNPBlock, diagonal_preconditioner, kfac_preconditioner

LABELS = torch.arange(12) % 3


def entropy_risk(model: nn.Module, x: Any, **options: Any) -> bnp.EmpiricalRisk:
    return bnp.EmpiricalRisk(model.double(), nn.functional.cross_entropy, (x, LABELS), **options)


def untouched(P: bnp.linalg.Preconditioner, positions: Tensor) -> bool:
    dense = P.to_dense()
    eye = torch.eye(P.dim, dtype=P.dtype)
    return torch.equal(dense[positions], eye[positions]) and torch.equal(dense[:, positions], eye[:, positions])


def check_named(risk: bnp.EmpiricalRisk, expected: dict[str, str]) -> bnp.linalg.Preconditioner:
    """`uncovered` names exactly these parameters, with these reasons in it, and `P` is the identity there."""
    P = bnp.bnp_preconditioner(risk)
    assert sorted(P.uncovered) == sorted(expected)
    for name, why in expected.items():
        assert why in P.uncovered[name]
        assert untouched(P, risk.space.indices(name))
    assert kfac_preconditioner(risk).uncovered == P.uncovered
    return P


def test_every_parameter_is_covered_or_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.PReLU(), nn.LayerNorm(6), nn.Linear(6, 3))
    risk = entropy_risk(model, uneven((12, 4), 1))
    kinds = {"1": "BatchNorm1d", "2": "PReLU", "3": "LayerNorm"}
    names = ["1.weight", "1.bias", "2.weight", "3.weight", "3.bias"]
    said = {n: f"also=[{kinds[n[0]]}]" for n in names} | {"2.weight": "PReLU is not a covered layer type"}
    P = check_named(risk, said)
    assert list(P.q) == ["0", "4"]


def test_a_layer_whose_forward_never_runs() -> None:
    """The output projection of attention gets a gradient though its forward never runs."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)
            self.spare = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.attention(x, x, x, need_weights=False)[0].mean(dim=1))

    risk = entropy_risk(Attention(), uneven((12, 5, 4), 1, axis=2))
    check_named(
        risk,
        {
            "attention.in_proj_weight": "MultiheadAttention is not a covered layer type",
            "attention.in_proj_bias": "MultiheadAttention is not a covered layer type",
            "attention.out_proj.weight": "never runs",
            "attention.out_proj.bias": "",
            "spare.weight": "never runs",
            "spare.bias": "",
        },
    )
    assert float(risk.gradient[risk.space.indices("attention.out_proj.weight")].abs().max()) > 0


def test_tied_weights_are_left_alone() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))

    risk = entropy_risk(Tied(), uneven((12, 4), 1))
    check_named(risk, {"first.weight": "tied: shared by first, second", "first.bias": "", "second.bias": ""})


def test_a_tied_bias_leaves_the_weights_their_form_without_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)
            self.second.bias = self.first.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    risk = entropy_risk(Tied(), uneven((12, 4), 1))
    P = check_named(risk, {"first.bias": "tied"})
    rows = layer_rows(risk)["first"][:, 0]
    M = rows.var(dim=0, correction=0).diag() + torch.outer(rows.mean(dim=0), rows.mean(dim=0))
    weights = P.block(("first", 1)).to_dense()[:4, :4]
    assert relative(weights @ weights.T, torch.linalg.inv(M)) < 1e-10


def test_a_reused_layer_sees_the_rows_of_every_use() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.inner(torch.tanh(self.inner(x))))

    model = Reused().double()
    x = uneven((12, 4), 1)
    P = bnp.bnp_preconditioner(entropy_risk(model, x))
    rows = torch.cat([x, torch.tanh(model.inner(x)).detach()])
    expected = BNPBlock(rows.mean(0)[None], rows.var(0, correction=0)[None], 1.0, units=4, bias=True)
    assert relative(P.block("inner").to_dense(), expected.to_dense()) < 1e-12


def test_dict_batches_and_arguments_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, *, inputs: Tensor) -> Tensor:
            return self.fc(input=inputs)

    model, x = Named().double(), uneven((12, 4), 1)
    P = bnp.bnp_preconditioner(entropy_risk(model, {"inputs": x}))
    assert relative(P.to_dense(), bnp.bnp_preconditioner(entropy_risk(model.fc, x)).to_dense()) < 1e-14


def test_a_part_of_the_parameters_and_another_point() -> None:
    risk = classification("dense")
    part = risk.restrict(["2.weight", "2.bias"])
    whole = bnp.bnp_preconditioner(risk)
    assert torch.equal(bnp.bnp_preconditioner(part).to_dense(), whole.block("2").to_dense())
    moved = bnp.bnp_preconditioner(risk.at(2 * risk.theta))
    assert torch.equal(moved.block("0").to_dense(), whole.block("0").to_dense()), "the data did not move"
    assert relative(moved.block("2").to_dense(), whole.block("2").to_dense()) > 0.1


@pytest.mark.parametrize("kind", ["dense", "groups"])
def test_a_measurement_changes_nothing(kind: str) -> None:
    """Parameters, gradients, flags and random states are bit-identical before and after."""
    model, x, y = network(kind)
    nn.functional.cross_entropy(model(x), y).backward()
    before = copy.deepcopy(model.state_dict()), [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    inputs = x.clone()
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    theta = risk.theta.clone()
    for build in (bnp.bnp_preconditioner, diagonal_preconditioner, kfac_preconditioner):
        build(risk)
    bnp.bnp_preconditioner(risk, q="measured", statistics="patch")
    assert all(torch.equal(t, before[0][n]) for n, t in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before[1], strict=True))
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(x, inputs)
    assert torch.equal(risk.theta, theta)
    assert not any(module._forward_hooks for _, module in risk.modules())


def test_running_statistics_of_batchnorm_do_not_move() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)).double()
    risk = entropy_risk(model, uneven((12, 4), 1))
    one, two = (bnp.bnp_preconditioner(risk).to_dense() for _ in range(2))
    kfac_preconditioner(risk)
    diagonal_preconditioner(risk)
    assert torch.equal(one, two)
    assert torch.equal(one, bnp.bnp_preconditioner(risk).to_dense())
    assert int(dict(risk.modules())["1"].num_batches_tracked) == 0


def test_the_preconditioner_records_what_it_was_made_with() -> None:
    P = bnp.bnp_preconditioner(classification("groups"), eps1=1e-2, eps2=1e-4, q=3.0, statistics="patch")
    options = {"eps1": 1e-2, "eps2": 1e-4, "q": 3.0, "statistics": "patch", "bias_free": "rank-one"}
    assert P.settings == options | {"output_scale": False}
    assert set(P.q.values()) == {3.0}


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps1": -1e-3}, "eps1 must be at least 0"),
        ({"eps2": math.nan}, "eps2 must be a real number"),
        ({"eps1": math.inf}, "must be finite and not negative"),
        ({"q": "autp"}, "q must be 'auto'"),
        ({"q": 0.0}, "q must be 'auto'"),
        ({"q": True}, "q must be 'auto'"),
        ({"q": math.nan}, "q must be 'auto'"),
        ({"statistics": "pixel"}, "must be 'channel' or 'patch'"),
        ({"bias_free": "rank one"}, "bias_free must be one of rank-one, diagonal"),
        ({"block": "1"}, "no parameter belongs to '1'"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        bnp.bnp_preconditioner(one_layer(uneven((9, 4), 1)), **options)


@pytest.mark.parametrize(
    ("mean", "variance", "q", "message"),
    [
        (torch.zeros(1, 2), torch.zeros(1, 2), 1.0, "must be positive"),
        (torch.zeros(1, 2), torch.tensor([[1.0, math.nan]]), 1.0, "must be positive"),
        (torch.tensor([[math.inf, 0.0]]), torch.ones(1, 2), 1.0, "the means finite"),
        (torch.zeros(1, 2), torch.ones(1, 2), -1.0, "q must be positive"),
        (torch.zeros(2), torch.ones(2), 1.0, r"must both be \(groups, m\)"),
        (torch.zeros(2, 2), torch.ones(2, 2), 1.0, "groups dividing 3 units"),
    ],
)
def test_a_block_refuses_moments_that_are_none(mean: Tensor, variance: Tensor, q: float, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        BNPBlock(mean, variance, q, units=3, bias=True)


def test_a_block_that_leaves_float32_is_refused() -> None:
    mean, variance = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 1e-200, dtype=torch.float64)
    assert BNPBlock(mean, variance, 1.0, units=1, bias=True).dtype == torch.float64
    with pytest.raises(InvalidInputError, match="zero or infinite"):
        BNPBlock(mean, variance, 1.0, units=1, bias=True, dtype=torch.float32)


def test_units_that_a_layer_lacks_are_refused() -> None:
    block = BNPBlock(torch.zeros(1, 3), torch.ones(1, 3), 1.0, units=4, bias=True)
    assert block.unit(3).dim == 4
    for i in (4, -1):
        with pytest.raises(InvalidInputError, match=f"the layer has units 0..3, not {i}"):
            block.unit(i)


def test_blocks_know_their_units() -> None:
    P = BNPBlock(torch.zeros(1, 2), torch.ones(1, 2), 1.0, units=3, bias=True)
    for unit in (-1, 3):
        with pytest.raises(InvalidInputError, match=rf"^the layer has units 0\.\.2, not {unit}$"):
            P.unit(unit)
    assert P.across(3) is not None
    assert P.across(6) is None  # of another layer
    assert BNPBlock(torch.zeros(3, 2), torch.ones(3, 2), 1.0, units=3, bias=True).across(3) is None  # groups differ
