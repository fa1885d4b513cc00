"""Running statistics (T4), those of a convolution (T6), and BN compared with BNP (Prop. 7, T9)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bnp_analysis.linalg import MatrixOperator, condition_number
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.network import EmpiricalRisk, Layer
from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.network.moments import corrected_rho, update_moments
from bnp_analysis.precondition import BlockDiagonal, BNPBlock, bnp_preconditioner
from bnp_analysis.precondition.base import layer_positions
from bnp_analysis.runtime.trees import tensors_of
from bnp_analysis.theory.check import Check, Source
from bnp_analysis.theory.statements.setting import (
    LayerMoments,
    LiveNorm,
    NotApplicable,
    Offset,
    Problem,
    agreement,
    at_least,
    at_most,
    channel_axis,
    channel_values,
    channels,
    dense,
    distance,
    extended,
    label,
    moments_of,
    own_moments,
    passing,
    per_layer,
    refused,
    rewritten,
    singular,
    statement,
    zero_padded,
)

_T4 = "running statistics are mean and variance of a mixture of all rows seen"
_PROP_10 = "|mu(t, a, p) - mu(p)| <= (k-1)(1/(2r) + 1/(2s) - (k-1)/(4rs)) max|h|"
_T6 = "per-patch statistics center and scale every entry of a patch"
_CHANNELS = "per-channel statistics center and scale every entry of a patch"
_ROWS = 2_000
_RHO = 0.9
_PROP_7 = "one step of gradient descent with BN, not differentiated through its statistics, is one step of BNP"
_SECOND = "the second step is another one when the mini-batch changes"
_T9 = "gradient descent on the network with BN at fixed statistics is BNP"
_OWN = "with live statistics a layer's own gradient is P^T grad"
_BELOW = "with live statistics (I - ee^T/R - gg^T/R) acts on what is passed below"
_STEPS = 6
_NONE: Mapping[str, LayerMoments] = {}


@statement(Source.T4, _T4)
@per_layer(_T4)
def check_running_statistics(problem: Problem, layer: Layer) -> Iterator[Check]:
    """T4: the law of total variance along random splits of each layer's rows, one-row batches among them."""
    rows = problem.rows[layer.name][:_ROWS, 0]
    if len(rows) < 3:
        raise NotApplicable(f"{len(rows)} rows cannot be split")
    g = problem.random(4)
    first, second = (_split(rows, g) for _ in range(2))
    rhos = [_RHO] * len(first)
    found = _run(first, rhos)
    details: dict[str, float] = {"rows": len(rows), "batches": len(first), "smallest batch": min(map(len, first))}
    yield agreement(_T4, found, _mixture(first, rhos, start=True), details=details)
    corrected = _run(first, [corrected_rho(_RHO, k + 1) for k in range(len(first))])
    words = "with the corrected start the start (0, 1) weighs nothing"
    yield agreement(words, corrected, _mixture(first, rhos, start=False))
    both = torch.cat([_run(split, _cumulative(split)) for split in (first, second)])
    exact = torch.cat([rows.mean(dim=0), rows.var(dim=0, unbiased=False)])
    moved = float((found - _run(second, [_RHO] * len(second))).norm() / exact.norm())
    details = {"with a constant rho two splits differ by": moved}
    yield agreement("with cumulative counts the split does not matter", both, exact.repeat(2), details=details)


def _split(rows: Tensor, g: torch.Generator) -> list[Tensor]:
    """Parts of random sizes, the first of one row."""
    sizes, left = [1], len(rows) - 1
    while left:
        sizes.append(min(int(torch.randint(1, max(len(rows) // 4, 2), (1,), generator=g)), left))
        left -= sizes[-1]
    return list(torch.split(rows, sizes))


def _run(batches: Sequence[Tensor], rhos: Sequence[float]) -> Tensor:
    mean = torch.zeros(batches[0].shape[1], dtype=batches[0].dtype)
    var = torch.ones_like(mean)
    for batch, rho in zip(batches, rhos, strict=True):
        mean, var = update_moments(mean, var, batch.mean(dim=0), batch.var(dim=0, unbiased=False), rho)
    return torch.cat([mean, var])


def _cumulative(batches: Sequence[Tensor]) -> list[float]:
    seen, rhos = 0, []
    for batch in batches:
        rhos.append(seen / (seen + len(batch)))
        seen += len(batch)
    return rhos


def _mixture(batches: Sequence[Tensor], rhos: Sequence[float], *, start: bool) -> Tensor:
    """Mean and variance of all rows at once, with their weights; the start is a row of mean 0 and variance 1."""
    after = [math.prod(rhos[k + 1 :]) for k in range(len(rhos))]
    parts = zip(batches, rhos, after, strict=True)
    weights = torch.cat([batch.new_full((len(batch),), (1 - r) * a / len(batch)) for batch, r, a in parts])
    rows = torch.cat(list(batches))
    first = math.prod(rhos) if start else 0.0
    total = float(weights.sum()) + first
    mean = (weights[:, None] * rows).sum(dim=0) / total
    var = ((weights[:, None] * (rows - mean) ** 2).sum(dim=0) + first * (1 + mean**2)) / total
    return torch.cat([mean, var])


@statement(Source.T6, _T6)
def check_patch_statistics(problem: Problem) -> Iterator[Check]:
    """T6: convolutions only; dense layers do not distinguish the two."""
    if all(map(dense, problem.layers)):
        raise NotApplicable("no convolution")
    yield from _patches(problem)


@per_layer(_T6, only=lambda layer: not dense(layer))
def _patches(problem: Problem, layer: Layer) -> Iterator[Check]:
    rows = problem.rows[layer.name]
    G = {which: own_moments(problem, layer, which).normalized(rows) for which in ("channel", "patch")}
    kept = ~own_moments(problem, layer, "patch").constant
    mean, std = G["patch"].mean(dim=0)[kept], G["patch"].std(dim=0, unbiased=False)[kept]
    expected = torch.cat([torch.zeros_like(mean), torch.ones_like(std)])
    details = {"entries": int(kept.sum())}
    yield agreement(_T6, torch.cat([mean, std]), expected, given=("convolution",), details=details)
    if layer.bias is not None:
        P = bnp_preconditioner(problem.risk, statistics="patch").blocks[layer.name][1]
        assert isinstance(P, BNPBlock)
        found = P.normalized(rows)[..., : layer.features] * P.q
        yield agreement("the per-patch preconditioner makes these rows", found, G["patch"])
    yield _agree(problem, layer, G)


def _agree(problem: Problem, layer: Layer, G: dict[str, Tensor]) -> Check:
    """Whether both statistics are the same, where every patch entry runs over all values of its channel."""
    module: Any = layer.module
    positions = sum(h.numel() // channels(layer) for h, _ in passing(problem.risk, layer.name))
    same = module.padding_mode == "circular" and all(s == 1 for s in module.stride)
    details = {"largest mean in sigma": float(G["channel"].mean(dim=0).abs().max())} | _effect(problem, layer, G)
    if same and len(problem.rows[layer.name]) == positions:
        return agreement(_CHANNELS, G["channel"], G["patch"], bound=1e-8, details=details)
    effect = ", ".join(f"{key} {value:.3g}" for key, value in details.items())
    return refused(_CHANNELS, f"not circular padding with stride 1; measured: {effect}", details=details)


def _effect(problem: Problem, layer: Layer, G: dict[str, Tensor]) -> dict[str, float]:
    """What the choice does to the inputs and to the layer's block."""
    found: dict[str, float] = {}
    for which, rows in G.items():
        matrix = extended(rows[:, 0])
        found[f"kappa*(G^) {which}"] = singular(matrix).value
        found[f"|G^|^2/R {which}"] = float(torch.linalg.matrix_norm(matrix, 2)) ** 2 / len(matrix)
    inner = problem.of(problem.risk.restrict(problem.risk.space.layer_names(layer.name)))
    if inner.risk.space.dim <= problem.limit:
        A = GramOperator(MatrixOperator(inner.factor, exact=False))
        for which in G:
            P = bnp_preconditioner(inner.risk, statistics=which)
            found[f"kappa* of the block {which}"] = condition_number(A, preconditioner=P).value
    return found


@statement(Source.PROP_10, _PROP_10)
def check_padded_means(problem: Problem) -> Iterator[Check]:
    """Prop. 10: attained by constant maps over sizes and kernels, beyond its domain false; and on the layers."""
    yield from _maps(problem.random(10))
    yield from _padded(problem)


def mean_bound(size: Sequence[int], reach: Sequence[int]) -> float:
    """The bound over `max|h|` for spatial `size` and `reach = (k - 1)/2`: the largest share of padded entries.

    `1 - prod(1 - reach/size)`; in two dimensions with a square kernel the paper's
    `(k-1)(1/(2r) + 1/(2s) - (k-1)/(4rs))`. One and three dimensions, other kernels and dilation are our extension.

    Example:
        >>> mean_bound((8, 8), (1, 1)) == 2 * (1 / 16 + 1 / 16 - 2 / (4 * 64))
        True
    """
    return 1 - math.prod(1 - d / n for n, d in zip(size, reach, strict=True))


def _entry_means(h: Tensor, k: int) -> Tensor:
    """Means of every kernel entry over images and positions, `(channels, k^2)`; images `(N, c, r, s)`."""
    return nn.functional.unfold(h, k, padding=k // 2).mean(dim=(0, 2)).view(h.shape[1], k * k)


def _maps(g: torch.Generator) -> Iterator[Check]:
    inside = [(r, s, k) for r, s in ((2, 2), (3, 5), (8, 8), (1, 9), (4, 32)) for k in (1, 3, 5, 7)]
    inside = [(r, s, k) for r, s, k in inside if k // 2 <= max(r, s)]
    attained, random = 0.0, 0.0
    for r, s, k in inside:
        bound = mean_bound((r, s), (k // 2, k // 2))
        for constant in (True, False):
            noise = torch.randn(2, 3, r, s, generator=g, dtype=torch.float64)
            h = torch.ones_like(noise) if constant else noise
            gap = float((_entry_means(h, k) - h.mean(dim=(0, 2, 3))[:, None]).abs().max() / h.abs().max())
            if constant and min(r, s) >= k // 2:
                attained = max(attained, abs(gap - bound))
            random = max(random, gap / bound if k > 1 else gap / 1e-12)
    where, domain = f"{len(inside)} sizes and kernels", "stride 1, zero padding, odd k"
    words = f"a constant map attains the bound [the largest difference over {where}]"
    yield at_most(words, attained, 1e-13, given=(domain,))
    words = f"{_PROP_10} [the largest ratio over {where}, constant and random maps]"
    yield at_most(words, random, 1.0, tolerance=1e-12, given=(domain, "(k - 1)/2 <= max(r, s)"))
    yield at_least(
        "where (k - 1)/2 > max(r, s) it is false [k = 7 on a constant 2 x 2 map]",
        float((_entry_means(torch.ones(1, 1, 2, 2, dtype=torch.float64), 7) - 1).abs().max()),
        1.3 * mean_bound((2, 2), (3, 3)),
        hypotheses={"(k - 1)/2 <= max(r, s)": False},
    )


@per_layer(_PROP_10, only=lambda layer: not dense(layer))
def _padded(problem: Problem, layer: Layer) -> Iterator[Check]:
    module: Any = layer.module
    dims = len(module.kernel_size)
    reach = [d * (k - 1) // 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    same = module.padding == "same" or tuple(module.padding) == tuple(reach)
    odd = all(k % 2 for k in module.kernel_size)
    if not (odd and same and module.padding_mode == "zeros" and set(module.stride) == {1}):
        raise NotApplicable("not a zero-padded convolution of odd kernel and stride 1 that keeps the size")
    seen = [h for h, _ in passing(problem.risk, layer.name)]
    size = tuple(seen[0].shape[-dims:])
    if any(tuple(h.shape[-dims:]) != size for h in seen):
        raise NotApplicable("images of several sizes")
    if sum(d > n for d, n in zip(reach, size, strict=True)) > 1:
        raise NotApplicable(f"the kernel reaches {reach}, beyond the whole image {size}")
    gap, bound = problem.rows[layer.name].mean(dim=0) - own_moments(problem, layer).mean, mean_bound(size, reach)
    yield at_most(
        _PROP_10,
        float(gap.abs().max()),
        bound * max(float(h.abs().max()) for h in seen),
        tolerance=1e-12,
        given=("stride 1, zero padding, odd k", "(k - 1)/2 <= max(r, s)"),
        details={"bound over max|h|": bound, "extension": dims != 2 or len({*reach}) > 1},
    )


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
