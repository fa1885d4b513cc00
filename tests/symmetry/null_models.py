"""What a small network with known null directions is, and the networks that no `Sequential` makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from curvature_reference import Batch, Problem, spread
from torch import Tensor, nn

Loss = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Case:
    """A network, its data, the null directions by cause, and the dimension that stays unexplained with the reason."""

    make: Callable[[], nn.Module]
    data: Batch
    sources: Mapping[str, int]
    unexplained: int = 0
    why: str = ""
    loss: Loss = F.cross_entropy
    seed: int = 0
    scale: float = 0.6
    approximate: Mapping[str, int] = field(default_factory=dict)
    skipped: str = ""
    change: Callable[[nn.Module], object] | None = None

    def problem(self) -> Problem:
        model = spread(self.make(), self.seed, self.scale)
        if self.change is not None:
            self.change(model)
        return Problem(model, self.loss, [self.data])


class Functional(nn.Module):
    """No modules at all."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"kernel": (3, 1, 3, 3), "offset": (3,), "matrix": (3, 27), "shift": (3,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(F.conv2d(x, self.kernel, self.offset)), 2)
        return F.linear(torch.flatten(h, 1), self.matrix, self.shift)


class Residual(nn.Module):
    """A stream of five channels; one block that writes in place if asked."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 5), nn.Linear(5, 3)
        self.inner, self.outer = nn.Linear(5, 4), nn.Linear(4, 5)
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        z = self.outer(F.relu(self.inner(h)))
        if self.in_place:
            z += h
        return self.leave(F.relu(z if self.in_place else z + h))


class Tied(nn.Module):
    """One layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.leave = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.relu(self.inner(F.relu(self.inner(x)))))


class Tokens(nn.Module):
    """Sequences `(N, T, d)`, flattened behind the hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.leave = nn.Linear(3, 4), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.relu(self.hidden(x)).flatten(1))


class Words(nn.Module):
    """An embedding; the data ask for six of its nine rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.leave = nn.Embedding(9, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.rows(x)))


class Spare(nn.Module):
    """A layer that is never used, and an activation that a parameter scales."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.leave, self.spare = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(2, 2)
        self.gains = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.hidden(x)) * self.gains)


def net(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def hidden(*between: nn.Module, width: int = 5, inputs: int = 4) -> Callable[[], nn.Module]:
    """One hidden layer, three outputs."""
    return net(nn.Linear(inputs, width), *between, nn.Linear(width, 3))


def constants(x: Tensor) -> Tensor:
    """A constant feature, a zero one, and the sum of two others beside the data."""
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    return torch.cat([x, 2.5 * ones, 0 * ones, x[:, :1] + x[:, 1:2]], dim=1)


def cut_and_open(model: nn.Module) -> None:
    """Unit 0 dead, units 1 and 2 always active."""
    model[0].bias.data[:3] = torch.tensor([-9.0, 9.0, 9.0], dtype=torch.float64)


def freeze(name: str, zero: bool = False) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        parameter = model.get_parameter(name)
        parameter.requires_grad_(False)
        if zero:
            parameter.data.zero_()

    return change
