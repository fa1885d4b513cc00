"""Null directions that come from the data: dependent inputs of a layer, rows that a ReLU cuts, dead units (T11)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.network.graph import Graph, Node
from bnp_analysis.network.layers import Coverage, coverage, rows
from bnp_analysis.network.risk import EmpiricalRisk

# Floating-point operations that the search in one layer may take.
_MOST_WORK = 2e12


@dataclass(frozen=True, eq=False)
class Candidate:
    """Directions `(n, k)` of one cause; `exact` is False where only a norm's eps = 0 would make them null."""

    cause: str
    columns: Tensor
    exact: bool = True


def dependent_inputs(
    risk: EmpiricalRisk, graphs: list[Graph], skipped: list[str], reach: Mapping[str, Tensor]
) -> list[Candidate]:
    """`e_i (x) v` with `H^ v = 0` on the rows that reach the loss through unit `i`.

    All rows for most layers; where a ReLU follows directly, a row that it cuts does not count, and a unit with no row
    left is dead.

    Args:
        risk: the empirical risk.
        graphs: the recorded operations of every batch.
        skipped: gets a word for every layer that was left out.
        reach: layer name -> `(R, units)`, the rows that reach the loss, where known.

    Returns:
        Candidates with the causes `"dependent inputs"`, `"inactive rows"`, `"dead units"`.
    """
    layers = coverage(risk)
    found: list[Candidate] = []
    for node in graphs[0]:
        if node.kind not in ("linear", "conv") or node.parameters.get("weight") not in risk.space.names:
            continue
        if graphs[0].uses(node.parameters["weight"]) > 1:
            skipped.append(f"{node.parameters['weight']}: used more than once")
            continue
        unfolded = _rows(node, graphs, layers)
        if unfolded is None:
            skipped.append(f"{node.parameters['weight']}: a functional convolution, whose rows are not known")
            continue
        bias = node.parameters.get("bias")
        bias = bias if bias is not None and bias in risk.space.names else None
        if bias is not None:
            unfolded = torch.cat([unfolded, unfolded.new_ones(*unfolded.shape[:2], 1)], dim=2)
        active = reach.get(node.layer) if node.layer in reach else _active(node, graphs)
        units = node.output.shape[-1] if node.kind == "linear" else node.output.shape[1]
        partial = 0 if active is None else int((~active.all(dim=0)).sum())
        if 2.0 * unfolded.shape[0] * unfolded.shape[2] ** 2 * (1 + partial) > _MOST_WORK:
            skipped.append(f"{node.parameters['weight']}: too large to search its inputs for dependences")
            continue
        found += _layer_candidates(risk, node, bias, unfolded, active, units)
    return found


def _rows(node: Node, graphs: list[Graph], layers: Coverage) -> Tensor | None:
    """All rows `(R, groups, m)` of a layer in float64."""
    received = [graph.nodes[node.index].received for graph in graphs]
    module = next((layer for layer in layers if layer.weight == node.parameters["weight"]), None)
    parts = []
    for h in received:
        if h is None:
            return None
        if module is not None:
            # With another padding mode the recorded input is padded already.
            if node.kind == "conv" and getattr(module.module, "padding_mode", "zeros") != "zeros":
                return None
            parts.append(rows(module, h).double())
        elif node.kind == "linear":
            parts.append(h.reshape(-1, 1, h.shape[-1]).double())
        else:
            return None
    return torch.cat(parts)


def _active(node: Node, graphs: list[Graph]) -> Tensor | None:
    """`(R, units)`: rows that a directly following ReLU, and a max-pooling behind it, let through; None without."""
    readers = graphs[0].consumers(node.index)
    if len(readers) != 1 or readers[0].kind not in ("relu", "relu_") or node.index == graphs[0].result:
        return None
    behind = graphs[0].consumers(readers[0].index)
    pool = behind[0] if len(behind) == 1 and behind[0].kind == "max_pool2d" else None
    parts = []
    for graph in graphs:
        output = graph.nodes[readers[0].index].output
        active = output > 0
        if pool is not None:
            active &= _selected(output, graph.nodes[pool.index])
        flat = active if node.kind == "linear" else active.movedim(1, -1)
        parts.append(flat.reshape(-1, flat.shape[-1]))
    return torch.cat(parts)


def _selected(values: Tensor, pool: Node) -> Tensor:
    """Positions that a max-pooling passes on."""
    kept = {"kernel_size", "stride", "padding", "dilation", "ceil_mode"}
    arguments = {name: value for name, value in pool.arguments.items() if name in kept}
    _, indices = torch.nn.functional.max_pool2d(values, **arguments, return_indices=True)
    chosen = torch.zeros_like(values, dtype=torch.bool).flatten(start_dim=2)
    chosen.scatter_(2, indices.flatten(start_dim=2), True)
    return chosen.view_as(values)


def _layer_candidates(
    risk: EmpiricalRisk, node: Node, bias: str | None, unfolded: Tensor, active: Tensor | None, units: int
) -> list[Candidate]:
    groups = unfolded.shape[1]
    columns: dict[str, list[Tensor]] = {"dependent inputs": [], "inactive rows": [], "dead units": []}
    common = [null_vectors(unfolded[:, g]) for g in range(groups)]
    for i in range(units):
        g = i // (units // groups)
        mine = None if active is None else active[:, i]
        if mine is None or bool(mine.all()):
            cause, vectors = "dependent inputs", common[g]
        elif not bool(mine.any()):
            cause, vectors = "dead units", torch.eye(unfolded.shape[2], dtype=torch.float64)
        else:
            cause, vectors = "inactive rows", null_vectors(unfolded[mine, g])
            if vectors.shape[1] == common[g].shape[1]:
                cause, vectors = "dependent inputs", common[g]
        if vectors.shape[1]:
            columns[cause].append(_embed(risk, node.parameters["weight"], bias, i, vectors))
    return [Candidate(cause, torch.cat(parts, dim=1)) for cause, parts in columns.items() if parts]


def null_vectors(matrix: Tensor) -> Tensor:
    """An orthonormal basis of the right null space: singular values below the backward error of the SVD."""
    count, width = matrix.shape
    work = torch.linalg.qr(matrix, mode="r")[1] if count > width else matrix
    _, s, vh = torch.linalg.svd(work, full_matrices=True)
    floor = max(count, width) * torch.finfo(torch.float64).eps * (float(s[0]) if s.numel() else 0.0)
    rank = int((s > floor).sum())
    basis: Tensor = vh[rank:].T
    return basis


def _embed(risk: EmpiricalRisk, weight: str, bias: str | None, unit: int, vectors: Tensor) -> Tensor:
    """Vectors over `(weights of a unit, its bias)` in the flat space."""
    features = vectors.shape[0] - (bias is not None)
    out = torch.zeros(risk.space.dim, vectors.shape[1], dtype=torch.float64)
    begin = risk.space.slice_of(weight).start + unit * features
    out[begin : begin + features] = vectors[:features]
    if bias is not None:
        out[risk.space.slice_of(bias).start + unit] = vectors[features]
    return out.to(risk.theta)
