"""The norm of normalized inputs with independent entries (Prop. 5): what its proof assumes, and where it is false."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bnp_analysis.network import Layer
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.conditioning import inputs_of
from bnp_analysis.theory.statements.reference import extended
from bnp_analysis.theory.statements.setting import Problem, each_layer, label, statement

_PROP_5 = "E |G^|/q <= C sqrt N for independent entries of mean 0 and variance 1"
_BOUNDED = "with bounded fourth moments C = 3 is enough"
_UNBOUNDED = "with variance 1 alone no C is: entries +-n with probability 1/n^2 make it (1 - 1/e) sqrt n at least"
_FLAW = "the proof takes E max_i |g_i|^2 for E |g_i|^2 = n"
# (n, N): as many rows as columns, fewer, more.
_SHAPES = ((10, 10), (100, 100), (200, 20), (20, 200))
_SIZES = (16, 64, 256)
_DRAWS = 20


def _norm(G: Tensor) -> float:
    """`|G^|/(q sqrt N)` of entries `(N, n)`."""
    rows, columns = G.shape
    q = math.sqrt(max(columns / rows, 1.0))
    return float(torch.linalg.matrix_norm(extended(G, True), 2)) / (q * math.sqrt(rows))


def sparse_entries(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Independent entries `+-n` with probability `1/n^2`, else 0: mean 0, variance 1, fourth moment `n^2`."""
    u = torch.rand(rows, columns, generator=g, dtype=torch.float64)
    sign = torch.rand(rows, columns, generator=g, dtype=torch.float64).sub(0.5).sign()
    return columns * sign * (u < columns**-2)


def _sparse_mean(n: int, g: torch.Generator) -> float:
    """The mean of `|G^|/(q sqrt N)` under the sparse law, `n = N`: exactly 1 without a nonzero entry, else drawn."""
    none: float = (1 - n**-2.0) ** (n * n)
    drawn: list[float] = []
    while len(drawn) < _DRAWS:
        G = sparse_entries(n, n, g)
        if bool(G.any()):
            drawn.append(_norm(G))
    return none + (1 - none) * sum(drawn) / len(drawn)


def largest_row(n: int, rows: int) -> float:
    """`E max_i |g_i|^2 / n` of the sparse law, exactly: `|g_i|^2/n^2` is binomial, `E max = sum_k P(max > k)`."""
    p, below, total = n**-2.0, 0.0, 0.0
    at: float = (1 - p) ** n
    for k in range(n):
        below += at
        total += -math.expm1(rows * math.log(min(below, 1.0)))
        at *= (n - k) / (k + 1) * p / (1 - p)
    return total * n


@statement(Source.PROP_5, _PROP_5)
def check_independent_entries(problem: Problem) -> Iterator[Check]:
    """Prop. 5 with and without a fourth moment; a layer's own inputs, which are not independent, are measured."""
    g = problem.random(5)
    laws: dict[str, Callable[[int, int], Tensor]] = {
        "Gaussian": lambda rows, n: torch.randn(rows, n, generator=g, dtype=torch.float64),
        "uniform": lambda rows, n: math.sqrt(12) * (torch.rand(rows, n, generator=g, dtype=torch.float64) - 0.5),
        "signs": lambda rows, n: (torch.rand(rows, n, generator=g, dtype=torch.float64) - 0.5).sign(),
    }
    found = {
        f"{name}, n = {n}, N = {rows}": sum(_norm(draw(rows, n)) for _ in range(5)) / 5
        for name, draw in laws.items()
        for n, rows in _SHAPES
    }
    yield Check.compare(
        f"{_BOUNDED} [the largest of {len(found)} laws and shapes]",
        Source.PROP_5,
        observed=max(found.values()),
        predicted=3.0,
        tolerance=0.0,
        relation="<=",
        hypotheses={"independent entries": True, "bounded fourth moments": True, "n >= 3": True},
        details=found,
    )
    for n in _SIZES:
        yield Check.compare(
            f"{_UNBOUNDED} [n = N = {n}]",
            Source.PROP_5,
            observed=_sparse_mean(n, g),
            predicted=(1 - 1 / math.e) * math.sqrt(n),
            tolerance=0.0,
            relation=">=",
            hypotheses={"independent entries": True, "bounded fourth moments": False},
            details={"draws with an entry that is not zero": _DRAWS},
        )
    yield Check.compare(
        f"{_FLAW}: their ratio, at least n (1 - 1/e) for the sparse law, exactly [n = N = {_SIZES[-1]}]",
        Source.PROP_5,
        observed=largest_row(_SIZES[-1], _SIZES[-1]),
        predicted=(1 - 1 / math.e) * _SIZES[-1],
        tolerance=0.0,
        relation=">=",
        details={"Gaussian, n = N = 30": _gaussian_rows(30, 30, g), "sparse, n = N = 30": largest_row(30, 30)},
    )
    yield from each_layer(problem, _PROP_5, Source.PROP_5, _own)


def _gaussian_rows(n: int, rows: int, g: torch.Generator) -> float:
    draws = torch.randn(200, rows, n, generator=g, dtype=torch.float64)
    return float(draws.square().sum(dim=2).amax(dim=1).mean()) / n


def _own(problem: Problem, layer: Layer) -> Iterator[Check]:
    found = _norm(inputs_of(problem, layer).G)
    why = f"the inputs of a layer are not independent; measured, |G^|/(q sqrt R) = {found:.3g}"
    yield Check.not_applicable(f"{_PROP_5} [{label(layer)}]", Source.PROP_5, why, details={"|G^|/(q sqrt R)": found})
