"""Why BNP conditions: centering and scaling (Theorem 4), the curvature between (Prop. 11), T7, and `q` (T8)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bnp_analysis.curvature.units import unit_blocks
from bnp_analysis.linalg import ConditionNumber, MatrixOperator, singular_condition_number
from bnp_analysis.network import Layer
from bnp_analysis.precondition import bnp_preconditioner
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.reference import damped, extended, own_moments
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, each_layer, label, statement

_CENTERING = "centering: kappa(H^U) <= kappa(H^)"
_STRICT = "kappa(H^U) < kappa(H^) where mu is not orthogonal to the top eigenvector of the covariance"
_SCALING = "scaling: kappa(G^) <= sqrt(n+1) min kappa(H^U D0) over diagonal D0"
_BY_D = "kappa(H^U) <= kappa(D) sqrt(n+1) min kappa(H^U D0), D = diag(1, 1/sigma)"
_THROUGH = "through S: kappa*(H^^T S H^) <= kappa*(H^)^2 kappa(S)"
_SHARP = "scaling: kappa*(G) <= sqrt(m) min_D kappa*(H_c D)"
_GUARANTEE = "kappa(G^^T S G^) <= m kappa(S)^2 kappa(H^^T S H^)"
_GAIN = "the gain of centering for whitened inputs is about (1 + |mu|^2 + s^2)/max(1, s^2)"
_BOUNDS = "max(1, m/(R-1)) <= |G^|^2/R <= m"
_SLACK = 1e-7
_SEARCH = 150
# A rank counts as decided where the values that count as zero lie this far below the others.
_GAP = 1e6


@dataclass(eq=False)
class Inputs:
    """The rows of one group of a layer without its constant features, and their three forms."""

    H: Tensor
    constant: int

    @property
    def R(self) -> int:
        return self.H.shape[0]

    @property
    def m(self) -> int:
        return self.H.shape[1]

    @cached_property
    def centered(self) -> Tensor:
        return self.H - self.H.mean(dim=0)

    @cached_property
    def G(self) -> Tensor:
        return self.centered / self.H.std(dim=0, unbiased=False)

    @cached_property
    def raw(self) -> ConditionNumber:
        return singular(extended(self.H, True))

    @cached_property
    def without_mean(self) -> ConditionNumber:
        return singular(extended(self.centered, True))

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


def singular(matrix: Tensor) -> ConditionNumber:
    """The effective condition number of the singular values, by a QR first."""
    return singular_condition_number(MatrixOperator(matrix, exact=False))


def inputs_of(problem: Problem, layer: Layer, group: int = 0) -> Inputs:
    """The inputs of a group, by their own exact moments (per entry of a patch).

    Raises:
        NotApplicable: fewer than two rows, or constant features only.
    """
    rows = problem.rows[layer.name][:, group]
    constant = own_moments(problem, layer, "patch").constant[group]
    if len(rows) < 2 or bool(constant.all()):
        raise NotApplicable(f"{len(rows)} rows with {int((~constant).sum())} features that change")
    return Inputs(rows[:, ~constant], int(constant.sum()))


@statement(Source.THEOREM_4, _CENTERING)
def check_centering(problem: Problem) -> Iterator[Check]:
    """Theorem 4 on every layer, of grouped convolutions on their first group; its strictness on known covariances."""
    for words, attempt in ((_CENTERING, _centering), (_STRICT, _strict), (_SCALING, _scaling)):
        yield from each_layer(problem, words, Source.THEOREM_4, attempt)
    yield from _known_covariances(problem.random(4))


def _centering(problem: Problem, layer: Layer) -> Iterator[Check]:
    inputs = inputs_of(problem, layer)
    inputs.require_full_rank()
    yield Check.compare(
        f"{_CENTERING} [{label(layer)}]",
        Source.THEOREM_4,
        observed=inputs.without_mean.value,
        predicted=inputs.raw.value,
        tolerance=_SLACK,
        relation="<=",
        hypotheses={"full column rank": True, "exact mean of the same rows": True},
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
    v, mu = torch.linalg.eigh(covariance)[1][:, -1], inputs.H.mean(dim=0)
    c, a = float(v @ covariance @ v), float(mu @ v)
    t = 1 + c + a * a
    larger = (t + math.sqrt(max(t * t - 4 * c, 0.0))) / 2
    return math.sqrt(larger / max(1.0, c)), abs(a) / (float(mu.norm()) or 1.0)


def _strict(problem: Problem, layer: Layer) -> Iterator[Check]:
    inputs = inputs_of(problem, layer)
    inputs.require_full_rank()
    yield _strictly(inputs, f"{_STRICT} [{label(layer)}]")


def _strictly(inputs: Inputs, words: str) -> Check:
    bound, cosine = least_gain(inputs)
    details = {"|mu . v|/|mu|": cosine, "|mu|": float(inputs.H.mean(dim=0).norm())}
    if bound - 1 < 10 * _SLACK:
        why = f"the mean is orthogonal to the top eigenvector, or nearly (bound of the ratio: 1 + {bound - 1:.2g})"
        return Check.not_applicable(words, Source.THEOREM_4, why, details=details)
    return Check.compare(
        words,
        Source.THEOREM_4,
        observed=inputs.raw.value / inputs.without_mean.value,
        predicted=bound,
        tolerance=_SLACK,
        relation=">=",
        hypotheses={"full column rank": True, "mu is not orthogonal to the top eigenvector": True},
        details=details,
    )


def _known_covariances(g: torch.Generator) -> Iterator[Check]:
    """Covariance diag(9, 4, .25): a mean beside the top eigenvector need not cost anything, but may."""
    for mean, equal in ((0.0, 0.3, 0.0), True), ((0.0, 0.0, 0.3), False):
        noise = torch.randn(40, 3, generator=g, dtype=torch.float64)
        white = torch.linalg.qr(noise - noise.mean(dim=0))[0] * math.sqrt(40)
        inputs = Inputs(white * torch.tensor([3.0, 2.0, 0.5]) + torch.tensor(mean, dtype=torch.float64), 0)
        words = (
            "a mean orthogonal to the top eigenvector may leave kappa(H^U) = kappa(H^)"
            if equal
            else "its condition is sufficient, not necessary: here the mean is orthogonal, and the inequality is strict"
        )
        ratio = inputs.raw.value / inputs.without_mean.value
        yield Check.compare(
            f"{words} [covariance diag(9, 4, .25), mu = {mean}]",
            Source.THEOREM_4,
            observed=ratio,
            predicted=1.0 if equal else 1.01,
            tolerance=1e-9,
            relation="=" if equal else ">=",
            hypotheses={"full column rank": True},
            details={"|mu . v|/|mu|": least_gain(inputs)[1]},
        )


def _scaling(problem: Problem, layer: Layer) -> Iterator[Check]:
    """van der Sluis' bound with all `n + 1` columns, and what it says of `H^U` by `H^U = G^ D^-1`."""
    inputs = inputs_of(problem, layer)
    inputs.require_full_rank()
    hat = torch.linalg.qr(extended(inputs.G, True), mode="r")[1]
    best = _best_scaling(hat, inputs.m + 1, problem.random(7))
    sigma = torch.cat([inputs.H.std(dim=0, unbiased=False), inputs.H.new_ones(1)])
    of_D = float(sigma.max() / sigma.min())
    hypotheses = {"full column rank": True}
    details = {"best kappa found over D0": best, "tried": _SEARCH, "kappa(D)": of_D, "n + 1": inputs.m + 1}
    for words, found, bound in (
        (_SCALING, singular(extended(inputs.G, True)).value, 1.0),
        (_BY_D, inputs.without_mean.value, of_D),
    ):
        yield Check.compare(
            f"{words} [{label(layer)}]",
            Source.THEOREM_4,
            observed=found,
            predicted=bound * math.sqrt(inputs.m + 1) * best,
            tolerance=_SLACK,
            relation="<=",
            hypotheses=hypotheses,
            details=details,
        )


@statement(Source.PROP_11, _THROUGH)
def check_through_curvature(problem: Problem) -> Iterator[Check]:
    """Prop. 11 on random matrices of any rank and on the units of dense layers; where `S` is singular it fails."""
    yield from _random_curvature(problem.random(11))
    yield from each_layer(problem, _THROUGH, Source.PROP_11, _through)


def _random_curvature(g: torch.Generator) -> Iterator[Check]:
    for definite in (True, False):
        worst, cases = 0.0, 0
        for rows, columns, rank in ((8, 5, 5), (8, 5, 3), (5, 8, 5), (5, 8, 2), (6, 6, 6), (6, 6, 1)):
            if not definite and rank < rows:
                continue
            for _ in range(5):
                left, right = (torch.randn(n, rank, generator=g, dtype=torch.float64) for n in (rows, columns))
                root = torch.randn(rows, rows, generator=g, dtype=torch.float64)
                root = root if definite else root[: rows - 2]
                H = left @ right.T
                found, of_H, of_S = (_kappa_of_rank(m, r) for m, r in ((root @ H, min(rank, len(root))), (H, rank),
                                                                      (root, len(root))))  # fmt: skip
                worst, cases = max(worst, found**2 / (of_H * of_S) ** 2), cases + 1
        what = "S > 0, H^ of any rank" if definite else "singular S, H^ of full row rank"
        yield Check.compare(
            f"{_THROUGH} [the largest ratio of {cases} random cases: {what}]",
            Source.PROP_11,
            observed=worst,
            predicted=1.0,
            tolerance=1e-6,
            relation="<=",
            hypotheses={what: True},
        )
    e = 1e-3
    H = torch.tensor([[1.0, 0.0], [1.0, e], [0.0, 1.0]], dtype=torch.float64)
    yield Check.compare(
        "for singular S without full row rank of H^ it fails, without bound [S = diag(1, 1, 0), rows (1, 0), (1, e), "
        "(0, 1)]",
        Source.PROP_11,
        observed=_kappa_of_rank(H[:2], 2) ** 2,
        predicted=1e3 * _kappa_of_rank(H, 2) ** 2,
        tolerance=0.0,
        relation=">=",
        hypotheses={"S is singular": True, "H^ has full row rank": False},
        details={"e": e, "kappa*(S)": 1.0},
    )


def _kappa_of_rank(matrix: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(matrix)
    return float(values[0] / values[rank - 1])


def _units(problem: Problem, layer: Layer) -> tuple[Inputs, list[tuple[int, Tensor]]]:
    """The inputs of a dense layer, and the roots of `S` of those of a few units whose `S` is positive definite.

    Raises:
        NotApplicable: `S` is not one positive number per row.
    """
    units = unit_blocks(problem.risk, problem.layers).get(layer.name)
    if units is None:
        raise NotApplicable("S is not one number per row: a convolution, a sequence, coupled or reused rows")
    tried = problem.some_units(layer, 8)
    found = [(i, units.scales[:, i]) for i in tried if bool((units.scales[:, i] > 0).all())]
    if not found:
        raise NotApplicable(f"S is singular in all {len(tried)} units tried: rows on which a unit does not act")
    return inputs_of(problem, layer), found


def _through(problem: Problem, layer: Layer) -> Iterator[Check]:
    inputs, units = _units(problem, layer)
    for name, rows in (("H^", inputs.H), ("G^", inputs.G)):
        hat = extended(rows, True)
        of_rows = singular(hat).value
        unit, found, of_S = max(
            ((i, singular(s[:, None] * hat).value ** 2, float((s.max() / s.min()) ** 2)) for i, s in units),
            key=lambda one: one[1] / one[2],
        )
        yield Check.compare(
            f"{_THROUGH.replace('H^', name)} [{label(layer)}]",
            Source.PROP_11,
            observed=found,
            predicted=of_rows**2 * of_S,
            tolerance=_SLACK,
            relation="<=",
            hypotheses={"S > 0": True},
            details={"unit": unit, "kappa(S)": of_S, f"kappa*({name})": of_rows, "units with S > 0": len(units)},
        )


@statement(Source.T7, _SHARP)
def check_conditioning(problem: Problem) -> Iterator[Check]:
    """T7, beyond Theorem 4 and Prop. 11: the sharper constant at any rank, what the block may lose, and the gain."""
    for words, attempt in ((_SHARP, _sharp), (_GUARANTEE, _guarantee), (_GAIN, _gain)):
        yield from each_layer(problem, words, Source.T7, attempt)


def _sharp(problem: Problem, layer: Layer) -> Iterator[Check]:
    inputs = inputs_of(problem, layer)
    triangle = torch.linalg.qr(inputs.centered, mode="r")[1] if inputs.m < inputs.R else inputs.centered
    sigma = inputs.H.std(dim=0, unbiased=False)
    unit = triangle / sigma
    values = torch.linalg.svdvals(unit)
    rank = int((values > max(inputs.R, inputs.m) * torch.finfo(values.dtype).eps * values[0] * 100).sum())
    if rank < len(values) and values[rank - 1] < _GAP**0.5 * values[rank]:
        raise NotApplicable(
            f"the rank of H_c is not decided: singular values {values[rank - 1]:.2g}, {values[rank]:.2g}"
        )
    best = _best_scaling(unit, rank, problem.random(7))
    yield Check.compare(
        f"{_SHARP} [{label(layer)}]",
        Source.T7,
        observed=float(values[0] / values[rank - 1]),
        predicted=math.sqrt(inputs.m) * best,
        tolerance=_SLACK,
        relation="<=",
        hypotheses={"no zero column": True},
        details={"m": inputs.m, "rank": rank, "best kappa* found over D": best, "tried": _SEARCH},
    )


def _best_scaling(unit: Tensor, rank: int, g: torch.Generator) -> float:
    """The smallest `kappa*` over scalings that a random search finds; the bound holds for every one."""

    def kappa(logs: Tensor) -> float:
        values = torch.linalg.svdvals(unit * logs.exp())
        return float(values[0] / values[rank - 1])

    logs = torch.zeros(unit.shape[1], dtype=unit.dtype)
    best, step = kappa(logs), 0.5
    for k in range(_SEARCH):
        trial = logs + step * torch.randn(len(logs), generator=g, dtype=logs.dtype)
        value = kappa(trial)
        if value < best:
            best, logs = value, trial
        elif k % 5 == 4:
            step *= 0.85
    return best


def _guarantee(problem: Problem, layer: Layer) -> Iterator[Check]:
    inputs, units = _units(problem, layer)
    inputs.require_full_rank()
    hat, raw = extended(inputs.G, True), extended(inputs.H, True)
    unit, found, bound, before = max(
        (
            (i, singular(s[:, None] * hat).value ** 2, inputs.m * float((s.max() / s.min()) ** 4) * was, was)
            for i, s, was in ((i, s, singular(s[:, None] * raw).value ** 2) for i, s in units)
        ),
        key=lambda one: one[1] / one[2],
    )
    yield Check.compare(
        f"{_GUARANTEE} [{label(layer)}]",
        Source.T7,
        observed=found,
        predicted=bound,
        tolerance=_SLACK,
        relation="<=",
        hypotheses={"S > 0": True, "full column rank": True},
        details={"unit": unit, "kappa(H^^T S H^)": before},
    )


def _gain(problem: Problem, layer: Layer) -> Iterator[Check]:
    inputs = inputs_of(problem, layer)
    inputs.require_full_rank()
    s = float(inputs.H.std(dim=0, unbiased=False).square().mean().sqrt())
    mu = inputs.H.mean(dim=0)
    Q = torch.linalg.qr(inputs.centered)[0]
    white = s * math.sqrt(inputs.R) * (Q - Q.mean(dim=0))
    before, after = singular(extended(white + mu, True)).value, singular(extended(white, True)).value
    t = 1 + float(mu @ mu) + s * s
    # The larger eigenvalue of [[1, |mu|], [|mu|, |mu|^2 + s^2]], which is t up to s^2/t.
    largest = (t + math.sqrt(max(t * t - 4 * s * s, 0.0))) / 2
    yield Check.compare(
        f"{_GAIN} [{label(layer)}]",
        Source.T7,
        observed=before / after,
        predicted=largest / max(1.0, s * s),
        tolerance=_SLACK,
        hypotheses={"isotropic covariance": True, "full column rank": True},
        reason="the layer's own rows whitened, with its own mean",
        details={
            "|mu|": float(mu.norm()),
            "s": s,
            "short form": t / max(1.0, s * s),
            "own gain": inputs.raw.value / inputs.without_mean.value,
        },
    )


@statement(Source.T8, _BOUNDS)
def check_scale(problem: Problem) -> Iterator[Check]:
    """T8: both bounds, and that `q="measured"` is this number."""
    yield from each_layer(problem, _BOUNDS, Source.T8, _scale)


def _scale(problem: Problem, layer: Layer) -> Iterator[Check]:
    inputs = inputs_of(problem, layer)
    name = label(layer)
    ratio = _size(extended(inputs.G, True))
    q2 = max(inputs.m / inputs.R, 1.0)
    low = max(1.0, inputs.m / (inputs.R - 1))
    details = {"R": inputs.R, "m": inputs.m, "m/R": inputs.m / inputs.R, "over q^2": ratio / q2}
    details["for independent features"] = (1 + math.sqrt(inputs.m / inputs.R)) ** 2
    hypotheses = {"exact moments of the same rows": True, "no constant feature": True}
    for words, bound, relation in (
        (f"|G^|^2/R >= max(1, m/(R-1)) [{name}]", low, ">="),
        (f"|G^|^2/R <= m [{name}]", float(inputs.m), "<="),
    ):
        yield Check.compare(
            words, Source.T8, observed=ratio, predicted=bound, tolerance=_SLACK, relation=relation,
            hypotheses=hypotheses, details=details,
        )  # fmt: skip
    if layer.bias is None:
        return
    moments = own_moments(problem, layer)
    rows = (problem.rows[layer.name] - moments.mean) / damped(moments, {"eps1": 0, "eps2": 0}).sqrt()
    largest = max(_size(extended(rows[:, group], True)) for group in range(layer.groups))
    measured = bnp_preconditioner(problem.risk, q="measured").q[layer.name] ** 2
    words = f'q = "measured" removes exactly |G^|^2/R [{name}]'
    yield Check.compare(words, Source.T8, observed=measured, predicted=largest, tolerance=1e-9, details=details)


def _size(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2)) ** 2 / len(matrix)
