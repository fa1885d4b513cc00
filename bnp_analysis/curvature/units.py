"""The blocks of single units of dense layers, from one backward pass per output (T1).

The Gauss-Newton block of unit `i` is `H^^T S_i H^` with diagonal `S_i`; its factor `S_i^(1/2) H^` needs the
layer's input rows and one number per example, not the Jacobian of the network.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bnp_analysis.curvature.output_curvature import output_root
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.linalg.matrices import RowScaled
from bnp_analysis.network.batches import tensors_of
from bnp_analysis.network.layers import Coverage, Layer
from bnp_analysis.network.risk import EmpiricalRisk


class UnitBlocks:
    """All unit blocks of one dense layer, `A_i = H^^T diag(s_i^2) H^` in the order (weights, bias).

    Attributes:
        rows: `(R, m + 1)`, the inputs with the bias column last; without it when the layer has no free bias.
        scales: `(R, n)`, `s_ji = sqrt(d^2 L / d a_ji^2)` of the Gauss-Newton matrix.
    """

    def __init__(self, rows: Tensor, scales: Tensor) -> None:
        self.rows, self.scales = rows, scales

    def __len__(self) -> int:
        return self.scales.shape[1]

    def __getitem__(self, i: int) -> GramOperator:
        return GramOperator(RowScaled(self.scales[:, i], self.rows))


def unit_blocks(risk: EmpiricalRisk, layers: Coverage) -> dict[str, UnitBlocks]:
    """The unit blocks of every dense layer that runs once per example, for all layers in one sweep.

    Args:
        risk: the empirical risk; its loss convex and separate over examples in the outputs.
        layers: the covered layers.

    Returns:
        Layer name -> `UnitBlocks`. Convolutions, layers that are reused or see sequences, batch-coupled models
        and losses without a square root are left out: their units are parts of the layer's block.

    Source: T1, T13.
    """
    dense = [layer for layer in layers if isinstance(layer.module, torch.nn.Linear)]
    if risk.coupled or not dense or not risk.batches.ordered:
        return {}
    own: dict[str, tuple[Tensor, Tensor]] = {}

    def attempt() -> list[str]:
        own.update(_own_rows(risk, dense))
        return [*own]

    kept = set.intersection(*map(set, risk.group.share(attempt, "the layers that have unit blocks")))
    found = {}
    for layer in dense:
        if layer.name in kept:
            mine, what = own[layer.name], f"the rows of {layer.name}"
            inputs, scales = (risk.group.gather(partial(mine.__getitem__, i), what) for i in range(2))
            found[layer.name] = UnitBlocks(_with_bias(layer, inputs), scales)
    return found


def _own_rows(risk: EmpiricalRisk, layers: list[Layer]) -> dict[str, tuple[Tensor, Tensor]]:
    """The input rows and scales of this process's batches, of layers that run once per example."""
    dense = {layer.name: layer for layer in layers}
    inputs: dict[str, list[Tensor]] = {name: [] for name in dense}
    scales: dict[str, list[Tensor]] = {name: [] for name in dense}
    for batch in risk.batches:
        outputs, seen = risk.record(batch, dense)
        found = output_root(risk, batch, outputs.detach())
        examples = tensors_of(batch.x)[0].shape[0]
        dense = {name: layer for name, layer in dense.items() if _simple(seen[name], examples)}
        if found is None or not dense or found.root.shape[0] != examples:
            return {}
        activations = [seen[name][0][1] for name in dense]
        squares = [torch.zeros_like(a) for a in activations]
        weight = batch.count / risk.batches.total
        for r in range(found.root.shape[1]):
            grads = torch.autograd.grad(
                outputs,
                activations,
                found.root[:, r].reshape(outputs.shape),
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            squares = [total + g.detach().square() for total, g in zip(squares, grads, strict=True)]
        for name, total in zip(dense, squares, strict=True):
            inputs[name].append(seen[name][0][0])
            scales[name].append((weight * total).sqrt())
    none = risk.theta.new_zeros
    return {
        name: (torch.cat([none(0, layer.features), *inputs[name]]), torch.cat([none(0, layer.units), *scales[name]]))
        for name, layer in dense.items()
    }


def _simple(seen: list[tuple[Tensor, Tensor]], examples: int) -> bool:
    """One occurrence, one row per example, and an output that the loss can reach."""
    return len(seen) == 1 and seen[0][1].ndim == 2 and seen[0][1].shape[0] == examples and seen[0][1].requires_grad


def _with_bias(layer: Layer, h: Tensor) -> Tensor:
    return h if layer.bias is None else torch.cat([h, h.new_ones(h.shape[0], 1)], dim=1)
