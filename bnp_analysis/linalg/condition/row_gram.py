"""The method row-gram: a wide factor whose rows are Kronecker products, by the Gram matrix of its scaled rows (T13)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import cho_solve, qr
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg.condition.certificates import unexplained, unexplained_zeros, zero_matrix
from bnp_analysis.linalg.condition.factor_svd import FACTOR_WORK, affordable
from bnp_analysis.linalg.condition.lanczos import lanczos_instead
from bnp_analysis.linalg.condition.methods import Method, Price, Problem, register
from bnp_analysis.linalg.condition.number import Extremes
from bnp_analysis.linalg.forming import UNIT, entry_rounding
from bnp_analysis.linalg.krylov.lanczos import Tridiagonalization, lanczos, tridiagonal_eigh
from bnp_analysis.linalg.matrices import CallableOperator
from bnp_analysis.linalg.operators import LinearOperator, RowProducts, SymmetricOperator
from bnp_analysis.linalg.preconditioner import Preconditioner
from bnp_analysis.linalg.scale import comfortable, scaled
from bnp_analysis.linalg.spectra.checks import factor_rounding_norm, require_finite, require_null
from bnp_analysis.runtime.memory import require_memory

# Lanczos steps for either end; those for the largest one stop once it is known so well.
_TOP, _BOTTOM, _TIGHT, _LOOSE = 300, 24, 1e-9, 1e-5
# Those for the smallest one stop at such a residual, relative: the square of it is what its Ritz value is off by.
_CLOSE = 1e-9
# Rows of the Gram matrix that are formed together.
_TOGETHER = 512
# How far below the estimate `lambda_min` is certified: the first that holds.
_MARGINS = (1.0, 8.0, 64.0)
_WIDEST = 0.5


@dataclass(frozen=True, eq=False)
class _Rows:
    """Rows of `2^exponent F P`, scaled to length one: `d_a f_a` with `f_a = sum_p g_pa (x) h_pj` over the parts `p`.

    Attributes:
        parts: for each part `G_p` `(m, n)`, a row for each row, and `H_p` `(R, f)` with rows of length one.
        examples: `(m,)`, `j`.
        length: `d`, `(m,)`.
        size: `(m,)`, lengths of `|F| |P|`, to which errors of `F P` are relative, over `d`: at least 1.
        rounding: that error.
        rank: what structure allows.
    """

    parts: list[tuple[Tensor, Tensor]]
    examples: Tensor
    length: Tensor
    size: Tensor
    rounding: float
    exponent: int
    rank: int

    @property
    def entry(self) -> float:
        """A bound of the error of an entry of the scaled Gram matrix: two inner products of vectors of length one."""
        longest = max(g.shape[1] + h.shape[1] for g, h in self.parts)
        return UNIT * (longest + len(self.parts) + 8)

    def times(self, y: Tensor) -> Tensor:
        """`F F^T y` for the scaled rows, `(m, k)`, without the Gram matrix."""
        total = torch.zeros_like(y)
        for g, h in self.parts:
            z = y.new_zeros(len(h), g.shape[1] * y.shape[1])
            z.index_add_(0, self.examples, (g.unsqueeze(2) * y.unsqueeze(1)).flatten(1))
            image = (h @ (h.T @ z)).view(len(h), g.shape[1], y.shape[1])
            total += (g.unsqueeze(2) * image[self.examples]).sum(dim=1)
        return total

    def gram(self) -> Tensor:
        """The lower triangle of `F F^T` of the scaled rows; above it some of the upper one."""
        m = len(self.length)
        K = self.length.new_zeros(m, m)
        for g, h in self.parts:
            inputs = h @ h.T
            for begin in range(0, m, _TOGETHER):
                end = min(begin + _TOGETHER, m)
                beside = inputs[self.examples[begin:end]].index_select(1, self.examples[:end])
                K[begin:end, :end].addcmul_(g[begin:end] @ g[:end].T, beside)
        return K


def row_gram(problem: Problem) -> Extremes:
    """Both ends of the spectrum of `P^T A P` from the Gram matrix `K = F P P^T F^T` of independent rows.

    With `d` the lengths of the rows, `K = D K_s D` and `K_s` has ones on its diagonal. Errors of its entries, and of a
    Cholesky factorization, are small relative to `d_a d_b`: each eigenvalue of `K` is known relative to itself, to
    `m^2 u / lambda_min(K_s)`, whatever the condition number of `K` is (Demmel and Veselic 1992). Of the smallest one

        `K_s - (m eta + tau) - l D^-2` has a Cholesky factorization  =>  `lambda_min(K) >= l`

    where `eta` bounds all errors of entries (Higham 2002, theorem 10.3) and `tau` leaves room for those of `F P`:
    `|delta F^T y| <= e sqrt(m / tau) |F^T y|`. A Rayleigh quotient bounds it from above. The largest one lies between a
    Ritz value and what the Frobenius norm leaves beside the leading ones. Where the rows are dependent to rounding, or
    `P` couples units, what Lanczos finds is returned with the reason.
    """
    factor, null = problem.factor("row-gram"), problem.null
    parts = factor.row_parts
    if parts is None:
        raise InvalidInputError(
            "row-gram needs a factor whose rows are Kronecker products, as that of a Gauss-Newton matrix in the "
            "parameters of dense layers that run once per example; those of "
            f"{factor!r} are not known to be. Use method='auto', 'factor-svd' or 'golub-kahan'"
        )
    count = parts[0].left.shape[0] * parts[0].left.shape[1]
    require_memory(_memory(count), f"row-gram of {count} rows", device=factor.device)
    if null.dim:
        checked = scaled(factor)
        require_null(checked, null, factor_rounding_norm(checked), "F")
    rows = _rows(factor, parts, problem.P)
    if rows is None:
        return lanczos_instead(problem, "row-gram", "P is not the same for every unit of a layer")
    if not len(rows.length):
        return zero_matrix(null.cost)
    x, frobenius = _smallest(rows, problem.seed)
    bottom = None if x is None else _bottom(rows, x)
    if bottom is None:
        return lanczos_instead(problem, "row-gram", "rows of the factor are dependent to rounding")
    (low, value, high), (least, top, most) = bottom, _top(rows, frobenius, bottom[2] / bottom[0] - 1, problem.seed)
    rank = len(rows.length)
    unresolved, on_word = unexplained_zeros(rank, rows.rank, null, problem.A)
    found = Extremes(
        lambda_max=top,
        lambda_min=value,
        lower=least / high,
        upper=most / low if unresolved == 0 else math.inf,
        rank=rank,
        on_your_word=on_word,
        unresolved=unresolved,
        zero=problem.A.dim - rank,
        noise_floor=value - low,
        residual_max=most - least,
        residual_min=high - low,
        matvecs=null.cost,
        note=unexplained(unresolved, null, problem.A),
    )
    return found.times_power(-2 * rows.exponent)


def _rows(factor: LinearOperator, parts: Sequence[RowProducts], P: Preconditioner | None) -> _Rows | None:
    """The rows of `F P`, independent ones where structure makes some dependent; None where `P` has another form."""
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    rounding = entry_rounding(factor)
    for part in parts:
        left, right, sizes = part.left.double(), part.right.double(), None
        if P is not None:
            inner = P.part(part.columns)
            form = None if inner is None else inner.across(left.shape[2])
            if form is None:
                return None
            Q, divisors = form
            Q = Q if Q.dtype == torch.float64 else Q.to(torch.float64)
            sizes, right = Q.row_magnitude(right), Q._rmatmat(right.T).T
            left = left if divisors is None else left / divisors.double()
            rounding = max(rounding, entry_rounding(factor) + (Q.roundings + 2) * UNIT / 2)
        require_finite(right, "the factor")
        require_finite(left, "the factor")
        length = torch.linalg.vector_norm(right, dim=1)
        more = length if sizes is None else torch.linalg.vector_norm(sizes, dim=1)
        unit = right / torch.where(length > 0, length, 1.0)[:, None]
        ratio = more / torch.where(length > 0, length, 1.0)
        made.append(((left * length[:, None, None]).cpu(), unit.cpu(), ratio.cpu()))
    whole, exponent = comfortable(torch.cat([left for left, _, _ in made], dim=2))
    amplified = torch.cat([s[:, None].expand(-1, left.shape[2]) for left, _, s in made], dim=1)
    kept, examples, sizes, mixing = _independent(whole, amplified, structural=factor.zeros_are_structural)
    length = torch.linalg.vector_norm(kept, dim=1)
    # Rows of a part, each to its own factor; a row of F P has length one then.
    split = torch.split(kept / length[:, None], [left.shape[2] for left, _, _ in made], dim=1)
    lost = whole.shape[0] * whole.shape[1] if not factor.zeros_are_structural else len(kept)
    return _Rows(
        parts=[(g, unit) for g, (_, unit, _) in zip(split, made, strict=True)],
        examples=examples,
        length=length,
        size=torch.clamp(sizes / length, min=1.0),
        # Lengths, and rows divided by them.
        rounding=rounding + mixing + (whole.shape[2] + max(u.shape[1] for _, u, _ in made) + 8) * UNIT,
        exponent=exponent,
        rank=min(factor.rank_bound, lost),
    )


def _independent(whole: Tensor, amplified: Tensor, *, structural: bool) -> tuple[Tensor, Tensor, Tensor, float]:
    """Rows `(m, n)` with the Gram matrices of each example's, their examples and sizes, and what was rounded.

    An example of `r` rows in `k < r` columns has `k` rows after a QR factorization, in which rows by descending length
    and column pivots keep the error of each row small relative to itself (Cox and Higham 1998); here it is measured.
    """
    sizes = torch.linalg.vector_norm(whole * amplified[:, None, :], dim=2)
    nonzero = whole != 0
    short = nonzero.any(dim=2).sum(dim=1) > nonzero.any(dim=1).sum(dim=1)
    keep = nonzero.any(dim=2) & ~short[:, None] if structural else nonzero.any(dim=2)
    index = torch.arange(len(whole)).unsqueeze(1).expand_as(keep)
    rows, examples, lengths, worst = [whole[keep]], [index[keep]], [sizes[keep]], 0.0
    for j in torch.nonzero(short).flatten().tolist() if structural else []:
        order = torch.linalg.vector_norm(whole[j], dim=1).argsort(descending=True)
        order = order[nonzero[j][order].any(dim=1)]
        columns = torch.nonzero(nonzero[j].any(dim=0)).flatten()
        block = whole[j][order][:, columns].numpy()
        Q, R, pivots = qr(block, mode="economic", pivoting=True)
        error = np.linalg.norm(Q @ R - block[:, pivots], axis=1) / np.linalg.norm(block, axis=1)
        worst = max(worst, float(error.max()) + len(columns) * UNIT)
        made = whole.new_zeros(len(R), whole.shape[2])
        made[:, columns[torch.from_numpy(pivots).long()]] = torch.from_numpy(R)
        # sum_b |Q_ba| s_b bounds the length of what errors of the old rows put into a new one.
        rows.append(made)
        lengths.append(torch.from_numpy(np.abs(Q)).T @ sizes[j][order])
        examples.append(torch.full((len(R),), j))
    return torch.cat(rows), torch.cat(examples), torch.cat(lengths), worst


def _smallest(rows: _Rows, seed: int) -> tuple[Tensor | None, float]:
    """`x = D y`, `|y| = 1`, for about the eigenvector `y` of `lambda_min(K)`; and `|K|_F^2`, while `K_s` is at hand.

    None where `K_s` has no factorization.
    """
    d, K = rows.length, rows.gram()
    frobenius, L = _square(K, d), _cholesky(K)
    del K
    if L is None:
        return None, frobenius
    # In place, as LAPACK stores matrices: a copy in each of some fifty solutions would take longer than they do.
    whole, lower = (L.numpy(), True) if L.mT.is_contiguous() else (L.mT.numpy(), False)

    def solve(v: Tensor) -> Tensor:
        return torch.from_numpy(cho_solve((whole, lower), (v / d).numpy(), check_finite=False))

    inverse = CallableOperator(lambda v: solve(v) / d, len(d), dtype=torch.float64, eps=UNIT)

    def closed(run: Tridiagonalization) -> bool:
        values, residuals = run.ritz()
        return bool(residuals[-1] <= _CLOSE * values[-1])

    run = lanczos(inverse, min(_BOTTOM, len(d)), seed=seed, until=closed)
    y = run.basis @ torch.from_numpy(tridiagonal_eigh(run.alpha, run.beta)[1][:, -1]).to(run.basis)
    # From one more solution: the entries of y where rows are long have no digits.
    x = solve(y)
    return x / torch.linalg.vector_norm(x / d), frobenius


def _bottom(rows: _Rows, x: Tensor) -> tuple[float, float, float] | None:
    """`lambda_min(K)` from below, about, and from above; None where it cannot be told from zero."""
    m, d, e = len(rows.length), rows.length, rows.size
    # Of entries of the Gram matrix, of its factorization, and of the numbers subtracted from its diagonal.
    eta = rows.entry + (m + 8) * UNIT / 2
    slack = m * eta
    value = float((x * rows.times(x[:, None])[:, 0]).sum())
    off = rows.rounding * float((e * x.abs()).sum())
    blur = 2 * eta * float(x.abs().sum()) ** 2
    high = (math.sqrt(max(value, 0.0) + blur) + off) ** 2
    room = float((e * x).square().sum())
    if not value > 0:
        return None
    # What is subtracted costs tau |e x|^2 / value, and errors of F P twice e sqrt(m / tau): least of all together.
    tau = (rows.rounding * math.sqrt(m) * value / room) ** (2 / 3) if rows.rounding else slack
    loss = rows.rounding * math.sqrt(m / tau)
    allowed = tau * e.square() + slack
    first = (2 * float((allowed * x.square()).sum()) + blur) / value + 1e-9
    for times in _MARGINS:
        margin = times * first
        if not margin < _WIDEST or loss >= 1:
            break
        shifted = rows.gram()
        least = value * (1 - margin)
        shifted.diagonal().sub_(allowed + least / d / d)
        if _cholesky(shifted) is not None:
            return least * (1 - loss) ** 2, value, high
    return None


def _top(rows: _Rows, frobenius: float, other: float, seed: int) -> tuple[float, float, float]:
    """`lambda_max(K)` from below, about, and from above, to a hundredth of the width `other` of the other end."""
    d, m = rows.length, len(rows.length)
    operator = CallableOperator(
        lambda v: d * rows.times((d * v)[:, None])[:, 0], m, dtype=torch.float64, device=d.device, eps=UNIT
    )
    trace = float(d.square().sum())
    rest = 2 * (rows.entry + m * UNIT) * trace

    def bounds(run: Tridiagonalization) -> tuple[float, float]:
        values, vectors = tridiagonal_eigh(run.alpha, run.beta)
        theta, last = values[::-1], vectors[-1, ::-1]
        # The leading ones, how they couple with the rest, and the Frobenius norm of the rest: for every number of them.
        coupling = run.residual_norm * np.sqrt(np.cumsum(last**2))
        beside = np.sqrt(np.maximum(frobenius - np.cumsum(theta**2), 0.0) + 4 * rest * trace)
        most = (theta[0] + beside) / 2 + np.hypot((theta[0] - beside) / 2, coupling)
        return float(theta[0]), float(most.min()) + rest

    def closed(run: Tridiagonalization) -> bool:
        low, high = bounds(run)
        return high <= (1 + min(max(_TIGHT, other / 100), _LOOSE)) * low + rest

    top, most = bounds(lanczos(operator, min(_TOP, m), seed=seed, restart=True, until=closed))
    off = rows.rounding * float(torch.linalg.vector_norm(rows.size * d))
    return max(math.sqrt(max(top - rest, 0.0)) - off, 0.0) ** 2, top, (math.sqrt(most) + off) ** 2


def _square(K: Tensor, length: Tensor) -> float:
    """`|D K_s D|_F^2` from the lower triangle, a few rows at a time."""
    total, weights = 0.0, length.square()
    for begin in range(0, len(K), _TOGETHER):
        end = min(begin + _TOGETHER, len(K))
        own, corner = weights[begin:end], K[begin:end, begin:end].tril(-1)
        total += 2 * float(own @ (K[begin:end, :begin].square() @ weights[:begin] + corner.square() @ own))
    return total + float((K.diagonal() * weights).square().sum())


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower triangle `L` of `L L^T`, in the place of a matrix; None where it is not positive definite."""
    L, info = torch.linalg.cholesky_ex(matrix)
    return None if int(info) else L


def _memory(m: int) -> int:
    """The Gram matrix of so many rows, its factor, and some of its rows."""
    return 8 * (2 * m + 4 * _TOGETHER) * m


def _work(rows: int) -> float:
    return 2.0 / 3 * rows**3


def _applies(A: SymmetricOperator) -> bool:
    F = A.factor
    if F is None:
        return False
    # As many independent rows as columns or more are dependent, or have the larger of the two Gram matrices.
    return F.rank_bound < F.shape[1] and _work(F.rank_bound) <= FACTOR_WORK and F.row_parts is not None


def _price(A: SymmetricOperator, steps: int) -> Price:
    if A.factor is None:
        return Price(0.0, 0, 0.0)
    m = A.factor.rank_bound
    return Price(0.0, _memory(m), _work(m) + 4.0 * _BOTTOM * m * m)


ROW_GRAM = register(
    Method(
        name="row-gram",
        claim="both sides, relative to themselves, if structure explains every zero and rows are independent",
        price=_price,
        solve=row_gram,
        applies=_applies,
        # Rows that factor-svd can take are its own: it bounds every rank.
        automatic=lambda A: A.factor is not None and not affordable(A.factor.shape) and _applies(A),
        decides=True,
        order=15,
    )
)
