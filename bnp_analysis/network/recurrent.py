"""What saturated gates do to the derivatives of torch's recurrent layers.

torch takes the derivatives of their gates as `s (1 - s)` and `1 - t^2`, inside kernels that cannot be replaced at a
reasonable price. Where a risk is watched, the same layers run as a loop over time, so that every gate is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode

from bnp_analysis.network.smooth import Valued, Watch, current_watch, generic

# States that are nearer to 1 than this cancel where torch subtracts them.
_SATURATED = 0.1

State = tuple[Tensor, ...]
# (watch, rows of one step, state, weights and biases) -> the next state, of which the first tensor is the output.
Cell = Callable[[Watch, Tensor, State, list[Tensor | None]], State]


class Unfused(TorchFunctionMode):
    """Recurrent layers called inside a watched pass have torch's values, and derivatives by a loop over time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        watch = current_watch()
        if watch is None or func not in _CELLS:
            return func(*args, **(kwargs or {}))
        value = func(*args, **(kwargs or {}))
        formula = (_one_step if func.__name__.endswith("_cell") else _layers)(_CELLS[func], watch, *args)
        if isinstance(value, Tensor):
            return _valued(value, formula[0])
        return tuple(_valued(v, f) for v, f in zip(value, formula, strict=True))


def _valued(value: Tensor, formula: Tensor) -> Tensor:
    return cast(Tensor, Valued.apply(value.detach(), formula))  # type: ignore[no-untyped-call]


def _one_step(cell: Cell, watch: Watch, x: Tensor, state: Any, *weights: Tensor | None) -> State:
    return cell(watch, x, (state,) if isinstance(state, Tensor) else tuple(state), list(weights))


def _layers(cell: Cell, watch: Watch, x: Tensor, *rest: Any) -> State:
    """All layers and directions, as `torch.lstm` and its like are called: of padded or of packed sequences."""
    sizes, batch_first = None, False
    if isinstance(rest[1], (list, tuple)) and isinstance(rest[2], bool):
        states, weights, biases, layers, dropout, train, both, batch_first = rest
        steps = list(x.unbind(int(batch_first)))
    else:
        sizes, states, weights, biases, layers, dropout, train, both = rest
        steps = list(torch.split(x, sizes.tolist()))
    states = (states,) if isinstance(states, Tensor) else tuple(states)
    directions = 1 + int(both)
    each = len(weights) // (layers * directions)
    last: list[State] = []
    for layer in range(layers):
        if layer:
            steps = [torch.dropout(step, dropout, train) for step in steps]
        found = []
        for direction in range(directions):
            k = layer * directions + direction
            own = list(weights[k * each : (k + 1) * each])
            own = own if biases else [*own[:2], None, None, *own[2:]]
            state, outputs = tuple(s[k] for s in states), []
            for step in reversed(steps) if direction else steps:
                # Of packed sequences the longest come first: the others have ended, or not yet begun.
                n = len(step)
                new = cell(watch, step, tuple(s[:n] for s in state), own)
                outputs.append(new[0])
                state = tuple(torch.cat([a, s[n:]]) for a, s in zip(new, state, strict=True))
            found.append(outputs[::-1] if direction else outputs)
            last.append(state)
        steps = [torch.cat(parts, -1) for parts in zip(*found, strict=True)]
    out = torch.stack(steps, int(batch_first)) if sizes is None else torch.cat(steps)
    return out, *(torch.stack(parts) for parts in zip(*last, strict=True))


def _lstm(watch: Watch, x: Tensor, state: State, weights: list[Tensor | None]) -> State:
    (h, c), (w, u, b, d, *projection) = state, weights
    i, f, g, o = (_linear(x, w, b) + _linear(h, u, d)).chunk(4, -1)
    c = _sigmoid(watch, f) * c + _sigmoid(watch, i) * _tanh(watch, g)
    h = _sigmoid(watch, o) * _tanh(watch, c)
    return (_linear(h, projection[0], None) if projection else h), c


def _gru(watch: Watch, x: Tensor, state: State, weights: list[Tensor | None]) -> State:
    (h,), (w, u, b, d) = state, weights
    (xr, xz, xn), (hr, hz, hn) = _linear(x, w, b).chunk(3, -1), _linear(h, u, d).chunk(3, -1)
    n = _tanh(watch, xn + _sigmoid(watch, xr + hr) * hn)
    if not watch.structural:
        _note_difference(watch, h, n)
    # torch has 1 - z; where z is near 1, its error is that of the derivative of z.
    return (_sigmoid(watch, -xz - hz) * n + _sigmoid(watch, xz + hz) * h,)


def _rnn(watch: Watch, x: Tensor, state: State, weights: list[Tensor | None]) -> State:
    (h,), (w, u, b, d) = state, weights
    return (_tanh(watch, _linear(x, w, b) + _linear(h, u, d)),)


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.linear(x, cast(Tensor, weight), bias)


def _sigmoid(watch: Watch, x: Tensor) -> Tensor:
    y = torch.sigmoid(x)
    if watch.structural:
        # Gates are factors as well: what they close is no structure either.
        return _valued(generic(y), y)
    _note(watch, x, lambda z: (1 - torch.sigmoid(z), torch.exp(z)))
    return y


def _tanh(watch: Watch, x: Tensor) -> Tensor:
    y = torch.tanh(x)
    if watch.structural:
        return _valued(generic(y) * (x != 0), y)
    _note(watch, x, lambda z: (1 - torch.tanh(z) ** 2, 2 * torch.sinh(z) ** 2))
    return y


def _note(watch: Watch, x: Tensor, cancelling: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    """What torch's derivative loses where a gate is nearly 1: roundings of 1, relative to the difference to 1."""
    if is_functorch_wrapped_tensor(x):
        watch.amplify(torch.inf)
        return
    difference, lost = cancelling(x.detach())
    watch.vanished = watch.vanished or bool((difference == 0).any())
    if lost.numel():
        # A difference that is nothing but rounding is wrong by itself.
        watch.amplify(min(float(lost.max()), 1 / torch.finfo(x.dtype).eps))


def _note_difference(watch: Watch, h: Tensor, n: Tensor) -> None:
    """The derivative by a GRU's gate is `h - n`, of two numbers that may both be nearly 1 or both nearly -1."""
    if is_functorch_wrapped_tensor(h):
        return
    h, n = h.detach(), n.detach()
    near = torch.minimum(h * n.sign(), n.abs()) > 1 - _SATURATED
    gap = (h - n).abs()[near]
    if gap.numel():
        watch.vanished = watch.vanished or bool((gap == 0).any())
        watch.amplify(min(1 / max(float(gap.min()), 1e-300), 1 / torch.finfo(n.dtype).eps))


_CELLS: dict[Any, Cell] = {
    torch.lstm: _lstm,
    torch.lstm_cell: _lstm,
    torch.gru: _gru,
    torch.gru_cell: _gru,
    torch.rnn_tanh: _rnn,
    torch.rnn_tanh_cell: _rnn,
}
