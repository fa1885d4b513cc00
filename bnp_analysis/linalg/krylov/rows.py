"""Reorthogonalization against a basis whose vectors are rows."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers summed in single precision before the sums are added in double.
_BLOCK = 1 << 7


def dots(V: Tensor, w: Tensor) -> Tensor:
    """`V w` for rows `(k, n)`, `(k,)` in float64, as accurate for long vectors as for short ones.

    In single precision on a CPU, 128 products at a time are summed and the sums added in double precision: row `i` is
    within `128 u sum_j |V_ij w_j|`, `u` the unit roundoff, in whatever order the processor sums a block. One sum over
    all `n` numbers would be within `n u` of that sum only.

    Source: Higham 2002, section 4.2.

    Example:
        >>> error = dots(torch.ones(1, 20000), torch.full((20000,), 0.1)).item() - 20000 * torch.tensor(0.1).item()
        >>> abs(error) <= 128 * 2**-24 * 2000
        True
    """
    k, n = V.shape
    if V.dtype == torch.float64 or V.device.type != "cpu" or n <= _BLOCK:
        return (V @ w).double()
    whole = n - n % _BLOCK
    blocks = V[:, :whole].reshape(k, whole // _BLOCK, _BLOCK)
    parts = torch.bmm(blocks.transpose(0, 1), w[:whole].reshape(-1, _BLOCK, 1))
    total: Tensor = parts[..., 0].sum(dim=0, dtype=torch.float64) + (V[:, whole:] @ w[whole:]).double()
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
