"""An orthonormal basis of verified directions, grown part by part; what is local stays local."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bnp_analysis.linalg.spectra.checks import Verifier
from bnp_analysis.symmetry.candidates import Candidate, Part

# Closer to the span of the others than this, relative, a direction does not count as new.
_NEW = 5e-7


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
                null = self._verifier.sizes(fresh.positions, clean) <= self._verifier.tolerance
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
