"""The class `BNP`, which replaces `.grad` by `P P^T .grad` in a training loop; its options."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bnp_analysis.errors import InvalidInputError, TrainingWarning
from bnp_analysis.network.layers import no_product, require_types
from bnp_analysis.network.parameters import ParameterSpace, clean_name
from bnp_analysis.network.snapshot import require_values, unwrap
from bnp_analysis.precondition.bnp import BNPPreconditioner
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.training.bnp.clipping import BeforeClipping, require_passes
from bnp_analysis.training.bnp.hooks import add_hooks, before_steps, not_held, owners, stepping
from bnp_analysis.training.bnp.layers import (
    Names,
    find_candidates,
    frozen_names,
    refuse_replicas,
    trainable_space,
    uncovered,
)
from bnp_analysis.training.bnp.moments import BatchMoments, RunningMoments, batch_moments, layer_width, pool_moments
from bnp_analysis.training.bnp.passes import Open, Passes, changes, handled
from bnp_analysis.training.bnp.settings import Settings
from bnp_analysis.training.bnp.update import (
    Marks,
    OutputScales,
    Update,
    find_gradients,
    marked,
    marks,
    require_whole_units,
    unchanged,
)

_STATE_VERSION = 1
_KEYS = ("version", "step", "layers")
_MOMENT_KEYS = ("mean", "variance", "rows", "examples", "start", "q2", "direction")
_OUTPUT_KEYS = ("output_squares", "output_start")


class BNP:
    """Batch Normalization Preconditioning of a model's gradients, for any loop and any torch optimizer.

    Hooks collect mean and variance of each covered layer's inputs in grad-enabled forward passes in training mode;
    `step()` commits them and replaces `.grad` by `P P^T .grad` (T3). No layer is added; forward passes and inference
    are unchanged. Covered: `Linear` (any leading dimensions), `Conv1d/2d/3d`, `ConvTranspose1d/2d/3d`, with or without
    a bias, pruned or not, modules that compute `F.linear` with their weight and nothing else, and the input and
    recurrent maps of `RNN`, `LSTM`, `GRU` and their cells.

    Args:
        model: the model to train, which may be compiled or wrapped in DistributedDataParallel.
        rho: weight of the past in the running statistics, `[0, 1)`.
        eps1, eps2: damping, `sigma^2 + eps1 max(sigma^2) + eps2`.
        q: `"rows"`, `q^2 = max(m/R, 1)` with the rows `R` of the step, the default, also called `"auto"`; `"paper"`,
            `max(m/N, sqrt(R/N))` with its examples `N` (`scale_square`); `"measured"`, `|G^|^2/R` of the step's rows
            (T8), which keeps the inputs until `step()`; or a positive number, 1 for off.
        variance: `"total"`, right at any batch size (T4); `"within"`, the average of those within batches; `"paper"`,
            that, and `(h - mu)^2` with the mean before the step where a batch is one row.
        init: `"corrected"` leaves the start `(0, 1)` out of the averages; `"paper"` keeps it.
        statistics: of a convolution, per `"channel"` or per entry of the `"patch"` (T6).
        bias_free: of layers without a free bias, `"rank-one"` or `"diagonal"` (T5).
        output_scale: `"estimated"` also divides units by estimated output scales (T10, this project's), `OutputScales`.
        include, exclude: names of layers, or of modules above them; default all, none.
        also: types of layers that are covered only where they are asked for: `nn.Embedding`, and normalizations such
            as `nn.LayerNorm`, `nn.GroupNorm` and `nn.BatchNorm2d`.
        reference_rows: a step of `R` rows leaves the past `rho^(R / reference_rows)`, so that a row weighs the same in
            batches of any size; None for `rho` at each step, as in the paper.
        check_every: steps between reading the flag of non-finite activations, default 1 on CPU and 100 elsewhere.

    Raises:
        InvalidInputError: unknown options, or a model with nothing to precondition.

    `rho` and the damping are the paper's; `BNP.paper(model)` is the paper's algorithm.

    Source: Lange, Helfrich and Ye 2022; T2-T6, T8; output scaling T10.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> pre, optimizer = BNP(model), torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.tensor([[5.0, 1.0], [6.0, 3.0], [7.0, 1.0]]), torch.ones(3, 1)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     torch.nn.functional.mse_loss(model(x), y).backward()
        ...     pre.step()
        ...     optimizer.step()
        >>> bool(torch.allclose(model(x), y, atol=1e-3))
        True
    """

    @gated
    def __init__(
        self,
        model: nn.Module,
        *,
        rho: float = 0.99,
        eps1: float = 1e-2,
        eps2: float = 1e-4,
        q: str | float = "auto",
        variance: str = "total",
        init: str = "corrected",
        statistics: str = "channel",
        bias_free: str = "rank-one",
        output_scale: Literal["none", "estimated"] = "none",
        include: Names | None = None,
        exclude: Names | None = None,
        also: Iterable[type[nn.Module]] = (),
        reference_rows: float | None = None,
        check_every: int | None = None,
    ) -> None:
        refuse_replicas(model)
        self.settings = Settings(
            rho, eps1, eps2, q, variance, init, statistics, bias_free, output_scale, reference_rows, check_every
        )
        self.model = model
        self._choice: dict[str, Any] = {"include": frozen_names(include), "exclude": frozen_names(exclude)}
        self._choice["also"] = require_types(also)
        found = find_candidates(unwrap(model), **self._choice, outputs=output_scale == "estimated")
        self._layers, self._reasons = found.layers, found.reasons
        require_values({name: p.device for name, p in unwrap(model).named_parameters()})
        for layer in self._layers:
            require_whole_units(layer, layer.own_weight)
        # Others on the same layers: both may measure, but only one may change a gradient.
        self._others = weakref.WeakSet(owners(self._layers))
        for other in self._others:
            other._others.add(self)
        widths = [layer_width(layer, statistics) for layer in self._layers]
        self._running = RunningMoments([layer.name for layer in self._layers], widths, self.settings)
        self._pending: dict[int, BatchMoments] = {}
        self._inputs: dict[int, list[Tensor]] = {}
        self._outputs = OutputScales(self._layers, rho, eps1) if output_scale == "estimated" else None
        self._update = Update(self.settings, self._layers, self._running, self._outputs)
        self._marks: Marks = {}
        self._attached: list[Any] = []
        self._early: BeforeClipping | None = None
        self._stepping: Callable[[], Optimizer | None] = lambda: None
        self._absent = set[str]()
        self._closed, self._quiet = False, torch.inference_mode()  # made once: a percent of a small network's step
        self._passes, self._reviewed = Passes(self._layers), set[str]()
        self._refused: dict[str, str] = {}
        self._modules = weakref.WeakSet(unwrap(model).modules())
        self._hooks = add_hooks(model, self._layers, weakref.ref(self), self._outputs)
        if any(hasattr(module, "_orig_mod") or module._compiled_call_impl for module in model.modules()):
            # Graphs that were compiled before do not know the hooks.
            torch.compiler.reset()

    @classmethod
    def paper(cls, model: nn.Module, **changes: Any) -> Self:
        """The published algorithms: Algorithm 2 (p. 11) for dense layers, Algorithm 3 (p. 19) for convolutions.

        `rho=0.99, eps1=1e-2, eps2=1e-4, q="paper"`; running statistics per channel that start at `(0, 1)`, without
        correction, of the variance within the batch, at one example `(h - mu)^2` with the running mean. The paper does
        not say whether that is the mean before or after its update: before is taken, and the other would multiply
        those squares by `rho^2`. What it does not speak of, layers without bias (here `bias_free="diagonal"`) and
        other geometries, is listed in `preconditioner().extensions`.

        Args:
            model: the model to train.
            changes: options of `BNP` in place of the preset's.

        Source: Lange, Helfrich and Ye 2022, Algorithms 2 and 3.

        Example:
            >>> import torch
            >>> pre = BNP.paper(torch.nn.Linear(2, 1))
            >>> pre.settings.q, pre.settings.variance, pre.settings.init
            ('paper', 'paper', 'paper')
        """
        preset = {"q": "paper", "variance": "paper", "init": "paper", "bias_free": "diagonal"}
        return cls(model, **{**preset, **changes})

    @property
    def covered(self) -> tuple[str, ...]:
        """Names of the layers it acts on: those whose weight trains and, after the first step, that were seen."""
        rows, before, changed = self._running.rows, not self._running.step, self._changes()
        return tuple(
            layer.name
            for i, layer in enumerate(self._layers)
            if layer.trains and (rows[i] or before) and layer.name not in changed and layer.name not in self._refused
        )

    @property
    def uncovered(self) -> dict[str, str]:
        """Parameter name -> why it is left alone; layers that were changed or added after this was made are named."""
        return uncovered(self._layers, self._reasons, set(self.covered), self._refused | self._changes())

    def step(self) -> None:
        """Commit the statistics of the step and replace `.grad` by `P P^T .grad`, before `optimizer.step()`.

        All micro-batches since the last call are pooled. Where training is distributed every process must call it.

        Raises:
            InvalidInputError: no forward or backward pass since the last step, layers without gradients, sparse ones,
                `variance="within"` on one row, or a closed object.
            NonFiniteError: NaN or infinity in a layer's input; names the layer and the step.
        """
        if self._closed:
            raise InvalidInputError("step() after close(): the hooks are gone")
        if self._passes.open:
            self._leave_out(self._passes.cut())
        if not self._pending and not self.covered:
            raise InvalidInputError(
                "step() has nothing to precondition: the weights of all covered layers, "
                f"{self._layers[0].name or 'the model itself'} first, are frozen or were "
                "never seen. What trains is left alone: see uncovered. Unfreeze a layer, or train without BNP"
            )
        if not self._pending:
            raise InvalidInputError(
                "step() without a forward pass in training mode since the last step(): P P^T would be applied twice, "
                "or without statistics. Call model.train(), and step() once per optimizer step; do not train a copy of "
                "the model, which has no hooks (DataParallel makes such copies)"
            )
        found = find_gradients(self._layers, self._pending, self._running.rows)
        if self._others and any(marked(found, other._marks) for other in self._others):
            raise InvalidInputError(
                "another BNP object has preconditioned these gradients already: P P^T would be applied twice. close() "
                "one of the two, or give each its own layers with include= and exclude="
            )
        if unchanged(found, self._marks):
            raise InvalidInputError("a second step() without a backward pass: P P^T would be applied twice")
        if self.settings.variance == "within":
            self._refuse_single_rows()
        pending, inputs = self._pending, self._inputs
        self._restart()
        with self._quiet:
            self._running.commit(pending)
            if self._outputs is not None:
                self._outputs.commit()
            self._update.apply(found, inputs)
        self._marks = marks(found)
        if self._running.step.bit_count() == 1 or self._running.step % 100 == 0:
            self._review()

    def discard(self) -> None:
        """Leave out what was seen since the last step: for a batch that the loop skips.

        A loop that skips `backward()` or `optimizer.step()` for a batch, since its loss is not finite or memory ran
        out, calls this, or its rows count in the next step. Rows of a forward pass that raised are left out already.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(2, 1)
            >>> pre, bad = BNP(model), torch.tensor([[float("nan"), 1.0]])
            >>> if not torch.isfinite(model(bad)).all():
            ...     pre.discard()
            >>> model(torch.ones(4, 2)).mean().backward()
            >>> pre.step()
        """
        self._forget()

    def attach(self, optimizer: Optimizer, *, before_clipping: bool | int = False) -> Self:
        """Let the optimizer call `step()` before each of its own, in loops one does not own.

        The optimizer keeps this object alive. Not both: a loop that attaches does not call `step()`.

        Args:
            optimizer: the one that steps, or a wrapper that holds it.
            before_clipping: False: gradients change right before the optimizer steps, behind the loop's clipping. True:
                when a backward pass ends, so that clipping bounds the step `P P^T g`; where gradients are accumulated,
                the number of backward passes for each step. Fewer, as at the end of the data, are preconditioned
                before the step.

        Raises:
            InvalidInputError: attached already, closed, not a torch optimizer, LBFGS, or none of its parameters is a
                covered layer's weight. In a backward pass: more of them before a step than `before_clipping` says.

        Warns:
            TrainingWarning: the optimizer holds the weights of some covered layers only.

        Example:
            >>> import torch
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            >>> pre, before = BNP(model).attach(optimizer, before_clipping=True), model.weight.detach().clone()
            >>> (9 * model(torch.rand(8, 2))).sum().backward()
            >>> _ = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            >>> optimizer.step()
            >>> bool((model.weight - before).norm() <= 0.1001)
            True
        """
        self.require_free()
        passes = require_passes(before_clipping)
        inner = stepping(optimizer, self._layers)
        self._stepping = weakref.ref(inner)
        self._absent = {layer.name for layer in not_held(inner, self._layers)}
        self._early = BeforeClipping(weakref.ref(self), self._layers, passes) if passes else None
        self._attached = [before_steps(inner, self._before_step), *([self._early] if self._early else [])]
        return self

    def require_free(self) -> None:
        """Refuse an object that is closed, or whose `step()` an optimizer calls already.

        Raises:
            InvalidInputError: it is.
        """
        if self._attached or self._closed:
            raise InvalidInputError(
                f"this object is {'closed' if self._closed else 'attached to an optimizer already'}"
            )

    @gated
    def preconditioner(self, space: ParameterSpace | None = None) -> BNPPreconditioner:
        """The `P` of the last step, damping and `q` included, as it is measured.

        Args:
            space: the chart, dtype and device to have it in, such as `risk.space`; default that of the parameters
                that train.

        Raises:
            InvalidInputError: before the first step, or a space of another model.
        """
        if not self._running.step:
            raise InvalidInputError("there is no P before the first step()")
        space = trainable_space(unwrap(self.model)) if space is None else space
        return self._update.preconditioner(space, self.covered, self.uncovered)

    def state_dict(self) -> dict[str, Any]:
        """Statistics, steps and scales; options and rows since the last step are not part of it."""
        self._running.check()
        return _write_state(self._running, self._update, self._outputs)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            InvalidInputError: it comes from another architecture, is damaged, or is none; nothing has changed then.
        """
        _read_state(state, self._running, self._update, self._outputs)
        self._forget()
        self._marks = {}

    def close(self) -> None:
        """Remove all hooks.

        Raises:
            NonFiniteError: there were non-finite activations since the flag was last read.
        """
        self._detach()
        self._running.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._detach()
        if kind is None:
            self._running.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """The same for a copy of the model, not attached to any optimizer."""
        other = type(self)(copy.deepcopy(self.model, memo), **asdict(self.settings), **self._choice)
        other.load_state_dict(copy.deepcopy(self.state_dict(), memo))
        if self._closed:
            other.close()
        return other

    def __reduce__(self) -> Any:
        raise InvalidInputError(
            "BNP is hooked to its model, so that it cannot be pickled or copied alone: save state_dict(), or copy "
            "both, copy.deepcopy((model, pre))"
        )

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.covered)} layers, {self._running.step} steps"
        return f"<BNP {state}, {self.settings}>"

    def begin_pass(self, module: nn.Module, trains: bool) -> None:
        """A forward pass of the model, or of what wraps it, begins, from its hook."""
        passes = self._passes
        if passes.open:
            self._leave_out(passes.cut(module))
        rows = dict(self._pending), {i: len(parts) for i, parts in self._inputs.items()}
        passes.open.append(Open(module, rows, handled()))
        if trains and len(passes.open) == 1:
            passes.begin(self._running.step, bool(self._attached))

    def end_pass(self, module: nn.Module) -> None:
        """A forward pass has ended, from its hook."""
        if (failed := self._passes.end(module)) is not None:
            self._leave_out(failed)

    def _leave_out(self, failed: Open | None) -> None:
        """Leave out what was seen since a pass began that has failed."""
        if failed is not None:
            self._pending, lengths = failed.before
            self._inputs = {i: self._inputs[i][:length] for i, length in lengths.items()}

    def _before_step(self) -> None:
        """The optimizer steps; what its hook calls keeps this object alive."""
        if self._early is None or not self._early.taken():
            self.step()

    def added(self) -> bool:
        """Whether a backward pass has added to gradients that `step()` has left, in the same tensors."""
        known = {id(ref()) for ref, _ in self._marks.values() if ref() is not None}
        return any(id(layer.own_weight.grad) in known for layer in self._layers)

    def _changes(self) -> dict[str, str]:
        return changes(unwrap(self.model), self._layers, self._modules, self._choice["also"])

    def _review(self) -> None:
        """Say which layers are left alone since something was changed after this object was made, or attached."""
        found, inner = self._changes(), self._stepping()
        for layer in not_held(inner, self._layers) if inner is not None and self._attached else []:
            if layer.trains and layer.name not in self._absent:
                found[layer.name] = "the optimizer that BNP is attached to does not hold its weight any more"
        if found.keys() - self._reviewed:
            self._reviewed |= found.keys()
            listed = "; ".join(f"{name or 'the model'}: {why}" for name, why in found.items())
            warnings.warn(f"BNP does not precondition all layers that train: {listed}", TrainingWarning, 3)

    def _detach(self) -> None:
        if not self._closed:
            self._passes.close(self._running.step, bool(self._attached))
        for handle in [*self._hooks, *self._attached]:
            handle.remove()
        self._attached, self._closed = [], True
        self._forget()

    def _forget(self) -> None:
        """Leave out what was seen since the last step."""
        self._restart()
        if self._outputs is not None:
            self._outputs.forget()
        if self._early is not None:
            self._early.forget()

    def _restart(self) -> None:
        self._pending, self._inputs = {}, {}
        self._passes.restart(({}, {}))

    def receive(self, index: int, h: Tensor) -> None:
        """Take in an input of a layer, from its hook."""
        layer = self._layers[index]
        if not layer.trains:
            return
        seen = batch_moments(layer, h, self.settings.statistics)
        if seen is None:
            return
        if seen.mean.numel() != self._running.widths[index]:
            if layer.kind.builtin:
                return  # torch refuses such an input
            raise InvalidInputError(
                f"layer {layer.name!r} ran on rows of {seen.mean.numel()} features, its weight has "
                f"{self._running.widths[index]}: was it registered with transposed= as it is stored?"
            )
        before = self._pending.get(index)
        self._pending[index] = seen if before is None else pool_moments(before, seen)
        if self.settings.q == "measured":
            self._inputs.setdefault(index, []).append(h.detach())

    def refuse(self, index: int) -> None:
        """Leave a layer alone whose forward pass is not the product that its shape promised, from its hook."""
        layer = self._layers[index]
        self._refused[layer.name] = no_product(layer.module)

    def _refuse_single_rows(self) -> None:
        single = [self._layers[i].name for i, m in self._pending.items() if m.samples < 2]
        if single:
            self._forget()
            raise InvalidInputError(
                f"variance='within' on one row: the variance within the batch of layer {single[0]!r} is 0 and would "
                "drive sigma to 0. Use variance='total', right at any batch size, variance='paper', or larger batches"
            )


def _write_state(running: RunningMoments, update: Update, outputs: OutputScales | None) -> dict[str, Any]:
    """Tensors and numbers only, so that `torch.load(weights_only=True)` reads it."""
    layers: dict[str, dict[str, Any]] = {}
    for i, (name, width) in enumerate(zip(running.names, running.widths, strict=True)):
        mean, variance = (torch.zeros(width), torch.ones(width)) if running.now is None else running.of(i)
        layers[name] = {
            "mean": mean.clone(),
            "variance": variance.clone(),
            "rows": running.rows[i],
            "examples": running.examples[i],
            "start": running.start[i],
            "q2": update.q2.get(i, 1.0),
        }
        if update.measured[i].vector is not None:
            layers[name]["direction"] = update.measured[i].vector
        if outputs is not None:
            layers[name] |= outputs.state(i)
    return {"version": _STATE_VERSION, "step": running.step, "layers": layers}


def _read_state(
    state: Mapping[str, Any], running: RunningMoments, update: Update, outputs: OutputScales | None
) -> None:
    """Put a state into the running statistics; nothing changes unless all of it fits.

    Raises:
        InvalidInputError: no such state, other layers, other widths, or numbers that no statistics have.
    """
    if (
        not isinstance(state, Mapping)
        or state.get("version") != _STATE_VERSION
        or not isinstance(state.get("layers"), Mapping)
        or not _is_count(state.get("step"))
    ):
        raise InvalidInputError(f"this is no state of BNP, version {_STATE_VERSION}")
    layers = {clean_name(name): entry for name, entry in state["layers"].items()}
    misfit = [f"missing: {n}" for n in running.names if n not in layers]
    misfit += [f"unknown: {n}" for n in (*layers, *state) if n not in (*running.names, *_KEYS)]
    for index, (name, width) in enumerate(zip(running.names, running.widths, strict=True)):
        units = None if outputs is None else outputs.units[index]
        if name in layers and (wrong := _wrong_entry(layers[name], width, units, update.directions[index])):
            misfit.append(f"{name!r} {wrong}")
    if misfit:
        raise InvalidInputError(
            f"the state does not fit: {'; '.join(misfit)}. It is damaged, or comes from another architecture, or from "
            "other include=, exclude=, statistics= or output_scale=; nothing was changed"
        )
    ordered = [layers[name] for name in running.names]
    like = None if running.now is None else running.now.values.device
    moments = [torch.cat([entry[key] for entry in ordered]) for key in ("mean", "variance")]
    if outputs is not None:
        outputs.load(ordered)
    running.set(torch.stack(moments).to(like) if state["step"] else None)
    running.rows = [entry["rows"] for entry in ordered]
    running.examples = [entry.get("examples", entry["rows"]) for entry in ordered]
    running.start = [float(entry["start"]) for entry in ordered]
    running.step = state["step"]
    update.q2 = {i: float(entry["q2"]) for i, entry in enumerate(ordered) if entry["rows"]}
    for measured, entry in zip(update.measured, ordered, strict=True):
        measured.vector = entry.get("direction")


def _wrong_entry(entry: Any, width: int, units: int | None, direction_shape: tuple[int, ...]) -> str:
    """What is wrong with a layer's part of a state, in words; empty if nothing is."""
    if not isinstance(entry, Mapping):
        return "has no entries"
    lengths = {"mean": width, "variance": width} | ({} if units is None else {"output_squares": units})
    for key, length in lengths.items():
        values = entry.get(key)
        if not isinstance(values, Tensor) or not values.is_floating_point():
            unscaled = ", so it was saved without output_scale='estimated'" if key == "output_squares" else ""
            return f"has no {key}{unscaled}"
        if values.shape != (length,):
            return f"has {tuple(values.shape)} as its {key}, expected {(length,)}"
        if not bool(torch.isfinite(values).all()) or (key != "mean" and bool((values < 0).any())):
            return f"has a {key} that is not finite, or negative"
    counts = [entry.get("rows"), entry.get("examples", entry.get("rows"))]
    shares = [entry.get("start"), *([] if units is None else [entry.get("output_start")])]
    if not all(map(_is_count, counts)):
        return "has no counts of rows and examples"
    if not all(isinstance(share, float | int) and 0 <= share <= 1 for share in shares):
        return "has a weight of the start outside of [0, 1]"
    known = (*_MOMENT_KEYS, *(() if units is None else _OUTPUT_KEYS))
    if unknown := [str(name) for name in entry if name not in known]:
        return f"has entries {', '.join(unknown)} that no statistics have"
    direction = entry.get("direction", torch.zeros(direction_shape))
    if not isinstance(direction, Tensor) or direction.shape != direction_shape:
        return f"has a direction that is no tensor {direction_shape}"
    if not bool(torch.isfinite(direction).all()):
        return "has a direction that is not finite"
    q2 = entry.get("q2")
    return "" if isinstance(q2, float | int) and 0 < q2 < math.inf else "has a q^2 that is not positive"


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
