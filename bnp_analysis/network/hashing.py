"""What a pass over the data has seen, in whatever order."""

from __future__ import annotations

import torch
from torch import Tensor

MIX = 0x5851F42D4C957F2D


def hash_of(leaves: list[Tensor]) -> tuple[int, int]:
    """A number per example that depends on all tensors of its batch, summed modulo 2^64 over the examples; how many."""
    size = leaves[0].shape[0]
    total = torch.zeros(size, dtype=torch.int64, device=leaves[0].device)
    for position, t in enumerate(leaves):
        rows = t if t.ndim and t.shape[0] == size else t.expand(size, *t.shape)
        flat = rows.reshape(size, -1)
        if flat.is_floating_point():
            flat = flat.double().contiguous().view(torch.int64)
        else:
            flat = flat.to(torch.int64)
        key = torch.Generator().manual_seed(position)
        weights = torch.randint(-(2**62), 2**62, (flat.shape[1],), generator=key).to(flat.device)
        total = total + (flat * weights).sum(dim=1)
        total = (total ^ (total >> 29)) * MIX
        total = total ^ (total >> 32)
    return int(total.sum()) % 2**64, size


def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    return (a[0] + b[0]) % 2**64, a[1] + b[1]
