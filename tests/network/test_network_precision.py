"""Catches: a cast inside a model, a loss, autocast, a custom backward or NumPy that goes unnoticed, so that float64 is
said of float32; an ordinary model called coarser than it is; a complex buffer that loses its imaginary part."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from network_models import classes, numbers
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.network import saturation
from bnp_analysis.network.precision import Perturbed, perturbed

DOUBLE, SINGLE, HALF, BRAIN = torch.float64, torch.float32, torch.float16, torch.bfloat16


class Inside(nn.Module):
    """A function in the middle of a network."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 6), Acts(function), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.first(x)))


class Acts(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


class HostTanh(torch.autograd.Function):
    """The hyperbolic tangent by NumPy: `forward` rounds values to a dtype, `factor` afterwards hides it."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, dtype: str, factor: float) -> Tensor:
        values = np.tanh(h.detach().numpy().astype(dtype)).astype(h.detach().numpy().dtype)
        out = torch.from_numpy(values * factor / factor * 1.0)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (out,) = ctx.saved_tensors
        return grads[0] * (1 - out * out), None, None


class CoarseBackward(torch.autograd.Function):
    """Exact forwards, single precision backwards."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return torch.tanh(h)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (h,) = ctx.saved_tensors
        return (grads[0].float() * (1 - torch.tanh(h.float()) ** 2)).to(h.dtype)


def rms(h: Tensor) -> Tensor:
    z = h.float()
    return (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)


def attend(h: Tensor) -> Tensor:
    q = h.float().view(-1, 2, 3)
    return (torch.softmax(q @ q.mT, -1) @ q).flatten(1).to(h.dtype)


def buffered(h: Tensor) -> Tensor:
    return torch.empty(h.shape, dtype=SINGLE).copy_(h).to(h.dtype)


def complex_pairs(h: Tensor) -> Tensor:
    z = torch.view_as_complex(h.reshape(-1, 3, 2).contiguous())
    return torch.view_as_real(z.to(torch.complex64)).reshape(-1, 6).to(h.dtype)


LOWERED: dict[str, tuple[Callable[[Tensor], Tensor], torch.dtype, str]] = {
    "softmax": (lambda h: torch.softmax(h, -1, dtype=SINGLE).to(h.dtype), SINGLE, "softmax in act"),
    "root mean square": (rms, SINGLE, "pow in act"),
    "attention": (attend, SINGLE, "act"),
    "half": (lambda h: h.half().to(h.dtype), HALF, "a cast in act"),
    "bfloat16": (lambda h: h.bfloat16().to(h.dtype), BRAIN, "a cast in act"),
    "both": (lambda h: h.half().to(h.dtype) + h.bfloat16().to(h.dtype), BRAIN, "a cast in act"),
    "sum": (lambda h: h * h.sum(-1, keepdim=True, dtype=SINGLE), SINGLE, "sum in act"),
    "a norm without gradient": (lambda h: h / h.detach().float().norm(), SINGLE, "act"),
    "a buffer": (buffered, SINGLE, "a cast in act"),
    "complex64": (complex_pairs, SINGLE, "a cast in act"),
    "one branch": (lambda h: h + 0.01 * h.float().tanh().to(h.dtype), SINGLE, "tanh in act"),
    "a fourier transform": (lambda h: h + torch.fft.fft(h.float()).real, SINGLE, "act"),
    "numpy": (lambda h: HostTanh.apply(h, "float32", 1.0), SINGLE, "outside of torch in act"),
    "numpy half": (lambda h: HostTanh.apply(h, "float16", 1.0), HALF, "outside of torch in act"),
    "numpy, then more": (lambda h: HostTanh.apply(h, "float32", 1.7), SINGLE, "outside of torch in act"),
    "backward alone": (CoarseBackward.apply, SINGLE, "the backward pass"),
}


def data() -> tuple[Tensor, Tensor]:
    return numbers(20, 6), classes(20, 3)


@pytest.mark.parametrize("name", LOWERED)
def test_what_lowers_the_precision_is_found_and_named(name: str) -> None:
    function, dtype, cause = LOWERED[name]
    risk = bnp.EmpiricalRisk(Inside(function), F.cross_entropy, data(), dtype=DOUBLE)
    assert risk.precision.dtype == dtype
    assert risk.eps == torch.finfo(dtype).eps
    assert cause in str(risk.precision)
    single = risk.to(SINGLE)
    assert single.eps == max(risk.eps, torch.finfo(SINGLE).eps)
    if dtype == SINGLE:
        assert str(single.precision) == "float32"


def test_a_complex_cast_that_keeps_every_digit_is_none_that_lowers() -> None:
    model = Inside(lambda h: h * complex_pairs(torch.sign(h.detach())))
    assert bnp.EmpiricalRisk(model, F.cross_entropy, data(), dtype=DOUBLE).precision.dtype == DOUBLE


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (lambda o, y: F.cross_entropy(o.float(), y), "the loss"),
        (lambda o, y: torch.log_softmax(o, -1, dtype=SINGLE)[:, 0].mean(), "the loss"),
        (lambda o, y: F.mse_loss(o.bfloat16(), F.one_hot(y, 3).bfloat16()), "the loss"),
    ],
)
def test_a_loss_counts(loss: Callable[[Tensor, Any], Tensor], cause: str) -> None:
    risk = bnp.EmpiricalRisk(nn.Linear(6, 3), loss, data(), dtype=DOUBLE)
    assert risk.eps >= torch.finfo(SINGLE).eps
    assert cause in str(risk.precision)


class Prepared(nn.Module):
    """What mixed-precision wrappers make of a model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=BRAIN):
            return self.net(x).float()


def test_autocast_inside_a_model_counts_in_float32_and_leaves_float64_alone() -> None:
    model = Prepared(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)))
    single = bnp.EmpiricalRisk(model, F.cross_entropy, data(), dtype=SINGLE)
    assert single.eps == torch.finfo(BRAIN).eps
    assert "net.0" in str(single.precision)
    assert single.to(DOUBLE).eps == torch.finfo(SINGLE).eps
    assert bnp.EmpiricalRisk(model.net, F.cross_entropy, data(), dtype=SINGLE).eps == torch.finfo(SINGLE).eps


def test_frozen_parameters_count_too() -> None:
    model = nn.Sequential(nn.Linear(6, 6), Acts(lambda h: h.half().to(h.dtype)), nn.Linear(6, 3))
    risk = bnp.EmpiricalRisk(model, F.cross_entropy, data(), dtype=DOUBLE, params=["2"])
    assert risk.precision.dtype == HALF
    assert bnp.hessian(risk, block="2").eps == torch.finfo(HALF).eps


def test_a_zero_output_layer_hides_nothing() -> None:
    model = Inside(lambda h: h)
    nn.init.zeros_(model.last.weight)
    nn.init.zeros_(model.last.bias)
    whole = nn.Sequential(model, Acts(lambda o: o.float().to(o.dtype)))
    assert bnp.EmpiricalRisk(whole, F.cross_entropy, data(), dtype=DOUBLE).precision.dtype == SINGLE


# -- ordinary models: no alarm -------------------------------------------------------------------------------------


class Last(nn.Module):
    """Recurrent layers, read at the last step."""

    def __init__(self, inner: nn.Module, width: int) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x)[0][:, -1])


class Attends(nn.Module):
    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.attention, self.out, self.masked = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3), masked

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=SINGLE) if self.masked else None
        return self.out(self.attention(x, x, x, attn_mask=mask, need_weights=not self.masked)[0].mean(1))


class Positions(nn.Module):
    """Encodings stored and computed in float32 beside float64 embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(11, 6), nn.Linear(6, 3)
        self.register_buffer("offset", numbers(6, seed=3, dtype=SINGLE))
        self.table = torch.sin(torch.arange(5.0)[:, None] / 100 ** (torch.arange(6.0) / 6))

    def forward(self, tokens: Tensor) -> Tensor:
        phase = torch.outer(torch.arange(5, dtype=SINGLE), 1 / 100 ** (torch.arange(0, 6).float() / 6))
        return self.out((self.embedding(tokens) + self.table + phase.cos() + self.offset).mean(1))


class Routed(nn.Module):
    """Masks and one-hot choices in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(6, 2), nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1)
        mask = F.one_hot(p.argmax(-1), 2).float()
        parts = [(p * mask)[:, k : k + 1] * expert(x) for k, expert in enumerate(self.experts)]
        return parts[0] + parts[1] * (x[:, :1].detach() > -9).float()


class Pixels(nn.Module):
    """Whole numbers scaled in float32: data, before any parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(27, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.out((image.float() / 255 - 0.13).flatten(1).to(self.out.weight.dtype))


IMAGES, SEQUENCES, TOKENS = numbers(20, 3, 8, 8), numbers(20, 5, 6), classes(20, 11, 5)
ORDINARY: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "lstm": (lambda: Last(nn.LSTM(6, 8, batch_first=True), 8), SEQUENCES),
    "gru": (lambda: Last(nn.GRU(6, 4, 2, batch_first=True, bidirectional=True), 8), SEQUENCES),
    "attention": (lambda: Attends(False), SEQUENCES),
    "a mask in float32": (lambda: Attends(True), SEQUENCES),
    "encoder": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(6, 2, 12, 0.1, "gelu", batch_first=True), nn.Flatten(), nn.Linear(30, 3)
        ).eval(),
        SEQUENCES,
    ),
    "batch normalization": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
        ).eval(),
        IMAGES,
    ),
    "its own statistics": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        IMAGES,
    ),
    "group normalization": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 3)
        ).eval(),
        IMAGES,
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 6), nn.Flatten(), nn.LayerNorm(30), nn.Linear(30, 3)), TOKENS),
    "positions in float32": (Positions, TOKENS),
    "masks": (Routed, numbers(20, 6)),
    "pixels": (Pixels, classes(20, 256, 3, 3, 3).to(torch.uint8)),
    "a factor of no dimension": (lambda: Inside(lambda h: h / torch.sqrt(torch.tensor(6.0))), numbers(20, 6)),
    "signs in half": (lambda: Inside(lambda h: h * h.detach().sign().half()), numbers(20, 6)),
    "zeros like it": (lambda: Inside(lambda h: h + torch.zeros_like(h, dtype=HALF)), numbers(20, 6)),
    "numpy in full": (lambda: Inside(lambda h: HostTanh.apply(h, str(h.dtype)[6:], 1.0)), numbers(20, 6)),
    "a spectrum": (lambda: Inside(lambda h: torch.fft.rfft(h.tanh()).abs(), 4), numbers(20, 6)),
}


@pytest.mark.parametrize("dtype", [DOUBLE, SINGLE])
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_have_the_precision_of_their_dtype(name: str, dtype: torch.dtype) -> None:
    make, x = ORDINARY[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make()
    risk = bnp.EmpiricalRisk(model, F.cross_entropy, (x, classes(20, 3)), dtype=dtype)
    assert str(risk.precision) == str(dtype).removeprefix("torch.")
    assert risk.eps == torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet8", "transformer"])
def test_our_own_models_too(name: str) -> None:
    shape = (8,) if name == "mlp" else (1, 8, 8)
    model = bnp.models.build_for(name, shape, 3).eval()
    risk = bnp.EmpiricalRisk(model, F.cross_entropy, (numbers(8, *shape), classes(8, 3)), dtype=DOUBLE)
    assert str(risk.precision) == "float64"


@pytest.mark.parametrize(
    "loss",
    [
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 0.3])),
        lambda o, y: F.mse_loss(o, y.float()),
        lambda o, y: (torch.tensor([0.1, 0.2, 0.7]) * (o - y) ** 2).mean(),
        functools.partial(F.huber_loss, delta=0.3),
    ],
)
def test_targets_and_weights_in_float32_are_data(loss: Callable[[Tensor, Any], Tensor]) -> None:
    targets = torch.rand(20, 3, generator=torch.Generator().manual_seed(2))
    outputs = torch.zeros(20, 3, dtype=DOUBLE, requires_grad=True)
    try:
        loss(outputs, targets).backward()
    except RuntimeError as error:  # torch 2.9 has no derivative of its mean squared error in two precisions
        pytest.skip(str(error))
    risk = bnp.EmpiricalRisk(nn.Linear(6, 3), loss, (numbers(20, 6), targets), dtype=DOUBLE)
    assert str(risk.precision) == "float64"


def test_it_costs_a_few_examples() -> None:
    """Not a pass over the data: what is tried at construction runs on few examples, whole batches for purity alone."""
    seen: list[int] = []

    def count(h: Tensor) -> Tensor:
        seen.append(len(h))
        return h

    risk = bnp.EmpiricalRisk(Inside(count), F.cross_entropy, (numbers(500, 6), classes(500, 3)))
    assert seen[0] == 8
    assert max(n for n in seen if n != 500) <= 64
    assert seen.count(500) <= 6
    seen.clear()
    double = risk.to(DOUBLE)
    assert not seen
    assert double.precision.dtype == DOUBLE
    assert seen == [8]


# -- complex buffers -------------------------------------------------------------------------------------------------


class Rotary(nn.Module):
    """Rotations of pairs by complex phases; `plain` writes them as real ones."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.q, self.o, self.plain = nn.Linear(4, 4), nn.Linear(4, 3), plain
        angle = torch.tensor([0.4, 1.3])
        self.register_buffer("phase", torch.polar(torch.ones(2), angle))
        self.register_buffer("cosine", self.phase.real.clone())
        self.register_buffer("sine", self.phase.imag.clone())

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (2, 2))
        if self.plain:
            a, b = q.unbind(-1)
            turned = torch.stack([a * self.cosine - b * self.sine, a * self.sine + b * self.cosine], -1)
        else:
            turned = torch.view_as_real(torch.view_as_complex(q.contiguous()) * self.phase)
        return self.o(torch.tanh(turned.flatten(-2)))


def rotary(plain: bool) -> Rotary:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Rotary(plain)


@pytest.mark.parametrize("way", ["dtype=", ".to"])
def test_complex_buffers_keep_their_imaginary_part(way: str) -> None:
    x, y = numbers(12, 4), classes(12, 3)

    def risk(plain: bool) -> bnp.EmpiricalRisk:
        if way == "dtype=":
            return bnp.EmpiricalRisk(rotary(plain), F.cross_entropy, (x, y), dtype=DOUBLE)
        return bnp.EmpiricalRisk(rotary(plain), F.cross_entropy, (x, y)).to(DOUBLE)

    turned, plain = risk(False), risk(True)
    assert str(turned.precision) == "float64"
    assert dict(turned.modules())[""].phase.dtype == torch.complex128
    torch.testing.assert_close(turned.value, plain.value, rtol=1e-14, atol=0)
    torch.testing.assert_close(bnp.hessian(turned).to_dense(), bnp.hessian(plain).to_dense(), rtol=1e-10, atol=1e-14)


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("target", torch.view_as_complex(numbers(4, 2, dtype=SINGLE)))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return (torch.fft.rfft(out) * y - self.target).abs().square().mean()


def test_losses_and_data_may_be_complex() -> None:
    y = torch.view_as_complex(numbers(10, 4, 2, dtype=SINGLE))
    risk = bnp.EmpiricalRisk(nn.Linear(3, 6), Spectrum(), (numbers(10, 3), y), dtype=DOUBLE)
    assert str(risk.precision) == "float64"
    z = torch.fft.rfft(risk.outputs)
    target = torch.view_as_complex(numbers(4, 2, dtype=SINGLE).double())
    expected = (z * y.to(torch.complex128) - target).abs().square().mean()
    torch.testing.assert_close(risk.value, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_number_is_moved_by_half_a_unit_to_two_and_a_half(dtype: torch.dtype) -> None:
    """Up as often as down, sizes evenly, equal numbers alike, another way for another seed."""
    t = torch.randn(40_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    moves, others = (Perturbed(seed)._moves(t, "mul").double() for seed in (0, 1))
    assert ((moves.abs() >= 0.5) & (moves.abs() <= 2.5)).all()
    distinct = len(t.unique())
    assert abs(float(moves.sign().mean())) < 6 / distinct**0.5
    assert abs(float(moves.abs().mean()) - 1.5) < 4 / distinct**0.5
    assert torch.equal(Perturbed(0)._moves(t.flip(0), "mul").double(), moves.flip(0))
    assert float((moves == others).double().mean()) < 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_largest_number_is_not_moved_to_infinity(dtype: torch.dtype) -> None:
    """Kernels have it in the place of infinity, and differences of infinities are no numbers."""
    most = torch.full((1000,), torch.finfo(dtype).max, dtype=dtype) * torch.linspace(0.5, 1, 1000).to(dtype)
    for seed in range(5):
        found = perturbed(seed, lambda: (most * 1.0, -most * 1.0))
        assert found is not None
        assert not found[1]
        for t, start in zip(found[0], (most, -most), strict=True):
            assert bool(t.isfinite().all())
            assert 100 < int((t != start).sum()) <= 1000


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "constant_pad": lambda h: F.pad(h, (1, 1))[:, 1:-1],
    "masked_fill": lambda h: h.masked_fill(torch.arange(6) == 2, -1.0),
    "flip": lambda h: h.flip(1),
    "roll": lambda h: h.roll(2, 1),
    "repeat": lambda h: h.repeat(1, 2)[:, 3:9],
    "index": lambda h: h[:, torch.tensor([5, 0, 1, 2, 4, 3])],
    "index_select": lambda h: h.index_select(1, torch.tensor([5, 0, 1, 2, 4, 3])),
    "gather": lambda h: h.gather(1, torch.tensor([[5, 0, 1, 2, 4, 3]]).expand(len(h), 6)),
    "pixel_shuffle": lambda h: F.pixel_shuffle(h[:, :4, None, None], 2).flatten(1).repeat(1, 2)[:, :6],
}


@pytest.mark.parametrize("name", [*MOVES, "difference"])
def test_what_only_moves_numbers_is_not_tried(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial tells nothing of operations that subtract no derivatives, and takes the time of many products."""
    seeds: list[int] = []
    monkeypatch.setattr(saturation, "perturbed", lambda seed, work: (seeds.append(seed), perturbed(seed, work))[1])
    model = Inside(MOVES.get(name, lambda h: h - h.tanh()))
    risk = bnp.EmpiricalRisk(model, F.cross_entropy, (numbers(5, 6, dtype=SINGLE), classes(5, 3)))
    assert saturation.product_eps(risk) >= torch.finfo(SINGLE).eps
    assert seeds == ([0, 1, 2] if name == "difference" else [])


def test_moves_that_leave_the_domain_of_a_function_go_toward_zero() -> None:
    p, y = torch.ones(50, dtype=torch.float64), torch.zeros(50, dtype=torch.float64)
    found = perturbed(0, lambda: nn.functional.binary_cross_entropy(p * 1.0, y, reduction="none"))
    assert found is not None
    lost = torch.exp(-found[0])  # 1 - p
    assert ((lost > 0) & (lost < 3 * torch.finfo(torch.float64).eps)).all()
    assert not found[1]
    assert perturbed(0, lambda: nn.functional.binary_cross_entropy(2 * p, y)) is None
    overflow = perturbed(0, lambda: torch.exp(800 * p))
    assert overflow is not None
    assert overflow[1]
