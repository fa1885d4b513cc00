"""Dense layers: every position before the last dimension is a row; and modules proved to be like one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from bnp_analysis.network.layer_kinds.base import RECOGNIZERS, Layer, LayerKind, enter

# Attributes by which public models say how many units there are, and how many inputs.
_UNITS, _INPUTS = ("nf", "out_features", "out_channels"), ("nx", "in_features", "in_channels")


class DenseLayer(Layer):
    """`nn.Linear`, with any leading dimensions."""

    rows_are_inputs = True

    def rows(self, h: Tensor) -> Tensor:
        """Every leading position of `h (..., m)`."""
        return h.reshape(-1, 1, self.features)

    def beyond_paper(self, rows: int, examples: int) -> list[str]:
        if rows <= examples:
            return []
        return [f"{rows / examples:g} positions an example, as of a convolution with kernel size 1"]


def recognize(module: nn.Module) -> LayerKind | None:
    """The kind of a module that may be a dense layer: a weight with units and inputs, at most a bias beside it.

    The contract of `transformers`' `Conv1D`, weight `(in, out)`, units `nf`, and those of layers with
    `F.linear(x, self.weight, self.bias)`, such as PyG's `Linear`. Which side of the weight the units are on must be
    clear from the bias or from attributes. Shape decides nothing more: before such a layer is covered its forward pass
    is recorded, and it is left out unless that is the product and nothing else.

    Example:
        >>> import torch
        >>> class Own(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight, self.bias = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(2))
        >>> recognize(Own()).transposed, recognize(nn.PReLU())
        (True, None)
    """
    own = {name: p for name, p in module._parameters.items() if p is not None}
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    torchs = [above for above in type(module).__mro__ if above.__module__.startswith("torch.nn.")]
    if weight is None or own or torchs != [nn.Module] or any(True for child in module.children()):
        return None
    if isinstance(weight, UninitializedParameter) or weight.ndim != 2 or (bias is not None and bias.ndim != 1):
        return None
    transposed = _transposed(module, tuple(weight.shape), None if bias is None else bias.numel())
    if transposed is None:
        return None
    return LayerKind(type(module), DenseLayer, transposed=transposed, recognized=True)


def _transposed(module: nn.Module, shape: tuple[int, ...], bias: int | None) -> bool | None:
    """Whether a weight has its units last; None where nothing says it."""
    if type(module).__name__ == "Conv1D" and getattr(module, "nf", None) == shape[1]:
        return True if bias in (None, shape[1]) else None
    if bias is not None and bias not in shape:
        return None
    if bias is not None and shape[0] != shape[1]:
        return bias == shape[1]
    said = [next((getattr(module, n) for n in names if hasattr(module, n)), None) for names in (_UNITS, _INPUTS)]
    if shape[0] == shape[1] or said == [*shape]:
        return False  # a square one that is stored transposed will fail its proof
    return True if said[::-1] == [*shape] else None


enter(DenseLayer, nn.Linear, builtin=True)
RECOGNIZERS.append(recognize)
