"""Networks that differentiate inside `forward`: physics losses, forces, ensembles, inner steps.

Only these tests would notice: a forward pass without gradients where the model wants them, operations of `torch.func`
that escape from their transforms, a convolution whose inner derivative is taken for a constant, unit blocks of weights
that act beside their own product, theorems called false where their hypothesis fails.
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import pytest
import torch
from curvature_reference import Problem, numbers, relative, spread
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jvp, stack_module_state, vjp, vmap
from torch.func import hessian as second
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.network import coverage


class Inside(nn.Module):
    """`how` makes the output from a network and its input."""

    def __init__(self, how: Callable[[nn.Module, Tensor], Tensor], net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)) if net is None else net
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self.net, x)


def residual(net: nn.Module, x: Tensor) -> Tensor:
    x.requires_grad_()
    return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0]


def guarded(net: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = net(x)
        return torch.cat([u, torch.autograd.grad(u.sum(), x, create_graph=True)[0]], dim=1)


def laplacian(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(lambda z: torch.trace(second(lambda q: net(q).squeeze())(z)))(x).unsqueeze(1)


def transport(net: nn.Module, x: Tensor) -> Tensor:
    return jvp(net, (x,), (torch.ones_like(x),))[1]


def jacobians(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(jacfwd(net))(x).flatten(1)


def chances(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(lambda z: torch.softmax(torch.cat([net(z), net(-z)]), 0).log())(x)


def dual(net: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x)))).tangent  # type: ignore[no-any-return]


def twice(net: nn.Module, x: Tensor) -> Tensor:
    """The Laplacian by forward derivatives of forward derivatives."""
    found = []
    for e in torch.eye(x.shape[1], dtype=x.dtype):
        along = e.expand_as(x)
        found.append(jvp(lambda q, v=along: jvp(net, (q,), (v,))[1], (x,), (along,))[1])
    return sum(found)  # type: ignore[return-value]


def pulled_back(net: nn.Module, x: Tensor) -> Tensor:
    """`vjp` is over when what it gave is called: tensors that it wrapped are left behind."""
    u, back = vjp(net, x)
    return back(torch.ones_like(u))[0]  # type: ignore[no-any-return]


def left_in_grad(net: nn.Module, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        net(x).sum().backward(inputs=[x], create_graph=True)
        assert x.grad is not None
        return x.grad


def force(net: nn.Module, x: Tensor) -> Tensor:
    x = x.unsqueeze(1).requires_grad_()
    return -torch.autograd.grad(net(x).square().sum(), x, create_graph=True)[0].squeeze(1)


def forces(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(grad(lambda z: net(z[None, None]).square().sum()))(x)


def inner_step(net: nn.Module, x: Tensor) -> Tensor:
    p = dict(net.named_parameters())
    g = grad(lambda q: functional_call(net, q, (x,)).square().mean())(p)
    return functional_call(net, {name: t - 0.1 * g[name] for name, t in p.items()}, (x,))


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        members = [nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)) for _ in range(3)]
        stacked, _ = stack_module_state(members)
        self.names, self.base = list(stacked), [members[0]]
        self.stacked = nn.ParameterList(nn.Parameter(t.detach()) for t in stacked.values())
        self.head = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        def member(*tensors: Tensor) -> Tensor:
            return functional_call(self.base[0], dict(zip(self.names, tensors, strict=True)), (x,))

        return self.head(vmap(member)(*self.stacked).mean(dim=0))


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv1d(2, 1, 3), nn.Tanh(), nn.Flatten())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "autograd.grad": lambda: Inside(residual),
    "enable_grad": lambda: Inside(guarded),
    "laplacian": lambda: Inside(laplacian),
    "jvp": lambda: Inside(transport),
    "jvp twice": lambda: Inside(twice),
    "vjp": lambda: Inside(pulled_back),
    ".grad": lambda: Inside(left_in_grad),
    "jacfwd": lambda: Inside(jacobians),
    "softmax": lambda: Inside(chances),
    "dual numbers": lambda: Inside(dual),
    "forces": lambda: Inside(force, convolutions()),
    "forces, torch.func": lambda: Inside(forces, convolutions()),
    "inner step": lambda: Inside(inner_step),
    "ensemble": Ensemble,
}


def problem_of(name: str) -> Problem:
    model = spread(MODELS[name]())
    x = numbers(9, 5 if name.startswith("forces") else 2)
    y = numbers(*model(x.clone().requires_grad_()).shape, seed=1)
    return Problem(model, F.mse_loss, [(x, y)])


def truth(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient, Hessian and Gauss-Newton matrix by double backward of torch."""
    (x, y), model = problem.batches[0], problem.model
    p = dict(model.named_parameters())
    out = functional_call(model, p, (x.clone(),))

    def flat(scalar: Tensor) -> Tensor:
        found = torch.autograd.grad(
            scalar, list(p.values()), create_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([t.reshape(-1) for t in found])

    g = flat(F.mse_loss(out, y))
    H = torch.stack([flat(part).detach() if part.requires_grad else torch.zeros_like(g) for part in g])
    J = torch.stack([flat(part).detach() for part in out.reshape(-1)])
    return g.detach(), H, 2 * J.T @ J / y.numel()


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", MODELS)
def test_all_products_are_those_of_torch_alone(name: str) -> None:
    problem = problem_of(name)
    gradient, H, G = truth(problem)
    with torch.no_grad():
        risk = problem.risk()
    V = numbers(risk.space.dim, 3, seed=5)
    assert relative(risk.gradient, gradient) <= 1e-12
    for engine in ("retained", "recompute"):
        assert relative(bnp.hessian(risk, engine=engine) @ V, H @ V) <= 1e-11
    A, E = bnp.gauss_newton(risk), bnp.fisher(risk, "empirical")
    F_, R = A.factor.to_dense(), E.factor.to_dense()
    assert max(relative(A @ V, G @ V), relative(F_.T @ F_, G)) <= 1e-11
    assert relative(E @ V, R.T @ (R @ V)) <= 1e-11
    assert not risk.outputs.requires_grad
    assert not any(batch.x.requires_grad for batch in risk.batches)


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("name", ["enable_grad", "laplacian", "ensemble", "jvp twice"])
def test_preconditioners_tables_and_null_directions_work(name: str) -> None:
    """The null directions of the Gauss-Newton matrix are null, and a layer's number is that of its dense block."""
    problem = problem_of(name)
    risk, (_, _, G) = problem.risk(), truth(problem)
    null = bnp.null_directions(risk)
    assert float((G @ null.basis).norm()) <= 1e-12 * float(G.norm())
    assert null.not_analysed
    for P in (bnp.bnp_preconditioner(risk), bnp.kfac_preconditioner(risk, damping=1e-2)):
        other = bnp.condition_number(bnp.gauss_newton(risk), preconditioner=P)
        assert other.lower >= 1
    for row in bnp.layer_table(risk).records():
        assert row


@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_rows_of_maps_inside_of_maps_are_those_of_the_whole(axes: tuple[int, int]) -> None:
    """Whichever axes are mapped over, the outer one comes first."""
    x = numbers(4, 3, 5)
    outer, inner = axes

    def mapped(net: nn.Module, h: Tensor) -> Tensor:
        h = h if outer == 0 else h.transpose(0, 1)
        h = h if inner == 0 else h.transpose(1 - outer, 2)
        return vmap(vmap(net, in_dims=inner), in_dims=outer)(h).flatten(1)

    risk = Problem(spread(Inside(mapped, nn.Linear(5, 2))), F.mse_loss, [(x, numbers(4, 6))]).risk()
    assert torch.equal(bnp.network.layer_rows(risk)["net"].squeeze(1), x.flatten(0, 1))


def test_a_layer_whose_examples_are_mapped_over_another_axis_is_told() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return vmap(self.words, in_dims=1)(x.T).flatten(1)

    x = torch.arange(18).view(6, 3) % 5
    risk = Problem(spread(Words()), F.mse_loss, [(x, numbers(6, 6))]).risk()
    with pytest.raises(bnp.errors.InvalidInputError, match=r"vmap its examples along another axis.*have in_dims=0"):
        bnp.bnp_preconditioner(risk, also=[nn.Embedding], output_scale=True)


def test_rows_are_those_that_the_layer_multiplies() -> None:
    """One example at a time under vmap: the moments are those of the data and the first layer."""
    x, seen = numbers(9, 2), []
    for how in (laplacian, lambda net, x: net(x)):
        risk = Problem(spread(Inside(how)), F.mse_loss, [(x, numbers(9, 1))]).risk()
        seen.append(bnp.network.layer_moments(risk))
    for name in ("net.0", "net.2"):
        assert relative(seen[0][name].mean, seen[1][name].mean) <= 1e-12
        assert relative(seen[0][name].variance, seen[1][name].variance) <= 1e-12
        assert seen[0][name].rows == seen[1][name].rows == 9
    assert relative(seen[0]["net.0"].mean.reshape(-1), x.mean(dim=0)) <= 1e-12


@pytest.mark.parametrize("name", ["autograd.grad", "enable_grad", "jvp"])
def test_units_of_weights_that_act_twice_have_no_rows(name: str) -> None:
    """`s_j h_j h_j^T` is not their block: the derivative inside uses the weight once more."""
    risk = problem_of(name).risk()
    assert not unit_blocks(risk, coverage(risk))
    plain = Problem(spread(Inside(lambda net, x: net(x))), F.mse_loss, [(numbers(9, 2), numbers(9, 1))]).risk()
    assert set(unit_blocks(plain, coverage(plain))) == {"net.0", "net.2"}


@pytest.mark.usefixtures("small_statements")
@pytest.mark.parametrize("name", ["enable_grad", "forces"])
def test_no_theorem_is_called_false(name: str) -> None:
    found = bnp.check_theory(problem_of(name).risk(), only=["T1", "T2", "T3", "T7", "T9", "T11"])
    assert not found.failed
    assert "differentiates through the layer" in str(found.records())


def test_weights_of_an_inner_step_are_not_the_layers_own() -> None:
    with pytest.raises(bnp.errors.InvalidInputError, match=r"net.0.weight: its forward runs with other weights"):
        bnp.bnp_preconditioner(problem_of("inner step").risk())


@pytest.mark.parametrize("bias", [0.5, 9.0, 16.0])
@pytest.mark.parametrize("how", [laplacian, twice])
def test_saturated_second_derivatives_inside_claim_no_more_than_they_know(
    how: Callable[[nn.Module, Tensor], Tensor], bias: float
) -> None:
    """`d2/dx2 tanh(w x + b) = w^2 tanh''(z)`, its derivatives in `w` and `b` to 60 digits."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Tanh()).double()
    x = torch.tensor([[0.25], [-0.75], [1.0]], dtype=torch.float64)
    with torch.no_grad():
        net[0].weight.fill_(1.25)
        net[0].bias.fill_(bias)
    risk = Problem(Inside(how, net), F.mse_loss, [(x, torch.zeros_like(x))]).risk()
    with mpmath.workdps(60):
        rows = []
        for point in x.flatten().tolist():
            w = mpmath.mpf(1.25)
            t, s = mpmath.tanh(w * point + bias), mpmath.sech(w * point + bias) ** 2
            second_, third = -2 * t * s, 4 * t * t * s - 2 * s * s
            rows.append([2 * w * second_ + w * w * third * point, w * w * third])
        ends = mpmath.eigsy(mpmath.matrix(rows).T * mpmath.matrix(rows), eigvals_only=True)
        truth = max(ends) / min(ends)
    if how is twice and bias == 16.0:
        # torch's own forward derivatives, of which nothing is left.
        with pytest.raises(bnp.errors.InvalidInputError, match="keeps 2 digits"):
            bnp.condition_number(bnp.gauss_newton(risk))
        return
    found = bnp.condition_number(bnp.gauss_newton(risk))
    assert found.lower <= truth <= found.upper
    assert found.lower <= found.value <= found.upper
