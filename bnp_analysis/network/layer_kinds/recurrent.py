"""Recurrent layers and cells: input map and recurrent map of each layer and direction are layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from bnp_analysis.network.layer_kinds.base import Apart, LayerKind, enter
from bnp_analysis.network.layer_kinds.dense import DenseLayer
from bnp_analysis.network.smooth import LOOPS


class RecurrentMap(DenseLayer):
    """One of the maps `W_ih x_t + b_ih`, `W_hh h_(t-1) + b_hh` of a recurrent layer, all gates together.

    Its rows are (example, time step): `x_t`, or the output of the layer below, and the state before the step, the first
    one included. Each map has the bias that torch gives it, so that no parameter belongs to two of them, also where
    only the sum of both biases matters. The projection of an LSTM, `W_hr (o_t tanh c_t)`, is a third map.
    """

    inner = True

    @classmethod
    def kinds(cls, kind: LayerKind, module: Any) -> list[LayerKind]:
        if isinstance(module, nn.RNNCellBase):
            ends = ["ih", "hh"]
        else:
            sides = [f"l{i}{end}" for i in range(module.num_layers) for end in ("", "_reverse")[: _ways(module)]]
            maps = ("ih", "hh", "hr") if module.proj_size else ("ih", "hh")
            ends = [f"{one}_{side}" for side in sides for one in maps]
        return [replace(kind, weight=f"weight_{end}", bias=f"bias_{end}", gain="", part=f"*_{end}") for end in ends]

    @classmethod
    def refused(cls, module: Any) -> str:
        if getattr(module, "dropout", 0.0) and module.num_layers > 1:
            return "dropout between its layers hides what the upper ones get: use layers of one each, with nn.Dropout"
        return ""

    @classmethod
    def unlike(cls, module_type: type[nn.Module], like: type[nn.Module], *, transposed: bool) -> str:
        return "a recurrent layer, whose maps have names of their own"

    def inputs(self, args: Any, output: Any) -> Mapping[str, Tensor]:
        with torch.no_grad():
            found = _of_cell(self.module, *args) if isinstance(self.module, nn.RNNCellBase) else None
            if found is None and not (isinstance(args[0], PackedSequence) or self.module.proj_size):
                found = _of_sequence(self.module, output[0], *args)
            return found if found is not None else {w: _joined(uses) for w, uses in self.apart(args)[1].items()}

    def apart(self, args: Any) -> Apart:
        maps = {id(getattr(self.module, kind.weight)): kind.weight for kind in self.kinds(self.kind, self.module)}
        with _Products(maps) as products:
            output = self.module.forward(*args)
        return output, products.found

    def row_count(self, h: Tensor, output: Any) -> int:
        return h.numel() // self.features

    def beyond_paper(self, rows: int, examples: int) -> list[str]:
        return [f"{rows / examples:g} time steps an example, as of a convolution with kernel size 1"]


class _Products(TorchFunctionMode):
    """Runs recurrent layers as loops over time, and keeps inputs and outputs of the products with some weights."""

    def __init__(self, maps: Mapping[int, str]) -> None:
        super().__init__()
        self._maps = maps
        self.found: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (loop := LOOPS.get(func)) is not None:
            with self:
                found = loop(*args)
            if found is not None:
                return found[0] if len(found) == 1 else tuple(found)
        out = func(*args, **(kwargs or {}))
        if func is F.linear and (name := self._maps.get(id(args[1]))) is not None:
            self.found.setdefault(name, []).append((args[0], out))
        return out


def _joined(uses: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The inputs of all steps: `(N, T, m)`, or `(R, m)` where sequences differ in length."""
    steps = [h for h, _ in uses]
    alike = len({h.shape for h in steps}) == 1
    return torch.stack(steps, -2) if alike and len(steps) > 1 else torch.cat(steps)


def _of_cell(module: Any, x: Tensor, hx: Any = None) -> dict[str, Tensor]:
    state = hx[0] if isinstance(hx, tuple | list) else hx
    if state is None:
        state = x.new_zeros(*x.shape[:-1], module.hidden_size)
    return {"weight_ih": x, "weight_hh": state}


def _of_sequence(module: Any, output: Tensor, x: Tensor, hx: Any = None) -> dict[str, Tensor]:
    """What every map of a layer on sequences of one length gets, `(N, T, m)`: outputs a step late are the states.

    Outputs of lower layers are not seen: these run again, by the kernels of torch.
    """
    x, output = (_batch_first(module, t) for t in (x, output))
    given = [hx] if isinstance(hx, Tensor) else hx
    states = None if given is None else [s.unsqueeze(1) if s.ndim == 2 else s for s in given]
    ways, found = _ways(module), dict[str, Tensor]()
    for i in range(module.num_layers):
        here = slice(i * ways, (i + 1) * ways)
        first = [output.new_zeros(ways, len(x), module.hidden_size)] if states is None else [s[here] for s in states]
        out = output if i == module.num_layers - 1 else _run(module, i, x, first)
        for k, side in enumerate(("", "_reverse")[:ways]):
            own, start = out[..., k * module.hidden_size :][..., : module.hidden_size], first[0][k].unsqueeze(1)
            before = [own[:, 1:], start] if side else [start, own[:, :-1]]
            found |= {f"weight_ih_l{i}{side}": x, f"weight_hh_l{i}{side}": torch.cat(before, 1)}
        x = out
    return found


def _run(module: Any, i: int, x: Tensor, first: list[Tensor]) -> Tensor:
    """The output of layer `i` alone."""
    count = _ways(module) * (4 if module.bias else 2)
    weights = [getattr(module, name) for name in module._flat_weights_names[i * count : (i + 1) * count]]
    states: Any = first[0]
    if module.mode == "LSTM":
        states = (*first, torch.zeros_like(first[0]))[:2]
    kernel = getattr(torch, module.mode.lower())
    out: Tensor = kernel(x, states, weights, module.bias, 1, 0.0, module.training, module.bidirectional, True)[0]
    return out


def _batch_first(module: Any, t: Tensor) -> Tensor:
    if t.ndim == 2:
        return t.unsqueeze(0)
    return t if module.batch_first else t.transpose(0, 1)


def _ways(module: Any) -> int:
    return 2 if module.bidirectional else 1


enter(RecurrentMap, nn.RNN, nn.LSTM, nn.GRU, weight="weight_ih_l0", bias="bias_ih_l0", builtin=True)
enter(RecurrentMap, nn.RNNCell, nn.LSTMCell, nn.GRUCell, weight="weight_ih", bias="bias_ih", builtin=True)
