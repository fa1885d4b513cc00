"""Operations that move numbers around, or leave them as they are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnp_analysis.network.graph import Node
from bnp_analysis.network.symmetry.signals import FIXED, ZERO, Known, Signal, Stored, Value
from bnp_analysis.network.symmetry.trace import Trace, rule, values_in
from bnp_analysis.runtime.trees import tensors_of

_MOVES = (
    "view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "moveaxis", "swapaxes",
    "swapdims", "t", "T", "mT", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "contiguous",
    "clone", "chunk", "split", "tensor_split", "unbind", "__getitem__", "select", "narrow", "index_select", "cat",
    "concat", "stack", "repeat", "tile", "repeat_interleave", "roll", "flip", "view_as", "reshape_as", "hstack",
    "vstack", "pixel_shuffle",
)  # fmt: skip
_SAME = (
    "to", "float", "double", "type", "type_as", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_alpha_dropout", "identity", "requires_grad_",
)  # fmt: skip


@rule(*_MOVES)
def moved(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    """The labels, or the positions of parameters, go where the numbers go."""
    values = list(values_in(given))
    stored = all(isinstance(value, Stored) for value in values)
    assert node.call is not None

    def written(part: Any) -> Any:
        if isinstance(part, Stored) and stored:
            return part.entries.double()
        if isinstance(part, Signal | Stored | Known):
            return trace.ledger.lift(part).double()
        if isinstance(part, dict):
            return {key: written(inner) for key, inner in part.items()}
        return type(part)(written(inner) for inner in part) if isinstance(part, list | tuple) else part

    args, kwargs = written(trace.value(node.call.positional)), written(trace.value(node.call.keywords))
    # Labels need not lie in memory as the numbers do.
    function = torch.reshape if node.kind == "view" else node.call.function
    if node.kind == "view":
        args = (args[0], args[1] if len(args) == 2 and not isinstance(args[1], int) else args[1:])
    out = [t.round().to(torch.int64) for t in tensors_of(function(*args, **kwargs))]
    if stored:
        return [Stored(t) for t in out]
    same = node.shape == node.before and isinstance(values[0], Signal)
    return [Signal(t, values[0].weights if same and isinstance(values[0], Signal) else None) for t in out]


@rule(*_SAME)
def same(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    """Purity was checked: a dropout that does something would have been refused."""
    value = next(values_in(given))
    return [value]


@rule("pad")
def padded(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    """Zeros beside the numbers, or the numbers again."""
    assert node.call is not None
    names = dict(zip(("input", "pad", "mode", "value"), node.call.positional, strict=False)) | node.call.keywords
    labels = trace.ledger.lift(trace.value(names["input"])).double()
    mode, value = names.get("mode", "constant"), names.get("value")
    if mode == "constant":
        out = F.pad(labels, names["pad"], value=float(FIXED if value else ZERO))
    else:
        out = F.pad(labels, names["pad"], mode=mode)
    return [Signal(out.round().to(torch.int64))]


@rule("masked_fill", "where")
def chosen(trace: Trace, node: Node, given: dict[str, Any]) -> list[Value] | None:
    """Numbers from one tensor or another by a mask that no parameter moves."""
    assert node.call is not None
    if len(node.call.positional) != 3:
        return None
    first, second, third = (trace.value(part) for part in node.call.positional)
    mask, plain, other = (second, third, first) if node.kind == "masked_fill" else (first, second, third)
    if not isinstance(mask, Tensor):
        return None
    a, b = (_labels(trace, part) for part in (plain, other))
    return [Signal(torch.where(mask, a, b))]


def _labels(trace: Trace, part: Any) -> Tensor:
    if isinstance(part, Signal | Stored | Known):
        return trace.ledger.lift(part)
    value = part if isinstance(part, Tensor) else torch.tensor(float(part))
    return torch.where(value == 0, ZERO, FIXED).to(torch.int64)
