"""A few epochs of plain training, reproducible from one seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.errors import NonFiniteError
from bnp_analysis.runtime.progress import Progress
from bnp_analysis.training.run import DIVERGED, SIGNALS
from bnp_analysis.training.trainer import train


def fit(
    model: nn.Module,
    loss: Callable[[Tensor, Any], Tensor],
    data: tuple[Tensor, Tensor],
    *,
    epochs: int = 5,
    batch_size: int = 32,
    lr: float = 0.1,
    momentum: float = 0.9,
    seed: int = 0,
    progress: Progress = False,
) -> list[float]:
    """Train a model in place by stochastic gradient descent with momentum; `train` with nothing else.

    Args:
        model: trained in place, left in the mode it was in.
        loss: `loss(output, y)`, the mean over the batch.
        data: `(x, y)`, `(N, ...)` each.
        epochs: passes over the data; 0 leaves the model as it is.
        batch_size: rows of a mini-batch; the last one of an epoch may be smaller.
        lr, momentum: of the optimizer.
        seed: of the order of the examples; the global random state is as before afterwards.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        The mean loss of each epoch.

    Raises:
        InvalidInputError: sizes that do not fit; NonFiniteError: the loss diverged, with the step and the rate.
        KeyboardInterrupt: interrupted.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> losses = fit(model, torch.nn.functional.mse_loss, (x, x[:, :1]), epochs=20, batch_size=2)
        >>> losses[-1] < losses[0]
        True
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    run = train(model, loss, data, optimizer, epochs=epochs, batch_size=batch_size, seed=seed, progress=progress)
    if run.stopped == DIVERGED:
        raise NonFiniteError(run.message)
    if run.stopped in SIGNALS:
        raise KeyboardInterrupt(run.message)
    return [float(row["train_loss"]) for row in run.epochs]
