"""The same risk of a network with some modules replaced: oracles that compute a quantity another way."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bnp_analysis.linalg import Preconditioner
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.network.risk import Loss
from bnp_analysis.runtime.trees import tensors_of

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


def with_squared_outputs(risk: EmpiricalRisk) -> EmpiricalRisk:
    """The risk of the same network with the loss `|f|^2/2`, whose curvature in the outputs is the identity."""
    return rewritten(risk, loss=lambda outputs, y: outputs.square().flatten(1).sum(dim=1).mean() / 2)


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
    """A layer whose output gets a free offset, zero at the start: derivatives by it are those by pre-activations."""

    def __init__(self, layer: nn.Module, shape: torch.Size, like: Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        self.layer = layer

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.layer(h) + self.offset
        return out


class Affine(nn.Module):
    """`h -> d h + c`, feature by feature (channel by channel), in front of a layer."""

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
