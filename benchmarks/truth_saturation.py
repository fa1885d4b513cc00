"""Saturated activations, losses and recurrent gates: their Gauss-Newton matrices, answered by mpmath.

One or two numbers decide each answer: the slopes of a unit at two pre-activations, the curvature of a loss at two
logits, the derivatives of a recurrent layer by its weights. Both signs, both precisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mpmath as mp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from truth_problems import BOTH, Case, Problem, Truth

import bnp_analysis as bnp

METHODS = (*BOTH, "dense", "lanczos")
F64, F32 = torch.float64, torch.float32


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def bell(x: Any) -> Any:
    return sigmoid(x) * sigmoid(-x)


def by_probabilities(z: Tensor, y: Tensor) -> Tensor:
    return -(y * torch.log(torch.sigmoid(z)) + (1 - y) * torch.log(torch.sigmoid(-z))).mean()


def by_log1p(z: Tensor, y: Tensor) -> Tensor:
    return (z.clamp(min=0) - z * y + torch.log1p(torch.exp(-z.abs()))).mean()


# Loss of logits -> a multiple of its curvature there.
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Any], Any]]] = {
    "binary cross-entropy": (F.binary_cross_entropy_with_logits, bell),
    "soft margin": (lambda z, y: F.soft_margin_loss(z, 2 * y - 1), bell),
    "by probabilities": (by_probabilities, bell),
    "by log1p": (by_log1p, bell),
    "log cosh": (lambda z, y: torch.log(torch.cosh(z)).mean() + 0 * y.sum(), lambda z: bell(2 * z)),
    "Poisson": (F.poisson_nll_loss, mp.exp),
    "softplus": (lambda z, y: F.softplus(z).mean() + 0 * y.sum(), bell),
}
ACTIVATIONS: dict[str, tuple[nn.Module, Callable[[Any], Any]]] = {
    "tanh": (nn.Tanh(), mp.tanh),
    "sigmoid": (nn.Sigmoid(), sigmoid),
    "gelu": (nn.GELU(), lambda x: x * mp.ncdf(x)),
    "silu": (nn.SiLU(), lambda x: x * sigmoid(x)),
    "softplus": (nn.Softplus(), lambda x: mp.log1p(mp.exp(x))),
    "logsigmoid": (nn.LogSigmoid(), lambda x: -mp.log1p(mp.exp(-x))),
    "mish": (nn.Mish(), lambda x: x * mp.tanh(mp.log1p(mp.exp(x)))),
    "elu": (nn.ELU(), lambda x: x if x > 0 else mp.expm1(x)),
    "softsign": (nn.Softsign(), lambda x: x / (1 + abs(x))),
}
SIZES = (8.0, 14.0, 20.0, 28.0, 37.0, 60.0)


def answer(kappa: Any, rank: int) -> Truth:
    """An answer of many digits as an interval of floats; infinite where it is none."""
    value = float(kappa) if kappa < mp.mpf(10) ** 300 else float("inf")
    return Truth(value * (1 - 1e-15), value * (1 + 1e-15), "mpmath", rank)


def of_loss(name: str, values: tuple[float, float], dtype: torch.dtype) -> Callable[[], Case]:
    """A loss at two logits, each of a weight of its own: the matrix is diagonal."""

    def make() -> Case:
        loss, curvature = LOSSES[name]
        model = nn.Linear(2, 1, bias=False, dtype=dtype)
        with torch.no_grad():
            model.weight.copy_(torch.tensor([values], dtype=dtype))
        risk = bnp.EmpiricalRisk(model, loss, (torch.eye(2, dtype=dtype), torch.zeros(2, 1, dtype=dtype)))
        with mp.workdps(60):
            S = [curvature(mp.mpf(z)) for z in values]
            truth = answer(max(S) / min(S), 2)
        return Case(bnp.gauss_newton(risk), truth, METHODS)

    return make


def of_activation(name: str, values: tuple[float, float], dtype: torch.dtype) -> Callable[[], Case]:
    """A unit at two pre-activations with slopes `a`, `b`: the rows are `(a, 0, a)` and `(0, b, b)`."""

    def make() -> Case:
        activation, exact = ACTIVATIONS[name]
        net = nn.Sequential(nn.Linear(2, 1, dtype=dtype), activation, nn.Linear(1, 1, dtype=dtype))
        with torch.no_grad():
            net[0].weight.copy_(torch.tensor([values], dtype=dtype))
            net[0].bias.zero_()
            net[2].weight.fill_(1.0)
        risk = bnp.EmpiricalRisk(net, F.mse_loss, (torch.eye(2, dtype=dtype), torch.zeros(2, 1, dtype=dtype)))
        with mp.workdps(300):
            a, b = (mp.diff(exact, mp.mpf(z), h=mp.mpf(10) ** -80) for z in values)
            trace, determinant = 2 * (a * a + b * b), 3 * a * a * b * b
            top = (trace + mp.sqrt(trace * trace - 4 * determinant)) / 2
            truth = answer(top * top / determinant, 2)
        return Case(bnp.gauss_newton(risk, block="0"), truth, METHODS)

    return make


class Last(nn.Module):
    """The last output of a recurrent layer with one unit and no biases."""

    def __init__(self, layer: Callable[..., nn.Module], dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = layer(1, 1, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.T[..., None])[0][-1]


LAYERS: dict[str, Callable[..., nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}


def last(kind: str, w: list[Any], sequence: list[float]) -> Any:
    """The output of `Last` at weights `(input, hidden)` of each gate."""
    h = c = mp.mpf(0)
    gates = len(w) // 2
    for x in sequence:
        a, b = [v * x for v in w[:gates]], [v * h for v in w[gates:]]
        if kind == "lstm":
            i, f, g, o = (p + q for p, q in zip(a, b, strict=True))
            c = sigmoid(f) * c + sigmoid(i) * mp.tanh(g)
            h = sigmoid(o) * mp.tanh(c)
        elif kind == "gru":
            z, n = sigmoid(a[1] + b[1]), mp.tanh(a[2] + sigmoid(a[0] + b[0]) * b[2])
            h = sigmoid(-a[1] - b[1]) * n + z * h
        else:
            h = mp.tanh(a[0] + b[0])
    return h


def of_gates(kind: str, gate: int, size: float, dtype: torch.dtype) -> Callable[[], Case]:
    """A recurrent layer on two steps whose one gate is as far from zero as `size`; the Jacobian by differences."""

    def make() -> Case:
        g = torch.Generator().manual_seed(gate + 1)
        net = Last(LAYERS[kind], dtype)
        gates = net.layer.weight_ih_l0.shape[0]
        weights = torch.randn(2 * gates, 1, generator=g).to(dtype)
        weights[gate] = size
        with torch.no_grad():
            for p, part in zip(net.parameters(), weights.split(gates), strict=True):
                p.copy_(part)
        x = (0.5 + torch.rand(4 * gates, 2, generator=g)).to(dtype)
        # Not compared with differences at construction, which refuses outputs that are nothing but rounding.
        data = x, torch.zeros(len(x), 1, dtype=dtype)
        risk = bnp.EmpiricalRisk(net, F.mse_loss, data, derivatives="surrogate")
        with mp.workdps(160):
            step, w = mp.mpf(10) ** -50, [mp.mpf(v) for v in risk.theta.tolist()]

            def slope(row: list[float], k: int) -> Any:
                up, down = ([v + s * (j == k) for j, v in enumerate(w)] for s in (step, -step))
                return (last(kind, up, row) - last(kind, down, row)) / (2 * step)

            J = mp.matrix([[slope(row, k) for k in range(len(w))] for row in x.tolist()])
            sigma = mp.svd_r(J, compute_uv=False)
            truth = answer((max(sigma) / min(sigma)) ** 2, len(w))
        return Case(bnp.gauss_newton(risk), truth, METHODS)

    return make


def problems() -> Iterator[Problem]:
    """All saturated problems."""
    for dtype in (F64, F32):
        group = "saturated" if dtype == F64 else "saturated, float32"
        for size in SIZES:
            for sign in (1, -1):
                for values in ((0.5, sign * size), (sign * size, sign * (size + 0.25))):
                    quick = values == (0.5, 37.0)
                    for name in LOSSES:
                        # 0 log 0 is no number.
                        if not (name == "by probabilities" and _vanishes(values, dtype)):
                            yield Problem(group, f"{name} at logits {values}", of_loss(name, values, dtype), quick)
                    for name in ACTIVATIONS:
                        yield Problem(group, f"{name} at {values}", of_activation(name, values, dtype), quick)
        for kind, gates in (("lstm", 4), ("gru", 3), ("rnn", 1)):
            for gate in range(gates):
                for size in (1.0, 6.0, -6.0, 12.0, -12.0, 20.0, -20.0):
                    make = of_gates(kind, gate, size, dtype)
                    yield Problem(group, f"{kind}, gate {gate} at about {size:g}", make, size == 12.0 and gate == 0)


def _vanishes(values: tuple[float, float], dtype: torch.dtype) -> bool:
    z = torch.tensor(values, dtype=dtype)
    return bool((torch.sigmoid(z) * torch.sigmoid(-z) == 0).any())
