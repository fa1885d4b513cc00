"""Condition numbers behind normalizations whose numbers cancel, against mpmath: what is claimed contains the truth.

Only these tests catch a norm of nearly constant rows, or of two numbers, whose rounding passes for an eigenvalue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.network.saturation import product_eps

Rows = Sequence[Sequence[Any]]


class Inside(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)


def of_row(row: Sequence[Any], eps: float) -> list[Any]:
    mean = sum(row) / len(row)
    spread = mp.sqrt(sum((a - mean) ** 2 for a in row) / len(row) + mp.mpf(eps))
    return [(a - mean) / spread for a in row]


def by_moments(h: Tensor) -> Tensor:
    mean = h.mean(-1, keepdim=True)
    return (h - mean) * torch.rsqrt((h * h).mean(-1, keepdim=True) - mean * mean + 1e-5)


def by_columns(rows: Rows, eps: float) -> list[list[Any]]:
    return [list(row) for row in zip(*(of_row(list(c), eps) for c in zip(*rows, strict=True)), strict=True)]


LAYER = lambda eps: (lambda h: F.layer_norm(h, (4,), eps=eps), lambda rows: [of_row(r, eps) for r in rows])  # noqa: E731
# Name -> function, the same of rows in mpmath, spread and offset of the rows that it gets.
CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Rows], Any], float, float]] = {
    "layer norm": (*LAYER(0.0), 1e-3, 1.0),
    "layer norm, nearly constant": (*LAYER(0.0), 1e-10, 1.0),
    "layer norm, large": (*LAYER(1e-5), 1e-3, 1e6),
    "group norm of two": (
        lambda h: F.group_norm(h, 2, eps=1e-12),
        lambda rows: [of_row(r[:2], 1e-12) + of_row(r[2:], 1e-12) for r in rows],
        1.0,
        0.0,
    ),
    "batch norm": (
        lambda h: F.batch_norm(h, None, None, training=True, eps=1e-12),
        lambda rows: by_columns(rows, 1e-12),
        1e-3,
        1e5,
    ),
    "moments": (by_moments, lambda rows: [of_row(r, 1e-5) for r in rows], 1e-3, 1e6),
}


def problem(
    function: Callable[[Tensor], Tensor], spread: float, offset: float, dtype: torch.dtype
) -> tuple[bnp.EmpiricalRisk, nn.Linear, Tensor]:
    g = torch.Generator().manual_seed(6)
    x = torch.randn(6, 2, generator=g, dtype=torch.float64).to(dtype)
    linear = nn.Linear(2, 4, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(spread * torch.randn(4, 2, generator=g, dtype=torch.float64))
        linear.bias.copy_(offset + spread * torch.randn(4, generator=g, dtype=torch.float64))
    linear = linear.to(dtype)
    model = nn.Sequential(linear, Inside(function))
    return bnp.EmpiricalRisk(model, F.mse_loss, (x, torch.zeros(6, 4, dtype=dtype))), linear, x


def truth(linear: nn.Linear, x: Tensor, function: Callable[[Rows], Any], spread: float) -> Any:
    """`kappa*` of the Gauss-Newton matrix, by differences of 90 digits."""
    weights = [[mp.mpf(float(a)) for a in row] for row in [*linear.weight.detach().T.double(), linear.bias.double()]]
    inputs = [[*map(mp.mpf, map(float, row)), mp.mpf(1)] for row in x.double()]

    def outputs(weights: Rows) -> list[Any]:
        rows = [[sum(a * w[i] for a, w in zip(row, weights, strict=True)) for i in range(4)] for row in inputs]
        return [a for row in function(rows) for a in row]

    step, columns = mp.mpf(10) ** -35 * min(spread, 1.0), []
    for j in range(3):
        for i in range(4):
            ends = []
            for sign in (1, -1):
                moved = [list(row) for row in weights]
                moved[j][i] += sign * step
                ends.append(outputs(moved))
            columns.append([(a - b) / (2 * step) for a, b in zip(*ends, strict=True)])
    values = sorted(mp.svd_r(mp.matrix(columns).T, compute_uv=False), reverse=True)
    return (values[0] / min(v for v in values if v > values[0] * mp.mpf(10) ** -25)) ** 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_norms_that_cancel(name: str, dtype: torch.dtype) -> None:
    function, exact, spread, offset = CASES[name]
    try:
        risk, linear, x = problem(function, spread, offset, dtype)
        found = bnp.condition_number(bnp.gauss_newton(risk))
    except bnp.errors.BNPAnalysisError:
        return  # refused in words
    if found.two_sided:
        with mp.workdps(90):
            assert found.lower <= truth(linear, x, exact, spread) <= found.upper


def test_ordinary_norms_widen_nothing() -> None:
    """The trial is left out where nothing cancels: numbers keep the digits they have."""
    for name in ("layer norm", "batch norm"):
        risk, _, _ = problem(CASES[name][0], 1.0, 0.0, torch.float64)
        assert product_eps(risk) == risk.eps
    risk, _, _ = problem(CASES["layer norm"][0], 1e-3, 1.0, torch.float64)
    assert product_eps(risk) > 10 * risk.eps
