"""The operations of a network read as demands on the labels of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.network.candidates import Chart
from bnp_analysis.network.graph import Graph, Name, Node, Slot
from bnp_analysis.network.symmetry.signals import FIXED, Known, Ledger, Signal, Stored, Value
from bnp_analysis.runtime.trees import tensors_of

Rule = Callable[["Trace", Node, dict[str, Any]], "list[Value] | None"]
RULES: dict[str, Rule] = {}


def rule(*kinds: str) -> Callable[[Rule], Rule]:
    """Register the meaning of some operations."""

    def keep(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(kinds, function))
        return function

    return keep


class Trace:
    """Walks through a graph whose nodes keep their calls, and writes into a ledger.

    Args:
        chart: the parameters.
        graph: the operations on few examples, with calls.
        full: the operations on every batch, for what only values tell: always-active units, variances.
    """

    def __init__(self, chart: Chart, graph: Graph, full: list[Graph]) -> None:
        self.chart, self.graph, self.full = chart, graph, full
        self.ledger = Ledger(chart)
        self.theta = chart.values().numpy()
        # Parameters and the kinds of operations that use them in ways that are not followed.
        self.unknown: list[tuple[str, str]] = []
        self._values: dict[Slot, Value] = {}
        for node in graph:
            for position, value in enumerate(self._outputs(node)):
                self._values[Slot(node.index, position)] = value
        if graph.output is not None:
            self.ledger.pin(self._values[graph.output])

    def value(self, given: Any) -> Any:
        """What stands for an argument: a value for a tensor of floating-point numbers, else the argument."""
        if isinstance(given, Slot):
            return self._values[given]
        if isinstance(given, Name):
            return Stored(self.chart.positions(given.name))
        if isinstance(given, Tensor) and given.is_floating_point():
            return Known(given)
        if isinstance(given, list | tuple):
            return type(given)(self.value(part) for part in given)
        return given

    def _outputs(self, node: Node) -> list[Value]:
        assert node.call is not None
        given = {role: self.value(part) for role, part in node.call.named(node.kind).items()}
        values = list(values_in(given))
        # What fails here is an operation like those without a rule; equations that it left behind only forbid more.
        with suppress(Exception):
            if all(isinstance(value, Known) for value in values):
                out = node.call.function(*raw(self.value(node.call.positional)), **raw(self.value(node.call.keywords)))
                return [Known(t.detach()) for t in tensors_of(out)]
            found = RULES[node.kind](self, node, given) if node.kind in RULES else None
            if found is not None:
                return found
        moving = [v for v in values if isinstance(v, Stored) or (isinstance(v, Signal) and bool((v.labels > 1).any()))]
        for value in moving:
            self.ledger.pin(value)
        self.unknown += [(name, node.kind) for name in node.parameters.values()]
        if any(isinstance(value, Signal) for value in moving):
            self.ledger.skipped.append(f"passes through {node.kind}")
        return [fixed(node.shape)] * node.call.outputs


def values_in(given: Any) -> Iterator[Value]:
    """Every value inside lists, tuples and dicts."""
    if isinstance(given, Signal | Stored | Known):
        yield given
    elif isinstance(given, dict):
        yield from values_in(list(given.values()))
    elif isinstance(given, list | tuple):
        for part in given:
            yield from values_in(part)


def raw(given: Any) -> Any:
    """Known values as tensors again, copied: some operations write into what they read."""
    if isinstance(given, Known):
        return given.value.clone()
    if isinstance(given, dict):
        return {key: raw(part) for key, part in given.items()}
    return type(given)(raw(part) for part in given) if isinstance(given, list | tuple) else given


def fixed(shape: torch.Size, weights: int | None = None) -> Signal:
    """An activation that no symmetry moves."""
    return Signal(torch.full(shape, FIXED, dtype=torch.int64), weights)


def spread_over(labels: Any, shape: torch.Size, axis: int) -> Signal:
    """An activation whose labels run along one axis."""
    along = [1] * len(shape)
    along[axis] = -1
    return Signal(torch.as_tensor(np.asarray(labels)).view(along).expand(shape).contiguous())
