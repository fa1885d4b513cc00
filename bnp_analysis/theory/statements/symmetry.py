"""Symmetries: null directions and generators (T11), curvature along orbits of ReLU units (T12), scaling (T10)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
from bnp_analysis.runtime.random import normal
from bnp_analysis.symmetry import NullDirections
from bnp_analysis.symmetry.candidates import Cause, Chart, Part
from bnp_analysis.symmetry.elementwise import pooled, same
from bnp_analysis.symmetry.graph import Graph, Node
from bnp_analysis.symmetry.null_space import candidate_directions
from bnp_analysis.symmetry.recording import record_graph
from bnp_analysis.theory.check import Check, Source
from bnp_analysis.theory.statements.reference import first_examples, rewritten
from bnp_analysis.theory.statements.setting import (
    NotApplicable,
    Problem,
    at_most,
    attempted,
    distance,
    located,
    per_layer,
    refused,
    statement,
)
from bnp_analysis.theory.statements.spectra import decided_rank, singular_values

_T11 = "the null directions that symmetries and data explain are null, and at most the nullity"
_COUNT = "explained null dimensions <= dense nullity of the Gauss-Newton matrix"
_ORBIT = "along a linear generator Hess t = -B^T grad"
_SHIFT = "along the shift of all logits Hess t = 0"
_T12 = "Hess(T theta) = T^-T Hess(theta) T^-1 along an orbit that keeps the network's function"
_KAPPA = "kappa* of the Gauss-Newton matrix along the orbit follows the law"
_T10 = "with output scaling kappa* in BNP coordinates does not change along the orbit"
# Singular values on both sides of the rank must be this far apart, or the nullity is not decided.
_GAP = 30.0
# Channels of a layer among which generators are chosen.
_TRIED = 64
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


# Of what moves numbers, what leaves them in their order.
_IN_ORDER = {"flatten", "view", "reshape", "contiguous", "clone", "squeeze", "unsqueeze", "unflatten"}


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads channels: `features (C, width)` are the input features of each channel."""

    node: Node
    features: Tensor

    def entries(self, channel: int) -> Tensor:
        """The entries of its weight that multiply a channel, in the same order for each."""
        shape = self.node.arguments["weight_shape"]
        out, inputs = shape[0], shape[1]
        groups = self.groups
        grid = torch.arange(torch.Size(shape).numel()).view(groups, out // groups, inputs, -1)
        picked = [grid[int(f) // inputs, :, int(f) % inputs] for f in self.features[channel]]
        return torch.stack(picked, dim=1).reshape(-1)

    @property
    def groups(self) -> int:
        return int(self.node.arguments.get("groups", 1))


@dataclass(frozen=True, eq=False)
class Link:
    """A layer, the layers that read its channels, and whether all that lies between is linear."""

    producer: Node
    channels: int
    readers: tuple[Reader, ...]
    linear: bool


def _is_maximum(node: Node) -> bool:
    return node.operation.effect is pooled and "max" in node.kind


def _is_average(node: Node) -> bool:
    return node.kind == "mean" or (node.operation.effect is pooled and "avg" in node.kind)


def _keeps_order(node: Node) -> bool:
    return node.kind in _IN_ORDER or node.operation.effect is same


def follow(graph: Graph, producer: Node) -> Link | None:
    """The layers that a layer's channels reach through homogeneous operations; None where they reach anything else."""
    axis = producer.channel_axis
    if axis is None:
        return None
    count = producer.shape[axis]
    front = [(producer, axis, torch.arange(count))]
    readers: list[Reader] = []
    linear = True
    while front:
        node, axis, channel = front.pop()
        if node.index == graph.result:
            return None
        for reader in graph.consumers(node.index):
            if reader.is_layer and reader.inputs == (node.index,):
                if axis != (len(reader.before) - 1 if reader.kind == "linear" else reader.channel_axis):
                    return None
                readers.append(Reader(reader, torch.argsort(channel, stable=True).view(count, -1)))
            elif (moved := _through(reader, axis, channel)) is None:
                return None
            else:
                linear = linear and not (reader.operation.role == "relu" or _is_maximum(reader))
                front.append((reader, *moved))
    return Link(producer, count, tuple(readers), linear) if readers else None


def _through(node: Node, axis: int, channel: Tensor) -> tuple[int, Tensor] | None:
    """Where the channels are behind an operation: the axis, and the channel of each of its entries."""
    before, after = node.before, node.shape
    if node.operation.role == "relu" or (_keeps_order(node) and before == after):
        return axis, channel
    if _is_maximum(node) or _is_average(node):
        pooled = len(before) - axis - 1 if node.kind == "mean" else int(node.kind[-2])
        kept = axis < len(before) - pooled and after[: axis + 1] == before[: axis + 1]
        return (axis, channel) if kept and len(after) in (len(before), axis + 1) else None
    if not _keeps_order(node):
        return None
    # Move the channels' numbers as the values were moved; the first axis, where it stays, is that of the examples.
    first = int(before[:1] == after[:1] and axis > 0)
    shape = [-1 if d == axis else 1 for d in range(first, len(before))]
    ids = channel.view(shape).expand(before[first:]).reshape(after[first:])
    for d in range(ids.ndim):
        along = ids.movedim(d, -1).reshape(-1, ids.shape[d])
        if bool((along == along[:1]).all()) and bool((along[0].bincount() > 0).all()):
            return d + first, along[0]
    return None


class Connection:
    """A layer whose channels reach other layers through homogeneous operations, all parameters free and used once."""

    def __init__(self, chart: Chart, link: Link) -> None:
        self.chart, self.link, self.name = chart, link, link.producer.layer

    def incoming(self, unit: int) -> Tensor:
        """Flat positions of a unit's weights and bias."""
        parameters = self.link.producer.parameters
        names = [parameters[role] for role in ("weight", "bias") if role in parameters]
        return torch.cat([self.chart.positions(name)[unit].reshape(-1) for name in names])

    def outgoing(self, unit: int) -> Tensor:
        """Flat positions of the weights that read a unit."""
        readers = self.link.readers
        return torch.cat([self._start(r.node.parameters["weight"]) + r.entries(unit) for r in readers])

    def _start(self, name: str) -> int:
        start: int = self.chart.space.slice_of(name).start
        return start

    def exponents(self, units: Sequence[int]) -> Tensor:
        """1 for what comes into some units, -1 for what goes out, 0 elsewhere, `(n,)`."""
        found = torch.zeros(self.chart.space.dim, dtype=torch.float64)
        for unit in units:
            found[self.incoming(unit)] += 1.0
            found[self.outgoing(unit)] -= 1.0
        return found

    def live(self, unit: int) -> bool:
        """Whether what a unit sends changes over the data: a constant feature has scale 1 whatever it is."""
        for reader in self.link.readers:
            received = reader.node.received
            if received is None:
                return False
            rows = received.movedim(1 if reader.node.kind == "conv" else -1, 0)[reader.features[unit]]
            if bool((rows.reshape(rows.shape[0], -1).std(dim=1, unbiased=False) == 0).any()):
                return False
        return True


def connections(risk: EmpiricalRisk) -> list[Connection]:
    """The `Connection`s of a network, in the order of its layers."""
    graph = record_graph(risk, next(iter(risk.batches)))
    chart = Chart(risk, graph)
    found = []
    for node in graph:
        link = follow(graph, node) if node.is_layer else None
        if link is not None:
            names = [name for n in (node, *(r.node for r in link.readers)) for name in n.parameters.values()]
            if all(map(chart.movable, names)):
                found.append(Connection(chart, link))
    return found


def generators(problem: Problem, each: int = 2) -> Iterator[Generator]:
    """Scales of homogeneous units and mixings of linear ones: of each layer those with the largest gradients."""
    gradient = problem.risk.gradient
    for one in connections(problem.risk):
        count = one.link.channels
        if not one.link.linear:
            found = [_scale(one, unit, gradient) for unit in range(min(count, _TRIED))]
            yield from sorted(found, key=lambda made: -float(made.transposed(gradient).norm()))[:each]
        elif count > 1 and all(reader.groups == 1 for reader in one.link.readers):
            # A = E_ij: row j of what comes in is added to row i, column i of what goes out taken from column j.
            i, j = 0, count - 1
            into = torch.cat([one.incoming(i), one.outgoing(j)])
            source = torch.cat([one.incoming(j), one.outgoing(i)])
            sign = _signs(one.incoming(i), one.outgoing(j), gradient)
            yield Generator(f"{Cause.LINEAR_LAYER}: {one.name}, units {j} into {i}", into, source, sign)


def _scale(one: Connection, unit: int, like: Tensor) -> Generator:
    into, out = one.incoming(unit), one.outgoing(unit)
    both = torch.cat([into, out])
    return Generator(f"{Cause.HOMOGENEITY}: {one.name}, unit {unit}", both, both, _signs(into, out, like))


def _signs(plus: Tensor, minus: Tensor, like: Tensor) -> Tensor:
    return torch.cat([torch.ones(len(plus)), -torch.ones(len(minus))]).to(like)


def scalings(problem: Problem) -> list[Scaling]:
    """For every homogeneous link: one live unit, and all its units.

    Raises:
        NotApplicable: no unit can be scaled.
    """
    found = []
    covered = {layer.name for layer in problem.layers}
    for one in connections(problem.risk):
        readers = tuple(reader.node.layer for reader in one.link.readers)
        if one.link.linear or not {one.name, *readers} <= covered:
            continue
        live = tuple(filter(one.live, range(one.link.channels)))
        for units in dict.fromkeys((live[:1], live)):
            if units:
                found.append(Scaling(one.name, readers, units, one.exponents(units)))
    if not found:
        raise NotApplicable("no unit or channel reaches the next layer through positively homogeneous operations alone")
    return found


def rescalings(problem: Problem) -> Tensor:
    """The exponents of every homogeneous unit that reaches the next layer, `(n, units)`."""
    found = [one.exponents([unit]) for one in connections(problem.risk) for unit in range(one.link.channels)]
    return torch.stack(found, dim=1) if found else torch.zeros(problem.risk.space.dim, 0, dtype=torch.float64)


def logit_shifts(problem: Problem) -> Tensor:
    """Unit directions that add one number to a weight of every output, where the loss ignores it, `(n, c)`."""
    candidates, _ = candidate_directions(problem.risk)
    found = [problem.risk.theta.new_zeros(problem.risk.space.dim, 0)]
    for part in (part for one in candidates if one.cause == Cause.SOFTMAX_SHIFT for part in one.parts):
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
        if not bool(t.any()):
            continue
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
    found = float((H @ directions).norm(dim=0).max()) / norm_estimate(H)
    yield at_most(_SHIFT, found, 1e-10, given=("a translation",), details={"directions": directions.shape[1]})


@dataclass
class OrbitCurve:
    """`kappa*` at the points `T_t theta`, observed there and predicted from `theta` alone.

    Attributes:
        times: `t`.
        observed, predicted: name of the coordinates (`"plain"`, `"bnp"`, `"bnp, output scaling"`) -> values.
        ranks: the ranks found at each point, in the same order.
        predicted_ranks: those found of the matrices that the law predicts.
        uncertainty: name -> the largest relative half width of an interval.
    """

    times: list[float]
    observed: dict[str, list[float]] = field(default_factory=dict)
    predicted: dict[str, list[float]] = field(default_factory=dict)
    ranks: dict[str, list[int | None]] = field(default_factory=dict)
    predicted_ranks: dict[str, list[int | None]] = field(default_factory=dict)
    uncertainty: dict[str, float] = field(default_factory=dict)

    def note(self, name: str, found: ConditionNumber, law: ConditionNumber) -> None:
        """Add what was found at the next point, and what the law says of it."""
        self.observed.setdefault(name, []).append(found.value)
        self.predicted.setdefault(name, []).append(law.value)
        self.ranks.setdefault(name, []).append(found.rank)
        self.predicted_ranks.setdefault(name, []).append(law.rank)
        # How far the ends of the resolved part are known; the zeros that structure does not explain play no part.
        widths = [2 * math.sqrt(k.noise_floor / k.lambda_min) for k in (found, law)]
        self.uncertainty[name] = max(self.uncertainty.get(name, 0.0), *widths)

    def deviation(self, name: str) -> float:
        """The largest relative distance of the observed values from the law."""
        pairs = zip(self.observed[name], self.predicted[name], strict=True)
        return max(abs(found / law - 1) for found, law in pairs)

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
            curve.note(name, _kappa(moved, own[name]), still[name] if law is None else _kappa(rows * law, None))
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
    ranks, predicted = curve.ranks[name], curve.predicted_ranks[name]
    if len({*ranks, *predicted}) > 1:
        pairs = zip(curve.times, ranks, predicted, strict=True)
        found = ", ".join(
            f"{rank} at t = {t:g}" if rank == law else f"{rank} and, predicted, {law} at t = {t:g}"
            for t, rank, law in pairs
        )
        why = f"the smallest eigenvalue sinks below the rounding level along the orbit: rank {found}"
        return refused(words, why)
    unsure = curve.uncertainty[name]
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
