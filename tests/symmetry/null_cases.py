"""Small networks with known null directions: how many of each cause, and what no cause explains."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from curvature_reference import Problem, classes, numbers
from null_models import (
    Case,
    Functional,
    Residual,
    Spare,
    Tied,
    Tokens,
    Words,
    constants,
    cut_and_open,
    freeze,
    hidden,
    net,
)
from torch import Tensor, nn

import bnp_analysis as bnp

X, Y = numbers(60, 4), classes(60, 3)
IMAGES, LABELS = numbers(80, 1, 8, 8, seed=2), classes(80, 3)
REAL = numbers(60, 3, seed=3)
FEW = "more parameters than independent outputs"

CASES: dict[str, Case] = {
    "relu": Case(hidden(nn.ReLU()), (X, Y), {"softmax shift": 6, "homogeneity": 5}),
    "relu in place": Case(hidden(nn.ReLU(inplace=True)), (X, Y), {"softmax shift": 6, "homogeneity": 5}),
    "relu wide": Case(
        hidden(nn.ReLU(), width=9), (numbers(200, 4), classes(200, 3)), {"softmax shift": 10, "homogeneity": 9}
    ),
    "relu deep": Case(
        net(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)),
        (X, Y),
        {"dependent inputs": 3, "inactive rows": 4, "dead units": 7, "softmax shift": 5, "homogeneity": 10},
        seed=3,
    ),
    "leaky": Case(hidden(nn.LeakyReLU(0.2)), (X, Y), {"softmax shift": 6, "homogeneity": 5}),
    "prelu": Case(hidden(nn.PReLU(5)), (X, Y), {"softmax shift": 6, "homogeneity": 5}),
    "relu mse": Case(hidden(nn.ReLU()), (X, REAL), {"homogeneity": 5}, loss=F.mse_loss),
    "tanh": Case(hidden(nn.Tanh()), (X, Y), {"softmax shift": 6}),
    "tanh mse": Case(hidden(nn.Tanh()), (X, REAL), {}, loss=F.mse_loss),
    "gelu mse": Case(hidden(nn.GELU()), (X, REAL), {}, loss=F.mse_loss),
    "bare": Case(lambda: nn.Linear(4, 3), (X, Y), {"softmax shift": 5}),
    "linear": Case(
        net(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 3)),
        (numbers(60, 6), Y),
        {"unread outputs": 20, "softmax shift": 18, "linear layer": 22},
    ),
    "linear narrow mse": Case(net(nn.Linear(4, 2), nn.Linear(2, 3)), (X, REAL), {"linear layer": 6}, loss=F.mse_loss),
    "dead and always active": Case(
        hidden(nn.ReLU()),
        (X, Y),
        {"dependent inputs": 3, "dead units": 5, "softmax shift": 5, "homogeneity": 4, "always-active units": 4},
        change=cut_and_open,
    ),
    "batch norm": Case(
        hidden(nn.BatchNorm1d(5), nn.ReLU()),
        (X, Y),
        {
            "dependent inputs": 3,
            "dead units": 7,
            "batch_norm shift": 4,
            "softmax shift": 5,
            "norm affine": 5,
            "batch_norm scale made up for": 4,
        },
        approximate={"batch_norm scale": 5},
    ),
    "batch norm plain": Case(
        hidden(nn.BatchNorm1d(5, affine=False), nn.ReLU()),
        (X, Y),
        {"batch_norm shift": 5, "softmax shift": 6, "batch_norm scale made up for": 5},
        approximate={"batch_norm scale": 5},
    ),
    "batch norm of inputs": Case(
        net(nn.BatchNorm1d(4), hidden(nn.ReLU())()),
        (X, Y),
        {"dependent inputs": 3, "dead units": 5, "softmax shift": 5, "norm affine": 8, "homogeneity": 4},
    ),
    "batch norm eval": Case(
        hidden(nn.BatchNorm1d(5), nn.ReLU(inplace=True)),
        (X, Y),
        {"dependent inputs": 3, "dead units": 7, "softmax shift": 5, "norm affine": 12},
        change=nn.Module.eval,
    ),
    "batch norm eval plain": Case(
        hidden(nn.BatchNorm1d(5, affine=False), nn.ReLU()),
        (X, Y),
        {"softmax shift": 6, "norm affine": 5},
        change=nn.Module.eval,
    ),
    "layer norm": Case(
        hidden(nn.LayerNorm(6), nn.ReLU(), width=6),
        (X, Y),
        {"dependent inputs": 6, "dead units": 4, "layer_norm shift": 5, "softmax shift": 5, "norm affine": 6},
        approximate={"layer_norm scale": 1},
    ),
    "layer norm eps 0": Case(
        hidden(nn.LayerNorm(6, eps=0), nn.ReLU(), width=6),
        (X, Y),
        {
            "dependent inputs": 6,
            "dead units": 4,
            "layer_norm shift": 5,
            "softmax shift": 5,
            "norm affine": 6,
            "layer_norm scale": 1,
        },
    ),
    "layer norm of inputs": Case(
        net(nn.LayerNorm(4), hidden(nn.Tanh())()),
        (X, Y),
        {"dependent inputs": 5, "softmax shift": 6, "norm affine": 8},
    ),
    "group norm": Case(
        hidden(nn.GroupNorm(2, 6), nn.ReLU(), width=6),
        (X, Y),
        {"dependent inputs": 6, "dead units": 4, "group_norm shift": 10, "softmax shift": 5, "norm affine": 6},
        approximate={"group_norm scale": 2},
    ),
    "rms norm eps 0": Case(
        hidden(nn.RMSNorm(6, eps=0.0), nn.ReLU(), width=6),
        (X, Y),
        {"softmax shift": 7, "norm affine": 6, "rms_norm scale": 1},
    ),
    "conv": Case(
        net(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)),
        (IMAGES, LABELS),
        {"softmax shift": 28, "homogeneity": 3},
        scale=0.3,
    ),
    "conv average": Case(
        net(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        (IMAGES, LABELS),
        {"softmax shift": 5, "homogeneity": 4},
    ),
    "conv batch norm": Case(
        net(
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 2, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(8, 3),
        ),
        (IMAGES, LABELS),
        {
            "batch_norm shift": 3,
            "softmax shift": 9,
            "norm affine": 4,
            "homogeneity": 2,
            "always-active units": 1,
            "batch_norm scale made up for": 3,
        },
        approximate={"batch_norm scale": 3},
    ),
    "conv group norm": Case(
        net(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)),
        (IMAGES, LABELS),
        {"group_norm shift": 2, "softmax shift": 5, "norm affine": 5},
        approximate={"group_norm scale": 2},
    ),
    "conv circular": Case(
        net(
            nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"),
            nn.ReLU(),
            nn.AvgPool1d(2),
            nn.Flatten(),
            nn.Linear(12, 3),
        ),
        (numbers(60, 2, 6), Y),
        {"softmax shift": 13, "homogeneity": 4},
    ),
    "conv depthwise": Case(
        net(
            nn.Conv2d(1, 3, 3),
            nn.ReLU(),
            nn.Conv2d(3, 3, 3, groups=3),
            nn.ReLU(),
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Linear(3, 3),
        ),
        (IMAGES, LABELS),
        {"dependent inputs": 3, "dead units": 20, "softmax shift": 3, "homogeneity": 4},
    ),
    "functional": Case(Functional, (IMAGES, LABELS), {"softmax shift": 28, "homogeneity": 3}, scale=0.3),
    "residual": Case(
        lambda: Residual(False),
        (X, Y),
        {"dependent inputs": 4, "softmax shift": 6, "residual stream": 10, "homogeneity": 4},
        1,
        FEW,
    ),
    "residual in place": Case(
        lambda: Residual(True),
        (X, Y),
        {"dependent inputs": 4, "softmax shift": 6, "residual stream": 10, "homogeneity": 4},
        1,
        FEW,
    ),
    "tied": Case(Tied, (X, Y), {"softmax shift": 5}, skipped="used more than once"),
    "tokens": Case(Tokens, (numbers(60, 5, 3), Y), {"softmax shift": 21, "homogeneity": 4}),
    "words": Case(Words, (classes(60, 6), Y), {"parameters without effect": 6, "softmax shift": 3}, 6, FEW),
    "spare": Case(
        Spare,
        (X, Y),
        {"parameters without effect": 6, "softmax shift": 4, "linear layer": 3},
    ),
    "frozen hidden bias": Case(hidden(nn.ReLU()), (X, Y), {"softmax shift": 6}, change=freeze("0.bias")),
    "frozen zero bias": Case(
        hidden(nn.ReLU()), (X, Y), {"softmax shift": 6, "homogeneity": 5}, change=freeze("0.bias", zero=True)
    ),
    "frozen last bias": Case(
        hidden(nn.ReLU()), (X, Y), {"softmax shift": 5, "homogeneity": 5}, change=freeze("2.bias")
    ),
    "constant features": Case(
        hidden(nn.ReLU(), inputs=7), (constants(X), Y), {"dependent inputs": 15, "softmax shift": 6, "homogeneity": 5}
    ),
    "few rows": Case(
        hidden(nn.ReLU(), inputs=9),
        (numbers(6, 9), classes(6, 3)),
        {"inactive rows": 31, "softmax shift": 6, "homogeneity": 5},
        14,
        FEW,
    ),
    "ignored labels": Case(
        lambda: nn.Linear(4, 3),
        (X[:6], torch.tensor([0, 1, 2, -100, -100, -100])),
        {"inactive rows": 6, "softmax shift": 3},
    ),
    "log softmax inside": Case(
        net(hidden(nn.ReLU())(), nn.LogSoftmax(dim=1)), (X, Y), {"softmax shift": 6, "homogeneity": 5}
    ),
}


@dataclass(frozen=True)
class Solved:
    """A case with its dense factor and Gauss-Newton matrix and its null directions, made once for all tests."""

    problem: Problem
    risk: bnp.EmpiricalRisk
    factor: Tensor
    matrix: Tensor
    null: bnp.symmetry.NullDirections


@cache
def solved(name: str) -> Solved:
    problem = CASES[name].problem()
    risk = problem.risk()
    factor = bnp.gauss_newton(risk).factor.to_dense()
    return Solved(problem, risk, factor, problem.gauss_newton(), bnp.null_directions(risk))
