"""Tangent vectors of symmetries, written into the flat parameter space (T11)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.network.dependencies import Candidate
from bnp_analysis.network.graph import NORMS, Graph, Node
from bnp_analysis.network.risk import EmpiricalRisk

# Mixing n units linearly gives n^2 directions of full length.
_MOST_NUMBERS = 200_000_000


@dataclass(frozen=True, eq=False)
class Link:
    """A hidden layer, and the layers that read its channels: consumer, and columns of its weight per channel."""

    producer: Node
    consumers: tuple[tuple[Node, int], ...]
    linear: bool
    through: tuple[Node, ...]


def channels_of(node: Node) -> int:
    return node.output.shape[-1] if node.kind in ("linear", "layer_norm", "rms_norm") else node.output.shape[1]


class TangentBuilder:
    """Writes directions into the flat space; a direction that would need a constant tensor is not built."""

    def __init__(self, risk: EmpiricalRisk, graph: Graph) -> None:
        self.space, self.graph = risk.space, graph
        self.tensors = risk.named_tensors()

    def free(self, *nodes: Node) -> bool:
        """Whether all tensors of the nodes are free and used nowhere else."""
        names = [name for node in nodes for name in node.parameters.values()]
        return all(name in self.space and self.graph.uses(name) == 1 for name in names)

    def vector(self, parts: Iterable[tuple[str, Tensor]]) -> Tensor:
        flat = torch.zeros(self.space.dim, dtype=self.space.dtype, device=self.space.device)
        for name, value in parts:
            flat[self.space.slice_of(name)] += value.reshape(-1)
        return flat

    def stack(self, vectors: Iterable[Tensor]) -> Tensor:
        columns = list(vectors)
        return torch.stack(columns, dim=1) if columns else torch.zeros(self.space.dim, 0, dtype=self.space.dtype)

    def _row(self, node: Node, into: int, source: int) -> Iterator[tuple[str, Tensor]]:
        """The weights and bias of channel `source`, placed in channel `into`."""
        for name in node.parameters.values():
            out = torch.zeros_like(self.tensors[name])
            out[into] = self.tensors[name][source]
            yield name, out

    def _columns(
        self, consumers: Iterable[tuple[Node, int]], into: int, source: int, factor: float = 1.0
    ) -> Iterator[tuple[str, Tensor]]:
        """Minus the consumers' weights on channel `source`, times a factor, placed on channel `into`."""
        for node, width in consumers:
            name = node.parameters["weight"]
            weight = self.tensors[name]
            out = torch.zeros_like(weight)
            out[:, into * width : (into + 1) * width] = -factor * weight[:, source * width : (source + 1) * width]
            yield name, out

    def rescalings(self, link: Link) -> list[Candidate]:
        """`(b_i, w_i,in ; -w_out,i)` for every unit or channel that reaches its consumers homogeneously."""
        if not self.free(link.producer, *(node for node, _ in link.consumers)) or link.linear:
            return []
        cause = "norm affine" if link.producer.kind in NORMS else "homogeneity"
        vectors = (
            self.vector([*self._row(link.producer, i, i), *self._columns(link.consumers, i, i)])
            for i in range(channels_of(link.producer))
        )
        return [Candidate(cause, self.stack(vectors))]

    def mixings(self, link: Link, slopes: dict[int, float], skipped: list[str]) -> list[Candidate]:
        """`(A W_in, A b ; -W_out A)` among units that act linearly, and `b += c, b_next -= W_out c`.

        With slopes `a_i` of the units, `W_out` is that of the inputs of the activation, `W_out diag(a)`.
        """
        units = list(slopes)
        if not units or not self.free(link.producer, *(node for node, _ in link.consumers)):
            return []
        norm = link.producer.kind in NORMS
        pairs = [(i, i) for i in units] if norm else [(i, k) for i in units for k in units]
        if len(pairs) * self.space.dim > _MOST_NUMBERS:
            skipped.append(f"{link.producer.layer}: {len(pairs)} mixings of its linear units are too many to hold")
            return []
        cause = "norm affine" if norm else ("linear layer" if link.linear else "always-active units")
        found = [
            self.vector([*self._row(link.producer, i, k), *self._columns(link.consumers, k, i, slopes[i] / slopes[k])])
            for i, k in pairs
        ]
        return [Candidate(cause, self.stack([*found, *self._shifts(link, slopes)]))]

    def _shifts(self, link: Link, slopes: dict[int, float]) -> Iterator[Tensor]:
        bias = link.producer.parameters.get("bias")
        padded = any(node.kind == "conv" and _padded(node) for node, _ in link.consumers)
        if bias is None or padded or any("bias" not in node.parameters for node, _ in link.consumers):
            return
        for i, slope in slopes.items():
            out = torch.zeros_like(self.tensors[bias])
            out[i] = 1.0
            parts = [(bias, out)]
            for node, width in link.consumers:
                weight = self.tensors[node.parameters["weight"]]
                taps = weight[:, i * width : (i + 1) * width].reshape(weight.shape[0], -1)
                parts.append((node.parameters["bias"], -slope * taps.sum(dim=1)))
            yield self.vector(parts)

    def normalized(self, node: Node) -> list[Candidate]:
        """What a normalization right behind a layer removes: shifts exactly, scales up to its eps."""
        readers = self.graph.consumers(node.index)
        if len(readers) != 1 or readers[0].kind not in NORMS or not self.free(node):
            return []
        norm, weight, bias = readers[0], node.parameters["weight"], node.parameters.get("bias")
        units = self.tensors[weight].shape[0]
        if norm.kind == "batch_norm":
            if not norm.arguments.get("training", True):
                return [self._absorbed(node, norm)]
            groups = [[i] for i in range(units)]
            # The batch statistics see the output: its own weights scale, its bias shifts.
            scaled = [weight]
        else:
            count = int(norm.arguments.get("groups", 1) or 1)
            size = units // count
            groups = [list(range(g * size, (g + 1) * size)) for g in range(count)]
            scaled = [weight] + ([bias] if bias else [])
            if norm.kind in ("layer_norm", "rms_norm") and tuple(norm.arguments.get("shape", (units,))) != (units,):
                return []
        shifts = [] if norm.kind == "rms_norm" else [self._shift(bias, group) for group in groups if bias]
        if norm.kind == "layer_norm" or (norm.kind == "group_norm" and node.kind == "linear"):
            shifts += [self._common(weight, group, j) for group in groups for j in range(self.tensors[weight].shape[1])]
        scales = []
        for group in groups:
            parts = []
            for name in scaled:
                out = torch.zeros_like(self.tensors[name])
                out[group] = self.tensors[name][group]
                parts.append((name, out))
            scales.append(self.vector(parts))
        eps = norm.arguments.get("eps")
        return [
            Candidate(f"{norm.kind} shift", self.stack(shifts)),
            Candidate(f"{norm.kind} scale", self.stack(scales), exact=eps == 0),
        ]

    def _absorbed(self, node: Node, norm: Node) -> Candidate:
        """A layer and the affine map of a BatchNorm with fixed statistics behind it: a scale, a shift per channel."""
        if not self.free(norm) or not {"weight", "bias"} <= norm.parameters.keys():
            return Candidate("norm affine", self.stack([]))
        bias, names = node.parameters.get("bias"), (norm.parameters["weight"], norm.parameters["bias"])
        gamma, beta = (self.tensors[name] for name in names)
        # The map itself, from what went in and came out: y = slope a + offset, channel by channel.
        axis = node.output.ndim - 1 if node.kind == "linear" else 1
        a = node.output.movedim(axis, 0).reshape(len(gamma), -1).double()
        y = norm.output.movedim(axis, 0).reshape(len(gamma), -1).double()
        center = a.mean(dim=1)
        slope = ((a - center[:, None]) * y).sum(dim=1) / (a - center[:, None]).square().sum(dim=1)
        mean = center - (y.mean(dim=1) - beta.double()) / slope
        vectors = []
        for i in range(len(gamma)):
            if not bool(torch.isfinite(mean[i]) & torch.isfinite(slope[i])):
                continue
            unit = torch.zeros_like(gamma)
            unit[i] = slope[i].to(unit)
            moved = (names[1], -mean[i].to(unit) * unit)
            only = torch.zeros_like(gamma)
            only[i] = gamma[i]
            vectors.append(self.vector([*self._row(node, i, i), (names[0], -only), moved]))
            if bias is not None:
                shift = torch.zeros_like(gamma)
                shift[i] = 1.0
                vectors.append(self.vector([(bias, shift), (names[1], -unit)]))
        return Candidate("norm affine", self.stack(vectors))

    def _shift(self, bias: str, group: list[int]) -> Tensor:
        out = torch.zeros_like(self.tensors[bias])
        out[group] = 1.0
        return self.vector([(bias, out)])

    def _common(self, weight: str, group: list[int], j: int) -> Tensor:
        out = torch.zeros_like(self.tensors[weight])
        out[group, j] = 1.0
        return self.vector([(weight, out)])

    def output_shift(self, risk: EmpiricalRisk, graph: Graph) -> list[Candidate]:
        """`W_out += e c^T, b_out += c_0 e`, where the loss ignores a common shift of an example's outputs."""
        last = graph.nodes[graph.result] if graph.result >= 0 else None
        if last is None or last.kind != "linear" or last.output.ndim != 2 or not self.free(last):
            return []
        if not shift_invariant(risk, last.output):
            return []
        weight, bias = last.parameters["weight"], last.parameters.get("bias")
        everyone = list(range(last.output.shape[1]))
        vectors = [self._common(weight, everyone, j) for j in range(self.tensors[weight].shape[1])]
        return [Candidate("softmax shift", self.stack(vectors + ([self._shift(bias, everyone)] if bias else [])))]


def shift_invariant(risk: EmpiricalRisk, outputs: Tensor) -> bool:
    """Whether adding another constant to each example's outputs leaves the loss of the first batch as it is."""
    batch = next(iter(risk.batches))
    shift = torch.linspace(-1.0, 2.0, outputs.shape[0], dtype=outputs.dtype, device=outputs.device).view(-1, 1)
    with torch.no_grad():
        plain, moved = risk.batch_loss(outputs, batch), risk.batch_loss(outputs + shift, batch)
    return bool((plain - moved).abs() <= 100 * torch.finfo(outputs.dtype).eps * (1 + plain.abs()))


def _padded(node: Node) -> bool:
    padding = node.arguments.get("padding", 0)
    return (isinstance(padding, str) and padding != "valid") or (not isinstance(padding, str) and any(_tuple(padding)))


def _tuple(value: object) -> tuple[object, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value,)
