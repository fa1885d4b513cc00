"""The result `ConditionNumber`, and the `Extremes` and `Magnitudes` that methods return."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnp_analysis.results import Result

MAGNITUDE = "max|lambda|/min|lambda|"
SINGULAR = "sigma_max/sigma_min+"
_SMALLEST = math.ulp(0.0)


@dataclass(frozen=True, kw_only=True)
class Extremes:
    """What a method finds: the ends of the nonzero spectrum, counts, and the bounds of their ratio.

    The fields are those of `ConditionNumber`.
    """

    lambda_max: float
    lambda_min: float
    lower: float
    upper: float
    rank: int | None = None
    null_dim: int = 0
    null_sources: Mapping[str, int] = field(default_factory=dict)
    on_your_word: int = 0
    unresolved: int | None = None
    negative: int = 0
    zero: int | None = None
    gap_ratio: float = math.inf
    noise_floor: float = 0.0
    failure_probability: float = 0.0
    residual_max: float = math.nan
    residual_min: float = math.nan
    matvecs: int = 0
    stop: str = "done"
    note: str = ""
    exponent: int = 0

    def times_power(self, power: int) -> Extremes:
        """The ends of `2^power A`, as floats where they are some; else `exponent` says in which units they are."""
        digits = [math.frexp(x)[1] + power for x in (self.lambda_max, self.lambda_min) if x]
        if power == 0 or not digits:
            return self
        if min(digits) < -1021 or max(digits) > 1023:
            return replace(self, exponent=power)
        names = ("lambda_max", "lambda_min", "noise_floor", "residual_max", "residual_min")
        sizes = {name: getattr(self, name) for name in names}
        # An error may be too small for a float, but is not zero.
        found: dict[str, Any] = {n: max(math.ldexp(x, power), _SMALLEST) if x else x for n, x in sizes.items()}
        return replace(self, **found)


@dataclass(frozen=True, kw_only=True)
class Magnitudes:
    """The largest `|lambda|`, descending: estimates, each with an interval that holds for its own rank.

    Attributes:
        value, lower, upper: `(R,)` float64.
        rest: no other eigenvalue is larger.
        rank: how many eigenvalues are nonzero, where that is certain.
        trace, trace_error: of the whole matrix, with a standard error that is 0 where all eigenvalues are known.
        negative: how many of them belong to negative eigenvalues.
        exponent: all sizes are in units of `2^exponent`.
        matvecs, failure_probability, stop: of the run; the probability is that of all bounds together.
    """

    value: NDArray[np.float64]
    lower: NDArray[np.float64]
    upper: NDArray[np.float64]
    rest: float
    rank: int | None
    trace: float
    trace_error: float
    negative: int
    matvecs: int
    failure_probability: float = 0.0
    stop: str = "done"
    exponent: int = 0


@dataclass(frozen=True, kw_only=True, repr=False)
class ConditionNumber(Result, Extremes):
    """The effective condition number `kappa* = lambda_max / lambda_min+` with its bounds.

    Attributes:
        value: best estimate; the ratio of `lambda_max` and `lambda_min`. Where some eigenvalues are unresolved and yet
            the spectrum ends in a clear gap where structure says it must, that is where it is taken; else at the
            smallest certified one.
        lower, upper: bounds; `lower` is NaN where none may be issued, `upper` infinite where none is known.
        two_sided: both bounds hold (with `failure_probability`, where that is not zero).
        method: its name, as `condition_number` takes it.
        lambda_max, lambda_min: largest and smallest nonzero eigenvalue (magnitudes for an indefinite matrix).
        residual_max, residual_min: some eigenvalue lies within each of these of `lambda_max`, `lambda_min`; NaN where
            the method gives no such pair.
        rank: eigenvalues counted as nonzero, None when the method cannot count them.
        null_dim: dimension of the declared null space.
        null_sources: its directions counted by cause.
        on_your_word: eigenvalues that are zero because a tensor of null directions says so: no arithmetic of the
            operator's precision can tell them from small ones, and no structure or known cause explains them.
        unresolved: eigenvalues below the noise floor that nothing explains as zero; None when not counted.
        negative: negative eigenvalues (indefinite matrices only).
        zero: eigenvalues within the noise floor, explained or not; None when not counted. `unresolved` of them are
            not explained, `on_your_word` by declaration alone, the others by structure or a cause in `null_sources`.
        gap_ratio: the smallest nonzero eigenvalue over the largest that counts as zero.
        noise_floor: eigenvalues below it are rounding.
        failure_probability: of the bounds, over random starts.
        quantity: what the numbers are: `"kappa*"`, `"max|lambda|/min|lambda|"` or `"sigma_max/sigma_min+"`.
        exponent: 0, unless eigenvalues leave the floats: `lambda_max`, `lambda_min`, `noise_floor` and the residuals
            are then in units of `2^exponent`.
        dim, dtype, stop, note: size, precision of the products (`float64`, `float64 (float32 inside)`), why the run
            ended, what to do next.
    """

    value: float
    two_sided: bool
    method: str
    dim: int
    dtype: str
    quantity: str = "kappa*"

    def __post_init__(self) -> None:
        """The bounds are proven, the value is an estimate: where rounding put it outside, it is the nearer bound."""
        if self.lower > self.upper:
            raise AssertionError(f"bounds {self.lower} .. {self.upper} exclude each other: an error of the package")
        low = self.value if math.isnan(self.lower) else self.lower
        object.__setattr__(self, "value", min(max(self.value, low), self.upper))

    def summary(self) -> str:
        """One honest line."""
        name = self.quantity
        how = f"{self.method} {self.dtype}"
        if self.rank is not None:
            how += f", rank {self.rank} of {self.dim}"
        if self.quantity == MAGNITUDE:
            how += f", {self.negative} negative" + ("" if self.zero is None else f", {self.zero} zero")
        if self.rank is not None and self.rank < self.dim and math.isfinite(self.gap_ratio):
            how += f", gap {self.gap_ratio:.2g}"
        if self.on_your_word:
            how += f", {self.on_your_word} zero on your word"
        if self.two_sided:
            chance = f", fails with probability <= {self.failure_probability:g}" if self.failure_probability else ""
            return f"{name} = {self.value:.4g} ({self.lower:.4g} .. {self.upper:.4g}), {how}{chance}"
        if math.isnan(self.lower):
            return f"{name} ~ {self.value:.4g}, no bound: {self.note}; {how}"
        return f"{name} >= {self.lower:.4g}, one-sided: {self.note}; {how}"
