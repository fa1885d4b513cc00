"""Derivatives of smooth functions where they saturate, against mpmath.

Only these tests catch a derivative that is a difference of two near numbers: `1 - y^2`, `y (1 - y)`, `1 + erf`, the
backward pass of a softmax whose largest probability is nearly 1, and a replacement that changes values, breaks third
derivatives, or cannot run on stacks of cotangents.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bnp_analysis.network.kernels import nodes_of
from bnp_analysis.network.smooth import Accurate, monitoring

mp.mp.dps = 60


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def gelu_tanh(x: Any) -> Any:
    return x * sigmoid(2 * mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3))


FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any], float]] = {
    "tanh": (torch.tanh, mp.tanh, 100),
    "tanh, method": (Tensor.tanh, mp.tanh, 100),
    "tanh, in place": (lambda x: x.clone().tanh_(), mp.tanh, 100),
    "sigmoid": (nn.Sigmoid(), sigmoid, 100),
    "expit": (torch.special.expit, sigmoid, 100),
    "gelu": (nn.GELU(), lambda x: x * mp.ncdf(x), 12),
    "gelu, tanh": (nn.GELU("tanh"), gelu_tanh, 9),
    "silu": (nn.SiLU(), lambda x: x * sigmoid(x), 80),
    "silu, in place": (lambda x: F.silu(x.clone(), inplace=True), lambda x: x * sigmoid(x), 80),
    "softplus": (nn.Softplus(), lambda x: mp.log1p(mp.exp(x)), 80),
    "softplus, beta": (nn.Softplus(3.0, 15.0), lambda x: mp.log1p(mp.exp(3 * x)) / 3, 25),
    "logsigmoid": (nn.LogSigmoid(), lambda x: -mp.log1p(mp.exp(-x)), 80),
    "mish": (nn.Mish(), lambda x: x * mp.tanh(mp.log1p(mp.exp(x))), 40),
    "softsign": (nn.Softsign(), lambda x: x / (1 + abs(x)), 1e6),
    "tanhshrink": (nn.Tanhshrink(), lambda x: x - mp.tanh(x), 80),
    "expm1": (torch.expm1, mp.expm1, 60),
    "exp2": (torch.exp2, lambda x: mp.mpf(2) ** x, 60),
    "erfc": (torch.erfc, mp.erfc, 5),
    "ndtr": (torch.special.ndtr, mp.ncdf, 8),
    "elu, in place": (nn.ELU(inplace=True), lambda x: x if x > 0 else mp.expm1(x), 80),
}


def derivatives(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with Accurate():
        y = f(x * 1)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    return y.detach(), g.detach(), h


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_keep_their_digits(name: str, dtype: torch.dtype) -> None:
    f, exact, most = FUNCTIONS[name]
    most = min(most, 1e6 if most > 1e3 else most if dtype == torch.float64 else most / 4)
    sizes = torch.logspace(-3, 0, 7, dtype=torch.float64) * most
    x = torch.cat([-sizes.flip(0), sizes]).to(dtype)
    y, g, h = derivatives(f, x)
    assert torch.equal(y, f(x.clone()))
    eps = torch.finfo(dtype).eps
    with mp.workdps(300):
        for k, value in enumerate(x.tolist()):
            z = mp.mpf(value)
            first, second = (mp.diff(exact, z, n, h=mp.mpf(10) ** -80) for n in (1, 2))
            # What the argument has rounded is amplified, by |z| or z^2; that of a tanh of a cubic by z^3.
            allowed = eps * (8 + 3 * abs(value) ** (3 if "gelu, tanh" in name else 1))
            assert abs(g[k].item() - first) <= allowed * abs(first), (value, g[k].item(), first)
            # Near an inflection terms of the size of the first derivative cancel.
            assert abs(h[k].item() - second) <= allowed * max(abs(second), 0.1 * abs(first)), (value, h[k], second)


@pytest.mark.parametrize("name", ["tanh", "gelu", "silu", "mish", "softplus", "sigmoid"])
def test_third_derivatives_and_transformations(name: str) -> None:
    f = FUNCTIONS[name][0]
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    with Accurate():
        assert torch.autograd.gradgradcheck(f, x)
        tangents = torch.func.jvp(f, (x.detach(),), (torch.ones_like(x),))[1]
        stacked = torch.func.vmap(torch.func.grad(f))(x.detach())
        y = f(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (batched,) = torch.autograd.grad(y, x, torch.eye(7, dtype=torch.float64), is_grads_batched=True, retain_graph=True)
    for other in (tangents, stacked, batched.diagonal()):
        torch.testing.assert_close(other, g.detach(), rtol=1e-14, atol=0)
    (h,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(h.sum(), x)
    exact = [float(mp.diff(FUNCTIONS[name][1], mp.mpf(v), 3)) for v in x.tolist()]
    torch.testing.assert_close(third, torch.tensor(exact, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("log", [False, True])
def test_a_softmax_that_is_nearly_certain(log: bool) -> None:
    """`p (g - sum p g)` and its derivative, at `p = 1 - 4e-18`: `g - sum p g` is an exact 0 in torch."""
    x = torch.tensor([[40.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([[3.0, -1.0, 2.0]], dtype=torch.float64)
    v = torch.tensor([[0.5, 2.0, -1.0]], dtype=torch.float64)
    with Accurate():
        y = (torch.log_softmax if log else torch.softmax)(x, 1)
    (first,) = torch.autograd.grad(y, x, g, create_graph=True)
    (second,) = torch.autograd.grad(first, x, v)

    with mp.workdps(120):
        for k in range(3):

            def moved(t: Any, s: Any, k: int = k) -> Any:
                z = [
                    mp.mpf(a) + t * mp.mpf(b) + (s if i == k else 0)
                    for i, (a, b) in enumerate(zip(x[0].tolist(), v[0].tolist(), strict=True))
                ]
                total = mp.fsum(mp.exp(a) for a in z)
                parts = [a - mp.log(total) if log else mp.exp(a) / total for a in z]
                return mp.fsum(mp.mpf(c) * p for c, p in zip(g[0].tolist(), parts, strict=True))

            one = mp.diff(lambda s: moved(0, s), 0, h=mp.mpf(10) ** -40)
            two = mp.diff(moved, (0, 0), (1, 1), h=mp.mpf(10) ** -40)
            assert abs(first[0, k].item() - one) <= 1e-13 * abs(one)
            assert abs(second[0, k].item() - two) <= 1e-13 * abs(two)


def weighted(z: Tensor, y: Tensor) -> Tensor:
    w = torch.tensor([0.5, 2.0, 1.0], dtype=z.dtype)
    return F.binary_cross_entropy_with_logits(z, y, w, pos_weight=torch.tensor(3.0, dtype=z.dtype), reduction="sum")


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "binary cross-entropy": F.binary_cross_entropy_with_logits,
    "weighted": weighted,
    "soft margin": lambda z, y: F.soft_margin_loss(z, 2 * y - 1),
    "multi-label": lambda z, y: F.multilabel_soft_margin_loss(z[None], y[None]),
    "by hand": lambda z, y: (F.softplus(z) - y * z).mean(),
    "logaddexp": lambda z, y: (torch.logaddexp(z, torch.zeros_like(z)) - y * z).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_logits(name: str) -> None:
    z = torch.tensor([36.0, -36.0, 5.0], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64)
    with Accurate():
        loss = LOSSES[name](z, y)
    assert torch.equal(loss.detach(), LOSSES[name](z.detach(), y)) or name == "multi-label"
    (g,) = torch.autograd.grad(loss, z, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), z)
    scale = [1.0, 6.0, 1 + 0.25 * 2] if name == "weighted" else [1 / 3] * 3
    weights = [0.5, 2.0, 1.0] if name == "weighted" else [1.0] * 3
    for k, t in enumerate(z.tolist()):
        if name == "weighted":
            factor = weights[k] * (1 + 2 * y[k].item())
        else:
            factor = scale[k]
        exact = factor * sigmoid(mp.mpf(t)) * sigmoid(-mp.mpf(t))
        if name == "soft margin" and k == 2:
            continue  # its target must be 1 or -1
        assert abs(h[k].item() - exact) <= 1e-14 * exact


@pytest.mark.parametrize("axis", [0, 1])
def test_cumulative_sums_of_exponentials(axis: int) -> None:
    numbers, c = [0.5, 40.0, -3.0, 38.0], [1.0, 2.0, -1.0, 0.5]
    z = torch.tensor([numbers], dtype=torch.float64).movedim(1, axis).requires_grad_()
    with Accurate():
        found = torch.logcumsumexp(z, axis)
    assert torch.equal(found.detach(), torch.logcumsumexp(z.detach(), axis))
    (g,) = torch.autograd.grad((found.reshape(-1) * torch.tensor(c, dtype=torch.float64)).sum(), z, create_graph=True)
    H = torch.stack([torch.autograd.grad(a, z, retain_graph=True)[0].reshape(-1) for a in g.reshape(-1)])
    exact = mp.zeros(4)
    for k in range(4):  # p (1 - p) from the others, without cancellation
        parts = [mp.exp(mp.mpf(a)) if j <= k else mp.mpf(0) for j, a in enumerate(numbers)]
        p = [a / mp.fsum(parts) for a in parts]
        for i, j in itertools.product(range(4), repeat=2):
            exact[i, j] += c[k] * (p[i] * mp.fsum(p[m] for m in range(4) if m != i) if i == j else -p[i] * p[j])
    for i, j in itertools.product(range(4), repeat=2):
        assert abs(H[i, j].item() - exact[i, j]) <= 1e-13 * abs(exact[i, j])


@pytest.mark.parametrize("shape", [(5, 4, 3), (6, 4), (4,)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_is_torchs(shape: tuple[int, ...], smoothing: float, reduction: str) -> None:
    """Values, first and second derivatives; with class indices no zeros are carried back through the softmax."""
    g = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 4, shape[:1] + shape[2:] if len(shape) > 1 else (), generator=g)
    if y.ndim:
        y[0] = -100
    w, v = (torch.rand(s, generator=g, dtype=torch.float64) for s in ((4,), shape))
    for target, weight in itertools.product((y, torch.rand(shape, generator=g, dtype=torch.float64)), (w, None)):

        def loss(target: Tensor = target, weight: Tensor | None = weight) -> Tensor:
            return F.cross_entropy(z, target, weight, reduction=reduction, label_smoothing=smoothing)

        with Accurate():
            ours = loss()
        theirs = loss()
        assert torch.equal(ours, theirs)
        scales = torch.arange(1.0, ours.numel() + 1, dtype=torch.float64).view(ours.shape)
        first = [torch.autograd.grad((a * scales).sum(), z, create_graph=True)[0] for a in (ours, theirs)]
        torch.testing.assert_close(*first, rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(*(torch.autograd.grad(a, z, v)[0] for a in first), rtol=1e-12, atol=1e-15)
        if target is y and not smoothing:
            assert "LogSoftmaxBackward" not in {node.name() for node in nodes_of(first[0])}


def test_cross_entropy_of_nothing_has_no_slope() -> None:
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    with Accurate():
        loss = F.cross_entropy(z, torch.full((3,), -100))
    assert loss.isnan()
    assert not torch.autograd.grad(loss, z)[0].any()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_and_gates_are_torchs(masked: bool) -> None:
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 4, 6, generator=g, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.rand(4, 4, generator=g) > 0.4 if masked else None
    if mask is not None:
        mask[:, 0] = True
    for f in (lambda: F.scaled_dot_product_attention(q, k, v, mask), lambda: F.glu(q) + 0 * k[..., :3] * v[..., :3]):
        with Accurate():
            ours = f()
        with sdpa_kernel(SDPBackend.MATH):
            theirs = f()
        assert torch.equal(ours, theirs)
        for a, b in zip(*(torch.autograd.grad(y.sin().sum(), (q, k, v)) for y in (ours, theirs)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_structure_is_what_masks_and_edges_leave() -> None:
    x = torch.tensor([-900.0, 900.0, 0.5], dtype=torch.float64, requires_grad=True)
    with monitoring() as seen, Accurate():
        (real,) = torch.autograd.grad(torch.tanh(x).sum(), x)
    with monitoring(structural=True), Accurate():
        (ordinary,) = torch.autograd.grad(torch.tanh(x).sum(), x)
        (cut,) = torch.autograd.grad(torch.relu(x).sum(), x)
    assert real[:2].tolist() == [0.0, 0.0]
    assert bool((ordinary > 0.4).all())
    assert cut.tolist() == [0.0, 1.0, 1.0]
    assert len(seen.edges) == 1


def test_an_amplification_that_is_known() -> None:
    """`|x f'' / f'|` of `erf` is `2 x^2`, looked at where the derivative is small."""
    x = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    with monitoring() as seen, Accurate():
        torch.erf(x)
    assert seen.amplification == pytest.approx(18.0, rel=1e-12)
    assert seen.least == pytest.approx(float(2 / mp.sqrt(mp.pi) * mp.exp(-9)), rel=1e-12)


Z = torch.tensor([[0.5, -1.0, 2.0], [3.0, 0.25, -0.75]], dtype=torch.float64)
TARGETS = torch.tensor([2, 0])
WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "log_softmax": lambda z: torch.log_softmax(z, 1),
    "glu": lambda z: F.glu(z.T),
    "soft margin": lambda z: F.soft_margin_loss(z, z.detach().sign()),
    "cross-entropy": lambda z: F.cross_entropy(z, TARGETS, WEIGHTS),
    "cross-entropy, one ignored": lambda z: F.cross_entropy(z, TARGETS, ignore_index=0),
    "cross-entropy, sum": lambda z: F.cross_entropy(z, TARGETS, WEIGHTS, reduction="sum"),
    "cross-entropy, none": lambda z: F.cross_entropy(z, TARGETS, WEIGHTS, reduction="none"),
}


@pytest.mark.parametrize("name", FORWARD)
def test_forward_derivatives_are_torchs(name: str) -> None:
    f, v = FORWARD[name], Z.flip(0) + 1
    expected = torch.func.jvp(f, (Z,), (v,))
    with Accurate():
        found = torch.func.jvp(f, (Z,), (v,))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


def test_third_derivatives_of_the_log_softmax_are_torchs() -> None:
    found = []
    for mode in (Accurate(), nullcontext()):
        z = Z.clone().requires_grad_()
        with mode:
            t = torch.log_softmax(z, 1).mul(WEIGHTS).sum()
        for _ in range(3):
            torch.autograd.grad(t, z, retain_graph=True)  # keeps a softmax that has no derivative
            (g,) = torch.autograd.grad(t, z, create_graph=True)
            t = g.sin().mul(Z.flip(0)).sum()
        found.append(g)
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-14)


HEADS = torch.arange(72, dtype=torch.float64).sin().view(2, 4, 3, 3)  # keys and values: heads, places, width
SIGNS = Z.sign()
LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "a softmax without an axis": F.log_softmax,
    "cumulative sums with an infinity": lambda z: torch.logcumsumexp(torch.where(Z == 3, math.inf, z), 1)[:, 1:],
    "the cumulative sum of a number": lambda z: torch.logcumsumexp(z[0, 0], 0),
    "sums with a mask": lambda z: torch.logaddexp(torch.where(Z < -0.8, -math.inf, z), z.flip(0)),
    "binary cross-entropy": lambda z: F.binary_cross_entropy_with_logits(z, (Z > 0).double(), size_average=False),
    "of probabilities": lambda z: F.binary_cross_entropy(z.sigmoid(), (Z > 0).double(), size_average=False),
    "poisson, of rates": lambda z: F.poisson_nll_loss(z.exp(), Z.exp(), log_input=False),
    "poisson": lambda z: F.poisson_nll_loss(z, Z.exp(), size_average=False),
    "soft margin": lambda z: F.soft_margin_loss(z, SIGNS, size_average=False),
    "cross-entropy": lambda z: F.cross_entropy(z, TARGETS, size_average=False),
    "margins": lambda z: F.multi_margin_loss(z, TARGETS, size_average=False),
    "margins of each": lambda z: F.multilabel_margin_loss(z, TARGETS[:, None].expand(2, 3), reduce=False),
    "attention without any": lambda z: F.scaled_dot_product_attention(z[None], HEADS[0], HEADS[1], dropout_p=1.0),
    "attention, turned": lambda z: F.scaled_dot_product_attention(z[None], HEADS[0], HEADS[1], scale=-0.5),
    "attention, grouped": lambda z: F.scaled_dot_product_attention(
        z.repeat(8, 1).view(1, 8, 2, 3), HEADS[0][None], HEADS[1][None], enable_gqa=True
    ),
}


@pytest.mark.filterwarnings("ignore:(?s).*(size_average|Implicit dimension)")
@pytest.mark.parametrize("name", LEFT)
def test_older_arguments_masks_and_special_cases_are_torchs(name: str) -> None:
    found = []
    for mode in (Accurate(), nullcontext()):
        z = Z.clone().requires_grad_()
        with mode, sdpa_kernel(SDPBackend.MATH):
            y = LEFT[name](z)
        found.append((y.detach(), *torch.autograd.grad(y.sin().sum(), z)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-15)


def softened(z: Tensor) -> Tensor:
    return torch.logsumexp(z, 0) * z + torch.logaddexp(z, z.flip(0)) * torch.logcumsumexp(z, 0)


EACH: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: torch.softmax(z, 0),
    "log_softmax": lambda z: torch.log_softmax(z, 0),
    "log_softmax of pairs": lambda z: torch.log_softmax(torch.stack([z, z.square()]), 0),
    "softmax of a number": lambda z: z * torch.softmax(z[0], 0),
    "sums of exponentials": softened,
    "cross-entropy": lambda z: z * F.cross_entropy(z, torch.tensor(1)),
    "weighted": lambda z: z * F.cross_entropy(z[None], torch.tensor([1]), WEIGHTS),
    "attention": lambda z: F.scaled_dot_product_attention(*z.expand(3, 1, 3).mT.unbind(0)),
}


@pytest.mark.parametrize("name", EACH)
def test_functions_of_each_example_under_vmap_are_those_of_one_after_the_other(name: str) -> None:
    """Reverse and forward derivatives, and what is watched, also where axes that are mapped over do not come first."""
    f = EACH[name]
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda z: torch.stack([f(row) for row in z]),
        torch.func.vmap(f),
        lambda z: torch.func.vmap(f, in_dims=1)(z.T),
    ]
    found = []
    for way in ways:
        z = Z.clone().requires_grad_()
        with monitoring() as seen, Accurate():
            way(z * 1)
        with Accurate():
            y, moved = way(z * 1), torch.func.jvp(way, (Z,), (Z.flip(0),))[1]
        g = torch.autograd.grad(y.sin().sum(), z, create_graph=True)[0]
        second = torch.autograd.grad(g.sin().sum(), z)[0]
        found.append((y.detach(), moved, g.detach(), second, torch.tensor(seen.amplification)))
        assert seen.vanished == (
            way is not ways[0] and name != "softmax of a number"
        )  # nothing is claimed of gradients inside transforms
    for other in found[1:]:
        for ours, theirs in zip(other, found[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_recurrent_layer_that_drops_is_left_to_torch() -> None:
    """Its masks are drawn inside of torch's kernel, so no loop over time has them; here everything is dropped."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 3, generator=g, dtype=torch.float64)
    layer = nn.GRU(3, 2, num_layers=2, dropout=1.0).double()
    with monitoring(), Accurate():
        found = layer(x)
    for ours, theirs in zip(found, layer(x), strict=True):
        assert torch.equal(ours, theirs)
