"""The condition profile: how the ratio of the largest eigenvalue to the r-th grows with r, as intervals (T13)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.condition.certificates import require_probability, zero_operator
from bnp_analysis.linalg.condition.methods import Problem, candidates, first_that_fits, named, registered
from bnp_analysis.linalg.condition.number import Magnitudes
from bnp_analysis.linalg.krylov.lanczos import Floats
from bnp_analysis.linalg.operators import SymmetricOperator, computed_in
from bnp_analysis.linalg.preconditioner import Preconditioner, check_fits
from bnp_analysis.linalg.scale import in_floats
from bnp_analysis.linalg.spectra.checks import HasBasis, products_known_to, provenance, read_null, require_operator
from bnp_analysis.results import Result
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.progress import Progress

_LADDER = (2, 5, 10, 20, 50, 100, 200, 500)
# A rank whose eigenvalue is known to no better than this factor is left out.
_KNOWN = 2.0


@dataclass(frozen=True, kw_only=True, repr=False)
class ConditionProfile(Result):
    """The ratios `lambda_1 / lambda_r` of a matrix for a ladder of ranks `r`, each an interval.

    Attributes:
        ranks: `(k,)` int64, ascending; a rank whose eigenvalue is not known to within a factor of 2 is left out.
        value, lower, upper: `(k,)` float64, the ratio at each rank and bounds that hold for that very rank.
        lambda_max, lambda_max_lower, lambda_max_upper: the largest `|lambda|` and its bounds.
        rank: the number of nonzero eigenvalues where it is certain, so that the last ratio is `kappa*`; else None.
        effective_rank, effective_rank_error: `trace / lambda_1`, and its standard error (0 for a dense matrix); no
            rank where eigenvalues are negative.
        thresholds: `(t,)` float64, fractions of `lambda_1`.
        at_least, at_most: `(t,)` int64, bounds of the number of eigenvalues whose size is at least that fraction of
            `lambda_1`; `at_most` is the dimension where no bound is known.
        negative: how many of the eigenvalues looked at are negative; the ratios are then those of magnitudes.
        method: its name, as in `methods(A)`.
        failure_probability: of all bounds together, over random starts; 0 for a dense matrix.
        dim, dtype, stop: size, precision of the products, why the run ended; `"memory"` where it would have gone for
            more ranks with more of it.
    """

    ranks: NDArray[np.int64]
    value: Floats
    lower: Floats
    upper: Floats
    lambda_max: float
    lambda_max_lower: float
    lambda_max_upper: float
    rank: int | None
    effective_rank: float
    effective_rank_error: float
    thresholds: Floats
    at_least: NDArray[np.int64]
    at_most: NDArray[np.int64]
    negative: int
    method: str
    failure_probability: float
    dim: int
    dtype: str
    stop: str

    def summary(self) -> str:
        """One line: three ratios, the effective rank, how it is known."""
        name = "|lambda|_1/|lambda|_r" if self.negative else "lambda_1/lambda_r"
        chosen = sorted({0, (len(self.ranks) - 1) // 2, len(self.ranks) - 1}) if len(self.ranks) else []
        ratios = ", ".join(
            f"{self.value[i]:.4g} ({self.lower[i]:.4g} .. {self.upper[i]:.4g}) at rank {self.ranks[i]}" for i in chosen
        )
        last = " = kappa*" if self.rank is not None and len(self.ranks) and self.ranks[-1] == self.rank else ""
        error = f" +- {self.effective_rank_error:.2g}" if self.effective_rank_error else ""
        share = "trace/lambda_1" if self.negative else "effective rank"
        chance = f", fails with probability <= {self.failure_probability:g}" if self.failure_probability else ""
        chance += ", fewer ranks than usual for lack of memory" if self.stop == "memory" else ""
        return (
            f"{name} = {ratios or 'not known at any rank'}{last}; {share} {self.effective_rank:.4g}{error}; "
            f"{self.method} {self.dtype}, {self.matvecs} products{products_known_to(self)}{chance}"
        )

    def records(self) -> list[dict[str, object]]:
        """One row per rank."""
        columns = zip(self.ranks.tolist(), self.value, self.lower, self.upper, strict=True)
        known = {"two_sided": True, "method": self.method}
        return [{"rank": r, "value": float(v), "lower": float(a), "upper": float(b)} | known for r, v, a, b in columns]

    def __str__(self) -> str:
        """The summary, and a table of the ranks."""
        return f"{self._line()}\n{self.table()}" if len(self.ranks) else self._line()

    def cells(self) -> list[dict[str, object]]:
        """One row per rank, as it is printed."""
        name = "|lambda|_1/|lambda|_r" if self.negative else "lambda_1/lambda_r"
        return [
            {
                "rank": f"{row['rank']} (kappa*)" if row["rank"] == self.rank else row["rank"],
                name: f"{row['value']:.4g}",
                "at least": f"{row['lower']:.4g}",
                "at most": f"{row['upper']:.4g}",
            }
            for row in self.records()
        ]


@full_float32
@gated
def condition_profile(
    A: SymmetricOperator,
    *,
    preconditioner: Preconditioner | None = None,
    null: Tensor | HasBasis | None = None,
    ranks: Sequence[int] | None = None,
    steps: int | None = None,
    method: str = "auto",
    thresholds: Sequence[float] = (1e-2, 1e-4, 1e-6),
    probes: int = 16,
    failure_probability: float = 1e-3,
    seed: int = 0,
    progress: Progress = False,
) -> ConditionProfile:
    """The ratios `lambda_1 / lambda_r` of `P^T A P` for a ladder of ranks `r`, each with bounds, at any size.

    The last ratio of all, `kappa*`, is often beyond double precision, and out of reach of a Krylov method; how the
    ratio grows with the rank is neither. For an indefinite operator the ratios are those of magnitudes.

    Args:
        A: symmetric operator on `R^n`.
        preconditioner: `P` with `theta = P z`; the operator measured is `P^T A P`.
        null: known null directions in the coordinates of `A`; zero eigenvalues have no rank in any case, declared ones
            need not be found.
        ranks: which, integers from 2 to `n`; default 2, 5, 10, 20, 50, 100 with Lanczos, up to the rank of a dense
            matrix.
        steps: of Lanczos, default three for each rank, at least 100.
        method: `"auto"`: a dense matrix where `condition_number` would take one, else Lanczos; or any registered method
            that bounds every rank: `"factor-svd"`, `"dense"`, `"lanczos"`.
        thresholds: fractions of `lambda_1` for which eigenvalues are counted.
        probes: random vectors for the part of the trace that Lanczos has not resolved, at least 2.
        failure_probability: of all bounds together, where they rest on random starts.
        seed: of the random starts.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `ConditionProfile`. Ranks that are not reached are left out.

    Raises:
        InvalidInputError: ranks or thresholds that do not fit, an unknown method, a zero operator; NullSpaceError,
        NonFiniteError, MemoryLimitError: as for `condition_number`.

    Source: T13; Cauchy's interlacing and the theorem of Courant and Fischer; Kuczynski and Wozniakowski 1992.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.diag(0.5 ** torch.arange(40, dtype=torch.float64)))
        >>> profile = bnp.condition_profile(A, ranks=[2, 3, 11], method="lanczos")
        >>> [round(x, 6) for x in profile.value.tolist()]
        [2.0, 4.0, 1024.0]
        >>> bool((profile.lower <= profile.value).all() and (profile.value <= profile.upper).all())
        True
    """
    require_operator(A)
    require_probability(failure_probability)
    if probes < 2:
        raise InvalidInputError(f"an error bar needs at least two probes, got {probes}")
    if not all(0 < t <= 1 for t in thresholds):
        raise InvalidInputError(f"thresholds are fractions of the largest eigenvalue, in (0, 1], got {thresholds}")
    if preconditioner is not None:
        check_fits(A, preconditioner)
    began = time.perf_counter()
    wanted = _ladder(ranks, A.dim)
    tried = candidates(A, magnitudes=True) if method == "auto" else [named(method)]
    if tried[0].magnitudes is None:
        able = ", ".join(["auto", *(known.name for known in registered() if known.magnitudes)])
        raise InvalidInputError(
            f"{method} bounds the ends of a spectrum only, a profile needs every rank; method must be one of {able}"
        )
    problem = Problem(
        A=A,
        P=preconditioner,
        null=read_null(null, A),
        steps=steps,
        count=max(wanted, default=None),
        probes=probes,
        failure_probability=failure_probability,
        seed=seed,
        progress=progress,
    )
    chosen, found = first_that_fits(tried, lambda method: method.magnitudes(problem) if method.magnitudes else None)
    assert found is not None
    if not found.value.size or not found.lower[0] > 0:
        raise zero_operator(A, preconditioner)
    return _profile(
        found,
        wanted,
        thresholds=np.array(sorted(thresholds, reverse=True)),
        method=chosen.name,
        dim=A.dim,
        dtype=computed_in(A),
        **provenance(
            A,
            preconditioner,
            {"ranks": wanted or None, "steps": steps, "method": method, "probes": probes}
            | {"failure_probability": failure_probability},
            seed,
            began,
        ),
    )


def _ladder(ranks: Sequence[int] | None, dim: int) -> list[int]:
    if ranks is None:
        return []
    ranks = list(ranks)
    wrong = [r for r in ranks if isinstance(r, bool) or not isinstance(r, int | np.integer) or not 2 <= r <= dim]
    if wrong or not ranks:
        raise InvalidInputError(
            f"ranks must be integers from 2 to the dimension {dim}, got {wrong or 'none'}; leave them out for a ladder"
        )
    return sorted({int(r) for r in ranks})


def _profile(found: Magnitudes, wanted: list[int], *, thresholds: Floats, **about: Any) -> ConditionProfile:
    reached = np.flatnonzero((found.lower > 0) & (found.upper <= _KNOWN * found.lower)) + 1
    ladder = wanted or [*_LADDER, *(10**k * m for k in range(3, 8) for m in (1, 2, 5))]
    if found.rank is not None and not wanted:
        ladder = [*(r for r in ladder if r < found.rank), found.rank]
    known = set(reached.tolist())
    ranks = np.array([r for r in ladder if r in known and r > 1], dtype=np.int64)
    top, bottom, first = found.upper[0], found.lower[0], found.value[0]
    with np.errstate(divide="ignore", invalid="ignore"):
        lower = np.maximum(bottom / found.upper[ranks - 1], 1.0)
        upper = top / found.lower[ranks - 1]
        value = np.clip(first / found.value[ranks - 1], lower, upper)
    sure = [int((found.lower >= t * top).sum()) for t in thresholds]
    most = [int((found.upper >= t * bottom).sum()) if found.rest < t * bottom else about["dim"] for t in thresholds]
    return ConditionProfile(
        ranks=ranks,
        value=value,
        lower=lower,
        upper=upper,
        lambda_max=in_floats(float(first), found.exponent, "the largest eigenvalue"),
        lambda_max_lower=in_floats(float(bottom), found.exponent, "the largest eigenvalue"),
        lambda_max_upper=in_floats(float(top), found.exponent, "the largest eigenvalue"),
        rank=found.rank,
        effective_rank=found.trace / float(first),
        effective_rank_error=found.trace_error / float(first),
        thresholds=thresholds,
        at_least=np.array(sure, dtype=np.int64),
        at_most=np.array(most, dtype=np.int64),
        negative=found.negative,
        failure_probability=found.failure_probability,
        stop=found.stop,
        matvecs=found.matvecs,
        **about,
    )
