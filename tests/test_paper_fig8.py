"""The numbers of Figure 8: certified ones against high precision, plotted ones by their definition.

Bugs that only this file catches: a block that is not the Hessian of the unit, a dead unit that counts, `P` applied on
the wrong side, statistics of the wrong rows.
"""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bnp_analysis.precondition import BNPBlock
from paper_figures.figures.paper_fig8 import FLOOR, NUMBERS, measure

HIDDEN, ROWS = 9, 6


def network() -> tuple[list[nn.Linear], Tensor]:
    """5-9-3 with one dead unit, and six examples."""
    g = torch.Generator().manual_seed(3)
    layers = [nn.Linear(5, HIDDEN), nn.Linear(HIDDEN, 3)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=g))
            layer.bias.copy_(1 + torch.rand(layer.bias.shape, generator=g))
        layers[0].bias[4] = -100
    return layers, torch.randn(ROWS, 5, generator=g)


def hessian_of_first_unit(layers: list[nn.Linear], x: Tensor) -> np.ndarray:
    """By double backward, float64, `(bias, weights)`."""
    with torch.no_grad():
        h = torch.relu(x.double() @ layers[0].weight.double().T + layers[0].bias.double())
        W, b = layers[1].weight.double(), layers[1].bias.double()

    def loss(unit: Tensor) -> Tensor:
        logits = h @ torch.cat([unit[None, 1:], W[1:]]).T + torch.cat([unit[:1], b[1:]])
        return nn.functional.cross_entropy(logits, torch.arange(ROWS) % 3)

    return np.asarray(torch.func.hessian(loss)(torch.cat([b[:1], W[0]])))


def kappa(A: np.ndarray, rank: int) -> float:
    """`lambda_max/lambda_rank` of a positive semidefinite matrix, 60 digits; its entries are rounded to float64."""
    with mpmath.workdps(60):
        values = sorted(mpmath.eigsy(mpmath.matrix(A.tolist()), eigvals_only=True), reverse=True)
        return float(values[0] / values[rank - 1])


@pytest.fixture
def found() -> dict[str, float]:
    layers, x = network()
    block = BNPBlock(torch.full((1, HIDDEN), 0.5), torch.full((1, HIDDEN), 4.0), 1.0, units=3, bias=True)
    return dict(zip(NUMBERS, measure(layers, x, block), strict=True))


def test_certified_numbers_are_those_of_the_hessian(found: dict[str, float]) -> None:
    layers, x = network()
    A = hessian_of_first_unit(layers, x)
    assert (found["rank"], found["dead"]) == (ROWS, 1)
    assert found["certified"] == pytest.approx(kappa(A, ROWS), rel=1e-6)
    assert found["upper"] >= found["certified"] * (1 - 1e-12)
    live = [0, *(j + 1 for j in range(HIDDEN) if j != 4)]
    with torch.no_grad():
        h = torch.relu(x.double() @ layers[0].weight.double().T + layers[0].bias.double()).numpy()
    for word, mean, sigma in (
        ("exact", h.mean(axis=0), h.std(axis=0)),
        ("running", np.full(HIDDEN, 0.5), np.full(HIDDEN, 2.0)),
    ):
        scale = np.concatenate([[1.0], 1 / np.where(sigma > 0, sigma, 1.0)])
        P = np.diag(scale)
        P[0, 1:] = -mean * scale[1:]
        assert found[word] == pytest.approx(kappa((P.T @ A @ P)[np.ix_(live, live)], ROWS), rel=1e-6)


def test_the_spread_of_deviations(found: dict[str, float]) -> None:
    layers, x = network()
    with torch.no_grad():
        sigma = torch.relu(x.double() @ layers[0].weight.double().T + layers[0].bias.double()).std(dim=0, correction=0)
    live = sigma[sigma > 0]
    assert found["kappa(D)"] == pytest.approx(max(1.0, float(live.max())) / min(1.0, float(live.min())))
    assert found["floored"] == pytest.approx(max(1.0, float(live.max())) / FLOOR)
    assert found["damped"] == pytest.approx(2.0)


def test_what_is_plotted_is_rounding(found: dict[str, float]) -> None:
    """Eigenvalues have errors of up to `n eps lambda_max`: ratios from `1 / (n eps)` on are unknown, and plotted.

    By how much plotted and certified numbers differ depends on the processor.
    """
    single, double = (1 / ((HIDDEN + 1) * torch.finfo(dtype).eps) for dtype in (torch.float32, torch.float64))
    assert 1 < found["threshold"] <= single < min(found["certified"], found["running"]) < double
    assert min(found["float32"], found["float32, P"]) > single
    assert found["float64"] > double


def test_without_the_run_s_preconditioner() -> None:
    layers, x = network()
    numbers = dict(zip(NUMBERS, measure(layers, x, None), strict=True))
    assert np.isnan([numbers[word] for word in ("float32, P", "running", "running upper", "damped")]).all()
    assert np.isfinite(numbers["exact"])
