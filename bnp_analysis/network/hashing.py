"""What a pass over the data has seen, in whatever order; a few examples at a time, since what is mixed takes memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

MIX = 0x5851F42D4C957F2D
# Numbers that are looked at together.
_TOGETHER = 2**20


def pieces(leaves: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors of a batch cut into a few examples each; what is not one entry per example is repeated.

    Example:
        >>> [[t.shape[0] for t in piece] for piece in pieces([torch.ones(3, 2**19), torch.ones(3), torch.ones(1)])]
        [[2, 2, 1], [1, 1, 1]]
    """
    leaves = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in leaves]
    size = leaves[0].shape[0]
    each = [t.ndim > 0 and t.shape[0] == size for t in leaves]
    step = max(1, _TOGETHER // max(1, *(t[0].numel() for t, cut in zip(leaves, each, strict=True) if cut)))
    for begin in range(0, size, step):
        yield [t[begin : begin + step] if cut else t for t, cut in zip(leaves, each, strict=True)]


def hash_of(leaves: list[Tensor]) -> tuple[int, int]:
    """A number per example that depends on all tensors of its batch, summed modulo 2^64 over the examples; how many."""
    leaves = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in leaves]
    size = leaves[0].shape[0]
    each = [t.ndim > 0 and t.shape[0] == size for t in leaves]
    weights = []
    for position, (t, cut) in enumerate(zip(leaves, each, strict=True)):
        key = torch.Generator().manual_seed(position)
        count = t[0].numel() if cut else t.numel()
        weights.append(torch.randint(-(2**62), 2**62, (count,), generator=key).to(t.device))
    total = torch.zeros((), dtype=torch.int64, device=leaves[0].device)
    for piece in pieces(leaves):
        rows = len(piece[0])
        mixed = torch.zeros(rows, dtype=torch.int64, device=total.device)
        for t, cut, w in zip(piece, each, weights, strict=True):
            flat = (t if cut else t.expand(rows, *t.shape)).reshape(rows, -1)
            if flat.is_floating_point():
                flat = flat.double().contiguous().view(torch.int64)
            mixed = mixed + (flat.to(torch.int64) * w).sum(dim=1)
            mixed = (mixed ^ (mixed >> 29)) * MIX
            mixed = mixed ^ (mixed >> 32)
        total += mixed.sum()
    return int(total) % 2**64, size


def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return (a[0] + b[0]) % 2**64, a[1] + b[1]
