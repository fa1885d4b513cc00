"""Declared null directions: read, checked against the operator, counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NullSpaceError
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator
from bnp_analysis.linalg.random import orthonormal

NORM_STEPS = 8


@runtime_checkable
class HasBasis(Protocol):
    """What `null=` accepts beside a tensor: an orthonormal basis with its counts by cause."""

    @property
    def basis(self) -> Tensor: ...

    @property
    def sources(self) -> Mapping[str, int]: ...


@dataclass(frozen=True, eq=False)
class SomeNullDirections:
    """Directions in the null space that need not be all of it, with their counts by cause."""

    basis: Tensor
    sources: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class DeclaredNull:
    """An orthonormal basis `(n, r)` of the declared null space, or the fact that nothing was declared."""

    basis: Tensor
    declared: bool
    sources: Mapping[str, int] = field(default_factory=dict)
    # Whether the caller says that these are all: a tensor does, found directions do not.
    complete: bool = False

    @property
    def dim(self) -> int:
        return self.basis.shape[1]

    @property
    def cost(self) -> int:
        """Products that checking the directions takes: the norm of the operator, and one for each."""
        return NORM_STEPS + self.dim if self.dim else 0


def read_null(null: Tensor | HasBasis | None, A: SymmetricOperator) -> DeclaredNull:
    """Read `null=`: None, a tensor `(n, r)` of independent columns, or an object with `.basis`.

    A tensor declares the whole null space (with `r = 0`, that there is none); an object declares directions in it.

    Raises:
        InvalidInputError: wrong shape, dtype or device; NullSpaceError: dependent columns.
    """
    if null is None:
        return DeclaredNull(torch.zeros(A.dim, 0, dtype=A.dtype, device=A.device), declared=False)
    if isinstance(null, Tensor):
        basis, sources = null, {"declared": null.shape[-1] if null.ndim == 2 else 1}
    elif isinstance(null, HasBasis):
        basis, sources = null.basis, dict(null.sources)
    else:
        raise InvalidInputError(f"null= takes a tensor (n, r) or null directions, not {type(null).__name__}")
    basis = basis.unsqueeze(1) if basis.ndim == 1 else basis
    if basis.ndim != 2 or basis.shape[0] != A.dim:
        raise InvalidInputError(f"null directions must be ({A.dim}, r), got {tuple(basis.shape)}")
    if basis.dtype != A.dtype or basis.device != A.device:
        raise InvalidInputError(
            f"null directions are in {basis.dtype} on {basis.device}, the operator in {A.dtype} on {A.device}; "
            "convert them with .to(...)"
        )
    # Unless a factor has fewer rows than there would be nonzero eigenvalues.
    complete = isinstance(null, Tensor) and (A.factor is None or A.factor.rank_bound >= A.dim - basis.shape[1])
    return DeclaredNull(orthonormal(basis), declared=True, sources=sources, complete=complete)


def null_tolerance(A: LinearOperator) -> float:
    """How large `|A n| / |A|` may be for a null vector `n`, by rounding alone."""
    return 100 * math.sqrt(max(A.shape)) * A.eps


def require_null(A: LinearOperator, null: DeclaredNull, scale: float, what: str = "A") -> float:
    """Refuse declared directions that the operator does not annihilate to rounding.

    Args:
        A: the operator or its factor.
        null: the declared basis.
        scale: the norm of `A`, against which `|A n|` is judged.

    Returns:
        The largest `|A n| / scale`, which is rounding, so that nothing below it can be told from zero.

    Raises:
        NullSpaceError: names the worst column and how far from null it is.
    """
    if null.dim == 0 or scale == 0:
        return 0.0
    images = (A @ null.basis).double().norm(dim=0) / scale
    tolerance = null_tolerance(A)
    worst = int(images.argmax())
    if not float(images[worst]) <= tolerance:
        raise NullSpaceError(
            f"declared null direction {worst} is not null: |{what} n| / |{what}| = {float(images[worst]):.3g}, "
            f"rounding explains {tolerance:.1g}. Deflating it would hide a nonzero eigenvalue and make the "
            "condition number too small; drop the direction, or give it in the operator's own coordinates"
        )
    return float(images[worst])
