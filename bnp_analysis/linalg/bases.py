"""Orthonormal bases, stored as columns, rows or sparse blocks, and projection onto their complements.

`LocalBasis` stores columns with few nonzero coordinates and orthogonalizes several new columns at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from bnp_analysis.errors import NullSpaceError
from bnp_analysis.linalg.matrices import Columns


def project_out(x: Tensor, basis: Columns | None) -> Tensor:
    """`x` minus its part in the span of an orthonormal basis `(n, r)`, twice for rounding."""
    if basis is None or basis.shape[1] == 0:
        return x
    for _ in range(2):
        x = x - basis @ (basis.T @ x)
    return x


def orthonormal(directions: Tensor, what: str = "null directions") -> Tensor:
    """An orthonormal basis of the span of independent columns `(n, r)`, computed in float64.

    Columns may have any lengths. Nearly parallel ones, `V = Q R` with an ill-conditioned `R`, are orthogonal to
    `u cond(R)` of their span only; `V R^-1` with its sums in doubled precision spans it to `u`.

    Raises:
        NullSpaceError: the columns are not finite or linearly dependent to rounding.

    Source: the product: Ozaki et al. 2012.

    Example:
        >>> one = torch.ones(4, dtype=torch.float64)
        >>> Q = orthonormal(torch.stack([one, 1e6 + torch.tensor([0.0, 1, 0, 1])], dim=1))
        >>> bool((Q @ (Q.T @ one) - one).norm() < 1e-14)
        True
    """
    if directions.shape[1] == 0:
        return directions
    if directions.shape[1] > directions.shape[0]:
        raise NullSpaceError(f"{what}: {directions.shape[1]} columns in dimension {directions.shape[0]} are dependent")
    sizes = directions.double().abs().amax(dim=0)
    if not bool(torch.isfinite(sizes).all()) or bool((sizes == 0).any()):
        raise NullSpaceError(f"{what}: a column is zero or not finite, so the null dimension would be miscounted")
    # By powers of two in two halves: no entry of a column is rounded.
    powers = -torch.frexp(sizes)[1]
    half = powers // 2
    columns = torch.ldexp(torch.ldexp(directions.double(), half), powers - half)
    columns = torch.ldexp(columns, -torch.frexp(columns.norm(dim=0))[1])
    Q, R = torch.linalg.qr(columns)
    singular = torch.linalg.svdvals(R)
    if float(singular[-1]) <= directions.shape[0] * torch.finfo(torch.float64).eps * float(singular[0]):
        raise NullSpaceError(
            f"{what}: the {directions.shape[1]} columns are linearly dependent to rounding, so the null "
            "dimension would be counted too high; give a basis (for example from torch.linalg.qr)"
        )
    if float(singular[0]) > 8 * float(singular[-1]):
        identity = torch.eye(len(R), dtype=R.dtype, device=R.device)
        Q = torch.linalg.qr(accurate_product(columns, torch.linalg.solve_triangular(R, identity, upper=True)))[0]
    basis: Tensor = Q.to(directions.dtype)
    return basis


def accurate_product(A: Tensor, B: Tensor) -> Tensor:
    """`A B` in float64 to nearly a rounding of each entry, where sums cancel by up to some twelve decades.

    Both are cut into slices so short that products of slices are exact, and these are added with their errors.

    Source: Ozaki, Ogita, Oishi and Rump 2012.

    Example:
        >>> A = torch.tensor([[1e10, 1.0, -1e10]], dtype=torch.float64)
        >>> accurate_product(A, torch.tensor([[1e-10], [1e-20], [1e-10]], dtype=torch.float64)).item()
        1e-20
    """
    bits = (53 - (A.shape[1] - 1).bit_length()) // 2
    left, right = _slices(A, bits, 1), _slices(B, bits, 0)
    total = error = A.new_zeros(A.shape[0], B.shape[1])
    for order in range(len(left) + len(right) - 1):
        for i in range(max(0, order - len(right) + 1), min(order + 1, len(left))):
            term = left[i] @ right[order - i]
            following = total + term
            back = following - total
            error = error + ((total - (following - back)) + (term - back))
            total = following
    return total + error


def _slices(M: Tensor, bits: int, dim: int) -> list[Tensor]:
    """`M` as a sum of matrices whose entries have so many bits below the largest of their row or column."""
    slices = []
    for _ in range(-(-106 // bits)):
        top = torch.frexp(M.abs().amax(dim=dim, keepdim=True))[1]
        sigma = torch.ldexp(torch.full_like(M, 0.75), top + 53 - bits)
        slices.append((M + sigma) - sigma)
        M = M - slices[-1]
    return slices


# Numbers summed in single precision before the sums are added in double.
_BLOCK = 1 << 7
# So many products are held at a time, in the processor's cache.
_PRODUCTS = 1 << 20


def dots(V: Tensor, w: Tensor) -> Tensor:
    """`V w` for rows `(k, n)`, `(k,)` in float64, as accurate for long vectors as for short ones.

    In single precision on a CPU, 128 products at a time are summed and the sums added in double precision: row `i` is
    within `128 u sum_j |V_ij w_j|`, `u` the unit roundoff, in whatever order the processor sums a block. One sum over
    all `n` numbers would be within `n u` of that sum only.

    Source: Higham 2002, section 4.2.

    Example:
        >>> error = dots(torch.ones(1, 20000), torch.full((20000,), 0.1)).item() - 20000 * torch.tensor(0.1).item()
        >>> abs(error) <= 128 * 2**-24 * 2000
        True
    """
    n = V.shape[1]
    if V.dtype == torch.float64 or V.device.type != "cpu" or n <= _BLOCK:
        return (V @ w).double()
    whole = n - n % _BLOCK
    blocks, x = V[:, :whole].reshape(len(V), whole // _BLOCK, _BLOCK), w[:whole].reshape(-1, _BLOCK)
    parts = torch.cat([torch.linalg.vecdot(rows, x) for rows in torch.split(blocks, max(1, _PRODUCTS // n))])
    total: Tensor = parts.sum(dim=1, dtype=torch.float64) + (V[:, whole:] @ w[whole:]).double()
    return total


def length(w: Tensor) -> Tensor:
    """`|w|` in float64."""
    norm: Tensor = torch.linalg.vector_norm(w, dtype=torch.float64)
    return norm


def orthogonalized(w: Tensor, V: Tensor, null: Columns | None) -> tuple[Tensor, Tensor, Tensor]:
    """`w` outside the rows of `V` and the columns of `null`, its norm, and what was taken off the rows.

    Classical Gram-Schmidt, two products a pass: one pass where it takes little away, else two.
    """
    taken = torch.zeros(len(V), dtype=torch.float64, device=w.device)
    before = norm = length(w)
    for _ in range(2):
        if null is not None and null.shape[1]:
            w = w - null @ (null.T @ w)
        more = dots(V, w)
        w = w - more.to(w.dtype) @ V
        taken += more
        norm = length(w)
        # A GPU would wait for the answer longer than the second pass takes.
        if w.device.type == "cpu" and float(norm) > 0.7 * float(before):
            break
    return w, norm, taken


# Coordinates `(p,)` and columns `(p, k)` on them; on the CPU, in float64.
Block = tuple[Tensor, Tensor]
# The stubs of scipy cannot tell which of many arrays these are.
Sparse = Any
_coo_array: Any = sparse.coo_array
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
# Columns that are compared with the others at once.
_TOGETHER = 64
# Entries of unit columns, and scalar products of two, that are rounding.
_ROUNDING = 2.0**-52
# Longer than this, a direction outside the others has lost no digit that counts; until all are, so often.
_CLEAR, _PASSES = 0.1, 4
# A remainder that is no longer than this is rounding error.
_NOTHING = 1e-13


class LocalBasis:
    """Orthonormal columns with few nonzero coordinates; projects several columns at a time onto their complement.

    Per operation, a product of two sparse matrices costs ten times as much as that of a sparse and a narrow dense one.
    """

    def __init__(self, dim: int) -> None:
        self._columns: Sparse = sparse.csc_array((dim, 0))
        # Coordinates, the part that has each, and where the columns of every part begin.
        self._where, self._parts, self._begins = np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(1, np.int64)

    def extend(self, blocks: Sequence[Block]) -> None:
        dim = self._columns.shape[0]
        self._columns = sparse.hstack([self._columns, sparse_columns(dim, blocks)], format="csc")
        numbers = np.arange(len(blocks)) + len(self._begins) - 1
        self._where = np.concatenate([self._where, *(where.numpy() for where, _ in blocks)])
        self._parts = np.concatenate([self._parts, np.repeat(numbers, [len(where) for where, _ in blocks])])
        self._begins = np.concatenate([self._begins, self._begins[-1] + np.cumsum([v.shape[1] for _, v in blocks])])

    def taken_off(self, columns: Sparse) -> tuple[Sparse, Ints]:
        """Unit columns minus their part in the span, twice for rounding, and the numbers of those that have one.

        Columns that share no coordinates with the span keep their exact zeros.
        """
        parts, numbers = [columns[:, :0]], [np.zeros(0, np.int64)]
        for begin in range(0, columns.shape[1], _TOGETHER):
            some, reduced = self._taken_off(columns[:, begin : begin + _TOGETHER])
            parts.append(some)
            numbers.append(begin + reduced)
        return sparse.hstack(parts, format="csc"), np.concatenate(numbers)

    def _taken_off(self, columns: Sparse) -> tuple[Sparse, Ints]:
        touched = np.zeros(columns.shape[0], bool)
        touched[columns.indices] = True
        parts = _marked(self._parts[touched[self._where]], len(self._begins) - 1)
        met = [np.arange(*self._begins[part : part + 2]) for part in parts]
        known = self._columns[:, np.concatenate(met)] if met else self._columns[:, :0]
        where = _marked(np.concatenate([columns.indices, known.indices]), columns.shape[0])
        known, rest = known[where], columns[where].toarray()
        overlaps = _rounded(known.T @ rest)
        live = overlaps.any(axis=1)
        if not live.any():
            return columns, np.zeros(0, np.int64)
        known, overlaps = known[:, np.flatnonzero(live)], overlaps[live]
        rest = _rounded(rest - known @ overlaps)
        rest = _rounded(rest - known @ _rounded(known.T @ rest))
        column, row = np.nonzero(rest.T)
        ends = np.searchsorted(column, np.arange(rest.shape[1] + 1))
        left = sparse.csc_array((rest[row, column], where[row], ends), shape=columns.shape)
        return left, np.flatnonzero(overlaps.any(axis=0))


def orthonormal_blocks(dim: int, blocks: Sequence[Block]) -> list[Block] | None:
    """An orthonormal basis of the span of independent columns, which stays on few coordinates where they are.

    Blocks before others are orthogonalized first, those in a row that share no coordinates together.

    Returns:
        The blocks; None where columns are dependent to rounding.
    """
    known, found = LocalBasis(dim), list[Block]()
    for group in _apart(dim, blocks):
        fresh = [(where, columns / columns.norm(dim=0)) for where, columns in group]
        # What is left of nearly dependent columns is their rounding, enlarged: taken off once more.
        for _ in range(_PASSES):
            rest, least = known.taken_off(sparse_columns(dim, fresh))[0], 1.0
            fresh = []
            for which in components(rest):
                where, values = dense_block(rest, which)
                Q, R = torch.linalg.qr(values)
                least = min(least, float(R.diagonal().abs().min()))
                fresh.append((where, Q))
            if least > _CLEAR or least <= _NOTHING:
                break
        if least <= _CLEAR or sum(Q.shape[1] for _, Q in fresh) != sum(columns.shape[1] for _, columns in group):
            return None
        known.extend(fresh)
        found += fresh
    return found


def _apart(dim: int, blocks: Sequence[Block]) -> Iterator[list[Block]]:
    """Blocks in their order, as many together as share no coordinates."""
    some, taken = list[Block](), torch.zeros(dim, dtype=torch.bool)
    for where, columns in blocks:
        if some and bool(taken[where].any()):
            yield some
            some, taken = [], torch.zeros(dim, dtype=torch.bool)
        some.append((where, columns))
        taken[where] = True
    if some:
        yield some


def _marked(indices: Ints, size: int) -> Ints:
    """Which of the numbers below `size` there are, in order."""
    found = np.zeros(size, bool)
    found[indices] = True
    return np.flatnonzero(found)


def _rounded(columns: Floats) -> Floats:
    """Without what rounding explains in unit columns."""
    return np.where(np.abs(columns) <= _ROUNDING, 0.0, columns)


def sparse_columns(dim: int, blocks: Sequence[Block], least: float = _ROUNDING) -> Sparse:
    """Blocks side by side as a sparse matrix of columns, without entries of at most `least`."""
    if not blocks:
        return sparse.csc_array((dim, 0))
    values = torch.cat([columns.T.reshape(-1) for _, columns in blocks]).numpy()
    where = torch.cat([where.repeat(columns.shape[1]) for where, columns in blocks]).numpy()
    ends = np.cumsum([0, *(len(where) for where, columns in blocks for _ in range(columns.shape[1]))])
    matrix = sparse.csc_array((values, where, ends), shape=(dim, len(ends) - 1))
    # Zeros that are stored would pass for shared coordinates.
    matrix.data[np.abs(matrix.data) <= least] = 0.0
    matrix.eliminate_zeros()
    return matrix


def dense_block(columns: Sparse, which: Ints) -> Block:
    """Some sparse columns on the coordinates where one of them is not zero."""
    begins, ends = columns.indptr[which], columns.indptr[which + 1]
    inside = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
    positions, place = np.unique(columns.indices[inside], return_inverse=True)
    values = np.zeros((len(positions), len(which)))
    values[place, np.repeat(np.arange(len(which)), ends - begins)] = columns.data[inside]
    return torch.from_numpy(positions.astype(np.int64)), torch.from_numpy(values)


def components(columns: Sparse) -> Iterator[Ints]:
    """The numbers of columns that share coordinates, together: small matrices, and zeros stay exact."""
    live = np.flatnonzero(np.diff(columns.indptr))
    if len(live) == 0:
        return
    rows, number = columns.indices, np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))
    edges = _coo_array((np.ones(len(rows)), (rows, number + columns.shape[0])), shape=[sum(columns.shape)] * 2)
    labels = connected_components(edges, directed=False)[1][columns.shape[0] :]
    order = live[np.argsort(labels[live], kind="stable")]
    yield from np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
