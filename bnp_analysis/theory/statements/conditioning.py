"""Why BNP conditions: centering, scaling, the curvature between them, the size of the gain (T7), and `q` (T8)."""

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
from bnp_analysis.theory.statements.reference import damped, extended, own_moments
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, each_layer, label, statement

_CENTERING = "centering: kappa(H^U) <= kappa(H^)"
_SCALING = "scaling: kappa*(G) <= sqrt(m) min_D kappa*(H_c D)"
_THROUGH = "through S: kappa*(G^^T S G^) <= kappa*(G^)^2 kappa(S)"
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


@statement("T7", "conditioning of a layer's inputs and blocks")
def check_conditioning(problem: Problem) -> Iterator[Check]:
    """T7 (a)-(d), each on every layer; of grouped convolutions on their first group."""
    for words, attempt in ((_CENTERING, _centering), (_SCALING, _scaling), (_THROUGH, _through), (_GAIN, _gain)):
        yield from each_layer(problem, words, "T7", attempt)


def _centering(problem: Problem, layer: Layer) -> Iterator[Check]:
    inputs = inputs_of(problem, layer)
    inputs.require_full_rank()
    after = singular(extended(inputs.centered, True))
    yield Check.compare(
        f"{_CENTERING} [{label(layer)}]",
        "T7",
        observed=after.value,
        predicted=inputs.raw.value,
        tolerance=_SLACK,
        relation="<=",
        hypotheses={"full column rank": True, "exact mean of the same rows": True},
        details={"R": inputs.R, "m": inputs.m, "constant features": inputs.constant},
    )


def _scaling(problem: Problem, layer: Layer) -> Iterator[Check]:
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
        f"{_SCALING} [{label(layer)}]",
        "T7",
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


def _through(problem: Problem, layer: Layer) -> Iterator[Check]:
    units = unit_blocks(problem.risk, problem.layers).get(layer.name)
    if units is None:
        raise NotApplicable("S is not one number per row: a convolution, a sequence, coupled or reused rows")
    inputs = inputs_of(problem, layer)
    hat, raw = extended(inputs.G, True), extended(inputs.H, True)
    of_G = singular(hat).value
    zero = 0
    worst: tuple[float, float, float, float, int] | None = None
    for i in problem.some_units(layer, 8):
        s = units.scales[:, i]
        if not bool((s > 0).all()):
            zero += 1
            continue
        kappa_S = float((s.max() / s.min()) ** 2)
        found = singular(s[:, None] * hat).value ** 2
        before = singular(s[:, None] * raw).value ** 2
        if worst is None or found / kappa_S > worst[0] / worst[1]:
            worst = found, kappa_S, before, float(s.max()), i
    if worst is None:
        raise NotApplicable(f"S is singular in all {zero} units tried: rows on which a unit does not act")
    found, kappa_S, before, _, unit = worst
    details = {"unit": unit, "kappa(S)": kappa_S, "kappa*(H^^T S H^)": before, "kappa*(G^)": of_G, "singular S": zero}
    yield Check.compare(
        f"{_THROUGH} [{label(layer)}]",
        "T7",
        observed=found,
        predicted=of_G**2 * kappa_S,
        tolerance=_SLACK,
        relation="<=",
        hypotheses={"S > 0": True},
        details=details,
    )
    words = f"kappa(G^^T S G^) <= m kappa(S)^2 kappa(H^^T S H^) [{label(layer)}]"
    try:
        inputs.require_full_rank()
    except NotApplicable as refusal:
        yield Check.not_applicable(words, "T7", str(refusal))
        return
    bound = inputs.m * kappa_S**2 * before
    more = {"S > 0": True, "full column rank": True}
    yield Check.compare(
        words, "T7", observed=found, predicted=bound, tolerance=_SLACK, relation="<=", hypotheses=more, details=details
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
        "T7",
        observed=before / after,
        predicted=largest / max(1.0, s * s),
        tolerance=_SLACK,
        hypotheses={"isotropic covariance": True, "full column rank": True},
        reason="the layer's own rows whitened, with its own mean",
        details={
            "|mu|": float(mu.norm()),
            "s": s,
            "short form": t / max(1.0, s * s),
            "own gain": inputs.raw.value / singular(extended(inputs.centered, True)).value,
        },
    )


@statement("T8", _BOUNDS)
def check_scale(problem: Problem) -> Iterator[Check]:
    """T8: both bounds, and that `q="measured"` is this number."""
    yield from each_layer(problem, _BOUNDS, "T8", _scale)


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
            words, "T8", observed=ratio, predicted=bound, tolerance=_SLACK, relation=relation, hypotheses=hypotheses,
            details=details,
        )  # fmt: skip
    if layer.bias is None:
        return
    moments = own_moments(problem, layer)
    rows = (problem.rows[layer.name] - moments.mean) / damped(moments, {"eps1": 0, "eps2": 0}).sqrt()
    largest = max(_size(extended(rows[:, group], True)) for group in range(layer.groups))
    measured = bnp_preconditioner(problem.risk, q="measured").q[layer.name] ** 2
    words = f'q = "measured" removes exactly |G^|^2/R [{name}]'
    yield Check.compare(words, "T8", observed=measured, predicted=largest, tolerance=1e-9, details=details)


def _size(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2)) ** 2 / len(matrix)
