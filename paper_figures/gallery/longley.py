"""Longley's regression: the textbook example of collinear columns."""

from __future__ import annotations

import math
from collections.abc import Iterator

import mpmath
import numpy as np
import torch
from torch import nn

import bnp_analysis as bnp
from paper_figures.gallery import Entry, Row, Settings

# GNP deflator, GNP, unemployed, armed forces, population, year (Longley 1967, in the public domain).
DATA = np.array(
    [
        [83.0, 234289, 2356, 1590, 107608, 1947],
        [88.5, 259426, 2325, 1456, 108632, 1948],
        [88.2, 258054, 3682, 1616, 109773, 1949],
        [89.5, 284599, 3351, 1650, 110929, 1950],
        [96.2, 328975, 2099, 3099, 112075, 1951],
        [98.1, 346999, 1932, 3594, 113270, 1952],
        [99.0, 365385, 1870, 3547, 115094, 1953],
        [100.0, 363112, 3578, 3350, 116219, 1954],
        [101.2, 397469, 2904, 3048, 117388, 1955],
        [104.6, 419180, 2822, 2857, 118734, 1956],
        [108.4, 442769, 2936, 2798, 120445, 1957],
        [110.8, 444546, 4681, 2637, 121950, 1958],
        [112.6, 482704, 3813, 2552, 123366, 1959],
        [114.2, 502601, 3931, 2514, 125368, 1960],
        [115.7, 518173, 4806, 2572, 127852, 1961],
        [116.9, 554894, 4007, 2827, 130081, 1962],
    ]
)


def measure(settings: Settings) -> Iterator[Row]:
    """Of `[e, X]` as it is and with columns of unit length, and of the Hessian of the squared loss."""
    for name, x in (("as they are", DATA), ("of unit length", DATA / np.linalg.norm(DATA, axis=0))):
        hat = np.column_stack([np.ones(len(x)), x])
        found, exact = _certified(x), _exact(hat)
        roots = {"lower": math.sqrt(found.lower), "upper": math.sqrt(found.upper), "exact": float(mpmath.sqrt(exact))}
        by_gram = _ratio(np.linalg.eigvals(hat.T @ hat))
        if x is DATA:
            yield Row(case="design", printed=4.86e9, reported=float(np.linalg.cond(hat)), **roots)
            ends = {"lower": found.lower, "upper": found.upper, "exact": float(exact)}
            yield Row(case="Hessian", reported=by_gram, agrees=None, **ends)
        else:
            case = f"design, columns {name}"
            yield Row(case=case, printed=56240.8685449, reported=math.sqrt(by_gram), **roots)


def _ratio(eigenvalues: np.ndarray) -> float:
    return float(abs(eigenvalues).max() / abs(eigenvalues).min())


def _certified(x: np.ndarray) -> bnp.linalg.ConditionNumber:
    """Of the Hessian of the squared loss of a linear layer with bias."""
    model = nn.Linear(x.shape[1], 1, dtype=torch.float64)
    data = torch.from_numpy(x)
    risk = bnp.EmpiricalRisk(model, nn.functional.mse_loss, (data, data.sum(dim=1, keepdim=True)))
    return bnp.condition_number(bnp.gauss_newton(risk))


def _exact(hat: np.ndarray) -> mpmath.mpf:
    """`kappa(hat)^2` of these floats, with 50 digits."""
    with mpmath.workdps(50):
        columns = mpmath.matrix(hat.tolist())
        values = mpmath.eigsy(columns.T * columns, eigvals_only=True)
        return max(values) / min(values)


ENTRY = Entry(
    title="Linear regression on Longley's data",
    source=(
        "statsmodels: `Cond. No. 4.86e+09` in the summary of this fit (its test suite, the LaTeX table of "
        "`test_regression.py`), and `56240.8685449` in the documentation of version 0.4.2, page *Ordinary Least "
        "Squares*. Data: J. W. Longley, J. Amer. Statist. Assoc. 62 (1967), 819-841."
    ),
    setting="16 rows, an intercept and 6 columns; for the Hessian a linear layer with bias and the squared loss.",
    naive=(
        "`Cond. No.` is a ratio of singular values. The documentation's number is `sqrt(max/min)` of "
        "`eigvals(X.T @ X)` with columns of unit length; for the Hessian the same without the root. In float64."
    ),
    certified="`condition_number(gauss_newton(risk))`: singular values of the factor, never of the Gram matrix.",
    check="eigenvalues of the Gram matrix of the same floats, with 50 digits.",
    why=(
        "`4.86e+09` is right. `56240.8685449` is right to seven digits; the error is the rounding of the Gram matrix, "
        "`u kappa^2 = 4e-7`. For the Hessian, `kappa = 2.4e19` exceeds `1/u`, so that no digit of the smallest "
        "computed eigenvalue is guaranteed. Here the ratio is 6 % off; with the intercept as the last column it is "
        "right to eight digits, since the matrix is graded. The singular values of the factor keep correct digits."
    ),
    presets={"quick": {}, "full": {}},
    measure=measure,
)
