"""From blocks to the network: whitening every block is within `s` of the best block-diagonal scaling (T16)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.linalg import Preconditioner
from bnp_analysis.theory.check import Check
from bnp_analysis.theory.sources import Source
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, statement

_T16 = "with all s blocks whitened kappa*(P^T A P) <= s min kappa*(D^T A D) over block-diagonal D"
_TOP = "with all s blocks whitened lambda_max <= s"
_SPREAD = "with block eigenvalues in [a, b] kappa*(P^T A P) <= s (b/a) min kappa*(D^T A D)"
_RANDOM_CASES = 20
_GAP = 100.0


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
    parts = []
    for positions in blocks:
        found = whitened_block(F[:, positions])
        if found is not None:
            parts.append(found)
    if not parts:
        raise NotApplicable("the matrix is zero")
    white = torch.linalg.svdvals(torch.cat([u for u, _ in parts], dim=1))
    rank = decided_rank(white, max(F.shape), "the whole")
    c = [10 ** (2 * float(torch.rand(1, generator=g)) - 1) for _ in parts]
    uneven = torch.linalg.svdvals(torch.cat([u * math.sqrt(x) for (u, _), x in zip(parts, c, strict=True)], dim=1))
    tried = {"I": _kappa(torch.cat([u * s for u, s in parts], dim=1), rank)}
    tried |= {name: _kappa(matrix, rank) for name, matrix in (scalings or {}).items()}
    for k in range(tries):
        tried[f"random {k}"] = _kappa(torch.cat([u @ _near(u.shape[1], k, g) for u, _ in parts], dim=1), rank)
    name = min(tried, key=lambda key: tried[key])
    return Whitened(
        blocks=len(parts),
        rank=rank,
        kappa=float((white[0] / white[rank - 1]) ** 2),
        top=float(white[0] ** 2),
        best=tried[name],
        best_name=name,
        uneven=float((uneven[0] / uneven[rank - 1]) ** 2),
        spread=max(c) / min(c),
        tried=tried,
    )


def whitened_block(F: Tensor) -> tuple[Tensor, Tensor] | None:
    """`F P` with `P` whitening `F^T F` on its range, and the singular values taken out; None for a zero block."""
    u, s, _ = torch.linalg.svd(F, full_matrices=False)
    if not len(s) or float(s[0]) == 0:
        return None
    rank = decided_rank(s, max(F.shape), "a block")
    return u[:, :rank], s[:rank]


def _near(n: int, k: int, g: torch.Generator) -> Tensor:
    """A random `D` of one block, in whitened coordinates: from a change of scale alone to any matrix."""
    scale = torch.exp(torch.randn(1, generator=g, dtype=torch.float64))
    noise = torch.randn(n, n, generator=g, dtype=torch.float64) / math.sqrt(max(n, 1))
    return scale * (torch.eye(n, dtype=torch.float64) + (0.0, 0.05, 0.2, 0.5)[k % 4] * noise)


def decided_rank(values: Tensor, size: int, what: str) -> int:
    """The rank from descending singular values, where a gap decides it.

    Raises:
        NotApplicable: values on both sides of the rounding level are too close.
    """
    floor = 10 * size * torch.finfo(values.dtype).eps * float(values[0])
    rank = int((values > floor).sum())
    if rank < len(values) and float(values[rank - 1]) < _GAP * float(values[rank]):
        raise NotApplicable(
            f"the rank of {what} is not decided: singular values go from {float(values[rank - 1]):.2g} to "
            f"{float(values[rank]):.2g} around the rounding level {floor:.2g}"
        )
    return rank


def _kappa(matrix: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(matrix)
    return float((values[0] / values[rank - 1]) ** 2) if float(values[rank - 1]) > 0 else math.inf


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
    try:
        yield from _network(problem)
    except NotApplicable as refusal:
        yield Check.not_applicable(f"{_T16} [network]", Source.T16, str(refusal))
    cases = [random_case(1000 * problem.seed + k) for k in range(_RANDOM_CASES)]
    worst = max(cases, key=lambda case: case.kappa / (case.blocks * case.best))
    yield _compare(f"{_T16} [worst of {len(cases)} random matrices]", worst)


def _network(problem: Problem) -> Iterator[Check]:
    names = network_blocks(problem)
    if len(names) < 2:
        raise NotApplicable("a single block")
    F = problem.factor
    scaled = {"P": _rows(problem.P, F)} if _block_diagonal(problem.P, list(names.values())) else {}
    found = whitened(F, list(names.values()), problem.random(16), scaled)
    where = f"network, blocks {', '.join(names)}"
    yield _compare(f"{_T16} [{where}]", found)
    hypotheses = {"positive semidefinite": True, "ranks decided by gaps": True}
    yield Check.compare(
        f"{_TOP} [{where}]", Source.T16, observed=found.top, predicted=float(found.blocks), tolerance=1e-9,
        relation="<=", hypotheses=hypotheses,
    )  # fmt: skip
    yield Check.compare(
        f"{_SPREAD} [{where}]",
        Source.T16,
        observed=found.uneven,
        predicted=found.blocks * found.spread * found.best,
        tolerance=1e-7,
        relation="<=",
        hypotheses=hypotheses,
        details={"b/a": found.spread},
    )


def _compare(words: str, found: Whitened) -> Check:
    return Check.compare(
        words,
        Source.T16,
        observed=found.kappa,
        predicted=found.blocks * found.best,
        tolerance=1e-7,
        relation="<=",
        hypotheses={"positive semidefinite": True, "ranks decided by gaps": True},
        reason=f"the best D found: {found.best_name}",
        details={"s": found.blocks, "rank": found.rank, **{f"kappa*, {k}": v for k, v in found.tried.items()}},
    )


def _rows(P: Preconditioner, F: Tensor) -> Tensor:
    rows: Tensor = P.apply_transpose(F.T.contiguous()).T
    return rows


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
