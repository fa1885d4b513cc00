"""Condition numbers of saturated recurrent layers against mpmath: what is claimed contains the truth.

Only these tests catch gates of torch's fused layers whose derivatives `s (1 - s)` and `1 - t^2` cancel or have become
zero, in padded and packed sequences and in single cells, and a watched pass that computes another layer than torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.network.smooth import Accurate, monitoring

PRECISIONS = [torch.float64, torch.float32]
LAYERS: dict[str, type[nn.Module]] = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
CELLS: dict[str, type[nn.Module]] = {"lstm": nn.LSTMCell, "gru": nn.GRUCell, "rnn": nn.RNNCell}
GATES = {"lstm": 4, "gru": 3, "rnn": 1}


def sigmoid(x: Any) -> Any:
    return 1 / (1 + mp.exp(-x))


def last_state(kind: str, w: list[Any], sequence: list[float]) -> Any:
    """The last output of a layer with one unit and no biases, at weights `(input, hidden)` of each gate."""
    gates = len(w) // 2
    h = c = mp.mpf(0)
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


def exact_kappa(kind: str, weights: list[float], x: list[list[float]]) -> Any:
    """The condition number of the Gauss-Newton matrix of a mean squared error, from difference quotients."""
    with mp.workdps(160):
        step = mp.mpf(10) ** -50
        w = [mp.mpf(v) for v in weights]

        def slope(row: list[float], k: int) -> Any:
            up, down = ([v + s * (j == k) for j, v in enumerate(w)] for s in (step, -step))
            return (last_state(kind, up, row) - last_state(kind, down, row)) / (2 * step)

        J = mp.matrix([[slope(row, k) for k in range(len(w))] for row in x])
        # Steps where a hidden state is 0 have no hidden weights.
        sigma = [s for s in mp.svd_r(J, compute_uv=False) if s > mp.mpf(10) ** -95]
        return (max(sigma) / min(sigma)) ** 2


class Last(nn.Module):
    """The last output of a layer or, unrolled, of a cell."""

    def __init__(self, kind: str, form: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.form = form
        made = CELLS[kind] if form == "cell" else LAYERS[kind]
        self.r = made(1, 1, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "cell":
            state: Any = None
            for step in x.unbind(1):
                state = self.r(step, state)
            return state[0] if isinstance(state, tuple) else state
        if self.form == "packed":
            lengths = torch.full((len(x),), x.shape[1])
            _, state = self.r(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))
            return (state[0] if isinstance(state, tuple) else state)[0]
        return self.r(x.transpose(0, 1))[0][-1]


def check(
    kind: str, form: str, weights: list[float], x: list[list[float]], dtype: torch.dtype
) -> bnp.linalg.ConditionNumber | None:
    """What is measured contains the truth of the weights as they are stored; None where it is refused in words."""
    net = Last(kind, form, dtype)
    half = len(weights) // 2
    with torch.no_grad():
        for p, part in zip(net.parameters(), (weights[:half], weights[half:]), strict=True):
            p.copy_(torch.tensor(part, dtype=dtype)[:, None])
    rows = torch.tensor(x, dtype=dtype)
    try:
        risk = bnp.EmpiricalRisk(net, F.mse_loss, (rows[..., None], torch.zeros(len(x), 1, dtype=dtype)))
        found = bnp.condition_number(bnp.gauss_newton(risk))
    except (bnp.errors.ZeroOperatorError, bnp.errors.InvalidInputError, bnp.errors.DerivativeError):
        # Outputs that are nothing but rounding have no derivatives that differences agree with.
        return None
    truth = exact_kappa(kind, risk.theta.tolist(), rows.tolist())
    assert found.lower <= truth <= found.upper, found
    return found


def drawn(kind: str, size: float, seed: int, steps: int = 3) -> tuple[list[float], list[list[float]]]:
    """Weights of which one gate is as large as `size`, and sequences of different lengths of input."""
    g = torch.Generator().manual_seed(seed)
    weights = torch.randn(2 * GATES[kind], generator=g)
    weights[seed % GATES[kind]] = size
    return weights.tolist(), (0.5 + torch.rand(len(weights) + 2, steps, generator=g)).tolist()


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("layer", torch.float64), ("layer", torch.float32), ("packed", torch.float32), ("cell", torch.float64)],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_saturated_gates(kind: str, form: str, dtype: torch.dtype) -> None:
    sizes = list(enumerate((5.0, -8.0, 17.0, 38.0, -60.0)))
    for seed, size in sizes if (form, dtype) == ("layer", torch.float64) else sizes[2::2]:
        weights, x = drawn(kind, size, seed, steps=2)
        check(kind, form, weights, x, dtype)


@pytest.mark.parametrize("kind", LAYERS)
def test_ordinary_gates_are_two_sided(kind: str) -> None:
    weights, x = drawn(kind, 1.0, 0)
    found = check(kind, "layer", weights, x, torch.float64)
    assert found is not None
    assert found.two_sided


def test_a_difference_of_saturated_states() -> None:
    """The update gate of a GRU gets `h - n`; both are 1 to all digits, and no structure is."""
    weights = [0.3, 0.2, 20.0, 0.1, -0.4, 20.0]
    x = [[1.0, 1.1], [1.2, 0.9], [0.8, 1.0], [1.3, 0.7], [0.6, 0.65], [0.9, 1.4], [1.05, 0.95]]
    for dtype in PRECISIONS:
        found = check("gru", "layer", weights, x, dtype)
        assert found is None or not found.two_sided


OPTIONS: list[dict[str, Any]] = [
    {},
    {"num_layers": 2, "bidirectional": True, "bias": False},
    {"batch_first": True, "bidirectional": True},
]


@pytest.mark.parametrize("options", [*OPTIONS, {"proj_size": 2, "num_layers": 2}])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_loop_over_time_has_the_layers_derivatives(kind: str, options: dict[str, Any]) -> None:
    """Taken apart, as where gates saturate, on gates that do not: torch's own derivatives are right there."""
    if "proj_size" in options and kind != "lstm":
        pytest.skip("only LSTMs have projections")
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 3, generator=g, dtype=torch.float64)
    layer: Callable[[Any], Any] = LAYERS[kind](3, 4, dtype=torch.float64, **options)
    front = "batch_first" in options
    packed = nn.utils.rnn.pack_padded_sequence(x, [5, 4, 4, 1] if front else [4, 4, 3, 2, 1], batch_first=front)

    def derivatives(given: Any) -> tuple[Tensor, ...]:
        total = torch.stack([t.square().sum() for t in tensors(layer(given))]).sum()
        return torch.autograd.grad(total, list(layer.parameters()))

    for given in (x, x[0], packed):
        expected = derivatives(given)
        with monitoring(), Accurate():
            found = derivatives(given)
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def tensors(output: Any) -> list[Tensor]:
    out, state = output
    return [out if isinstance(out, Tensor) else out.data, *(state if isinstance(state, tuple) else (state,))]
