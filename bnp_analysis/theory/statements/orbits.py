"""Curvature along orbits of ReLU networks: one function, many condition numbers (T12), and output scaling (T10)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.curvature import gauss_newton, hessian
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import ConditionNumber, MatrixOperator, Preconditioner, condition_number
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.precondition import bnp_preconditioner
from bnp_analysis.runtime.random import normal
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.generators import Scaling, scalings
from bnp_analysis.theory.statements.rewriting import first_examples, rewritten
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, distance, statement

_T12 = "Hess(T theta) = T^-T Hess(theta) T^-1 along an orbit that keeps the network's function"
_KAPPA = "kappa* of the Gauss-Newton matrix along the orbit follows the law"
_T10 = "with output scaling kappa* in BNP coordinates does not change along the orbit"
TIMES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
# Rows of a factor at every point of an orbit: the law holds for any data.
_ROWS = 1_200


@dataclass
class OrbitCurve:
    """`kappa*` at the points `T_t theta`, observed there and predicted from `theta` alone.

    Attributes:
        times: `t`.
        observed, predicted: name of the coordinates (`"plain"`, `"bnp"`, `"bnp, output scaling"`) -> values.
        ranks: the ranks found at each point, in the same order.
        uncertainty: name -> the largest relative half width of an interval.
    """

    times: list[float]
    observed: dict[str, list[float]] = field(default_factory=dict)
    predicted: dict[str, list[float]] = field(default_factory=dict)
    ranks: dict[str, list[int | None]] = field(default_factory=dict)
    uncertainty: dict[str, float] = field(default_factory=dict)

    def note(self, name: str, found: ConditionNumber, law: ConditionNumber) -> None:
        self.observed.setdefault(name, []).append(found.value)
        self.predicted.setdefault(name, []).append(law.value)
        self.ranks.setdefault(name, []).append(found.rank)
        width = max(_width(found), _width(law))
        self.uncertainty[name] = max(self.uncertainty.get(name, 0.0), width)

    def deviation(self, name: str) -> float:
        """The largest relative distance of the observed values from the law."""
        pairs = zip(self.observed[name], self.predicted[name], strict=True)
        return max(abs(found / law - 1) for found, law in pairs)

    def spread(self, name: str) -> float:
        """`max/min - 1` along the orbit."""
        return max(self.observed[name]) / min(self.observed[name]) - 1


def _width(k: ConditionNumber) -> float:
    """How far the ends of the resolved part are known; the zeros that structure does not explain play no part."""
    return 2 * math.sqrt(k.noise_floor / k.lambda_min)


def orbit_curve(risk: EmpiricalRisk, scaling: Scaling, times: Sequence[float] = TIMES) -> OrbitCurve:
    """`kappa*` of the Gauss-Newton matrix along `T_t theta`: plain, in BNP coordinates, with output scaling.

    Args:
        risk: at `theta`, in float64, small enough for its dense factor.
        scaling: the orbit.
        times: `t`.

    Returns:
        An `OrbitCurve`.

    Source: T10, T12.
    """
    F = _factor(risk)
    coordinates = _coordinates(risk)
    curve = OrbitCurve(list(times))
    still: dict[str, ConditionNumber] = {}
    for t in times:
        T = scaling.diagonal(t)
        there = risk.at(T * risk.theta)
        moved, own = _factor(there), _coordinates(there)
        for name, P in coordinates.items():
            # The factor there is F T^-1; in BNP coordinates z' = diag(c) z, c = t for what comes in, 1 elsewhere.
            law = {"plain": 1 / T, "bnp": t ** -scaling.exponents.clamp_min(0)}.get(name)
            if law is None and name not in still:
                still[name] = _kappa(F, P)
            rows = F if P is None else P.apply_transpose(F.T).T
            curve.note(name, _kappa(moved, own[name]), still[name] if law is None else _kappa(rows * law, None))
    return curve


def _factor(risk: EmpiricalRisk) -> Tensor:
    found = gauss_newton(risk).factor
    if found is None:
        raise NotApplicable("the loss is not convex in the outputs, or not separate over examples: no factor")
    return found.to_dense()


def _coordinates(risk: EmpiricalRisk) -> dict[str, Preconditioner | None]:
    return {
        "plain": None,
        "bnp": bnp_preconditioner(risk),
        "bnp, output scaling": bnp_preconditioner(risk, output_scale=True),
    }


def _kappa(F: Tensor, P: Preconditioner | None) -> ConditionNumber:
    return condition_number(GramOperator(MatrixOperator(F, exact=False)), preconditioner=P)


def _studied(problem: Problem) -> tuple[EmpiricalRisk, list[Scaling]]:
    """The risk on a part of its data, and the orbits at it."""
    risk = problem.risk
    problem.require_size(risk.space.dim)
    problem.require_smooth()
    if risk.coupled:
        raise NotApplicable("batch statistics couple the examples")
    outputs = max(risk.outputs.numel() // round(risk.batches.total), 1)
    count = max(_ROWS // outputs, 2)
    if risk.batches.total > count:
        risk = rewritten(risk, batches=first_examples(risk, count))
    return risk, scalings(Problem(risk, seed=problem.seed, limit=problem.limit))


@statement(Source.T12, _T12)
def check_orbits(problem: Problem) -> Iterator[Check]:
    """T12: the law on products, the condition numbers along the orbit, and the blocks in BNP coordinates."""
    risk, orbits = _studied(problem)
    for scaling in orbits:
        yield from _law(problem, risk, scaling)
        yield from _blocks(risk, scaling)
    for scaling in _first_and_last(orbits):
        curve = _curve(problem, risk, scaling)
        for name in ("plain", "bnp"):
            yield _compared(
                curve,
                name,
                (f"{_KAPPA} [{name}; {_where(scaling)}]", Source.T12),
                observed=curve.deviation(name),
                reason=f"kappa* from {min(curve.observed[name]):.3g} to {max(curve.observed[name]):.3g}",
                details={"observed": curve.observed[name], "predicted": curve.predicted[name]},
            )


@statement(Source.T10, _T10)
def check_output_scaling(problem: Problem) -> Iterator[Check]:
    """T10: the same orbits with each unit divided by its share of the curvature of the loss."""
    risk, orbits = _studied(problem)
    name = "bnp, output scaling"
    for scaling in _first_and_last(orbits):
        curve = _curve(problem, risk, scaling)
        yield _compared(
            curve,
            name,
            (f"{_T10} [{_where(scaling)}]", Source.T10),
            observed=curve.spread(name),
            reason=f"kappa* {curve.observed[name][0]:.6g}; without it a factor {_factor_of(curve):.3g}",
            details={f"kappa*, {key}": values for key, values in curve.observed.items()},
        )


def _compared(
    curve: OrbitCurve, name: str, said: tuple[str, str], *, observed: float, reason: str, details: dict[str, Any]
) -> Check:
    """A statement about one kind of number along an orbit, where its rank is the same everywhere."""
    if not _one_rank(curve, name):
        return Check.not_applicable(*said, _ranks(curve, name))
    return Check.compare(
        *said,
        observed=observed,
        predicted=1e-6 + curve.uncertainty[name],
        tolerance=0.0,
        relation="<=",
        hypotheses={"positively homogeneous": True, "one rank along the orbit": True},
        reason=reason,
        details={"t": curve.times, **details},
    )


def _factor_of(curve: OrbitCurve) -> float:
    return max(curve.observed["bnp"]) / min(curve.observed["bnp"])


def _curve(problem: Problem, risk: EmpiricalRisk, scaling: Scaling) -> OrbitCurve:
    """The curve, kept for the next statement that asks for it."""
    key = ("orbit", scaling.producer, scaling.units)
    if key not in problem.results:
        try:
            # All t for single units, the ends for whole layers.
            problem.results[key] = orbit_curve(risk, scaling, TIMES if len(scaling.units) == 1 else TIMES[::3])
        except InvalidInputError as error:
            raise NotApplicable(str(error)) from error
    found: OrbitCurve = problem.results[key]
    return found


def _one_rank(curve: OrbitCurve, name: str) -> bool:
    return len(set(curve.ranks[name])) == 1


def _ranks(curve: OrbitCurve, name: str) -> str:
    found = ", ".join(f"{rank} at t = {t:g}" for t, rank in zip(curve.times, curve.ranks[name], strict=True))
    return f"the smallest eigenvalue sinks below the rounding level along the orbit: rank {found}"


def _first_and_last(orbits: list[Scaling]) -> list[Scaling]:
    """One unit of the first layer, all units of the last."""
    return orbits[:1] if len(orbits) == 1 else [orbits[0], orbits[-1]]


def _where(scaling: Scaling) -> str:
    units = f"unit {scaling.units[0]}" if len(scaling.units) == 1 else f"{len(scaling.units)} units"
    return f"{scaling.producer or 'layer'}, {units}"


def _law(problem: Problem, risk: EmpiricalRisk, scaling: Scaling) -> Iterator[Check]:
    """`T^T Hess(T theta) T v = Hess(theta) v` on random vectors, far along the orbit."""
    v = normal((risk.space.dim, 3), problem.random(12), risk.theta)
    image = hessian(risk) @ v
    worst, outputs = 0.0, 0.0
    for t in (1e-3, 1e3):
        T = scaling.diagonal(t).unsqueeze(1)
        there = risk.at(T.squeeze(1) * risk.theta)
        outputs = max(outputs, distance(there.outputs, risk.outputs))
        worst = max(worst, distance(T * (hessian(there) @ (T * v)), image))
    yield Check.compare(
        f"{_T12} [{_where(scaling)}]",
        Source.T12,
        observed=worst,
        predicted=1e-8,
        tolerance=0.0,
        relation="<=",
        hypotheses={"the outputs are unchanged": outputs <= 1e-10},
        details={"outputs change by": outputs, "t": "1e-3, 1e3"},
    )


def _blocks(risk: EmpiricalRisk, scaling: Scaling) -> Iterator[Check]:
    """In undamped BNP coordinates: outgoing blocks stay, incoming ones go with `t^-2`, what couples them with `1/t`."""
    P = bnp_preconditioner(risk)
    F = P.apply_transpose(_factor(risk).T).T
    into = (scaling.exponents > 0).nonzero().squeeze(1)
    out = torch.cat([P.blocks[name][0] for name in dict.fromkeys(scaling.readers)])
    gaps = {"outgoing": 0.0, "incoming": 0.0, "cross": 0.0}
    for t in (1e-3, 1e-1, 1e1, 1e3):
        there = risk.at(scaling.diagonal(t) * risk.theta)
        moved = bnp_preconditioner(there).apply_transpose(_factor(there).T).T
        for name, left, right, power in (
            ("outgoing", out, out, 0),
            ("incoming", into, into, 2),
            ("cross", into, out, 1),
        ):
            found = moved[:, left].T @ moved[:, right] * t**power
            gaps[name] = max(gaps[name], distance(found, F[:, left].T @ F[:, right]))
    for name, words in (
        ("outgoing", "the outgoing layer's block does not change"),
        ("incoming", "the incoming units' block scales by t^-2"),
        ("cross", "their cross block scales by t^-1"),
    ):
        yield Check.compare(
            f"in BNP coordinates {words} [{_where(scaling)}]",
            Source.T12,
            observed=gaps[name],
            predicted=1e-8,
            tolerance=0.0,
            relation="<=",
            hypotheses={"undamped": True, "live units": True},
            details={"t": "1e-3, 0.1, 10, 1e3"},
        )
