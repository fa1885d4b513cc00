"""Problems with known answers, and checks of the laws that every operator and preconditioner satisfies.

For the tests of this package and for your own operators: `spectrum` and `symmetric_with_spectrum` prescribe
eigenvalues; the `check_*` functions raise an `AssertionError` that names the law an implementation breaks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import DenseOperator, LinearOperator, Preconditioner, SymmetricOperator

KINDS = ("log", "isolated", "clustered", "repeated", "two-scale", "flat")

# Rounding of a product is at most this times `max(m, n) u |A| |v|`; a formula that is wrong misses by far more.
_SLACK = 100.0


def spectrum(kind: str, n: int, kappa: float, *, rank: int | None = None, scale: float = 1.0) -> Tensor:
    """Eigenvalues in descending order, `scale = lambda_1 >= ... >= lambda_rank = scale / kappa`, then zeros.

    Args:
        kind: `"log"` (logarithmically spaced), `"isolated"` (one small value, the rest in `[1/2, 1]`),
            `"clustered"` (three clusters, relative spread 1e-3), `"repeated"` (three exact values),
            `"two-scale"` (half of them in `[1/2, 1]`, half in `[1, 2] / kappa`), `"flat"` (all equal).
        n: how many.
        kappa: the ratio of the largest and the smallest nonzero one, at least 1; 1 for `"flat"` and for rank 1.
        rank: how many are not zero; default all.
        scale: the largest.

    Returns:
        `(n,)` float64.

    Raises:
        InvalidInputError: an unknown kind, or numbers that do not fit together.

    Source: the problems on which T13 was tested.

    Example:
        >>> spectrum("log", 4, 100.0, rank=3).tolist()
        [1.0, 0.1, 0.01, 0.0]
    """
    r = n if rank is None else rank
    if kind not in KINDS:
        raise InvalidInputError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not 1 <= r <= n or not 1 <= kappa < math.inf or not 0 < scale < math.inf:
        raise InvalidInputError(f"no spectrum with n={n}, rank={r}, kappa={kappa}, scale={scale}")
    if kappa != 1 and (kind == "flat" or r == 1):
        raise InvalidInputError(f"{kind} of rank {r} has one nonzero value, so kappa is 1, not {kappa}")
    position = torch.linspace(0, 1, r, dtype=torch.float64)
    if kind == "isolated":
        nonzero = 1 - position / 2
    elif kind in ("clustered", "repeated"):
        third = (torch.arange(r, dtype=torch.float64) * 3 / r).floor()
        nonzero = kappa ** (-third / 2) * (1 + 1e-3 * (kind == "clustered") * (third / 2 - position))
    elif kind == "two-scale":
        nonzero = torch.where(position < 0.5, 1 - position, (3 - 2 * position) / kappa)
    else:
        nonzero = kappa**-position
    nonzero[-1], nonzero[0] = 1 / kappa, 1.0
    nonzero = nonzero.clamp(1 / kappa, 1.0).sort(descending=True).values
    return torch.cat([nonzero * scale, nonzero.new_zeros(n - r)])


def random_orthogonal(n: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniform over the group (`Q` of a Gaussian matrix, signs from `R`).

    Args:
        n: size.
        generator: of the random numbers.

    Returns:
        `(n, n)` float64.

    Source: Mezzadri 2007.

    Example:
        >>> Q = random_orthogonal(5, torch.Generator().manual_seed(0))
        >>> bool((Q.T @ Q - torch.eye(5)).abs().max() < 1e-14)
        True
    """
    q, r = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    orthogonal: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
    return orthogonal


@dataclass(frozen=True, eq=False)
class PrescribedOperator:
    """A symmetric matrix whose eigenvalues were prescribed.

    Attributes:
        operator: the matrix `Q diag(values) Q^T`, with its factor if that was asked for.
        values: `(n,)` float64, as they were given.
        vectors: `Q`, `(n, n)`, column `i` belongs to `values[i]`.
    """

    operator: DenseOperator
    values: Tensor
    vectors: Tensor

    @property
    def null(self) -> Tensor:
        """An orthonormal basis `(n, r)` of the null space."""
        return self.vectors[:, (self.values == 0).nonzero().squeeze(1)]

    @property
    def kappa(self) -> float:
        """The prescribed effective condition number, of magnitudes where values are negative."""
        magnitudes = self.values.abs()
        return float(magnitudes.max() / magnitudes[magnitudes > 0].min())


def symmetric_with_spectrum(
    values: Tensor,
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    factor_rows: int | None = None,
) -> PrescribedOperator:
    """The matrix `A = Q diag(values) Q^T` for a random orthogonal `Q`, formed in float64 and cast.

    Its eigenvalues are the prescribed ones up to the rounding of its entries, `n u max|values|`; the singular
    values of its factor up to `n u sqrt(max values)`.

    Args:
        values: `(n,)` eigenvalues of any sign.
        generator: of `Q`.
        dtype: of the operator.
        factor_rows: give the operator a factor `F` with so many rows, `F^T F = A`; at least the rank.

    Returns:
        A `PrescribedOperator`: `operator`, `values`, `vectors`, `null`, `kappa`.

    Raises:
        InvalidInputError: values that are no vector, or a factor that cannot exist.

    Source: T13.

    Example:
        >>> problem = symmetric_with_spectrum(torch.tensor([4.0, 1.0, 0.0]), torch.Generator().manual_seed(0))
        >>> torch.linalg.eigvalsh(problem.operator.to_dense()).abs().round(decimals=12).tolist()
        [0.0, 1.0, 4.0]
        >>> problem.kappa, tuple(problem.null.shape)
        (4.0, (3, 1))
    """
    if values.ndim != 1:
        raise InvalidInputError(f"values must be a vector (n,), got {tuple(values.shape)}")
    values, rows = values.double(), None
    q = random_orthogonal(values.numel(), generator)
    matrix = (q * values) @ q.T
    if factor_rows is not None:
        kept = (values > 0).nonzero().squeeze(1)
        if factor_rows < kept.numel() or bool((values < 0).any()):
            raise InvalidInputError(f"no factor with {factor_rows} rows has these squared singular values")
        w = random_orthogonal(factor_rows, generator)[:, : kept.numel()]
        rows = ((w * values[kept].sqrt()) @ q[:, kept].T).to(dtype)
    operator = DenseOperator(((matrix + matrix.T) / 2).to(dtype), factor=rows)
    return PrescribedOperator(operator, values, q.to(dtype))


def check_linear_operator(op: LinearOperator, generator: torch.Generator) -> None:
    """Check linearity, `u.(A v) = (A^T u).v`, blocks = columns, `to_dense`, and that bad vectors are refused.

    Args:
        op: `m x n`, small enough for its dense matrix.
        generator: of the vectors.

    Raises:
        AssertionError: names the law that is broken and by how much.

    Source: the definition of a matrix.

    Example:
        >>> from bnp_analysis.linalg import MatrixOperator
        >>> check_linear_operator(MatrixOperator(torch.ones(2, 3)), torch.Generator().manual_seed(0))
    """
    m, n = op.shape
    dense = op.to_dense()
    _law(dense.shape == (m, n) and dense.dtype == op.dtype, "to_dense has the operator's shape and dtype", dense.shape)
    size = float(dense.double().norm())
    v, w, u = _block(op, n, generator), _block(op, n, generator), _block(op, m, generator)
    before, image, adjoint = v.clone(), op @ v, op.T @ u
    _law(torch.equal(v, before), "a product leaves its argument alone", "it was changed")
    _law(image.shape == (m, 3) and adjoint.shape == (n, 3), "A V is (m, k) and A^T U is (n, k)", image.shape)
    _equal(op, op @ (2 * v - 3 * w), 2 * image - 3 * (op @ w), 10 * size, "linearity, A(2v - 3w) = 2Av - 3Aw")
    _equal(op, image, dense @ v, size, "to_dense() @ v = A @ v")
    _equal(op, adjoint, dense.T @ u, size, "to_dense().T @ u = A.T @ u")
    _equal(op, u.T @ image, adjoint.T @ v, size, "the adjoint identity u.(Av) = (A^T u).v")
    for j in range(3):
        _equal(op, op @ v[:, j], image[:, j], size, "a block is its columns, (A V)_j = A v_j")
    _law((op @ v[:, :0]).shape == (m, 0), "an empty block gives an empty block", tuple((op @ v[:, :0]).shape))
    _equal(op, op.T.to_dense(), dense.T, size, "A.T.to_dense() = to_dense().T")
    rank = int(torch.linalg.matrix_rank(dense)) if min(m, n) else 0
    _law(rank <= op.rank_bound, "the rank is at most rank_bound", f"{rank} > {op.rank_bound}")
    other = torch.float32 if op.dtype == torch.float64 else torch.float64
    _refused(op.__matmul__, v.to(other), "a vector of another dtype is refused")
    _refused(op.__matmul__, v.new_zeros(n + 1), "a vector of another length is refused")
    _refused(op.__matmul__, v.unsqueeze(2), "a tensor with three axes is refused")


def check_symmetric_operator(op: SymmetricOperator, generator: torch.Generator) -> None:
    """Check the laws of a linear operator, `A = A^T`, `F^T F = A`, and that SciPy sees the same products.

    Args:
        op: `n x n`, small enough for its dense matrix.
        generator: of the vectors.

    Raises:
        AssertionError: names the law that is broken and by how much.

    Source: the definition of a symmetric matrix.

    Example:
        >>> check_symmetric_operator(DenseOperator(torch.eye(3)), torch.Generator().manual_seed(0))
    """
    check_linear_operator(op, generator)
    dense = op.to_dense()
    size = float(dense.double().norm())
    _equal(op, dense, dense.T, size, "symmetry, A = A^T")
    v = _block(op, op.dim, generator)
    seen = torch.as_tensor(op.to_scipy() @ v.cpu().numpy(), device=op.device)
    _equal(op, seen, op @ v, size, "to_scipy() has the same products")
    if op.factor is not None:
        check_linear_operator(op.factor, generator)
        rows = op.factor.to_dense()
        # |F|^2, not |A|: after a congruence the square may be smaller than what it was summed from.
        _equal(op, rows.T @ rows, dense, size + float(rows.double().norm()) ** 2, "the factor, F^T F = A")


def check_preconditioner(P: Preconditioner, generator: torch.Generator) -> None:
    """Check `P^-1 P = I`, transposes, `P P^T > 0`, `|P|`, and that `transport` gives `P^-1 N`, orthonormal.

    Args:
        P: small enough for its dense matrix.
        generator: of the vectors.

    Raises:
        AssertionError: names the law that is broken and by how much.

    Source: T2, T13.

    Example:
        >>> from bnp_analysis.linalg import IdentityPreconditioner
        >>> check_preconditioner(IdentityPreconditioner(3, torch.float64), torch.Generator().manual_seed(0))
    """
    check_linear_operator(P, generator)
    n, dense = P.dim, P.to_dense()
    singular = torch.linalg.svdvals(dense.double())
    _law(n == 0 or float(singular[-1]) > 0, "P is invertible", "a singular value is zero")
    kappa = float(singular[0] / singular[-1]) if n else 1.0
    v = _block(P, n, generator)
    one = float(v.double().norm()) * kappa
    for there, back in ((P.apply, P.solve), (P.apply_transpose, P.solve_transpose)):
        _equal(P, back(there(v)), v, one, f"{back.__name__}({there.__name__}(v)) = v")
    size = float(dense.double().norm())
    _equal(P, P.apply_transpose(v), dense.T @ v, size, "apply_transpose(v) = P^T v")
    _equal(P, P.direction(v), dense @ (dense.T @ v), size**2, "direction(g) = P P^T g")
    descent = (v * P.direction(v)).sum(dim=0)
    _law(n == 0 or bool((descent > 0).all()), "direction(g).g > 0, P P^T is positive definite", descent.tolist())
    missing = dense.abs() * (1 - _SLACK * torch.finfo(P.dtype).eps) - P.absolute().to_dense()
    _law(n == 0 or bool((missing <= 0).all()), "absolute() >= |P| in every entry", "an entry is smaller")
    null = torch.linalg.qr(_block(P, n, generator))[0][:, : max(n - 1, 0)]
    carried = P.transport(null)
    _equal(P, carried.T @ carried, torch.eye(carried.shape[1]).to(carried), 1.0, "transport(N) is orthonormal")
    image = P.apply(carried)
    _equal(P, image, null @ (null.T @ image), size * (1 + n), "transport(N) spans P^-1 N, so that A P y = 0")
    _refused(P.solve, v.new_zeros(n + 1), "solve refuses a vector of another length")


def _block(op: LinearOperator, length: int, generator: torch.Generator) -> Tensor:
    return torch.randn(length, 3, dtype=torch.float64, generator=generator).to(dtype=op.dtype, device=op.device)


def _equal(op: LinearOperator, found: Tensor, expected: Tensor, size: float, law: str) -> None:
    """Equal to rounding in the operator's dtype, relative to `size`."""
    _law(found.shape == expected.shape, law, (tuple(found.shape), tuple(expected.shape)))
    gap = float((found.double() - expected.double()).norm())
    allowed = _SLACK * max(*op.shape, 1) * torch.finfo(op.dtype).eps * size
    _law(gap <= allowed, law, f"they differ by {gap:.3g}, rounding explains {allowed:.2g}")


def _law(holds: bool, law: str, seen: object) -> None:
    if not holds:
        raise AssertionError(f"broken law: {law} (seen: {seen})")


def _refused(call: Callable[[Tensor], object], argument: Tensor, law: str) -> None:
    try:
        call(argument)
    except InvalidInputError:
        return
    raise AssertionError(f"broken law: {law} (seen: no InvalidInputError)")
