"""The hooks of BNP: on layers, to see their inputs and the gradients at their outputs, and on an optimizer's step."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils.checkpoint import CheckpointFunction
from torch.utils.hooks import RemovableHandle

from bnp_analysis.errors import InvalidInputError, TrainingWarning
from bnp_analysis.network.layer_kinds import Layer, by_module
from bnp_analysis.network.observation import in_order
from bnp_analysis.network.recorded_product import Recorded, Recording
from bnp_analysis.network.snapshot import unwrap, wrappers
from bnp_analysis.training.bnp.passes import handled

# Looked up once: these are asked in every forward pass of every layer.
_compiling, _peek, _backward = (
    torch.compiler.is_dynamo_compiling,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._current_graph_task_id,
)


class _NoScriptError(InvalidInputError, AttributeError):
    """Asked for by name, as TorchScript asks for what it compiles; for others no attribute."""


class _Hook:
    """What no copy of a model has, and no script."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return inert

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return make_inert, ()

    @property
    def __name__(self) -> str:
        raise _NoScriptError(
            "torch.jit.script would compile the hooks of BNP into the model, which collect statistics for training. "
            "Call close() first"
        )

    def eagerly(self, *arguments: Any) -> None:
        """Break the graph of a compiled model here, and call this outside of it: it counts, which a graph must not."""
        from bnp_analysis.training.bnp.eager import call

        call(self, *arguments)


class InputHook(_Hook):
    """A forward pre-hook that hands on a layer's inputs in training, once for each use.

    A copy of the model, or a pickle, gets a hook that does nothing: measurements work on copies.

    Args:
        module: the layer.
        owner: what collects, by a weak reference: a forgotten one is not kept alive.
        index: of the layer, for its owner.
        mode: the module whose mode says whether a pass trains.
    """

    def __init__(self, module: nn.Module, owner: weakref.ref[Any], index: int, mode: nn.Module) -> None:
        self._module, self._owner, self._index, self._mode = module, owner, index, mode

    @property
    def owner(self) -> Any:
        """What collects, or None if it was forgotten."""
        return self._owner()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _compiling():
            self.eagerly(module, args, kwargs)
            return
        # Shallow copies share the table of hooks: replicas of DataParallel.
        if module is not self._module or not _trains(self._mode):
            return
        owner = self._owner()
        if owner is not None:
            owner.receive(self._index, args[0] if args else in_order(module, args, kwargs)[0])


class InnerHook(_Hook):
    """A forward hook that hands on the inputs of the layers inside a module, which its output and states tell.

    Args:
        layers: those of one module, with their places for their owner.
        owner: what collects, by a weak reference.
    """

    def __init__(self, layers: Sequence[tuple[int, Layer]], owner: weakref.ref[Any]) -> None:
        self._layers, self._owner = layers, owner

    @property
    def owner(self) -> Any:
        """What collects, or None if it was forgotten."""
        return self._owner()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if _compiling():
            self.eagerly(module, args, kwargs, output)
            return
        _, first = self._layers[0]
        owner = self._owner()
        if owner is None or module is not first.module or not _trains(module):
            return
        found = first.inputs(in_order(module, args, kwargs), output)
        for index, layer in self._layers:
            owner.receive(index, found[layer.kind.weight])


class Proof:
    """Watches a layer that is known by its shape alone: its first forward pass in training is recorded.

    Until then nothing is collected. Where the pass is proved to be the product, the hooks of a covered layer take over,
    with what this pass has seen; else the layer is named by its owner, and left alone. What is compiled shows none of
    its operations, and is left alone too.

    Args:
        layer: the layer.
        owner: what collects, by a weak reference.
        index: of the layer, for its owner.
        outputs: what outputs are scaled by, if they are.
    """

    def __init__(self, layer: Layer, owner: weakref.ref[Any], index: int, outputs: Any) -> None:
        self._layer, self.owner, self._index, self._outputs = layer, owner, index, outputs
        self._running: tuple[Recording, Recorded, Any, int, int] | None = None
        self._open = True

    def add(self, handles: list[RemovableHandle]) -> None:
        """Register; `handles` gets those of the hooks, also of the ones that take over."""
        module, self._handles = self._layer.module, handles
        handles.append(module.register_forward_pre_hook(ProofHook(self, ends=False), with_kwargs=True))
        handles.append(module.register_forward_hook(ProofHook(self, ends=True), with_kwargs=True, always_call=True))

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins."""
        if not self._open or module is not self._layer.module or not _trains(module) or not self._layer.trains:
            return
        h = in_order(module, args, kwargs)[0]
        recording = Recording()
        self._running = recording, recording.__enter__(), h, h._version if isinstance(h, Tensor) else 0, handled()

    def end(self, module: nn.Module, output: Any) -> None:
        """It has ended, or failed."""
        if self._running is None or module is not self._layer.module:
            return
        (recording, recorded, h, version, before), self._running = self._running, None
        recording.__exit__(None, None, None)  # type: ignore[no-untyped-call] # torch does not annotate it
        owner, layer = self.owner(), self._layer
        if owner is None or before != handled():
            return
        self._open = False
        weight, bias = layer.own_weight, layer.own_bias
        proved = recorded.is_product(output, h, weight, bias, transposed=layer.kind.transposed)
        if not proved or h._version != version or recorded.returned(h):
            owner.refuse(self._index)
            return
        self._handles += _collect(layer, self.owner, self._index, self._outputs, module)
        owner.receive(self._index, h)
        if self._outputs is not None:
            OutputHook(layer, weakref.ref(self._outputs), self._index, module)(module, (), output)


class ProofHook(_Hook):
    """One of the two hooks of a `Proof`."""

    def __init__(self, proof: Proof, ends: bool) -> None:
        self._proof, self._ends = proof, ends

    @property
    def owner(self) -> Any:
        """What collects, or None if it was forgotten."""
        return self._proof.owner()

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        if _compiling():
            return
        if self._ends:
            self._proof.end(module, output)
        else:
            self._proof.begin(module, args, kwargs)


class PassHook(_Hook):
    """Tells an owner when a forward pass of the whole model begins, and when it has ended or failed.

    Args:
        module: the model, or what wraps it.
        owner: what is told, by a weak reference.
        end: the handle of the hook behind the pass; None for that hook itself.
    """

    def __init__(self, module: nn.Module, owner: weakref.ref[Any], end: RemovableHandle | None = None) -> None:
        self._module, self._owner, self._end = module, owner, end

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any = None) -> None:
        if _compiling():
            self.eagerly(module, args, output)
            return
        owner = self._owner()
        if owner is None or module is not self._module:
            return
        if self._end is None:
            owner.end_pass(module)
            return
        hooks = module._forward_hooks
        if next(reversed(hooks)) != self._end.id:
            hooks[self._end.id] = hooks.pop(self._end.id)  # behind hooks of others, which may raise
        owner.begin_pass(module, module.training and torch.is_grad_enabled() and _peek() is None)


class OutputHook(_Hook):
    """A forward hook that has the gradient at a layer's output handed on when it passes.

    Args:
        layer: the layer.
        owner: what collects, by a weak reference.
        index: of the layer, for its owner.
        mode: the module whose mode says whether a pass trains.
    """

    def __init__(self, layer: Layer, owner: weakref.ref[Any], index: int, mode: nn.Module) -> None:
        self._layer, self._owner, self._index, self._mode = layer, owner, index, mode

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if _compiling():
            self.eagerly(module, args, output)
            return
        # A forward pass that activation checkpointing repeats gets a hook that is never called.
        if not self._mode.training or module is not self._layer.module or not output.requires_grad:
            return
        if self._layer.trains:
            owner, index = self._owner, self._index

            def passed(gradient: Tensor) -> None:
                scales = owner()
                if scales is not None:
                    scales.receive(index, gradient)

            output.register_hook(passed)


def add_hooks(
    model: nn.Module, layers: Sequence[Layer], owner: weakref.ref[Any], outputs: Any
) -> list[RemovableHandle]:
    """The hooks around the passes of a model and its wrappers, on layers' inputs, and on outputs that are scaled."""
    handles = []
    for module in wrappers(model):
        end = module.register_forward_hook(PassHook(module, owner), always_call=True)
        handles += [end, module.register_forward_pre_hook(PassHook(module, owner, end), prepend=True)]
    model = unwrap(model)
    places = {layer.name: i for i, layer in enumerate(layers)}
    for own in by_module(layer for layer in layers if layer.inner).values():
        inner = InnerHook([(places[layer.name], layer) for layer in own], owner)
        # Before other hooks: that of fully_shard takes the weights away, with which lower layers run once more.
        handles.append(own[0].module.register_forward_hook(inner, with_kwargs=True, prepend=True))
    for i, layer in enumerate(layers):
        if layer.inner:
            continue
        if layer.kind.recognized:
            Proof(layer, owner, i, outputs).add(handles)
        else:
            handles += _collect(layer, owner, i, outputs, layer.module if layer.own_mode else model)
    return handles


def _collect(layer: Layer, owner: weakref.ref[Any], index: int, outputs: Any, mode: nn.Module) -> list[RemovableHandle]:
    """The hooks of a covered layer."""
    module = layer.module
    handles = [module.register_forward_pre_hook(InputHook(module, owner, index, mode), with_kwargs=True)]
    if outputs is not None:
        handles.append(module.register_forward_hook(OutputHook(layer, weakref.ref(outputs), index, mode)))
    return handles


def owners(layers: Iterable[Layer]) -> list[Any]:
    """Those whose hooks are on some of the layers."""
    tables = [table for layer in layers for table in (layer.module._forward_pre_hooks, layer.module._forward_hooks)]
    hooks = [hook for table in tables for hook in table.values()]
    found = [hook.owner for hook in hooks if isinstance(hook, InputHook | InnerHook | ProofHook)]
    return [owner for owner in dict.fromkeys(found) if owner is not None]


def inert(module: nn.Module, *_: Any) -> None:
    """What remains of a hook on a copied model."""


def make_inert() -> Callable[..., None]:
    """The same, made anew: what a pickle of a hook calls."""
    return inert


def _trains(module: nn.Module) -> bool:
    """Whether a forward pass that begins is one that trains."""
    if not module.training or not torch.is_grad_enabled():
        return False
    # Gradients by `torch.func` are someone's measurement: they never reach `.grad`, and rows would not outlive it.
    return _peek() is None and (_backward() == -1 or not _recomputed())


def _recomputed() -> bool:
    """Whether this forward, inside a backward pass, repeats one that was seen: activation checkpointing.

    The reentrant form runs its first forward without gradients, where nothing is collected; there the repetition
    is the one to see.
    """
    frame = sys._getframe()
    reentrant = CheckpointFunction.backward.__code__
    above: Any = frame
    while above is not None:
        if above.f_code is reentrant:
            return False
        above = above.f_back
    return True


def _stepping(optimizer: Any) -> Optimizer | None:
    """The optimizer that steps, behind the wrappers of other libraries, which keep it in an attribute."""
    for name in ("optimizer", "original_optimizer", "optim", "base_optimizer"):
        inner = vars(optimizer).get(name) if hasattr(optimizer, "__dict__") else None
        if isinstance(inner, Optimizer) and inner is not optimizer:
            return _stepping(inner)
    # A wrapper that never called `Optimizer.__init__` has no hooks.
    hooked = isinstance(optimizer, Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks")
    return optimizer if hooked else None


class EndOfBackward:
    """Calls a function when a backward pass that reached one of the parameters has ended, whatever else waits for it.

    Args:
        parameters: leaves that train; others are left out.
        call: what is called.
    """

    def __init__(self, parameters: Iterable[Tensor], call: Callable[[], None]) -> None:
        self._call, self._pass = call, -1
        hooked: list[Any] = [p for p in parameters if p.requires_grad]  # torch does not annotate the method
        self._handles = [p.register_post_accumulate_grad_hook(self._seen) for p in hooked]

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def _seen(self, _: Tensor) -> None:
        # By the pass and not by a flag: one that raises never ends.
        running = _backward()
        if running != self._pass:
            self._pass = running
            # Twice: averages of gradients over processes wait for the end too, and are queued while it runs.
            _engine().queue_callback(lambda: _engine().queue_callback(self._call))


def _engine() -> Any:
    return torch.autograd.Variable._execution_engine


def stepping(optimizer: Optimizer, layers: Sequence[Layer]) -> Optimizer:
    """The optimizer to attach to, behind wrappers.

    Raises:
        InvalidInputError: not a torch optimizer, one that evaluates its closure several times, or one that holds no
            weight of the layers.

    Warns:
        TrainingWarning: it holds the weights of some layers that train, and not of others.
    """
    inner = _stepping(optimizer)
    if inner is None:
        raise InvalidInputError(
            f"attach needs a torch optimizer, or a wrapper that holds one, got {type(optimizer).__name__}; "
            "call step() yourself, before its step()"
        )
    if why := getattr(inner, "not_attached", ""):
        raise InvalidInputError(why)
    if isinstance(inner, LBFGS):
        raise InvalidInputError("LBFGS searches along its own direction with several evaluations; BNP would break it")
    absent = not_held(inner, layers)
    if len(absent) == len(layers):
        raise InvalidInputError(
            "the optimizer holds no weight of a covered layer: it was made for another model, or from a copy"
        )
    if others := [layer.name for layer in absent if layer.trains]:
        warnings.warn(
            f"the optimizer that BNP is attached to does not hold the weights of {', '.join(others)}: another one that "
            "steps before it moves them without BNP. Attach to the one that steps first, or give each optimizer a BNP "
            "of its own with include= or exclude=",
            TrainingWarning,
            3,
        )
    return inner


def not_held(optimizer: Optimizer, layers: Iterable[Layer]) -> list[Layer]:
    """The layers whose weights an optimizer does not step."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [layer for layer in layers if id(layer.own_weight) not in held]


def before_steps(optimizer: Optimizer, step: Callable[[], None]) -> RemovableHandle:
    """Call `step` before each step of an optimizer, or after its closure where it is given one."""

    def before(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            step()
            return None

        def closed() -> Any:
            with torch.enable_grad():
                loss = closure()
            step()
            return loss

        # The optimizer itself is the first positional argument.
        return args[:1], kwargs | {"closure": closed}

    return optimizer.register_step_pre_hook(before)
