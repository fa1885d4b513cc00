"""BN against BNP: one step is one step (Prop. 7), whole trajectories at fixed statistics, and a projection (T9)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnp_analysis.network import EmpiricalRisk, Layer
from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.precondition import BlockDiagonal, BNPBlock, bnp_preconditioner
from bnp_analysis.precondition.base import layer_positions
from bnp_analysis.runtime.trees import tensors_of
from bnp_analysis.theory.check import Check, Source
from bnp_analysis.theory.statements.reference import (
    LayerMoments,
    LiveNorm,
    Offset,
    channel_axis,
    channel_values,
    channels,
    moments_of,
    own_moments,
    rewritten,
    zero_padded,
)
from bnp_analysis.theory.statements.setting import (
    NotApplicable,
    Problem,
    agreement,
    at_least,
    at_most,
    distance,
    label,
    passing,
    per_layer,
    refused,
    statement,
)

_PROP_7 = "one step of gradient descent with BN, not differentiated through its statistics, is one step of BNP"
_SECOND = "the second step is another one when the mini-batch changes"
_T9 = "gradient descent on the network with BN at fixed statistics is BNP"
_OWN = "with live statistics a layer's own gradient is P^T grad"
_BELOW = "with live statistics (I - ee^T/R - gg^T/R) acts on what is passed below"
_STEPS = 6
_NONE: Mapping[str, LayerMoments] = {}


class FixedNorm(nn.Module):
    """torch's batch normalization without gain and offset, at fixed statistics, eps = 0."""

    mean: Tensor
    variance: Tensor

    def __init__(self, mean: Tensor, variance: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        self._axis = axis

    def forward(self, h: Tensor) -> Tensor:
        moved = h.movedim(self._axis, 1)
        return F.batch_norm(moved, self.mean, self.variance, training=False, eps=0.0).movedim(1, self._axis)


def _chart(problem: Problem, layers: Iterable[Layer], known: Mapping[str, LayerMoments] = _NONE) -> BlockDiagonal:
    """`P` of `theta = P z` for some layers, `q = 1`: `w = z_w / sigma`, `b = z_b - w . mu`; the identity elsewhere."""
    space, blocks = problem.risk.space, {}
    for layer in layers:
        moments = known.get(layer.name) or own_moments(problem, layer)
        block = BNPBlock(moments.mean, _variance(moments), 1.0, units=layer.units, bias=True)
        blocks[layer.name] = (layer_positions(layer, space), block)
    return BlockDiagonal(space.dim, blocks, space.dtype, space.device)


def _variance(moments: LayerMoments) -> Tensor:
    return torch.where(moments.constant, torch.ones_like(moments.variance), moments.variance)


def _fixed(problem: Problem, layer: Layer) -> FixedNorm:
    moments = own_moments(problem, layer)
    shape = channels(layer), layer.patch
    mean, variance = (t.reshape(shape)[:, 0].clone() for t in (moments.mean, _variance(moments)))
    return FixedNorm(mean, variance, channel_axis(layer))


def _front(norm: nn.Module) -> Any:
    return lambda own: nn.Sequential(norm, own)


def _chosen(problem: Problem) -> list[Layer]:
    """The layers in front of which BN is BNP: with a bias, without zero padding."""
    return [layer for layer in problem.layers if layer.bias is not None and not zero_padded(layer)]


def _only(risk: EmpiricalRisk, layers: Iterable[Layer]) -> BlockDiagonal:
    """BNP with `q = 1` on some layers, the identity elsewhere."""
    blocks = bnp_preconditioner(risk, q=1.0).blocks
    own = {layer.name: blocks[layer.name] for layer in layers}
    return BlockDiagonal(risk.space.dim, own, risk.space.dtype, risk.space.device)


def _step_size(risk: EmpiricalRisk) -> float:
    size = float(risk.gradient.square().sum())
    return 0.2 * min(float(risk.value) / size, 1.0) if size > 0 else 1.0


@statement(Source.T9, _T9)
def check_batch_norm(problem: Problem) -> Iterator[Check]:
    """T9: trajectories with fixed statistics, gradients with live ones, and the exception of zero padding."""
    problem.require_smooth()
    problem = problem.moving
    chosen = _chosen(problem)
    if chosen:
        gap, details = _trajectories(problem, chosen)
        words = f"{_T9} [{', '.join(map(label, chosen))}]"
        given = ("fixed statistics", "q = 1", "no zero padding", "biases")
        yield at_most(words, gap, 1e-9, given=given, details=details)
    yield from _exceptions(problem)
    yield from _own_gradient(problem)
    yield from _below(problem)


@per_layer(_T9)
def _exceptions(problem: Problem, layer: Layer) -> Iterator[Check]:
    if layer.bias is None:
        yield refused(_T9, "no free bias: BN's centering has no place to go")
    elif zero_padded(layer):
        gap, details = _trajectories(problem, [layer])
        why = f"zero padding: BN pads with the mean, BNP with zero; measured, trajectories differ by {gap:.3g}"
        yield refused(_T9, why, details=details)


def _trajectories(problem: Problem, layers: list[Layer]) -> tuple[float, dict[str, float]]:
    """How far gradient descent with BN in front of layers and BNP come apart, relative to the way they went."""
    risk = problem.risk
    with_bn = rewritten(risk, {layer.name: _front(_fixed(problem, layer)) for layer in layers})
    chart, P = _chart(problem, layers), _only(risk, layers)
    bn, bnp = with_bn.at(chart.solve(risk.theta)), risk
    alpha = _step_size(bn)
    for _ in range(_STEPS):
        bn = bn.at(bn.theta - alpha * bn.gradient)
        bnp = bnp.at(bnp.theta - alpha * P.direction(bnp.gradient))
    way = float((bnp.theta - risk.theta).norm())
    gap = float((chart.apply(bn.theta) - bnp.theta).norm())
    details = {"steps": float(_STEPS), "alpha": alpha, "loss before": float(risk.value), "loss after": float(bnp.value)}
    details["outputs differ by"] = distance(bn.outputs, bnp.outputs)
    return (gap / way if way > 0 else gap), details


def _require_live(problem: Problem, layer: Layer) -> None:
    problem.require_once(layer)
    if layer.bias is None:
        raise NotApplicable("no free bias")
    if zero_padded(layer):
        raise NotApplicable("zero padding: BN pads with the mean, BNP with zero")
    if problem.risk.coupled:
        raise NotApplicable("batch-coupled layers in the network already")
    if problem.risk.batches.number > 1:
        raise NotApplicable(f"{problem.risk.batches.number} batches: live statistics are those of one; give one batch")


@per_layer(_OWN)
def _own_gradient(problem: Problem, layer: Layer) -> Iterator[Check]:
    _require_live(problem, layer)
    risk, z = problem.risk, _chart(problem, [layer]).solve(problem.risk.theta)
    live = rewritten(risk, {layer.name: _front(LiveNorm(channel_axis(layer)))}).at(z)
    positions, P = bnp_preconditioner(risk, q=1.0).blocks[layer.name]
    yield agreement(
        _OWN,
        live.gradient[positions],
        P.apply_transpose(risk.gradient[positions]),
        given=("nothing batch-coupled downstream", "one batch"),
        details={"outputs differ by": distance(live.outputs, risk.outputs)},
    )


@per_layer(_BELOW)
def _below(problem: Problem, layer: Layer) -> Iterator[Check]:
    _require_live(problem, layer)
    risk, z = problem.risk, _chart(problem, [layer]).solve(problem.risk.theta)
    h, axis, norm = passing(risk, layer.name)[0][0], channel_axis(layer), _fixed(problem, layer)

    def gradients(norm: nn.Module) -> tuple[Tensor, Tensor]:
        """By the layer's input, a row per position; and by the parameters of the layers before it."""
        other = rewritten(risk, {layer.name: _front(nn.Sequential(Offset(h.shape, h), norm))})
        place = other.space.slice_of(f"{layer.name}.0.0.offset" if layer.name else "0.0.offset")
        gradient = other.at(torch.cat([z[: place.start], z.new_zeros(h.numel()), z[place.start :]])).gradient
        return gradient[place].view(h.shape).movedim(axis, -1).flatten(0, -2), gradient[: place.start]

    (live, lower_live), (fixed, lower_fixed) = gradients(LiveNorm(axis)), gradients(norm)
    g = norm(h).movedim(axis, -1).flatten(0, -2)
    changing = (g != 0).any(dim=0)
    live, fixed, g = live[:, changing], fixed[:, changing], g[:, changing]
    projected = fixed - fixed.mean(dim=0) - g * (g * fixed).mean(dim=0)
    below = distance(lower_live, lower_fixed) if bool(lower_fixed.any()) else 0.0
    yield at_most(
        _BELOW,
        # Relative to what comes in: with two rows nothing is left.
        float((live - projected).norm() / fixed.norm()) if bool(fixed.any()) else 0.0,
        1e-9,
        given=("nothing batch-coupled downstream", "one batch"),
        details={"removes of the gradient": distance(live, fixed), "gradients of layers before change by": below},
    )


@statement(Source.PROP_7, _PROP_7)
def check_one_step(problem: Problem) -> Iterator[Check]:
    """Prop. 7: a step with BN in front of all layers at once, and a second one on another mini-batch."""
    problem.require_smooth()
    problem = problem.moving
    if problem.risk.coupled:
        raise NotApplicable("batch-coupled layers in the network already")
    names = [layer.name for layer in _chosen(problem) if problem.uses[layer.name] == 1]
    if not names:
        raise NotApplicable("every layer is without a bias, runs twice, or pads with zeros where BN pads with the mean")
    batch, theta = next(iter(problem.risk.batches)), problem.risk.theta
    first = _Pair(problem, batch, names)
    z, after_bnp, alpha = first.start(theta)
    after_bn = first.chart_at(z).apply(first.bn_step(z, alpha))
    way = float((after_bnp - theta).norm())
    rounding = 100 * torch.finfo(z.dtype).eps * float(z.norm()) / way if way else 0.0
    if rounding > 1e-3:
        raise NotApplicable(
            f"the step is {way:.2g} long, and the parameters with BN are rounded by {rounding:.2g} of it"
        )
    yield at_most(
        f"{_PROP_7} [{', '.join(name or 'the layer' for name in names)}]",
        float((after_bn - after_bnp).norm()) / (way or 1.0),
        max(1e-9, rounding),
        given=("gain 1, offset 0", "q = 1", "no zero padding", "biases"),
        details={"alpha": alpha, "examples": batch.count},
    )
    yield _second_step(problem, batch, names)


def _second_step(problem: Problem, batch: Batch, names: list[str]) -> Check:
    """Increments of the second step, on another mini-batch, of BNP's network and of the one below BN."""
    size, theta = tensors_of(batch.x)[0].shape[0], problem.risk.theta
    parts = [slice_batch(batch, 0, size // 2), slice_batch(batch, size // 2, size)] if size >= 4 else [None]
    if None in parts:
        return refused(_SECOND, "no two mini-batches of at least two examples")
    first, second = (_Pair(problem, part, names) for part in parts if part is not None)
    z, here, alpha = first.start(theta)
    z = first.bn_step(z, alpha)
    chart = second.chart_at(z)
    moved = chart.apply(z)
    length = float((here - theta).norm())
    weights = [problem.risk.space.indices(layer.weight) for layer in problem.layers if layer.name in names]
    if not bool((here - theta)[torch.cat(weights)].any()):
        return refused(_SECOND, "the step moves no weight: all units are dead, and BN changes nothing")
    return at_least(
        _SECOND,
        distance(chart.apply(second.bn_step(z, alpha)) - moved, second.bnp_step(here, alpha) - here),
        1e-6,
        given=("two disjoint mini-batches",),
        details={"the change of mini-batch moves BN's network, in steps": float((moved - here).norm()) / length},
    )


class _Pair:
    """One mini-batch, the network on it, and the same network with BN in front of some layers."""

    def __init__(self, problem: Problem, batch: Batch, names: list[str]) -> None:
        self.problem = problem.of(rewritten(problem.risk, batches=[batch]))
        self.layers = [self.problem.layers[name] for name in names]
        norms = {one.name: _front(LiveNorm(channel_axis(one), through=False)) for one in self.layers}
        self.with_bn = rewritten(self.problem.risk, norms)

    def start(self, theta: Tensor) -> tuple[Tensor, Tensor, float]:
        """The same point with BN, BNP's first step from it, and the step size of both."""
        z = _chart(self.problem, self.layers).solve(theta)
        alpha = _step_size(self.with_bn.at(z))
        return z, self.bnp_step(theta, alpha), alpha

    def chart_at(self, z: Tensor) -> BlockDiagonal:
        """Between `z` and the network below BN, by the statistics that BN has there."""
        there = self.with_bn.at(z)
        found = {}
        for one in self.layers:
            h = passing(there, f"{one.name}.0" if one.name else "0")[0][0]
            found[one.name] = moments_of(channel_values(one, h), one)
        return _chart(self.problem, self.layers, found)

    def bn_step(self, z: Tensor, alpha: float) -> Tensor:
        return z - alpha * self.with_bn.at(z).gradient

    def bnp_step(self, theta: Tensor, alpha: float) -> Tensor:
        there = self.problem.risk.at(theta)
        return theta - alpha * _only(there, self.layers).direction(there.gradient)
