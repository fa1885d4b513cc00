"""Golub-Kahan to breakdown, part of the way, and across interruptions.

Bugs that only these tests catch: bases sized by the parameters where the rank is what counts; an interrupt in the
middle of a step that leaves half of it behind; a restart, half a product, for every copy of a repeated value; a file
of another null space; a lower bound from columns that rounding has carried into a null space; what was below the noise
and set to zero, missing in the radius.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from linalg_problems import exact_problem
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, MemoryLimitError
from bnp_analysis.linalg import (
    Bidiagonalization,
    DensePreconditioner,
    GramOperator,
    LinearOperator,
    MatrixOperator,
    condition_number,
    golub_kahan,
)
from bnp_analysis.runtime import memory as memory_module
from bnp_analysis.testing import random_orthogonal, spectrum, symmetric_with_spectrum

# Exponents e of the singular values 2^-e: kappa is 4^max.
SHAPES: dict[str, list[int]] = {
    "log-spaced": [i % 22 for i in range(60)],
    "isolated": [0] * 59 + [22],
    "repeated": [0] * 30 + [10] * 20 + [20] * 10,
    "flat": [3] * 60,
    "rank one": [0],
}


class Watched(LinearOperator):
    """A matrix whose products are counted; the product with number `stop_at` is cut short by Ctrl-C."""

    def __init__(self, matrix: Tensor, stop_at: int = 0) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), matrix.dtype, "cpu")
        self.matrix, self.stop_at, self.halves = matrix, stop_at, 0
        self.asked: list[Tensor] = []

    def _matmat(self, x: Tensor) -> Tensor:
        return self._count(self.matrix @ x)

    def _rmatmat(self, y: Tensor) -> Tensor:
        return self._count(self.matrix.T @ y)

    def _count(self, product: Tensor) -> Tensor:
        self.halves += 1
        if self.halves == self.stop_at:
            raise KeyboardInterrupt
        return product


def laws(F: Tensor, run: Bidiagonalization) -> None:
    """`F V = U B` to the noise, orthonormal bases."""
    B = torch.from_numpy(run.matrix)
    assert float((F.double() @ run.right - run.left @ B).norm()) <= run.dropped + 2 * run.noise
    for basis in (run.left, run.right):
        assert float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max()) <= 1e-13


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_singular_values(shape: str, dtype: torch.dtype, generator: torch.Generator) -> None:
    exponents = SHAPES[shape] if dtype == torch.float64 else [min(e, 8) for e in SHAPES[shape]]
    p = exact_problem(exponents, generator, zeros=64 - len(exponents), dtype=dtype)
    sigma = np.sort(2.0 ** -np.array(exponents, dtype=float))[::-1]
    for null in (None, p.null):
        F = Watched(p.factor)
        run = golub_kahan(F, 64, null=null)
        found = run.singular_values()
        columns = run.matrix.shape[1]
        assert (F.halves + 1) // 2 == run.products <= columns + 1, "a copy of a repeated value costs no product more"
        assert run.stop == "exhausted"
        np.testing.assert_allclose(found[: sigma.size], sigma, atol=run.noise + run.dropped)
        assert (found[sigma.size :] <= run.noise).all(), "spurious values where nothing is left"
        laws(p.factor, run)
        if null is not None:
            assert columns == sigma.size
            assert float((null.double().T @ run.right).abs().max()) <= 1e-14 if dtype == torch.float64 else 1e-6


class Rough(Watched):
    """Products rougher than the dtype: `F` with an error on its null space, `F^T` with others, all below the noise."""

    def __init__(self, rough: float, rougher: float) -> None:
        """Rank 20, value 1, in 60 x 40; noise `nu = 10 u sqrt(60)`."""
        eye = torch.eye(60, dtype=torch.float64)
        nu = 10 * torch.finfo(torch.float64).eps * math.sqrt(60)
        super().__init__(eye[:, :20] @ eye[:20, :40])
        self.away = rough * nu * eye[:, 30:50] @ eye[20:40, :40]
        self.back = rougher * nu * eye[:40, 20:40] @ eye[30:50]

    def _matmat(self, x: Tensor) -> Tensor:
        return self._count((self.matrix + self.away) @ x)

    def _rmatmat(self, y: Tensor) -> Tensor:
        self.asked.append(y[:, 0].clone())
        return self._count(self.matrix.T @ y + self.back @ y)


def test_what_was_set_to_zero_is_in_the_radius() -> None:
    """Twenty columns whose images lie below the noise, together above it."""
    F = Rough(0.8, 300.0)
    run = golub_kahan(F, 40)
    assert run.matrix.shape == (20, 40)
    gap = (F.matrix + F.away) @ run.right - run.left @ torch.from_numpy(run.matrix)
    assert float(gap.norm()) > 3 * run.noise
    assert run.dropped == pytest.approx(float(gap.norm()), rel=0.1, abs=0.0)
    k = condition_number(GramOperator(F), method="golub-kahan")
    assert math.sqrt(k.noise_floor) >= run.dropped + 1.9 * run.noise
    # What F^T sends out of V at the end is below the noise, and counted too.
    assert run.noise / 10 < golub_kahan(Rough(0.0, 0.8), 40).dropped < 2 * run.noise


def test_random_vectors_come_from_outside_what_is_known() -> None:
    """So that `F^T` of them has nothing in `V`: what rounding has put there is not carried on unseen."""
    F = Rough(0.0, 0.0)
    run = golub_kahan(F, 40)
    assert len(F.asked) == 22
    for known, y in enumerate(F.asked[1:]):
        assert float((run.left[:, : max(known - 1, 0)].T @ y).norm()) < 1e-13


@pytest.mark.parametrize("scale", [2.0**-46, 1.0, 2.0**46])
def test_the_route_is_exact_and_spends_rank_plus_two_products(scale: float, generator: torch.Generator) -> None:
    exponents = [round(i * 20 / 60) for i in range(60)]
    p = exact_problem(exponents, generator, zeros=4)
    F = Watched(scale * p.factor)
    k = condition_number(GramOperator(F), method="golub-kahan")
    assert k.value == pytest.approx(p.kappa, rel=1e-9)
    assert k.rank == 60
    assert (F.halves + 1) // 2 == k.matvecs <= 62
    distinct = symmetric_with_spectrum(scale * spectrum("log", 60, 1e12), generator, factor_rows=80)
    k = condition_number(distinct.operator, null=distinct.null, method="golub-kahan")
    assert k.two_sided
    assert k.matvecs <= 62
    assert k.value == pytest.approx(1e12, rel=1e-8)
    assert k.upper / k.lower - 1 <= 1e-6


def test_a_few_examples_and_many_parameters_need_little_memory(
    monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    """Bases of `rank + 2` vectors, not of as many as there are parameters."""
    F = MatrixOperator(torch.randn(12, 3000, generator=generator, dtype=torch.float64))
    monkeypatch.setattr(memory_module, "available_memory", lambda *_: 10 * 12 * 3012 * 8)
    k = condition_number(GramOperator(F), method="golub-kahan")
    sigma = torch.linalg.svdvals(F.to_dense())
    assert k.two_sided
    assert k.value == pytest.approx(float(sigma[0] / sigma[-1]) ** 2, rel=1e-10)
    with pytest.raises(MemoryLimitError, match="Golub-Kahan bases of 1000 vectors for a 1000 x 3000 factor"):
        condition_number(GramOperator(MatrixOperator(torch.ones(1000, 3000))), method="golub-kahan", steps=1000)


def test_bases_grow_where_rounding_adds_directions(generator: torch.Generator) -> None:
    """Eighty repeated values and an undeclared null space: more columns than the rank, and all of them right."""
    F = torch.zeros(120, 200, dtype=torch.float64)
    F[:90, :90] = random_orthogonal(90, generator)
    F = F @ random_orthogonal(200, generator)
    F[0] *= 1e-6
    run = golub_kahan(MatrixOperator(F), 200)
    assert run.stop == "exhausted"
    laws(F, run)
    np.testing.assert_allclose(run.singular_values()[:90], torch.linalg.svdvals(F)[:90].numpy(), atol=1e-13)


def test_bases_grow_beyond_a_rank_that_was_said_too_small(tmp_path: Path, generator: torch.Generator) -> None:
    F = torch.randn(9, 7, generator=generator, dtype=torch.float64)
    for _ in range(2):  # the second run is resumed from all seven columns
        run = golub_kahan(MatrixOperator(F, rank_bound=1), 7, checkpoint=tmp_path / "run.pt")
        laws(F, run)
        np.testing.assert_allclose(run.singular_values(), torch.linalg.svdvals(F).numpy(), rtol=1e-12)


@pytest.mark.parametrize("kind", ["log", "clustered"])
@pytest.mark.parametrize("norm", [0.0, 1e2])
def test_a_partial_run_bounds_from_below(kind: str, norm: float, generator: torch.Generator) -> None:
    """Undeclared, half declared and declared null spaces; with `P`, whose rounding leaks into the null space sooner."""
    kappa, n, rank = 1e6, 90, 70
    for trial in range(4):
        p = symmetric_with_spectrum(spectrum(kind, n, kappa, rank=rank), generator, factor_rows=n)
        assert p.operator.factor is not None
        F, P = p.operator.factor.to_dense(), None
        null = p.null
        if norm:
            change = random_orthogonal(n, generator) * spectrum("log", n, norm, scale=norm) @ p.vectors.T
            F, P = F @ torch.linalg.inv(change), DensePreconditioner(change)
            null = torch.linalg.svd(F)[2][rank:].T
        A = GramOperator(MatrixOperator(F, exact=False))
        for steps in (10, 40, 65):
            for declared in (None, Found(null[:, 3:]), null):
                k = condition_number(A, preconditioner=P, null=declared, method="golub-kahan", steps=steps, seed=trial)
                assert math.isnan(k.lower) or k.lower <= kappa * (1 + 1e-3), (steps, str(k))
                assert k.upper >= kappa * (1 - 1e-3)


class Found:
    """Null directions that were found: perhaps not all."""

    def __init__(self, basis: Tensor) -> None:
        self.basis, self.sources = basis, {"found": basis.shape[1]}


@pytest.mark.parametrize("steps", [60, 100, 150, 400])
def test_an_undeclared_null_space_is_not_contaminated(steps: int, generator: torch.Generator) -> None:
    """Truth 1e4 and 50 undeclared null directions."""
    p = symmetric_with_spectrum(spectrum("log", 400, 1e4, rank=350), generator, factor_rows=400)
    for seed in range(3):
        k = condition_number(p.operator, method="golub-kahan", steps=steps, seed=seed)
        assert k.lower <= 1e4
        assert not k.two_sided
        assert k.lower >= 1000 or steps == 60


@pytest.mark.parametrize("stop_at", range(2, 60, 3))
def test_an_interrupted_run_resumes_bit_for_bit(stop_at: int, tmp_path: Path, generator: torch.Generator) -> None:
    """Wherever Ctrl-C falls: in the first or the second product of a step, or in a restart."""
    p = exact_problem([0] * 4 + [i % 7 for i in range(10)], generator, zeros=2)
    whole = golub_kahan(MatrixOperator(p.factor), 16, seed=3)
    file = tmp_path / "run.pt"
    broken = Watched(p.factor, stop_at)
    if stop_at == 2:
        with pytest.raises(KeyboardInterrupt):
            golub_kahan(broken, 16, seed=3, checkpoint=file)
        assert not file.exists(), "nothing was known yet"
        return
    first = golub_kahan(broken, 16, seed=3, checkpoint=file)
    assert first.stop == ("interrupted" if broken.halves == stop_at else "exhausted")
    laws(p.factor, first)
    resumed = golub_kahan(MatrixOperator(p.factor), 16, seed=3, checkpoint=file)
    np.testing.assert_array_equal(resumed.matrix, whole.matrix)
    for ours, theirs in ((resumed.left, whole.left), (resumed.right, whole.right)):
        assert torch.equal(ours, theirs)
    assert (resumed.stop, resumed.clean, resumed.dropped) == (whole.stop, whole.clean, whole.dropped)
    assert whole.products <= resumed.products <= whole.products + 1, "one product checks the matrix"


def test_a_run_is_saved_as_it_goes(tmp_path: Path, generator: torch.Generator) -> None:
    """Killed, not interrupted: the file is at most fifty columns old."""
    F = random_orthogonal(130, generator) * spectrum("log", 130, 1e3)
    file = tmp_path / "run.pt"

    def die(done: int, total: int) -> None:
        if done == 120:
            raise SystemExit

    with pytest.raises(SystemExit):
        golub_kahan(MatrixOperator(F), 130, checkpoint=file, progress=die)
    rest = Watched(F)
    resumed = golub_kahan(rest, 130, checkpoint=file)
    np.testing.assert_array_equal(resumed.matrix, golub_kahan(MatrixOperator(F), 130).matrix)
    assert rest.halves <= 2 * 31, "from column 100, not from the start"


def test_a_file_is_resumed_by_its_own_problem_only(tmp_path: Path, generator: torch.Generator) -> None:
    p = exact_problem([i % 5 for i in range(12)], generator, zeros=4)
    F, file = MatrixOperator(p.factor), tmp_path / "run.pt"
    golub_kahan(F, 6, null=p.null, checkpoint=file)
    nudged = p.factor + 1e-9 * torch.randn(16, 16, generator=generator, dtype=torch.float64)
    for other, null in ((MatrixOperator(nudged), p.null), (MatrixOperator(2 * p.factor), p.null)):
        with pytest.raises(InvalidInputError, match="another matrix or another null space"):
            golub_kahan(other, 16, null=null, checkpoint=file)
    turned = random_orthogonal(16, generator)[:, :4]
    with pytest.raises(InvalidInputError, match="another matrix or another null space"):
        golub_kahan(F, 16, null=turned, checkpoint=file)
    with pytest.raises(InvalidInputError, match="another run"):
        golub_kahan(F, 16, null=p.null[:, :3], checkpoint=file)
    with pytest.raises(InvalidInputError, match="allow more"):
        golub_kahan(F, 5, null=p.null, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(InvalidInputError, match="not a saved run"):
        golub_kahan(F, 16, null=p.null, checkpoint=file)
