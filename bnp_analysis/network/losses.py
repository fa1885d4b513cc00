"""Losses that depend on the parameters otherwise than through the outputs: penalties, residuals, features."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from bnp_analysis.errors import DerivativeError
from bnp_analysis.network.observation import Observer
from bnp_analysis.network.snapshot import unwrap
from bnp_analysis.runtime.trees import tensors_of


def reads_model(loss: Callable[..., Any]) -> bool:
    """Whether a loss takes the network: it has a third positional argument without a default.

    Example:
        >>> import torch
        >>> reads_model(lambda output, y, model: output.mean()), reads_model(torch.nn.functional.cross_entropy)
        (True, False)
    """
    try:
        parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters.values()
    except (TypeError, ValueError):  # written in C, without a signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters) == 3


class WithModel(nn.Module):
    """A loss as a function of the network's parameters too: `functional_call` exchanges them for both."""

    def __init__(self, loss: Callable[..., Tensor], model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._loss = (loss,)  # no submodule: its tensors are constants

    def forward(self, outputs: Tensor, y: Any) -> Tensor:
        return self._loss[0](outputs, y, self.model)


def live_tensors(loss: Callable[..., Any], model: nn.Module) -> dict[int, str]:
    """The parameters of the caller's model by identity, for `require_own_tensors`.

    Raises:
        DerivativeError: the loss holds some of them, of which the risk would make copies.
    """
    live = {id(p): name for name, p in unwrap(model).named_parameters()}
    _refuse([live[id(t)] for t in _held(loss) if id(t) in live])
    return live


def require_own_tensors(live: Mapping[int, str], observer: Observer, value: Tensor) -> None:
    """Refuse a loss that reads parameters of the caller's model: those stay where they are when `theta` moves.

    Args:
        live: from `live_tensors`.
        observer: what the evaluation of the loss called.
        value: the loss, recorded.

    Raises:
        DerivativeError: names them.
    """
    _refuse([*dict.fromkeys([*observer.read, *(live[id(t)] for t in _leaves(value) if id(t) in live)])])


def _refuse(read: list[str]) -> None:
    if read:
        raise DerivativeError(
            f"the loss reads parameters of the model itself ({_few(read)}), by a closure or an attribute: they keep "
            "their values when theta moves, so the risk would lack that term's change, and its gradient and curvature "
            "the term. Let the loss take the network as a third argument, loss(output, y, model), and use that: "
            "model.parameters() for a penalty, model(points) for a residual"
        )


def _held(loss: Any) -> list[Tensor]:
    """The tensors that a loss holds, of which the risk makes copies."""
    if isinstance(loss, nn.Module):
        return list(loss.parameters())
    if isinstance(loss, functools.partial):
        return tensors_of((loss.args, loss.keywords)) + _held(loss.func)
    return []


def _leaves(value: Tensor) -> list[Tensor]:
    """The leaves of a recorded graph."""
    found, seen, waiting = [], set(), [value.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            found.append(leaf)
    return found


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
