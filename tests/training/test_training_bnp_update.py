"""`.grad` after `step()` is `P P^T .grad`, with the `P` that is measured, and optimizers then move in `z`.

Bugs that only these tests catch: a fast in-place formula that is not the block's direction for some kind of layer
(groups, padding, no bias, patch statistics), statistics or rows that differ from those of `bnp_preconditioner` over
the same batch, `q` for `q^2`, an optimizer under BNP that is not the same optimizer on `w = P z`, and the missing
equality with a network that normalizes each layer's input.
"""

from __future__ import annotations

import copy

import pytest
import torch
from bnp_loops import KINDS, backward, gradient, loss_of, network, parameters, relative, stepped
from torch import Tensor, nn
from torch.func import functional_call

import bnp_analysis as bnp
from bnp_analysis.models import mlp
from bnp_analysis.training.bnp import BNP

FORMS = [(True, "rank-one"), (False, "rank-one"), (False, "diagonal")]
STATISTICS = ("channel", "patch")
# Each geometry once, with forms and statistics in turn; all of them where there are groups.
CASES = [(kind, *FORMS[i % 3], STATISTICS[i // 3 % 2]) for i, kind in enumerate(KINDS)]
CASES = sorted({*CASES, *(("groups", *form, which) for form in FORMS for which in STATISTICS)})


@pytest.mark.parametrize(("kind", "bias", "bias_free", "statistics"), CASES)
def test_the_gradient_becomes_the_dense_product(kind: str, bias: bool, bias_free: str, statistics: str) -> None:
    model, x, y = network(kind, bias=bias)
    pre = BNP(model, statistics=statistics, bias_free=bias_free)
    for k in range(3):
        before, after = stepped(model, x + k, y, pre)
    P = pre.preconditioner().to_dense()
    assert relative(after, P @ (P.T @ before)) < 1e-12


@pytest.mark.parametrize(("kind", "bias", "bias_free", "statistics"), CASES)
def test_after_one_step_it_is_the_preconditioner_of_that_batch(
    kind: str, bias: bool, bias_free: str, statistics: str
) -> None:
    """The moments of `bnp_preconditioner` come another way, from a snapshot of the model."""
    model, x, y = network(kind, bias=bias)
    damping = (1e-2, 1e-4) if statistics == "patch" else (0.0, 0.0)
    options = {"eps1": damping[0], "eps2": damping[1], "statistics": statistics, "bias_free": bias_free}
    _, after = stepped(model, x, y, BNP(model, **options))
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    expected = bnp.bnp_preconditioner(risk, **options).direction(risk.gradient)
    assert relative(after, expected) < 1e-11


@pytest.mark.parametrize("rows", [2, 60])
def test_the_published_formula(rows: int) -> None:
    """T3 written out, with `R` fewer and more than `m`."""
    model, x, y = network(rows=rows)
    layer = model[0]
    pre = BNP.paper(model, rho=0.9)
    model.zero_grad()
    backward(model, x, y)
    Gw, Gb = layer.weight.grad.clone(), layer.bias.grad.clone()
    mu, var = 0.1 * x.mean(0), 0.9 + 0.1 * x.var(0, correction=0)
    s2 = var + 1e-2 * var.max() + 1e-4
    q2 = max(5 / rows, 1)
    new_w = (Gw - Gb[:, None] * mu) / s2 / q2
    pre.step()
    assert relative(layer.weight.grad, new_w) < 1e-12
    assert relative(layer.bias.grad, Gb / q2 - new_w @ mu) < 1e-12


def test_undamped_it_is_the_inverse_second_moment_with_a_diagonal_covariance() -> None:
    """`P P^T = [[1, mu^T], [mu, mu mu^T + diag sigma^2]]^-1` (T3); with no bias `(diag sigma^2 + mu mu^T)^-1` (T5)."""
    for bias in (True, False):
        model, x, y = network(bias=bias, rows=40)
        layer = model[0]
        pre = BNP(model, eps1=0, eps2=0, q=1)
        model.zero_grad()
        backward(model, x, y)
        g = layer.weight.grad.clone()
        g = torch.cat([layer.bias.grad[:, None], g], 1) if bias else g
        mu, var = x.mean(0), x.var(0, correction=0)
        mean = torch.cat([torch.ones(1, dtype=mu.dtype), mu]) if bias else mu
        M = torch.outer(mean, mean) + torch.diag(torch.cat([torch.zeros(int(bias), dtype=mu.dtype), var]))
        pre.step()
        after = torch.cat([layer.bias.grad[:, None], layer.weight.grad], 1) if bias else layer.weight.grad
        assert relative(after, g @ torch.linalg.inv(M)) < 1e-11


def test_the_diagonal_form_without_bias() -> None:
    """T5 (i): `P P^T = diag(1/rms^2)/q^2`, `q^2 = max(m/R, 1) + sum mu^2/rms^2`."""
    model, x, y = network(bias=False, rows=40)
    pre = BNP(model, eps1=0, eps2=0, bias_free="diagonal")
    model.zero_grad()
    backward(model, x, y)
    g = model[0].weight.grad.clone()
    second = x.square().mean(0)
    q2 = 1 + float((x.mean(0).square() / second).sum())
    pre.step()
    assert relative(model[0].weight.grad, g / second / q2) < 1e-12


@pytest.mark.parametrize("q", [1.0, 3.0])
def test_a_number_for_q(q: float) -> None:
    model, x, y = network(rows=3)
    twin = copy.deepcopy(model)
    _, after = stepped(model, x, y, BNP(model, q=q))
    _, off = stepped(twin, x, y, BNP(twin, q=1))
    assert relative(after, off / q**2) < 1e-14


@pytest.mark.parametrize(
    ("kind", "bias", "bias_free"), [("dense", *FORMS[2]), ("padding", *FORMS[1]), ("groups", *FORMS[0])]
)
def test_measured_q_is_the_norm_of_the_normalized_rows(kind: str, bias: bool, bias_free: str) -> None:
    """T8: with the moments of one batch it is `q="measured"` of `bnp_preconditioner`, once power steps converge."""
    model, x, y = network(kind, bias=bias)
    pre = BNP(model, q="measured", rho=0, bias_free=bias_free)
    for _ in range(30):
        stepped(model, x, y, pre)
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    P = bnp.bnp_preconditioner(risk, q="measured", eps1=1e-2, eps2=1e-4, bias_free=bias_free)
    assert pre.preconditioner().q == pytest.approx(P.q, rel=1e-6)


def test_a_measured_q_stays_where_a_layer_saw_nothing() -> None:
    """A gradient is there, from elsewhere, but no rows to measure with."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = True
            self.a, self.b = nn.Linear(5, 3).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x) if self.both else self.a(x)

    model, (_, x, y) = Branches(), network()
    pre = BNP(model, q="measured", rho=0.5)
    backward(model, x, y)
    pre.step()
    before = {name: entry["q2"] for name, entry in pre.state_dict()["layers"].items()}
    model.both = False
    backward(model, 3 * x, y)
    model.b.weight.grad = torch.ones(3, 5, dtype=torch.float64)
    model.b.bias.grad = torch.ones(3, dtype=torch.float64)
    pre.step()
    after = {name: entry["q2"] for name, entry in pre.state_dict()["layers"].items()}
    assert after["b"] == before["b"]
    assert after["a"] != before["a"]


def in_z(model: nn.Module, P: Tensor, make: type[torch.optim.Optimizer], options: dict, x: Tensor, y: Tensor) -> Tensor:
    """The same optimizer on `L(P z)`, with autograd through `P`."""
    names, shapes = zip(*((n, p.shape) for n, p in model.named_parameters()), strict=True)
    z = torch.linalg.solve(P, parameters(model)).requires_grad_()
    optimizer = make([z], **options)
    for _ in range(20):
        optimizer.zero_grad()
        parts = (P @ z).split([s.numel() for s in shapes])
        weights = {n: part.view(s) for n, part, s in zip(names, parts, shapes, strict=True)}
        nn.functional.cross_entropy(functional_call(model, weights, (x,)), y).backward()
        optimizer.step()
    return (P @ z).detach()


@pytest.mark.parametrize(("kind", "bias", "nesterov"), [(kind, i % 2 == 0, i % 2 == 1) for i, kind in enumerate(KINDS)])
def test_an_optimizer_under_bnp_is_that_optimizer_on_the_network_in_z(kind: str, bias: bool, nesterov: bool) -> None:
    """T2 with fixed statistics."""
    options = {"lr": 0.05, "momentum": 0.9, "nesterov": nesterov}
    model, x, y = network(kind, bias=bias)
    twin = copy.deepcopy(model)
    pre = BNP(model)
    stepped(model, x, y, pre)
    fixed = pre.state_dict()
    P = pre.preconditioner().to_dense()
    optimizer = torch.optim.SGD(model.parameters(), **options)
    for _ in range(20):
        # Statistics of deeper layers move with the weights; they are put back before they are used.
        pre.load_state_dict(fixed)
        model.zero_grad()
        backward(model, x, y)
        frozen_statistics(pre)
        pre.step()
        optimizer.step()
    assert relative(parameters(model), in_z(twin, P, torch.optim.SGD, options, x, y)) < 1e-10


def frozen_statistics(pre: BNP) -> None:
    """Make what the layers saw in this step equal to the running statistics, so that committing changes nothing."""
    for i, seen in pre._pending.items():
        mean, variance = pre._running.of(i)
        pre._pending[i] = seen._replace(mean=mean.clone(), variance=variance.clone())


def test_bnp_is_the_network_that_normalizes_the_inputs_of_its_layers() -> None:
    """T9: statistics fixed, `q = 1`, no affine part: `w^ = P w^_BN` all along."""
    normalized = mlp(
        [5, 4, 3], activation="tanh", norm="batch", norm_at="input", norm_affine=False, dtype=torch.float64
    )
    _, x, y = network(rows=30)
    for _ in range(200):
        normalized(x)
    for module in normalized:
        if isinstance(module, nn.BatchNorm1d):
            module.running_var *= 29 / 30  # torch keeps the unbiased variance
    normalized.eval()
    plain = mlp([5, 4, 3], activation="tanh", dtype=torch.float64)

    def move() -> Tensor:
        for k in ("1", "2"):
            norm, source = normalized.get_submodule(f"norm{k}"), normalized.get_submodule(f"fc{k}")
            scale = (norm.running_var + norm.eps).rsqrt()
            weight = source.weight.detach() * scale
            yield_to = plain.get_submodule(f"fc{k}")
            yield_to.weight.data = weight
            yield_to.bias.data = source.bias.detach() - weight @ norm.running_mean
        return parameters(plain)

    move()
    assert relative(plain(x), normalized(x)) < 1e-12
    pre = BNP(plain, q=1, eps1=0, eps2=1e-5)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (plain, normalized)]
    norms = [normalized.get_submodule("norm1"), normalized.get_submodule("norm2")]
    for _ in range(25):
        for model, optimizer in zip((plain, normalized), optimizers, strict=True):
            optimizer.zero_grad()
            backward(model, x, y)
            if model is plain:
                for i, norm in enumerate(norms):
                    seen = pre._pending[i]
                    pre._pending[i] = seen._replace(mean=norm.running_mean, variance=norm.running_var)
                pre.step()
            optimizer.step()
    trained = parameters(plain).clone()
    assert relative(trained, move()) < 1e-10
    assert float(loss_of(plain, x, y).detach()) < 0.95


def test_what_trains_is_what_is_measured() -> None:
    model, x, y = network()
    pre = BNP(model)
    stepped(model, x, y, pre)
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    A = bnp.gauss_newton(risk)
    before = bnp.condition_number(A, null=bnp.null_directions(risk))
    after = bnp.condition_number(A, preconditioner=pre.preconditioner(), null=bnp.null_directions(risk))
    assert after.value < before.value
    single = pre.preconditioner(
        bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y), dtype=torch.float32).space
    )
    assert single.dtype == torch.float32
    assert pre.preconditioner().settings["eps1"] == 1e-2


@pytest.mark.parametrize(("kind", "bias"), [("dense", False), ("groups", True)])
def test_gradients_may_lie_in_memory_as_they_like(kind: str, bias: bool) -> None:
    """Every second entry of something, the first index running fastest: values alone count."""
    model, x, y = network(kind, bias=bias)
    twin = copy.deepcopy(model)
    expected = stepped(model, x, y, BNP(model))[1]
    pre = BNP(twin)
    backward(twin, x, y)
    for p in twin.parameters():
        assert p.grad is not None
        backwards = list(reversed(range(p.ndim)))
        p.grad = torch.stack([p.grad.permute(backwards)] * 2, dim=-1)[..., 0].permute(backwards)
        assert not p.grad.is_contiguous()
    pre.step()
    torch.testing.assert_close(gradient(twin), expected, rtol=1e-13, atol=1e-15)


def test_gradients_of_other_layers_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    _, x, y = network()
    pre = BNP(model, exclude="2")
    before, after = stepped(model, x, y, pre)
    n = sum(p.numel() for p in model[0].parameters())
    assert torch.equal(before[n:], after[n:])
    assert not torch.equal(before[:n], after[:n])
    assert pre.covered == ("0",)
    assert set(pre.uncovered) == {"1.weight", "1.bias", "2.weight", "2.bias"}
    assert pre.uncovered["2.weight"] == pre.uncovered["2.bias"] == "left out by include= or exclude="
    assert gradient(model).numel() == before.numel()
