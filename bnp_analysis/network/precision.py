"""The precision in which a risk and its products are really computed, and the effect of rounding."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from bnp_analysis.errors import BNPAnalysisError
from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.network.kernels import KernelMode, recording
from bnp_analysis.runtime.random import random_state
from bnp_analysis.runtime.trees import map_tensors, tensors_of

if TYPE_CHECKING:
    from bnp_analysis.network.risk import EmpiricalRisk

T = TypeVar("T")

# Roundings that radii allow for anyway.
_USUAL = 4
# More noise than float64 explains, in a layer relative to its derivatives.
_STEPS = 1e-10
# Examples that are run: operations, and their dtypes, do not depend on how many there are.
_FEW = 8
# A layer whose derivatives are smaller than this share of the largest, squared, has no effect.
_EFFECT = 1e-8
# Under which name a risk remembers its generic point.
GENERIC = "generic point"
_OUTSIDE = "a value computed outside of torch"
_DIGITS = {d for d in vars(torch).values() if isinstance(d, torch.dtype) and (d.is_floating_point or d.is_complex)}
# Operations that choose among numbers, move or negate them: nothing is rounded.
_CHOOSE = {"topk", "sort", "max", "min", "amax", "amin", "aminmax", "median", "nanmedian", "kthvalue", "mode", "where"}
_CHOOSE |= {"maximum", "minimum", "fmax", "fmin", "clamp", "clamp_min", "clamp_max", "relu", "threshold_backward"}
_CHOOSE |= {"neg", "abs", "clone", "to_copy", "cat", "stack", "gather", "index", "index_select", "take", "embedding"}
_CHOOSE |= {"flip", "roll", "repeat", "constant_pad_nd", "masked_fill", "scatter", "tril", "triu", "unfold_copy"}
_CHOOSE |= {"index_fill", "masked_select", "max_pool2d_with_indices", "max_pool3d_with_indices", "nan_to_num"}
# Integers of the same size in bytes.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Dtypes that values may have passed through unseen, coarsest first.
_COARSE = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Precision:
    """The coarsest dtype that anything which depends on the parameters passes through.

    Attributes:
        dtype: that dtype.
        cause: the operation and the module that lowered it; empty where it is the risk's own.
        noise: what was measured of a coarser dtype's rounding, relative: more where what it rounded cancels.
        outside: whether values came from outside of torch, which may have passed through anything.

    Example:
        >>> print(Precision(torch.float32, "softmax in block.2"), Precision(torch.float64).eps == 2.0**-52)
        float32 (softmax in block.2) True
    """

    dtype: torch.dtype
    cause: str = ""
    noise: float = 0.0
    outside: bool = False

    @property
    def eps(self) -> float:
        """The spacing of its numbers at 1, or the noise."""
        return max(float(torch.finfo(self.dtype).eps), self.noise)

    def __str__(self) -> str:
        cause = self.cause + (f", noise {self.noise:.0e}" if self.noise else "")
        return str(self.dtype).removeprefix("torch.") + (f" ({cause})" if cause else "")


def find_precision(risk: EmpiricalRisk) -> Precision:
    """The precision of a risk and its products, from one recorded gradient on a few examples.

    Every operation is seen below autograd and autocast, with the dtypes that its kernel gets. What depends on a
    parameter, free or constant, and comes out in a coarser dtype than the risk's has lost digits, unless it was cast
    and all its values survived (masks, signs, whole numbers). Data and constants may be in any dtype: they are what
    they are. A value that comes back from outside of torch (NumPy, an extension) shows by its digits what it was
    rounded to, or else by the steps in which the outputs move.

    Args:
        risk: the empirical risk.

    Returns:
        The coarsest over all processes.
    """
    found: list[Precision] = risk.group.share(lambda: _own_precision(risk), "the precision of the products")
    return max(found, key=lambda precision: precision.eps)


def generic_point(risk: EmpiricalRisk) -> Tensor:
    """A point 1 % from `theta` in every tensor, without its coincidences.

    Such are biases of zero, which put layers on the kink of a ReLU, and a zero output layer, which hides all below it.
    """

    def point() -> Tensor:
        g = torch.Generator().manual_seed(0)
        tensors = risk.space.unflatten(risk.theta).values()
        noise = (0.01 * size_of(t) * torch.randn(t.shape, generator=g).to(t) for t in tensors)
        return risk.theta + risk.space.flatten(noise)

    return risk.remembered(GENERIC, point)


def size_of(t: Tensor) -> float:
    """The root mean square of a tensor's entries, 1 for zeros."""
    return float(t.double().square().mean().sqrt()) or 1.0


def _own_precision(risk: EmpiricalRisk) -> Precision:
    batch = next((b for b in risk.batches), None)
    if batch is None:
        return Precision(risk.space.dtype)
    few = slice_batch(batch, 0, _FEW) if tensors_of(batch.x)[0].shape[0] > _FEW else None
    failed = ""
    for one in (batch,) if few is None else (few, batch):
        try:
            with random_state(device=risk.space.device), _attributes_kept(risk):
                return _recorded(risk, one)
        except Exception as error:
            # A model may want whole batches; what fails there too fails in the next pass, or cannot be recorded.
            failed = f"not recorded: {type(error).__name__}"
    return Precision(risk.space.dtype, failed)


@contextmanager
def _attributes_kept(risk: EmpiricalRisk) -> Iterator[None]:
    """What modules keep between calls is afterwards what it was: a state of few examples fits no others."""
    before = [(vars(module), dict(vars(module))) for _, module in risk.modules()]
    try:
        yield
    finally:
        for now, then in before:
            now.clear()
            now.update(then)


@recording()
def _recorded(risk: EmpiricalRisk, batch: Batch) -> Precision:
    free = risk.space.unflatten(generic_point(risk))
    tensors = {
        name: t.detach().clone().requires_grad_() if t.is_floating_point() or t.is_complex() else t
        for name, t in (risk.named_tensors() | free).items()
    }
    leaves = [t for t in tensors.values() if t.requires_grad]
    constants = [t for _, module in risk.modules() for t in module._buffers.values() if t is not None]
    running: list[str] = []
    record = _Record(risk.space.dtype, leaves, [*constants, *tensors_of((batch.x, batch.y))], running)
    with record, around_modules(risk, lambda name: running.append(name or "the model"), lambda _: running.pop()):
        outputs = risk.batch_outputs(tensors, batch)
        running[:] = ["the loss"]
        loss = risk.batch_loss(outputs, batch, tensors)
        running[:] = ["the backward pass"]
        record.backward = True
        if loss.requires_grad:
            torch.autograd.grad(loss, leaves, allow_unused=True)
    found = record.coarsest()
    if risk.space.dtype != torch.float64 or found.eps > torch.finfo(torch.float32).eps:
        return found
    if found.cause or record.unknown:
        noise = _noise(risk, batch)
        if not found.cause and noise > _STEPS:
            found = Precision(torch.float32, record.unknown)
        if found.cause and noise > _USUAL * found.eps:
            return replace(found, noise=noise)
    return found


def _noise(risk: EmpiricalRisk, batch: Batch) -> float:
    """The noise of `J^T u`, relative, in the worst layer: from third differences along a line, as a function has none.

    Over steps `t = 2^-16` they are of size `t^3` for a smooth function and `1e-16` for float64; a value rounded to
    float32 in between moves in steps of `1e-7` of itself, which what cancels afterwards makes larger.

    Source: More and Wild 2011, estimating computational noise.
    """
    origin = generic_point(risk)
    g = torch.Generator().manual_seed(1)
    step = 2.0**-16 * (1 + origin.abs()) * torch.randn(risk.space.dim, generator=g, dtype=torch.float64).to(origin)
    rows = []
    for k in (-3, -1, 1, 3):
        tensors = {n: t.clone().requires_grad_() for n, t in risk.space.unflatten(origin + k * step).items()}
        outputs = risk.batch_outputs(tensors, batch)
        cotangent = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        rows.append(risk.pullback((outputs * cotangent.to(outputs)).sum(), tensors))
    third = (rows[3] - 3 * rows[2] + 3 * rows[1] - rows[0]) / 20**0.5
    noise, size = (risk.space.unflatten(t.square()) for t in (third, rows[1]))
    return math.sqrt(worst_layer({n: (float(noise[n].sum()), float(t.sum())) for n, t in size.items()}))


def worst_layer(tensors: Mapping[str, tuple[float, float]]) -> float:
    """The largest share of the noise of a layer in its size, from squares of both by tensors `(noise, size)`."""
    layers: dict[str, list[float]] = {}
    for name, squares in tensors.items():
        layer = layers.setdefault(name.rpartition(".")[0], [0.0, 0.0])
        layer[:] = [a + b for a, b in zip(layer, squares, strict=True)]
    # In a layer without effect all is noise.
    floor = _EFFECT * max(size for _, size in layers.values())
    return max((noise / size for noise, size in layers.values() if size > floor), default=0.0)


@contextmanager
def around_modules(
    risk: EmpiricalRisk, enter: Callable[[str], object], leave: Callable[[str], object]
) -> Iterator[None]:
    """Meanwhile a module's forward pass begins with `enter(name)` and ends, also by an error, with `leave(name)`."""
    with ExitStack() as hooks:
        for name, module in risk.modules():

            def entered(module: Any, args: Any, name: str = name) -> None:
                enter(name)

            def left(module: Any, args: Any, output: Any, name: str = name) -> None:
                leave(name)

            hooks.enter_context(module.register_forward_pre_hook(entered))
            hooks.enter_context(module.register_forward_hook(left, always_call=True))
        yield


class _Record(KernelMode):
    """Follows what depends on the parameters, by storage, through every kernel that runs.

    Args:
        own: the risk's dtype.
        leaves: the parameters.
        given: data and buffers.
        running: ends with the name of the module that runs.
    """

    def __init__(self, own: torch.dtype, leaves: list[Tensor], given: list[Tensor], running: list[str]) -> None:
        super().__init__()
        self._running = running
        self.backward = False
        self._own = own
        # Places of memory; weak references keep them from being given away, and none of the memory.
        self._places: dict[int, StorageWeakRef] = {}
        self._dependent = {place for t in leaves if (place := self._place(t))}
        self._seen = self._dependent | {place for t in given if (place := self._place(t))}
        self._constants: set[int] = set()
        # Where a value came from outside of torch whose digits do not tell what it was rounded to.
        self.unknown = ""
        self.outside = False
        self.causes: dict[torch.dtype, tuple[bool, str]] = {}

    def coarsest(self) -> Precision:
        """What was found."""
        dtype = max(self.causes, key=lambda d: torch.finfo(d).eps, default=self._own)
        return Precision(dtype, self.causes.get(dtype, (False, ""))[1], outside=self.outside)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [t for t in tensors_of((args, kwargs) if kwargs else args) if t.dtype in _DIGITS]
        places = [self._place(t) for t in inputs]
        seen = self._seen
        for t, place in zip(inputs, places, strict=True):
            if place and place not in seen:
                self._look(t, place)
        out = func(*args, **(kwargs or {}))
        foreign = [place for place in places if place not in seen]
        dependent, name = not self._dependent.isdisjoint(places), ""
        for t in (out,) if isinstance(out, Tensor) else tensors_of(out):
            if t.dtype not in _DIGITS or not (place := self._place(t)):
                continue
            if place not in foreign:
                seen.add(place)
            if not dependent:
                continue
            name = name or func.overloadpacket.__name__
            if name.endswith("_like") or name.startswith("new_"):
                break
            if self._coarse(t.dtype):
                source = inputs[-1]
                cast = name in ("_to_copy", "copy_")
                # A real number as a complex one is cast back by its real part.
                values = torch.view_as_real(t)[..., 0] if t.is_complex() and not source.is_complex() else t
                if cast and source.dtype != t.dtype and bool((values.to(source.dtype) == source).all()):
                    continue
                if not func.is_view:
                    self._note(t.dtype, name, cast=cast)
            self._dependent.add(place)
        return out

    def _place(self, t: Tensor) -> int:
        """Where the memory of a tensor lies, 0 where it has none of its own (sparse tensors)."""
        try:
            storage = t.untyped_storage()
        except RuntimeError:
            return 0
        place: int = storage._cdata
        if place not in self._places:
            self._places[place] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
        return place

    def _look(self, t: Tensor, place: int) -> None:
        """A tensor that no kernel has made came from outside; if a derivative goes through it, it is a value."""
        if self.backward and (t.ndim == 0 or place in self._constants):
            return
        if not self.backward and (t._base if t._base is not None else t).is_leaf:
            self._constants.add(place)
            return
        self._seen.add(place)
        self._dependent.add(place)
        self.outside = True
        values = t.detach()
        for dtype in (t.dtype,) if self._coarse(t.dtype) else filter(self._coarse, _COARSE):
            # Whole numbers are masks, signs and counts.
            if t.dtype == dtype or bool(
                (values.to(dtype).to(t.dtype) == values).all() and (values != values.round()).any()
            ):
                self._note(dtype, _OUTSIDE, cast=False)
                return
        self.unknown = self.unknown or f"{_OUTSIDE} in {self._where()}"

    def _coarse(self, dtype: torch.dtype) -> bool:
        return dtype is not self._own and torch.finfo(dtype).eps > torch.finfo(self._own).eps

    def _note(self, dtype: torch.dtype, name: str, *, cast: bool) -> None:
        """The first operation in a dtype is its cause; a cast only until one follows that computes with it."""
        dtype = dtype.to_real()
        before = self.causes.get(dtype)
        if before is None or (before[0] and not cast):
            what = "a cast" if cast else name.strip("_")
            self.causes[dtype] = (cast, f"{what} in {self._where()}")

    def _where(self) -> str:
        return self._running[-1] if self._running else "the model"


class Perturbed(KernelMode):  # type: ignore[no-untyped-call]
    """Every number that an operation computes is moved up or down, by half a unit roundoff to two and a half (CESTAC).

    With moves of one size, those of two operations (`p = sigmoid(z)`, `-p`) cancel exactly in half of all trials. A
    move depends on the number and the kind of operation alone: equal numbers stay equal, so that maxima over ties are
    taken at the same places, and what is computed twice is the same; unless `alike` is off, for differences of nearly
    equal evaluations. With `shrinking` all moves go toward zero.

    Source: Vignes 1993.
    """

    def __init__(self, seed: int, *, alike: bool = True, shrinking: bool = False) -> None:
        super().__init__()
        self._seed, self._alike, self._shrinking = seed, alike, shrinking
        self._calls = 0
        # Whether finite numbers gave an infinite one: its reciprocal is a zero that means nothing.
        self.overflowed = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(r.alias_info is not None for r in func._schema.returns):
            return out
        # Zeros without memory, which autograd makes, cannot be looked at.
        inputs = [t for t in tensors_of((args, kwargs or {})) if not (t._is_zerotensor() or t.is_meta)]
        given = {id(t) for t in inputs}
        numbers = [a for a in args if isinstance(a, float | int) and not isinstance(a, bool)]
        if any(bool(t.isinf().any()) for t in tensors_of(out) if _has_numbers(t)):
            finite = all(map(math.isfinite, numbers)) and not any(bool(t.isinf().any()) for t in inputs)
            self.overflowed = self.overflowed or finite
        if not given:
            return out
        name = func.overloadpacket.__name__.strip("_")
        if name in _CHOOSE:
            return out
        product = func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.div) and all(numbers)

        def moved(t: Tensor) -> Tensor:
            if id(t) in given or not _has_numbers(t):
                return t
            number = torch.finfo(t.dtype)
            unit = t * number.eps
            if product and bool((lost := t.abs() < number.tiny).any()):
                # What underflows has an error as large as the least number, which a large factor may bring back.
                for factor in inputs:
                    lost = lost & (factor != 0)
                unit = unit + number.tiny * lost.to(t)
            found = t + self._moves(t, name) * unit
            # The largest number, which stands for infinity in some kernels, is not moved beyond itself.
            return found if bool(found.isfinite().all()) else torch.where(found.isinf(), t, found)

        return map_tensors(out, moved)

    def _moves(self, t: Tensor, name: str) -> Tensor:
        """Between 0.5 and 2.5 with signs, from the bits of numbers: the same on every device."""
        bits = t.contiguous().view(_BITS[t.element_size()]).long()
        self._calls += not self._alike
        mixed = (bits ^ _key(f"{self._seed} {self._calls} {name}")).mul_(0x1E3779B97F4A7C15)
        mixed.bitwise_xor_(mixed >> 29).mul_(0x3F58476D1CE4E5B9)
        # Sixteen bits for the size in units of 2^-15, and one for the sign; float32 holds them all, float16 does not.
        size = (mixed >> 32).bitwise_and_(0xFFFF).add_(1 << 14)
        sign = -1 if self._shrinking else (mixed << 13).bitwise_right_shift_(63).bitwise_or_(1)
        return (size.mul_(sign).double() / 2**15).to(t)


@lru_cache(maxsize=1024)
def _key(name: str) -> int:
    return random.Random(name).getrandbits(62)


def perturbed(seed: int, compute: Callable[[], T], *, alike: bool = True) -> tuple[T, bool] | None:
    """What is computed with every operation's rounding moved (`Perturbed`), and whether it overflowed.

    A probability of 1 may be moved beyond it, where no rounding would bring it and `binary_cross_entropy` is not
    defined: then all moves go toward zero. None where that fails too.
    """
    for shrinking in (False, True):
        with suppress(RuntimeError, ValueError, BNPAnalysisError):
            with Perturbed(seed, alike=alike, shrinking=shrinking) as moves:
                found = compute()
            return found, moves.overflowed
    return None


def _has_numbers(t: Tensor) -> bool:
    return t.is_floating_point() and not t._is_zerotensor() and not t.is_meta
