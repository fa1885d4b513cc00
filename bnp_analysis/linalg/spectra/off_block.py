"""How much of a symmetric operator lies outside its diagonal blocks, in the Frobenius norm."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, ZeroOperatorError
from bnp_analysis.linalg.derived import Restriction, check_positions
from bnp_analysis.linalg.forming import amplified, formed
from bnp_analysis.linalg.krylov.lanczos import Floats
from bnp_analysis.linalg.operators import SymmetricOperator
from bnp_analysis.linalg.scale import exponent, scaled, times_power
from bnp_analysis.linalg.spectra.checks import provenance, require_finite, require_operator, rounding_norm
from bnp_analysis.linalg.spectra.null import NORM_STEPS
from bnp_analysis.results import Result
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.memory import available_memory
from bnp_analysis.runtime.progress import Progress, reporting
from bnp_analysis.runtime.random import generator, rademacher

# Products, and rows of a dense matrix, that are worth an exact share.
_FEW, _ROWS = 1_000, 4_000
# Rows of a symmetric matrix that are multiplied out together, from the diagonal on.
_PANEL = 128
OFF_BLOCK_PROBES = 16


@dataclass(frozen=True, kw_only=True, repr=False)
class OffBlockShare(Result):
    """The share `|A - blockdiag(A)|_F / |A|_F` of a matrix outside its diagonal blocks, 0 if it has none there.

    Attributes:
        value: between 0 and 1.
        lower, upper: bounds with the given confidence, and what rounding leaves open; of an exact share that alone.
        confidence: 1 where nothing was sampled.
        norm: `|A|_F`, estimated by the same products.
        probes: random vectors drawn, 0 of an exact share.
        blocks: how many there are.
    """

    value: float
    lower: float
    upper: float
    confidence: float
    norm: float
    probes: int
    blocks: int

    @property
    def error(self) -> float:
        """The distance to the farther bound."""
        return max(self.upper - self.value, self.value - self.lower)

    def summary(self) -> str:
        """The share, its bounds, and its price."""
        return f"{self}, {self.matvecs} products"

    def __str__(self) -> str:
        how = f" at {100 * self.confidence:g} %" if self.probes else ", exact"
        return (
            f"|A - blockdiag(A)|_F / |A|_F = {self.value:.3g} ({self.lower:.3g} .. {self.upper:.3g}{how}), "
            f"{self.blocks} blocks"
        )


@full_float32
@gated
def off_block_share(
    A: SymmetricOperator,
    blocks: Sequence[Tensor],
    *,
    parts: Callable[[int], SymmetricOperator] | None = None,
    probes: int = OFF_BLOCK_PROBES,
    confidence: float = 0.95,
    method: str = "auto",
    seed: int = 0,
    progress: Progress = False,
) -> OffBlockShare:
    """The share `|A - D|_F / |A|_F` of a matrix outside its diagonal blocks `D`, with bounds.

    For random signs `z` the mean of `|(A - D) z|^2` is `|A - D|_F^2`, that of `|A z|^2` is `|A|_F^2`, and their ratio
    is the share squared. The bounds are those of Student's `t` for the logarithm of the ratio's odds, whose error is
    that of the jackknife over probes. A matrix with up to 4000 rows that takes no more than 1000 products to form is
    formed.

    Args:
        A: symmetric operator on `R^n`.
        blocks: positions of each block, int64; every coordinate is in exactly one.
        parts: `i -> A[blocks[i], blocks[i]]` as an operator, where that is cheaper than a product with `A`.
        probes: random vectors, at least 3; each takes a product with `A` and with every block.
        confidence: of the bounds.
        method: `"auto"`, `"exact"` or `"stochastic"`.
        seed: of the probes.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        An `OffBlockShare`.

    Raises:
        InvalidInputError: blocks that overlap, lie outside or leave coordinates out, fewer than three probes, an
        unknown method;
        ZeroOperatorError: the matrix is zero, of which there is no share; NonFiniteError: NaN or infinity in a product.

    Source: Hutchinson 1990; Efron and Stein 1981 for the jackknife.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.tensor([[3.0, 0.0, 4.0], [0.0, 0.0, 0.0], [4.0, 0.0, 3.0]]))
        >>> share = off_block_share(A, [torch.tensor([0, 1]), torch.tensor([2])])
        >>> round(share.value, 6), share.confidence
        (0.8, 1.0)
    """
    require_operator(A)
    positions = torch.cat([*blocks, torch.zeros(0, dtype=torch.int64)])
    check_positions(positions.sort().values, A.dim)
    if len(positions) < A.dim:
        raise InvalidInputError(
            f"{A.dim - len(positions)} of {A.dim} coordinates are in no block; cut the operator to those that are, "
            "linalg.Restriction(A, positions), or name the rest too"
        )
    if probes < 3:
        raise InvalidInputError(f"the error of a ratio needs at least three probes, got {probes}")
    if method not in ("auto", "exact", "stochastic") or not 0 < confidence < 1:
        raise InvalidInputError(
            f"method must be auto, exact or stochastic and confidence lie in (0, 1), got {method!r} and {confidence}"
        )
    began, n = time.perf_counter(), A.dim
    side = A if A.factor is None or A.dense_cost <= A.factor.dense_cost else A.factor
    cheap = n <= _ROWS and side.dense_cost <= _FEW and 8 * 4 * n * max(side.shape) <= available_memory(side.device)
    settings = {"probes": probes, "confidence": confidence, "method": method, "blocks": [len(b) for b in blocks]}
    if method == "exact" or (method == "auto" and cheap):
        dense = formed(side)
        require_finite(dense.matrix, "the dense matrix")
        power, cost, drawn = -dense.exponent * (1 if side is A else 2), side.dense_cost, 0
        whole, outside = _norms(dense.matrix, blocks, gram=side is not A)
        # A convention like that of formed entries: what they round, all in one direction.
        slack = (dense.rounding * (1 if side is A else 2) + n * 2.0**-53) * whole
        value = outside / whole if whole else 0.0
        bounds = (max(0.0, value - slack / whole), min(1.0, value + slack / whole)) if whole else (0.0, 0.0)
        confidence = 1.0
    else:
        operator = scaled(A)
        off, all_ = _squares(operator, A, blocks, parts, probes, seed, progress)
        drawn, power = len(off), -exponent(operator)
        cost = drawn * (1 + len(blocks))
        whole = math.sqrt(float(all_.mean()))
        size, extra = (rounding_norm(operator, seed), 2 * NORM_STEPS) if amplified(operator) else (0.0, 0)
        cost += extra
        # What two products round, those with the matrix and with its blocks.
        noise = 2 * math.sqrt(n) * operator.eps * max(1.0, size / whole if whole else 1.0)
        value, bounds = (
            _ratio(np.where(off <= noise**2 * all_, 0.0, off), all_, confidence) if whole else (0.0, (0.0, 0.0))
        )
        bounds = max(0.0, bounds[0] - noise), min(1.0, bounds[1] + noise)
    if not whole:
        raise ZeroOperatorError(f"{A!r} is zero in every product, so no share of it lies anywhere")
    return OffBlockShare(
        value=value,
        lower=bounds[0],
        upper=bounds[1],
        confidence=confidence,
        norm=float(times_power(torch.tensor(whole, dtype=torch.float64), power)),
        probes=drawn,
        blocks=len(blocks),
        matvecs=cost,
        **provenance(A, None, settings, seed, began),
    )


def _norms(matrix: Tensor, blocks: Sequence[Tensor], *, gram: bool) -> tuple[float, float]:
    """The Frobenius norms of a symmetric matrix, `M` or `M^T M`, and of what is outside of its blocks."""
    label = torch.zeros(matrix.shape[1], dtype=torch.int64)
    for i, block in enumerate(blocks):
        label[block] = i
    label = label.to(matrix.device)
    whole = outside = 0.0
    for begin in range(0, len(label), _PANEL):
        end = begin + _PANEL
        panel = matrix[:, begin:end].T @ matrix[:, begin:] if gram else matrix[begin:end, begin:]
        squares = panel.square()
        # What is behind the panel's own columns stands on both sides of the diagonal.
        squares[:, _PANEL:] *= 2
        whole += float(squares.sum())
        outside += float(torch.where(label[begin:end, None] == label[begin:], 0.0, squares).sum())
    return math.sqrt(whole), math.sqrt(outside)


def _squares(
    operator: SymmetricOperator,
    A: SymmetricOperator,
    blocks: Sequence[Tensor],
    parts: Callable[[int], SymmetricOperator] | None,
    probes: int,
    seed: int,
    progress: Progress,
) -> tuple[Floats, Floats]:
    """`|(A - D) z|^2` and `|A z|^2` for each probe, in the units of the scaled operator."""
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    z = rademacher((A.dim, probes), generator(seed), like)
    with reporting(progress, 1 + len(blocks), "off-block share") as update:
        image = operator @ z
        require_finite(image, "a product")
        update(1)
        inside = torch.zeros_like(image)
        for i, block in enumerate(blocks):
            part = Restriction(A, block) if parts is None else parts(i)
            where = block.to(image.device)
            product = part @ z[where].to(part.dtype)
            inside[where] = times_power(product.to(image.dtype), exponent(operator))
            update(2 + i)
    require_finite(inside, "a product of a block")
    sizes = [x.double().square().sum(dim=0).cpu().numpy() for x in (image - inside, image)]
    return sizes[0], sizes[1]


def _ratio(off: Floats, whole: Floats, confidence: float) -> tuple[float, tuple[float, float]]:
    """The root of the ratio of two means, and its bounds."""
    share = min(float(off.sum() / whole.sum()), 1.0)
    if share == 0.0:
        return 0.0, (0.0, 0.0)
    count = len(off)
    left = np.clip((off.sum() - off) / (whole.sum() - whole), 1e-300, 1 - 1e-16)
    odds = np.log(left / (1 - left))
    spread = math.sqrt((count - 1) / count * float(((odds - odds.mean()) ** 2).sum()))
    middle = min(share, 1 - 1e-16)
    half = float(stdtrit(count - 1, (1 + confidence) / 2)) * spread
    ends = (1 / (1 + math.exp(-x)) for x in (math.log(middle / (1 - middle)) + s * half for s in (-1, 1)))
    low, high = (math.sqrt(x) for x in ends)
    value = math.sqrt(share)
    return value, (min(low, value), max(high, value))
