"""How large the rank of a matrix can be, judging by where its entries are zero."""

from __future__ import annotations

from scipy.sparse import csgraph, csr_matrix
from torch import Tensor

from bnp_analysis.linalg.operators import LinearOperator


def rank_from_zeros(operator: LinearOperator, rows: int, columns: int) -> int:
    """The structural rank of an operator: its own bound, and where its zeros are structural how many lines hold others.

    Args:
        operator: `F`.
        rows, columns: how many rows and columns of `F` are not all zero.

    Example:
        >>> import torch
        >>> from bnp_analysis.linalg import MatrixOperator
        >>> rank_from_zeros(MatrixOperator(torch.ones(2, 2)), 2, 1)
        1
    """
    return min(operator.rank_bound, rows, columns) if operator.zeros_are_structural else operator.rank_bound


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
