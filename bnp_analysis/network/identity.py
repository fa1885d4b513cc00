"""What must be the same on every process for the parts of a risk to add up."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from bnp_analysis.distributed.group import digest


def fingerprint(model: nn.Module, loss: Callable[..., Any], theta: Tensor) -> dict[str, Any]:
    """Name -> a value to compare: of the model, its tensors and modes, the loss, and the point.

    What functions close over stays unseen.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {
        "the model": f"{model!r} {_settings(model)}",
        "the train flags": "".join("te"[not m.training] for m in model.modules()),
        "the names and shapes of tensors": {name: tuple(t.shape) for name, t in tensors.items()},
        "the dtype and kind of device": f"{theta.dtype} on {theta.device.type}",
        "the loss": _described(loss),
        "the point theta": digest(theta),
        "what the tensors hold": [digest(t) for t in tensors.values()],
    }


def _described(loss: Callable[..., Any]) -> str:
    if isinstance(loss, nn.Module):
        return f"{_settings(loss)} {[digest(t) for t in loss.state_dict().values() if isinstance(t, Tensor)]}"
    if isinstance(loss, functools.partial):
        held = [digest(v) if isinstance(v, Tensor) else repr(v) for v in (*loss.args, *loss.keywords.values())]
        return f"{_described(loss.func)} {held} {[*loss.keywords]}"
    return str(getattr(loss, "__qualname__", type(loss).__qualname__))


def _settings(root: nn.Module) -> list[tuple[str, str, dict[str, Any]]]:
    """The numbers and words that modules hold beside their tensors: not all of them are in their `repr`."""
    plain = (bool, int, float, str, type(None))
    return [
        (name, type(m).__qualname__, {k: v for k, v in vars(m).items() if isinstance(v, plain) and k != "training"})
        for name, m in root.named_modules()
    ]
