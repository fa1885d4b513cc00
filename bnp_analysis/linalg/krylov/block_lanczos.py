"""Block Lanczos with full reorthogonalization: repeated eigenvalues with their multiplicity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.bases import project_out
from bnp_analysis.linalg.krylov.lanczos import Floats
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.scale import comfortable, exponent, in_floats, require_resolution, scaled, times_power
from bnp_analysis.runtime.memory import require_memory
from bnp_analysis.runtime.progress import Progress, reporting
from bnp_analysis.runtime.random import generator, normal


@dataclass(frozen=True, eq=False)
class BlockTridiagonalization:
    """`A Q = Q T + R E^T` with orthonormal `Q` and block tridiagonal `T`.

    Attributes:
        matrix: `T`, `(k, k)`, float64.
        basis: `Q`, `(n, k)`.
        residual: `R`, `(n, b)`, the coupling of the last block of `b` columns.
        matvecs: products with the operator.
        stop: `"steps"`, `"invariant subspace"` or `"interrupted"`.
    """

    matrix: Floats
    basis: Tensor
    residual: Tensor
    matvecs: int
    stop: str

    def ritz(self) -> tuple[Floats, Floats]:
        """Ritz values in ascending order and their residual norms."""
        _, e = comfortable(torch.from_numpy(self.matrix))
        values, vectors = np.linalg.eigh(np.ldexp(self.matrix, e))
        residual = np.ldexp(self.residual.double().cpu().numpy(), e)
        width = residual.shape[1]
        if width == 0:
            return np.ldexp(values, -e), np.zeros_like(values)
        return np.ldexp(values, -e), np.ldexp(np.linalg.norm(residual @ vectors[-width:], axis=0), -e)


def block_lanczos(
    A: SymmetricOperator,
    steps: int,
    *,
    block_size: int = 2,
    seed: int = 0,
    null: Tensor | None = None,
    progress: Progress = False,
) -> BlockTridiagonalization:
    """Run block Lanczos, `A Q = Q T + R E^T`: eigenvalues up to `block_size`-fold appear with their multiplicity.

    Args:
        A: symmetric operator on `R^n`.
        steps: block steps; the basis has at most `steps * block_size` columns.
        block_size: columns of the random start block.
        seed: of the start block.
        null: orthonormal `(n, r)` kept out of the basis.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `BlockTridiagonalization`; columns that become dependent are dropped, relative to `A`.

    Raises:
        InvalidInputError: a block that does not fit; NonFiniteError: a product with NaN or infinity.

    Source: Golub and Underwood 1977; T13.

    Example:
        >>> import torch
        >>> from bnp_analysis.linalg import DenseOperator, block_lanczos
        >>> A = DenseOperator(torch.diag(torch.tensor([1.0, 5.0, 5.0])).double())
        >>> [round(float(v), 6) for v in block_lanczos(A, 2, block_size=2).ritz()[0]]
        [1.0, 5.0, 5.0]
    """
    given, A = A, scaled(A)
    null = null if null is None else null.to(A.dtype)
    n, rank = A.dim, 0 if null is None else null.shape[1]
    if not 1 <= block_size <= n - rank or steps < 1:
        raise InvalidInputError(f"block_size={block_size}, steps={steps} do not fit n={n} with {rank} null directions")
    limit = min(steps * block_size, n - rank)
    require_memory(
        (limit + block_size + rank) * n * A.dtype.itemsize, f"a block Lanczos basis of {limit} vectors", device=A.device
    )
    require_resolution(A, n)
    like = torch.empty(0, dtype=A.dtype, device=A.device)
    w = project_out(normal((n, block_size), generator(seed), like), null)
    basis = torch.zeros(n, 0, dtype=A.dtype, device=A.device)
    T: Floats = np.zeros((0, 0))
    matvecs, scale, stop = 0, 0.0, "steps"
    eps = A.eps
    with reporting(progress, limit, "block Lanczos") as update:
        try:
            for _ in range(steps):
                q = _independent_columns(w, 10 * n**0.5 * eps * scale)
                if q.shape[1] == 0:
                    stop = "invariant subspace"
                    break
                # Columns of a nearly dependent block come out of QR unorthogonal to the basis: once more.
                q = torch.linalg.qr(project_out(project_out(q, basis), null))[0]
                product = A @ q
                matvecs += q.shape[1]
                grown = torch.cat([basis, q], dim=1)
                coupling = (grown.T.double() @ product.double()).cpu().numpy()
                if not np.isfinite(coupling).all():
                    raise NonFiniteError(f"a product among the first {matvecs} with {A!r} is NaN or infinite")
                T, basis = _append(T, coupling), grown
                scale = max(scale, float(np.abs(coupling).max()))
                w = project_out(project_out(product, null), basis)
                update(basis.shape[1])
        except KeyboardInterrupt:
            if basis.shape[1] == 0:
                raise
            stop = "interrupted"
    if stop == "invariant subspace" or basis.shape[1] == n - rank:
        w = w[:, :0]
    power = exponent(given) - exponent(A)
    if power:
        in_floats(float(np.abs(T).max()), power, "the block tridiagonal matrix")
        T, w = np.ldexp(T, power), times_power(w.double(), power)
    return BlockTridiagonalization(T, basis, w, matvecs, stop)


def _append(T: Floats, coupling: Floats) -> Floats:
    """`T` bordered by the new block column `Q^T A q`, symmetrized across rounding."""
    k, width = T.shape[0], coupling.shape[1]
    grown = np.zeros((k + width, k + width))
    grown[:k, :k] = T
    grown[:k, k:] = coupling[:k]
    grown[k:, :k] = coupling[:k].T
    grown[k:, k:] = (coupling[k:] + coupling[k:].T) / 2
    return grown


def _independent_columns(w: Tensor, tolerance: float) -> Tensor:
    """An orthonormal basis of the columns that stand above the tolerance."""
    u: Tensor
    u, s, _ = torch.linalg.svd(w, full_matrices=False)
    return u[:, s > max(tolerance, float(s[0]) * torch.finfo(w.dtype).eps if s.numel() else 0.0)]
