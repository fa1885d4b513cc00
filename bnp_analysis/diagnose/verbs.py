"""`layer_table` and `compare`: condition numbers of layers and of the network, without and with `P`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.curvature import CURVATURES, gauss_newton, hessian
from bnp_analysis.curvature.engines import curvature_names
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.diagnose.blocks import LayerBlocks, block_numbers, known_null, measured, pair, recorded_network
from bnp_analysis.diagnose.conditioning import condition
from bnp_analysis.diagnose.price import MOST_WORK, off_block_is_cheap, require_work, table_work
from bnp_analysis.diagnose.spectra import off_block as share_outside
from bnp_analysis.diagnose.tables import Comparison, LayerRow, LayerTable
from bnp_analysis.errors import InvalidInputError, NoDerivativeError
from bnp_analysis.linalg import (
    ConditionNumber,
    MatrixOperator,
    Preconditioner,
    SymmetricOperator,
    singular_condition_number,
)
from bnp_analysis.linalg.condition.methods import automatic
from bnp_analysis.linalg.spectra.checks import null_vectors
from bnp_analysis.network import Coverage, EmpiricalRisk, coverage
from bnp_analysis.network.layers import asked_types
from bnp_analysis.network.moments import input_triangles, layer_moments
from bnp_analysis.precondition import NetworkPreconditioner, bnp_preconditioner
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.kinds import gated, require_kind
from bnp_analysis.runtime.progress import Progress, reporting
from bnp_analysis.runtime.random import generator, normal


@full_float32
@gated
def layer_table(
    risk: EmpiricalRisk,
    P: NetworkPreconditioner | None = None,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = torch.float64,
    engine: str = "auto",
    max_memory: int | None = None,
    max_flops: float = MOST_WORK,
    off_block: bool | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> LayerTable:
    """The conditioning of every covered layer: of its inputs, of its units' blocks, of its own block.

    Args:
        risk: the empirical risk.
        P: a preconditioner over `risk.space` that is block diagonal in the layers; default the undamped BNP one. Where
            it covers layers that are covered only if asked for (`also=`), the table does.
        layers: names of the layers wanted; default all.
        dtype: in which to measure; None for the risk's own.
        engine, max_memory: of operators, as in `hessian`.
        max_flops: floating-point operations that the table may take; its estimate is in `settings`.
        off_block: also the share `|A - blockdiag(A)|_F / |A|_F` outside of the layers' blocks; default where it takes a
            second or less, or at most a fifth of what the table takes.
        seed: of random starts and probes.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `LayerTable`.

    Raises:
        InvalidInputError: an unknown layer, or no covered layer.
        WorkLimitError: it would take more than `max_flops`.

    Source: T1, T1', T2, T7.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2
        >>> risk = bnp.EmpiricalRisk(bnp.models.mlp([4, 3, 2]), torch.nn.functional.cross_entropy, (x, y))
        >>> [row.layer for row in bnp.layer_table(risk).layers]
        ['fc1', 'fc2']
    """
    began = time.perf_counter()
    risk, P = _measured(risk, P, dtype)
    asked = asked_types(dict(risk.modules()), getattr(P, "blocks", ()))
    found = coverage(risk, asked)
    if layers is not None:
        if not layers:
            raise InvalidInputError("layers is empty; leave it out for every layer")
        unknown = [name for name in layers if name not in {layer.name for layer in found}]
        if unknown:
            known = ", ".join(layer.name for layer in found)
            raise InvalidInputError(f"layers: no covered layer named {', '.join(unknown)}; there are: {known}")
        found = Coverage(tuple(layer for layer in found if layer.name in layers), found.uncovered)
    work = table_work(risk, found)
    require_work(work, max_flops)
    moments = layer_moments(risk, layers=found)
    triangles = input_triangles(risk, moments, found)
    units = unit_blocks(risk, found)
    held: dict[str, Any] = {"engine": engine, "max_memory": max_memory}
    own, recorded = LayerBlocks(risk, list(found), units, held), recorded_network(risk, list(found))
    table = []
    with reporting(
        progress, sum(layer.units + 2 for layer in found), f"layers, {sum(work.values()):.0e} flops"
    ) as update:
        done = 0
        for layer in found:
            forms = (triangles[layer.name].raw, triangles[layer.name].centered, triangles[layer.name].normalized)
            worst = [max((_singular(t, risk.eps) for t in form), key=lambda k: k.value) for form in forms]
            advance = partial(lambda before, count: update(before + count), done)
            A = own.of(layer.name)
            blocks = block_numbers(risk, layer, A, P, units.get(layer.name), recorded, seed, advance)
            done += layer.units + 2
            update(done)
            table.append(
                LayerRow(
                    layer=layer.name,
                    kind=type(layer.module).__name__,
                    rows=moments[layer.name].rows,
                    features=layer.features,
                    units=layer.units,
                    groups=layer.groups,
                    constant=int(moments[layer.name].constant.sum()),
                    inputs=worst[0],
                    centered=worst[1],
                    normalized=worst[2],
                    unit_blocks=tuple(plain for plain, _ in blocks.units),
                    unit_blocks_with_P=tuple(conditioned for _, conditioned in blocks.units),
                    block=blocks.whole[0],
                    block_with_P=blocks.whole[1],
                    is_hessian=_equals_hessian(A, hessian(risk, block=layer.name, **held), seed),
                    seed=seed,
                    matvecs=_products([*worst, *(k for both in [*blocks.units, blocks.whole] for k in both)])
                    + blocks.products
                    + 2,
                )
            )
    share = None
    if off_block_is_cheap(risk, found, sum(work.values())) if off_block is None else off_block:

        def build(of: EmpiricalRisk, block: str | tuple[str, int | slice] | None) -> SymmetricOperator:
            return gauss_newton(of, block=block, **held) if block or own.joint is None else own.joint

        share = share_outside(risk, [layer.name for layer in found], build, seed=seed)
    return LayerTable(
        layers=tuple(table),
        uncovered=dict(found.uncovered),
        off_block=share,
        settings={
            "preconditioner": getattr(P, "settings", {}),
            "dtype": str(risk.space.dtype),
            "precision": str(risk.precision),
            "n": risk.batches.total,
            "flops": sum(work.values()),
        },
        engine=risk.provenance,
        seed=seed,
        matvecs=sum(row.matvecs for row in table) + own.products + (0 if share is None else share.matvecs),
        seconds=time.perf_counter() - began,
    )


@full_float32
@gated
def compare(
    risk: EmpiricalRisk,
    P: NetworkPreconditioner | None = None,
    *,
    curvature: Sequence[str] | str = ("gauss_newton", "hessian"),
    layers: Sequence[str] | None = None,
    profiles: bool = False,
    dtype: torch.dtype | None = torch.float64,
    engine: str = "auto",
    max_memory: int | None = None,
    max_flops: float = MOST_WORK,
    seed: int = 0,
    progress: Progress = False,
) -> Comparison:
    """What a preconditioner does to the conditioning of a network: its `layer_table`, and the whole network.

    Args:
        risk: the empirical risk.
        P: a preconditioner over `risk.space`; default the undamped BNP one.
        curvature: matrices of the whole network to measure: `"gauss_newton"`, `"hessian"`, `"fisher_mc"`,
            `"fisher_empirical"`; or one of them.
        layers: names of the layers wanted in the table; default all.
        profiles: also how the ratio of eigenvalues grows with the rank, as `condition` measures it: numbers with both
            bounds at any size, at some hundred products each.
        dtype: in which to measure; None for the risk's own.
        engine, max_memory: of operators, as in `hessian`.
        max_flops: floating-point operations that the table may take; its estimate is in `settings`.
        seed: of random starts, probes and sampled targets.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `Comparison`.

    Raises:
        InvalidInputError: no covered layer, or an unknown matrix.
        WorkLimitError: the table would take more than `max_flops`.

    Source: T1, T2, T7, T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2
        >>> risk = bnp.EmpiricalRisk(bnp.models.mlp([4, 3, 2]), torch.nn.functional.cross_entropy, (x, y))
        >>> sorted(bnp.compare(risk).network)
        ['gauss_newton', 'hessian']
    """
    began = time.perf_counter()
    risk, P = _measured(risk, P, dtype)
    curvature = curvature_names(*([curvature] if isinstance(curvature, str) else curvature))
    held: dict[str, Any] = {"engine": engine, "max_memory": max_memory}
    table = layer_table(risk, P, layers=layers, dtype=None, **held, max_flops=max_flops, seed=seed, progress=progress)
    network, by_rank = {}, {}
    null = cache(lambda of: known_null(risk, None, curvature=of))
    for name in curvature:
        A = curvature_matrix(risk, name, seed, **held)
        # What annihilates the Gauss-Newton matrix annihilates Fisher matrices; of the Hessian it is looked for anew.
        known = null("gauss_newton" if A.semidefinite else name) if automatic(A, indefinite=True).decides else None
        network[name] = pair(A, P, known, seed, progress=progress)
        if profiles and network[name] != (None, None):
            by_rank[name] = condition(
                risk, curvature=name, preconditioner=P, dtype=None, **held, seed=seed, progress=progress
            )
    return Comparison(
        layers=table,
        network=network,
        profiles=by_rank,
        settings=table.settings,
        engine=table.engine,
        seed=seed,
        matvecs=table.matvecs
        + _products([k for both in network.values() for k in both])
        + sum(found.matvecs for found in by_rank.values()),
        seconds=time.perf_counter() - began,
    )


@gated
def curvature_matrix(
    risk: EmpiricalRisk, name: str, seed: int = 0, *, engine: str = "auto", max_memory: int | None = None
) -> SymmetricOperator:
    """A curvature matrix of a risk by its name, one of `CURVATURES`; `engine` and `max_memory` as in `hessian`.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, (x, y))
        >>> curvature_matrix(risk, "hessian").dim
        3
    """
    (name,) = curvature_names(name)
    return CURVATURES[name](risk, seed=seed, engine=engine, max_memory=max_memory)


def _measured(
    risk: EmpiricalRisk, P: NetworkPreconditioner | None, dtype: torch.dtype | None
) -> tuple[EmpiricalRisk, NetworkPreconditioner]:
    """The risk and `P` as they are measured: in float64 on the CPU unless told otherwise; BNP unless given."""
    if P is not None:
        require_kind(P, "P", Preconditioner)
    risk = measured(risk, dtype, "the numbers of a table")
    P = P if P is None or dtype is None else P.to(dtype, "cpu")
    return risk, bnp_preconditioner(risk) if P is None else P


def _singular(triangle: Tensor, eps: float) -> ConditionNumber:
    return singular_condition_number(MatrixOperator(triangle, exact=False, eps=eps), null_vectors(triangle))


def _equals_hessian(A: SymmetricOperator, H: SymmetricOperator, seed: int) -> bool | None:
    """Whether one random product of the layer's Hessian block equals that of its Gauss-Newton block (T1').

    None where an operation has no second derivative.
    """
    v = normal((A.dim,), generator(seed), torch.empty(0, dtype=A.dtype, device=A.device))
    image = A @ v
    tolerance = 1e3 * A.eps * float(A.dim) ** 0.5
    try:
        return bool((H @ v - image).norm() <= tolerance * image.norm())
    except NoDerivativeError:
        return None


def _products(found: Sequence[ConditionNumber | None]) -> int:
    return sum(k.matvecs for k in found if k is not None)
