"""What a pass uses beside its arguments: tensors of the caller's model, random numbers, what stops a gradient."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnp_analysis.runtime.trees import tensors_of

# Functions whose derivative torch takes to be zero, or the identity.
_STEPS = {"round", "round_", "floor", "floor_", "ceil", "ceil_", "trunc", "trunc_", "sign", "sign_", "heaviside"}
_STEPS |= {"fake_quantize_per_tensor_affine", "fake_quantize_per_channel_affine", "bucketize"}


class Observer(TorchFunctionMode):
    """Sees the calls of a pass.

    Args:
        watched: `id` of a tensor -> its name.

    Attributes:
        read: names of the watched tensors that were arguments.
        generators: random generators that were passed on purpose.
        dtypes: of all tensors that were made.
        stops: where a gradient was cut, a step function or a padding index used, `"detach at net.py:12"`.
    """

    def __init__(self, watched: Mapping[int, str] | None = None) -> None:
        super().__init__()
        self._watched = watched or {}
        self.read: dict[str, None] = {}
        self.generators: dict[int, torch.Generator] = {}
        self.dtypes: set[torch.dtype] = set()
        self.stops: dict[str, None] = {}

    @property
    def eps(self) -> float:
        """The spacing of the coarsest floating-point numbers that were made."""
        return max((torch.finfo(d).eps for d in self.dtypes if d.is_floating_point), default=0.0)

    def __enter__(self) -> Observer:
        # What torch warns of would be said to come from here.
        self._quiet = warnings.catch_warnings()
        self._quiet.__enter__()
        warnings.simplefilter("ignore")
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._quiet.__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_of((args, kwargs) if kwargs else args)
        if self._watched:
            self.read |= {self._watched[id(t)]: None for t in given if id(t) in self._watched}
        self.generators |= {id(g): g for g in (*args, *kwargs.values()) if isinstance(g, torch.Generator)}
        out = func(*args, **kwargs)
        made = tensors_of(out) if isinstance(out, Tensor | tuple | list) else []
        self.dtypes |= {t.dtype for t in made}
        name = str(getattr(func, "__name__", func))
        cut = any(t.requires_grad for t in given) and any(t.is_floating_point() and not t.requires_grad for t in made)
        if cut or name in _STEPS or kwargs.get("padding_idx") is not None:
            name = str(getattr(func.__self__, "__name__", name)) if name == "__get__" else name
            self.stops[_caller(name)] = None
        return out


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
    """The names of the `autograd.Function`s in a recorded graph."""
    found: dict[str, None] = {}
    seen: set[Any] = set()
    waiting = [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found[node.name().removesuffix("Backward")] = None
    return [*found]


def held_objects(roots: Iterable[Any], wanted: tuple[type, ...], depth: int = 6) -> Iterator[Any]:
    """Objects of some types within reach of modules and functions: attributes, closures, globals they name."""
    seen: set[int] = set()
    waiting = [(root, depth) for root in roots]
    while waiting:
        value, left = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, wanted):
            yield value
        elif left > 0:
            waiting += [(part, left - 1) for part in _parts(value)]


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, types.MethodType):
        return (value.__self__, value.__func__)
    if isinstance(value, types.BuiltinMethodType) and not isinstance(value.__self__, types.ModuleType):
        return (value.__self__,)
    if isinstance(value, types.FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if not _empty(c)]
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


def _empty(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False
