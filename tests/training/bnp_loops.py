"""What the tests of BNP in training share: float64 networks of every covered kind, dense `P P^T`, one step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bnp_analysis.training.bnp import BNP

CLASSES = 3


def uneven(shape: tuple[int, ...], seed: int = 1, axis: int = 1) -> Tensor:
    """Inputs whose features or channels (along `axis`) have different means and scales."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, dtype=torch.float64, generator=g)
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    spread = torch.linspace(-1, 1, shape[axis], dtype=torch.float64).view(sizes)
    return 10 ** (0.5 * spread) * (x - spread)


def _convolution(
    layer: Callable[..., nn.Module], shape: tuple[int, ...]
) -> Callable[[bool], tuple[nn.Module, tuple[int, ...], int]]:
    def make(bias: bool) -> tuple[nn.Module, tuple[int, ...], int]:
        first = layer(bias=bias)
        width = first(torch.zeros(1, *shape)).numel()
        return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(width, CLASSES, bias)), shape, 1

    return make


def _dense(bias: bool) -> tuple[nn.Module, tuple[int, ...], int]:
    return nn.Sequential(nn.Linear(5, 4, bias), nn.Tanh(), nn.Linear(4, CLASSES, bias)), (5,), 1


def _sequence(bias: bool) -> tuple[nn.Module, tuple[int, ...], int]:
    layers = [nn.Linear(4, 3, bias), nn.Tanh(), nn.Flatten(), nn.Linear(15, CLASSES, bias)]
    return nn.Sequential(*layers), (5, 4), 2


KINDS: dict[str, Callable[[bool], tuple[nn.Module, tuple[int, ...], int]]] = {
    "dense": _dense,
    "sequence": _sequence,
    "conv": _convolution(lambda bias: nn.Conv2d(2, 3, 3, bias=bias), (2, 5, 5)),
    "stride": _convolution(lambda bias: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), bias=bias), (2, 5, 4)),
    "padding": _convolution(lambda bias: nn.Conv2d(2, 3, 3, padding=(1, 2), bias=bias), (2, 4, 4)),
    "same": _convolution(lambda bias: nn.Conv2d(2, 3, (2, 3), padding="same", bias=bias), (2, 4, 4)),
    "dilation": _convolution(lambda bias: nn.Conv2d(2, 3, 2, dilation=(2, 3), bias=bias), (2, 5, 5)),
    "groups": _convolution(lambda bias: nn.Conv2d(4, 6, 2, groups=2, padding=1, bias=bias), (4, 3, 3)),
    "depthwise": _convolution(lambda bias: nn.Conv2d(3, 6, 3, groups=3, bias=bias), (3, 4, 4)),
    "1d": _convolution(lambda bias: nn.Conv1d(3, 4, 3, padding=1, stride=2, bias=bias), (3, 7)),
    "3d": _convolution(lambda bias: nn.Conv3d(2, 2, 2, dilation=(1, 1, 2), bias=bias), (2, 3, 3, 4)),
}


def network(kind: str = "dense", *, bias: bool = True, rows: int = 12) -> tuple[nn.Module, Tensor, Tensor]:
    """A seeded float64 network of that kind, inputs and class labels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, shape, axis = KINDS[kind](bias)
    x = uneven((rows, *shape), axis=axis)
    return model.double(), x, torch.arange(rows) % CLASSES


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), y)


def backward(model: nn.Module, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
    """One forward and backward pass; gradients add up."""
    (scale * loss_of(model, x, y)).backward()


def gradient(model: nn.Module) -> Tensor:
    """All gradients, flat."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def stepped(model: nn.Module, x: Tensor, y: Tensor, pre: BNP) -> tuple[Tensor, Tensor]:
    """The gradient before and after `pre.step()`."""
    model.zero_grad()
    backward(model, x, y)
    before = gradient(model)
    pre.step()
    return before, gradient(model)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())
