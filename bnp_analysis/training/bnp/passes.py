"""Forward passes between two steps: failed passes, weights that train without BNP, changed layers."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections import Counter
from collections.abc import Container, Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from bnp_analysis.errors import TrainingWarning
from bnp_analysis.network.layer_kinds import Layer
from bnp_analysis.network.layers import layers_of
from bnp_analysis.network.parameters import clean_name
from bnp_analysis.training.bnp.moments import BatchMoments

#: What was seen since the last step: moments of each layer, and how many of its inputs are kept.
Rows = tuple[dict[int, BatchMoments], dict[int, int]]
# Weights that change so often in a row without a step are trained without it; fewer may be a checkpoint, or averaging.
_UNNOTICED = 3


class Open(NamedTuple):
    """A forward pass that has begun.

    Attributes:
        module: the model, or what wraps it.
        before: the rows that were seen before it.
        handled: `handled()` at its beginning.
    """

    module: nn.Module
    before: Rows
    handled: int


class Passes:
    """Knows which passes run, counts those that train, and notices when an optimizer trains without `step()`.

    Args:
        layers: the covered layers.

    Attributes:
        open: passes that have begun, the outermost first.
        count: passes that train, since the object was made.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self.open: list[Open] = []
        self.count = self._changes = 0
        self._last: tuple[weakref.ref[Tensor], int, int] | None = None

    def cut(self, beginning: nn.Module | None = None) -> Open | None:
        """Close the passes that run no more, of which no hook was told, as by Ctrl-C.

        Args:
            beginning: a module whose next pass begins.

        Returns:
            The first of them, if there is one.
        """
        running = _running()
        running[beginning] -= 1
        for place, one in enumerate(self.open):
            running[one.module] -= 1
            if running[one.module] < 0:
                del self.open[place:]
                return one
        return None

    def end(self, module: nn.Module) -> Open | None:
        """Close the innermost pass of a module; it is returned if it has failed."""
        if not self.open or self.open[-1].module is not module:
            return None
        one = self.open.pop()
        return None if one.handled == handled() else one

    def restart(self, rows: Rows) -> None:
        """The rows seen until now are used, or left out; `rows` stands for none."""
        if self.open:
            self.open = [one._replace(before=rows) for one in self.open]

    def begin(self, step: int, attached: bool) -> None:
        """A pass begins; `step` counts the steps of BNP until now.

        Who calls `step()` in a loop of their own may stop doing so; an optimizer that it is attached to may not.

        Warns:
            TrainingWarning: between the last passes the weights changed three times and `step` did not.
        """
        for layer in self._layers:
            weight = layer.kind.parameter(layer.module)
            if weight is not None and weight.requires_grad:
                break
        else:
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


def handled() -> int:
    """What tells the exception that is being handled from others; a hook after a pass that raised sees a new one."""
    return id(sys.exc_info()[1])


def _running() -> Counter[nn.Module | None]:
    """How often each module is being called, in any thread."""
    found = Counter[nn.Module | None]()
    for top in sys._current_frames().values():
        frame: Any = top
        while frame is not None:
            if frame.f_code is nn.Module._call_impl.__code__:
                found[frame.f_locals["self"]] += 1
            frame = frame.f_back
    return found


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
    new = [module for module in modules.values() if module not in before]
    uses = Counter(id(p) for module in set(modules.values()) for p in module._parameters.values())
    found = {}
    for layer in layers:
        if id(layer.module) not in there:
            found[layer.name] = "it was replaced or removed after BNP was made"
        elif layer.kind.parameter(layer.module) is None:
            found[layer.name] = "its weight is computed from others (pruned or parametrized) since BNP was made"
        elif uses[id(layer.own_weight)] > 1:
            found[layer.name] = "its weight is shared with another module since BNP was made: make it anew"
    for layer in layers_of(modules.items(), also=also)[0] if new else []:
        if layer.module in new:
            for name in (layer.weight, layer.bias):
                if name is not None:
                    found[name] = f"{layer.name} was added after BNP was made: make it anew, with load_state_dict"
    return found
