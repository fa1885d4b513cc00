"""Random vectors from local generators, drawn on the CPU so that every device sees the same ones."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NullSpaceError


def generator(seed: int, stream: int = 0) -> torch.Generator:
    """A local CPU generator, another for each `stream` of a seed; the global one is never touched."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidInputError(f"seed must be an integer, got {seed!r}")
    if stream:
        state = np.random.SeedSequence((abs(seed), int(seed < 0), stream)).generate_state(1, np.uint64)
        seed = int(state[0] >> np.uint64(1))
    return torch.Generator(device="cpu").manual_seed(seed)


def normal(shape: tuple[int, ...], g: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers, drawn in float64 and cast: one seed means one vector in every dtype."""
    return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype=like.dtype, device=like.device)


def rademacher(shape: tuple[int, ...], g: torch.Generator, like: Tensor) -> Tensor:
    """Independent signs."""
    signs = torch.randint(0, 2, shape, generator=g, dtype=torch.int64) * 2 - 1
    return signs.to(dtype=like.dtype, device=like.device)


def uniform_at(seed: int, example: Tensor, entry: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), one for each pair of an example and an entry of it, whatever else is drawn.

    Args:
        seed: of all of them.
        example, entry: integers, broadcast.

    Returns:
        float64 on the CPU.

    Source: the mixing of splitmix64 (Steele, Lea and Flood 2014), once for the example and once for the entry.

    Example:
        >>> every = uniform_at(0, torch.arange(4).view(4, 1), torch.arange(3))
        >>> bool(every[2, 1] == uniform_at(0, torch.tensor(2), torch.tensor(1)))
        True
    """
    start = np.random.SeedSequence((abs(seed), int(seed < 0))).generate_state(1, np.uint64).view(np.int64)
    z = _mixed(_mixed(int(start[0]) + example.cpu().long() * _STEP) + entry.cpu().long() * _STEP)
    return (_shifted(z, 12).double() + 0.5) * 2.0**-52


_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _mixed(z: Tensor) -> Tensor:
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def project_out(x: Tensor, basis: Tensor | None) -> Tensor:
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
