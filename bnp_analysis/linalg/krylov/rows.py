"""Reorthogonalization against a basis whose vectors are rows."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 13


def dots(V: Tensor, w: Tensor) -> Tensor:
    """`V w` for rows `(k, n)`, `(k,)` in float64.

    A single-precision sum over a million numbers on a CPU has lost three digits: partial sums are added in double.

    Example:
        >>> dots(torch.ones(1, 20000), torch.full((20000,), 0.1)).item() - 20000 * torch.tensor(0.1).item() < 1e-3
        True
    """
    if V.dtype == torch.float64 or V.device.type != "cpu" or V.shape[1] <= _BLOCK:
        return (V @ w).double()
    parts = zip(torch.split(V, _BLOCK, dim=1), torch.split(w, _BLOCK), strict=True)
    total: Tensor = torch.stack([rows @ part for rows, part in parts]).sum(dim=0, dtype=torch.float64)
    return total


def length(w: Tensor) -> Tensor:
    """`|w|` in float64."""
    norm: Tensor = torch.linalg.vector_norm(w, dtype=torch.float64)
    return norm


def orthogonalized(w: Tensor, V: Tensor, null: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`w` outside the rows of `V` and the columns of `null`, its norm, and what was taken off the rows.

    Classical Gram-Schmidt, two products a pass: one pass where it takes little away, else two.
    """
    taken = torch.zeros(len(V), dtype=torch.float64, device=w.device)
    before = norm = length(w)
    for _ in range(2):
        if null is not None and null.shape[1]:
            w = w - null @ (null.T @ w)
        more = dots(V, w)
        w = w - more.to(w.dtype) @ V
        taken += more
        norm = length(w)
        # A GPU would wait for the answer longer than the second pass takes.
        if w.device.type == "cpu" and float(norm) > 0.7 * float(before):
            break
    return w, norm, taken
