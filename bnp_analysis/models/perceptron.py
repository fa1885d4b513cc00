"""The multilayer perceptron."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.models.activations import check_activation
from bnp_analysis.models.construction import add_layer, check_size, seeded
from bnp_analysis.models.normalization import Normalization


def mlp(
    widths: Sequence[int],
    *,
    activation: str = "relu",
    norm: str = "none",
    norm_at: str = "preactivation",
    norm_affine: bool = True,
    norm_groups: int | None = None,
    bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> nn.Sequential:
    """Build a multilayer perceptron, `h_k = act(W_k h_(k-1) + b_k)`, the last layer without activation.

    Args:
        widths: features of the input, of each hidden layer, and of the output; two or more.
        activation: a key of `ACTIVATIONS`.
        norm: a key of `NORMS`.
        norm_at: "preactivation" (linear, norm, activation) or "input" (norm before every linear layer).
        norm_affine: whether the normalization has a gain and a shift of its own.
        norm_groups: of norm="group"; None fits it to each width.
        bias: whether the linear layers have one.
        seed: of the initialization, which is torch's default; global random state stays as it is.
        dtype: of the parameters, by default torch's.

    Returns:
        A sequential model from (N, widths[0]) to (N, widths[-1]) with modules `fc1, norm1, act1, fc2, ...`;
        `norm<k>` belongs to `fc<k>`.

    Raises:
        InvalidInputError: for fewer than two widths, a width that is not positive, unknown names, or a
            normalization that does not fit a width.

    Example:
        >>> model = mlp([64, 32, 10], norm="batch")
        >>> [name for name, _ in model.named_children()]
        ['fc1', 'norm1', 'act1', 'fc2']
        >>> model(torch.zeros(5, 64)).shape
        torch.Size([5, 10])
    """
    sizes = list(widths)
    if len(sizes) < 2:
        raise InvalidInputError(f"widths needs an input and an output size, not {sizes}")
    for size in sizes:
        check_size(size, "each of widths")
    check_activation(activation)
    placed = Normalization(norm, norm_at, norm_affine, norm_groups)

    def make() -> nn.Sequential:
        modules: OrderedDict[str, nn.Module] = OrderedDict()
        for k, (inputs, outputs) in enumerate(pairwise(sizes[:-1]), start=1):
            layer = nn.Linear(inputs, outputs, bias)
            add_layer(modules, str(k), layer, norm=placed, activation=activation)
        head = nn.Linear(sizes[-2], sizes[-1], bias)
        add_layer(modules, str(len(sizes) - 1), head, norm=placed, output=True)
        return nn.Sequential(modules)

    return seeded(make, seed, dtype)
