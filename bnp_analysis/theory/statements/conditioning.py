"""Why BNP improves conditioning: Theorem 4, Prop. 11, T7, and the choice of `q` (T8, Prop. 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.linalg import ConditionNumber
from bnp_analysis.network import Layer, layer_rows
from bnp_analysis.precondition import bnp_preconditioner
from bnp_analysis.theory.check import Check, Source
from bnp_analysis.theory.statements.setting import (
    NotApplicable,
    Problem,
    at_least,
    at_most,
    block_of,
    compared,
    decided_rank,
    dense,
    equals,
    extended,
    first_examples,
    kappa_of_rank,
    of_group,
    own_moments,
    passing,
    per_layer,
    refused,
    rewritten,
    singular,
    statement,
)

_CENTERING = "centering: kappa(H^U) <= kappa(H^)"
_STRICT = "kappa(H^U) < kappa(H^) where mu is not orthogonal to the top eigenvector of the covariance"
_SCALING = "scaling: kappa(G^) <= sqrt(n+1) min kappa(H^U D0) over diagonal D0"
_BY_D = "kappa(H^U) <= kappa(D) sqrt(n+1) min kappa(H^U D0), D = diag(1, 1/sigma)"
_THROUGH = "through S: kappa*(H^^T S H^) <= kappa*(H^)^2 kappa(S)"
_SHARP = "scaling: kappa*(G) <= sqrt(m) min_D kappa*(H_c D)"
_GUARANTEE = "kappa(G^^T S G^) <= m kappa(S)^2 kappa(H^^T S H^)"
_GAIN = "the gain of centering for whitened inputs is about (1 + |mu|^2 + s^2)/max(1, s^2)"
_BOUNDS = "max(1, m/(R-1)) <= |G^|^2/R <= m"
_PROP_5 = "E |G^|/q <= C sqrt N for independent entries of mean 0 and variance 1"
_BOUNDED = "with bounded fourth moments C = 3 is enough"
_UNBOUNDED = "with variance 1 alone no C is: entries +-n with probability 1/n^2 make it (1 - 1/e) sqrt n at least"
_FLAW = "the proof takes E max_i |g_i|^2 for E |g_i|^2 = n"
_DENSE = "with one example H^ of a dense layer has one row: BNP moves its norm and no condition number"
_CONVOLUTION = "with one example H^ of a convolution keeps a row per position"
_SLACK = 1e-7
_SEARCH = 150
# A rank counts as decided where the singular values that count as zero lie this far below the others.
_GAP = 1e3
# (n, N) of Prop. 5: as many rows as columns, fewer, more.
_SHAPES = ((10, 10), (100, 100), (200, 20), (20, 200))
_SIZES = (16, 64, 256)
_DRAWS = 20


@dataclass(eq=False)
class Inputs:
    """The rows of one group of a layer without its constant features, and their three forms."""

    H: Tensor
    constant: int

    def __post_init__(self) -> None:
        self.R, self.m = self.H.shape

    @cached_property
    def mean(self) -> Tensor:
        return self.H.mean(dim=0)

    @cached_property
    def sigma(self) -> Tensor:
        return self.H.std(dim=0, unbiased=False)

    @cached_property
    def centered(self) -> Tensor:
        return self.H - self.mean

    @cached_property
    def G(self) -> Tensor:
        return self.centered / self.sigma

    @cached_property
    def raw(self) -> ConditionNumber:
        return singular(extended(self.H))

    @cached_property
    def without_mean(self) -> ConditionNumber:
        return singular(extended(self.centered))

    def require_full_rank(self) -> None:
        """Refuse rank-deficient `H^`.

        Raises:
            NotApplicable: with the rank.
        """
        if self.raw.rank != self.m + 1:
            raise NotApplicable(
                f"H^ has rank {self.raw.rank} of {self.m + 1} columns ({self.R} rows, {self.constant} constant "
                "features set aside): without full column rank the statement is false in general"
            )


def inputs_of(problem: Problem, layer: Layer, *, full_rank: bool = False) -> Inputs:
    """The inputs of a layer's first group, by their own exact moments (per entry of a patch).

    Raises:
        NotApplicable: fewer than two rows, or constant features only; without full column rank, where it is needed.
    """
    rows = problem.rows[layer.name][:, 0]
    constant = own_moments(problem, layer, "patch").constant[0]
    if len(rows) < 2 or bool(constant.all()):
        raise NotApplicable(f"{len(rows)} rows with {int((~constant).sum())} features that change")
    inputs = Inputs(rows[:, ~constant], int(constant.sum()))
    if full_rank:
        inputs.require_full_rank()
    return inputs


@statement(Source.THEOREM_4, _CENTERING)
def check_centering(problem: Problem) -> Iterator[Check]:
    """Theorem 4 on every layer, of grouped convolutions on their first group; its strictness on known covariances."""
    for part in (_centering, _strict, _scaling):
        yield from part(problem)
    yield from _known_covariances(problem.random(4))


@per_layer(_CENTERING)
def _centering(problem: Problem, layer: Layer) -> Iterator[Check]:
    inputs = inputs_of(problem, layer, full_rank=True)
    yield at_most(
        _CENTERING,
        inputs.without_mean.value,
        inputs.raw.value,
        tolerance=_SLACK,
        given=("full column rank", "exact mean of the same rows"),
        details={"R": inputs.R, "m": inputs.m, "constant features": inputs.constant},
    )


def least_gain(inputs: Inputs) -> tuple[float, float]:
    """A lower bound of `kappa(H^)/kappa(H^U)`, above 1 where the mean meets the top eigenvector of the covariance.

    With `v` that eigenvector, `c` its eigenvalue and `a = mu . v`, the largest eigenvalue of `H^^T H^/R` is at least
    that of its compression `[[1, a], [a, c + a^2]]` to `e_0` and `v`, `l`; and its smallest is at most
    `min(1, lambda_min)`. So the squared ratio is at least `l/max(1, c)`, and `l > max(1, c)` unless `a = 0`.

    Returns:
        `sqrt(l/max(1, c))` and `|a|/|mu|`.
    """
    covariance = inputs.centered.T @ inputs.centered / inputs.R
    v, mu = torch.linalg.eigh(covariance)[1][:, -1], inputs.mean
    c, a = float(v @ covariance @ v), float(mu @ v)
    return math.sqrt(_larger_root(1 + c + a * a, c) / max(1.0, c)), abs(a) / (float(mu.norm()) or 1.0)


def _larger_root(trace: float, determinant: float) -> float:
    """The larger eigenvalue of a symmetric 2 x 2 matrix."""
    return (trace + math.sqrt(max(trace * trace - 4 * determinant, 0.0))) / 2


@per_layer(_STRICT)
def _strict(problem: Problem, layer: Layer) -> Iterator[Check]:
    yield strictly(inputs_of(problem, layer, full_rank=True))


def strictly(inputs: Inputs) -> Check:
    """That centering gains at least what the covariance says, where it says anything."""
    bound, cosine = least_gain(inputs)
    details = {"|mu . v|/|mu|": cosine, "|mu|": float(inputs.mean.norm())}
    if bound - 1 < 10 * _SLACK:
        why = f"the mean is orthogonal to the top eigenvector, or nearly (bound of the ratio: 1 + {bound - 1:.2g})"
        return refused(_STRICT, why, details=details)
    return at_least(
        _STRICT,
        inputs.raw.value / inputs.without_mean.value,
        bound,
        tolerance=_SLACK,
        given=("full column rank", "mu is not orthogonal to the top eigenvector"),
        details=details,
    )


def _known_covariances(g: torch.Generator) -> Iterator[Check]:
    """Covariance diag(9, 4, .25): a mean beside the top eigenvector need not cost anything, but may."""
    equal = "a mean orthogonal to the top eigenvector may leave kappa(H^U) = kappa(H^)", "=", 1.0
    strict = "its condition is sufficient, not necessary: here the mean is orthogonal, and the inequality is strict"
    for mean, (words, relation, bound) in (((0.0, 0.3, 0.0), equal), ((0.0, 0.0, 0.3), (strict, ">=", 1.01))):
        noise = torch.randn(40, 3, generator=g, dtype=torch.float64)
        white = torch.linalg.qr(noise - noise.mean(dim=0))[0] * math.sqrt(40)
        inputs = Inputs(white * torch.tensor([3.0, 2.0, 0.5]) + torch.tensor(mean, dtype=torch.float64), 0)
        yield compared(
            f"{words} [covariance diag(9, 4, .25), mu = {mean}]",
            inputs.raw.value / inputs.without_mean.value,
            relation,
            bound,
            tolerance=1e-9,
            given=("full column rank",),
            details={"|mu . v|/|mu|": least_gain(inputs)[1]},
        )


@per_layer(_SCALING)
def _scaling(problem: Problem, layer: Layer) -> Iterator[Check]:
    """van der Sluis' bound with all `n + 1` columns, and what it says of `H^U` by `H^U = G^ D^-1`."""
    inputs = inputs_of(problem, layer, full_rank=True)
    hat = torch.linalg.qr(extended(inputs.G), mode="r")[1]
    best = _best_scaling(hat, inputs.m + 1, problem.random(7))
    sigma = torch.cat([inputs.sigma, inputs.H.new_ones(1)])
    of_D = float(sigma.max() / sigma.min())
    details = {"best kappa found over D0": best, "tried": _SEARCH, "kappa(D)": of_D, "n + 1": inputs.m + 1}
    for words, found, factor in (
        (_SCALING, singular(extended(inputs.G)).value, 1.0),
        (_BY_D, inputs.without_mean.value, of_D),
    ):
        bound = factor * math.sqrt(inputs.m + 1) * best
        yield at_most(words, found, bound, tolerance=_SLACK, given=("full column rank",), details=details)


@statement(Source.PROP_11, _THROUGH)
def check_through_curvature(problem: Problem) -> Iterator[Check]:
    """Prop. 11 on random matrices of any rank and on the units of dense layers; where `S` is singular it fails."""
    yield from _random_curvature(problem.random(11))
    yield from _through(problem)


def _random_curvature(g: torch.Generator) -> Iterator[Check]:
    shapes = (8, 5, 5), (8, 5, 3), (5, 8, 5), (5, 8, 2), (6, 6, 6), (6, 6, 1)
    for what, short in (("S > 0, H^ of any rank", 0), ("singular S, H^ of full row rank", 2)):
        ratios = []
        for rows, columns, rank in shapes:
            if short and rank < rows:
                continue
            for _ in range(5):
                left, right = (torch.randn(n, rank, generator=g, dtype=torch.float64) for n in (rows, columns))
                root = torch.randn(rows, rows, generator=g, dtype=torch.float64)[: rows - short]
                H = left @ right.T
                found = kappa_of_rank(root @ H, min(rank, len(root)))
                ratios.append(found**2 / (kappa_of_rank(H, rank) * kappa_of_rank(root, len(root))) ** 2)
        words = f"{_THROUGH} [the largest ratio of {len(ratios)} random cases: {what}]"
        yield at_most(words, max(ratios), 1.0, tolerance=1e-6, given=(what,))
    e = 1e-3
    H = torch.tensor([[1.0, 0.0], [1.0, e], [0.0, 1.0]], dtype=torch.float64)
    yield at_least(
        "for singular S without full row rank of H^ it fails, without bound [S = diag(1, 1, 0), rows (1, 0), (1, e), "
        "(0, 1)]",
        kappa_of_rank(H[:2], 2) ** 2,
        1e3 * kappa_of_rank(H, 2) ** 2,
        hypotheses={"S is singular": True, "H^ has full row rank": False},
        details={"e": e, "kappa*(S)": 1.0},
    )


def _units(problem: Problem, layer: Layer) -> list[tuple[int, Tensor, float]]:
    """A few units of a dense layer whose `S` is positive definite, with its root and `kappa(S)`.

    Raises:
        NotApplicable: `S` is not one positive number per row.
    """
    units = unit_blocks(problem.risk, problem.layers).get(layer.name)
    if units is None:
        raise NotApplicable("S is not one number per row: a convolution, a sequence, coupled or reused rows")
    tried = problem.some_units(layer, 8)
    roots = [(i, units.scales[:, i]) for i in tried]
    found = [(i, s, float((s.max() / s.min()) ** 2)) for i, s in roots if bool((s > 0).all())]
    if not found:
        raise NotApplicable(f"S is singular in all {len(tried)} units tried: rows on which a unit does not act")
    return found


@per_layer(_THROUGH)
def _through(problem: Problem, layer: Layer) -> Iterator[Check]:
    units, inputs = _units(problem, layer), inputs_of(problem, layer)
    for name, rows in (("H^", inputs.H), ("G^", inputs.G)):
        hat = extended(rows)
        of_rows = singular(hat).value
        found = [(singular(s[:, None] * hat).value ** 2, of_S, i) for i, s, of_S in units]
        worst, of_S, unit = max(found, key=lambda one: one[0] / one[1])
        if 1 + _SLACK < worst / (of_rows**2 * of_S) < 1 + 100 * torch.finfo(hat.dtype).eps * of_rows:
            why = (
                f"kappa*({name}) = {of_rows:.2g} is known only to {torch.finfo(hat.dtype).eps * of_rows:.2g} of itself"
            )
            yield refused(_THROUGH.replace("H^", name), why)
            continue
        yield at_most(
            _THROUGH.replace("H^", name),
            worst,
            of_rows**2 * of_S,
            tolerance=_SLACK,
            given=("S > 0",),
            details={"unit": unit, "kappa(S)": of_S, f"kappa*({name})": of_rows, "units with S > 0": len(units)},
        )


@statement(Source.T7, _SHARP)
def check_conditioning(problem: Problem) -> Iterator[Check]:
    """T7, beyond Theorem 4 and Prop. 11: the sharper constant at any rank, what the block may lose, and the gain."""
    for part in (_sharp, _guarantee, _gain):
        yield from part(problem)


@per_layer(_SHARP)
def _sharp(problem: Problem, layer: Layer) -> Iterator[Check]:
    inputs = inputs_of(problem, layer)
    triangle = torch.linalg.qr(inputs.centered, mode="r")[1] if inputs.m < inputs.R else inputs.centered
    unit = triangle / inputs.sigma
    values = torch.linalg.svdvals(unit)
    floor = max(inputs.R, inputs.m) * torch.finfo(values.dtype).eps * float(values[0]) * 100
    rank = decided_rank(values, floor, _GAP, "of H_c ")
    best = _best_scaling(unit, rank, problem.random(7))
    yield at_most(
        _SHARP,
        float(values[0] / values[rank - 1]),
        math.sqrt(inputs.m) * best,
        tolerance=_SLACK,
        given=("no zero column",),
        details={"m": inputs.m, "rank": rank, "best kappa* found over D": best, "tried": _SEARCH},
    )


def _best_scaling(unit: Tensor, rank: int, g: torch.Generator) -> float:
    """The smallest `kappa*` over scalings that a random search finds; the bound holds for every one."""
    logs = torch.zeros(unit.shape[1], dtype=unit.dtype)
    best, step = kappa_of_rank(unit, rank), 0.5
    for k in range(_SEARCH):
        trial = logs + step * torch.randn(len(logs), generator=g, dtype=logs.dtype)
        value = kappa_of_rank(unit * trial.exp(), rank)
        if value < best:
            best, logs = value, trial
        elif k % 5 == 4:
            step *= 0.85
    return best


@per_layer(_GUARANTEE)
def _guarantee(problem: Problem, layer: Layer) -> Iterator[Check]:
    units, inputs = _units(problem, layer), inputs_of(problem, layer, full_rank=True)
    hat, raw = extended(inputs.G), extended(inputs.H)
    found = []
    for i, s, of_S in units:
        after, before = (singular(s[:, None] * rows).value ** 2 for rows in (hat, raw))
        found.append((after, inputs.m * of_S**2 * before, before, i))
    after, bound, before, unit = max(found, key=lambda one: one[0] / one[1])
    given, details = ("S > 0", "full column rank"), {"unit": unit, "kappa(H^^T S H^)": before}
    yield at_most(_GUARANTEE, after, bound, tolerance=_SLACK, given=given, details=details)


@per_layer(_GAIN)
def _gain(problem: Problem, layer: Layer) -> Iterator[Check]:
    inputs = inputs_of(problem, layer, full_rank=True)
    s, mu = float(inputs.sigma.square().mean().sqrt()), inputs.mean
    Q = torch.linalg.qr(inputs.centered)[0]
    white = s * math.sqrt(inputs.R) * (Q - Q.mean(dim=0))
    t = 1 + float(mu @ mu) + s * s
    # The larger eigenvalue of [[1, |mu|], [|mu|, |mu|^2 + s^2]] is t up to s^2/t.
    yield equals(
        _GAIN,
        singular(extended(white + mu)).value / singular(extended(white)).value,
        _larger_root(t, s * s) / max(1.0, s * s),
        tolerance=_SLACK,
        given=("isotropic covariance", "full column rank"),
        reason="the layer's own rows whitened, with its own mean",
        details={
            "|mu|": float(mu.norm()),
            "s": s,
            "short form": t / max(1.0, s * s),
            "own gain": inputs.raw.value / inputs.without_mean.value,
        },
    )


@statement(Source.T8, _BOUNDS)
@per_layer(_BOUNDS)
def check_scale(problem: Problem, layer: Layer) -> Iterator[Check]:
    """T8: both bounds, and that `q="measured"` is this number."""
    inputs = inputs_of(problem, layer)
    R, m, ratio = inputs.R, inputs.m, _size(inputs.G) ** 2
    details = {"R": R, "m": m, "m/R": m / R, "over q^2": ratio / max(m / R, 1.0)}
    details["for independent features"] = (1 + math.sqrt(m / R)) ** 2
    more = {"given": ("exact moments of the same rows", "no constant feature"), "details": details}
    low = max(1.0, m / (R - 1))
    yield at_least("|G^|^2/R >= max(1, m/(R-1))", ratio, low, tolerance=_SLACK, **more)
    yield at_most("|G^|^2/R <= m", ratio, float(m), tolerance=_SLACK, **more)
    if layer.bias is None:
        return
    rows = own_moments(problem, layer).normalized(problem.rows[layer.name])
    largest = max(_size(rows[:, group]) ** 2 for group in range(layer.groups))
    measured = bnp_preconditioner(problem.risk, q="measured").q[layer.name] ** 2
    yield equals('q = "measured" removes exactly |G^|^2/R', measured, largest, tolerance=1e-9, details=details)


def _size(G: Tensor) -> float:
    """`|G^|/sqrt R` of rows `(R, m)`."""
    return float(torch.linalg.matrix_norm(extended(G), 2)) / math.sqrt(len(G))


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
        f"{name}, n = {n}, N = {rows}": sum(_over_q(draw(rows, n)) for _ in range(5)) / 5
        for name, draw in laws.items()
        for n, rows in _SHAPES
    }
    yield at_most(
        f"{_BOUNDED} [the largest of {len(found)} laws and shapes]",
        max(found.values()),
        3.0,
        given=("independent entries", "bounded fourth moments", "n >= 3"),
        details=found,
    )
    for n in _SIZES:
        yield at_least(
            f"{_UNBOUNDED} [n = N = {n}]",
            _sparse_mean(n, g),
            (1 - 1 / math.e) * math.sqrt(n),
            hypotheses={"independent entries": True, "bounded fourth moments": False},
            details={"draws with an entry that is not zero": _DRAWS},
        )
    rows = torch.randn(200, 30, 30, generator=g, dtype=torch.float64).square().sum(dim=2).amax(dim=1)
    yield at_least(
        f"{_FLAW}: their ratio, at least n (1 - 1/e) for the sparse law, exactly [n = N = {_SIZES[-1]}]",
        largest_row(_SIZES[-1], _SIZES[-1]),
        (1 - 1 / math.e) * _SIZES[-1],
        details={"Gaussian, n = N = 30": float(rows.mean()) / 30, "sparse, n = N = 30": largest_row(30, 30)},
    )
    yield from _own_entries(problem)


@per_layer(_PROP_5)
def _own_entries(problem: Problem, layer: Layer) -> Iterator[Check]:
    found = _over_q(inputs_of(problem, layer).G)
    why = f"the inputs of a layer are not independent; measured, |G^|/(q sqrt R) = {found:.3g}"
    yield refused(_PROP_5, why, details={"|G^|/(q sqrt R)": found})


def _over_q(G: Tensor) -> float:
    """`|G^|/(q sqrt N)` of entries `(N, n)`."""
    return _size(G) / math.sqrt(max(G.shape[1] / len(G), 1.0))


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
            drawn.append(_over_q(G))
    return none + (1 - none) * sum(drawn) / len(drawn)


def largest_row(n: int, rows: int) -> float:
    """`E max_i |g_i|^2 / n` of the sparse law, exactly: `|g_i|^2/n^2` is binomial, `E max = sum_k P(max > k)`."""
    from scipy.stats import binom  # here, since it takes longer to import than all else together

    below = np.minimum(binom.cdf(np.arange(n), n, n**-2.0), 1.0)
    return n * float(-np.expm1(rows * np.log(below)).sum())


@statement(Source.ONE_EXAMPLE, _DENSE)
def check_one_example(problem: Problem) -> Iterator[Check]:
    """The paper's remark on one example: the first of the data, with the preconditioner of all of them."""
    if problem.risk.coupled:
        raise NotApplicable("batch statistics couple the examples")
    one = problem.of(rewritten(problem.risk, batches=first_examples(problem.risk, 1)))
    if round(one.risk.batches.total) != 1:
        raise NotApplicable("the first batch cannot be cut")
    rows = layer_rows(one.risk, problem.layers)

    def given_rows(layer: Layer) -> Tensor:
        one.require_once(layer)
        return extended(rows[layer.name][:, 0], layer.bias is not None)

    @per_layer(_DENSE, only=dense)
    def of_dense(problem: Problem, layer: Layer) -> Iterator[Check]:
        given = given_rows(layer)
        if len(given) != 1:
            raise NotApplicable(f"a sequence: one example has {len(given)} rows")
        moved = given @ of_group(block_of(problem.bnp, layer), layer, 0)
        yield equals(
            _DENSE,
            max(singular(given).value, singular(moved).value),
            1.0,
            tolerance=1e-12,
            given=("dense", "one example"),
            details={"|H^|": float(given.norm()), "|H^ P|": float(moved.norm())},
        )

    @per_layer(_CONVOLUTION, only=lambda layer: not dense(layer))
    def of_convolution(problem: Problem, layer: Layer) -> Iterator[Check]:
        given = given_rows(layer)
        positions = passing(one.risk, layer.name)[0][1].numel() // layer.units
        yield equals(
            _CONVOLUTION,
            float(len(given)),
            float(positions),
            given=("convolution", "one example"),
            details={"rank of H^": singular(given).rank, "columns": given.shape[1]},
        )

    yield from of_dense(problem)
    yield from of_convolution(problem)
