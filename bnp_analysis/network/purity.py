"""Is the risk one function of theta? Random layers, batch coupling and losses that are not means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bnp_analysis.distributed.nested import tensors_of
from bnp_analysis.errors import InvalidInputError, StochasticModelError
from bnp_analysis.network.batches import Batch, slice_batch, with_examples
from bnp_analysis.network.precision import generic_point
from bnp_analysis.network.randomness import random_state

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

    Layers of known types count if they run. Anything else is found by experiment on the first batch that allows
    one, at a point near `theta` (a zero output layer hides all that happens below it): the same inputs under
    several random states, and with other examples beside the first ones.

    Raises:
        StochasticModelError: names the layers, what would have been computed, the ways out.
    """
    found = risk.group.share(lambda: _couples_here(risk), "what couples examples")
    coupled = any(c for c, _ in found)
    normalizing = list(dict.fromkeys(name for _, names in found for name in names))
    if coupled and risk.batches.everywhere > 1:
        raise StochasticModelError(
            f"batch-coupled layers in training mode ({_named(normalizing)}) over {risk.batches.everywhere} "
            "batches: each batch would be normalized by its own statistics, so the risk would depend on how the "
            "data are split, and no product would be that of the whole data set. Call model.eval() to measure at "
            "running statistics, or give all the data as one batch (x, y)"
        )
    return coupled


def _couples_here(risk: EmpiricalRisk) -> tuple[bool, list[str]]:
    """Whether this process's batches couple their examples, and by which layers."""
    random = _that_run(risk, random_layers(risk))
    normalizing = _that_run(risk, coupled_layers(risk))
    coupled = bool(normalizing)
    tensors = risk.space.unflatten(generic_point(risk))
    for batch in risk.batches:
        if not bool(torch.isfinite(_outputs(risk, tensors, batch, 0)).all()):
            tensors = risk.space.unflatten(risk.theta)
        outputs = [_outputs(risk, tensors, batch, seed) for seed in (0, 1, 2)]
        differ = any(_differs(risk, outputs[0], other) for other in outputs[1:])
        if differ and not random and (kept := _kept_between_calls(risk, tensors, batch)):
            raise StochasticModelError(
                f"the model keeps something between its calls ({', '.join(kept)}): the same inputs under the same "
                "random numbers gave two outputs, so every evaluation would be of another function. Let forward() "
                "begin from a fixed state, or take the state as an input and return it"
            )
        if random or differ:
            raise StochasticModelError(
                f"the model is random in training mode ({_named(random)}): every evaluation would use "
                "another mask, and products would belong to different functions. Call model.eval(), set p=0, or "
                "measure model.eval() with BatchNorm left in train mode"
            )
        _require_determined_loss(risk, batch, outputs[0])
        coupled = coupled or _couples(risk, tensors, batch, outputs[0])
        if coupled or tensors_of(batch.x)[0].shape[0] > 1:
            break
    return coupled, normalizing


def _that_run(risk: EmpiricalRisk, names: list[str]) -> list[str]:
    """Those of the named layers whose forward runs."""
    ran: set[str] = set()
    if names:
        with random_state(device=risk.space.device):
            risk.capture(lambda name, module, args, output: ran.add(name), names)
    return [name for name in names if name in ran]


def _outputs(risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch, seed: int) -> Tensor:
    with torch.no_grad(), random_state(seed=seed, device=risk.space.device):
        return risk.batch_outputs(tensors, batch)


def _kept_between_calls(risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch) -> list[str]:
    """What the model's modules keep from one call to the next, where that changes the outputs: attributes, by name."""
    first = _outputs(risk, tensors, batch, 0)

    def held() -> dict[str, int]:
        return {f"{name}.{key}".lstrip("."): id(value) for name, m in risk.modules() for key, value in vars(m).items()}

    before = held()
    if not _differs(risk, first, _outputs(risk, tensors, batch, 0)):
        return []
    return [name for name, what in held().items() if before.get(name) != what] or ["outside of its attributes"]


def _require_determined_loss(risk: EmpiricalRisk, batch: Batch, outputs: Tensor) -> None:
    values = []
    for seed in (0, 1):
        with torch.no_grad(), random_state(seed=seed, device=risk.space.device):
            values.append(risk.batch_loss(outputs.clone(), batch))
    if _differs(risk, *values):
        raise StochasticModelError(
            "the loss is random: the same outputs and targets gave two values, so every product would belong to "
            "another function. Fix what it samples"
        )


def _differs(risk: EmpiricalRisk, a: Tensor, b: Tensor) -> bool:
    """Different beyond what another summation order explains."""
    if a.shape != b.shape:
        return True
    scale = float(b.abs().max()) if b.numel() else 0.0
    return bool(((a - b).abs() > scale * risk.eps**0.5).any())


def _couples(risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch, whole: Tensor) -> bool:
    """Whether the outputs of the first one or two examples change when the others are replaced by copies of them.

    Rows of outputs may be in any order (examples may have several): as many must stay as belong to the kept ones.
    """
    size = tensors_of(batch.x)[0].shape[0]
    rows = [whole, *(t for t in tensors_of(batch.y) if t.ndim)]
    if size < 2 or whole.ndim == 0 or any(t.shape[0] % size for t in rows):
        return False
    kept = 2 if size > 2 else 1
    mixed = _outputs(risk, tensors, with_examples(batch, torch.arange(size) % kept), 0)
    if mixed.shape != whole.shape:
        return True
    scale = float(whole.abs().max())
    stays = (mixed - whole).abs() <= scale * risk.eps**0.5
    whole_rows = stays.reshape(whole.shape[0], -1).all(dim=1)
    return bool(torch.isfinite(whole).all()) and int(whole_rows.sum()) * size < kept * whole.shape[0]


def random_layers(risk: EmpiricalRisk) -> list[str]:
    """Names of layers that draw random numbers in training mode."""
    found = []
    for name, module in risk.modules():
        active = isinstance(module, _DROPOUTS) and module.p > 0
        active = active or (isinstance(module, nn.RReLU) and module.lower < module.upper)
        inner = getattr(module, "dropout", 0.0)
        active = active or (isinstance(module, nn.MultiheadAttention | nn.RNNBase) and float(inner) > 0)
        if active and module.training:
            found.append(name)
    return found


def coupled_layers(risk: EmpiricalRisk) -> list[str]:
    """Names of layers that normalize by the statistics of the batch."""
    return [
        name
        for name, module in risk.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]


def _named(names: list[str]) -> str:
    found = ", ".join(name or "the model itself" for name in names)
    return found or "no layer of a known type: look for functional calls in forward()"


def require_mean_loss(risk: EmpiricalRisk) -> None:
    """Refuse a loss that is not a mean over the batch, where several batches are averaged.

    Raises:
        InvalidInputError: says what the risk would have been.
    """
    for batch in risk.batches:
        if is_mean(risk, batch) is False:
            raise InvalidInputError(
                f"the loss is not a mean over batch {batch.index}: its parts do not average to the whole. Over "
                "several batches, weighted by their sizes, a sum would count large batches twice over. Use "
                "reduction='mean'; if the mean is over something else than examples (weighted classes, targets that "
                "are not ignored), say with count= how much there is of it; or give all the data as one batch (x, y)"
            )


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
        whole = risk.batch_loss(outputs, batch)
        values = [risk.batch_loss(outputs[:cut], head), risk.batch_loss(outputs[cut:], tail)]
    # By count= or by examples: the former may be a weight of the whole batch, which says nothing of its parts.
    for weights in ((risk.batches.weigh(head), risk.batches.weigh(tail)), (cut, size - cut)):
        # A part of weight 0 (nothing but ignored targets) has no mean of its own.
        parts = [(weight, float(value)) for weight, value in zip(weights, values, strict=True) if weight > 0]
        mean = sum(weight * value for weight, value in parts) / (sum(weights) or 1.0)
        scale = max([abs(float(whole)), *(abs(value) for _, value in parts)])
        # count= may have been summed in float32, whatever the loss is.
        if abs(mean - float(whole)) <= max(1e-5, risk.eps**0.6) * scale:
            return True
    return False
