"""The verbs a notebook wants: how well conditioned each layer and the network are, without and with `P`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bnp_analysis.curvature import NullDirections, fisher, gauss_newton, hessian, null_directions
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.diagnose.tables import Comparison, LayerRow, LayerTable
from bnp_analysis.errors import InvalidInputError, MemoryLimitError, ZeroOperatorError
from bnp_analysis.linalg import (
    ConditionNumber,
    MatrixOperator,
    Preconditioner,
    SymmetricOperator,
    condition_number,
    magnitude_condition_number,
    singular_condition_number,
)
from bnp_analysis.linalg.null import HasBasis, SomeNullDirections
from bnp_analysis.linalg.progress import Progress, reporting
from bnp_analysis.linalg.random import generator, normal
from bnp_analysis.network import Coverage, EmpiricalRisk, Layer, coverage
from bnp_analysis.network.dependencies import null_vectors
from bnp_analysis.network.inputs import input_triangles
from bnp_analysis.network.moments import layer_moments
from bnp_analysis.precondition import NetworkPreconditioner, bnp_preconditioner

# Parameters of a block beyond which tables do not search for null directions.
_SEARCHED = 6_000


def layer_table(
    risk: EmpiricalRisk,
    P: NetworkPreconditioner | None = None,
    *,
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = torch.float64,
    seed: int = 0,
    progress: Progress = False,
) -> LayerTable:
    """The conditioning of every covered layer: of its inputs, of its units' blocks, of its own block.

    Args:
        risk: the empirical risk.
        P: a preconditioner over `risk.space` that is block diagonal in the layers; default the undamped BNP one.
        layers: names of the layers wanted; default all.
        dtype: in which to measure; None for the risk's own.
        seed: of random starts and probes.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `LayerTable`.

    Raises:
        InvalidInputError: an unknown layer, or no covered layer.

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
    found = coverage(risk)
    if layers is not None:
        unknown = [name for name in layers if name not in {layer.name for layer in found}]
        if unknown:
            known = ", ".join(layer.name for layer in found)
            raise InvalidInputError(f"no covered layer named {', '.join(unknown)}; there are: {known}")
        found = Coverage(tuple(layer for layer in found if layer.name in layers), found.uncovered)
    moments = layer_moments(risk, layers=found)
    triangles = input_triangles(risk, moments, found)
    units = unit_blocks(risk, found)
    table = []
    with reporting(progress, sum(layer.units + 2 for layer in found), "layers") as update:
        done = 0
        for layer in found:
            forms = (triangles[layer.name].raw, triangles[layer.name].centered, triangles[layer.name].normalized)
            worst = [max((_singular(t) for t in form), key=lambda k: k.value) for form in forms]
            null = _known_null(risk, layer.name)
            whole = _pair(gauss_newton(risk, block=layer.name), P.block(layer.name), null, seed)
            inner = risk.space.restrict(risk.space.layer_names(layer.name))
            blocks = units.get(layer.name)
            pairs = []
            for i in range(layer.units):
                A: SymmetricOperator = gauss_newton(risk, block=(layer.name, i)) if blocks is None else blocks[i]
                inside = None
                if null is not None:
                    inside = SomeNullDirections(null.inside(inner.indices((layer.name, i))))
                pairs.append(_pair(A, _unit_of(P, layer.name, i), inside, seed))
                done += 1
                update(done)
            done += 2
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
                    unit_blocks=tuple(pair[0] for pair in pairs),
                    unit_blocks_with_P=tuple(pair[1] for pair in pairs),
                    block=whole[0],
                    block_with_P=whole[1],
                    is_hessian=_equals_hessian(risk, layer, seed),
                    seed=seed,
                    matvecs=_products([*worst, *(k for pair in pairs for k in pair), *whole]) + 2,
                )
            )
    return LayerTable(
        layers=tuple(table),
        uncovered=dict(found.uncovered),
        settings={
            "preconditioner": getattr(P, "settings", {}),
            "dtype": str(risk.space.dtype),
            "n": risk.batches.total,
        },
        seed=seed,
        matvecs=sum(row.matvecs for row in table),
        seconds=time.perf_counter() - began,
    )


def compare(
    risk: EmpiricalRisk,
    P: NetworkPreconditioner | None = None,
    *,
    curvature: Sequence[str] = ("gauss-newton", "hessian"),
    layers: Sequence[str] | None = None,
    dtype: torch.dtype | None = torch.float64,
    seed: int = 0,
    progress: Progress = False,
) -> Comparison:
    """What a preconditioner does to the conditioning of a network: its `layer_table`, and the whole network.

    Args:
        risk: the empirical risk.
        P: a preconditioner over `risk.space`; default the undamped BNP one.
        curvature: matrices of the whole network to measure: `"gauss-newton"`, `"hessian"`, `"fisher-mc"`,
            `"fisher-empirical"`.
        layers: names of the layers wanted in the table; default all.
        dtype: in which to measure; None for the risk's own.
        seed: of random starts, probes and sampled targets.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `Comparison`.

    Raises:
        InvalidInputError: no covered layer, or an unknown matrix.

    Source: T1, T2, T7, T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2
        >>> risk = bnp.EmpiricalRisk(bnp.models.mlp([4, 3, 2]), torch.nn.functional.cross_entropy, (x, y))
        >>> sorted(bnp.compare(risk).network)
        ['gauss-newton', 'hessian']
    """
    began = time.perf_counter()
    risk, P = _measured(risk, P, dtype)
    unknown = [name for name in curvature if name not in CURVATURES]
    if unknown:
        raise InvalidInputError(f"unknown curvature {', '.join(unknown)}; there are: {', '.join(CURVATURES)}")
    table = layer_table(risk, P, layers=layers, dtype=None, seed=seed, progress=progress)
    network = {}
    null = _known_null(risk, None) if set(curvature) - {"hessian"} else None
    for name in curvature:
        A = curvature_matrix(risk, name, seed)
        measure = magnitude_condition_number if name == "hessian" else condition_number
        # The symmetries of the network annihilate J, hence the Gauss-Newton and Fisher matrices; not the Hessian.
        network[name] = _pair(A, P, None if name == "hessian" else null, seed, measure, progress)
    return Comparison(
        layers=table,
        network=network,
        settings=table.settings,
        seed=seed,
        matvecs=table.matvecs + _products([k for pair in network.values() for k in pair]),
        seconds=time.perf_counter() - began,
    )


CURVATURES = ("gauss-newton", "hessian", "fisher-mc", "fisher-empirical")


def curvature_matrix(risk: EmpiricalRisk, name: str, seed: int = 0) -> SymmetricOperator:
    """A curvature matrix of a risk by its name, one of `CURVATURES`.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.eye(2), torch.zeros(2, 1)
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(2, 1), torch.nn.functional.mse_loss, (x, y))
        >>> curvature_matrix(risk, "hessian").dim
        3
    """
    if name == "gauss-newton":
        return gauss_newton(risk)
    if name == "hessian":
        return hessian(risk)
    if name not in CURVATURES:
        raise InvalidInputError(f"unknown curvature {name!r}; there are: {', '.join(CURVATURES)}")
    return fisher(risk, name.removeprefix("fisher-"), seed=seed)


def _measured(
    risk: EmpiricalRisk, P: NetworkPreconditioner | None, dtype: torch.dtype | None
) -> tuple[EmpiricalRisk, NetworkPreconditioner]:
    """The risk and `P` as they are measured: in float64 on the CPU unless told otherwise; BNP unless given."""
    if dtype is not None:
        risk = risk.to(dtype, "cpu")
        P = None if P is None else P.to(dtype, "cpu")
    return risk, bnp_preconditioner(risk) if P is None else P


def _singular(triangle: Tensor) -> ConditionNumber:
    return singular_condition_number(MatrixOperator(triangle, exact=False), null_vectors(triangle))


def _pair(
    A: SymmetricOperator,
    P: Preconditioner | None,
    null: HasBasis | None,
    seed: int,
    measure: Callable[..., ConditionNumber] = condition_number,
    progress: Progress = False,
) -> tuple[ConditionNumber | None, ConditionNumber | None]:
    """The number without and with `P`; None where there is no curvature at all, or no such `P`."""
    try:
        plain = measure(A, null=null, seed=seed, progress=progress)
        return plain, None if P is None else measure(A, preconditioner=P, null=null, seed=seed, progress=progress)
    except ZeroOperatorError:
        return None, None


def _unit_of(P: NetworkPreconditioner, layer: str, unit: int) -> Preconditioner | None:
    """The part of `P` on one unit; None where `P` couples the units of a layer, as K-FAC does."""
    try:
        return P.block((layer, unit))
    except InvalidInputError:
        return None


def _known_null(risk: EmpiricalRisk, block: str | None) -> NullDirections | None:
    """The verified null directions; None for large blocks, whose basis is dense: their numbers stay one-sided."""
    names = risk.space.names if block is None else risk.space.layer_names(block)
    if risk.space.restrict(names).dim > _SEARCHED:
        return None
    try:
        return null_directions(risk, block=block)
    except MemoryLimitError:
        return None


def _equals_hessian(risk: EmpiricalRisk, layer: Layer, seed: int) -> bool:
    """Whether one random product of the layer's Hessian block equals that of its Gauss-Newton block (T1')."""
    H, A = hessian(risk, block=layer.name), gauss_newton(risk, block=layer.name)
    v = normal((A.dim,), generator(seed), risk.theta)
    image = A @ v
    tolerance = 1e3 * torch.finfo(risk.space.dtype).eps * float(A.dim) ** 0.5
    return bool((H @ v - image).norm() <= tolerance * image.norm())


def _products(found: Sequence[ConditionNumber | None]) -> int:
    return sum(k.matvecs for k in found if k is not None)
