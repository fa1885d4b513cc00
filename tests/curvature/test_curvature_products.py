"""Catches: a product that is not the matrix of its name (a forgotten term, transposition, batch weight or factor 2),
batches that weigh equally, and parameters that are frozen, tied or unused going to the wrong place in the vector."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from curvature_reference import Problem, classes, numbers, relative, split, spread
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError


def tanh_mlp(*widths: int, **options: Any) -> nn.Module:
    return spread(bnp.models.mlp(list(widths), activation="tanh", **options))


class Tied(nn.Module):
    """The same tensor embeds and reads out; the bias is one layer's alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 3, bias=False)
        self.middle = nn.Linear(3, 3)
        self.head = nn.Linear(4, 3)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.middle(torch.tanh(self.embed(x)))) @ self.embed.weight + self.head(x).sum(
            dim=1, keepdim=True
        )


class Pieces(nn.Module):
    """Two inputs, several outputs, a branch that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 2), nn.Linear(2, 2)
        self.unused = nn.Linear(2, 2)

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        h = torch.tanh(self.left(a)) * self.right(b)
        return {"hidden": h, "logits": h * h + h}


def log_cosh(out: Tensor, y: Tensor) -> Tensor:
    return (F.softplus(2 * (out - y)) - (out - y)).mean()


def margins(out: Tensor, y: Tensor) -> Tensor:
    """Convex, neither diagonal nor softmax: squared sums of neighbours and a fourth power."""
    return ((out[:, :-1] + out[:, 1:] - y[:, :-1]) ** 2).mean() + 0.1 * (out.sum(dim=1) ** 4).mean()


def one_hot(n: int, width: int) -> Tensor:
    return F.one_hot(classes(n, width), width).double()


LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[int], Tensor]]] = {
    "cross_entropy": (F.cross_entropy, lambda n: classes(n, 3)),
    "label_smoothing": (lambda o, y: F.cross_entropy(o, y, label_smoothing=0.2), lambda n: classes(n, 3)),
    "soft_targets": (F.cross_entropy, lambda n: torch.softmax(numbers(n, 3, seed=8), dim=1)),
    "mse": (F.mse_loss, lambda n: numbers(n, 3, seed=5)),
    "bce": (F.binary_cross_entropy_with_logits, lambda n: one_hot(n, 3)),
    "bce_module": (nn.BCEWithLogitsLoss(), lambda n: one_hot(n, 3)),
    "smooth_l1": (F.smooth_l1_loss, lambda n: numbers(n, 3, seed=5)),
    "log_cosh": (log_cosh, lambda n: numbers(n, 3, seed=5)),
    "margins": (margins, lambda n: numbers(n, 3, seed=5)),
    "poisson": (F.poisson_nll_loss, lambda n: classes(n, 3, 3).double()),
}


def loss_problem(name: str) -> Problem:
    loss, targets = LOSSES[name]
    return Problem(tanh_mlp(4, 5, 3), loss, split(numbers(11, 4), targets(11), (5, 4, 2)))


def image_problem(model: nn.Module, sizes: tuple[int, ...], train: bool) -> Problem:
    n = sum(sizes)
    batches = split(numbers(n, 2, 4, 4), classes(n, 3), sizes)
    return Problem(spread(model).train(train), F.cross_entropy, batches)


def table_problem(model: nn.Module, sizes: tuple[int, ...], train: bool) -> Problem:
    n = sum(sizes)
    return Problem(spread(model).train(train), F.cross_entropy, split(numbers(n, 4), classes(n, 3), sizes))


def cnn(norm: str = "none", **options: Any) -> nn.Module:
    return bnp.models.cnn((2, 4, 4), 3, channels=(2, 2, 2), hidden=3, activation="tanh", norm=norm, **options)


def mlp(norm: str, **options: Any) -> nn.Module:
    return bnp.models.mlp([4, 5, 4, 3], activation="tanh", norm=norm, **options)


def frozen() -> Problem:
    problem = loss_problem("mse")
    problem.model.fc1.weight.requires_grad_(False)
    problem.model.fc2.bias.requires_grad_(False)
    return problem


def pieces(kind: type) -> Problem:
    a, b, y = numbers(7, 3), numbers(7, 2, seed=3), numbers(7, 2, seed=4)
    cuts = list(pairwise((0, 4, 7)))
    xs = [{"b": b[i:j], "a": a[i:j]} if kind is dict else (a[i:j], b[i:j]) for i, j in cuts]
    batches = [(x, y[i:j]) for x, (i, j) in zip(xs, cuts, strict=True)]
    return Problem(spread(Pieces()), F.mse_loss, batches, output=lambda o: o["logits"])


def ignoring() -> Problem:
    y = classes(11, 3)
    y[[0, 1, 2, 3, 4, 7]] = -100  # the whole first batch is ignored: its own mean is 0/0
    batches = split(numbers(11, 4), y, (4, 5, 2))[1:]
    return Problem(tanh_mlp(4, 5, 3), F.cross_entropy, batches, count=lambda pair: int((pair[1] >= 0).sum()))


def weighted() -> Problem:
    w = torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64)
    batches = split(numbers(11, 4), classes(11, 3), (5, 4, 2))
    loss = nn.CrossEntropyLoss(weight=w)
    return Problem(tanh_mlp(4, 5, 3), loss, batches, count=lambda pair: float(w[pair[1]].sum()))


def tokens(last: bool) -> Problem:
    """A class per position, classes last as in language models or second as `cross_entropy` wants them."""
    x, y = numbers(6, 5, 4), classes(6, 3, 5)
    if last:
        return Problem(
            tanh_mlp(4, 3, 3), lambda o, y: F.cross_entropy(o.flatten(0, 1), y.flatten()), split(x, y, (4, 2))
        )
    return Problem(tanh_mlp(4, 3, 3), F.cross_entropy, split(x, y, (4, 2)), output=lambda o: o.transpose(1, 2))


def flat_tokens() -> Problem:
    x, y = numbers(6, 5, 4), classes(6, 3, 5)
    loss = lambda o, y: F.cross_entropy(o, y.flatten())  # noqa: E731
    return Problem(tanh_mlp(4, 3, 3), loss, split(x, y, (4, 2)), output=lambda o: o.flatten(0, 1))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    **{name: (lambda name=name: loss_problem(name)) for name in LOSSES},
    "frozen": frozen,
    "tied": lambda: Problem(spread(Tied()), F.mse_loss, split(numbers(7, 4), numbers(7, 4, seed=2), (4, 3))),
    "tuple, unused, output=": lambda: pieces(tuple),
    "dict, unused, output=": lambda: pieces(dict),
    "ignore_index, count=": ignoring,
    "class weights, count=": weighted,
    "tokens, classes last": lambda: tokens(True),
    "tokens, classes second": lambda: tokens(False),
    "tokens, flattened": flat_tokens,
    "one linear layer": lambda: Problem(spread(nn.Linear(4, 3)), F.mse_loss, [(numbers(5, 4), numbers(5, 3, seed=2))]),
    "cnn": lambda: image_problem(cnn(), (3, 2), True),
    "cnn, avg pool, circular": lambda: image_problem(cnn(pool="avg", padding_mode="circular"), (3, 2), True),
    "cnn, BatchNorm, train": lambda: image_problem(cnn("batch"), (5,), True),
    "cnn, BatchNorm, eval": lambda: image_problem(cnn("batch"), (3, 2), False),
    "cnn, BatchNorm at the input, train": lambda: image_problem(cnn("batch", norm_at="input"), (5,), True),
    "cnn, LayerNorm": lambda: image_problem(cnn("layer"), (3, 2), True),
    "mlp, BatchNorm, train": lambda: table_problem(mlp("batch"), (9,), True),
    "mlp, BatchNorm, eval": lambda: table_problem(mlp("batch"), (5, 4), False),
    "mlp, LayerNorm": lambda: table_problem(mlp("layer"), (5, 4), True),
    "mlp, GroupNorm": lambda: table_problem(
        bnp.models.mlp([4, 6, 4, 3], activation="tanh", norm="group", norm_groups=2), (5, 4), True
    ),
    "dropout off": lambda: table_problem(
        nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)), (5, 4), False
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_products_equal_dense_autodiff(name: str) -> None:
    problem = PROBLEMS[name]()
    risk = problem.risk()
    V = numbers(problem.theta.numel(), 3, seed=11)
    assert torch.equal(risk.theta, problem.theta)
    assert relative(risk.value, problem.value(problem.theta)) <= 1e-14
    assert relative(risk.gradient, problem.gradient(problem.theta)) <= 1e-12
    H, G = bnp.hessian(risk), bnp.gauss_newton(risk)
    dense = problem.gauss_newton()
    for A, reference in ((H, problem.hessian_product(V)), (G, dense @ V)):
        assert A.dim == problem.theta.numel()
        assert A.dtype == torch.float64
        product = A @ V
        assert relative(product, reference) <= 1e-10
        assert relative(A @ V[:, 0], reference[:, 0]) <= 1e-10
        assert (A @ V[:, :0]).shape == (A.dim, 0)
        assert relative(V.T @ product, (V.T @ product).T) <= 1e-12
    if A.dim < 40:
        assert relative(G.to_dense(), dense) <= 1e-10
        assert relative(H.to_dense(), problem.hessian()) <= 1e-10


@pytest.mark.parametrize("name", PROBLEMS)
def test_hessian_products_equal_differences_of_gradients(name: str) -> None:
    """Independent of second derivatives altogether."""
    problem = PROBLEMS[name]()
    A, theta = bnp.hessian(problem.risk()), problem.theta
    v = numbers(theta.numel(), seed=12)
    h = 1e-5 / float(v.abs().max())
    if name == "smooth_l1":
        h /= 10  # its third derivative jumps where the residual is one
    difference = (problem.gradient(theta + h * v) - problem.gradient(theta - h * v)) / (2 * h)
    assert relative(A @ v, difference) <= 1e-6


def test_gauss_newton_is_not_the_hessian() -> None:
    problem = loss_problem("mse")
    assert relative(problem.gauss_newton(), problem.hessian()) > 0.1


# closed forms


def extended(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)


def in_torch_order(units_first: Tensor, units: int, features: int) -> Tensor:
    """From `[w_1, b_1, w_2, b_2, ...]` to `[w_1, w_2, ..., b_1, b_2, ...]`."""
    grid = torch.arange(units * (features + 1)).view(units, features + 1)
    order = torch.cat([grid[:, :-1].reshape(-1), grid[:, -1]])
    return units_first[order][:, order]


@pytest.mark.parametrize("build", [bnp.hessian, bnp.gauss_newton])
def test_least_squares(build: Callable[..., Any]) -> None:
    x, y = numbers(9, 4), numbers(9, 3, seed=2)
    risk = bnp.EmpiricalRisk(spread(nn.Linear(4, 3)), F.mse_loss, split(x, y, (6, 2, 1)))
    h = extended(x)
    expected = torch.kron(torch.eye(3, dtype=torch.float64), 2 / (9 * 3) * h.T @ h)
    assert relative(build(risk).to_dense(), in_torch_order(expected, 3, 4)) <= 1e-13


@pytest.mark.parametrize("build", [bnp.hessian, bnp.gauss_newton])
def test_logistic_regression(build: Callable[..., Any]) -> None:
    x, y = numbers(9, 4), classes(9, 2).double().unsqueeze(1)
    model = spread(nn.Linear(4, 1))
    risk = bnp.EmpiricalRisk(model, F.binary_cross_entropy_with_logits, split(x, y, (6, 2, 1)))
    h, p = extended(x), torch.sigmoid(model(x)).detach()
    assert relative(build(risk).to_dense(), h.T @ (p * (1 - p) * h) / 9) <= 1e-13


@pytest.mark.parametrize("build", [bnp.hessian, bnp.gauss_newton])
def test_softmax_regression(build: Callable[..., Any]) -> None:
    x, y = numbers(9, 4), classes(9, 3)
    model = spread(nn.Linear(4, 3))
    risk = bnp.EmpiricalRisk(model, F.cross_entropy, split(x, y, (6, 2, 1)))
    h, p = extended(x), torch.softmax(model(x), dim=1).detach()
    blocks = [torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(k, k)) for k, q in zip(h, p, strict=True)]
    assert relative(build(risk).to_dense(), in_torch_order(sum(blocks) / 9, 3, 4)) <= 1e-13


# splits of the data


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.booleans())
@settings(max_examples=5)
def test_any_split_gives_the_same_matrices(sizes: list[int], seeded: bool) -> None:
    n = sum(sizes)
    x, y = numbers(n, 3, seed=n), classes(n, 3, seed=n)
    model = tanh_mlp(3, 4, 3)
    whole = bnp.EmpiricalRisk(model, F.cross_entropy, (x, y))
    parts = bnp.EmpiricalRisk(model, F.cross_entropy, split(x, y, sizes))
    v = numbers(whole.space.dim, seed=int(seeded))
    for build in (bnp.hessian, bnp.gauss_newton, lambda r: bnp.fisher(r, "empirical")):
        assert relative(build(parts) @ v, build(whole) @ v) <= 1e-12
    assert relative(parts.gradient, whole.gradient) <= 1e-12
    assert relative(parts.value, whole.value) <= 1e-13


def test_a_batch_of_two_does_not_weigh_as_much_as_one_of_64() -> None:
    x, y = numbers(130, 3), numbers(130, 2, seed=1)
    x[128:], y[128:] = 30 * x[128:], 30 * y[128:]  # the last two examples dominate if their batch weighs a third
    model = tanh_mlp(3, 2)
    A = bnp.hessian(bnp.EmpiricalRisk(model, F.mse_loss, split(x, y, (64, 64, 2)))).to_dense()
    h = extended(x)
    expected = torch.kron(torch.eye(2, dtype=torch.float64), h.T @ h / 130)
    equal = sum(part.T @ part / len(part) for part in h.split([64, 64, 2])) / 3
    assert relative(A, in_torch_order(expected, 2, 3)) <= 1e-13
    assert relative(torch.kron(torch.eye(2, dtype=torch.float64), equal), expected) > 2  # the bug would show


def test_count_sets_the_weights() -> None:
    x, y = numbers(9, 3), numbers(9, 2, seed=1)
    batches = split(x, y, (6, 3))
    model = tanh_mlp(3, 2)
    twice = bnp.EmpiricalRisk(model, F.mse_loss, batches, count=lambda pair: 2.0 if len(pair[0]) == 6 else 1.0)
    parts = [bnp.hessian(bnp.EmpiricalRisk(model, F.mse_loss, batch)).to_dense() for batch in batches]
    assert relative(bnp.hessian(twice).to_dense(), (2 * parts[0] + parts[1]) / 3) <= 1e-13


# float32


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "mlp, BatchNorm, train", "cnn"])
def test_float32_products_are_float32_products(name: str) -> None:
    problem = PROBLEMS[name]()
    single = problem.risk(dtype=torch.float32)
    v = numbers(problem.theta.numel(), seed=3)
    for build in (bnp.hessian, bnp.gauss_newton):
        A = build(single)
        assert A.dtype == torch.float32
        assert relative((A @ v.float()).double(), build(problem.risk()) @ v) <= 1e-4
        with pytest.raises(InvalidInputError, match="float32"):
            A @ v
    assert problem.risk(dtype=torch.float32).value.dtype == torch.float32


# where the caller has turned recording off


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_products_do_not_depend_on_the_callers_grad_mode(mode: Callable[[], Any]) -> None:
    """A forgotten `no_grad` around everything gave zero gradients and zero matrices without a word."""
    problem = loss_problem("cross_entropy")
    v = numbers(problem.theta.numel(), seed=3)
    with mode():
        risk = problem.risk()
        inside = [risk.gradient, bnp.hessian(risk) @ v, bnp.gauss_newton(risk) @ v]
        inside += [bnp.gauss_newton(risk).factor @ v, bnp.fisher(risk, "empirical") @ v]
        inside += [bnp.gauss_newton(risk).factor.to_dense()]
        moved = bnp.hessian(risk.at(risk.theta)) @ v
        block = bnp.hessian(risk, block="fc1").to_dense()
    outside = [risk.gradient, bnp.hessian(risk) @ v, bnp.gauss_newton(risk) @ v]
    outside += [bnp.gauss_newton(risk).factor @ v, bnp.fisher(risk, "empirical") @ v]
    outside += [bnp.gauss_newton(risk).factor.to_dense()]
    assert all(relative(a, b) <= 1e-14 for a, b in zip(inside, outside, strict=True))
    assert relative(outside[1], problem.hessian() @ v) <= 1e-10
    assert relative(moved, outside[1]) <= 1e-14
    assert relative(block, problem.hessian()[:25, :25]) <= 1e-10


def test_a_loss_that_is_linear_in_the_outputs_has_no_curvature_of_its_own() -> None:
    problem = Problem(tanh_mlp(3, 4, 2), lambda o, y: (o * y).mean(), [(numbers(6, 3), numbers(6, 2, seed=1))])
    risk = problem.risk()
    assert relative(bnp.hessian(risk).to_dense(), problem.hessian()) <= 1e-10
    assert float(bnp.gauss_newton(risk).to_dense().abs().max()) == 0
    linear = Problem(spread(nn.Linear(3, 2)), lambda o, y: (o * y).mean(), [(numbers(6, 3), numbers(6, 2, seed=1))])
    assert float(bnp.hessian(linear.risk()).to_dense().abs().max()) == 0


def test_a_loss_that_does_not_look_at_the_outputs_has_no_curvature() -> None:
    risk = Problem(tanh_mlp(3, 4, 2), lambda o, y: y.mean(), [(numbers(6, 3), numbers(6, 2, seed=1))]).risk()
    assert float(bnp.gauss_newton(risk).to_dense().abs().max()) == 0
    assert float(bnp.hessian(risk).to_dense().abs().max()) == 0


def test_one_number_for_the_whole_batch_is_an_output_without_rows() -> None:
    class Length(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x).square().mean()

    problem = Problem(spread(Length()), lambda o, y: (o - 1) ** 2, [(numbers(6, 3), numbers(6))])
    risk = problem.risk()
    A = bnp.gauss_newton(risk)
    assert relative(A.to_dense(), problem.gauss_newton()) <= 1e-10
    assert relative(bnp.hessian(risk).to_dense(), problem.hessian()) <= 1e-10
    assert A.factor is None
    assert A.semidefinite
    assert "no ratio of eigenvalues is known to within a factor of 2" in str(bnp.condition(risk))
