"""A few eigenpairs by thick-restart Lanczos."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.lanczos import Floats
from bnp_analysis.linalg.memory import require_memory
from bnp_analysis.linalg.null import HasBasis, read_null
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.preconditioner import Preconditioner, congruence
from bnp_analysis.linalg.progress import Progress, reporting
from bnp_analysis.linalg.random import generator, normal
from bnp_analysis.results import Result

_CHECK_PRODUCTS = 8
WHICH = ("largest", "smallest", "both")


@dataclass(frozen=True, kw_only=True, repr=False)
class Eigenpairs(Result):
    """Eigenvalues with their vectors and residuals.

    Attributes:
        values: `(k,)` float64, in the order asked for: largest first, or smallest first.
        vectors: `(n, k)`, orthonormal, in the coordinates of the operator measured (`z` with a preconditioner).
        residuals: `(k,)` float64, `|A y - theta y|`: some eigenvalue lies within it of each value (T13).
        converged: how many pairs meet the tolerance.
        stop: `"converged"`, `"steps"`, `"invariant subspace"` or `"interrupted"`.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    which: str
    converged: int
    stop: str

    def summary(self) -> str:
        """The values in one line."""
        shown = ", ".join(
            f"{v:.4g} +- {r:.1g}" for v, r in zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        )
        done = f"{self.converged} of {len(self.values)} converged"
        return f"{self.which} eigenvalues {shown}; {done}, {self.matvecs} products"

    def records(self) -> list[dict[str, object]]:
        """One row per eigenvalue."""
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        return [{"index": i, "eigenvalue": v, "residual": r} for i, (v, r) in enumerate(pairs)]


def eigenpairs(
    A: SymmetricOperator,
    k: int = 10,
    *,
    which: str = "largest",
    preconditioner: Preconditioner | None = None,
    null: Tensor | HasBasis | None = None,
    tol: float = 1e-6,
    max_matvecs: int = 1000,
    seed: int = 0,
    progress: Progress = False,
) -> Eigenpairs:
    """The `k` largest or smallest eigenvalues of `P^T A P` with vectors and residuals.

    Args:
        A: symmetric operator on `R^n`.
        k: how many pairs.
        which: `"largest"`, `"smallest"` (algebraically), or `"both"` ends, `k` split between them.
        preconditioner: `P`; the operator measured is `P^T A P`.
        null: known null directions in the coordinates of `A`, left out of the search.
        tol: a pair is converged when its residual is at most `max(tol |theta|, c eps |theta|_max)`.
        max_matvecs: where to give up; what was reached is returned and says so.
        seed: of the random start.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        `Eigenpairs`. Residuals are recomputed by one product each.

    Raises:
        InvalidInputError: `k` or `which` do not fit; NonFiniteError: a product with NaN or infinity.

    Source: Wu and Simon 2000 (thick restart); T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(torch.arange(1.0, 51.0, dtype=torch.float64)))
        >>> [round(v, 6) for v in bnp.eigenpairs(A, k=2).values.tolist()]
        [50.0, 49.0]
    """
    if which not in WHICH:
        raise InvalidInputError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    declared = read_null(null, A)
    operator = A if preconditioner is None else congruence(A, preconditioner)
    basis = declared.basis if preconditioner is None else preconditioner.transport(declared.basis)
    room = A.dim - declared.dim
    if not 1 <= k <= room:
        raise InvalidInputError(f"k={k} eigenpairs asked of an operator with {room} dimensions outside the null space")
    began = time.perf_counter()
    search = _ThickRestart(operator, basis, k, which, tol, seed)
    search.run(max_matvecs, progress)
    values, vectors = search.wanted_pairs()
    products = operator @ vectors
    residuals = (products - vectors * values.to(vectors)).double().norm(dim=0)
    done = residuals <= torch.maximum(tol * values.abs(), torch.tensor(search.noise, dtype=torch.float64))
    return Eigenpairs(
        values=values,
        vectors=vectors.cpu(),
        residuals=residuals.cpu(),
        which=which,
        converged=int(done.sum()),
        stop=search.stop,
        settings={
            "k": k,
            "which": which,
            "tol": tol,
            "max_matvecs": max_matvecs,
            "preconditioned": preconditioner is not None,
        },
        seed=seed,
        matvecs=search.matvecs + k,
        seconds=time.perf_counter() - began,
    )


class _ThickRestart:
    """The state of one search: a basis `V`, the projection `V^T A V`, and the next direction."""

    def __init__(self, A: SymmetricOperator, null: Tensor, k: int, which: str, tol: float, seed: int) -> None:
        self.A, self.null, self.k, self.which, self.tol = A, null, k, which, tol
        room = A.dim - null.shape[1]
        # The small end of a spectrum converges slowly: a wider basis restarts less often.
        self.width = min(room, max(2 * k + 10, 24) if which == "largest" else max(3 * k + 20, 60))
        require_memory((self.width + 1) * A.dim * A.dtype.itemsize, f"a basis of {self.width} vectors")
        self.V = torch.zeros(self.width + 1, A.dim, dtype=A.dtype, device=A.device)
        self.H: Floats = np.zeros((self.width, self.width))
        self.g = generator(seed)
        self.size, self.matvecs, self.beta, self.stop, self.noise = 0, 0, 0.0, "steps", 0.0
        self.full = self.width == room
        self.checked_at: int | None = None
        self.V[0] = self._fresh()

    def _fresh(self) -> Tensor:
        """A random unit vector outside the basis and the null space."""
        v = self._orthogonalized(normal((self.A.dim,), self.g, self.V))
        unit: Tensor = v / v.norm()
        return unit

    def _orthogonalized(self, w: Tensor) -> Tensor:
        V = self.V[: self.size]
        for _ in range(2):
            w = w - self.null @ (self.null.T @ w)
            w = w - (V @ w) @ V
        return w

    def _expand(self) -> None:
        """One product: column `size` of `H`, the next direction and its norm."""
        j = self.size
        w = self.A @ self.V[j]
        self.matvecs += 1
        self.size = j + 1
        column = (self.V[: j + 1].double() @ w.double()).cpu().numpy()
        if not np.isfinite(column).all():
            raise NonFiniteError(f"product {self.matvecs} with {self.A!r} has NaN or infinite entries")
        self.H[: j + 1, j] = column
        self.H[j, : j + 1] = column
        w = self._orthogonalized(w)
        scale = float(np.abs(self.H[: j + 1, : j + 1]).max())
        self.noise = 10 * math.sqrt(self.A.dim) * float(torch.finfo(self.A.dtype).eps) * scale
        self.beta = float(w.double().norm())
        if self.beta <= self.noise:
            # An invariant subspace: go on from a fresh vector, so that repeated eigenvalues appear.
            self.beta = 0.0
            if self.size < self.width:
                w = self._fresh()
        norm = w.norm()
        if float(norm) > 0:
            self.V[self.size] = w / norm

    def run(self, max_matvecs: int, progress: Progress) -> None:
        with reporting(progress, max_matvecs, "eigenpairs") as update:
            try:
                while True:
                    while self.size < self.width:
                        self._expand()
                        update(min(self.matvecs, max_matvecs))
                        if self.size > self.k and self.size % 3 == 0 and not self.full and self._converged():
                            break
                    if self.full or (self.checked_at is not None and self._converged()):
                        self.stop = "converged"
                        return
                    if self.checked_at is None and self._converged():
                        # One start vector meets one copy of a repeated eigenvalue: look again from another.
                        self.checked_at = self.matvecs
                        self.beta = 0.0
                    if self.matvecs >= max_matvecs:
                        return
                    self._restart()
            except KeyboardInterrupt:
                if self.size < self.k:
                    raise
                self.stop = "interrupted"

    def _decompose(self) -> tuple[Floats, Floats, list[int]]:
        """Ritz values, vectors and the positions of the wanted ones, best first."""
        values, vectors = np.linalg.eigh(self.H[: self.size, : self.size])
        descending = list(range(self.size))[::-1]
        if self.which == "largest":
            return values, vectors, descending[: self.k]
        if self.which == "smallest":
            return values, vectors, descending[::-1][: self.k]
        upper = (self.k + 1) // 2
        return values, vectors, descending[:upper] + descending[::-1][: self.k - upper]

    def _converged(self) -> bool:
        if self.size < self.k or (self.checked_at is not None and self.matvecs < self.checked_at + _CHECK_PRODUCTS):
            return False
        values, vectors, wanted = self._decompose()
        residuals = np.abs(vectors[-1, wanted]) * self.beta
        return bool(np.all(residuals <= np.maximum(self.tol * np.abs(values[wanted]), self.noise)))

    def _restart(self) -> None:
        """Keep the wanted Ritz vectors and their neighbours; the next direction stays."""
        values, vectors, wanted = self._decompose()
        keep = min(self.k + max(4, (self.width - self.k) // 3), self.size - 1)
        order = {"largest": list(range(self.size))[::-1], "smallest": list(range(self.size))}.get(self.which)
        if order is None:
            half = keep // 2
            order = list(range(half)) + list(range(half, self.size))[::-1]
        chosen = wanted + [i for i in order if i not in wanted][: keep - len(wanted)]
        Y = torch.as_tensor(vectors[:, chosen].copy(), dtype=self.V.dtype, device=self.V.device)
        following = self.V[self.size].clone()
        self.V[: len(chosen)] = Y.T @ self.V[: self.size]
        self.H[:] = 0.0
        self.H[np.arange(len(chosen)), np.arange(len(chosen))] = values[chosen]
        self.size = len(chosen)
        self.V[self.size] = self._fresh() if self.beta == 0.0 else following

    def wanted_pairs(self) -> tuple[Tensor, Tensor]:
        values, vectors, wanted = self._decompose()
        Y = torch.as_tensor(vectors[:, wanted].copy(), dtype=self.V.dtype, device=self.V.device)
        return torch.as_tensor(values[wanted].copy(), dtype=torch.float64), (Y.T @ self.V[: self.size]).T
