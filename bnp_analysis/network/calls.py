"""Calls of torch functions: what kind they are, which parameters they use, and their arguments by name."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bnp_analysis.runtime.trees import tensors_of

LAYERS = {F.linear: "linear", F.conv1d: "conv", F.conv2d: "conv", F.conv3d: "conv"}
_COMPUTED = " with computed weights"
NORMS = {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"}
# Homogeneous of degree one, entry by entry, with a slope on either side of zero.
ACTIVATIONS = {"relu", "leaky_relu", "prelu"}
_ALIASES = {
    **{f"{name}{d}d_with_indices": f"{name}{d}d" for name in ("max_pool", "adaptive_max_pool") for d in (1, 2, 3)},
    **{f"_{name}{d}d": f"{name}{d}d" for name in ("max_pool", "adaptive_max_pool") for d in (1, 2, 3)},
    **{f"{name}_": name for name in ("relu", "leaky_relu", "prelu", "dropout", "add", "sub", "mul", "div", "tanh")},
    **{f"{name}_": name for name in ("sigmoid", "square", "pow", "masked_fill", "elu", "silu", "gelu", "squeeze")},
    **{f"__{name}__": name for name in ("add", "sub", "mul", "truediv", "matmul", "pow", "neg")},
    **{f"__i{name}__": name for name in ("add", "sub", "mul", "truediv")},
    **{"__radd__": "add", "__rmul__": "mul", "__rsub__": "rsub", "truediv": "div", "__itruediv__": "div"},
    **{"multiply": "mul", "subtract": "sub", "divide": "div", "true_divide": "div", "__truediv__": "div"},
    **{"mm": "matmul", "bmm": "matmul", "negative": "neg", "_softmax": "softmax"},
}
# The parts that arguments play, in the order in which they are passed.
_ORDER = {
    "linear": ("input", "weight", "bias"),
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "batch_norm": ("input", "mean", "variance", "weight", "bias", "training", "momentum", "eps"),
    "instance_norm": ("input", "mean", "variance", "weight", "bias", "training", "momentum", "eps"),
    "layer_norm": ("input", "shape", "weight", "bias", "eps"),
    "group_norm": ("input", "groups", "weight", "bias", "eps"),
    "rms_norm": ("input", "shape", "weight", "eps"),
    "leaky_relu": ("input", "negative_slope"),
    "prelu": ("input", "slopes"),
    "embedding": ("indices", "weight", "padding_idx"),
    "scaled_dot_product_attention": ("query", "key", "value", "mask", "dropout_p", "is_causal", "scale", "enable_gqa"),
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div", "matmul", "pow"), ("input", "other")),
    **dict.fromkeys(("mean", "sum", "amax", "max"), ("input", "dim", "keepdim")),
    "softmax": ("input", "dim"),
    "log_softmax": ("input", "dim"),
    **{f"avg_pool{d}d": ("input", "kernel_size", "stride", "padding") for d in (1, 2, 3)},
}
_SAME = {
    "exponent": "other",
    "axis": "dim",
    "attn_mask": "mask",
    "running_mean": "mean",
    "running_var": "variance",
    "use_input_stats": "training",
    "normalized_shape": "shape",
    "num_groups": "groups",
}


def arguments_by_name(kind: str, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by the parts they play."""
    order = _ORDER.get(kind.removesuffix(_COMPUTED), ())
    given = {(order[i] if i < len(order) else f"argument{i}"): value for i, value in enumerate(args)}
    return given | {_SAME.get(key, key): value for key, value in kwargs.items()}


def read_call(func: Any, args: Any, kwargs: Any, names: dict[int, str]) -> tuple[str, dict[str, str], dict[str, Any]]:
    """The kind of a call, the parameters it uses by role, and its other arguments by name."""
    name = str(getattr(func, "__name__", func))
    if name == "__get__":
        name = str(getattr(func.__self__, "__name__", name))
    kind = LAYERS.get(func, _ALIASES.get(name, name))
    given = arguments_by_name(kind, args, kwargs)
    roles = {role: names[id(value)] for role, value in given.items() if id(value) in names}
    tensors = [value for value in tensors_of((list(args), kwargs)) if id(value) in names]
    roles |= {f"tensor{i}": names[id(t)] for i, t in enumerate(tensors) if names[id(t)] not in roles.values()}
    kept = ("mean", "variance")
    arguments = {
        key: value.clone() if isinstance(value, Tensor) else value
        for key, value in given.items()
        if id(value) not in names and (key in kept or not tensors_of(value))
    }
    if kind in ("linear", "conv"):
        weight, bias = given.get("weight"), given.get("bias")
        arguments["weight_shape"] = tuple(weight.shape) if isinstance(weight, Tensor) else ()
        if id(weight) not in names or (bias is not None and id(bias) not in names):
            kind += _COMPUTED
    return kind, roles, arguments
