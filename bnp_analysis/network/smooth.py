"""Smooth functions whose derivatives stay accurate where they saturate.

torch computes the derivative of `tanh` as `1 - y^2` and that of a sigmoid as `y (1 - y)`. For `y` near 1 this cancels,
and at `tanh(20)` it is exactly 0. Inside `Accurate` such functions have the values of torch, and first and second
derivatives with a small relative error for all arguments: `sech^2 x`, `sigmoid(x) sigmoid(-x)`, the normal density.
Functions whose derivatives torch computes accurately (ELU, exponentials, `atan`) are not replaced.

A derivative that underflows to zero is no structural zero. `Monitor(structural=True)` runs the same functions with
derivatives replaced by numbers of moderate size: zeros that remain come from a mask or a missing edge of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MappingProxyType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import (
    TransformType,
    get_interpreter_stack,
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    maybe_get_bdim,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode, handle_torch_function
from torch.utils._python_dispatch import _disable_current_modes

from bnp_analysis.network.forms import FORMS, reduced
from bnp_analysis.runtime.trees import tensors_of

_ROOT, _LN2 = math.sqrt(2 / math.pi), math.log(2)
# A logit so far below the largest of its row is masked, not improbable.
_MASKED = 1e4
# Derivatives down to this are good to 32 roundings as `1 - y^2` and `y (1 - y)`, which every entry is granted.
_COARSEST = 1 / 32
# So many numbers are in memory for all partial sums of a cumulative one.
_PARTIAL_SUMS = 2**24

Entrywise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ScalarFunction:
    """A function with its first two derivatives, entry by entry.

    From `low` to `high` torch's own derivatives keep their digits, and its kernels are used.
    """

    value: Entrywise
    slope: Entrywise
    curvature: Entrywise
    low: float = math.inf
    high: float = -math.inf

    def derivative(self, order: int) -> Entrywise:
        """The function itself, its first or its second derivative."""
        return (self.value, self.slope, self.curvature)[order]


@dataclass(eq=False)
class Monitor:
    """What smooth functions did while a model ran.

    Attributes:
        structural: whether derivatives are to be replaced by numbers of ordinary size.
        edges: where the gradients of their arguments arrive.
        vanished: whether some value is an exact zero, or too small to have all digits, that is none by structure.
        amplification: the largest `|x f''(x) / f'(x)|`: relative errors of arguments grow by it in derivatives.
        least: the smallest derivative.
    """

    structural: bool = False
    edges: list[GradientEdge] = field(default_factory=list)
    vanished: bool = False
    amplification: float = 0.0
    least: float = math.inf

    def amplify(self, by: float) -> None:
        """Derivatives have so many times the rounding of what they are computed from."""
        self.amplification = max(self.amplification, by)


_MONITOR: ContextVar[Monitor | None] = ContextVar("monitor", default=None)


@contextmanager
def monitoring(*, structural: bool = False) -> Iterator[Monitor]:
    """Monitor what smooth functions do in models and losses that run inside."""
    monitor = Monitor(structural)
    token = _MONITOR.set(monitor)
    try:
        yield monitor
    finally:
        _MONITOR.reset(token)


class Function(torch.autograd.Function):
    """Without what torch does at every call for defaults and transforms, where there are none."""

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)  # type: ignore[no-untyped-call]
        # What a transform has left behind, as `torch.func.vjp` does, is no part of the graph; the tensors inside are.
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]


class Smooth(Function):
    """A derivative of a scalar function, entry by entry: of order 0 the function itself."""

    @staticmethod
    def forward(x: Tensor, f: ScalarFunction, order: int) -> Tensor:
        return f.derivative(order)(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.f, ctx.order = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return cotangents[0] * Smooth.next(ctx), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0] * Smooth.next(ctx)

    @staticmethod
    def next(ctx: Any) -> Tensor:
        """The derivative of the next order; the last one is made of torch's operations."""
        (x,) = ctx.saved_tensors
        if ctx.order == 1 or not (torch.is_grad_enabled() or is_functorch_wrapped_tensor(x)):
            return cast(Tensor, ctx.f.derivative(ctx.order + 1)(x))
        return cast(Tensor, Smooth.apply(x, ctx.f, ctx.order + 1))


def smooth(x: Tensor, f: ScalarFunction) -> Tensor:
    """`f(x)`, with the derivatives that `f` states."""
    return cast(Tensor, Smooth.apply(x, f, 0))


def _sigmoid(x: Tensor) -> Tensor:
    return smooth(x, SIGMOID) if x.requires_grad else torch.sigmoid(x)


def _tanh(x: Tensor) -> Tensor:
    return smooth(x, TANH) if x.requires_grad else torch.tanh(x)


def _bell(x: Tensor) -> Tensor:
    """`sigmoid(x) sigmoid(-x)`."""
    return _sigmoid(x) * _sigmoid(-x)


def _mostly(plain: Entrywise, exact: Entrywise, far: Entrywise, x: Tensor) -> Tensor:
    """`exact(x)`, by cheaper operations but in the few places where those lose digits."""
    if is_functorch_wrapped_tensor(x) or (x.requires_grad and torch.is_grad_enabled()):
        return exact(x)
    found, places = plain(x), far(x).nonzero(as_tuple=True)
    if len(places[0]):
        found[places] = exact(x[places])
    return found


def _density(x: Tensor) -> Tensor:
    """The normal density."""
    return _mostly(lambda z: torch.exp(-z * z / 2) / math.sqrt(2 * math.pi), _far_density, lambda z: z.abs() > 2, x)


def _far_density(x: Tensor) -> Tensor:
    """Its exponent in two parts, of which the larger is exact."""
    coarse = (x.detach().clamp(-64, 64) * 16).round() / 16
    return torch.exp(-coarse * coarse / 2) * torch.exp(-(x - coarse) * (x + coarse) / 2) / math.sqrt(2 * math.pi)


def _gelu_slope(x: Tensor) -> Tensor:
    plain = torch.ops.aten.gelu_backward
    return _mostly(lambda z: plain(torch.ones_like(z), z), _gelu_far_slope, lambda z: z < GELU.low, x)


def _gelu_far_slope(x: Tensor) -> Tensor:
    size = x.abs()
    tail = _density(size) * (torch.special.erfcx(size / math.sqrt(2)) / _ROOT - size)
    return torch.where(x < 0, tail, 1 - tail)


def _erf_slope(x: Tensor) -> Tensor:
    return 2 / math.sqrt(math.pi) * torch.exp(-x * x)


def _inner(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the tanh of the approximate GELU is taken of, and its derivatives."""
    return _ROOT * x * (1 + 0.044715 * x * x), _ROOT * (1 + 0.134145 * x * x), _ROOT * 0.26829 * x


def _gelu_tanh_slope(x: Tensor) -> Tensor:
    u, first, _ = _inner(x)
    return _sigmoid(2 * u) * (1 + 2 * x * first * _sigmoid(-2 * u))


def _gelu_tanh_curvature(x: Tensor) -> Tensor:
    u, first, second = _inner(x)
    return _bell(2 * u) * (4 * first + 2 * x * second - 4 * x * first * first * _tanh(u))


def _mish(x: Tensor) -> tuple[Tensor, Tensor]:
    """`t = tanh(softplus(x))` and `t'`."""
    m = _sigmoid(-x)
    return _sigmoid(x) * (1 + m) / (1 + m * m), (2 * m / (1 + m * m)) ** 2 * _sigmoid(x)


def _mish_slope(x: Tensor) -> Tensor:
    t, d = _mish(x)
    return t + x * d


def _mish_curvature(x: Tensor) -> Tensor:
    t, d = _mish(x)
    return d * (2 + x * (_sigmoid(-x) - 2 * t * _sigmoid(x)))


_ALL = -math.inf, math.inf
SIGMOID = ScalarFunction(torch.sigmoid, _bell, lambda x: -_bell(x) * _tanh(x / 2), -math.inf, 2.5)
TANH = ScalarFunction(torch.tanh, lambda x: 4 * _bell(2 * x), lambda x: -8 * _bell(2 * x) * _tanh(x), -2.0, 2.0)
LOGSIGMOID = ScalarFunction(F.logsigmoid, lambda x: _sigmoid(-x), lambda x: -_bell(x), -math.inf, 2.5)
SILU = ScalarFunction(
    F.silu,
    lambda x: _sigmoid(x) * (1 + x * _sigmoid(-x)),
    lambda x: _bell(x) * (2 - x * _tanh(x / 2)),
    -math.inf,
    2.5,
)
MISH = ScalarFunction(F.mish, _mish_slope, _mish_curvature, -2.0, 2.0)
GELU = ScalarFunction(F.gelu, _gelu_slope, lambda x: _density(x) * (2 - x * x), -2.0, math.inf)
GELU_TANH = ScalarFunction(partial(F.gelu, approximate="tanh"), _gelu_tanh_slope, _gelu_tanh_curvature, -2.0, 2.0)
EXP = ScalarFunction(torch.exp, torch.exp, torch.exp, *_ALL)
ERF = ScalarFunction(torch.erf, _erf_slope, lambda x: -2 * x * _erf_slope(x), *_ALL)
EXPM1 = ScalarFunction(torch.expm1, torch.exp, torch.exp, -3.0, math.inf)
EXP2 = ScalarFunction(torch.exp2, lambda x: _LN2 * torch.exp2(x), lambda x: _LN2**2 * torch.exp2(x), *_ALL)
ERFC = ScalarFunction(torch.erfc, lambda x: -_erf_slope(x), lambda x: 2 * x * _erf_slope(x), *_ALL)
NDTR = ScalarFunction(torch.special.ndtr, _density, lambda x: -x * _density(x), *_ALL)
SOFTSIGN = ScalarFunction(
    F.softsign, lambda x: (1 + x.abs()) ** -2, lambda x: -2 * x.sign() * (1 + x.abs()) ** -3, -8.0, 8.0
)
TANHSHRINK = ScalarFunction(F.tanhshrink, lambda x: _tanh(x) ** 2, lambda x: 8 * _tanh(x) * _bell(2 * x))


def _softplus(beta: float = 1.0, threshold: float = 20.0) -> ScalarFunction:
    # torch goes over to x where the difference is rounding; the second derivative has not gone yet.
    value = partial(F.softplus, beta=beta, threshold=threshold)
    high = 2.5 / beta if beta > 0 else -math.inf
    return ScalarFunction(value, lambda x: _sigmoid(beta * x), lambda x: beta * _bell(beta * x), -math.inf, high)


def _exponential(scale: float, alpha: float, width: float, value: Entrywise) -> ScalarFunction:
    """`scale x` above zero, `scale alpha (exp(x / width) - 1)` below."""

    def below(x: Tensor) -> Tensor:
        return scale * alpha / width * torch.exp(x.clamp(max=0) / width)

    return ScalarFunction(
        value,
        lambda x: torch.where(x > 0, scale, below(x)),
        lambda x: torch.where(x > 0, 0.0, below(x) / width),
        *_ALL,
    )


def _all(name: str, *, inplace: bool = True) -> list[Any]:
    """A function under all its names."""
    names = [name, *([f"{name}_"] if inplace else [])]
    places: list[Any] = [torch, Tensor, F, torch.special]
    return [getattr(place, n) for place in places for n in names if hasattr(place, n)]


_SIGMOIDS = {f for name in ("sigmoid", "expit") for f in _all(name, inplace=False)}
_NAMED: dict[str, Callable[..., ScalarFunction]] = {
    "tanh": lambda: TANH,
    "sigmoid": lambda: SIGMOID,
    "expit": lambda: SIGMOID,
    "logsigmoid": lambda: LOGSIGMOID,
    "log_sigmoid": lambda: LOGSIGMOID,
    "silu": lambda: SILU,
    "mish": lambda: MISH,
    "gelu": lambda approximate="none": GELU_TANH if approximate == "tanh" else GELU,
    "softplus": _softplus,
    "softsign": lambda: SOFTSIGN,
    "tanhshrink": lambda: TANHSHRINK,
    "elu": lambda alpha=1.0: _exponential(1.0, alpha, 1.0, partial(F.elu, alpha=alpha)),
    "celu": lambda alpha=1.0: _exponential(1.0, alpha, alpha, partial(F.celu, alpha=alpha)),
    "exp": lambda: EXP,
    "expm1": lambda: EXPM1,
    "exp2": lambda: EXP2,
    "erf": lambda: ERF,
    "erfc": lambda: ERFC,
    "ndtr": lambda: NDTR,
    "selu": lambda: _exponential(1.0507009873554805, 1.6732632423543772, 1.0, F.selu),
}
# Function of torch -> the scalar function for its further arguments.
_FUNCTIONS = {function: make for name, make in _NAMED.items() for function in _all(name)}


def generic(x: Tensor) -> Tensor:
    """Positive numbers of ordinary size in no relation to each other."""
    index = torch.arange(x.numel(), device=x.device, dtype=torch.float64)
    return (1 + 0.5 * torch.sin(12.9898 * index)).to(x.dtype).reshape(x.shape)


def _ordinary(x: Tensor, low: float, high: float) -> bool:
    """Whether torch's derivatives may be used: none is asked for, or all entries lie between bounds."""
    if is_functorch_wrapped_tensor(x):  # whose numbers cannot be looked at
        return False
    if not x.requires_grad or not x.numel():
        return True
    with _unseen():
        z = x.detach()
        return (low == -math.inf or float(z.amin()) >= low) and (high == math.inf or float(z.amax()) <= high)


def _unseen() -> AbstractContextManager[Any]:
    """What chooses between two ways of computing is no part of what is recorded, or tried with other roundings."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()


class Softmax(Function):
    """The softmax along an axis; cotangents are taken relative to that of the largest entry, so nothing cancels."""

    @staticmethod
    def forward(x: Tensor, dim: int, structural: bool) -> Tensor:
        return torch.softmax(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dim, structural = inputs
        p = _unsaturated(x, ctx.dim) if structural else output
        ctx.save_for_backward(p)
        ctx.save_for_forward(p)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return Softmax.jvp(ctx, *cotangents), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (p,) = ctx.saved_tensors
        return p * _centred(tangents[0], p, ctx.dim)


class LogSoftmax(Function):
    """The logarithm of the softmax along an axis."""

    @staticmethod
    def forward(x: Tensor, dim: int, structural: bool) -> Tensor:
        return torch.log_softmax(x, dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.dim, ctx.structural = inputs
        ctx.kept = None
        # The same for both: under vmap torch remembers the batched axes of the tensors that were saved last.
        ctx.save_for_backward(x, output)
        ctx.save_for_forward(x, output)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        x, logarithms = ctx.saved_tensors
        if not torch.is_grad_enabled() and not is_functorch_wrapped_tensor(x):
            if ctx.kept is None:
                p = _unsaturated(x, ctx.dim) if ctx.structural else logarithms.exp()
                ctx.kept = _pulling(p, ctx.dim)
            return ctx.kept(cotangents[0]), None, None
        return LogSoftmaxPullback.apply(cotangents[0], x, ctx.dim, ctx.structural), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        x, _ = ctx.saved_tensors
        p = Softmax.apply(x, ctx.dim, ctx.structural)
        return _centred(tangents[0], p, ctx.dim)


class LogSoftmaxPullback(Function):
    """`g - p sum g`, the first derivative of `LogSoftmax`."""

    @staticmethod
    def forward(g: Tensor, x: Tensor, dim: int, structural: bool) -> Tensor:
        p = _unsaturated(x, dim) if structural else torch.softmax(x, dim)
        return _pulling(p, dim)(g)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        g, x, ctx.dim, ctx.structural = inputs
        ctx.kept = None
        ctx.save_for_backward(g, x)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        g, x = ctx.saved_tensors
        if torch.is_grad_enabled() or any(is_functorch_wrapped_tensor(t) for t in (g, x)):
            p = Softmax.apply(x, ctx.dim, ctx.structural)
            top, scale = p.argmax(ctx.dim, keepdim=True), -g.sum(ctx.dim, keepdim=True) * p
        else:  # a kept graph is run backwards many times, with the same softmax
            if ctx.kept is None:
                p = _unsaturated(x, ctx.dim) if ctx.structural else torch.softmax(x, ctx.dim)
                ctx.kept = p, p.argmax(ctx.dim, keepdim=True), -g.sum(ctx.dim, keepdim=True) * p
            p, top, scale = ctx.kept
        centred = _centred(cotangents[0], p, ctx.dim, top)
        return centred, scale * centred if ctx.needs_input_grad[1] else None, None, None


def _pulling(p: Tensor, dim: int) -> Entrywise:
    """`g -> g - p sum g` for a softmax `p`, the largest entry without cancellation: `1 - p` is the sum of others."""
    top = p.argmax(dim, keepdim=True)
    largest, others = p.gather(dim, top), p.scatter(dim, top, 0.0).sum(dim, keepdim=True)

    def pull(g: Tensor) -> Tensor:
        own, rest = g.gather(dim, top), g.scatter(dim, top, 0.0).sum(dim, keepdim=True)
        return (g - p * (own + rest)).scatter(dim, top, own * others - largest * rest)

    return pull


def _centred(g: Tensor, p: Tensor, dim: int, top: Tensor | None = None) -> Tensor:
    """`g - sum p g`, from differences to the entry `top` where `p` is largest."""
    h = g - g.gather(dim, p.argmax(dim, keepdim=True) if top is None else top)
    return h - (p * h).sum(dim, keepdim=True)


def _unsaturated(x: Tensor, dim: int) -> Tensor:
    """The softmax with all logits that are not masked equal."""
    masked = x < x.amax(dim, keepdim=True) - _MASKED
    return torch.softmax(torch.zeros_like(x).masked_fill(masked, -math.inf), dim)


class Valued(Function):
    """The value of one computation with the derivatives of another."""

    @staticmethod
    def forward(value: Tensor, formula: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return None, cotangents[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[1].clone()


class Likelihood(Function):
    """`F.nll_loss`, linear in the logarithms: torch's own carries zeros back to them in every second derivative."""

    @staticmethod
    def forward(logs: Tensor, y: Tensor, weight: Tensor | None, axis: int, given: Mapping[str, Any]) -> Tensor:
        return F.nll_loss(logs, y, weight, **given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        logs, y, weight, ctx.axis, ctx.given = inputs
        ctx.shape = logs.shape
        ctx.save_for_backward(y, weight)
        ctx.save_for_forward(y, weight)

    @staticmethod
    def _shares(ctx: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """The place of each target, and its part of the loss."""
        y, weight = ctx.saved_tensors
        kept = y != ctx.given.get("ignore_index", -100)
        index = torch.where(kept, y, 0).long()
        shares = kept.to(like) if weight is None else weight[index] * kept
        if ctx.given.get("reduction", "mean") == "mean":
            total = shares.sum()
            shares = shares / torch.where(total == 0, 1.0, total)  # as torch's where all targets are ignored
        return index.unsqueeze(ctx.axis), shares.unsqueeze(ctx.axis)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (g,) = cotangents
        index, shares = Likelihood._shares(ctx, g)
        g = g if g.ndim == 0 else g.unsqueeze(ctx.axis)
        return g.new_zeros(ctx.shape).scatter(ctx.axis, index, -g * shares), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        index, shares = Likelihood._shares(ctx, tangents[0])
        parts = -tangents[0].gather(ctx.axis, index).mul(shares).squeeze(ctx.axis)
        return parts if ctx.given.get("reduction") == "none" else parts.sum()


# Attribute of a sigmoid: what it was taken of, and the versions of both, which change when one is written into.
_LOGITS = "_bnp_analysis_logits"


def _mark(p: Tensor, z: Tensor) -> None:
    """Remember the logits `z` of probabilities `p`.

    Where `p` is nearly 1, `1 - p` has no digits of `sigmoid(-z)`; where it is small, those of the second derivative of
    `log p` cancel.
    """
    setattr(p, _LOGITS, (z, z._version, p._version))


def _logits(p: Tensor) -> Tensor | None:
    """What `p` is the sigmoid of, if that is known."""
    z, *versions = p.__dict__.get(_LOGITS, (None,)) if isinstance(p, Tensor) else (None,)
    return z if z is not None and versions == [z._version, p._version] else None


def _of_logits(formula: Entrywise, func: Any, p: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A function of probabilities with the derivatives of one of their logits; beside 1 it has no other arguments."""
    z = None if kwargs or args not in ((), (1,)) else _logits(p)
    return cast(Tensor, func(p, *args, **kwargs)) if z is None else _valued(func, (p, *args), {}, formula(z))


def _complement(func: Any, p: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`1 - p`, which is `sigmoid(-z)`."""
    z = _logits(p)
    found = _of_logits(lambda z: _entrywise(torch.sigmoid, -z), func, p, *args, **kwargs)
    if args == (1,) and z is not None:
        _mark(found, -z)
    return found


def _valued(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], formula: Tensor) -> Tensor:
    with torch.no_grad():
        value = func(*args, **kwargs)
    return cast(Tensor, Valued.apply(value.detach(), formula))


def _entrywise(func: Any, x: Tensor, *rest: Any, inplace: bool = False, **kwargs: Any) -> Tensor:
    monitor = _MONITOR.get()
    inplace = inplace or func.__name__.endswith("_")
    f = _FUNCTIONS[func](*rest, **kwargs)
    if monitor is not None:
        _note(monitor, x, f)
        f = ScalarFunction(f.value, generic, lambda x: generic(x) + 0.25) if monitor.structural else f
    if inplace:
        return x.copy_(smooth(x.clone(), f))
    plain = monitor is None and _ordinary(x, f.low, f.high)
    found = cast(Tensor, func(x, *rest, **kwargs)) if plain else smooth(x, f)
    if func in _SIGMOIDS and x.requires_grad:
        _mark(found, x)
    return found


def _forwards_twice() -> bool:
    """Whether forward derivatives of forward derivatives are computed, which torch takes for 0 in custom functions."""
    if not torch._C._are_functorch_transforms_active():
        return False
    return sum(level.key() == TransformType.Jvp for level in get_interpreter_stack() or ()) > 1


def _by_torch(func: Any, x: Tensor, *rest: Any, **kwargs: Any) -> Any:
    """A function with the derivatives that torch has, which keep the fewer digits the smaller they are beside 1."""
    if (monitor := _MONITOR.get()) is not None:
        monitor.vanished, slope = True, 0.0
        if func in _FUNCTIONS:
            given = {k: v for k, v in kwargs.items() if k != "inplace"}
            with temporarily_clear_interpreter_stack(), torch.no_grad():
                slopes = _FUNCTIONS[func](*rest, **given).slope(untransformed(x)).abs()
                slope = float(slopes.min()) if slopes.numel() else 1.0
        monitor.amplify(1 / max(slope, torch.finfo(x.dtype).eps))
    return func(x, *rest, **kwargs)


def untransformed(t: Tensor) -> Tensor:
    """The numbers of a tensor inside transforms of `torch.func`, recorded where they are: batches of `vmap` come first.

    Example:
        >>> seen = []
        >>> def f(row):
        ...     seen.append(untransformed(row))
        ...     return row.sum()
        >>> _ = torch.func.vmap(torch.func.grad(f))(torch.ones(3, 2))
        >>> seen[0].shape
        torch.Size([3, 2])
    """
    axes = list(range(t.ndim))
    while is_functorch_wrapped_tensor(t):
        if is_batchedtensor(t):
            batch = maybe_get_bdim(t)
            axes = [batch, *(axis + (axis >= batch) for axis in axes)]
        t = get_unwrapped(t)
    # At once and outside: a transform of a tensor that is still inside another one would need that to run.
    return t if axes == sorted(axes) else t.permute(axes)


def _outside(x: Tensor) -> AbstractContextManager[Any]:
    """Meanwhile numbers can be looked at that lie inside transforms."""
    return temporarily_clear_interpreter_stack() if is_functorch_wrapped_tensor(x) else nullcontext()


def _finite(x: Tensor) -> bool:
    with _outside(x):
        return bool(torch.isfinite(untransformed(x)).all())


def _note(monitor: Monitor, x: Tensor, f: ScalarFunction) -> None:
    """Remember what derivatives of one call amplify, where they arrive, and whether its value has vanished."""
    if x.requires_grad:
        monitor.edges.append(get_gradient_edge(x))
    inside = is_functorch_wrapped_tensor(x)
    # Inside a transform the gradients of two passes cannot be compared.
    monitor.vanished = monitor.vanished or inside
    with _outside(x), torch.no_grad():
        z, tiny = untransformed(x).detach(), torch.finfo(x.dtype).tiny
        slope = f.slope(z)
        monitor.least = min(monitor.least, float(slope.abs().min()) if z.numel() else math.inf)
        change = (z * f.curvature(z) / slope).abs()
        steep = change[(slope.abs() >= tiny) & (slope.abs() < 0.1)]
        monitor.amplify(float(steep.max()) if steep.numel() else 0.0)
        subnormal = slope.abs()[(slope != 0) & (slope.abs() < tiny)]
        # Below the smallest normal number the spacing is the same everywhere.
        monitor.amplify(min(tiny / float(subnormal.min()), 1 / torch.finfo(x.dtype).eps) if subnormal.numel() else 0.0)
        monitor.vanished = monitor.vanished or bool(((f.value(z).abs() < tiny) & (z != 0)).any())


def _softmaxed(made: Any, func: Any, x: Tensor, dim: int | None = None, *rest: Any, **kwargs: Any) -> Tensor:
    """A softmax, or one of its logarithms, along an axis."""
    monitor = _MONITOR.get()
    dtype = next((d for d in (*rest, kwargs.get("dtype")) if isinstance(d, torch.dtype)), None)
    if dim is None or x.ndim == 0:
        return cast(Tensor, func(x, dim, *rest, **kwargs))
    x = x if dtype is None else x.to(dtype)
    if monitor is None:
        # In a loss each rounding counts, and its outputs are few: logarithms are always written out.
        if made is Softmax and not is_functorch_wrapped_tensor(x):
            found = cast(Tensor, func(x, dim))
            if not (x.requires_grad and _nearly_certain(x.detach(), found.detach(), dim)):
                return found
    else:
        if x.requires_grad:
            monitor.edges.append(get_gradient_edge(x))
        monitor.vanished = monitor.vanished or is_functorch_wrapped_tensor(x)
        with _outside(x), torch.no_grad():
            z = untransformed(x).detach()
            axis = dim if dim < 0 else dim + z.ndim - x.ndim
            p, kept = torch.softmax(z, axis), _unsaturated(z, axis) > 0
            monitor.vanished = monitor.vanished or bool(((p < torch.finfo(p.dtype).tiny) & kept).any())
            # The roots of probabilities are what counts: half of the relative error.
            spread = (z.amax(axis, keepdim=True) - z).masked_fill(~kept, 0.0)
            monitor.amplify(float(spread.max()) / 2)
    return cast(Tensor, made.apply(x, dim, monitor is not None and monitor.structural))


def _nearly_certain(x: Tensor, p: Tensor, dim: int) -> bool:
    """Whether some softmax `p` of logits `x` is nearly 1, and by no mask that leaves one alone."""
    most = 1 - _COARSEST
    with _unseen():
        if not p.numel() or bool(p.max() <= most):
            return False
        return not bool((p.amax(dim) <= most).logical_or((x > -math.inf).sum(dim) == 1).all())


def _log_sum_exp(func: Any, x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    if not isinstance(dim, int) or x.ndim == 0 or not _finite(x):
        return cast(Tensor, func(x, dim, keepdim))
    formula = _log_of_sum(x, dim)
    return _valued(func, (x, dim, keepdim), {}, formula if keepdim else formula.squeeze(dim))


def _log_of_sum(x: Tensor, dim: int) -> Tensor:
    logs = _softmaxed(LogSoftmax, torch.log_softmax, x, dim)
    # Of the largest entry, so that the difference has the softmax for its derivative, without cancellation.
    top = x.detach().argmax(dim, keepdim=True)
    return x.gather(dim, top) - logs.gather(dim, top)


def _log_cum_sum_exp(func: Any, x: Tensor, dim: int) -> Tensor:
    """Every partial sum by itself: torch's derivatives take logarithms of 0 and add the largest number to itself."""
    if x.ndim == 0 or x.numel() * x.shape[dim] > _PARTIAL_SUMS or not _finite(x):
        return cast(Tensor, func(x, dim))
    later = torch.ones(x.shape[dim], x.shape[dim], dtype=torch.bool, device=x.device).triu(1)
    sums = x.movedim(dim, -1).unsqueeze(-2).masked_fill(later, -math.inf)
    return _valued(func, (x, dim), {}, _log_of_sum(sums, -1).squeeze(-1).movedim(-1, dim))


def _log_add_exp(func: Any, a: Tensor, b: Tensor) -> Tensor:
    return _valued(func, (a, b), {}, a + _softplus_of(b - a))


_softplus_of = partial(_entrywise, F.softplus)


def _given(old: tuple[Any, ...], kwargs: dict[str, Any], *known: str) -> dict[str, Any] | None:
    """The arguments of a loss that say something; None where one is not known here."""
    given = {k: v for k, v in kwargs.items() if v is not None}
    return None if old or given.keys() - {"reduction", *known} else {"reduction": "mean"} | given


def _binary_cross_entropy(
    func: Any, z: Tensor, y: Tensor, weight: Tensor | None = None, *old: Any, **kwargs: Any
) -> Tensor:
    given, args = _given(old, kwargs, "pos_weight"), (z, y, weight)
    if given is None or y.requires_grad or (_MONITOR.get() is None and _ordinary(z, -2.5, 2.5)):
        return cast(Tensor, func(*args, *old, **kwargs))
    return _valued(func, args, kwargs, _cross_entropy_of_logits(z, y, y * given.get("pos_weight", 1), weight, given))


def _cross_entropy_of_logits(z: Tensor, y: Tensor, ups: Tensor, weight: Tensor | None, given: dict[str, Any]) -> Tensor:
    loss = (1 - y) * _softplus_of(z) + ups * _softplus_of(-z)
    return reduced(loss if weight is None else loss * weight, given["reduction"])


def _of_probabilities(
    func: Any, p: Tensor, y: Tensor, weight: Tensor | None = None, *old: Any, **kwargs: Any
) -> Tensor:
    """Binary cross-entropy of probabilities; torch adds 1e-12 to `p (1 - p)` in derivatives, and not in the value."""
    given, args = _given(old, kwargs), (p, y, weight)
    if given is None or y.requires_grad:
        return cast(Tensor, func(*args, *old, **kwargs))
    if (z := _logits(p)) is not None:
        return _valued(func, args, kwargs, _cross_entropy_of_logits(z, y, y, weight, given))
    monitor, q = _MONITOR.get(), p
    if monitor is not None and monitor.structural:
        q = p - p.detach() + generic(p) / 2
    least = math.exp(-100)  # torch's logarithms end at -100
    loss = -y * q.clamp_min(least).log() - (1 - y) * (1 - q).clamp_min(least).log()
    formula = reduced(loss if weight is None else loss * weight, given["reduction"])
    if not is_functorch_wrapped_tensor(p) and bool((p > 1).any() & (p <= 1 + 4 * torch.finfo(p.dtype).eps).all()):
        return formula  # torch takes no probability that rounding, when it is tried, has put above 1
    return _valued(func, args, kwargs, formula)


def _poisson(func: Any, z: Tensor, y: Tensor, log_input: bool = True, *rest: Any, **kwargs: Any) -> Tensor:
    given = _given(rest, kwargs, "full", "eps")
    if given is None or not log_input or y.requires_grad:
        return cast(Tensor, func(z, y, log_input, *rest, **kwargs))
    return _valued(func, (z, y), kwargs, reduced(_entrywise(torch.exp, z) - y * z, given["reduction"]))


def _soft_margin(func: Any, z: Tensor, y: Tensor, *old: Any, **kwargs: Any) -> Tensor:
    given = _given(old, kwargs)
    if given is None:
        return cast(Tensor, func(z, y, *old, **kwargs))
    return _valued(func, (z, y), kwargs, reduced(_softplus_of(-y * z), given["reduction"]))


def _cross_entropy(func: Any, z: Tensor, y: Tensor, weight: Tensor | None = None, *old: Any, **kwargs: Any) -> Tensor:
    given = _given(old, kwargs, "ignore_index", "label_smoothing")
    if given is None or z.ndim == 0:
        return cast(Tensor, func(z, y, weight, *old, **kwargs))
    axis, smoothing, reduction = int(z.ndim > 1), given.get("label_smoothing", 0.0), given["reduction"]
    logs = _softmaxed(LogSoftmax, F.log_softmax, z, axis)
    if not y.is_floating_point() and smoothing == 0:
        # One argument: torch.func would take a dict apart.
        chosen = MappingProxyType({k: v for k, v in given.items() if k != "label_smoothing"})
        return cast(Tensor, Likelihood.apply(logs, y, weight, axis, chosen))
    shape = [-1 if d == axis else 1 for d in range(z.ndim)]
    weights = torch.ones_like(z) if weight is None else weight.view(shape).expand_as(z)
    if y.is_floating_point():
        targets, total = y * (1 - smoothing) + smoothing / z.shape[axis], z.numel() / z.shape[axis]
    else:
        kept = (y != given.get("ignore_index", -100)).unsqueeze(axis).to(z)
        hard = torch.zeros_like(z).scatter(axis, torch.where(kept > 0, y.unsqueeze(axis), 0), 1.0) * kept
        targets, total = hard * (1 - smoothing) + kept * smoothing / z.shape[axis], (hard * weights).sum()
    loss = -(logs * targets * weights).sum(axis)
    formula = loss.sum() / total if reduction == "mean" else reduced(loss, reduction)
    return _valued(func, (z, y, weight), kwargs, formula)


def _glu(func: Any, x: Tensor, dim: int = -1) -> Tensor:
    kept, gate = x.chunk(2, dim)
    return _valued(func, (x, dim), {}, kept * _entrywise(torch.sigmoid, gate))


def _attention(
    func: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if dropout_p or q.is_nested or (scale is not None and scale <= 0):
        given = {"scale": scale, "enable_gqa": enable_gqa}
        return cast(Tensor, func(q, k, v, attn_mask, dropout_p, is_causal, **given))
    # As torch's math kernel computes it, whose values these are.
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    logits = (q * root) @ (k * root).transpose(-2, -1)
    mask = attn_mask
    if is_causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    p = _softmaxed(Softmax, torch.softmax, logits, -1)
    if mask is not None:
        # A row with nothing to attend to gives zeros.
        p = torch.where((logits == -math.inf).all(-1, keepdim=True), 0.0, p)
    return p @ v


def _unit(act: Entrywise, x: Tensor, state: list[Tensor], w: Tensor, u: Tensor, *b: Tensor) -> list[Tensor]:
    return [act(sum(b, F.linear(x, w) + F.linear(state[0], u)))]


_tanh_unit, _relu_unit = partial(_unit, partial(_entrywise, torch.tanh)), partial(_unit, torch.relu)


def _lstm_unit(x: Tensor, state: list[Tensor], w: Tensor, u: Tensor, *b: Any) -> list[Tensor]:
    # The fifth weight, if there is one, projects what is put out.
    *biases, project = b if len(b) % 2 else (*b, None)
    i, f, g, o = sum(biases, F.linear(x, w) + F.linear(state[0], u)).chunk(4, -1)
    kept = _entrywise(torch.sigmoid, f) * state[1]
    kept = kept + _entrywise(torch.sigmoid, i) * _entrywise(torch.tanh, g)
    out = _entrywise(torch.sigmoid, o) * _entrywise(torch.tanh, kept)
    return [out if project is None else F.linear(out, project), kept]


def _gru_unit(x: Tensor, state: list[Tensor], w: Tensor, u: Tensor, *b: Tensor) -> list[Tensor]:
    inner, outer = (F.linear(t, m, *c).chunk(3, -1) for t, m, c in ((x, w, b[:1]), (state[0], u, b[1:])))
    r, z = _entrywise(torch.sigmoid, inner[0] + outer[0]), inner[1] + outer[1]
    new = _entrywise(torch.tanh, inner[2] + r * outer[2])
    return [_entrywise(torch.sigmoid, -z) * new + _entrywise(torch.sigmoid, z) * state[0]]


def _recurrent(unit: Callable[..., list[Tensor]], x: Tensor, *args: Any) -> list[Tensor] | None:
    """A recurrent layer step by step, `x` a padded or a packed sequence; None if it is random."""
    sizes = args[0].tolist() if isinstance(args[0], Tensor) and not args[0].is_floating_point() else None
    hx, weights, _, layers, dropout, train, both, *first = args if sizes is None else args[1:]
    if dropout and train:
        return None
    axis = int(bool(first and first[0]))
    steps = list(x.unbind(axis) if sizes is None else torch.split(x, sizes))
    states, ends, count = [hx] if isinstance(hx, Tensor) else [*hx], [], len(weights) // (layers * (1 + both))
    for layer in range(layers):
        outs = []
        for back in range(1 + both):
            index = layer * (1 + both) + back
            state, out = [s[index] for s in states], []
            for step in reversed(steps) if back else steps:
                new = unit(step, [s[: len(step)] for s in state], *weights[index * count : (index + 1) * count])
                state = [torch.cat([n, s[len(step) :]]) for n, s in zip(new, state, strict=True)]
                out.append(new[0])
            outs.append(out[::-1] if back else out)
            ends.append(state)
        steps = [torch.cat(parts, -1) for parts in zip(*outs, strict=True)]
    return [torch.cat(steps) if sizes else torch.stack(steps, axis), *map(torch.stack, zip(*ends, strict=True))]


def _cell(unit: Callable[..., list[Tensor]], x: Tensor, hx: Any, *weights: Tensor | None) -> list[Tensor] | None:
    return unit(x, [hx] if isinstance(hx, Tensor) else [*hx], *(w for w in weights if w is not None))


def _gated(make: Callable[..., list[Tensor] | None], func: Any, *args: Any) -> Any:
    """A recurrent layer or cell by smooth functions where its gates saturate: its own kernels are faster."""
    if _MONITOR.get() is None:
        if not any(t.requires_grad for t in tensors_of(args)):
            return func(*args)
        with torch.no_grad(), monitoring() as seen:
            make(*args)
        if seen.least > _COARSEST and not seen.vanished:
            return func(*args)
    formulas = make(*args)
    if formulas is None:
        return func(*args)
    if len(formulas) == 1:
        return _valued(func, args, {}, formulas[0])
    with torch.no_grad():
        values = func(*args)
    return tuple(Valued.apply(v.detach(), f) for v, f in zip(values, formulas, strict=True))


def _named(func: Any, call: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement under the function's name, by which the recorder of a graph knows it."""

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return call(func, *args, **kwargs)

    replacement.__name__ = func.__name__
    return replacement


#: Recurrent layers and cells of torch -> the same by a loop over time, whose products are calls of `F.linear`; the
#: output and the last states in a list, None where the layer is random.
LOOPS: dict[Any, Callable[..., list[Tensor] | None]] = {
    getattr(torch, name + suffix): partial(call, unit)
    for name, unit in (("rnn_tanh", _tanh_unit), ("rnn_relu", _relu_unit), ("lstm", _lstm_unit), ("gru", _gru_unit))
    for suffix, call in (("", _recurrent), ("_cell", _cell))
}

_REPLACED: dict[Any, Callable[..., Any]] = {
    **{func: _named(func, _entrywise) for func in _FUNCTIONS},
    **{f: _named(f, partial(_softmaxed, Softmax)) for f in _all("softmax", inplace=False)},
    **{f: _named(f, partial(_softmaxed, LogSoftmax)) for f in _all("log_softmax", inplace=False)},
    **{f: _named(f, _log_sum_exp) for f in _all("logsumexp", inplace=False)},
    **{f: _named(f, _log_cum_sum_exp) for f in _all("logcumsumexp", inplace=False)},
    **{f: _named(f, _log_add_exp) for f in _all("logaddexp", inplace=False)},
    F.binary_cross_entropy_with_logits: _named(F.binary_cross_entropy_with_logits, _binary_cross_entropy),
    F.binary_cross_entropy: _named(F.binary_cross_entropy, _of_probabilities),
    F.poisson_nll_loss: _named(F.poisson_nll_loss, _poisson),
    F.soft_margin_loss: _named(F.soft_margin_loss, _soft_margin),
    F.cross_entropy: _named(F.cross_entropy, _cross_entropy),
    F.glu: _named(F.glu, _glu),
    # Rectifiers do not saturate.
    **{f: _named(f, partial(_gated, loop)) for f, loop in LOOPS.items() if "relu" not in f.__name__},
    F.scaled_dot_product_attention: _named(F.scaled_dot_product_attention, _attention),
}

# What becomes of probabilities whose logits are known: functions of them, and functions that only move entries.
_PROBABILITIES: dict[Any, Callable[..., Any]] = {
    **{f: _named(f, partial(_of_logits, lambda z: z)) for f in _all("logit", inplace=False)},
    **{f: _named(f, partial(_of_logits, partial(_entrywise, F.logsigmoid))) for f in _all("log", inplace=False)},
    **{f: _named(f, _complement) for f in (torch.rsub, Tensor.__rsub__)},
}
_MOVES = {
    f
    for name in ("squeeze", "unsqueeze", "view", "reshape", "flatten", "transpose", "permute", "movedim", "__getitem__")
    for f in _all(name, inplace=False)
}
_ON_PROBABILITIES = _MOVES | _PROBABILITIES.keys()


class Accurate(TorchFunctionMode):
    """Functions called inside have torch's values, and derivatives of any order that keep their digits."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = args and func in _ON_PROBABILITIES and _logits(args[0]) is not None
        if known and func in _MOVES:
            found = func(*args, **kwargs)
            _mark(found, func(_logits(args[0]), *args[1:], **kwargs))
            return found
        if (replacement := _PROBABILITIES[func] if known else _REPLACED.get(func)) is not None:
            if (torch.is_grad_enabled() or _MONITOR.get()) and _plain(args) and kwargs.get("out") is None:
                if _forwards_twice():
                    return _by_torch(func, *args, **kwargs)
                if torch._C._len_torch_function_stack():
                    return handle_torch_function(replacement, (args[0],), *args, **kwargs)
                return replacement(*args, **kwargs)
        elif (inside := _INSIDE.get(func)) is not None:
            with self:
                return inside(*args, **kwargs)
        return func(*args, **kwargs)


def _plain(args: tuple[Any, ...]) -> bool:
    """Whether the first argument is a real tensor of no other class."""
    return bool(args) and type(args[0]) in (Tensor, torch.nn.Parameter) and args[0].is_floating_point()


def _opened(func: Any) -> Any:
    """A function of torch that is written in Python, so that the calls inside it are seen in its place."""
    space = {**func.__globals__, "has_torch_function": lambda *_: False}
    space["has_torch_function_variadic"] = space["has_torch_function_unary"] = space["has_torch_function"]
    copy = FunctionType(func.__code__, space, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


# Read through to the calls inside.
_COMPOSITE = (F.multi_head_attention_forward, F.multilabel_soft_margin_loss, F.softmin)
_INSIDE = {func: _opened(func) for func in _COMPOSITE} | FORMS
