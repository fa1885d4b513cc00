"""The factor `F = R J` of a Gauss-Newton or Fisher matrix: output-side rows `R` times the Jacobian."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bnp_analysis.curvature.products import GraphCache, OutputGraph, output_graph
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.network.batches import Batch, slice_batch, tensors_of
from bnp_analysis.network.risk import EmpiricalRisk

# Rows of a Jacobian are pulled back for a few examples at a time: the cost of one row is that of its slice.
_SLICE = 8

Roots = list[Tensor]


class JacobianFactor(LinearOperator):
    """`F = R J`, `(sum_b N_b r_b) x n`; row `(j, i)` is `sqrt(w_b) R_j[i] . J_j`.

    Args:
        risk: the empirical risk.
        roots: for each batch the output-side rows `R`, `(N_b, r, K)`, batch weight not included.
        rank: a structural bound of the rank.
    """

    def __init__(self, risk: EmpiricalRisk, roots: Roots, rank: int) -> None:
        rows = sum(root.shape[0] * root.shape[1] for root in roots)
        super().__init__((rows, risk.space.dim), risk.space.dtype, risk.space.device)
        self._risk, self._roots, self._rank = risk, roots, rank
        self._graphs = GraphCache(risk, output_graph)

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, self._rank)

    @property
    def dense_cost(self) -> int:
        # A row costs the backward pass of its slice: in products, which are two passes over all the data.
        width = max((root.shape[1] for root in self._roots), default=1)
        largest = max((root.shape[0] for root in self._roots), default=1)
        return max(1, (width * (largest if self._risk.coupled else min(_SLICE, largest)) + 1) // 2)

    def _matmat(self, x: Tensor) -> Tensor:
        vectors = [list(self._risk.space.unflatten(v).values()) for v in x.T.contiguous().unbind()]
        parts = []
        for graph, root in zip(self._graphs, self._roots, strict=True):
            columns = [_rows(root, graph.jvp(v)) * graph.weight**0.5 for v in vectors]
            parts.append(torch.stack(columns, dim=1))
        return torch.cat(parts)

    def _rmatmat(self, y: Tensor) -> Tensor:
        total = y.new_zeros(self.shape[1], y.shape[1])
        begin = 0
        for graph, root in zip(self._graphs, self._roots, strict=True):
            size = root.shape[0] * root.shape[1]
            part = y[begin : begin + size] * graph.weight**0.5
            begin += size
            for k in range(y.shape[1]):
                u = _cotangent(root, part[:, k], graph)
                total[:, k] += self._risk.space.flatten(graph.vjp(u))
        return total

    def to_dense(self) -> Tensor:
        dense = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        begin = 0
        for batch, root in zip(self._risk.batches, self._roots, strict=True):
            weight = (batch.count / self._risk.batches.total) ** 0.5
            for part, first in _slices(batch, self._risk.coupled):
                size = tensors_of(part.x)[0].shape[0] if first is not None else root.shape[0]
                mine = root if first is None else root[first : first + size]
                rows = jacobian_rows(self._risk, part, mine) * weight
                dense[begin : begin + rows.shape[0]] = rows
                begin += rows.shape[0]
        return dense


def _slices(batch: Batch, coupled: bool) -> list[tuple[Batch, int | None]]:
    """The batch cut into small ones where examples are independent, else whole."""
    size = tensors_of(batch.x)[0].shape[0]
    if coupled or slice_batch(batch, 0, 1) is None:
        return [(batch, None)]
    cuts = range(0, size, _SLICE)
    return [(part, first) for first in cuts if (part := slice_batch(batch, first, first + _SLICE)) is not None]


def jacobian_rows(risk: EmpiricalRisk, batch: Batch, root: Tensor) -> Tensor:
    """The rows `R_j[i] . J_j` of a batch, `(N r, n)`, by batched backward passes."""
    graph = output_graph(risk, batch, forward=False)
    count, width, _ = root.shape
    cotangents = root.new_zeros(count, width, count, root.shape[2])
    each = torch.arange(count, device=root.device)
    cotangents[each, :, each] = root
    stacked = cotangents.reshape(count * width, *graph.outputs.shape)
    parts = graph.vjp_rows(stacked)
    return torch.cat([part.reshape(count * width, -1) for part in parts], dim=1)


def _rows(root: Tensor, outputs: Tensor) -> Tensor:
    """`R_j . out_j`, flattened over examples and rows."""
    return torch.einsum("nrk,nk->nr", root, outputs.reshape(root.shape[0], -1)).reshape(-1)


def _cotangent(root: Tensor, y: Tensor, graph: OutputGraph) -> Tensor:
    """`R_j^T y_j` in the shape of the outputs."""
    return torch.einsum("nrk,nr->nk", root, y.view(root.shape[:2])).reshape(graph.outputs.shape)


def batch_roots(
    risk: EmpiricalRisk, make: Callable[[EmpiricalRisk, Batch, Tensor], tuple[Tensor, int] | None]
) -> tuple[Roots, int] | None:
    """`make(risk, batch, outputs)` for every batch, with the ranks added up; None as soon as one has none.

    A loader whose order may change has no fixed rows, so no factor.
    """
    if not risk.batches.ordered:
        return None
    roots, rank = [], 0
    tensors = risk.space.unflatten(risk.theta)
    for batch in risk.batches:
        with torch.no_grad():
            outputs = risk.batch_outputs(tensors, batch)
        made = make(risk, batch, outputs)
        if made is None:
            return None
        roots.append(made[0])
        rank += made[1] if batch.count > 0 else 0
    return roots, rank
