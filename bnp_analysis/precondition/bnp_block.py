"""The preconditioner of one layer, `P = U D / q` (T2, T5)."""

from __future__ import annotations

import copy
import math
from typing import Self

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.precondition.base import SplitsByUnit


class BNPBlock(SplitsByUnit):
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

    def unit_positions(self, i: int) -> Tensor:
        weights = torch.arange(i * self.features, (i + 1) * self.features)
        return torch.cat([weights, torch.tensor([self.units * self.features + i])]) if self.bias else weights

    def unit(self, i: int) -> BNPBlock:
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
