"""Exact scaling of operators by powers of two, against over- and underflow, and out of half precision (T13).

Squares, norms and products of numbers near the limits of the floating-point range underflow or overflow. A public
function measures `2^e A`, whose norm is near 1, and multiplies its results by `2^-e`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.derived import GramOperator, Restriction, Shifted
from bnp_analysis.linalg.operators import Derived, LinearOperator, Product, SymmetricOperator
from bnp_analysis.linalg.preconditioner import Congruence, Preconditioner
from bnp_analysis.runtime.random import generator, normal

# Binary exponents within which fourth powers of an operator's size, and squares of what it spans, stay in the floats.
_COMFORTABLE = {torch.float64: 100, torch.float32: 28, torch.bfloat16: 28, torch.float16: 5}

# Products of operators, which are made of scaled ones, and how often each is a factor.
_POWERS: dict[Any, tuple[int, ...]] = {GramOperator: (2,), Congruence: (1, 2), Product: (1, 1)}


def times_power(x: Tensor, exponent: int) -> Tensor:
    """`2^exponent x`, exact but for underflow, also where `2^exponent` is no float.

    Example:
        >>> times_power(torch.tensor([2.0**-1060], dtype=torch.float64), 1060).item()
        1.0
    """
    if exponent == 0:
        return x
    most = 1 - math.frexp(torch.finfo(x.dtype).tiny)[1]
    while exponent:
        step = max(-most, min(most, exponent))
        x, exponent = x * 2.0**step, exponent - step
    return x


def binary_exponent(x: Tensor) -> float:
    """`e` with `2^(e-1) <= max|x| < 2^e`; `-inf` for zero, `inf` or NaN where an entry is."""
    size = float(x.abs().max()) if x.numel() else 0.0
    return float(math.frexp(size)[1]) if 0 < size < math.inf else (-math.inf if size == 0 else size)


def comfortable(matrix: Tensor) -> tuple[Tensor, int]:
    """A matrix and 0, or where its size is far from 1, `2^e` times the matrix and `e`.

    Example:
        >>> comfortable(torch.tensor([2.0**-200], dtype=torch.float64))
        (tensor([0.5000], dtype=torch.float64), 199)
    """
    exponent = binary_exponent(matrix)
    if not math.isfinite(exponent) or abs(exponent) <= _COMFORTABLE[matrix.dtype]:
        return matrix, 0
    return times_power(matrix, -int(exponent)), -int(exponent)


def precise(dtype: torch.dtype) -> torch.dtype:
    """In which vectors are kept for products in `dtype`."""
    return dtype if dtype.itemsize >= 4 else torch.float32


class Scaled(Derived):
    """`2^e F` with vectors in at least single precision; the first product says which `e`, most often 0."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(operator, dtype=precise(operator.dtype))
        self._exponent: int | None = None

    @property
    def exponent(self) -> int:
        return self._exponent or 0

    def of(self, matrix: Tensor, exponent: int = 0) -> Tensor:
        if self._exponent is None:
            self._exponent = comfortable(matrix)[1]
        return times_power(matrix.to(self.dtype), self._exponent)

    @property
    def exact(self) -> bool:
        return self.inner.exact

    def row_blocks(self) -> Iterator[Tensor]:
        yield from (self.of(rows) for rows in self.inner.row_blocks())

    def _matmat(self, x: Tensor) -> Tensor:
        return self._times(self.inner._matmat, x)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._times(self.inner._rmatmat, y)

    def _times(self, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self._exponent is None:
            image = self._at(product, x, 0)
            near = abs(binary_exponent(image)) <= _COMFORTABLE[self.inner.dtype]
            self._exponent = 0 if near or not x.numel() else self._found()
            # What is 0 or infinite for another reason is left as it is.
            if self._exponent == 0:
                return image
        return self._at(product, x, self._exponent)

    def _at(self, product: Callable[[Tensor], Tensor], x: Tensor, exponent: int) -> Tensor:
        dtype = self.inner.dtype
        if exponent == 0 and dtype == self.dtype:
            return product(x)
        # An exponent beyond the floats is divided between the vector and its image.
        most = -math.frexp(torch.finfo(dtype).tiny)[1] - 8
        first = max(-most, min(most, exponent))
        return times_power(product(times_power(x, first).to(dtype)).to(self.dtype), exponent - first)

    def _found(self) -> int:
        """The exponent by products with one random vector, made longer or shorter where its image is 0 or infinite."""
        v = normal((self.inner.shape[1], 1), generator(0), self)
        far = -3 * math.frexp(torch.finfo(self.inner.dtype).tiny)[1] // 4
        for shift in (0, far, -far):
            size = binary_exponent(self._at(self.inner._matmat, v, shift)) - binary_exponent(v) - shift
            if math.isfinite(size):
                return 0 if abs(size) <= _COMFORTABLE[self.inner.dtype] else -int(size)
        return 0

    def __repr__(self) -> str:
        return repr(self.inner)


class ScaledSymmetric(Scaled, SymmetricOperator):
    """The same of a symmetric operator, whose factor has a scale of its own and is left out."""

    inner: SymmetricOperator

    @property
    def start(self) -> Tensor | None:
        inner = self.inner.start
        return None if inner is None else comfortable(inner.to(self.dtype))[0]


class ScaledShift(Shifted):
    """`2^e (A + delta I)` for `2^e A` made by `scaled`."""

    @property
    def exponent(self) -> int:
        # What is added stays in the floats.
        return min(exponent(self.inner), 900 - math.frexp(self.delta)[1])

    @property
    def added(self) -> float:
        return abs(math.ldexp(self.delta, self.exponent))

    def _matmat(self, x: Tensor) -> Tensor:
        image = self.inner._matmat(x)
        e = self.exponent
        return times_power(image, e - exponent(self.inner)) + math.ldexp(self.delta, e) * x


class ScaledPreconditioner(Preconditioner):
    """`2^e P`."""

    def __init__(self, inner: Preconditioner, exponent: int) -> None:
        super().__init__(inner.dim, inner.dtype, inner.device)
        self.inner, self.exponent, self.made_of = inner, exponent, (inner,)

    @property
    def roundings(self) -> int:
        return self.inner.roundings

    def _matmat(self, x: Tensor) -> Tensor:
        return times_power(self.inner._matmat(x), self.exponent)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return times_power(self.inner._rmatmat(y), self.exponent)

    def _solve(self, x: Tensor) -> Tensor:
        return times_power(self.inner._solve(x), -self.exponent)

    def _rsolve(self, y: Tensor) -> Tensor:
        return times_power(self.inner._rsolve(y), -self.exponent)

    def absolute(self) -> LinearOperator:
        absolute = Scaled(self.inner.absolute())
        absolute._exponent = self.exponent
        return absolute

    def row_magnitude(self, rows: Tensor) -> Tensor:
        return times_power(self.inner.row_magnitude(rows), self.exponent)


def scaled_preconditioner(P: Preconditioner) -> Preconditioner:
    """`P`, in at least single precision; where its size is far from 1, a power of two times `P`."""
    P = P if P.dtype == precise(P.dtype) else P.to(precise(P.dtype))
    size = binary_exponent(P.absolute()._matmat(torch.ones(P.dim, 1, dtype=P.dtype, device=P.device)))
    if abs(size) <= _COMFORTABLE[P.dtype]:
        return P
    # A row of |P| may overflow where no entry does.
    most = math.frexp(torch.finfo(P.dtype).max)[1]
    return ScaledPreconditioner(P, -int(size) if math.isfinite(size) else (-most if size > 0 else 0))


def scaled(A: Any) -> Any:
    """`2^e A` with `e = exponent(scaled(A))`, known after the first product; kinds of products keep their kind."""
    if isinstance(A, Scaled | ScaledPreconditioner):
        return A
    if isinstance(A, Preconditioner):
        return scaled_preconditioner(A)
    for kind in _POWERS:
        if isinstance(A, kind):
            return kind(*map(scaled, A.made_of))
    if isinstance(A, Restriction):
        return Restriction(scaled(A.inner), A.indices)
    if isinstance(A, Shifted) and not isinstance(A, ScaledShift):
        A = ScaledShift(scaled(A.inner), A.delta)
    return ScaledSymmetric(A) if isinstance(A, SymmetricOperator) else Scaled(A)


def exponent(A: LinearOperator) -> int:
    """`e` of `2^e A` made by `scaled`."""
    if isinstance(A, Scaled):
        return A.exponent + exponent(A.inner)
    if isinstance(A, ScaledPreconditioner | ScaledShift):
        return A.exponent
    if isinstance(A, Restriction):
        return exponent(A.inner)
    powers = next((powers for kind, powers in _POWERS.items() if isinstance(A, kind)), ())
    return sum(power * exponent(part) for power, part in zip(powers, A.made_of, strict=False))


def require_resolution(A: LinearOperator, vectors: int) -> None:
    """Refuse a search whose every residual would count as rounding.

    Args:
        A: the operator.
        vectors: the dimension that its rounding errors are taken to fill.
    """
    if 10 * math.sqrt(vectors) * A.eps >= 1:
        raise InvalidInputError(
            f"products of {A!r} are known to {A.eps:.1g} only; over {max(A.shape)} dimensions rounding would explain "
            "any residual, and eigenvalues would be invented. Build the operator in float32 or float64 (dtype=), or "
            "remove the cast inside the function"
        )


def in_floats(value: float, power: int, what: str) -> float:
    """`2^power value` as a float.

    Raises:
        InvalidInputError: it is none.

    Example:
        >>> in_floats(0.75, -1, "the trace")
        0.375
    """
    if power == 0 or value == 0 or not math.isfinite(value):
        return value
    digits = math.frexp(value)[1] + power
    if -1021 <= digits <= 1024:
        return math.ldexp(value, power)
    raise InvalidInputError(
        f"{what} is about 10^{digits * math.log10(2):.0f}, which is no float64 number; measure a multiple of the "
        "operator (a loss times a constant), whose eigenvalues are the same multiples"
    )
