"""Symmetries as one-parameter groups: linear generators `t = B theta`, and the scales `T_t` along ReLU orbits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.network import Layer
from bnp_analysis.symmetry.candidates import Cause, Chart, Part
from bnp_analysis.symmetry.graph import Node
from bnp_analysis.symmetry.null_space import candidate_directions
from bnp_analysis.symmetry.recording import record_graph
from bnp_analysis.theory.statements.channels import Link, follow
from bnp_analysis.theory.statements.setting import NotApplicable, Problem

# Channels of a layer among which generators are chosen.
_TRIED = 64


@dataclass(frozen=True, eq=False)
class Generator:
    """A sparse matrix `B` with `B[into, source] = sign`; the tangent of its orbit at `theta` is `B theta`.

    Attributes:
        cause: of the symmetry.
        where: the unit in words.
        into, source, sign: `(k,)` flat positions and values.
    """

    cause: str
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


def _links(problem: Problem) -> tuple[Chart, list[Link]]:
    """Links between layers through homogeneous operations, whose parameters are free and used once."""
    risk = problem.risk
    graph = record_graph(risk, next(iter(risk.batches)))
    chart = Chart(risk, graph)
    found = []
    for node in graph:
        link = follow(graph, node) if node.is_layer else None
        if link is not None and all(_movable(chart, n) for n in (node, *(r.node for r in link.readers))):
            found.append(link)
    return chart, found


def _movable(chart: Chart, node: Node) -> bool:
    return all(chart.movable(name) for name in node.parameters.values())


def _incoming(chart: Chart, link: Link, unit: int) -> Tensor:
    """Flat positions of a unit's weights and bias."""
    names = [link.producer.parameters[role] for role in ("weight", "bias") if role in link.producer.parameters]
    return torch.cat([chart.positions(name)[unit].reshape(-1) for name in names])


def _outgoing(chart: Chart, link: Link, unit: int) -> Tensor:
    """Flat positions of the weights that read a unit."""
    return torch.cat([chart.space.slice_of(r.node.parameters["weight"]).start + r.entries(unit) for r in link.readers])


def generators(problem: Problem, per_layer: int = 2) -> Iterator[Generator]:
    """Scales of homogeneous units and mixings of linear ones: of each layer those with the largest gradients."""
    chart, links = _links(problem)
    gradient = problem.risk.gradient
    for link in links:
        if not link.linear:
            found = [_scale(chart, link, i, gradient) for i in range(min(link.channels, _TRIED))]
            found.sort(key=lambda one: -float(one.transposed(gradient).norm()))
            yield from found[:per_layer]
        elif link.channels > 1 and all(reader.groups == 1 for reader in link.readers):
            # A = E_ij: row j of what comes in is added to row i, column i of what goes out taken from column j.
            i, j = 0, link.channels - 1
            into = torch.cat([_incoming(chart, link, i), _outgoing(chart, link, j)])
            source = torch.cat([_incoming(chart, link, j), _outgoing(chart, link, i)])
            count = len(_incoming(chart, link, i))
            sign = torch.ones(len(into)).to(problem.risk.theta)
            sign[count:] = -1
            yield Generator(Cause.LINEAR_LAYER, f"{link.producer.layer}, units {j} into {i}", into, source, sign)


def _scale(chart: Chart, link: Link, unit: int, like: Tensor) -> Generator:
    into, out = _incoming(chart, link, unit), _outgoing(chart, link, unit)
    both = torch.cat([into, out])
    sign = torch.cat([torch.ones(len(into)), -torch.ones(len(out))]).to(like)
    return Generator(Cause.HOMOGENEITY, f"{link.producer.layer}, unit {unit}", both, both, sign)


def scalings(problem: Problem) -> list[Scaling]:
    """For every homogeneous link: one live unit, and all its units.

    Raises:
        NotApplicable: no unit can be scaled.
    """
    chart, links = _links(problem)
    found = []
    covered = {layer.name for layer in problem.layers}
    for link in links:
        readers = tuple(reader.node.layer for reader in link.readers)
        if link.linear or not {link.producer.layer, *readers} <= covered:
            continue
        live = [i for i in range(link.channels) if _live(link, i)]
        if not live:
            continue
        for units in ((live[0],), tuple(live)) if len(live) > 1 else ((live[0],),):
            exponents = sum(_exponents(chart, link, i) for i in units)
            assert isinstance(exponents, Tensor)
            found.append(Scaling(link.producer.layer, readers, units, exponents))
    if not found:
        raise NotApplicable("no unit or channel reaches the next layer through positively homogeneous operations alone")
    return found


def _exponents(chart: Chart, link: Link, unit: int) -> Tensor:
    """1 for what comes into a unit, -1 for what goes out, 0 elsewhere, `(n,)`."""
    found = torch.zeros(chart.space.dim, dtype=torch.float64)
    found[_incoming(chart, link, unit)] = 1.0
    found[_outgoing(chart, link, unit)] = -1.0
    return found


def rescalings(problem: Problem) -> Tensor:
    """The exponents of every homogeneous unit that reaches the next layer, `(n, units)`."""
    chart, links = _links(problem)
    found = [_exponents(chart, link, i) for link in links for i in range(link.channels)]
    return torch.stack(found, dim=1) if found else torch.zeros(problem.risk.space.dim, 0, dtype=torch.float64)


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


def logit_shifts(problem: Problem) -> Tensor:
    """Unit directions that add one number to a weight of every output, where the loss ignores it, `(n, c)`."""
    candidates, _ = candidate_directions(problem.risk)
    found = []
    for part in (part for one in candidates if one.cause == Cause.SOFTMAX_SHIFT for part in one.parts):
        if any(_is_translation(problem, layer, part) for layer in problem.layers):
            column = torch.zeros(problem.risk.space.dim, dtype=problem.risk.theta.dtype)
            column[part.positions] = part.values[:, 0].to(column)
            found.append(column / column.norm())
    return torch.stack(found, dim=1) if found else torch.zeros(problem.risk.space.dim, 0, dtype=torch.float64)


def _live(link: Link, unit: int) -> bool:
    """Whether what a unit sends changes over the data: a constant feature has scale 1 whatever it is."""
    for reader in link.readers:
        received = reader.node.received
        if received is None:
            return False
        rows = received.movedim(1 if reader.node.kind == "conv" else -1, 0)[reader.features[unit]]
        if bool((rows.reshape(rows.shape[0], -1).std(dim=1, unbiased=False) == 0).any()):
            return False
    return True
