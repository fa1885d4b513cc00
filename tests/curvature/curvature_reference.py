"""Curvature by definition, on dense matrices: what the products of the package are compared with.

Nothing here comes from the package: flat vectors, batch weights, Jacobians and Hessians are written out again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call

import bnp_analysis as bnp

Batch = tuple[Any, Any]


@dataclass
class Problem:
    """A model, a loss and batches, with the dense matrices that belong to them."""

    model: nn.Module
    loss: Callable[[Tensor, Any], Tensor]
    batches: list[Batch]
    output: Callable[[Any], Tensor] | None = None
    count: Callable[[Batch], float] | None = None
    params: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def risk(self, **options: Any) -> bnp.EmpiricalRisk:
        given = {"output": self.output, "count": self.count, "params": self.params} | self.options | options
        return bnp.EmpiricalRisk(self.model, self.loss, self.batches, **given)

    @property
    def free(self) -> dict[str, Tensor]:
        """The free tensors in the order of `named_parameters()`."""
        named = dict(self.model.named_parameters())
        if self.params is None:
            return {name: p.detach() for name, p in named.items() if p.requires_grad}
        return {name: p.detach() for name, p in named.items() if name in self.params}

    @property
    def theta(self) -> Tensor:
        return torch.cat([p.reshape(-1) for p in self.free.values()])

    @property
    def weights(self) -> list[float]:
        """Each batch's share of the examples, or of what `count` counts."""
        counts = [float(len(first(x))) if self.count is None else float(self.count((x, y))) for x, y in self.batches]
        return [count / sum(counts) for count in counts]

    def outputs(self, theta: Tensor, batch: int) -> Tensor:
        tensors, begin = {}, 0
        for name, p in self.free.items():
            tensors[name] = theta[begin : begin + p.numel()].view(p.shape)
            begin += p.numel()
        buffers = {name: b.clone() for name, b in self.model.named_buffers()}
        x = self.batches[batch][0]
        args, kwargs = ((), x) if isinstance(x, dict) else (tuple(x) if isinstance(x, tuple) else (x,), {})
        raw = functional_call(self.model, {**tensors, **buffers}, args, kwargs)
        return raw if self.output is None else self.output(raw)

    def value(self, theta: Tensor) -> Tensor:
        parts = zip(self.weights, range(len(self.batches)), strict=True)
        return torch.stack([w * self.loss(self.outputs(theta, b), self.batches[b][1]) for w, b in parts]).sum()

    def gradient(self, theta: Tensor) -> Tensor:
        theta = theta.clone().requires_grad_()
        return torch.autograd.grad(self.value(theta), theta)[0]

    def hessian(self) -> Tensor:
        return hessian(self.value, self.theta)

    def hessian_product(self, V: Tensor) -> Tensor:
        """`H V` by double backward, column by column: for `H` itself there is a backward pass for every parameter."""
        theta = self.theta.clone().requires_grad_()
        slopes = torch.autograd.grad(self.value(theta), theta, create_graph=True)[0]
        return torch.stack([torch.autograd.grad(slopes, theta, v, retain_graph=True)[0] for v in V.T], dim=1)

    def jacobian(self, batch: int) -> Tensor:
        """`(outputs of the batch, n)`."""
        dense = jacobian(lambda theta: self.outputs(theta, batch), self.theta)
        return dense.reshape(-1, dense.shape[-1])

    def output_hessian(self, batch: int) -> Tensor:
        """The Hessian of the batch loss in all outputs of the batch."""
        z, y = self.outputs(self.theta, batch).detach(), self.batches[batch][1]
        return hessian(lambda flat: self.loss(flat.view(z.shape), y), z.reshape(-1))

    def gauss_newton(self) -> Tensor:
        total = 0.0
        for weight, batch in zip(self.weights, range(len(self.batches)), strict=True):
            J = self.jacobian(batch)
            total = total + weight * J.T @ self.output_hessian(batch) @ J
        return total

    def positions(self, names: Iterable[str], unit: int | None = None) -> Tensor:
        """Flat positions of some tensors, or of row `unit` of each."""
        found, begin, wanted = [], 0, set(names)
        for name, p in self.free.items():
            grid = torch.arange(begin, begin + p.numel()).view(p.shape)
            begin += p.numel()
            if name in wanted:
                found.append((grid if unit is None else grid[unit]).reshape(-1))
        return torch.cat(found)


def first(x: Any) -> Tensor:
    """The tensor whose first dimension counts the examples."""
    if isinstance(x, dict):
        return next(iter(x.values()))
    return x[0] if isinstance(x, tuple | list) else x


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers of a seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def classes(count: int, width: int, *more: int, seed: int = 1) -> Tensor:
    """Class labels of a seed."""
    return torch.randint(0, width, (count, *more), generator=torch.Generator().manual_seed(seed))


def spread(model: nn.Module, seed: int = 0, scale: float = 0.6) -> nn.Module:
    """The model in float64 with parameters that are all generic: no zero bias, no unit gain, no fresh buffer."""
    g = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=g, dtype=torch.float64))
        for name, b in model.named_buffers():
            if name.endswith("running_mean"):
                b.copy_(0.3 * torch.randn(b.shape, generator=g, dtype=torch.float64))
            if name.endswith("running_var"):
                b.copy_(0.5 + torch.rand(b.shape, generator=g, dtype=torch.float64))
    return model


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest entry of `b`."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))


def split(x: Any, y: Tensor, sizes: Iterable[int]) -> list[Batch]:
    """Uneven batches of a pair."""
    found, begin = [], 0
    for size in sizes:
        cut = slice(begin, begin + size)
        part = {k: v[cut] for k, v in x.items()} if isinstance(x, dict) else x[cut]
        found.append((part, y[cut]))
        begin += size
    return found
