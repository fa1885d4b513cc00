"""The blocks of dense layers and of their units, from one backward pass per output (T1).

The Gauss-Newton block of unit `i` is `H^^T S_i H^` with diagonal `S_i`; its factor `S_i^(1/2) H^` needs the
layer's input rows and one number per example, not the Jacobian of the network. The layer's own factor has the rows
`g_jr (x) h^_j`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.curvature.output_curvature import output_root
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.linalg.matrices import RowScaled
from bnp_analysis.linalg.operators import LinearOperator, RowProducts
from bnp_analysis.linalg.spectra.checks import SomeNullDirections, Verifier, null_vectors
from bnp_analysis.network.kernels import derivative
from bnp_analysis.network.layer_kinds import Layer
from bnp_analysis.network.layers import Coverage, coverage, products_only
from bnp_analysis.network.moments import extended
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.saturation import ROUNDINGS, has_vanished, product_eps
from bnp_analysis.runtime.memory import available_memory
from bnp_analysis.runtime.trees import tensors_of

# Numbers in the rows of a layer's factor that are formed together: those who reduce them make six copies.
_TOGETHER = 2**20


class DenseLayerFactor(LinearOperator):
    """The factor of a dense layer's block: for example `j` and output `r` the row `g_jr (x) h_j`, then `g_jr`.

    Args:
        cotangents: `G`, `(R, r, n)`: the output-side rows pulled back to the layer's outputs.
        inputs: `H^`, `(R, m)`, with the bias column last if there is one.
        bias: whether there is one.
        rank: a structural bound of the rank.
        eps: of what both were computed in.
        zeros_are_structural: False where saturation may have made some of them.

    Example:
        >>> F = DenseLayerFactor(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[3.0, 1.0]]), bias=True, rank=1)
        >>> F.to_dense().tolist()
        [[3.0, 6.0, 1.0, 2.0]]
    """

    def __init__(
        self,
        cotangents: Tensor,
        inputs: Tensor,
        *,
        bias: bool,
        rank: int,
        eps: float | None = None,
        zeros_are_structural: bool = True,
    ) -> None:
        examples, each, units = cotangents.shape
        super().__init__((examples * each, units * inputs.shape[1]), inputs.dtype, inputs.device, eps)
        self._cotangents, self._inputs = cotangents, inputs
        self._rank, self._structural = rank, zeros_are_structural
        self._cut = units * (inputs.shape[1] - int(bias))

    @property
    def rank_bound(self) -> int:
        return min(*self.shape, self._rank)

    @property
    def zeros_are_structural(self) -> bool:
        return self._structural

    @property
    def dense_cost(self) -> int:
        return 0

    def _matmat(self, x: Tensor) -> Tensor:
        (examples, _, units), features, k = self._cotangents.shape, self._inputs.shape[1], x.shape[1]
        inner = self._cut // units
        parts = [x[: self._cut].reshape(units, inner, k), x[self._cut :].reshape(units, features - inner, k)]
        columns = torch.cat(parts, dim=1).transpose(0, 1).reshape(features, units * k)
        images = (self._inputs @ columns).reshape(examples, units, k)
        return torch.bmm(self._cotangents, images).reshape(self.shape[0], k)

    def _rmatmat(self, y: Tensor) -> Tensor:
        (examples, each, units), features, k = self._cotangents.shape, self._inputs.shape[1], y.shape[1]
        inner = self._cut // units
        pulled = torch.bmm(self._cotangents.transpose(1, 2), y.reshape(examples, each, k))
        sums = (self._inputs.T @ pulled.reshape(examples, units * k)).reshape(features, units, k).transpose(0, 1)
        parts = [sums[:, :inner].reshape(units * inner, k), sums[:, inner:].reshape(units * (features - inner), k)]
        return torch.cat(parts)

    def to_dense(self) -> Tensor:
        return torch.cat(list(self.row_blocks()))

    def row_blocks(self) -> Iterator[Tensor]:
        examples, each, units = self._cotangents.shape
        features = self._cut // units
        step = max(1, _TOGETHER // (each * self.shape[1]))
        for begin in range(0, examples, step):
            g, h = self._cotangents[begin : begin + step], self._inputs[begin : begin + step]
            weights = g.unsqueeze(3) * h[:, None, None, :features]
            bias = g.unsqueeze(3) * h[:, None, None, features:]
            yield torch.cat([weights.flatten(2), bias.flatten(2)], dim=2).flatten(0, 1)


class UnitBlocks:
    """All unit blocks of one dense layer, `A_i = H^^T diag(s_i^2) H^` in the order (weights, bias).

    Attributes:
        rows: `(R, m + 1)`, the inputs with the bias column last; without it when the layer has no free bias.
        scales: `(R, n)`, `s_ji = sqrt(d^2 L / d a_ji^2)` of the Gauss-Newton matrix.
        whole: the layer's own block; None where its factor would not fit into memory.
        eps: of what all were computed in.
        zeros_are_structural: False where scales or inputs of 0 may be what saturation has made too small.
    """

    def __init__(
        self,
        rows: Tensor,
        scales: Tensor,
        whole: GramOperator | None = None,
        eps: float | None = None,
        *,
        zeros_are_structural: bool = True,
    ) -> None:
        self.rows, self.scales, self.whole, self.eps = rows, scales, whole, eps
        self.zeros_are_structural = zeros_are_structural
        self._common: Tensor | None = None

    def __len__(self) -> int:
        return self.scales.shape[1]

    def __getitem__(self, i: int) -> GramOperator:
        return GramOperator(
            RowScaled(self.scales[:, i], self.rows, self.eps, zeros_are_structural=self.zeros_are_structural)
        )

    def dependences(self, i: int, factor: LinearOperator) -> SomeNullDirections:
        """Directions `v` with `H^ v = 0` on the rows that count for unit `i`, verified with a factor of its block."""
        active = (self.scales[:, i] != 0) | (not self.zeros_are_structural)
        if not bool(active.all()):
            vectors = _null_rows(self.rows[active])
        else:
            vectors = self._common = _null_rows(self.rows) if self._common is None else self._common
        if vectors.shape[1]:
            verifier = Verifier(factor, vectors.shape[1])
            sizes = verifier.sizes([(torch.arange(len(vectors)), vectors)])[0]
            vectors = vectors[:, sizes <= verifier.tolerance]
        return SomeNullDirections(vectors.to(self.rows), {"dependent inputs": vectors.shape[1]})


def unit_blocks(risk: EmpiricalRisk, layers: Coverage) -> dict[str, UnitBlocks]:
    """The unit blocks of every dense layer that runs once per example, for all layers in one sweep.

    Args:
        risk: the empirical risk; its loss convex and separate over examples in the outputs.
        layers: the covered layers.

    Returns:
        Layer name -> `UnitBlocks`. Convolutions, layers that are reused or see sequences, batch-coupled models
        and losses without a square root are left out, and pruned weights: their units are parts of the layer's block.

    Source: T1, T13.
    """
    dense = [layer for layer in layers if not (layer.spatial or layer.groups > 1 or layer.kind.gain)]
    if risk.coupled or not dense or not risk.batches.ordered:
        return {}
    own: dict[str, _Own] = {}

    def attempt() -> list[str]:
        own.update(_own_rows(risk, dense))
        return [*own]

    kept = set.intersection(*map(set, risk.group.share(attempt, "the layers that have unit blocks")))
    if not kept:
        return {}
    doubts = risk.group.share(lambda: next((o.rounding, o.vanished) for o in own.values()), "doubts of the rows")
    eps = max(product_eps(risk), *(rounding / ROUNDINGS for rounding, _ in doubts))
    structural = not (any(vanished for _, vanished in doubts) or has_vanished(risk))
    found = {}
    for layer in dense:
        if layer.name in kept:
            mine, what = own[layer.name], f"the rows of {layer.name}"
            inputs, scales = (risk.group.gather(partial(getattr, mine, part), what) for part in ("inputs", "scales"))
            rows = extended(layer, inputs)[:, 0]
            facts = {"eps": eps, "zeros_are_structural": structural}
            # The rows of a factor list the weights unit after unit.
            ordered = not layer.kind.transposed
            whole = mine.layer_block(rows, bias=layer.bias is not None, **facts) if ordered else None
            found[layer.name] = UnitBlocks(rows, scales, whole, **facts)
    return found


def row_products(risk: EmpiricalRisk) -> list[RowProducts] | None:
    """The rows of the Gauss-Newton factor as Kronecker products, a part for each layer, by one sweep over the data.

    Args:
        risk: the empirical risk.

    Returns:
        The parts; None unless all free parameters are those of dense layers that run once per example.

    Source: T1.

    Example:
        >>> import bnp_analysis as bnp
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 1])
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, (x, y))
        >>> [(part.left.shape, part.right.shape) for part in row_products(risk)]
        [(torch.Size([3, 1, 2]), torch.Size([3, 4]))]
    """
    if risk.coupled or risk.group.size > 1 or not risk.batches.ordered:
        return None
    layers, columns = list(coverage(risk)), {}
    for layer in layers:
        names = [layer.weight] + ([] if layer.bias is None else [layer.bias])
        plain = not (layer.spatial or layer.groups > 1 or layer.kind.gain or layer.kind.transposed)
        if not plain or list(risk.space.layer_names(layer.name)) != names:
            return None
        columns[layer.name] = risk.space.indices(layer.name)
    if sum(len(positions) for positions in columns.values()) != risk.space.dim:
        return None
    own, parts = _own_rows(risk, layers, independent=True), []
    for layer in layers:
        mine = own.get(layer.name)
        if mine is None or mine.cotangents is None:
            return None
        rows = extended(layer, mine.inputs)[:, 0]
        parts.append(RowProducts(mine.cotangents, rows, columns[layer.name]))
    return parts


@dataclass(frozen=True)
class _Own:
    """What this process's batches give of a layer; cotangents of one process alone, while they fit."""

    inputs: Tensor
    scales: Tensor
    cotangents: Tensor | None
    rank: int
    rounding: float
    vanished: bool

    def layer_block(self, rows: Tensor, *, bias: bool, **facts: Any) -> GramOperator | None:
        if self.cotangents is None:
            return None
        return GramOperator(DenseLayerFactor(self.cotangents, rows, bias=bias, rank=self.rank, **facts))


def _own_rows(risk: EmpiricalRisk, layers: list[Layer], *, independent: bool = False) -> dict[str, _Own]:
    """One sweep over this process's batches, for layers that run once per example; all rows of the root, or few."""
    dense = {layer.name: layer for layer in layers}
    none = risk.theta.new_zeros
    inputs = {name: [none(0, 1, layer.features)] for name, layer in dense.items()}
    scales = {name: [none(0, layer.units)] for name, layer in dense.items()}
    cotangents: dict[str, list[Tensor]] = {name: [] for name in dense}
    kept, rank, rounding, vanished = risk.group.size == 1, 0, 0.0, False
    for batch in risk.batches:
        leaves = risk.leaves()
        outputs, seen = risk.record(batch, dense.values(), leaves)
        examples = tensors_of(batch.x)[0].shape[0]
        dense = {name: layer for name, layer in dense.items() if _simple(seen[name], examples)}
        alone = products_only(dense.values(), leaves, outputs, seen)
        dense = {name: layer for name, layer in dense.items() if name in alone}
        # The root of a sequence's outputs is dear: it is made where some layer wants it.
        found = output_root(risk, batch, outputs.detach()) if dense else None
        if found is None or found.root.shape[0] != examples:
            return {}
        activations = [seen[name][0][1] for name in dense]
        width = sum(a.shape[1] * a.element_size() for a in activations)
        root = found.independent() if independent else found.root
        kept = kept and root.shape[1] * examples * width < available_memory(risk.space.device) // 4
        rank += found.rank
        rounding, vanished = max(rounding, found.rounding), vanished or found.vanished
        pulled: list[list[Tensor]] = [[] for _ in dense]
        norms = [torch.zeros_like(a) for a in activations]
        weight = batch.count / risk.batches.total
        for r in range(root.shape[1]):
            cotangent = weight**0.5 * root[:, r].reshape(outputs.shape)
            grads = derivative(outputs, activations, cotangent, retain_graph=True, what="the rows of units")
            norms = [torch.hypot(total, g.detach()) for total, g in zip(norms, grads, strict=True)]
            for one, g in zip(pulled, grads, strict=True):
                one.extend([g.detach()] if kept else [])
        for name, one, total in zip(dense, pulled, norms, strict=True):
            inputs[name].append(dense[name].rows(seen[name][0][0]))
            scales[name].append(total.detach())
            cotangents[name] += [torch.stack(one, dim=1)] if kept else []
            one.clear()  # not held twice
    return {
        name: _Own(
            torch.cat(inputs[name]),
            torch.cat(scales[name]),
            _joined(cotangents.pop(name)) if kept else None,
            rank,
            rounding,
            vanished,
        )
        for name in dense
    }


def _joined(parts: list[Tensor]) -> Tensor | None:
    """The rows of all batches in one tensor, without a copy of those of one batch."""
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(parts)


def _simple(seen: list[tuple[Tensor, Tensor]], examples: int) -> bool:
    """One occurrence, one row per example, and an output that the loss can reach."""
    return len(seen) == 1 and seen[0][1].ndim == 2 and seen[0][1].shape[0] == examples and seen[0][1].requires_grad


def _null_rows(rows: Tensor) -> Tensor:
    """The null space of rows at length one, on the CPU: a row counts however small it is."""
    size = rows.double().norm(dim=1, keepdim=True)
    return null_vectors(rows.double() / torch.where(size > 0, size, 1.0)).cpu()
