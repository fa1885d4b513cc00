"""The search for a few eigenpairs by thick-restart Lanczos, with a multiplicity check for repeated eigenvalues."""

from __future__ import annotations

import math
import signal
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnp_analysis.errors import NonFiniteError
from bnp_analysis.linalg.bases import dots, length, orthogonalized, project_out
from bnp_analysis.linalg.krylov.lanczos import Floats, require_same
from bnp_analysis.linalg.matrices import Columns
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.runtime.files import SavedRun
from bnp_analysis.runtime.memory import require_memory
from bnp_analysis.runtime.progress import Progress, StopRequest, Update, reporting, stop_requests
from bnp_analysis.runtime.random import generator, normal
from bnp_analysis.runtime.threads import one_blas_thread

_LEAST_VERIFICATION = 8
_COLUMNS = 1 << 15


class ThickRestart:
    """The state of one search: `A V^T = V^T H + sum_c r_c g_c^T`, rows of `V` orthonormal and orthogonal to each `r_c`.

    A Krylov space has one residual; a multiplicity check, in a new direction, leaves another one open. They give the
    residual of every Ritz pair without further products, and what symmetry says of the next product.
    """

    def __init__(
        self,
        A: SymmetricOperator,
        null: Columns,
        k: int,
        which: str,
        tol: float,
        seed: int,
        verify: bool = True,
        start: Tensor | None = None,
    ) -> None:
        self.A, self.null, self.k, self.which, self.tol = A, null, k, which, tol
        self.upper = {"largest": k, "smallest": 0}.get(which, (k + 1) // 2)  # how many of the upper end
        # A second copy of the value at an end does not change that value.
        self.verify = verify and max(self.upper, k - self.upper) > 1
        room = A.dim - null.shape[1]
        # The small end of a spectrum converges slowly: a wider basis restarts less often.
        self.width = min(room, max(5 * k, 40) if which == "largest" else max(5 * k + 10, 90))
        require_memory((self.width + 6) * A.dim * A.dtype.itemsize, f"a basis of {self.width} vectors", device=A.device)
        roundings = 10 * math.sqrt(min(A.dim, 1000))
        self.rounding = roundings * A.eps  # may take products, which memory has to have room for
        # What products are certain to is a bound; most are better, and the search goes as far as its own arithmetic.
        self.own_rounding = roundings * min(A.eps, torch.finfo(A.dtype).eps)
        self.V = torch.zeros(self.width + 1, A.dim, dtype=A.dtype, device=A.device)
        self.H = torch.zeros(self.width, self.width, dtype=torch.float64, device=A.device)
        self.open: list[tuple[Tensor, Tensor]] = []
        # Of each basis vector, the lengths of residuals that counted as rounding and were let go.
        self.dropped = torch.zeros(self.width, dtype=torch.float64, device=A.device)
        self.chain = True  # whether the open residuals belong to the newest vector alone
        self.g = generator(seed)
        self.size, self.matvecs, self.stop = 0, 0, "steps"
        self.checks = 0  # products that compared saved searches with the operator
        # How far the products contradict the symmetry of `H`, in the Frobenius norm: what residuals do not know of.
        self.scale = self.drift = 0.0
        self.full = self.width == room
        self.seen: Floats | None = None  # the wanted values before the multiplicity check that goes on
        self.longest_verification, self.verify_until = 0, 0
        self.V[0] = self._fresh()
        self.given = 0  # directions that the search begins with; the residual of each of them stays open
        if start is not None:
            self._begin(start.view(A.dim, -1))

    def _begin(self, start: Tensor) -> None:
        """Begin in the span of the columns `(n, b)`, the last one with a random vector a tenth as long.

        That meets what the columns do not, and takes from the last one little of what it knows.
        """
        random = self.V[0].clone()
        columns = project_out(start, self.null)
        columns = columns / columns.norm(dim=0)
        columns[:, -1] += 0.1 * random
        for column in columns.T[-self.width :]:
            v, norm, _ = orthogonalized(column, self.V[: self.given], self.null)
            if float(norm) > math.sqrt(torch.finfo(v.dtype).eps):  # else it is in the span of the others
                self.V[self.given] = v / norm
                self.given += 1

    def run(self, max_matvecs: int, progress: Progress, saved: SavedRun) -> None:
        """Search until the wanted pairs have converged and a check in a new direction finds no others."""
        with reporting(progress, max_matvecs, "eigenpairs") as update, stop_requests(signal.SIGINT) as request:
            try:
                self._search(max_matvecs, update, saved, request)
            except KeyboardInterrupt as error:
                if not request.is_clean(error):
                    raise
                self.stop = "interrupted"
            except Exception:  # of a product: what there is stays
                if self.size:
                    saved.save(self.state())
                raise
        if self.size:
            saved.save(self.state())
        if self.stop == "interrupted" and self.size < self.k:
            raise KeyboardInterrupt

    def state(self) -> dict[str, Any]:
        """Everything that another process needs to go on."""
        return {
            "V": self.V[: self.size + 1].cpu(),
            "H": self.H.cpu(),
            "open": [(r.cpu(), g.cpu()) for r, g in self.open],
            "dropped": self.dropped.cpu(),
            "chain": self.chain,
            "seen": None if self.seen is None else torch.from_numpy(np.asarray(self.seen).copy()),
            "counts": [self.size, self.matvecs, self.checks, self.longest_verification, self.verify_until],
            "sizes": [self.scale, self.drift],
            "generator": self.g.get_state(),
        }

    def restore(self, state: dict[str, Any]) -> bool:
        """Go on from a saved state; True.

        Raises:
            InvalidInputError: the products in it are not those of this operator.
        """
        self.V[: len(state["V"])] = state["V"].to(self.V)
        self.H = state["H"].to(self.H)
        self.open = [(r.to(self.V), g.to(self.H)) for r, g in state["open"]]
        self.dropped = state["dropped"].to(self.H)
        self.chain = state["chain"]
        self.seen = None if state["seen"] is None else state["seen"].numpy()
        self.size, self.matvecs, self.checks, self.longest_verification, self.verify_until = state["counts"]
        self.scale, self.drift = state["sizes"]
        self.g.set_state(state["generator"])
        first = torch.eye(self.size, 1, dtype=self.H.dtype, device=self.H.device)
        image = (self.H[: self.size, :1].to(self.V.dtype).T @ self.V[: self.size] + self._residuals(first))[0]
        require_same(float((self.A @ self.V[0] - image).double().norm()) <= 100 * self.noise, "search")
        self.checks += 1
        return True

    def _search(self, max_matvecs: int, update: Update, saved: SavedRun, request: StopRequest) -> None:
        """Look, then one product: a state saved after a product is looked at again by the run that goes on from it."""
        limit = max(max_matvecs, self.k)
        while True:
            # Long searches are looked at less often: an eigenproblem each time.
            often = not self.full and self.matvecs >= self.given and not self.matvecs % (1 + self.matvecs // 100)
            if often or self.size == self.width or self.matvecs >= limit:
                if self.full and self.size == self.width:
                    self.stop = "converged"
                    return
                if self._settled():
                    if self._confirmed():
                        self.stop = "converged"
                        return
                    self._verify()
                elif self.size == self.width and self.matvecs < limit:
                    self._restart(self._next_direction())
            if self.matvecs >= limit:
                return
            self._expand()
            if saved.due(self.matvecs):
                saved.save(self.state())
            update(min(self.matvecs, max_matvecs))
            request.heed()

    def wanted_pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Values `(k,)`, vectors `(n, k)`, residual norms `(k,)` of the wanted pairs, and what was dropped of these."""
        values, vectors, wanted = self._decompose()
        Y = self._coefficients(vectors, wanted)
        X = (Y.to(self.V.dtype).T @ self.V[: self.size]).T
        dropped = self.dropped[: self.size] @ Y.abs()
        return torch.as_tensor(values[wanted].copy(), dtype=torch.float64), X, self._residual_norms(Y), dropped

    def _expand(self) -> None:
        """One product: the image of the newest vector, its column of `H`, and the next direction."""
        j = self.size
        u = self.V[j]
        w = self.A @ u
        column = torch.zeros(j + 1, dtype=torch.float64, device=u.device)
        kept = []
        for r, g in self.open:  # A is symmetric: most of the column is known
            along = length(r) if self.chain else dots(r[None], u)
            column[:j] += along * g[:j]
            if not self.chain:
                kept.append((r - along.to(r.dtype) * u, g))
        column[j] = dots(u[None], w)[0]
        first = max(j - 1, 0) if self.chain else 0
        w = w - column[first:].to(w.dtype) @ self.V[first : j + 1]
        w, norm, more = orthogonalized(w, self.V[: j + 1], self.null)
        column += more
        self.matvecs += 1
        norm, size, gap = torch.stack([norm, column.abs().max(), more.norm()]).tolist()
        if not math.isfinite(norm):
            raise NonFiniteError(f"product {self.matvecs} with {self.A!r} has NaN or infinite entries")
        self.scale, self.drift = max(self.scale, size), math.hypot(self.drift, gap)
        self.H[: j + 1, j] = self.H[j, : j + 1] = column
        self.open = []
        for r, g in kept:
            self._keep(r, float(r.norm()), g)
        self.size = j + 1
        if norm > self.least:
            g = torch.zeros(self.width, dtype=torch.float64, device=u.device)
            g[j] = 1.0
            self.open.append((w, g))
        else:
            self.dropped[j] += norm
        self.chain = len(self.open) <= 1 and norm > self.least
        if self.matvecs < self.given:
            self.chain = False  # the next direction is there
        elif self.size < self.width or not self.full:
            self.V[self.size] = w / norm if norm > self.least else self._fresh()
            if self.given > 1 and self.size < self.width:
                self._gather()
                self.V[self.size] = self._next_direction()

    def _gather(self) -> None:
        """The open residuals as orthonormal vectors: their number stays that of the given directions."""
        if len(self.open) < 2:
            return
        Q, T = torch.linalg.qr(torch.stack([r for r, _ in self.open]).double().T)
        U, S, W = torch.linalg.svd(T @ torch.stack([g for _, g in self.open]), full_matrices=False)
        rows = (Q @ U).T.to(self.V.dtype)
        self.open, self.chain = [], False
        for r, s, w in zip(rows, S, W, strict=True):
            self._keep(r, 1.0, s * w)

    def _keep(self, r: Tensor, length: float, g: Tensor) -> None:
        """Hold a residual and the share that each basis vector has of it; where it is rounding, only its length."""
        if length * float(g.norm()) > self.least:
            self.open.append((r, g))
        else:
            self.dropped += length * g.abs()

    def _fresh(self) -> Tensor:
        """A random unit vector outside the basis and the null space."""
        return self._unit(normal((self.A.dim,), self.g, self.V))

    def _unit(self, v: Tensor) -> Tensor:
        v, norm, _ = orthogonalized(v, self.V[: self.size], self.null)
        return (v / norm).to(v.dtype)

    def _decompose(self) -> tuple[Floats, Floats, list[int]]:
        """Ritz values, vectors and the positions of the wanted ones, best first."""
        with one_blas_thread(self.size):
            values, vectors = np.linalg.eigh(self.H[: self.size, : self.size].cpu().numpy())
        descending = list(range(self.size))[::-1]
        return values, vectors, descending[: self.upper] + descending[::-1][: self.k - self.upper]

    def _coefficients(self, vectors: Floats, chosen: list[int]) -> Tensor:
        return torch.as_tensor(vectors[:, chosen].copy(), device=self.V.device)

    def _shares(self, Y: Tensor) -> Tensor:
        """`(c, k)`: how much of each open residual a Ritz pair has."""
        return (torch.stack([g[: self.size] for _, g in self.open]) if self.open else self.H[:0, : self.size]) @ Y

    def _residuals(self, Y: Tensor) -> Tensor:
        """The vectors `A x - theta x` of Ritz pairs, as rows."""
        rows = torch.stack([r for r, _ in self.open]) if self.open else self.V[:0]
        return self._shares(Y).T.to(rows.dtype) @ rows

    def _residual_norms(self, Y: Tensor) -> Tensor:
        if len(self.open) == 1:
            return self._shares(Y)[0].abs() * length(self.open[0][0])
        norms: Tensor = torch.linalg.vector_norm(self._residuals(Y), dim=1, dtype=torch.float64)
        return norms

    def _settled(self) -> bool:
        """Whether the wanted pairs meet the tolerance, and the multiplicity check that goes on has been long enough."""
        if self.size < self.k or self.matvecs < self.verify_until:
            return False
        values, vectors, wanted = self._decompose()
        residuals = self._residual_norms(self._coefficients(vectors, wanted)).cpu().numpy()
        return bool(np.all(residuals <= self._tolerance(values[wanted], self.least)))

    @property
    def noise(self) -> float:
        """What products are certain to."""
        return self.rounding * self.scale

    @property
    def least(self) -> float:
        """Residuals below it are rounding of the search's own arithmetic."""
        return self.own_rounding * self.scale

    def _tolerance(self, values: Floats, least: float) -> Floats:
        tolerance: Floats = 0.9 * np.maximum(self.tol * np.abs(values), least)  # what is reported is rounded too
        return tolerance

    def _confirmed(self) -> bool:
        """Whether a check from another start left the wanted values as they were; if not, say how long the next is.

        One start vector meets one copy of a repeated eigenvalue.
        """
        values, vectors, wanted = self._decompose()
        found, seen = values[wanted], self.seen
        if not self.verify or (
            seen is not None and bool(np.all(np.abs(found - seen) <= 2 * self._tolerance(found, self.noise)))
        ):
            return True
        self.seen = found
        self.longest_verification = self.longest_verification or max(_LEAST_VERIFICATION, self.matvecs // 2)
        rest = [i for i in range(self.size) if i not in wanted]
        norms = self.H.new_tensor([float(r.norm()) for r, _ in self.open])
        spread = (norms @ self._shares(self._coefficients(vectors, rest)).abs()).cpu().numpy()
        low, high = values[rest] - spread, values[rest] + spread
        sizes = (self.A.dim, self.tol, self.noise)
        need = max(
            products_that_show(found[: self.upper], low, high, *sizes),
            products_that_show(-found[self.upper :], -high, -low, *sizes),
        )
        self.verify_until = self.matvecs + int(min(need, self.longest_verification))
        return False

    def _verify(self) -> None:
        """Go on in a random direction."""
        if self.size + self.verify_until - self.matvecs < self.width:
            self.V[self.size] = self._fresh()
            self.chain = False
        else:
            self._restart(self._fresh())

    def _next_direction(self) -> Tensor:
        """The residual of the worst wanted pair; while they all are converged, the direction of the search."""
        values, vectors, wanted = self._decompose()
        Y = self._coefficients(vectors, wanted)
        excess = self._residual_norms(Y).cpu().numpy() - self._tolerance(values[wanted], self.least)
        worst = int(excess.argmax())
        if excess[worst] <= 0 or len(self.open) == 1:
            return self.V[self.size].clone()
        return self._unit(self._residuals(Y[:, worst : worst + 1])[0])

    def _restart(self, following: Tensor) -> None:
        """Keep the wanted Ritz vectors and their neighbours, and go on in the direction given."""
        values, vectors, wanted = self._decompose()
        keep = min(self.k + max(4, (self.width - self.k) // 3), self.size, self.width - 1)
        order = {"largest": list(range(self.size))[::-1], "smallest": list(range(self.size))}.get(self.which)
        if order is None:
            half = keep // 2
            order = list(range(half)) + list(range(half, self.size))[::-1]
        chosen = wanted + [i for i in order if i not in wanted][: keep - len(wanted)]
        Y, size = self._coefficients(vectors, chosen), len(chosen)
        turn = Y.to(self.V.dtype).T
        for start in range(0, self.A.dim, _COLUMNS):  # no second basis in memory
            part = slice(start, start + _COLUMNS)
            self.V[:size, part] = turn @ self.V[: self.size, part]
        # Lengths would drift over hundreds of restarts.
        self.V[:size] /= self.V[:size].norm(dim=1, keepdim=True)
        self.H.zero_()
        self.H[:size, :size] = torch.diag(torch.as_tensor(values[chosen].copy(), device=self.H.device))
        self.open = [(r, self._turned(Y.T, g)) for r, g in self.open]
        self.dropped = self._turned(Y.T.abs(), self.dropped)
        self.size, self.chain = size, False
        self.V[self.size] = following

    def _turned(self, turn: Tensor, g: Tensor) -> Tensor:
        """The shares of new basis vectors."""
        new = torch.zeros_like(g)
        new[: len(turn)] = turn @ g[: self.size]
        return new


#: The chance that a multiplicity check misses a copy, by Chebyshev's bound.
OVERLOOKED = 1e-3


def products_that_show(levels: Floats, low: Floats, high: Floats, dim: int, tol: float, noise: float) -> float:
    """Products after which a random direction shows a further copy of a wanted value, but for a rare chance.

    The hardest to see is a copy of the last wanted value but one; one of the last itself changes no value. A Chebyshev
    polynomial of degree `d` for the other eigenvalues enlarges the direction's part along the copy, which is less than
    `delta / sqrt(n)` with probability `delta sqrt(2 / pi)`, `cosh(d acosh(1 + 2 gap / width))` times; a Rayleigh
    quotient above the last wanted value then shows it.

    Args:
        levels: the wanted values of an upper end, largest first.
        low, high: between which each of the other eigenvalues lies.
        dim: `n`.
        tol: what counts as a difference, relative to a wanted value.
        noise: what counts as one at all.

    Returns:
        The number of products; infinite where the copy would not stand out.

    Example:
        >>> import numpy as np
        >>> products_that_show(np.array([9.0, 8.0, 7.0]), np.array([0.0]), np.array([1.0]), 10**5, 1e-3, 1e-12)
        6.0
    """
    if levels.size < 2:
        return 0.0
    level, last = float(levels[-2]), float(levels[-1])
    gap = level - float(high.max(initial=-math.inf))
    if low.size == 0 or gap <= 0:
        return math.inf
    least = float(low.min())
    above = max(level - last, tol * abs(level), noise)
    if above <= 0:
        return math.inf
    delta = OVERLOOKED * math.sqrt(math.pi / 2)
    wanted = math.sqrt(dim * max(last - least, above) / above) / delta
    width = max(float(high.max()) - least, 1e-6 * gap)
    return 1.0 + math.ceil(math.acosh(wanted) / math.acosh(1 + 2 * gap / width))
