"""The network of `krylov.py`, an independent check of eigenpairs, and what other packages make of its Hessian."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from side_by_side import eig_for_pyhessian, installed, seconds
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.training import fit

LOSS = nn.functional.cross_entropy


class Network:
    """A trained network with its data: a risk and a plain gradient in either dtype, and an independent product."""

    def __init__(self, data: Any, epochs: int, device: str) -> None:
        x, y = data.tensors
        x = x.flatten(1).float()
        model = bnp.models.mlp([x.shape[1], 100, 100, 100, 10], seed=0, dtype=torch.float32)
        if epochs:
            fit(model, LOSS, (x, y), epochs=epochs, batch_size=128, lr=0.1, momentum=0.0)
        self.model, self.x, self.y = model.to(device), x.to(device), y.to(device)
        self._exact: tuple[list[Tensor], tuple[Tensor, ...]] | None = None

    def copy(self, dtype: torch.dtype) -> nn.Module:
        x = self.x.shape[1]
        twin = bnp.models.mlp([x, 100, 100, 100, 10], dtype=dtype).to(self.x.device)
        twin.load_state_dict({name: t.to(dtype) for name, t in self.model.state_dict().items()})
        return twin

    def risk(self, dtype: torch.dtype) -> bnp.EmpiricalRisk:
        return bnp.EmpiricalRisk(self.copy(dtype), LOSS, (self.x.to(dtype), self.y))

    def gradient(self, dtype: torch.dtype) -> Callable[[], Any]:
        twin, x = self.copy(dtype), self.x.to(dtype)
        parameters = list(twin.parameters())
        return lambda: torch.autograd.grad(LOSS(twin(x), self.y), parameters)

    def residuals(self, values: Any, vectors: Tensor) -> list[float]:
        """`|A x - theta x| / |theta|` for the columns, by double backward in float64."""
        if self._exact is None:
            twin = self.copy(torch.float64)
            parameters = list(twin.parameters())
            loss = LOSS(twin(self.x.double()), self.y)
            self._exact = parameters, torch.autograd.grad(loss, parameters, create_graph=True)
        parameters, gradients = self._exact
        found = []
        for theta, column in zip(np.asarray(values, dtype=float), vectors.T.double().to(self.x.device), strict=True):
            v = column / column.norm()
            parts = v.split([p.numel() for p in parameters])
            cotangents = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
            image = torch.autograd.grad(gradients, parameters, cotangents, retain_graph=True)
            found.append(float((torch.cat([t.reshape(-1) for t in image]) - theta * v).norm()) / abs(theta))
        return found


def timed(unit: Callable[[], Any], work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work gives, and its time over the unit's, taken before and after."""
    kept: list[Any] = []
    before = [seconds(unit) for _ in range(5)]
    spent = seconds(lambda: kept.append(work()))
    after = [seconds(unit) for _ in range(5)]
    return kept[0], spent / statistics.median(before + after)


def eigenthings(network: Network) -> Any:
    from hessian_eigenthings import HessianOperator

    batches = [(network.x, network.y)]
    return HessianOperator(network.copy(torch.float32), batches, lambda m, batch: LOSS(m(batch[0]), batch[1]))


@contextmanager
def counted_pyhessian(network: Network) -> Iterator[tuple[Any, list[int]]]:
    """Pyhessian's object and a list as long as its products."""
    import pyhessian

    module = sys.modules["pyhessian.hessian"]  # the package's attribute of this name is the class
    calls: list[int] = []
    true_product = module.hessian_vector_product

    def product(*arguments: Any) -> Any:
        calls.append(1)
        return true_product(*arguments)

    module.hessian_vector_product = product
    try:
        with torch.random.fork_rng(devices=[]), eig_for_pyhessian():
            torch.manual_seed(0)
            model = network.copy(torch.float32)
            yield pyhessian.hessian(model, LOSS, data=(network.x, network.y), cuda=network.x.is_cuda), calls
    finally:
        module.hessian_vector_product = true_product


def peers(network: Network, k: int, tol: float) -> Iterator[dict[str, Any]]:
    """The same eigenpairs by others, each row a setting: products, gradients, the worst residual."""
    from scipy.sparse.linalg import LinearOperator, eigsh

    unit = network.gradient(torch.float32)
    A = bnp.hessian(network.risk(torch.float32))
    inner = A.to_scipy()

    def row(name: str, products: int, gradients: float, values: Any, vectors: Tensor) -> dict[str, Any]:
        residual = max(network.residuals(values, vectors))
        return {"name": name, "products": products, "gradients": gradients, "residual": residual}

    for ncv in (2 * k + 1, 4 * k, 6 * k):
        calls: list[int] = []

        def counted(v: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            return inner.matvec(v)

        wrapped = LinearOperator(A.shape, matvec=counted, dtype=inner.dtype)
        start = np.random.default_rng(0).standard_normal(A.dim).astype(inner.dtype)

        def solve(wrapped: Any = wrapped, ncv: int = ncv, start: Any = start) -> Any:
            return eigsh(wrapped, k, which="LA", tol=tol, ncv=ncv, v0=start)

        (values, vectors), gradients = timed(unit, solve)
        yield row(f"SciPy eigsh over our product, ncv {ncv}", len(calls), gradients, values, torch.as_tensor(vectors))
    if installed("hessian-eigenthings"):
        from hessian_eigenthings import lanczos as theirs

        operator = eigenthings(network)
        for steps in (2 * k, 3 * k, 4 * k, 6 * k, 10 * k):
            found, gradients = timed(
                unit,
                lambda steps=steps: theirs(operator, k=k, max_iter=steps, reorthogonalize=True, which="LA", seed=0),
            )
            last = row(
                f"hessian-eigenthings lanczos, max_iter {steps}, reorthogonalized",
                *(steps, gradients, found.eigenvalues.tolist(), found.eigenvectors.T),
            )
            if last["residual"] <= tol:
                break
        yield last  # the least number of steps tried that meets the tolerance
    if installed("pyhessian"):
        with counted_pyhessian(network) as (measured, calls):
            found, gradients = timed(unit, lambda: measured.eigenvalues(maxIter=200, tol=tol, top_n=k))
            flat = torch.stack([torch.cat([part.reshape(-1) for part in v]) for v in found[1]], dim=1).detach()
            yield row("pyhessian power iteration, maxIter 200", len(calls), gradients, found[0], flat)
