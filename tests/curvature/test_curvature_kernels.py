"""Catches: kernels without a second derivative (fused attention, recurrent layers) that reach the forward pass,
compiled models that are differentiated as compiled, and kept or rebuilt graphs that give different products."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvature_reference import Problem, classes, numbers, relative, split, spread
from test_curvature_products import PROBLEMS
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError

# the same functions from sums and products alone


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mixed(x, x, x, need_weights=False)[0]).mean(dim=1))


class WrittenAttention(Attention):
    def forward(self, x: Tensor) -> Tensor:
        w, b = self.mixed.in_proj_weight, self.mixed.in_proj_bias
        heads = [part.unflatten(2, (2, 2)).transpose(1, 2) for part in (x @ w.T + b).chunk(3, dim=2)]
        q, k, v = heads
        scores = torch.einsum("nhid,nhjd->nhij", q, k) / 2**0.5
        weights = scores.exp() / scores.exp().sum(dim=3, keepdim=True)
        mixed = (weights @ v).transpose(1, 2).flatten(2) @ self.mixed.out_proj.weight.T + self.mixed.out_proj.bias
        return self.head(torch.tanh(mixed).mean(dim=1))


class Product(nn.Module):
    """`scaled_dot_product_attention` without a layer around it."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=2)
        return self.head(F.scaled_dot_product_attention(q, k, v)).mean(dim=1)


class WrittenProduct(Product):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=2)
        weights = (q @ k.transpose(1, 2) / 2).exp()
        return self.head(weights / weights.sum(dim=2, keepdim=True) @ v).mean(dim=1)


class Recurrent(nn.Module):
    def __init__(self, kind: type, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(4, 2, batch_first=True, **options)
        self.head = nn.Linear(4 if options.get("bidirectional") else 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class WrittenRecurrent(Recurrent):
    def forward(self, x: Tensor) -> Tensor:
        for layer in range(self.rnn.num_layers):
            sides = ["", "_reverse"] if self.rnn.bidirectional else [""]
            x = torch.cat([self.run(x, f"l{layer}{side}", bool(side)) for side in sides], dim=2)
        return self.head(x[:, -1])

    def run(self, x: Tensor, suffix: str, reverse: bool) -> Tensor:
        w, u, b, c = (getattr(self.rnn, f"{n}_{suffix}") for n in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        h = cell = x.new_zeros(len(x), 2)
        found = []
        for t in reversed(range(x.shape[1])) if reverse else range(x.shape[1]):
            inner, outer = x[:, t] @ w.T + b, h @ u.T + c
            if isinstance(self.rnn, nn.LSTM):
                i, f, g, o = (inner + outer).chunk(4, dim=1)
                cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(cell)
            elif isinstance(self.rnn, nn.GRU):
                (r, z, n), (s, q, m) = inner.chunk(3, dim=1), outer.chunk(3, dim=1)
                update = torch.sigmoid(z + q)
                h = (1 - update) * torch.tanh(n + torch.sigmoid(r + s) * m) + update * h
            else:
                h = torch.tanh(inner + outer)
            found.append(h)
        return torch.stack(found[::-1] if reverse else found, dim=1)


PAIRS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "MultiheadAttention": (Attention, WrittenAttention),
    "scaled_dot_product_attention": (Product, WrittenProduct),
    **{
        f"{kind.__name__}{', two layers, both ways' if deep else ''}": (
            lambda kind=kind, deep=deep: Recurrent(kind, **deep),
            lambda kind=kind, deep=deep: WrittenRecurrent(kind, **deep),
        )
        for kind in (nn.RNN, nn.GRU, nn.LSTM)
        for deep in ({}, {"num_layers": 2, "bidirectional": True})
        if not deep or kind is nn.LSTM
    },
}


@pytest.mark.parametrize(("name", "train"), [(name, i % 2 == 0) for i, name in enumerate(PAIRS)])
def test_attention_and_recurrent_layers(name: str, train: bool) -> None:
    fused, written = (spread(make()).train(train) for make in PAIRS[name])
    batches = split(numbers(5, 3, 4), classes(5, 3), (3, 2))
    risk = Problem(fused, F.cross_entropy, batches).risk()
    reference = Problem(written, F.cross_entropy, batches)
    assert relative(risk.value, reference.value(reference.theta)) <= 1e-12
    V = numbers(risk.space.dim, 2, seed=3)
    theta = reference.theta.requires_grad_()
    gradient = torch.autograd.grad(reference.value(theta), theta, create_graph=True)[0]
    expected = torch.stack([torch.autograd.grad(gradient, theta, v, retain_graph=True)[0] for v in V.T], dim=1)
    assert relative(risk.gradient, gradient.detach()) <= 1e-12
    assert relative(bnp.hessian(risk) @ V, expected) <= 1e-10
    A = bnp.gauss_newton(risk)
    G = reference.gauss_newton()
    assert relative(A @ V, G @ V) <= 1e-10
    rows = A.factor.to_dense()
    assert relative(rows.T @ rows, G) <= 1e-10


def test_a_small_attention_network_equals_its_dense_hessian() -> None:
    problem = Problem(spread(WrittenProduct()), F.cross_entropy, [(numbers(4, 3, 4), classes(4, 3))])
    fused = Problem(spread(Product()), F.cross_entropy, problem.batches)
    assert relative(bnp.hessian(fused.risk()).to_dense(), hessian(problem.value, problem.theta)) <= 1e-10


def test_a_transformer_layer_by_differences() -> None:
    """Its fast path in evaluation mode is another kernel, and hides the layers inside."""
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), nn.Flatten(), nn.Linear(12, 3))
    problem = Problem(spread(model).eval(), F.cross_entropy, [(numbers(5, 3, 4), classes(5, 3))])
    risk = problem.risk()
    v = numbers(risk.space.dim, seed=3)
    h = 1e-6
    difference = (problem.gradient(problem.theta + h * v) - problem.gradient(problem.theta - h * v)) / (2 * h)
    assert relative(bnp.hessian(risk) @ v, difference) <= 1e-6
    assert [layer.name for layer in bnp.network.coverage(risk)] == ["0.linear1", "0.linear2", "2"]


def test_the_callers_choice_of_kernels_comes_back() -> None:
    before = [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math")]
    flags = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    risk = Problem(spread(Recurrent(nn.LSTM)), F.cross_entropy, [(numbers(4, 3, 4), classes(4, 3))]).risk()
    bnp.hessian(risk).to_dense()
    with sdpa_kernel(SDPBackend.MATH):
        bnp.hessian(Problem(spread(Product()), F.cross_entropy, [(numbers(4, 3, 4), classes(4, 3))]).risk())
    after = [getattr(torch.backends.cuda, f"{kind}_sdp_enabled")() for kind in ("flash", "mem_efficient", "math")]
    assert before == after
    assert flags == (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)


class Cubed(torch.autograd.Function):
    """An operation whose author gave it one derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x * grad


class Once(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cubed.apply(x)


def test_an_operation_without_a_second_derivative_is_named() -> None:
    """torch leaves out the node that would raise: half of the Hessian was zero without a word."""
    model = spread(nn.Sequential(nn.Linear(3, 4), Once(), nn.Linear(4, 2)))
    risk = Problem(model, F.mse_loss, [(numbers(5, 3), numbers(5, 2, seed=1))]).risk()
    assert relative(risk.gradient, Problem(model, F.mse_loss, risk_data(risk)).gradient(risk.theta)) <= 1e-12
    with pytest.raises(InvalidInputError, match=r"no second derivative in torch: one of CubedBackward"):
        bnp.hessian(risk) @ numbers(risk.space.dim)
    batch = next(iter(risk.batches))
    J = jacobian(lambda theta: risk.batch_outputs(risk.space.unflatten(theta), batch), risk.theta).reshape(10, -1)
    A = bnp.gauss_newton(risk)
    assert relative(A @ torch.eye(A.dim, dtype=A.dtype), J.T @ J / 5) <= 1e-12


def risk_data(risk: bnp.EmpiricalRisk) -> list[tuple[Any, Any]]:
    return [(batch.x, batch.y) for batch in risk.batches]


# models that torch.compile has made


class Compiled(nn.Module):
    """What `torch.compile` wraps around a model, refusing to run."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner

    def forward(self, *args: Any) -> Tensor:
        raise AssertionError("the compiled model was run")


def wrappers() -> dict[str, Callable[[nn.Module], nn.Module]]:
    return {
        "compiled": Compiled,
        "data parallel": nn.DataParallel,
        "both": lambda m: nn.DataParallel(Compiled(m)),
        "the other way round": lambda m: Compiled(nn.DataParallel(m)),
        "really compiled": lambda m: torch.compile(m, backend="eager"),
    }


@pytest.mark.parametrize("kind", wrappers())
def test_wrapped_models_are_unwrapped(kind: str) -> None:
    problem = PROBLEMS["cross_entropy"]()
    wrapped = wrappers()[kind](copy.deepcopy(problem.model))
    risk = bnp.EmpiricalRisk(wrapped, problem.loss, problem.batches)
    assert risk.space.names == tuple(problem.free)
    assert relative(bnp.hessian(risk).to_dense(), problem.hessian()) <= 1e-10
    assert torch.equal(risk.at(wrapped.state_dict()).theta, risk.theta)
    assert torch.equal(risk.at(problem.model.state_dict()).theta, risk.theta)
    named = bnp.EmpiricalRisk(wrapped, problem.loss, problem.batches, params=["fc1"])
    assert named.space.names == ("fc1.weight", "fc1.bias")


def test_wrapped_parts_are_unwrapped() -> None:
    """A part in a wrapper lost its parameters: their names no longer matched the snapshot's."""
    body, head = nn.Linear(4, 3), nn.Linear(3, 3)
    shared = Compiled(nn.Linear(3, 3))
    wrapped = spread(nn.Sequential(nn.DataParallel(body), nn.Tanh(), shared, nn.Tanh(), shared, head))
    plain = nn.Sequential(body, nn.Tanh(), shared._orig_mod, nn.Tanh(), shared._orig_mod, head)
    problem = Problem(plain, F.cross_entropy, [(numbers(5, 4), classes(5, 3))])
    risk = bnp.EmpiricalRisk(wrapped, F.cross_entropy, problem.batches)
    assert risk.space.names == tuple(problem.free)
    assert relative(bnp.hessian(risk).to_dense(), problem.hessian()) <= 1e-10
    assert torch.equal(risk.at(wrapped.state_dict()).theta, problem.theta)


def test_functions_compiled_inside_forward_run_eagerly() -> None:
    calls = []

    def backend(graph: Any, example: Any) -> Any:
        calls.append(1)
        return graph.forward

    squash = torch.compile(lambda h: torch.tanh(h) * h, backend=backend)

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(squash(self.a(x)))

    risk = Problem(spread(Inner()), F.mse_loss, [(numbers(5, 3), numbers(5, 2, seed=1))]).risk()
    bnp.hessian(risk) @ numbers(risk.space.dim)
    assert not calls


class Segments(nn.Module):
    """A native operation without a second derivative: products of two features each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).T.contiguous()
        return self.b(torch.segment_reduce(h, "prod", lengths=torch.tensor([2, 2])).T)


def test_a_native_operation_without_a_second_derivative_is_named() -> None:
    risk = Problem(spread(Segments()), F.mse_loss, [(numbers(5, 3), numbers(5, 2, seed=1))]).risk()
    with pytest.raises(InvalidInputError, match=r"no second derivative in torch.*_segment_reduce_backward"):
        bnp.hessian(risk) @ numbers(risk.space.dim)
    # What is not differentiated twice through it has one.
    assert relative(bnp.hessian(risk, block="b").to_dense(), bnp.gauss_newton(risk, block="b").to_dense()) <= 1e-10


class Checkpointed(nn.Module):
    """Activations of its second layer dropped and computed again in the backward pass, in two ways, or kept."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.a, self.b, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 2), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return torch.tanh(self.b(torch.tanh(self.a(x))))
        h = checkpoint(lambda h: torch.tanh(self.a(h)), x, use_reentrant=self.reentrant)
        return checkpoint(lambda h: torch.tanh(self.b(h)), h, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    """It would recompute from the parameters of the module, which are not the ones that are differentiated."""
    data = [(numbers(5, 3), numbers(5, 2, seed=1))]
    kept, dropped = (Problem(spread(Checkpointed(how)), F.mse_loss, data).risk() for how in (None, reentrant))
    assert relative(dropped.gradient, kept.gradient) <= 1e-12
    for curvature in (bnp.hessian, bnp.gauss_newton):
        A, v = curvature(dropped), numbers(dropped.space.dim)
        assert relative(A @ v, curvature(kept) @ v) <= 1e-12
    # Elsewhere than at the model's own parameters too.
    theta = 1.5 * kept.theta
    assert relative(bnp.hessian(dropped.at(theta)) @ theta, bnp.hessian(kept.at(theta)) @ theta) <= 1e-12
    used = torch.utils.checkpoint.CheckpointFunction
    assert used.__module__ == "torch.utils.checkpoint"  # the process has its own again


class NumpyBackward(torch.autograd.Function):
    """A backward pass that cannot run on a stack of cotangents."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        assert not torch._C._functorch.is_batchedtensor(grad)
        if grad.requires_grad:
            return 2 * grad
        return torch.from_numpy(2 * grad.numpy())


def test_rows_of_operations_that_cannot_be_batched() -> None:
    class Doubling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return NumpyBackward.apply(x)

    model = spread(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Doubling(), nn.Linear(4, 2)))
    problem = Problem(model, F.mse_loss, [(numbers(5, 3), numbers(5, 2, seed=1))])
    rows = bnp.gauss_newton(problem.risk()).factor.to_dense()
    assert relative(rows.T @ rows, problem.gauss_newton()) <= 1e-10
