"""Declared null directions: read, checked against the operator, counted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NullSpaceError
from bnp_analysis.linalg.bases import orthonormal
from bnp_analysis.linalg.forming import formed
from bnp_analysis.linalg.matrices import Columns, LocalColumns, ReducedFactor, as_tensor
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator
from bnp_analysis.linalg.scale import Scaled, exponent, precise
from bnp_analysis.runtime.kinds import require_plain
from bnp_analysis.runtime.random import generator, normal

NORM_STEPS = 8
# Random combinations of rows. They show less than 1/`CAUTION` of an image with probability `MISSED` at most: for
# `chi^2` with `s` degrees of freedom, `P(chi^2 <= x s) <= (x e^(1 - x))^(s / 2)`, here at `x = 1/16`.
COMBINED, CAUTION = 48, 4.0
MISSED = (math.exp(1 - CAUTION**-2) / CAUTION**2) ** (COMBINED / 2)
# Blocks of columns that take less than one such part of a dense basis are kept.
_SAVED = 4
# Stored matrices whose singular values may decide whether declared directions are null.
_DECIDED = 3_000


@runtime_checkable
class HasBasis(Protocol):
    """What `null=` accepts beside a tensor: an orthonormal basis with its counts by cause."""

    @property
    def basis(self) -> Tensor: ...

    @property
    def sources(self) -> Mapping[str, int]: ...


@runtime_checkable
class HasColumns(Protocol):
    """The same where the basis is kept on few coordinates: what is deflated takes what its blocks take."""

    @property
    def columns(self) -> LocalColumns: ...

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

    basis: Columns
    declared: bool
    sources: Mapping[str, int] = field(default_factory=dict)
    # Whether the caller says that these are all: a tensor does, found directions do not.
    complete: bool = False
    # The same basis in float64, `(n, r)`, for checks, and the precision of what was given.
    wide: Tensor | None = None
    given_eps: float = 0.0
    # Whether the directions rest on the caller's word alone, no cause being named.
    on_word: bool = False

    @property
    def dim(self) -> int:
        return self.basis.shape[1]

    @property
    def cost(self) -> int:
        """Products that checking the directions takes: the norm of the operator, and one for each."""
        checked = min(self.dim, COMBINED) if isinstance(self.basis, LocalColumns) else self.dim
        return NORM_STEPS + checked if self.dim else 0


def read_null(null: Tensor | HasBasis | None, A: SymmetricOperator) -> DeclaredNull:
    """Read `null=`: None, a tensor `(n, r)` of independent columns, or an object with `.basis`.

    A tensor declares the whole null space (with `r = 0`, that there is none); an object declares directions in it.
    Where it has orthonormal `.columns` that take little, these are used as they are.

    Raises:
        InvalidInputError: wrong shape, dtype or device; NullSpaceError: dependent columns.
    """
    if null is None:
        return DeclaredNull(torch.zeros(A.dim, 0, dtype=precise(A.dtype), device=A.device), declared=False)
    if isinstance(null, HasColumns) and (found := _local(null, A)) is not None:
        return found
    if isinstance(null, Tensor):
        require_plain(null, "null")
        basis, sources = null, {"declared": null.shape[-1] if null.ndim == 2 else 1}
    elif isinstance(null, HasBasis):
        basis, sources = null.basis, dict(null.sources)
    else:
        raise InvalidInputError(
            f"null= takes a tensor (n, r) or null directions, not {type(null).__name__}: bnp.null_directions(risk)"
        )
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
    wide = orthonormal(basis.double())
    return DeclaredNull(
        wide.to(precise(A.dtype)),
        declared=True,
        sources=sources,
        complete=complete,
        wide=wide,
        given_eps=float(torch.finfo(basis.dtype).eps),
        on_word=isinstance(null, Tensor),
    )


def _local(null: HasColumns, A: SymmetricOperator) -> DeclaredNull | None:
    """Orthonormal columns that are many and live on few coordinates, as they are; None where they are not such."""
    N = null.columns
    count = N.shape[1]
    if N.shape[0] != A.dim or (N.dtype, N.device) != (A.dtype, A.device):
        return None
    if count <= COMBINED or _SAVED * N.held > A.dim * count:
        return None
    N = N.to(precise(A.dtype))
    g = normal((count, 2), generator(0), N)
    if not float((N.T @ (N @ g) - g).norm()) <= 100 * math.sqrt(count) * torch.finfo(N.dtype).eps * float(g.norm()):
        return None
    given = float(torch.finfo(A.dtype).eps)
    return DeclaredNull(N, declared=True, sources=dict(null.sources), given_eps=given)


def null_tolerance(A: LinearOperator, eps: float | None = None) -> float:
    """How large `|A n| / |A|` may be for a null vector `n`, by rounding alone: of products, or to `eps`."""
    return 100 * math.sqrt(max(A.shape)) * (A.eps if eps is None else eps)


def require_null(A: LinearOperator, null: DeclaredNull, scale: float, what: str = "A") -> float:
    """Refuse declared directions that the operator does not annihilate to rounding.

    What is computed is checked by a product, to its rounding. What is stored is checked in float64, whatever its dtype:
    to `n u |A|`, and what rounding entries and directions to their dtype explains, `eps | |A| |n| |`. Many columns on
    few coordinates are checked by 48 random combinations of rows, which miss one with probability 1e-19.

    Args:
        A: the operator or its factor.
        null: the declared basis.
        scale: the norm of `A`, against which `|A n|` is judged.

    Returns:
        The largest `|A n| / scale`, which is rounding, so that nothing below it can be told from zero.

    Raises:
        NullSpaceError: names the worst column and how far from null it is, or that products cannot tell.
    """
    if null.dim == 0 or scale == 0:
        return 0.0
    if isinstance(A, SymmetricOperator) and A.factor is not None and _stored(A.factor):
        return _require_null_of(A.factor, null, math.sqrt(scale), "F")
    if _stored(A):
        return _require_null_of(A, null, scale, what)
    tolerance = null_tolerance(A)
    if tolerance >= 0.1:
        raise NullSpaceError(
            f"products of {A!r} are known to {A.eps:.1g} only, so that none could tell a null direction from another; "
            "the declared ones would be believed unseen. Measure in float32 or float64, or leave null= out"
        )
    images = _images(A, null.basis, tolerance * scale) / scale
    _refuse_worst(images, torch.full_like(images, tolerance), what)
    return float(images.max())


def combined_rows(A: LinearOperator) -> Tensor:
    """Gaussian combinations `c` of rows of `A` as columns, `(n, COMBINED)`: `sum (c . v)^2` has the mean `|A v|^2`.

    Example:
        >>> from bnp_analysis.linalg import MatrixOperator
        >>> combined_rows(MatrixOperator(torch.tensor([[1.0, 0.0]])))[1].any().item()
        False
    """
    G = normal((A.shape[0], COMBINED), generator(0), torch.empty(0, dtype=A.dtype))
    return A.T @ (1 / math.sqrt(COMBINED) * G).to(A.device)


def _images(A: LinearOperator, basis: Columns, tolerance: float) -> Tensor:
    """`|A n|` of columns; of many that live on few coordinates a bound from random combinations of the rows of `A`.

    The bound fails with probability `MISSED` for each, and columns that it does not show to be null are multiplied.
    """
    if isinstance(basis, Tensor) or basis.shape[1] <= COMBINED:
        exact: Tensor = (A @ as_tensor(basis)).double().norm(dim=0)
        return exact
    found: Tensor = CAUTION * (basis.T @ combined_rows(A)).double().norm(dim=1)
    unclear = torch.nonzero(~(found <= tolerance)).flatten()
    for some in torch.split(unclear, COMBINED):
        chosen = torch.zeros(basis.shape[1], len(some), dtype=basis.dtype, device=basis.device)
        chosen[some, torch.arange(len(some), device=basis.device)] = 1.0
        found[some] = (A @ (basis @ chosen)).double().norm(dim=0)
    return found


def _stored(A: LinearOperator) -> bool:
    inner = A.inner if isinstance(A, Scaled) else A
    return inner.given if isinstance(inner, ReducedFactor) else A.exact and A.dense_cost == 0


def _require_null_of(A: LinearOperator, null: DeclaredNull, scale: float, what: str) -> float:
    """The same of a stored matrix; where directions are spoilt by rounding, its singular values decide."""
    wide = as_tensor(null.basis).double() if null.wide is None else null.wide
    found = formed(A.inner if isinstance(A, Scaled) else A)
    matrix, scale = found.matrix, scale * 2.0 ** (found.exponent - exponent(A))
    unit = max(matrix.shape) * torch.finfo(torch.float64).eps
    images = (matrix @ wide).norm(dim=0) / scale
    spoilt = null.given_eps * (matrix.abs() @ wide.abs()).norm(dim=0) / scale
    spoilt += found.rounding * (found.sizes() @ wide.abs()).norm(dim=0) / scale
    nearly = null_tolerance(A, null.given_eps)
    if bool((images > unit + spoilt).any()) and bool((images <= nearly).all()) and min(matrix.shape) <= _DECIDED:
        sigma = torch.linalg.svdvals(matrix)
        left = matrix.shape[1] - null.dim
        if left >= len(sigma) or float(sigma[left]) <= unit * float(sigma[0]):
            return float(images.max())
    _refuse_worst(images, unit + spoilt, what)
    return float(images.max())


def _refuse_worst(images: Tensor, tolerance: Tensor, what: str) -> None:
    worst = int((images / tolerance).argmax())
    if not float(images[worst]) <= float(tolerance[worst]):
        raise NullSpaceError(
            f"declared null direction {worst} is not null: |{what} n| / |{what}| = {float(images[worst]):.3g}, "
            f"rounding explains {float(tolerance[worst]):.1g}. Deflating it would hide a nonzero eigenvalue and make "
            "the condition number too small; drop the direction, or give it in the operator's own coordinates"
        )
