"""An orthonormal basis of verified directions, grown part by part; what is local stays local."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.linalg.matrices import MatrixOperator
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.linalg.scale import scaled
from bnp_analysis.linalg.spectra.checks import norm_estimate
from bnp_analysis.linalg.spectra.null import null_tolerance
from bnp_analysis.network.candidates import Candidate, Part
from bnp_analysis.runtime.memory import available_memory

# Closer to the span of the others than this, relative, a direction does not count as new.
_NEW = 5e-7
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
        if count > operator.dense_cost and 4 * rows * columns * operator.dtype.itemsize < available_memory(
            operator.device
        ):
            self.matvecs += operator.dense_cost
            self._operator = MatrixOperator(self._operator.to_dense(), exact=False, eps=operator.eps)
        self._scale = math.sqrt(norm_estimate(GramOperator(self._operator)))

    def sizes(self, part: Part) -> Tensor:
        """The sizes of the images of nonzero columns, relative."""
        norms = _norms(part.values)
        if self._scale == 0 or part.count == 0:
            return torch.zeros_like(norms)
        values = (part.values / norms).to(self._operator.dtype)
        return self._image_norms(part.positions, values) / self._scale

    def _image_norms(self, positions: Tensor, values: Tensor) -> Tensor:
        operator = self._operator
        if isinstance(operator, MatrixOperator):
            matrix = operator.to_dense()
            image = matrix[:, positions.to(matrix.device)] @ values.to(matrix.device)
            return _norms(image)
        self.matvecs += values.shape[1]
        found = []
        for begin in range(0, values.shape[1], _TOGETHER):
            some = values[:, begin : begin + _TOGETHER]
            columns = torch.zeros(operator.shape[1], some.shape[1], dtype=operator.dtype)
            columns[positions] = some
            found.append(_norms(operator @ columns.to(operator.device)))
        return torch.cat(found)


class NullBasis:
    """Orthonormal columns in `(n, r)`, kept on the coordinates that they live on.

    Args:
        dim: the dimension `n`.
        verifier: decides what is null.
    """

    def __init__(self, dim: int, verifier: Verifier) -> None:
        self._dim, self._verifier = dim, verifier
        self._chunks: list[tuple[str, Part]] = []
        self._covered = torch.zeros(dim, dtype=torch.bool)

    def add(self, cause: str, parts: Sequence[Part]) -> None:
        """Add the span of verified parts, but for what is in it already."""
        spread = []
        for part in parts:
            if bool(self._covered[part.positions].any()):
                spread.append(part)
            else:
                self._keep(cause, part.positions, _span(part.values / part.values.norm(dim=0)))
        if spread:
            for component in _components(self._without_known(_dense(self._dim, spread))):
                # What is left of nearly dependent columns is their rounding, enlarged: cleaned and verified once more.
                fresh = Part(component.positions, _span(component.values))
                clean = torch.linalg.qr(self._without_known(_dense(self._dim, [fresh]))[fresh.positions])[0]
                null = self._verifier.sizes(Part(fresh.positions, clean)) <= self._verifier.tolerance
                self._keep(cause, fresh.positions, clean[:, null])

    def _keep(self, cause: str, positions: Tensor, values: Tensor) -> None:
        if values.shape[1]:
            self._chunks.append((cause, Part(positions, values)))
            self._covered[positions] = True

    def _without_known(self, columns: Tensor) -> Tensor:
        """Columns minus their part in the basis, twice for rounding; exact zeros stay."""
        for _ in range(2):
            for _, known in self._chunks:
                here = columns[known.positions]
                columns[known.positions] = here - known.values @ (known.values.T @ here)
        return columns

    def counts(self) -> dict[str, int]:
        """Cause -> dimensions, in the order in which the causes came."""
        found: dict[str, int] = {}
        for cause, part in self._chunks:
            found[cause] = found.get(cause, 0) + part.count
        return found

    def dense(self, like: Tensor) -> Tensor:
        """`(n, r)`, cause after cause as in `counts`."""
        basis = torch.zeros(self._dim, sum(self.counts().values()), dtype=like.dtype, device=like.device)
        begin = 0
        for wanted in self.counts():
            for cause, part in self._chunks:
                if cause == wanted:
                    basis[part.positions.to(like.device), begin : begin + part.count] = part.values.to(like)
                    begin += part.count
        return basis


def most_columns(candidates: Sequence[Candidate]) -> int:
    """How many full columns are held at once, at most: those of the basis, and work for candidates that overlap."""
    parts = [part for candidate in candidates for part in candidate.parts]
    covered = torch.zeros(1 + max((int(part.positions.max()) for part in parts), default=0), dtype=torch.bool)
    most = total = 0
    for candidate in candidates:
        overlapping = 0
        for part in candidate.parts:
            overlapping += part.count if bool(covered[part.positions].any()) else 0
            covered[part.positions] = True
        total, most = total + candidate.count, max(most, overlapping)
    return total + 4 * most


def _norms(columns: Tensor) -> Tensor:
    sizes: Tensor = torch.linalg.vector_norm(columns, dim=0).cpu().double()
    return sizes


def _span(columns: Tensor) -> Tensor:
    """An orthonormal basis of the columns' span; themselves where they are one."""
    gram = columns.T @ columns
    if float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max()) < 1e-14:
        return columns
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = u[:, s > _NEW]
    return basis


def _dense(dim: int, parts: Sequence[Part]) -> Tensor:
    columns = torch.zeros(dim, sum(part.count for part in parts), dtype=torch.float64)
    begin = 0
    for part in parts:
        columns[part.positions, begin : begin + part.count] = part.values / part.values.norm(dim=0)
        begin += part.count
    return columns


def _components(columns: Tensor) -> Iterator[Part]:
    """Columns that share no coordinates apart: one SVD each keeps zeros exact and matrices small."""
    columns = columns[:, (columns != 0).any(dim=0)]
    if columns.shape[1] == 0:
        return
    pattern = csr_array((columns != 0).numpy().astype(np.float32))
    labels = torch.from_numpy(connected_components(pattern.T @ pattern, directed=False)[1])
    for label in range(int(labels.max()) + 1):
        mine = columns[:, labels == label]
        positions = (mine != 0).any(dim=1).nonzero().reshape(-1)
        yield Part(positions, mine[positions])
