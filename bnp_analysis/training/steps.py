"""Batches of a training run, a step on one batch, and an evaluation on all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.network.batches import arguments, described, way_to_pair
from bnp_analysis.runtime.random import random_state
from bnp_analysis.runtime.trees import map_tensors, tensors_of
from bnp_analysis.training.bnp import BNP
from bnp_analysis.training.run import Stateful

_ROWS = 1000  # of one forward pass in an evaluation of data in memory


class TensorBatches:
    """Mini-batches of examples in memory, in a new random order in each pass.

    Args:
        x, y: `(N, ...)` each.
        batch_size: rows of a batch; the last one of a pass may be smaller.
        generator: of the orders; the global random state is not used.

    Raises:
        InvalidInputError: sizes that do not fit.

    Example:
        >>> pairs = TensorBatches(torch.arange(5), torch.arange(5), 2, torch.Generator().manual_seed(0))
        >>> len(pairs), sorted(int(row) for x, _ in pairs for row in x)
        (3, [0, 1, 2, 3, 4])
    """

    def __init__(self, x: Tensor, y: Tensor, batch_size: int, generator: torch.Generator) -> None:
        if batch_size < 1 or x.shape[0] != y.shape[0] or x.shape[0] == 0:
            raise InvalidInputError(
                f"batch_size={batch_size} on {x.shape[0]} inputs and {y.shape[0]} targets do not fit"
            )
        self.x, self.y, self.batch_size, self.generator = x, y, batch_size, generator

    def __len__(self) -> int:
        return (self.x.shape[0] + self.batch_size - 1) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(self.x.shape[0], generator=self.generator).to(self.x.device)
        for rows in torch.split(order, self.batch_size):
            yield self.x[rows], self.y[rows]


def is_pair_of_tensors(data: Any) -> bool:
    """Whether data are one `(x, y)` of tensors, not a loader."""
    return isinstance(data, tuple) and len(data) == 2 and all(isinstance(part, Tensor) for part in data)


def as_batches(data: Any, batch_size: int | None, seed: int, device: torch.device) -> Iterable[Any]:
    """The batches of `(x, y)`, or a loader as it is.

    Raises:
        InvalidInputError: a one-shot iterator, which has no second epoch; a batch size for a loader, which has
            its own; something else.
    """
    if is_pair_of_tensors(data):
        x, y = (part.to(device) for part in data)
        return TensorBatches(x, y, 32 if batch_size is None else batch_size, torch.Generator().manual_seed(seed))
    if batch_size is not None:
        raise InvalidInputError("batch_size belongs to (x, y) in memory; a loader has its own: leave it out")
    if isinstance(data, Iterator | torch.utils.data.Dataset):
        raise InvalidInputError(
            f"{type(data).__name__} cannot be read again in batches for each epoch: wrap a data set in a DataLoader, "
            "make a list of an iterator, or give (x, y)"
        )
    if not isinstance(data, Iterable) or isinstance(data, Tensor | Mapping | str):
        raise InvalidInputError(f"the data are (x, y) or an iterable of such batches, not {type(data).__name__}")
    return data


def generators(source: Any) -> list[torch.Generator]:
    """The generators that a loader and its samplers draw from."""
    inner = getattr(source, "batch_sampler", None)
    parts = (source, getattr(source, "sampler", None), inner, getattr(inner, "sampler", None))
    found = {id(g): g for part in parts if isinstance(g := getattr(part, "generator", None), torch.Generator)}
    return list(found.values())


def begin_epoch(source: Any, epoch: int) -> None:
    """Tell samplers that shuffle by the number of the epoch (the distributed one) which one begins."""
    inner = getattr(source, "batch_sampler", None)
    for sampler in (getattr(source, "sampler", None), getattr(inner, "sampler", None)):
        if callable(set_epoch := getattr(sampler, "set_epoch", None)):
            set_epoch(epoch)


def moved(pair: Any, device: torch.device) -> tuple[Any, Any, int]:
    """Inputs and targets of a batch on a device, and the number of examples.

    Raises:
        InvalidInputError: not a pair, or without a tensor that has a batch dimension.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InvalidInputError(f"a batch is a pair (x, y), not {described(pair)}: {way_to_pair(pair)}")
    x, y = (map_tensors(part, lambda t: t.to(device, non_blocking=True)) for part in pair)
    leaves = tensors_of(x)
    if not leaves or leaves[0].ndim == 0 or leaves[0].shape[0] == 0:
        raise InvalidInputError("a batch has no input tensor with examples")
    return x, y, leaves[0].shape[0]


@runtime_checkable
class StepsGradients(Stateful, Protocol):
    """What the trainer asks of a preconditioner: `step()` between `backward()` and the optimizer, and a state."""

    def step(self) -> Any: ...


def require_same_model(
    model: nn.Module, loss: object, optimizer: torch.optim.Optimizer, preconditioner: object = None
) -> None:
    """Refuse an optimizer that would change no parameter of what is trained, and a preconditioner that cannot step.

    Raises:
        InvalidInputError: one was made for another model, or from a copy; or the preconditioner is closed, or another
            caller steps it.
    """
    modules = [m for m in (model, loss) if isinstance(m, nn.Module)]
    trained = {id(p) for m in modules for p in m.parameters()}
    if not any(id(p) in trained for group in optimizer.param_groups for p in group["params"]):
        raise InvalidInputError(
            "the optimizer holds no parameter of the model, which would stay as it is: it was made for another model, "
            "or from a copy; write torch.optim.SGD(model.parameters(), lr=...)"
        )
    if isinstance(preconditioner, BNP):
        if not any(id(p) in trained for p in preconditioner.model.parameters()):
            raise InvalidInputError("preconditioner was made for another model, or a copy: write BNP(model)")
        preconditioner.require_free()
        if getattr(optimizer, "preconditioner", None) is preconditioner:
            raise InvalidInputError("preconditioner is stepped by the optimizer already: leave it out here")


@dataclass
class Step:
    """One update of a model."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    optimizer: torch.optim.Optimizer
    preconditioner: StepsGradients | None
    device: torch.device

    def take(self, pair: Any, *, check: bool) -> tuple[Tensor, int, str]:
        """Do one update.

        Args:
            pair: the batch.
            check: whether to look at the loss before it is differentiated; no update follows a bad one.

        Returns:
            The loss before the update, the number of examples, and why no update was made, if none was.
        """
        x, y, count = moved(pair, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        try:
            output = call(self.model, x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InvalidInputError(
                "batch normalization in training needs more than one value per channel, and a batch has one example. "
                "Use a larger batch, drop the last one, or a normalization of single examples (layer, group)"
            ) from error
        value = self.loss(output, y)
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
            raise InvalidInputError("loss(output, y) must be a scalar tensor that depends on the parameters")
        found = value.detach()
        if check and not bool(torch.isfinite(found)):
            return found, count, f"the loss is {float(found)}"
        torch.autograd.backward(value)
        if self.preconditioner is not None:
            try:
                self.preconditioner.step()
            except NonFiniteError as error:
                return found, count, str(error)
        self.optimizer.step()
        return found, count, ""


def call(model: nn.Module, x: Any) -> Any:
    """The model's output, whether its input is a tensor, a tuple or a dict."""
    args, kwargs = arguments(x)
    return model(*args, **kwargs)


def evaluate(step: Step, data: Any) -> dict[str, float]:
    """Mean loss, and for class labels the accuracy, in evaluation mode; changes nothing.

    Args:
        step: whose model and loss.
        data: `(x, y)` in memory, or an iterable of such batches.

    Returns:
        `eval_loss`, and `accuracy` where outputs are `(N, C)` and targets `(N,)` integers.
    """
    if is_pair_of_tensors(data):
        data = list(zip(*(part.split(_ROWS) for part in data), strict=True))
    total, correct, rows = 0.0, 0, 0
    classes = True
    with kept_modes(step.model), torch.no_grad(), random_state(device=step.device, generators=generators(data)):
        step.model.eval()
        for pair in data:
            x, y, count = moved(pair, step.device)
            output = call(step.model, x)
            total += float(step.loss(output, y)) * count
            rows += count
            labels = isinstance(y, Tensor) and y.ndim == 1 and not y.is_floating_point()
            classes = classes and labels and isinstance(output, Tensor) and output.ndim == 2
            if classes:
                correct += int((output.argmax(1) == y).sum())
    if rows == 0:
        raise InvalidInputError("the evaluation data have no example")
    return {"eval_loss": total / rows} | ({"accuracy": correct / rows} if classes else {})


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Each module is in training or evaluation mode afterwards as it was before."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
