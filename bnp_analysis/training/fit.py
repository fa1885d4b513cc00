"""A plain training loop, reproducible from one seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.progress import Progress, reporting


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
    """Train a model in place by stochastic gradient descent with momentum.

    Args:
        model: trained in place, left in the mode it was in.
        loss: `loss(output, y)`, the mean over the batch.
        data: `(x, y)`, `(N, ...)` each.
        epochs: passes over the data; 0 leaves the model as it is.
        batch_size: rows of a mini-batch; the last one of an epoch may be smaller.
        lr, momentum: of the optimizer.
        seed: of the order of the examples; no global random state is used.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        The mean loss of each epoch.

    Raises:
        InvalidInputError: sizes that do not fit; NonFiniteError: the loss diverged, with the epoch.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> losses = fit(model, torch.nn.functional.mse_loss, (x, x[:, :1]), epochs=20, batch_size=2)
        >>> losses[-1] < losses[0]
        True
    """
    x, y = data
    if epochs < 0 or batch_size < 1 or x.shape[0] != y.shape[0] or x.shape[0] == 0:
        raise InvalidInputError(
            f"epochs={epochs}, batch_size={batch_size} on {x.shape[0]} inputs and {y.shape[0]} targets do not fit"
        )
    was_training = model.training
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    with reporting(progress, epochs, "training") as update:
        for epoch in range(epochs):
            total = 0.0
            for rows in torch.split(torch.randperm(x.shape[0], generator=order), batch_size):
                optimizer.zero_grad(set_to_none=True)
                value = loss(model(x[rows]), y[rows])
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += float(value.detach()) * len(rows)
            losses.append(total / x.shape[0])
            if not torch.isfinite(torch.tensor(losses[-1])):
                raise NonFiniteError(f"the loss is {losses[-1]} after epoch {epoch + 1}: lower the learning rate {lr}")
            update(epoch + 1)
    model.train(was_training)
    return losses
