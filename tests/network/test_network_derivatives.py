"""Catches: a gradient, Hessian product or Jacobian product that is not the derivative of what the risk computes, and is
accepted without a word; and a right one that is refused: at kinks, in float32, at scales from 1e-12 to 1e12."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from network_models import classes, classify, drawn, numbers, split, table
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.errors import DerivativeError, InvalidInputError

F32, F64 = torch.float32, torch.float64


class Middle(nn.Module):
    """`out(function(self, first(x)))`."""

    def __init__(self, function: Callable[[Middle, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(4, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.function(self, self.first(x)))
        return out


class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return (h > 0).to(h)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / (1 + ctx.saved_tensors[0].abs()) ** 2


class Adjoint(torch.autograd.Function):
    """Runs its module again in the backward pass, as adjoint ODE solvers do."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, module: nn.Module, *parameters: Tensor) -> Tensor:
        ctx.module, ctx.h, ctx.parameters = module, h.detach(), parameters
        return module(h).detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        with torch.enable_grad():
            h = ctx.h.requires_grad_()
            out = ctx.module(h)
        found = torch.autograd.grad(out, (h, *ctx.parameters), g, allow_unused=True)
        rest = (torch.zeros_like(p) if q is None else q for p, q in zip(ctx.parameters, found[1:], strict=True))
        return found[0], None, *rest


class Recomputed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(Adjoint.apply(x, self.body, *self.body.parameters()))


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.zeros(200, 3)), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = ((x * 50).long() % 199 + 1) * (x > -1)  # 0 now and then
        return self.out(F.embedding(tokens, self.table, padding_idx=0).flatten(1))


def hooked(factor: float) -> nn.Module:
    model = Middle(lambda m, h: torch.tanh(h))
    model.first.register_full_backward_hook(
        lambda m, g_in, g_out: tuple(None if g is None else factor * g for g in g_in)
    )
    model.out.register_full_backward_hook(lambda m, g_in, g_out: tuple(None if g is None else factor * g for g in g_in))
    return model


def clipped(m: Middle, h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    return torch.tanh(h)


def without_recording(m: Middle, h: Tensor) -> Tensor:
    with torch.no_grad():
        size = h.norm(dim=1, keepdim=True)
    return h / size


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "detach": (lambda: Middle(lambda m, h: h / h.norm(dim=1, keepdim=True).detach()), "first.*detach at test_network"),
    "data": (lambda: Middle(lambda m, h: torch.tanh(h) * h.data.exp()), "first.*data at test_network"),
    "no_grad": (lambda: Middle(without_recording), r"first.*norm at test_network"),
    "one scalar": (lambda: Middle(lambda m, h: torch.tanh(h) * m.scale.detach()), r"scale \(scale: exactly 0"),
    "straight-through": (lambda: Middle(lambda m, h: h + ((4 * h).round() / 4 - h).detach()), "round at"),
    "sign": (lambda: Middle(lambda m, h: torch.tanh(h) + (h.sign() - torch.tanh(h)).detach()), "sign at"),
    "surrogate spike": (lambda: Middle(lambda m, h: Spike.apply(h)), "first.*autograd.Function Spike"),
    "reversed gradient": (lambda: hooked(-1.0), "first"),
    "clipped gradient": (lambda: Middle(clipped), "first"),
    "adjoint": (Recomputed, "body.*exactly 0.*Function Adjoint"),
    "padding index": (Padded, "table.*embedding at"),
    "spectral norm": (lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3))), r"model.eval\(\)"),
}


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize(("dtype", "data"), [(F32, table(40)), (F64, split(*table(9), (5, 4)))], ids=["one", "split"])
@pytest.mark.parametrize("name", WRONG)
def test_gradients_of_no_function_are_refused(name: str, dtype: torch.dtype, data: Any) -> None:
    make, words = WRONG[name]
    with pytest.raises(DerivativeError) as caught:
        classify(drawn(make), data, dtype=dtype)
    assert_words(str(caught.value), words)


def assert_words(text: str, words: str) -> None:
    assert re.search(words, text), text
    assert "Curvature would be that of no function" in text  # what would have come out
    assert "params=" in text  # the ways out
    assert "derivatives='surrogate'" in text


def assert_surrogate(*results: Any) -> None:
    for result in results:
        assert "surrogate derivatives, not those of the risk" in str(result), type(result)
        assert "surrogate" in repr(result)


@pytest.mark.parametrize("name", ["surrogate spike", "one scalar"])
def test_surrogates_are_measured_under_their_name(name: str) -> None:
    """The numbers are those of the surrogate's own gradient, and every line says so."""
    risk = classify(drawn(WRONG[name][0]), table(40), derivatives="surrogate")
    assert_surrogate(bnp.condition_number(bnp.gauss_newton(risk)), bnp.eigenpairs(bnp.hessian(risk), k=1))


def test_every_verb_names_surrogates() -> None:
    risk = classify(drawn(WRONG["straight-through"][0]), table(40), derivatives="surrogate")
    A, H = bnp.gauss_newton(risk), bnp.hessian(risk)
    null = bnp.null_directions(risk)
    assert_surrogate(
        bnp.condition_number(A, null=null),
        bnp.eigenpairs(H, k=1),
        bnp.trace(H, probes=4),
        bnp.spectral_density(A, probes=1),
        null,
        bnp.layer_table(risk),
        bnp.condition_number(bnp.gauss_newton(risk, block="out")),
        bnp.check_theory(risk, only=["T1"]),
    )
    plain = classify(drawn(lambda: Middle(lambda m, h: torch.tanh(h))), table(40))
    assert "surrogate" not in str(bnp.trace(bnp.hessian(plain), probes=4))


def test_what_is_left_out_is_not_refused() -> None:
    model = drawn(WRONG["one scalar"][0])
    classify(model, table(40), params=["first", "out"])
    with pytest.raises(InvalidInputError, match="derivatives must be"):
        classify(model, table(), derivatives="approximate")


def test_the_padding_row_of_an_embedding_has_its_derivative() -> None:
    """The outputs depend on it; that training leaves it alone is the optimizer's business."""
    model = drawn(lambda: nn.Sequential(nn.Embedding(5, 2, padding_idx=0), nn.Flatten(), nn.Linear(6, 3)))
    x, y = torch.tensor([[0, 1, 2], [3, 0, 0], [4, 4, 0], [1, 0, 3]]), classes(4, 3)
    risk = classify(model, (x, y))

    def by_hand(theta: Tensor) -> Tensor:
        t = risk.space.unflatten(theta)
        return F.cross_entropy(t["0.weight"][x].flatten(1) @ t["2.weight"].T + t["2.bias"], y)

    g = torch.autograd.functional.jacobian(by_hand, risk.theta)
    assert bool(g[:2].any())
    torch.testing.assert_close(risk.gradient, g, rtol=1e-12, atol=1e-14)
    H = torch.autograd.functional.hessian(by_hand, risk.theta)
    torch.testing.assert_close(bnp.hessian(risk).to_dense(), H, rtol=1e-11, atol=1e-13)
    assert model[0].padding_idx == 0  # the caller's model


# second derivatives


class Cube(torch.autograd.Function):
    """The first derivative is right; the second leaves its own out."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.slope = (3 * h * h).detach()
        return h**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


class Unlinked(torch.autograd.Function):
    """Its backward pass, as one through NumPy, is no recorded function of what comes in."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return torch.tanh(h)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.detach() * (1 - torch.tanh(ctx.saved_tensors[0].detach()) ** 2)


class Squares(torch.autograd.Function):
    """A loss with a wrong second derivative."""

    @staticmethod
    def forward(ctx: Any, o: Tensor) -> Tensor:
        ctx.o = o.detach()
        return o.square().mean()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2 * ctx.o / ctx.o.numel()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(
    ("function", "loss", "hessian", "gauss_newton"),
    [
        (Cube.apply, F.cross_entropy, "first.*autograd.Function Cube", None),
        (Unlinked.apply, F.cross_entropy, "first", "the outputs"),
        (torch.tanh, lambda o, y: Squares.apply(o), "out", "the loss's gradient in the outputs"),
        (torch.tanh, F.cross_entropy, None, None),
    ],
    ids=["slope held", "unlinked", "loss", "right"],
)
def test_second_derivatives_of_no_function_are_refused(
    function: Any, loss: Any, hessian: str | None, gauss_newton: str | None, dtype: torch.dtype
) -> None:
    risk = bnp.EmpiricalRisk(drawn(lambda: Middle(lambda m, h: function(h))), loss, table(40), dtype=dtype)
    for verb, block in (
        *((bnp.hessian, block) for block in (None, "first")),
        *((bnp.gauss_newton, block) for block in (None, "first")),
        (bnp.null_directions, "first"),  # whose factor is that of `gauss_newton`
    ):
        words = hessian if verb is bnp.hessian else gauss_newton
        if words is None:
            verb(risk, block=block)
        else:
            with pytest.raises(DerivativeError, match=words):
                verb(risk, block=block)


def test_products_are_tried_where_the_output_is_one_number_for_the_batch() -> None:
    """Such outputs could not be put together, and a trial that fails refuses nothing."""
    model = drawn(lambda: Middle(lambda m, h: Unlinked.apply(h)))
    risk = bnp.EmpiricalRisk(model, lambda o, y: (o - 1) ** 2, table(40), output=lambda o: o.square().mean())
    with pytest.raises(DerivativeError, match="the outputs"):
        bnp.gauss_newton(risk)


def test_second_derivatives_are_tried_once_per_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    risk = classify(drawn(lambda: Middle(lambda m, h: torch.tanh(h))), table(40))
    bnp.hessian(risk)
    monkeypatch.setattr("bnp_analysis.network.derivatives.trial", None)  # is called no more
    bnp.hessian(risk, block="out")
    bnp.hessian(risk.at(2 * risk.theta))


@pytest.mark.parametrize("api", ["parametrized", "hook", "function"])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_normalization_has_its_second_derivative(api: str, dim: int | None) -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = {0: (4, 1), 1: (1, 3), None: ()}[dim]
            self.g, self.v = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(4, 3))
            self.bias = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, torch._weight_norm(self.v, self.g, -1 if dim is None else dim), self.bias)

    def make() -> nn.Module:
        layers = {
            "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4), dim=dim),
            "hook": lambda: nn.utils.weight_norm(nn.Linear(3, 4), dim=dim),
            "function": Written,
        }
        return nn.Sequential(layers[api](), nn.Tanh(), nn.Linear(4, 2))

    x, y = numbers(12, 3), classes(12, 2)
    risk = classify(drawn(make), (x, y))
    gains, directions = {
        "parametrized": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
        "hook": ("weight_g", "weight_v"),
        "function": ("g", "v"),
    }[api]

    def by_hand(theta: Tensor) -> Tensor:
        t = risk.space.unflatten(theta)
        g, v = t[f"0.{gains}"], t[f"0.{directions}"]
        size = v.square().sum().sqrt() if dim is None else v.square().sum(1 - dim, keepdim=True).sqrt()
        out = torch.tanh(x @ (g * v / size).T + t["0.bias"]) @ t["2.weight"].T + t["2.bias"]
        return F.cross_entropy(out, y)

    expected = torch.autograd.functional.hessian(by_hand, risk.theta)
    torch.testing.assert_close(bnp.hessian(risk).to_dense(), expected, rtol=1e-10, atol=1e-12)


# nothing is refused that is right


def zero_biases(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Inputs of zero then lie on the kinks of the ReLUs."""

    def made() -> nn.Module:
        model = make()
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
        return model

    return made


def cnn(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), *middle, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 3)
    )


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def images() -> Tensor:
    x = numbers(8, 1, 10, 10)
    return x * (x > 0.5)


RIGHT: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "perceptron": (lambda: bnp.models.mlp([4, 20, 20, 3]), lambda: numbers(40, 4)),
    "kinks": (zero_biases(lambda: bnp.models.mlp([4, 20, 20, 3])), lambda: numbers(40, 4) * (numbers(40, 4) > 0.3)),
    "batch norm": (lambda: bnp.models.mlp([4, 9, 3], norm="batch"), lambda: numbers(40, 4)),
    "cnn": (zero_biases(cnn), images),
    "cnn, training": (lambda: cnn(nn.BatchNorm2d(4)), images),
    "cnn, evaluation": (lambda: cnn(nn.BatchNorm2d(4)).eval(), images),
    "resnet": (lambda: bnp.models.build_for("resnet8", (1, 8, 8), 3).eval(), lambda: numbers(4, 1, 8, 8)),
    "lstm": (lambda: nn.LSTM(4, 3, batch_first=True), lambda: numbers(5, 6, 4)),
    "dead": (lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), lambda: torch.zeros(7, 4)),
    "tied": (tied, lambda: numbers(20, 4)),
    "large inputs": (lambda: bnp.models.mlp([4, 9, 3]), lambda: 1e6 * numbers(20, 4)),
    "tiny inputs": (lambda: bnp.models.mlp([4, 9, 3]), lambda: 1e-6 * numbers(20, 4)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_derivatives_are_not_refused(name: str) -> None:
    make, inputs = RIGHT[name]
    pick = (lambda o: o[0][:, -1]) if name == "lstm" else None
    for seed, dtype in enumerate((F32, F64, F32)):
        torch_state = torch.get_rng_state()
        torch.manual_seed(seed)
        model = make()
        torch.set_rng_state(torch_state)
        risk = classify(model, (inputs(), classes(len(inputs()), 3)), output=pick, dtype=dtype)
        bnp.hessian(risk)
        bnp.gauss_newton(risk)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("scale", "shift"), [(1e-12, 1.0), (1e-6, 0.0), (1.0, 1.0), (1e6, 0.0), (1e12, 1.0)])
def test_losses_of_any_scale_are_not_refused(scale: float, shift: float, dtype: torch.dtype) -> None:
    """Also beside a constant in which the loss's digits are lost."""
    losses = (F.cross_entropy, lambda o, y: (o - 1).abs().mean(), F.multi_margin_loss)
    for loss in losses:

        def scaled(o: Tensor, y: Tensor, loss: Any = loss) -> Tensor:
            return scale * loss(o, y) + shift

        risk = bnp.EmpiricalRisk(drawn(lambda: bnp.models.mlp([4, 9, 3])), scaled, table(20), dtype=dtype)
        bnp.hessian(risk)
        bnp.gauss_newton(risk)


@pytest.mark.slow
def test_rectifiers_at_random_points_are_not_refused() -> None:
    for seed in range(200):
        x, y = numbers(40, 6, seed=seed), classes(40, 3, seed=seed)
        model = drawn(lambda: bnp.models.mlp([6, 30, 30, 3]), seed)
        risk = classify(model, (x, y), dtype=F32 if seed % 2 else F64)
        bnp.hessian(risk)
        bnp.gauss_newton(risk)


def stable(o: Tensor, y: Tensor) -> Tensor:
    return (o.clamp(min=0) - o * y + torch.log(1 + torch.exp(-o.abs()))).mean()


def log_cosh(o: Tensor, y: Tensor) -> Tensor:
    d = (o - y).abs()
    return (d + F.softplus(-2 * d)).mean()


def fair(o: Tensor, y: Tensor) -> Tensor:
    d = (o - y).abs()
    return (d - torch.log1p(d)).mean()


@pytest.mark.parametrize("seed", [0, 1, 3, 4, 13, 20])  # over the longest step some of these bend
@pytest.mark.parametrize(("loss", "first"), [(stable, True), (log_cosh, False), (fair, False)])
def test_smooth_losses_on_the_kinks_of_their_parts(
    loss: Callable[[Tensor, Tensor], Tensor], first: bool, seed: int
) -> None:
    """A last layer of zeros: autograd's curvature is 0 there, that of the loss is not; found at `theta` alone."""
    model = drawn(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)), seed).double()
    with torch.no_grad():
        model[2].weight.zero_()
        model[2].bias.zero_()
    data = table()[0].double(), torch.zeros(len(table()[0]), 1).double()
    build = partial(bnp.EmpiricalRisk, model, loss, data)
    make = build if first else partial(bnp.gauss_newton, build())
    with pytest.raises(DerivativeError, match=r"abs at test_network_derivatives"):
        make()


def test_real_kinks_at_theta_decide_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 1)).double()
    with torch.no_grad():
        model[0].bias.zero_()
        model[2].weight.zero_()
    x = table()[0].double()
    x[0] = 0
    for loss in (F.mse_loss, F.l1_loss, F.binary_cross_entropy_with_logits):
        risk = bnp.EmpiricalRisk(model, loss, (x, torch.zeros(len(x), 1).double()))
        bnp.hessian(risk), bnp.gauss_newton(risk)
