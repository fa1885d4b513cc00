"""Where the mini-batches of a training run come from, in an order that can be repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.runtime.trees import map_tensors, tensors_of


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


def moved(pair: Any, to: Callable[[Tensor], Tensor]) -> tuple[Any, Any, int]:
    """Inputs and targets of a batch, each tensor passed through `to`, and the number of examples.

    Raises:
        InvalidInputError: not a pair, or without a tensor that has a batch dimension.
    """
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise InvalidInputError(f"a batch is a pair (x, y), not {type(pair).__name__}")
    x, y = map_tensors(pair[0], to), map_tensors(pair[1], to)
    leaves = tensors_of(x)
    if not leaves or leaves[0].ndim == 0 or leaves[0].shape[0] == 0:
        raise InvalidInputError("a batch has no input tensor with examples")
    return x, y, leaves[0].shape[0]
