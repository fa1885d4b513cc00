"""The numbers of a layer's block and of its units' blocks, without and with `P`: each factor is formed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

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
from bnp_analysis.linalg.spectra.null import HasBasis, SomeNullDirections
from bnp_analysis.network import EmpiricalRisk, Layer
from bnp_analysis.precondition import NetworkPreconditioner
from bnp_analysis.runtime.memory import available_memory
from bnp_analysis.runtime.progress import Progress
from bnp_analysis.runtime.threads import each
from bnp_analysis.symmetry import NullDirections, null_directions

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
    P: NetworkPreconditioner,
    dense: UnitBlocks | None,
    engine: Mapping[str, Any],
    seed: int,
    update: Callable[[int], None],
) -> BlockNumbers:
    """Measure one layer.

    Args:
        risk: the empirical risk.
        layer: one of its covered layers.
        P: the preconditioner.
        dense: the layer's unit blocks, where it is dense and runs once per example.
        engine: `engine` and `max_memory` of operators.
        seed: of random starts.
        update: gets how many of the layer's blocks are done.
    """
    own = _own_block(risk, layer, dense, engine)
    products, small = 0, own
    if reducible(own) and own.factor is not None:
        products = own.factor.dense_cost
        own = held(own, own.factor)
        small = reduced(own)
    null = known_null(risk, layer.name, small.factor if small is not own else None)
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
    risk: EmpiricalRisk, block: str | None, factor: LinearOperator | None = None, *, curvature: str = "gauss-newton"
) -> NullDirections | None:
    """The verified null directions; None for large blocks, whose basis is dense: their numbers stay one-sided."""
    names = risk.space.names if block is None else risk.space.layer_names(block)
    if risk.space.restrict(names).dim > SEARCHED:
        return None
    try:
        return null_directions(risk, curvature=curvature, block=block, factor=factor)
    except MemoryLimitError:
        return None


def measured(risk: EmpiricalRisk, dtype: torch.dtype | None, what: str) -> EmpiricalRisk:
    """The risk in the precision in which it is measured, on the CPU; None for its own. It must have enough digits."""
    risk = risk if dtype is None else risk.to(dtype, "cpu")
    require_digits(risk.eps, str(risk.precision), what, cast=True)
    return risk


def _own_block(
    risk: EmpiricalRisk, layer: Layer, dense: UnitBlocks | None, engine: Mapping[str, Any]
) -> SymmetricOperator:
    """The layer's Gauss-Newton block; its rows from inputs and cotangents where these are known and rows are needed."""
    names = (layer.weight,) if layer.bias is None else (layer.weight, layer.bias)
    whole = None if dense is None or tuple(risk.space.layer_names(layer.name)) != names else dense.whole
    # For products alone kept graphs are as fast.
    return whole if whole is not None and reducible(whole) else gauss_newton(risk, block=layer.name, **engine)


def held(own: SymmetricOperator, factor: LinearOperator) -> SymmetricOperator:
    """The same matrix with its rows formed here, if they fit: what a reduction blurs is measured on them once more."""
    rows, columns = factor.shape
    fits = factor.dense_cost > 0 and 8 * 5 * rows * columns < available_memory(factor.device)
    if not fits:
        return own
    # Zero rows may be missing: nothing of the matrix is lost.
    formed = torch.cat(list(factor.row_blocks()))
    return GramOperator(
        MatrixOperator(
            formed,
            exact=factor.exact,
            rank_bound=factor.rank_bound,
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
