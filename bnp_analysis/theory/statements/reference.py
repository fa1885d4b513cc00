"""Oracles: the same risk with modules replaced, and BNP of one layer written out, dense, from its definition."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnp_analysis.linalg import ConditionNumber, MatrixOperator, Preconditioner, singular_condition_number
from bnp_analysis.network import EmpiricalRisk, Layer
from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.network.risk import Loss
from bnp_analysis.precondition import BlockDiagonal, BNPBlock, BNPPreconditioner
from bnp_analysis.runtime.trees import tensors_of
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, dense, passing

Replace = Mapping[str, Callable[[nn.Module], nn.Module]]


def rewritten(
    risk: EmpiricalRisk,
    replace: Replace | None = None,
    *,
    batches: Sequence[Batch] | None = None,
    loss: Loss | None = None,
) -> EmpiricalRisk:
    """The risk of the same network, loss and data with some modules replaced, at the same parameters.

    Parameters keep their place in the flat vector where a replacement holds the module it replaces and no parameters
    before it.

    Args:
        risk: the empirical risk.
        replace: name of a module -> a function from a copy of it to its replacement.
        batches: other data, made of the risk's.
        loss: another loss.

    Returns:
        A new `EmpiricalRisk`.
    """
    model = copy.deepcopy(dict(risk.modules())[""])
    tensors = risk.named_tensors()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
            parameter.requires_grad_(name in risk.space)
    for name, make in (replace or {}).items():
        if not name:
            model = make(model)
            continue
        above, _, leaf = name.rpartition(".")
        parent = model.get_submodule(above)
        setattr(parent, leaf, make(getattr(parent, leaf)))
    # The modules put in may leave derivatives out on purpose, as BN does through its statistics.
    derivatives = "surrogate" if replace else risk.derivatives
    return _risk_of(model, risk, batches, output=risk.output, loss=loss, derivatives=derivatives)


def _risk_of(
    model: nn.Module,
    risk: EmpiricalRisk,
    batches: Sequence[Batch] | None = None,
    *,
    output: Callable[[Any], Tensor] | None = None,
    loss: Loss | None = None,
    derivatives: Literal["exact", "surrogate"] | None = None,
) -> EmpiricalRisk:
    """The risk of another network with the data of this one and, unless given another, its loss."""

    def same(outputs: Tensor, y: Any) -> Tensor:
        return risk.batch_loss(outputs, Batch(None, y, 1.0, 0))

    def count(pair: Any) -> float:
        x, y = pair
        return risk.batches.weigh(Batch(x, y, float(tensors_of(x)[0].shape[0]), 0))

    data = [(batch.x, batch.y) for batch in (risk.batches if batches is None else batches)]
    return EmpiricalRisk(
        model, loss or same, data, output=output, count=count, derivatives=derivatives or risk.derivatives
    )


def first_examples(risk: EmpiricalRisk, count: int) -> list[Batch]:
    """The first examples of the first batch, or all of it where it cannot be cut."""
    batch = next(iter(risk.batches))
    part = slice_batch(batch, 0, count)
    return [batch if part is None else part]


class InCoordinates(nn.Module):
    """The network as a function of `z`, `theta = P z` with a dense `P`: gradient descent here is that of T2.

    Args:
        risk: of the network in its own parameters.
        matrix: `P`, `(n, n)`.
    """

    matrix: Tensor

    def __init__(self, risk: EmpiricalRisk, matrix: Tensor) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.linalg.solve(matrix, risk.theta))
        self.register_buffer("matrix", matrix)

        # A function, not an attribute: the copy that a risk makes of its model need not copy another risk.
        def run(theta: Tensor, x: Any) -> Tensor:
            return risk.batch_outputs(risk.space.unflatten(theta), Batch(x, None, 1.0, 0))

        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._run(self.matrix @ self.z, kwargs or args)


def in_coordinates(risk: EmpiricalRisk, P: Preconditioner) -> EmpiricalRisk:
    """The risk as a function of `z = P^-1 theta`, differentiated through the dense product `P z`."""
    return _risk_of(InCoordinates(risk, P.to_dense()), risk)


class Offset(nn.Module):
    """Adds a free offset, zero at the start: derivatives by it are those by what it is added to."""

    def __init__(self, shape: torch.Size, like: Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.offset


class Affine(nn.Module):
    """`h -> scale h + shift`, feature by feature (channel by channel), in front of a layer."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self._axis = axis

    def forward(self, h: Tensor) -> Tensor:
        shape = [-1 if d == self._axis % h.ndim else 1 for d in range(h.ndim)]
        return h * self.scale.view(shape) + self.shift.view(shape)


class LiveNorm(nn.Module):
    """Batch normalization of a layer's input by the statistics of the batch, eps = 0; constant features keep 1.

    Args:
        axis: of the features or channels.
        through: whether statistics are differentiated.
    """

    def __init__(self, axis: int, through: bool = True) -> None:
        super().__init__()
        self._axis, self._through = axis, through

    def forward(self, h: Tensor) -> Tensor:
        others = [d for d in range(h.ndim) if d != self._axis % h.ndim]
        source = h if self._through else h.detach()
        mean = source.mean(dim=others, keepdim=True)
        variance = (source - mean).square().mean(dim=others, keepdim=True)
        size = h.detach().abs().amax(dim=others, keepdim=True)
        constant = variance.detach() <= (8 * torch.finfo(h.dtype).eps * size) ** 2
        return (h - mean) / torch.where(constant, torch.ones_like(variance), variance).sqrt()


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """Mean and biased variance of a layer's inputs, `(groups, m)`, and which of them never change."""

    mean: Tensor
    variance: Tensor
    constant: Tensor

    def damped(self, eps1: float = 0.0, eps2: float = 0.0) -> Tensor:
        """`sigma^2 + eps1 max(sigma^2) + eps2`, 1 in place of a zero."""
        s2 = self.variance + eps1 * self.variance.max() + eps2
        return torch.where(s2 > 0, s2, torch.ones_like(s2))

    def normalized(self, rows: Tensor) -> Tensor:
        """Rows `(R, groups, m)`, centred and divided by their deviations."""
        return (rows - self.mean) / self.damped().sqrt()


def own_moments(problem: Problem, layer: Layer, statistics: str = "channel") -> LayerMoments:
    """The moments from all values at once: of each entry of a patch, or of each input channel, repeated."""
    if statistics == "patch" or dense(layer):
        return moments_of(problem.rows[layer.name], layer)
    return moments_of(torch.cat([channel_values(layer, h) for h, _ in passing(problem.risk, layer.name)]), layer)


def moments_of(values: Tensor, layer: Layer) -> LayerMoments:
    """The moments of rows, `(R, groups, m)`, or of the values of input channels, `(R, channels)`."""
    mean, variance = values.mean(dim=0), values.var(dim=0, unbiased=False)
    low, high = values.amin(dim=0), values.amax(dim=0)
    constant = high - low <= 8 * torch.finfo(values.dtype).eps * torch.maximum(low.abs(), high.abs())
    found = mean, torch.where(constant, torch.zeros_like(variance), variance), constant
    return LayerMoments(*(per_entry(t, layer) if t.ndim == 1 else t for t in found))


def channels(layer: Layer) -> int:
    """Features or channels of a layer's input."""
    return layer.groups * layer.features // layer.patch


def per_entry(values: Tensor, layer: Layer) -> Tensor:
    """A number per input channel, repeated for every entry of a patch: `(groups, m)`."""
    return values.repeat_interleave(layer.patch).view(layer.groups, layer.features)


def per_unit(values: Tensor, layer: Layer) -> Tensor:
    """The numbers of each unit's group, `(units, m)`; values `(groups, m)`."""
    return values[torch.arange(layer.units) // (layer.units // layer.groups)]


def channel_axis(layer: Layer) -> int:
    """The axis of a layer's input that runs over features or channels, from the end."""
    module: Any = layer.module
    return -1 if dense(layer) else -1 - len(module.kernel_size)


def channel_values(layer: Layer, h: Tensor) -> Tensor:
    """The values of each feature or channel of a layer's input or output, `(R, channels)`."""
    return h.movedim(channel_axis(layer), -1).reshape(-1, h.shape[channel_axis(layer)])


def zero_padded(layer: Layer) -> bool:
    """Whether a convolution pads with zeros, which no map in front of it changes."""
    module: Any = layer.module
    if dense(layer) or module.padding_mode != "zeros":
        return False
    return module.padding != "valid" if isinstance(module.padding, str) else any(module.padding)


def scale(layer: Layer, rows: int, rule: str = "rows", examples: int = 1) -> float:
    """`q = sqrt(max(m/R, 1))`, or `sqrt(max(m/N, sqrt(R/N)))` of the rule "paper"."""
    if rule == "paper":
        return math.sqrt(max(layer.features / examples, math.sqrt(rows / examples)))
    return math.sqrt(max(layer.features / rows, 1.0))


def extended(rows: Tensor, bias: bool = True) -> Tensor:
    """`[H, e]` in torch's order, or `H` without a bias; rows `(R, m)`."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) if bias else rows


def singular(matrix: Tensor) -> ConditionNumber:
    """The effective condition number of the singular values, by a QR first."""
    return singular_condition_number(MatrixOperator(matrix, exact=False))


def kappa_of_rank(matrix: Tensor, rank: int) -> float:
    """The ratio of the largest singular value to that of a rank, infinite where this is zero."""
    values = torch.linalg.svdvals(matrix)
    return float(values[0] / values[rank - 1]) if float(values[rank - 1]) > 0 else math.inf


def decided_rank(values: Tensor, floor: float, gap: float, what: str = "") -> int:
    """The rank from descending singular values, where a gap decides it.

    Args:
        values: the first is not zero.
        floor: values below it are rounding.
        gap: between the last that counts and the first that does not.
        what: whose rank, in words.

    Raises:
        NotApplicable: values on both sides of the rounding level are too close.
    """
    rank = int((values > floor).sum())
    if rank < len(values) and float(values[rank - 1]) < gap * float(values[rank]):
        raise NotApplicable(
            f"the rank {what}is not decided: singular values go from {float(values[rank - 1]):.2g} to "
            f"{float(values[rank]):.2g} around the rounding level {floor:.2g} without a gap"
        )
    return rank


def singular_values(F: Tensor) -> Tensor:
    """Of a factor, by its triangle where it has more rows than columns."""
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(F, mode="r")[1] if F.shape[0] > F.shape[1] else F)
    return values


def block_of(P: object, layer: Layer) -> BNPBlock:
    """The part of a BNP preconditioner on a layer.

    Raises:
        NotApplicable: it is not BNP's.
    """
    found = P.blocks.get(layer.name, (None, None))[1] if isinstance(P, BlockDiagonal) else None
    if not isinstance(P, BNPPreconditioner) or not isinstance(found, BNPBlock):
        raise NotApplicable(f"the preconditioner is {type(P).__name__}, not BNP's")
    return found


def of_group(block: BNPBlock, layer: Layer, group: int) -> Tensor:
    """The dense `P` of the first output unit of a group."""
    return block.unit(group * (layer.units // layer.groups)).to_dense()
