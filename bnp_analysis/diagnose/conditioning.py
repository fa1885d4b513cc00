"""`condition`: how well conditioned a network's loss is and what a preconditioner does to it, in one call."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bnp_analysis.curvature import CURVATURES
from bnp_analysis.curvature.engines import curvature_names
from bnp_analysis.diagnose.blocks import held, known_null, measured
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import ConditionProfile, Preconditioner, condition_profile
from bnp_analysis.linalg.condition.methods import Method, candidates, first_that_fits, named
from bnp_analysis.linalg.spectra.checks import HasBasis
from bnp_analysis.network import EmpiricalRisk
from bnp_analysis.precondition import NetworkPreconditioner, bnp_preconditioner
from bnp_analysis.results import Result
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.kinds import gated, require_kind
from bnp_analysis.runtime.progress import Progress

_IN_WORDS = {
    "gauss_newton": "Gauss-Newton matrix",
    "hessian": "Hessian",
    "fisher_mc": "Fisher matrix of sampled targets",
    "fisher_empirical": "empirical Fisher matrix",
}
_COLUMNS = ("value", "lower", "upper", "two_sided", "method")
# Products, and operations of dense algebra, without and with P each, that keep the whole call to a minute of two cores.
_PRODUCTS, _WORK = 1_500, 4e11


@dataclass(frozen=True, kw_only=True, repr=False)
class Conditioning(Result):
    """Condition profiles of one curvature matrix without and with a preconditioner, and what lies between them.

    Attributes:
        without_P, with_P: their `ConditionProfile`s; `with_P` is None where there is no preconditioner.
        ranks: `(k,)` the ranks that both know.
        gain, gain_lower, gain_upper: `(k,)` the ratio `lambda_1 / lambda_r` without `P` over the one with `P`: above 1
            the preconditioner has made it smaller.
        matrix: the curvature matrix in words.
        preconditioner: its name, `"none"` where there is none.
        block: the layer, or the whole network where it is None.
        dim, examples: numbers of parameters and of examples.
        null_sources: known null directions by cause, where they were looked for.
        uncovered: parameters that `P` leaves as they are, with the reason.
    """

    without_P: ConditionProfile
    with_P: ConditionProfile | None
    ranks: NDArray[np.int64]
    gain: NDArray[np.float64]
    gain_lower: NDArray[np.float64]
    gain_upper: NDArray[np.float64]
    matrix: str
    preconditioner: str
    block: str | None
    dim: int
    examples: float
    null_sources: Mapping[str, int]
    uncovered: Mapping[str, str]

    def summary(self) -> str:
        """A paragraph: what was measured, the ratios without and with `P`, the gain, how certain, what `P` leaves."""
        where = "the whole network" if self.block is None else f"layer {self.block}"
        text = [
            f"{self.matrix} of {where}: {self.dim:,} parameters, {self.examples:,.0f} examples.",
            _sentence(self.without_P, "Without a preconditioner"),
        ]
        if self.with_P is not None:
            text.append(_sentence(self.with_P, f"With {self.preconditioner}"))
        if len(self.ranks):
            r, g, a, b = self.ranks[-1], self.gain[-1], self.gain_lower[-1], self.gain_upper[-1]
            verb = "smaller" if a > 1 else "larger" if b < 1 else "neither certainly smaller nor larger"
            text.append(f"At rank {r} the ratio has become {verb}: by a factor of {g:.4g} ({a:.4g} .. {b:.4g}).")
        chance = max(p.failure_probability for p in (self.without_P, self.with_P) if p is not None)
        text.append(
            f"The intervals hold except with probability {chance:g}."
            if chance
            else "The intervals are certain and include rounding errors."
        )
        if last := _what_is_missing([p for p in (self.without_P, self.with_P) if p is not None]):
            text.append(last)
        if self.uncovered:
            names = ", ".join(list(self.uncovered)[:3]) + (", ..." if len(self.uncovered) > 3 else "")
            text.append(f"{self.preconditioner} leaves as they are: {names}.")
        return " ".join(text)

    def records(self) -> list[dict[str, object]]:
        """One row per rank that one of the profiles knows: floats, NaN where a profile or the gain is not known."""
        sides = [("", self.without_P), ("_with_P", self.with_P)]
        rows: dict[int, dict[str, object]] = {}
        for suffix, profile in sides:
            for row in [] if profile is None else profile.records():
                rank = int(str(row["rank"]))
                rows.setdefault(rank, {"rank": rank}).update({f"{k}{suffix}": row[k] for k in _COLUMNS})
        for r, *gain in zip(self.ranks.tolist(), self.gain, self.gain_lower, self.gain_upper, strict=True):
            rows[r] |= dict(zip(("gain", "gain_lower", "gain_upper"), map(float, gain), strict=True))
        head = [f"{k}{s}" for s, p in sides if p is not None for k in _COLUMNS]
        head += ["gain", "gain_lower", "gain_upper"] if self.with_P is not None else []
        lacks = {"method": "", "two_sided": False}
        return [
            {"rank": r} | {k: rows[r].get(k, lacks.get(k.removesuffix("_with_P"), math.nan)) for k in head}
            for r in sorted(rows)
        ]

    def cells(self) -> list[dict[str, object]]:
        """The same as a reader's table: `value (lower .. upper)` without and with `P`, and the gain."""
        found: list[dict[str, object]] = []
        columns = {"": "without P", "_with_P": "with P"} if self.with_P is not None else {"": "without P"}
        for row in self.records():
            kappa = [p.rank for p in (self.without_P, self.with_P) if p is not None and p.rank is not None]
            name = f"{row['rank']} (kappa*)" if row["rank"] in kappa else str(row["rank"])
            shown: dict[str, object] = {"rank": name}
            shown |= {words: _interval(row, "value", s) for s, words in columns.items()}
            found.append(shown | ({"gain": _interval(row, "gain", "")} if self.with_P is not None else {}))
        return found


@full_float32
@gated
def condition(
    risk: EmpiricalRisk,
    *,
    curvature: str = "gauss_newton",
    block: str | None = None,
    preconditioner: NetworkPreconditioner | str | None = "bnp",
    null: Tensor | HasBasis | str | None = "auto",
    method: str = "auto",
    steps: int | None = None,
    dtype: torch.dtype | None = torch.float64,
    engine: str = "auto",
    max_memory: int | None = None,
    seed: int = 0,
    progress: Progress = False,
) -> Conditioning:
    """How well conditioned the loss is, without and with a preconditioner: `lambda_1 / lambda_r` with bounds.

    Operator, known null directions and the block of `P` are cut alike.

    Args:
        risk: the empirical risk.
        curvature: `"gauss_newton"`, `"hessian"` (ratios of magnitudes), `"fisher_mc"` or `"fisher_empirical"`.
        block: a layer's name, for its own block; default the whole network.
        preconditioner: `"bnp"`, the undamped one of this risk; any preconditioner over `risk.space`; None for none.
        null: known null directions; `"auto"` looks for them where they decide something: for a dense matrix. Or
            a tensor `(n, r)`, an object with `.basis`, None.
        method, steps: as for `condition_profile`; `"auto"` takes dense algebra only where it ends soon.
        dtype: in which to measure, on the CPU; None for the risk's own.
        engine, max_memory: of operators, as in `hessian`.
        seed: of random starts and sampled targets.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `Conditioning`; it reads as a paragraph, `records()` gives numbers, `plot_profile` draws it.

    Raises:
        InvalidInputError: an unknown curvature, layer or preconditioner, or no layer that BNP covers.

    Source: T1, T2, T13.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> x, y = torch.rand(30, 4, generator=torch.Generator().manual_seed(0)) + 3, torch.arange(30) % 2
        >>> risk = bnp.EmpiricalRisk(bnp.models.mlp([4, 3, 2]), torch.nn.functional.cross_entropy, (x, y))
        >>> found = bnp.condition(risk)
        >>> found.without_P.rank == found.with_P.rank, bool(found.gain_lower[-1] > 1)
        (True, True)
    """
    began = time.perf_counter()
    (name,) = curvature_names(curvature)
    risk = measured(risk, dtype, "ratios of eigenvalues")
    P, label, uncovered = _preconditioner(risk, preconditioner, dtype)
    A = CURVATURES[name](risk, seed=seed, block=block, engine=engine, max_memory=max_memory)
    own: Preconditioner | None = P if P is None or block is None else P.block(block)
    if isinstance(null, str) and null != "auto":
        raise InvalidInputError(f"null must be 'auto', a tensor (n, r), null directions or None, got {null!r}")

    def found(chosen: Method) -> tuple[list[ConditionProfile], Tensor | HasBasis | None, int]:
        # Rows that are formed anyway are formed once: for the null directions, without and with P.
        stored = A if A.factor is None or not chosen.decides else held(A, A.factor)
        formed = 0 if A.factor is None or stored is A else A.factor.dense_cost
        known = None if isinstance(null, str) else null
        if isinstance(null, str) and chosen.decides:
            # What annihilates the outputs' derivatives is null for every semidefinite curvature.
            own_null = "gauss_newton" if A.semidefinite else name
            rows = stored.factor if name == "gauss_newton" else None
            known = known_null(risk, block, rows, curvature=own_null)
        profiles = [
            condition_profile(
                stored, preconditioner=p, null=known, method=chosen.name, steps=steps, seed=seed, progress=progress
            )
            for p in ([None] if own is None else [None, own])
        ]
        return profiles, known, formed

    tried = candidates(A, magnitudes=True, products=_PRODUCTS, flops=_WORK) if method == "auto" else [named(method)]
    profiles, known, formed = first_that_fits(tried, found)[1]
    plain, other = profiles[0], profiles[1] if own is not None else None
    ranks, gain = _gain(plain, other)
    return Conditioning(
        without_P=plain,
        with_P=other,
        ranks=ranks,
        gain=gain[0],
        gain_lower=gain[1],
        gain_upper=gain[2],
        matrix=_IN_WORDS.get(name, f"{name} matrix"),
        preconditioner=label,
        block=block,
        dim=A.dim,
        examples=float(risk.batches.total),
        null_sources={} if known is None or isinstance(known, Tensor) else dict(known.sources),
        uncovered=uncovered,
        settings={"curvature": name, "block": block, "preconditioner": label, "method": method, "steps": steps},
        engine=risk.provenance,
        seed=seed,
        matvecs=formed + sum(p.matvecs for p in profiles),
        seconds=time.perf_counter() - began,
    )


def _preconditioner(
    risk: EmpiricalRisk, given: NetworkPreconditioner | str | None, dtype: torch.dtype | None
) -> tuple[NetworkPreconditioner | None, str, Mapping[str, str]]:
    """The preconditioner, its name, and what it leaves as it is."""
    if given is None:
        return None, "none", {}
    if isinstance(given, str):
        if given != "bnp":
            raise InvalidInputError(
                f"preconditioner must be 'bnp', a preconditioner over risk.space or None, got {given!r}; "
                "bnp.kfac_preconditioner(risk), for example, makes one"
            )
        bnp = bnp_preconditioner(risk)
        return bnp, "BNP", dict(bnp.uncovered)
    require_kind(given, "preconditioner", Preconditioner)
    P = given if dtype is None else given.to(dtype, "cpu")
    return P, type(P).__name__.removesuffix("Preconditioner"), dict(getattr(P, "uncovered", {}))


def _interval(row: Mapping[str, Any], name: str, suffix: str) -> str:
    lower, upper = ("lower", "upper") if name == "value" else (f"{name}_lower", f"{name}_upper")
    value, low, high = (float(row[f"{part}{suffix}"]) for part in (name, lower, upper))
    return "" if math.isnan(value) else f"{value:.4g} ({low:.4g} .. {high:.4g})"


def _gain(
    plain: ConditionProfile, other: ConditionProfile | None
) -> tuple[NDArray[np.int64], list[NDArray[np.float64]]]:
    """At the ranks that both know: the ratio of the ratios, its lower and its upper bound."""
    if other is None:
        return np.zeros(0, dtype=np.int64), [np.zeros(0)] * 3
    ranks, i, j = np.intersect1d(plain.ranks, other.ranks, return_indices=True)
    return ranks, [plain.value[i] / other.value[j], plain.lower[i] / other.upper[j], plain.upper[i] / other.lower[j]]


def _what_is_missing(profiles: Sequence[ConditionProfile]) -> str:
    """Why there is no condition number, and how to go further."""
    if all(p.rank is not None for p in profiles):
        return ""
    if named(profiles[0].method).decides:
        return "Smaller eigenvalues are lost in rounding and nothing explains them as zero: kappa* has no upper bound."
    why = ", for lack of memory" if any(p.stop == "memory" for p in profiles) else ""
    return f"Smaller eigenvalues were not searched for{why}: steps= goes further, method='dense' to the end."


def _sentence(profile: ConditionProfile, how: str) -> str:
    if not len(profile.ranks):
        return f"{how} no ratio of eigenvalues is known to within a factor of 2."
    i = len(profile.ranks) - 1
    kappa = profile.rank is not None and profile.ranks[i] == profile.rank
    what = "the condition number kappa*" if kappa else f"the largest eigenvalue over that of rank {profile.ranks[i]}"
    sizes, share = ("in size ", "") if profile.negative else ("", "the effective rank ")
    return (
        f"{how}, {what} is {sizes}{profile.value[i]:.4g} ({profile.lower[i]:.4g} .. {profile.upper[i]:.4g}), "
        f"{share}trace/lambda_1 {profile.effective_rank:.3g}."
    )
