"""Networks on digits: their Gauss-Newton matrices, layer and unit blocks, with and without `P`, and their Hessians.

For perceptrons the answer is computed anew from the weights, in extended precision: forward pass, Jacobian, square
root of the loss's curvature and `P`. For the convolutional network the rows that the package computes are taken as
given, so that only what happens after them is checked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from truth_arithmetic import Long, eigenvalues, long
from truth_problems import BOTH, Case, Problem, Truth, truth_of

import bnp_analysis as bnp
from bnp_analysis.linalg.preconditioner import DensePreconditioner, Preconditioner
from bnp_analysis.precondition import BlockDiagonal, BNPBlock, DiagonalPreconditioner, diagonal_preconditioner

# Hidden units and examples: more rows than parameters, and the other way round.
TALL, WIDE = (3, 60), (8, 20)
STAGES = (0, 100, 800)


def squared(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error against one-hot targets."""
    return nn.functional.mse_loss(output, nn.functional.one_hot(y, output.shape[1]).to(output))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"CE": nn.functional.cross_entropy, "MSE": squared}


def build(kind: str, hidden: int) -> nn.Sequential:
    if kind == "conv":
        return bnp.models.cnn((1, 8, 8), 10, channels=(2, 2, 2), hidden=2 * hidden, seed=1, dtype=torch.float64)
    return bnp.models.mlp((64, hidden, 10), activation=kind, seed=1, dtype=torch.float64)


@cache
def trained(kind: str, loss: str, hidden: int, steps: int) -> dict[str, Tensor]:
    """The parameters after some steps of gradient descent with momentum on 400 digits."""
    model = build(kind, hidden)
    x, y = digits(400, kind)
    order = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02 if kind == "conv" else 0.1, momentum=0.9)
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=order)[:50]
        optimizer.zero_grad(set_to_none=True)
        LOSSES[loss](model(x[rows]), y[rows]).backward()
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def digits(n: int, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    data = bnp.data.load("digits", n=n, flatten=kind != "conv", dtype=dtype)
    return data.x, data.y


def risk_of(
    kind: str, loss: str, stage: int, dtype: torch.dtype = torch.float64, shape: tuple[int, int] = TALL
) -> bnp.EmpiricalRisk:
    hidden, examples = shape
    model = build(kind, hidden)
    model.load_state_dict(trained(kind, loss, hidden, stage))
    return bnp.EmpiricalRisk(model.to(dtype), LOSSES[loss], digits(examples, kind, dtype))


def exact_rows(risk: bnp.EmpiricalRisk, kind: str, loss: str) -> Long:
    """`S^(1/2) J` of a perceptron with one hidden layer, from its weights."""
    W1, b1, W2, b2 = (long(p) for p in risk.space.unflatten(risk.theta).values())
    batch = next(iter(risk.batches))
    x = long(batch.x)
    a = x @ W1.T + b1
    h, slope = _activation(kind, a)
    z = h @ W2.T + b2
    count, classes = z.shape
    J = np.zeros((count, classes, sum(p.size for p in (W1, b1, W2, b2))), dtype=np.longdouble)
    inner = W2[None] * slope[:, None, :]
    cut = np.cumsum([W1.size, b1.size, W2.size])
    J[..., : cut[0]] = (inner[..., None] * x[:, None, None, :]).reshape(count, classes, -1)
    J[..., cut[0] : cut[1]] = inner
    for k in range(classes):
        J[:, k, cut[1] + k * h.shape[1] : cut[1] + (k + 1) * h.shape[1]] = h
        J[:, k, cut[2] + k] = 1
    if loss == "MSE":
        return (J * np.sqrt(np.longdouble(2) / (count * classes))).reshape(count * classes, -1)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    centred = J - np.einsum("nk,nkp->np", p, J)[:, None]
    return (np.sqrt(p / count)[..., None] * centred).reshape(count * classes, -1)


def _activation(kind: str, a: Long) -> tuple[Long, Long]:
    if kind == "tanh":
        h = np.tanh(a)
        return h, 1 - h * h
    slope = np.where(a > 0, np.longdouble(1), np.longdouble(0.01 if kind == "leaky_relu" else 0))
    return a * slope, slope


def times(rows: Long, P: Preconditioner) -> Long:
    """`F P` from the numbers that define `P`."""
    if isinstance(P, DiagonalPreconditioner):
        return rows * long(P.scales)
    if not isinstance(P, BlockDiagonal):
        return rows @ long(P.to_dense())
    out = rows.copy()
    for positions, block in P.blocks.values():
        assert isinstance(block, BNPBlock)
        assert block.bias
        weights, bias = positions[: -block.units].numpy(), positions[-block.units :].numpy()
        F = rows[:, weights].reshape(len(rows), block.units, block.features)
        mu, sigma = long(block.mean), np.sqrt(long(block.variance))
        against = (F - rows[:, bias][..., None] * mu) / (sigma * np.longdouble(block.q))
        out[:, weights] = against.reshape(len(rows), -1)
        out[:, bias] = rows[:, bias] / np.longdouble(block.q)
    return out


def preconditioner(name: str, risk: bnp.EmpiricalRisk, block: Any = None) -> Preconditioner | None:
    if name == "no P":
        return None
    if name == "BNP":
        return bnp.bnp_preconditioner(risk) if block is None else bnp.bnp_preconditioner(risk, block=block)
    if name == "diagonal P":
        P = diagonal_preconditioner(risk)
        return P if block is None else P.block(block)
    n = risk.space.dim if block is None else risk.space.indices(block).numel()
    g = torch.Generator().manual_seed(5)
    left, right = (bnp.testing.random_orthogonal(n, g) for _ in range(2))
    return DensePreconditioner((left * bnp.testing.spectrum("log", n, 1e5, scale=1e5) @ right).to(risk.space.dtype))


def network(
    kind: str,
    loss: str,
    stage: int,
    way: str = "no P",
    *,
    block: Any = None,
    shape: tuple[int, int] = TALL,
    dtype: torch.dtype = torch.float64,
    methods: tuple[str, ...] = BOTH,
) -> Callable[[], Case]:
    def make() -> Case:
        risk = risk_of(kind, loss, stage, dtype, shape)
        A = bnp.gauss_newton(risk, block=block)
        P = preconditioner(way, risk, block)
        if kind == "conv":
            factor = A.factor
            assert factor is not None
            rows, source = long(factor.to_dense()), "extended precision from the computed rows"
        else:
            rows, source = exact_rows(risk, kind, loss), "extended precision from the weights"
            if block is not None:
                rows = rows[:, risk.space.indices(block).numpy()]
        product = rows if P is None else times(rows, P)
        size = 0.0
        if P is not None:
            magnitudes = P.absolute()._rmatmat(torch.from_numpy(np.abs(rows).astype(np.float64)).to(dtype).T)
            size = float(torch.linalg.matrix_norm(magnitudes.double(), 2))
        null = bnp.null_directions(risk, block=block)
        facts = {"null directions": null.basis.shape[1], "parameters": A.dim}
        return Case(A, truth_of(product, size, source=source), methods, P=P, null=null, facts=facts)

    return make


def hessian(kind: str, loss: str, stage: int) -> Callable[[], Case]:
    """The Hessian in all parameters but the first weights, in general indefinite."""

    def make() -> Case:
        risk = risk_of(kind, loss, stage, shape=(8, 60)).restrict(("fc1.bias", "fc2.weight", "fc2.bias"))
        H = bnp.hessian(risk)
        dense = H.to_dense()
        values = eigenvalues(long((dense + dense.T) / 2))
        sizes = np.sort(np.abs(values))
        doubt = len(values) * 2.3e-16 * float(sizes[-1])
        kept = sizes[sizes > 100 * doubt]
        least, top = float(kept[0]), float(kept[-1])
        truth = Truth(
            (top - doubt) / (least + doubt), (top + doubt) / (least - doubt), "entries to rounding", len(kept)
        )
        return Case(H, truth, ("dense", "inertia", "lanczos"), indefinite=True)

    return make


def problems() -> Iterator[Problem]:
    """All network problems."""
    yield from whole_networks()
    yield from blocks()


def whole_networks() -> Iterator[Problem]:
    acts, f32 = ("relu", "tanh", "leaky_relu"), torch.float32
    for kind in acts:
        for loss in LOSSES:
            for stage in STAGES:
                for way in ("no P", "BNP"):
                    make = network(kind, loss, stage, way)
                    quick = kind == "relu" and loss == "MSE" and stage == 100 and way == "BNP"
                    yield Problem("network", f"{kind} {loss}, {stage} steps, {way}", make, quick)
    for stage in STAGES:
        for way in ("no P", "BNP"):
            make = network("conv", "CE", stage, way)
            yield Problem("network", f"conv CE, {stage} steps, {way}", make)
    for kind in ("relu", "tanh"):
        for loss in LOSSES:
            for way in ("no P", "BNP"):
                make = network(kind, loss, 100, way, shape=WIDE)
                yield Problem("network, fewer rows than parameters", f"{kind} {loss}, 100 steps, {way}", make)
    for loss in LOSSES:
        make = network("relu", loss, 100, "diagonal P")
        yield Problem("network", f"relu {loss}, 100 steps, diagonal P", make)
    for kind in ("relu", "tanh"):
        for loss in LOSSES:
            for stage in (0, 800):
                for way in ("no P", "BNP"):
                    make = network(kind, loss, stage, way, dtype=f32)
                    yield Problem("network, float32", f"{kind} {loss}, {stage} steps, {way}", make, False)


def blocks() -> Iterator[Problem]:
    dense = ("factor-svd", "golub-kahan", "dense", "inertia", "lanczos")
    for kind in ("relu", "tanh"):
        for layer in ("fc1", "fc2"):
            for stage in (0, 800):
                for way in ("no P", "BNP", "diagonal P"):
                    make = network(kind, "CE", stage, way, block=layer, methods=dense if layer == "fc2" else BOTH)
                    quick = kind == "relu" and layer == "fc2" and stage == 0 and way == "BNP"
                    yield Problem("layer block", f"{kind} CE {layer}, {stage} steps, {way}", make, quick)
    for layer, loss in (("fc2", "CE"), ("fc2", "MSE")):
        make = network("tanh", loss, 0, "random P, |P| 1e5", block=layer)
        yield Problem("layer block", f"tanh {loss} {layer}, 0 steps, random P, |P| 1e5", make, quick=True)
    for kind in ("relu", "tanh"):
        for unit in (("fc1", 2), ("fc2", 3)):
            for way in ("no P", "BNP", "diagonal P"):
                make = network(kind, "CE", 100, way, block=unit, methods=dense)
                yield Problem(
                    "unit block", f"{kind} CE {unit[0]} unit {unit[1]}, 100 steps, {way}", make, unit[0] == "fc2"
                )
    for kind in ("relu", "tanh"):
        for stage in (0, 100):
            make = hessian(kind, "CE", stage)
            yield Problem("Hessian", f"{kind} CE, {stage} steps, all but the first weights", make, quick=kind == "tanh")
