"""Symmetries: null directions and generators (T11), curvature along orbits of ReLU units (T12), scaling (T10)."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.curvature import hessian
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import ConditionNumber, MatrixOperator, Preconditioner, condition_number
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.linalg.spectra.checks import norm_estimate
from bnp_analysis.network import EmpiricalRisk, Layer
from bnp_analysis.precondition import bnp_preconditioner
from bnp_analysis.precondition.base import layer_positions
from bnp_analysis.runtime.random import normal
from bnp_analysis.symmetry import NullDirections
from bnp_analysis.symmetry.candidates import Candidate, Cause, Orbit, Part
from bnp_analysis.symmetry.null_space import candidate_directions
from bnp_analysis.theory.check import Check, Source
from bnp_analysis.theory.statements.setting import (
    NotApplicable,
    Problem,
    at_most,
    attempted,
    decided_rank,
    distance,
    first_examples,
    located,
    own_moments,
    per_layer,
    per_unit,
    refused,
    rewritten,
    singular_values,
    statement,
)

_T11 = "the null directions that symmetries and data explain are null, and at most the nullity"
_COUNT = "explained null dimensions <= dense nullity of the Gauss-Newton matrix"
_ORBIT = "along a linear generator Hess t = -B^T grad"
_SHIFT = "along the shift of all logits Hess t = 0"
_T12 = "Hess(T theta) = T^-T Hess(theta) T^-1 along an orbit that keeps the network's function"
_KAPPA = "kappa* of the Gauss-Newton matrix along the orbit follows the law"
_T10 = "with output scaling kappa* in BNP coordinates does not change along the orbit"
# Singular values on both sides of the rank must be this far apart, or the nullity is not decided.
_GAP = 30.0
# How far an eigenvalue may be uncertain, relative, for a first-order width to mean anything.
_KNOWN = 0.1
TIMES = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
# Rows of a factor at every point of an orbit: the law holds for any data.
_ROWS = 1_200


@dataclass(frozen=True, eq=False)
class Generator:
    """A sparse matrix `B` with `B[into, source] = sign`; the tangent of its orbit at `theta` is `B theta`.

    Attributes:
        where: the cause of the symmetry, and the unit, in words.
        into, source, sign: `(k,)` flat positions and values.
    """

    where: str
    into: Tensor
    source: Tensor
    sign: Tensor

    def tangent(self, theta: Tensor) -> Tensor:
        """`B theta`."""
        return torch.zeros_like(theta).index_add_(0, self.into, self.sign * theta[self.source])

    def transposed(self, g: Tensor) -> Tensor:
        """`B^T g`."""
        return torch.zeros_like(g).index_add_(0, self.source, self.sign * g[self.into])


@dataclass(frozen=True, eq=False)
class Scaling:
    """Units scaled by `t` and what reads them by `1/t`: `T_t = diag(t^exponents)`.

    Attributes:
        producer: name of the layer whose units are scaled.
        readers: names of the layers that read them.
        units: the units scaled.
        exponents: `(n,)`, 1 for what comes in, -1 for what goes out, 0 elsewhere.
    """

    producer: str
    readers: tuple[str, ...]
    units: tuple[int, ...]
    exponents: Tensor

    def diagonal(self, t: float) -> Tensor:
        """The diagonal of `T_t`."""
        return t**self.exponents

    def __str__(self) -> str:
        units = f"unit {self.units[0]}" if len(self.units) == 1 else f"{len(self.units)} units"
        return f"{self.producer or 'layer'}, {units}"


def _candidates(problem: Problem) -> list[Candidate]:
    """What structure and data suggest, found once for all statements."""
    if "candidates" not in problem.results:
        problem.results["candidates"], _ = candidate_directions(problem.risk)
    found: list[Candidate] = problem.results["candidates"]
    return found


def linear_orbits(problem: Problem) -> list[Orbit]:
    """The linear symmetries that the structure of the network gives: scales of units, mixings of two channels."""
    orbits = [orbit for one in _candidates(problem) for orbit in one.orbits if orbit is not None]
    return [orbit for orbit in orbits if len(orbit.scaled) or orbit.sheared]


def generators(problem: Problem, each: int = 2) -> Iterator[Generator]:
    """Scales of homogeneous units and mixings of linear ones: of each layer those with the largest gradients."""
    space, gradient = problem.risk.space, problem.risk.gradient
    starts = [space.slice_of(name).start for name in space.names]
    found: dict[str, list[Generator]] = {}
    for orbit in linear_orbits(problem):
        # Of a layer of linear units, mixings alone: scales are the special case of one unit.
        if orbit.cause == (Cause.LINEAR_LAYER if orbit.sheared else Cause.HOMOGENEITY):
            pairs = torch.cat([orbit.scaled[:, None].expand(-1, 2), *(pairs for pairs, _ in orbit.sheared)])
            into, source = pairs.T
            sign = torch.cat([orbit.exponents, *(factors for _, factors in orbit.sheared)]).to(gradient)
            name = space.names[bisect(starts, int(into[0])) - 1]
            owner, shape = name.rpartition(".")[0], space.shapes[name]
            i, j = ((int(end[0]) - space.slice_of(name).start) // math.prod(shape[1:]) for end in (into, source))
            unit = f"unit {i}" if i == j else f"units {j} into {i}"
            made = Generator(f"{orbit.cause}: {owner}, {unit}", into, source, sign)
            found.setdefault(f"{orbit.cause} {owner}", []).append(made)
    for group in found.values():
        yield from sorted(group, key=lambda made: -float(made.transposed(gradient).norm()))[:each]


def unit_scalings(problem: Problem) -> Iterator[Scaling]:
    """The scaling of every homogeneous unit between covered layers, in the order in which the layers run."""
    layers = [problem.layers[name] for name in problem.uses]
    places = {layer.name: layer_positions(layer, problem.risk.space) for layer in layers}
    for orbit in linear_orbits(problem):
        exponents = scales_of(orbit, problem.risk.space.dim)
        met = {name: exponents[where] for name, where in places.items() if bool(exponents[where].any())}
        if orbit.cause == Cause.HOMOGENEITY and sum(int((e != 0).sum()) for e in met.values()) == len(orbit.scaled):
            producer, *readers = met
            first = int(met[producer].nonzero()[0])
            sign = met[producer][first].sign()
            if all(bool((sign * met[name] <= 0).all()) for name in readers):
                unit = first // problem.layers[producer].features
                yield Scaling(producer, tuple(readers), (unit,), sign * exponents)


def scalings(problem: Problem) -> list[Scaling]:
    """For every layer of homogeneous units: one live unit, and all its live units.

    Raises:
        NotApplicable: no unit can be scaled.
    """
    live: dict[str, list[Scaling]] = {}
    for one in unit_scalings(problem):
        if _is_live(problem, one):
            live.setdefault(one.producer, []).append(one)
    if not live:
        raise NotApplicable("no unit or channel reaches the next layer through positively homogeneous operations alone")
    return [
        replace(
            some[0],
            units=tuple(one.units[0] for one in some),
            exponents=torch.stack([one.exponents for one in some]).sum(dim=0),
        )
        for units in live.values()
        for some in ([units] if len(units) == 1 else [units[:1], units])
    ]


def _is_live(problem: Problem, one: Scaling) -> bool:
    """Whether what a unit sends changes over the data: a constant feature has scale 1 whatever it is."""
    for layer in map(problem.layers.__getitem__, one.readers):
        read = one.exponents[layer_positions(layer, problem.risk.space)][: layer.units * layer.features] < 0
        constant = per_unit(own_moments(problem, layer).constant, layer)
        if bool((read.view(layer.units, -1) & constant).any()):
            return False
    return True


def scales_of(orbit: Orbit, dim: int) -> Tensor:
    """The exponents of an orbit as a vector, `(n,)`."""
    return torch.zeros(dim, dtype=torch.float64).index_put_((orbit.scaled,), orbit.exponents)


def rescalings(problem: Problem) -> Tensor:
    """The exponents of every scale that leaves the network the same function, `(n, scales)`."""
    dim = problem.risk.space.dim
    found = [scales_of(orbit, dim) for orbit in linear_orbits(problem) if len(orbit.scaled)]
    return torch.stack(found, dim=1) if found else torch.zeros(dim, 0, dtype=torch.float64)


def logit_shifts(problem: Problem) -> Tensor:
    """Unit directions that add one number to a weight of every output, where the loss ignores it, `(n, c)`."""
    found = [problem.risk.theta.new_zeros(problem.risk.space.dim, 0)]
    for part in (part for one in _candidates(problem) if one.cause == Cause.SOFTMAX_SHIFT for part in one.parts):
        if any(_is_translation(problem, layer, part) for layer in problem.layers):
            column = torch.zeros_like(problem.risk.theta)
            column[part.positions] = part.values[:, 0].to(column)
            found.append((column / column.norm())[:, None])
    return torch.cat(found, dim=1)


def _is_translation(problem: Problem, layer: Layer, part: Part) -> bool:
    """Whether a direction adds one number to the same weight of every unit of one layer: no parameter enters it."""
    space = problem.risk.space
    column = torch.zeros(space.dim, dtype=torch.float64)
    column[part.positions] = part.values[:, 0]
    size = float(column.norm())
    for name in space.layer_names(layer.name):
        rows = column[space.slice_of(name)].reshape(layer.units, -1)
        if float((rows - rows[0]).norm()) > 1e-12 * size:
            return False
        column[space.slice_of(name)] = 0
    return not bool(column.any())


@statement(Source.T11, _T11)
def check_null_directions(problem: Problem) -> Iterator[Check]:
    """T11: the whole network where it fits, else its layers; what is left of the nullity is named unexplained."""
    try:
        problem.require_size(problem.risk.space.dim)
        yield from located("network", _counted(problem, problem.null))
    except NotApplicable as refusal:
        yield refused(f"{_COUNT} [network]", str(refusal))
        yield from _layers(problem)
    yield from attempted(_ORBIT, _generated(problem))
    yield from attempted(_SHIFT, _shift(problem))


@per_layer(_COUNT)
def _layers(problem: Problem, layer: Layer) -> Iterator[Check]:
    inner = problem.of(problem.risk.restrict(problem.risk.space.layer_names(layer.name)))
    yield from _counted(inner, inner.null)


def _counted(problem: Problem, null: NullDirections) -> Iterator[Check]:
    # By F, not A: |A t| would be the square of a small number.
    F = problem.factor
    values = singular_values(F)
    if not len(values) or float(values[0]) == 0:
        raise NotApplicable("the Gauss-Newton matrix is zero")
    rank = decided_rank(values, max(F.shape) * torch.finfo(F.dtype).eps * float(values[0]), _GAP)
    nullity = F.shape[1] - rank
    explained = int(torch.linalg.matrix_rank(null.basis)) if null.basis.shape[1] else 0
    rest = nullity - explained
    reason = f"unexplained: {rest}" if rest > 0 else "all explained"
    if null.not_analysed:
        reason += f"; not analysed: {'; '.join(null.not_analysed)}"
    sizes = {"parameters": float(F.shape[1]), "rank": float(rank), "nullity": float(nullity)}
    sizes |= {"largest": float(values[0]), "smallest": float(values[rank - 1])}
    sizes["largest that counts as zero"] = float(values[rank]) if rank < len(values) else 0.0
    yield at_most(
        _COUNT,
        float(explained),
        float(nullity),
        given=("the rank is decided by a gap",),
        reason=reason,
        details={**sizes, **null.sources, "unexplained": rest, "approximate": dict(null.approximate)},
    )
    if explained:
        images = (F @ null.basis).norm(dim=0) / null.basis.norm(dim=0)
        words, details = "every direction found is null: |F t| / |F| |t|", {"directions": explained}
        yield at_most(words, float(images.max()) / sizes["largest"], 1e-10, details=details)


def _generated(problem: Problem) -> Iterator[Check]:
    problem.require_smooth()
    risk, H = problem.risk, hessian(problem.risk)
    made = list(generators(problem))
    if not made:
        raise NotApplicable("no unit or channel is scaled or mixed by a linear generator")
    for one in made:
        t, expected = one.tangent(risk.theta), -one.transposed(risk.gradient)
        image = H @ t
        sizes = {"|Hess t|": float(image.norm()), "|B^T grad|": float(expected.norm())}
        size = max(*sizes.values(), 1e-5 * norm_estimate(H) * float(t.norm()))
        yield at_most(
            f"{_ORBIT} [{one.where}]",
            float((image - expected).norm()) / size,
            1e-8,
            given=("no entry on a kink",),
            details={**sizes, "grad . t": float(risk.gradient @ t)},
        )


def _shift(problem: Problem) -> Iterator[Check]:
    directions = logit_shifts(problem)
    if not directions.shape[1]:
        raise NotApplicable("the loss does not ignore a shift of the outputs of a last layer")
    H = hessian(problem.risk)
    size = norm_estimate(H)
    if size == 0:
        raise NotApplicable("the Hessian is zero")
    found = float((H @ directions).norm(dim=0).max()) / size
    yield at_most(_SHIFT, found, 1e-10, given=("a translation",), details={"directions": directions.shape[1]})


@dataclass
class OrbitCurve:
    """`kappa*` at the points `T_t theta`, observed there and predicted from `theta` alone.

    Attributes:
        times: `t`.
        pairs: name of the coordinates (`"plain"`, `"bnp"`, `"bnp, output scaling"`) -> what was found at each point,
            and what the law says of it.
    """

    times: list[float]
    pairs: dict[str, list[tuple[ConditionNumber, ConditionNumber]]] = field(default_factory=dict)

    @property
    def observed(self) -> dict[str, list[float]]:
        """The values found, by the coordinates."""
        return {name: [found.value for found, _ in pairs] for name, pairs in self.pairs.items()}

    @property
    def predicted(self) -> dict[str, list[float]]:
        """The values of the law, by the coordinates."""
        return {name: [law.value for _, law in pairs] for name, pairs in self.pairs.items()}

    @property
    def ranks(self) -> dict[str, list[int | None]]:
        """The ranks found, by the coordinates."""
        return {name: [found.rank for found, _ in pairs] for name, pairs in self.pairs.items()}

    def uncertainty(self, name: str) -> float:
        """The largest relative half width: how far the ends of the resolved part are known.

        The zeros that structure does not explain play no part.
        """
        return max(2 * math.sqrt(k.noise_floor / k.lambda_min) for pair in self.pairs[name] for k in pair)

    def deviation(self, name: str) -> float:
        """The largest relative distance of the observed values from the law."""
        return max(abs(found.value / law.value - 1) for found, law in self.pairs[name])

    def spread(self, name: str) -> float:
        """`max/min - 1` along the orbit."""
        return max(self.observed[name]) / min(self.observed[name]) - 1


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
    F, coordinates = _factor(risk), _coordinates(risk)
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
            expected = still[name] if law is None else _kappa(rows * law, None)
            curve.pairs.setdefault(name, []).append((_kappa(moved, own[name]), expected))
    return curve


def _factor(risk: EmpiricalRisk) -> Tensor:
    return Problem(risk, limit=risk.space.dim).factor


def _coordinates(risk: EmpiricalRisk) -> dict[str, Preconditioner | None]:
    scaled = bnp_preconditioner(risk, output_scale=True)
    return {"plain": None, "bnp": bnp_preconditioner(risk), "bnp, output scaling": scaled}


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
    return risk, scalings(problem.of(risk))


@statement(Source.T12, _T12)
def check_orbits(problem: Problem) -> Iterator[Check]:
    """T12: the law on products, the condition numbers along the orbit, and the blocks in BNP coordinates."""
    risk, orbits = _studied(problem)
    for scaling in orbits:
        yield from located(str(scaling), _law(problem, risk, scaling))
        yield from located(str(scaling), _blocks(risk, scaling))
    for scaling, curve in _curves(problem, risk, orbits):
        for name in ("plain", "bnp"):
            values = curve.observed[name]
            yield _along(
                curve,
                name,
                f"{_KAPPA} [{name}; {scaling}]",
                curve.deviation(name),
                reason=f"kappa* from {min(values):.3g} to {max(values):.3g}",
                details={"observed": values, "predicted": curve.predicted[name]},
            )


@statement(Source.T10, _T10)
def check_output_scaling(problem: Problem) -> Iterator[Check]:
    """T10: the same orbits with each unit divided by its share of the curvature of the loss."""
    risk, orbits = _studied(problem)
    name = "bnp, output scaling"
    for scaling, curve in _curves(problem, risk, orbits):
        without = curve.spread("bnp") + 1
        yield _along(
            curve,
            name,
            f"{_T10} [{scaling}]",
            curve.spread(name),
            reason=f"kappa* {curve.observed[name][0]:.6g}; without it a factor {without:.3g}",
            details={f"kappa*, {key}": values for key, values in curve.observed.items()},
        )


def _curves(problem: Problem, risk: EmpiricalRisk, orbits: list[Scaling]) -> Iterator[tuple[Scaling, OrbitCurve]]:
    """One unit of the first layer, all units of the last; kept for the next statement that asks for them."""
    for scaling in orbits[:1] if len(orbits) == 1 else [orbits[0], orbits[-1]]:
        key = ("orbit", scaling.producer, scaling.units)
        if key not in problem.results:
            try:
                # All t for single units, the ends for whole layers.
                times = TIMES if len(scaling.units) == 1 else TIMES[::3]
                problem.results[key] = orbit_curve(risk, scaling, times)
            except InvalidInputError as error:
                raise NotApplicable(str(error)) from error
        yield scaling, problem.results[key]


def _along(curve: OrbitCurve, name: str, words: str, observed: float, *, reason: str, details: dict[str, Any]) -> Check:
    """A statement about one kind of number along an orbit, where its rank is the same everywhere."""
    pairs = curve.pairs[name]
    if len({k.rank for pair in pairs for k in pair}) > 1:
        found = ", ".join(
            f"{here.rank} at t = {t:g}"
            if here.rank == law.rank
            else f"{here.rank} and, predicted, {law.rank} at t = {t:g}"
            for t, (here, law) in zip(curve.times, pairs, strict=True)
        )
        why = f"the smallest eigenvalue sinks below the rounding level along the orbit: rank {found}"
        return refused(words, why)
    unsure = curve.uncertainty(name)
    if unsure > _KNOWN:
        why = f"along the orbit the smallest eigenvalue is known only to {unsure:.2g} of itself"
        return refused(words, why)
    given = ("positively homogeneous", "one rank along the orbit")
    bound, details = 1e-6 + unsure, {"t": curve.times, **details}
    return at_most(words, observed, bound, given=given, reason=reason, details=details)


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
    hypotheses, details = {"the outputs are unchanged": outputs <= 1e-10}, {"outputs change by": outputs}
    yield at_most(_T12, worst, 1e-8, hypotheses=hypotheses, details={**details, "t": "1e-3, 1e3"})


def _blocks(risk: EmpiricalRisk, scaling: Scaling) -> Iterator[Check]:
    """In undamped BNP coordinates: outgoing blocks stay, incoming ones go with `t^-2`, what couples them with `1/t`."""

    def rows(there: EmpiricalRisk) -> Tensor:
        return bnp_preconditioner(there).apply_transpose(_factor(there).T).T

    F, places = rows(risk), bnp_preconditioner(risk).blocks
    into = (scaling.exponents > 0).nonzero().squeeze(1)
    out = torch.cat([places[name][0] for name in dict.fromkeys(scaling.readers)])
    moved = {t: rows(risk.at(scaling.diagonal(t) * risk.theta)) for t in (1e-3, 1e-1, 1e1, 1e3)}
    for words, left, right, power in (
        ("the outgoing layer's block does not change", out, out, 0),
        ("the incoming units' block scales by t^-2", into, into, 2),
        ("their cross block scales by t^-1", into, out, 1),
    ):
        here = F[:, left].T @ F[:, right]
        gaps = [distance(there[:, left].T @ there[:, right] * t**power, here) for t, there in moved.items()]
        said, details = f"in BNP coordinates {words}", {"t": "1e-3, 0.1, 10, 1e3"}
        yield at_most(said, max(gaps), 1e-8, given=("undamped", "live units"), details=details)
