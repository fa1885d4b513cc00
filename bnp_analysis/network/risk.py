"""The empirical risk: a pure function of the parameters, for a fixed model, loss and data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.func import functional_call

from bnp_analysis.distributed import ALONE, Group
from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.operators import require_no_autocast
from bnp_analysis.network.batches import Batch, Batches, Count, Inputs, arguments, one_tensor
from bnp_analysis.network.derivatives import Trial, require_gradient
from bnp_analysis.network.kernels import derivative, explained, recording, with_differentiable_kernels
from bnp_analysis.network.layer_kinds import Layer, by_module
from bnp_analysis.network.observation import (
    Visit,
    WithModel,
    differentiable_part,
    forward_hooks,
    live_tensors,
    reads_model,
)
from bnp_analysis.network.parameters import ParameterSpace, choose_parameters
from bnp_analysis.network.precision import GENERIC, Precision, find_precision
from bnp_analysis.network.purity import require_mean_loss, require_pure
from bnp_analysis.network.smooth import Accurate, untransformed
from bnp_analysis.network.snapshot import brought, fingerprint, point, snapshot, snapshot_loss, tied_names, with_tensors
from bnp_analysis.runtime.kinds import gated, require_loss, require_plain
from bnp_analysis.runtime.threads import LOCK
from bnp_analysis.runtime.trees import all_finite, counterpart, map_tensors

Loss = Callable[..., Tensor]


class EmpiricalRisk:
    """The mean loss `L(theta) = (1/N) sum_j l(f(x_j; theta), y_j)` as a pure function of `theta`.

    Everything is a snapshot: the model (parameters, buffers, train flags) and data held in memory are copied,
    so that later training changes neither the risk nor an operator made from it; and no measurement changes
    the model, its gradients or any global state.

    Args:
        model: any `nn.Module`.
        loss: `loss(output, y)`, a scalar, the mean over the batch. With a third positional argument it also gets the
            network at `theta`, an `nn.Module`: for penalties (`model.parameters()`) and residuals (`model(points)`).
        data: one batch `(x, y)`, or an iterable of batches that can be read again (list, `DataLoader`). `x` is
            a tensor, a tuple (`model(*x)`) or a dict (`model(**x)`).
        params: names, prefixes, or a filter `(name, parameter) -> bool`; default every parameter that
            requires a gradient. The others are constants.
        at: the point `theta`: a flat vector `(n,)` over `space`, or a state dict. Default: the model's.
        output: picks the output tensor, for instance `lambda o: o.logits`.
        count: `count(x, y)`, or `count(pair)` of one argument: the weight of a batch in the mean; default its number of
            examples.
        dtype: of parameters and floating-point data; default the model's.
        device: default the model's.
        group: the processes that share the data (`bnp.distributed`); `data` is then this one's shard, perhaps an empty
            list, and the risk that of all shards together. All of them make the same calls.
        derivatives: `"exact"`: they are tried against differences and refused where they are not those of the risk;
            `"surrogate"`: taken as they are (straight-through, surrogate gradients), and every result says so.

    Attributes:
        space: the `ParameterSpace` of `theta`.
        theta: `(n,)`, the point.
        output: the argument of that name.
        coupled: whether an example's output depends on the rest of its batch.
        precision: the coarsest dtype that the loss and its derivatives pass through, and which operation of which
            module lowered it: `float64`, or `float32 (softmax in block.2)`.
        eps: its spacing at 1, of which every tolerance and radius is made.
        derivatives: the argument of that name.
        with_model: whether the loss gets the network as well.

    Raises:
        DerivativeError: autograd's gradient is not that of the risk (`detach`, modules that run again in the backward
            pass, ...), or the loss reads the parameters of `model` itself. Names the tensors and the causes.
        InvalidInputError: a filter that matches nothing, parameters that are not floating point, a loss that is
            not a scalar or not a mean where that matters, a state that does not fit, an empty loader.
        NonFiniteError: NaN or infinity in data (names the batch), parameters (names them) or the loss.
        DistributedError: another process failed or was lost, or has another model or loss.
        StochasticModelError: random layers in training mode, or batch-coupled ones over several batches.
        InconsistentDataError: a loader whose contents change between passes.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.eye(3), torch.tensor([0, 1, 1])
        >>> model = torch.nn.Linear(3, 2)
        >>> risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, y))
        >>> risk.space.dim, tuple(risk.gradient.shape)
        (8, (8,))
    """

    @recording()
    @gated
    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Any,
        *,
        params: Iterable[str] | Callable[[str, nn.Parameter], bool] | None = None,
        at: Tensor | Mapping[str, Tensor] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        count: Count | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        group: Group = ALONE,
        derivatives: Literal["exact", "surrogate"] = "exact",
    ) -> None:
        if derivatives not in ("exact", "surrogate"):
            raise InvalidInputError(f"derivatives must be 'exact' or 'surrogate', got {derivatives!r}")
        require_loss(loss)
        self.group, self.derivatives = group, derivatives
        with group.together("the construction of a risk"):
            self._model = snapshot(model, dtype, device)
            self.output, self.inputs = output, Inputs()
            self._tied = tied_names(self._model)
            self._recurrent = any(isinstance(m, nn.RNNBase) for m in self._model.modules())
            self.space = choose_parameters(self._model, params)
            self._model.requires_grad_(False)
            self.with_model, live = reads_model(loss), live_tensors(loss, model)
            self._loss = snapshot_loss(loss, self.space.dtype, self.space.device)
            self.batches = Batches(data, count, self.space.dtype, self.space.device, group)
            own = {name: p.detach() for name, p in self._model.named_parameters()}
            self.theta = self.space.flatten(own).clone()
            self._constants = {name: p for name, p in own.items() if name not in self.space}
            if at is not None:
                self._move(at)
            self._cache: dict[str, Tensor] = {}
            # What follows from the outputs and the loss alone, for all risks that have these outputs.
            self._of_outputs: dict[str, Tensor] = {}
            # Which second derivatives have been tried, for all risks made of this one, and where gradients were.
            self.tried = set[str]()
            self.place: Trial | None = None
            self._require_finite_parameters()
            self.group.require_same(lambda: fingerprint(self._model, self._loss, self.theta), "the risk")
            self._precision: Precision | None = find_precision(self)
            self.coupled = require_pure(self, live)
            _ = self.value
            self.inputs.settle()
            if self.batches.everywhere > 1:
                require_mean_loss(self)
            if derivatives == "exact":
                require_gradient(self)

    def __call__(self, theta: Tensor) -> Tensor:
        """The risk at another point, a scalar tensor.

        Raises:
            NonFiniteError: the loss of a batch is NaN or infinite; names the batch.
        """
        require_plain(theta, "theta")
        theta = theta.to(self.theta)
        return self.group.sum(lambda: self._part(theta), "the risk", of=theta).to(self.space.dtype)

    def _part(self, theta: Tensor) -> Tensor:
        """What this process's batches add to the risk."""
        total = torch.zeros((), dtype=torch.float64, device=self.space.device)
        tensors = self.space.unflatten(theta)
        with torch.no_grad():
            for batch in self.batches:
                loss = self.batch_loss(self.batch_outputs(tensors, batch), batch, tensors)
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError(
                        f"the loss of batch {batch.index} is {loss.item()} at this theta, so the risk and its "
                        "derivatives are not numbers. Look at the learning rate, the inputs and the dtype"
                    )
                total += batch.count / self.batches.total * loss.double()
        return total

    def remembered(self, what: str, compute: Callable[[], Tensor], *, of_outputs: bool = False) -> Tensor:
        """What was computed once of this risk at its own point; of its outputs, whichever tensors are free."""
        cache = self._of_outputs if of_outputs else self._cache
        if what not in cache:
            cache[what] = compute()
        return cache[what]

    @property
    def value(self) -> Tensor:
        """`L(theta)`, a scalar tensor."""
        return self.remembered("value", lambda: self(self.theta)).clone()

    @property
    @recording()
    def gradient(self) -> Tensor:
        """`grad L(theta)`, `(n,)`."""
        return self.remembered("gradient", self._whole_gradient).clone()

    def _whole_gradient(self) -> Tensor:
        total = self.group.sum(self._gradient_part, "the gradient", of=self.theta)
        if not bool(torch.isfinite(total).all()):
            raise NonFiniteError("the gradient has NaN or infinite entries though the loss is finite")
        return total

    def _gradient_part(self) -> Tensor:
        total = torch.zeros(self.space.dim, dtype=self.space.dtype, device=self.space.device)
        for batch in self.batches:
            tensors = self.leaves()
            loss = self.batch_loss(self.batch_outputs(tensors, batch), batch, tensors)
            total += batch.count / self.batches.total * self.pullback(loss, tensors)
        return total

    @property
    def outputs(self) -> Tensor:
        """`f(x_j; theta)` over all batches, concatenated in the order of the pass, processes in that of ranks.

        Of a model whose output is one number for a batch, these numbers.
        """
        tensors = self.space.unflatten(self.theta)
        with torch.no_grad():
            own = self.group.share(lambda: [self.batch_outputs(tensors, b).cpu() for b in self.batches], "outputs")
        return torch.cat([part if part.ndim else part.view(1) for parts in own for part in parts]).to(self.space.device)

    @recording()
    def at(self, theta: Tensor | Mapping[str, Tensor]) -> EmpiricalRisk:
        """The same risk at another point; model and data are shared, nothing is checked again but the point."""
        other = self._copied()
        other._move(theta)
        other.group.agree(other.theta, "the point")
        other._require_finite_parameters()
        return other

    @recording()
    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> EmpiricalRisk:
        """The same risk in another dtype, and on another device; nothing is checked again."""
        where = self.space.device if device is None else torch.device(device)
        if dtype == self.space.dtype and where == self.space.device:
            return self
        other = self._copied(GENERIC)
        other._model = brought(copy.deepcopy(self._model), dtype, where)
        other._loss = snapshot_loss(self._loss, dtype, where)
        other.space = ParameterSpace(self.space.shapes, dtype, where, self.space.aliases, self.space.transposed)
        other.theta = self.theta.to(dtype=dtype, device=where)
        other._constants = {n: t.to(device=where, dtype=counterpart(t, dtype)) for n, t in self._constants.items()}
        other.batches = self.batches.to(dtype, where)
        other._cache = {name: t.to(other.theta) for name, t in other._cache.items()}
        # Found when it is asked for; over several processes now, since all of them take part.
        other._precision = None if other.group.size == 1 else find_precision(other)
        return other

    @property
    def precision(self) -> Precision:
        """The coarsest dtype that the loss and its derivatives pass through, and what lowered it."""
        if self._precision is None:
            self._precision = find_precision(self)
        return self._precision

    @property
    def eps(self) -> float:
        """The spacing at 1 of the precision in which the risk and its derivatives are computed."""
        return self.precision.eps

    def gathered(self) -> EmpiricalRisk:
        """The same risk with the data of all processes in each of them, for what cannot be split.

        Raises:
            MemoryLimitError: the data do not fit into one process.
        """
        if self.group.size == 1:
            return self
        other = copy.copy(self)
        other.group, other.batches, other._of_outputs = ALONE, self.batches.gathered(), {}
        return other

    @recording()
    def restrict(self, names: Iterable[str]) -> EmpiricalRisk:
        """The risk as a function of some of its tensors; the others stay constant at the present point."""
        other = self._copied("value")
        other._of_outputs, other.space = self._of_outputs, self.space.restrict(names)
        tensors = self.space.unflatten(self.theta)
        other._constants = self._constants | {n: t for n, t in tensors.items() if n not in other.space}
        other.theta = other.space.flatten(tensors)
        return other

    def _copied(self, *kept: str) -> EmpiricalRisk:
        """The same risk, of which nothing is remembered but what `remembered` has under some names."""
        other = copy.copy(self)
        other._cache = {name: self._cache[name] for name in kept if name in self._cache}
        other._of_outputs = {}
        return other

    def leaves(self) -> dict[str, Tensor]:
        """Fresh leaves at `theta` that record gradients."""
        return {name: t.clone().requires_grad_() for name, t in self.space.unflatten(self.theta).items()}

    def named_tensors(self) -> dict[str, Tensor]:
        """Every parameter of the model at `theta`, free or constant, under its name."""
        return {**self._constants, **self.space.unflatten(self.theta)}

    def batch_outputs(self, tensors: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """`f(x; theta)` for a batch, at named tensors."""
        require_no_autocast(self.space.dtype, self.space.device, "the outputs of the model")
        what = f"the outputs of the model for batch {batch.index}"
        # Derivatives inside forward() are recorded whatever is wanted of its outputs.
        with explained(what, self._model), self.inputs.given(batch.x, batch.own) as x, recording():
            args, kwargs = arguments(x)
            out = one_tensor(self._call(self._model, tensors, args, kwargs), self.output)
            # Outputs in a coarser dtype than the parameters': exact in theirs, so that all that follows has one dtype.
            wide = torch.promote_types(out.dtype, self.space.dtype)
            out = out if out.dtype == wide else out.to(wide)
        return out if torch.is_grad_enabled() else out.detach()

    def _call(self, module: nn.Module, tensors: Mapping[str, Tensor], args: Any, kwargs: Any, prefix: str = "") -> Any:
        # Copies, no operations of the network: batch statistics write into buffers.
        with torch._C.DisableTorchFunction():
            buffers = {name: b.clone() for name, b in self._model.named_buffers()}
        values = {**self._constants, **tensors, **buffers}
        values |= {other: values[name] for other, name in self._tied.items() if name in values}
        values = {prefix + name: t for name, t in values.items()} if prefix else values
        return with_differentiable_kernels(
            lambda: functional_call(module, values, args, kwargs, tie_weights=False), recurrent=self._recurrent
        )

    def batch_loss(self, outputs: Tensor, batch: Batch, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss of a batch from its outputs, a scalar; a loss that gets the network has it at `tensors`."""
        what = f"the loss of batch {batch.index}, of outputs {tuple(outputs.shape)},"
        with explained(what), recording(), Accurate():
            if self.with_model:
                at = self.space.unflatten(self.theta) if tensors is None else tensors
                value = self._call(WithModel(self._loss, self._model), at, (outputs, batch.y), {}, "model.")
            else:
                value = self._loss(outputs, batch.y)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInputError(
                f"loss(output, y) gave {got}, not a scalar, the mean over the batch: write reduction='mean', or "
                "lambda output, y: loss(output, y).mean()"
            )
        if value.is_complex():
            raise InvalidInputError(
                "loss(output, y) gave a complex number, which has no smallest value: write what is minimized, such as "
                "lambda output, y: loss(output, y).abs()"
            )
        return value.reshape(()) if torch.is_grad_enabled() else value.detach().reshape(())

    def require_loss_of_outputs(self, what: str) -> None:
        """Refuse what is defined by the outputs' curvature alone.

        Raises:
            InvalidInputError: the loss gets the network; says which ways there are.
        """
        if self.with_model:
            raise InvalidInputError(
                f"{what} is made of the loss's curvature in the outputs, J^T S J, but this loss also depends on the "
                "parameters directly, loss(output, y, model): that part would be left out. hessian(risk) has all of "
                "it. Or let forward() return what the loss needs (a residual, features) as outputs, and give "
                "loss(output, y); for an L2 penalty c |theta|^2 take the risk without it and shift the matrix by 2 c"
            )

    @property
    def provenance(self) -> dict[str, Any]:
        """What results keep of how their derivatives came about, and of what lowers their precision."""
        kept = {"derivatives": self.derivatives} if self.derivatives != "exact" else {}
        return kept | ({"precision": str(self.precision)} if self.precision.cause else {})

    def code(self) -> list[Any]:
        """The model and the loss; look, do not touch."""
        return [self._model, self._loss]

    def alone(self, batch: Batch) -> EmpiricalRisk:
        """The same model and loss over one batch, in this process alone."""
        other = self._copied(GENERIC)  # a point is no matter of the data
        other.group, other.batches = ALONE, self.batches.alone(batch)
        return other

    def pullback(self, scalar: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """The flat gradient of a scalar in named leaf tensors; zero for unused ones."""
        if not scalar.requires_grad:
            return torch.zeros(self.space.dim, dtype=self.space.dtype, device=self.space.device)
        grads = derivative(scalar, [*tensors.values()], what="the gradient")
        return self.space.flatten(g.detach() for g in grads)

    def capture(self, visit: Visit, names: Iterable[str] | None = None, *, numbers: bool = True) -> None:
        """Run this process's batches without gradients, showing `visit(name, module, inputs, output)` every module.

        Inputs and outputs are shown as numbers without history, or else as the very tensors that the modules see:
        inside `torch.func` these belong to its transforms.
        """
        tensors = self.space.unflatten(self.theta)

        def plain(t: Tensor) -> Tensor:
            return untransformed(t).detach()

        def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
            # What a visitor computes is no part of the transforms that the model runs.
            with temporarily_clear_interpreter_stack():
                visit(name, module, map_tensors(args, plain), map_tensors(output, plain))

        with LOCK, forward_hooks(self._model, look if numbers else visit, names), torch.no_grad():
            for batch in self.batches:
                self.batch_outputs(tensors, batch)

    @recording()
    def record(
        self, batch: Batch, layers: Iterable[Layer], leaves: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
        """Run one batch with gradients: its outputs, and each layer's `(input, output)` per occurrence, by its name.

        Modules with layers inside run as loops over time, in which every step is an occurrence.
        """
        known = by_module(layers)
        seen: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for own in known.values() for layer in own}

        def note(name: str, module: nn.Module, args: Any, output: Any) -> Any:
            apart = known[name][0].apart(args)
            handed, uses = (output.clone(), {}) if apart is None else apart
            for layer in known[name]:
                for h, a in uses.get(layer.kind.weight, [(args[0], output)]):
                    # Copies: what follows may write into the layer's input, an activation in place into its output.
                    with temporarily_clear_interpreter_stack():
                        received = untransformed(h).detach().clone()
                    seen[layer.name].append((received, differentiable_part(a)))
            return handed

        with LOCK, forward_hooks(self._model, note, known):
            return self.batch_outputs(self.leaves() if leaves is None else leaves, batch), seen

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The modules of the snapshot under their names; look, do not touch."""
        yield from self._model.named_modules()

    def _move(self, at: Tensor | Mapping[str, Tensor]) -> None:
        self.theta, rest = point(at, self._model, self.space)
        if rest:
            # Buffers and constants of the state belong to the point as well: a model of its own.
            self._model = with_tensors(self._model, rest)
            own = dict(self._model.named_parameters())
            self._constants = self._constants | {n: own[n].detach() for n in rest if n in self._constants}

    def _require_finite_parameters(self) -> None:
        if all_finite(self.theta) and all(map(all_finite, self._constants.values())):
            return
        bad = [n for n, t in self.named_tensors().items() if not all_finite(t)]
        if bad:
            raise NonFiniteError(f"parameters with NaN or infinite entries: {', '.join(bad)}")

    def __repr__(self) -> str:
        kind, data = type(self._model).__name__, f"{self.batches.total:g} examples in {self.batches.number} batches"
        return f"<EmpiricalRisk of {kind}, {self.space.dim} parameters, {data}, {self.space.dtype}>"
