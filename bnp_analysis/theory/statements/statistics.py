"""Running statistics (T4), and the statistics of a convolution per channel or per entry of its patch (T6)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnp_analysis.linalg import MatrixOperator, condition_number
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.network import Layer
from bnp_analysis.network.moments import corrected_rho, update_moments
from bnp_analysis.precondition import BNPBlock, bnp_preconditioner
from bnp_analysis.theory.check import Check, Source
from bnp_analysis.theory.statements.reference import channels, extended, own_moments, singular
from bnp_analysis.theory.statements.setting import (
    NotApplicable,
    Problem,
    agreement,
    at_least,
    at_most,
    dense,
    passing,
    per_layer,
    refused,
    statement,
)

_T4 = "running statistics are mean and variance of a mixture of all rows seen"
_PROP_10 = "|mu(t, a, p) - mu(p)| <= (k-1)(1/(2r) + 1/(2s) - (k-1)/(4rs)) max|h|"
_T6 = "per-patch statistics center and scale every entry of a patch"
_CHANNELS = "per-channel statistics center and scale every entry of a patch"
_ROWS = 2_000
_RHO = 0.9


@statement(Source.T4, _T4)
@per_layer(_T4)
def check_running_statistics(problem: Problem, layer: Layer) -> Iterator[Check]:
    """T4: the law of total variance along random splits of each layer's rows, one-row batches among them."""
    rows = problem.rows[layer.name][:_ROWS, 0]
    if len(rows) < 3:
        raise NotApplicable(f"{len(rows)} rows cannot be split")
    g = problem.random(4)
    first, second = (_split(rows, g) for _ in range(2))
    rhos = [_RHO] * len(first)
    found = _run(first, rhos)
    details: dict[str, float] = {"rows": len(rows), "batches": len(first), "smallest batch": min(map(len, first))}
    yield agreement(_T4, found, _mixture(first, rhos, start=True), details=details)
    corrected = _run(first, [corrected_rho(_RHO, k + 1) for k in range(len(first))])
    words = "with the corrected start the start (0, 1) weighs nothing"
    yield agreement(words, corrected, _mixture(first, rhos, start=False))
    both = torch.cat([_run(split, _cumulative(split)) for split in (first, second)])
    exact = torch.cat([rows.mean(dim=0), rows.var(dim=0, unbiased=False)])
    moved = float((found - _run(second, [_RHO] * len(second))).norm() / exact.norm())
    details = {"with a constant rho two splits differ by": moved}
    yield agreement("with cumulative counts the split does not matter", both, exact.repeat(2), details=details)


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
    parts = zip(batches, rhos, after, strict=True)
    weights = torch.cat([batch.new_full((len(batch),), (1 - r) * a / len(batch)) for batch, r, a in parts])
    rows = torch.cat(list(batches))
    first = math.prod(rhos) if start else 0.0
    total = float(weights.sum()) + first
    mean = (weights[:, None] * rows).sum(dim=0) / total
    var = ((weights[:, None] * (rows - mean) ** 2).sum(dim=0) + first * (1 + mean**2)) / total
    return torch.cat([mean, var])


@statement(Source.T6, _T6)
def check_patch_statistics(problem: Problem) -> Iterator[Check]:
    """T6: convolutions only; dense layers do not distinguish the two."""
    if all(map(dense, problem.layers)):
        raise NotApplicable("no convolution")
    yield from _patches(problem)


@per_layer(_T6, only=lambda layer: not dense(layer))
def _patches(problem: Problem, layer: Layer) -> Iterator[Check]:
    rows = problem.rows[layer.name]
    G = {which: own_moments(problem, layer, which).normalized(rows) for which in ("channel", "patch")}
    kept = ~own_moments(problem, layer, "patch").constant
    mean, std = G["patch"].mean(dim=0)[kept], G["patch"].std(dim=0, unbiased=False)[kept]
    expected = torch.cat([torch.zeros_like(mean), torch.ones_like(std)])
    details = {"entries": int(kept.sum())}
    yield agreement(_T6, torch.cat([mean, std]), expected, given=("convolution",), details=details)
    if layer.bias is not None:
        P = bnp_preconditioner(problem.risk, statistics="patch").blocks[layer.name][1]
        assert isinstance(P, BNPBlock)
        found = P.normalized(rows)[..., : layer.features] * P.q
        yield agreement("the per-patch preconditioner makes these rows", found, G["patch"])
    yield _agree(problem, layer, G)


def _agree(problem: Problem, layer: Layer, G: dict[str, Tensor]) -> Check:
    """Whether both statistics are the same, where every patch entry runs over all values of its channel."""
    module: Any = layer.module
    positions = sum(h.numel() // channels(layer) for h, _ in passing(problem.risk, layer.name))
    same = module.padding_mode == "circular" and all(s == 1 for s in module.stride)
    details = {"largest mean in sigma": float(G["channel"].mean(dim=0).abs().max())} | _effect(problem, layer, G)
    if same and len(problem.rows[layer.name]) == positions:
        return agreement(_CHANNELS, G["channel"], G["patch"], bound=1e-8, details=details)
    effect = ", ".join(f"{key} {value:.3g}" for key, value in details.items())
    return refused(_CHANNELS, f"not circular padding with stride 1; measured: {effect}", details=details)


def _effect(problem: Problem, layer: Layer, G: dict[str, Tensor]) -> dict[str, float]:
    """What the choice does to the inputs and to the layer's block."""
    found: dict[str, float] = {}
    for which, rows in G.items():
        matrix = extended(rows[:, 0])
        found[f"kappa*(G^) {which}"] = singular(matrix).value
        found[f"|G^|^2/R {which}"] = float(torch.linalg.matrix_norm(matrix, 2)) ** 2 / len(matrix)
    inner = problem.of(problem.risk.restrict(problem.risk.space.layer_names(layer.name)))
    if inner.risk.space.dim <= problem.limit:
        A = GramOperator(MatrixOperator(inner.factor, exact=False))
        for which in G:
            P = bnp_preconditioner(inner.risk, statistics=which)
            found[f"kappa* of the block {which}"] = condition_number(A, preconditioner=P).value
    return found


@statement(Source.PROP_10, _PROP_10)
def check_padded_means(problem: Problem) -> Iterator[Check]:
    """Prop. 10: attained by constant maps over sizes and kernels, beyond its domain false; and on the layers."""
    yield from _maps(problem.random(10))
    yield from _padded(problem)


def mean_bound(size: Sequence[int], reach: Sequence[int]) -> float:
    """The bound over `max|h|` for spatial `size` and `reach = (k - 1)/2`: the largest share of padded entries.

    `1 - prod(1 - reach/size)`; in two dimensions with a square kernel the paper's
    `(k-1)(1/(2r) + 1/(2s) - (k-1)/(4rs))`. One and three dimensions, other kernels and dilation are our extension.

    Example:
        >>> mean_bound((8, 8), (1, 1)) == 2 * (1 / 16 + 1 / 16 - 2 / (4 * 64))
        True
    """
    return 1 - math.prod(1 - d / n for n, d in zip(size, reach, strict=True))


def _entry_means(h: Tensor, k: int) -> Tensor:
    """Means of every kernel entry over images and positions, `(channels, k^2)`; images `(N, c, r, s)`."""
    return nn.functional.unfold(h, k, padding=k // 2).mean(dim=(0, 2)).view(h.shape[1], k * k)


def _maps(g: torch.Generator) -> Iterator[Check]:
    inside = [(r, s, k) for r, s in ((2, 2), (3, 5), (8, 8), (1, 9), (4, 32)) for k in (1, 3, 5, 7)]
    inside = [(r, s, k) for r, s, k in inside if k // 2 <= max(r, s)]
    attained, random = 0.0, 0.0
    for r, s, k in inside:
        bound = mean_bound((r, s), (k // 2, k // 2))
        for constant in (True, False):
            noise = torch.randn(2, 3, r, s, generator=g, dtype=torch.float64)
            h = torch.ones_like(noise) if constant else noise
            gap = float((_entry_means(h, k) - h.mean(dim=(0, 2, 3))[:, None]).abs().max() / h.abs().max())
            if constant and min(r, s) >= k // 2:
                attained = max(attained, abs(gap - bound))
            random = max(random, gap / bound if k > 1 else gap / 1e-12)
    where, domain = f"{len(inside)} sizes and kernels", "stride 1, zero padding, odd k"
    words = f"a constant map attains the bound [the largest difference over {where}]"
    yield at_most(words, attained, 1e-13, given=(domain,))
    words = f"{_PROP_10} [the largest ratio over {where}, constant and random maps]"
    yield at_most(words, random, 1.0, tolerance=1e-12, given=(domain, "(k - 1)/2 <= max(r, s)"))
    yield at_least(
        "where (k - 1)/2 > max(r, s) it is false [k = 7 on a constant 2 x 2 map]",
        float((_entry_means(torch.ones(1, 1, 2, 2, dtype=torch.float64), 7) - 1).abs().max()),
        1.3 * mean_bound((2, 2), (3, 3)),
        hypotheses={"(k - 1)/2 <= max(r, s)": False},
    )


@per_layer(_PROP_10, only=lambda layer: not dense(layer))
def _padded(problem: Problem, layer: Layer) -> Iterator[Check]:
    module: Any = layer.module
    dims = len(module.kernel_size)
    reach = [d * (k - 1) // 2 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    same = module.padding == "same" or tuple(module.padding) == tuple(reach)
    odd = all(k % 2 for k in module.kernel_size)
    if not (odd and same and module.padding_mode == "zeros" and set(module.stride) == {1}):
        raise NotApplicable("not a zero-padded convolution of odd kernel and stride 1 that keeps the size")
    seen = [h for h, _ in passing(problem.risk, layer.name)]
    size = tuple(seen[0].shape[-dims:])
    if any(tuple(h.shape[-dims:]) != size for h in seen):
        raise NotApplicable("images of several sizes")
    if sum(d > n for d, n in zip(reach, size, strict=True)) > 1:
        raise NotApplicable(f"the kernel reaches {reach}, beyond the whole image {size}")
    gap, bound = problem.rows[layer.name].mean(dim=0) - own_moments(problem, layer).mean, mean_bound(size, reach)
    yield at_most(
        _PROP_10,
        float(gap.abs().max()),
        bound * max(float(h.abs().max()) for h in seen),
        tolerance=1e-12,
        given=("stride 1, zero padding, odd k", "(k - 1)/2 <= max(r, s)"),
        details={"bound over max|h|": bound, "extension": dims != 2 or len({*reach}) > 1},
    )
