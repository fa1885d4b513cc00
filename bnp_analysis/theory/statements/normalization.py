"""BN against BNP: one step is one step (Prop. 7), whole trajectories at fixed statistics, and a projection (T9)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnp_analysis.network import EmpiricalRisk, Layer
from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.precondition import BlockDiagonal, bnp_preconditioner
from bnp_analysis.runtime.trees import tensors_of
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.reference import (
    LayerMoments,
    channel_values,
    moments_of,
    own_moments,
)
from bnp_analysis.theory.statements.rewriting import LiveNorm, rewritten
from bnp_analysis.theory.statements.setting import (
    NotApplicable,
    Problem,
    agreement,
    distance,
    each_layer,
    label,
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


class InputOffset(nn.Module):
    """Adds a free offset, zero at the start: derivatives by it are those by what comes in."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros_like(like))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.offset


class _Map:
    """`z = P^-1 theta` and back for some layers, `q = 1`, written out: `w = z_w / sigma`, `b = z_b - w . mu`."""

    def __init__(self, problem: Problem, layers: Iterable[Layer], known: Mapping[str, LayerMoments] = _NONE) -> None:
        self._parts = []
        for layer in layers:
            moments = known.get(layer.name) or own_moments(problem, layer)
            owner = torch.arange(layer.units) // (layer.units // layer.groups)
            sigma = _sigma(moments)
            weight = problem.risk.space.slice_of(layer.weight)
            bias = problem.risk.space.slice_of(layer.bias or "")
            self._parts.append((weight, bias, layer.units, moments.mean[owner], sigma[owner]))

    def to_z(self, theta: Tensor) -> Tensor:
        z = theta.clone()
        for weight, bias, units, mean, sigma in self._parts:
            w = theta[weight].view(units, -1)
            z[weight] = (w * sigma).reshape(-1)
            z[bias] = theta[bias] + (w * mean).sum(dim=1)
        return z

    def from_z(self, z: Tensor) -> Tensor:
        theta = z.clone()
        for weight, bias, units, mean, sigma in self._parts:
            w = z[weight].view(units, -1) / sigma
            theta[weight] = w.reshape(-1)
            theta[bias] = z[bias] - (w * mean).sum(dim=1)
        return theta


def _sigma(moments: LayerMoments) -> Tensor:
    return torch.where(moments.constant, torch.ones_like(moments.variance), moments.variance).sqrt()


def _fixed(problem: Problem, layer: Layer) -> FixedNorm:
    moments, channels = own_moments(problem, layer), layer.groups * layer.features // layer.patch
    mean, variance = (t.reshape(channels, layer.patch)[:, 0] for t in (moments.mean, _sigma(moments).square()))
    return FixedNorm(mean.clone(), variance.clone(), layer.channel_axis)


@statement(Source.T9, _T9)
def check_batch_norm(problem: Problem) -> Iterator[Check]:
    """T9: trajectories with fixed statistics, gradients with live ones, and the exception of zero padding."""
    problem.require_smooth()
    problem = problem.moving
    chosen = _chosen(problem)
    if chosen:
        gap, details = _trajectories(problem, chosen)
        hypotheses = {"fixed statistics": True, "q = 1": True, "no zero padding": True, "biases": True}
        words = f"{_T9} [{', '.join(label(layer) for layer in chosen)}]"
        yield Check.compare(
            words, Source.T9, observed=gap, predicted=1e-9, tolerance=0.0, relation="<=", hypotheses=hypotheses,
            details=details,
        )  # fmt: skip
    for layer in problem.layers:
        if layer.bias is None:
            yield Check.not_applicable(
                f"{_T9} [{label(layer)}]", Source.T9, "no free bias: BN's centering has no place to go"
            )
        elif layer.pads_zeros:
            gap, details = _trajectories(problem, [layer])
            why = f"zero padding: BN pads with the mean, BNP with zero; measured, trajectories differ by {gap:.3g}"
            yield Check.not_applicable(f"{_T9} [{label(layer)}]", Source.T9, why, details=details)
    yield from each_layer(problem, _OWN, Source.T9, _own_gradient)
    yield from each_layer(problem, _BELOW, Source.T9, _below)


def _chosen(problem: Problem) -> list[Layer]:
    """The layers in front of which BN is BNP: with a bias, without zero padding."""
    return [layer for layer in problem.layers if layer.bias is not None and not layer.pads_zeros]


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
    batch = next(iter(problem.risk.batches))
    first = _Pair(problem, batch, names)
    z = first.own_chart.to_z(problem.risk.theta)
    alpha = _step_size(first.with_bn.at(z))
    after_bn = first.chart_at(z).from_z(first.bn_step(z, alpha))
    after_bnp = first.bnp_step(problem.risk.theta, alpha)
    way = float((after_bnp - problem.risk.theta).norm())
    rounding = 100 * torch.finfo(z.dtype).eps * float(z.norm()) / way if way else 0.0
    if rounding > 1e-3:
        raise NotApplicable(
            f"the step is {way:.2g} long, and the parameters with BN are rounded by {rounding:.2g} of it"
        )
    yield Check.compare(
        f"{_PROP_7} [{', '.join(name or 'the layer' for name in names)}]",
        Source.PROP_7,
        observed=float((after_bn - after_bnp).norm()) / (way or 1.0),
        predicted=max(1e-9, rounding),
        tolerance=0.0,
        relation="<=",
        hypotheses={"gain 1, offset 0": True, "q = 1": True, "no zero padding": True, "biases": True},
        details={"alpha": alpha, "examples": batch.count},
    )
    yield _second_step(problem, batch, names)


def _second_step(problem: Problem, batch: Batch, names: list[str]) -> Check:
    """Increments of the second step, on another mini-batch, of BNP's network and of the one below BN."""
    size = tensors_of(batch.x)[0].shape[0]
    parts = [slice_batch(batch, 0, size // 2), slice_batch(batch, size // 2, size)] if size >= 4 else [None]
    if None in parts:
        return Check.not_applicable(_SECOND, Source.PROP_7, "no two mini-batches of at least two examples")
    first, second = (_Pair(problem, part, names) for part in parts if part is not None)
    theta, z = problem.risk.theta, first.own_chart.to_z(problem.risk.theta)
    alpha = _step_size(first.with_bn.at(z))
    z = first.bn_step(z, alpha)
    here = first.bnp_step(theta, alpha)
    chart = second.chart_at(z)
    moved = chart.from_z(z)
    increments = chart.from_z(second.bn_step(z, alpha)) - moved, second.bnp_step(here, alpha) - here
    length = float((here - theta).norm())
    return Check.compare(
        _SECOND,
        Source.PROP_7,
        observed=distance(*increments),
        predicted=1e-6,
        tolerance=0.0,
        relation=">=",
        hypotheses={"two disjoint mini-batches": True},
        details={"the change of mini-batch moves BN's network, in steps": float((moved - here).norm()) / length},
    )


class _Pair:
    """One mini-batch, the network on it, and the same network with BN in front of some layers."""

    def __init__(self, problem: Problem, batch: Batch, names: list[str]) -> None:
        self.problem = Problem(rewritten(problem.risk, batches=[batch]), limit=problem.limit)
        self.layers = [self.problem.layers[name] for name in names]
        self.own_chart = _Map(self.problem, self.layers)
        norms = {one.name: _front(LiveNorm(one.channel_axis, through=False)) for one in self.layers}
        self.with_bn = rewritten(self.problem.risk, norms)

    def chart_at(self, z: Tensor) -> _Map:
        """Between `z` and the network below BN, by the statistics that BN has there."""
        found: dict[str, LayerMoments] = {}
        owners = {f"{one.name}.0" if one.name else "0": one for one in self.layers}

        def note(name: str, module: nn.Module, args: Any, out: Any) -> None:
            found[owners[name].name] = moments_of(channel_values(owners[name], args[0]), owners[name])

        self.with_bn.at(z).capture(note, owners)
        return _Map(self.problem, self.layers, found)

    def bn_step(self, z: Tensor, alpha: float) -> Tensor:
        return z - alpha * self.with_bn.at(z).gradient

    def bnp_step(self, theta: Tensor, alpha: float) -> Tensor:
        there = self.problem.risk.at(theta)
        P = _only(there, self.layers)
        return theta - alpha * P.direction(there.gradient)


def _only(risk: EmpiricalRisk, layers: Iterable[Layer]) -> BlockDiagonal:
    """BNP with `q = 1` on some layers, the identity elsewhere."""
    blocks = bnp_preconditioner(risk, q=1.0).blocks
    return BlockDiagonal(
        risk.space.dim, {layer.name: blocks[layer.name] for layer in layers}, risk.space.dtype, risk.space.device
    )


def _step_size(risk: EmpiricalRisk) -> float:
    size = float(risk.gradient.square().sum())
    return 0.2 * min(float(risk.value) / size, 1.0) if size > 0 else 1.0


def _trajectories(problem: Problem, layers: list[Layer]) -> tuple[float, dict[str, float]]:
    """How far gradient descent with BN in front of layers and BNP come apart, relative to the way they went."""
    risk = problem.risk
    with_bn = rewritten(risk, {layer.name: _front(_fixed(problem, layer)) for layer in layers})
    chart = _Map(problem, layers)
    P = _only(risk, layers)
    bn, bnp = with_bn.at(chart.to_z(risk.theta)), risk
    alpha = _step_size(bn)
    for _ in range(_STEPS):
        bn = bn.at(bn.theta - alpha * bn.gradient)
        bnp = bnp.at(bnp.theta - alpha * P.direction(bnp.gradient))
    way = float((bnp.theta - risk.theta).norm())
    gap = float((chart.from_z(bn.theta) - bnp.theta).norm())
    details = {"steps": float(_STEPS), "alpha": alpha, "loss before": float(risk.value), "loss after": float(bnp.value)}
    details["outputs differ by"] = distance(bn.outputs, bnp.outputs)
    return (gap / way if way > 0 else gap), details


def _front(norm: nn.Module) -> Any:
    return lambda own: nn.Sequential(norm, own)


def _require_live(problem: Problem, layer: Layer) -> None:
    problem.require_once(layer)
    if layer.bias is None:
        raise NotApplicable("no free bias")
    if layer.pads_zeros:
        raise NotApplicable("zero padding: BN pads with the mean, BNP with zero")
    if problem.risk.coupled:
        raise NotApplicable("batch-coupled layers in the network already")
    if problem.risk.batches.number > 1:
        raise NotApplicable(f"{problem.risk.batches.number} batches: live statistics are those of one; give one batch")


def _own_gradient(problem: Problem, layer: Layer) -> Iterator[Check]:
    _require_live(problem, layer)
    risk, chart = problem.risk, _Map(problem, [layer])
    live = rewritten(risk, {layer.name: _front(LiveNorm(layer.channel_axis))}).at(chart.to_z(risk.theta))
    positions, P = bnp_preconditioner(risk, q=1.0).blocks[layer.name]
    found, expected = live.gradient[positions], P.apply_transpose(risk.gradient[positions])
    yield agreement(
        f"{_OWN} [{label(layer)}]",
        Source.T9,
        found,
        expected,
        hypotheses={"nothing batch-coupled downstream": True, "one batch": True},
        details={"outputs differ by": distance(live.outputs, risk.outputs)},
    )


def _below(problem: Problem, layer: Layer) -> Iterator[Check]:
    _require_live(problem, layer)
    risk, z = problem.risk, _Map(problem, [layer]).to_z(problem.risk.theta)
    seen: list[Tensor] = []
    risk.capture(lambda name, module, args, out: seen.append(args[0].clone()), [layer.name])
    axis = layer.channel_axis
    gradients: dict[str, tuple[Tensor, Tensor]] = {}
    for kind, norm in (("live", LiveNorm(axis)), ("fixed", _fixed(problem, layer))):
        other = rewritten(risk, {layer.name: _front(nn.Sequential(InputOffset(seen[0]), norm))})
        gradients[kind] = _offset_gradient(other, layer, z, seen[0])
    (live, lower_live), (fixed, lower_fixed) = gradients["live"], gradients["fixed"]
    g = _fixed(problem, layer)(seen[0])
    live, fixed, g = (t.movedim(axis, -1).flatten(0, -2) for t in (live, fixed, g))
    changing = (g != 0).any(dim=0)
    live, fixed, g = live[:, changing], fixed[:, changing], g[:, changing]
    projected = fixed - fixed.mean(dim=0) - g * (g * fixed).mean(dim=0)
    below = distance(lower_live, lower_fixed) if bool(lower_fixed.any()) else 0.0
    # Relative to what comes in: with two rows nothing is left.
    yield Check.compare(
        f"{_BELOW} [{label(layer)}]",
        Source.T9,
        observed=float((live - projected).norm() / fixed.norm()) if bool(fixed.any()) else 0.0,
        predicted=1e-9,
        tolerance=0.0,
        relation="<=",
        hypotheses={"nothing batch-coupled downstream": True, "one batch": True},
        details={"removes of the gradient": distance(live, fixed), "gradients of layers before change by": below},
    )


def _offset_gradient(other: EmpiricalRisk, layer: Layer, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient by the layer's input, and that of the parameters in the layers before it."""
    name = f"{layer.name}.0.0.offset" if layer.name else "0.0.offset"
    place = other.space.slice_of(name)
    theta = torch.cat([z[: place.start], torch.zeros(h.numel(), dtype=z.dtype), z[place.start :]])
    gradient = other.at(theta).gradient
    return gradient[place].view(h.shape), gradient[: place.start]
