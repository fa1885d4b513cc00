"""The preconditioner of Batch Normalization Preconditioning (T2, T3, T5, T6)."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Self, overload

import torch
from torch import Tensor, nn

from bnp_analysis.curvature.output_curvature import pulled_to_layers
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.network.layer_kinds import Layer
from bnp_analysis.network.layers import Coverage
from bnp_analysis.network.moments import Moments, layer_moments, second_moments
from bnp_analysis.network.parameters import Block, ParameterSpace
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.precondition.base import BlockDiagonal, Entry, covered_layers, layer_positions
from bnp_analysis.runtime.kinds import gated

_NEEDS = (
    "output_scale needs the curvature of the loss in the outputs, which must be convex there, a mean over examples, "
    "and small enough to be formed; leave output_scale off"
)
#: Rules for `q^2` that know shapes alone; "auto" is the default, at present that of "rows".
RULES = ("auto", "rows", "paper")
BIAS_FREE = ("rank-one", "diagonal")
#: Preset -> options: "exact", undamped, as the theory needs; "paper", those of the published algorithms.
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"eps1": 0.0, "eps2": 0.0, "q": "auto", "statistics": "channel", "bias_free": "rank-one"},
    "paper": {"eps1": 1e-2, "eps2": 1e-4, "q": "paper", "statistics": "channel", "bias_free": "diagonal"},
}


class BNPBlock(Preconditioner):
    """`P = U D / q` of one layer, on its flat tensors (weight row-major, then bias).

    With a bias, `U = [[1, -mu^T], [0, I]]` and `D = diag(1, 1/sigma)` for each unit (T2). Without one,
    `P P^T = (diag sigma^2 + mu mu^T)^-1 / q^2` by one rank-one correction (T5):
    `P = diag(1/sigma) (I - b u u^T) / q` with `v = mu/sigma`, `u = v/|v|`, `b = 1 - 1/sqrt(1 + |v|^2)`; with `mu = 0`
    this is diagonal. With output scales `s` the columns of unit `i` are divided by `s_i`, `P diag(1/s)` (T10).

    Args:
        mean: `mu`, `(groups, m)`.
        variance: damped `sigma^2 > 0`, `(groups, m)`.
        q: the scale of the layer.
        units: output units `n`; split evenly among the groups.
        bias: whether the last `units` variables are the bias.
        output_scales: `s > 0`, one per unit; None for 1.
        dtype: of the variables, default that of the moments; these may be more precise.

    Raises:
        InvalidInputError: shapes that do not fit, a variance, `q` or a scale that is not positive and finite.

    Example:
        >>> P = BNPBlock(torch.tensor([[3.0]]), torch.tensor([[4.0]]), 1.0, units=1, bias=True)
        >>> P.direction(torch.tensor([2.0, 1.0])).tolist()
        [-0.25, 1.75]
    """

    def __init__(
        self,
        mean: Tensor,
        variance: Tensor,
        q: float,
        *,
        units: int,
        bias: bool,
        output_scales: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if mean.shape != variance.shape or mean.ndim != 2 or not mean.shape[0] or units % mean.shape[0]:
            raise InvalidInputError(
                f"mean and variance must both be (groups, m) with groups dividing {units} units, got "
                f"{tuple(mean.shape)} and {tuple(variance.shape)}"
            )
        if not bool((variance > 0).all()) or not bool(torch.isfinite(variance).all() and torch.isfinite(mean).all()):
            raise InvalidInputError("the damped variances must be positive and finite, the means finite")
        if not (q > 0 and math.isfinite(q)):
            raise InvalidInputError(f"q must be positive and finite, got {q}")
        groups, features = mean.shape
        super().__init__(units * (features + int(bias)), dtype or mean.dtype, mean.device)
        self.mean, self.variance, self.q = mean, variance, float(q)
        self.units, self.groups, self.features, self.bias = units, groups, features, bias
        sigma = variance.sqrt()
        v = mean / sigma
        norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
        root = torch.hypot(torch.ones_like(norm), norm)
        self._mu, self._scale = self._against_weights(mean), self._against_weights(sigma * self.q)
        self._u = self._against_weights(v / norm.clamp_min(torch.finfo(norm.dtype).tiny))
        # Without cancellation for small |v|: 1 - 1/root = |v|/root * |v|/(root + 1), root - 1 = |v| * |v|/(root + 1).
        self._shrink = self._against_weights(norm / root * (norm / (root + 1)))
        self._grow = self._against_weights(norm * (norm / (root + 1)))
        if not bool((self._scale > 0).all()) or not bool(torch.isfinite(self._scale).all()):
            raise InvalidInputError(f"a scale q sigma is zero or infinite in {self.dtype}; measure in float64")
        self.output_scales, self._divisors = output_scales, None
        if output_scales is not None:
            self._divisors = self._per_variable(output_scales)

    def _per_variable(self, scales: Tensor) -> Tensor:
        """The scale of each variable's unit, `(n, 1)`."""
        if scales.shape != (self.units,) or not bool((scales > 0).all() and torch.isfinite(scales).all()):
            raise InvalidInputError(f"scales must be {self.units} positive and finite numbers, one for each unit")
        one = scales.to(self.dtype)
        spread = torch.cat([one.repeat_interleave(self.features), *([one] if self.bias else [])]).unsqueeze(1)
        if not bool((spread > 0).all() and torch.isfinite(spread).all()):
            raise InvalidInputError(f"a scale is zero or infinite in {self.dtype}; measure in float64")
        return spread

    def part(self, positions: Tensor) -> Preconditioner | None:
        """The whole, or an output unit: each is acted on by itself."""
        first = int(positions[0]) // max(self.features, 1) if positions.numel() else self.units
        if first < self.units and torch.equal(self._unit_positions(first), positions.cpu()):
            return self.unit(first)
        return super().part(positions)

    def _unit_positions(self, i: int) -> Tensor:
        """Where the variables of output unit `i` lie in the layer's flat vector, in ascending order."""
        weights = torch.arange(i * self.features, (i + 1) * self.features)
        return torch.cat([weights, torch.tensor([self.units * self.features + i])]) if self.bias else weights

    def unit(self, i: int) -> BNPBlock:
        """The preconditioner of output unit `i`."""
        if not 0 <= i < self.units:
            raise InvalidInputError(f"the layer has units 0..{self.units - 1}, not {i}")
        group = i // (self.units // self.groups)
        mean, variance = self.mean[group : group + 1], self.variance[group : group + 1]
        scales = None if self.output_scales is None else self.output_scales[i : i + 1]
        return BNPBlock(mean, variance, self.q, units=1, bias=self.bias, output_scales=scales, dtype=self.dtype)

    def across(self, units: int) -> tuple[Preconditioner, Tensor | None] | None:
        if self.groups > 1 or units != self.units:
            return None
        one = BNPBlock(self.mean, self.variance, self.q, units=1, bias=self.bias, dtype=self.dtype)
        return one, self.output_scales

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Self:
        """Made anew from the moments, which keep their precision."""
        where = self.device if device is None else torch.device(device)
        mean, variance = self.mean.to(where), self.variance.to(where)
        scales = None if self.output_scales is None else self.output_scales.to(where)
        return type(self)(
            mean, variance, self.q, units=self.units, bias=self.bias, output_scales=scales, dtype=dtype
        )  # fmt: skip

    def normalized(self, rows: Tensor) -> Tensor:
        """The rows of `H^ P` without output scales: those of `G^ / q` for undamped moments of the same rows.

        Args:
            rows: `(R, groups, m)`.

        Returns:
            `(R, groups, d)`, the column of the bias last if there is one.
        """
        count = rows.shape[0]
        # One unit per group: P^T acts on the extended rows, which are columns here.
        single = BNPBlock(self.mean, self.variance, self.q, units=self.groups, bias=self.bias, dtype=self.dtype)
        flat = rows.to(self.dtype).reshape(count, -1)
        ones = flat.new_ones(count, self.groups if self.bias else 0)
        weights, bias = single._split(single._rmatmat(torch.cat([flat, ones], dim=1).T))
        parts = [weights.view(self.groups, self.features, count)]
        if self.bias:
            parts.append(bias.view(self.groups, 1, count))
        return torch.cat(parts, dim=1).permute(2, 0, 1)

    def _against_weights(self, x: Tensor) -> Tensor:
        """`(groups, m or 1)` in a shape that multiplies weights `(groups, units per group, m, k)`."""
        return x.to(self.dtype)[:, None, :, None]

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cut, shape = self.units * self.features, (self.groups, self.units // self.groups)
        weights = x[:cut].reshape(*shape, self.features, x.shape[1])
        return weights, x[cut:].reshape(*shape, int(self.bias), x.shape[1])

    def _join(self, weights: Tensor, bias: Tensor | None = None) -> Tensor:
        flat = weights.reshape(self.units * self.features, weights.shape[-1])
        return flat if bias is None else torch.cat([flat, bias.reshape(self.units, bias.shape[-1])])

    def _matmat(self, x: Tensor) -> Tensor:
        w, b = self._split(x if self._divisors is None else x / self._divisors)
        if self.bias:
            w = w / self._scale
            return self._join(w, b / self.q - (w * self._mu).sum(dim=2, keepdim=True))
        return self._join(self._rank_one(w, -self._shrink) / self._scale)

    def _rmatmat(self, y: Tensor) -> Tensor:
        g, gb = self._split(y)
        if self.bias:
            out = self._join((g - gb * self._mu) / self._scale, gb / self.q)
        else:
            out = self._join(self._rank_one(g / self._scale, -self._shrink))
        return out if self._divisors is None else out / self._divisors

    def _solve(self, x: Tensor) -> Tensor:
        w, b = self._split(x)
        if self.bias:
            out = self._join(w * self._scale, self.q * (b + (w * self._mu).sum(dim=2, keepdim=True)))
        else:
            out = self._join(self._rank_one(w * self._scale, self._grow))
        return out if self._divisors is None else out * self._divisors

    def _rsolve(self, y: Tensor) -> Tensor:
        g, gb = self._split(y if self._divisors is None else y * self._divisors)
        if self.bias:
            return self._join(self._scale * g + self.q * self._mu * gb, self.q * gb)
        return self._join(self._rank_one(g, self._grow) * self._scale)

    def _rank_one(self, w: Tensor, c: Tensor) -> Tensor:
        """`(I + c u u^T) w`: with `c = -shrink` the inverse square root of `I + v v^T`, with `grow` its square root."""
        return w + c * self._u * (self._u * w).sum(dim=2, keepdim=True)

    @property
    def roundings(self) -> int:
        # With a bias: product, difference, quotient, sigma, q sigma and its cast. Without one: sums over the features
        # in u.w and in |v|, which u has twice and the shrinkage up to twice, and a few for what they are made of.
        # Output scales divide once more, and are cast.
        return (6 if self.bias else 5 * self.features + 24) + (0 if self._divisors is None else 2)

    def absolute(self) -> LinearOperator:
        # The same sums with nothing cancelling; only products of it are used.
        other = copy.copy(self)
        other._mu, other._u, other._shrink = -self._mu.abs(), self._u.abs(), -self._shrink
        return other


class BNPPreconditioner(BlockDiagonal):
    """The BNP preconditioner of a network, with what it was built from.

    Args:
        space: the chart of the parameters.
        blocks: layer name -> (positions, `BNPBlock`).
        settings: damping, rule for `q`, statistics, form without a bias, output scaling.
        constant_features: layer name -> input features with zero variance, group by group.
        uncovered: parameter name -> why it is left alone.
        flat_units: layer name -> output units without curvature, whose output scale is 1.
        extensions: layer name -> what of it `q="paper"` takes beyond the paper.

    Attributes:
        q: layer name -> `q`.
        output_scales: layer name -> `s`, one per unit (T10); empty without output scaling.
    """

    def __init__(
        self,
        space: ParameterSpace,
        blocks: Mapping[str, tuple[Tensor, BNPBlock]],
        *,
        settings: Mapping[str, Any],
        constant_features: Mapping[str, tuple[int, ...]],
        uncovered: Mapping[str, str],
        flat_units: Mapping[str, tuple[int, ...]] | None = None,
        extensions: Mapping[str, str] | None = None,
    ) -> None:
        entries: dict[str, Entry] = dict(blocks)
        super().__init__(
            space.dim, entries, space.dtype, space.device, space, settings=settings, uncovered=uncovered
        )  # fmt: skip
        self.constant_features = dict(constant_features)
        self.flat_units, self.extensions = dict(flat_units or {}), dict(extensions or {})
        self.q = {name: block.q for name, (_, block) in blocks.items()}
        scales = {name: block.output_scales for name, (_, block) in blocks.items()}
        self.output_scales = {name: s for name, s in scales.items() if s is not None}


def damped_variance(variance: Tensor, eps1: float, eps2: float) -> Tensor:
    """`sigma^2 + eps1 max(sigma^2) + eps2`, with 1 in place of a zero (T3).

    Example:
        >>> damped_variance(torch.tensor([[4.0, 0.0]]), 0.0, 0.0).tolist()
        [[4.0, 1.0]]
    """
    damped = variance + eps1 * variance.amax() + eps2
    return torch.where(damped > 0, damped, torch.ones_like(damped))


def scale_square(rule: str, features: int, rows: int, examples: int) -> float:
    """`q^2` of a layer from its shapes.

    `"rows"`: `max(m/R, 1)`, the order of `|G^|^2/R` of independent inputs (T8). `"paper"`: `max(m/N, sqrt(R/N))`,
    which is `max(n/N, 1)` for a dense layer and `max(c k^2/N, sqrt(r s))` for a convolution with `r x s` output
    positions.

    Args:
        rule: one of `RULES`.
        features: `m`, inputs of one unit; `c k^2` for a convolution with `c` channels in a group.
        rows: `R`, rows of `H^` in the step: examples times output positions.
        examples: `N`, examples in the step.

    Source: Lange, Helfrich and Ye 2022, Algorithm 2 (p. 11) and Algorithm 3 (p. 19). One or three spatial dimensions
    (the root of the number of positions), stride, dilation and groups (the same with the layer's own output positions
    and `c` of one group) and dense layers on sequences (convolutions with `k = 1`) are this project's extension.

    Example:
        >>> [scale_square("paper", 27, 64 * n, n) for n in (2, 128)], scale_square("rows", 27, 128, 2)
        ([13.5, 8.0], 1.0)
    """
    if rule == "paper":
        return max(features / examples, math.sqrt(rows / examples))
    return max(features / rows, 1.0)


def surviving_mean(mean: Tensor, second: Tensor) -> float:
    """`sum_j mu_j^2/rms_j^2` of the worst group: what the diagonal form without a bias adds to `q^2` (T5).

    Args:
        mean, second: first and second moments, `(groups, m)`.
    """
    share = torch.where(second > 0, mean.square() / second, torch.zeros_like(second))
    return float(share.sum(dim=1).max())


@gated
def layer_block(
    layer: Layer,
    moments: Moments,
    *,
    eps1: float,
    eps2: float,
    q: str | float = "auto",
    bias_free: str = "rank-one",
    output_scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> BNPBlock:
    """The block of one layer from the moments of its inputs, damped; what is measured and what trains.

    Args:
        layer: the covered layer.
        moments: of its inputs, with their numbers of rows `R` and examples `N`.
        eps1, eps2: damping, `sigma^2 + eps1 max(sigma^2) + eps2`, the largest of the whole layer.
        q: the layer's scale, or one of `RULES` for it, to whose `q^2` the diagonal form without a bias adds
            `sum_j mu_j^2 / rms_j^2`.
        bias_free: without a bias, `"rank-one"` or `"diagonal"`.
        output_scales: of its units (T10); 1 in place of a 0.
        dtype: of the parameters, default that of the moments.

    Returns:
        A `BNPBlock`.
    """
    mean, variance = layer.unit_moments(moments.mean, moments.variance)
    square = scale_square(q, layer.features, moments.rows, moments.examples) if isinstance(q, str) else 0.0
    if layer.bias is None and bias_free == "diagonal":
        # Column norms in place of deviations, nothing projected out: the mean direction survives.
        variance = variance + mean.square()
        square += surviving_mean(mean, variance)
        mean = torch.zeros_like(mean)
    scale = math.sqrt(square) if isinstance(q, str) else float(q)
    damped = damped_variance(variance, eps1, eps2)
    scales = None if output_scales is None else torch.where(output_scales > 0, output_scales, 1.0)
    return BNPBlock(
        mean, damped, scale, units=layer.units, bias=layer.bias is not None, output_scales=scales, dtype=dtype
    )  # fmt: skip


@overload
def bnp_preconditioner(
    risk: EmpiricalRisk,
    *,
    preset: str = ...,
    eps1: float | None = ...,
    eps2: float | None = ...,
    q: str | float | None = ...,
    statistics: str | None = ...,
    bias_free: str | None = ...,
    output_scale: bool = ...,
    also: Iterable[type[nn.Module]] = ...,
    block: None = None,
) -> BNPPreconditioner: ...
@overload
def bnp_preconditioner(
    risk: EmpiricalRisk,
    *,
    preset: str = ...,
    eps1: float | None = ...,
    eps2: float | None = ...,
    q: str | float | None = ...,
    statistics: str | None = ...,
    bias_free: str | None = ...,
    output_scale: bool = ...,
    also: Iterable[type[nn.Module]] = ...,
    block: Block,
) -> Preconditioner: ...
@gated
def bnp_preconditioner(
    risk: EmpiricalRisk,
    *,
    preset: str = "exact",
    eps1: float | None = None,
    eps2: float | None = None,
    q: str | float | None = None,
    statistics: str | None = None,
    bias_free: str | None = None,
    output_scale: bool = False,
    also: Iterable[type[nn.Module]] = (),
    block: Block | None = None,
) -> BNPPreconditioner | Preconditioner:
    """The BNP preconditioner `P = U D / q` of every covered layer, from exact moments over the risk's data.

    Undamped by default, as the theory needs: damping breaks the invariance to per-feature scales (T3).

    Args:
        risk: the empirical risk; the moments are those of its layers' inputs at its `theta`.
        preset: what options that are None are: `"exact"`, or `"paper"`, the `P` of the published algorithms
            (Algorithm 2, p. 11; Algorithm 3, p. 19) with the moments of the data in place of running ones:
            `eps1=1e-2, eps2=1e-4, q="paper"`, per channel, and `bias_free="diagonal"`, of which the paper says nothing.
        eps1, eps2: damping, `sigma^2 + eps1 max(sigma^2) + eps2`; 0 in the preset `"exact"`.
        q: `"rows"`, `q^2 = max(m/R, 1)`, the default, also called `"auto"`; `"paper"`, `q^2 = max(m/N, sqrt(R/N))`
            for `N` examples with `R` output positions in all, see `scale_square`; `"measured"`, `q^2 = |G^|^2 / R`
            (T8); or a positive number, 1 for off.
        statistics: of a convolution, per `"channel"` (the paper) or per entry of the `"patch"` (T6).
        bias_free: for layers without a free bias, `"rank-one"` or `"diagonal"` (T5).
        output_scale: also divide unit `i` by `s_i = sqrt(mean_j d^2 l_j / da_ij^2)` (T10), the Gauss-Newton diagonal
            summed over positions; this project's extension. It costs one backward pass per output of the network.
        also: types of layers that are covered only where they are asked for, such as `nn.Embedding`.
        block: only the part of `P` on a layer, or on one output unit `(layer, i)`.

    Returns:
        A `BNPPreconditioner` over `risk.space`, or its block. A feature of zero variance gets scale 1 (in the diagonal
        form, its size if that is not 0) and is listed in `constant_features`; a unit without curvature gets output
        scale 1 and is listed in `flat_units`; an uncovered parameter is left alone and named in `uncovered`; where
        `q="paper"` meets a layer that the paper does not speak of, `extensions` says what was done.

    Raises:
        InvalidInputError: an unknown option, negative damping, no covered layer, or `output_scale` for a loss that is
            not convex in the outputs and a mean over examples.

    Source: Lange, Helfrich and Ye 2022; T2, T3, T5, T6, T8; output scaling T10.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = 5 + torch.eye(3), torch.tensor([0, 1, 1])
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, (x, y))
        >>> P = bnp.bnp_preconditioner(risk)
        >>> P.dim, P.q, P.uncovered
        (8, {'': 1.0}, {})
    """
    if preset not in PRESETS:
        raise InvalidInputError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    given = {"eps1": eps1, "eps2": eps2, "q": q, "statistics": statistics, "bias_free": bias_free}
    settings = PRESETS[preset] | {name: value for name, value in given.items() if value is not None}
    require_options(settings["eps1"], settings["eps2"], settings["q"], settings["bias_free"])
    layers = covered_layers(risk, "BNP", also)
    moments = layer_moments(risk, statistics=settings["statistics"], layers=layers)
    rule = settings["q"]
    form = {name: settings[name] for name in ("eps1", "eps2", "bias_free")}

    def build(layer: Layer, q: str | float, dtype: torch.dtype, scales: Tensor | None = None) -> BNPBlock:
        return layer_block(layer, moments[layer.name], **form, q=q, output_scales=scales, dtype=dtype)

    q_of: dict[str, str | float] = {layer.name: rule for layer in layers}
    if rule == "measured":
        unscaled = {layer.name: build(layer, 1.0, torch.float64) for layer in layers}
        grams = second_moments(risk, layers, lambda layer, h: unscaled[layer.name].normalized(layer.per_unit(h)))
        q_of = {name: math.sqrt(float(torch.linalg.eigvalsh(g)[:, -1].max())) for name, g in grams.items()}
    curved = output_scales(risk, layers) if output_scale else {}
    blocks = {
        layer.name: (
            layer_positions(layer, risk.space),
            build(layer, q_of[layer.name], risk.space.dtype, curved.get(layer.name)),
        )
        for layer in layers
    }
    P = BNPPreconditioner(
        risk.space,
        blocks,
        settings=settings | {"output_scale": output_scale},
        constant_features={layer.name: _places(moments[layer.name].constant) for layer in layers},
        uncovered=layers.uncovered,
        flat_units={name: _places(s == 0) for name, s in curved.items()},
        extensions=extensions(
            rule, {layer: (moments[layer.name].rows, moments[layer.name].examples) for layer in layers}
        ),
    )
    return P if block is None else P.block(block)


def require_options(eps1: float, eps2: float, q: str | float, bias_free: str) -> None:
    """Refuse options that `bnp_preconditioner` does not have, here and where it trains.

    Raises:
        InvalidInputError: naming the option, what it is, and what it may be.
    """
    if not (0 <= eps1 < math.inf and 0 <= eps2 < math.inf):
        raise InvalidInputError(f"damping must be finite and not negative: eps1={eps1}, eps2={eps2}")
    number = isinstance(q, int | float) and not isinstance(q, bool) and 0 < q < math.inf
    if not number and q not in (*RULES, "measured"):
        words = ", ".join(map(repr, (*RULES, "measured")))
        raise InvalidInputError(f"q must be {words} or a positive number (1 for off), got {q!r}")
    if bias_free not in BIAS_FREE:
        raise InvalidInputError(f"bias_free must be one of {', '.join(BIAS_FREE)}, got {bias_free!r}")


def extensions(rule: str | float, counts: Mapping[Layer, tuple[int, int]]) -> dict[str, str]:
    """Layer name -> what of it the paper does not speak of, where its rule was asked for; from rows and examples.

    The paper's own are dense layers on one vector an example, and two-dimensional convolutions with stride 1, odd
    kernels and zero padding that keeps the size; all with a bias.
    """
    if rule != "paper":
        return {}
    found = {}
    for layer, (rows, examples) in counts.items():
        said = layer.beyond_paper(rows, examples)
        said += [] if layer.bias is not None else ["no free bias, with the q of a layer that has one"]
        if said:
            found[layer.name] = "; ".join(said)
    return found


def _places(true: Tensor) -> tuple[int, ...]:
    """Where a mask is true, counted through all its entries."""
    return tuple(torch.nonzero(true.flatten()).flatten().tolist())


def output_scales(risk: EmpiricalRisk, layers: Coverage) -> dict[str, Tensor]:
    """`s_i = sqrt(sum_r d^2 L / da_ir^2)` of each unit of each layer, by the Gauss-Newton matrix of the loss.

    The sum is over all rows of the layer: examples, positions and uses. For a dense layer that runs once per example
    it is `mean_j d^2 l_j / da_ij^2`; for a convolution the diagonal is summed over output positions.

    Args:
        risk: the empirical risk; its loss convex in the outputs, and a mean over examples (or positions).
        layers: the covered layers.

    Returns:
        Layer name -> `(units,)`, float64; 0 for a unit without curvature.

    Raises:
        InvalidInputError: a loss without a square root of its output Hessian.

    Source: T10. Exact; one backward pass per output, and per example where a batch couples its examples.
    """
    total = risk.group.sum(lambda: torch.cat(_own_squares(risk, layers)), "output scales")
    parts = torch.split(total, [layer.units for layer in layers])
    return {layer.name: part.sqrt() for layer, part in zip(layers, parts, strict=True)}


def _own_squares(risk: EmpiricalRisk, layers: Coverage) -> list[Tensor]:
    """The sum over this process's batches, layer by layer."""
    squares = {layer.name: torch.zeros(layer.units, dtype=torch.float64, device=risk.space.device) for layer in layers}
    for layer, weight, g in pulled_to_layers(risk, layers, _NEEDS):
        squares[layer.name] += weight * g.square().sum(dim=0)
    return list(squares.values())
