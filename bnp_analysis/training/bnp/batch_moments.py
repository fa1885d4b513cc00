"""What one forward pass says about a layer's inputs: the pure functions (T4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bnp_analysis.network.layers import Layer, channels, example_count, rows
from bnp_analysis.network.moments import update_moments

_PRECISE = (torch.float32, torch.float64)
_PART = 2**19  # numbers that are centred together


class BatchMoments(NamedTuple):
    """Mean and biased variance of what a layer saw.

    Attributes:
        samples: the values behind each mean.
        rows: `R`, rows of `H^`; the same for a dense layer, output positions for a convolution.
        examples: `N`; less than the rows of a convolution, or of a dense layer on sequences.
        mean, variance: `(width,)`, per feature, input channel or patch entry; no variance for that of one row, zero.
    """

    samples: int
    rows: int
    examples: int
    mean: Tensor
    variance: Tensor | None


def pool_moments(a: BatchMoments, b: BatchMoments) -> BatchMoments:
    """The moments of both together: micro-batches of one step, or several uses of a layer (T4)."""
    total = a.samples + b.samples
    one, two = (torch.zeros_like(m.mean) if m.variance is None else m.variance for m in (a, b))
    mean, variance = update_moments(a.mean, one, b.mean, two, a.samples / total)
    return BatchMoments(total, a.rows + b.rows, a.examples + b.examples, mean, variance)


def batch_moments(layer: Layer, h: Tensor, kind: str) -> BatchMoments | None:
    """The moments of one input of a layer, in float32 or better.

    Args:
        layer: the layer.
        h: its input.
        kind: `"channel"`, or `"patch"` for one pair per entry of a convolution's patch (T6).

    Returns:
        The moments, or None for an input without rows.
    """
    h = h.detach()
    if h.dtype not in _PRECISE:
        h = h.float()
    # First what most often comes: its Python is a part of a small network's step that one sees.
    if isinstance(layer.module, nn.Linear) and h.ndim == 2:
        return _table_moments(h)
    if h.numel() == 0:
        return None
    if isinstance(layer.module, nn.Linear) or kind == "patch":
        found = _table_moments(rows(layer, h).flatten(1))
        return None if found is None else found._replace(examples=example_count(layer, h))
    h = h if h.ndim == layer.module.weight.ndim else h.unsqueeze(0)
    found = _image_moments(h) if h.is_contiguous() and not h.is_cuda else _table_moments(channels(layer, h))
    return None if found is None else found._replace(rows=h.shape[0] * _positions(layer, h), examples=h.shape[0])


def _table_moments(table: Tensor) -> BatchMoments | None:
    """Per column of `(R, d)`; the kernels differ by a factor of ten and more on CPU, see `benchmarks/bnp_step.py`."""
    count, width = table.shape
    if not count or not width:
        return None
    if count == 1:
        # A copy: whoever gave the input may reuse its memory before the step.
        return BatchMoments(1, 1, 1, table.clone().flatten(), None)
    if table.is_cuda:
        variance, mean = torch.var_mean(table, dim=0, correction=0)
    else:
        mean, variance = torch.batch_norm_update_stats(table, None, None, 0.0)
    return BatchMoments(count, count, count, mean, variance)


def _image_moments(h: Tensor) -> BatchMoments:
    """Per channel of `(N, c, ...)`, contiguous."""
    values = h.flatten(2)
    mean = values.mean((0, 2))
    column, squares = mean.unsqueeze(1), torch.zeros_like(mean)
    # In parts that stay in the cache: less time, and no second copy of the input in memory.
    for part in torch.split(values, max(1, _PART // max(values[0].numel(), 1))):
        squares += torch.linalg.vector_norm(part - column, dim=2).square_().sum(0)
    count = h.numel() // h.shape[1]
    return BatchMoments(count, count, count, mean, squares / count)


def _positions(layer: Layer, h: Tensor) -> int:
    """Output positions of a convolution per example."""
    module = layer.module
    assert not isinstance(module, nn.Linear)
    # Twice one entry per padded side, last dimension first, whatever form the user gave.
    padding: list[int] = list(module._reversed_padding_repeated_twice)
    count = 1
    for d, size in enumerate(h.shape[2:]):
        reverse = 2 * (len(module.kernel_size) - 1 - d)
        full = size + padding[reverse] + padding[reverse + 1]
        span = module.dilation[d] * (module.kernel_size[d] - 1) + 1
        count *= (full - span) // module.stride[d] + 1
    return count
