"""Small float64 networks with inputs that are neither centred nor of one scale, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import bnp_analysis as bnp

CLASSES = 3


def uneven(shape: tuple[int, ...], seed: int, axis: int = 1) -> Tensor:
    """Random inputs whose features (or channels, along `axis`) have different means and scales."""
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, dtype=torch.float64, generator=g)
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    scale = 10 ** torch.linspace(-0.5, 0.5, shape[axis], dtype=torch.float64).view(sizes)
    shift = torch.linspace(1, -0.7, shape[axis], dtype=torch.float64).view(sizes)
    return scale * (x + shift)


def _convolutional(
    layer: Callable[..., nn.Module], inputs: tuple[int, ...]
) -> Callable[[bool], tuple[nn.Module, Tensor]]:
    def make(bias: bool) -> tuple[nn.Module, Tensor]:
        x = uneven(inputs, 1)
        first = layer(bias=bias).double()
        width = first(x).flatten(1).shape[1]
        return nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(width, CLASSES, bias)), x

    return make


def _perceptron(bias: bool) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(5, 4, bias), nn.LeakyReLU(0.1), nn.Linear(4, CLASSES, bias)), uneven((12, 5), 1)


def _sequence(bias: bool) -> tuple[nn.Module, Tensor]:
    return (
        nn.Sequential(nn.Linear(4, 3, bias), nn.Tanh(), nn.Flatten(), nn.Linear(15, CLASSES, bias)),
        uneven((6, 5, 4), 1, axis=2),
    )


NETWORKS: dict[str, Callable[[bool], tuple[nn.Module, Tensor]]] = {
    "dense": _perceptron,
    "sequence": _sequence,
    "conv": _convolutional(lambda bias: nn.Conv2d(2, 3, 3, bias=bias), (6, 2, 5, 5)),
    "stride": _convolutional(lambda bias: nn.Conv2d(2, 3, (3, 2), stride=(2, 1), bias=bias), (6, 2, 5, 4)),
    "padding": _convolutional(lambda bias: nn.Conv2d(2, 3, 3, padding=1, bias=bias), (6, 2, 3, 3)),
    "same": _convolutional(lambda bias: nn.Conv2d(2, 3, (2, 3), padding="same", bias=bias), (6, 2, 3, 3)),
    "circular": _convolutional(
        lambda bias: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular", bias=bias), (6, 2, 3, 3)
    ),
    "reflect": _convolutional(
        lambda bias: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="reflect", bias=bias), (6, 2, 3, 3)
    ),
    "dilation": _convolutional(lambda bias: nn.Conv2d(2, 3, 2, dilation=(2, 3), bias=bias), (6, 2, 5, 5)),
    "groups": _convolutional(lambda bias: nn.Conv2d(4, 6, 2, 2, 1, groups=2, bias=bias), (6, 4, 3, 3)),
    "depthwise": _convolutional(lambda bias: nn.Conv2d(3, 6, 3, groups=3, bias=bias), (6, 3, 4, 4)),
    "1d": _convolutional(lambda bias: nn.Conv1d(3, 4, 3, padding=1, stride=2, bias=bias), (6, 3, 7)),
    "3d": _convolutional(lambda bias: nn.Conv3d(2, 2, 2, dilation=(1, 1, 2), bias=bias), (6, 2, 3, 3, 4)),
}


def network(kind: str, *, bias: bool = True, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    """A seeded network of that kind, its inputs and class labels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, x = NETWORKS[kind](bias)
    return model.double(), x, torch.arange(x.shape[0]) % CLASSES


def classification(kind: str, *, bias: bool = True, seed: int = 0) -> bnp.EmpiricalRisk:
    """The cross-entropy risk of such a network."""
    model, x, y = network(kind, bias=bias, seed=seed)
    return bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))


def one_layer(x: Tensor, units: int = 1, *, bias: bool = True, seed: int = 0) -> bnp.EmpiricalRisk:
    """Least squares with one dense layer: its Gauss-Newton blocks are `2 H^^T H^ / (R n)`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Linear(x.shape[-1], units, bias).to(x.dtype)
    return bnp.EmpiricalRisk(model, nn.functional.mse_loss, (x, torch.zeros(*x.shape[:-1], units, dtype=x.dtype)))


def relative(a: Tensor, b: Tensor) -> float:
    """`|a - b| / |b|` in the norm of all entries."""
    return float((a - b).norm() / b.norm())
