"""Block Lanczos keeps its identity while columns of a block become dependent.

Bugs that only these tests catch: a dependent column that is normalized instead of dropped; a residual that belongs
to another block; multiplicities above one but within the block size that are missed; an absolute tolerance.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from linalg_problems import counting, interrupt
from torch import Tensor

from bnp_analysis.errors import InvalidInputError, MemoryLimitError, NonFiniteError
from bnp_analysis.linalg import BlockTridiagonalization, DenseOperator, SymmetricOperator, block_lanczos
from bnp_analysis.runtime import memory as memory_module
from bnp_analysis.testing import KINDS, spectrum, symmetric_with_spectrum

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def defect(A: SymmetricOperator, run: BlockTridiagonalization) -> float:
    """`|A Q - Q T - R E^T|`."""
    basis = run.basis.double()
    gap = (A @ run.basis).double() - basis @ torch.as_tensor(run.matrix)
    width = run.residual.shape[1]
    if width:
        gap[:, -width:] -= run.residual.double()
    return float(gap.norm())


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("block_size", "steps"), [(1, 12), (3, 1), (3, 9), (4, 40)])
def test_decomposition_and_orthogonality(
    kind: str, block_size: int, steps: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    values = spectrum(kind, 40, 1.0 if kind == "flat" else 1e4, rank=33)
    p = symmetric_with_spectrum(values, generator, dtype=dtype)
    eps = torch.finfo(dtype).eps
    for null in (None, p.null):
        run = block_lanczos(p.operator, steps, block_size=block_size, seed=2, null=null)
        k = run.basis.shape[1]
        assert run.matvecs == k <= min(steps * block_size, 40 if null is None else 33)
        assert defect(p.operator, run) <= 100 * math.sqrt(40) * eps
        Q = run.basis.double()
        assert float((Q.T @ Q - torch.eye(k)).abs().max()) <= 30 * eps
        assert np.array_equal(run.matrix, run.matrix.T)
        assert run.residual.shape[1] == 0 or run.stop == "steps"
        # The far part of T is rounding: it is block tridiagonal.
        far = np.abs(np.subtract.outer(np.arange(k), np.arange(k))) > 2 * block_size
        assert np.all(np.abs(run.matrix[far]) <= 30 * math.sqrt(40) * eps)
        if null is not None:
            assert float((null.T @ run.basis).abs().max()) <= 30 * eps


def test_multiplicity_up_to_the_block_size(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(torch.tensor([5.0] * 4 + [2.0] * 3 + [0.0] * 2), generator)
    found = block_lanczos(p.operator, 3, block_size=3).ritz()[0]
    copies = [int((np.abs(found - value) < 1e-12).sum()) for value in (5, 2, 0)]
    assert copies[1:] == [3, 2]
    assert copies[0] >= 3


def test_an_invariant_space_has_no_residual(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(torch.tensor([2.0] * 7 + [1.0] * 7), generator)
    run = block_lanczos(p.operator, 9, block_size=3)
    assert (run.stop, run.basis.shape[1], run.residual.shape[1]) == ("invariant subspace", 6, 0)
    assert run.ritz()[1].max() == 0.0


def test_residuals_bound_the_distance_to_an_eigenvalue(generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(spectrum("log", 60, 1e3), generator)
    values, residuals = block_lanczos(p.operator, 12, block_size=2).ritz()
    nearest = (torch.as_tensor(values)[:, None] - p.values).abs().min(dim=1).values.numpy()
    assert np.all(nearest <= residuals + 1e-13)
    assert residuals.min() < 1e-6
    assert residuals.max() > 1e-2


@pytest.mark.parametrize("scale", [1e-14, 1e14])
def test_scale(scale: float, generator: torch.Generator) -> None:
    p = symmetric_with_spectrum(torch.tensor([2.0] * 10 + [1.0] * 10), generator)
    plain, scaled = (block_lanczos(DenseOperator(s * p.operator.to_dense()), 30, block_size=3) for s in (1.0, scale))
    assert plain.basis.shape == scaled.basis.shape == (20, 6)
    np.testing.assert_allclose(scaled.ritz()[0] / scale, plain.ritz()[0], rtol=1e-9)


def test_small_and_zero_matrices() -> None:
    assert block_lanczos(DenseOperator(torch.tensor([[2.0]])), 3, block_size=1).ritz()[0].tolist() == [2.0]
    assert block_lanczos(DenseOperator(torch.zeros(5, 5)), 5, block_size=2).ritz()[0].tolist() == [0.0, 0.0]


def test_interrupt_nan_and_progress(generator: torch.Generator) -> None:
    A = symmetric_with_spectrum(spectrum("log", 20, 10.0), generator).operator
    run = block_lanczos(counting(A, {6: interrupt}), 5, block_size=2)
    assert (run.stop, run.matvecs) == ("interrupted", 4)
    assert defect(A, run) <= 1e-13
    with pytest.raises(KeyboardInterrupt):
        block_lanczos(counting(A, {1: interrupt}), 5)

    def spoil(v: Tensor) -> Tensor:
        return v / 0

    with pytest.raises(NonFiniteError, match="among the first 4"):
        block_lanczos(counting(A, {3: spoil}), 5)
    seen: list[tuple[int, int]] = []
    block_lanczos(A, 3, block_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 6), (4, 6), (6, 6)]


@pytest.mark.parametrize(("block_size", "steps"), [(0, 1), (7, 1), (2, 0)])
def test_sizes_that_do_not_fit(block_size: int, steps: int, generator: torch.Generator) -> None:
    A = symmetric_with_spectrum(spectrum("log", 6, 10.0), generator).operator
    with pytest.raises(InvalidInputError, match="do not fit"):
        block_lanczos(A, steps, block_size=block_size)


def test_memory(monkeypatch: pytest.MonkeyPatch, generator: torch.Generator) -> None:
    A = symmetric_with_spectrum(spectrum("log", 6, 10.0), generator).operator
    monkeypatch.setattr(memory_module, "available_memory", lambda *_: 100)
    with pytest.raises(MemoryLimitError):
        block_lanczos(A, 3)
