"""Small networks and numbers that the tests of the network room share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def classes(count: int, width: int, *more: int, seed: int = 1) -> Tensor:
    """Class labels of a seed."""
    return torch.randint(0, width, (count, *more), generator=torch.Generator().manual_seed(seed))


def drawn(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module in float64 whose parameters come from a seed."""
    model = make().double()
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return model


def mlp(**options: Any) -> nn.Module:
    return drawn(lambda: bnp.models.mlp([4, 5, 3], activation="tanh", **options))


def table(count: int = 9) -> tuple[Tensor, Tensor]:
    return numbers(count, 4), classes(count, 3)


def classify(model: nn.Module, data: Any, **options: Any) -> bnp.EmpiricalRisk:
    return bnp.EmpiricalRisk(model, F.cross_entropy, data, **options)


def risk_of(model: nn.Module, x: Tensor, sizes: tuple[int, ...] | None = None) -> bnp.EmpiricalRisk:
    """Any model over any inputs: the loss only has to be a mean."""
    y = torch.zeros(len(x))
    return bnp.EmpiricalRisk(
        model, lambda o, y: o.flatten(1).square().mean(), [(x, y)] if sizes is None else split(x, y, sizes)
    )


def split(x: Tensor, y: Tensor, sizes: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(sizes), y.split(sizes), strict=True))
