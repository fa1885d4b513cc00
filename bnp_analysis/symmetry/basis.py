"""An orthonormal basis of null directions, grown cause by cause; what is local stays local."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.linalg.bases import Block, Ints, LocalBasis, Sparse, components, dense_block, sparse_columns
from bnp_analysis.linalg.spectra.checks import Verifier
from bnp_analysis.symmetry.candidates import Part

# Closer to the span of the others than this, relative, a direction does not count as new.
_NEW = 5e-7
# Longer than this, a direction outside the others has lost no digit that counts.
_CLEAR = 0.1


@dataclass(frozen=True, eq=False)
class Chunk:
    """Orthonormal columns on the coordinates that they live on.

    Attributes:
        cause: why they are null.
        part: the columns.
        turn: the number of the call of `add` that they came with.
        verified: whether they are candidates that were, not what is left of some.
    """

    cause: str
    part: Part
    turn: int
    verified: bool


class NullBasis:
    """Orthonormal columns in `(n, r)`, kept on the coordinates that they live on.

    Args:
        dim: the dimension `n`.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._chunks: list[Chunk] = []
        self._known = LocalBasis(dim)

    def add(self, cause: str, parts: Sequence[Part], turn: int) -> None:
        """Add the span of null columns, but for what is in it already: in one go what shares no coordinates."""
        lengths = [part.values.norm(dim=0) for part in parts]
        unit = [Part(part.positions, part.values / length) for part, length in zip(parts, lengths, strict=True)]
        units = sparse_columns(self._dim, [_block(part) for part in unit])
        owner = np.repeat(np.arange(len(parts)), [part.count for part in parts])
        rest, reduced = self._known.taken_off(units)
        spread = np.zeros(len(parts), bool)
        spread[owner[reduced]] = True
        direct: list[Chunk] = []
        clean: list[Chunk] = []
        again: list[Part] = []
        for columns in components(rest):
            source = np.unique(owner[columns])
            if len(source) == 1 and not spread[source[0]]:
                own = unit[source[0]] if len(columns) == unit[source[0]].count else _part(rest, columns)
                direct.append(Chunk(cause, Part(own.positions, _span(own.values)[0]), turn, True))
            else:
                part = _part(rest, columns)
                values, least = _span(part.values)
                part = Part(part.positions, values)
                if least > _CLEAR:
                    clean.append(Chunk(cause, part, turn, False))
                elif part.count:
                    again.append(part)
        # What is left of nearly dependent columns is their rounding, enlarged: cleaned, and verified once more.
        cleaned, _ = self._known.taken_off(sparse_columns(self._dim, [_block(part) for part in again]))
        ends = np.cumsum([part.count for part in again])
        clean += [
            Chunk(cause, Part(part.positions, torch.linalg.qr(part.values)[0]), turn, False)
            for part in (_part(cleaned, np.arange(e - p.count, e)) for p, e in zip(again, ends, strict=True))
        ]
        self._extend([chunk for chunk in direct + clean if chunk.part.count])

    def settle(self, verifier: Verifier) -> int | None:
        """Verify what was cleaned; of the first turn where some is not null it is dropped, and all that came later.

        Returns:
            That turn; None where all is null.
        """
        waiting = [i for i, chunk in enumerate(self._chunks) if not chunk.verified]
        parts = [self._chunks[i].part for i in waiting]
        sizes = verifier.sizes([(part.positions, part.values) for part in parts])
        null = {i: size <= verifier.tolerance for i, size in zip(waiting, sizes, strict=True)}
        failed = [self._chunks[i].turn for i, mine in null.items() if not bool(mine.all())]
        if not failed:
            self._chunks = [chunk if chunk.verified else replace(chunk, verified=True) for chunk in self._chunks]
            return None
        last = min(failed)
        kept = []
        for i, chunk in enumerate(self._chunks):
            if chunk.turn <= last:
                values = chunk.part.values[:, null[i]] if i in null else chunk.part.values
                kept += [Chunk(chunk.cause, Part(chunk.part.positions, values), chunk.turn, True)]
        self._chunks, self._known = [], LocalBasis(self._dim)
        self._extend([chunk for chunk in kept if chunk.part.count])
        return last

    def _extend(self, chunks: list[Chunk]) -> None:
        self._chunks += chunks
        self._known.extend([_block(chunk.part) for chunk in chunks])

    def counts(self) -> dict[str, int]:
        """Cause -> dimensions, in the order in which the causes came."""
        found: dict[str, int] = {}
        for chunk in self._chunks:
            found[chunk.cause] = found.get(chunk.cause, 0) + chunk.part.count
        return found

    def blocks(self, like: Tensor) -> tuple[Block, ...]:
        """Positions `(p,)` and columns `(p, k)`, cause after cause as in `counts`; where there is none, one of none."""
        none = like.new_zeros(0, 0)
        parts = [chunk.part for wanted in self.counts() for chunk in self._chunks if chunk.cause == wanted]
        found = tuple((part.positions.to(like.device), part.values.to(like)) for part in parts)
        return found or ((none.reshape(0).long(), none),)


def _block(part: Part) -> Block:
    return part.positions, part.values


def _part(columns: Sparse, which: Ints) -> Part:
    return Part(*dense_block(columns, which))


def _span(columns: Tensor) -> tuple[Tensor, float]:
    """An orthonormal basis of the columns' span, themselves where they are one; and their least length in it."""
    if columns.shape[1] == 1:
        size = float(columns.norm())
        return (columns / size, size) if size > _NEW else (columns[:, :0], 0.0)
    gram = columns.T @ columns
    if float((gram - torch.eye(len(gram), dtype=gram.dtype)).abs().max()) < 1e-14:
        return columns, 1.0
    u, s, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = u[:, s > _NEW]
    return basis, float(s[s > _NEW].min()) if basis.shape[1] else 0.0
