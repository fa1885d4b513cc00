"""BN is BNP plus a projection (T9): networks with BN on their layers' inputs against BNP without it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnp_analysis.network import EmpiricalRisk, Layer
from bnp_analysis.precondition import BlockDiagonal, bnp_preconditioner
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.statements.reference import LayerMoments, own_moments
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

_T9 = "gradient descent on the network with BN at fixed statistics is BNP"
_OWN = "with live statistics a layer's own gradient is P^T grad"
_BELOW = "with live statistics (I - ee^T/R - gg^T/R) acts on what is passed below"
_STEPS = 6


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


def channel_axis(layer: Layer) -> int:
    """The axis of a layer's input that runs over features or channels, from the end."""
    return -1 if isinstance(layer.module, nn.Linear) else -1 - len(layer.module.kernel_size)


def zero_padded(layer: Layer) -> bool:
    """Whether a convolution pads with zeros, which BN in front of it does not normalize."""
    module: Any = layer.module
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros":
        return False
    return module.padding != "valid" if isinstance(module.padding, str) else any(module.padding)


class _Map:
    """`z = P^-1 theta` and back for some layers, `q = 1`, written out: `w = z_w / sigma`, `b = z_b - w . mu`."""

    def __init__(self, problem: Problem, layers: Iterable[Layer]) -> None:
        self._parts = []
        for layer in layers:
            moments = own_moments(problem, layer)
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
    return FixedNorm(mean.clone(), variance.clone(), channel_axis(layer))


@statement("T9", _T9)
def check_batch_norm(problem: Problem) -> Iterator[Check]:
    """T9: trajectories with fixed statistics, gradients with live ones, and the exception of zero padding."""
    problem.require_smooth()
    problem = problem.moving
    chosen = [layer for layer in problem.layers if layer.bias is not None and not zero_padded(layer)]
    if chosen:
        gap, details = _trajectories(problem, chosen)
        hypotheses = {"fixed statistics": True, "q = 1": True, "no zero padding": True, "biases": True}
        words = f"{_T9} [{', '.join(label(layer) for layer in chosen)}]"
        yield Check.compare(
            words, "T9", observed=gap, predicted=1e-9, tolerance=0.0, relation="<=", hypotheses=hypotheses,
            details=details,
        )  # fmt: skip
    for layer in problem.layers:
        if layer.bias is None:
            yield Check.not_applicable(
                f"{_T9} [{label(layer)}]", "T9", "no free bias: BN's centering has no place to go"
            )
        elif zero_padded(layer):
            gap, details = _trajectories(problem, [layer])
            why = f"zero padding: BN pads with the mean, BNP with zero; measured, trajectories differ by {gap:.3g}"
            yield Check.not_applicable(f"{_T9} [{label(layer)}]", "T9", why, details=details)
    yield from each_layer(problem, _OWN, "T9", _own_gradient)
    yield from each_layer(problem, _BELOW, "T9", _below)


def _trajectories(problem: Problem, layers: list[Layer]) -> tuple[float, dict[str, float]]:
    """How far gradient descent with BN in front of layers and BNP come apart, relative to the way they went."""
    risk = problem.risk
    with_bn = rewritten(risk, {layer.name: _front(_fixed(problem, layer)) for layer in layers})
    chart = _Map(problem, layers)
    whole = bnp_preconditioner(risk, q=1.0)
    P = BlockDiagonal(
        risk.space.dim, {layer.name: whole.blocks[layer.name] for layer in layers}, risk.space.dtype, risk.space.device
    )
    bn, bnp = with_bn.at(chart.to_z(risk.theta)), risk
    size = float(bn.gradient.square().sum())
    alpha = 0.2 * min(float(bn.value) / size, 1.0) if size > 0 else 1.0
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
    if zero_padded(layer):
        raise NotApplicable("zero padding: BN pads with the mean, BNP with zero")
    if problem.risk.coupled:
        raise NotApplicable("batch-coupled layers in the network already")
    if problem.risk.batches.number > 1:
        raise NotApplicable(f"{problem.risk.batches.number} batches: live statistics are those of one; give one batch")


def _own_gradient(problem: Problem, layer: Layer) -> Iterator[Check]:
    _require_live(problem, layer)
    risk, chart = problem.risk, _Map(problem, [layer])
    live = rewritten(risk, {layer.name: _front(LiveNorm(channel_axis(layer)))}).at(chart.to_z(risk.theta))
    positions, P = bnp_preconditioner(risk, q=1.0).blocks[layer.name]
    found, expected = live.gradient[positions], P.apply_transpose(risk.gradient[positions])
    yield agreement(
        f"{_OWN} [{label(layer)}]",
        "T9",
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
    axis = channel_axis(layer)
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
        "T9",
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
