"""Diagonal preconditioners: Jacobi, and those that adaptive optimizers apply (T15)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bnp_analysis.curvature.factors import Root, rows_of_batch
from bnp_analysis.curvature.output_curvature import output_root
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.network.parameters import Block, ParameterSpace, clean_name
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.network.snapshot import unwrap
from bnp_analysis.precondition.base import NetworkPreconditioner
from bnp_analysis.runtime.kinds import gated

Found = TypeVar("Found")
ADAPTIVE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad)


class DiagonalPreconditioner(NetworkPreconditioner):
    """`P = diag(scales)`.

    Args:
        scales: `(n,)`, positive and finite.
        space: the chart, which `block` needs.
        settings: what the scales were made from.
        zero_entries: parameter name -> how many of its entries had nothing to scale by, and got scale 1.
        uncovered: parameter name -> why it is left alone.

    Raises:
        InvalidInputError: scales that are not a positive finite vector.

    Example:
        >>> DiagonalPreconditioner(torch.tensor([1.0, 2.0])).direction(torch.ones(2)).tolist()
        [1.0, 4.0]
    """

    def __init__(
        self,
        scales: Tensor,
        space: ParameterSpace | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        zero_entries: Mapping[str, int] | None = None,
        uncovered: Mapping[str, str] | None = None,
    ) -> None:
        if scales.ndim != 1 or not bool((scales > 0).all()) or not bool(torch.isfinite(scales).all()):
            raise InvalidInputError(
                f"scales must be a vector of positive finite numbers, got shape {tuple(scales.shape)} in {scales.dtype}"
                + (f" from {float(scales.min()):g} to {float(scales.max()):g}" if scales.numel() else "")
            )
        super().__init__(scales.numel(), scales.dtype, scales.device)
        self.scales = scales.detach().clone()
        self._space = space
        self._column = self.scales.unsqueeze(1)
        self.settings = dict(settings or {})
        self.zero_entries, self.uncovered = dict(zero_entries or {}), dict(uncovered or {})

    def block(self, block: Block) -> DiagonalPreconditioner:
        if self._space is None:
            raise InvalidInputError("this preconditioner was built without a parameter space; it has no layers")
        return DiagonalPreconditioner(self.scales[self._space.indices(block).to(self.device)])

    def _matmat(self, x: Tensor) -> Tensor:
        return self._column * x

    def _solve(self, x: Tensor) -> Tensor:
        return x / self._column

    _rmatmat, _rsolve = _matmat, _solve

    def absolute(self) -> LinearOperator:
        return self


@gated
def diagonal_preconditioner(
    risk: EmpiricalRisk,
    source: str | Tensor | torch.optim.Optimizer = "gauss_newton",
    *,
    model: nn.Module | None = None,
    damping: float = 0.0,
    block: Block | None = None,
) -> DiagonalPreconditioner:
    """A diagonal preconditioner: Jacobi's, an adaptive optimizer's, or given scales.

    Args:
        risk: the empirical risk.
        source: one of
            `"gauss_newton"`, Jacobi: `P = diag(A)^(-1/2)` with the exact diagonal of the Gauss-Newton matrix;
            a `torch.optim` Adam, AdamW, RMSprop or Adagrad after some steps: `P = diag((sqrt(v_hat) + eps)^(-1/2))`
            with its own state, bias correction and `eps`, so that `P P^T` is its step matrix (T15; learning rate,
            momentum and weight decay are no part of it);
            a tensor `(n,)` of positive scales in the order of `risk.space`: `P = diag(scales)`.
        model: the module whose parameters the optimizer holds, by which they are named; not needed for an optimizer
            made from `model.named_parameters()`.
        damping: Jacobi only, relative to the largest entry: `diag(A) + damping * max(diag(A))`.
        block: only the part of `P` on a layer, or on one output unit `(layer, i)`.

    Returns:
        A `DiagonalPreconditioner`. An entry without curvature or gradient history (0 in place of a positive number)
        gets scale 1 and is counted in `zero_entries`; parameters that the optimizer has not stepped are left alone and
        named in `uncovered`.

    Raises:
        InvalidInputError: an unknown source, an optimizer of another kind, of another model or without a step, scales
            that do not fit, or a loss without a Gauss-Newton factor (not convex in the outputs, not separate over
            examples).

    Source: T15; Kingma and Ba 2015 for Adam.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.diag(torch.tensor([4.0, 1.0])), torch.zeros(2, 1)
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(2, 1, bias=False), torch.nn.functional.mse_loss, (x, y))
        >>> bnp.diagonal_preconditioner(risk).scales.tolist()
        [0.25, 1.0]
    """
    if damping and not isinstance(source, str):
        raise InvalidInputError("damping is Jacobi's; an optimizer has its own eps, and scales are taken as they are")
    space = risk.space
    if isinstance(source, Tensor):
        if source.shape != (space.dim,):
            raise InvalidInputError(f"scales must have shape ({space.dim},), got {tuple(source.shape)}")
        P = DiagonalPreconditioner(source.detach().to(risk.theta), space, settings={"source": "scales"})
    elif isinstance(source, torch.optim.Optimizer):
        P = adaptive_preconditioner(source, space, model)
    elif source == "gauss_newton":
        diagonal = gauss_newton_diagonal(risk).double()
        damped = diagonal + damping * diagonal.amax()
        P = from_divisors(damped, space, {"source": source, "damping": damping}, {})
    else:
        raise InvalidInputError(
            f"source must be 'gauss_newton', an optimizer or a tensor of scales, got {source!r} "
            f"({type(source).__name__})"
        )
    return P if block is None else P.block(block)


def gauss_newton_diagonal(risk: EmpiricalRisk) -> Tensor:
    """The exact diagonal of the Gauss-Newton matrix, `(n,)`: its factor's rows squared, a few examples at a time.

    Raises:
        InvalidInputError: the loss is not convex in the outputs, or not separate over examples.
    """
    return risk.group.sum(lambda: _own_diagonal(risk), "the diagonal").to(risk.space.dtype)


def _own_diagonal(risk: EmpiricalRisk) -> Tensor:
    """The sum over this process's batches."""
    total = torch.zeros(risk.space.dim, dtype=torch.float64, device=risk.space.device)
    tensors = risk.space.unflatten(risk.theta)
    for batch in risk.batches:
        with torch.no_grad():
            outputs = risk.batch_outputs(tensors, batch)
        found = output_root(risk, batch, outputs, positions=True)
        if found is None:
            raise InvalidInputError(
                "the loss is not convex in the outputs, or not separate over examples, so the Gauss-Newton matrix has "
                "no factor whose rows give its diagonal. Give scales of your own as a tensor (n,)"
            )
        weight = batch.count / risk.batches.total
        for rows in rows_of_batch(risk, batch, Root(found.root, outputs.shape[0], found.axis)):
            total += weight * rows.square().sum(dim=0)
    return total


def from_divisors(
    divisors: Tensor, space: ParameterSpace, settings: Mapping[str, Any], uncovered: Mapping[str, str]
) -> DiagonalPreconditioner:
    """`P = diag(divisors^(-1/2))`, 1 where a divisor is zero, counted by parameter."""
    if not bool(torch.isfinite(divisors).all()):
        raise InvalidInputError("the divisors have NaN or infinite entries: the optimizer's state, or a gradient, has")
    zero = divisors == 0
    scales = torch.where(zero, torch.ones_like(divisors), divisors).rsqrt().to(space.dtype)
    counts = {name: int(part.sum()) for name, part in space.unflatten(zero).items()}
    return DiagonalPreconditioner(
        scales,
        space,
        settings=settings,
        zero_entries={name: count for name, count in counts.items() if count},
        uncovered=uncovered,
    )


def adaptive_preconditioner(
    optimizer: torch.optim.Optimizer, space: ParameterSpace, model: nn.Module | None
) -> DiagonalPreconditioner:
    """`P = diag((sqrt(v_hat) + eps)^(-1/2))` of every parameter that was stepped, times the root of its rate."""
    if not any(steps_as(optimizer, kind) for kind in ADAPTIVE):
        raise InvalidInputError(
            f"{type(optimizer).__name__} has no diagonal step matrix that is known here; Adam, AdamW, RMSprop and "
            "Adagrad have. Give its scales as a tensor (n,)"
        )
    found, uncovered = read_states(
        optimizer,
        space,
        model,
        lambda parameter, group, state, rate: (
            _divisor(optimizer, group, state) / rate if float(state.get("step", 0)) > 0 else None
        ),
    )
    every = {n: found.get(n, torch.ones(shape, dtype=torch.float64)).cpu() for n, shape in space.shapes.items()}
    return from_divisors(space.flatten(every).to(space.device), space, {"source": type(optimizer).__name__}, uncovered)


def steps_as(optimizer: torch.optim.Optimizer, kind: type[torch.optim.Optimizer]) -> bool:
    """Whether an optimizer's step is that of a kind: a class made from it may have a step of its own.

    Example:
        >>> class Signs(torch.optim.SGD):
        ...     def step(self, closure=None):
        ...         pass
        >>> steps_as(Signs([torch.ones(1)], lr=1.0), torch.optim.SGD)
        False
    """
    # torch wraps the method of each class once it is used.
    return isinstance(optimizer, kind) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step)


def read_states(
    optimizer: torch.optim.Optimizer,
    space: ParameterSpace,
    model: nn.Module | None,
    read: Callable[[Tensor, Mapping[str, Any], Mapping[str, Any], float], Found | None],
) -> tuple[dict[str, Found], dict[str, str]]:
    """Parameter name -> what `read(parameter, group, state, rate)` makes of it; name -> why there is nothing.

    `rate` is the group's learning rate over the largest of all groups; without a rate a parameter does not move.

    Raises:
        InvalidInputError: there is nothing of any parameter.
    """
    found: dict[str, Found] = {}
    uncovered = dict.fromkeys(space.names, "not among the optimizer's parameters")
    top = max(_rate(group) for group in optimizer.param_groups)
    for parameter, group, name in named_parameters(optimizer, model):
        if name not in space:
            continue
        listed = space.canonical(name)
        require_shape(parameter, name, space)
        state = optimizer.state.get(parameter)
        rate = _rate(group) / top if top > 0 else 1.0  # at a rate of zero everywhere it is that of a schedule
        one = read(parameter, group, state or {}, rate) if rate > 0 else None
        if one is None:
            uncovered[listed] = "the optimizer has not stepped it" if rate > 0 else "its learning rate is zero"
        else:
            found[listed] = one
            uncovered.pop(listed, None)
    if not found:
        raise InvalidInputError(
            f"{type(optimizer).__name__} holds no state that preconditions a parameter of the risk: it has made no "
            "step, or belongs to another model. Train first (SOAP's first step only initializes it)"
        )
    return found, uncovered


def _rate(group: Mapping[str, Any]) -> float:
    """The learning rate of a group; states without one are of an optimizer that has one for all."""
    return float(group.get("lr", 1.0))


def require_shape(parameter: Tensor, name: str, space: ParameterSpace) -> None:
    """Refuse a parameter of an optimizer that has another shape in the space."""
    expected = space.shapes[space.canonical(name)]
    if parameter.shape != expected:
        raise InvalidInputError(
            f"{name} has shape {tuple(parameter.shape)} in the optimizer, {tuple(expected)} in the risk: they belong "
            "to different models"
        )


def _divisor(optimizer: torch.optim.Optimizer, group: Mapping[str, Any], state: Mapping[str, Any]) -> Tensor:
    """What the optimizer divides a parameter's step by."""
    if isinstance(optimizer, torch.optim.RMSprop):
        square = state["square_avg"]
        if group["centered"]:
            # In the state's own precision, as the optimizer does.
            square = square.addcmul(state["grad_avg"], state["grad_avg"], value=-1)
    elif isinstance(optimizer, torch.optim.Adagrad):
        square = state["sum"]
    else:
        name = "max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"
        square = state[name].double() / (1 - float(group["betas"][1]) ** float(state["step"]))
    divisor: Tensor = square.detach().double().sqrt() + float(group["eps"])
    return divisor


def named_parameters(
    optimizer: torch.optim.Optimizer, model: nn.Module | None
) -> list[tuple[Tensor, Mapping[str, Any], str]]:
    """Every parameter of the optimizer with its group and its name: by identity in `model`, else as it was given."""
    of = {} if model is None else {id(p): clean_name(n) for n, p in unwrap(model).named_parameters()}
    named: list[tuple[Tensor, Mapping[str, Any], str]] = []
    strangers = 0
    for group in optimizer.param_groups:
        given = group.get("param_names") or [None] * len(group["params"])
        for parameter, own in zip(group["params"], given, strict=True):
            name = of.get(id(parameter)) if model is not None else own
            if name is None:
                strangers += 1
            else:
                named.append((parameter, group, clean_name(name)))
    if not named:
        raise InvalidInputError(
            "the optimizer's parameters have no names: give model=, the module they belong to, or make the optimizer "
            "from model.named_parameters()"
            if model is None
            else f"none of the {strangers} parameters of the optimizer belongs to the given model"
        )
    return named
