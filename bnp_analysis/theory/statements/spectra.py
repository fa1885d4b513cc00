"""Condition numbers in floating point (T13), and whitened blocks and the whole matrix (T16)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from bnp_analysis.errors import ZeroOperatorError
from bnp_analysis.linalg import (
    CallableOperator,
    DensePreconditioner,
    MatrixOperator,
    Preconditioner,
    condition_number,
    lanczos,
)
from bnp_analysis.linalg.condition.certificates import kuczynski_wozniakowski
from bnp_analysis.linalg.derived import GramOperator
from bnp_analysis.testing import random_orthogonal, spectrum
from bnp_analysis.theory.check import Check, Source
from bnp_analysis.theory.statements.setting import (
    NotApplicable,
    Problem,
    at_least,
    at_most,
    attempted,
    decided_rank,
    equals,
    kappa_of_rank,
    located,
    refused,
    singular_values,
    statement,
)

_T13 = "what a computed condition number may claim in floating point"
_RITZ = "the ratio of extreme Ritz values from a start in the range is at most kappa*"
_RANDOM_STARTS = "Kuczynski-Wozniakowski bounds fail no more often than they say"
_T16 = "with all s blocks whitened kappa*(P^T A P) <= s min kappa*(D^T A D) over block-diagonal D"
_TOP = "with all s blocks whitened lambda_max <= s"
_SPREAD = "with block eigenvalues in [a, b] kappa*(P^T A P) <= s (b/a) min kappa*(D^T A D)"
_UNIT = torch.finfo(torch.float64).eps
_KAPPA = 1e12
_SHAPE = (40, 20)
_CASES = 12
_STARTS = 60
_STEPS = 40
_CHANCE = 0.2
_RANDOM_CASES = 20
#: Singular values on both sides of a rank must be this far apart, or the rank of a block is not decided.
_GAP = 100.0


@statement(Source.T13, _T13)
def check_floating_point(problem: Problem) -> Iterator[Check]:
    """T13: factor against Gram matrix, the `|P|` term, Ritz values, random starts."""
    yield from _factor_and_gram(problem.random(13))
    yield from _product(problem.random(14))
    yield from attempted(_RITZ, _ritz(problem))
    yield from attempted(_RANDOM_STARTS, _starts(problem))


def _factor_and_gram(g: torch.Generator) -> Iterator[Check]:
    """Errors of `lambda_min+` from the two methods, the worst of a few matrices with prescribed singular values."""
    factor, gram = 0.0, 0.0
    rows, columns = _SHAPE
    for _ in range(_CASES):
        sigma = spectrum("log", columns, _KAPPA).sqrt()
        F = random_orthogonal(rows, g)[:, :columns] * sigma @ random_orthogonal(columns, g)
        true = float(sigma[-1] ** 2)
        factor = max(factor, abs(condition_number(GramOperator(MatrixOperator(F))).lambda_min / true - 1))
        gram = max(gram, abs(float(torch.linalg.eigvalsh(F.T @ F)[0]) / true - 1))
    details = {"kappa": _KAPPA, "matrices": _CASES, "factor": factor, "Gram matrix": gram}
    yield at_most(
        "from the factor the relative error of lambda_min+ is of order u sqrt(kappa)",
        factor,
        2 * rows * _UNIT * math.sqrt(_KAPPA),
        details=details,
    )
    yield at_least(
        "from the Gram matrix it is of order u kappa: more than sqrt(kappa)/1000 times as large",
        gram / max(factor, _UNIT),
        math.sqrt(_KAPPA) / 1000,
        details=details,
    )


def _product(g: torch.Generator) -> Iterator[Check]:
    """Intervals for `F P`, `|P| = 1e5`, against singular values of the product in exact arithmetic."""
    with_term, without = 0, 0
    for _ in range(_CASES):
        n = int(torch.randint(3, 7, (1,), generator=g))
        P = random_orthogonal(n, g) * spectrum("log", n, 1e5, scale=1e5) @ random_orthogonal(n, g)
        G = random_orthogonal(n + 2, g)[:, :n] * spectrum("log", n, 100.0).sqrt() @ random_orthogonal(n, g)
        F = G @ torch.linalg.inv(P)
        sigma = torch.linalg.svdvals(_exact_product(F, P))
        true = float((sigma[0] / sigma[-1]) ** 2)
        k = condition_number(GramOperator(MatrixOperator(F)), preconditioner=DensePreconditioner(P))
        with_term += not k.lower <= true <= k.upper
        computed = torch.linalg.svdvals(F @ P)
        top, bottom = float(computed[0]), float(computed[-1])
        d = radius_without_product(top, (n + 2, n))
        without += not ((top - d) / (bottom + d)) ** 2 <= true <= ((top + d) / max(bottom - d, 1e-300)) ** 2
    details = {"intervals": _CASES, "|P|": 1e5, "missed with the term": with_term, "missed without": without}
    words = "with the |P| term the interval of kappa*(P^T A P) holds the truth: intervals that miss it"
    yield equals(words, float(with_term), 0.0, details=details)
    yield at_least("without the |P| term most intervals miss it", float(without), _CASES / 2, details=details)


def radius_without_product(largest: float, shape: tuple[int, int]) -> float:
    """`max(r, n) u sigma_1`: how far the SVD alone moves singular values, the product left out."""
    return max(shape) * _UNIT * largest


def _exact_product(F: Tensor, P: Tensor) -> Tensor:
    """`F P` in rational arithmetic, rounded once."""
    left, right = ([[Fraction(x) for x in row] for row in matrix.tolist()] for matrix in (F, P.T))
    rows = [[float(sum(a * b for a, b in zip(row, col, strict=True))) for col in right] for row in left]
    return torch.tensor(rows, dtype=torch.float64)


def _ritz(problem: Problem) -> Iterator[Check]:
    """The ratio of extreme Ritz values, start in the range, against all singular values of the user's factor."""
    A = GramOperator(MatrixOperator(problem.factor, exact=False))
    try:
        dense = condition_number(A)
    except ZeroOperatorError as error:
        raise NotApplicable(str(error)) from error
    for steps in (15, 60):
        if steps >= A.dim:
            continue
        words = f"{_RITZ} [{steps} steps]"
        found = condition_number(A, method="lanczos", steps=steps, seed=problem.seed)
        if math.isnan(found.lower):
            yield refused(words, f"no bound was issued: {found.note}")
            continue
        yield at_most(
            words,
            found.lower,
            dense.value,
            tolerance=2 * math.sqrt(dense.noise_floor / dense.lambda_min),
            given=("start in the range", "Ritz values above the floor"),
            details={"rank": dense.rank, "unresolved": dense.unresolved},
        )


def _starts(problem: Problem) -> Iterator[Check]:
    """How often the Kuczynski-Wozniakowski bounds fail over random starts, on the user's own nonzero spectrum."""
    values = singular_values(problem.factor)
    values = values[values > 1e-6 * values[:1]].square()
    n = len(values)
    steps = min(_STEPS, n // 2)
    if steps < 5:
        raise NotApplicable(f"{n} nonzero eigenvalues: Lanczos finds them all")
    A = CallableOperator(lambda v: values * v, n, dtype=torch.float64)
    failed, finite = 0, 0
    for k in range(_STARTS):
        ritz = lanczos(A, steps, seed=1000 * problem.seed + k).ritz()[0]
        high, low = kuczynski_wozniakowski(float(ritz[-1]), float(ritz[0]), steps, n, _CHANCE)
        finite += math.isfinite(high)
        failed += not (low <= float(values[-1]) * (1 + 1e-12) and float(values[0]) <= high * (1 + 1e-12))
    if not finite:
        raise NotApplicable(f"{steps} steps are too few for a bound in dimension {n}")
    yield at_most(
        _RANDOM_STARTS,
        failed / _STARTS,
        _CHANCE + 3 * math.sqrt(_CHANCE * (1 - _CHANCE) / _STARTS),
        reason=f"stated {_CHANCE}, with three standard errors of {_STARTS} starts",
        details={"dimension": n, "steps": steps, "failed": failed},
    )


@dataclass(frozen=True, eq=False)
class Whitened:
    """The two sides of T16 for one factor.

    Attributes:
        blocks: `s`, of nonzero blocks.
        rank: of the factor.
        kappa: `kappa*` with all blocks whitened.
        top: its largest eigenvalue.
        best: the smallest `kappa*(D^T A D)` found, and its name.
        uneven: `kappa*` with blocks `c_b I`, `c_b` in `[a, b]`, and `b/a`.
        tried: `kappa*(D^T A D)` of every `D` by name.
    """

    blocks: int
    rank: int
    kappa: float
    top: float
    best: float
    best_name: str
    uneven: float
    spread: float
    tried: dict[str, float]


def whitened(
    F: Tensor,
    blocks: Sequence[Tensor],
    g: torch.Generator,
    scalings: dict[str, Tensor] | None = None,
    tries: int = 8,
) -> Whitened:
    """Whiten the diagonal blocks of `A = F^T F` on their ranges and compare with other block-diagonal scalings.

    Args:
        F: `(r, n)`.
        blocks: positions of each block, disjoint.
        g: of random `D`.
        scalings: name -> `F D` for further block-diagonal `D`.
        tries: random `D`.

    Returns:
        `Whitened`.

    Raises:
        NotApplicable: the rank of a block or of the whole is not decided by a gap.

    Source: T16; Demmel 1983, Elsner 1984.
    """
    parts = [found for positions in blocks if (found := whitened_block(F[:, positions])) is not None]
    if not parts:
        raise NotApplicable("the matrix is zero")
    white = torch.linalg.svdvals(torch.cat([u for u, _ in parts], dim=1))
    rank = decided_rank(white, _floor(white, F), _GAP, "of the whole ")
    c = [10 ** (2 * float(torch.rand(1, generator=g)) - 1) for _ in parts]
    uneven = torch.cat([u * math.sqrt(x) for (u, _), x in zip(parts, c, strict=True)], dim=1)

    def matrices() -> Iterator[tuple[str, Tensor]]:
        """One after another: each is as large as `F`."""
        yield "I", torch.cat([u * s for u, s in parts], dim=1)
        yield from (scalings or {}).items()
        for k in range(tries):
            yield f"random {k}", torch.cat([u @ _near(u.shape[1], k, g) for u, _ in parts], dim=1)

    tried = {name: kappa_of_rank(matrix, rank) ** 2 for name, matrix in matrices()}
    name = min(tried, key=lambda key: tried[key])
    return Whitened(
        blocks=len(parts),
        rank=rank,
        kappa=float((white[0] / white[rank - 1]) ** 2),
        top=float(white[0] ** 2),
        best=tried[name],
        best_name=name,
        uneven=kappa_of_rank(uneven, rank) ** 2,
        spread=max(c) / min(c),
        tried=tried,
    )


def _floor(values: Tensor, F: Tensor) -> float:
    return 10 * max(F.shape) * torch.finfo(values.dtype).eps * float(values[0])


def whitened_block(F: Tensor) -> tuple[Tensor, Tensor] | None:
    """`F P` with `P` whitening `F^T F` on its range, and the singular values taken out; None for a zero block."""
    u, s, _ = torch.linalg.svd(F, full_matrices=False)
    if not len(s) or float(s[0]) == 0:
        return None
    rank = decided_rank(s, _floor(s, F), _GAP, "of a block ")
    return u[:, :rank], s[:rank]


def _near(n: int, k: int, g: torch.Generator) -> Tensor:
    """A random `D` of one block, in whitened coordinates: from a change of scale alone to any matrix."""
    scale = torch.exp(torch.randn(1, generator=g, dtype=torch.float64))
    noise = torch.randn(n, n, generator=g, dtype=torch.float64) / math.sqrt(max(n, 1))
    return scale * (torch.eye(n, dtype=torch.float64) + (0.0, 0.05, 0.2, 0.5)[k % 4] * noise)


def random_case(seed: int) -> Whitened:
    """A random matrix with a few blocks of uneven scales, rank-deficient in every third case.

    Example:
        >>> case = random_case(0)
        >>> case.kappa <= case.blocks * case.best
        True
    """
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 6, (int(torch.randint(2, 6, (1,), generator=g)),), generator=g).tolist()
    n = sum(sizes)
    rows = n + 4 if seed % 3 else max(n - 2, 2)
    F = torch.randn(rows, n, generator=g, dtype=torch.float64)
    F = F @ (torch.eye(n, dtype=torch.float64) + torch.randn(n, n, generator=g, dtype=torch.float64))
    F = F * 10 ** torch.randn(n, generator=g, dtype=torch.float64)
    return whitened(F, torch.split(torch.arange(n), sizes), g)


@statement(Source.T16, _T16)
def check_blocks(problem: Problem) -> Iterator[Check]:
    """T16: on the network, its layers as blocks, and on random matrices."""
    names = network_blocks(problem)
    where = f"network, blocks {', '.join(names)}"
    refusal = f"{_T16} [network]"
    yield from attempted(refusal, located(where, _network(problem, list(names.values()))))
    cases = [random_case(1000 * problem.seed + k) for k in range(_RANDOM_CASES)]
    worst = max(cases, key=lambda case: case.kappa / (case.blocks * case.best))
    yield from located(f"worst of {len(cases)} random matrices", [_compare(worst)])


_PSD = ("positive semidefinite", "ranks decided by gaps")


def _network(problem: Problem, blocks: list[Tensor]) -> Iterator[Check]:
    if len(blocks) < 2:
        raise NotApplicable("a single block")
    F, P = problem.factor, problem.P
    scaled = {"P": P.apply_transpose(F.T.contiguous()).T} if _block_diagonal(P, blocks) else {}
    found = whitened(F, blocks, problem.random(16), scaled)
    yield _compare(found)
    yield at_most(_TOP, found.top, float(found.blocks), tolerance=1e-9, given=_PSD)
    bound = found.blocks * found.spread * found.best
    yield at_most(_SPREAD, found.uneven, bound, tolerance=1e-7, given=_PSD, details={"b/a": found.spread})


def _compare(found: Whitened) -> Check:
    return at_most(
        _T16,
        found.kappa,
        found.blocks * found.best,
        tolerance=1e-7,
        given=_PSD,
        reason=f"the best D found: {found.best_name}",
        details={"s": found.blocks, "rank": found.rank, **{f"kappa*, {k}": v for k, v in found.tried.items()}},
    )


def network_blocks(problem: Problem) -> dict[str, Tensor]:
    """The parameters of every module that holds some, by its name."""
    space = problem.risk.space
    found: dict[str, list[Tensor]] = {}
    for name in space.names:
        place = space.slice_of(name)
        found.setdefault(name.rpartition(".")[0] or name, []).append(torch.arange(place.start, place.stop))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _block_diagonal(P: Preconditioner, blocks: list[Tensor]) -> bool:
    """Whether `P` couples no two blocks, seen on one random vector of each."""
    g = torch.Generator().manual_seed(0)
    for positions in blocks:
        v = torch.zeros(P.dim, dtype=P.dtype)
        v[positions] = torch.randn(len(positions), generator=g, dtype=torch.float64).to(P.dtype)
        image = P.apply(v)
        image[positions] = 0
        if bool(image.any()):
            return False
    return True
