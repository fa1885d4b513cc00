"""Inner products with a basis, and the threads beside them.

Bugs that only these tests catch: a single-precision sum that loses digits with the length of the vectors; one pass of
reorthogonalization where two are needed; BLAS threads that are not limited, or not given back.
"""

from __future__ import annotations

import sys

import pytest
import torch

from bnp_analysis.linalg.bases import dots, length, orthogonalized
from bnp_analysis.runtime import threads


@pytest.mark.parametrize("equal", [False, True], ids=["random", "equal"])
def test_long_sums_keep_their_digits(equal: bool, generator: torch.Generator) -> None:
    """Equal terms round the same way at every addition: their errors add up. A block's worst case is the bound."""
    V, w = (torch.rand(k, 600_001, generator=generator) for k in (3, 1))
    if equal:
        V, w = torch.ones_like(V), torch.full_like(w, 0.1)
    exact = V.double() @ w[0].double()
    assert float(((dots(V, w[0]) - exact) / exact).abs().max()) < 128 * 2**-24
    assert float(length(w[0])) == pytest.approx(float(w[0].double().norm()), rel=1e-7)
    assert dots(V, w[0]).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("outside", [1.0, 1e-3])
def test_what_is_left_is_orthogonal(dtype: torch.dtype, outside: float, generator: torch.Generator) -> None:
    """Also where nearly all of the vector lies in the basis, and one pass would leave much of its rounding."""
    n, k, eps = 20_000, 12, torch.finfo(dtype).eps
    Q = torch.linalg.qr(torch.randn(n, k + 3, generator=generator, dtype=torch.float64)).Q.to(dtype)
    V, null = Q[:, :k].T.contiguous(), Q[:, k : k + 2]
    w = V.sum(dim=0) + null.sum(dim=1) + outside * Q[:, -1]
    left, norm, taken = orthogonalized(w, V, null)
    assert float(norm) == pytest.approx(outside, rel=100 * eps / outside)
    unit = left / norm
    assert float((V @ unit).abs().max()) <= 30 * eps
    assert float((null.T @ unit).abs().max()) <= 30 * eps + 30 * eps**2 / outside
    torch.testing.assert_close(taken, torch.ones(k, dtype=torch.float64), rtol=0, atol=100 * eps)


def test_blas_threads_are_limited_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def now() -> set[int]:
        return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = now()
        with threads.one_blas_thread():
            assert now() == {1}
        assert now() == before
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    threads._controller.cache_clear()
    with threads.one_blas_thread():
        pass
    threads._controller.cache_clear()
