"""Units of a LeakyReLU that act linearly: always above zero with slope 1, always below it with the slope of the layer.

Bugs that only these tests catch: a slope that is forgotten, or taken from another layer or from the default, in the
mixings of such units, in their shifts, or in the changes that the layers behind them send to nothing. A direction
built with a wrong slope is not null and is thrown away, so that only the count shows it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from curvature_reference import Problem, classes, numbers, spread
from torch import Tensor, nn

import bnp_analysis as bnp

ABOVE, BELOW = 12.0, -12.0
# Biases of the hidden units: always above zero, always below it, or both.
SIGNS = {
    "one below": [BELOW, 0.0, 0.0, 0.0],
    "above and below": [ABOVE, BELOW, 0.0, 0.0],
    "two below": [BELOW, BELOW, 0.0, 0.0],
    "three": [ABOVE, BELOW, BELOW, 0.0],
}
SLOPES = {"default": nn.LeakyReLU(), "0.2": nn.LeakyReLU(0.2), "0.7": nn.LeakyReLU(0.7)}
X = numbers(80, 3)


def squared(outputs: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(outputs, y)


def biased(model: nn.Sequential, biases: dict[int, list[float]]) -> nn.Sequential:
    for layer, values in biases.items():
        model[layer].bias.data[:] = torch.tensor(values, dtype=torch.float64)
    return model


def counted(model: nn.Sequential, loss: Callable[[Tensor, Tensor], Tensor], y: Tensor, x: Tensor = X) -> dict[str, int]:
    """What was found by cause, after a comparison with the nullity of the dense Gauss-Newton matrix."""
    problem = Problem(model, loss, [(x, y)])
    risk = problem.risk()
    N = bnp.null_directions(risk)
    assert not N.rejected, "a direction with a wrong slope"
    sigma = torch.linalg.svdvals(bnp.gauss_newton(risk).factor.to_dense())
    rank = int((sigma > 1e-13 * sigma[0]).sum())
    assert rank == len(sigma) or sigma[rank - 1] > 1e4 * sigma[rank], "no clear gap: the test shows nothing"
    assert N.basis.shape[1] == risk.space.dim - rank
    matrix = problem.gauss_newton()
    assert float((matrix @ N.basis).norm() / matrix.norm()) < 1e-10
    return dict(N.sources)


@pytest.mark.parametrize(
    ("slope", "signs"),
    [("default", "above and below"), ("0.2", "one below"), ("0.2", "three"), ("0.7", "two below")],
)
def test_mixings_and_shifts_of_linear_units(slope: str, signs: str) -> None:
    """`k` units that act linearly have `k^2` mixings and `k` shifts; the others their scale."""
    model = spread(nn.Sequential(nn.Linear(3, 4), SLOPES[slope], nn.Linear(4, 5)), 1, 0.8)
    found = counted(biased(model, {0: SIGNS[signs]}), squared, numbers(80, 5, seed=4))
    linear = sum(bias != 0.0 for bias in SIGNS[signs])
    assert sum(found.values()) == linear**2 + linear + (4 - linear)


@pytest.mark.parametrize(("loss", "slopes"), [("MSE", (0.2, 0.05)), ("CE", (0.05, 0.6)), ("MSE", (0.5, 0.5))])
def test_a_chain_with_two_slopes(loss: str, slopes: tuple[float, float]) -> None:
    """Each layer has its own slope; in the second one all units act linearly."""
    layers = (nn.Linear(3, 4), nn.LeakyReLU(slopes[0]), nn.Linear(4, 4), nn.LeakyReLU(slopes[1]), nn.Linear(4, 3))
    biases = {0: SIGNS["above and below"], 2: [40.0, -40.0, -40.0, 40.0]}
    model = biased(spread(nn.Sequential(*layers), 2, 0.4), biases)
    if loss == "CE":
        counted(model, F.cross_entropy, classes(80, 3))
    else:
        counted(model, squared, numbers(80, 3, seed=4))


@pytest.mark.parametrize("slope", ["default", "0.2", "0.7"])
def test_changes_that_the_layers_behind_do_not_pass_on(slope: str) -> None:
    """Four linear units before two outputs: an affine map in 8 numbers, however many parameters write it."""
    model = spread(nn.Sequential(nn.Linear(3, 4), SLOPES[slope], nn.Linear(4, 2)), 3, 0.8)
    found = counted(biased(model, {0: [ABOVE, BELOW, ABOVE, BELOW]}), squared, numbers(80, 2, seed=4))
    assert sum(found.values()) == 26 - 8
