"""Functions that a compiled model runs eagerly; imported on tracing, since torch's compiler takes a second to load."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _call(function: Callable[..., None], *arguments: Any) -> None:
    function(*arguments)


call = torch.compiler.disable(_call)  # type: ignore[no-untyped-call] # torch does not annotate it
