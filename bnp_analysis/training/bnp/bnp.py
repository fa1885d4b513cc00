"""BNP in a training loop: its options, and `.grad` that becomes `P P^T .grad`."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.names import clean_name
from bnp_analysis.network.parameters import ParameterSpace
from bnp_analysis.network.snapshot import unwrap
from bnp_analysis.precondition.bnp import BNPPreconditioner
from bnp_analysis.runtime.kinds import require_kind
from bnp_analysis.training.bnp.hooks import add_hooks, attach_to
from bnp_analysis.training.bnp.layers import (
    Names,
    find_candidates,
    frozen_names,
    refuse_replicas,
    trainable_space,
    uncovered,
)
from bnp_analysis.training.bnp.moments import BatchMoments, RunningMoments, batch_moments, layer_width, pool_moments
from bnp_analysis.training.bnp.settings import Settings
from bnp_analysis.training.bnp.update import Marks, OutputScales, Update, find_gradients, marks, unchanged

_STATE_VERSION = 1


class BNP:
    """Batch Normalization Preconditioning of a model's gradients, for any loop and any torch optimizer.

    Hooks collect mean and variance of each covered layer's inputs in grad-enabled forward passes in training mode;
    `step()` commits them and replaces `.grad` by `P P^T .grad` (T3). No layer is added; forward passes and inference
    are unchanged. Covered: `Linear` (any leading dimensions), `Conv1d/2d/3d`, with or without a bias.

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
        output_scale: str = "none",
        include: Names | None = None,
        exclude: Names | None = None,
        reference_rows: float | None = None,
        check_every: int | None = None,
    ) -> None:
        require_kind(model, "model", nn.Module)
        refuse_replicas(model)
        self.settings = Settings(
            rho, eps1, eps2, q, variance, init, statistics, bias_free, output_scale, reference_rows, check_every
        )
        self.model = model
        self._choice: dict[str, Any] = {"include": frozen_names(include), "exclude": frozen_names(exclude)}
        found = find_candidates(unwrap(model), **self._choice)
        self._layers, self._reasons = found.layers, found.reasons
        widths = [layer_width(layer, statistics) for layer in self._layers]
        self._running = RunningMoments([layer.name for layer in self._layers], widths, self.settings)
        self._pending: dict[int, BatchMoments] = {}
        self._inputs: dict[int, list[Tensor]] = {}
        self._outputs = OutputScales(self._layers, rho, eps1) if output_scale == "estimated" else None
        self._update = Update(self.settings, self._layers, self._running, self._outputs)
        self._marks: Marks = {}
        self._attached: RemovableHandle | None = None
        self._closed, self._quiet = False, torch.inference_mode()  # made once: a percent of a small network's step
        self._hooks = add_hooks(self._layers, weakref.ref(self), self._outputs)
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
        rows, before = self._running.rows, not self._running.step
        return tuple(
            layer.name for i, layer in enumerate(self._layers) if layer.own_weight.requires_grad and (rows[i] or before)
        )

    @property
    def uncovered(self) -> dict[str, str]:
        """Parameter name -> why it is left alone."""
        return uncovered(self._layers, self._reasons, set(self.covered))

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
        if unchanged(found, self._marks):
            raise InvalidInputError("a second step() without a backward pass: P P^T would be applied twice")
        if self.settings.variance == "within":
            self._refuse_single_rows()
        pending, inputs = self._pending, self._inputs
        self._pending, self._inputs = {}, {}
        with self._quiet:
            self._running.commit(pending)
            if self._outputs is not None:
                self._outputs.commit()
            self._update.apply(found, inputs)
        self._marks = marks(found)

    def attach(self, optimizer: Optimizer) -> Self:
        """Let the optimizer call `step()` before each of its own, in loops one does not own.

        The optimizer keeps this object alive. Not both: a loop that attaches does not call `step()`.

        Raises:
            InvalidInputError: attached already, closed, not a torch optimizer, LBFGS, or none of its parameters is a
                covered layer's weight.
        """
        if self._attached is not None or self._closed:
            raise InvalidInputError(
                f"this object is {'closed' if self._closed else 'attached to an optimizer already'}"
            )
        self._attached = attach_to(optimizer, self._layers, self.step)
        return self

    def preconditioner(self, space: ParameterSpace | None = None) -> BNPPreconditioner:
        """The `P` of the last step, damping and `q` included, as it is measured.

        Args:
            space: the chart, dtype and device to have it in, such as `risk.space`; default that of the parameters
                that train.

        Raises:
            InvalidInputError: before the first step.
        """
        if not self._running.step:
            raise InvalidInputError("there is no P before the first step()")
        space = trainable_space(unwrap(self.model)) if space is None else space
        return self._update.preconditioner(space, self.covered, self.uncovered)

    def state_dict(self) -> dict[str, Any]:
        """Statistics, steps and scales; options and rows since the last step are not part of it."""
        self._running.check()
        return _write_state(self._running, self._update.q2, self._outputs)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`.

        Raises:
            InvalidInputError: it comes from another architecture, or is none.
        """
        self._update.q2 = _read_state(state, self._running, self._outputs)
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

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{len(self.covered)} layers, {self._running.step} steps"
        return f"<BNP {state}, {self.settings}>"

    def _detach(self) -> None:
        for handle in [*self._hooks, *([self._attached] if self._attached else [])]:
            handle.remove()
        self._attached, self._closed = None, True
        self._forget()

    def _forget(self) -> None:
        """Leave out what was seen since the last step."""
        self._pending, self._inputs = {}, {}
        if self._outputs is not None:
            self._outputs.forget()

    def receive(self, index: int, h: Tensor) -> None:
        """Take in an input of a layer, from its hook."""
        layer = self._layers[index]
        if not layer.trains:
            return
        seen = batch_moments(layer, h, self.settings.statistics)
        if seen is None:
            return
        before = self._pending.get(index)
        self._pending[index] = seen if before is None else pool_moments(before, seen)
        if self.settings.q == "measured":
            self._inputs.setdefault(index, []).append(h.detach())

    def _refuse_single_rows(self) -> None:
        single = [self._layers[i].name for i, m in self._pending.items() if m.samples < 2]
        if single:
            self._forget()
            raise InvalidInputError(
                f"variance='within' on one row: the variance within the batch of layer {single[0]!r} is 0 and would "
                "drive sigma to 0. Use variance='total', right at any batch size, variance='paper', or larger batches"
            )


def _write_state(running: RunningMoments, q2: Mapping[int, float], outputs: OutputScales | None) -> dict[str, Any]:
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
            "q2": q2.get(i, 1.0),
        }
        if outputs is not None:
            layers[name] |= outputs.state(i)
    return {"version": _STATE_VERSION, "step": running.step, "layers": layers}


def _read_state(state: Mapping[str, Any], running: RunningMoments, outputs: OutputScales | None) -> dict[int, float]:
    """Put a state into the running statistics; nothing changes unless all of it fits.

    Returns:
        `q^2` of the layers seen.

    Raises:
        InvalidInputError: no such state, other layers, or other widths.
    """
    if (
        not isinstance(state, Mapping)
        or not {"step", "layers"} <= state.keys()
        or state.get("version") != _STATE_VERSION
    ):
        raise InvalidInputError(f"this is no state of BNP, version {_STATE_VERSION}")
    layers = {clean_name(name): entry for name, entry in state["layers"].items()}
    misfit = [f"missing: {n}" for n in running.names if n not in layers]
    misfit += [f"unknown: {n}" for n in layers if n not in running.names]
    for name, width in zip(running.names, running.widths, strict=True):
        if name in layers and tuple(layers[name]["mean"].shape) != (width,):
            misfit.append(f"{name!r} has {tuple(layers[name]['mean'].shape)} means, expected {(width,)}")
    if outputs is not None and any("output_squares" not in entry for entry in layers.values()):
        misfit.append("it was saved without output_scale='estimated'")
    if misfit:
        raise InvalidInputError(
            f"the state does not fit: {'; '.join(misfit)}. It comes from another architecture, or from other "
            "include=, exclude= or statistics="
        )
    ordered = [layers[name] for name in running.names]
    if outputs is not None:
        outputs.load(ordered)
    like = None if running.now is None else running.now.values.device
    moments = [torch.cat([entry[key] for entry in ordered]) for key in ("mean", "variance")]
    running.set(torch.stack(moments).to(like) if state["step"] else None)
    running.rows = [int(entry["rows"]) for entry in ordered]
    running.examples = [int(entry.get("examples", entry["rows"])) for entry in ordered]
    running.start = [float(entry["start"]) for entry in ordered]
    running.step = int(state["step"])
    return {i: float(entry["q2"]) for i, entry in enumerate(ordered) if entry["rows"]}
