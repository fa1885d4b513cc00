"""Tables of condition numbers: what `layer_table` and `compare` return."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from bnp_analysis.diagnose.conditioning import Conditioning
from bnp_analysis.linalg import ConditionNumber, OffBlockShare
from bnp_analysis.results import Result

#: What the columns of a printed layer table mean.
LEGEND = """\
R: rows that enter a layer, examples times positions; m: input features of a row; constant: features of one value.
k(.) = sigma_max/sigma_min+ of a layer's inputs: H^ raw, H^U centred, G^ normalized; rank H^: that of the raw ones.
k*: largest over smallest nonzero eigenvalue, in size, of a Gauss-Newton block, without and with P; gain: their ratio.
units: the median of the units' blocks (the worst in brackets); dead: units whose block is zero.
>= marks a lower bound; - stands for a block without curvature, or an unknown ratio."""


def numbers(k: ConditionNumber | None, suffix: str = "") -> dict[str, Any]:
    """A condition number as columns: floats that are NaN where nothing is known.

    Example:
        >>> numbers(None, "_with_P")["two_sided_with_P"]
        False
    """
    found: dict[str, Any] = dict.fromkeys(("value", "lower", "upper"), math.nan) | {"two_sided": False, "method": ""}
    if k is not None:
        found = {name: getattr(k, name) for name in found}
    return {f"{name}{suffix}": value for name, value in found.items()}


def gain(plain: ConditionNumber | None, other: ConditionNumber | None) -> dict[str, float]:
    """What `P` has gained, `kappa` without it over `kappa` with it, with bounds; NaN where nothing is known.

    Example:
        >>> gain(None, None)["gain"]
        nan
    """
    if plain is None or other is None:
        return dict.fromkeys(("gain", "gain_lower", "gain_upper"), math.nan)
    return {
        # Of two estimates that nothing bounds from above the ratio says nothing.
        "gain": plain.value / other.value if plain.two_sided and other.two_sided else math.nan,
        "gain_lower": plain.lower / other.upper,
        "gain_upper": plain.upper / other.lower,
    }


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
        off_block: which share of the Gauss-Newton matrix of these layers lies outside of their blocks, so that no
            number of the table sees it; None of a single layer, and where it was not measured.
    """

    layers: tuple[LayerRow, ...]
    uncovered: dict[str, str]
    off_block: OffBlockShare | None = None

    def summary(self) -> str:
        """Sizes in one line."""
        return f"{len(self.layers)} layers, {len(self.uncovered)} uncovered parameters, {self.matvecs} products"

    def __str__(self) -> str:
        """The summary, the table, what is outside of the blocks, and what the columns mean."""
        return f"{self._line()}\n\n{self.printed()}\n\n{LEGEND}"

    def printed(self) -> str:
        """The table and, where known, the share of the curvature that is outside of its blocks."""
        return self.table() + ("" if self.off_block is None else f"\nOutside of the layers' blocks: {self.off_block}")

    def records(self) -> list[dict[str, Any]]:
        """One row per layer, of numbers.

        `value, lower, upper, two_sided, method` are those of `kappa*` of the layer's block, with the ending `_with_P`
        those with `P`, and `gain` is their ratio; `inputs, centered, normalized` are `sigma_max/sigma_min+` of `H^`,
        `H^U`, `G^`; `units_*` the median and the largest of the live units' blocks. A row also answers to the names of
        `cells()`, with their words.
        """
        rows = [
            {
                "layer": row.layer or row.kind,
                "kind": row.kind,
                "R": row.rows,
                "m": row.features,
                "units": row.units,
                "constant": row.constant,
                "dead": row.dead,
                **numbers(row.block),
                **numbers(row.block_with_P, "_with_P"),
                **gain(row.block, row.block_with_P),
                "rank_inputs": row.inputs.rank,
                "inputs": row.inputs.value,
                "centered": row.centered.value,
                "normalized": row.normalized.value,
                **_units(row.unit_blocks),
                **_units(row.unit_blocks_with_P, "_with_P"),
                "is_hessian": row.is_hessian,
            }
            for row in self.layers
        ]
        return [_Record(row, words) for row, words in zip(rows, self.cells(), strict=True)]

    def cells(self) -> list[dict[str, Any]]:
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
                "gain": ratio(gain(row.block, row.block_with_P)),
                "Hessian": {True: "yes", False: "no", None: "unknown"}[row.is_hessian],
            }
            for row in self.layers
        ]


class _Record(dict[str, Any]):
    """A row of numbers that has the words of 0.1 under their names, which are no columns."""

    def __init__(self, numbers: Mapping[str, Any], words: Mapping[str, Any]) -> None:
        super().__init__(numbers)
        self._words = words

    def __missing__(self, name: str) -> Any:
        return self._words[name]


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Result):
    """A network's conditioning without and with a preconditioner.

    Attributes:
        layers: the `LayerTable`.
        network: name of a curvature matrix -> its condition numbers without and with `P`; of the Hessian it is
            `max|lambda|/min|lambda|` with counts, of the others `kappa*`; None where the network has no curvature.
        profiles: name of a curvature matrix -> how its ratio `lambda_1/lambda_r` grows with the rank, without and with
            `P`; empty unless asked for.
    """

    layers: LayerTable
    network: Mapping[str, tuple[ConditionNumber | None, ConditionNumber | None]]
    profiles: Mapping[str, Conditioning] = field(default_factory=dict)

    def summary(self) -> str:
        """The whole network in one line."""
        return ", ".join(f"{name} {cell(k)} -> {cell(with_P)} with P" for name, (k, with_P) in self.network.items())

    def __str__(self) -> str:
        """The summary, the layers, and the whole network rank by rank."""
        profiles = [
            f"Whole network, {name}: lambda_1 over the eigenvalue of a rank\n{found.table()}"
            for name, found in self.profiles.items()
        ]
        return "\n\n".join([self._line(), self.layers.printed(), LEGEND, *profiles])

    def records(self) -> list[dict[str, Any]]:
        """The rows of the layer table, then one for each matrix of the whole network, then its ranks.

        `matrix` and `rank` say which: at a rank stands the ratio of the largest eigenvalue to it; without a
        rank it is that of the smallest nonzero one.
        """
        head = {"matrix": "gauss_newton", "rank": math.nan}
        rows = [{"layer": row.pop("layer")} | head | row for row in self.layers.records()]
        for name, (plain, other) in self.network.items():
            whole = {"layer": "whole network", "matrix": name}
            rows.append(whole | {"rank": math.nan} | numbers(plain) | numbers(other, "_with_P") | gain(plain, other))
            rows += [whole | row for row in self.profiles[name].records()] if name in self.profiles else []
        return rows

    def cells(self) -> list[dict[str, Any]]:
        """The rows of the layer table, as they are printed."""
        return self.layers.cells()


def ratio(found: Mapping[str, float]) -> str:
    """A gain in a table: a number where both sides are known, else a bound.

    Example:
        >>> ratio({"gain": float("nan"), "gain_lower": 2.0, "gain_upper": float("inf")})
        '>=2'
    """
    if not math.isnan(found["gain"]):
        return f"{found['gain']:.3g}"
    if found["gain_lower"] > 0:
        return f">={found['gain_lower']:.3g}"
    return f"<={found['gain_upper']:.3g}" if math.isfinite(found["gain_upper"]) else "-"


def _units(blocks: Sequence[ConditionNumber | None], suffix: str = "") -> dict[str, Any]:
    """The median and the largest value of the live units; whether all are known from both sides."""
    live = [k for k in blocks if k is not None]
    values = torch.tensor([k.value for k in live] or [math.nan], dtype=torch.float64)
    return {
        f"units_median{suffix}": float(values.median()),
        f"units_worst{suffix}": float(values.max()),
        f"units_two_sided{suffix}": bool(live) and all(k.two_sided for k in live),
    }


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
