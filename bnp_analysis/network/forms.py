"""Functions whose torch kernels lack a correct second derivative, rewritten in differentiable operations.

Values and gradients are those of torch, with one exception: for log-probabilities that are not normalized, the
gradient of torch's CTC loss is the derivative of another function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn._reduction import legacy_get_string
from torch.nn.utils.rnn import pad_sequence

# In place of log 0: sums of it stay finite, and no difference of two infinities arises.
_LOG_ZERO = -1e30
_REDUCTIONS = ("none", "mean", "sum")


def ctc_loss(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | Sequence[int],
    target_lengths: Tensor | Sequence[int],
    blank: int = 0,
    reduction: str | int = "mean",
    zero_infinity: bool = False,
) -> Tensor:
    """`-log p(targets)`, by the recursion over the places between and at the labels; arguments as in torch.

    Source: Graves et al. 2006, section 4.1.

    Example:
        >>> y = torch.tensor([[1]])
        >>> round(float(ctc_loss(torch.zeros(2, 1, 2), y, [2], [1]).exp()), 6)  # the paths 1-, -1 and 11
        0.333333
    """
    single = log_probs.ndim == 2
    log_probs = log_probs.unsqueeze(1) if single else log_probs
    steps, count, _ = log_probs.shape
    lengths, sizes = (
        torch.as_tensor(t, device=log_probs.device).reshape(-1).long() for t in (input_lengths, target_lengths)
    )
    if targets.ndim == 1:
        targets = pad_sequence(list(torch.split(targets[: int(sizes.sum())], sizes.tolist())), batch_first=True)
    targets = targets.to(log_probs.device).long()
    # Labels with a blank before, between and behind them.
    inside = torch.arange(targets.shape[1], device=targets.device) < sizes.unsqueeze(1)
    labels = targets.new_full((count, 2 * targets.shape[1] + 1), blank)
    labels[:, 1::2] = torch.where(inside, targets, blank)
    skips = F.pad((labels[:, 2:] != blank) & (labels[:, 2:] != labels[:, :-2]), (min(2, labels.shape[1]), 0))
    emitted = log_probs.gather(2, labels.expand(steps, -1, -1))
    emitted = torch.where(emitted > _LOG_ZERO, emitted, _LOG_ZERO)
    begins = torch.arange(labels.shape[1], device=labels.device) < 2
    paths = torch.where(begins, emitted[0], _LOG_ZERO)
    for t in range(1, steps):
        stay, step, skip = paths, *(F.pad(paths, (k, 0), value=_LOG_ZERO)[:, : labels.shape[1]] for k in (1, 2))
        longer = torch.stack([stay, step, torch.where(skips, skip, _LOG_ZERO)]).logsumexp(dim=0) + emitted[t]
        paths = torch.where((t < lengths).unsqueeze(1), longer, paths)
    ends = torch.stack([2 * sizes, (2 * sizes - 1).clamp_min(0)], dim=1)
    last = torch.where(torch.stack([sizes >= 0, sizes > 0], dim=1), paths.gather(1, ends), _LOG_ZERO)
    loss = -last.logsumexp(dim=1)
    loss = torch.where(loss < -_LOG_ZERO / 2, loss, 0.0 if zero_infinity else torch.inf)
    if reduction in ("mean", 1):
        return (loss / sizes.clamp_min(1)).mean()
    found = reduced(loss, reduction)
    return found.squeeze(0) if single and found.ndim else found


def multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`(1/C) sum_(i != y) w_y max(0, margin - x_y + x_i)^p` of each example; arguments as in torch.

    Example:
        >>> float(multi_margin_loss(torch.tensor([[1.0, 0.5]]), torch.tensor([0])))
        0.25
    """
    x, y = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    own = F.one_hot(y, x.shape[1]).bool()
    gaps = (margin - x.gather(1, y.unsqueeze(1)) + x).clamp_min(0).pow(p)
    loss = torch.where(own, 0.0, gaps if weight is None else gaps * weight[y].unsqueeze(1)).sum(dim=1) / x.shape[1]
    return _reduced(loss, input, size_average, reduce, reduction)


def multilabel_margin_loss(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    """`(1/C) sum_(j in y) sum_(i not in y) max(0, 1 - x_j + x_i)` of each example; arguments as in torch.

    Example:
        >>> float(multilabel_margin_loss(torch.tensor([[1.0, 0.5]]), torch.tensor([[0, -1]])))
        0.25
    """
    x, y = (t.reshape(-1, t.shape[-1]) for t in (input, target))
    valid = (y >= 0).cumprod(dim=1).bool()
    own = torch.zeros_like(x).scatter_add(1, y.clamp_min(0), valid.to(x)).bool()
    labels = x.gather(1, y.clamp_min(0))
    gaps = (1 - labels.unsqueeze(2) + x.unsqueeze(1)).clamp_min(0)
    loss = torch.where(valid.unsqueeze(2) & ~own.unsqueeze(1), gaps, 0.0).sum(dim=(1, 2)) / x.shape[1]
    return _reduced(loss, input, size_average, reduce, reduction)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`g v / |v|` along an axis: torch's kernel differentiates twice with `|v|` held fixed (CPU, torch 2.13).

    Example:
        >>> weight_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0]])).tolist()
        [[6.0, 8.0]]
    """
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _reduced(loss: Tensor, of: Tensor, size_average: bool | None, reduce: bool | None, reduction: str) -> Tensor:
    """The mean, the sum or none of both, also as torch reads its older arguments."""
    if size_average is not None or reduce is not None:
        reduction = legacy_get_string(size_average, reduce, emit_warning=False)
    return reduced(loss if of.ndim > 1 else loss.squeeze(0), reduction)


def reduced(loss: Tensor, reduction: str | int) -> Tensor:
    """The losses of all examples as torch's losses put them together.

    Example:
        >>> float(reduced(torch.ones(3), "sum"))
        3.0
    """
    name = reduction if isinstance(reduction, str) else _REDUCTIONS[reduction]
    return loss.mean() if name == "mean" else loss.sum() if name == "sum" else loss


#: Function of torch -> its form here, with the same arguments.
FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch._weight_norm: weight_norm,
    F.ctc_loss: ctc_loss,
    torch.ctc_loss: ctc_loss,
    F.multi_margin_loss: multi_margin_loss,
    F.multilabel_margin_loss: multilabel_margin_loss,
}
