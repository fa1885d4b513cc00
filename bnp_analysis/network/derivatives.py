"""Comparison of autograd's derivatives of a risk with difference quotients along random directions.

A risk is refused if autograd returns the derivative of another function: modules that run again in the backward pass,
`detach`, straight-through estimators, wrong `autograd.Function`s. Quotients are computed in float64 if the model runs
in it, at a point near `theta` (initial biases of zero put whole layers on the kink of a ReLU), along directions in
which every tensor moves by the same relative amount. If a step crosses a kink or rounding dominates, quotients of
different steps disagree; they decide nothing, and other steps are used. A refusal needs two directions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bnp_analysis.errors import BNPAnalysisError, DerivativeError
from bnp_analysis.network.batches import Batch, slice_batch, with_examples
from bnp_analysis.network.kernels import recording
from bnp_analysis.network.observation import Observer, custom_functions
from bnp_analysis.network.precision import generic_point, perturbed, size_of
from bnp_analysis.runtime.random import random_state
from bnp_analysis.runtime.trees import tensors_of

if TYPE_CHECKING:
    from bnp_analysis.network.risk import EmpiricalRisk

# An eighth of the examples, within these bounds: the cost is about that of a gradient, where float64 is slow.
_FEWEST, _MOST = 8, 64
# A quotient that agrees to this share of what is compared agrees; coarser numbers than float64 are given more.
_TOLERANCE = 1e-5
# Roundings of the function that a quotient may show.
_ROUNDINGS = 64
# A loss smaller than this share of the outputs is a difference of theirs.
_CANCELLED = 1e-6
# Steps, as multiples of the best one for a smooth function.
_STEPS = (1.0, 1 / 32, 1 / 1024)
_MOST_TENSORS = 48
# How often rounding is tried before a refusal, and how many times more than seen it may be.
_TRIALS, _SAFETY = 2, 8
# Of so few parameters the place of a trial is kept for the next: a copy of the model and of a few examples.
_KEPT = 2**18

Quotient = Callable[[float], dict[str, Tensor]]


@dataclass(frozen=True)
class Trial:
    """Where derivatives are tried: a risk on a few examples at a point, its one batch, and the recorded loss.

    `size`: to which the rounding of the loss is relative; `kinked`: whether some function is evaluated on its kink;
    `smooth_at`: the risk's point, where that has been looked for and no function is on its kink.
    """

    risk: Any  # an EmpiricalRisk, whose module imports this one
    batch: Batch
    loss: Tensor
    leaves: dict[str, Tensor]
    eps: float
    size: float
    stops: tuple[str, ...]
    functions: tuple[str, ...]
    kinked: bool = False
    smooth_at: Tensor | None = None

    def direction(self, seed: int, names: set[str] | None = None) -> Tensor:
        """`(n,)`: every tensor moves by the same share of its size; with `names` only these."""
        g = torch.Generator().manual_seed(seed)
        parts = []
        for name, t in self.risk.space.unflatten(self.risk.theta).items():
            noise = torch.randn(t.shape, generator=g).to(t)
            parts.append(noise * (size_of(t) if names is None or name in names else 0.0))
        found: Tensor = self.risk.space.flatten(parts)
        return found


def trial(risk: EmpiricalRisk) -> Trial | None:
    """A place to try derivatives at; None where there is none: no batch, or numbers too coarse for differences."""
    batch = next(iter(risk.batches), None)
    if batch is None:
        return None
    size = tensors_of(batch.x)[0].shape[0]
    examples = min(_MOST, max(_FEWEST, size // 8))
    if not risk.coupled and size > examples and slice_batch(batch, 0, 1) is not None:
        batch = with_examples(batch, torch.linspace(0, size - 1, examples).long())
    one = risk.alone(batch)
    places = [one]
    if risk.space.dtype != torch.float64 and risk.space.device.type != "mps":
        places.insert(0, one.to(torch.float64))
    for place in places:
        part = next(iter(place.batches))
        for near in (generic_point(place), place.theta):
            observer, at = Observer(), place.at(near)
            try:
                leaves = at.leaves()
                with observer:
                    outputs = at.batch_outputs(leaves, part)
                    loss = at.batch_loss(outputs, part, leaves)
            except (RuntimeError, BNPAnalysisError):  # a model written for one precision
                break
            if bool(torch.isfinite(loss)):
                eps = max(observer.eps, torch.finfo(at.space.dtype).eps)
                value, width = abs(float(loss.detach())), float(outputs.detach().abs().mean())
                # A loss in which the outputs cancel, as of saturated logits, is known to their rounding only.
                rounded = value if value > _CANCELLED * width else width
                causes = tuple(observer.stops), tuple(custom_functions(loss))
                # Calls of functions show every cast, unless values leave torch or something is known to lower them.
                hidden = place is one or risk.precision.outside or bool(risk.precision.cause)
                coarsest = max(eps, torch.finfo(at.precision.dtype).eps if hidden else 0.0)
                return Trial(at, part, loss, leaves, eps, rounded, *causes) if coarsest < 1e-5 else None
    return None


@recording()
def require_gradient(risk: EmpiricalRisk) -> None:
    """Refuse a gradient that is not the value's.

    Raises:
        DerivativeError: names the tensors, by how much they disagree, what may cause it, the ways out.
    """
    with random_state(device=risk.space.device):
        found = trial(risk)
        if found is None:
            return
        _require_gradient(found)
        kink = on_kink(risk, found)
        if kink is not None:
            _require_gradient(kink)
        if found.risk.space.dim <= _KEPT:
            smooth_at = risk.theta if kink is None else None
            risk.place = replace(found, loss=found.loss.detach(), leaves={}, smooth_at=smooth_at)


def _require_gradient(found: Trial) -> None:
    at = found.risk
    try:
        gradient = at.pullback(found.loss, found.leaves)
    except (RuntimeError, BNPAnalysisError):
        return  # who asks for it is told
    if not bool(torch.isfinite(gradient).all()):
        return

    def agrees(v: Tensor) -> bool | None:
        tensors, g = at.space.unflatten(v), at.space.unflatten(gradient)
        slopes = {name: (g[name] * t).sum() for name, t in tensors.items()}
        scale = sum(abs(float(s)) for s in slopes.values())
        spread = sum(float(g[n].norm() * at.theta[at.space.slice_of(n)].norm()) for n in tensors)
        claimed = {"": sum(slopes.values(), torch.zeros(()))}

        def slope(h: float) -> dict[str, Tensor]:
            ends = [{"": at(at.theta + step * v).double()} for step in (h, -h)]
            if found.kinked:
                require_one_slope(ends[0], {"": at(at.theta).double()}, ends[1], h, scale)
            return {"": (ends[0][""] - ends[1][""]) / (2 * h)}

        return compare(found, claimed, slope, scale, spread + found.size)

    if any(agrees(found.direction(seed)) is not False for seed in (1, 2)):
        return
    names = list(at.space.names)
    wrong = [n for n in names[:_MOST_TENSORS] if agrees(found.direction(3, {n})) is False]
    raise DerivativeError(_message(found, "gradient", wrong or names, gradient))


def on_kink(risk: EmpiricalRisk, near: Trial) -> Trial | None:
    """A trial at `theta` itself, where some function with a kink is evaluated on it; else None.

    The risk may be smooth there: `max(z, 0) + log(1 + exp(-|z|))` is a softplus, of which autograd takes the slope 1
    and the curvature 0 at `z = 0`, which is where a last layer of zeros begins.
    """
    if near.smooth_at is risk.theta:
        return None
    at, observer = near.risk.at(risk.theta.to(near.risk.theta)), Observer(kinks=True)
    try:
        # Without derivatives first: usually there is no kink.
        with observer:
            tensors = at.space.unflatten(at.theta)
            at.batch_loss(at.batch_outputs(tensors, near.batch), near.batch, tensors)
        if not observer.kinks:
            return None
        leaves = at.leaves()
        loss = at.batch_loss(at.batch_outputs(leaves, near.batch), near.batch, leaves)
    except (RuntimeError, BNPAnalysisError):
        return None
    return replace(near, risk=at, loss=loss, leaves=leaves, stops=(*observer.kinks, *near.stops), kinked=True)


def require_one_slope(
    ahead: Mapping[str, Tensor], here: Mapping[str, Tensor], behind: Mapping[str, Tensor], h: float, scale: float
) -> None:
    """Whether slopes to both sides agree; where they do not, a function has no derivative to compare with.

    Raises:
        DerivativeError: they do not.
    """
    bent = _norm({n: ahead[n] - 2 * t + behind[n] for n, t in here.items()}) / (2 * abs(h))
    if bent > _TOLERANCE / 4 * max(scale, _gap(ahead, behind) / (2 * abs(h))):
        raise DerivativeError("a kink")


def require_second(
    risk: EmpiricalRisk,
    what: str,
    product: Callable[[EmpiricalRisk, Batch, list[Tensor]], Mapping[str, Tensor]],
    function: Callable[[EmpiricalRisk, Batch], Mapping[str, Tensor]],
) -> None:
    """Refuse products that are not the derivative along `v` of the function they are computed for; once per `what`.

    Args:
        risk: the empirical risk.
        what: the derivative in words.
        product: risk, batch, `v` by tensors -> the product, by names.
        function: risk, batch -> the function in the same form.

    Raises:
        DerivativeError: names what disagrees.
    """
    if risk.derivatives != "exact" or what in risk.tried:
        return
    risk.tried.add(what)
    with random_state(device=risk.space.device):
        known = risk.place if risk.place is not None and risk.place.risk.space.names == risk.space.names else None
        found = known or trial(risk)
        if found is None:
            return
        kink = on_kink(risk, found)
        for place in (found, *([] if kink is None else [kink])):
            try:
                _require_second(place, what, product, function)
            except DerivativeError:
                risk.tried.discard(what)
                raise


def _require_second(
    found: Trial,
    what: str,
    product: Callable[[EmpiricalRisk, Batch, list[Tensor]], Mapping[str, Tensor]],
    function: Callable[[EmpiricalRisk, Batch], Mapping[str, Tensor]],
) -> None:
    at, batch = found.risk, found.batch

    def value(theta: Tensor) -> dict[str, Tensor]:
        return _scaled(at, function(at.at(theta), batch))

    def disagreeing(v: Tensor, among: list[str] | None = None) -> list[str]:
        try:
            claimed = _scaled(at, product(at, batch, list(at.space.unflatten(v).values())))
            here = value(at.theta)
        except (RuntimeError, BNPAnalysisError):
            return []  # who asks for a product is told
        ends: dict[float, tuple[dict[str, Tensor], ...]] = {}

        def along(h: float, name: str) -> dict[str, Tensor]:
            if h not in ends:
                ends[h] = value(at.theta + h * v), value(at.theta - h * v)
            ahead, behind = ({name: end[name]} for end in ends[h])
            if found.kinked:
                require_one_slope(ahead, {name: here[name]}, behind, h, sum(_norms(at, name, claimed)))
            return {name: (ahead[name] - behind[name]) / (2 * h)}

        return [
            n
            for n in claimed
            if (among is None or n in among)
            and compare(found, {n: claimed[n]}, partial(along, name=n), *_norms(at, n, claimed, here)) is False
        ]

    wrong = disagreeing(found.direction(1))
    if wrong and (wrong := disagreeing(found.direction(2), wrong)):
        raise DerivativeError(_message(found, what, wrong))


def _scaled(risk: EmpiricalRisk, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In float64; derivatives by a tensor times its size, so that those by different tensors have one unit."""
    tensors = risk.space.unflatten(risk.theta)
    return {n: t.detach().double() * (size_of(tensors[n]) if n in tensors else 1.0) for n, t in parts.items()}


def _norms(risk: EmpiricalRisk, name: str, *parts: Mapping[str, Tensor]) -> list[float]:
    """Of everything that has the unit of a part."""
    return [_norm(p if name in risk.space else {name: p[name]}) for p in parts]


def compare(found: Trial, claimed: Mapping[str, Tensor], quotient: Quotient, scale: float, size: float) -> bool | None:
    """Whether a derivative agrees with difference quotients; None if they agree neither with it nor with one another.

    Args:
        found: where.
        claimed: the derivative, name -> tensor.
        quotient: step -> the difference quotient in the same form.
        scale: of the derivative, of which a share of rounding is granted.
        size: of the function, whose rounding is divided by the step.
    """
    tolerance = max(_TOLERANCE, 20 * found.eps**0.5)
    verdict: bool | None = None
    longest: float | None = None
    for factor in _STEPS:
        h = found.eps**0.375 * factor
        rounding = _ROUNDINGS * found.eps * size / h
        try:
            quotients = [quotient(h)]
            gap = _gap(quotients[0], claimed)
            allowed = tolerance * max(scale, _norm(quotients[0])) + rounding
            if gap <= allowed:
                return True
            quotients += [quotient(h / 2), quotient(4 * h)]
        except BNPAnalysisError:  # outside of where the risk is defined, or bent over this step
            continue
        longest = longest or h
        spread = max(_gap(q, quotients[0]) for q in quotients[1:])
        gap = min(_gap(q, claimed) for q in quotients)
        if gap > allowed and gap > 8 * spread and gap > allowed + _noise(quotient, h, quotients[0]):
            # Rounding moves the function by as much whichever the step is, and seldom shows in a short one.
            with suppress(BNPAnalysisError):
                moved = longest * _noise(quotient, longest, quotient(longest))
                verdict = False if gap > allowed + moved / h else verdict
    return verdict


def _noise(quotient: Quotient, h: float, found: Mapping[str, Tensor]) -> float:
    """How far rounding moves a quotient, of a function in which it grows (`logit(sigmoid(z))`)."""
    moved = 0.0
    for seed in range(_TRIALS):
        # At -h the quotient is the same; what was computed at one step is remembered.
        trial = perturbed(seed, partial(quotient, -h * (1 + seed / 1024)), alike=False)
        moved = moved if trial is None else max(moved, _gap(trial[0], found))
    return _SAFETY * moved


def _norm(a: Mapping[str, Tensor]) -> float:
    return float(sum(float(t.double().square().sum()) for t in a.values()) ** 0.5)


def _gap(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return _norm({name: a[name].double() - b[name].double() for name in a})


def _message(found: Trial, what: str, wrong: list[str], gradient: Tensor | None = None) -> str:
    zero = []
    if gradient is not None:
        zero = [n for n in wrong if not bool(found.risk.space.unflatten(gradient)[n].any())]
    causes = [*dict.fromkeys([*(f"autograd.Function {name}" for name in found.functions), *found.stops])]
    words = f"autograd's {what} is not that of the risk: difference quotients disagree in {_few(wrong)}"
    words += f" ({_few(zero)}: exactly 0, though the risk changes)" if zero else ""
    words += f". Seen in the pass: {_few(causes)}" if causes else ""
    return (
        f"{words}. Curvature would be that of no function. "
        + "Modules that run again in the backward pass (adjoint ODE solvers, checkpoints of one's own) do so with "
        "other parameters; detach, rounding with a straight-through gradient, surrogate gradients, gradient hooks and "
        "autograd.Functions may have derivatives that are not those of what they compute; layers that update buffers "
        "in training mode (spectral_norm) do so without a derivative: model.eval(). "
        + "Take them out for a measurement; leave the tensors out with params=; or measure the surrogate under its "
        "name with EmpiricalRisk(..., derivatives='surrogate')"
    )


def _few(names: list[str]) -> str:
    return ", ".join(n or "?" for n in names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
