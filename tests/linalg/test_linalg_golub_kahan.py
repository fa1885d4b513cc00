"""Golub-Kahan bidiagonalization finds every nonzero singular value of a factor, and resumes from a file.

Bugs that only these tests catch: a last column of `B` that is dropped, which makes spurious tiny singular values; a
run that ends before the row space is exhausted; null vectors that rounding puts into the basis one after another; a
file that cannot be read back, or of another matrix and resumed.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, NonFiniteError
from bnp_analysis.linalg import LinearOperator, MatrixOperator, condition_number, golub_kahan, singular_condition_number
from bnp_analysis.testing import KINDS, random_orthogonal, spectrum, symmetric_with_spectrum


@pytest.mark.parametrize("kind", KINDS)
def test_golub_kahan_finds_all_singular_values(kind: str, generator: torch.Generator) -> None:
    """Down to 1e-7 of the largest: their squares would drown in the rounding of `F^T F`."""
    values = spectrum(kind, 30, 1.0 if kind == "flat" else 1e14, rank=22)
    p = symmetric_with_spectrum(values, generator, factor_rows=40)
    assert p.operator.factor is not None
    for null, columns in ((None, 30), (p.null, 22)):
        run = golub_kahan(p.operator.factor, 30, null=null)
        assert run.stop == "exhausted"
        assert 22 <= run.matrix.shape[1] <= columns
        found = run.singular_values()[:22]
        np.testing.assert_allclose(found, values[:22].sqrt().numpy(), atol=1e-14)
        F = p.operator.factor
        assert float((F @ run.right - run.left @ torch.as_tensor(run.matrix)).norm()) <= 1e-13
        for basis in (run.left, run.right):
            assert float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max()) <= 1e-14


@pytest.mark.parametrize("kappa", [1e2, 1e8])
@pytest.mark.parametrize("kind", ["log", "clustered"])
def test_an_undeclared_null_space_takes_few_columns(kind: str, kappa: float, generator: torch.Generator) -> None:
    """Each column that rounding puts into the null space is a product spent on nothing."""
    rank = 350
    sigma = spectrum(kind, 400, kappa, rank=rank)[:rank].sqrt()
    left, right = (random_orthogonal(400, generator)[:, :rank] for _ in range(2))
    run = golub_kahan(MatrixOperator(left * sigma @ right.T), 400)
    assert run.stop == "exhausted"
    assert run.matrix.shape[1] <= rank + 2
    np.testing.assert_allclose(run.singular_values()[:rank], sigma.numpy(), atol=1e-13)


@pytest.mark.parametrize("shape", [(3, 9), (9, 3), (1, 5), (5, 1), (1, 1)])
def test_golub_kahan_of_wide_and_tall_factors(shape: tuple[int, int], generator: torch.Generator) -> None:
    """A wide factor ends on a vanishing alpha; without that last column of `B` small values would be spurious."""
    F = torch.randn(*shape, generator=generator, dtype=torch.float64)
    run = golub_kahan(MatrixOperator(F), 9)
    assert run.stop == "exhausted"
    np.testing.assert_allclose(run.singular_values()[: min(shape)], torch.linalg.svdvals(F).numpy(), rtol=1e-12)


def test_golub_kahan_stopped_early_bounds_from_below(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 200, 1e4, rank=150), generator, factor_rows=200)
    for null in (None, p.null):
        for steps in (20, 60, 120):
            k = condition_number(p.operator, null=null, method="golub-kahan", steps=steps)
            assert (k.stop, k.two_sided, k.upper) == ("steps", False, math.inf)
            assert 1.0 < k.lower <= 1e4
            assert "stopped after" in k.note


@pytest.mark.parametrize("cut", [1, 7, 19])
def test_golub_kahan_resumes_from_a_file(cut: int, tmp_path: Path, generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("repeated", 30, 1e3, rank=24), generator, factor_rows=24)
    F = p.operator.factor
    assert F is not None
    file = tmp_path / "runs" / "run.pt"
    whole = golub_kahan(F, 30, seed=3)
    golub_kahan(F, cut, seed=3, checkpoint=file)
    resumed = golub_kahan(F, 30, seed=3, checkpoint=file)
    np.testing.assert_allclose(resumed.singular_values(), whole.singular_values(), rtol=1e-9, atol=1e-15)
    assert (resumed.stop, resumed.matrix.shape) == (whole.stop, whole.matrix.shape)
    k = condition_number(p.operator, null=p.null, method="golub-kahan", checkpoint=tmp_path / "k.pt")
    assert k == condition_number(p.operator, null=p.null, method="golub-kahan", checkpoint=tmp_path / "k.pt") or (
        k.two_sided
    )


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path, generator: torch.Generator) -> None:
    F, G = (MatrixOperator(torch.randn(9, 6, generator=generator, dtype=torch.float64)) for _ in range(2))
    file = tmp_path / "run.pt"
    golub_kahan(F, 3, checkpoint=file)
    for other, seed in ((F, 1), (MatrixOperator(F.to_dense()[:, :5]), 0), (MatrixOperator(F.to_dense().float()), 0)):
        with pytest.raises(InvalidInputError, match="another run"):
            golub_kahan(other, 5, seed=seed, checkpoint=file)
    with pytest.raises(InvalidInputError, match="another matrix"):
        golub_kahan(G, 5, checkpoint=file)
    file.write_bytes(b"not a run")
    with pytest.raises(InvalidInputError, match="not a saved run"):
        golub_kahan(F, 5, checkpoint=file)


def test_golub_kahan_keeps_what_it_has_on_ctrl_c(tmp_path: Path, generator: torch.Generator) -> None:
    matrix = torch.randn(20, 12, generator=generator, dtype=torch.float64)

    class Impatient(LinearOperator):
        left = 11

        def _matmat(self, x: Tensor) -> Tensor:
            Impatient.left -= 1
            if Impatient.left == 0:
                raise KeyboardInterrupt
            return matrix @ x

        def _rmatmat(self, y: Tensor) -> Tensor:
            return matrix.T @ y

    F = Impatient((20, 12), torch.float64, "cpu")
    run = golub_kahan(F, 12, checkpoint=tmp_path / "run.pt")
    assert (run.stop, run.matrix.shape[1]) == ("interrupted", 10)
    resumed = golub_kahan(F, 12, checkpoint=tmp_path / "run.pt")
    np.testing.assert_allclose(resumed.singular_values(), torch.linalg.svdvals(matrix).numpy(), rtol=1e-12)


def test_bad_factors() -> None:
    F = MatrixOperator(torch.ones(3, 2))
    for measure in (lambda matrix: golub_kahan(matrix, 2), singular_condition_number):
        words = r"F must be a LinearOperator, not a Tensor: write bnp\.linalg\.MatrixOperator\(matrix\)$"
        with pytest.raises(InvalidInputError, match=words):
            measure(torch.ones(3, 2))
    with pytest.raises(InvalidInputError, match="steps must be positive, got steps=0"):
        golub_kahan(F, 0)
    for factor in (MatrixOperator(torch.ones(0, 2)), MatrixOperator(torch.ones(2, 0))):
        with pytest.raises(InvalidInputError, match="nothing to bidiagonalize"):
            golub_kahan(factor, 3)
    with pytest.raises(NonFiniteError):
        golub_kahan(MatrixOperator(torch.tensor([[1.0, math.nan]])), 2)
    assert golub_kahan(MatrixOperator(torch.zeros(3, 2)), 2).singular_values().size == 0
