"""Null directions against dense nullities, and what symmetries say of the Hessian (T11)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bnp_analysis.curvature import hessian
from bnp_analysis.linalg.spectra.checks import norm_estimate
from bnp_analysis.network import Layer
from bnp_analysis.symmetry import NullDirections, null_directions
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.generators import generators, logit_shifts
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, each_layer, label, statement

_T11 = "the null directions that symmetries and data explain are null, and at most the nullity"
_COUNT = "explained null dimensions <= dense nullity of the Gauss-Newton matrix"
_ORBIT = "along a linear generator Hess t = -B^T grad"
_SHIFT = "along the shift of all logits Hess t = 0"
# Singular values on both sides of the rank must be this far apart, or the nullity is not decided.
_GAP = 30.0


@statement(Source.T11, _T11)
def check_null_directions(problem: Problem) -> Iterator[Check]:
    """T11: the whole network where it fits, else its layers; what is left of the nullity is named unexplained."""
    try:
        problem.require_size(problem.risk.space.dim)
        yield from _counted(problem, problem.null, "network")
    except NotApplicable as refusal:
        yield Check.not_applicable(f"{_COUNT} [network]", Source.T11, str(refusal))
        yield from each_layer(problem, _COUNT, Source.T11, _layer)
    yield from _orbits(problem)
    yield from _shift(problem)


def _layer(problem: Problem, layer: Layer) -> Iterator[Check]:
    inner = Problem(problem.risk.restrict(problem.risk.space.layer_names(layer.name)), limit=problem.limit)
    inner.require_size(inner.risk.space.dim)
    yield from _counted(inner, null_directions(inner.risk), label(layer))


def _counted(problem: Problem, null: NullDirections, where: str) -> Iterator[Check]:
    nullity, details = _nullity(problem.factor)
    explained = int(torch.linalg.matrix_rank(null.basis)) if null.basis.shape[1] else 0
    rest = nullity - explained
    reason = f"unexplained: {rest}" if rest > 0 else "all explained"
    if null.not_analysed:
        reason += f"; not analysed: {'; '.join(null.not_analysed)}"
    yield Check.compare(
        f"{_COUNT} [{where}]",
        Source.T11,
        observed=float(explained),
        predicted=float(nullity),
        tolerance=0.0,
        relation="<=",
        hypotheses={"the rank is decided by a gap": True},
        reason=reason,
        details={**details, **null.sources, "unexplained": rest, "approximate": dict(null.approximate)},
    )
    if not explained:
        return
    # By F, not A: |A t| would be the square of a small number.
    F = problem.factor
    images = (F @ null.basis).norm(dim=0) / null.basis.norm(dim=0)
    yield Check.compare(
        f"every direction found is null: |F t| / |F| |t| [{where}]",
        Source.T11,
        observed=float(images.max()) / details["largest"],
        predicted=1e-10,
        tolerance=0.0,
        relation="<=",
        details={"directions": explained},
    )


def _nullity(F: Tensor) -> tuple[int, dict[str, float]]:
    """Columns minus the rank of `F`, by its singular values.

    Raises:
        NotApplicable: no gap tells the rank.
    """
    square = torch.linalg.qr(F, mode="r")[1] if F.shape[0] > F.shape[1] else F
    values = torch.linalg.svdvals(square)
    if not len(values) or float(values[0]) == 0:
        raise NotApplicable("the Gauss-Newton matrix is zero")
    floor = max(F.shape) * torch.finfo(F.dtype).eps * float(values[0])
    rank = int((values > floor).sum())
    below = float(values[rank]) if rank < len(values) else 0.0
    if below and float(values[rank - 1]) < _GAP * below:
        raise NotApplicable(
            f"the rank is not decided: singular values go from {float(values[rank - 1]):.2g} to {below:.2g} around the "
            f"rounding level {floor:.2g} without a gap"
        )
    details = {"parameters": float(F.shape[1]), "rank": float(rank), "nullity": float(F.shape[1] - rank)}
    return F.shape[1] - rank, details | {
        "largest": float(values[0]),
        "smallest": float(values[rank - 1]),
        "largest that counts as zero": below,
    }


def _orbits(problem: Problem) -> Iterator[Check]:
    try:
        problem.require_smooth()
    except NotApplicable as refusal:
        yield Check.not_applicable(_ORBIT, Source.T11, str(refusal))
        return
    risk, H = problem.risk, hessian(problem.risk)
    theta, gradient = risk.theta, risk.gradient
    found = False
    for one in generators(problem):
        found = True
        t, expected = one.tangent(theta), -one.transposed(gradient)
        if not bool(t.any()):
            continue
        image = H @ t
        size = max(float(image.norm()), float(expected.norm()), 1e-5 * norm_estimate(H) * float(t.norm()))
        yield Check.compare(
            f"{_ORBIT} [{one.cause}: {one.where}]",
            Source.T11,
            observed=float((image - expected).norm()) / size,
            predicted=1e-8,
            tolerance=0.0,
            relation="<=",
            hypotheses={"no entry on a kink": True},
            details={
                "|Hess t|": float(image.norm()),
                "|B^T grad|": float(expected.norm()),
                "grad . t": float(gradient @ t),
            },
        )
    if not found:
        yield Check.not_applicable(_ORBIT, Source.T11, "no unit or channel is scaled or mixed by a linear generator")


def _shift(problem: Problem) -> Iterator[Check]:
    directions = logit_shifts(problem)
    if not directions.shape[1]:
        yield Check.not_applicable(
            _SHIFT, Source.T11, "the loss does not ignore a shift of the outputs of a last layer"
        )
        return
    H = hessian(problem.risk)
    yield Check.compare(
        _SHIFT,
        Source.T11,
        observed=float((H @ directions).norm(dim=0).max()) / norm_estimate(H),
        predicted=1e-10,
        tolerance=0.0,
        relation="<=",
        hypotheses={"a translation": True},
        details={"directions": directions.shape[1]},
    )
