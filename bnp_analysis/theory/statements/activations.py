"""Which nonlinear operations a network runs: piecewise linear ones, their kinks, and smooth ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.runtime.trees import tensors_of

# Where each of these is not differentiable; both sides are linear.
_KINKS: dict[str, tuple[float, ...]] = {
    "relu": (0.0,), "relu_": (0.0,), "leaky_relu": (0.0,), "leaky_relu_": (0.0,), "prelu": (0.0,), "abs": (0.0,),
    "relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0), "hardtanh_": (-1.0, 1.0),
}  # fmt: skip
# Linear in each argument that carries activations, or choosing among them.
_LINEAR = {
    "linear", "flatten", "view", "reshape", "contiguous", "clone", "to", "float", "double", "squeeze", "unsqueeze",
    "unflatten", "permute", "transpose", "movedim", "mean", "sum", "add", "add_", "sub", "neg", "cat", "stack", "pad",
    "expand", "chunk", "split", "unbind", "maximum", "minimum", "amax", "interpolate", "getitem", "dropout",
    "__getitem__", "detach", "expand_as", "T", "mT",
}  # fmt: skip
_LINEAR_STARTS = ("conv", "max_pool", "avg_pool", "adaptive_", "_max_pool", "_adaptive_", "dropout", "__add", "__radd",
                  "__sub", "__rsub", "__iadd")  # fmt: skip


@dataclass
class Activations:
    """What a forward pass did.

    Attributes:
        smooth: operations that are neither linear nor piecewise linear, with their counts.
        kinked: piecewise linear operations, with their counts.
        on_kink: entries that lie exactly on a kink, where there is no derivative.
    """

    smooth: dict[str, int] = field(default_factory=dict)
    kinked: dict[str, int] = field(default_factory=dict)
    on_kink: int = 0

    @property
    def piecewise_linear(self) -> bool:
        return not self.smooth

    @property
    def why_smooth(self) -> str:
        """The operations in words."""
        return ", ".join(f"{name} ({count})" for name, count in self.smooth.items())


class _Watch(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = Activations()
        self._inside = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", func)).strip()
        given = tensors_of(args[0]) if args else []
        out = self._note(name, given, args, kwargs)
        result = func(*args, **kwargs)
        produced = tensors_of(result if isinstance(result, Tensor | tuple | list) else ())
        if out is not None and any(t.is_floating_point() for t in produced):
            book, key = out
            book[key] = book.get(key, 0) + 1
        return result

    def _note(self, name: str, given: list[Tensor], args: Any, kwargs: Any) -> tuple[dict[str, int], str] | None:
        if name in _KINKS:
            self.found.on_kink += sum(int((given[0] == kink).sum()) for kink in _KINKS[name]) if given else 0
            return self.found.kinked, name
        if name == "batch_norm" and not _flag(args, kwargs):
            return None
        if name in _LINEAR or name.startswith(_LINEAR_STARTS):
            return None
        return self.found.smooth, name


def _flag(args: Any, kwargs: Any) -> bool:
    """Whether a call of batch_norm uses the statistics of the batch."""
    return bool(kwargs.get("training", args[5] if len(args) > 5 else False))


def activations(risk: EmpiricalRisk) -> Activations:
    """Run a risk's data once and note every operation.

    Args:
        risk: the empirical risk.

    Returns:
        The `Activations`.

    Source: the hypotheses of T1'.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(4, 3), torch.zeros(4, dtype=torch.long)
        >>> risk = bnp.EmpiricalRisk(bnp.models.mlp([3, 2, 2]), torch.nn.functional.cross_entropy, (x, y))
        >>> activations(risk).kinked, activations(risk).smooth
        ({'relu': 1}, {})
    """
    watch = _Watch()
    tensors = risk.named_tensors()
    for batch in risk.batches:
        with torch.no_grad(), watch:
            risk.batch_outputs(tensors, batch)
    return watch.found
