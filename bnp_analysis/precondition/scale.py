"""The scale `q` of a layer from its shapes (T3, T5, T8), and what of it goes beyond the paper."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bnp_analysis.network.layers import Layer

#: Rules for `q^2` that know shapes alone; "auto" is the default, at present that of "rows".
RULES = ("auto", "rows", "paper")


def scale_square(rule: str, features: int, rows: int, examples: int) -> float:
    """`q^2` of a layer from its shapes.

    `"rows"`: `max(m/R, 1)`, the order of `|G^|^2/R` of independent inputs (T8). `"paper"`: `max(m/N, sqrt(R/N))`,
    which is `max(n/N, 1)` for a dense layer and `max(c k^2/N, sqrt(r s))` for a convolution with `r x s` output
    positions.

    Args:
        rule: one of `RULES`.
        features: `m`, inputs of one unit; `c k^2` for a convolution with `c` channels in a group.
        rows: `R`, rows of `H^` in the step: examples times output positions.
        examples: `N`, examples in the step.

    Source: Lange, Helfrich and Ye 2022, Algorithm 2 (p. 11) and Algorithm 3 (p. 19). One or three spatial dimensions
    (the root of the number of positions), stride, dilation and groups (the same with the layer's own output positions
    and `c` of one group) and dense layers on sequences (convolutions with `k = 1`) are this project's extension.

    Example:
        >>> [scale_square("paper", 27, 64 * n, n) for n in (2, 128)], scale_square("rows", 27, 128, 2)
        ([13.5, 8.0], 1.0)
    """
    if rule == "paper":
        return max(features / examples, math.sqrt(rows / examples))
    return max(features / rows, 1.0)


def beyond_paper(layer: Layer, rows: int, examples: int) -> str:
    """What of a layer the paper's rule for `q` does not speak of, in words; empty for the paper's own layers.

    Those are dense layers on one vector an example, and two-dimensional convolutions with stride 1, odd kernels and
    zero padding that keeps the size; all with a bias.
    """
    module, found = layer.module, []
    if isinstance(module, nn.Linear):
        if rows > examples:
            found.append(f"{rows / examples:g} positions an example, as of a convolution with kernel size 1")
    else:
        if len(module.kernel_size) != 2:
            found.append(f"{len(module.kernel_size)} spatial dimensions, by the root of the number of positions")
        if any(s != 1 for s in module.stride):
            found.append("stride, by its own output positions")
        if any(d != 1 for d in module.dilation):
            found.append("dilation, by its own output positions")
        if module.groups > 1:
            found.append("groups, with the channels of one group")
        spans = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        kept = [span / 2 for span in reversed(spans) for _ in range(2)]
        if module.padding_mode != "zeros" or list(module._reversed_padding_repeated_twice) != kept:
            found.append("padding other than zeros that keep the size, by its own output positions")
    if layer.bias is None:
        found.append("no free bias, with the q of a layer that has one")
    return "; ".join(found)


def surviving_mean(mean: Tensor, second: Tensor) -> float:
    """`sum_j mu_j^2/rms_j^2` of the worst group: what the diagonal form without a bias adds to `q^2` (T5).

    Args:
        mean, second: first and second moments, `(groups, m)`.
    """
    share = torch.where(second > 0, mean.square() / second, torch.zeros_like(second))
    return float(share.sum(dim=1).max())
