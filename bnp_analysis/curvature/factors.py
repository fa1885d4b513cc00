"""The factor `F = R J` of a Gauss-Newton or Fisher matrix: output-side rows `R` times the Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.curvature.engines import Engine, Plan, tensors_of_columns
from bnp_analysis.curvature.output_curvature import OutputRoot, from_rows, to_rows
from bnp_analysis.curvature.products import TOGETHER, OutputGraph, output_graph
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator, RowProducts
from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.network.kernels import recording
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.saturation import ROUNDINGS, has_vanished, product_eps
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.memory import available_memory, require_memory
from bnp_analysis.runtime.trees import tensors_of

# Rows of a Jacobian are pulled back for a few examples at a time: the cost of one row is that of its slice. An example
# with many rows is a slice of its own.
_SLICE, _ROWS = 8, 64
# Of all rows together, while they are formed or reduced.
_COPIES = 6


@dataclass(frozen=True)
class Root:
    """The output-side rows of a batch, `(rows, r, K)` for `rows * K` outputs, whose first dimension is `leading`.

    The `K` outputs of a row lie along their `axis`, the last where they are all of an example.

    Attributes:
        rank: a structural bound of their rank.
        rounding: how far entries may be off, relative to their sizes.
        vanished: whether some zeros among them are none by structure.
    """

    rows: Tensor
    leading: int
    axis: int = -1
    rank: int = 0
    rounding: float = 0.0
    vanished: bool = False

    def per_example(self, batch: Batch) -> int | None:
        """Rows of one example, where the outputs list examples in the order of the batch; else None."""
        size = tensors_of(batch.x)[0].shape[0]
        return self.rows.shape[0] // size if self.leading == size else None

    @property
    def slice(self) -> int:
        """How many examples are pulled back together, where they are independent."""
        return max(1, min(_SLICE, _ROWS * self.leading // max(1, self.rows.shape[0] * self.rows.shape[1])))


class JacobianFactor(LinearOperator):
    """`F = R J`, `(sum_b N_b r_b) x n`; row `(j, i)` is `sqrt(w_b) R_j[i] . J_j`.

    Over several processes the rows of all of them, in the order of ranks; each computes those of its batches.

    Args:
        risk: the empirical risk.
        roots: for each batch of this process the output-side rows `R`, batch weight not included.
        engine, max_memory: as in `hessian`.
        products: finds the rows as Kronecker products, where they are some.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        roots: list[Root],
        engine: str = "auto",
        max_memory: int | None = None,
        products: Callable[[EmpiricalRisk], list[RowProducts] | None] | None = None,
    ) -> None:
        self._rows = [root.rows.shape[0] * root.rows.shape[1] for root in roots]
        self._risk, self._roots, self.group, self._products = risk, roots, risk.group, products
        doubt, lost = max((r.rounding for r in roots), default=0.0), any(r.vanished for r in roots)
        own = sum(self._rows), sum(r.rank for r in roots), self._own_dense_cost(), doubt, lost
        counts, ranks, costs, doubts, gone = zip(*self.group.share(lambda: own, "the rows of a factor"), strict=True)
        # The cheaper side: a product for every parameter, or a backward pass of its slice for every row.
        self._by_columns = risk.space.dim <= max(costs)
        super().__init__((sum(counts), risk.space.dim), risk.space.dtype, risk.space.device, risk.eps)
        self._begin = int(sum(counts[: self.group.rank]))
        self._rank, self._dense_cost = int(sum(ranks)), min(risk.space.dim, int(max(costs)))
        self._root_rounding, self._root_vanished = float(max(doubts)), any(gone)
        self.graphs = Engine(risk, output_graph, engine, max_memory)

    @property
    def engine(self) -> Plan:
        """How products are computed, and their estimated memory."""
        return self.graphs.plan

    @property
    def record(self) -> Mapping[str, Any]:
        return self.graphs.record

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, self._rank)

    @cached_property
    def row_parts(self) -> list[RowProducts] | None:
        return None if self._products is None else self._products(self._risk)

    @property
    def eps(self) -> float:
        return max(product_eps(self._risk), self._root_rounding / ROUNDINGS)

    @property
    def zeros_are_structural(self) -> bool:
        """Whether none comes from a derivative that saturation has made too small."""
        return not (self._root_vanished or has_vanished(self._risk))

    @property
    def dense_cost(self) -> int:
        return self._dense_cost

    def _own_dense_cost(self) -> int:
        # A row costs the backward pass of its slice: in products, which are two passes over all the data.
        cost = 1
        for rows, root in zip(self._rows, self._roots, strict=True):
            cut = not self._risk.coupled and root.leading > root.slice
            cost = max(cost, (rows * root.slice // root.leading if cut else rows) // 2)
        return cost

    def _matmat(self, x: Tensor) -> Tensor:
        return self.group.gather(lambda: self.own_rows_times(x), "a product with a factor", of=x)

    def _rmatmat(self, y: Tensor) -> Tensor:
        part = y[self._begin : self._begin + sum(self._rows)]
        return self.group.sum(lambda: self.own_columns_times(part), "a product with a factor's transpose", of=y)

    def own_rows_times(self, x: Tensor) -> Tensor:
        """The product with the rows of this process's batches."""
        vectors = tensors_of_columns(self._risk.space, x)
        product = x.new_zeros(sum(self._rows), x.shape[1])
        ends = list(accumulate(self._rows))

        def project(graph: OutputGraph, b: int, retain: bool) -> None:
            for k, v in enumerate(vectors):
                image = graph.jvp(v, retain=retain or k + 1 < len(vectors))
                product[ends[b] - self._rows[b] : ends[b], k] = _project(self._roots[b], image) * graph.weight**0.5

        self.graphs.each(project)
        return product

    def own_columns_times(self, y: Tensor) -> Tensor:
        """The transposed product with these rows."""
        ends = list(accumulate(self._rows))

        def pull(graph: OutputGraph, b: int, k: int, retain: bool) -> list[Tensor]:
            part = y[ends[b] - self._rows[b] : ends[b], k]
            u = _cotangent(self._roots[b], part * graph.weight**0.5, graph)
            return graph.vjp(u, retain=retain)

        return self.graphs.total(y.shape[1], pull)

    def gram_product(self, graph: OutputGraph, b: int, v: list[Tensor], retain: bool) -> list[Tensor]:
        """What the `b`-th batch adds to `F^T F v`, per tensor."""
        part = _project(self._roots[b], graph.jvp(v, retain=retain)) * graph.weight
        return graph.vjp(_cotangent(self._roots[b], part, graph), retain=retain)

    def to_dense(self) -> Tensor:
        return self.group.gather(self._own_dense, "the rows of a factor")

    def _own_dense(self) -> Tensor:
        m, n = sum(self._rows), self.shape[1]
        require_memory(m * n * self.dtype.itemsize, f"a dense {m} x {n} factor", device=self.device)
        dense = torch.empty(m, n, dtype=self.dtype, device=self.device)
        begin = 0
        for rows in self._own_blocks():
            dense[begin : begin + len(rows)] = rows
            begin += len(rows)
        return dense

    def row_blocks(self) -> Iterator[Tensor]:
        yield from self._own_blocks() if self.group.size == 1 else [self.to_dense()]

    def _own_blocks(self) -> Iterator[Tensor]:
        # All rows at once, of which those who reduce them make copies in float64; a few at a time take longer.
        size = 8 * _COPIES * sum(self._rows) * self.shape[1]
        if self._by_columns and size <= available_memory(self.device):
            yield self.own_rows_times(torch.eye(self.shape[1], dtype=self.dtype, device=self.device))
            return
        for batch, root in zip(self._risk.batches, self._roots, strict=True):
            weight = (batch.count / self._risk.batches.total) ** 0.5
            yield from rows_of_batch(self._risk, batch, replace(root, rows=root.rows * weight))


def rows_of_batch(risk: EmpiricalRisk, batch: Batch, root: Root) -> Iterator[Tensor]:
    """The rows `R_j[i] . J_j` of a batch, `(N r, n)`, a few examples at a time where they are independent."""
    for part, rows in _slices(batch, root, risk.coupled):
        try:
            yield _jacobian_rows(risk, part, replace(root, rows=root.rows[rows]))
        except InvalidInputError:
            # Made for one size of batch.
            yield _jacobian_rows(risk, batch, root, rows)


def _slices(batch: Batch, root: Root, coupled: bool) -> list[tuple[Batch, slice]]:
    """The batch cut into small ones where examples are independent, else whole; and their rows of the root."""
    each = root.per_example(batch)
    if coupled or each is None or slice_batch(batch, 0, 1) is None:
        return [(batch, slice(0, root.rows.shape[0]))]
    cuts = range(0, root.leading, root.slice)
    return [
        (part, slice(first * each, min((first + root.slice) * each, root.rows.shape[0])))
        for first in cuts
        if (part := slice_batch(batch, first, first + root.slice)) is not None
    ]


@full_float32
def _jacobian_rows(risk: EmpiricalRisk, batch: Batch, root: Root, only: slice = slice(None)) -> Tensor:
    """The rows of a batch, or only those of some `j`, by batched backward passes."""
    graph = output_graph(risk, batch, forward=False)
    R = root.rows
    count, width, _ = R.shape
    flat = R[only].reshape(-1, R.shape[2])
    owner = torch.arange(count, device=R.device)[only].repeat_interleave(width)
    dense = R.new_empty(len(flat), risk.space.dim)
    step = max(1, TOGETHER // max(graph.outputs.numel(), risk.space.dim // 2, 1))
    for begin in range(0, len(flat), step):
        end = min(begin + step, len(flat))
        cotangents = R.new_zeros(end - begin, count, R.shape[2])
        cotangents[torch.arange(end - begin, device=R.device), owner[begin:end]] = flat[begin:end]
        stack = torch.Size((end - begin, *graph.outputs.shape))
        parts = graph.vjp_rows(from_rows(cotangents, stack, root.axis + (root.axis >= 0)))
        place = 0
        for part in parts:
            flat_part = part.reshape(end - begin, -1)
            dense[begin:end, place : place + flat_part.shape[1]] = flat_part
            place += flat_part.shape[1]
    return dense


def _project(root: Root, outputs: Tensor) -> Tensor:
    """`R_j . out_j`, flattened over examples and rows."""
    rows = to_rows(outputs, root.rows.shape[2], root.axis)
    return torch.einsum("nrk,nk->nr", root.rows, rows).reshape(-1)


def _cotangent(root: Root, y: Tensor, graph: OutputGraph) -> Tensor:
    """`R_j^T y_j` in the shape of the outputs."""
    rows = torch.einsum("nrk,nr->nk", root.rows, y.reshape(root.rows.shape[:2]))
    return from_rows(rows, graph.outputs.shape, root.axis)


@recording()
def batch_roots(
    risk: EmpiricalRisk, make: Callable[[EmpiricalRisk, Batch, Tensor], OutputRoot | None]
) -> list[Root] | None:
    """`make(risk, batch, outputs)` for this process's batches; None where any batch has none.

    A loader whose order may change has no fixed rows, so no factor.
    """
    if not risk.batches.ordered:
        return None
    made: list[list[Root] | None] = []

    def attempt() -> bool:
        made.append(_own_roots(risk, make))
        return made[0] is not None

    return made[0] if all(risk.group.share(attempt, "the roots of a factor")) else None


def _own_roots(
    risk: EmpiricalRisk, make: Callable[[EmpiricalRisk, Batch, Tensor], OutputRoot | None]
) -> list[Root] | None:
    roots = []
    tensors = risk.space.unflatten(risk.theta)
    for batch in risk.batches:
        with torch.no_grad():
            outputs = risk.batch_outputs(tensors, batch)
        made = make(risk, batch, outputs)
        if made is None:
            return None
        roots.append(Root(made.root, outputs.shape[0], made.axis, made.rank, made.rounding, made.vanished))
    return roots
