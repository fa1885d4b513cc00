"""Sparse candidate null directions, their causes and finite symmetries, and the basis built from them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.bases import Block, Ints, LocalBasis, Sparse, components, dense_block, sparse_columns
from bnp_analysis.linalg.spectra.checks import Verifier
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.symmetry.graph import Graph


class Cause(StrEnum):
    """Why a direction is null (T11); printed and written to files as these words."""

    NO_EFFECT = "parameters without effect"
    DEPENDENT_INPUTS = "dependent inputs"
    INACTIVE_ROWS = "inactive rows"
    DEAD_UNITS = "dead units"
    UNREAD_OUTPUTS = "unread outputs"
    SOFTMAX_SHIFT = "softmax shift"
    LAYER_NORM_SHIFT = "layer_norm shift"
    GROUP_NORM_SHIFT = "group_norm shift"
    BATCH_NORM_SHIFT = "batch_norm shift"
    INSTANCE_NORM_SHIFT = "instance_norm shift"
    LAYER_NORM_SCALE = "layer_norm scale"
    RMS_NORM_SCALE = "rms_norm scale"
    GROUP_NORM_SCALE = "group_norm scale"
    BATCH_NORM_SCALE = "batch_norm scale"
    INSTANCE_NORM_SCALE = "instance_norm scale"
    COMPENSATED_SCALE = "batch_norm scale made up for"
    NORM_AFFINE = "norm affine"
    ROTATION = "rotation through norms"
    HOMOGENEITY = "homogeneity"
    ALWAYS_ACTIVE = "always-active units"
    LINEAR_LAYER = "linear layer"
    RESIDUAL_STREAM = "residual stream"
    QUERY_KEY = "attention query-key"
    KEY_BIAS = "key bias"
    ATTENTION_VALUES = "attention values"

    def __repr__(self) -> str:
        return repr(self.value)


# What a normalization, or a softmax, makes of a common shift of what it receives: nothing.
SHIFTS = {
    "layer_norm": Cause.LAYER_NORM_SHIFT,
    "group_norm": Cause.GROUP_NORM_SHIFT,
    "batch_norm": Cause.BATCH_NORM_SHIFT,
    "instance_norm": Cause.INSTANCE_NORM_SHIFT,
    "softmax": Cause.SOFTMAX_SHIFT,
    "log_softmax": Cause.SOFTMAX_SHIFT,
}
# The same of a common scale.
SCALES = {
    "layer_norm": Cause.LAYER_NORM_SCALE,
    "rms_norm": Cause.RMS_NORM_SCALE,
    "group_norm": Cause.GROUP_NORM_SCALE,
    "batch_norm": Cause.BATCH_NORM_SCALE,
    "instance_norm": Cause.INSTANCE_NORM_SCALE,
}


@dataclass(frozen=True, eq=False)
class Part:
    """Columns `values (p, k)` on the flat positions `positions (p,)`, zero elsewhere; on the CPU, in float64."""

    positions: Tensor
    values: Tensor

    @property
    def count(self) -> int:
        return self.values.shape[1]


_no_positions, _no_values = (partial(torch.zeros, 0, dtype=dtype) for dtype in (torch.int64, torch.float64))


@dataclass(frozen=True, eq=False)
class Orbit:
    """A one-parameter group `T_t`, `T_s T_t = T_(s t)`, with `L(T_t theta) = L(theta)` for all `t > 0`.

    Scales multiply by powers of `t`, shifts and mixings of one channel into another go by `log t`.

    Attributes:
        cause: what the symmetry comes from, as in `NullDirections.sources`.
        scaled, exponents: `theta[scaled] *= t^exponents`.
        shifted, steps: `theta[shifted] += log(t) steps`.
        sheared: for each of some steps in a row, `theta[target] += log(t) * factor * theta[source]`, summed over equal
            targets; columns `(target, source)` and the factors.

    Source: T11, T12.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(9, 3, dtype=torch.float64), torch.arange(9) % 2
        >>> model = bnp.models.mlp([3, 4, 2], dtype=torch.float64)
        >>> risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, y))
        >>> orbit = bnp.null_directions(risk).orbit("homogeneity")
        >>> bool(abs(risk(orbit.apply(risk.theta, 50.0)) - risk.value) < 1e-14)
        True
    """

    cause: str
    scaled: Tensor = field(default_factory=_no_positions)
    exponents: Tensor = field(default_factory=_no_values)
    shifted: Tensor = field(default_factory=_no_positions)
    steps: Tensor = field(default_factory=_no_values)
    sheared: tuple[tuple[Tensor, Tensor], ...] = ()

    def apply(self, theta: Tensor, t: float) -> Tensor:
        """`T_t theta`.

        Args:
            theta: flat parameters `(n,)`, near or far from where the symmetry was found.
            t: positive; 1 is the identity.

        Raises:
            InvalidInputError: `t` is not positive.
        """
        if not (t > 0 and math.isfinite(t)):
            raise InvalidInputError(f"an orbit goes along 0 < t < inf, not t = {t}; t = 1 is where it starts")
        time, out = math.log(t), theta.clone()
        out[self.scaled] *= (time * self.exponents).exp().to(theta)
        out[self.shifted] += (time * self.steps).to(theta)
        for pairs, factors in self.sheared:
            out = out.index_add(0, pairs[:, 0], (time * factors).to(theta) * out[pairs[:, 1]])
        return out

    def tangent(self, theta: Tensor) -> Tensor:
        """`d/dt T_t theta` at `t = 1`, `(n,)`."""
        out = torch.zeros_like(theta)
        out[self.scaled] = self.exponents.to(theta) * theta[self.scaled]
        out[self.shifted] += self.steps.to(theta)
        for pairs, factors in self.sheared:
            out = out.index_add(0, pairs[:, 0], factors.to(theta) * theta[pairs[:, 1]])
        return out


@dataclass(frozen=True, eq=False)
class Candidate:
    """Directions of one cause; `exact` is False where only a norm's eps = 0 would make them null.

    `orbits[i]` is the finite symmetry along the single column of `parts[i]`, where there is one.
    """

    cause: str
    parts: tuple[Part, ...]
    exact: bool = True
    orbits: tuple[Orbit | None, ...] = ()

    @property
    def count(self) -> int:
        return sum(part.count for part in self.parts)


class Chart:
    """Where the parameters of a graph lie in the flat space, and their values in float64 on the CPU.

    Attributes:
        values: all numbers by position: the free ones as in the flat space, then the constants.
    """

    def __init__(self, risk: EmpiricalRisk, graph: Graph) -> None:
        self.space, self.graph, self.dim = risk.space, graph, risk.space.dim
        self._tensors = {name: t.detach().cpu().double() for name, t in risk.named_tensors().items()}
        self._positions = dict[str, Tensor]()
        self._start, begin = {}, self.dim
        for name, t in self._tensors.items():
            free = name in self.space
            self._start[name] = self.space.slice_of(name).start if free else begin
            begin += 0 if free else t.numel()
        self.values = torch.zeros(begin, dtype=torch.float64)
        for name, t in self._tensors.items():
            self.values[self.positions(name).reshape(-1)] = t.reshape(-1)

    @property
    def names(self) -> list[str]:
        """Of all parameters, free or not."""
        return [*self._tensors]

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def positions(self, name: str) -> Tensor:
        """Where the entries of a parameter lie, of its shape; constants lie behind the flat space."""
        start, t = self._start[name], self._tensors[name]
        if name not in self._positions:
            self._positions[name] = torch.arange(start, start + t.numel()).view(t.shape)
        return self._positions[name]


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
        found = Counter[str]()
        for chunk in self._chunks:
            found[chunk.cause] += chunk.part.count
        return dict(found)

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
