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


@dataclass(frozen=True)
class _Mark:
    """Where a run stands; replaced as a whole after a step, so that an interrupt loses that step and nothing else."""

    columns: int
    rows: int
    halves: int
    mixed: bool  # whether the start's own space is exhausted, and random vectors are mixed in
    scale: float
    dropped: float
    w: Tensor
    random: Tensor


class _Run:
    """The state of a bidiagonalization; basis vectors beyond its mark are scratch."""

    def __init__(
        self, F: LinearOperator, limit: int, null: Columns | None, seed: int, magnitude: float, given: LinearOperator
    ) -> None:
        self.F, self.g, self.limit, self.magnitude, self.given = F, generator(seed), limit, magnitude, given
        self.null = None if null is None else null.to(torch.float64)
        # Once a new vector would hold more of the null space than this, random vectors are mixed in.
        self.leak_limit = F.eps**0.4
        # Rows are basis vectors: contiguous for the products of a reorthogonalization.
        self.V = torch.zeros(0, F.shape[1], dtype=torch.float64, device=F.device)
        self.U = torch.zeros(0, F.shape[0], dtype=torch.float64, device=F.device)
        self.B: Floats = np.zeros((0, 0))
        # Bounds of the part of each right vector that rounding has put into an undeclared null space.
        self.leaks: Floats = np.zeros(0)
        w = torch.zeros(F.shape[1], dtype=torch.float64, device=F.device)
        self.mark = _Mark(0, 0, 0, False, magnitude, 0.0, w, self.g.get_state())
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
        w, halves = self._pull(self._outside(0), 0, 0)
        # The first product has said in which units F is.
        scale = max(math.ldexp(self.magnitude, exponent(self.F) - exponent(self.given)), float(w.norm()))
        self.mark = replace(self.mark, w=w, halves=halves, scale=scale, random=self.g.get_state())

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
            return torch.zeros_like(self.mark.w), halves
        return self._against(self._times(self.F.T, y, halves), self.V[:columns], self.null), halves + 1

    @property
    def columns(self) -> int:
        return self.mark.columns

    @property
    def noise(self) -> float:
        unit = self.F.eps
        return 10 * unit * math.sqrt(max(self.F.shape)) * self.mark.scale

    def advance(self) -> bool:
        """One column of `V`, and one of `U` unless `F v` lies in its span; False when nothing is left to find."""
        at, noise = self.mark, self.noise
        self.g.set_state(at.random)
        if at.columns == len(self.V):
            self.make_room(min(self.limit, 2 * at.columns))
        w, halves, mixed, dropped = at.w, at.halves, at.mixed, at.dropped
        # F^T u has only its rounding there; subtracting alpha v and dividing by beta enlarge what v had.
        before = float(self.B[at.rows - 1, at.columns - 1] * self.leaks[at.columns - 1]) if at.rows else 0.0
        if not mixed and noise / 10 + before > self.leak_limit * float(w.norm()):
            # The space is exhausted, or nearly: this w, normalized, would put more of the null space into V, and each
            # such part takes a column. F^T of something new is long; repeated values need another start as well.
            pulled, halves = self._pull(self._outside(at.rows), at.columns, halves)
            w, mixed = w + pulled, True
        if float(w.norm()) <= noise:
            # F^T of a random vector lies in the space: but for chance, so does the whole row space.
            dropped += float(w.norm()) ** 2
            self.mark = replace(at, halves=halves, mixed=mixed, dropped=dropped, w=torch.zeros_like(w))
            return False
        # Once more: what is left of a small vector is less orthogonal than it was.
        v = self._against(w / w.norm(), self.V[: at.columns], self.null)
        v, leak = v / v.norm(), min(1.0, (noise / 10 + before) / float(w.norm()))
        k, image = at.rows, self._times(self.F, v, halves)
        u = self._against(image, self.U[:k], None)
        a, halves = float(u.norm()), halves + 1
        self.V[at.columns], self.leaks[at.columns] = v, leak
        self.B[:k, at.columns] = (self.U[:k] @ image).cpu().numpy()
        y = None
        if a > noise and k < len(self.U):
            y = self.U[k] = u / a
            self.B[k, at.columns] = a
            k += 1
        else:
            dropped += a**2
        if mixed and (g := self._outside(k)) is not None:
            y = g if y is None else y + g
        following, halves = self._pull(y, at.columns + 1, halves)
        scale = max(at.scale, float(image.norm()))
        self.mark = _Mark(at.columns + 1, k, halves, mixed, scale, dropped, following, self.g.get_state())
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
        at = self.mark
        bases = {"V": self.V[: at.columns].cpu(), "U": self.U[: at.rows].cpu()}
        arrays = {"B": self.B[: at.rows, : at.columns], "leaks": self.leaks[: at.columns]}
        numbers = {name: getattr(at, name) for name in ("halves", "mixed", "scale", "dropped")}
        copies = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        return bases | copies | numbers | {"w": at.w.cpu(), "random": at.random}

    def restore(self, state: dict[str, Any]) -> bool:
        """Go on from a saved state; True."""
        columns, rows = len(state["V"]), len(state["U"])
        if columns > self.limit:
            raise InvalidInputError(f"the saved run has {columns} columns, steps= allows {self.limit}; allow more")
        if columns > len(self.V):
            self.make_room(columns)
        self.V[:columns], self.U[:rows] = state["V"].to(self.V), state["U"].to(self.U)
        self.B[:rows, :columns], self.leaks[:columns] = state["B"].numpy(), state["leaks"].numpy()
        numbers = (state["halves"], state["mixed"], state["scale"], state["dropped"])
        self.mark = _Mark(columns, rows, *numbers, state["w"].to(self.V), state["random"])
        if columns:
            self._require_same()
        return True

    def _require_same(self) -> None:
        """One product: the last column of `F V = U B` tells another matrix, other null directions lie in `V`."""
        at = self.mark
        v, b = self.V[at.columns - 1], torch.from_numpy(self.B[: at.rows, at.columns - 1]).to(self.V)
        gap = float((self._times(self.F, v, at.halves) - b @ self.U[: at.rows]).norm())
        inside = 0.0 if self.null is None else float((self.null.T @ self.V[: at.columns].T).norm())
        self.mark = replace(at, halves=at.halves + 1)
        if gap > 10 * self.noise or inside > 1e-8:
            raise InvalidInputError(
                f"the saved run is of another matrix or another null space: F v misses by {gap:.2g}, rounding explains "
                f"{10 * self.noise:.2g}. Resuming would mix the two; delete the file, or give another checkpoint="
            )

    def result(self, stop: str) -> Bidiagonalization:
        at = self.mark
        whole = at.columns == self.F.shape[1] - (0 if self.null is None else self.null.shape[1])
        # What is left at breakdown was set to zero as well, unless V is all that there is.
        last = 0.0 if whole or stop != "exhausted" else float(at.w.norm()) ** 2
        return Bidiagonalization(
            matrix=self.B[: at.rows, : at.columns].copy(),
            left=self.U[: at.rows].T,
            right=self.V[: at.columns].T,
            dropped=math.sqrt(at.dropped + last),
            products=(at.halves + 1) // 2,
            noise=self.noise,
            clean=max(1, int((np.sqrt(np.cumsum(self.leaks[: at.columns] ** 2)) <= _CONTAMINATION).sum())),
            stop=stop,
        )
