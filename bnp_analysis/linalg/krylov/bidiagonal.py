"""Golub-Kahan bidiagonalization with full reorthogonalization: singular values of a factor, without squaring them."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.krylov.lanczos import Floats
from bnp_analysis.linalg.matrices import Columns
from bnp_analysis.linalg.operators import LinearOperator
from bnp_analysis.linalg.scale import comfortable, exponent, in_floats, require_resolution, scaled
from bnp_analysis.runtime.files import saved_run
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.memory import require_memory
from bnp_analysis.runtime.progress import Progress, reporting, stop_requests
from bnp_analysis.runtime.random import generator

_CONTAMINATION = 1e-2
_NUMBERS = ("halves", "mixed", "scale", "dropped", "random")  # of a saved state, as they are


@dataclass(frozen=True, eq=False)
class Bidiagonalization:
    """`F V = U B` with orthonormal `U`, `V` in float64; `B` is upper bidiagonal up to the first breakdown.

    Attributes:
        matrix: `B`, `(k, l)`. It has more columns than rows where `F v` fell into the span of `U`; dropping such a
            column would make spurious tiny singular values.
        left, right: `U` `(m, k)`, `V` `(n, l)`.
        dropped: what was below the noise and set to zero, in all: no singular value moved further by it.
        products: pairs of products with `F` and `F^T`.
        noise: values below it are rounding.
        clean: leading columns of `V` that, together, hold at most 1 % of an undeclared null space.
        stop: `"steps"`, `"exhausted"` or `"interrupted"`; exhausted means that every nonzero singular value is there.
    """

    matrix: Floats
    left: Tensor
    right: Tensor
    dropped: float
    products: int
    noise: float
    clean: int
    stop: str

    def singular_values(self) -> Floats:
        """Singular values of `B`, descending; those of `F` when the run exhausted the space."""
        _, e = comfortable(torch.from_numpy(self.matrix))
        return np.ldexp(np.linalg.svd(np.ldexp(self.matrix, e), compute_uv=False), -e)

    def times_power(self, power: int) -> Bidiagonalization:
        """The same of `2^power F`.

        Raises:
            InvalidInputError: its numbers are no floats.
        """
        if power == 0:
            return self
        in_floats(float(np.abs(self.matrix).max(initial=0.0)), power, "the bidiagonal matrix")
        matrix = np.ldexp(self.matrix, power)
        return replace(
            self, matrix=matrix, dropped=math.ldexp(self.dropped, power), noise=math.ldexp(self.noise, power)
        )


@gated
def golub_kahan(
    F: LinearOperator,
    steps: int,
    *,
    null: Columns | None = None,
    magnitude: float = 0.0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Progress = False,
) -> Bidiagonalization:
    """Bidiagonalize `F`, `F V = U B`, from a start in its row space until a random vector finds nothing more.

    One start meets one copy of a repeated singular value, and near the end of its space rounding puts null vectors
    into `V`. From there on `F^T (u_k + g)` with a random `g` outside `U` takes the place of `F^T u_k`: it is long
    while anything is left to meet, and no product is spent on further restarts. `B` is then upper triangular.

    Args:
        F: `(m, n)`; products in its dtype, vectors in float64.
        steps: largest number of columns of `V`.
        null: orthonormal `(n, r)` kept out of `V` by reorthogonalization.
        magnitude: what the rounding of a product is relative to, where that is more than `|F|`: `|F| |P|` for `F P`.
        seed: of random vectors.
        checkpoint: a file written every 50 columns or 30 seconds, at the end and on Ctrl-C, and resumed from when it
            exists. One product then checks that it belongs to this `F`.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `Bidiagonalization`; `k` columns take at most `k + 1` pairs of products.

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
    given, F = F, scaled(F)
    run = _Run(F, limit, null, seed, magnitude, given)
    require_resolution(F, max(F.shape))
    key = f"golub-kahan of {F.shape[0]}x{F.shape[1]} in {F.dtype}, {rank} null directions, seed {seed}"
    with saved_run(checkpoint, key) as saved:
        if not saved.restore(run.restore):
            run.begin()
        stop = "steps"
        with reporting(progress, limit, "Golub-Kahan") as update, stop_requests(signal.SIGINT) as request:
            try:
                while run.columns < limit and stop == "steps":
                    request.heed()
                    stop = "steps" if run.advance() else "exhausted"
                    update(run.columns)
                    if saved.due(run.columns):
                        saved.save(run.state())
            except KeyboardInterrupt as error:
                if run.columns == 0 or not request.is_clean(error):
                    raise
                stop = "interrupted"
        if run.columns == F.shape[1] - rank:
            stop = "exhausted"  # as many directions as there are
        saved.save(run.state())
    return run.result(stop).times_power(exponent(given) - exponent(F))


class _Run:
    """The state of a bidiagonalization, which a step changes at its end; basis vectors beyond it are scratch."""

    def __init__(
        self, F: LinearOperator, limit: int, null: Columns | None, seed: int, magnitude: float, given: LinearOperator
    ) -> None:
        self.F, self.g, self.limit, self.magnitude, self.given = F, generator(seed), limit, magnitude, given
        self.null = None if null is None else null.to(torch.float64)
        # Once a new vector would hold more of the null space than this, random vectors are mixed in.
        self.leak_limit = F.eps**0.4
        self.rounding = 10 * F.eps * math.sqrt(max(F.shape))
        # Rows are basis vectors: contiguous for the products of a reorthogonalization.
        self.V = torch.zeros(0, F.shape[1], dtype=torch.float64, device=F.device)
        self.U = torch.zeros(0, F.shape[0], dtype=torch.float64, device=F.device)
        self.B: Floats = np.zeros((0, 0))
        # Bounds of the part of each right vector that rounding has put into an undeclared null space.
        self.leaks: Floats = np.zeros(0)
        self.columns = self.rows = self.halves = 0
        # Whether the start's own space is exhausted, and random vectors are mixed in.
        self.mixed, self.scale, self.dropped = False, magnitude, 0.0
        self.w = torch.zeros(F.shape[1], dtype=torch.float64, device=F.device)
        self.random = self.g.get_state()
        self.make_room(min(limit, F.rank_bound + 2))

    def make_room(self, columns: int) -> None:
        """Bases for so many columns; more than the structural rank bound are needed only where rounding adds some."""
        m, n = self.F.shape
        what = f"Golub-Kahan bases of {columns} vectors for a {m} x {n} factor"
        require_memory(8 * (columns + 1) * (m + n), what, device=self.F.device)
        V, U, B, leaks = self.V, self.U, self.B, self.leaks
        self.V = torch.cat([V, V.new_zeros(columns - len(V), n)])
        self.U = torch.cat([U, U.new_zeros(min(columns, m) - len(U), m)])
        self.B = np.pad(B, ((0, len(self.U) - len(U)), (0, columns - len(V))))
        self.leaks = np.pad(leaks, (0, columns - len(V)))

    def begin(self) -> None:
        """`F^T g`: in the row space, where no null vector is."""
        self.w, self.halves = self._pull(self._outside(0), 0, 0)
        # The first product has said in which units F is.
        self.scale = max(math.ldexp(self.magnitude, exponent(self.F) - exponent(self.given)), float(self.w.norm()))
        self.random = self.g.get_state()

    def _outside(self, rows: int) -> Tensor | None:
        """A random unit vector outside `U`, None where `U` is everything; `F^T` of it has nothing in `V`."""
        if rows == self.F.shape[0]:
            return None
        drawn = torch.randn(self.F.shape[0], generator=self.g, dtype=torch.float64).to(self.F.device)
        g = self._against(drawn / drawn.norm(), self.U[:rows], None)
        unit: Tensor = g / g.norm()
        return unit

    def _pull(self, y: Tensor | None, columns: int, halves: int) -> tuple[Tensor, int]:
        """The part of `F^T y` outside `V`, zero where there is no `y`; and the count of products."""
        if y is None:
            return torch.zeros_like(self.w), halves
        return self._against(self._times(self.F.T, y, halves), self.V[:columns], self.null), halves + 1

    @property
    def noise(self) -> float:
        return self.rounding * self.scale

    def advance(self) -> bool:
        """One column of `V`, and one of `U` unless `F v` lies in its span; False when nothing is left to find."""
        j, k, noise = self.columns, self.rows, self.noise
        self.g.set_state(self.random)
        if j == len(self.V):
            self.make_room(min(self.limit, 2 * j))
        w, halves, mixed, dropped = self.w, self.halves, self.mixed, self.dropped
        # F^T u has only its rounding there; subtracting alpha v and dividing by beta enlarge what v had.
        before = float(self.B[k - 1, j - 1] * self.leaks[j - 1]) if k else 0.0
        if not mixed and noise / 10 + before > self.leak_limit * float(w.norm()):
            # The space is exhausted, or nearly: this w, normalized, would put more of the null space into V, and each
            # such part takes a column. F^T of something new is long; repeated values need another start as well.
            pulled, halves = self._pull(self._outside(k), j, halves)
            w, mixed = w + pulled, True
        if float(w.norm()) <= noise:
            # F^T of a random vector lies in the space: but for chance, so does the whole row space.
            self.halves, self.mixed, self.dropped = halves, mixed, dropped + float(w.norm()) ** 2
            self.w = torch.zeros_like(w)
            return False
        # Once more: what is left of a small vector is less orthogonal than it was.
        v = self._against(w / w.norm(), self.V[:j], self.null)
        v, leak = v / v.norm(), min(1.0, (noise / 10 + before) / float(w.norm()))
        image = self._times(self.F, v, halves)
        u = self._against(image, self.U[:k], None)
        a, halves = float(u.norm()), halves + 1
        self.V[j], self.leaks[j] = v, leak
        self.B[:k, j] = (self.U[:k] @ image).cpu().numpy()
        y = None
        if a > noise and k < len(self.U):
            y = self.U[k] = u / a
            self.B[k, j] = a
            k += 1
        else:
            dropped += a**2
        if mixed and (g := self._outside(k)) is not None:
            y = g if y is None else y + g
        self.w, self.halves = self._pull(y, j + 1, halves)
        self.columns, self.rows, self.mixed, self.dropped = j + 1, k, mixed, dropped
        self.scale, self.random = max(self.scale, float(image.norm())), self.g.get_state()
        return True

    def _times(self, F: LinearOperator, v: Tensor, halves: int) -> Tensor:
        out = (F @ v.to(F.dtype)).double()
        if not bool(torch.isfinite(out).all()):
            raise NonFiniteError(f"product {halves // 2 + 1} with {F!r} has NaN or infinite entries")
        return out

    def _against(self, w: Tensor, basis: Tensor, null: Columns | None) -> Tensor:
        for _ in range(2):
            if null is not None and null.shape[1]:
                w = w - null @ (null.T @ w)
            w = w - (basis @ w) @ basis
        return w

    def state(self) -> dict[str, Any]:
        vectors = {"V": self.V[: self.columns].cpu(), "U": self.U[: self.rows].cpu(), "w": self.w.cpu()}
        arrays = {"B": self.B[: self.rows, : self.columns], "leaks": self.leaks[: self.columns]}
        copies = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        return vectors | copies | {name: getattr(self, name) for name in _NUMBERS}

    def restore(self, state: dict[str, Any]) -> bool:
        """Go on from a saved state; True."""
        self.columns, self.rows = columns, rows = len(state["V"]), len(state["U"])
        if columns > self.limit:
            raise InvalidInputError(f"the saved run has {columns} columns, steps= allows {self.limit}; allow more")
        if columns > len(self.V):
            self.make_room(columns)
        self.V[:columns], self.U[:rows] = state["V"].to(self.V), state["U"].to(self.U)
        self.B[:rows, :columns], self.leaks[:columns] = state["B"].numpy(), state["leaks"].numpy()
        self.w = state["w"].to(self.V)
        for name in _NUMBERS:
            setattr(self, name, state[name])
        if columns:
            self._require_same()
        return True

    def _require_same(self) -> None:
        """One product: the last column of `F V = U B` tells another matrix, other null directions lie in `V`."""
        v, b = self.V[self.columns - 1], torch.from_numpy(self.B[: self.rows, self.columns - 1]).to(self.V)
        gap = float((self._times(self.F, v, self.halves) - b @ self.U[: self.rows]).norm())
        inside = 0.0 if self.null is None else float((self.null.T @ self.V[: self.columns].T).norm())
        self.halves += 1
        if gap > 10 * self.noise or inside > 1e-8:
            raise InvalidInputError(
                f"the saved run is of another matrix or another null space: F v misses by {gap:.2g}, rounding explains "
                f"{10 * self.noise:.2g}. Resuming would mix the two; delete the file, or give another checkpoint="
            )

    def result(self, stop: str) -> Bidiagonalization:
        whole = self.columns == self.F.shape[1] - (0 if self.null is None else self.null.shape[1])
        # What is left at breakdown was set to zero as well, unless V is all that there is.
        last = 0.0 if whole or stop != "exhausted" else float(self.w.norm()) ** 2
        return Bidiagonalization(
            matrix=self.B[: self.rows, : self.columns].copy(),
            left=self.U[: self.rows].T,
            right=self.V[: self.columns].T,
            dropped=math.sqrt(self.dropped + last),
            products=(self.halves + 1) // 2,
            noise=self.noise,
            clean=max(1, int((np.sqrt(np.cumsum(self.leaks[: self.columns] ** 2)) <= _CONTAMINATION).sum())),
            stop=stop,
        )
