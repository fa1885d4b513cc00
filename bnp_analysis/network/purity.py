"""Is the risk one function of theta? Random layers, batch coupling and losses that are not means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError, StochasticModelError
from bnp_analysis.network.batches import Batch, slice_batch, tensors_of

if TYPE_CHECKING:
    from bnp_analysis.network.risk import EmpiricalRisk

_DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)


def require_pure(risk: EmpiricalRisk) -> bool:
    """Refuse random models, and batch-coupled ones over several batches; say whether batches couple.

    Both are found by experiment, on the first batch that allows one: the same inputs under two random
    states, and with one example left out. The names are then read off the layers' types.

    Raises:
        StochasticModelError: names the layers, what would have been computed, the ways out.
    """
    tensors = risk.space.unflatten(risk.theta)
    coupled = False
    for batch in risk.batches:
        sampled, again = (_outputs(risk, tensors, batch, seed) for seed in (0, 1))
        if not torch.equal(sampled, again) and _differs(sampled, again):
            raise StochasticModelError(
                f"the model is random in training mode ({_named(risk, random_layers)}): every evaluation would use "
                "another mask, and products would belong to different functions. Call model.eval(), set p=0, or "
                "measure model.eval() with BatchNorm left in train mode"
            )
        coupled = coupled or _couples(risk, tensors, batch, sampled)
        if coupled or tensors_of(batch.x)[0].shape[0] > 1:
            break
    if coupled and risk.batches.number > 1:
        raise StochasticModelError(
            f"batch-coupled layers in training mode ({_named(risk, coupled_layers)}) over {risk.batches.number} "
            "batches: each batch would be normalized by its own statistics, so the risk would depend on how the "
            "data are split, and no product would be that of the whole data set. Call model.eval() to measure at "
            "running statistics, or give all the data as one batch (x, y)"
        )
    return coupled


def _outputs(risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch, seed: int) -> Tensor:
    devices = [risk.space.device] if risk.space.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return risk.batch_outputs(tensors, batch)


def _differs(a: Tensor, b: Tensor) -> bool:
    """Different beyond what another summation order explains."""
    if a.shape != b.shape:
        return True
    scale = float(b.abs().max()) if b.numel() else 0.0
    return bool(((a - b).abs() > scale * torch.finfo(b.dtype).eps ** 0.5).any())


def _couples(risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch, whole: Tensor) -> bool:
    size = tensors_of(batch.x)[0].shape[0]
    part = slice_batch(batch, 0, size - 1) if size > 1 else None
    if part is None or whole.ndim == 0 or whole.shape[0] != size:
        # One example, or no batch dimension to cut: judged by the types of the layers.
        return bool(coupled_layers(risk))
    try:
        fewer = _outputs(risk, tensors, part, 0)
    except ValueError:
        # BatchNorm refuses a single row.
        return bool(coupled_layers(risk))
    return _differs(fewer, whole[: size - 1])


def random_layers(risk: EmpiricalRisk) -> list[str]:
    """Names of layers that draw random numbers in training mode."""
    found = []
    for name, module in risk.modules():
        active = isinstance(module, _DROPOUTS) and module.p > 0
        active = active or isinstance(module, nn.RReLU)
        inner = getattr(module, "dropout", 0.0)
        active = active or (isinstance(module, nn.MultiheadAttention | nn.RNNBase) and float(inner) > 0)
        if active and module.training:
            found.append(name or type(module).__name__)
    return found


def coupled_layers(risk: EmpiricalRisk) -> list[str]:
    """Names of layers that normalize by the statistics of the batch."""
    found = []
    for name, module in risk.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            found.append(name or type(module).__name__)
    return found


def _named(risk: EmpiricalRisk, find: object) -> str:
    names = find(risk) if callable(find) else []
    return ", ".join(names) if names else "no layer of a known type: look for functional calls in forward()"


def require_mean_loss(risk: EmpiricalRisk) -> None:
    """Refuse a loss that is not a mean over the batch, where several batches are averaged.

    Raises:
        InvalidInputError: says what the risk would have been.
    """
    for batch in risk.batches:
        verdict = is_mean(risk, batch)
        if verdict is False:
            raise InvalidInputError(
                "the loss is not a mean over the batch: halves of a batch do not average to the whole. Over several "
                "batches, weighted by their sizes, a sum would count large batches twice over. Use "
                "reduction='mean', or give all the data as one batch (x, y)"
            )
        if verdict is not None:
            return


def is_mean(risk: EmpiricalRisk, batch: Batch) -> bool | None:
    """Whether the losses of two parts of a batch average to that of the whole; None if it cannot be cut."""
    size = tensors_of(batch.x)[0].shape[0]
    with torch.no_grad():
        outputs = risk.batch_outputs(risk.space.unflatten(risk.theta), batch)
        if size < 2 or outputs.ndim == 0 or outputs.shape[0] != size:
            return None
        cut = max(1, size // 3)
        head, tail = slice_batch(batch, 0, cut), slice_batch(batch, cut, size)
        if head is None or tail is None:
            return None
        whole = float(risk.batch_loss(outputs, batch))
        first, second = float(risk.batch_loss(outputs[:cut], head)), float(risk.batch_loss(outputs[cut:], tail))
    left, right = risk.batches.weigh(head), risk.batches.weigh(tail)
    mean = (left * first + right * second) / ((left + right) or 1.0)
    scale = max(abs(first), abs(second), abs(whole))
    return abs(mean - whole) <= 1e-3 * scale + torch.finfo(risk.space.dtype).tiny
