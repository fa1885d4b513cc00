"""Known null directions of the Gauss-Newton matrix: candidates from the structure, each verified."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.curvature.gauss_newton import gauss_newton
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.linalg.extremes import norm_estimate
from bnp_analysis.linalg.memory import available_memory, require_memory
from bnp_analysis.linalg.null import null_tolerance
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.network.layers import coverage
from bnp_analysis.network.parameters import Block
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.symmetries import candidate_directions
from bnp_analysis.results import Result


@dataclass(frozen=True, kw_only=True, repr=False)
class NullDirections(Result):
    """Verified null directions of a Gauss-Newton matrix, in the coordinates of its parameters.

    Attributes:
        basis: `(n, r)`, orthonormal; accepted wherever `null=` is.
        sources: cause -> how many dimensions it adds to those before it; they sum to `r`.
        approximate: cause -> `(count, largest |F t| / |F| |t|)` of directions that are null only in the limit of a
            normalization's eps; never part of the basis.
        rejected: cause -> `(count, largest |F t| / |F| |t|)` of candidates that turned out not to be null.
        not_analysed: parts of the network that could not be read.
    """

    basis: Tensor
    sources: Mapping[str, int]
    approximate: Mapping[str, tuple[int, float]]
    rejected: Mapping[str, tuple[int, float]]
    not_analysed: tuple[str, ...]

    def summary(self) -> str:
        """Counts by cause."""
        parts = ", ".join(f"{cause} {count}" for cause, count in self.sources.items()) or "none"
        text = f"{self.basis.shape[1]} null directions of {self.basis.shape[0]} ({parts})"
        if self.approximate:
            text += "; approximate: " + ", ".join(f"{c} {n} ({s:.1g})" for c, (n, s) in self.approximate.items())
        if self.rejected:
            text += "; rejected: " + ", ".join(f"{c} {n} ({s:.1g})" for c, (n, s) in self.rejected.items())
        return text + (f"; not analysed: {'; '.join(self.not_analysed)}" if self.not_analysed else "")

    def records(self) -> list[dict[str, object]]:
        """One row per cause."""
        return [{"cause": cause, "dimensions": count} for cause, count in self.sources.items()]

    def inside(self, positions: Tensor) -> Tensor:
        """The basis vectors that vanish outside some coordinates, on these: `(len(positions), k)`.

        They are null directions of the principal block at these coordinates, for instance of one unit.
        """
        outside = torch.ones(self.basis.shape[0], dtype=torch.bool, device=self.basis.device)
        outside[positions] = False
        alone = (self.basis[outside] == 0).all(dim=0)
        return self.basis[positions][:, alone]


def null_directions(risk: EmpiricalRisk, *, block: Block | None = None) -> NullDirections:
    """Directions `t` with `F t = 0`, `F^T F` the Gauss-Newton matrix, from the symmetries and the data of a network.

    Causes (T11): positively homogeneous units and channels; linear layers and always-active units; the softmax shift;
    shifts before a normalization, and its affine part; dependent inputs, rows that a ReLU cuts, dead units. Each is
    verified by a product, relative; scales before a normalization with eps > 0 are reported as approximate.

    Args:
        risk: the empirical risk.
        block: only directions inside a layer, or inside one output unit `(layer, i)`.

    Returns:
        `NullDirections`; the rank is that of the union. What the data do not determine beyond these causes is not
        counted as explained.

    Raises:
        InvalidInputError: no such block; MemoryLimitError: the candidates do not fit.

    Source: T11.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(20, 2, dtype=torch.float64), torch.arange(20) % 3
        >>> model = torch.nn.Linear(2, 3, dtype=torch.float64)
        >>> risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, y))
        >>> bnp.null_directions(risk).sources
        {'softmax shift': 3}
    """
    began = time.perf_counter()
    if block is not None:
        layer = block if isinstance(block, str) else block[0]
        inner = risk.restrict(risk.space.layer_names(layer))
        if isinstance(block, str):
            return null_directions(inner)
        return _unit(null_directions(inner), inner.space.indices(block))
    # A row without curvature is exactly zero in the unit's factor, whatever cut it.
    units = unit_blocks(risk, coverage(risk))
    reach = {layer: blocks.scales != 0 for layer, blocks in units.items()}
    candidates, skipped = candidate_directions(risk, reach)
    n = risk.space.dim
    require_memory(
        3 * n * sum(c.columns.shape[1] for c in candidates) * risk.space.dtype.itemsize, "the candidate null directions"
    )
    A = gauss_newton(risk)
    count = sum(c.columns.shape[1] for c in candidates)
    image, scale, matvecs = _images(A.factor or A, count)
    basis = torch.zeros(n, 0, dtype=risk.space.dtype, device=risk.space.device)
    sources: dict[str, int] = {}
    approximate: dict[str, tuple[int, float]] = {}
    rejected: dict[str, tuple[int, float]] = {}
    tolerance = null_tolerance(image)
    for candidate in candidates:
        columns = candidate.columns / candidate.columns.norm(dim=0).clamp_min(torch.finfo(risk.space.dtype).tiny)
        columns = columns[:, columns.norm(dim=0) > 0.5]
        sizes = (image @ columns).norm(dim=0) / scale if scale > 0 else columns.new_zeros(columns.shape[1])
        null = sizes <= tolerance
        if not bool(null.all()):
            book = rejected if candidate.exact else approximate
            known, worst = book.get(candidate.cause, (0, 0.0))
            book[candidate.cause] = (known + int((~null).sum()), max(worst, float(sizes[~null].max())))
        fresh = _new_directions(basis, columns[:, null])
        if fresh.shape[1]:
            # What is left of nearly dependent columns is their rounding, enlarged: verified once more.
            fresh = fresh[:, (image @ fresh).norm(dim=0) <= tolerance * max(scale, 1e-300)]
        if fresh.shape[1]:
            basis = torch.cat([basis, fresh], dim=1)
            sources[candidate.cause] = sources.get(candidate.cause, 0) + fresh.shape[1]
    return NullDirections(
        basis=basis,
        sources=sources,
        approximate=approximate,
        rejected=rejected,
        not_analysed=tuple(skipped),
        settings={"tolerance": tolerance},
        matvecs=matvecs + count,
        seconds=time.perf_counter() - began,
    )


def _images(operator: LinearOperator, count: int) -> tuple[LinearOperator, float, int]:
    """The factor, dense where that is cheaper than one product per candidate; its norm; products spent."""
    from bnp_analysis.linalg.matrices import MatrixOperator

    rows, columns = operator.shape
    if count > operator.dense_cost and 4 * rows * columns * operator.dtype.itemsize < available_memory():
        cost = operator.dense_cost
        operator = MatrixOperator(operator.to_dense(), exact=False)
        return operator, norm_estimate(GramOperator(operator)) ** 0.5, cost
    return operator, norm_estimate(GramOperator(operator)) ** 0.5, 8


def _new_directions(basis: Tensor, columns: Tensor) -> Tensor:
    """An orthonormal basis of what the columns add to a span; disjoint supports stay disjoint."""
    if columns.shape[1] == 0:
        return columns
    rest = columns - basis @ (basis.T @ columns)
    rest = rest - basis @ (basis.T @ rest)
    kept: list[Tensor] = []
    for part in _supports(rest):
        u, s, _ = torch.linalg.svd(part, full_matrices=False)
        # Closer to the span of the others than this, a direction does not count as new.
        kept.append(u[:, s > float(torch.finfo(columns.dtype).eps) ** 0.4])
    return torch.cat(kept, dim=1) if kept else rest[:, :0]


def _supports(columns: Tensor) -> list[Tensor]:
    """Runs of columns with the same nonzero rows: one SVD each keeps zeros exact and matrices small."""
    groups: dict[bytes, list[int]] = {}
    for k, pattern in enumerate((columns != 0).T.cpu().numpy()):
        groups.setdefault(pattern.tobytes(), []).append(k)
    if len(groups) == columns.shape[1] or _overlap(columns, list(groups.values())):
        return [columns]
    return [columns[:, picked] for picked in groups.values()]


def _overlap(columns: Tensor, groups: list[list[int]]) -> bool:
    cover = torch.zeros(columns.shape[0], dtype=torch.int64, device=columns.device)
    for picked in groups:
        cover += (columns[:, picked] != 0).any(dim=1)
    return bool((cover > 1).any())


def _unit(found: NullDirections, positions: Tensor) -> NullDirections:
    basis = found.inside(positions)
    return NullDirections(
        basis=basis,
        sources={"inside the unit": basis.shape[1]} if basis.shape[1] else {},
        approximate=found.approximate,
        rejected=found.rejected,
        not_analysed=found.not_analysed,
        settings=found.settings,
        matvecs=found.matvecs,
        seconds=found.seconds,
    )
