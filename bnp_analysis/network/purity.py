"""Checks that a risk is one function of theta: random layers, coupled examples, losses that are no means."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnp_analysis.errors import InvalidInputError, MeasurementWarning, StochasticModelError
from bnp_analysis.network.batches import Batch, slice_batch, with_examples
from bnp_analysis.network.decisions import State, sources, turned_around
from bnp_analysis.network.kernels import KernelMode, recording, vector_jacobian
from bnp_analysis.network.observation import Arguments, require_own_tensors
from bnp_analysis.network.precision import around_modules, generic_point
from bnp_analysis.runtime.random import random_state, reseed
from bnp_analysis.runtime.trees import map_tensors, tensors_of

if TYPE_CHECKING:
    from bnp_analysis.network.risk import EmpiricalRisk

# Examples in a part of a batch, and how many parts are compared with the whole.
_PART, _MOST_PARTS = 8, 8
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def require_pure(risk: EmpiricalRisk, live: Mapping[int, str]) -> bool:
    """Refuse random models, and batch-coupled ones over several batches; say whether batches couple.

    `live`: the parameters of the caller's model by identity, which the loss must not read.

    Layers of known types count if they run. Anything else is found on the first batch that allows it, at a point
    near `theta` (a zero output layer hides all that happens below it). Random numbers: whether a pass drew any, and if
    so, whether the smallest and largest that can be drawn change the outputs. Other examples: whether any output
    depends on another example than its own.

    Raises:
        StochasticModelError: names the layers, what would have been computed, the ways out.
    """
    # The states come back before other processes are waited for.
    here = random_state(device=risk.space.device)(_couple)
    found = risk.group.share(lambda: here(risk, live), "what couples examples")
    coupled = any(c for c, _ in found)
    normalizing = list(dict.fromkeys(name for _, names in found for name in names))
    if coupled and risk.batches.everywhere > 1:
        raise StochasticModelError(
            f"batch-coupled layers in training mode ({_named(normalizing)}) over {risk.batches.everywhere} "
            "batches: each batch would be normalized by its own statistics, so the risk would depend on how the "
            "data are split, and no product would be that of the whole data set. Call model.eval() to measure at "
            "running statistics, or give all the data as one batch (x, y)"
        )
    return coupled


def _couple(risk: EmpiricalRisk, live: Mapping[int, str]) -> tuple[bool, list[str]]:
    """Whether this process's batches couple their examples, and by which layers."""
    random = _that_run(risk, random_layers(risk))
    normalizing = _that_run(risk, coupled_layers(risk))
    coupled = bool(normalizing)
    state = State(risk.code())
    held = [x for x in state.within if isinstance(x, _GENERATORS)]
    for batch in risk.batches:
        for theta in (generic_point(risk), risk.theta):
            tensors = risk.space.unflatten(theta)
            by_inputs = _ByInputs(risk, tensors, batch, plain=coupled or bool(random))
            drawn = _Draws(risk, held, state, by_inputs)
            if bool(torch.isfinite(drawn.value).all()):
                break
        outputs = drawn.value
        _require_determined_loss(risk, held, state, tensors, live, batch, outputs)
        found = None if coupled or random or drawn.any else couples(risk, tensors, batch, outputs, by_inputs)
        # Outputs that were the same beside other examples have been seen to be the same twice.
        if found is not False and not random and not drawn.any and (kept := _kept_between_calls(risk, tensors, batch)):
            raise StochasticModelError(
                f"the model keeps something between its calls ({', '.join(kept)}): the same inputs under the same "
                "random numbers gave two outputs, so every evaluation would be of another function. Let forward() "
                "begin from a fixed state, or take the state as an input and return it"
            )
        if random or (found is not False and drawn.matter(partial(_outputs, risk, tensors, batch))):
            raise StochasticModelError(
                f"the model is random in training mode ({_named(random or _drawing_layers(risk, batch))}): every "
                f"evaluation would use another mask, and products would belong to different functions{drawn.words}. "
                "Call model.eval(), set p=0, or measure model.eval() with BatchNorm left in train mode"
            )
        drawn.require_undecided(partial(_outputs, risk, tensors, batch), "the model")
        coupled = bool(coupled or found or (drawn.any and couples(risk, tensors, batch, outputs, by_inputs)))
        if coupled or tensors_of(batch.x)[0].shape[0] > 1:
            break
    return coupled, normalizing


def _that_run(risk: EmpiricalRisk, names: list[str]) -> list[str]:
    """Those of the named layers whose forward runs."""
    ran: set[str] = set()
    if names:
        with random_state(device=risk.space.device):
            risk.capture(lambda name, module, args, output: ran.add(name), names)
    return [name for name in names if name in ran]


def _outputs(risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor:
    with torch.no_grad():
        return risk.batch_outputs(tensors, batch)


def _kept_between_calls(risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch) -> list[str]:
    """What the model's modules keep from one call to the next, where that changes the outputs: attributes, by name."""

    def run() -> Tensor:
        with random_state(seed=0, device=risk.space.device):
            return _outputs(risk, tensors, batch)

    first = run()

    def held() -> dict[str, int]:
        return {f"{name}.{key}".lstrip("."): id(value) for name, m in risk.modules() for key, value in vars(m).items()}

    before = held()
    if not _differs(risk, first, run()):
        return []
    return [name for name, what in held().items() if before.get(name) != what] or ["outside of its attributes"]


class _Draws:
    """The random numbers that a pass drew: which of the global generators moved, and which private ones.

    Attributes:
        value: what the pass gave.
        seen: the calls of the pass.
        any: whether there were any.
        words: the generators, for an error.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        held: list[Any],
        kept: State,
        run: Callable[[], Tensor],
        live: Mapping[int, str] | None = None,
    ) -> None:
        self._risk, self._device = risk, risk.space.device
        shared = (random._inst, np.random.mtrand._rand, torch.default_generator)
        private = [g for g in held if all(g is not other for other in shared)]
        self.seen = Arguments(live)
        used = dict[str, None]()
        kept.begin()
        reseed(0, self._device)
        before, mine = _seeded(self._device), [_state(g) for g in private]
        with self.seen, sources(used):
            self.value = run()
        after = _global_states(self._device)
        private += [g for g in self.seen.generators.values() if all(g is not other for other in private)]
        mine += [None] * (len(private) - len(mine))
        self._ends, self._kept, self._used, self._went_on = after, kept.changed(), used, kept.moved()
        self._moved = [name for name, state in before.items() if state != after[name]]
        self._private = [(g, s) for g, s in zip(private, mine, strict=True) if s != _state(g)]
        names = [*self._moved, *(type(g).__name__ for g, _ in self._private)]
        self.any = bool(names)
        self.words = f" (it draws from: {', '.join(names)})" if names else ""

    def require_undecided(self, run: Callable[[], Tensor], what: str) -> None:
        """Refuse decisions by random numbers, the clock or a counter, however rarely they fall the other way.

        Raises:
            StochasticModelError: names the decision.
        """
        if not (self._moved or self._kept or self._used or self._went_on):
            return
        kept = State(self._risk.code())

        def again(seed: int) -> Tensor:
            with random_state(seed=seed, device=self._device):
                value = run()
                self._again = _global_states(self._device)
            return value

        again(1)
        decision, unseen = turned_around(
            partial(again, 0),
            self._risk.code(),
            kept.changed(),
            partial(_differs, self._risk),
            reseeded=all(self._ends[name] == self._again[name] for name in self._moved),
        )
        if decision:
            raise StochasticModelError(
                f"{what} decides by what may be another in the next pass ({decision}): had it fallen the other way, "
                "the same inputs would have given other outputs, so that products might belong to different "
                "functions. Call model.eval(), or fix what decides"
            )
        if unseen := [*dict.fromkeys([*unseen, *self._went_on])]:
            warnings.warn(
                f"{what} uses what may be another in the next pass, and cannot be followed to what it decides: "
                f"{', '.join(unseen[:6])}. What was tried changed nothing, which does not show rare decisions; "
                "call model.eval(), or take it out",
                MeasurementWarning,
                stacklevel=2,
            )

    def matter(self, run: Callable[[], Tensor]) -> bool:
        """Whether other draws give other values, or the draws go on from pass to pass where they cannot be chosen."""
        ends = [_state(g) for g, _ in self._private]
        reseed(1, self._device)
        if _differs(self._risk, self.value, run()):
            return True
        if any(end != _state(g) for end, (g, _) in zip(ends, self._private, strict=True)) or "CUDA" in self._moved:
            return True
        for which in range(8 if self._moved else 0):
            with extreme_draws(which, self._device):
                if _differs(self._risk, self.value, run()):
                    return True
        return False


def _global_states(device: torch.device) -> dict[str, Any]:
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "Python's random": random.getstate(),
        "NumPy's random": _state(np.random.mtrand._rand),
    }
    return states | ({"CUDA": torch.cuda.get_rng_state(device).numpy().tobytes()} if device.type == "cuda" else {})


def _seeded(device: torch.device) -> dict[str, Any]:
    """The states just after `reseed(0)`; reading NumPy's takes longer than a pass of a small network."""
    return _global_states(device) if device.type == "cuda" else _seeded_here()


@cache
def _seeded_here() -> dict[str, Any]:
    with random_state(seed=0):
        return _global_states(torch.device("cpu"))


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().cpu().numpy().tobytes()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return [p.tobytes() if isinstance(p, np.ndarray) else p for p in generator.get_state(legacy=True)]
    return repr(generator.bit_generator.state)


def _drawing_layers(risk: EmpiricalRisk, batch: Batch) -> list[str]:
    """The innermost modules in whose forward pass a global generator moves."""
    found: dict[str, None] = {}
    before: list[Any] = []

    def begin(name: str) -> None:
        before.append(_global_states(risk.space.device))

    def end(name: str) -> None:
        if before.pop() != _global_states(risk.space.device):
            found[name] = None

    with around_modules(risk, begin, end), random_state(seed=0, device=risk.space.device):
        _outputs(risk, risk.space.unflatten(risk.theta), batch)
    return [n for n in found if not any(other != n and other.startswith(f"{n}." if n else "") for other in found)]


@recording()
def _require_determined_loss(
    risk: EmpiricalRisk,
    held: list[Any],
    kept: State,
    tensors: Mapping[str, Tensor],
    live: Mapping[int, str],
    batch: Batch,
    outputs: Tensor,
) -> None:
    def run() -> Tensor:
        return risk.batch_loss(outputs.detach().requires_grad_().clone(), batch, tensors)

    drawn = _Draws(risk, held, kept, run, live)
    require_own_tensors(live, drawn.seen, drawn.value)
    if drawn.matter(run):
        raise StochasticModelError(
            f"the loss is random: the same outputs and targets gave two values{drawn.words}, so every product would "
            "belong to another function. Fix what it samples"
        )
    drawn.require_undecided(run, "the loss")


def _differs(risk: EmpiricalRisk, a: Tensor, b: Tensor) -> bool:
    """Different beyond what another summation order explains."""
    a, b = a.detach(), b.detach()
    if a.shape != b.shape:
        return True
    finite = b[torch.isfinite(b)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    return not bool(torch.isclose(a, b, rtol=0.0, atol=scale * risk.eps**0.5, equal_nan=True).all())


def random_layers(risk: EmpiricalRisk) -> list[str]:
    """Names of layers that draw random numbers in training mode."""

    def draws(module: Any) -> bool:
        if isinstance(module, nn.modules.dropout._DropoutNd):
            return module.p > 0
        if isinstance(module, nn.RReLU):
            return module.lower < module.upper
        return isinstance(module, nn.MultiheadAttention | nn.RNNBase) and float(module.dropout) > 0

    return [name for name, module in risk.modules() if module.training and draws(module)]


def coupled_layers(risk: EmpiricalRisk) -> list[str]:
    """Names of layers that normalize by the statistics of the batch."""
    return [
        name
        for name, module in risk.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None)
    ]


def _named(names: list[str]) -> str:
    found = ", ".join(name or "the model itself" for name in names)
    return found or "no layer of a known type: look for functional calls in forward()"


def require_mean_loss(risk: EmpiricalRisk) -> None:
    """Refuse a loss that is not a mean over its batch, where several batches are averaged.

    Raises:
        InvalidInputError: says what the risk would have been.
    """
    for batch in risk.batches:
        how = _in_two(risk, batch)
        if how == "sum":
            raise InvalidInputError(
                f"the loss is a sum over batch {batch.index}, not a mean: over several batches, weighted by their "
                "sizes, it would count large batches twice over. Write reduction='mean', or "
                "lambda output, y: loss(output, y) / len(y)"
            )
        if how == "neither":
            raise InvalidInputError(
                f"the loss is not a mean over batch {batch.index}: its parts do not average to the whole. Over "
                "several batches, weighted by their sizes, a sum would count large batches twice over. Use "
                "reduction='mean'; if the mean is over something else than examples (weighted classes, targets that "
                "are not ignored), say with count= how much there is of it; or give all the data as one batch (x, y)"
            )


def is_mean(risk: EmpiricalRisk, batch: Batch) -> bool | None:
    """Whether the losses of two parts of a batch average to that of the whole; None if it cannot be cut."""
    how = _in_two(risk, batch)
    return None if how is None else how == "mean"


def _in_two(risk: EmpiricalRisk, batch: Batch) -> Literal["mean", "sum", "neither"] | None:
    """What of the losses of two parts of a batch that of the whole is; None if it cannot be cut."""
    size = tensors_of(batch.x)[0].shape[0]
    with torch.no_grad():
        outputs = risk.batch_outputs(risk.space.unflatten(risk.theta), batch)
        if size < 2 or outputs.ndim == 0 or outputs.shape[0] != size:
            return None
        cut = max(1, size // 3)
        head, tail = slice_batch(batch, 0, cut), slice_batch(batch, cut, size)
        if head is None or tail is None:
            return None
        whole = risk.batch_loss(outputs, batch)
        values = [risk.batch_loss(outputs[:cut], head), risk.batch_loss(outputs[cut:], tail)]
    # count= may have been summed in float32, whatever the loss is.
    tolerance = max(1e-5, risk.eps**0.6)
    # By count= or by examples: the former may be a weight of the whole batch, which says nothing of its parts.
    for weights in ((risk.batches.weigh(head), risk.batches.weigh(tail)), (cut, size - cut)):
        # A part of weight 0 (nothing but ignored targets) has no mean of its own.
        parts = [(weight, float(value)) for weight, value in zip(weights, values, strict=True) if weight > 0]
        mean = sum(weight * value for weight, value in parts) / (sum(weights) or 1.0)
        scale = max([abs(float(whole)), *(abs(value) for _, value in parts)])
        if abs(mean - float(whole)) <= tolerance * scale:
            return "mean"
    total, scale = sum(map(float, values)), max(abs(float(whole)), *(abs(float(value)) for value in values))
    return "sum" if abs(total - float(whole)) <= tolerance * scale else "neither"


def couples(
    risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch, whole: Tensor, by_inputs: _ByInputs
) -> bool | None:
    """Whether some example's output depends on another example; None where examples cannot be exchanged.

    First the outputs of a random half beside copies of one of them, which shows batch statistics and decisions without
    derivative that many examples take part in. Then any two examples, by derivatives: for independent ones, whose
    Jacobian `J` has blocks on its diagonal alone, weights `a` of the examples come back as they are,
    `J^T (a r) = a J^T r` for cotangents `r`, and with random weights for no others. Inputs without derivative (tokens)
    are looked at where they first become numbers with one. Where this does not show independence (outputs in another
    order, nothing to differentiate by), examples are replaced by others, all pairs told apart by the binary digits of
    their index.
    """
    size = tensors_of(batch.x)[0].shape[0]
    rows = [whole, *(t for t in tensors_of(batch.y) if t.ndim)]
    if size < 2 or whole.ndim == 0 or any(t.shape[0] % size for t in rows) or not bool(torch.isfinite(whole).all()):
        return None
    index = torch.arange(size)
    half = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: (size + 1) // 2]
    alone = torch.full((size,), int(half[0])).scatter(0, half, half)
    if _changes(risk, tensors, batch, whole, alone, len(half)):
        return True
    with suppress(RuntimeError, ValueError, TypeError):  # an operation without derivative
        if _apart(by_inputs, whole, size):
            return _differs_in_parts(risk, tensors, batch, whole)
    for bit in range((size - 1).bit_length()):
        for side in (0, 1):
            partner = index ^ (1 << bit)
            stays = (((index >> bit) & 1) == side) | (partner >= size)
            if _changes(risk, tensors, batch, whole, torch.where(stays, index, partner), int(stays.sum())):
                return True
    return False


def _differs_in_parts(risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch, whole: Tensor) -> bool:
    """Whether a batch in parts has other outputs: thresholds over the batch, without derivative, such as a median."""
    size = tensors_of(batch.x)[0].shape[0]
    if whole.shape[0] != size:
        return False
    step = _PART if size > _PART else (size + 1) // 2
    near = float(whole.abs().max()) * torch.finfo(whole.dtype).eps ** 0.5
    for k in range(0, min(size, _MOST_PARTS * step), step):
        part = slice_batch(batch, k, k + step)
        try:
            outputs = None if part is None else _outputs(risk, tensors, part)
        except InvalidInputError:  # made for one size of batch
            return False
        own = whole[k : k + step]
        if outputs is not None and (outputs.shape != own.shape or float((outputs - own).abs().max()) > near):
            return True
    return False


def _changes(
    risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch, whole: Tensor, index: Tensor, kept: int
) -> bool:
    """Whether the outputs of the `kept` examples change when others are replaced.

    Rows of outputs may be in any order (examples may have several): as many must stay as belong to the kept ones.
    """
    with torch.no_grad():
        mixed = risk.batch_outputs(tensors, with_examples(batch, index))
    if mixed.shape != whole.shape:
        return True
    stays = (mixed - whole).abs() <= float(whole.abs().max()) * torch.finfo(whole.dtype).eps ** 0.5
    whole_rows = stays.reshape(whole.shape[0], -1).all(dim=1)
    return int(whole_rows.sum()) * len(index) < kept * whole.shape[0]


class _Entrances(TorchFunctionMode):
    """Finds where data first become floating-point numbers with one entry per example, and records from there on."""

    def __init__(self, data: list[Tensor], size: int) -> None:
        super().__init__()
        self.found: list[Tensor] = []
        self._size = size
        self._alive = data  # a freed tensor's identity would be given to another
        self._integers = {id(t) for t in data}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors_of((args, kwargs)) if self._integers else []
        entering = any(id(t) in self._integers for t in given) and not any(t.requires_grad for t in given)
        out = func(*args, **kwargs)
        if entering and isinstance(out, Tensor) and out.ndim and out.shape[0] == self._size:
            if out.is_floating_point():
                self.found.append(out.requires_grad_())
            else:
                self._integers.add(id(out))
            self._alive.append(out)
        return out


class _ByInputs:
    """A pass that records derivatives by what depends on single examples, where a model lets it.

    Args:
        risk, tensors, batch: of what.
        plain: whether nothing is to be recorded.

    Attributes:
        outputs: recorded; None where they are not.
        sources: what they can be differentiated by.
    """

    def __init__(self, risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch, *, plain: bool) -> None:
        self._pass, self._plain = (risk, tensors, batch), plain
        self.outputs: Tensor | None = None
        self.sources: list[Tensor] = []

    def __call__(self) -> Tensor:
        if not self._plain:
            with suppress(RuntimeError, ValueError, TypeError):  # an operation that refuses inputs with a derivative
                return self._record(*self._pass)
        return _outputs(*self._pass)

    @recording()
    def _record(self, risk: EmpiricalRisk, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor:
        size = tensors_of(batch.x)[0].shape[0]
        own: list[Tensor] = []
        integers: list[Tensor] = []

        def by(t: Tensor) -> Tensor:
            # Data are large: a copy only for a model that writes into them, as its first examples have shown.
            t = t.clone() if risk.inputs.written else t.detach()
            if t.ndim and t.shape[0] == size:
                (own if t.is_floating_point() else integers).append(t)
            if not t.is_floating_point():
                return t
            t.requires_grad_()
            return t.view_as(t) if risk.inputs.written else t

        with risk.inputs.kept(batch.x):
            part = replace(batch, x=map_tensors(batch.x, by), own=True)
            entrances = _Entrances(integers, size)
            # Warnings of what the model does with inputs that have a derivative.
            with entrances, warnings.catch_warnings(action="ignore"):
                outputs = risk.batch_outputs({name: t.detach() for name, t in tensors.items()}, part)
        self.outputs, self.sources = outputs, [*own, *entrances.found]
        return outputs.detach()


@recording()
def _apart(by_inputs: _ByInputs, whole: Tensor, size: int) -> bool:
    """Whether `J^T (a r) = a J^T r` for random `a` and `r`; False if there is nothing to differentiate by."""
    outputs, sources = by_inputs.outputs, by_inputs.sources
    if outputs is None or not sources or not outputs.requires_grad or outputs.shape != whole.shape:
        return False
    g = torch.Generator().manual_seed(0)
    r = torch.randn(outputs.shape, generator=g, dtype=torch.float64).to(outputs)
    a = (torch.rand(size, generator=g, dtype=torch.float64) + 0.5).to(outputs)
    directions = [torch.randn(t[0].numel(), generator=g, dtype=torch.float64).to(t) for t in sources]

    def pulled(u: Tensor) -> list[Tensor]:
        """`J^T u` along a direction, one number per example for each source."""
        found = vector_jacobian(outputs, sources, u, retain_graph=True, allow_unused=True)
        return [
            d.new_zeros(size) if t is None else t.reshape(size, -1) @ d for t, d in zip(found, directions, strict=True)
        ]

    plain = pulled(r)
    if not any(bool(t.any()) for t in plain):
        return False
    each, tolerance = outputs.shape[0] // size, torch.finfo(outputs.dtype).eps ** 0.5
    # Rows of outputs example by example, or position by position.
    for weights in {1: [a]}.get(each, [a.repeat_interleave(each), a.repeat(each)]):
        u = r * weights.view(-1, *[1] * (r.ndim - 1))
        pairs = zip(pulled(u), plain, strict=True)
        if all(float((p - a.to(q) * q).abs().max()) <= tolerance * float(q.abs().max()) for p, q in pairs):
            return True
    return False


# Words of a generator's state that are chosen; the others are random, so that loops which reject draws come to an end.
_CHOSEN, _WORDS = 480, 624


@contextmanager
def extreme_draws(which: int, device: torch.device | None = None) -> Iterator[None]:
    """Meanwhile the global generators draw their smallest numbers (`which` 0), their largest (1) or a mixture (2, ...).

    A decision `draw < p` falls both ways, however small `p` is: for Python, NumPy and torch on the CPU, whose
    generators are Mersenne twisters with a state that can be chosen. On the first 480 words (240 numbers in float64).

    Example:
        >>> import random
        >>> with extreme_draws(0):
        ...     random.random() < 1e-12
        True
    """
    own = np.random.RandomState(which)
    words = own.randint(0, 2**32, _WORDS, dtype=np.uint64)
    ends = np.array([0, 2**32 - 1], dtype=np.uint64)
    pick = np.full(_CHOSEN, which) if which < 2 else own.randint(0, 3, _CHOSEN)
    words[:_CHOSEN] = np.where(pick < 2, ends[np.minimum(pick, 1)], words[:_CHOSEN])
    state = _untempered(words)
    with random_state(seed=which, device=device), _Bernoulli(which):
        random.setstate((3, (*(int(w) for w in state), 0), None))
        np.random.set_state(("MT19937", state.astype(np.uint32), 0, 0, 0.0))  # noqa: NPY002
        torch.set_rng_state(_torch_state(state))
        yield


def _untempered(y: np.ndarray) -> np.ndarray:
    """The state words from which a Mersenne twister makes these numbers."""
    y = y ^ (y >> np.uint64(18))
    y = y ^ ((y << np.uint64(15)) & np.uint64(0xEFC60000))
    x = y
    for _ in range(4):
        x = y ^ ((x << np.uint64(7)) & np.uint64(0x9D2C5680))
    y = x
    for _ in range(2):
        x = y ^ (x >> np.uint64(11))
    return x & np.uint64(0xFFFFFFFF)


def _torch_state(words: np.ndarray) -> Tensor:
    """A state of torch's generator: seed, numbers left, seeded, next, the words, normal numbers kept for later."""
    state = torch.Generator().manual_seed(0).get_state().numpy()
    state[8:12].view(np.int32)[0] = _WORDS
    state[16:24].view(np.uint64)[0] = 0
    state[24 : 24 + 8 * _WORDS].view(np.uint64)[:] = words
    return torch.from_numpy(state)


class _Bernoulli(KernelMode):  # type: ignore[no-untyped-call]
    """Masks of dropout, drawn by other generators than the states above, at one of their two ends."""

    def __init__(self, which: int) -> None:
        super().__init__()
        self._which = which

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._which < 2 and func.overloadpacket is torch.ops.aten.bernoulli_ and len(args) > 1:
            p = args[1]
            out.copy_(torch.as_tensor(p > 0 if self._which else p >= 1))
        return out
