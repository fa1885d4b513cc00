"""Modules seen at work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

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
