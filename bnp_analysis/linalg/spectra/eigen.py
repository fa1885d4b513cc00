"""A few eigenpairs by thick-restart Lanczos."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.bases import project_out
from bnp_analysis.linalg.krylov.thick_restart import ThickRestart
from bnp_analysis.linalg.matrices import Columns
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.preconditioner import Congruence, Preconditioner
from bnp_analysis.linalg.scale import comfortable, exponent, in_floats, require_resolution, scaled, times_power
from bnp_analysis.linalg.spectra.checks import (
    NORM_STEPS,
    HasBasis,
    left_of,
    measured,
    products_known_to,
    provenance,
    rounding_at,
    rounding_of_sums,
)
from bnp_analysis.results import Result
from bnp_analysis.runtime.files import saved_run
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.progress import Progress

WHICH = ("largest", "smallest", "both")


@dataclass(frozen=True, kw_only=True, repr=False)
class Eigenpairs(Result):
    """Eigenvalues with their vectors and residuals.

    Attributes:
        values: `(k,)` float64, in the order asked for: largest first, or smallest first.
        vectors: `(n, k)`, orthonormal, in the coordinates of the operator measured (`z` with a preconditioner).
        residuals: `(k,)` float64, `|A y - theta y|`: some eigenvalue lies within it of each value (T13). They include
            the rounding of products and vectors, `sqrt(min(n, 1000)) eps |A|`, and at least `4 eps |A|`.
        converged: how many pairs meet the tolerance.
        stop: `"converged"` (and, unless `multiplicity="trust"`, a multiplicity check from another start found no
            further copies of repeated eigenvalues), `"steps"`, `"interrupted"`, or `"rounding"` where products are too
            noisy for the tolerance.
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
        return f"{self.which} eigenvalues {shown}; {done}, {self.matvecs} products{products_known_to(self)}"

    def records(self) -> list[dict[str, object]]:
        """One row per eigenvalue."""
        pairs = zip(self.values.tolist(), self.residuals.tolist(), strict=True)
        return [{"index": i, "eigenvalue": v, "residual": r} for i, (v, r) in enumerate(pairs)]


@full_float32
@gated
def eigenpairs(
    A: SymmetricOperator,
    k: int = 10,
    *,
    which: str = "largest",
    preconditioner: Preconditioner | None = None,
    null: Tensor | HasBasis | None = None,
    tol: float = 1e-6,
    max_matvecs: int = 1000,
    multiplicity: str = "verify",
    start: Tensor | str = "auto",
    checkpoint: str | Path | None = None,
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
        tol: in (0, 1); a pair is converged when its residual is at most `max(tol |theta|, c eps |theta|_max)`.
        max_matvecs: where the search gives up; what was reached is returned and says so.
        multiplicity: `"verify"`: once all have converged, go on in a random direction, which has a part along further
            copies of repeated eigenvalues, until one would have shown (chance of overlooking it 1e-3) but at most half
            as long as the search was. `"trust"`: a single start vector sees one copy of each; take the caller's word
            that it is the only one.
        start: `(n,)`, rich in the vectors that are wanted, in the coordinates of the operator measured; a random vector
            of the same length is added, so that no eigenvector is missed for it. `(n, b)`: several, for instance the
            `vectors` of a search at a point nearby; the random vector is added to the last one, the search begins with
            the products of all of them and goes on from the worst pair's residual. `"auto"`: for the largest ones what
            the operator proposes, if anything: curvature of a risk the risk's gradient, after training rich in the top
            eigenvectors, which costs one gradient or, where its graph is kept, nothing. `"random"`: no more than that.
        checkpoint: a file written every 50 products or 30 seconds, at the end and on Ctrl-C, and resumed from when it
            exists.
        seed: of the random start.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        `Eigenpairs`. Residuals follow from the products made, with what these contradict one another by, and are
        recomputed by one product each where that is more than a tenth of them and of what is asked for.

    Raises:
        InvalidInputError: `k` or `which` do not fit; NullSpaceError: declared directions that are not null;
        NonFiniteError: a product with NaN or infinity.

    Source: Wu and Simon 2000 (thick restart); T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(torch.arange(1.0, 51.0, dtype=torch.float64)))
        >>> [round(v, 6) for v in bnp.eigenpairs(A, k=2).values.tolist()]
        [50.0, 49.0]
    """
    if which not in WHICH:
        raise InvalidInputError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    operator, declared = measured(A, preconditioner, null, seed)
    operator = scaled(operator)
    if multiplicity not in ("verify", "trust"):
        raise InvalidInputError(f"multiplicity must be 'verify' or 'trust', got {multiplicity!r}")
    room = A.dim - declared.dim
    if not 1 <= k <= room:
        raise InvalidInputError(f"k={k} eigenpairs asked of an operator with {room} dimensions outside the null space")
    began = time.perf_counter()
    require_resolution(operator, min(A.dim, 1000))
    begin, origin = _start(start, A.dtype, operator, which, declared.basis)
    search = ThickRestart(operator, declared.basis, k, which, tol, seed, multiplicity == "verify", begin)
    key = f"the {k} {which} eigenpairs of dimension {A.dim} in {A.dtype}, {declared.dim} null directions, seed {seed}"
    key += "" if begin is None else f", started from {origin}"
    with saved_run(checkpoint, key) as saved:
        saved.restore(search.restore)
        search.run(max_matvecs, progress, saved)
    values, vectors, residuals, dropped = search.wanted_pairs()
    spent = search.matvecs + search.checks + declared.cost
    residuals, asked, unknown = residuals.cpu(), tol * values.abs(), dropped.cpu() + search.drift
    if search.stop != "interrupted" and bool((unknown > torch.maximum(residuals, asked) / 10).any()):
        residuals = (operator @ vectors - vectors * values.to(vectors)).double().norm(dim=0).cpu()
        spent, unknown = spent + k, 0 * unknown
    done = residuals <= asked.clamp(min=search.noise)
    residuals = residuals + unknown
    # The products, the basis and the vectors made of it are rounded; one number that is given is not.
    if A.dim > 1 or operator.eps > torch.finfo(operator.dtype).eps:
        residuals = residuals + max(search.noise / 10, 4 * operator.eps * search.scale)
    rounded, extra = rounding_of_sums(operator, seed)
    residuals, spent = residuals + math.sqrt(A.dim) * rounded, spent + extra
    if isinstance(operator, Congruence):
        if declared.dim:
            residuals, spent = residuals + left_of(operator, declared.basis), spent + declared.combined
        residuals, spent = residuals + rounding_at(operator, values, vectors, seed), spent + 2 * NORM_STEPS
    power = -exponent(operator)
    in_floats(float(values.abs().max()), power, "the largest of the eigenvalues asked for")
    if power:  # an error may be too small for a float, but is not zero
        values, residuals = times_power(values, power), times_power(residuals, power).clamp(min=math.ulp(0.0))
    settings = {
        "k": k,
        "which": which,
        "tol": tol,
        "max_matvecs": max_matvecs,
        "multiplicity": multiplicity,
        "start": origin,
    }
    return Eigenpairs(
        values=values,
        vectors=vectors.cpu(),
        residuals=residuals,
        which=which,
        converged=int(done.sum()),
        stop="rounding" if search.stop == "converged" and not bool(done.all()) else search.stop,
        matvecs=spent,
        **provenance(A, preconditioner, settings, seed, began),
    )


def _start(
    start: Tensor | str, dtype: torch.dtype, operator: SymmetricOperator, which: str, null: Columns
) -> tuple[Tensor | None, str]:
    """The vector a search begins with beside a random one, and in words where it comes from."""
    if isinstance(start, str):
        if start not in ("auto", "random"):
            raise InvalidInputError(f"start must be 'auto', 'random' or a tensor ({operator.dim},), got {start!r}")
        proposed = operator.start if start == "auto" and which == "largest" else None
        # At a minimum the gradient is zero.
        usable = proposed is not None and _has_part_outside(proposed, null)
        return (proposed, "what the operator proposes, and random") if usable else (None, "random")
    if isinstance(start, Tensor) and start.dtype == dtype:
        start = start.to(operator.dtype)
    _require_start(start, operator, null)
    return comfortable(start)[0], "given, and random"


def _has_part_outside(start: Tensor, null: Columns) -> bool:
    inside = float(project_out(start.double().unsqueeze(1), null.to(torch.float64)).norm())
    return 0 < inside < math.inf and inside > 1e-6 * float(start.double().norm())


def _require_start(start: Tensor, operator: SymmetricOperator, null: Columns) -> None:
    """Refuse a start of another size, dtype or device, or with nothing in the space that is searched."""
    if (
        not isinstance(start, Tensor)
        or start.ndim not in (1, 2)
        or start.shape[0] != operator.dim
        or not 0 < start.numel() <= operator.dim**2
    ):
        shape = tuple(start.shape) if isinstance(start, Tensor) else type(start).__name__
        raise InvalidInputError(
            f"start must be 'auto', 'random' or a tensor ({operator.dim},), got {shape}; several are "
            f"({operator.dim}, b)"
        )
    if start.dtype != operator.dtype or start.device != operator.device:
        raise InvalidInputError(
            f"start is in {start.dtype} on {start.device}, the operator in {operator.dtype} on {operator.device}; "
            "convert it with .to(...)"
        )
    columns = start.view(operator.dim, -1).unbind(dim=1)
    if not all(_has_part_outside(column, null) for column in columns):
        raise InvalidInputError(
            "start is zero, not finite or a null direction, so there would be nothing to search from; leave it out "
            "for a random one"
        )
