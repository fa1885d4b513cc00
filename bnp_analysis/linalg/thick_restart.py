"""The search for a few eigenpairs by thick-restart Lanczos, with a second look for repeated eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg.lanczos import Floats
from bnp_analysis.linalg.memory import require_memory
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.progress import Progress, reporting
from bnp_analysis.linalg.random import generator, normal

_LEAST_LOOK = 8
_SAVE_EVERY = 50
_CHECK_EVERY = 3


class ThickRestart:
    """The state of one search: an orthonormal basis `V` (rows), its images `A V`, and `H = V^T A V`.

    The images make every residual exact, also after a look in a new direction, when the basis is no Krylov space.
    """

    def __init__(self, A: SymmetricOperator, null: Tensor, k: int, which: str, tol: float, seed: int) -> None:
        self.A, self.null, self.k, self.which, self.tol = A, null, k, which, tol
        room = A.dim - null.shape[1]
        # The small end of a spectrum converges slowly: a wider basis restarts less often.
        self.width = min(room, max(2 * k + 10, 24) if which == "largest" else max(3 * k + 20, 60))
        require_memory((2 * self.width + 1) * A.dim * A.dtype.itemsize, f"a basis of {self.width} vectors")
        self.V = torch.zeros(self.width + 1, A.dim, dtype=A.dtype, device=A.device)
        self.images = torch.zeros(self.width, A.dim, dtype=A.dtype, device=A.device)
        self.H: Floats = np.zeros((self.width, self.width))
        self.g = generator(seed)
        self.size, self.matvecs, self.noise, self.stop = 0, 0, 0.0, "steps"
        self.full = self.width == room
        self.seen: Floats | None = None  # the wanted values before the look that goes on
        self.look_length, self.look_until = 0, 0
        self.V[0] = self._fresh()

    def run(self, max_matvecs: int, progress: Progress, save: Callable[[], None] = lambda: None) -> None:
        """Search until the wanted pairs have converged and a look in a new direction finds no others.

        `save` is called every 50 products, at the end and on Ctrl-C.
        """
        try:
            self._search(max_matvecs, progress, save)
        finally:
            if self.size:
                save()

    def state(self) -> dict[str, Any]:
        """Everything that another process needs to go on."""
        return {
            "V": self.V.cpu(),
            "images": self.images.cpu(),
            "H": torch.from_numpy(self.H.copy()),
            "seen": None if self.seen is None else torch.from_numpy(np.asarray(self.seen).copy()),
            "numbers": [self.size, self.matvecs, self.look_length, self.look_until],
            "noise": float(self.noise),
            "generator": self.g.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            InvalidInputError: the images in it are not those of this operator.
        """
        self.V, self.images = state["V"].to(self.V), state["images"].to(self.images)
        self.H = state["H"].numpy()
        self.seen = None if state["seen"] is None else state["seen"].numpy()
        self.size, self.matvecs, self.look_length, self.look_until = state["numbers"]
        self.noise = state["noise"]
        self.g.set_state(state["generator"])
        gap = float((self.A @ self.V[0] - self.images[0]).double().norm())
        if gap > 100 * self.noise:
            raise InvalidInputError(
                "the saved search belongs to another operator of the same size; delete the file, or give another "
                "checkpoint="
            )
        self.matvecs += 1

    def _search(self, max_matvecs: int, progress: Progress, save: Callable[[], None]) -> None:
        with reporting(progress, max_matvecs, "eigenpairs") as update:
            try:
                while True:
                    while self.size < self.width and self.matvecs < max(max_matvecs, self.k):
                        self._expand()
                        if self.matvecs % _SAVE_EVERY == 0:
                            save()
                        update(min(self.matvecs, max_matvecs))
                        if not self.full and self.size % _CHECK_EVERY == 0 and self._settled():
                            break
                    if self.full and self.size == self.width:
                        self.stop = "converged"
                        return
                    if self._settled():
                        if self._confirmed():
                            self.stop = "converged"
                            return
                        self._restart(self._fresh())
                    elif self.matvecs >= max(max_matvecs, self.k):
                        return
                    elif self.size == self.width:
                        self._restart(self._next_direction())
            except KeyboardInterrupt:
                if self.size < self.k:
                    raise
                self.stop = "interrupted"

    def wanted_pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Values `(k,)`, vectors `(n, k)` and residual norms `(k,)` of the wanted pairs."""
        values, vectors, wanted = self._decompose()
        residuals = self._residuals(values, vectors, wanted).double().norm(dim=1)
        Y = self._coefficients(vectors, wanted)
        return torch.as_tensor(values[wanted].copy(), dtype=torch.float64), (Y.T @ self.V[: self.size]).T, residuals

    def _expand(self) -> None:
        """One product: the image of the newest vector, its column of `H`, and the next direction."""
        j = self.size
        w = self.A @ self.V[j]
        self.matvecs += 1
        column = (self.V[: j + 1].double() @ w.double()).cpu().numpy()
        if not np.isfinite(column).all():
            raise NonFiniteError(f"product {self.matvecs} with {self.A!r} has NaN or infinite entries")
        self.images[j] = w
        self.H[: j + 1, j] = column
        self.H[j, : j + 1] = column
        scale = float(np.abs(self.H[: j + 1, : j + 1]).max())
        self.noise = 10 * math.sqrt(self.A.dim) * float(torch.finfo(self.A.dtype).eps) * scale
        self.size = j + 1
        if self.size < self.width or not self.full:
            self.V[self.size] = self._unit(w)

    def _unit(self, w: Tensor) -> Tensor:
        """The direction of `w` outside the basis; a fresh one where only rounding is left of it."""
        w = self._orthogonalized(w)
        norm = w.norm()
        return w / norm if float(norm) > self.noise else self._fresh()

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

    def _coefficients(self, vectors: Floats, chosen: list[int]) -> Tensor:
        return torch.as_tensor(vectors[:, chosen].copy(), dtype=self.V.dtype, device=self.V.device)

    def _residuals(self, values: Floats, vectors: Floats, chosen: list[int]) -> Tensor:
        """The vectors `A y - theta y` of Ritz pairs, as rows."""
        Y = self._coefficients(vectors, chosen)
        theta = torch.as_tensor(values[chosen].copy(), dtype=self.V.dtype, device=self.V.device)
        return Y.T @ self.images[: self.size] - theta[:, None] * (Y.T @ self.V[: self.size])

    def _settled(self) -> bool:
        """Whether the wanted pairs meet the tolerance, and the look that goes on has been long enough."""
        if self.size < self.k or self.matvecs < self.look_until:
            return False
        values, vectors, wanted = self._decompose()
        residuals = self._residuals(values, vectors, wanted).double().norm(dim=1).cpu().numpy()
        return bool(np.all(residuals <= self._tolerance(values[wanted])))

    def _tolerance(self, values: Floats) -> Floats:
        tolerance: Floats = np.maximum(self.tol * np.abs(values), self.noise) / 2  # half: products differ by rounding
        return tolerance

    def _confirmed(self) -> bool:
        """Whether a look from another start left the wanted values as they were; if not, begin one.

        One start vector meets one copy of a repeated eigenvalue. A look is half as long as the first search was.
        """
        values, _, wanted = self._decompose()
        found, seen = values[wanted], self.seen
        if seen is not None and bool(np.all(np.abs(found - seen) <= 4 * self._tolerance(found))):
            return True
        self.seen = found
        self.look_length = self.look_length or max(_LEAST_LOOK, self.matvecs // 2)
        self.look_until = self.matvecs + self.look_length
        return False

    def _next_direction(self) -> Tensor:
        """The residual of the worst wanted pair; while they all are converged, the direction of the search."""
        values, vectors, wanted = self._decompose()
        rows = self._residuals(values, vectors, wanted)
        excess = rows.double().norm(dim=1).cpu().numpy() - self._tolerance(values[wanted])
        worst = int(excess.argmax())
        return self._unit(rows[worst]) if excess[worst] > 0 else self.V[self.size].clone()

    def _restart(self, following: Tensor) -> None:
        """Keep the wanted Ritz vectors and their neighbours, and go on in the direction given."""
        values, vectors, wanted = self._decompose()
        keep = min(self.k + max(4, (self.width - self.k) // 3), self.size, self.width - 1)
        order = {"largest": list(range(self.size))[::-1], "smallest": list(range(self.size))}.get(self.which)
        if order is None:
            half = keep // 2
            order = list(range(half)) + list(range(half, self.size))[::-1]
        chosen = wanted + [i for i in order if i not in wanted][: keep - len(wanted)]
        Y = self._coefficients(vectors, chosen)
        kept, images = Y.T @ self.V[: self.size], Y.T @ self.images[: self.size]
        # Lengths would drift over hundreds of restarts.
        lengths = kept.norm(dim=1, keepdim=True)
        self.V[: len(chosen)], self.images[: len(chosen)] = kept / lengths, images / lengths
        self.H[:] = 0.0
        self.H[np.arange(len(chosen)), np.arange(len(chosen))] = values[chosen]
        self.size = len(chosen)
        self.V[self.size] = following
