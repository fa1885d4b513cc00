"""Problems whose minimizer, null space and effective condition number are known.

Inputs are real (handwritten digits), targets come from a teacher network, so that the loss has an attained minimizer
with zero residual; no pre-activation lies near a kink. Dials choose `kappa*`, the shift and the scales of the inputs
without changing the function that is learned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bnp_analysis.curvature.hessian import hessian
from bnp_analysis.data import load
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.theory.limit_point import find_minimizer

_GRID = 49
_DECADES = 3.0


def white_digits(n: int, features: int, *, classes: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Principal components of handwritten digits, of mean 0 and covariance the identity on these examples.

    Args:
        n: examples, more than `features`.
        features: leading components, at most 40.
        classes: only the digits `0 .. classes - 1`.
        seed: of the subset.

    Returns:
        Inputs `(n, features)` in float64 and labels `(n,)`.

    Raises:
        InvalidInputError: sizes out of range.

    Example:
        >>> x, y = white_digits(100, 5)
        >>> bool(torch.allclose(x.T @ x / 100, torch.eye(5, dtype=torch.float64)))
        True
    """
    if not 1 < classes <= 10 or not 0 < features <= 40 or not features < n:
        raise InvalidInputError(
            f"2 to 10 classes, 1 to 40 features and more examples than features are needed, got classes={classes}, "
            f"features={features}, n={n}"
        )
    data = load("digits", flatten=True, dtype=torch.float64)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    chosen = order[data.y[order] < classes][:n]
    if len(chosen) < n:
        raise InvalidInputError(f"there are {len(chosen)} training digits of these classes, not {n}")
    x = data.x[chosen]
    U, _, Vt = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
    # The sign of a singular vector is the library's choice.
    signs = torch.sign(Vt.gather(1, Vt.abs().argmax(dim=1, keepdim=True)).squeeze(1))
    return (U * signs)[:, :features] * math.sqrt(n), data.y[chosen]


def small_digits(n: int, *, seed: int = 0) -> Tensor:
    """Digits averaged to 4 x 4 pixels, standardized per pixel: `(n, 1, 4, 4)` in float64.

    Example:
        >>> small_digits(20).shape
        torch.Size([20, 1, 4, 4])
    """
    x = load("digits", n=n, seed=seed, flatten=False, dtype=torch.float64).x
    x = nn.functional.avg_pool2d(x, 2)
    return (x - x.mean(dim=0)) / x.std(dim=0, correction=0).clamp_min(0.05)


def teach(model: nn.Sequential, x: Tensor, generator: torch.Generator, *, margins: bool) -> Tensor:
    """Draw a network's weights, multiples of orthogonal matrices; with `margins`, no pre-activation comes near zero.

    Each unit's (channel's) bias is moved to the middle of the widest gap among the middle half of its pre-activations:
    the unit is neither dead nor always active, and the kinks stay away from the data.

    Returns:
        The network's outputs.
    """
    with torch.no_grad():
        for module, after in zip(model, [*list(model)[1:], None], strict=True):
            # A network that is built here, of these kinds alone: weights are set, no kind is asked for its rows.
            if isinstance(module, nn.Linear | nn.Conv2d):
                flat = torch.randn(module.weight.flatten(1).shape, generator=generator, dtype=x.dtype)
                U, _, Vt = torch.linalg.svd(flat, full_matrices=False)
                module.weight.copy_((math.sqrt(2) * U @ Vt).view_as(module.weight))
                assert module.bias is not None
                module.bias.zero_()
                if margins and isinstance(after, nn.ReLU | nn.LeakyReLU):
                    a = module(x)
                    columns = a if a.ndim == 2 else a.movedim(1, -1).flatten(0, -2)
                    module.bias.copy_(-torch.stack([_gap(column) for column in columns.T]))
            x = module(x)
    return x


def _gap(values: Tensor) -> Tensor:
    """The middle of the widest gap among the middle half."""
    ordered = values.sort().values
    inner = ordered[len(ordered) // 4 : -(len(ordered) // 4)]
    widest = int(inner.diff().argmax())
    return (inner[widest] + inner[widest + 1]) / 2


def effective_condition(H: Tensor, null_dimension: int) -> float:
    """`lambda_max / lambda_min+` of a stored positive semidefinite matrix with a null space of known dimension."""
    values = torch.linalg.eigvalsh((H + H.T) / 2)
    smallest = float(values[null_dimension])
    return float(values[-1]) / smallest if smallest > 0 else math.inf


def dial(H: Tensor, null_dimension: int, exponents: Tensor, kappa: float | None) -> Tensor:
    """The change of scale `theta' = d theta` at which `kappa*(D^-1 H D^-1) = kappa` (T12).

    Args:
        H: the Hessian at a minimizer, `(n, n)`.
        null_dimension: of its null space, known.
        exponents: `e`, `(n,)`; the scales are `d = 10^(u e)` with one number `u`.
        kappa: wanted; None for `u = 0`.

    Returns:
        `d`, `(n,)`.

    Raises:
        InvalidInputError: a `kappa` that no `u` between -3 and 3 gives; says which ones do.
    """
    from scipy.optimize import brentq

    e = exponents
    if kappa is None:
        return torch.ones_like(e)

    def excess(u: float) -> float:
        scale = 10 ** (-u * e)
        return math.log(effective_condition(scale[:, None] * H * scale, null_dimension) / kappa)

    grid = np.linspace(-_DECADES, _DECADES, _GRID)
    values = [excess(u) for u in grid]
    best = int(np.argmin(values))
    for k in (*range(best, len(grid) - 1), *range(best - 1, -1, -1)):
        if min(values[k : k + 2]) <= 0 < max(values[k : k + 2]):
            scales: Tensor = 10 ** (brentq(excess, grid[k], grid[k + 1], xtol=1e-13) * e)
            return scales
    low, high = (kappa * math.exp(v) for v in (min(values), max(values)))
    raise InvalidInputError(f"this network reaches kappa* from {low:.3g} to {high:.3g} with this dial, not {kappa:g}")


Layer = TypeVar("Layer", bound=nn.Module)

_HOMOGENEOUS: dict[str, Callable[[], nn.Module]] = {"relu": nn.ReLU, "leaky_relu": partial(nn.LeakyReLU, 0.2)}
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {**_HOMOGENEOUS, "tanh": nn.Tanh}
_START = 1e-5  # relative distance of a problem's point from its minimizer


@dataclass(frozen=True, eq=False)
class KnownProblem:
    """A risk with what is known about it.

    Attributes:
        risk: at a point near the minimizer, in float64.
        minimizer: the flat parameters of a minimizer.
        null_dimension: of the Hessian there, from formulas.
        kappa: its effective condition number there.
        description: one line.

    Example:
        >>> problem = softmax_regression(kappa=20.0)
        >>> problem.null_dimension, round(problem.kappa, 6)
        (7, 20.0)
    """

    risk: EmpiricalRisk
    minimizer: Tensor
    null_dimension: int
    kappa: float
    description: str

    @property
    def solved(self) -> EmpiricalRisk:
        """The risk at the minimizer."""
        return self.risk.at(self.minimizer)

    def __repr__(self) -> str:
        return f"<KnownProblem: {self.description}>"


def teacher_student(
    widths: Sequence[int] = (6, 8, 3),
    *,
    activation: str = "relu",
    kappa: float | None = None,
    by: str = "inputs",
    shift: float = 0.0,
    n: int = 200,
    seed: int = 0,
) -> KnownProblem:
    """A dense network learning from one of its own kind, squared loss.

    Args:
        widths: of inputs, hidden layers, outputs.
        activation: `"relu"`, `"leaky_relu"` or `"tanh"`.
        kappa: the effective condition number at the minimizer, None for what comes out.
        by: the dial: `"inputs"` gives the features scales from 1 down to some small number; `"orbit"` multiplies what
            goes into the first hidden layer and divides what comes out of it (T12; homogeneous activations).
        shift: mean over standard deviation of every input feature, 0 to 100; the teacher's biases undo it.
        n: examples.
        seed: of teacher and start.

    Returns:
        A `KnownProblem`; its null space has one dimension per homogeneous hidden unit.

    Raises:
        InvalidInputError: an unknown activation or dial, a `kappa` out of reach, sizes out of range.

    Example:
        >>> problem = teacher_student(kappa=2e3, shift=0.5)
        >>> problem.null_dimension, round(problem.kappa, 6), float(problem.solved.value) < 1e-20
        (8, 2000.0, True)
    """
    if activation not in _ACTIVATIONS:
        raise InvalidInputError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
    if by not in ("inputs", "orbit") or (by == "orbit" and activation not in _HOMOGENEOUS):
        raise InvalidInputError(f"by must be 'inputs', or 'orbit' with a homogeneous activation, got {by!r}")
    null = sum(widths[1:-1]) if activation in _HOMOGENEOUS else 0
    return _dense_problem(widths, activation, null, kappa=kappa, by=by, shift=shift, n=n, seed=seed)


def linear_chain(
    widths: Sequence[int] = (5, 4, 4, 3),
    *,
    kappa: float | None = None,
    shift: float = 0.0,
    n: int = 200,
    seed: int = 0,
) -> KnownProblem:
    """A deep linear network learning a linear map, squared loss.

    With the narrowest width `h`, `m` inputs and `C` outputs, the products of `p` parameters move in
    `h (m + C - h) + C` directions (matrices of rank `h`, and the bias), so the null space has
    `p - h (m + C - h) - C` dimensions (T11).

    Args:
        widths, kappa, shift, n, seed: see `teacher_student`; the dial gives the input features scales.

    Example:
        >>> linear_chain(kappa=100.0).null_dimension
        41
    """
    if len(widths) < 3:
        raise InvalidInputError(f"a chain has at least one hidden layer, got widths {list(widths)}")
    narrow, count = min(widths), sum((inputs + 1) * outputs for inputs, outputs in pairwise(widths))
    null = count - narrow * (widths[0] + widths[-1] - narrow) - widths[-1]
    return _dense_problem(widths, "linear", null, kappa=kappa, by="inputs", shift=shift, n=n, seed=seed)


def convolutional(
    channels: int = 3, *, activation: str = "leaky_relu", kappa: float | None = None, n: int = 100, seed: int = 0
) -> KnownProblem:
    """A convolution, an activation and a dense layer learning from one of their own kind on digits of 4 x 4 pixels.

    Args:
        channels: of the convolution, 2 x 2 without padding.
        activation: `"relu"` or `"leaky_relu"`.
        kappa: reached along the scaling orbit of the channels (T12); None for what comes out.
        n, seed: see `teacher_student`.

    Returns:
        A `KnownProblem`; its null space has one dimension per channel.

    Example:
        >>> convolutional(kappa=1e4).null_dimension
        3
    """
    if activation not in _HOMOGENEOUS:
        raise InvalidInputError(f"activation must be one of {', '.join(_HOMOGENEOUS)}, got {activation!r}")
    x = small_digits(n, seed=seed)
    head = _empty(nn.Linear(9 * channels, 2, dtype=torch.float64, device="meta"))
    conv = _empty(nn.Conv2d(1, channels, 2, dtype=torch.float64, device="meta"))
    model = nn.Sequential(conv, _HOMOGENEOUS[activation](), nn.Flatten(), head)
    g = torch.Generator().manual_seed(seed)
    y = teach(model, x, g, margins=True)
    theta = EmpiricalRisk(model, nn.functional.mse_loss, (x, y)).theta

    def build(d: Tensor) -> EmpiricalRisk:
        return EmpiricalRisk(model, nn.functional.mse_loss, (x, y), at=theta * d)

    exponents = torch.cat(
        [torch.ones(conv.weight.numel() + channels), -torch.ones(head.weight.numel()), torch.zeros(2)]
    )
    words = f"{channels} channels of 2 x 2, {activation}"
    return _turned(build, exponents.double(), channels, kappa, words, seed)


def softmax_regression(
    classes: int = 3,
    features: int = 6,
    *,
    smoothing: float = 0.1,
    kappa: float | None = None,
    shift: float = 0.0,
    n: int = 200,
    seed: int = 0,
) -> KnownProblem:
    """Label-smoothed softmax regression of digits: a loss with an attained minimizer that is not zero there.

    Args:
        classes: digits `0 .. classes - 1`.
        features: principal components.
        smoothing: of the labels, in (0, 1); without it separable data have no minimizer.
        kappa, shift, n, seed: see `teacher_student`; the dial gives the input features scales.

    Returns:
        A `KnownProblem`; its null space has `features + 1` dimensions, the shift of all logits (T11).
    """
    if not 0 < smoothing < 1:
        raise InvalidInputError(f"smoothing must be in (0, 1), got {smoothing}: without it there may be no minimizer")
    x, y = white_digits(n, features, classes=classes, seed=seed)
    x = x + shift
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    model = _empty(nn.Linear(features, classes, dtype=torch.float64, device="meta"))
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    found = find_minimizer(EmpiricalRisk(model, loss, (x, y)))
    per_feature = torch.linspace(0, 1, features, dtype=torch.float64)
    exponents = torch.cat([per_feature.repeat(classes), torch.zeros(classes, dtype=torch.float64)])

    def build(d: Tensor) -> EmpiricalRisk:
        return EmpiricalRisk(model, loss, (x / d[:features], y), at=found.theta * d)

    words = f"softmax regression, {classes} classes, {features} features, labels smoothed by {smoothing:g}"
    return _turned(build, exponents, features + 1, kappa, _shifted(words, shift), seed)


def _empty(layer: Layer) -> Layer:
    """Parameters without values: torch's would be drawn from the global generator."""
    return layer.to_empty(device="cpu")


def _dense(widths: Sequence[int], activation: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        if layers and activation in _ACTIVATIONS:
            layers.append(_ACTIVATIONS[activation]())
        layers.append(_empty(nn.Linear(inputs, outputs, dtype=torch.float64, device="meta")))
    return nn.Sequential(*layers)


def _dense_problem(
    widths: Sequence[int], activation: str, null: int, *, kappa: float | None, by: str, shift: float, n: int, seed: int
) -> KnownProblem:
    model, words = _dense(widths, activation), f"{'-'.join(map(str, widths))} {activation}"
    m, hidden = widths[0], widths[1]
    white, _ = white_digits(n, m, seed=seed)
    g = torch.Generator().manual_seed(seed)
    y = teach(model, white, g, margins=activation in _HOMOGENEOUS)
    first, x = model[0], white + shift
    assert isinstance(first, nn.Linear)
    with torch.no_grad():
        first.bias.sub_(first.weight.sum(dim=1) * shift)
    theta = EmpiricalRisk(model, nn.functional.mse_loss, (x, y)).theta

    # Scales of the flat parameters: first weight (hidden, m), first bias, and what follows.
    rest = len(theta) - hidden * (m + 1)
    if by == "inputs":
        per_feature = torch.linspace(0, 1, m, dtype=torch.float64)
        exponents = torch.cat([per_feature.repeat(hidden), torch.zeros(hidden + rest, dtype=torch.float64)])
    else:
        outgoing = widths[2] * hidden
        parts = [torch.ones(hidden * (m + 1)), -torch.ones(outgoing), torch.zeros(rest - outgoing)]
        exponents = torch.cat(parts).double()

    def build(d: Tensor) -> EmpiricalRisk:
        inputs = x / d[:m] if by == "inputs" else x
        return EmpiricalRisk(model, nn.functional.mse_loss, (inputs, y), at=theta * d)

    return _turned(build, exponents, null, kappa, _shifted(words, shift), seed)


def _turned(
    build: Callable[[Tensor], EmpiricalRisk], exponents: Tensor, null: int, kappa: float | None, words: str, seed: int
) -> KnownProblem:
    """Turn the dial to `kappa`, build the risk there, start near its minimizer."""
    base = hessian(build(torch.ones_like(exponents))).to_dense()
    solved = build(dial(base, null, exponents, kappa))
    reached = effective_condition(hessian(solved).to_dense(), null)
    g = torch.Generator().manual_seed(seed + 1)
    start = solved.theta * (1 + _START * torch.randn(solved.space.dim, generator=g, dtype=torch.float64))
    return KnownProblem(solved.at(start), solved.theta, null, reached, f"{words}, kappa* {reached:.4g}")


def _shifted(words: str, shift: float) -> str:
    return words + (f", inputs shifted by {shift:g} standard deviations" if shift else "")
