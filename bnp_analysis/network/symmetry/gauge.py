"""Scales and shifts that a network does not see: the solutions of a ledger's equations as moves of parameters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from bnp_analysis.network.candidates import Candidate, Move, Part
from bnp_analysis.network.symmetry.signals import Ledger, Use
from bnp_analysis.network.symmetry.system import (
    Equations,
    Floats,
    Ints,
    Sparse,
    combined,
    coo_array,
    csr_array,
    solutions,
    vstack,
)

# The word that says most about a symmetry comes first.
_ORDER = (
    "attention query-key", "residual stream", "norm affine", "always-active units", "homogeneity",
    "attention values",
)  # fmt: skip
MADE_UP = "batch_norm scale made up for"
Vector = tuple[Ints, Floats]


@dataclass(frozen=True, eq=False)
class Moves:
    """How scales and shifts move the free parameters, and what constant or shared parameters ask of them.

    Attributes:
        tangents: `(n, unknowns)`.
        demands: `(equations, unknowns)`.
    """

    tangents: Sparse
    demands: Sparse


def parameter_moves(ledger: Ledger, theta: Floats) -> Moves:
    """Each use says how its parameters must move; those that cannot, or in two ways, are demands."""
    rows, entries = _expressions(ledger, theta)
    size = ledger.chart.dim
    stuck = (entries < 0) | (entries >= size)
    if ledger.pinned:
        stuck |= np.isin(entries, np.concatenate(ledger.pinned))
    free = np.flatnonzero(~stuck)
    order = free[np.argsort(entries[free], kind="stable")]
    first = np.ones(len(order), bool)
    first[1:] = entries[order][1:] != entries[order][:-1]
    leader = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))] if len(order) else order
    again = csr_array(rows[order[~first]] - rows[leader[~first]])
    lines = order[first]
    onto = coo_array((np.ones(len(lines)), (entries[lines], lines)), shape=(size, len(entries))).tocsr()
    return Moves(csr_array(onto @ rows), csr_array(vstack([rows[np.flatnonzero(stuck)], again])))


def _expressions(ledger: Ledger, theta: Floats) -> tuple[Sparse, Ints]:
    """For each use of a parameter, what must become of it; missing biases are parameters -1 with the value 0."""
    found, entries = Equations(), []
    for use in ledger.uses:
        out = np.broadcast_to(use.out[:, None], use.weight.shape)
        w = theta[use.weight]
        if use.table:
            found.add((2 * out.ravel(), w.ravel()), (2 * out.ravel() + 1, 1.0))
            entries.append(use.weight.ravel())
            continue
        source = use.source[use.group]
        found.add((2 * out.ravel(), w.ravel()), (2 * source.ravel(), -w.ravel()))
        bias = np.full(len(use.out), -1) if use.bias is None else use.bias
        b = np.zeros(len(use.out)) if use.bias is None else theta[bias]
        shifts = [(2 * source[:, k] + 1, -w[:, k]) for k in _moving_columns(use)]
        found.add((2 * use.out, b), (2 * use.out + 1, 1.0), *shifts)
        entries += [use.weight.ravel(), bias]
    matrix = found.matrix(2 * ledger.count)
    return matrix, np.concatenate(entries) if entries else np.zeros(0, np.int64)


def _moving_columns(use: Use) -> Ints:
    return np.flatnonzero((use.source > 1).any(axis=0))


def scale_candidates(ledger: Ledger, theta: Floats) -> list[Candidate]:
    """Solutions of the equations as directions, those that only the limit of no eps allows apart."""
    moves = parameter_moves(ledger, theta)
    common = vstack([ledger.equations.matrix(2 * ledger.count), moves.demands])
    vectors, left_out = solutions(csr_array(vstack([common, ledger.exact.matrix(2 * ledger.count)])))
    if left_out:
        ledger.skipped.append(f"{left_out} scales and shifts depend on each other: too many to solve for")
    found = _candidates(ledger, theta, moves, vectors, exact=True)
    if ledger.relaxed:
        more, _ = solutions(csr_array(vstack([common, ledger.limit.matrix(2 * ledger.count)])))
        picked = _independent(more, 2 * np.unique(np.concatenate(ledger.relaxed)), 2 * ledger.count)
        found += _candidates(ledger, theta, moves, picked, exact=False)
    return found


def _independent(vectors: list[Vector], wanted: Ints, size: int) -> list[Vector]:
    """Vectors whose values at some unknowns are independent, as many as there are."""
    dense = combined(vectors, size)[wanted].toarray()
    picked: list[Vector] = []
    for k in np.flatnonzero(np.abs(dense).max(axis=0, initial=0.0)):
        column = dense[:, k].copy()
        pivot = int(np.abs(column).argmax())
        if abs(column[pivot]) > 1e-9:
            picked.append(vectors[k])
            dense -= np.outer(column, dense[pivot] / column[pivot])
    return picked


def _candidates(ledger: Ledger, theta: Floats, moves: Moves, vectors: list[Vector], *, exact: bool) -> list[Candidate]:
    columns = (moves.tangents @ combined(vectors, 2 * ledger.count)).tocsc()
    parts: dict[str, list[Part]] = {}
    finite: dict[str, list[Move | None]] = {}
    for k, (unknowns, _) in enumerate(vectors):
        inside = slice(columns.indptr[k], columns.indptr[k + 1])
        values, where = columns.data[inside], columns.indices[inside].astype(np.int64)
        keep = np.abs(values) > 0
        values, where = values[keep], where[keep]
        if len(values) == 0:
            continue
        names = {ledger.causes.get(int(label)) for label in unknowns // 2}
        cause = _cause(names, unknowns, exact)
        part = Part(torch.from_numpy(where), torch.from_numpy(values)[:, None])
        parts.setdefault(cause, []).append(part)
        finite.setdefault(cause, []).append(_finite(theta, part, unknowns, names) if exact else None)
    return [Candidate(cause, tuple(found), exact, tuple(finite[cause])) for cause, found in parts.items()]


def _cause(names: set[str | None], unknowns: Ints, exact: bool) -> str:
    shifts = unknowns % 2 == 1
    if exact and MADE_UP in names:
        return MADE_UP
    divided = sorted(name for name in names if name is not None and name.endswith(" scale"))
    if divided:
        return divided[0].removesuffix("scale") + "shift" if shifts.all() else divided[0]
    for name in _ORDER:
        if name in names:
            if name == "always-active units" and not shifts.any():
                return "homogeneity"
            return "key bias" if name == "attention query-key" and shifts.all() else name
    return "linear layer"


def _finite(theta: Floats, part: Part, unknowns: Ints, names: set[str | None]) -> Move | None:
    """Scales alone are powers of `t`, shifts alone translations; a unit that is linear on the data only is neither."""
    none = torch.zeros(0, dtype=torch.int64)
    empty = torch.zeros(0, dtype=torch.float64)
    if bool((unknowns % 2 == 0).all()) and MADE_UP not in names:
        exponents = part.values[:, 0] / torch.from_numpy(theta)[part.positions]
        return Move(part.positions, exponents, none, empty)
    if bool((unknowns % 2 == 1).all()) and "always-active units" not in names:
        return Move(none, empty, part.positions, part.values[:, 0])
    return None
