"""The update `P P^T g` with `P` of the running statistics, and the same `P` for measurements."""

from __future__ import annotations

import math
import weakref
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.layer_kinds import Layer
from bnp_analysis.network.moments import Moments, without_start
from bnp_analysis.network.parameters import ParameterSpace
from bnp_analysis.precondition.base import layer_positions
from bnp_analysis.precondition.bnp import (
    RULES,
    BNPBlock,
    BNPPreconditioner,
    damped_variance,
    extensions,
    layer_block,
    scale_square,
    surviving_mean,
)
from bnp_analysis.training.bnp.layers import has_free_bias
from bnp_analysis.training.bnp.moments import Buffer, RunningMoments, distributed
from bnp_analysis.training.bnp.settings import Settings

# A layer's place among all, the layer, and the gradients of its weight and of its bias, None where that is not free.
Gradients = tuple[int, Layer, Tensor, Tensor | None]
Marks = dict[int, tuple[weakref.ref[Tensor], int]]

_DENSE = torch.strided
_POWER_STEPS = 5


def find_gradients(layers: Sequence[Layer], seen: Container[int], rows: Sequence[int]) -> list[Gradients]:
    """The gradients of the layers that took part.

    Args:
        layers: the candidates.
        seen: those with statistics in this step.
        rows: of each layer when it was last seen before, 0 for never.

    Raises:
        InvalidInputError: some of the layers seen have none, which are named, or all; sparse ones.
    """
    found: list[Gradients] = []
    missing: list[str] = []
    for i, layer in enumerate(layers):
        # Attributes of modules and tensors are slow; each is looked up once.
        owner: Any = layer.kind.parameter(layer.module)
        if owner is None or not owner.requires_grad or not (rows[i] or i in seen):
            continue
        own: Any = layer.module._parameters.get(layer.kind.bias) if layer.bias is not None else None
        free = own is not None and own.requires_grad
        weight, bias = owner.grad, own.grad if free else None
        if weight is None or (free and bias is None):
            if i in seen:
                missing += [layer.weight] if weight is None else []
                missing += [layer.bias] if free and bias is None and layer.bias is not None else []
            continue
        if type(weight) is not Tensor:
            weight, bias = (None if g is None else require_whole_units(layer, g) for g in (weight, bias))
        if not weight.is_floating_point():
            raise InvalidInputError(f"layer {layer.name!r} has become {weight.dtype} since BNP was made: make it anew")
        if weight.layout is not _DENSE or (bias is not None and bias.layout is not _DENSE):
            raise InvalidInputError(f"the gradient of layer {layer.name!r} is sparse; BNP needs dense gradients")
        found.append((i, layer, weight, bias))
    if not found:
        raise InvalidInputError("step() before any backward pass: no covered layer has a gradient")
    if len({id(weight) for _, _, weight, _ in found}) < len(found):
        owners = {id(weight): layer.name for _, layer, weight, _ in found}
        shared = [layer.name for _, layer, weight, _ in found if owners[id(weight)] != layer.name]
        raise InvalidInputError(
            f"layer {shared[0]!r} shares its weight with another one since BNP was made, and P P^T would be applied to "
            "the gradient twice: make it anew"
        )
    if missing:
        raise InvalidInputError(
            f"layers ran in the forward pass but have no gradient: {', '.join(missing)}. Let the loss depend on them, "
            "run such forward passes under torch.no_grad(), or leave the layers out with exclude="
        )
    return found


def require_whole_units(layer: Layer, tensor: Tensor) -> Tensor:
    """The part of a weight, a bias or a gradient that lies here, all of an ordinary one.

    `P P^T` acts on each unit by itself. Where a tensor is sharded by units (`fully_shard`) over all processes, the
    update of a part is the part of the update, and the inputs' moments are summed over processes as always.

    Raises:
        InvalidInputError: it is sharded otherwise: by inputs (tensor parallelism), over some of the processes, or the
            layer has groups of units.
    """
    if not hasattr(tensor, "to_local"):
        return tensor
    from torch.distributed.tensor import DTensor, Shard

    assert isinstance(tensor, DTensor)
    mesh, whole = tensor.device_mesh, tensor.placements == (Shard(0),)
    if (
        not whole
        or mesh.size() != dist.get_world_size()
        or layer.groups > 1
        or layer.kind.transposed
        or layer.kind.gain
    ):
        raise InvalidInputError(
            f"layer {layer.name!r} is sharded as {tensor.placements} over {mesh.size()} processes: BNP needs whole "
            "units, sharded over all processes (fully_shard), and sees the inputs of whole layers only. Use "
            "fully_shard or DistributedDataParallel, or leave the layer out with exclude="
        )
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


def marked(gradients: Sequence[Gradients], before: Marks) -> bool:
    """Whether one of the gradients is one that was marked, by whatever object, and was not written to since."""
    known = {(id(ref()), version) for ref, version in before.values()}
    return any((id(weight), weight._version) in known for _, _, weight, _ in gradients)


def marks(gradients: Sequence[Gradients]) -> Marks:
    """What tells these gradients from those that a later backward pass leaves."""
    return {place: (weakref.ref(weight), weight._version) for place, _, weight, _ in gradients}


def unchanged(gradients: Sequence[Gradients], before: Marks) -> bool:
    """Whether every gradient is the one that was marked, and was not written to since."""
    for place, _, weight, _ in gradients:
        ref, version = before.get(place, (None, 0))
        if ref is None or ref() is not weight or version != weight._version:
            return False
    return True


def with_bias_(weight: Tensor, bias: Tensor, mean: Tensor, damped: Tensor, q2: float) -> None:
    """`Gw' = (Gw - Gb mu^T)/s2/q2`, `Gb' = Gb/q2 - Gw' mu`, in place (T3).

    Args:
        weight: gradient `(n, ...)`, contiguous; changed.
        bias: gradient `(n,)`; changed.
        mean: `mu`, `(m,)`, or `(groups, m)` of several.
        damped: `s2`, like the mean.
        q2: `q^2`.

    Example:
        >>> gw, gb = torch.tensor([[2.0]]), torch.tensor([1.0])
        >>> with_bias_(gw, gb, torch.tensor([3.0]), torch.tensor([4.0]), 1.0)
        >>> gw.item(), gb.item()
        (-0.25, 1.75)
    """
    scale = 1 / q2
    # The fewest passes over the weights: on CPU each is a good part of the cost of a step.
    if mean.ndim == 1:
        w = weight if weight.ndim == 2 else weight.view(weight.shape[0], -1)
        w.addr_(bias, mean, beta=scale, alpha=-scale).div_(damped)
        bias.addmv_(w, mean, beta=scale, alpha=-1)
        return
    groups, m = mean.shape
    w, b = weight.view(groups, -1, m), bias.view(groups, -1, 1)
    w.baddbmm_(b, mean.unsqueeze(1), beta=scale, alpha=-scale).div_(damped.unsqueeze(1))
    b.baddbmm_(w, mean.unsqueeze(2), beta=scale, alpha=-1)


def without_bias_(weight: Tensor, mean: Tensor, damped: Tensor, q2: float) -> None:
    """`Gw' = Gw (diag s2 + mu mu^T)^-1 / q2`, in place; diagonal where `mu = 0` (T5).

    Args:
        weight: gradient `(n, ...)`, contiguous; changed.
        mean: `mu`, `(m,)`, or `(groups, m)` of several.
        damped: `s2`, like the mean.
        q2: `q^2`.

    Example:
        >>> gw = torch.tensor([[26.0]])
        >>> without_bias_(gw, torch.tensor([3.0]), torch.tensor([4.0]), 1.0)
        >>> round(gw.item(), 5)
        2.0
    """
    if mean.ndim == 1:
        mean, damped = mean.unsqueeze(0), damped.unsqueeze(0)
    w = weight.view(mean.shape[0], -1, mean.shape[1])
    # In terms of v = mu/sigma nothing overflows that need not.
    inverse = damped.rsqrt()
    v = mean * inverse
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    u = (v / norm.clamp_min(torch.finfo(v.dtype).tiny)).unsqueeze(2)
    shrink = (norm / torch.hypot(torch.ones_like(norm), norm)).square().unsqueeze(2)
    w.mul_(inverse.unsqueeze(1))
    w.sub_((w @ u) @ (shrink * u).transpose(1, 2)).mul_((inverse / q2).unsqueeze(1))


def divide_units_(weight: Tensor, bias: Tensor | None, squares: Tensor) -> None:
    """Each unit's part divided by its `s_i^2`, in place (T10).

    Example:
        >>> gw, gb = torch.ones(2, 3), torch.ones(2)
        >>> divide_units_(gw, gb, torch.tensor([1.0, 4.0])); gw.sum().item(), gb.tolist()
        (3.75, [1.0, 0.25])
    """
    s2 = squares.to(weight)
    weight.view(s2.numel(), -1).div_(s2.unsqueeze(1))
    if bias is not None:
        bias.div_(s2)


class DampedMoments:
    """Means and damped variances of each layer, channels repeated over their patches.

    Args:
        layers: in the order of the statistics.
        widths: how many means each has.
        eps1, eps2: damping.
    """

    def __init__(self, layers: Sequence[Layer], widths: Sequence[int], eps1: float, eps2: float) -> None:
        self._layers = tuple(layers)
        sizes = [layer.groups * layer.features for layer in layers]
        self._sizes, self._channelwise = sizes, [w != size for w, size in zip(widths, sizes, strict=True)]
        owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        source, begin = [], 0
        for layer, width, channelwise in zip(layers, widths, self._channelwise, strict=True):
            own = torch.arange(begin, begin + width)
            source.append(layer.expand(own).flatten() if channelwise else own)
            begin += width
        self._owner, self._source = owner, torch.cat(source)
        self._eps1, self._floor, self._repeats = eps1, eps2, any(self._channelwise)
        self._out: Tensor | None = None
        self._means: list[Tensor] = []
        self._damped: list[Tensor] = []

    def __call__(self, now: Buffer) -> tuple[list[Tensor], list[Tensor]]:
        """`mu` and `sigma^2 + eps1 max(sigma^2) + eps2`, 1 in place of a zero; `(m,)`, or `(groups, m)` of several."""
        means, s2 = now.shaped or self._prepare(now), self._s2
        top = torch.index_select(torch.add(self._eps2, now.largest, alpha=self._eps1), 0, self._owner)
        if self._repeats:
            torch.index_select(now.values, 1, self._source, out=self._out)
            s2.add_(top)
        else:
            torch.add(now.variance, top, out=s2)
        if not self._floor:
            s2.masked_fill_(s2 == 0, 1.0)
        return means, self._damped

    def _prepare(self, now: Buffer) -> list[Tensor]:
        """Where the results go, `(2, sum of m)`, and the views that each step needs, which are made once."""
        like = now.values
        if self._out is None or self._out.dtype is not like.dtype or self._out.device != like.device:
            self._owner, self._source = self._owner.to(like.device), self._source.to(like.device)
            self._eps2 = like.new_full((len(self._sizes),), self._floor)
            self._out = torch.empty(2, sum(self._sizes), dtype=like.dtype, device=like.device)
            self._s2 = self._out[1]
            self._means, self._damped = self._split(self._out[0]), self._split(self._s2)
        now.shaped = self._means if self._repeats else self._split(now.mean)
        return now.shaped

    def one(self, index: int, values: Tensor) -> Tensor:
        """The values of one layer's statistics, `(groups, m)`."""
        layer = self._layers[index]
        return layer.expand(values) if self._channelwise[index] else values.view(layer.groups, -1)

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = torch.split(flat, self._sizes)
        return [part if y.groups == 1 else part.view(y.groups, -1) for part, y in zip(parts, self._layers, strict=True)]


class MeasuredScale:
    """`|G^|^2 / R` of the rows of a step, by power steps that continue from the last ones (T8)."""

    def __init__(self) -> None:
        self.vector: Tensor | None = None

    def __call__(self, layer: Layer, inputs: Sequence[Tensor], mean: Tensor, s2: Tensor) -> float:
        """The largest over the groups, for inputs normalized by the mean and the damped variance."""
        mean, s2 = (t.view(-1, layer.features) for t in (mean, s2))
        v = mean / s2.sqrt()
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        u = v / norm.clamp_min(torch.finfo(v.dtype).tiny)
        shrink = 1 - 1 / torch.hypot(torch.ones_like(norm), norm)
        parts = []
        for h in inputs:
            g = layer.per_unit(layer.rows(h.to(mean.dtype)))
            if layer.bias is not None:
                g = torch.cat([(g - mean) / s2.sqrt(), g.new_ones(*g.shape[:2], 1)], dim=2)
            else:
                g = g / s2.sqrt()
                g = g - shrink * u * (g * u).sum(dim=2, keepdim=True)
            parts.append(g.transpose(0, 1))
        G = torch.cat(parts, dim=1)
        count = torch.tensor(float(G.shape[1]), dtype=G.dtype, device=G.device)
        _sum_over_processes(count)
        return self._iterate(G, count)

    def _iterate(self, G: Tensor, count: Tensor) -> float:
        x = self.vector
        if x is None or x.shape != (G.shape[0], G.shape[2], 1):
            x = G.new_ones(G.shape[0], G.shape[2], 1)
        # A little of everything, so that a start orthogonal to the new leading direction is left again.
        x = x.to(G) + 1e-3 * torch.cos(torch.arange(G.shape[2], dtype=G.dtype, device=G.device)).view(1, -1, 1)
        size = x.new_zeros(G.shape[0], 1, 1)
        for _ in range(_POWER_STEPS):
            x = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(torch.finfo(G.dtype).tiny)
            x = G.transpose(1, 2) @ (G @ x)
            _sum_over_processes(x)
            size = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        self.vector = x
        return float(size.max() / count) or 1.0


def _sum_over_processes(x: Tensor) -> None:
    """In place, where training is distributed."""
    if distributed():
        dist.all_reduce(x)


class OutputScales:
    """`s_i^2` of every unit: a running average of the squared gradients in its pre-activations.

    Sums `v_i = sum_r (dL/da_ir)^2` over the rows of a step, divided by their mean over all units that were seen: the
    scale of the loss, and with it a gradient scaler's, drops out. `s_i^2 = average(v_i) + eps1`, so that no unit's step
    grows more than `1/eps1`-fold. The exact scales need the curvature of the loss (`bnp_preconditioner`); squared
    gradients have that as their mean only where labels are drawn from the model, and miss one factor for all units.

    Args:
        layers: in the order of the statistics.
        rho: weight of the past.
        eps1: damping.
    """

    def __init__(self, layers: Sequence[Layer], rho: float, eps1: float) -> None:
        self._layers, self._rho, self._eps1 = tuple(layers), rho, eps1
        self.units = [layer.units for layer in layers]
        self._sums: dict[int, Tensor] = {}
        self.values: Tensor | None = None
        self.start = [1.0] * len(self.units)

    def receive(self, index: int, gradient: Tensor) -> None:
        """Take in the gradient at an output of a layer, from its hook."""
        g = gradient.detach()
        g = g.float() if g.dtype in (torch.float16, torch.bfloat16) else g
        total = self._layers[index].by_unit(g).square().sum(dim=0)
        before = self._sums.get(index)
        self._sums[index] = total if before is None else before + total

    def forget(self) -> None:
        """Leave out what came since the last step."""
        self._sums = {}

    def commit(self) -> None:
        """Take in what passed in a step, over all processes where training is distributed."""
        found, self._sums = self._sums, {}
        if not found:
            return
        some = next(iter(found.values()))
        parts = [found[i] if i in found else some.new_zeros(n) for i, n in enumerate(self.units)]
        sums = torch.cat(parts)
        _sum_over_processes(sums)
        old = torch.ones_like(sums) if self.values is None else self.values.to(sums)
        mean = sums.sum() / sum(self.units[i] for i in found)
        # Overflowed or vanished gradients say nothing: what was known goes on.
        relative = torch.where(torch.isfinite(mean) & (mean > 0), sums / mean, old)
        past = [without_start(self._rho, self.start[i]) if i in found else 1.0 for i in range(len(self.units))]
        weights = torch.cat([torch.full((n,), 1 - p, dtype=old.dtype) for n, p in zip(self.units, past, strict=True)])
        self.values = torch.lerp(old, relative, weights.to(old.device, non_blocking=True))
        for i in found:
            self.start[i] *= self._rho

    def squares(self, index: int) -> Tensor:
        """`s_i^2` of the units of a layer, 1 where there is neither gradient nor damping."""
        if self.values is None:
            return torch.ones(self.units[index])
        own = torch.split(self.values, self.units)[index] + self._eps1
        return torch.where(own > 0, own, torch.ones_like(own))

    def state(self, index: int) -> dict[str, Any]:
        """What a state dict keeps of a layer."""
        values = torch.ones(sum(self.units)) if self.values is None else self.values
        own = torch.split(values, self.units)[index].clone()
        return {"output_squares": own, "output_start": self.start[index]}

    def load(self, entries: Sequence[Any]) -> None:
        """Go on from the entries of `state`, layer by layer."""
        self.values = torch.cat([entry["output_squares"] for entry in entries])
        self.start = [float(entry["output_start"]) for entry in entries]
        self._sums = {}


class Update:
    """How each layer's statistics become its `P`.

    Args:
        settings: damping, `q`, form without a bias.
        layers: in the order of the statistics.
        running: their statistics.
        outputs: the scales of their units, if there are any.

    Attributes:
        q2: `q^2` of the last step, layer by layer.
        measured: the power iterations of each layer, used where `q` is measured.
        directions: the shapes of their vectors.
    """

    def __init__(
        self, settings: Settings, layers: Sequence[Layer], running: RunningMoments, outputs: OutputScales | None
    ) -> None:
        self._settings, self._layers, self._running, self._outputs = settings, layers, running, outputs
        self.measured = [MeasuredScale() for _ in layers]
        self.directions = [(layer.groups, layer.features + (layer.bias is not None), 1) for layer in layers]
        self.q2: dict[int, float] = {}
        self._damped = DampedMoments(layers, running.widths, settings.eps1, settings.eps2)

    def apply(self, found: Sequence[Gradients], inputs: Mapping[int, Sequence[Tensor]]) -> None:
        """Precondition the gradients; `inputs` are those of the step where `q` is measured."""
        running, outputs = self._running, self._outputs
        now, rows, examples = running.now, running.rows, running.examples
        assert now is not None
        means, damped = self._damped(now)
        kind, q = now.values.dtype, self._settings.q
        by_shape = q if isinstance(q, str) and q in RULES else ""
        diagonal = self._settings.bias_free == "diagonal"
        for i, layer, weight, bias in found:
            mean, s2 = means[i], damped[i]
            if bias is None and diagonal:
                mean, s2 = self._diagonal(i)
            elif layer.kind.gain:
                mean, variance = self._moments(i)
                s2 = damped_variance(variance, self._settings.eps1, self._settings.eps2)
            if by_shape and (bias is not None or not diagonal):
                q2 = scale_square(by_shape, layer.features, rows[i], examples[i])
            else:
                own = layer if bias is not None else replace(layer, bias=None)
                q2 = self._square(i, own, mean, s2, inputs.get(i, ()))
            self.q2[i] = q2
            # In the statistics' precision where the gradient's is lower.
            stored = layer.matrix(weight)
            w = stored if stored.dtype is kind and stored.is_contiguous() else stored.to(kind).contiguous()
            b = bias if bias is None or bias.dtype is kind else bias.to(kind)
            if b is None:
                without_bias_(w, mean, s2, q2)
            else:
                with_bias_(w, b, mean, s2, q2)
            if outputs is not None:
                divide_units_(w, b, outputs.squares(i))
            if w is not stored:
                stored.copy_(w)
            if b is not bias:
                bias.copy_(b)  # type: ignore[union-attr, arg-type] # both are None, or none is

    def _square(self, i: int, layer: Layer, mean: Tensor, s2: Tensor, inputs: Sequence[Tensor]) -> float:
        """`q^2` of a layer in this step, where shapes alone do not give it."""
        q, running = self._settings.q, self._running
        if not isinstance(q, str):
            return float(q) ** 2
        if q in RULES:
            mean, variance = self._moments(i)
            square = scale_square(q, layer.features, running.rows[i], running.examples[i])
            return square + surviving_mean(mean, variance + mean.square())
        if not inputs:
            return self.q2[i]
        return self.measured[i](layer, inputs, mean, s2)

    def _diagonal(self, index: int) -> tuple[Tensor, Tensor]:
        """What stands for the moments of a layer without a bias: no mean, damped second moments (T5)."""
        mean, variance = self._moments(index)
        second = variance + mean.square()
        return torch.zeros_like(mean), damped_variance(second, self._settings.eps1, self._settings.eps2)

    def preconditioner(
        self, space: ParameterSpace, covered: Collection[str], uncovered: Mapping[str, str]
    ) -> BNPPreconditioner:
        """`P` over a space, identity on what is not covered."""
        blocks, constant, seen = {}, {}, {}
        for i, layer in enumerate(self._layers):
            if layer.name in covered and layer.weight in space:
                free = layer.bias is not None and layer.bias in space and has_free_bias(layer)
                own = replace(layer, bias=layer.bias if free else None)
                block, still = self._block(own, i, space)
                blocks[layer.name] = (layer_positions(own, space), block)
                seen[own] = self._running.rows[i], self._running.examples[i]
                constant[layer.name] = tuple(torch.nonzero(still.flatten()).flatten().tolist())
        if covered and not blocks:
            raise InvalidInputError("space holds no weight of the layers that BNP acts on: it is of another model")
        settings = {**asdict(self._settings), "step": self._running.step}
        return BNPPreconditioner(
            space,
            blocks,
            settings=settings,
            constant_features=constant,
            uncovered=uncovered,
            extensions=extensions(self._settings.q, seen),
        )

    def _moments(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and variance `(groups, m)`, or `(units, m)` of what each unit's parameters meet."""
        return self._layers[index].unit_moments(*self._seen(index))

    def _seen(self, index: int) -> tuple[Tensor, Tensor]:
        """Mean and variance `(groups, m)` of the inputs."""
        mean, variance = self._running.of(index)
        return self._damped.one(index, mean), self._damped.one(index, variance)

    def _block(self, layer: Layer, i: int, space: ParameterSpace) -> tuple[BNPBlock, Tensor]:
        mean, variance = (m.detach().to(space.device, torch.float64, copy=True) for m in self._seen(i))
        moments = Moments(mean, variance, variance == 0, self._running.rows[i], self._running.examples[i])
        chosen = self._settings
        scales = None
        if self._outputs is not None:
            scales = self._outputs.squares(i).to(space.device, torch.float64).sqrt()
        block = layer_block(
            layer,
            moments,
            eps1=chosen.eps1,
            eps2=chosen.eps2,
            q=math.sqrt(self.q2[i]),
            bias_free=chosen.bias_free,
            output_scales=scales,
            dtype=space.dtype,
        )
        return block, moments.constant
