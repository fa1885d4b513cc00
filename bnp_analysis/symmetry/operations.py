"""The table of operations: the rule by which each torch function acts on scales, shifts and mixings.

A new operation is one more line, with a rule of `elementwise` or `layers` or one of your own; what is missing here is
not followed, which forbids symmetries and invents none. Activations that are neither homogeneous nor periodic are
`rigid`, whatever moves numbers around without changing them is `moved`.
"""

from __future__ import annotations

from bnp_analysis.symmetry import elementwise as e
from bnp_analysis.symmetry import layers
from bnp_analysis.symmetry.graph import Operation

_TWO = ("input", "other")
_REDUCED = ("input", "dim", "keepdim")
_POOLED = ("input", "kernel_size", "stride", "padding")
_STATISTICS = ("input", "mean", "variance", "weight", "bias", "training", "momentum", "eps")
_PLACES = (1, 2, 3)

OPERATIONS: dict[str, Operation] = {
    # Layers, and what else may bring parameters in.
    "linear": Operation(layers.linear, ("input", "weight", "bias"), role="layer"),
    "conv": Operation(
        layers.convolution,
        ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
        tuple(f"conv{d}d" for d in _PLACES),
        role="layer",
    ),
    "embedding": Operation(layers.embedding, ("indices", "weight", "padding_idx", "max_norm"), role="writer"),
    "matmul": Operation(layers.matmul, _TWO, ("mm", "bmm"), role="writer"),
    "scaled_dot_product_attention": Operation(
        layers.attention, ("query", "key", "value", "mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    ),
    # Normalizations.
    "layer_norm": Operation(layers.norm_over_features, ("input", "shape", "weight", "bias", "eps"), role="norm"),
    "rms_norm": Operation(layers.norm_over_features, ("input", "shape", "weight", "eps"), role="norm"),
    "group_norm": Operation(layers.group_norm, ("input", "groups", "weight", "bias", "eps"), role="norm"),
    "batch_norm": Operation(layers.norm_by_channel, _STATISTICS, role="norm"),
    "instance_norm": Operation(layers.norm_by_channel, _STATISTICS, role="norm"),
    # Arithmetic.
    "add": Operation(e.summed, _TWO, ("radd",), role="writer", keeps_softmax=True),
    "sub": Operation(e.summed, _TWO, ("subtract",), keeps_softmax=True),
    "rsub": Operation(e.summed, _TWO),
    "neg": Operation(e.negated, names=("negative",)),
    "mul": Operation(e.product, _TWO, ("multiply", "rmul"), keeps_softmax=True),
    "div": Operation(e.product, _TWO, ("divide", "true_divide", "truediv"), keeps_softmax=True),
    "pow": Operation(e.power, _TWO),
    "square": Operation(e.power),
    # Positively homogeneous activations; a sign tells the slope.
    "relu": Operation(e.homogeneous, role="relu"),
    "leaky_relu": Operation(e.homogeneous, ("input", "negative_slope"), role="relu"),
    "prelu": Operation(e.homogeneous, ("input", "slopes"), role="relu"),
    **dict.fromkeys(("abs", "clamp", "clamp_min"), Operation(e.homogeneous)),
    # Reductions and pools.
    **dict.fromkeys(("mean", "sum", "amax", "max"), Operation(e.reduced, _REDUCED)),
    **{
        f"{name}_pool{d}d": Operation(e.pooled, names=(f"{name}_pool{d}d_with_indices",))
        for name in ("max", "adaptive_max")
        for d in _PLACES
    },
    **{f"avg_pool{d}d": Operation(e.pooled, _POOLED) for d in _PLACES},
    **{f"adaptive_avg_pool{d}d": Operation(e.pooled) for d in _PLACES},
    "interpolate": Operation(e.pooled),
    "softmax": Operation(e.softmax, ("input", "dim")),
    "log_softmax": Operation(e.softmax, ("input", "dim")),
    # What leaves numbers as they are, or moves them.
    "masked_fill": Operation(e.chosen, ("input", "mask", "other"), keeps_softmax=True),
    "where": Operation(e.chosen, ("mask", "other", "input"), keeps_softmax=True),
    "pad": Operation(e.padded, ("input", "pad", "mode", "value")),
    **dict.fromkeys(("to", "float", "double", "dropout"), Operation(e.same, keeps_softmax=True)),
    **dict.fromkeys(
        (
            *("type", "type_as", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
            *("identity", "requires_grad_"),
        ),
        Operation(e.same),
    ),
    **dict.fromkeys(
        (
            *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "moveaxis", "swapaxes"),
            *("swapdims", "t", "T", "mT", "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "contiguous"),
            *("clone", "chunk", "split", "tensor_split", "unbind", "__getitem__", "select", "narrow", "index_select"),
            *("cat", "concat", "stack", "repeat", "tile", "repeat_interleave", "roll", "flip", "view_as"),
            *("reshape_as", "hstack", "vstack", "pixel_shuffle"),
        ),
        Operation(e.moved),
    ),
    # Smooth activations.
    **dict.fromkeys(
        (
            *("tanh", "sigmoid", "gelu", "silu", "softplus", "elu", "selu", "celu", "mish", "softsign", "logsigmoid"),
            *("exp", "log", "log1p", "expm1", "sin", "cos", "erf", "atan", "asinh", "tanhshrink", "softmin"),
        ),
        Operation(e.rigid),
    ),
}

# Parts of arguments by the keywords that torch has for them.
ARGUMENTS = {
    "exponent": "other",
    "axis": "dim",
    "attn_mask": "mask",
    "running_mean": "mean",
    "running_var": "variance",
    "use_input_stats": "training",
    "normalized_shape": "shape",
    "num_groups": "groups",
}
