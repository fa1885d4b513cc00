"""Null directions found from the structure of a network, against the nullity of its dense Gauss-Newton factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import bnp_analysis as bnp

D = torch.float64


def networks() -> dict[str, tuple[Callable[[], nn.Module], bool, str]]:
    """Name -> (how to build it, whether it takes images, loss): factors are tall, so that rank is what data allow."""

    def mlp(*widths: int, **options: Any) -> Callable[[], nn.Module]:
        return lambda: bnp.models.mlp(widths, seed=2, dtype=D, **options)

    def conv(**options: Any) -> Callable[[], nn.Module]:
        return lambda: bnp.models.cnn((1, 8, 8), channels=(2, 2, 2), hidden=3, seed=2, dtype=D, **options)

    def linear() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 3), nn.Linear(3, 10)).double()

    return {
        "relu 64-3-10, CE": (mlp(64, 3, 10), False, "CE"),
        "relu 64-3-10, MSE": (mlp(64, 3, 10), False, "MSE"),
        "relu 64-3-3-10, CE": (mlp(64, 3, 3, 10), False, "CE"),
        "tanh 64-3-10, CE": (mlp(64, 3, 10, activation="tanh"), False, "CE"),
        "leaky 64-3-3-10, MSE": (mlp(64, 3, 3, 10, activation="leaky_relu"), False, "MSE"),
        "relu without bias 64-3-10, CE": (mlp(64, 3, 10, bias=False), False, "CE"),
        "linear 64-3-10, MSE": (linear, False, "MSE"),
        "LayerNorm relu 64-3-10, CE": (mlp(64, 3, 10, norm="layer"), False, "CE"),
        "conv relu, CE": (conv(), True, "CE"),
        "conv tanh, MSE": (conv(activation="tanh"), True, "MSE"),
    }


def squared(output: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, nn.functional.one_hot(y, 10).to(output))


def counts(examples: int = 150) -> Iterator[dict[str, Any]]:
    """A row for each network: nullity of the dense factor, directions found by cause, the rest."""
    for name, (build, images, loss) in networks().items():
        torch.manual_seed(0)
        data = bnp.data.load("digits", n=examples, flatten=not images, dtype=D)
        risk = bnp.EmpiricalRisk(build(), nn.functional.cross_entropy if loss == "CE" else squared, (data.x, data.y))
        found = bnp.null_directions(risk)
        factor = bnp.gauss_newton(risk).factor
        assert factor is not None
        sigma = torch.linalg.svdvals(factor.to_dense())
        floor = max(factor.shape) * torch.finfo(D).eps * float(sigma[0])
        rank = int((sigma > floor).sum())
        gap = float(sigma[rank - 1] / sigma[rank]) if rank < len(sigma) and sigma[rank] > 0 else float("inf")
        nullity = factor.shape[1] - rank
        yield {
            "network": name,
            "parameters": factor.shape[1],
            "rows": factor.shape[0],
            "nullity": nullity,
            "found": found.basis.shape[1],
            "sources": dict(found.sources),
            "unexplained": nullity - found.basis.shape[1],
            "approximate": {cause: list(value) for cause, value in found.approximate.items()},
            "not_analysed": list(found.not_analysed),
            "gap": gap,
        }
