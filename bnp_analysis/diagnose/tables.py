"""Tables of condition numbers: what `layer_table` and `compare` return."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bnp_analysis.linalg import ConditionNumber
from bnp_analysis.results import Result


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerRow(Result):
    """One layer of a `LayerTable`.

    Attributes:
        layer, kind: name and type of the module.
        rows, features, units, groups: `R`, `m`, `n`, and the groups of a convolution.
        constant: input features with one value, set aside before the three input numbers.
        inputs, centered, normalized: `sigma_max/sigma_min+` of `H^`, `H^U`, `G^`; the worst group.
        unit_blocks, unit_blocks_with_P: `kappa*` of every unit's block without and with `P`; None for a dead unit, and
            where `P` couples the units of a layer.
        block, block_with_P: `kappa*` of the layer's block without and with `P`; None for a layer without curvature.
        is_hessian: whether the Gauss-Newton blocks equal the Hessian's here (T1'), tested by one product;
            None where an operation has no second derivative.
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
    unit_blocks_with_P: tuple[ConditionNumber | None, ...]
    block: ConditionNumber | None
    block_with_P: ConditionNumber | None
    is_hessian: bool | None

    @property
    def dead(self) -> int:
        """Units whose block is zero."""
        return sum(k is None for k in self.unit_blocks)

    def summary(self) -> str:
        """The layer in one line."""
        return (
            f"{self.layer or self.kind}: R {self.rows}, m {self.features}, kappa(H^) {self.inputs.value:.3g} -> "
            f"{self.centered.value:.3g} -> {self.normalized.value:.3g}; block {cell(self.block)} -> "
            f"{cell(self.block_with_P)}"
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
                "units k* with P": spread(row.unit_blocks_with_P),
                "dead": row.dead,
                "layer k*": cell(row.block),
                "layer k* with P": cell(row.block_with_P),
                "Hessian": {True: "yes", False: "no", None: "unknown"}[row.is_hessian],
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
