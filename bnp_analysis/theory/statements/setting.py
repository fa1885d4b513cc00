"""Statements, their execution, and the problem, refusals and oracles that their checks share.

Oracles are the same risk with modules replaced, and BNP of one layer written out, dense, from its definition.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bnp_analysis.curvature import gauss_newton
from bnp_analysis.errors import BNPAnalysisError
from bnp_analysis.linalg import (
    ConditionNumber,
    MatrixOperator,
    Preconditioner,
    SymmetricOperator,
    singular_condition_number,
)
from bnp_analysis.network import Coverage, EmpiricalRisk, Layer, coverage, layer_rows
from bnp_analysis.network.batches import Batch, slice_batch
from bnp_analysis.network.layers import products_only
from bnp_analysis.network.parameters import Block
from bnp_analysis.network.risk import Loss
from bnp_analysis.precondition import BlockDiagonal, BNPBlock, BNPPreconditioner, bnp_preconditioner
from bnp_analysis.runtime.random import generator
from bnp_analysis.runtime.trees import tensors_of
from bnp_analysis.symmetry import NullDirections, elementwise, layers, null_directions
from bnp_analysis.symmetry.operations import OPERATIONS
from bnp_analysis.symmetry.recording import kind_of
from bnp_analysis.theory.check import Check, Source

# Parameters of a dense reference matrix, and numbers in the factor that it is made of.
DENSE_LIMIT = 1_500
FACTOR_LIMIT = 40_000_000
_UNDAMPED = {
    **{"eps1": 0.0, "eps2": 0.0, "q": "auto"},
    **{"statistics": "channel", "bias_free": "rank-one", "output_scale": False},
}

# Where each of these is not differentiable; both sides are linear.
_KINKS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("relu", "leaky_relu", "prelu", "abs"), (0.0,)),
    **{"relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0)},
}
# Linear in each argument that carries activations, or choosing among them; and what the table does not know.
_LINEAR = {
    *(layers.linear, layers.convolution, elementwise.summed, elementwise.negated, elementwise.reduced),
    *(elementwise.pooled, elementwise.same, elementwise.moved, elementwise.padded, elementwise.chosen),
}
_ALSO_LINEAR = {"detach", "dropout", "maximum", "minimum"}


# Statements on `P P^T`, and up to where what they compare is a relative distance.
_THROUGH_P = {Source.THEOREM_3, Source.ALGORITHM_2, Source.PROP_7, Source.T9, Source.T12}
_DISTANCE = 1e-7


class NotApplicable(Exception):
    """A hypothesis fails, or could not be verified; the message is the reason."""


@dataclass
class Activations(TorchFunctionMode):
    """The nonlinear operations of forward passes, noted while they run.

    Attributes:
        smooth: operations that are neither linear nor piecewise linear, with their counts.
        kinked: piecewise linear operations, with their counts.
        on_kink: entries that lie exactly on a kink, where there is no derivative.
    """

    smooth: dict[str, int] = field(default_factory=dict)
    kinked: dict[str, int] = field(default_factory=dict)
    on_kink: int = 0

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, kind = str(getattr(func, "__name__", func)).strip(), kind_of(func).strip("_")
        given = tensors_of(args[0]) if args else []
        # Counted before the call, which may write into its input.
        self.on_kink += sum(int((given[0] == kink).sum()) for kink in _KINKS.get(kind, ()) if given)
        result = func(*args, **kwargs)
        live = kind != "batch_norm" or bool(kwargs.get("training", args[5] if len(args) > 5 else False))
        known = OPERATIONS[kind].effect if kind in OPERATIONS else None
        linear = not live or known in _LINEAR or kind in _ALSO_LINEAR
        produced = tensors_of(result if isinstance(result, Tensor | tuple | list) else ())
        if not linear and any(t.is_floating_point() for t in produced):
            book = self.kinked if kind in _KINKS else self.smooth
            book[name] = book.get(name, 0) + 1
        return result


def activations(risk: EmpiricalRisk) -> Activations:
    """Run a risk's data once and note every operation.

    Args:
        risk: the empirical risk.

    Returns:
        The `Activations`.

    Source: the hypotheses of T1'.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(4, 3), torch.zeros(4, dtype=torch.long)
        >>> risk = bnp.EmpiricalRisk(bnp.models.mlp([3, 2, 2]), torch.nn.functional.cross_entropy, (x, y))
        >>> activations(risk).kinked, activations(risk).smooth
        ({'relu': 1}, {})
    """
    found, tensors = Activations(), risk.named_tensors()
    for batch in risk.batches:
        with torch.no_grad(), found:
            risk.batch_outputs(tensors, batch)
    return found


def dense(layer: Layer) -> bool:
    """Whether a layer is dense; else it is a convolution."""
    return not layer.spatial


def passing(risk: EmpiricalRisk, name: str) -> list[tuple[Tensor, Tensor]]:
    """What goes into a module and what comes out, in the order of the calls."""
    found: list[tuple[Tensor, Tensor]] = []
    risk.capture(lambda name, module, args, out: found.append((args[0].clone(), out.clone())), [name])
    return found


class Problem:
    """A risk with a preconditioner, and what several checks need of them, computed once.

    Args:
        risk: the empirical risk.
        preconditioner: over `risk.space`; default the undamped BNP one.
        seed: of every random choice.
        limit: parameters up to which dense reference matrices are formed.
    """

    def __init__(
        self,
        risk: EmpiricalRisk,
        preconditioner: Preconditioner | None = None,
        *,
        seed: int = 0,
        limit: int = DENSE_LIMIT,
    ) -> None:
        # Statements look at rows and examples: with several processes each of them has all.
        self.risk, self.seed, self.limit = risk.gathered(), seed, limit
        self._preconditioner = preconditioner
        # What two statements need: the second finds what the first computed.
        self.results: dict[Any, Any] = {}

    def of(self, risk: EmpiricalRisk) -> Problem:
        """Another risk under the same seed and limit."""
        return Problem(risk, seed=self.seed, limit=self.limit)

    @cached_property
    def layers(self) -> Coverage:
        """The covered layers.

        Raises:
            NotApplicable: there is none.
        """
        found = coverage(self.risk).without(
            lambda layer: layer.inner or layer.kind.gain or (layer.kind.transposed and layer.spatial),
            "the statements are about dense layers and convolutions whose weights are parameters",
        )
        if not found.covered:
            why = "; ".join(f"{n}: {reason}" for n, reason in found.uncovered.items())
            raise NotApplicable(f"no covered layer ({why})")
        return found

    @cached_property
    def bnp(self) -> BNPPreconditioner:
        """The undamped BNP preconditioner: the given one if it is that, else made here."""
        given = self._preconditioner
        if isinstance(given, BNPPreconditioner) and all(given.settings.get(k) == v for k, v in _UNDAMPED.items()):
            return given
        _ = self.layers
        return bnp_preconditioner(self.risk)

    @cached_property
    def P(self) -> Preconditioner:
        """The given preconditioner, or BNP's."""
        return self.bnp if self._preconditioner is None else self._preconditioner

    @cached_property
    def moving(self) -> Problem:
        """The problem where its gradient is more than rounding: here, or a little beside a critical point."""
        theta = self.risk.theta
        noise = torch.randn(theta.shape, generator=self.random(1), dtype=torch.float64).to(theta)
        beside = self.risk.at(theta + 0.01 * (theta.abs() + theta.abs().mean()) * noise)
        return self if self.risk.gradient.norm() > 1e-6 * beside.gradient.norm() else self.of(beside)

    @cached_property
    def uses(self) -> dict[str, int]:
        """How often each covered layer runs in one forward pass."""
        counts = dict.fromkeys((layer.name for layer in self.layers), 0)

        def note(name: str, module: Any, args: Any, output: Any) -> None:
            counts[name] += 1

        self.risk.capture(note, counts)
        return {name: count // self.risk.batches.number for name, count in counts.items()}

    @cached_property
    def alone(self) -> set[str]:
        """The covered layers whose weight acts through its product alone, not inside derivatives in `forward`."""
        leaves, batch = self.risk.leaves(), next(iter(self.risk.batches))
        outputs, seen = self.risk.record(batch, self.layers, leaves)
        return products_only(self.layers, leaves, outputs, seen)

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """The rows of every covered layer, `(R, groups, m)`."""
        return layer_rows(self.risk, self.layers)

    @cached_property
    def activations(self) -> Activations:
        """What kind of nonlinear operations the network has."""
        return activations(self.risk)

    @cached_property
    def null(self) -> NullDirections:
        """The verified null directions of the Gauss-Newton matrix."""
        self.require_size(self.risk.space.dim)
        return null_directions(self.risk)

    @cached_property
    def factor(self) -> Tensor:
        """The dense factor `F`, `F^T F` the Gauss-Newton matrix of the whole network.

        Raises:
            NotApplicable: there is none, or it is too large.
        """
        self.require_size(self.risk.space.dim)
        found = gauss_newton(self.risk).factor
        if found is None:
            raise NotApplicable("the loss is not convex in the outputs, or not separate over examples: no factor")
        if found.shape[0] * found.shape[1] > FACTOR_LIMIT:
            raise NotApplicable(
                f"the dense factor is {found.shape[0]} x {found.shape[1]}, more than {FACTOR_LIMIT:,} numbers"
            )
        return found.to_dense()

    def dense(self, make: Callable[..., SymmetricOperator], block: Block | None = None) -> Tensor:
        """The dense matrix of `hessian` or `gauss_newton`, or of a block.

        Raises:
            NotApplicable: it is too large.
        """
        A = make(self.risk, block=block)
        self.require_size(A.dim)
        return A.to_dense()

    def require_once(self, layer: Layer) -> None:
        """Refuse a layer that runs several times in one forward pass, or that derivatives inside it use again.

        Raises:
            NotApplicable: with the number.
        """
        if layer.name not in self.alone:
            raise NotApplicable("forward() differentiates through the layer: its weight acts beside its own product")
        if self.uses[layer.name] != 1:
            raise NotApplicable(f"the layer runs {self.uses[layer.name]} times in one forward pass")

    def require_smooth(self) -> None:
        """Refuse points without derivatives.

        Raises:
            NotApplicable: an entry lies exactly on a kink.
        """
        count = self.activations.on_kink
        if count:
            raise NotApplicable(
                f"{count} pre-activations lie exactly on a kink: there is no derivative, and the one that is computed "
                "depends on rounding"
            )

    def require_size(self, dim: int, what: str = "a dense reference matrix") -> None:
        """Refuse dense work beyond the limit, with the size.

        Raises:
            NotApplicable: `dim` is larger than the limit.
        """
        if dim > self.limit:
            raise NotApplicable(f"{dim} parameters; {what} takes up to {self.limit}")

    def some_units(self, layer: Layer, count: int = 3) -> list[int]:
        """A few units of a layer, spread over it."""
        return sorted({i * (layer.units - 1) // max(count - 1, 1) for i in range(min(count, layer.units))})

    def random(self, stream: int) -> torch.Generator:
        """A local generator, another for each purpose."""
        return generator(self.seed, stream)


Attempt = Callable[[Problem], Iterable[Check]]
#: Every statement that a module of this folder has registered.
REGISTRY: dict[Source, Statement] = {}


@dataclass(frozen=True)
class Statement:
    """A statement, and how it is tried on a problem.

    Called with a risk it gives its checks; never an error for a problem that it does not apply to.

    Attributes:
        source: which one it is.
        words: what it says, for tables where it could not be tried.
        attempt: the checks of one problem, one after the other.
    """

    source: Source
    words: str
    attempt: Attempt

    def __call__(
        self, risk: EmpiricalRisk | Problem, preconditioner: Preconditioner | None = None, *, seed: int = 0
    ) -> tuple[Check, ...]:
        """The checks of this statement over a risk.

        Args:
            risk: the empirical risk, in float64.
            preconditioner: over `risk.space`; default the undamped BNP one.
            seed: of random choices.

        Returns:
            At least one `Check`.
        """
        problem = risk if isinstance(risk, Problem) else Problem(risk, preconditioner, seed=seed)
        return tuple(self.run(problem))

    def run(self, problem: Problem) -> Iterator[Check]:
        """The checks as they are made; what cannot be tried is *not applicable*, with the reason."""
        yield from signed(self.source, self._tried(problem))

    def _tried(self, problem: Problem) -> Iterator[Check]:
        if problem.risk.eps > torch.finfo(torch.float64).eps:
            why = f"{problem.risk.precision}: rounding would hide what is checked; measure in float64 throughout"
            yield refused(self.words, why)
            return
        check = None
        for check in attempted(self.words, self.attempt(problem)):
            yield within_rounding(check, problem) if self.source in _THROUGH_P else check
        if check is None:
            yield refused(self.words, "nothing in this network that it speaks of")


def statement(source: Source, words: str) -> Callable[[Attempt], Statement]:
    """Register a function over a problem as the check of a statement; its checks get the statement's name."""

    def registered(attempt: Attempt) -> Statement:
        made = Statement(source, words, attempt)
        object.__setattr__(made, "__doc__", attempt.__doc__)
        # A module that is run again, or a test's own statement, does not replace the first.
        REGISTRY.setdefault(source, made)
        return made

    return registered


def per_layer(
    words: str, *, only: Callable[[Layer], bool] = lambda layer: True
) -> Callable[[Callable[[Problem, Layer], Iterable[Check]]], Attempt]:
    """Make a function over a layer one over a problem: every covered layer in turn, named in its checks.

    Args:
        words: what is said of a layer that is refused; a refusal is that layer's alone.
        only: the layers that are spoken of.
    """

    def over_layers(attempt: Callable[[Problem, Layer], Iterable[Check]]) -> Attempt:
        def checks(problem: Problem) -> Iterator[Check]:
            for layer in filter(only, problem.layers):
                yield from located(label(layer), attempted(words, attempt(problem, layer)))

        checks.__doc__ = attempt.__doc__
        return checks

    return over_layers


def attempted(words: str, checks: Iterable[Check]) -> Iterator[Check]:
    """The checks as they are made; a refusal or an error among them becomes *not applicable*."""
    try:
        yield from checks
    except NotApplicable as refusal:
        yield refused(words, str(refusal))
    except (BNPAnalysisError, ArithmeticError) as error:  # numbers beyond the floats
        yield refused(words, f"could not be tried: {error}")


def within_rounding(check: Check, problem: Problem) -> Check:
    """A relative distance that fails by no more than rounding explains gives no verdict; any other check is returned.

    `P P^T` multiplies what is left of `Gw - Gb mu^T` by `mu / sigma^2`: rounding grows by the square of `mu / sigma`.
    """
    if check.holds is not False or check.relation != "<=" or not check.predicted <= _DISTANCE:
        return check
    ratio = max(
        float((m.mean.abs() / m.damped().sqrt()).max()) for m in map(partial(own_moments, problem), problem.layers)
    )
    rounding = 100 * torch.finfo(torch.float64).eps * ratio**2
    if not check.observed <= rounding:
        return check
    reason = (
        f"means of up to {ratio:.2g} deviations leave {rounding:.2g} to rounding, and {check.observed:.2g} was found"
    )
    return refused(check.statement, reason, source=check.source, details=check.details)


def signed(source: Source, checks: Iterable[Check]) -> Iterator[Check]:
    """The same checks, with the statement's name where they have none."""
    for check in checks:
        yield check if check.source else dataclasses.replace(check, source=str(source))


def located(where: str, checks: Iterable[Check]) -> Iterator[Check]:
    """The same checks, whose statements say where they were tried."""
    for check in checks:
        yield dataclasses.replace(check, statement=f"{check.statement} [{where}]")


def label(layer: Layer) -> str:
    """The layer's name, or its type for a bare one."""
    return layer.name or type(layer.module).__name__


def compared(
    words: str,
    observed: float,
    relation: str,
    predicted: float,
    *,
    tolerance: float = 0.0,
    given: Sequence[str] = (),
    **more: Any,
) -> Check:
    """A `Check` of the statement that is being tried.

    Args:
        words, observed, relation, predicted, tolerance: see `Check.compare`.
        given: hypotheses that were verified.
        more: `reason`, `details`, or `hypotheses` where one of them does not hold.
    """
    more = {"source": "", "hypotheses": dict.fromkeys(given, True)} | more
    return Check.compare(words, observed=observed, predicted=predicted, relation=relation, tolerance=tolerance, **more)


def equals(words: str, observed: float, predicted: float, **more: Any) -> Check:
    """Claim `observed = predicted`."""
    return compared(words, observed, "=", predicted, **more)


def at_most(words: str, observed: float, predicted: float, **more: Any) -> Check:
    """Claim `observed <= predicted`."""
    return compared(words, observed, "<=", predicted, **more)


def at_least(words: str, observed: float, predicted: float, **more: Any) -> Check:
    """Claim `observed >= predicted`."""
    return compared(words, observed, ">=", predicted, **more)


def agreement(words: str, found: Tensor, expected: Tensor, *, bound: float = 1e-9, **more: Any) -> Check:
    """Whether two arrays agree: their relative distance is at most `bound`, which rounding must explain."""
    return at_most(words, distance(found, expected), bound, **more)


def refused(words: str, reason: str, **more: Any) -> Check:
    """The statement that is being tried does not apply here."""
    return Check.not_applicable(words, reason=reason, **({"source": ""} | more))


def distance(found: Tensor, expected: Tensor) -> float:
    """`|found - expected| / |expected|` in the norm of all entries, whatever their size.

    It is infinite where only `expected` is zero, and where only `found` is not finite.

    Raises:
        NotApplicable: `expected` has left the floats.
    """
    if not expected.numel():
        return 0.0
    if not bool(torch.isfinite(expected).all()):
        raise NotApplicable("what is compared with leaves the range of floats")
    # Squares of entries beyond 1e154 are infinite, of those below 1e-162 zero.
    unit = torch.maximum(found.abs().max(), expected.abs().max())
    if not bool(torch.isfinite(unit)):
        return math.inf
    if not unit > 0:
        return 0.0
    gap, size = float((found / unit - expected / unit).norm()), float((expected / unit).norm())
    return gap / size if size > 0 else math.inf


Replace = Mapping[str, Callable[[nn.Module], nn.Module]]


def rewritten(
    risk: EmpiricalRisk,
    replace: Replace | None = None,
    *,
    batches: Sequence[Batch] | None = None,
    loss: Loss | None = None,
) -> EmpiricalRisk:
    """The risk of the same network, loss and data with some modules replaced, at the same parameters.

    Parameters keep their place in the flat vector where a replacement holds the module it replaces and no parameters
    before it.

    Args:
        risk: the empirical risk.
        replace: name of a module -> a function from a copy of it to its replacement.
        batches: other data, made of the risk's.
        loss: another loss.

    Returns:
        A new `EmpiricalRisk`.
    """
    model = copy.deepcopy(dict(risk.modules())[""])
    tensors = risk.named_tensors()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
            parameter.requires_grad_(name in risk.space)
    for name, make in (replace or {}).items():
        if not name:
            model = make(model)
            continue
        above, _, leaf = name.rpartition(".")
        parent = model.get_submodule(above)
        setattr(parent, leaf, make(getattr(parent, leaf)))
    # The modules put in may leave derivatives out on purpose, as BN does through its statistics.
    derivatives = "surrogate" if replace else risk.derivatives
    return _risk_of(model, risk, batches, output=risk.output, loss=loss, derivatives=derivatives)


def _risk_of(
    model: nn.Module,
    risk: EmpiricalRisk,
    batches: Sequence[Batch] | None = None,
    *,
    output: Callable[[Any], Tensor] | None = None,
    loss: Loss | None = None,
    derivatives: Literal["exact", "surrogate"] | None = None,
) -> EmpiricalRisk:
    """The risk of another network with the data of this one and, unless given another, its loss."""

    def same(outputs: Tensor, y: Any) -> Tensor:
        return risk.batch_loss(outputs, Batch(None, y, 1.0, 0))

    def count(pair: Any) -> float:
        x, y = pair
        return risk.batches.weigh(Batch(x, y, float(tensors_of(x)[0].shape[0]), 0))

    data = [(batch.x, batch.y) for batch in (risk.batches if batches is None else batches)]
    return EmpiricalRisk(
        model, loss or same, data, output=output, count=count, derivatives=derivatives or risk.derivatives
    )


def first_examples(risk: EmpiricalRisk, count: int) -> list[Batch]:
    """The first examples of the first batch, or all of it where it cannot be cut."""
    batch = next(iter(risk.batches))
    part = slice_batch(batch, 0, count)
    return [batch if part is None else part]


class InCoordinates(nn.Module):
    """The network as a function of `z`, `theta = P z` with a dense `P`: gradient descent here is that of T2.

    Args:
        risk: of the network in its own parameters.
        matrix: `P`, `(n, n)`.
    """

    matrix: Tensor

    def __init__(self, risk: EmpiricalRisk, matrix: Tensor) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.linalg.solve(matrix, risk.theta))
        self.register_buffer("matrix", matrix)

        # A function, not an attribute: the copy that a risk makes of its model need not copy another risk.
        def run(theta: Tensor, x: Any) -> Tensor:
            return risk.batch_outputs(risk.space.unflatten(theta), Batch(x, None, 1.0, 0))

        self._run = run

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._run(self.matrix @ self.z, kwargs or args)


def in_coordinates(risk: EmpiricalRisk, P: Preconditioner) -> EmpiricalRisk:
    """The risk as a function of `z = P^-1 theta`, differentiated through the dense product `P z`."""
    return _risk_of(InCoordinates(risk, P.to_dense()), risk)


class Offset(nn.Module):
    """Adds a free offset, zero at the start: derivatives by it are those by what it is added to."""

    def __init__(self, shape: torch.Size, like: Tensor) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.offset


class Affine(nn.Module):
    """`h -> scale h + shift`, feature by feature (channel by channel), in front of a layer."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, axis: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self._axis = axis

    def forward(self, h: Tensor) -> Tensor:
        shape = [-1 if d == self._axis % h.ndim else 1 for d in range(h.ndim)]
        return h * self.scale.view(shape) + self.shift.view(shape)


class LiveNorm(nn.Module):
    """Batch normalization of a layer's input by the statistics of the batch, eps = 0; constant features keep 1.

    Args:
        axis: of the features or channels.
        through: whether statistics are differentiated.
    """

    def __init__(self, axis: int, through: bool = True) -> None:
        super().__init__()
        self._axis, self._through = axis, through

    def forward(self, h: Tensor) -> Tensor:
        others = [d for d in range(h.ndim) if d != self._axis % h.ndim]
        source = h if self._through else h.detach()
        mean = source.mean(dim=others, keepdim=True)
        variance = (source - mean).square().mean(dim=others, keepdim=True)
        size = h.detach().abs().amax(dim=others, keepdim=True)
        constant = variance.detach() <= (8 * torch.finfo(h.dtype).eps * size) ** 2
        return (h - mean) / torch.where(constant, torch.ones_like(variance), variance).sqrt()


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """Mean and biased variance of a layer's inputs, `(groups, m)`, and which of them never change."""

    mean: Tensor
    variance: Tensor
    constant: Tensor

    def damped(self, eps1: float = 0.0, eps2: float = 0.0) -> Tensor:
        """`sigma^2 + eps1 max(sigma^2) + eps2`, 1 in place of a zero."""
        s2 = self.variance + eps1 * self.variance.max() + eps2
        return torch.where(s2 > 0, s2, torch.ones_like(s2))

    def normalized(self, rows: Tensor) -> Tensor:
        """Rows `(R, groups, m)`, centred and divided by their deviations."""
        return (rows - self.mean) / self.damped().sqrt()


def own_moments(problem: Problem, layer: Layer, statistics: str = "channel") -> LayerMoments:
    """The moments from all values at once: of each entry of a patch, or of each input channel, repeated."""
    if statistics == "patch" or dense(layer):
        return moments_of(problem.rows[layer.name], layer)
    return moments_of(torch.cat([channel_values(layer, h) for h, _ in passing(problem.risk, layer.name)]), layer)


def moments_of(values: Tensor, layer: Layer) -> LayerMoments:
    """The moments of rows, `(R, groups, m)`, or of the values of input channels, `(R, channels)`."""
    mean, variance = values.mean(dim=0), values.var(dim=0, unbiased=False)
    low, high = values.amin(dim=0), values.amax(dim=0)
    constant = high - low <= 8 * torch.finfo(values.dtype).eps * torch.maximum(low.abs(), high.abs())
    found = mean, torch.where(constant, torch.zeros_like(variance), variance), constant
    return LayerMoments(*(per_entry(t, layer) if t.ndim == 1 else t for t in found))


def channels(layer: Layer) -> int:
    """Features or channels of a layer's input."""
    return layer.groups * layer.features // layer.patch


def per_entry(values: Tensor, layer: Layer) -> Tensor:
    """A number per input channel, repeated for every entry of a patch: `(groups, m)`."""
    return values.repeat_interleave(layer.patch).view(layer.groups, layer.features)


def per_unit(values: Tensor, layer: Layer) -> Tensor:
    """The numbers of each unit's group, `(units, m)`; values `(groups, m)`."""
    return values[torch.arange(layer.units) // (layer.units // layer.groups)]


def channel_axis(layer: Layer) -> int:
    """The axis of a layer's input that runs over features or channels, from the end."""
    module: Any = layer.module
    return -1 if dense(layer) else -1 - len(module.kernel_size)


def channel_values(layer: Layer, h: Tensor) -> Tensor:
    """The values of each feature or channel of a layer's input or output, `(R, channels)`."""
    return h.movedim(channel_axis(layer), -1).reshape(-1, h.shape[channel_axis(layer)])


def zero_padded(layer: Layer) -> bool:
    """Whether a convolution pads with zeros, which no map in front of it changes."""
    module: Any = layer.module
    if dense(layer) or module.padding_mode != "zeros":
        return False
    return module.padding != "valid" if isinstance(module.padding, str) else any(module.padding)


def scale(layer: Layer, rows: int, rule: str = "rows", examples: int = 1) -> float:
    """`q = sqrt(max(m/R, 1))`, or `sqrt(max(m/N, sqrt(R/N)))` of the rule "paper"."""
    if rule == "paper":
        return math.sqrt(max(layer.features / examples, math.sqrt(rows / examples)))
    return math.sqrt(max(layer.features / rows, 1.0))


def extended(rows: Tensor, bias: bool = True) -> Tensor:
    """`[H, e]` in torch's order, or `H` without a bias; rows `(R, m)`."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) if bias else rows


def singular(matrix: Tensor) -> ConditionNumber:
    """The effective condition number of the singular values, by a QR first."""
    return singular_condition_number(MatrixOperator(matrix, exact=False))


def kappa_of_rank(matrix: Tensor, rank: int) -> float:
    """The ratio of the largest singular value to that of a rank, infinite where this is zero."""
    values = torch.linalg.svdvals(matrix)
    return float(values[0] / values[rank - 1]) if float(values[rank - 1]) > 0 else math.inf


def decided_rank(values: Tensor, floor: float, gap: float, what: str = "") -> int:
    """The rank from descending singular values, where a gap decides it.

    Args:
        values: the first is not zero.
        floor: values below it are rounding.
        gap: between the last that counts and the first that does not.
        what: whose rank, in words.

    Raises:
        NotApplicable: values on both sides of the rounding level are too close.
    """
    rank = int((values > floor).sum())
    if rank < len(values) and float(values[rank - 1]) < gap * float(values[rank]):
        raise NotApplicable(
            f"the rank {what}is not decided: singular values go from {float(values[rank - 1]):.2g} to "
            f"{float(values[rank]):.2g} around the rounding level {floor:.2g} without a gap"
        )
    return rank


def singular_values(F: Tensor) -> Tensor:
    """Of a factor, by its triangle where it has more rows than columns."""
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(F, mode="r")[1] if F.shape[0] > F.shape[1] else F)
    return values


def block_of(P: object, layer: Layer) -> BNPBlock:
    """The part of a BNP preconditioner on a layer.

    Raises:
        NotApplicable: it is not BNP's.
    """
    found = P.blocks.get(layer.name, (None, None))[1] if isinstance(P, BlockDiagonal) else None
    if not isinstance(P, BNPPreconditioner) or not isinstance(found, BNPBlock):
        raise NotApplicable(f"the preconditioner is {type(P).__name__}, not BNP's")
    return found


def of_group(block: BNPBlock, layer: Layer, group: int) -> Tensor:
    """The dense `P` of the first output unit of a group."""
    return block.unit(group * (layer.units // layer.groups)).to_dense()
