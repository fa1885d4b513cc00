"""What a step of BNP costs (Prop. 6): the operations of Algorithm 2, counted one by one, against the formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from bnp_analysis.network import Layer
from bnp_analysis.precondition import BNPBlock
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, agreement, each_layer, label, statement

_PROP_6 = "a dense step costs 4nN + 6 n n_out + 2 n_out + 8n operations"
# (n, n_out, N)
_SIZES = ((3, 2, 4), (5, 7, 2), (4, 1, 9), (2, 6, 3))
_EPS1, _EPS2, _RHO = 1e-2, 1e-4, 0.99


class Counted:
    """A number that counts the additions, multiplications, divisions and comparisons made with it."""

    def __init__(self, value: float, book: dict[str, int]) -> None:
        self.value, self.book = value, book

    def _do(self, made: Callable[[float, float], Any], other: Counted | float) -> Counted:
        self.book["operations"] = self.book.get("operations", 0) + 1
        return Counted(made(self.value, other.value if isinstance(other, Counted) else other), self.book)

    def __add__(self, other: Counted | float) -> Counted:
        return self._do(float.__add__, other)

    def __sub__(self, other: Counted | float) -> Counted:
        return self._do(float.__sub__, other)

    def __mul__(self, other: Counted | float) -> Counted:
        return self._do(float.__mul__, other)

    def __truediv__(self, other: Counted | float) -> Counted:
        return self._do(float.__truediv__, other)

    def __gt__(self, other: Counted) -> bool:
        return bool(self._do(float.__gt__, other).value)


Numbers = list[Counted]


def _sum(terms: Sequence[Counted]) -> Counted:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def algorithm_2(
    H: list[Numbers], Gw: list[Numbers], Gb: Numbers, mu: Numbers, var: Numbers, q2: float
) -> tuple[list[Numbers], Numbers]:
    """One dense step of Algorithm 2 in scalars, with running statistics `mu`, `var` (changed in place).

    Args:
        H: the inputs, `N` rows of `n`.
        Gw, Gb: the gradients, `n_out` rows of `n`, and `n_out`.
        mu, var: running mean and variance.
        q2: `q^2`.

    Returns:
        The preconditioned gradients.

    Source: Lange, Helfrich and Ye 2022, Algorithm 2 (p. 11).
    """
    N, n = len(H), len(mu)
    for j in range(n):
        column = [row[j] for row in H]
        mean = _sum(column) / float(N)
        apart = [h - mean for h in column]
        variance = _sum([d * d for d in apart]) / float(N)
        mu[j] = mu[j] * _RHO + mean * (1 - _RHO)
        var[j] = var[j] * _RHO + variance * (1 - _RHO)
    damping = max(var) * _EPS1 + _EPS2
    s2 = [v + damping for v in var]
    new = [[(w - m * b) / s / q2 for w, m, s in zip(row, mu, s2, strict=True)] for row, b in zip(Gw, Gb, strict=True)]
    bias = [b / q2 - _sum([w * m for w, m in zip(row, mu, strict=True)]) for row, b in zip(new, Gb, strict=True)]
    return new, bias


def batch_norm(
    H: list[Numbers], dY: list[Numbers], gain: Numbers, offset: Numbers, mu: Numbers, var: Numbers
) -> tuple[list[Numbers], list[Numbers]]:
    """Forward and backward pass of batch normalization in scalars, with running statistics: its outputs and `dH`."""
    N, n = len(H), len(mu)
    Y, dH = ([list(row) for row in H] for _ in range(2))
    for j in range(n):
        mean = _sum([row[j] for row in H]) / float(N)
        apart = [row[j] - mean for row in H]
        variance = _sum([d * d for d in apart]) / float(N)
        mu[j] = mu[j] * _RHO + mean * (1 - _RHO)
        var[j] = var[j] * _RHO + variance * (1 - _RHO)
        sigma = (variance + _EPS2)._do(float.__pow__, 0.5)
        hat = [d / sigma for d in apart]
        d = [row[j] for row in dY]
        for i in range(N):
            Y[i][j] = hat[i] * gain[j] + offset[j]
        d_offset, d_gain = _sum(d), _sum([a * b for a, b in zip(d, hat, strict=True)])
        scale, mean_d, mean_dh = gain[j] / sigma, d_offset / float(N), d_gain / float(N)
        for i in range(N):
            dH[i][j] = (d[i] - mean_d - hat[i] * mean_dh) * scale
    return Y, dH


def formula(n: int, n_out: int, N: int) -> int:
    """The paper's number of operations of one dense step."""
    return 4 * n * N + 6 * n * n_out + 2 * n_out + 8 * n


def _random(book: dict[str, int], g: torch.Generator, *shape: int) -> Any:
    """Counted numbers in nested lists."""

    def wrap(values: Any) -> Any:
        return [wrap(v) for v in values] if isinstance(values, list) else Counted(values, book)

    return wrap(torch.randn(*shape, generator=g, dtype=torch.float64).tolist())


def _values(nested: Any) -> torch.Tensor:
    return torch.tensor([[v.value for v in row] for row in nested], dtype=torch.float64)


@statement(Source.PROP_6, _PROP_6)
def check_cost(problem: Problem) -> Iterator[Check]:
    """Prop. 6: at a few sizes, that the counted algorithm is the package's update, and BN's count."""
    g, steps, norms = problem.random(6), [], []
    for n, n_out, N in _SIZES:
        book: dict[str, int] = {}
        H, dY, Gw, Gb, mu, var, gain, offset = (
            _random(book, g, *shape) for shape in ((N, n), (N, n), (n_out, n), (n_out,), (n,), (n,), (n,), (n,))
        )
        var = [Counted(v.value**2, book) for v in var]
        given = torch.cat([_values(Gw).flatten(), _values([Gb])[0]])
        q2 = max(n / N, 1.0)
        weights, bias = algorithm_2(H, Gw, Gb, mu, var, q2)
        steps.append((book.pop("operations"), formula(n, n_out, N), n_out))
        mean, s2 = _values([mu, var])
        block = BNPBlock(mean[None], (s2 + _EPS1 * s2.max() + _EPS2)[None], q2**0.5, units=n_out, bias=True)
        made = torch.cat([_values(weights).flatten(), _values([bias])[0]])
        yield agreement(
            f"what is counted is the update [n = {n}, n_out = {n_out}, N = {N}]", Source.PROP_6, made,
            block.direction(given), bound=1e-12,
        )  # fmt: skip
        batch_norm(H, dY, gain, offset, mu, var)
        norms.append((book["operations"], 32 * n * N + 4 * n, n * N))
    yield Check.compare(
        f"{_PROP_6}; counted, n_out - 1 fewer [the largest difference at {len(_SIZES)} sizes]",
        Source.PROP_6,
        observed=float(max(abs(paper - counted - (n_out - 1)) for counted, paper, n_out in steps)),
        predicted=0.0,
        tolerance=0.0,
        details={"counted": [one[0] for one in steps], "the formula": [one[1] for one in steps]},
    )
    yield Check.compare(
        "BN costs at most 32 nN + 4n operations, and not so many [the largest ratio]",
        Source.PROP_6,
        observed=max(counted / paper for counted, paper, _ in norms),
        predicted=1.0,
        tolerance=0.0,
        relation="<=",
        details={"counted over nN": [counted / nN for counted, _, nN in norms]},
    )
    yield from each_layer(problem, _PROP_6, Source.PROP_6, _own)


def _own(problem: Problem, layer: Layer) -> Iterator[Check]:
    """What the formula says of a layer: numbers, no verdict."""
    if layer.spatial:
        raise NotApplicable("the count is of dense layers")
    n, n_out, N = layer.features, layer.units, len(problem.rows[layer.name])
    ours, theirs = formula(n, n_out, N), 32 * n * N + 4 * n
    why = f"n = {n}, n_out = {n_out}, N = {N}: {ours:,} operations by the formula, BN {theirs:,}"
    yield Check.not_applicable(f"{_PROP_6} [{label(layer)}]", Source.PROP_6, why)
