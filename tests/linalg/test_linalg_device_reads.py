"""Catches: a Krylov loop that waits for a device at every product; numbers that change because they are read later, an
invariant subspace or a NaN that is then overlooked. The device is this one, made to look as seldom as another would."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnp_analysis.errors import NonFiniteError
from bnp_analysis.linalg import CallableOperator, DenseOperator, lanczos
from bnp_analysis.linalg.bases import dots, length

N = 60


class Reads(TorchDispatchMode):
    """Counts what the host asks of a tensor."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def as_on_a_device(w: Tensor, V: Tensor, null: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Two passes, and no question in between."""
    taken = torch.zeros(len(V), dtype=torch.float64)
    for _ in range(2):
        if null is not None:
            w = w - null @ (null.T @ w)
        more = dots(V, w)
        w, taken = w - more.to(w.dtype) @ V, taken + more
    return w, length(w), taken


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Look every tenth step, as where looking means waiting."""
    import sys

    module = sys.modules["bnp_analysis.linalg.krylov.lanczos"]
    init = module._Run.__init__

    def run(self: Any, *arguments: Any) -> None:
        init(self, *arguments)
        self.every = module._SELDOM

    monkeypatch.setattr(module, "orthogonalized", as_on_a_device)
    monkeypatch.setattr(module._Run, "__init__", run)
    return monkeypatch


def operator(dtype: torch.dtype = torch.float64, scale: float = 1.0) -> DenseOperator:
    g = torch.Generator().manual_seed(0)
    matrix = scale * torch.randn(N, N, generator=g, dtype=dtype)
    return DenseOperator(matrix + matrix.T)


def count_reads(steps: int, seldom: pytest.MonkeyPatch) -> int:
    lists = [0]
    tolist = Tensor.tolist

    def counted(self: Tensor) -> Any:
        lists[0] += 1
        return tolist(self)

    seldom.setattr(Tensor, "tolist", counted)
    with Reads() as reads:
        lanczos(operator(), steps, seed=1)
    return reads.count + lists[0]


def test_between_readings_nothing_is_read(seldom: pytest.MonkeyPatch) -> None:
    """Ten steps more are one reading more; at the start a few numbers say whether there is a start, and the scale."""
    few, more = count_reads(20, seldom), count_reads(50, seldom)
    assert more - few == 3
    assert few <= 9


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float64, 1.0), (torch.float64, 1e-60), (torch.float32, 1.0)])
@pytest.mark.parametrize("steps", [7, 20, N])
def test_numbers_do_not_depend_on_when_they_are_read(
    steps: int, dtype: torch.dtype, scale: float, seldom: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    late = lanczos(operator(dtype, scale), steps, seed=1, checkpoint=tmp_path / "run.pt")
    seldom.undo()
    import sys

    seldom.setattr(sys.modules["bnp_analysis.linalg.krylov.lanczos"], "orthogonalized", as_on_a_device)
    found = lanczos(operator(dtype, scale), steps, seed=1)
    np.testing.assert_array_equal(late.alpha, found.alpha)
    np.testing.assert_array_equal(late.beta, found.beta)
    assert torch.equal(late.basis, found.basis)
    assert torch.equal(late.residual, found.residual)
    assert (late.matvecs, late.stop) == (found.matvecs, found.stop)


@pytest.mark.parametrize("exact", [True, False])
def test_an_invariant_subspace_is_seen_late_but_seen(exact: bool, seldom: pytest.MonkeyPatch) -> None:
    """Four eigenvalues: what is computed after the fourth step is dropped, and its products are counted."""
    asked = []
    values = torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64).repeat(N // 4)

    def product(v: Tensor) -> Tensor:
        asked.append(bool(torch.isfinite(v).all()))
        return values * v

    start = torch.zeros(N, dtype=torch.float64)
    start[:4] = 1.0 if exact else torch.rand(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    eps = torch.finfo(torch.float64).eps
    run = lanczos(CallableOperator(product, N, dtype=torch.float64, eps=eps), 30, start=start)
    assert run.stop == "invariant subspace"
    assert run.ritz()[0] == pytest.approx([1.0, 2.0, 4.0, 8.0], rel=1e-12)
    gap = values[:, None] * run.basis - run.basis @ torch.from_numpy(
        np.diag(run.alpha) + np.diag(run.beta, 1) + np.diag(run.beta, -1)
    )
    assert float((gap[:, -1] - run.residual).norm()) <= 10 * 8 * eps
    assert run.residual_norm <= 10 * N**0.5 * eps * 8
    assert run.matvecs == len(asked) == 10
    assert all(asked), "a vector that is not one"


def test_restarts_find_repeated_values_on_a_device_too(seldom: pytest.MonkeyPatch) -> None:
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64).repeat(3)
    run = lanczos(CallableOperator(lambda v: values * v, 9, dtype=torch.float64), 9, restart=True)
    assert run.ritz()[0] == pytest.approx(sorted(values.tolist()), rel=1e-12)


def test_a_nan_is_refused_by_the_product_that_gave_it(seldom: pytest.MonkeyPatch) -> None:
    count = [0]

    def product(v: Tensor) -> Tensor:
        count[0] += 1
        return torch.linspace(1, 2, N).double() * v * (math.nan if count[0] == 4 else 1.0)

    with pytest.raises(NonFiniteError, match="product 4 with"):
        lanczos(CallableOperator(product, N, dtype=torch.float64, eps=torch.finfo(torch.float64).eps), 30)
    assert count[0] == 10
