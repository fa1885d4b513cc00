"""Checks of an operator before a measurement: type, symmetry, finiteness, size, null directions."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError, NullSpaceError
from bnp_analysis.linalg.bases import orthonormal, sparse_columns
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.linalg.forming import amplified, cancels, formed
from bnp_analysis.linalg.krylov.lanczos import lanczos
from bnp_analysis.linalg.matrices import CallableOperator, Columns, LocalColumns, ReducedFactor, as_tensor
from bnp_analysis.linalg.operators import (
    Derived,
    LinearOperator,
    Product,
    Stacked,
    Sum,
    SymmetricOperator,
    SymmetricSum,
    coarse,
    computed_in,
    require_digits,
)
from bnp_analysis.linalg.preconditioner import Congruence, Preconditioner, check_fits, congruence
from bnp_analysis.linalg.scale import Scaled, ScaledSymmetric, exponent, precise, scaled
from bnp_analysis.results import Result
from bnp_analysis.runtime.kinds import require_kind, require_plain
from bnp_analysis.runtime.memory import available_memory, require_memory
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
# Columns that are multiplied together by an operator without a matrix, and rows that are read together.
_TOGETHER, _ROWS = 32, 512
# From so many columns on the same coordinates on they are a dense matrix.
_WIDE = 8
# Bytes that rows may take which are read more than once.
_KEPT = 2**30


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
        checked = self.combined if isinstance(self.basis, LocalColumns) else self.dim
        return NORM_STEPS + checked if self.dim else 0

    @property
    def combined(self) -> int:
        """Products that bound what is left of the directions (see `left_of`)."""
        return min(self.dim, COMBINED)


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


def left_of(A: LinearOperator, null: Columns) -> float:
    """`|A Z|_F` of null directions `Z` that `P` has transported: it amplifies their rounding (T13).

    What is searched is `A (I - Z Z^T)`: singular values are off by as much at most, eigenvalues by twice that. Of many
    directions it is a bound from random combinations of the rows of `A`, which fails with probability `MISSED` at most.
    """
    if null.shape[1] <= COMBINED:
        return float((A @ as_tensor(null)).double().norm())
    return CAUTION * float((null.T @ combined_rows(A)).double().norm())


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


def norm_estimate(A: SymmetricOperator, seed: int = 0) -> float:
    """`|A|_2` to within a small factor, from `NORM_STEPS` Lanczos steps."""
    run = lanczos(A, NORM_STEPS, seed=seed)
    if run.stop == "interrupted":
        # Preparation only: there is no bound yet that could be kept.
        raise KeyboardInterrupt
    return float(np.abs(run.ritz()[0]).max())


def rounding_norm(A: SymmetricOperator, seed: int = 0) -> float:
    """What the rounding of a product with `A` is relative to: `|A|`, for `P^T A P` it is `|P|^2 |A|` (T13)."""
    if isinstance(A, ScaledSymmetric) and amplified(A):
        return rounding_norm(A.inner, seed) * 2.0**A.exponent
    if isinstance(A, Congruence):
        size = factor_rounding_norm(A.preconditioner, seed)
        return rounding_norm(A.operator, seed) * size * size
    if isinstance(A, GramOperator) and amplified(A):
        size = factor_rounding_norm(A.factor, seed)
        return size * size
    if isinstance(A, Derived) and isinstance(A.inner, SymmetricOperator) and amplified(A):
        return rounding_norm(A.inner, seed) * abs(A.times) + A.added
    if isinstance(A, SymmetricSum):
        return rounding_norm(A.left, seed) + rounding_norm(A.right, seed)
    return norm_estimate(A, seed)


def amplification(A: SymmetricOperator, seed: int) -> tuple[float, int]:
    """What products round relative to where that may exceed `|A|`, else 0; and the products spent."""
    return (rounding_norm(A, seed), 2 * NORM_STEPS) if amplified(A) else (0.0, 0)


def rounding_of_sums(A: SymmetricOperator, seed: int) -> tuple[float, int]:
    """`eps` times what products round relative to where a sum may cancel, else 0; and the products spent."""
    return (A.eps * rounding_norm(A, seed), 2 * NORM_STEPS) if cancels(A) else (0.0, 0)


def rounding_at(A: Congruence, values: Tensor, vectors: Tensor, seed: int) -> Tensor:
    """What products `P^T A P y` round to at eigenpairs, `(k,)`: `eps |P| |A| || |P| |y| ||`.

    Through a factor of `A` it is `eps |F| (|F P| || |P| |y| || + |P| |F P y|)`: a rounding of `F P y` goes through
    `F P`, one of its image under `F^T` through `P`.
    """
    P = A.preconditioner
    size, norm = factor_rounding_norm(P, seed), rounding_norm(A.operator, seed)
    spread: Tensor = P.absolute()._matmat(vectors.abs()).double().norm(dim=0).cpu()
    if A.operator.factor is None:
        return A.eps * size * norm * spread
    largest = norm_estimate(A, seed)
    return A.eps * math.sqrt(norm) * (math.sqrt(largest) * spread + size * values.abs().cpu().sqrt())


def factor_rounding_norm(F: LinearOperator, seed: int = 0) -> float:
    """The same for a factor: `|F|`, for `F P` it is `|F| |P|`."""
    if isinstance(F, Scaled) and amplified(F):
        return factor_rounding_norm(F.inner, seed) * 2.0**F.exponent
    if isinstance(F, Product):
        return factor_rounding_norm(F.left, seed) * factor_rounding_norm(F.right, seed)
    if isinstance(F, Derived) and amplified(F):
        return math.hypot(factor_rounding_norm(F.inner, seed) * abs(F.times), F.added)
    if isinstance(F, Sum):
        return factor_rounding_norm(F.left, seed) + factor_rounding_norm(F.right, seed)
    if isinstance(F, Stacked) and amplified(F):
        return math.hypot(factor_rounding_norm(F.left, seed), factor_rounding_norm(F.right, seed))
    if isinstance(F, ReducedFactor):
        if seed not in F.norms:
            F.norms[seed] = math.sqrt(norm_estimate(GramOperator(F), seed))
        return F.norms[seed]
    return math.sqrt(norm_estimate(GramOperator(F), seed))


def require_operator(A: SymmetricOperator) -> None:
    """Refuse what is no symmetric operator, or one on `R^0`, and computed products too coarse for its spectrum.

    Entries that are given are as they are, and the spacing of a function's products is measured: there radii say it.
    """
    require_kind(A, "A", SymmetricOperator)
    if A.dim == 0:
        raise InvalidInputError("an operator on R^0 has no eigenvalues and no entries")
    inside = _innermost(A)
    if inside.exact or isinstance(inside, CallableOperator):
        return
    found = inside.record.get("precision")
    cast = found is not None or not coarse(inside)
    require_digits(A.eps, found or computed_in(A), "its eigenvalues and their ratios", cast=cast)


def measured(
    A: SymmetricOperator, P: Preconditioner | None, null: Tensor | HasBasis | None, seed: int
) -> tuple[SymmetricOperator, DeclaredNull]:
    """The operator that is measured, `A` or `P^T A P`, and its declared null directions, checked against it."""
    require_operator(A)
    declared = read_null(null, A)
    if P is not None:
        check_fits(A, P)
    if declared.dim:
        checked = scaled(A)
        require_null(checked, declared, rounding_norm(checked, seed), "A")
    if P is None:
        return A, declared
    return congruence(A, P), replace(declared, basis=scaled(P).transport(declared.basis))


def provenance(
    A: SymmetricOperator, P: Preconditioner | None, settings: dict[str, Any], seed: int, began: float
) -> dict[str, Any]:
    """What every result of `A` or `P^T A P` says of how it came about, once the products have been made."""
    return {
        "settings": settings | {"preconditioned": P is not None},
        "seed": seed,
        "seconds": time.perf_counter() - began,
        "engine": dict(_innermost(A).record) | ({"eps": A.eps} if coarse(A) else {}),
    }


def products_known_to(result: Result) -> str:
    """The precision of the products in words, where it is lower than that of the dtype."""
    return f" (products to {result.engine['eps']:.1g})" if "eps" in result.engine else ""


def require_symmetric(A: SymmetricOperator, seed: int) -> None:
    """Two random vectors: `u.Av = v.Au` up to rounding; a congruence, shift or sum is as symmetric as its parts."""
    A = _innermost(A)
    inner = A.inner if isinstance(A, ScaledSymmetric) else A
    if isinstance(inner, SymmetricSum):
        for part in (inner.left, inner.right):
            require_symmetric(scaled(part), seed)
        return
    pair = normal((A.dim, 2), generator(seed), A)
    image = A @ pair
    require_finite(image, "a product")
    if isinstance(A, GramOperator):
        return
    u, v, Au, Av = (x.double() for x in (pair[:, 0], pair[:, 1], image[:, 0], image[:, 1]))
    gap, size = abs(float(u @ Av) - float(v @ Au)), float(u.norm() * Av.norm() + v.norm() * Au.norm())
    # Random vectors meet rounding errors at random: the gap does not grow with n.
    if gap > 1e3 * A.eps * size:
        raise InvalidInputError(
            f"{A!r} is not symmetric: u.Av and v.Au differ by {gap / size:.2g} relative, for random u, v. Lanczos "
            "would report eigenvalues of no matrix at all; check the function that computes the products"
        )


def _innermost(A: SymmetricOperator) -> SymmetricOperator:
    if isinstance(A, Congruence):
        return _innermost(A.operator)
    if isinstance(A, Derived) and isinstance(A.inner, SymmetricOperator):
        # What scales an operator that is made of no other is where its products are in range.
        whole = isinstance(A, Scaled) and not isinstance(A.inner, Derived | Congruence)
        return A if whole else _innermost(A.inner)
    return A


def require_finite(x: Tensor, what: str) -> None:
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError(
            f"{what} has NaN or infinite entries, so no eigenvalue of it is defined; look at the parameters, "
            "the loss and the dtype"
        )


class Verifier:
    """`|F t| / |F| |t|` of candidates: by a product for each, from the rows of `F`, or from combinations of rows.

    What is cheapest: one product for each, all rows, or `G^T F` for 48 Gaussian columns `G`. `|G^T F t|^2 / |F t|^2` is
    then `chi^2` distributed, so that a size below a quarter of the tolerance is one below the tolerance but for a
    probability of `MISSED`; sizes near the tolerance are measured by products.

    Columns that live on few coordinates are multiplied with these alone. Rows are kept while they take little memory,
    else formed again, some at a time, for everything that is asked for together.

    Args:
        operator: the factor, or the matrix where there is none.
        count: how many candidates there are.

    Attributes:
        doubt: the probability that a size is above the tolerance which was found below it, for each size.

    Source: the bound of `chi^2`: Laurent and Massart 2000; Dasgupta and Gupta 2003.
    """

    def __init__(self, operator: LinearOperator, count: int) -> None:
        rows, columns = operator.shape
        self.matvecs, self.tolerance = 0, null_tolerance(operator)
        # Only ratios count: squares of what is far from 1 leave the floats.
        self._operator = scaled(operator)
        self._by_rows = count > min(operator.dense_cost, COMBINED)
        self._combined = self._by_rows and operator.dense_cost > COMBINED
        self.doubt = MISSED if self._combined else 0.0
        self._kept: list[Tensor] | None = None
        size = 2 * min(rows, COMBINED if self._combined else rows) * columns * operator.dtype.itemsize
        if self._combined or (self._by_rows and size < min(_KEPT, available_memory())):
            self._kept = list(self._row_blocks())
        if self._kept and not self._combined:
            self._scale = math.sqrt(norm_estimate(self._gram_of(self._kept)))
        else:
            self._scale = math.sqrt(norm_estimate(GramOperator(self._operator)))
            self.matvecs += NORM_STEPS

    def _gram_of(self, kept: list[Tensor]) -> SymmetricOperator:
        """`F^T F` from the rows that are held, without products of the operator."""

        def product(v: Tensor) -> Tensor:
            return torch.stack([rows @ (rows.T @ v) for rows in kept]).sum(dim=0)

        return CallableOperator(product, kept[0].shape[0], dtype=kept[0].dtype, eps=self._operator.eps)

    def sizes(self, parts: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """The relative sizes of the images of nonzero columns `(p, k)` on coordinates `(p,)`, for each such pair."""
        norms = [_norms(columns) for _, columns in parts]
        counts = [columns.shape[1] for _, columns in parts]
        if self._scale == 0 or sum(counts) == 0:
            return [torch.zeros_like(size) for size in norms]
        units = [(where, columns / size) for (where, columns), size in zip(parts, norms, strict=True)]
        found = self._by_rows_of(units) if self._by_rows else self._by_products_with(units)
        sizes = torch.split(found / self._scale, counts)
        return [self._settled(*unit, size) for unit, size in zip(units, sizes, strict=True)]

    def _settled(self, where: Tensor, columns: Tensor, sizes: Tensor) -> Tensor:
        """The same, measured where combinations of rows do not tell on which side of the tolerance they are."""
        near = (sizes > self.tolerance / CAUTION) & (sizes < CAUTION**2 * self.tolerance)
        if self._combined and bool(near.any()):
            sizes = sizes.clone()
            sizes[near] = self._by_products_with([(where, columns[:, near])]) / self._scale
        return sizes

    def images(self, columns: Tensor) -> Tensor:
        """`F t / |F|` of unit columns `(n, k)`, in float64 on the CPU."""
        self.matvecs += columns.shape[1]
        if self._scale == 0 or columns.shape[1] == 0:
            return torch.zeros(self._operator.shape[0], columns.shape[1], dtype=torch.float64)
        like = columns.to(self._operator.device, self._operator.dtype)
        found = [(self._operator @ some).cpu().double() / self._scale for some in torch.split(like, _TOGETHER, dim=1)]
        return torch.cat(found, dim=1)

    def _row_blocks(self) -> Iterator[Tensor]:
        """Some rows of `F` at a time as columns, `(n, rows)`, on the CPU; or combinations of them."""
        if self._combined:
            self.matvecs += COMBINED
            yield combined_rows(self._operator).cpu()
            return
        self.matvecs += self._operator.dense_cost
        for rows in self._operator.row_blocks():
            for some in torch.split(rows, _ROWS):
                yield some.cpu().T.contiguous()

    def _by_rows_of(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        parts = [(where, columns.to(self._operator.dtype)) for where, columns in parts]
        ends = np.cumsum([columns.shape[1] for _, columns in parts])
        wide = [i for i, (_, columns) in enumerate(parts) if columns.shape[1] >= _WIDE]
        narrow = [i for i, (_, columns) in enumerate(parts) if 0 < columns.shape[1] < _WIDE]
        sparse = sparse_columns(self._operator.shape[1], [parts[i] for i in narrow], least=0.0).T
        squares = np.zeros(ends[-1])
        places = np.concatenate([np.arange(ends[i] - parts[i][1].shape[1], ends[i]) for i in narrow] or [ends[:0]])
        for rows in self._row_blocks() if self._kept is None else self._kept:
            squares[places] += np.square(sparse @ rows.numpy(), dtype=np.float64).sum(axis=1)
            for i in wide:
                where, columns = parts[i]
                squares[ends[i] - columns.shape[1] : ends[i]] += (
                    (columns.T @ rows[where]).double().square().sum(dim=1).numpy()
                )
        return torch.from_numpy(np.sqrt(squares))

    def _by_products_with(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        operator, found = self._operator, []
        for where, columns in parts:
            for some in torch.split(columns, _TOGETHER, dim=1):
                full = torch.zeros(operator.shape[1], some.shape[1], dtype=operator.dtype)
                full[where] = some.to(operator.dtype)
                found.append(_norms(operator @ full.to(operator.device)))
                self.matvecs += some.shape[1]
        return torch.cat(found)


def _norms(columns: Tensor) -> Tensor:
    sizes: Tensor = torch.linalg.vector_norm(columns, dim=0).cpu().double()
    return sizes


def null_vectors(matrix: Tensor, slack: float = 1.0) -> Tensor:
    """An orthonormal basis, in float64, of the right null space: columns that are dependent to the rounding of the SVD.

    Columns are compared at one scale, so that a small one does not pass for zero; in float64 whatever the dtype, so
    that rounded columns do not pass for dependent ones. `slack` allows for a matrix that was computed.

    Raises:
        MemoryLimitError: the basis of all columns would not fit.

    Example:
        >>> import torch
        >>> null_vectors(torch.tensor([[1.0, 1e-20, 2.0], [1.0, 0.0, 2.0]], dtype=torch.float64)).shape
        torch.Size([3, 1])
    """
    count, width = matrix.shape
    # All right singular vectors, the part of them that is returned, and its factorization.
    what = f"the dependences between {width} columns"
    require_memory(8 * width * (4 * width + 3 * count), what, device=matrix.device)
    matrix = matrix.double()
    size = matrix.norm(dim=0) if count else matrix.new_zeros(width)
    scale = torch.where(size > 0, size, 1.0)
    work = matrix / scale
    work = torch.linalg.qr(work, mode="r")[1] if count > width else work
    _, s, vh = torch.linalg.svd(work, full_matrices=True)
    floor = slack * max(count, width) * torch.finfo(matrix.dtype).eps * (float(s[0]) if s.numel() else 0.0)
    rank = int((s > floor).sum())
    if rank == width:
        return matrix.new_zeros(width, 0)
    # Back in the old scale; the largest is taken out, so that no column loses its digits.
    return _orthonormal_by_rows(vh[rank:].T / (scale / scale.min()).unsqueeze(1))


def _orthonormal_by_rows(columns: Tensor) -> Tensor:
    """Columns made orthonormal with a rounding of each row relative to that row, however their sizes differ.

    Source: Cox and Higham 1998, stability of Householder QR factorization for weighted least squares problems: rows in
    descending order, columns pivoted.
    """
    sizes = columns.abs().amax(dim=1).cpu()
    if float(sizes.max()) <= 10 * float(sizes.min()):
        return cast(Tensor, torch.linalg.qr(columns)[0])
    order = sizes.argsort(descending=True)
    found = torch.empty_like(columns, device="cpu")
    found[order] = torch.from_numpy(scipy.linalg.qr(columns.cpu()[order].numpy(), mode="economic", pivoting=True)[0])
    return found.to(columns.device)
