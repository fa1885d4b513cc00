"""Condition numbers of a layer's block and its units' blocks, without and with `P`, from one factor each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.curvature import gauss_newton
from bnp_analysis.curvature.units import UnitBlocks
from bnp_analysis.errors import InvalidInputError, MemoryLimitError, ZeroOperatorError
from bnp_analysis.linalg import (
    ConditionNumber,
    GramOperator,
    MatrixOperator,
    Preconditioner,
    Restriction,
    SymmetricOperator,
    condition_number,
)
from bnp_analysis.linalg.condition.reduction import reduced, reduced_parts, reducible
from bnp_analysis.linalg.operators import LinearOperator, require_digits
from bnp_analysis.linalg.spectra.checks import HasBasis, SomeNullDirections
from bnp_analysis.network import EmpiricalRisk, Layer
from bnp_analysis.precondition import NetworkPreconditioner
from bnp_analysis.runtime.memory import available_memory
from bnp_analysis.runtime.progress import Progress
from bnp_analysis.runtime.threads import each
from bnp_analysis.symmetry import NullDirections
from bnp_analysis.symmetry.null_space import RecordedNetwork, search

Pair = tuple[ConditionNumber | None, ConditionNumber | None]
# Parameters of a block beyond which tables do not search for all its null directions.
SEARCHED = 6_000
# Intervals of a reduced factor that are wider than this, relative, are measured once more on `F P` itself.
_WIDTH = 1e-6


@dataclass(frozen=True)
class BlockNumbers:
    """`kappa*` without and with `P` of a layer's own block and of every unit's; products spent to form factors."""

    whole: Pair
    units: list[Pair]
    products: int


def block_numbers(
    risk: EmpiricalRisk,
    layer: Layer,
    own: SymmetricOperator,
    P: NetworkPreconditioner,
    dense: UnitBlocks | None,
    recorded: Callable[[], RecordedNetwork],
    seed: int,
    update: Callable[[int], None],
) -> BlockNumbers:
    """Measure one layer.

    Args:
        risk: the empirical risk.
        layer: one of its covered layers.
        own: its Gauss-Newton block.
        P: the preconditioner.
        dense: the layer's unit blocks, where it is dense and runs once per example.
        recorded: makes what a search for null directions reads of the network, once.
        seed: of random starts.
        update: gets how many of the layer's blocks are done.
    """
    products, small = 0, own
    if reducible(own) and own.factor is not None:
        products = own.factor.dense_cost
        own = held(own, own.factor)
        small = reduced(own)
    null = known_null(risk, layer.name, small.factor if small is not own else None, recorded=recorded)
    whole = pair(small, P.block(layer.name), null, seed, direct=own)
    update(1)
    inner = risk.space.restrict(risk.space.layer_names(layer.name))
    positions = [inner.indices((layer.name, i)) for i in range(layer.units)]
    parts = None
    if dense is None and small is own and own.factor is not None and _parts_fit(own.factor, layer):
        parts = reduced_parts(own.factor, positions)
        products += own.factor.dense_cost

    def unit(i: int) -> Pair:
        part = _unit_of(P, layer.name, i)
        inside = None if null is None else SomeNullDirections(null.inside(positions[i]))
        if dense is None:
            whole_unit = Restriction(own, positions[i])
            A = parts[i] if parts else whole_unit if small is own else Restriction(small, positions[i])
            return pair(A, part, inside, seed, direct=whole_unit)
        block = dense[i]
        A = reduced(block) if reducible(block) else block
        numbers = pair(A, part, inside, seed, direct=block)
        if inside is None and A is not block and numbers[0] is not None and numbers[0].unresolved:
            inside = dense.dependences(i, A.factor or block.factor)
            numbers = pair(A, part, inside, seed, direct=block) if inside.basis.shape[1] else numbers
        return numbers

    # Operators that are not stored keep graphs, or talk to other processes: one at a time.
    stored = dense is not None or (risk.group.size == 1 and (parts is not None or small is not own))
    workers = _workers(layer, max(own.shape[0] if own.factor is None else own.factor.shape[0], 1)) if stored else 1
    return BlockNumbers(whole, each(unit, range(layer.units), workers, lambda done: update(1 + done)), products)


def pair(
    A: SymmetricOperator,
    P: Preconditioner | None,
    null: HasBasis | None,
    seed: int,
    *,
    progress: Progress = False,
    direct: SymmetricOperator | None = None,
) -> Pair:
    """The number without and with `P`; None where there is no curvature to be seen, or no such `P`.

    Args:
        A: the operator, possibly reduced.
        P: the preconditioner of its variables.
        null: known null directions.
        seed: of random starts.
        progress: of a Krylov run.
        direct: the operator that `A` was reduced from, to which a number with `P` returns that the reduction blurs.
    """
    try:
        plain = condition_number(A, null=null, seed=seed, progress=progress)
    except ZeroOperatorError:
        return None, None
    found: ConditionNumber | None = None
    for operator in [] if P is None else [A] if direct is None or direct is A else [A, direct]:
        try:
            other = condition_number(operator, preconditioner=P, null=null, seed=seed, progress=progress)
        except ZeroOperatorError:
            continue
        found = other if found is None else min(found, other, key=_doubt)
        if not _blurred(plain, found):
            break
    return plain, found


def _blurred(plain: ConditionNumber, found: ConditionNumber) -> bool:
    if (found.unresolved or 0) > (plain.unresolved or 0):
        return True
    return found.dtype == "float64" and math.isfinite(found.upper) and found.upper > (1 + _WIDTH) * found.lower


def _doubt(k: ConditionNumber) -> tuple[int, float]:
    return k.unresolved or 0, k.upper / k.lower if k.lower > 0 else math.inf


def known_null(
    risk: EmpiricalRisk,
    block: str | None,
    factor: LinearOperator | None = None,
    *,
    curvature: str = "gauss_newton",
    recorded: Callable[[], RecordedNetwork] | None = None,
) -> NullDirections | None:
    """The verified null directions; None for large blocks, whose basis is dense: their numbers stay one-sided."""
    if not searched(risk, block):
        return None
    inner = risk if block is None else risk.restrict(risk.space.layer_names(block))
    try:
        return search(inner, curvature, factor, None if recorded is None else recorded())
    except MemoryLimitError:
        return None


def searched(risk: EmpiricalRisk, block: str | None) -> bool:
    """Whether all null directions of a block, or of the whole, are looked for."""
    names = risk.space.names if block is None else risk.space.layer_names(block)
    return risk.space.restrict(names).dim <= SEARCHED


def recorded_network(risk: EmpiricalRisk, layers: Sequence[Layer]) -> Callable[[], RecordedNetwork]:
    """What the search reads of the network for those of some layers that it covers, read when it is first asked for."""
    found = [name for layer in layers if searched(risk, layer.name) for name in risk.space.layer_names(layer.name)]
    return cache(lambda: RecordedNetwork(risk.restrict(found)))


def measured(risk: EmpiricalRisk, dtype: torch.dtype | None, what: str) -> EmpiricalRisk:
    """The risk in the precision in which it is measured, on the CPU; None for its own. It must have enough digits."""
    risk = risk if dtype is None else risk.to(dtype, "cpu")
    require_digits(risk.eps, str(risk.precision), what, cast=True)
    return risk


class LayerBlocks:
    """The Gauss-Newton blocks of layers; rows that have to be differentiated come from one sweep for all, if they fit.

    Args:
        risk: the empirical risk.
        layers: the layers.
        dense: unit blocks of those that are dense and run once per example.
        engine: `engine` and `max_memory` of operators.

    Attributes:
        joint: the curvature of all layers together, where its rows are held; else None.
        products: spent on the sweep.
    """

    def __init__(
        self, risk: EmpiricalRisk, layers: Sequence[Layer], dense: Mapping[str, UnitBlocks], engine: Mapping[str, Any]
    ) -> None:
        self._risk, self._engine, self.products = risk, engine, 0
        self._inputs = {layer.name: own for layer in layers if (own := _from_inputs(risk, layer, dense)) is not None}
        self._rows: tuple[Tensor, LinearOperator] | None = None
        self._places: Mapping[str, Tensor] = {}
        self.joint: SymmetricOperator | None = None
        names = [layer.name for layer in layers if layer.name not in self._inputs]
        while len(names) > 1:
            inner = risk.restrict([name for layer in names for name in risk.space.layer_names(layer)])
            parts = {name: inner.space.indices(name) for name in names}
            whole = gauss_newton(inner, **engine)
            if whole.factor is None or sum(map(len, parts.values())) > inner.space.dim:
                return
            few = [name for name, positions in parts.items() if reducible(Restriction(whole, positions))]
            if few == names:
                self._sweep(whole, whole.factor, parts, every=len(names) == len(layers))
                return
            names = few

    def _sweep(
        self, whole: SymmetricOperator, factor: LinearOperator, parts: Mapping[str, Tensor], *, every: bool
    ) -> None:
        own = held(whole, factor)
        if own is whole or own.factor is None:
            return
        rows, self.products = own.factor.to_dense(), factor.dense_cost
        self._rows, self._places = (rows, factor), parts
        self.joint = own if every else None

    def of(self, layer: str) -> SymmetricOperator:
        """The block of a layer."""
        if layer in self._inputs:
            return self._inputs[layer]
        if self._rows is not None and layer in self._places:
            rows, factor = self._rows
            return stored(rows[:, self._places[layer]], factor)
        # For products alone kept graphs are as fast as the rows of a dense layer.
        return gauss_newton(self._risk, block=layer, **self._engine)


def _from_inputs(risk: EmpiricalRisk, layer: Layer, dense: Mapping[str, UnitBlocks]) -> SymmetricOperator | None:
    """A layer's block with rows from inputs and cotangents, where these are known and rows are needed."""
    names = (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
    known = layer.name in dense and tuple(risk.space.layer_names(layer.name)) == names
    whole = dense[layer.name].whole if known else None
    return whole if whole is not None and reducible(whole) else None


def held(own: SymmetricOperator, factor: LinearOperator) -> SymmetricOperator:
    """The same matrix with its rows formed here, if they fit: what a reduction blurs is measured on them once more."""
    rows, columns = factor.shape
    fits = factor.dense_cost > 0 and 8 * 5 * rows * columns < available_memory(factor.device)
    if not fits:
        return own
    # Zero rows may be missing: nothing of the matrix is lost.
    return stored(torch.cat(list(factor.row_blocks())), factor)


def stored(rows: Tensor, factor: LinearOperator) -> SymmetricOperator:
    """The matrix of some columns of a factor whose rows have been formed."""
    return GramOperator(
        MatrixOperator(
            rows,
            exact=factor.exact,
            rank_bound=min(factor.rank_bound, rows.shape[1]),
            zeros_are_structural=factor.zeros_are_structural,
            eps=factor.eps,
        )
    )


def _unit_of(P: NetworkPreconditioner, layer: str, unit: int) -> Preconditioner | None:
    """The part of `P` on one unit; None where `P` couples the units of a layer, as K-FAC does."""
    try:
        return P.block((layer, unit))
    except InvalidInputError:
        return None


def _parts_fit(factor: LinearOperator, layer: Layer) -> bool:
    """Whether the units' parts of a factor too large to be reduced as a whole can be reduced at once."""
    width = factor.shape[1] // layer.units
    return 8 * 8 * width * width * layer.units < available_memory(factor.device)


def _workers(layer: Layer, rows: int) -> int:
    """As many as torch has threads, while the factors of as many units fit into half of the memory."""
    each_one = 8 * 6 * rows * (layer.features + 1)
    return max(1, min(torch.get_num_threads(), layer.units, available_memory() // (2 * each_one)))
