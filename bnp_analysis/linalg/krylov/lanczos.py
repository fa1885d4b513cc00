"""The Lanczos process with full reorthogonalization, and its three-term recurrence alone.

A run returns plain data: tridiagonal matrix, basis, residual, number of products, and the reason it stopped.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.bases import dots, length, orthogonalized, project_out
from bnp_analysis.linalg.matrices import Columns, LocalColumns
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.scale import comfortable, exponent, in_floats, require_resolution, scaled, times_power
from bnp_analysis.runtime.files import saved_run
from bnp_analysis.runtime.kinds import gated, require_plain
from bnp_analysis.runtime.memory import require_memory
from bnp_analysis.runtime.progress import Progress, reporting, stop_requests
from bnp_analysis.runtime.random import generator, normal
from bnp_analysis.runtime.threads import one_blas_thread

Floats = NDArray[np.float64]
_SELDOM = 10  # steps after which the numbers of a run are read, where reading means waiting for a device


@dataclass(frozen=True, eq=False)
class Tridiagonalization:
    """`A Q = Q T + r e_k^T` with orthonormal `Q` and tridiagonal `T`.

    Attributes:
        alpha: `(k,)` diagonal of `T`, float64.
        beta: `(k - 1,)` off-diagonal of `T`, float64; a zero marks a restart.
        basis: `Q`, `(n, k)`, in the operator's dtype.
        residual: `r`, `(n,)`; rounding when the space is invariant, or as small as what rounding may be.
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
        residual, e = comfortable(self.residual.double())
        return math.ldexp(float(residual.norm()), -e)

    def times_power(self, power: int) -> Tridiagonalization:
        """The same of `2^power A`.

        Raises:
            InvalidInputError: its numbers are no floats.
        """
        if power == 0:
            return self
        in_floats(
            float(max(np.abs(self.alpha).max(), np.abs(self.beta).max(initial=0.0))), power, "the tridiagonal matrix"
        )
        # The residual may leave the range of single precision.
        residual = times_power(self.residual.double(), power)
        return replace(self, alpha=np.ldexp(self.alpha, power), beta=np.ldexp(self.beta, power), residual=residual)

    def ritz(self) -> tuple[Floats, Floats]:
        """Ritz values in ascending order and their residual norms `|r| |e_k^T s_i|`.

        Some eigenvalue of `A` lies within each residual of its Ritz value (T13).
        """
        values, vectors = tridiagonal_eigh(self.alpha, self.beta)
        return values, np.abs(vectors[-1]) * self.residual_norm

    def ritz_vectors(self, pick: NDArray[np.int64] | None = None) -> Tensor:
        """Ritz vectors `(n, k)`, in the order of `ritz()`, or some of them."""
        _, vectors = tridiagonal_eigh(self.alpha, self.beta)
        vectors = vectors if pick is None else vectors[:, pick]
        return self.basis @ torch.as_tensor(vectors, dtype=self.basis.dtype, device=self.basis.device)


def tridiagonal_eigh(alpha: Floats, beta: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues and vectors of the tridiagonal problem, always in float64."""
    if alpha.size == 1:
        return alpha.copy(), np.ones((1, 1))
    _, e = comfortable(torch.from_numpy(np.concatenate([alpha, beta])))
    with one_blas_thread():
        values, vectors = eigh_tridiagonal(np.ldexp(alpha, e), np.ldexp(beta, e))
    return np.ldexp(np.asarray(values, dtype=np.float64), -e), np.asarray(vectors, dtype=np.float64)


@gated
def lanczos(
    A: SymmetricOperator,
    steps: int,
    *,
    start: Tensor | None = None,
    seed: int = 0,
    null: Columns | None = None,
    restart: bool = False,
    resume: Tridiagonalization | None = None,
    until: Callable[[Tridiagonalization], bool] | None = None,
    checkpoint: str | Path | None = None,
    progress: Progress = False,
) -> Tridiagonalization:
    """Run the Lanczos process, `A Q = Q T + r e_k^T`, with full reorthogonalization.

    Args:
        A: symmetric operator on `R^n`.
        steps: largest number of columns of `Q`; at most `n - r` are possible.
        start: start vector `(n,)`; default a Gaussian one from `seed`.
        seed: of the start vector and of restarts.
        null: orthonormal `(n, r)`; kept out of the basis by reorthogonalization.
        restart: on an invariant subspace go on from a new random vector, so that repeated
            eigenvalues appear with their multiplicity; else stop there.
        resume: continue an earlier run of the same operator instead of starting one.
        until: called every five steps; the run stops when it returns True.
        checkpoint: a file written every 50 steps or 30 seconds, at the end and on Ctrl-C, and resumed from when it
            exists.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `Tridiagonalization`. Ctrl-C returns what is there, with `stop="interrupted"`.

    Raises:
        InvalidInputError: a start vector of wrong shape, zero, or inside the null space; a file of another run.
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
    rank = 0 if null is None else null.shape[1]
    limit = min(int(steps), A.dim - rank)
    given, A = A, scaled(A)
    start = start if start is None or start.dtype != given.dtype else start.to(A.dtype)
    null = null if null is None or null.dtype != given.dtype else null.to(A.dtype)
    if resume is not None:
        if comfortable(torch.from_numpy(resume.alpha))[1]:
            A @ resume.basis[:, :1]  # says the scale
        resume = resume.times_power(exponent(A) - exponent(given))
    if limit < 1:
        raise InvalidInputError(f"Lanczos needs at least one step: steps={steps}, n={A.dim}, null directions={rank}")
    how = "random start" if start is None else "given start"
    key = f"lanczos of dimension {A.dim} in {A.dtype}, {rank} null directions, seed {seed}, {how}"
    vectors = limit + 1 + (0 if isinstance(null, LocalColumns) else rank)
    bytes_needed = vectors * A.dim * A.dtype.itemsize
    require_memory(bytes_needed, f"a Lanczos basis of {limit} vectors of length {A.dim}", device=A.device)

    def in_units(found: Tridiagonalization) -> Tridiagonalization:
        return found.times_power(exponent(given) - exponent(A))

    with saved_run(checkpoint, key) as saved:
        resume = saved.restore(lambda state: _saved(A, state)) or resume
        if resume is not None and len(resume.alpha) > limit:
            return in_units(resume)
        require_resolution(A, A.dim)
        run = _Run(A, limit, null, _start(A, start, null, seed) if resume is None else resume.residual, resume)
        run.every = 1 if restart else run.every

        def converged() -> bool:
            return until is not None and run.size % 5 == 0 < run.size and until(in_units(run.snapshot("converged")))

        stop = "steps"
        with reporting(progress, limit, "Lanczos") as update, stop_requests(signal.SIGINT) as request:
            try:
                while run.size < limit:
                    if converged():
                        stop = "converged"
                        break
                    if run.broken_down and not restart:
                        stop = "invariant subspace"
                        break
                    request.heed()
                    run.advance(seed)
                    update(run.size)
                    if saved.due(run.size):
                        saved.save(run.state())
                else:
                    stop = "exhausted" if run.size == A.dim - rank else "converged" if converged() else stop
            except KeyboardInterrupt as error:
                if run.size == 0 or not request.is_clean(error):
                    raise
                stop = "interrupted"
        saved.save(run.state())
    return in_units(run.snapshot(stop))


def _saved(A: SymmetricOperator, state: dict[str, Any]) -> Tridiagonalization:
    """A saved run; one product says whether it was with this operator."""
    alpha, basis, w = state["alpha"].numpy(), state["basis"].to(A.device), state["w"].to(A.device)
    q = basis[-1]
    scale = float(np.abs(alpha).max()) + float(w.double().norm())
    noise = 100 * float(np.sqrt(A.dim)) * A.eps * scale
    require_same(abs(float((A @ q).double() @ q.double()) - alpha[-1]) <= noise, "run")
    return Tridiagonalization(alpha, state["beta"].numpy(), basis.T, w, int(state["matvecs"]) + 1, "steps")


def require_same(holds: bool, what: str) -> None:
    """Refuse to go on from a saved state whose numbers are not those of this operator."""
    if not holds:
        raise InvalidInputError(
            f"the saved {what} belongs to another operator of the same size; delete the file, or give another "
            "checkpoint="
        )


class _Run:
    """The state of a run; consistent after every step, so that an interrupt loses at most the step in hand.

    `pending` are the numbers of the newest steps, not read yet; `coupling` is the last norm that was."""

    def __init__(
        self, A: SymmetricOperator, limit: int, null: Columns | None, w: Tensor, resume: Tridiagonalization | None
    ) -> None:
        self.A, self.limit, self.null, self.w = A, limit, null, w
        # The run's own: what products are certain to is a bound, which would end runs that still learn.
        self.rounding = 10 * float(np.sqrt(A.dim)) * min(A.eps, torch.finfo(A.dtype).eps)
        self.coupling, self.every = float(length(w)), 1 if A.device.type == "cpu" else _SELDOM
        self.pending: list[Tensor] = []
        # Rows are basis vectors: contiguous for the two products of a reorthogonalization.
        self.basis = torch.zeros(limit + 1, A.dim, dtype=A.dtype, device=A.device)
        self.alpha: list[float] = []
        self.beta: list[float] = []
        self.matvecs = 0
        self.room = A.dim - (0 if null is None else null.shape[1])
        if resume is not None:
            if resume.basis.shape[0] != A.dim or resume.basis.dtype != A.dtype:
                raise InvalidInputError(
                    f"the run to resume has vectors of length {resume.basis.shape[0]} in {resume.basis.dtype}, "
                    f"not those of {A!r}"
                )
            self.w = w.to(A.dtype)
            self.alpha, self.beta = list(resume.alpha), list(resume.beta)
            self.basis[: self.size] = resume.basis.T
            self.matvecs = resume.matvecs

    @property
    def size(self) -> int:
        return len(self.alpha) + len(self.pending)

    @property
    def norm(self) -> float | Tensor:
        """Of the newest residual; one that was not read may be zero."""
        return torch.where(self.pending[-1][1] > 0, self.pending[-1][1], 1.0) if self.pending else self.coupling

    @property
    def broken_down(self) -> bool:
        """Whether the residual is rounding, relative to the operator as seen so far."""
        if self.pending or not self.alpha:
            return False
        scale = max(map(abs, (*self.alpha, *self.beta)))
        return self.coupling <= self.rounding * scale

    def advance(self, seed: int) -> None:
        """One product: the next basis vector, its `alpha`, the `beta` before it, and the next residual."""
        k = self.size
        if self.broken_down:
            # A stream for each step: neither the start again, nor other vectors in a run that was resumed.
            drawn = normal((self.A.dim,), generator(seed, stream=k), self.basis)
            fresh = orthogonalized(drawn, self.basis[:k], self.null)[0]
            self.coupling, vector = 0.0, fresh / length(fresh)
        else:
            vector = self.w / self.norm
        self.basis[k] = vector
        product = self.A @ vector
        a = dots(vector[None], product)[0]
        # The recurrence first: what the basis takes off then is rounding, and one pass is enough.
        residual = product - a.to(product.dtype) * vector
        if k:
            residual = residual - self.norm * self.basis[k - 1]
        residual, size, _ = orthogonalized(residual, self.basis[: k + 1], self.null)
        if k + 1 == self.room:
            residual, size = torch.zeros_like(residual), torch.zeros_like(size)
        self.pending.append(torch.stack([a, size]))
        self.w, self.matvecs = residual, self.matvecs + 1
        if len(self.pending) >= self.every or self.size == self.limit:
            self.read()

    def read(self) -> None:
        """Read the numbers of the steps that are pending; those after an invariant subspace are dropped."""
        found = torch.stack(self.pending).tolist() if self.pending else []
        first, self.pending = self.matvecs - len(found), []
        for i, (alpha, norm) in enumerate(found, start=1):
            if not np.isfinite(alpha + norm):
                raise NonFiniteError(
                    f"product {first + i} with {self.A!r} has NaN or infinite entries; every Ritz value after "
                    "it would be noise. Look at the parameters, the loss and the dtype"
                )
            self.beta += [self.coupling] if self.alpha else []
            self.alpha.append(alpha)
            self.coupling = norm
            if i < len(found) and self.broken_down:
                self.w = norm * self.basis[self.size]
                break

    def state(self) -> dict[str, Any]:
        self.read()
        return {
            "alpha": torch.tensor(self.alpha, dtype=torch.float64),
            "beta": torch.tensor(self.beta[: self.size - 1], dtype=torch.float64),
            "basis": self.basis[: self.size].cpu(),
            "w": self.w.cpu(),
            "matvecs": self.matvecs,
        }

    def snapshot(self, stop: str) -> Tridiagonalization:
        self.read()
        k = self.size
        beta = np.array(self.beta[: k - 1])
        return Tridiagonalization(np.array(self.alpha), beta, self.basis[:k].T, self.w, self.matvecs, stop)


def _start(A: SymmetricOperator, start: Tensor | None, null: Columns | None, seed: int) -> Tensor:
    vector = normal((A.dim,), generator(seed), A) if start is None else start
    require_plain(vector, "start")
    if vector.shape != (A.dim,) or vector.dtype != A.dtype or vector.device != A.device:
        raise InvalidInputError(
            f"the start vector must be ({A.dim},) in {A.dtype} on {A.device}, got {tuple(vector.shape)} "
            f"in {vector.dtype} on {vector.device}"
        )
    size = float(vector.abs().max())
    # Scaled first: 1e-200 v is as good a start as v.
    projected = project_out((vector / size).unsqueeze(1), null).squeeze(1) if np.isfinite(size) and size > 0 else vector
    norm = float(projected.double().norm())
    if not np.isfinite(norm) or norm <= 10 * A.dim * torch.finfo(A.dtype).eps:
        raise InvalidInputError(
            "the start vector is zero, not finite, or lies in the declared null space; "
            "leave start=None for a random one"
        )
    return projected / norm


def three_term(
    A: SymmetricOperator, steps: int, start: Tensor, null: Columns, *, every: int | None = None
) -> tuple[Floats, Floats, int]:
    """The tridiagonal matrix of a run that stores three vectors.

    Rounding brings back directions that have converged: their eigenvalues come again, as *ghosts*. The weights of a
    value's copies add up to its own, so quadrature stays right; single Ritz values, their number and vectors do not.

    Args:
        A: symmetric operator on `R^n`.
        steps: largest size of the matrix.
        start: start vector `(n,)`.
        null: orthonormal `(n, r)`, projected out of every vector.
        every: steps after which the numbers are read; default 1 on the CPU, 10 where reading means waiting.

    Returns:
        Diagonal `(k,)`; off-diagonal and, last, the norm of the residual, `(k,)`; the products spent. `k < steps` where
        the residual may be rounding, that of an invariant subspace.

    Raises:
        NonFiniteError: a product with NaN or infinity.

    Source: Greenbaum 1989; Golub and Strakos 1994.

    Example:
        >>> import torch
        >>> from bnp_analysis.linalg import DenseOperator
        >>> A = DenseOperator(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
        >>> alpha, beta, products = three_term(A, 2, torch.ones(2).double(), torch.zeros(2, 0).double())
        >>> alpha.round(6).tolist(), beta.round(6).tolist(), products
        ([2.0, 2.0], [1.0, 0.0], 2)
    """
    given, A = A, scaled(A)
    require_resolution(A, A.dim)
    start, null = start.to(A.dtype), null.to(A.dtype)
    coefficients = torch.zeros(2, steps, dtype=torch.float64, device=A.device)
    alpha, beta = coefficients
    v = project_out(start.unsqueeze(1), null).squeeze(1)
    v, previous = v / length(v), torch.zeros_like(v)
    every = every or (1 if A.device.type == "cpu" else 10)
    eps = min(A.eps, torch.finfo(A.dtype).eps)
    for k in range(steps):
        w = A @ v
        alpha[k] = dots(v[None], w)[0]
        w = w - alpha[k] * v
        if k:
            w = w - beta[k - 1] * previous
        w = project_out(w.unsqueeze(1), null).squeeze(1)
        beta[k] = length(w)
        if (k + 1) % every == 0 or k + 1 == steps:
            found = coefficients[:, : k + 1].cpu().numpy()
            scale = np.maximum.accumulate(np.abs(found).max(axis=0))  # NaN from the first one on
            small = (found[1] <= 10 * math.sqrt(A.dim) * eps * scale).nonzero()[0]
            if small.size:  # an invariant subspace; what was computed after it is of no use
                kept = found[:, : int(small[0]) + 1]
                return *_in_units(kept, exponent(given) - exponent(A)), k + 1
            if not np.isfinite(scale[-1]):
                raise NonFiniteError(
                    f"one of the first {k + 1} products with {A!r} has NaN or infinite entries; look at the "
                    "parameters, the loss and the dtype"
                )
        previous, v = v, w / beta[k]
    return *_in_units(found, exponent(given) - exponent(A)), steps


def _in_units(found: Floats, power: int) -> tuple[Floats, Floats]:
    in_floats(float(np.abs(found).max()), power, "the tridiagonal matrix")
    return np.ldexp(found[0], power), np.ldexp(found[1], power)
