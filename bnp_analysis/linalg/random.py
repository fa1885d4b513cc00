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


def project_out(x: Tensor, basis: Tensor | None) -> Tensor:
    """`x` minus its part in the span of an orthonormal basis `(n, r)`, twice for rounding."""
    if basis is None or basis.shape[1] == 0:
        return x
    for _ in range(2):
        x = x - basis @ (basis.T @ x)
    return x


def orthonormal(directions: Tensor, what: str = "null directions") -> Tensor:
    """An orthonormal basis of the span of independent columns `(n, r)`.

    Raises:
        NullSpaceError: the columns are not finite or linearly dependent to rounding.
    """
    if directions.shape[1] == 0:
        return directions
    if directions.shape[1] > directions.shape[0]:
        raise NullSpaceError(f"{what}: {directions.shape[1]} columns in dimension {directions.shape[0]} are dependent")
    norms = directions.norm(dim=0)
    if not bool(torch.isfinite(norms).all()) or bool((norms == 0).any()):
        raise NullSpaceError(f"{what}: a column is zero or not finite, so the null dimension would be miscounted")
    q, r = torch.linalg.qr(directions / norms)
    smallest = float(torch.linalg.svdvals(r)[-1])
    if smallest <= directions.shape[0] * torch.finfo(directions.dtype).eps:
        raise NullSpaceError(
            f"{what}: the {directions.shape[1]} columns are linearly dependent to rounding, so the null "
            "dimension would be counted too high; give a basis (for example from torch.linalg.qr)"
        )
    basis: Tensor = q
    return basis
