"""The verbs a notebook wants: how well conditioned each layer and the network are, without and with `P`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.curvature import fisher, gauss_newton, hessian
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.errors import InvalidInputError, ZeroOperatorError
from bnp_analysis.linalg import (
    ConditionNumber,
    MatrixOperator,
    Preconditioner,
    SymmetricOperator,
    condition_number,
    magnitude_condition_number,
    singular_condition_number,
)
from bnp_analysis.linalg.progress import Progress, reporting
from bnp_analysis.linalg.random import generator, normal
from bnp_analysis.network import Coverage, EmpiricalRisk, Layer, coverage
from bnp_analysis.network.inputs import input_triangles
from bnp_analysis.network.moments import layer_moments
from bnp_analysis.precondition import BlockDiagonal, bnp_preconditioner
from bnp_analysis.results import Result


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerRow(Result):
    """One layer of a `LayerTable`.

    Attributes:
        layer, kind: name and type of the module.
        rows, features, units, groups: `R`, `m`, `n`, and the groups of a convolution.
        constant: input features with one value, set aside before the three input numbers.
        inputs, centered, normalized: `sigma_max/sigma_min+` of `H^`, `H^U`, `G^`; the worst group.
        unit_blocks, unit_blocks_bnp: `kappa*` of every unit's block without and with `P`; None for a dead unit.
        block, block_bnp: `kappa*` of the layer's block without and with `P`; None for a layer without curvature.
        is_hessian: whether the Gauss-Newton blocks equal the Hessian's here (T1'), tested by one product.
    """

    layer: str
    kind: str
    rows: int
    features: int
    units: int
    groups: int
    constant: int
    inputs: ConditionNumber
    centered: ConditionNumber
    normalized: ConditionNumber
    unit_blocks: tuple[ConditionNumber | None, ...]
    unit_blocks_bnp: tuple[ConditionNumber | None, ...]
    block: ConditionNumber | None
    block_bnp: ConditionNumber | None
    is_hessian: bool

    @property
    def dead(self) -> int:
        """Units whose block is zero."""
        return sum(k is None for k in self.unit_blocks)

    def summary(self) -> str:
        """The layer in one line."""
        return (
            f"{self.layer or self.kind}: R {self.rows}, m {self.features}, kappa(H^) {self.inputs.value:.3g} -> "
            f"{self.centered.value:.3g} -> {self.normalized.value:.3g}; block {cell(self.block)} -> "
            f"{cell(self.block_bnp)}"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerTable(Result):
    """How well conditioned each layer is, without and with a preconditioner.

    Attributes:
        layers: one `LayerRow` per covered layer.
        uncovered: parameter name -> why the preconditioner leaves it alone.
    """

    layers: tuple[LayerRow, ...]
    uncovered: dict[str, str]

    def summary(self) -> str:
        """Sizes in one line."""
        return f"{len(self.layers)} layers, {len(self.uncovered)} uncovered parameters, {self.matvecs} products"

    def records(self) -> list[dict[str, Any]]:
        """One row per layer; a unit column is the median of its units (the worst in brackets)."""
        return [
            {
                "layer": row.layer or row.kind,
                "R": row.rows,
                "m": row.features,
                "units": row.units,
                "constant": row.constant,
                "rank H^": row.inputs.rank,
                "k(H^)": cell(row.inputs),
                "k(H^U)": cell(row.centered),
                "k(G^)": cell(row.normalized),
                "units k*": spread(row.unit_blocks),
                "units k* with P": spread(row.unit_blocks_bnp),
                "dead": row.dead,
                "layer k*": cell(row.block),
                "layer k* with P": cell(row.block_bnp),
                "Hessian": "yes" if row.is_hessian else "no",
            }
            for row in self.layers
        ]


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Result):
    """A network's conditioning without and with a preconditioner.

    Attributes:
        layers: the `LayerTable`.
        network: name of a curvature matrix -> its condition numbers without and with `P`; of the Hessian it is
            `max|lambda|/min|lambda|` with counts, of the others `kappa*`; None where the network has no curvature.
    """

    layers: LayerTable
    network: Mapping[str, tuple[ConditionNumber | None, ConditionNumber | None]]

    def summary(self) -> str:
        """The whole network in one line."""
        return ", ".join(f"{name} {cell(k)} -> {cell(with_P)} with P" for name, (k, with_P) in self.network.items())

    def records(self) -> list[dict[str, Any]]:
        """The rows of the layer table."""
        return self.layers.records()


def cell(k: ConditionNumber | None) -> str:
    """A condition number in a table: `~` marks one without bounds, `>=` a one-sided one.

    Example:
        >>> cell(None)
        '-'
    """
    if k is None:
        return "-"
    if k.two_sided:
        return f"{k.value:.3g}"
    return f">={k.lower:.3g}" if not math.isnan(k.lower) else f"~{k.value:.3g}"


def spread(blocks: Sequence[ConditionNumber | None]) -> str:
    """The median of the live units' values and, in brackets, the largest; `>=` if a one-sided one is among them."""
    live = [k for k in blocks if k is not None]
    if not live:
        return "-"
    values = torch.tensor([k.value for k in live], dtype=torch.float64)
    mark = "" if all(k.two_sided for k in live) else ">="
    return f"{mark}{float(values.median()):.3g} ({float(values.max()):.3g})"


def layer_table(
    risk: EmpiricalRisk,
    P: BlockDiagonal | None = None,
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
            whole = _whole_layer(risk, P, layer, seed)
            blocks = units.get(layer.name)
            pairs = []
            for i in range(layer.units):
                A: SymmetricOperator = gauss_newton(risk, block=(layer.name, i)) if blocks is None else blocks[i]
                pairs.append(_pair(A, P.block((layer.name, i)), seed))
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
                    unit_blocks_bnp=tuple(pair[1] for pair in pairs),
                    block=whole[0],
                    block_bnp=whole[1],
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
    P: BlockDiagonal | None = None,
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
    for name in curvature:
        A = curvature_matrix(risk, name, seed)
        measure = magnitude_condition_number if name == "hessian" else condition_number
        network[name] = _pair(A, P, seed, measure, progress)
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
    risk: EmpiricalRisk, P: BlockDiagonal | None, dtype: torch.dtype | None
) -> tuple[EmpiricalRisk, BlockDiagonal]:
    """The risk and `P` as they are measured: in float64 on the CPU unless told otherwise; BNP unless given."""
    if dtype is not None:
        risk = risk.to(dtype, "cpu")
        P = None if P is None else P.to(dtype, "cpu")
    return risk, bnp_preconditioner(risk) if P is None else P


def _singular(triangle: Tensor) -> ConditionNumber:
    return singular_condition_number(MatrixOperator(triangle, exact=False))


def _whole_layer(
    risk: EmpiricalRisk, P: BlockDiagonal, layer: Layer, seed: int
) -> tuple[ConditionNumber | None, ConditionNumber | None]:
    return _pair(gauss_newton(risk, block=layer.name), P.block(layer.name), seed)


def _pair(
    A: SymmetricOperator,
    P: Preconditioner,
    seed: int,
    measure: Callable[..., ConditionNumber] = condition_number,
    progress: Progress = False,
) -> tuple[ConditionNumber | None, ConditionNumber | None]:
    """The number without and with `P`; None where there is no curvature at all."""
    try:
        plain = measure(A, seed=seed, progress=progress)
        return plain, measure(A, preconditioner=P, seed=seed, progress=progress)
    except ZeroOperatorError:
        return None, None


def _equals_hessian(risk: EmpiricalRisk, layer: Layer, seed: int) -> bool:
    """Whether one random product of the layer's Hessian block equals that of its Gauss-Newton block (T1')."""
    H, A = hessian(risk, block=layer.name), gauss_newton(risk, block=layer.name)
    v = normal((A.dim,), generator(seed), risk.theta)
    image = A @ v
    tolerance = 1e3 * torch.finfo(risk.space.dtype).eps * float(A.dim) ** 0.5
    return bool((H @ v - image).norm() <= tolerance * image.norm())


def _products(found: Sequence[ConditionNumber | None]) -> int:
    return sum(k.matvecs for k in found if k is not None)


__all__ = ["Comparison", "LayerRow", "LayerTable", "compare", "layer_table"]
