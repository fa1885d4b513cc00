"""Invertible changes of variables `theta = P z` and the congruence `P^T A P`."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Self, overload

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.bases import orthonormal_blocks
from bnp_analysis.linalg.matrices import Columns, LocalColumns, MatrixOperator
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator, describe, gate
from bnp_analysis.runtime.kinds import require_kind

# Columns that are solved for together.
_TOGETHER = 64


class Preconditioner(LinearOperator):
    """An invertible square map `P` with `theta = P z`; gradients are multiplied by `P P^T`.

    A subclass gives four formulas on blocks `(n, k)`: `_matmat` (P z), `_rmatmat` (P^T g), `_solve`
    (P^-1 theta) and `_rsolve` (P^-T g), and `absolute`.
    """

    def __init__(self, dim: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__((dim, dim), dtype, device)

    @property
    def dim(self) -> int:
        """The number `n` of parameters."""
        return self.shape[0]

    @property
    def rank_bound(self) -> int:
        """`n`: `P` is invertible, and so `rank(F P) = rank F`."""
        return self.dim

    @abstractmethod
    def _solve(self, x: Tensor) -> Tensor:
        """`P^-1 x` for a checked block."""

    @abstractmethod
    def _rsolve(self, x: Tensor) -> Tensor:
        """`P^-T x` for a checked block."""

    @abstractmethod
    def absolute(self) -> LinearOperator:
        """An operator with entries `>= |P_ij|`, which the certificate's radius counts (T13)."""

    @property
    def roundings(self) -> int:
        """`|fl(P^T g) - P^T g| <= roundings u |P|^T |g|`, entry by entry; enough for every form in the package."""
        return 5 * self.dim + 32

    def part(self, positions: Tensor) -> Preconditioner | None:
        """`P` on some variables, in their order, where it couples them with no others; None where it is not known."""
        whole = torch.arange(self.dim, device=positions.device)
        return self if torch.equal(positions, whole) else None

    def across(self, units: int) -> tuple[Preconditioner, Tensor | None] | None:
        """`(Q, s)` with `(g (x) h) P = (g / s) (x) (h Q)` for a layer of so many units; None where there are none.

        Variables are the weights unit after unit, and then the biases; `h` has the bias column last. `s` of None is 1.
        """
        return None

    def row_magnitude(self, rows: Tensor) -> Tensor:
        """Entries at least `|H| |P|` for stored rows `H`."""
        return self.absolute()._rmatmat(rows.abs().T).T

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Self:
        """The same `P` in another dtype, and on another device."""
        other = copy.copy(self)
        other.dtype = dtype
        other.device = self.device if device is None else torch.device(device)
        for name, value in vars(self).items():
            if name not in ("dtype", "device"):
                setattr(other, name, _converted(value, dtype, other.device))
        return other

    def apply(self, z: Tensor) -> Tensor:
        """`theta = P z`; `(n,)` or `(n, k)`."""
        return self @ z

    def apply_transpose(self, g: Tensor) -> Tensor:
        """`P^T g`, the gradient in the variables `z`."""
        return gate(self, g, self.dim, self._rmatmat)

    def solve(self, theta: Tensor) -> Tensor:
        """`z = P^-1 theta`."""
        return gate(self, theta, self.dim, self._solve)

    def solve_transpose(self, g: Tensor) -> Tensor:
        """`P^-T g`."""
        return gate(self, g, self.dim, self._rsolve)

    def direction(self, g: Tensor) -> Tensor:
        """`P P^T g`: what gradient descent in `z` does to `theta` (T2)."""
        return self.apply(self.apply_transpose(g))

    @overload
    def transport(self, null: Tensor) -> Tensor: ...
    @overload
    def transport(self, null: Columns) -> Columns: ...
    def transport(self, null: Columns) -> Columns:
        """An orthonormal basis of `P^-1 N`, the null space of `P^T A P` when `N` spans that of `A`.

        Columns on few coordinates stay on few, where `P` mixes few.
        """
        if null.shape[1] == 0:
            return null
        if isinstance(null, LocalColumns):
            solved = self._solved(null)
            blocks = None if solved is None else orthonormal_blocks(self.dim, solved)
            if blocks is not None:
                return LocalColumns(self.dim, [(where, columns.to(null.dtype)) for where, columns in blocks])
            null = null.to_dense()
        basis: Tensor = torch.linalg.qr(self.solve(null))[0]
        return basis

    def _solved(self, null: LocalColumns) -> list[tuple[Tensor, Tensor]] | None:
        """`P^-1 N` block by block, each on the coordinates where it is not zero; None where these are most."""
        found, held = list[tuple[Tensor, Tensor]](), 0
        for where, columns in null.blocks if self.device.type == "cpu" else []:
            for some in torch.split(columns, _TOGETHER, dim=1):
                full = torch.zeros(self.dim, some.shape[1], dtype=self.dtype)
                full[where] = some.to(self.dtype)
                image = self.solve(full).double()
                there = torch.nonzero((image != 0).any(dim=1)).flatten()
                found.append((there, image[there]))
                held += found[-1][1].numel()
                if 2 * held > self.dim * null.shape[1]:
                    return None
        return found or None


def _converted(value: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Tensors and preconditioners inside containers, converted; positions and pivots keep their integers."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype)
    if isinstance(value, Preconditioner):
        return value.to(dtype, device)
    if isinstance(value, dict):
        return {k: _converted(v, dtype, device) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_converted(v, dtype, device) for v in value)
    return value


class IdentityPreconditioner(Preconditioner):
    """`P = I`.

    Example:
        >>> import torch
        >>> P = IdentityPreconditioner(2, torch.float64)
        >>> P.direction(torch.ones(2, dtype=torch.float64)).tolist()
        [1.0, 1.0]
    """

    roundings = 0

    def _matmat(self, x: Tensor) -> Tensor:
        return x

    _rmatmat = _solve = _rsolve = _matmat

    def across(self, units: int) -> tuple[Preconditioner, Tensor | None] | None:
        return IdentityPreconditioner(self.dim // units, self.dtype, self.device), None

    def absolute(self) -> LinearOperator:
        return self


class DensePreconditioner(Preconditioner):
    """An invertible `P` that is stored, with its LU factorization.

    Raises:
        InvalidInputError: not square, not finite, or numerically singular: then `P^-1 N` and the
            certificate would be noise.

    Example:
        >>> import torch
        >>> P = DensePreconditioner(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> P.solve(P.apply(torch.tensor([1.0, 2.0])))
        tensor([1., 2.])
    """

    def __init__(self, matrix: Tensor) -> None:
        if not isinstance(matrix, Tensor) or matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise InvalidInputError(f"a preconditioner is a square matrix (n, n), got {describe(matrix)}")
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        if matrix.dtype.itemsize < 4:
            raise InvalidInputError(
                f"a preconditioner in {matrix.dtype} cannot be inverted; give P and the operator in float32 or float64"
            )
        self._matrix = matrix.detach().clone()
        if not bool(torch.isfinite(self._matrix).all()):
            raise InvalidInputError("the preconditioner has NaN or infinite entries")
        singular = torch.linalg.svdvals(self._matrix)
        if self.dim and float(singular[-1]) <= self.dim * torch.finfo(matrix.dtype).eps * float(singular[0]):
            raise InvalidInputError(
                "the preconditioner is singular to rounding: theta = P z would lose directions. "
                f"Its singular values run from {singular[0]:.3g} to {singular[-1]:.3g}"
            )
        self._lu = tuple(torch.linalg.lu_factor(self._matrix))

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Self:
        """Made anew from the matrix: a factorization in the old dtype would not invert in the new one."""
        return type(self)(self._matrix.to(dtype=dtype, device=self.device if device is None else device))

    def _matmat(self, x: Tensor) -> Tensor:
        return self._matrix @ x

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._matrix.T @ y

    def _solve(self, x: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.lu_solve(*self._lu, x)
        return solution

    def _rsolve(self, y: Tensor) -> Tensor:
        solution: Tensor = torch.linalg.lu_solve(*self._lu, y, adjoint=True)
        return solution

    @property
    def roundings(self) -> int:
        return self.dim

    def absolute(self) -> LinearOperator:
        return MatrixOperator(self._matrix.abs())

    def to_dense(self) -> Tensor:
        return self._matrix


class Congruence(SymmetricOperator):
    """`P^T A P`, symmetric by construction; its factor is `F P` where `A = F^T F`."""

    zeros_are_structural = False  # entries are sums, which may cancel or underflow to 0

    def __init__(self, operator: SymmetricOperator, preconditioner: Preconditioner) -> None:
        check_fits(operator, preconditioner)
        super().__init__(operator.dim, operator.dtype, operator.device)
        self.operator, self.preconditioner = self.made_of = operator, preconditioner

    @property
    def factor(self) -> LinearOperator | None:
        inner = self.operator.factor
        return None if inner is None else inner @ self.preconditioner

    @property
    def semidefinite(self) -> bool:
        return self.operator.semidefinite

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Those of `A`: `z` has a coordinate for every one of `theta`."""
        return self.operator.shapes

    @property
    def start(self) -> Tensor | None:
        inner = self.operator.start
        return None if inner is None else self.preconditioner._rmatmat(inner.unsqueeze(1)).squeeze(1)

    @property
    def dense_cost(self) -> int:
        return self.operator.dense_cost

    @property
    def rank_bound(self) -> int:
        return self.operator.rank_bound

    def _matmat(self, x: Tensor) -> Tensor:
        P = self.preconditioner
        return P._rmatmat(self.operator._matmat(P._matmat(x)))

    def to_dense(self) -> Tensor:
        P = self.preconditioner
        half = P._rmatmat(self.operator.to_dense())
        return P._rmatmat(half.T)


def check_fits(operator: SymmetricOperator, preconditioner: Preconditioner) -> None:
    """Refuse a preconditioner of another size, dtype or device than the operator."""
    require_kind(preconditioner, "preconditioner", Preconditioner)
    if preconditioner.dim != operator.dim:
        raise InvalidInputError(
            f"the preconditioner acts on {preconditioner.dim} parameters, the operator on {operator.dim}; "
            "build both from the same risk and the same block"
        )
    if preconditioner.dtype != operator.dtype or preconditioner.device != operator.device:
        raise InvalidInputError(
            f"the preconditioner is in {preconditioner.dtype} on {preconditioner.device}, "
            f"the operator in {operator.dtype} on {operator.device}"
        )


def congruence(A: SymmetricOperator, P: Preconditioner) -> SymmetricOperator:
    """The operator `P^T A P`, the curvature in the variables `z` of `theta = P z` (T2).

    Args:
        A: symmetric operator on `R^n`.
        P: preconditioner on `R^n`, same dtype and device.

    Returns:
        A `SymmetricOperator`; its `factor` is `F P` where `A` has the factor `F`.

    Raises:
        InvalidInputError: sizes, dtypes or devices differ.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(torch.tensor([4.0, 1.0])))
        >>> P = bnp.linalg.DensePreconditioner(torch.diag(torch.tensor([0.5, 1.0])))
        >>> bnp.linalg.congruence(A, P).to_dense()
        tensor([[1., 0.],
                [0., 1.]])
    """
    require_kind(A, "A", SymmetricOperator)
    require_kind(P, "P", Preconditioner)
    return Congruence(A, P)
