"""Modules seen at work, and what they see inside the transforms of `torch.func`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch._C import _functorch

from bnp_analysis.errors import InvalidInputError

Visit = Callable[[str, nn.Module, Any, Any], Tensor | None]


@contextmanager
def watched(model: nn.Module, visit: Visit, names: Iterable[str] | None) -> Iterator[None]:
    """Meanwhile every forward pass of the named modules, default all, calls `visit(name, module, inputs, output)`."""
    wanted = None if names is None else set(names)
    handles: list[Any] = []

    def remove() -> None:
        for handle in handles:
            handle.remove()

    try:
        for name, module in model.named_modules():
            if wanted is None or name in wanted:

                def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
                    return visit(name, module, (*args, *kwargs.values()), output)

                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        try:
            remove()
        except KeyboardInterrupt:
            remove()
            raise


def transformed(t: Tensor) -> bool:
    """Whether a tensor belongs to a transform of `torch.func` that runs at the moment."""
    return _functorch.is_functorch_wrapped_tensor(t)


def differentiable_part(t: Tensor) -> Tensor:
    """The tensor inside transforms of `torch.func`, as it lies in the recorded graph outside of them.

    Raises:
        InvalidInputError: a batch of `vmap` that does not come first.
    """
    found = untransformed(t)
    while transformed(t):
        t = _functorch.get_unwrapped(t)
    if t is not found:
        raise InvalidInputError(
            "a layer gives vmap its examples along another axis than the first, so they cannot be told apart in what "
            "is recorded. Let vmap inside forward() have in_dims=0, or give the layer whole batches"
        )
    return t


def untransformed(t: Tensor) -> Tensor:
    """The numbers of a tensor inside transforms of `torch.func`, recorded where they are: batches of `vmap` come first.

    Example:
        >>> import torch
        >>> seen = []
        >>> def f(row):
        ...     seen.append(untransformed(row))
        ...     return row.sum()
        >>> _ = torch.func.vmap(torch.func.grad(f))(torch.ones(3, 2))
        >>> seen[0].shape
        torch.Size([3, 2])
    """
    while transformed(t):
        batch = _functorch.maybe_get_bdim(t) if _functorch.is_batchedtensor(t) else 0
        t = _functorch.get_unwrapped(t)
        t = t if batch == 0 else t.movedim(batch, 0)
    return t
