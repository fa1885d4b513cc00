"""What compiled models run eagerly. Imported when one is traced: torch's compiler takes a second to load."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bnp_analysis.training.bnp.hooks import InputHook


def _see(hook: InputHook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hook.see(module, args, kwargs)


see = torch.compiler.disable(_see)  # type: ignore[no-untyped-call] # torch does not annotate it
