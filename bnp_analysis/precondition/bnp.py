"""The preconditioner of Batch Normalization Preconditioning (T2, T3, T5, T6)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.network.layers import Layer, coverage
from bnp_analysis.network.moments import Moments, largest_normalized, layer_moments
from bnp_analysis.network.parameters import Block, ParameterSpace
from bnp_analysis.network.risk import EmpiricalRisk
from bnp_analysis.precondition.blocks import BlockDiagonal, SplitsByUnit

BIAS_FREE = ("rank-one", "diagonal")


class BNPBlock(SplitsByUnit):
    """`P = U D / q` of one layer, on its flat tensors (weight row-major, then bias).

    With a bias, `U = [[1, -mu^T], [0, I]]` and `D = diag(1, 1/sigma)` for each unit (T2). Without one, either
    `diag(1/rms)` or, better at the same cost, `P P^T = (diag sigma^2 + mu mu^T)^-1` by one rank-one correction
    (T5).

    Args:
        mean: `mu`, `(groups, m)`.
        variance: damped `sigma^2 > 0`, `(groups, m)`.
        q: the scale of the layer.
        units: output units `n`; split evenly among the groups.
        bias: whether the last `units` variables are the bias.
        bias_free: `"rank-one"` or `"diagonal"`, used without a bias.

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
        bias_free: str = "rank-one",
    ) -> None:
        if mean.shape != variance.shape or mean.ndim != 2 or units % mean.shape[0]:
            raise InvalidInputError(
                f"mean and variance must both be (groups, m) with groups dividing {units} units, got "
                f"{tuple(mean.shape)} and {tuple(variance.shape)}"
            )
        if bias_free not in BIAS_FREE:
            raise InvalidInputError(f"bias_free must be one of {', '.join(BIAS_FREE)}, got {bias_free!r}")
        if not bool((variance > 0).all()) or not bool(torch.isfinite(variance).all() and torch.isfinite(mean).all()):
            raise InvalidInputError("the damped variances must be positive and finite, the means finite")
        if not (q > 0 and math.isfinite(q)):
            raise InvalidInputError(f"q must be positive and finite, got {q}")
        groups, features = mean.shape
        super().__init__(units * (features + bias), mean.dtype, mean.device)
        self.mean, self.variance, self.q = mean, variance, float(q)
        self.units, self.bias, self.bias_free = units, bias, bias_free
        self._groups, self._features = groups, features
        # (groups, 1, m, 1): against weights (groups, units per group, m, k).
        self._mu = mean[:, None, :, None]
        if bias or bias_free == "rank-one":
            self._sigma = variance.sqrt()[:, None, :, None]
        else:
            self._sigma = (variance + mean.square()).sqrt()[:, None, :, None]
        self._v = self._mu / self._sigma
        square = self._v.square().sum(dim=2, keepdim=True)
        # 1 - 1/sqrt(1 + s) without cancellation for small s, divided by s; its limit 1/2 at zero.
        root = (1 + square).sqrt()
        self._shrink = 1 / (root * (root + 1))
        self._grow = 1 / (root + 1)

    def unit(self, i: int) -> BNPBlock:
        """The preconditioner of output unit `i` alone."""
        group = i // (self.units // self._groups)
        return BNPBlock(
            self.mean[group : group + 1],
            self.variance[group : group + 1],
            self.q,
            units=1,
            bias=self.bias,
            bias_free=self.bias_free,
        )

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = x[: self.units * self._features]
        shape = (self._groups, self.units // self._groups, self._features, x.shape[1])
        return weights.view(shape) if weights.is_contiguous() else weights.reshape(shape), x[weights.shape[0] :]

    def _join(self, weights: Tensor, bias: Tensor | None) -> Tensor:
        flat = weights.reshape(self.units * self._features, -1)
        return flat if bias is None else torch.cat([flat, bias.reshape(self.units, -1)])

    def _per_group(self, bias: Tensor) -> Tensor:
        return bias.reshape(self._groups, self.units // self._groups, 1, -1)

    def _matmat(self, x: Tensor) -> Tensor:
        w, b = self._split(x)
        if self.bias:
            w = w / (self._sigma * self.q)
            return self._join(w, self._per_group(b) / self.q - (w * self._mu).sum(dim=2, keepdim=True))
        return self._join(self._symmetric(w, -self._shrink) / (self._sigma * self.q), None)

    def _rmatmat(self, y: Tensor) -> Tensor:
        g, gb = self._split(y)
        if self.bias:
            gb = self._per_group(gb)
            return self._join((g - gb * self._mu) / (self._sigma * self.q), gb / self.q)
        return self._join(self._symmetric(g / (self._sigma * self.q), -self._shrink), None)

    def _solve(self, x: Tensor) -> Tensor:
        w, b = self._split(x)
        if self.bias:
            return self._join(
                w * (self._sigma * self.q), self.q * (self._per_group(b) + (w * self._mu).sum(dim=2, keepdim=True))
            )
        return self._join(self._symmetric(w * (self._sigma * self.q), self._grow), None)

    def _rsolve(self, y: Tensor) -> Tensor:
        g, gb = self._split(y)
        if self.bias:
            gb = self._per_group(gb)
            return self._join(self.q * (self._sigma * g + self._mu * gb), self.q * gb)
        return self._join(self._symmetric(g, self._grow) * (self._sigma * self.q), None)

    def _symmetric(self, w: Tensor, c: Tensor) -> Tensor:
        """`(I + c v v^T) w`: with `c = -shrink` the inverse square root of `I + v v^T`, with `grow` its square root."""
        if self.bias_free == "diagonal":
            return w
        return w + c * self._v * (self._v * w).sum(dim=2, keepdim=True)

    def absolute(self) -> LinearOperator:
        return _BNPMagnitude(self)


class _BNPMagnitude(LinearOperator):
    """Entries at least `|P_ij|` of a `BNPBlock`: the same sums with nothing cancelling."""

    def __init__(self, P: BNPBlock) -> None:
        super().__init__(P.shape, P.dtype, P.device)
        self._P = P

    def _correct(self, w: Tensor) -> Tensor:
        P = self._P
        if P.bias_free == "diagonal":
            return w
        return w + P._shrink * P._v.abs() * (P._v.abs() * w).sum(dim=2, keepdim=True)

    def _matmat(self, x: Tensor) -> Tensor:
        P = self._P
        w, b = P._split(x)
        if P.bias:
            w = w / (P._sigma * P.q)
            return P._join(w, P._per_group(b) / P.q + (w * P._mu.abs()).sum(dim=2, keepdim=True))
        return P._join(self._correct(w) / (P._sigma * P.q), None)

    def _rmatmat(self, y: Tensor) -> Tensor:
        P = self._P
        g, gb = P._split(y)
        if P.bias:
            gb = P._per_group(gb)
            return P._join((g + gb * P._mu.abs()) / (P._sigma * P.q), gb / P.q)
        return P._join(self._correct(g / (P._sigma * P.q)), None)


class BNPPreconditioner(BlockDiagonal):
    """The BNP preconditioner of a network, with what it was built from.

    Attributes:
        settings: damping, rule for `q`, statistics.
        q: layer name -> `q`.
        constant_features: layer name -> input features with zero variance, which got scale 1.
        uncovered: parameter name -> why it is left alone.
    """

    settings: Mapping[str, Any]
    q: Mapping[str, float]
    constant_features: Mapping[str, tuple[int, ...]]
    uncovered: Mapping[str, str]


def damped_variance(variance: Tensor, eps1: float, eps2: float) -> Tensor:
    """`sigma^2 + eps1 max(sigma^2) + eps2`, with 1 in place of a zero (T3).

    Example:
        >>> damped_variance(torch.tensor([[4.0, 0.0]]), 0.0, 0.0).tolist()
        [[4.0, 1.0]]
    """
    damped = variance + eps1 * variance.amax() + eps2
    return torch.where(damped > 0, damped, torch.ones_like(damped))


def bnp_preconditioner(
    risk: EmpiricalRisk,
    *,
    eps1: float = 0.0,
    eps2: float = 0.0,
    q: str | float = "auto",
    statistics: str = "channel",
    bias_free: str = "rank-one",
    block: Block | None = None,
) -> BNPPreconditioner | SplitsByUnit | BlockDiagonal:
    """The BNP preconditioner `P = U D / q` of every covered layer, from exact moments over the risk's data.

    Undamped by default, as the theory needs: damping breaks the invariance to per-feature scales (T3).

    Args:
        risk: the empirical risk; the moments are those of its layers' inputs at its `theta`.
        eps1, eps2: damping, `sigma^2 + eps1 max(sigma^2) + eps2`; the paper's values as recalled are 1e-2, 1e-4.
        q: `"auto"`, `q^2 = max(m/R, 1)`; `"measured"`, `q^2 = |G^|^2 / R` (T8); or a positive number, 1 for off.
        statistics: of a convolution, per `"channel"` (the paper) or per entry of the `"patch"` (T6).
        bias_free: for layers without a free bias, `"rank-one"` or `"diagonal"` (T5).
        block: only the part of `P` on a layer, or on one output unit `(layer, i)`.

    Returns:
        A `BNPPreconditioner` over `risk.space`, or its block; a feature of zero variance gets scale 1 and is
        listed in `constant_features`, an uncovered parameter is left alone and named in `uncovered`.

    Raises:
        InvalidInputError: an unknown option, negative damping, or no covered layer.

    Source: Lange, Helfrich and Ye 2022; T2, T3, T5, T6, T8.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = 5 + torch.eye(3), torch.tensor([0, 1, 1])
        >>> risk = bnp.EmpiricalRisk(torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, (x, y))
        >>> P = bnp.bnp_preconditioner(risk)
        >>> P.dim, P.q, P.uncovered
        (8, {'': 1.0}, {})
    """
    if not (eps1 >= 0 and eps2 >= 0):
        raise InvalidInputError(f"damping must not be negative: eps1={eps1}, eps2={eps2}")
    if not (q in ("auto", "measured") or (isinstance(q, int | float) and not isinstance(q, bool) and q > 0)):
        raise InvalidInputError(f"q must be 'auto', 'measured' or a positive number (1 for off), got {q!r}")
    layers = coverage(risk)
    if not layers.covered:
        listed = "; ".join(f"{n}: {why}" for n, why in layers.uncovered.items())
        raise InvalidInputError(
            f"no layer that BNP covers (Linear, Conv1d, Conv2d, Conv3d) among the parameters: {listed}"
        )
    moments = layer_moments(risk, statistics=statistics, layers=layers)
    measured = largest_normalized(risk, moments, layers) if q == "measured" else {}
    blocks, scales, constant = {}, {}, {}
    for layer in layers:
        found = moments[layer.name]
        scales[layer.name] = _q(layer, found, q, measured.get(layer.name), bias_free)
        blocks[layer.name] = (
            layer_positions(layer, risk.space),
            BNPBlock(
                found.mean.to(risk.theta),
                damped_variance(found.variance, eps1, eps2).to(risk.theta),
                scales[layer.name],
                units=layer.units,
                bias=layer.bias is not None,
                bias_free=bias_free,
            ),
        )
        constant[layer.name] = tuple(torch.nonzero(found.constant.flatten()).flatten().tolist())
    P = BNPPreconditioner(risk.space.dim, blocks, risk.space.dtype, risk.space.device, risk.space)
    P.settings = {"eps1": eps1, "eps2": eps2, "q": q, "statistics": statistics, "bias_free": bias_free}
    P.q, P.constant_features, P.uncovered = scales, constant, layers.uncovered
    return P if block is None else P.block(block)  # type: ignore[return-value]


def layer_positions(layer: Layer, space: ParameterSpace) -> Tensor:
    """Flat positions of a layer's weight and free bias, in this order."""
    names = [layer.weight] + ([layer.bias] if layer.bias is not None else [])
    return torch.cat([torch.arange(space.slice_of(n).start, space.slice_of(n).stop) for n in names])


def _q(layer: Layer, found: Moments, rule: str | float, measured: float | None, bias_free: str) -> float:
    """The scale of a layer (T3, T8); without a bias the diagonal form keeps the mean direction (T5)."""
    if not isinstance(rule, str):
        return float(rule)
    if measured is not None:
        return math.sqrt(measured)
    square = max(layer.features / found.rows, 1.0)
    if layer.bias is None and bias_free == "diagonal":
        rms = found.variance + found.mean.square()
        ratio = torch.where(rms > 0, found.mean.square() / rms, torch.zeros_like(rms))
        square += float(ratio.sum(dim=1).max())
    return math.sqrt(square)


__all__ = ["BNPBlock", "BNPPreconditioner", "bnp_preconditioner", "damped_variance"]
