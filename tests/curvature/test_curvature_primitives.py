"""Catches: a derivative mode under which torch's fused layers give silently wrong second derivatives (forward mode over
reverse mode through BatchNorm, LayerNorm, InstanceNorm), in products, in factors, in batched rows of Jacobians.

Every layer is written again with sums, products and roots; the written-out network is differentiated densely.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvature_reference import Problem, classes, numbers, relative, spread
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp


def standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    mean = x.sum(dim=dims, keepdim=True) / math.prod(x.shape[d] for d in dims)
    centred = x - mean
    variance = (centred * centred).sum(dim=dims, keepdim=True) / math.prod(x.shape[d] for d in dims)
    return centred / (variance + eps) ** 0.5


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *([1] * (x.ndim - 2)))


class WrittenBatchNorm(nn.Module):
    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = fused.weight, fused.bias, fused.eps
        self.live = fused.training or fused.running_mean is None
        self.mean, self.variance = fused.running_mean, fused.running_var

    def forward(self, x: Tensor) -> Tensor:
        if self.live:
            normal = standardized(x, (0, *range(2, x.ndim)), self.eps)
        else:
            normal = (x - per_channel(self.mean, x)) / (per_channel(self.variance, x) + self.eps) ** 0.5
        return normal * per_channel(self.weight, x) + per_channel(self.bias, x)


class WrittenLayerNorm(nn.Module):
    def __init__(self, fused: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.rank = fused.weight, fused.bias, fused.eps, len(fused.normalized_shape)

    def forward(self, x: Tensor) -> Tensor:
        return standardized(x, tuple(range(x.ndim - self.rank, x.ndim)), self.eps) * self.weight + self.bias


class WrittenGroupNorm(nn.Module):
    """Also InstanceNorm, with as many groups as channels."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = fused.weight, fused.bias, fused.eps
        self.groups = fused.num_groups if isinstance(fused, nn.GroupNorm) else fused.num_features

    def forward(self, x: Tensor) -> Tensor:
        grouped = x.reshape(x.shape[0], self.groups, -1)
        normal = standardized(grouped, (2,), self.eps).view(x.shape)
        return normal * per_channel(self.weight, x) + per_channel(self.bias, x)


class WrittenConv(nn.Module):
    """A sum over kernel positions of shifted inputs, zero padding."""

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self.weight, self.bias = fused.weight, fused.bias
        self.settings = (fused.stride, fused.padding, fused.dilation, fused.groups)

    def forward(self, x: Tensor) -> Tensor:
        stride, padding, dilation, groups = self.settings
        n, c, *space = x.shape
        kernel = self.weight.shape[2:]
        padded = x.new_zeros(n, c, *(s + 2 * p for s, p in zip(space, padding, strict=True)))
        padded[(..., *(slice(p, p + s) for s, p in zip(space, padding, strict=True)))] = x
        sizes = [
            (s + 2 * p - d * (k - 1) - 1) // t + 1
            for s, p, d, k, t in zip(space, padding, dilation, kernel, stride, strict=True)
        ]
        out = 0.0
        for place in itertools.product(*(range(k) for k in kernel)):
            cut = tuple(
                slice(i * d, i * d + t * (s - 1) + 1, t)
                for i, d, t, s in zip(place, dilation, stride, sizes, strict=True)
            )
            part = padded[(..., *cut)].reshape(n, groups, c // groups, *sizes)
            w = self.weight[(..., *place)].view(groups, -1, c // groups)
            out = out + torch.einsum("ngc...,guc->ngu...", part, w).reshape(n, -1, *sizes)
        return out if self.bias is None else out + per_channel(self.bias, x)


class WrittenMaxPool(nn.Module):
    def __init__(self, fused: nn.MaxPool2d) -> None:
        super().__init__()
        self.k = fused.kernel_size

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(2, self.k, self.k).unfold(3, self.k, self.k)
        return patches.flatten(start_dim=4).max(dim=4).values


class WrittenGELU(nn.Module):
    def __init__(self, fused: nn.GELU) -> None:
        super().__init__()
        self.tanh = fused.approximate == "tanh"

    def forward(self, x: Tensor) -> Tensor:
        if self.tanh:
            return 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x * x * x)))
        return 0.5 * x * (1 + torch.erf(x / 2**0.5))


class FusedAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class WrittenAttention(nn.Module):
    def __init__(self, fused: nn.Module) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = x.chunk(3, dim=-1)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = torch.where(later, 0.0, scores.exp())
        return weights / weights.sum(dim=-1, keepdim=True) @ v


WRITTEN: dict[type, Callable[[Any], nn.Module]] = {
    nn.BatchNorm1d: WrittenBatchNorm,
    nn.BatchNorm2d: WrittenBatchNorm,
    nn.BatchNorm3d: WrittenBatchNorm,
    nn.LayerNorm: WrittenLayerNorm,
    nn.GroupNorm: WrittenGroupNorm,
    nn.InstanceNorm1d: WrittenGroupNorm,
    nn.InstanceNorm2d: WrittenGroupNorm,
    nn.Conv1d: WrittenConv,
    nn.Conv2d: WrittenConv,
    nn.Conv3d: WrittenConv,
    nn.MaxPool2d: WrittenMaxPool,
    nn.GELU: WrittenGELU,
    FusedAttention: WrittenAttention,
}


def written(model: nn.Module) -> nn.Module:
    """The same parameters under the same names, through written-out layers."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if type(module) in WRITTEN:
            parent, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, WRITTEN[type(module)](module))
    return twin


def table(*middle: nn.Module) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(3, 4), *middle, nn.Tanh(), nn.Linear(4, 3)), numbers(6, 3)


def signal(*middle: nn.Module, channels: int = 4) -> tuple[nn.Module, Tensor]:
    layers = nn.Sequential(nn.Conv1d(2, 4, 2), *middle, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    return layers, numbers(4, 2, 4)


def image(*middle: nn.Module) -> tuple[nn.Module, Tensor]:
    layers = nn.Sequential(nn.Conv2d(1, 4, 2, padding=1), *middle, nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    return layers, numbers(4, 1, 3, 3)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "BatchNorm1d": lambda: table(nn.BatchNorm1d(4)),
    "BatchNorm1d over a signal": lambda: signal(nn.BatchNorm1d(4)),
    "BatchNorm1d without running statistics": lambda: table(nn.BatchNorm1d(4, track_running_stats=False)),
    "BatchNorm2d": lambda: image(nn.BatchNorm2d(4)),
    "two BatchNorms": lambda: (
        nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)),
        numbers(6, 3),
    ),
    "LayerNorm": lambda: table(nn.LayerNorm(4)),
    "GroupNorm": lambda: image(nn.GroupNorm(2, 4)),
    "InstanceNorm1d": lambda: signal(nn.InstanceNorm1d(4, affine=True)),
    "InstanceNorm2d": lambda: image(nn.InstanceNorm2d(4, affine=True)),
    "Conv1d": lambda: signal(nn.Conv1d(4, 4, 2, stride=2, padding=1, groups=2)),
    "Conv2d": lambda: image(nn.Conv2d(4, 4, 2, stride=2, padding=1, dilation=2, groups=2)),
    "Conv3d": lambda: (
        nn.Sequential(nn.Conv3d(1, 3, 2, padding=(0, 1, 0)), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3)),
        numbers(4, 1, 2, 2, 3),
    ),
    "max-pool": lambda: image(nn.MaxPool2d(2)),
    "GELU": lambda: table(nn.GELU()),
    "GELU, tanh": lambda: table(nn.GELU("tanh")),
    "attention": lambda: (
        nn.Sequential(nn.Linear(3, 9), FusedAttention(), nn.Flatten(), nn.Linear(12, 3)),
        numbers(4, 4, 3),
    ),
}

LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[[int], Tensor]]] = {
    "cross_entropy": (F.cross_entropy, lambda n: classes(n, 3)),
    "mse": (F.mse_loss, lambda n: numbers(n, 3, seed=5)),
    "bce": (F.binary_cross_entropy_with_logits, lambda n: F.one_hot(classes(n, 3), 3).double()),
    "smooth_l1": (F.smooth_l1_loss, lambda n: numbers(n, 3, seed=5)),
}


def problems(network: str, loss: str, train: bool) -> tuple[Problem, Problem]:
    model, x = NETWORKS[network]()
    model.double().eval()(x)  # lazy layers take shape
    model = spread(model).train(train)
    function, targets = LOSSES[loss]
    batches = [(x, targets(len(x)))]
    return Problem(model, function, batches), Problem(written(model), function, batches)


# Every network with the losses in turn, in both modes if it has two; every loss with the batch's own statistics.
CASES = {
    (network, [*LOSSES][(i + train) % 4], train)
    for i, network in enumerate(NETWORKS)
    for train in ((True, False) if "BatchNorm" in network else (i % 2 == 0,))
}
CASES |= {(next(iter(NETWORKS)), loss, True) for loss in LOSSES}


@pytest.mark.parametrize(("network", "loss", "train"), sorted(CASES))
def test_fused_layers_differentiate_like_written_ones(network: str, loss: str, train: bool) -> None:
    fused, reference = problems(network, loss, train)
    risk = fused.risk()
    assert relative(risk.outputs, reference.outputs(reference.theta, 0)) <= 1e-12
    V, G = numbers(risk.space.dim, 2, seed=9), reference.gauss_newton()
    assert relative(bnp.hessian(risk) @ V, reference.hessian_product(V)) <= 1e-10
    A = bnp.gauss_newton(risk)
    assert relative(A @ V, G @ V) <= 1e-10
    rows = A.factor.to_dense()
    assert relative(rows.T @ rows, G) <= 1e-10
    assert relative(A.factor @ V, rows @ V) <= 1e-10


def test_the_written_layers_are_other_code() -> None:
    """The comparison would be empty if a layer were left as it is."""
    for network, make in NETWORKS.items():
        model, x = make()
        model(x.float())
        twin = written(model)
        assert not any(type(m) in WRITTEN for m in twin.modules()), network
        assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
