"""Orthonormal bases, stored as columns or as rows, and what is orthogonal to them."""

from __future__ import annotations

import torch
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
    k, n = V.shape
    if V.dtype == torch.float64 or V.device.type != "cpu" or n <= _BLOCK:
        return (V @ w).double()
    whole = n - n % _BLOCK
    blocks = V[:, :whole].reshape(k, whole // _BLOCK, _BLOCK)
    parts = torch.bmm(blocks.transpose(0, 1), w[:whole].reshape(-1, _BLOCK, 1))
    total: Tensor = parts[..., 0].sum(dim=0, dtype=torch.float64) + (V[:, whole:] @ w[whole:]).double()
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
