"""Singular values and eigenvalues in extended precision: an answer that no method of the package computes.

`numpy.longdouble` has 64 bits of mantissa on x86 (80-bit numbers) and 113 on 64-bit ARM Linux. Where it is no more than
float64, `PRECISE` is False and the problems that need it are left out.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Long = NDArray[np.longdouble]
UNIT = float(np.finfo(np.longdouble).eps)
PRECISE = UNIT < 1e-18


def long(x: Tensor | NDArray[Any]) -> Long:
    """The same numbers, every digit kept."""
    return np.asarray(x.detach().double().numpy() if isinstance(x, Tensor) else x, dtype=np.longdouble)


def exact_product(left: Tensor, right: Tensor) -> Long:
    """The product of stored matrices, summed in integers, so that cancellation costs no digit."""
    a, b = (_integers(x) for x in (left, right))
    product = a[0] @ b[0]

    def rounded(entry: int) -> np.longdouble:
        high = float(Fraction(entry, 1))
        return np.longdouble(high) + np.longdouble(float(Fraction(entry) - Fraction(high)))

    units = np.longdouble(2) ** -a[1] * np.longdouble(2) ** -b[1]
    return np.array([[rounded(entry) for entry in row] for row in product], dtype=np.longdouble) * units


def _integers(matrix: Tensor) -> tuple[NDArray[Any], int]:
    """Integers and a power of two: `matrix = integers * 2^-shift`, exactly."""
    ratios = [[x.as_integer_ratio() for x in row] for row in matrix.double().tolist()]
    shift = max(denominator.bit_length() - 1 for row in ratios for _, denominator in row)
    return np.array([[n * 2**shift // d for n, d in row] for row in ratios], dtype=object), shift


def singular_values(matrix: Long) -> Long:
    """All singular values, descending, by one-sided Jacobi rotations from the float64 singular vectors.

    Jacobi's method finds small singular values to high relative accuracy; no eigenvalue routine is involved.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    scale = np.abs(tall).max()
    if scale == 0 or tall.size == 0:
        return np.zeros(tall.shape[1], dtype=np.longdouble)
    tall = tall / scale
    vectors = torch.linalg.svd(torch.from_numpy(tall.astype(np.float64)), full_matrices=False)[2].T
    columns = np.ascontiguousarray((tall @ _orthogonal(vectors)).T)
    for _ in range(30):
        if not _sweep(columns):
            break
    norms = np.sqrt((columns * columns).sum(axis=1))
    return np.sort(norms)[::-1] * scale


def eigenvalues(matrix: Long) -> Long:
    """All eigenvalues of a symmetric matrix, ascending, by Jacobi rotations from the float64 eigenvectors."""
    scale = np.abs(matrix).max()
    symmetric = torch.from_numpy((matrix / scale).astype(np.float64))
    vectors = _orthogonal(torch.linalg.eigh((symmetric + symmetric.T) / 2)[1])
    B = vectors.T @ (matrix / scale) @ vectors
    B = (B + B.T) / 2
    n = len(B)
    for _ in range(30):
        off = B - np.diag(np.diag(B))
        if float(np.abs(off).max(initial=0.0)) <= UNIT:
            break
        for i in range(n - 1):
            for j in range(i + 1, n):
                if abs(B[i, j]) > UNIT / 8:
                    _rotate(B, i, j)
    return np.sort(np.diag(B)) * scale


def error(values: Long, shape: tuple[int, int], magnitude: float = 0.0) -> float:
    """How far extended-precision singular values of a product may be from the exact ones."""
    return 20 * UNIT * math.sqrt(max(shape)) * max(float(values[0]), magnitude)


def _orthogonal(vectors: Tensor) -> Long:
    """Orthogonal to float64 becomes orthogonal to extended precision, by Newton's iteration."""
    V = long(vectors)
    identity = np.eye(V.shape[1], dtype=np.longdouble)
    for _ in range(2):
        V = V @ (3 * identity - V.T @ V) / 2
    return V


def _sweep(columns: Long) -> int:
    """Make every pair of columns (rows here) orthogonal; the number of rotations that it took."""
    n, rotations = len(columns), 0
    squares = (columns * columns).sum(axis=1)
    tiny = (UNIT * np.sqrt(squares.max())) ** 2
    for i in range(n - 1):
        # Most pairs are orthogonal already: one product finds those that are not.
        inner = columns[i + 1 :] @ columns[i]
        for j in np.flatnonzero(np.abs(inner) > 2 * UNIT * np.sqrt(squares[i] * squares[i + 1 :])) + i + 1:
            x, y = columns[i], columns[j]
            a, b, c = x @ x, y @ y, x @ y
            if max(a, b) <= tiny or abs(c) <= 2 * UNIT * np.sqrt(a * b):
                continue
            tau = (b - a) / (2 * c)
            t = (1 if tau >= 0 else -1) / (abs(tau) + np.sqrt(1 + tau * tau))
            cosine = 1 / np.sqrt(1 + t * t)
            columns[i], columns[j] = cosine * (x - t * y), cosine * (t * x + y)
            squares[i], squares[j] = max(a - t * c, 0), max(b + t * c, 0)
            rotations += 1
    return rotations


def _rotate(B: Long, i: int, j: int) -> None:
    tau = (B[j, j] - B[i, i]) / (2 * B[i, j])
    t = (1 if tau >= 0 else -1) / (abs(tau) + np.sqrt(1 + tau * tau))
    c = 1 / np.sqrt(1 + t * t)
    s = t * c
    for axis in (B, B.T):
        x, y = axis[i].copy(), axis[j].copy()
        axis[i], axis[j] = c * x - s * y, s * x + c * y
