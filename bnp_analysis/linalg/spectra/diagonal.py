"""The diagonal of a symmetric operator: exact where a dense side is cheap, else from products with random signs."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.forming import amplified, formed
from bnp_analysis.linalg.operators import LinearOperator, SymmetricOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.linalg.scale import exponent, scaled, times_power
from bnp_analysis.linalg.spectra.checks import measured, products_known_to, provenance, require_finite, rounding_norm
from bnp_analysis.linalg.spectra.null import NORM_STEPS
from bnp_analysis.results import Result
from bnp_analysis.runtime.float32 import full_float32
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.memory import available_memory, require_memory
from bnp_analysis.runtime.progress import Progress, reporting
from bnp_analysis.runtime.random import generator, rademacher

METHODS = ("auto", "exact", "stochastic")
# Products that a dense side may take before signs are drawn in its place.
_FEW = 1_000


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
        rounding, power = dense.rounding * dense.sizes().diagonal().max(), -dense.exponent
    return times_power(lengths.cpu(), power), float(times_power(rounding, power))


def _estimated(
    A: SymmetricOperator, probes: int, seed: int, progress: Progress
) -> tuple[Tensor, Tensor, float, int, int]:
    """Values, standard errors, what products round, the probes drawn and the products made."""
    operator = scaled(A)
    g, like = generator(seed), torch.empty(0, dtype=operator.dtype, device=operator.device)
    mean, squares = torch.zeros(2, A.dim, dtype=torch.float64)
    done, largest = 0, 0.0
    with reporting(progress, probes, "diagonal") as update:
        try:
            for i in range(probes):
                v = rademacher((A.dim,), g, like)
                image = operator @ v
                require_finite(image, f"product {i + 1} with {operator!r}")
                found = (v * image).double().cpu()
                # Welford 1962: equal samples leave no variance, whatever their size.
                ahead = found - mean
                mean, done = mean + ahead / (i + 1), i + 1
                squares += ahead * (found - mean)
                largest = max(largest, float(found.norm()))
                update(done)
        except KeyboardInterrupt:
            # Two finished probes are a result of their own, with error bars.
            if done < 2:
                raise
    error = (squares / (done - 1) / done).sqrt()
    size, extra = (rounding_norm(operator, seed), 2 * NORM_STEPS) if amplified(operator) else (0.0, 0)
    rounding = torch.tensor(operator.eps * max(largest, size * math.sqrt(A.dim)), dtype=torch.float64)
    value, error, rounding = (times_power(x, -exponent(operator)) for x in (mean, error, rounding))
    return value, error, float(rounding), done, done + extra
