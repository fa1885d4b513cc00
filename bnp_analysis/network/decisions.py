"""Decisions in a pass that depend on random numbers, the clock or counters, which differ between passes."""

from __future__ import annotations

import gc
import itertools
import math
import operator
import os
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bnp_analysis.network.observation import empty, reached
from bnp_analysis.runtime.trees import tensors_of

# Runs of a pass with decisions turned around.
_MOST_RUNS = 24
_BELOW_ONE = math.nextafter(1.0, 0.0)
_UNBOUNDED = (-math.inf, math.inf)
_CLOCKS = [f for name, f in vars(time).items() if name.removesuffix("_ns") in ("time", "perf_counter", "monotonic")]
_CLOCKS += [time.process_time, time.process_time_ns, time.thread_time, time.thread_time_ns]
_RANDOM: tuple[str, ...] = ("random", "getrandbits", "randint", "randrange", "uniform", "gauss", "normalvariate")
_RANDOM += ("expovariate", "betavariate", "gammavariate", "lognormvariate", "triangular", "vonmisesvariate")
_RANDOM += ("paretovariate", "weibullvariate", "choice")
_NUMPY: tuple[str, ...] = ("rand", "randn", "random", "random_sample", "ranf", "sample", "uniform", "normal", "choice")
_NUMPY += ("standard_normal", "randint", "poisson", "binomial", "beta", "gamma", "exponential", "geometric")
_NUMPY += ("permutation", "lognormal")
_FROM_ZERO_TO_ONE = {"random", "rand", "rand_like", "random_sample", "ranf", "sample"}
# What is called below Python's own functions: nobody else's frame lies between.
_OUTSIDE = {"urandom", "getrandom", "now", "utcnow", "today", "random", "getrandbits"} | {f.__name__ for f in _CLOCKS}
_THROUGH = {"random", "secrets", "uuid", "statistics", "datetime", "_pydatetime", "numpy"}
# Whose decisions show nothing of the model: they print, wait and write.
_LIBRARIES = {*sys.stdlib_module_names, "torch", "tqdm", "bnp_analysis"} - {"__main__"}
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_ALONE: dict[str, Callable[..., Any]] = {"neg": operator.neg, "pos": operator.pos, "abs": abs, "round": round}
_ALONE |= {"floor": math.floor, "ceil": math.ceil, "trunc": math.trunc}
_MONOTONE = {"add", "sub", "mul", "truediv"}
_COMPARED = ("lt", "le", "gt", "ge", "eq", "ne")
_COMPARED_TENSORS = {name: name for name in _COMPARED}
_COMPARED_TENSORS |= {"greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "not_equal": "ne"}
_INDEXED = {"__getitem__", "index_select", "gather", "take", "embedding"}
_KEEP_BOUNDS = {"__getitem__", "clone", "to", "float", "double", "squeeze", "unsqueeze", "view", "reshape", "expand"}
_KEEP_BOUNDS |= {"detach", "select", "item", "flatten", "type_as", "cpu", "expand_as", "max", "min", "amax", "amin"}
_LEAVES_TORCH = {"__float__", "__int__", "__index__", "tolist", "numpy", "__array__", "__complex__"}


@contextmanager
def sources(found: dict[str, None], ours: str = "") -> Iterator[None]:
    """Meanwhile calls of the clock and of generators by a user's code are named in `found`: `"time.time at net.py:3"`.

    Calls through frames of the module `ours` are not. Nothing is seen while another profiler runs.

    Example:
        >>> import time
        >>> seen = {}
        >>> with sources(seen):
        ...     exec("t = time.time()", {"time": time, "__name__": "mine"})
        >>> [*seen]
        ['time.time at <string>:1']
    """

    def look(frame: FrameType, event: str, called: Any) -> None:
        if event != "c_call" or (name := getattr(called, "__name__", "")) not in _OUTSIDE:
            return
        owner = getattr(called, "__self__", None)
        if isinstance(owner, random.Random) and owner is not random._inst:
            return
        if name in ("random", "getrandbits") and owner is not random._inst:
            return
        what, above = name, frame
        while _package(above) in _THROUGH and above.f_back is not None:
            what, above = above.f_code.co_name, above.f_back
        if above.f_globals.get("__name__") == ours:
            return
        where = _place(above)
        if where:
            kind = "random" if isinstance(owner, random.Random) else getattr(owner, "__name__", type(owner).__name__)
            found[f"{kind}.{what}{where}"] = None

    if sys.getprofile() is not None:
        yield
        return
    try:
        sys.setprofile(look)
        yield
    finally:
        sys.setprofile(None)


class State:
    """Numbers, iterators and source functions within reach of a model and a loss, and which of them a pass changed.

    Args:
        roots: the model and the loss.
    """

    def __init__(self, roots: list[Any]) -> None:
        self.within = [*reached(roots)]
        self.spaces = _namespaces(self.within)
        self._going = [x for x in self.within if isinstance(x, itertools.count | types.GeneratorType)]
        self.begin()

    def begin(self) -> None:
        """Remembers what there is now."""
        self._before = self._numbers()
        self._progress = [_progress(x) for x in self._going]
        self._environment = _environment()

    def variables(self) -> list[tuple[Any, Any, Any]]:
        """`(namespace, key, value)` of all that there is."""
        return [(space, key, space[key]) for space in self.spaces for key in [*space]]

    def _numbers(self) -> dict[tuple[int, Any], tuple[Any, Any]]:
        return {
            (id(space), key): (space, len(value) if type(value) is list else value)
            for space, key, value in self.variables()
            if isinstance(value, int | float) or type(value) is list
        }

    def changed(self) -> list[tuple[Any, Any]]:
        """`(namespace, key)` of numbers that are others now."""
        return [
            (space, key[1])
            for key, (space, value) in self._numbers().items()
            if key in self._before and not _same(self._before[key][1], value)
        ]

    def moved(self) -> list[str]:
        """What went on and cannot be set: iterators, generators, variables of the environment."""
        found = [
            f"the generator {x.__name__}()" if isinstance(x, types.GeneratorType) else f"an iterator ({was})"
            for x, was in zip(self._going, self._progress, strict=True)
            if _progress(x) != was
        ]
        now = _environment()
        names = {n for n in now.keys() | self._environment.keys() if now.get(n) != self._environment.get(n)}
        return found + [f"os.environ[{os.fsdecode(n)!r}]" for n in sorted(names)]

    def functions(self) -> list[tuple[Any, Any]]:
        """`(namespace, key)` of functions that read the clock or draw numbers."""
        known = _wrapped()
        return [(space, key) for space, key, value in self.variables() if callable(value) and _hashed(value) in known]


def _environment() -> dict[Any, Any]:
    """The variables as they are stored: to decode them all takes as long as a pass of a small network."""
    return dict(vars(os.environ).get("_data", os.environ))


def _progress(x: itertools.count[Any] | types.GeneratorType[Any, Any, Any]) -> Any:
    if isinstance(x, itertools.count):
        return repr(x)
    frame = x.gi_frame
    if frame is None:
        return None
    inner = operator.length_hint(x.gi_yieldfrom, 0)  # of `yield from`
    return frame.f_lasti, inner, [v if isinstance(v, int | float) else id(v) for v in frame.f_locals.values()]


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b)))


def _hashed(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return None
    return value


class _Cells:
    """A closure as a namespace."""

    def __init__(self, function: types.FunctionType) -> None:
        self._cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))

    def __iter__(self) -> Iterator[str]:
        return (name for name, cell in self._cells.items() if not empty(cell))

    def __getitem__(self, name: str) -> Any:
        return self._cells[name].cell_contents

    def __setitem__(self, name: str, value: Any) -> None:
        self._cells[name].cell_contents = value


class _Globals:
    """The global variables that a function names."""

    def __init__(self, function: types.FunctionType) -> None:
        self.all = function.__globals__
        self._names = [name for name in function.__code__.co_names if name in self.all]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __getitem__(self, name: str) -> Any:
        return self.all[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self.all[name] = value


def _namespaces(within: list[Any]) -> list[Any]:
    """Where variables of a model and a loss are: attributes, dictionaries, closures, globals that functions name."""
    found: list[Any] = []
    for value in within:
        if isinstance(value, types.FunctionType):
            if str(value.__module__).partition(".")[0] not in _LIBRARIES:
                found += [_Globals(value), _Cells(value)]
        elif type(value) is dict:
            found.append(value)
        elif type(value).__module__.startswith("torch."):
            continue  # torch's own modules keep no numbers between calls but buffers, of which passes get copies
        elif not isinstance(value, Tensor | type | types.ModuleType) and type(getattr(value, "__dict__", None)) is dict:
            found.append(vars(value))
    return [*{id(space): space for space in found}.values()]


def _wrapped() -> dict[Any, tuple[str, tuple[Any, str]]]:
    """Functions that read the clock or draw numbers -> their kind and where they are usually called."""
    found: dict[Any, tuple[str, tuple[Any, str]]] = {f: ("clock", (time, f.__name__)) for f in _CLOCKS}
    found |= {getattr(random, name): ("random", (random, name)) for name in _RANDOM}
    return found | {
        getattr(np.random, name): ("numpy", (np.random, name)) for name in _NUMPY if hasattr(np.random, name)
    }


class Trail(TorchFunctionMode):
    """A pass whose clock, random numbers and counters are followed to decisions, some of which are turned around.

    Args:
        turned: decisions to turn around, as `taken` names them.
        reseeded: whether the pass seeds its generators itself, so that they are constants.

    Attributes:
        taken: decisions of the pass that could have fallen the other way, `(what, times before)`.
        unseen: where such numbers went that cannot be followed.
    """

    def __init__(self, turned: frozenset[tuple[str, int]] = frozenset(), *, reseeded: bool = False) -> None:
        super().__init__()
        self.taken: list[tuple[str, int]] = []
        self.unseen: dict[str, None] = {}
        self.active, self._thread = True, threading.get_ident()
        self.reseeded = reseeded
        self._turned = turned
        self._times: dict[str, int] = {}
        self._followed: dict[int, tuple[Tensor, tuple[float, float]]] = {}

    @property
    def follows(self) -> bool:
        """Whether it is this thread's pass, and not over."""
        return self.active and threading.get_ident() == self._thread

    def turn(self, what: str, possible: bool = True) -> bool:
        """Whether a decision of the user's code is to be turned around."""
        where = _place(_visible()) if self.follows and possible else ""
        if not where:
            return False
        what = f"{what}{where}"
        times = self._times[what] = self._times.get(what, -1) + 1
        self.taken.append((what, times))
        return (what, times) in self._turned

    def lost(self, what: str) -> None:
        """Notes a number that leaves what can be followed."""
        where = _place(_visible()) if self.follows else ""
        if where:
            self.unseen[f"{what}{where}"] = None

    def follow(self, value: Any, bounds: tuple[float, float] = _UNBOUNDED, what: str = "a number") -> Any:
        """A number whose uses are seen."""
        if isinstance(value, bool | np.bool_):
            return value
        if isinstance(value, int | np.integer):
            return _Whole(int(value)).by(self, bounds, what)
        if isinstance(value, float | np.floating):
            return _Real(float(value)).by(self, bounds, what)
        return value

    # tensors

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", func))
        args, kwargs = self._numbers_of(name, args), self._numbers_of(name, kwargs)
        given = tensors_of((list(args), kwargs))
        bounds = next((self._followed[id(t)][1] for t in given if self._is_followed(t)), None)
        before = None if self.reseeded else torch.get_rng_state()
        out = func(*args, **kwargs)
        made = tensors_of(out) if isinstance(out, Tensor | tuple | list) else []
        if before is not None and not _constant(name, args, kwargs) and not torch.equal(before, torch.get_rng_state()):
            self._followed |= {id(t): (t, _range(name, args, kwargs)) for t in made}
            return out
        if bounds is None:
            return out
        if name == "__bool__":
            return self._answer("ne", out, bounds, 0)
        if name == "item":
            return self.follow(out, bounds, "a random number")
        if name in _LEAVES_TORCH and sys._getframe(1).f_code is not Trail.number.__code__:
            self.lost(f"{name.strip('_')}() of a random number")
        if name in _INDEXED and not self._is_followed(given[0]):
            self.lost("an index that is a random number")
        compared = name.strip("_").removesuffix("_")
        if compared in _COMPARED_TENSORS and isinstance(out, Tensor) and self._is_followed(args[0]):
            compared = _COMPARED_TENSORS[compared]
            out, made = self._answer(compared, out, bounds, args[1]), []
            if _open(compared, bounds, _ends(args[1])):
                self._followed[id(out)] = out, (0.0, 1.0)
        kept = bounds if name in _KEEP_BOUNDS else _UNBOUNDED
        self._followed |= {id(t): (t, kept) for t in made}
        return out

    def _numbers_of(self, name: str, tree: Any) -> Any:
        """Arguments of an operation of torch with plain numbers, or with others where these are turned around."""
        if isinstance(tree, dict):
            return {key: self._numbers_of(name, part) for key, part in tree.items()}
        if type(tree) in (tuple, list):
            return type(tree)(self._numbers_of(name, part) for part in tree)
        if not isinstance(tree, _Followed):
            return tree
        low, high = tree.bounds
        return tree.another() if self.turn(f"{tree.what} in {name.strip('_')}", low < high) else tree.plain()

    def _answer(self, name: str, out: Any, bounds: tuple[float, float], other: Any) -> Any:
        """The outcome of a comparison with tensors of random numbers, or its opposite."""
        if not self.turn("a comparison of a random number", _open(name, bounds, _ends(other))):
            return out
        return (not out) if isinstance(out, bool) else out.logical_not()

    def number(self, t: Any, kind: type) -> Any:
        """`float(t)` or `int(t)` of a tensor or a number, followed where that is."""
        value = kind(t.plain() if isinstance(t, _Followed) else t)
        if isinstance(t, _Followed):
            return self.follow(value, t.bounds, t.what)
        return self.follow(value, self._followed[id(t)][1], "a random number") if self._is_followed(t) else value

    def _is_followed(self, t: Any) -> bool:
        return id(t) in self._followed and self._followed[id(t)][0] is t


def _visible() -> FrameType | None:
    """The innermost frame that is neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and _package(frame) in ("torch", "bnp_analysis", "contextlib"):
        frame = frame.f_back
    return frame


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _place(frame: FrameType | None) -> str:
    """`" at net.py:12"` of a frame; empty where it is a library's, or of what runs when garbage is collected."""
    if frame is None or _package(frame) in _LIBRARIES:
        return ""
    collecting = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    above: FrameType | None = frame
    while above is not None:
        if above.f_code in collecting:
            return ""
        above = above.f_back
    return f" at {frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


def _constant(name: str, args: Any, kwargs: Any) -> bool:
    """Whether an operation that moves the generator gives the same whatever is drawn, or one that is chosen."""
    if kwargs.get("generator") is not None or name in ("manual_seed", "set_rng_state"):
        return True
    numbers = [a for a in (*args[1:], *kwargs.values()) if isinstance(a, int | float) and not isinstance(a, bool)]
    if "dropout" in name:
        return bool(numbers) and numbers[0] == 0
    return name.startswith("bernoulli") and bool(numbers) and numbers[0] in (0, 1)


def _range(name: str, args: Any, kwargs: Any, *, inclusive: bool = False) -> tuple[float, float]:
    """Between which numbers a function of this name draws, of torch, NumPy or Python, whose `randint` is inclusive."""
    if name in _FROM_ZERO_TO_ONE or (name == "uniform_" and len(args) == 1 and not kwargs):
        return 0.0, _BELOW_ONE
    if name == "uniform" and len(args) == 2:
        return float(min(args)), float(max(args))
    if name == "getrandbits":
        return 0.0, float(2 ** min(args[0], 1000))
    if name in ("randint", "randrange"):
        whole = [a for a in args if isinstance(a, int)][:2]
        ends = [kwargs.get("low", 0), *([kwargs["high"]] if "high" in kwargs else []), *whole][-2:]
        return (float(ends[0]), float(ends[-1] - (0 if inclusive else 1))) if len(ends) == 2 else _UNBOUNDED
    return (0.0, 1.0) if name.startswith("bernoulli") or name == "uniform" else _UNBOUNDED


def _open(name: str, a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether a comparison of numbers within bounds can fall both ways."""
    if name in ("eq", "ne"):
        return a[0] <= b[1] and b[0] <= a[1] and (a != b or a[0] < a[1])
    a, b = (a, b) if name in ("lt", "le") else (b, a)
    below = operator.lt if name in ("lt", "gt") else operator.le
    return below(a[0], b[1]) and not below(a[1], b[0])


class _Followed:
    """What numbers that are followed have in common; once their pass is over they are plain ones."""

    trail: Trail
    bounds: tuple[float, float]
    what: str
    plain: Callable[[], Any]

    def by(self, trail: Trail, bounds: tuple[float, float], what: str) -> Any:
        self.trail, self.bounds, self.what = trail, bounds, what
        return self

    def another(self) -> Any:
        """Another number within the bounds."""
        value = self.plain()
        low, high = self.bounds
        for other in (2 * value + 1, high, low):
            if math.isfinite(other) and low <= other <= high and other != value:
                return type(value)(other)
        return value

    def __reduce__(self) -> Any:
        value = self.plain()
        return type(value), (value,)

    def __hash__(self) -> int:
        return hash(self.plain())

    def __bool__(self) -> bool:
        outcome = bool(self.plain())
        return outcome != self.trail.turn(f"the truth of {self.what}", _open("ne", self.bounds, (0.0, 0.0)))

    def __int__(self) -> int:
        self.trail.lost(f"int() of {self.what}")
        return int(self.plain())

    def __float__(self) -> float:
        self.trail.lost(f"float() of {self.what}")
        return float(self.plain())


class _Whole(_Followed, int):
    plain = int.__int__


class _Real(_Followed, float):
    plain = float.__float__


def _bare(x: Any) -> Any:
    return x.plain() if isinstance(x, _Followed) else x


def _ends(x: Any) -> tuple[float, float]:
    if isinstance(x, _Followed):
        return x.bounds
    return (float(x), float(x)) if isinstance(x, int | float) and abs(x) < 1e300 else _UNBOUNDED


def _within(name: str, a: Any, b: Any) -> tuple[float, float]:
    """Bounds of the result of an operation."""
    if name == "mod" and not isinstance(b, _Followed) and b > 0:
        return 0.0, float(b - 1 if isinstance(a, int) and isinstance(b, int) else math.nextafter(b, 0.0))
    if name in _MONOTONE:
        with suppress(ArithmeticError):
            corners = [getattr(operator, name)(x, y) for x in _ends(a) for y in _ends(b)]
            if name != "truediv" or _ends(b)[0] == _ends(b)[1]:
                if 0.0 in (*_ends(a), *_ends(b)):
                    corners = [0.0 if math.isnan(c) else c for c in corners]
                if not any(map(math.isnan, corners)):
                    return min(corners), max(corners)
    return _UNBOUNDED


def _arithmetic(name: str, *, reflected: bool) -> Callable[[Any, Any], Any]:
    compute = getattr(operator, name)

    def operation(self: Any, other: Any, *rest: Any) -> Any:
        if not isinstance(other, int | float) or rest:
            return NotImplemented
        a, b = (other, self) if reflected else (self, other)
        result = compute(_bare(a), _bare(b))
        return self.trail.follow(result, _within(name, a, b), self.what) if self.trail.follows else result

    return operation


def _single(name: str) -> Callable[..., Any]:
    compute = _ALONE[name]

    def operation(self: Any, *rest: Any) -> Any:
        result = compute(self.plain(), *rest)
        low, high = sorted((-self.bounds[0], -self.bounds[1])) if name == "neg" else _UNBOUNDED
        return self.trail.follow(result, (low, high), self.what) if self.trail.follows else result

    return operation


def _comparison(name: str) -> Callable[[Any, Any], Any]:
    compute = getattr(operator, name)

    def operation(self: Any, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        outcome = bool(compute(self.plain(), _bare(other)))
        return outcome != self.trail.turn(f"a comparison of {self.what}", _open(name, self.bounds, _ends(other)))

    return operation


for _kind in (_Whole, _Real):
    for _name in _ARITHMETIC:
        setattr(_kind, f"__{_name}__", _arithmetic(_name, reflected=False))
        setattr(_kind, f"__r{_name}__", _arithmetic(_name, reflected=True))
    for _name in _ALONE:
        setattr(_kind, f"__{_name}__", _single(_name))
    for _name in _COMPARED:
        setattr(_kind, f"__{_name}__", _comparison(_name))


def _follows(trail: Trail, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """A source whose numbers are followed."""
    name = function.__name__
    what = "the clock" if kind == "clock" else "a random number"

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        if not trail.follows or (kind != "clock" and trail.reseeded) or not _place(sys._getframe(1)):
            return value
        if not isinstance(value, int | float | np.integer | np.floating):
            trail.lost(f"{kind}.{name}")
            return value
        inclusive = kind == "random" and name == "randint"
        return trail.follow(value, _range(name, args, kwargs, inclusive=inclusive), what)

    return wrapped


def _converted(trail: Trail, kind: type) -> type:
    """What stands for `int` or `float` in a user's code."""

    class Kind(type):
        def __instancecheck__(cls, x: Any) -> bool:
            return isinstance(x, kind)

        def __eq__(cls, other: Any) -> bool:
            return other is cls or other is kind

        def __hash__(cls) -> int:
            return hash(kind)

    class Converted(kind, metaclass=Kind):  # type: ignore[misc]
        def __new__(cls, *args: Any) -> Any:
            return trail.number(*args, kind) if len(args) == 1 and trail.follows else kind(*args)

    return Converted


class _Grown(list):  # type: ignore[type-arg]
    """A list that passes make longer; reading it is noted."""

    trail: Trail

    def __len__(self) -> int:
        self.trail.lost("the length of a list that passes change")
        return list.__len__(self)

    def __iter__(self) -> Iterator[Any]:
        self.trail.lost("a list that passes change")
        return list.__iter__(self)

    def __getitem__(self, place: Any) -> Any:
        self.trail.lost("a list that passes change")
        return list.__getitem__(self, place)


@contextmanager
def _following(trail: Trail, state: State, numbers: list[tuple[Any, Any, Any]]) -> Iterator[None]:
    """Meanwhile sources and counters are followed."""
    known = _wrapped()
    made = {f: _follows(trail, f, kind) for f, (kind, _) in known.items()}
    places = [(vars(module), name, f) for f, (_, (module, name)) in known.items()]
    places += [(space, key, space[key]) for space, key in state.functions()]
    lists = [(space, key, space[key]) for space, key, value in numbers if isinstance(value, list)]
    spaces = {id(space.all): space.all for space in state.spaces if isinstance(space, _Globals)}
    spaces = {i: space for i, space in spaces.items() if str(space.get("__name__")).partition(".")[0] not in _LIBRARIES}
    kinds = [(space, kind) for space in spaces.values() for kind in (int, float) if kind.__name__ not in space]
    try:
        for space, kind in kinds:
            space[kind.__name__] = _converted(trail, kind)
        for space, key, function in places:
            space[key] = made[function]
        for space, key, value in numbers:
            if isinstance(value, list):
                space[key] = _Grown(value)
                space[key].trail = trail
            else:
                space[key] = trail.follow(value, what=f"what is kept in {key!r}")
        with trail, sources(trail.unseen, ours=__name__):
            yield
    finally:
        trail.active = False
        for space, kind in kinds:
            space.pop(kind.__name__, None)
        for space, key, before in (*places, *lists):
            space[key] = before
        for space, key, value in state.variables():
            if isinstance(value, _Followed):
                space[key] = value.plain()


def turned_around(
    run: Callable[[], Tensor],
    roots: list[Any],
    numbers: list[tuple[Any, Any]],
    differ: Callable[[Tensor, Tensor], bool],
    *,
    reseeded: bool,
) -> tuple[str, list[str]]:
    """A decision by random numbers, the clock or a counter that changes what a pass gives, or where they are lost.

    Args:
        run: the pass.
        roots: the model and the loss.
        numbers: `(namespace, key)` of what passes change.
        differ: whether two results differ.
        reseeded: whether the pass seeds its generators itself.

    Returns:
        The decision, empty where there is none, and what cannot be followed.
    """
    state = State(roots)
    begin = [[*space[key]] if isinstance(space[key], list) else space[key] for space, key in numbers]

    def tried(turned: frozenset[tuple[str, int]]) -> tuple[Tensor | None, Trail]:
        trail = Trail(turned, reseeded=reseeded)
        try:
            with _following(trail, state, [(*place, value) for place, value in zip(numbers, begin, strict=True)]):
                return run(), trail
        except Exception as error:
            trail.unseen[f"a pass that fails with them ({type(error).__name__})"] = None
            return None, trail

    first, trail = tried(frozenset())
    if first is None:
        return "", [*trail.unseen]
    unseen, known, runs = dict(trail.unseen), set(trail.taken), 0
    waiting = [frozenset({decision}) for decision in trail.taken]
    while waiting and runs < _MOST_RUNS:
        turned = waiting.pop(0)
        runs += 1
        value, trail = tried(turned)
        # Who asks for a number that this turn makes impossible may fail.
        if value is None:
            continue
        if differ(first, value):
            return next(what for what, _ in turned), []
        new = [decision for decision in trail.taken if decision not in known]
        known.update(new)
        waiting += [turned | {decision} for decision in new]
        unseen |= trail.unseen
    if waiting:
        unseen[f"{len(waiting)} more decisions"] = None
    return "", [*unseen]
