"""Golub-Kahan bidiagonalization with full reorthogonalization: singular values of a factor, without squaring them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.checkpoint import load_state, save_state
from bnp_analysis.linalg.lanczos import Floats
from bnp_analysis.linalg.memory import require_memory
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.linalg.progress import Progress, reporting
from bnp_analysis.linalg.random import generator

_SAVE_EVERY = 50
_CONTAMINATION = 1e-2


@dataclass(frozen=True, eq=False)
class Bidiagonalization:
    """`F V = U B` with orthonormal `U`, `V` in float64; `B` is upper bidiagonal but for restarts.

    Attributes:
        matrix: `B`, `(k, l)`. It has more columns than rows where `F v` fell into the span of `U`; dropping such a
            column would make spurious tiny singular values.
        left, right: `U` `(m, k)`, `V` `(n, l)`.
        residual: `|F^T u_k - V B^T e_k|`, the coupling to what was not searched.
        products: pairs of products with `F` and `F^T`.
        noise: values below it are rounding.
        clean: leading columns of `V` that, together, hold at most 1 % of an undeclared null space.
        stop: `"steps"`, `"exhausted"` or `"interrupted"`; exhausted means that every nonzero singular value is there.
    """

    matrix: Floats
    left: Tensor
    right: Tensor
    residual: float
    products: int
    noise: float
    clean: int
    stop: str

    def singular_values(self) -> Floats:
        """Singular values of `B`, descending; those of `F` when the run exhausted the space."""
        return np.asarray(np.linalg.svd(self.matrix, compute_uv=False), dtype=np.float64)


def golub_kahan(
    F: LinearOperator,
    steps: int,
    *,
    null: Tensor | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress = False,
) -> Bidiagonalization:
    """Bidiagonalize `F`, `F V = U B`, from a start in its row space until a random vector finds nothing more.

    Args:
        F: `(m, n)`; products in its dtype, vectors in float64.
        steps: largest number of columns of `V`.
        null: orthonormal `(n, r)` kept out of `V` by reorthogonalization.
        seed: of random vectors.
        checkpoint: a file written every 50 columns, at the end and on Ctrl-C, and resumed from when it exists.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `Bidiagonalization`; a repeated singular value appears by a restart from a random vector.

    Raises:
        InvalidInputError: nothing to do, or a checkpoint of another run; NonFiniteError: a product with NaN or
        infinity; MemoryLimitError: the bases would not fit.

    Source: Golub and Kahan 1965; T13.

    Example:
        >>> import torch
        >>> from bnp_analysis.linalg import MatrixOperator
        >>> run = golub_kahan(MatrixOperator(torch.diag(torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64))), 3)
        >>> run.singular_values().round(12).tolist(), run.stop
        ([3.0, 2.0], 'exhausted')
    """
    rank = 0 if null is None else null.shape[1]
    limit = min(int(steps), F.shape[1] - rank)
    if limit < 1 or F.shape[0] < 1:
        raise InvalidInputError(f"nothing to bidiagonalize: F is {F.shape}, steps={steps}, null directions={rank}")
    require_memory(8 * (limit + 1) * sum(F.shape), f"Golub-Kahan bases of {limit} vectors for a {F.shape} factor")
    run = _Run(F, limit, null, seed)
    key = f"golub-kahan of {F.shape[0]}x{F.shape[1]} in {F.dtype}, {rank} null directions, seed {seed}"
    if checkpoint is not None and Path(checkpoint).exists():
        run.restore(load_state(checkpoint, key))
    else:
        run.begin()
    stop = "steps"
    with reporting(progress, limit, "Golub-Kahan") as update:
        try:
            while run.columns < limit and stop == "steps":
                stop = "steps" if run.advance() else "exhausted"
                update(run.columns)
                if checkpoint is not None and run.columns % _SAVE_EVERY == 0:
                    save_state(checkpoint, key, run.state())
        except KeyboardInterrupt:
            if run.columns == 0:
                raise
            stop = "interrupted"
    if run.columns == F.shape[1] - rank:
        # As many directions as there are.
        stop = "exhausted"
    if checkpoint is not None:
        save_state(checkpoint, key, run.state())
    return run.result(stop)


class _Run:
    """The state of a bidiagonalization; consistent after every step, so that an interrupt loses at most that step."""

    def __init__(self, F: LinearOperator, limit: int, null: Tensor | None, seed: int) -> None:
        m, n = F.shape
        self.F, self.g, self.limit = F, generator(seed), limit
        self.null = None if null is None else null.double()
        # Rows are basis vectors: contiguous for the products of a reorthogonalization.
        self.V = torch.zeros(limit, n, dtype=torch.float64, device=F.device)
        self.U = torch.zeros(min(limit, m), m, dtype=torch.float64, device=F.device)
        self.B: Floats = np.zeros((min(limit, m), limit))
        self.rows, self.columns, self.halves = 0, 0, 0
        self.scale = 0.0
        # Bounds of the part of each right vector that rounding has put into an undeclared null space.
        self.leaks: list[float] = []
        self.w = torch.zeros(n, dtype=torch.float64, device=F.device)

    def begin(self) -> None:
        """`F^T g`: in the row space, where no null vector is."""
        self.w = self._from_row_space()
        self.scale = float(self.w.norm())

    def _from_row_space(self) -> Tensor:
        return self._against(self._times(self.F.T, self._random(self.F.shape[0])), self.V[: self.columns], self.null)

    @property
    def products(self) -> int:
        """Pairs of products, rounded up."""
        return (self.halves + 1) // 2

    @property
    def noise(self) -> float:
        unit = float(torch.finfo(self.F.dtype).eps)
        return 10 * unit * math.sqrt(max(self.F.shape)) * self.scale

    def advance(self) -> bool:
        """One column of `V`, and one of `U` unless `F v` lies in its span; False when nothing is left to find."""
        w = self.w
        if float(w.norm()) <= self.noise:
            # An invariant space: a repeated value needs another start.
            w = self._from_row_space()
            if float(w.norm()) <= self.noise:
                # F^T of a random vector lies in the space: but for chance, so does the whole row space.
                return False
        # Once more: what is left of a small vector is less orthogonal than it was.
        v = self._against(w / w.norm(), self.V[: self.columns], self.null)
        v = v / v.norm()
        # F^T u has only its rounding there; subtracting alpha v and dividing by beta enlarge what v had.
        before = self.B[self.rows - 1, self.columns - 1] * self.leaks[-1] if self.leaks and self.rows else 0.0
        leak = (self.noise / 10 + before) / float(w.norm())
        image = self._times(self.F, v)
        k = self.rows
        coefficients = self.U[:k] @ image
        u = self._against(image, self.U[:k], None)
        a = float(u.norm())
        self.scale = max(self.scale, float(image.norm()))
        self.V[self.columns] = v
        self.leaks.append(leak)
        self.B[:k, self.columns] = coefficients.cpu().numpy()
        following = torch.zeros_like(self.w)
        if a > self.noise and k < self.U.shape[0]:
            self.U[k] = u / a
            self.B[k, self.columns] = a
            following = self._against(self._times(self.F.T, self.U[k]), self.V[: self.columns + 1], self.null)
            self.rows = k + 1
        self.columns += 1
        self.w = following
        return True

    def _random(self, n: int) -> Tensor:
        g = torch.randn(n, generator=self.g, dtype=torch.float64).to(self.F.device)
        unit: Tensor = g / g.norm()
        return unit

    def _times(self, F: LinearOperator, v: Tensor) -> Tensor:
        out = (F @ v.to(F.dtype)).double()
        self.halves += 1
        if not bool(torch.isfinite(out).all()):
            raise NonFiniteError(f"product {self.products + 1} with {F!r} has NaN or infinite entries")
        return out

    def _against(self, w: Tensor, basis: Tensor, null: Tensor | None) -> Tensor:
        for _ in range(2):
            if null is not None and null.shape[1]:
                w = w - null @ (null.T @ w)
            w = w - (basis @ w) @ basis
        return w

    def state(self) -> dict[str, Any]:
        return {
            "V": self.V[: self.columns].cpu(),
            "U": self.U[: self.rows].cpu(),
            "B": torch.from_numpy(self.B[: self.rows, : self.columns].copy()),
            "w": self.w.cpu(),
            "halves": self.halves,
            "leaks": [float(leak) for leak in self.leaks],
            "scale": float(self.scale),
            "generator": self.g.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        columns, rows = state["V"].shape[0], state["U"].shape[0]
        if columns > self.limit:
            raise InvalidInputError(f"the saved run has {columns} columns, steps= allows {self.limit}; allow more")
        self.columns, self.rows, self.halves, self.scale = columns, rows, state["halves"], state["scale"]
        self.V[:columns], self.U[:rows] = state["V"].to(self.V), state["U"].to(self.U)
        self.B[:rows, :columns] = state["B"].numpy()
        self.w, self.leaks = state["w"].to(self.w), list(state["leaks"])
        self.g.set_state(state["generator"])
        # The name of a run says its size and seed; one product says whether it was this matrix.
        expected = torch.from_numpy(self.B[:rows, 0]).to(self.U) @ self.U[:rows]
        if columns and float((self._times(self.F, self.V[0]) - expected).norm()) > 100 * self.noise:
            raise InvalidInputError(
                "the saved run belongs to another matrix of the same size; delete the file, or give another checkpoint="
            )

    def result(self, stop: str) -> Bidiagonalization:
        return Bidiagonalization(
            matrix=self.B[: self.rows, : self.columns].copy(),
            left=self.U[: self.rows].T,
            right=self.V[: self.columns].T,
            residual=0.0 if stop == "exhausted" else float(self.w.norm()),
            products=self.products,
            noise=self.noise,
            clean=max(1, int((np.sqrt(np.cumsum(np.square(self.leaks))) <= _CONTAMINATION).sum())),
            stop=stop,
        )
