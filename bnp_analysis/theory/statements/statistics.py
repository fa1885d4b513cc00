"""Running statistics (T4), and the statistics of a convolution per channel or per entry of its patch (T6)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from bnp_analysis.linalg import MatrixOperator, condition_number, singular_condition_number
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.network import Layer
from bnp_analysis.precondition import BNPBlock, bnp_preconditioner
from bnp_analysis.precondition.running import corrected_rho, update_moments
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.statements.reference import damped, extended, own_moments
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, agreement, each_layer, label, statement

_T4 = "running statistics are mean and variance of a mixture of all rows seen"
_T6 = "per-patch statistics center and scale every entry of a patch"
_ROWS = 2_000
_RHO = 0.9


@statement("T4", _T4)
def check_running_statistics(problem: Problem) -> Iterator[Check]:
    """T4: the law of total variance along random splits of each layer's rows, one-row batches among them."""
    yield from each_layer(problem, _T4, "T4", _running)


def _running(problem: Problem, layer: Layer) -> Iterator[Check]:
    rows = problem.rows[layer.name][:_ROWS, 0]
    if len(rows) < 3:
        raise NotApplicable(f"{len(rows)} rows cannot be split")
    name, g = label(layer), problem.random(4)
    first, second = (_split(rows, g) for _ in range(2))
    rhos = [_RHO] * len(first)
    details: dict[str, float] = {"rows": len(rows), "batches": len(first), "smallest batch": min(map(len, first))}
    found = _run(first, rhos)
    yield agreement(f"{_T4} [{name}]", "T4", found, _mixture(first, rhos, start=True), details=details)
    corrected = [corrected_rho(_RHO, k + 1) for k in range(len(first))]
    words = f"with the corrected start the start (0, 1) weighs nothing [{name}]"
    yield agreement(words, "T4", _run(first, corrected), _mixture(first, rhos, start=False))
    both = [_run(split, _cumulative(split)) for split in (first, second)]
    exact = torch.cat([rows.mean(dim=0), rows.var(dim=0, unbiased=False)])
    words = f"with cumulative counts the split does not matter [{name}]"
    constant = _run(second, [_RHO] * len(second))
    moved = float((found - constant).norm() / exact.norm())
    details = {"with a constant rho two splits differ by": moved}
    yield agreement(words, "T4", torch.cat(both), torch.cat([exact, exact]), details=details)


def _split(rows: Tensor, g: torch.Generator) -> list[Tensor]:
    """Parts of random sizes, the first of one row."""
    sizes, left = [1], len(rows) - 1
    while left:
        sizes.append(min(int(torch.randint(1, max(len(rows) // 4, 2), (1,), generator=g)), left))
        left -= sizes[-1]
    return list(torch.split(rows, sizes))


def _run(batches: Sequence[Tensor], rhos: Sequence[float]) -> Tensor:
    mean = torch.zeros(batches[0].shape[1], dtype=batches[0].dtype)
    var = torch.ones_like(mean)
    for batch, rho in zip(batches, rhos, strict=True):
        mean, var = update_moments(mean, var, batch.mean(dim=0), batch.var(dim=0, unbiased=False), rho)
    return torch.cat([mean, var])


def _cumulative(batches: Sequence[Tensor]) -> list[float]:
    seen, rhos = 0, []
    for batch in batches:
        rhos.append(seen / (seen + len(batch)))
        seen += len(batch)
    return rhos


def _mixture(batches: Sequence[Tensor], rhos: Sequence[float], *, start: bool) -> Tensor:
    """Mean and variance of all rows at once, with their weights; the start is a row of mean 0 and variance 1."""
    after = [math.prod(rhos[k + 1 :]) for k in range(len(rhos))]
    weights = torch.cat(
        [batch.new_full((len(b),), (1 - r) * a / len(b)) for b, r, a in zip(batches, rhos, after, strict=True)
         for batch in [b]]
    )  # fmt: skip
    rows = torch.cat(list(batches))
    first = math.prod(rhos) if start else 0.0
    total = float(weights.sum()) + first
    mean = (weights[:, None] * rows).sum(dim=0) / total
    var = ((weights[:, None] * (rows - mean) ** 2).sum(dim=0) + first * (1 + mean**2)) / total
    return torch.cat([mean, var])


@statement("T6", _T6)
def check_patch_statistics(problem: Problem) -> Iterator[Check]:
    """T6: convolutions only; dense layers do not distinguish the two."""
    if all(isinstance(layer.module, nn.Linear) for layer in problem.layers):
        raise NotApplicable("no convolution")
    yield from each_layer(problem, _T6, "T6", _patches)


def _patches(problem: Problem, layer: Layer) -> Iterator[Check]:
    if isinstance(layer.module, nn.Linear):
        return
    name, rows = label(layer), problem.rows[layer.name]
    G = {which: _normalized(problem, layer, which) for which in ("channel", "patch")}
    kept = ~own_moments(problem, layer, "patch").constant
    P = bnp_preconditioner(problem.risk, statistics="patch").blocks[layer.name][1]
    assert isinstance(P, BNPBlock)
    mean, std = G["patch"].mean(dim=0)[kept], G["patch"].std(dim=0, unbiased=False)[kept]
    yield agreement(
        f"{_T6} [{name}]",
        "T6",
        torch.cat([mean, std]),
        torch.cat([torch.zeros_like(mean), torch.ones_like(std)]),
        hypotheses={"convolution": True},
        details={"entries": int(kept.sum())},
    )
    if layer.bias is not None:
        rest = P.normalized(rows)[..., : layer.features] * P.q
        yield agreement(f"the per-patch preconditioner makes these rows [{name}]", "T6", rest, G["patch"])
    yield _agree(problem, layer, G)


def _agree(problem: Problem, layer: Layer, G: dict[str, Tensor]) -> Check:
    """Whether both statistics are the same, where every patch entry runs over all values of its channel."""
    words = f"per-channel statistics center and scale every entry of a patch [{label(layer)}]"
    module = layer.module
    same = getattr(module, "padding_mode", "") == "circular" and all(s == 1 for s in getattr(module, "stride", ()))
    same = same and problem.rows[layer.name].shape[0] == _positions(problem, layer)
    details = {"largest mean in sigma": float(G["channel"].mean(dim=0).abs().max())} | _effect(problem, layer, G)
    if same:
        return agreement(words, "T6", G["channel"], G["patch"], bound=1e-8, details=details)
    effect = ", ".join(f"{key} {value:.3g}" for key, value in details.items())
    return Check.not_applicable(words, "T6", f"not circular padding with stride 1; measured: {effect}", details=details)


def _positions(problem: Problem, layer: Layer) -> int:
    """Values of one input channel."""
    counts: list[int] = []
    channels = layer.groups * layer.features // layer.patch
    problem.risk.capture(lambda name, module, args, out: counts.append(args[0].numel() // channels), [layer.name])
    return sum(counts)


def _normalized(problem: Problem, layer: Layer, statistics: str) -> Tensor:
    """`(R, groups, m)`."""
    moments = own_moments(problem, layer, statistics)
    return (problem.rows[layer.name] - moments.mean) / damped(moments, {"eps1": 0, "eps2": 0}).sqrt()


def _effect(problem: Problem, layer: Layer, G: dict[str, Tensor]) -> dict[str, float]:
    """What the choice does to the inputs and to the layer's block."""
    found: dict[str, float] = {}
    for which, rows in G.items():
        matrix = extended(rows[:, 0], True)
        found[f"kappa*(G^) {which}"] = singular_condition_number(MatrixOperator(matrix, exact=False)).value
        found[f"|G^|^2/R {which}"] = float(torch.linalg.matrix_norm(matrix, 2)) ** 2 / len(matrix)
    names = problem.risk.space.layer_names(layer.name)
    inner = problem.risk.restrict(names)
    if inner.space.dim > problem.limit:
        return found
    F = Problem(inner, limit=problem.limit).factor
    for which in G:
        P = bnp_preconditioner(inner, statistics=which)
        block = condition_number(GramOperator(MatrixOperator(F, exact=False)), preconditioner=P)
        found[f"kappa* of the block {which}"] = block.value
    return found
