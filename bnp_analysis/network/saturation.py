"""What saturated smooth functions do to a risk's derivatives: how much rounding they amplify, and which vanish."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnp_analysis.network.batches import Batch
from bnp_analysis.network.kernels import recording
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.smooth import Watch, generic, watching

# An entry's error is taken for 32 roundings at least: room for what the argument of a smooth function has rounded,
# amplified so many times.
_ALLOWED = 8.0


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

    def amplification() -> Tensor:
        grown = risk.group.share(lambda: _amplification(risk), "what saturation amplifies")
        return torch.tensor(max(grown), dtype=torch.float64)

    return risk.eps * max(1.0, float(risk.remembered("amplification", amplification)) / _ALLOWED)


def has_vanished(risk: EmpiricalRisk) -> bool:
    """Whether some derivative or value of a smooth function is an exact zero, or nearly one, that is none by structure.

    The gradient of a random combination of the outputs is compared, wherever a smooth function gets it and in every
    parameter, with the same for derivatives of ordinary size.
    """

    def vanished() -> Tensor:
        found = risk.group.share(lambda: any(_vanished(risk, batch) for batch in risk.batches), "vanished derivatives")
        return torch.tensor(any(found))

    return bool(risk.remembered("vanished", vanished))


def _amplification(risk: EmpiricalRisk) -> float:
    tensors = risk.space.unflatten(risk.theta)
    with torch.no_grad(), watching() as watch:
        for batch in risk.batches:
            risk.batch_loss(risk.batch_outputs(tensors, batch), batch)
    return watch.amplification


@recording()
def _vanished(risk: EmpiricalRisk, batch: Batch) -> bool:
    with watching() as seen:
        real = _gradients(risk, batch, seen)
    if seen.vanished or not seen.edges:
        return seen.vanished
    with watching(structural=True) as ordinary:
        expected = _gradients(risk, batch, ordinary)
    if len(real) != len(expected):
        return True
    return any(
        bool((e != 0).any() if r is None else ((r.abs() < torch.finfo(r.dtype).tiny ** 0.5) & (e != 0)).any())
        for r, e in zip(real, expected, strict=True)
        if e is not None
    )


def _gradients(risk: EmpiricalRisk, batch: Batch, watch: Watch) -> list[Tensor | None]:
    leaves = risk.leaves()
    outputs = risk.batch_outputs(leaves, batch)
    if not outputs.requires_grad:
        return []
    wanted: Any = [*watch.edges, *leaves.values()]
    return list(torch.autograd.grad(outputs, wanted, generic(outputs.detach()), allow_unused=True))
