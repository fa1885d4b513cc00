"""Spectra of the blocks of a curvature: densities, profiles, distances, and the part outside the blocks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bnp_analysis.curvature import CURVATURES
from bnp_analysis.curvature.engines import curvature_names
from bnp_analysis.diagnose.blocks import measured
from bnp_analysis.errors import InvalidInputError, ZeroOperatorError
from bnp_analysis.linalg import (
    ConditionProfile,
    OffBlockShare,
    Restriction,
    SpectralDensity,
    SymmetricOperator,
    condition_profile,
    off_block_share,
    spectral_density,
)
from bnp_analysis.linalg.spectra.quadrature import on_symmetric_axis, symmetric_grid
from bnp_analysis.network import EmpiricalRisk, ParameterSpace
from bnp_analysis.network.parameters import Block
from bnp_analysis.results import Result
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.progress import Progress, reporting

Floats = NDArray[np.float64]
# Of the axis on which densities are compared: sizes below this part of the largest one count as zero; its points.
_FLOOR, _POINTS = 1e-6, 1200


@dataclass(frozen=True, kw_only=True, repr=False)
class BlockSpectra(Result):
    """The spectra of the diagonal blocks of one curvature matrix.

    Attributes:
        names: of the blocks.
        sizes: numbers of parameters.
        densities: the `SpectralDensity` of each block; of all its eigenvalues, where that took no more products.
        profiles: the `ConditionProfile` of each block; None for a block without curvature, and where not asked for.
        distance: `(b, b)` the Jensen-Shannon distance, between 0 and 1, of the densities of two blocks.
        noise: `(b,)` the same between two halves of the probes of one block: smaller distances mean nothing.
        off_block: the share of the matrix outside of the blocks; None for a single block and blocks that overlap.
        curvature: name of the matrix.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    densities: tuple[SpectralDensity, ...]
    profiles: tuple[ConditionProfile | None, ...]
    distance: Floats
    noise: Floats
    off_block: OffBlockShare | None
    curvature: str

    def summary(self) -> str:
        """How many blocks, which are the most unlike, what lies outside of them."""
        text = f"{len(self.names)} blocks of the {self.curvature} matrix, {self.matvecs} products"
        if len(self.names) > 1:
            i, j = np.unravel_index(int(self.distance.argmax()), self.distance.shape)
            text += (
                f"; the most unlike are {self.names[i]} and {self.names[j]}, Jensen-Shannon distance "
                f"{self.distance[i, j]:.3g} (noise {max(self.noise[i], self.noise[j]):.2g})"
            )
        return text + ("" if self.off_block is None else f"; outside of the blocks {self.off_block}")

    def __str__(self) -> str:
        """The summary and the table."""
        return f"{self._line()}\n{self.table()}"

    def records(self) -> list[dict[str, object]]:
        """One row per block, of numbers.

        `smallest`, `largest`, `mean` are those of the nodes of the density, `negative` the mass below minus its
        rounding with bounds; `lambda_max` with bounds, `effective_rank` and the last known `ratio` at `rank` are
        the profile's; `noise` as above.
        """
        rows: list[dict[str, object]] = []
        for i, (density, profile) in enumerate(zip(self.densities, self.profiles, strict=True)):
            nodes = density.nodes[density.weights > 0]
            below = density.mass(-math.inf, -max(density.rounding, np.finfo(float).tiny))
            known = profile is not None and len(profile.ranks) > 0
            rows.append(
                {
                    "block": self.names[i],
                    "size": self.sizes[i],
                    "smallest": float(nodes.min()),
                    "largest": float(nodes.max()),
                    "mean": float((density.nodes * density.weights).sum() / len(density.nodes)),
                    "negative": below.value,
                    "negative_lower": below.lower,
                    "negative_upper": below.upper,
                    "lambda_max": profile.lambda_max if profile else math.nan,
                    "lambda_max_lower": profile.lambda_max_lower if profile else math.nan,
                    "lambda_max_upper": profile.lambda_max_upper if profile else math.nan,
                    "effective_rank": profile.effective_rank if profile else math.nan,
                    "effective_rank_error": profile.effective_rank_error if profile else math.nan,
                    "rank": float(profile.ranks[-1]) if profile and known else math.nan,
                    "ratio": float(profile.value[-1]) if profile and known else math.nan,
                    "lower": float(profile.lower[-1]) if profile and known else math.nan,
                    "upper": float(profile.upper[-1]) if profile and known else math.nan,
                    "noise": float(self.noise[i]),
                }
            )
        return rows

    def cells(self) -> list[dict[str, object]]:
        """The same with rounded numbers."""
        kept = ("block", "size", "smallest", "largest", "mean", "negative")
        shown: list[dict[str, object]] = []
        for row, profile in zip(self.records(), self.profiles, strict=True):
            cell: dict[str, object] = {name: row[name] for name in kept}
            if any(self.profiles):
                cell["trace/lambda_1"] = f"{row['effective_rank']:.3g}"
                ratio = f"{row['ratio']:.3g} ({row['lower']:.3g} .. {row['upper']:.3g}) at rank {row['rank']:.0f}"
                cell["lambda_1/lambda_r"] = "-" if profile is None or not len(profile.ranks) else ratio
            shown.append(cell)
        return shown


@full_float32
@gated
def block_spectra(
    risk: EmpiricalRisk,
    *,
    blocks: Mapping[str, Block] | Sequence[Block] | None = None,
    curvature: str = "hessian",
    probes: int = 8,
    steps: int = 64,
    profiles: bool = True,
    dtype: torch.dtype | None = torch.float64,
    engine: str = "auto",
    max_memory: int | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> BlockSpectra:
    """Densities and condition profiles of the diagonal blocks of a curvature, and how unlike they are.

    Blocks are compared by the Jensen-Shannon distance `sqrt((KL(p, m) + KL(q, m)) / 2)`, `m = (p + q) / 2`, in bits, of
    their densities on the axis `sign(x) log10(1 + |x| / s)`, `s` a millionth of the largest eigenvalue of all blocks. A
    block with no more parameters than `probes * steps` has all its eigenvalues computed; of others these are products.

    Args:
        risk: the empirical risk.
        blocks: what a curvature takes as `block=`: names of layers or tensors, patterns (`"embed*"`, `"*.weight"`),
            units `(name, slice(a, b))`; with labels, if in a dict, as `risk.space.row_blocks("*.in_proj_*", "qkv")`
            makes for parts of a packed projection and for heads. Default every parameter tensor.
        curvature: `"hessian"`, `"gauss_newton"`, `"fisher_mc"` or `"fisher_empirical"`.
        probes, steps: of the densities, as for `spectral_density`.
        profiles: also the condition profile of each block.
        dtype: in which to measure, on the CPU; None for the risk's own.
        engine, max_memory: of operators, as in `hessian`.
        seed: of probes, random starts and sampled targets.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `BlockSpectra`; `plotting.plot_block_distances` and `plotting.plot_block_densities` draw it.

    Raises:
        InvalidInputError: an unknown curvature or block, two blocks under one label.

    Source: Zhang et al. 2024 (Why Transformers need Adam) for the comparison; Lin 1991 for the divergence.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2
        >>> risk = bnp.EmpiricalRisk(bnp.models.mlp([4, 3, 2]), torch.nn.functional.cross_entropy, (x, y))
        >>> found = bnp.block_spectra(risk, blocks=["fc1", "fc2"])
        >>> found.names, found.sizes, bool(found.off_block.value < 1)
        (('fc1', 'fc2'), (15, 8), True)
    """
    began = time.perf_counter()
    (name,) = curvature_names(curvature)
    if probes < 2:
        raise InvalidInputError(f"the noise of a distance needs at least two probes, got {probes}")
    risk = measured(risk, dtype, "spectra of blocks")
    wanted = _labelled(blocks, risk.space)
    positions = [risk.space.indices(block) for block in wanted.values()]

    def build(of: EmpiricalRisk, block: Block | None = None) -> SymmetricOperator:
        return CURVATURES[name](of, seed=seed, block=block, engine=engine, max_memory=max_memory)

    densities: list[SpectralDensity] = []
    found_profiles: list[ConditionProfile | None] = []
    with reporting(progress, len(wanted) + 1, "spectra of blocks") as update:
        for block in wanted.values():
            A = build(risk, block)
            method = "dense" if A.dim <= probes * steps else "quadrature"
            densities.append(spectral_density(A, probes=probes, steps=steps, method=method, seed=seed))
            found_profiles.append(_profile(A, seed) if profiles else None)
            update(len(densities))
        share = off_block(risk, list(wanted.values()), build, seed=seed)
        update(len(densities) + 1)
    distance, noise = _distances(densities)
    found = [*densities, *(one for one in found_profiles if one is not None), *([] if share is None else [share])]
    return BlockSpectra(
        names=tuple(wanted),
        sizes=tuple(len(p) for p in positions),
        densities=tuple(densities),
        profiles=tuple(found_profiles),
        distance=distance,
        noise=noise,
        off_block=share,
        curvature=curvature,
        settings={"curvature": name, "probes": probes, "steps": steps, "dtype": str(risk.space.dtype)},
        engine=risk.provenance,
        seed=seed,
        matvecs=sum(result.matvecs for result in found),
        seconds=time.perf_counter() - began,
    )


def off_block(
    risk: EmpiricalRisk,
    blocks: Sequence[Block],
    build: Callable[[EmpiricalRisk, Block | None], SymmetricOperator],
    *,
    seed: int = 0,
) -> OffBlockShare | None:
    """The share of a curvature of the parameters in some blocks that lies outside of these, by `build(risk, block)`.

    None for a single block, blocks that overlap, and where there is no curvature.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, (x, y))
        >>> round(off_block(risk, ["weight", "bias"], lambda r, block: bnp.hessian(r, block=block)).value, 4)
        0.6325
    """
    names = [name for block in blocks for name in risk.space.layer_names(block if isinstance(block, str) else block[0])]
    inner = risk.restrict(names)
    positions = [inner.space.indices(block) for block in blocks]
    every = torch.cat(positions).sort().values
    if len(blocks) < 2 or bool((every.diff() == 0).any()):
        return None
    whole = build(inner, None)
    A = whole if len(every) == whole.dim else Restriction(whole, every)
    places = torch.full((inner.space.dim,), -1)
    places[every] = torch.arange(len(every))
    try:
        return off_block_share(A, [places[p] for p in positions], parts=lambda i: build(inner, blocks[i]), seed=seed)
    except ZeroOperatorError:
        return None


def _labelled(blocks: Mapping[str, Block] | Sequence[Block] | None, space: ParameterSpace) -> Mapping[str, Block]:
    """The blocks under their labels."""
    if isinstance(blocks, Mapping):
        found = dict(blocks)
    else:
        if isinstance(blocks, str):
            raise InvalidInputError(f"blocks are several: give [{blocks!r}]")
        listed = list(space.names if blocks is None else blocks)
        found = {_label(block): block for block in listed}
        if len(found) < len(listed):
            raise InvalidInputError("a block is given twice")
    if not found:
        raise InvalidInputError("no block to measure; leave blocks out for every parameter tensor")
    return found


def _label(block: Block) -> str:
    if isinstance(block, str):
        return block
    name, unit = block
    return f"{name}[{unit.start}:{unit.stop}]" if isinstance(unit, slice) else f"{name}[{unit}]"


def _profile(A: SymmetricOperator, seed: int) -> ConditionProfile | None:
    try:
        return condition_profile(A, seed=seed)
    except ZeroOperatorError:
        return None


def _distances(densities: Sequence[SpectralDensity]) -> tuple[Floats, Floats]:
    """The Jensen-Shannon distances of densities on one axis, and those between halves of the probes of each."""
    largest = max(float(np.abs(d.nodes).max()) for d in densities) or 1.0
    grid = symmetric_grid(largest, _FLOOR * largest, _POINTS)

    def shares(nodes: Floats, weights: Floats) -> Floats:
        heights = on_symmetric_axis(grid, nodes, weights, _FLOOR * largest)
        return np.asarray(heights / heights.sum())

    whole = [shares(d.nodes, d.weights) for d in densities]
    halves = [
        jensen_shannon(shares(d.nodes[::2], d.weights[::2]), shares(d.nodes[1::2], d.weights[1::2]))
        if len(d.nodes) > 1
        else 0.0
        for d in densities
    ]
    return np.array([[jensen_shannon(p, q) for q in whole] for p in whole]), np.array(halves)


def jensen_shannon(p: Floats, q: Floats) -> float:
    """The Jensen-Shannon distance of two distributions over the same places, with logarithms to base 2.

    Example:
        >>> jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])), jensen_shannon(np.ones(2) / 2, np.ones(2) / 2)
        (1.0, 0.0)
    """
    both, total = p + q, 0.0
    for x in (p, q):
        some = x > 0
        total += float((x[some] * np.log2(2 * x[some] / both[some])).sum()) / 2
    return math.sqrt(max(total, 0.0))
