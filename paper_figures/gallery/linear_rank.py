"""Ranks of the Hessian and the Gauss-Newton matrix of a linear network."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bnp_analysis as bnp
from paper_figures.gallery import Entry, Row, Settings

PRIME = 2**31 - 1
WIDTHS, EXAMPLES = (25, 5, 10, 10), 50


def measure(settings: Settings) -> Iterator[Row]:
    """Both matrices for both losses; the squared loss in float32 too."""
    data = bnp.data.load("digits", n=EXAMPLES)
    pixels, labels = data.tensors
    x = nn.functional.adaptive_avg_pool2d(pixels.double().reshape(-1, 1, 8, 8), 5).flatten(1)
    g = torch.Generator().manual_seed(settings["seed"])
    layers = [nn.Linear(m, n, bias=False, dtype=torch.float64) for m, n in pairwise(WIDTHS)]
    for layer in layers:
        nn.init.xavier_normal_(layer.weight, generator=g)
    one_hot = nn.functional.one_hot(labels, 10).double()
    weights = [layer.weight.detach() for layer in layers]
    for name in settings["losses"]:
        squared = name == "squared loss"
        loss, y, printed = (
            (nn.functional.mse_loss, one_hot, (250, 150))
            if squared
            else (nn.functional.cross_entropy, labels, (245, 145))
        )
        risk = bnp.EmpiricalRisk(nn.Sequential(*layers), loss, (x, y))
        for matrix, number in zip(("hessian", "gauss_newton"), printed, strict=True):
            A = bnp.hessian(risk) if matrix == "hessian" else bnp.gauss_newton(risk)
            null = bnp.null_directions(risk, curvature=matrix)
            found = (bnp.magnitude_condition_number if matrix == "hessian" else bnp.condition_number)(A, null=null)
            bounds: dict[str, Any] = {
                "quantity": "rank",
                "lower": found.rank or 0,
                "upper": A.dim - null.basis.shape[1],
            }
            if squared:
                bounds["exact"] = _rank(_matrix(weights, x, one_hot, hessian=matrix == "hessian"))
            dense = A.to_dense()
            case = f"{'Hessian' if matrix == 'hessian' else 'Gauss-Newton'}, {name}"
            yield Row(case=case, printed=number, reported=float(torch.linalg.matrix_rank(dense)), **bounds)
            if squared:
                reported = float(torch.linalg.matrix_rank(dense.float()))
                yield Row(case=f"{case}, float32", reported=reported, agrees=False, **bounds)


def _modular(t: Tensor) -> np.ndarray:
    """Floats, which are `m 2^e`, as numbers modulo the prime."""

    def residue(value: float) -> int:
        numerator, denominator = value.as_integer_ratio()
        return numerator * pow(denominator, -1, PRIME) % PRIME

    return np.array([residue(v) for v in t.flatten().tolist()], dtype=np.int64).reshape(t.shape)


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a b`, row of `b` by row, so that no sum leaves 63 bits."""
    total = np.zeros((a.shape[0], b.shape[1]), dtype=np.int64)
    for column, row in zip(a.T, b, strict=True):
        total = (total + column[:, None] * row) % PRIME
    return total


def _matrix(weights: list[Tensor], x: Tensor, y: Tensor, *, hessian: bool) -> np.ndarray:
    """`J^T J` of `W3 W2 W1 x`, or the Hessian of half its squared error, in exact arithmetic modulo the prime.

    Written out by hand, the weights in the order of the parameters.
    """
    w1, w2, w3 = (_modular(w) for w in weights)
    inputs, targets = _modular(x.T), _modular(y.T)
    h1 = _times(w1, inputs)
    h2 = _times(w2, h1)
    w32, eye = _times(w3, w2), np.eye(len(w3), dtype=np.int64)
    # d output[i, n] / d W[a, b] = left[i, a] right[b, n]
    parts = [
        (left[:, None, :, None] * right.T[None, :, None, :] % PRIME).reshape(len(targets) * targets.shape[1], -1)
        for left, right in ((w32, inputs), (w3, h1), (eye, h2))
    ]
    J = np.concatenate(parts, axis=1)
    A = _times(J.T, J)
    if not hessian:
        return A
    e = (_times(w3, h2) - targets) % PRIME
    to_inputs, to_h1 = _times(e, inputs.T), _times(e, h1.T)
    first = _times(w3.T, to_inputs)
    # The second derivatives of <e, W3 W2 W1 x> in (W2, W1), (W3, W2) and (W3, W1).
    n1, n2, n3 = (w.size for w in (w1, w2, w3))
    e1, e2 = (np.eye(len(w), dtype=np.int64) for w in (w1, w2))
    for rows, columns, block in (
        (slice(n1, n1 + n2), slice(0, n1), np.einsum("bB,ac->abBc", e1, first)),
        (slice(n1 + n2, n1 + n2 + n3), slice(n1, n1 + n2), np.einsum("bB,ac->abBc", e2, to_h1)),
        (slice(n1 + n2, n1 + n2 + n3), slice(0, n1), np.einsum("bc,ad->abcd", w2, to_inputs) % PRIME),
    ):
        flat = block.reshape(rows.stop - rows.start, columns.stop - columns.start)
        A[rows, columns] = (A[rows, columns] + flat) % PRIME
        A[columns, rows] = (A[columns, rows] + flat.T) % PRIME
    assert n1 + n2 + n3 == len(A)
    return A


def _rank(A: np.ndarray) -> int:
    """By elimination modulo the prime: at most the rank over the rationals, less only if the prime divides minors."""
    A, rank = A.copy(), 0
    for column in range(A.shape[1]):
        below = np.flatnonzero(A[rank:, column])
        if not below.size:
            continue
        A[[rank, rank + below[0]]] = A[[rank + below[0], rank]]
        A[rank] = A[rank] * pow(int(A[rank, column]), -1, PRIME) % PRIME
        A[rank + 1 :] = (A[rank + 1 :] - A[rank + 1 :, column, None] * A[rank]) % PRIME
        rank += 1
        if rank == len(A):
            break
    return rank


ENTRY = Entry(
    title="Ranks of a linear network",
    source=(
        "S. P. Singh, G. Bachmann, T. Hofmann, *Analytic Insights into Structure and Rank of Neural Network Hessian "
        "Maps*, NeurIPS 2021; network, sample size and formulas are those of `hessian_rank.py` in its code "
        "(dalab/hessian-rank); the formulas give the printed ranks for a network of 25-5-10-10."
    ),
    setting=(
        "Linear network 25-5-10-10 without biases, 275 parameters, Glorot normal, 50 images of digits scaled to 5 x 5 "
        "(the source: MNIST)."
    ),
    naive="`matrix_rank` of the dense matrix in float64 (the source enables float64; the default of JAX is float32).",
    certified=(
        "`condition_number` and `magnitude_condition_number` with `null_directions(risk, curvature=...)`: the "
        "rank is at least the number of eigenvalues above their error radius, and at most the dimension minus the "
        "number of null directions."
    ),
    check="Gaussian elimination modulo 2^31 - 1 of the matrix from formulas written by hand (squared loss).",
    why=(
        "In float64 all ranks agree: the formulas hold, and the gap in the spectrum is wide. In float32 there is no "
        "gap, and `matrix_rank` is too small by 18 % and 28 %."
    ),
    presets={
        "quick": {"seed": 0, "losses": ["squared loss"]},
        "full": {"seed": 0, "losses": ["squared loss", "cross-entropy"]},
    },
    measure=measure,
)
