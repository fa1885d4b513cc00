"""Matrix-free linear operators on flat vectors.

`A @ v` checks every argument; the formulas that it calls (`_matmat`, `_rmatmat`) check nothing.
Operators add, scale and compose: `A + B`, `A - B`, `2 * A`, `A @ B`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, overload

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.kinds import require_plain

_IDENTITY_CHUNK = 64
# Coarser products than this have no digits left for a spectrum: float16 and TF32 have 2^-10, bfloat16 2^-7.
_COARSEST = 1e-4
_CAST = (
    "Measure in float64: EmpiricalRisk(..., dtype=torch.float64), risk.to(torch.float64) or an operator in that dtype; "
    "what the model or the loss itself casts must be taken out there"
)
_CANCELLED = (
    "The dtype has more: they are lost where the loss is a difference of nearly equal numbers, as log(cosh(z)) is at "
    "large logits, where gates of recurrent layers are saturated, or where derivatives are below the smallest normal "
    "number (GELU at -14 in float32). Write the loss in a form whose derivatives keep their digits "
    "(binary_cross_entropy_with_logits, cross_entropy, softplus, logsigmoid), take a point or data with smaller "
    "logits, leave the saturated layers out with params=, and, from float32, go over to float64"
)


@dataclass(frozen=True, eq=False)
class RowProducts:
    """Rows `g_jr (x) h_j` of a factor, in some of its columns: those of one dense layer (T1).

    Products of two rows are `(g_jr . g_ks) (h_j . h_k)`: the Gram matrix of all rows costs what its size is, however
    many columns there are.

    Attributes:
        left: `G`, `(R, r, n)`, example by example.
        right: `H`, `(R, f)`, with the bias column last if there is one.
        columns: `(n f,)`, positions of the columns: unit after unit, then those of the biases.
    """

    left: Tensor
    right: Tensor
    columns: Tensor


class LinearOperator(ABC):
    """A real `m x n` matrix known by its products, `A @ v` and `A.T @ u`.

    Vectors have shape `(n,)`, blocks of vectors `(n, k)`. Vectors of another dtype or device are
    refused: a silent cast would change the precision that the results claim.

    `A @ B`, `A + B`, `A - B`, `c * A` and `-A` are operators again, symmetric where `A` and `B` are and what is made of
    them is. Their precision `eps` is that of the coarser part, a sum of operators with factors `F`, `G` has the factor
    `[F; G]`, and `c A` with `c >= 0` has `sqrt(c) F`. Bounds count what the parts round: of `A - B` relative to
    `|A| + |B|`, however small the difference is.
    """

    # So that `numpy.float64(2) * A` asks `A`.
    __array_ufunc__ = None
    # The operators that it is made of: unless a subclass knows better, what is said of rounding and zeros is theirs.
    made_of: tuple[LinearOperator, ...] = ()

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device | str, eps: float | None = None
    ) -> None:
        rows, columns = int(shape[0]), int(shape[1])
        if rows < 0 or columns < 0:
            raise InvalidInputError(f"an operator cannot have shape {(rows, columns)}")
        if not dtype.is_floating_point:
            raise InvalidInputError(f"an operator needs a real floating-point dtype, not {dtype}")
        self.shape = (rows, columns)
        self.dtype = dtype
        self.device = torch.device(device)
        self._eps = float(torch.finfo(dtype).eps if eps is None else eps)

    @abstractmethod
    def _matmat(self, x: Tensor) -> Tensor:
        """The product with a checked block `(n, k)`."""

    @abstractmethod
    def _rmatmat(self, x: Tensor) -> Tensor:
        """The transposed product with a checked block `(m, k)`."""

    @property
    def T(self) -> LinearOperator:
        """The transpose, sharing everything with this operator."""
        return Transposed(self)

    @property
    def rank_bound(self) -> int:
        """An upper bound of the rank that follows from structure alone, here `min(m, n)`."""
        return min(self.shape)

    @property
    def row_parts(self) -> Sequence[RowProducts] | None:
        """The rows as Kronecker products in disjoint sets of columns, up to an orthogonal mixture; None if unknown."""
        return None

    @property
    def zeros_are_structural(self) -> bool:
        """Whether an exact 0 in `to_dense()` is one whatever the numbers are: zero rows and columns then bound a rank.

        True of given entries and of what a graph leaves out (a missing edge, a ReLU mask). An operator whose zeros may
        be rounding (a cancellation, an underflow) says False.
        """
        return all(part.zeros_are_structural for part in self.made_of)

    @property
    def dense_cost(self) -> int:
        """Products that `to_dense` spends."""
        return min(self.shape)

    @property
    def exact(self) -> bool:
        """Whether the entries of `to_dense()` are given, not computed with rounding."""
        return False

    @property
    def eps(self) -> float:
        """The spacing `eps` of the numbers at 1 in which products are really computed: the dtype's, or a coarser one.

        Every tolerance and every radius is made of it. An operator whose products pass through lower precision (a
        cast inside a model) has a larger one than its dtype.
        """
        return max([part.eps for part in self.made_of]) if self.made_of else self._eps

    @property
    def record(self) -> Mapping[str, Any]:
        """How products were computed, for results; empty where there is nothing to choose."""
        return dict(ChainMap(*(dict(part.record) for part in self.made_of)))

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...
    @overload
    def __matmul__(self, other: LinearOperator) -> LinearOperator: ...
    def __matmul__(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        if isinstance(other, LinearOperator):
            return Product(self, other)
        return gate(self, other, self.shape[1], self._matmat)

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self + (-other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, c: float) -> LinearOperator:
        return Multiple(self, c)

    def __rmul__(self, c: float) -> LinearOperator:
        return self * c

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def to_dense(self) -> Tensor:
        """The `(m, n)` matrix, by products with the identity along the shorter side."""
        rows, columns = self.shape
        side, product = (columns, self._matmat) if columns <= rows else (rows, self._rmatmat)
        chunks = []
        for begin in range(0, side, _IDENTITY_CHUNK):
            width = min(_IDENTITY_CHUNK, side - begin)
            unit = torch.zeros(side, width, dtype=self.dtype, device=self.device)
            unit[begin : begin + width] = torch.eye(width, dtype=self.dtype, device=self.device)
            chunks.append(product(unit))
        if not chunks:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        dense = torch.cat(chunks, dim=1)
        return dense if columns <= rows else dense.T

    def row_blocks(self) -> Iterator[Tensor]:
        """The rows of `to_dense()` in parts, but for zero rows that may be left out: less is held at once."""
        yield self.to_dense()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.shape[0]}x{self.shape[1]} {self.dtype} on {self.device}>"


def gate(operator: LinearOperator, v: Tensor, length: int, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Check a vector or block, apply the product, give back the shape that came in."""
    name = type(operator).__name__
    require_no_autocast(operator.dtype, operator.device, "products")
    if not isinstance(v, Tensor):
        raise InvalidInputError(f"{name} multiplies torch tensors, not {type(v).__name__}; use torch.as_tensor(v)")
    if v.ndim not in (1, 2) or v.shape[0] != length:
        raise InvalidInputError(
            f"{name} of shape {operator.shape} cannot multiply a tensor of shape {tuple(v.shape)}: "
            f"expected ({length},) or ({length}, k)"
        )
    if v.layout is not torch.strided:
        require_plain(v, "the vector")
    if v.dtype != operator.dtype or v.device != operator.device:
        raise InvalidInputError(
            f"{name} works in {operator.dtype} on {operator.device}, the vector is {v.dtype} on {v.device}; "
            f"convert the vector with v.to({operator.dtype}), or build the operator in the vector's dtype"
        )
    with full_float32:
        return product(v.unsqueeze(1)).squeeze(1) if v.ndim == 1 else product(v)


def require_no_autocast(dtype: torch.dtype, device: torch.device, what: str) -> None:
    """Refuse to compute where torch would take half precision for it; it leaves float64 alone.

    Example:
        >>> with torch.autocast("cpu", dtype=torch.bfloat16):
        ...     require_no_autocast(torch.float64, torch.device("cpu"), "products")
    """
    if dtype != torch.float64 and torch.is_autocast_enabled(device.type):
        raise InvalidInputError(
            f"autocast is on, so {what} would be in {torch.get_autocast_dtype(device.type)} and lose digits, "
            f"though they say {dtype}. Measure outside of `with torch.autocast(...)`, or in float64"
        )


def coarse(operator: LinearOperator) -> bool:
    """Whether products have lost a decimal digit, or nearly one, of their dtype."""
    return operator.eps > 8 * torch.finfo(operator.dtype).eps


def computed_in(operator: LinearOperator) -> str:
    """In which precision products are computed: the dtype, and in brackets a coarser one that they pass through.

    Example:
        >>> from bnp_analysis.linalg import MatrixOperator
        >>> computed_in(MatrixOperator(torch.eye(2, dtype=torch.float64), eps=2.0**-23))
        'float64 (float32 inside)'
    """
    own = str(operator.dtype).removeprefix("torch.")
    if not coarse(operator):
        return own
    # Rounding that is amplified makes float32 a little coarser; as coarse as half precision it comes from anywhere.
    most = {torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}
    near = (d for d, times in most.items() if 1 <= operator.eps / torch.finfo(d).eps <= times)
    inside = next((str(d).removeprefix("torch.") for d in near), None)
    return f"{own} ({inside} inside)" if inside else f"{own} (eps {operator.eps:.1g})"


def require_digits(eps: float, computed: str, what: str, *, cast: bool) -> None:
    """Refuse a statement about a spectrum from products with fewer than four digits, as of bfloat16 and float16.

    Args:
        eps: the spacing of their numbers at 1.
        computed: the precision in words.
        what: would have been stated.
        cast: whether a coarser dtype is the cause, and no cancellation.

    Raises:
        InvalidInputError: with the ways out.

    Example:
        >>> require_digits(2.0**-23, "float32", "eigenvalues", cast=True)
    """
    if eps > _COARSEST:
        raise InvalidInputError(
            f"products are computed in {computed}, which keeps {max(-math.log10(eps), 0):.0f} digits, so {what} would "
            f"be those of its rounding. {_CAST if cast else _CANCELLED}"
        )


class Transposed(LinearOperator):
    """The transpose of an operator; made by `A.T`."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__((operator.shape[1], operator.shape[0]), operator.dtype, operator.device)
        self._operator, self.made_of = operator, (operator,)

    @property
    def T(self) -> LinearOperator:
        return self._operator

    @property
    def rank_bound(self) -> int:
        return self._operator.rank_bound

    @property
    def dense_cost(self) -> int:
        return self._operator.dense_cost

    def _matmat(self, x: Tensor) -> Tensor:
        return self._operator._rmatmat(x)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._operator._matmat(y)

    def to_dense(self) -> Tensor:
        return self._operator.to_dense().T


class OfTwo(LinearOperator):
    """What is made of two operators `left`, `right`: it is as precise as the coarser one."""

    def __init__(self, left: LinearOperator, right: LinearOperator, shape: tuple[int, int], what: str) -> None:
        if left.dtype != right.dtype or left.device != right.device:
            raise InvalidInputError(
                f"cannot {what} an operator in {left.dtype} on {left.device} "
                f"with one in {right.dtype} on {right.device}; build both in one dtype on one device"
            )
        LinearOperator.__init__(self, shape, left.dtype, left.device)
        self.left, self.right = self.made_of = left, right

    @property
    def rank_bound(self) -> int:
        return min(self.left.rank_bound + self.right.rank_bound, *self.shape)

    @property
    def dense_cost(self) -> int:
        return self.left.dense_cost + self.right.dense_cost


class Product(OfTwo):
    """The product `A B` of two operators; made by `A @ B`."""

    zeros_are_structural = False  # entries are sums, which may cancel or underflow to 0

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if left.shape[1] != right.shape[0]:
            raise InvalidInputError(f"shapes {left.shape} and {right.shape} do not multiply")
        super().__init__(left, right, (left.shape[0], right.shape[1]), "multiply")

    @property
    def rank_bound(self) -> int:
        return min(self.left.rank_bound, self.right.rank_bound)

    @property
    def dense_cost(self) -> int:
        return self.left.dense_cost

    def _matmat(self, x: Tensor) -> Tensor:
        return self.left._matmat(self.right._matmat(x))

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self.right._rmatmat(self.left._rmatmat(y))

    def to_dense(self) -> Tensor:
        # (A B)^T = B^T A^T: the rows of A, each sent through B^T.
        return self.right._rmatmat(self.left.to_dense().T).T


class Sum(OfTwo):
    """The sum `A + B` of two operators; made by `A + B`."""

    zeros_are_structural = False  # entries are sums, which may cancel or underflow to 0

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        if left.shape != right.shape:
            raise InvalidInputError(f"shapes {left.shape} and {right.shape} do not add")
        super().__init__(left, right, left.shape, "add")

    def _matmat(self, x: Tensor) -> Tensor:
        return self.left._matmat(x) + self.right._matmat(x)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self.left._rmatmat(y) + self.right._rmatmat(y)

    def to_dense(self) -> Tensor:
        return self.left.to_dense() + self.right.to_dense()


class Stacked(OfTwo):
    """`[F; G]`, the factor of `F^T F + G^T G`."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        super().__init__(left, right, (left.shape[0] + right.shape[0], left.shape[1]), "stack")

    @property
    def exact(self) -> bool:
        return self.left.exact and self.right.exact

    def _matmat(self, x: Tensor) -> Tensor:
        return torch.cat([self.left._matmat(x), self.right._matmat(x)])

    def _rmatmat(self, y: Tensor) -> Tensor:
        rows = self.left.shape[0]
        return self.left._rmatmat(y[:rows]) + self.right._rmatmat(y[rows:])

    def to_dense(self) -> Tensor:
        return torch.cat([self.left.to_dense(), self.right.to_dense()])


class Derived(LinearOperator):
    """What is made of the entries of one other operator: its rounding is what that operator rounds (T13).

    Attributes:
        inner: the other operator.
        times: a number that its entries are multiplied by.
    """

    times = 1.0

    def __init__(
        self,
        inner: LinearOperator,
        shape: tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        LinearOperator.__init__(self, shape or inner.shape, dtype or inner.dtype, device or inner.device)
        self.inner, self.made_of = inner, (inner,)

    @property
    def added(self) -> float:
        """The size of what is added to the entries of `inner`."""
        return 0.0

    @property
    def rank_bound(self) -> int:
        return min(self.shape) if self.added else self.inner.rank_bound if self.times else 0

    @property
    def dense_cost(self) -> int:
        return self.inner.dense_cost

    @property
    def semidefinite(self) -> bool:
        """As of a symmetric operator; what is made of a rectangular one is not asked."""
        return isinstance(self.inner, SymmetricOperator) and self.inner.semidefinite

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """As of a symmetric operator of the same coordinates."""
        return self.inner.shapes if isinstance(self.inner, SymmetricOperator) else {}

    @abstractmethod
    def of(self, matrix: Tensor, exponent: int = 0) -> Tensor:
        """The same made of a matrix: `2^exponent to_dense()` where that is `2^exponent inner.to_dense()`."""

    def to_dense(self) -> Tensor:
        return self.of(self.inner.to_dense())


class Multiple(Derived):
    """`c A`; made by `c * A`."""

    def __init__(self, inner: LinearOperator, c: float) -> None:
        if not isinstance(c, int | float) or not math.isfinite(c):
            raise InvalidInputError(f"an operator is multiplied by a finite number, not {describe(c)} {c}")
        super().__init__(inner)
        self.times = float(c)

    def of(self, matrix: Tensor, exponent: int = 0) -> Tensor:
        return self.times * matrix

    def _matmat(self, x: Tensor) -> Tensor:
        return self.times * self.inner._matmat(x)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self.times * self.inner._rmatmat(y)


class SymmetricOperator(LinearOperator):
    """A real symmetric `n x n` matrix known by its products.

    `factor` is an operator `F` with `F^T F = A`, or None. Where it exists, `A` is positive
    semidefinite and small eigenvalues are decided on the singular values of `F`, whose error is
    `u sqrt(kappa)` in place of `u kappa` (T13).
    """

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device | str, eps: float | None = None) -> None:
        super().__init__((dim, dim), dtype, device, eps)

    @property
    def dim(self) -> int:
        """The number `n` of rows and columns."""
        return self.shape[0]

    @property
    def factor(self) -> LinearOperator | None:
        """An operator `F` of shape `(r, n)` with `F^T F = A`, or None where none is known."""
        return None

    @property
    def semidefinite(self) -> bool:
        """Whether no eigenvalue is negative, so that `condition_number` refuses one that is (the default).

        A matrix that may have negative eigenvalues, as a Hessian, says False: magnitudes are compared then.
        """
        return True

    @property
    def start(self) -> Tensor | None:
        """A vector `(n,)` rich in the eigenvectors of the largest eigenvalues, where one is known without a product."""
        return None

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of the tensors that the coordinates belong to, row-major and in order; empty if not known."""
        return {}

    @property
    def T(self) -> Self:
        return self

    @overload
    def __add__(self, other: SymmetricOperator) -> SymmetricOperator: ...
    @overload
    def __add__(self, other: LinearOperator) -> LinearOperator: ...
    def __add__(self, other: LinearOperator) -> LinearOperator:
        return SymmetricSum(self, other) if isinstance(other, SymmetricOperator) else super().__add__(other)

    @overload
    def __sub__(self, other: SymmetricOperator) -> SymmetricOperator: ...
    @overload
    def __sub__(self, other: LinearOperator) -> LinearOperator: ...
    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return super().__sub__(other)

    def __mul__(self, c: float) -> SymmetricOperator:
        return SymmetricMultiple(self, c)

    def __rmul__(self, c: float) -> SymmetricOperator:
        return self * c

    def __neg__(self) -> SymmetricOperator:
        return self * -1.0

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._matmat(y)

    def to_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator` with the same products, in NumPy arrays on the host.

        Arrays may be of any real or complex dtype and memory layout; what comes out is in the operator's precision.
        """
        from scipy.sparse.linalg import LinearOperator as ScipyLinearOperator

        # NumPy has no bfloat16.
        host = torch.float32 if self.dtype == torch.bfloat16 else self.dtype
        numpy_dtype = torch.empty(0, dtype=host).numpy().dtype

        def real(x: Any) -> Any:
            block = torch.from_numpy(np.array(x, dtype=numpy_dtype, order="C")).to(self.dtype).to(self.device)
            return (self @ block).to(device="cpu", dtype=host).numpy()

        def matmat(x: Any) -> Any:
            return real(x.real) + 1j * real(x.imag) if np.iscomplexobj(x) else real(x)

        return ScipyLinearOperator(
            self.shape, matvec=matmat, rmatvec=matmat, matmat=matmat, rmatmat=matmat, dtype=numpy_dtype
        )


class SymmetricSum(Sum, SymmetricOperator):
    """The sum of two symmetric operators."""

    left: SymmetricOperator
    right: SymmetricOperator

    @property
    def factor(self) -> LinearOperator | None:
        upper, lower = self.left.factor, self.right.factor
        return None if upper is None or lower is None else Stacked(upper, lower)

    @property
    def semidefinite(self) -> bool:
        return self.left.semidefinite and self.right.semidefinite

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.left.shapes or self.right.shapes

    @property
    def start(self) -> Tensor | None:
        return self.right.start if self.left.start is None else self.left.start


class SymmetricMultiple(Multiple, SymmetricOperator):
    """A multiple of a symmetric operator."""

    inner: SymmetricOperator

    @property
    def factor(self) -> LinearOperator | None:
        inner = self.inner.factor
        return None if inner is None or self.times < 0 else math.sqrt(self.times) * inner

    @property
    def semidefinite(self) -> bool:
        return self.times >= 0 and self.inner.semidefinite

    @property
    def start(self) -> Tensor | None:
        return self.inner.start if self.times > 0 else None


def describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} in {value.dtype}"
    return type(value).__name__
