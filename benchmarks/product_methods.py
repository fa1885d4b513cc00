"""Products with curvature matrices by this package's engines, plain torch and other packages, on the same data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from side_by_side import PEERS, installed
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.models import cnn, mlp, resnet

LOSS = nn.functional.cross_entropy
Product = Callable[[Tensor], Tensor]
#: name -> (network, shape of an example, examples, examples with --quick, with --gpu).
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, int, int]] = {
    "MLP": (lambda: mlp([784, 100, 100, 100, 10], dtype=torch.float32), (784,), 2048, 128, 65536),
    "CNN": (lambda: cnn(dtype=torch.float32), (3, 32, 32), 256, 8, 4096),
    "ResNet": (lambda: resnet(20, dtype=torch.float32), (3, 32, 32), 64, 2, 2048),
}
TITLES = {"MLP": "MLP 784-100-100-100-10", "CNN": "five-layer CNN", "ResNet": "ResNet-20 without BN"}
OURS = "bnp_analysis"


class Problem:
    """A network with random data and a direction."""

    def __init__(self, name: str, size: int, device: str, dtype: torch.dtype = torch.float32) -> None:
        make, shape, *_ = NETWORKS[name]
        g = torch.Generator().manual_seed(0)
        self.model = make().to(device, dtype)
        self.x = torch.rand(size, *shape, generator=g).to(device, dtype)
        self.y = (torch.arange(size) % 10).to(device)
        self.parameters = list(self.model.parameters())
        dim = sum(p.numel() for p in self.parameters)
        self.v = torch.randn(dim, generator=g).to(device, dtype)

    def loss(self) -> Tensor:
        return LOSS(self.model(self.x), self.y)

    def gradient(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.loss(), self.parameters)

    @cached_property
    def risk(self) -> bnp.EmpiricalRisk:
        return bnp.EmpiricalRisk(self.model, LOSS, (self.x, self.y))

    def split(self, v: Tensor) -> list[Tensor]:
        parts = v.split([p.numel() for p in self.parameters])
        return [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]

    def functional(self) -> tuple[Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """The gradient as a function of the parameters."""
        names = [name for name, _ in self.model.named_parameters()]

        def loss(values: tuple[Tensor, ...]) -> Tensor:
            named = dict(zip(names, values, strict=True))
            return LOSS(torch.func.functional_call(self.model, named, (self.x,)), self.y)

        return torch.func.grad(loss), tuple(p.detach() for p in self.parameters)


def flat(parts: Any) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])


def double_backward(p: Problem) -> Product:
    def product(v: Tensor) -> Tensor:
        gradients = torch.autograd.grad(p.loss(), p.parameters, create_graph=True)
        return flat(torch.autograd.grad(gradients, p.parameters, p.split(v)))

    return product


def retained(p: Problem) -> Product:
    gradients = torch.autograd.grad(p.loss(), p.parameters, create_graph=True)
    return lambda v: flat(torch.autograd.grad(gradients, p.parameters, p.split(v), retain_graph=True))


def linearized(p: Problem) -> Product:
    gradient, at = p.functional()
    _, derivative = torch.func.linearize(gradient, at)
    return lambda v: flat(derivative(tuple(p.split(v))))


def forward_over_reverse(p: Problem) -> Product:
    gradient, at = p.functional()
    return lambda v: flat(torch.func.jvp(gradient, (at,), (tuple(p.split(v)),))[1])


def eigenthings_hessian(p: Problem) -> Product:
    from hessian_eigenthings import HessianOperator

    return HessianOperator(p.model, [(p.x, p.y)], lambda m, batch: LOSS(m(batch[0]), batch[1])).matvec


def eigenthings_ggn(p: Problem) -> Product:
    from hessian_eigenthings import GGNOperator

    operator = GGNOperator(p.model, [(p.x, p.y)], lambda m, batch: m(batch[0]), lambda f, batch: LOSS(f, batch[1]))
    return operator.matvec


def pyhessian_data(p: Problem) -> Product:
    import pyhessian
    from pyhessian.utils import hessian_vector_product

    kept = pyhessian.hessian(p.model, LOSS, data=(p.x, p.y), cuda=p.x.is_cuda)
    return lambda v: flat(hessian_vector_product(kept.gradsH, kept.params, p.split(v)))


def pyhessian_loader(p: Problem) -> Product:
    import pyhessian

    kept = pyhessian.hessian(p.model, LOSS, dataloader=[(p.x, p.y)], cuda=p.x.is_cuda)
    return lambda v: flat(kept.dataloader_hv_product(p.split(v))[1])


def curvlinops(p: Problem, kind: str) -> Product:
    import curvlinops as package

    settings = {"check_deterministic": False}
    operator = getattr(package, kind)(p.model, nn.CrossEntropyLoss(), p.parameters, [(p.x, p.y)], **settings)
    return lambda v: operator @ v


#: matrix -> {name: what makes the product}; the first of each matrix is the package's default.
METHODS: dict[str, dict[str, Callable[[Problem], Product]]] = {
    "Hessian": {
        OURS: lambda p: bnp.hessian(p.risk).__matmul__,
        f"{OURS}, graph retained": lambda p: bnp.hessian(p.risk, engine="retained").__matmul__,
        f"{OURS}, recomputed": lambda p: bnp.hessian(p.risk, engine="recompute").__matmul__,
        "torch, double backward": double_backward,
        "torch, double backward retained": retained,
        "torch.func.linearize(grad)": linearized,
        "torch.func.jvp(grad)": forward_over_reverse,
        "hessian-eigenthings": eigenthings_hessian,
        "pyhessian, data": pyhessian_data,
        "pyhessian, loader": pyhessian_loader,
        "curvlinops-for-pytorch": lambda p: curvlinops(p, "HessianLinearOperator"),
    },
    "Gauss-Newton": {
        OURS: lambda p: bnp.gauss_newton(p.risk).__matmul__,
        f"{OURS}, recomputed": lambda p: bnp.gauss_newton(p.risk, engine="recompute").__matmul__,
        "hessian-eigenthings": eigenthings_ggn,
        "curvlinops-for-pytorch": lambda p: curvlinops(p, "GGNLinearOperator"),
    },
}


def available() -> Iterator[tuple[str, str]]:
    """Matrix and method of everything that can run here."""
    for matrix, methods in METHODS.items():
        for method in methods:
            peer = method.partition(",")[0]
            if peer not in PEERS or installed(peer):
                yield matrix, method
