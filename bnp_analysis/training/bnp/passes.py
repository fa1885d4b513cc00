"""Forward passes between two steps: rows of one that fails, weights that train without BNP, layers that changed."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Container, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from bnp_analysis.errors import TrainingWarning
from bnp_analysis.network.layer_kinds import Layer
from bnp_analysis.network.layers import layers_of
from bnp_analysis.network.names import clean_name

# Weights that change so often in a row without a step are trained without it; fewer may be a checkpoint, or averaging.
_UNNOTICED = 3


class Passes:
    """Counts the passes that train, and notices when an optimizer changes the weights without `step()`.

    Args:
        layers: the covered layers.

    Attributes:
        count: passes since the object was made.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self.count = self._changes = 0
        self._last: tuple[weakref.ref[Tensor], int, int] | None = None

    def begin(self, step: int, attached: bool) -> None:
        """A pass begins; `step` counts the steps of BNP until now.

        Who calls `step()` in a loop of their own may stop doing so; an optimizer that it is attached to may not.

        Warns:
            TrainingWarning: between the last passes the weights changed three times and `step` did not.
        """
        weight = next((layer.own_weight for layer in self._layers if layer.trains), None)
        if weight is None:
            return
        self.count += 1
        if self._last is not None:
            expected = attached or not step
            self._changes = 0 if step != self._last[2] else self._changes + (expected and self._changed())
        self._last = weakref.ref(weight), weight._version, step
        if self._changes == _UNNOTICED:
            self._changes += 1
            warnings.warn(f"the weights have changed {_UNNOTICED} times, {_unused(attached)}", TrainingWarning, 2)

    def close(self, step: int, attached: bool) -> None:
        """The end.

        Warns:
            TrainingWarning: the weights changed and there was never a step.
        """
        if attached and not step and (self._changes or self._changed()):
            warnings.warn(f"{self.count} forward passes in training mode, {_unused(attached)}", TrainingWarning, 3)

    def _changed(self) -> bool:
        """Whether the weight was written to since the last pass began."""
        known, version, _ = self._last or (lambda: None, 0, 0)
        weight = known()
        return weight is not None and weight._version != version


def _unused(attached: bool) -> str:
    how = (
        "the optimizer that BNP is attached to does not step: attach to the one that trains, after the last is made"
        if attached
        else "step() was not called: call it between backward() and optimizer.step(), or attach() the optimizer"
    )
    return f"but gradients were never preconditioned, since {how}"


def failed(output: Any) -> bool:
    """Whether a forward hook that is always called is called for a pass that raised."""
    return output is None and sys.exc_info()[0] is not None


def changes(
    model: nn.Module, layers: Sequence[Layer], before: Container[nn.Module], also: Iterable[type[nn.Module]]
) -> dict[str, str]:
    """Names of layers, or of parameters of new ones -> what happened to them since BNP was made.

    Args:
        model: unwrapped.
        layers: the layers that BNP acts on.
        before: all modules that the model had.
        also: types of layers that were asked for.
    """
    modules = {clean_name(name): module for name, module in model.named_modules()}
    there = {id(module) for module in modules.values()}
    found = {}
    for layer in layers:
        if id(layer.module) not in there:
            found[layer.name] = "it was replaced or removed after BNP was made"
        elif layer.kind.parameter(layer.module) is None:
            found[layer.name] = "its weight is computed from others (pruned or parametrized) since BNP was made"
    for layer in layers_of(modules.items(), also=also)[0]:
        if layer.module not in before:
            for name in (layer.weight, layer.bias):
                if name is not None:
                    found[name] = f"{layer.name} was added after BNP was made: make it anew, with load_state_dict"
    return found
