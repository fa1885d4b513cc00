"""Observation of a pass: called modules, random numbers, stopped gradients, parameters a loss reads."""

from __future__ import annotations

import functools
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._C import _functorch
from torch.overrides import TorchFunctionMode

from bnp_analysis.errors import DerivativeError, InvalidInputError
from bnp_analysis.network.kernels import nodes_of
from bnp_analysis.network.smooth import untransformed
from bnp_analysis.network.snapshot import unwrap
from bnp_analysis.runtime.trees import tensors_of

# Functions whose derivative torch takes to be zero, or the identity.
_STEPS = {"round", "round_", "floor", "floor_", "ceil", "ceil_", "trunc", "trunc_", "sign", "sign_", "heaviside"}
# Functions with a kink at zero, at a number that they are given, or where two arguments are equal.
_KINKS = {"abs", "absolute", "relu", "relu6", "leaky_relu", "prelu", "threshold", "hardtanh", "sign", "sgn"}
_KINKS |= {"clamp", "clamp_min", "clamp_max", "clip", "maximum", "minimum", "max", "min", "fmax", "fmin", "where"}
_KINKS |= {"gt", "ge", "lt", "le", "hardshrink", "softshrink", "hardswish", "hardsigmoid"}
_KINKS |= {"smooth_l1_loss", "huber_loss", "l1_loss", "hinge_embedding_loss", "margin_ranking_loss"}
_STEPS |= {"fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "bucketize"}


class _Quiet(TorchFunctionMode):
    """A look at a pass, during which torch does not warn: its warnings would be said to come from here."""

    def __enter__(self) -> Self:
        self._quiet = warnings.catch_warnings(action="ignore")
        self._quiet.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._quiet.__exit__(*error)


class Arguments(_Quiet):
    """Sees what the calls of a pass are given.

    Args:
        watched: `id` of a tensor -> its name.

    Attributes:
        read: names of the watched tensors that were arguments.
        generators: random generators that were passed on purpose.
    """

    def __init__(self, watched: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self._watched = watched or {}
        self.read: dict[str, None] = {}
        self.generators: dict[int, torch.Generator] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._watched:
            for t in tensors_of((args, kwargs) if kwargs else args):
                if id(t) in self._watched:
                    self.read[self._watched[id(t)]] = None
        for value in (*args, *kwargs.values()) if kwargs else args:
            # Not by isinstance, which torch answers in Python.
            if torch.Generator in type(value).__mro__:
                self.generators[id(value)] = value
        return func(*args, **kwargs)


class Observer(_Quiet):
    """Sees the calls of a pass, and what they make.

    Args:
        kinks: whether to look for functions that are evaluated on a kink.

    Attributes:
        dtypes: of all tensors that were made.
        stops: where a gradient was cut, a step function or a padding index used, `"detach at net.py:12"`.
        kinks: where functions were evaluated on their kinks, if that was asked for.
    """

    def __init__(self, *, kinks: bool = False) -> None:
        super().__init__()
        self._looks = kinks
        self.kinks: dict[str, None] = {}
        self.dtypes: set[torch.dtype] = set()
        self.stops: dict[str, None] = {}

    @property
    def eps(self) -> float:
        """The spacing of the coarsest floating-point numbers that were made."""
        return max((torch.finfo(d).eps for d in self.dtypes if d.is_floating_point), default=0.0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [out] if isinstance(out, Tensor) else tensors_of(out) if isinstance(out, tuple | list) else []
        cut = False
        for t in made:
            self.dtypes.add(t.dtype)
            cut = cut or (not t.requires_grad and t.is_floating_point())
        name = str(getattr(func, "__name__", func))
        kinked = self._looks and name.strip("_") in _KINKS
        given = tensors_of((args, kwargs) if kwargs else args) if cut or kinked else []
        if kinked and _on_kink(given, args[1:], kwargs):
            self.kinks[_caller(name)] = None
        cut = cut and any(t.requires_grad for t in given)
        if cut or name in _STEPS or kwargs.get("padding_idx") is not None:
            name = str(getattr(func.__self__, "__name__", name)) if name == "__get__" else name
            self.stops[_caller(name)] = None
        return out


def _on_kink(given: list[Tensor], args: Iterable[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether some entry of the arguments of a function with a kink is where it has one."""
    first, *others = [t for t in given if not transformed(t)] or [torch.ones(())]
    numbers = [a for a in (*args, *kwargs.values()) if isinstance(a, int | float)]
    if any(bool((first == c).any()) for c in (0, *numbers)):
        return True
    return any(_broadcast(first, t) and bool((first == t).any()) for t in others)


def _broadcast(a: Tensor, b: Tensor) -> bool:
    return all(m == n or 1 in (m, n) for m, n in zip(reversed(a.shape), reversed(b.shape), strict=False))


def _caller(name: str) -> str:
    """`name` with the innermost line that is neither torch's nor ours, or the `autograd.Function` around it."""
    frame: FrameType | None = sys._getframe(2)
    place = ""
    while frame is not None:
        context = frame.f_locals.get("ctx") if frame.f_code.co_name == "forward" else None
        if isinstance(context, torch.autograd.function.FunctionCtx):
            return f"autograd.Function {type(context).__name__.removesuffix('Backward')}"
        module = str(frame.f_globals.get("__name__", ""))
        if not place and module.partition(".")[0] not in ("torch", "bnp_analysis", "contextlib"):
            place = f" at {frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return name + place


def custom_functions(outputs: Tensor) -> list[str]:
    """The names of the `autograd.Function`s in a recorded graph, but this package's own."""
    found = [node for node in nodes_of(outputs) if hasattr(node, "_forward_cls")]
    custom = [node.name() for node in found if not node._forward_cls.__module__.startswith("bnp_analysis.")]
    return [*dict.fromkeys(name.removesuffix("Backward") for name in custom)]


# Most of what is reached are attributes of modules, of which these have no parts.
_WHOLE = frozenset((bool, int, float, str, bytes, type(None), Tensor, nn.Parameter))


def reached(roots: Iterable[Any], depth: int = 6) -> Iterator[Any]:
    """What is within reach of modules and functions: attributes, closures, globals they name."""
    seen: set[int] = set()
    waiting = [(root, depth) for root in roots]
    while waiting:
        value, left = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if left > 0:
            waiting += [(part, left - 1) for part in _parts(value)]


def _parts(value: Any) -> Iterable[Any]:
    if type(value) in _WHOLE:
        return ()
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, types.BuiltinMethodType) and not isinstance(value.__self__, types.ModuleType):
        return (value.__self__,)
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if not empty(c)]
        named = [value.__globals__[n] for n in value.__code__.co_names if n in value.__globals__]
        return [*cells, *(value.__defaults__ or ()), *(v for v in named if not isinstance(v, types.ModuleType | type))]
    if isinstance(value, nn.Module):
        return [*vars(value).values(), *_forward(type(value))]
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, tuple | list | set):
        return list(value)
    if isinstance(value, Tensor | type | types.ModuleType | str | bytes) or not hasattr(value, "__dict__"):
        return ()
    return [*vars(value).values(), *((value.__call__,) if callable(value) else ())]


def _forward(kind: type[nn.Module]) -> list[Callable[..., Any]]:
    """The methods that a user's module class adds."""
    own = [k for k in kind.__mro__ if not k.__module__.startswith("torch.")]
    return [f for k in own for f in vars(k).values() if isinstance(f, types.FunctionType)]


def empty(cell: Any) -> bool:
    """Whether a variable of a closure has no value yet.

    Example:
        >>> import types
        >>> empty(types.CellType()), empty(types.CellType(1))
        (True, False)
    """
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


Visit = Callable[[str, nn.Module, Any, Any], Any]


@contextmanager
def forward_hooks(model: nn.Module, visit: Visit, names: Iterable[str] | None) -> Iterator[None]:
    """Meanwhile every forward pass of the named modules, default all, calls `visit(name, module, inputs, output)`."""
    wanted = None if names is None else set(names)
    handles: list[Any] = []

    def remove() -> None:
        for handle in handles:
            handle.remove()

    try:
        for name, module in model.named_modules():
            if wanted is None or name in wanted:

                def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
                    return visit(name, module, in_order(module, args, kwargs), output)

                handles.append(module.register_forward_hook(hook, with_kwargs=True))
        yield
    finally:
        try:
            remove()
        except KeyboardInterrupt:
            remove()
            raise


def in_order(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a forward pass, those given by name in the order of the method's parameters.

    Example:
        >>> in_order(nn.LSTM(1, 1), (), {"hx": "state", "input": "x"})
        ('x', 'state')
    """
    if len(kwargs) > 1:
        places = {name: i for i, name in enumerate(inspect.signature(module.forward).parameters)}
        kwargs = dict(sorted(kwargs.items(), key=lambda given: places.get(given[0], len(places))))
    return (*args, *kwargs.values())


def transformed(t: Tensor) -> bool:
    """Whether a tensor belongs to a transform of `torch.func` that runs at the moment."""
    return _functorch.is_functorch_wrapped_tensor(t)


def differentiable_part(t: Tensor) -> Tensor:
    """The tensor inside transforms of `torch.func`, as it lies in the recorded graph outside of them.

    Raises:
        InvalidInputError: a batch of `vmap` that does not come first.
    """
    found = untransformed(t)
    while transformed(t):
        t = _functorch.get_unwrapped(t)
    if t is not found:
        raise InvalidInputError(
            "a layer gives vmap its examples along another axis than the first, so they cannot be told apart in what "
            "is recorded. Let vmap inside forward() have in_dims=0, or give the layer whole batches"
        )
    return t


def reads_model(loss: Callable[..., Any]) -> bool:
    """Whether a loss takes the network: it has a third positional argument without a default.

    Example:
        >>> import torch
        >>> reads_model(lambda output, y, model: output.mean()), reads_model(torch.nn.functional.cross_entropy)
        (True, False)
    """
    try:
        parameters = inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters.values()
    except (TypeError, ValueError):  # written in C, without a signature
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters) == 3


class WithModel(nn.Module):
    """A loss as a function of the network's parameters too: `functional_call` exchanges them for both."""

    def __init__(self, loss: Callable[..., Tensor], model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._loss = (loss,)  # no submodule: its tensors are constants

    def forward(self, outputs: Tensor, y: Any) -> Tensor:
        return self._loss[0](outputs, y, self.model)


def live_tensors(loss: Callable[..., Any], model: nn.Module) -> dict[int, str]:
    """The parameters of the caller's model by identity, for `require_own_tensors`.

    Raises:
        DerivativeError: the loss holds some of them, of which the risk would make copies.
    """
    live = {id(p): name for name, p in unwrap(model).named_parameters()}
    _refuse([live[id(t)] for t in _held(loss) if id(t) in live])
    return live


def require_own_tensors(live: Mapping[int, str], seen: Arguments, value: Tensor) -> None:
    """Refuse a loss that reads parameters of the caller's model: those stay where they are when `theta` moves.

    Args:
        live: from `live_tensors`.
        seen: what the evaluation of the loss called.
        value: the loss, recorded.

    Raises:
        DerivativeError: names them.
    """
    leaves = [node.variable for node in nodes_of(value) if hasattr(node, "variable")]
    _refuse([*dict.fromkeys([*seen.read, *(live[id(t)] for t in leaves if id(t) in live)])])


def _refuse(read: list[str]) -> None:
    if read:
        raise DerivativeError(
            f"the loss reads parameters of the model itself ({_few(read)}), by a closure or an attribute: they keep "
            "their values when theta moves, so the risk would lack that term's change, and its gradient and curvature "
            "the term. Let the loss take the network as a third argument, loss(output, y, model), and use that: "
            "model.parameters() for a penalty, model(points) for a residual"
        )


def _held(loss: Any) -> list[Tensor]:
    """The tensors that a loss holds, of which the risk makes copies."""
    if isinstance(loss, nn.Module):
        return list(loss.parameters())
    if isinstance(loss, functools.partial):
        return tensors_of((loss.args, loss.keywords)) + _held(loss.func)
    return []


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
