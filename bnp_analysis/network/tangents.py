"""Tangent vectors of symmetries across layers: scales, mixings and shifts that a chain passes on (T11)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bnp_analysis.network.candidates import Candidate, Chart, Part, Piece
from bnp_analysis.network.dependencies import null_vectors
from bnp_analysis.network.graph import Graph, Node
from bnp_analysis.network.links import Link, channel_axis
from bnp_analysis.network.risk import EmpiricalRisk

# Mixing k units gives k^2 directions, whose basis takes n k^2 numbers and n k^4 operations.
_MOST_WORK = 1e12


class TangentBuilder:
    """Writes the directions of links; one that would need a constant or shared tensor to move is not built."""

    def __init__(
        self, risk: EmpiricalRisk, graphs: list[Graph], chart: Chart, links: dict[int, Link], skipped: list[str]
    ) -> None:
        self._risk, self._graphs, self._chart, self._links, self._skipped = risk, graphs, chart, links, skipped
        self._slopes = {index: slopes(graphs, link) for index, link in links.items()}

    def rescalings(self, link: Link) -> list[Candidate]:
        """`(b_i, w_i,in ; -w_out,i)` for every unit or channel that reaches its readers homogeneously."""
        if not link.inner or (link.linear and self._can_mix(link)):
            return []
        cause = "norm affine" if link.producer.is_norm else "homogeneity"
        return [self._chart.candidate(cause, (self._mixing(link, i, i) for i in range(link.channels)))]

    def mixings(self, link: Link) -> list[Candidate]:
        """`(A W_in, A b ; -W_out A)` among units that act linearly, and `b += c, b_next -= W_out c`.

        With slopes `a_i` of the units, `W_out` is that of the inputs of the activation, `W_out diag(a)`.
        """
        if not link.inner:
            return []
        known = self._slopes[link.producer.index]
        cause = "norm affine" if link.producer.is_norm else ("linear layer" if link.linear else "always-active units")
        parts: list[Part | None] = []
        if not link.maxima:
            if not self._can_mix(link):
                self._skipped.append(f"{link.producer.layer}: {len(known)}^2 mixings of its linear units are too many")
            elif not link.producer.is_norm and all(reader.groups == 1 for reader in link.readers):
                parts += [self._mixing(link, i, k, known[i] / known[k]) for i in known for k in known]
            else:
                parts += [self._mixing(link, i, i) for i in known]
        parts += self._shifts(link, known)
        return [self._chart.candidate(cause, parts)]

    def _can_mix(self, link: Link) -> bool:
        known = len(self._slopes[link.producer.index])
        return link.producer.is_norm or self._chart.space.dim * float(known) ** 4 <= _MOST_WORK

    def _mixing(self, link: Link, into: int, source: int, factor: float = 1.0) -> Part | None:
        """Unit `source` added to unit `into`, and taken out of what reads `source`."""
        taken = self._chart.columns(link.readers, into, -factor, source)
        return self._chart.part([*self._chart.row(link.producer, into, source), *taken])

    def _shifts(self, link: Link, known: dict[int, float]) -> Iterator[Part | None]:
        bias = link.producer.parameters.get("bias")
        nodes = [reader.node for reader in link.readers]
        padded = any(_padded(node) for node in (*nodes, *link.averages))
        if bias is None or padded or any("bias" not in node.parameters for node in nodes):
            return
        for i, slope in known.items():
            pieces = [self._chart.single(bias, i)]
            for reader in link.readers:
                weight = self._chart.tensor(reader.node.parameters["weight"])
                taps = torch.zeros_like(weight).reshape(-1)
                taps[reader.entries(i)] = weight.reshape(-1)[reader.entries(i)]
                total = taps.view(len(weight), -1).sum(dim=1, keepdim=True)
                pieces.append(Piece(reader.node.parameters["bias"], torch.arange(len(weight)), -slope * total))
            yield self._chart.part(pieces)

    def deaf(self) -> list[Candidate]:
        """`d (x) c` in a layer behind which all is linear, where a change along `d` does not reach the loss.

        In the last layer `d = e` if the loss ignores a common shift of an example's outputs (`W_out += e c^T,
        b_out += c_0 e`); in one before it what the next layer's weights send there, or to zero.
        """
        found: list[Candidate] = []
        known: dict[int, Tensor] = {}
        for index, link in reversed(self._links.items()):
            d = self._deaf_to(link, known)
            if d.shape[1] == 0:
                continue
            known[index] = d
            last = not link.readers and link.linear
            cause = "softmax shift" if last else ("linear layer" if link.linear else "always-active units")
            found.append(self._chart.candidate(cause, self._outer(link.producer, d)))
        return found[::-1]

    def _deaf_to(self, link: Link, known: dict[int, Tensor]) -> Tensor:
        """Changes `d (units, q)` of a layer's output that do not reach the loss, whatever they are multiplied by."""
        none = torch.zeros(link.channels, 0, dtype=torch.float64)
        a = self._slopes[link.producer.index]
        if not a or link.maxima or any(reader.groups != 1 for reader in link.readers):
            return none
        units, conditions = torch.tensor(list(a)), []
        for reader in link.readers:
            weight = self._chart.tensor(reader.node.parameters["weight"])
            weight = weight.flatten(start_dim=2) if weight.ndim > 2 else weight.unsqueeze(2)
            sent = weight[:, reader.features[units]].flatten(start_dim=2).movedim(2, 0)
            known_here = known.get(reader.node.index, sent.new_zeros(len(weight), 0))
            conditions.append((sent - known_here @ (known_here.T @ sent)).reshape(-1, len(units)))
        if link.output is not None or link.softmax:
            eye = torch.eye(link.channels, dtype=torch.float64)
            shift = link.output is None or shift_invariant(self._risk, link.output)
            conditions.append((eye - 1 / link.channels if shift else eye)[:, units])
        if not conditions:
            return none
        slope = torch.tensor(list(a.values()), dtype=torch.float64)
        found = null_vectors(torch.cat(conditions) * slope, slack=100)
        d = torch.zeros(link.channels, found.shape[1], dtype=torch.float64)
        d[units] = found
        return d

    def _outer(self, node: Node, d: Tensor) -> Iterator[Part | None]:
        everyone = torch.arange(len(d))
        if node.is_layer and node.arguments.get("groups", 1) == 1:
            width = torch.Size(node.arguments["weight_shape"][1:]).numel()
            for j in range(width):
                yield self._chart.part([Piece(node.parameters["weight"], everyone * width + j, d)])
        if "bias" in node.parameters:
            yield self._chart.part([Piece(node.parameters["bias"], everyone, d)])


def slopes(graphs: list[Graph], link: Link) -> dict[int, float]:
    """Channels that act linearly on all the data, with the slope; behind a max-pooling, those that shift linearly.

    Every channel without an activation, else those that one ReLU or LeakyReLU passes with a single sign.
    """
    everyone = range(link.channels)
    if not link.activations:
        return dict.fromkeys(everyone, 1.0)
    if len(link.activations) != 1 or link.activations[0].kind == "prelu" or (link.maxima and link.averages):
        return {}
    below = _below(link.activations[0])
    positive, negative = torch.ones(2, link.channels, dtype=torch.bool)
    for graph in graphs:
        for values in _values(graph, link):
            positive &= (values > 0).all(dim=1)
            negative &= (values < 0).all(dim=1)
    return {i: 1.0 if positive[i] else below for i in everyone if positive[i] or (negative[i] and below != 0.0)}


def _values(graph: Graph, link: Link) -> Iterator[Tensor]:
    """`(channels, everything else)`: what a layer returns; behind a max-pooling, what is left of it."""
    if not link.maxima:
        node = graph.nodes[link.producer.index]
        axis = channel_axis(node)
        assert node.output is not None
        assert axis is not None
        yield node.output.cpu().movedim(axis, 0).reshape(link.channels, -1)
        return
    for reader in link.readers:
        received = graph.nodes[reader.node.index].received
        assert received is not None
        rows = received.cpu().movedim(1 if reader.node.kind == "conv" else -1, 0)
        yield rows[reader.features].reshape(link.channels, -1)


def _below(activation: Node) -> float:
    """The slope below zero."""
    return 0.0 if activation.kind == "relu" else float(activation.arguments.get("negative_slope", 0.01))


def shift_invariant(risk: EmpiricalRisk, axis: int) -> bool:
    """Whether adding another constant along an axis of the outputs, elsewhere any, leaves the loss as it is."""
    batch = next(iter(risk.batches))
    with torch.no_grad():
        outputs = risk.batch_outputs(risk.named_tensors(), batch)
        shape = [1 if d == axis else size for d, size in enumerate(outputs.shape)]
        shift = torch.linspace(-1.0, 2.0, torch.Size(shape).numel(), dtype=torch.float64).view(shape).to(outputs)
        plain, moved = risk.batch_loss(outputs, batch), risk.batch_loss(outputs + shift, batch)
        size = 1 + plain.abs() + outputs.abs().max()
    return bool((plain - moved).abs() <= 100 * torch.finfo(outputs.dtype).eps * size)


def _padded(node: Node) -> bool:
    padding = node.arguments.get("padding", 0)
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, tuple | list) else bool(padding)
