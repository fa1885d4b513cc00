"""The Lanczos process with full reorthogonalization.

What a run leaves is data: a tridiagonal matrix, its basis, the residual vector, the number of
products and the reason it stopped. It knows nothing of condition numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.memory import require_memory
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.progress import Progress, reporting
from bnp_analysis.linalg.random import generator, normal, project_out

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Tridiagonalization:
    """`A Q = Q T + r e_k^T` with orthonormal `Q` and tridiagonal `T`.

    Attributes:
        alpha: `(k,)` diagonal of `T`, float64.
        beta: `(k - 1,)` off-diagonal of `T`, float64; a zero marks a restart.
        basis: `Q`, `(n, k)`, in the operator's dtype.
        residual: `r`, `(n,)`; zero when the space is invariant.
        matvecs: products with the operator spent so far.
        stop: `"steps"`, `"converged"`, `"invariant subspace"`, `"exhausted"` or `"interrupted"`.
    """

    alpha: Floats
    beta: Floats
    basis: Tensor
    residual: Tensor
    matvecs: int
    stop: str

    @property
    def residual_norm(self) -> float:
        """`|r|`, the coupling to the space that was not searched."""
        return float(self.residual.double().norm())

    def ritz(self) -> tuple[Floats, Floats]:
        """Ritz values in ascending order and their residual norms `|r| |e_k^T s_i|`.

        Some eigenvalue of `A` lies within each residual of its Ritz value (T13).
        """
        values, vectors = tridiagonal_eigh(self.alpha, self.beta)
        return values, np.abs(vectors[-1]) * self.residual_norm

    def ritz_vectors(self) -> Tensor:
        """Ritz vectors `(n, k)`, in the order of `ritz()`."""
        _, vectors = tridiagonal_eigh(self.alpha, self.beta)
        return self.basis @ torch.as_tensor(vectors, dtype=self.basis.dtype, device=self.basis.device)


def tridiagonal_eigh(alpha: Floats, beta: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues and vectors of the tridiagonal problem, always in float64 (trap 11)."""
    if alpha.size == 1:
        return alpha.copy(), np.ones((1, 1))
    scale = max(float(np.abs(alpha).max()), float(np.abs(beta).max()))
    if scale == 0.0:
        return np.zeros_like(alpha), np.eye(alpha.size)
    # Scaled, so that 1e-300 A does not underflow inside LAPACK.
    values, vectors = eigh_tridiagonal(alpha / scale, beta / scale)
    return np.asarray(values * scale, dtype=np.float64), np.asarray(vectors, dtype=np.float64)


def lanczos(
    A: SymmetricOperator,
    steps: int,
    *,
    start: Tensor | None = None,
    seed: int = 0,
    null: Tensor | None = None,
    restart: bool = False,
    resume: Tridiagonalization | None = None,
    until: Callable[[Tridiagonalization], bool] | None = None,
    progress: Progress = False,
) -> Tridiagonalization:
    """Run the Lanczos process, `A Q = Q T + r e_k^T`, with full reorthogonalization.

    Args:
        A: symmetric operator on `R^n`.
        steps: largest number of columns of `Q`; at most `n - r` are possible.
        start: start vector `(n,)`; default a Gaussian one from `seed`.
        seed: of the start vector and of restarts.
        null: orthonormal `(n, r)`; kept out of the basis by reorthogonalization (trap 6).
        restart: on an invariant subspace go on from a new random vector, so that repeated
            eigenvalues appear with their multiplicity; else stop there.
        resume: continue an earlier run of the same operator instead of starting one.
        until: called every five steps; the run stops when it returns True.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `Tridiagonalization`. Ctrl-C returns what is there, with `stop="interrupted"`.

    Raises:
        InvalidInputError: a start vector of wrong shape, zero, or inside the null space.
        NonFiniteError: a product with NaN or infinity.
        MemoryLimitError: the basis would not fit; said before the first product.

    Source: Lanczos 1950; T13.

    Example:
        >>> import torch
        >>> from bnp_analysis.linalg import DenseOperator, lanczos
        >>> run = lanczos(DenseOperator(torch.diag(torch.arange(1.0, 4.0))), 3, seed=1)
        >>> [round(float(v), 4) for v in run.ritz()[0]]
        [1.0, 2.0, 3.0]
    """
    n, rank = A.dim, 0 if null is None else null.shape[1]
    limit = min(int(steps), n - rank)
    if limit < 1:
        raise InvalidInputError(f"Lanczos needs at least one step: steps={steps}, n={n}, null directions={rank}")
    columns = 0 if resume is None else len(resume.alpha)
    require_memory((limit + 1 + rank) * n * A.dtype.itemsize, f"a Lanczos basis of {limit} vectors of length {n}")
    # Rows are basis vectors: contiguous for the two products of a reorthogonalization.
    basis = torch.zeros(limit + 1, n, dtype=A.dtype, device=A.device)
    alpha: list[float] = []
    beta: list[float] = []
    g = generator(seed)
    if resume is None:
        w = _start(A, start, null, g)
        matvecs = 0
    else:
        if columns >= limit:
            return resume
        basis[:columns] = resume.basis.T
        alpha, beta = list(resume.alpha), list(resume.beta)
        w, matvecs = resume.residual.clone(), resume.matvecs

    def snapshot(stop: str) -> Tridiagonalization:
        k = len(alpha)
        return Tridiagonalization(np.array(alpha), np.array(beta[: k - 1]), basis[:k].T, w, matvecs, stop)

    stop = "steps"
    with reporting(progress, limit, "Lanczos") as update:
        try:
            while len(alpha) < limit:
                k = len(alpha)
                norm = float(w.double().norm())
                if norm <= _breakdown(alpha, beta, A) and k > 0:
                    w = torch.zeros_like(w)
                    if not restart:
                        stop = "invariant subspace"
                        break
                    fresh = _orthogonalize(normal((n,), g, basis), basis[:k], null)
                    basis[k] = fresh / fresh.norm()
                    norm = 0.0
                else:
                    basis[k] = w / norm
                if k > 0:
                    beta.append(norm)
                product = A @ basis[k]
                matvecs += 1
                a = float(product.double() @ basis[k].double())
                if not np.isfinite(a):
                    raise NonFiniteError(
                        f"product {matvecs} with {A!r} has NaN or infinite entries; every Ritz value after it "
                        "would be noise. Look at the parameters, the loss and the dtype"
                    )
                residual = _orthogonalize(product, basis[: k + 1], null)
                alpha.append(a)
                w = residual
                update(k + 1)
                if until is not None and (k + 1) % 5 == 0 and until(snapshot("converged")):
                    stop = "converged"
                    break
            else:
                if len(alpha) == n - rank:
                    stop, w = "exhausted", torch.zeros_like(w)
        except KeyboardInterrupt:
            if not alpha:
                raise
            stop = "interrupted"
            beta = beta[: len(alpha) - 1]
            w = torch.zeros_like(w) if len(alpha) == n - rank else w
    return snapshot(stop)


def _start(A: SymmetricOperator, start: Tensor | None, null: Tensor | None, g: torch.Generator) -> Tensor:
    like = torch.empty(0, dtype=A.dtype, device=A.device)
    vector = normal((A.dim,), g, like) if start is None else start
    if vector.shape != (A.dim,) or vector.dtype != A.dtype or vector.device != A.device:
        raise InvalidInputError(
            f"the start vector must be ({A.dim},) in {A.dtype} on {A.device}, got {tuple(vector.shape)} "
            f"in {vector.dtype} on {vector.device}"
        )
    size = float(vector.double().norm())
    # Scaled to length one first: 1e-200 v is as good a start as v.
    projected = project_out((vector / size).unsqueeze(1), null).squeeze(1) if np.isfinite(size) and size > 0 else vector
    norm = float(projected.double().norm())
    if not np.isfinite(norm) or norm <= 10 * A.dim * torch.finfo(A.dtype).eps:
        raise InvalidInputError(
            "the start vector is zero, not finite, or lies in the declared null space; "
            "leave start=None for a random one"
        )
    return projected / norm


def _orthogonalize(w: Tensor, basis: Tensor, null: Tensor | None) -> Tensor:
    """Classical Gram-Schmidt, twice, against the basis (rows) and the known null directions."""
    for _ in range(2):
        if null is not None and null.shape[1]:
            w = w - null @ (null.T @ w)
        w = w - (basis @ w) @ basis
    return w


def _breakdown(alpha: list[float], beta: list[float], A: SymmetricOperator) -> float:
    """The size below which a residual is rounding, relative to the operator seen so far (trap 5)."""
    if not alpha:
        return 0.0
    scale = max(abs(x) for x in (*alpha, *beta))
    return 10 * float(np.sqrt(A.dim)) * float(torch.finfo(A.dtype).eps) * scale
