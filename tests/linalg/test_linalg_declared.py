"""Declared null directions, the precision of functions, and SciPy's arrays: what is believed, and what is checked.

Only these tests catch: a small eigenvalue hidden by declaring its vector, a true null space refused because of how its
basis is given, a cast inside a function, imaginary parts that are dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import gmres
from torch import Tensor

from bnp_analysis.errors import NullSpaceError
from bnp_analysis.linalg import (
    CallableOperator,
    DenseOperator,
    GramOperator,
    MatrixOperator,
    condition_number,
    eigenpairs,
    trace,
)
from bnp_analysis.linalg.bases import accurate_product, orthonormal
from bnp_analysis.linalg.condition.reduction import reduced
from bnp_analysis.linalg.spectra.checks import SomeNullDirections

E3 = torch.tensor([[0.0], [0.0], [1.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("small", "dtype"), [(1e-14, torch.float64), (3e-12, torch.float64), (2e-5, torch.float32), (1e-8, torch.float32)]
)
def test_a_small_eigenvalue_is_not_declared_away(small: float, dtype: torch.dtype) -> None:
    D, e3 = torch.diag(torch.tensor([1.0, 0.5, small], dtype=dtype)), E3.to(dtype)
    gram = GramOperator(MatrixOperator(D))
    for A, methods in (
        (DenseOperator(D), ("dense", "inertia", "lanczos", "inverse-lanczos")),
        (gram, ("factor-svd", "golub-kahan", "dense", "lanczos")),
        (reduced(gram), ("factor-svd", "golub-kahan")),
    ):
        for method in methods:
            with pytest.raises(NullSpaceError, match="is not null"):
                condition_number(A, null=e3, method=method)  # type: ignore[arg-type]


def differences(n: int) -> Tensor:
    """Rows `x_i - x_(i+2)`: their null space is spanned by the even and the odd places."""
    D = torch.zeros(n - 2, n, dtype=torch.float64)
    D[torch.arange(n - 2), torch.arange(n - 2)], D[torch.arange(n - 2), torch.arange(n - 2) + 2] = 1.0, -1.0
    return D


@pytest.mark.parametrize(
    ("offset", "lengths"), [(0, (1, 1)), (1e6, (1, 1)), (1e9, (1, 1)), (1e6, (1e300, 1e-300)), (-3e7, (1e-310, 1e200))]
)
@pytest.mark.parametrize("method", ["factor-svd", "golub-kahan", "dense", "lanczos"])
def test_a_null_space_may_be_given_badly(offset: float, lengths: tuple[float, float], method: str) -> None:
    """Two paths of seven: `kappa = (1 + cos(pi/8)) / (1 - cos(pi/8))`."""
    b = (torch.arange(16) % 2).double()
    null = torch.stack([torch.ones(16, dtype=torch.float64) * lengths[0], (offset + b) * lengths[1]], dim=1)
    k = condition_number(GramOperator(MatrixOperator(differences(16))), null=null, method=method)
    truth = (1 + math.cos(math.pi / 8)) / (1 - math.cos(math.pi / 8))
    assert k.two_sided
    assert k.lower <= truth * (1 + 1e-14)
    assert truth * (1 - 1e-14) <= k.upper
    assert (k.null_dim, k.on_your_word) == (2, 2 if method == "lanczos" else 0), "fourteen rows explain it"


@pytest.mark.parametrize("off", [1e-15, 1e-14])
def test_a_direction_off_by_rounding_is_believed_where_the_singular_values_say_zero(off: float) -> None:
    null = torch.tensor([off, 0.0, 0.0, 1.0], dtype=torch.float64)
    k = condition_number(DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.0], dtype=torch.float64))), null=null)
    assert (k.null_dim, k.two_sided) == (1, True)
    assert k.value == pytest.approx(3.0)
    small = DenseOperator(torch.diag(torch.tensor([1.0, 2.0, 3.0, 1e-14], dtype=torch.float64)))
    with pytest.raises(NullSpaceError, match="declared null direction 0 is not null"):
        condition_number(small, null=null)


def test_products_that_cannot_tell_a_null_direction_are_not_asked() -> None:
    A = CallableOperator(lambda v: v * torch.linspace(0, 1, 100).double(), 100, dtype=torch.float64, eps=2e-3)
    with pytest.raises(NullSpaceError, match=r"known to 0\.002 only, so that none could tell a null direction"):
        condition_number(A, null=torch.eye(100, dtype=torch.float64)[:, :1], method="lanczos")


def test_single_precision_columns_of_exact_numbers() -> None:
    b = (torch.arange(16) % 2).float()
    null = torch.stack([torch.ones(16), 1e6 + b], dim=1)
    A = GramOperator(MatrixOperator(differences(16).float()))
    assert condition_number(A, null=null).null_dim == 2
    # Orthonormalized in single precision, its rounding is the reason why the matrix does not annihilate it.
    assert condition_number(A, null=torch.linalg.qr(torch.stack([torch.ones(16), b], dim=1))[0]).null_dim == 2


def test_dependent_columns_are_refused() -> None:
    one = torch.ones(5, dtype=torch.float64)
    with pytest.raises(NullSpaceError, match="dependent"):
        orthonormal(torch.stack([one, 1e300 * one], dim=1))


def test_products_in_doubled_precision(generator: torch.Generator) -> None:
    """Against integers: sums of 12 products that cancel to one part in 1e12."""
    A = torch.randint(-(2**40), 2**40, (3, 12), generator=generator, dtype=torch.int64)
    B = torch.randint(-(2**40), 2**40, (12, 2), generator=generator, dtype=torch.int64)
    exact = np.array(A.tolist(), dtype=object) @ np.array(B.tolist(), dtype=object)
    # One more row makes all sums small integers.
    A2 = torch.cat([A.double(), torch.ones(3, 2, dtype=torch.float64)], dim=1)
    high = [[float(x) for x in row] for row in exact]
    cut = torch.tensor([[-high[0][j] for j in range(2)], [7.0, 5.0]], dtype=torch.float64)
    found = accurate_product(A2, torch.cat([B.double(), cut]))
    for j in range(2):
        assert found[0, j].item() == float(int(exact[0][j]) - int(high[0][j]) + (7, 5)[j])


def test_zero_unresolved_and_on_your_word_stay_apart() -> None:
    D = torch.diag(torch.tensor([2.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    Q = torch.linalg.qr(torch.arange(16.0).reshape(4, 4).double() ** 2 + torch.eye(4).double())[0]
    A = DenseOperator((Q @ D @ Q.T + (Q @ D @ Q.T).T) / 2)
    silent, said = condition_number(A), condition_number(A, null=Q[:, 2:])
    part = condition_number(A, null=Q[:, 2:3])
    caused = condition_number(A, null=SomeNullDirections(Q[:, 2:], {"a symmetry": 2}))
    structure = condition_number(DenseOperator(D), null=torch.eye(4, dtype=torch.float64)[:, 2:])
    counts = [(k.zero, k.unresolved, k.on_your_word) for k in (silent, said, part, caused, structure)]
    assert counts == [(2, 2, 0), (2, 0, 2), (2, 1, 1), (2, 0, 0), (2, 0, 0)]
    assert "2 zero on your word" in str(said)
    assert "on your word" not in str(caused)
    assert said.to_dict()["on_your_word"] == 2
    assert condition_number(A, null=Q[:, 2:], method="lanczos").on_your_word == 2


def matrix(n: int = 24) -> Tensor:
    rows = torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return rows @ rows.T


M = matrix()
CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "argument": lambda v: M @ v.float().double(),
    "image": lambda v: (M @ v).float().double(),
    "both": lambda v: (M.float() @ v.float()).double(),
    "between": lambda v: matrix_root() @ (matrix_root().T @ v).float().double(),
    "half": lambda v: M @ v.half().double(),
    "bfloat16": lambda v: M @ v.bfloat16().double(),
}


def matrix_root() -> Tensor:
    return torch.linalg.cholesky(M)


@pytest.mark.parametrize("name", CASTS)
def test_a_cast_inside_a_function_is_found(name: str) -> None:
    A = CallableOperator(CASTS[name], 24, dtype=torch.float64)
    spacing = {"half": 2.0**-10, "bfloat16": 2.0**-7}.get(name, 2.0**-23)
    assert spacing / 8 <= A.eps <= 8 * spacing
    truth = torch.linalg.eigvalsh(M)
    kappa = float(truth[-1] / truth[0])
    for method in ("dense", "lanczos"):
        k = condition_number(A, method=method)
        assert math.isnan(k.lower) or k.lower <= kappa
        assert kappa <= k.upper
        assert "(eps " in str(k) or " inside)" in str(k)
    found = eigenpairs(A, 2)
    assert bool(((found.values - truth.flip(0)[:2]).abs() <= found.residuals).all())
    assert "products to" in str(found)
    assert "products to" in str(trace(A))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ordinary_rounding_is_no_cast(dtype: torch.dtype) -> None:
    for n in (1, 2, 7, 60, 500):
        rows = matrix(n).to(dtype)
        for scale in (1.0, 1e-20, 1e20):
            A = CallableOperator(lambda v, rows=rows, scale=scale: scale * (rows @ v), n, dtype=dtype)
            assert A.eps == torch.finfo(dtype).eps
    calls = []
    A = CallableOperator(lambda v: calls.append(1) or v, 5, dtype=dtype)
    assert (A.eps, A.eps, len(calls)) == (torch.finfo(dtype).eps, torch.finfo(dtype).eps, 3)
    assert CallableOperator(lambda v: 0 * v, 5, dtype=dtype).eps == torch.finfo(dtype).eps
    for half, n in ((torch.float16, 5), (torch.bfloat16, 5), (dtype, 0)):
        untried = CallableOperator(lambda v: calls.append(2) or v, n, dtype=half)
        assert untried.eps == torch.finfo(half).eps
    assert len(calls) == 3, "too few digits, or numbers, to try any"
    assert CallableOperator(lambda v: v / 0, 5, dtype=dtype).eps == torch.finfo(dtype).eps


def test_products_of_differences_say_how_precise_they_are() -> None:
    h = 1e-5
    A = CallableOperator(lambda v: (torch.tanh(h * v) - torch.tanh(-h * v)) / (2 * h), 20, dtype=torch.float64)
    assert 1e-13 < A.eps < 1e-9


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scipy_sees_the_same_matrix(dtype: torch.dtype) -> None:
    B = matrix(6).to(dtype)
    A, N, rel = DenseOperator(B).to_scipy(), B.double().numpy(), 1e-12 if dtype == torch.float64 else 1e-5
    v = np.arange(6.0) - 2
    frozen = v.copy()
    frozen.flags.writeable = False
    for x in (
        v,
        v[::-1],
        np.stack([v, v], axis=1)[:, 0],
        frozen,
        v.astype(np.float32),
        v.astype(int),
        v + 1j,
        v[::-1] * 1j,
    ):
        np.testing.assert_allclose(A @ x, N @ x, rtol=rel, atol=rel * np.abs(N).max())
    block = np.asfortranarray(np.random.default_rng(0).standard_normal((6, 3))) + 1j
    np.testing.assert_allclose(A @ block, N @ block, rtol=rel, atol=rel * np.abs(N).max())
    np.testing.assert_allclose(A.H @ (v + 2j), N @ (v + 2j), rtol=rel, atol=rel * np.abs(N).max())
    if dtype == torch.float64:
        from scipy.sparse.linalg import LinearOperator

        resolvent = LinearOperator((6, 6), matvec=lambda z: A @ z + 0.5j * z, dtype=complex)
        x, info = gmres(resolvent, v + 1j, rtol=1e-10)
        assert info == 0
        assert np.linalg.norm(N @ x + 0.5j * x - v - 1j) < 1e-8
