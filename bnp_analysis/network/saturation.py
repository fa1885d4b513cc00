"""The effect of saturated functions on a risk's derivatives: amplified rounding, vanished derivatives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.network.kernels import derivative, nodes_of, recording, vector_jacobian
from bnp_analysis.network.precision import perturbed, worst_layer
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.smooth import Monitor, generic, monitoring
from bnp_analysis.runtime.trees import tensors_of

# An entry's error is taken for 32 roundings at least: room for what the argument of a smooth function has rounded,
# amplified so many times.
_ALLOWED = 8.0
#: An entry's error is taken for so many roundings at least.
ROUNDINGS = 32
# How often rounding is tried, and how many times more than seen it may be.
_TRIALS, _SAFETY = 3, 4
# Examples that are tried together.
_PART = 256
# Recorded operations that neither take differences of derivatives nor round more than a product does: of layers,
# activations, and what only moves numbers. Others are tried.
_TAME = {
    f"{name}Backward{k}"
    for k in range(2)
    for name in (
        *("Addmm", "Mm", "Bmm", "Baddbmm", "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Clone"),
        *("Expand", "Squeeze", "Unsqueeze", "Alias", "Slice", "Select", "Split", "Cat", "AsStrided", "ToCopy", "Add"),
        *("ConstantPadNd", "MaskedFill", "Flip", "Roll", "Repeat", "Index", "IndexSelect", "Gather", "PixelShuffle"),
        *("Convolution", "MaxPool2DWithIndices", "AvgPool2D", "Mean", "AdaptiveAvgPool2D", "Embedding", "Softmax"),
        *("Relu", "LeakyRelu", "Hardtanh", "Tanh", "Sigmoid", "Gelu", "Silu", "Elu", "Softplus", "LogSoftmax"),
        *("Where", "Unsafe", "Chunk", "Stack", "Unbind"),
    )
} | {"torch::autograd::AccumulateGrad", "SmoothBackward", "SoftmaxBackward"}

_NORMS = {"NativeLayerNormBackward0", "NativeBatchNormBackward0", "NativeGroupNormBackward0"}


def product_eps(risk: EmpiricalRisk) -> float:
    """The spacing at 1 of derivatives of the risk, whose relative errors smooth functions amplify by `|x f'' / f'|`.

    The derivative `sech^2 x` has `2 |x|` times the relative error of `x`, a normal density `x^2` times.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.tensor([[40.0]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False, dtype=torch.float64), torch.nn.Tanh())
        >>> _ = torch.nn.init.ones_(model[0].weight)
        >>> risk = bnp.EmpiricalRisk(model, torch.nn.functional.mse_loss, (x, y))
        >>> product_eps(risk) / risk.eps
        10.0
    """
    grown = _everywhere(risk, "what saturation amplifies", lambda: _amplification(risk), max)
    return max(risk.eps * max(1.0, float(grown) / _ALLOWED), _tried(risk)[0] / ROUNDINGS)


def has_vanished(risk: EmpiricalRisk) -> bool:
    """Whether some derivative or value of a smooth function is an exact zero, or nearly one, that is none by structure.

    The gradient of a random combination of the outputs is compared, wherever a smooth function gets it and in every
    parameter, with the same for derivatives of ordinary size.
    """
    found = _everywhere(risk, "vanished derivatives", lambda: any(_vanished(risk, b) for b in risk.batches), any)
    return bool(found) or _tried(risk)[1]


def _everywhere(risk: EmpiricalRisk, what: str, here: Callable[[], Any], join: Callable[[list[Any]], Any]) -> Tensor:
    """What all processes have found here, joined, once for a risk."""
    return risk.remembered(what, lambda: torch.tensor(join(risk.group.share(here, what)), dtype=torch.float64))


def _tried(risk: EmpiricalRisk) -> tuple[float, bool]:
    """How far rounding moves `J^T u`, relative, in the worst layer; and whether nothing is left of numbers behind it.

    Functions written by hand have whatever digits their operations leave: `x / sqrt(1 + x^2)` has the derivative
    `1 / s - x^2 / s^3`, in which nothing is left at `x = 1e4` in float32. A zero by a mask or a missing edge stays one.
    """

    def worst(found: list[list[tuple[float, bool]]]) -> list[float]:
        every = [one for own in found for one in own]
        return [max((doubt for doubt, _ in every), default=0.0), any(lost for _, lost in every)]

    doubt, lost = _everywhere(risk, "the rounding of products", lambda: [*_trials(risk)], worst).tolist()
    return doubt, bool(lost)


def _trials(risk: EmpiricalRisk) -> Iterator[tuple[float, bool]]:
    """Batches are tried in parts where they can be cut: gradients at operations inside the model are held."""
    for batch in risk.batches:
        size = tensors_of(batch.x)[0].shape[0]
        parts = [slice_batch(batch, k, k + _PART) for k in range(0, size, _PART)] if size > _PART else []
        if not parts or risk.coupled or None in parts:
            parts = [batch]
        try:
            found = [_trial(risk, part) for part in parts if part is not None]
        except InvalidInputError:  # made for one size of batch
            found = [_trial(risk, batch)]
        yield from found


@recording()
def _trial(risk: EmpiricalRisk, batch: Batch) -> tuple[float, bool]:
    plain = _pulled(risk, batch)
    if plain is None:
        return 0.0, False
    derivatives, inside = plain
    moved, lost = dict.fromkeys(derivatives, 0.0), False
    for seed in range(_TRIALS):
        trial = perturbed(seed, lambda: _pulled(risk, batch))
        if trial is None:  # rounding may take what is computed to where it is not defined
            return 1.0, True
        other = trial[0]
        if other is None or other[1].keys() != inside.keys():  # another branch of the model
            continue
        for k, g in inside.items():
            gap = (other[1][k] - g).abs()
            lost = lost or bool(((gap > 0) & (_SAFETY * gap >= g.abs())).any())
        # Where rounding can make a derivative no number, nothing is known of it: no NaN is smaller than another number.
        gaps = {n: _square(other[0][n] - t) for n, t in derivatives.items()}
        moved = {n: max(moved[n], gap if isfinite(gap) else inf) for n, gap in gaps.items()}
    worst = worst_layer({n: (moved[n], _square(t)) for n, t in derivatives.items()})
    return min(1.0, _SAFETY * worst**0.5), lost


def _tame(node: Any) -> bool:
    """Whether no derivatives cancel at an operation; a product with a constant is one of those.

    A normalization is one where what it normalizes is no small difference of large numbers (`|mean| / std`), and more
    than two numbers: of two, only their order is left, and no derivative but rounding.
    """
    if node.name() in _NORMS:
        mean, inverse, numbers = _normalized(node)
        return numbers > 2 and float((mean.abs() * inverse).detach().max()) <= _ALLOWED
    if node.name() in ("MulBackward0", "DivBackward0"):
        return all(argument is None for argument, _ in node.next_functions[1:])
    return node.name() in _TAME


def _normalized(node: Any) -> tuple[Tensor, Tensor, int]:
    """Means, inverse standard deviations and how many numbers each is of, at a normalization."""
    h = node._saved_input
    if node.name() == "NativeBatchNormBackward0" and not node._saved_training:
        return node._saved_running_mean, (node._saved_running_var + node._saved_eps).rsqrt(), h.numel()
    mean, inverse = node._saved_result1, node._saved_result2
    return mean, inverse, h.numel() // max(1, mean.numel())


def _square(t: Tensor) -> float:
    return float(t.detach().double().square().sum())


def _pulled(risk: EmpiricalRisk, batch: Batch) -> tuple[dict[str, Tensor], dict[int, Tensor]] | None:
    """`J^T u` for random `u` by parameters, and the gradients that arrive at arguments of operations that may cancel.

    None where no operation of the model can cancel.
    """
    leaves = risk.leaves()
    outputs = risk.batch_outputs(leaves, batch)
    nodes = nodes_of(outputs)
    arguments = {n for node in nodes if not _tame(node) for n, _ in node.next_functions if n is not None}
    if not outputs.requires_grad or not arguments:
        return None
    inside: dict[int, Tensor] = {}

    def note(k: int) -> Callable[[Any], None]:
        def arrived(gradients: Any) -> None:
            g = next((g for g in gradients if g is not None and not g._is_zerotensor()), None)
            if g is not None and g.is_floating_point():
                inside[k] = g.detach()

        return arrived

    g = torch.Generator().manual_seed(0)
    u = torch.randn(outputs.shape, generator=g, dtype=torch.float64).to(outputs)
    with ExitStack() as hooks:
        for k, node in enumerate(nodes):
            if node in arguments and not hasattr(node, "variable"):
                hooks.enter_context(node.register_prehook(note(k)))
        pulled = derivative(outputs, [*leaves.values()], u, what="the rounding of products")
    return dict(zip(leaves, pulled, strict=True)), inside


def _amplification(risk: EmpiricalRisk) -> float:
    tensors = risk.space.unflatten(risk.theta)
    with torch.no_grad(), monitoring() as monitor:
        for batch in risk.batches:
            risk.batch_loss(risk.batch_outputs(tensors, batch), batch)
    return monitor.amplification


@recording()
def _vanished(risk: EmpiricalRisk, batch: Batch) -> bool:
    with monitoring() as seen:
        real = _gradients(risk, batch, seen)
    if seen.vanished or not seen.edges:
        return seen.vanished
    with monitoring(structural=True) as ordinary:
        expected = _gradients(risk, batch, ordinary)
    if len(real) != len(expected):
        return True
    return any(
        bool((e != 0).any() if r is None else ((r.abs() < torch.finfo(r.dtype).tiny ** 0.5) & (e != 0)).any())
        for r, e in zip(real, expected, strict=True)
        if e is not None
    )


def _gradients(risk: EmpiricalRisk, batch: Batch, monitor: Monitor) -> list[Tensor | None]:
    leaves = risk.leaves()
    outputs = risk.batch_outputs(leaves, batch)
    if not outputs.requires_grad:
        return []
    wanted: Any = [*monitor.edges, *leaves.values()]
    return vector_jacobian(outputs, wanted, generic(outputs.detach()), allow_unused=True)
