"""What compiled models run eagerly. Imported when one is traced: torch's compiler takes a second to load."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.training.bnp.hooks import InputHook, OutputHook


def _see(hook: InputHook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hook.see(module, args, kwargs)


def _watch(hook: OutputHook, module: nn.Module, output: Tensor) -> None:
    hook.watch(module, output)


see = torch.compiler.disable(_see)  # type: ignore[no-untyped-call] # torch does not annotate it
watch = torch.compiler.disable(_watch)  # type: ignore[no-untyped-call] # torch does not annotate it
