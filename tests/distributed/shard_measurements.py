"""What the tests measure in one process and in several: name -> tensors, for a handful of small problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.distributed import Group
from bnp_analysis.network import coverage, layer_rows
from bnp_analysis.network.moments import input_triangles, layer_moments

cross_entropy, mse = nn.functional.cross_entropy, nn.functional.mse_loss
Found = dict[str, Any]


def data(count: int, *shape: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, *shape, generator=g, dtype=torch.float64) + 0.5, torch.arange(count) % 3


def dense() -> nn.Module:
    return bnp.models.mlp([4, 5, 3], seed=2, dtype=torch.float64)


def convolutional() -> nn.Module:
    torch.manual_seed(3)
    conv = nn.Conv2d(2, 4, 2, padding=1, groups=2)
    return nn.Sequential(conv, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 4, 3)).double()


def shards(name: str, group: Group) -> tuple[nn.Module, Any, Any]:
    """The model, the loss and this process's data of a problem; one process has all of them."""
    if name == "uneven":  # two batches against one of one example
        x, y = data(14, 4)
        parts = [[(x[:8], y[:8]), (x[8:13], y[8:13])], [(x[13:], y[13:])]]
        return dense(), cross_entropy, _mine(parts, group)
    if name == "empty shard":
        return dense(), cross_entropy, _mine([[data(14, 4)], []], group)
    if name == "first shard empty":
        return dense(), cross_entropy, _mine([[], [data(14, 4)]], group)
    if name == "convolution":
        x, y = data(9, 2, 3, 3)
        return convolutional(), cross_entropy, _mine([[(x[:6], y[:6])], [(x[6:], y[6:])]], group)
    if name == "squared loss":
        x, _ = data(12, 4)
        return dense(), mse, group.shard((x, x[:, :3].sin()))
    assert name == "shuffled loader"
    dataset = torch.utils.data.TensorDataset(*data(20, 4))
    return dense(), cross_entropy, torch.utils.data.DataLoader(group.shard(dataset), batch_size=3, shuffle=True)


PROBLEMS = ("uneven", "empty shard", "first shard empty", "convolution", "squared loss", "shuffled loader")


def _mine(parts: list[list[Any]], group: Group) -> list[Any]:
    return parts[group.rank] if group.size == 2 else [batch for part in parts for batch in part]


def measured(name: str, group: Group) -> Found:
    """Everything that is compared, for one problem."""
    model, loss, part = shards(name, group)
    risk = bnp.EmpiricalRisk(model, loss, part, group=group)
    found: Found = {}
    for measure in (_risk, _products, _inputs, _preconditioners, *MORE.get(name, ())):
        found |= measure(risk)
    return {name: torch.as_tensor(value) if isinstance(value, np.ndarray) else value for name, value in found.items()}


def _vectors(count: int) -> Tensor:
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def _risk(risk: bnp.EmpiricalRisk) -> Found:
    there = risk.at(risk.theta + 0.1 * _vectors(risk.space.dim)[:, 0])
    found = {"value": risk.value, "gradient": risk.gradient, "value elsewhere": there.value}
    found["gradient elsewhere"] = there.gradient
    if risk.batches.ordered:
        found["outputs"], found["gathered"] = risk.outputs, risk.gathered().gradient
    return found


def _matrices(risk: bnp.EmpiricalRisk) -> Iterator[tuple[str, Callable[..., Any]]]:
    yield "hessian", bnp.hessian
    yield "gauss_newton", bnp.gauss_newton
    if risk.batches.ordered:
        yield "fisher mc", lambda r, **k: bnp.fisher(r, "mc", samples=2, seed=3, **k)
        yield "fisher empirical", lambda r, **k: bnp.fisher(r, "empirical", **k)


def _products(risk: bnp.EmpiricalRisk) -> Found:
    V = _vectors(risk.space.dim)
    found: Found = {}
    for name, make in _matrices(risk):
        A = make(risk)
        found[name] = A @ V
        factor = A.factor
        found[f"{name}: has a factor"] = factor is not None
        if factor is not None:
            found[f"{name} factor"], found[f"{name} factor, dense"] = factor @ V, factor.to_dense()
            found[f"{name} factor transposed"] = factor.T @ _vectors(factor.shape[0])
            found[f"{name} rank bound"] = factor.rank_bound
    return found


def _blocks(risk: bnp.EmpiricalRisk) -> Found:
    found: Found = {}
    for name, make in _matrices(risk):
        for layer in coverage(risk):
            found[f"{name} of {layer.name}"] = make(risk, block=layer.name).to_dense()
        found[f"{name} of a unit"] = make(risk, block=(layer.name, 1)).to_dense()
    for name, blocks in unit_blocks(risk, coverage(risk)).items():
        found |= {f"unit blocks of {name}, {i}": blocks[i].to_dense() for i in range(len(blocks))}
    return found


def _inputs(risk: bnp.EmpiricalRisk) -> Found:
    covered = coverage(risk)
    found: Found = {"covered": [layer.name for layer in covered], "uncovered": dict(covered.uncovered)}
    for statistics in ("channel", "patch"):
        moments = layer_moments(risk, statistics=statistics)
        for name, m in moments.items():
            found[f"{statistics} moments of {name}"] = torch.cat([m.mean, m.variance, m.constant.double()])
            found[f"rows of {name}"] = m.rows
    for name, triangles in input_triangles(risk, moments, covered).items():
        for form in ("raw", "centered", "normalized"):
            grams = [t.T @ t for t in getattr(triangles, form)]
            found[f"{form} inputs of {name}"] = torch.stack(grams)
    if risk.batches.ordered:
        found |= {f"input rows of {name}": rows for name, rows in layer_rows(risk).items()}
    return found


def _preconditioners(risk: bnp.EmpiricalRisk) -> Found:
    V = _vectors(risk.space.dim)
    return {
        "bnp": bnp.bnp_preconditioner(risk) @ V,
        "bnp by patches": bnp.bnp_preconditioner(risk, statistics="patch", eps1=1e-2, eps2=1e-4) @ V,
        "bnp, measured scale": bnp.bnp_preconditioner(risk, q="measured") @ V,
        "bnp, output scale": bnp.bnp_preconditioner(risk, output_scale=True) @ V,
        "kfac": bnp.kfac_preconditioner(risk, damping=0.1) @ V,
        "diagonal": bnp.diagonal_preconditioner(risk, damping=1e-2) @ V,
    }


def _numbers(risk: bnp.EmpiricalRisk) -> Found:
    H, A, P = bnp.hessian(risk), bnp.gauss_newton(risk), bnp.bnp_preconditioner(risk)
    N = bnp.null_directions(risk)
    found: Found = {"null directions": N.basis @ N.basis.T, "their causes": dict(N.sources)}
    for method in ("factor-svd", "golub-kahan", "dense", "inertia", "lanczos"):
        k = bnp.condition_number(A, null=N, method=method, steps=12 if method == "lanczos" else None)
        found |= {f"kappa by {method}": k.value, f"its rank by {method}": k.rank}
    k = bnp.condition_number(A, null=N, preconditioner=P)
    inverse = bnp.linalg.regularized_condition_number(A, 0.1, method="inverse-lanczos", seed=2)
    found |= {"kappa by inverse-lanczos": inverse.value}
    found["check"] = [c.holds for c in bnp.check_theory(risk, only=["T1", "T3"]).checks]
    found |= {"kappa with P": k.value, "its interval": torch.tensor([k.lower, k.upper]).nan_to_num()}
    found["kappa of the hessian"] = bnp.linalg.magnitude_condition_number(H).value
    found["kappa, regularized"] = bnp.linalg.regularized_condition_number(A, 0.1).value
    pairs = bnp.eigenpairs(H, 3, seed=1)
    found |= {"eigenvalues": pairs.values, "eigenvectors": pairs.vectors.abs()}
    density = bnp.spectral_density(H, probes=2, steps=6, seed=1)
    found |= {"density": density.density, "quadrature nodes": density.nodes}
    found["trace"] = bnp.trace(A, probes=4, seed=1).value
    # row-gram needs the rows of all examples in one process.
    costs = [cost for cost in bnp.linalg.methods(A) if cost.method != "row-gram"]
    found["methods that apply"] = [cost.method for cost in costs if cost.applies]
    return found


def _tables(risk: bnp.EmpiricalRisk) -> Found:
    found: Found = {}
    comparison = bnp.compare(risk, curvature=["gauss_newton", "fisher_mc"])
    for name, pair in comparison.network.items():
        found[f"compared: {name}"] = torch.tensor([k.value for k in pair if k is not None], dtype=torch.float64)
    for row in comparison.layers.layers:
        kinds = (row.inputs, row.centered, row.normalized, row.block, row.block_with_P)
        numbers = [k.value for k in (*kinds, *row.unit_blocks, *row.unit_blocks_with_P) if k is not None]
        found[f"row of {row.layer}"] = torch.tensor(numbers, dtype=torch.float64)
        found[f"facts of {row.layer}"] = (row.rows, row.constant, row.dead, row.is_hessian)
    return found


#: What else is measured: of the other problems, whose curvature is that of these, products and moments are enough.
MORE: dict[str, tuple[Callable[[bnp.EmpiricalRisk], Found], ...]] = {
    "uneven": (_blocks, _numbers, _tables),
    "convolution": (_blocks,),
}
