"""Diagonal preconditioners are what they are called after: Jacobi's, and the step matrices of torch's optimizers.

Bugs that only these tests catch: a bias correction that is forgotten or off by one step, `eps` inside the root,
`max_exp_avg_sq` or the centring of RMSprop ignored, a parameter given the state of another one, a diagonal of the
Gauss-Newton matrix that weighs uneven batches alike or is only an estimate.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from precondition_networks import classification, network
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.precondition import DiagonalPreconditioner, diagonal_preconditioner
from bnp_analysis.precondition.base import BlockDiagonal

Optimizers = dict[str, Callable[[Any], torch.optim.Optimizer]]

# Without momentum an optimizer's step is its step matrix times the gradient.
OPTIMIZERS: Optimizers = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.0, 0.9), eps=1e-2),
    "adam, few steps": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.0, 0.999)),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.0, 0.5), eps=1e-3, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.0, 0.9), eps=1e-3, weight_decay=0.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, alpha=0.9, eps=1e-3),
    "centred rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, alpha=0.9, eps=1e-3, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, eps=1e-3, initial_accumulator_value=0.1),
    "adam, one tensor at a time": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.0, 0.9), foreach=False),
}


def trained(make: Callable[[Any], torch.optim.Optimizer], steps: int = 4) -> tuple[Any, ...]:
    """A model after some steps, its optimizer, data, and the last gradient and step."""
    model, x, y = network("dense")
    optimizer = make(model.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
    gradient = {n: p.grad for n, p in model.named_parameters()}
    step = {n: p.detach() - before[n] for n, p in model.named_parameters()}
    return model, optimizer, (x, y), gradient, step


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_p_p_transposed_is_the_step_matrix_of_the_optimizer(kind: str) -> None:
    model, optimizer, data, gradient, step = trained(OPTIMIZERS[kind])
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, data)
    P = diagonal_preconditioner(risk, optimizer, model=model)
    torch.testing.assert_close(
        -1e-2 * P.direction(risk.space.flatten(gradient)), risk.space.flatten(step), rtol=1e-9, atol=1e-15
    )
    assert P.uncovered == {}
    assert P.zero_entries == {}
    assert P.settings["source"] == type(optimizer).__name__


def test_groups_have_their_own_eps_and_betas() -> None:
    def make(parameters: Any) -> torch.optim.Optimizer:
        first, *rest = parameters
        groups = [{"params": [first], "eps": 0.1, "betas": (0.0, 0.5)}, {"params": rest}]
        return torch.optim.Adam(groups, lr=1e-2, betas=(0.0, 0.99))

    model, optimizer, data, gradient, step = trained(make)
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, data)
    P = diagonal_preconditioner(risk, optimizer, model=model)
    found = -1e-2 * P.direction(risk.space.flatten(gradient))
    torch.testing.assert_close(found, risk.space.flatten(step), rtol=1e-9, atol=1e-15)


def test_parameters_are_matched_by_identity_not_by_order() -> None:
    model, x, y = network("groups")
    reverse = torch.optim.Adam(list(model.parameters())[::-1])
    nn.functional.cross_entropy(model(x), y).backward()
    reverse.step()
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    P = diagonal_preconditioner(risk, reverse, model=model)
    g = risk.space.flatten({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(P.scales, (g.abs() + 1e-8).rsqrt())
    wrapped = nn.DataParallel(model) if not torch.cuda.is_available() else model
    again = diagonal_preconditioner(risk, reverse, model=wrapped)
    assert torch.equal(again.scales, P.scales)


def test_an_optimizer_of_named_parameters_needs_no_model() -> None:
    model, x, y = network("dense")
    optimizer = torch.optim.Adam(list(model.named_parameters()))
    if "param_names" not in optimizer.param_groups[0]:
        pytest.skip("this torch does not keep names")
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    named = diagonal_preconditioner(risk, optimizer)
    assert torch.equal(named.scales, diagonal_preconditioner(risk, optimizer, model=model).scales)


def test_parameters_that_were_not_stepped_are_left_alone_and_named() -> None:
    model, x, y = network("dense")
    optimizer = torch.optim.Adam([model[0].weight, model[2].bias])
    model[2].bias.requires_grad_(False)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    model[2].bias.requires_grad_(True)
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    P = diagonal_preconditioner(risk, optimizer, model=model)
    assert P.uncovered == {
        "0.bias": "not among the optimizer's parameters",
        "2.weight": "not among the optimizer's parameters",
        "2.bias": "the optimizer has not stepped it",
    }
    tensors = risk.space.unflatten(P.scales)
    assert all(bool((tensors[n] == 1).all()) for n in P.uncovered)
    assert not bool((tensors["0.weight"] == 1).any())


def test_no_history_and_no_eps_gives_scale_one_and_is_counted() -> None:
    model, x, y = network("dense")
    x[:, 2] = 0.0
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    # Adagrad: torch's step is NaN there (0/0), so the risk is that of the point before it.
    optimizer = torch.optim.Adagrad(model.parameters(), eps=0.0)
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    P = diagonal_preconditioner(risk, optimizer, model=model)
    assert P.zero_entries == {"0.weight": 4}
    assert bool((risk.space.unflatten(P.scales)["0.weight"][:, 2] == 1).all())


def test_optimizers_that_cannot_be_read_are_refused() -> None:
    model, x, y = network("dense")
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    with pytest.raises(InvalidInputError, match="SGD has no diagonal step matrix"):
        diagonal_preconditioner(risk, torch.optim.SGD(model.parameters()), model=model)
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(InvalidInputError, match="it has made no step"):
        diagonal_preconditioner(risk, adam, model=model)
    with pytest.raises(InvalidInputError, match="have no names: give model="):
        diagonal_preconditioner(risk, adam)
    with pytest.raises(InvalidInputError, match="none of the 4 parameters of the optimizer belongs"):
        diagonal_preconditioner(risk, adam, model=copy.deepcopy(model))
    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    with pytest.raises(InvalidInputError, match="different models"):
        diagonal_preconditioner(risk, torch.optim.Adam(other.parameters()), model=other)


# Jacobi


@pytest.mark.parametrize("kind", ["dense", "sequence", "groups", "1d"])
def test_jacobi_is_the_exact_diagonal_of_the_gauss_newton_matrix(kind: str) -> None:
    risk = classification(kind)
    A = bnp.gauss_newton(risk).to_dense()
    P = diagonal_preconditioner(risk)
    torch.testing.assert_close(P.scales, A.diagonal().rsqrt(), rtol=1e-10, atol=0)
    diagonal = bnp.linalg.congruence(bnp.gauss_newton(risk), P).to_dense().diagonal()
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal))


def losses() -> dict[str, tuple[nn.Module, Callable[..., Tensor], tuple[Tensor, Any]]]:
    g = torch.Generator().manual_seed(3)
    x, tokens = (torch.randn(9, *shape, dtype=torch.float64, generator=g) for shape in ((4,), (3, 4)))
    coupled = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
    per_token = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    flat = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), nn.Flatten(0, 1)).double()

    def tokens_loss(output: Tensor, y: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.reshape(-1, 2), y.reshape(-1))

    y = torch.arange(27).view(9, 3) % 2
    return {
        "squared": (nn.Linear(4, 2).double(), nn.functional.mse_loss, (x, x[:, :2])),
        "batch coupled": (coupled, nn.functional.cross_entropy, (x, y[:, 0])),
        "tokens": (per_token, tokens_loss, (tokens, y)),
        "flattened tokens": (flat, tokens_loss, (tokens, y)),
    }


@pytest.mark.parametrize("case", losses())
def test_jacobi_for_other_losses_and_shapes(case: str) -> None:
    model, loss, data = losses()[case]
    risk = bnp.EmpiricalRisk(model, loss, data)
    diagonal = bnp.gauss_newton(risk).to_dense().diagonal()
    P = diagonal_preconditioner(risk)
    # Bias in front of BatchNorm: no curvature, zero to rounding.
    kept = diagonal > 1e-20
    torch.testing.assert_close(P.scales[kept], diagonal[kept].rsqrt(), rtol=1e-9, atol=0)


def test_uneven_batches_and_counts_weigh_as_in_the_risk() -> None:
    model, x, y = network("dense")
    split = [(x[:1], y[:1]), (x[1:11], y[1:11]), (x[11:], y[11:])]
    whole = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    parts = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, split)
    torch.testing.assert_close(
        diagonal_preconditioner(parts).scales, diagonal_preconditioner(whole).scales, rtol=1e-12, atol=0
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=5, shuffle=True)
    shuffled = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, loader)
    torch.testing.assert_close(
        diagonal_preconditioner(shuffled).scales, diagonal_preconditioner(whole).scales, rtol=1e-12, atol=0
    )


def test_dead_entries_get_scale_one_and_are_counted_and_damping_reaches_them() -> None:
    model, x, y = network("dense")
    x[:, 1] = 0.0
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    P = diagonal_preconditioner(risk)
    assert P.zero_entries == {"0.weight": 4}
    assert bool((risk.space.unflatten(P.scales)["0.weight"][:, 1] == 1).all())
    damped = diagonal_preconditioner(risk, damping=0.5)
    diagonal = bnp.gauss_newton(risk).to_dense().diagonal()
    torch.testing.assert_close(damped.scales, (diagonal + 0.5 * diagonal.max()).rsqrt(), rtol=1e-12, atol=0)
    assert damped.zero_entries == {}
    assert damped.settings == {"source": "gauss_newton", "damping": 0.5}


def test_jacobi_does_not_depend_on_the_callers_grad_mode() -> None:
    risk = classification("dense")
    expected = diagonal_preconditioner(risk).scales
    with torch.no_grad():
        assert torch.equal(diagonal_preconditioner(risk).scales, expected)


def test_given_scales_are_taken_as_they_are() -> None:
    risk = classification("dense")
    scales = torch.linspace(1, 2, risk.space.dim)
    P = diagonal_preconditioner(risk, scales)
    assert torch.equal(P.to_dense(), torch.diag(scales.double()))
    assert torch.equal(diagonal_preconditioner(risk, scales, block="2").scales, scales[-15:].double())
    scales.zero_()
    assert bool((P.scales > 0).all()), "a copy"


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (torch.ones(3), {}, r"must have shape \(39,\)"),
        (torch.zeros(39), {}, "vector of positive finite numbers"),
        (torch.full((39,), float("nan")), {}, "vector of positive finite numbers"),
        (torch.full((39,), float("inf")), {}, "vector of positive finite numbers"),
        (torch.ones(39), {"damping": 0.1}, "damping is Jacobi's"),
        ("adam", {}, "source must be 'gauss_newton'"),
        (None, {}, "source must be 'gauss_newton'"),
        ("gauss_newton", {"damping": -1.0}, "damping must be at least 0"),
        ("gauss_newton", {"damping": float("nan")}, "damping must be a real number"),
        ("gauss_newton", {"damping": float("inf")}, "damping must be finite and not negative"),
    ],
)
def test_bad_sources_are_refused(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        diagonal_preconditioner(classification("dense"), source, **options)


def test_a_loss_without_a_factor_is_refused() -> None:
    model, x, y = network("dense")
    risk = bnp.EmpiricalRisk(model, lambda o, t: -nn.functional.cross_entropy(o, t), (x, y))
    with pytest.raises(InvalidInputError, match="not convex in the outputs"):
        diagonal_preconditioner(risk)


def test_blocks_need_names() -> None:
    with pytest.raises(InvalidInputError, match="was built without a parameter space; it has no layers"):
        DiagonalPreconditioner(torch.ones(3)).block("0")


def test_parts_that_meet_nothing_are_the_identity() -> None:
    inner = DiagonalPreconditioner(torch.tensor([2.0, 3.0]))
    P = BlockDiagonal(4, {"a": (torch.arange(2), inner)}, torch.float32, torch.device("cpu"))
    rest, own = P.part(torch.tensor([2, 3])), P.part(torch.tensor([0, 1]))
    assert rest is not None
    assert torch.equal(rest.to_dense(), torch.eye(2))
    assert own is inner
    assert P.part(torch.tensor([1, 2])) is None
