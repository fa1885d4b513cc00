"""Trace, diagonal and off-block share of a symmetric operator, exact where cheap.

Exact where the matrix or a factor can be formed cheaply, otherwise estimated from products with random signs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, ZeroOperatorError
from bnp_analysis.linalg.derived import Restriction, check_positions
from bnp_analysis.linalg.forming import formed
from bnp_analysis.linalg.krylov.lanczos import Floats
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.linalg.scale import exponent, in_floats, scaled, times_power
from bnp_analysis.linalg.spectra.checks import (
    amplification,
    measured,
    products_known_to,
    provenance,
    require_finite,
    require_operator,
    rounding_of_sums,
)
from bnp_analysis.linalg.spectra.quadrature import standard_error
from bnp_analysis.results import Result
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.memory import available_memory, require_memory
from bnp_analysis.runtime.progress import Progress, reporting
from bnp_analysis.runtime.random import generator, rademacher

METHODS = ("auto", "exact", "stochastic")
# Products that a dense side may take before signs are drawn in its place, and rows of one that is worth an exact share.
_FEW, _ROWS = 1_000, 4_000
# Rows of a symmetric matrix that are multiplied out together, from the diagonal on.
_PANEL = 128
OFF_BLOCK_PROBES = 16


@dataclass(frozen=True, kw_only=True, repr=False)
class Trace(Result):
    """A stochastic trace with its standard error, and what its products round."""

    value: float
    error: float
    dim: int

    def summary(self) -> str:
        """The trace and its error."""
        cost = f"{self.matvecs} products{products_known_to(self)}"
        return f"trace = {self.value:.6g} +- {self.error:.2g} (standard error), {cost}"


@full_float32
@gated
def trace(
    A: SymmetricOperator,
    *,
    preconditioner: Preconditioner | None = None,
    probes: int = 32,
    seed: int = 0,
    progress: Progress = False,
) -> Trace:
    """The trace of `P^T A P` by Hutchinson's estimator, `mean(v.Av)` over random signs `v`.

    Args:
        A: symmetric operator on `R^n`.
        preconditioner: `P`; the trace of `P^T A P`.
        probes: number of random vectors, at least 2.
        seed: of the probes.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `Trace` with the standard error over probes and the rounding `sqrt(n) eps |A v|` of products.

    Raises:
        InvalidInputError: fewer than two probes; NonFiniteError: a product with NaN or infinity.

    Source: Hutchinson 1990.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> bnp.trace(bnp.DenseOperator(torch.eye(7, dtype=torch.float64))).value
        7.0
    """
    if probes < 2:
        raise InvalidInputError(f"an error bar needs at least two probes, got {probes}")
    began = time.perf_counter()
    operator = scaled(measured(A, preconditioner, None, seed)[0])
    samples: list[tuple[float, float]] = []

    def add(v: Tensor, image: Tensor) -> float:
        samples.append((float(v.double() @ image), float(image.norm())))
        return samples[-1][1]

    _over_signs(operator, probes, seed, progress, "trace", add)
    values, sizes = np.array(samples).T
    # Each of n terms v_i (A v)_i is known to a rounding; probes do not average it away.
    rounded, extra = rounding_of_sums(operator, seed)
    rounding = math.sqrt(A.dim) * (operator.eps * float(sizes.max()) + math.sqrt(A.dim) * rounded)
    return Trace(
        value=in_floats(float(values.mean()), -exponent(operator), "the trace"),
        error=in_floats(math.hypot(standard_error(values), rounding), -exponent(operator), "the error of the trace"),
        dim=A.dim,
        matvecs=len(samples) + extra,
        **provenance(A, preconditioner, {"probes": probes}, seed, began),
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class Diagonal(Result):
    """The diagonal of a symmetric matrix, each entry with a standard error.

    Attributes:
        value: `(n,)` float64.
        error: `(n,)` float64, the standard error of each entry over probes; 0 where the diagonal was read off.
        rounding: beside it every entry may be off by this, from the rounding of products.
        method: `"exact"` or `"stochastic"`.
        probes: random vectors drawn, 0 of an exact diagonal.
        shapes: name -> shape of the tensors that the coordinates belong to, in their order; empty where not known.
        choice: in words, what each way would have taken.
    """

    value: Tensor
    error: Tensor
    rounding: float
    method: str
    probes: int
    shapes: Mapping[str, tuple[int, ...]]
    choice: str

    def interval(self, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds `(n,)` of each entry by itself: Student's `t` of the probes times `error`, and `rounding`.

        Args:
            confidence: of each interval, not of all at once.

        Raises:
            InvalidInputError: a confidence outside (0, 1), or above what so few probes can give: with a chance of
            `2^(1 - probes)` all samples of an entry beside a single large one are equal, and show no scatter.
        """
        if not 0 < confidence < 1:
            raise InvalidInputError(f"confidence must lie in (0, 1), got {confidence}")
        if self.probes and 1 - confidence < 2.0 ** (1 - self.probes):
            needed = 1 + math.ceil(-math.log2(1 - confidence))
            raise InvalidInputError(
                f"{self.probes} probes give no interval at {100 * confidence:g} %: with a chance of "
                f"{2.0 ** (1 - self.probes):.2g} all samples of an entry are equal by accident, and it would claim no "
                f"error at all. Draw at least {needed}, probes={needed}, or ask for less"
            )
        times = float(stdtrit(self.probes - 1, (1 + confidence) / 2)) if self.probes else 0.0
        half = times * self.error + self.rounding
        return self.value - half, self.value + half

    def tensors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Values and errors in the shapes of the parameters: name -> `(value, error)`.

        Raises:
            InvalidInputError: the operator did not know what its coordinates are.
        """
        if not self.shapes:
            raise InvalidInputError(
                "this diagonal is that of an operator without named parameters; value and error are flat"
            )
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), *(torch.split(x, sizes) for x in (self.value, self.error)), strict=True)
        return {name: (value.view(shape), error.view(shape)) for (name, shape), value, error in parts}

    def summary(self) -> str:
        """Sizes, how it was found, what the alternative would have cost."""
        low, high = float(self.value.min()), float(self.value.max())
        typical = float(self.error.square().mean().sqrt())
        error = f", standard errors about {typical:.2g}" if self.probes else ""
        return (
            f"diagonal of {len(self.value)} entries from {low:.4g} to {high:.4g}, sum {float(self.value.sum()):.6g}"
            f"{error}; {self.choice}; {self.matvecs} products{products_known_to(self)}"
        )

    def records(self) -> list[dict[str, object]]:
        """One row per entry: tensor, index inside of it, value, error."""
        sizes = {name: math.prod(shape) for name, shape in self.shapes.items()} or {"": len(self.value)}
        places = [(name, i) for name, size in sizes.items() for i in range(size)]
        columns = zip(places, self.value.tolist(), self.error.tolist(), strict=True)
        return [{"tensor": name, "index": i, "value": v, "error": e} for (name, i), v, e in columns]

    def cells(self) -> list[dict[str, object]]:
        """One row per tensor: its number of entries, their ends, mean and root mean square error."""
        named = self.tensors() if self.shapes else {"all": (self.value, self.error)}
        return [
            {
                "tensor": name,
                "entries": value.numel(),
                "smallest": float(value.min()),
                "mean": float(value.mean()),
                "largest": float(value.max()),
                "error": float(error.square().mean().sqrt()),
            }
            for name, (value, error) in named.items()
            if value.numel()
        ]

    def __str__(self) -> str:
        """The summary and, where parameters have names, a table of them."""
        return f"{self._line()}\n{self.table()}" if self.shapes else self._line()


@full_float32
@gated
def diagonal(
    A: SymmetricOperator,
    *,
    preconditioner: Preconditioner | None = None,
    probes: int = 64,
    method: str = "auto",
    seed: int = 0,
    progress: Progress = False,
) -> Diagonal:
    """The diagonal of `P^T A P`, by `mean(v * Av)` over random signs `v`, or read off a matrix where that is cheap.

    The variance of an entry is `sum_{j != i} a_ij^2` over the number of probes: of a diagonal matrix the first probe is
    exact. A dense side is the matrix, of which the diagonal is read, or a factor `F` with `F^T F = A`, whose columns'
    squared norms are the diagonal; it is formed where that takes no more products than the probes, or than 1000, and
    fits into half of the free memory.

    Args:
        A: symmetric operator on `R^n`.
        preconditioner: `P`; the diagonal of `P^T A P`.
        probes: number of random vectors, at least 2.
        method: `"auto"`, or one of `"exact"` and `"stochastic"`.
        seed: of the probes.
        progress: True draws a bar, a callable gets `(done, total)`.

    Returns:
        A `Diagonal`: `value` and `error` per coordinate, `tensors()` in the shapes of the parameters.

    Raises:
        InvalidInputError: fewer than two probes, an unknown method; NonFiniteError: a product with NaN or infinity;
        MemoryLimitError: an exact diagonal was asked for and its dense side does not fit.

    Source: Bekas, Kokiopoulou and Saad 2007.

    Example:
        >>> import torch, bnp_analysis as bnp
        >>> A = bnp.DenseOperator(torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=torch.float64))
        >>> bnp.diagonal(A).value.tolist()
        [3.0, 2.0]
        >>> found = bnp.diagonal(A, method="stochastic", probes=20)
        >>> bool(((found.value - torch.tensor([3.0, 2.0])).abs() < 4 * found.error).all())
        True
    """
    if probes < 2:
        raise InvalidInputError(f"an error bar needs at least two probes, got {probes}")
    if method not in METHODS:
        raise InvalidInputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    began = time.perf_counter()
    operator = measured(A, preconditioner, None, seed)[0]
    side = _cheaper_side(operator)
    what = "the matrix" if side is operator else "its factor"
    size = 8 * 4 * side.shape[0] * side.shape[1]
    fits = 2 * size <= available_memory(side.device)
    if method == "exact":
        require_memory(size, f"{what} of {operator!r}, dense,", device=side.device)
    exact = method == "exact" or (method == "auto" and fits and side.dense_cost <= max(probes, _FEW))
    if exact:
        value, rounding = _read_off(side, of_factor=side is not operator)
        error, drawn, spent = torch.zeros_like(value), 0, side.dense_cost
        choice = f"exact, from {what} formed with {spent} products ({probes} probes would estimate it)"
    else:
        value, error, rounding, drawn, spent = _estimated(operator, probes, seed, progress)
        memory = "" if fits else f" and {size / 2**30:.2g} GiB"
        choice = f"estimated from {drawn} probes (exactly, from {what}, it takes {side.dense_cost} products{memory})"
    return Diagonal(
        value=value,
        error=error,
        rounding=rounding,
        method="exact" if exact else "stochastic",
        probes=drawn,
        shapes={name: tuple(shape) for name, shape in operator.shapes.items()},
        choice=choice,
        matvecs=spent,
        **provenance(A, preconditioner, {"probes": probes, "method": method}, seed, began),
    )


def _cheaper_side(operator: SymmetricOperator) -> LinearOperator:
    """The matrix, or its factor where that takes fewer products to form."""
    factor = operator.factor
    return operator if factor is None or operator.dense_cost <= factor.dense_cost else factor


def _read_off(side: LinearOperator, *, of_factor: bool) -> tuple[Tensor, float]:
    """The diagonal by a dense matrix, or by the columns of a dense factor, and what it rounds."""
    dense = formed(side)
    require_finite(dense.matrix, "the dense matrix")
    if of_factor:
        lengths = dense.matrix.square().sum(dim=0)
        # |(F + E) e_j|^2 with |E e_j| <= rounding |magnitude e_j|, and the sum itself.
        wrong = 2 * lengths.sqrt() * dense.rounding * dense.sizes().norm(dim=0) + len(dense.matrix) * 2.0**-52 * lengths
        rounding, power = wrong.max(), -2 * dense.exponent
    else:
        lengths = dense.matrix.diagonal().clone()
        # A product is known to a rounding of its length, not of each entry.
        rounding, power = dense.rounding * dense.sizes().norm(dim=0).max(), -dense.exponent
    return times_power(lengths.cpu(), power), float(times_power(rounding, power))


def _estimated(
    A: SymmetricOperator, probes: int, seed: int, progress: Progress
) -> tuple[Tensor, Tensor, float, int, int]:
    """Values, standard errors, what products round, the probes drawn and the products made."""
    operator = scaled(A)
    mean, squares = torch.zeros(2, A.dim, dtype=torch.float64)
    done, largest = 0, 0.0

    def add(v: Tensor, image: Tensor) -> float:
        """Welford 1962: equal samples leave no variance, whatever their size."""
        nonlocal mean, squares, done, largest
        found = (v * image).cpu()
        ahead = found - mean
        mean, done = mean + ahead / (done + 1), done + 1
        squares += ahead * (found - mean)
        size = float(found.norm())
        largest = max(largest, size)
        return size

    _over_signs(operator, probes, seed, progress, "diagonal", add)
    error = (squares / (done - 1) / done).sqrt()
    size, extra = amplification(operator, seed)
    rounding = torch.tensor(operator.eps * max(largest, size * math.sqrt(A.dim)), dtype=torch.float64)
    value, error, rounding = (times_power(x, -exponent(operator)) for x in (mean, error, rounding))
    return value, error, float(rounding), done, done + extra


def _over_signs(
    operator: SymmetricOperator,
    probes: int,
    seed: int,
    progress: Progress,
    label: str,
    add: Callable[[Tensor, Tensor], float],
) -> None:
    """Give `add` random signs `v` and `A v` in float64, of which it says a size; those of before an interrupt stay."""
    g, done = generator(seed), 0
    with reporting(progress, probes, label) as update:
        try:
            while done < probes:
                v = rademacher((operator.dim,), g, operator)
                image = operator @ v
                if not math.isfinite(add(v, image.double())):
                    require_finite(image, f"product {done + 1} with {operator!r}")
                done += 1
                update(done)
        except KeyboardInterrupt:
            # Two finished probes are a result of their own, with error bars.
            if done < 2:
                raise


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
    side = _cheaper_side(A)
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
        size, extra = amplification(operator, seed)
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
    z = rademacher((A.dim, probes), generator(seed), operator)
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
