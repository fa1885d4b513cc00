"""Null vectors of stored matrices, and whether given directions are null for an operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.linalg.matrices import MatrixOperator
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.linalg.scale import scaled
from bnp_analysis.linalg.spectra.checks import norm_estimate
from bnp_analysis.linalg.spectra.null import null_tolerance
from bnp_analysis.runtime.memory import available_memory

# Columns that are multiplied together by an operator without a matrix.
_TOGETHER = 32


class Verifier:
    """`|F t| / |F| |t|` of candidates: by a dense `F` where that is cheaper than one product for each.

    Args:
        operator: the factor, or the matrix where there is none.
        count: how many candidates there are.
    """

    def __init__(self, operator: LinearOperator, count: int) -> None:
        rows, columns = operator.shape
        self.matvecs, self.tolerance = 8, null_tolerance(operator)
        # Only ratios count: squares of what is far from 1 leave the floats.
        self._operator = scaled(operator)
        needed = 4 * rows * columns * operator.dtype.itemsize
        if count > operator.dense_cost and needed < available_memory(operator.device):
            self.matvecs += operator.dense_cost
            self._operator = MatrixOperator(self._operator.to_dense(), exact=False, eps=operator.eps)
        self._scale = math.sqrt(norm_estimate(GramOperator(self._operator)))

    def sizes(self, positions: Tensor, columns: Tensor) -> Tensor:
        """The relative sizes of the images of nonzero columns `(p, k)` on some coordinates `(p,)`."""
        norms = _norms(columns)
        if self._scale == 0 or columns.shape[1] == 0:
            return torch.zeros_like(norms)
        return self._image_norms(positions, (columns / norms).to(self._operator.dtype)) / self._scale

    def images(self, columns: Tensor) -> Tensor:
        """`F t / |F|` of unit columns `(n, k)`, in float64 on the CPU."""
        self.matvecs += columns.shape[1]
        if self._scale == 0 or columns.shape[1] == 0:
            return torch.zeros(self._operator.shape[0], columns.shape[1], dtype=torch.float64)
        like = columns.to(self._operator.device, self._operator.dtype)
        found = [(self._operator @ some).cpu().double() / self._scale for some in torch.split(like, _TOGETHER, dim=1)]
        return torch.cat(found, dim=1)

    def _image_norms(self, positions: Tensor, columns: Tensor) -> Tensor:
        operator = self._operator
        if isinstance(operator, MatrixOperator):
            matrix = operator.to_dense()
            return _norms(matrix[:, positions.to(matrix.device)] @ columns.to(matrix.device))
        self.matvecs += columns.shape[1]
        found = []
        for some in torch.split(columns, _TOGETHER, dim=1):
            full = torch.zeros(operator.shape[1], some.shape[1], dtype=operator.dtype)
            full[positions] = some
            found.append(_norms(operator @ full.to(operator.device)))
        return torch.cat(found)


def _norms(columns: Tensor) -> Tensor:
    sizes: Tensor = torch.linalg.vector_norm(columns, dim=0).cpu().double()
    return sizes


def null_vectors(matrix: Tensor, slack: float = 1.0) -> Tensor:
    """An orthonormal basis, in float64, of the right null space: columns that are dependent to the rounding of the SVD.

    Columns are compared at one scale, so that a small one does not pass for zero; in float64 whatever the dtype, so
    that rounded columns do not pass for dependent ones. `slack` allows for a matrix that was computed.

    Example:
        >>> import torch
        >>> null_vectors(torch.tensor([[1.0, 1e-20, 2.0], [1.0, 0.0, 2.0]], dtype=torch.float64)).shape
        torch.Size([3, 1])
    """
    count, width = matrix.shape
    matrix = matrix.double()
    size = matrix.norm(dim=0) if count else matrix.new_zeros(width)
    scale = torch.where(size > 0, size, 1.0)
    work = matrix / scale
    work = torch.linalg.qr(work, mode="r")[1] if count > width else work
    _, s, vh = torch.linalg.svd(work, full_matrices=True)
    floor = slack * max(count, width) * torch.finfo(matrix.dtype).eps * (float(s[0]) if s.numel() else 0.0)
    rank = int((s > floor).sum())
    if rank == width:
        return matrix.new_zeros(width, 0)
    # Back in the old scale; the largest is taken out, so that no column loses its digits.
    basis: Tensor = torch.linalg.qr(vh[rank:].T / (scale / scale.min()).unsqueeze(1))[0]
    return basis
