"""How large the rank of a matrix can be, judging by where its entries are zero."""

from __future__ import annotations

from scipy.sparse import csgraph, csr_matrix
from torch import Tensor


def structural_rank(nonzero: Tensor) -> int:
    """The largest rank of a matrix with this pattern: the size of a maximum matching of its rows and columns.

    Three columns whose nonzero entries lie in two rows are dependent, whatever the entries: images of digits have
    such columns near the border. A column with at least as many nonzero entries as there are columns finds a row
    of its own after all others have theirs, so only sparse columns are matched.

    Args:
        nonzero: `(r, n)`, bool.

    Returns:
        The bound; almost every matrix of the pattern attains it.

    Source: Koenig 1931, Hall 1935; Hopcroft and Karp 1973.

    Example:
        >>> import torch
        >>> structural_rank(torch.tensor([[True, True, True], [True, False, False], [True, False, False]]))
        2
    """
    tall = nonzero if nonzero.shape[0] >= nonzero.shape[1] else nonzero.T
    counts = tall.sum(dim=0)
    left = counts > 0
    size = matched = int(left.sum())
    while True:
        left &= counts < size
        if size == int(left.sum()):
            break
        size = int(left.sum())
    sparse = tall[:, left]
    sparse = sparse[sparse.any(dim=1)]
    return matched - size + (int(csgraph.structural_rank(csr_matrix(sparse.cpu().numpy()))) if size else 0)
