"""`BNP.paper` and the preset "paper" are the published algorithms, transcribed here entry by entry.

Bugs that only these tests catch: `q^2` of a convolution by rows in place of the paper's `max(c k^2/N, sqrt(r s))`; a
bias updated with the gradient of the weight before its own update; damping by a channel's variance in place of the
largest; a corrected or another start; statistics of one example that vanish; momentum on the raw gradient; a layer
beyond the paper that is treated without a word.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from bnp_loops import backward, loss_of, relative, uneven
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.training.bnp import BNP

EPS1, EPS2, RHO = 1e-2, 1e-4, 0.99


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3))


def convolutional() -> nn.Sequential:
    """The paper's geometry: 3 x 3 kernels with "same" padding, dense layers behind."""
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, 3, padding="same"), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 3)),
    )


SHAPES = {"dense": (dense, (7,)), "convolutional": (convolutional, (3, 8, 8))}


def problem(kind: str, rows: int) -> tuple[nn.Module, Tensor, Tensor]:
    make, shape = SHAPES[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double()
    return model, uneven((rows, *shape)), torch.arange(rows) % 3


class Transcription:
    """Algorithms 2 (p. 11) and 3 (p. 19) with plain loops over the paper's indices, in numpy.

    Args:
        shape: of the layer's weight.
        reading: which running mean the variance of one example takes, that "before" its update or "after".
    """

    def __init__(self, shape: tuple[int, ...], reading: str = "before") -> None:
        self.mu, self.var, self.reading = np.zeros(shape[1]), np.ones(shape[1]), reading

    def __call__(self, h: np.ndarray, Gw: np.ndarray, Gb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        N = h.shape[0]
        axes = tuple(i for i in range(h.ndim) if i != 1)
        batch_mean, batch_var = h.mean(axes), h.var(axes)
        before = self.mu.copy()
        self.mu = RHO * self.mu + (1 - RHO) * batch_mean
        if h.size == h.shape[1]:
            batch_var = (batch_mean - (before if self.reading == "before" else self.mu)) ** 2
        self.var = RHO * self.var + (1 - RHO) * batch_var
        s2 = self.var + EPS1 * self.var.max() + EPS2
        if Gw.ndim == 2:
            q2 = max(Gw.shape[1] / N, 1)
            new = np.array([[(g - m * b) / s / q2 for g, m, s in zip(G, self.mu, s2)] for G, b in zip(Gw, Gb)])  # noqa: B905
            return new, Gb / q2 - np.array([sum(row * self.mu) for row in new])
        c, k, (r, s) = Gw.shape[1], Gw.shape[2], h.shape[2:]
        q2 = max(c * k**2 / N, math.sqrt(r * s))
        new_w, new_b = np.empty_like(Gw), np.empty_like(Gb)
        for d in range(Gw.shape[0]):
            shift = 0.0
            for p, i, j in np.ndindex(*Gw.shape[1:]):
                new_w[d, p, i, j] = (Gw[d, p, i, j] - self.mu[p] * Gb[d]) / s2[p] / q2
                shift += self.mu[p] * new_w[d, p, i, j]
            new_b[d] = Gb[d] / q2 - shift
        return new_w, new_b


def run_transcription(
    model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, momentum: float, reading: str = "before"
) -> list[float]:
    """Train by the transcription with momentum `v <- momentum v + g, theta <- theta - lr v`; the losses."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    rules = [Transcription(tuple(m.weight.shape), reading) for m in layers]
    inputs: dict[nn.Module, np.ndarray] = {}
    for m in layers:
        m.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0].detach().numpy().copy()}))
    velocity = {m: (np.zeros(m.weight.shape), np.zeros(m.bias.shape)) for m in layers}
    losses = []
    for k in range(steps):
        model.zero_grad()
        loss = loss_of(model, x + 0.1 * k, y)
        loss.backward()
        losses.append(float(loss.detach()))
        for m, rule in zip(layers, rules, strict=True):
            given = (m.weight.grad.numpy().copy(), m.bias.grad.numpy().copy())
            velocity[m] = tuple(momentum * v + g for v, g in zip(velocity[m], rule(inputs[m], *given), strict=True))
            with torch.no_grad():
                m.weight -= lr * torch.from_numpy(velocity[m][0])
                m.bias -= lr * torch.from_numpy(velocity[m][1])
    return losses


def run_package(model: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float, momentum: float) -> None:
    pre, optimizer = BNP.paper(model), torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for k in range(steps):
        optimizer.zero_grad()
        backward(model, x + 0.1 * k, y)
        pre.step()
        optimizer.step()
    pre.close()


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize(("rows", "momentum"), [(1, 0.9), (2, 0.0), (60, 0.9)])
def test_twenty_steps_are_those_of_the_transcription(kind: str, rows: int, momentum: float) -> None:
    model, x, y = problem(kind, rows)
    twin = copy.deepcopy(model)
    start = copy.deepcopy(model)
    run_package(model, x, y, 20, 0.05, momentum)
    run_transcription(twin, x, y, 20, 0.05, momentum)
    for (name, found), expected, before in zip(
        model.named_parameters(), twin.parameters(), start.parameters(), strict=True
    ):
        assert relative(found.detach(), expected.detach()) < 1e-12, name
        assert relative(found.detach(), before.detach()) > 1e-4, name


@pytest.mark.parametrize(("rows", "square"), [(2, 13.5), (128, 8.0)])
def test_the_scale_of_a_convolution(rows: int, square: float) -> None:
    """`max(c k^2/N, sqrt(r s))` for `c = 3, k = 3` on 8 x 8 images."""
    model, x, y = nn.Conv2d(3, 2, 3, padding=1).double(), uneven((rows, 3, 8, 8)), torch.zeros(rows, 2, 8, 8)
    risk = bnp.EmpiricalRisk(model, nn.functional.mse_loss, (x, y.double()))
    P = bnp.bnp_preconditioner(risk, preset="paper")
    assert P.q[""] ** 2 == pytest.approx(square, rel=1e-15)
    assert P.extensions == {}
    pre = BNP.paper(model)
    nn.functional.mse_loss(model(x), y.double()).backward()
    pre.step()
    assert pre.preconditioner().q[""] ** 2 == pytest.approx(square, rel=1e-15)
    assert pre.preconditioner().extensions == {}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rows", [2, 60])
def test_the_preset_is_the_published_step_with_the_moments_of_the_data(kind: str, rows: int) -> None:
    """What Algorithms 2 and 3 do once their running statistics are those of the batch, which always comes again."""
    model, x, y = problem(kind, rows)
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    expected = []
    inputs: dict[nn.Module, np.ndarray] = {}
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for m in layers:
        m.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0].detach().numpy().copy()}))
    backward(model, x, y)
    for m in layers:
        rule, h = Transcription(tuple(m.weight.shape)), inputs[m]
        axes = tuple(i for i in range(h.ndim) if i != 1)
        rule.mu, rule.var = h.mean(axes), h.var(axes)
        expected += [t.ravel() for t in rule(h, m.weight.grad.numpy(), m.bias.grad.numpy())]
    found = bnp.bnp_preconditioner(risk, preset="paper").direction(risk.gradient)
    assert relative(found, torch.from_numpy(np.concatenate(expected))) < 1e-11


def test_options_given_take_the_place_of_the_presets() -> None:
    model, x, y = problem("dense", 3)
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    P = bnp.bnp_preconditioner(risk, preset="paper", eps1=0.0, q="rows")
    assert (P.settings["eps1"], P.settings["eps2"], P.settings["q"]) == (0.0, 1e-4, "rows")
    assert bnp.bnp_preconditioner(risk, **P.settings).q == P.q
    with pytest.raises(InvalidInputError, match="preset must be one of exact, paper"):
        bnp.bnp_preconditioner(risk, preset="published")


BEYOND = {
    "1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 9), (6, 9), "1 spatial"),
    "3d": (lambda: nn.Conv3d(2, 3, 3, padding=1), (2, 3, 4, 5), (54, 60), "3 spatial"),
    "stride": (lambda: nn.Conv2d(2, 3, 3, padding=1, stride=2), (2, 8, 8), (18, 16), "stride"),
    "dilation": (lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=2), (2, 6, 6), (18, 36), "dilation"),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 6, 6), (18, 36), "groups"),
    "valid": (lambda: nn.Conv2d(2, 3, 3), (2, 6, 6), (18, 16), "padding"),
    "even": (lambda: nn.Conv2d(2, 3, 2, padding="same"), (2, 6, 6), (8, 36), "padding"),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 6, 6), (18, 36), "padding"),
    "no bias": (lambda: nn.Conv2d(2, 3, 3, padding=1, bias=False), (2, 6, 6), (18, 36), "bias"),
    "sequence": (lambda: nn.Linear(40, 2), (5, 40), (40, 5), "5 positions"),
}


@pytest.mark.parametrize("kind", BEYOND)
@pytest.mark.parametrize("rows", [1, 50])
def test_beyond_the_paper_the_rule_is_extended_and_says_so(kind: str, rows: int) -> None:
    """`q^2 = max(m/N, sqrt(positions))`, without the surviving mean of the diagonal form."""
    make, shape, (features, positions), word = BEYOND[kind]
    layer = make().double()
    x = uneven((rows, *shape))
    y = torch.zeros_like(layer(x)).detach()
    P = bnp.bnp_preconditioner(
        bnp.EmpiricalRisk(layer, nn.functional.mse_loss, (x, y)), preset="paper", bias_free="rank-one"
    )
    expected = max(features / rows, math.sqrt(positions))
    assert P.q[""] ** 2 == pytest.approx(expected, rel=1e-14)
    assert word in P.extensions[""]
    assert ("padding" in P.extensions[""]) == (word == "padding")
    pre = BNP.paper(layer, bias_free="rank-one")
    nn.functional.mse_loss(layer(x), y).backward()
    pre.step()
    assert pre.preconditioner().q[""] ** 2 == pytest.approx(expected, rel=1e-14)
    assert word in pre.preconditioner().extensions[""]
    assert BNP.paper(layer).settings.q == "paper"


@pytest.mark.parametrize(
    ("make", "x", "name", "said"),
    [
        (
            lambda: nn.ConvTranspose1d(2, 3, 3), uneven((4, 2, 9)), "0",
            "a transposed convolution, as that of its input with zeros in between",
        ),
        (
            lambda: nn.GRU(2, 3, batch_first=True), uneven((4, 9, 2)), "0.*_hh_l0",
            "9 time steps an example, as of a convolution with kernel size 1",
        ),
        (
            lambda: nn.Embedding(5, 3), torch.arange(36).view(4, 9) % 5, "0",
            "Embedding, by its rows; no free bias, with the q of a layer that has one",
        ),
    ],
)  # fmt: skip
def test_kinds_that_the_paper_does_not_have_are_named(
    make: Callable[[], nn.Module], x: Tensor, name: str, said: str
) -> None:
    class First(nn.Module):
        def forward(self, h: Tensor | tuple[Tensor, Tensor]) -> Tensor:
            return (h[0] if isinstance(h, tuple) else h).flatten(1)

    model = nn.Sequential(make(), First()).double()
    risk = bnp.EmpiricalRisk(model, lambda o, y: o.square().mean(), (x, torch.zeros(4)))
    assert bnp.bnp_preconditioner(risk, preset="paper", also=[nn.Embedding]).extensions[name] == said


def test_other_rules_have_no_extensions_and_rows_are_the_default() -> None:
    layer = nn.Conv1d(2, 3, 3).double()
    risk = bnp.EmpiricalRisk(layer, nn.functional.mse_loss, (uneven((4, 2, 9)), torch.zeros(4, 3, 7).double()))
    found = [bnp.bnp_preconditioner(risk, q=q) for q in ("auto", "rows", "measured", 2.0)]
    assert all(P.extensions == {} for P in found)
    assert found[0].q == found[1].q
    with pytest.raises(InvalidInputError, match="'rows', 'paper', 'measured' or a positive number"):
        bnp.bnp_preconditioner(risk, q="published")
    with pytest.raises(InvalidInputError, match="'rows', 'paper', 'measured' or a positive number"):
        BNP(layer, q="published")


def test_micro_batches_are_the_whole_batch() -> None:
    model, x, y = problem("convolutional", 6)
    twin = copy.deepcopy(model)
    pre = BNP.paper(model)
    backward(model, x, y)
    pre.step()
    other = BNP.paper(twin)
    for i in range(6):
        backward(twin, x[i : i + 1], y[i : i + 1], 1 / 6)
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative(q.grad, p.grad) < 1e-12


def test_which_running_mean_one_example_is_measured_from_hardly_matters() -> None:
    """The paper does not say (p. 11): the squares differ by `1/rho^2`, 2.03 %, and losses by a few percent."""
    model, x, y = problem("dense", 200)
    losses = {}
    for reading in ("before", "after"):
        twin, order = copy.deepcopy(model), torch.Generator().manual_seed(1)
        layers = [m for m in twin.modules() if isinstance(m, nn.Linear)]
        rules = [Transcription(tuple(m.weight.shape), reading) for m in layers]
        for k in torch.randperm(200, generator=order):
            h = x[k : k + 1]
            twin.zero_grad()
            backward(twin, h, y[k : k + 1])
            inputs = [h, torch.relu(layers[0](h))]
            for m, rule, seen in zip(layers, rules, inputs, strict=True):
                step = rule(seen.detach().numpy(), m.weight.grad.numpy(), m.bias.grad.numpy())
                with torch.no_grad():
                    m.weight -= 0.05 * torch.from_numpy(step[0])
                    m.bias -= 0.05 * torch.from_numpy(step[1])
        losses[reading] = float(loss_of(twin, x, y).detach()), rules[0].var
    assert losses["after"][0] == pytest.approx(losses["before"][0], rel=0.05)
    ratio = losses["before"][1] / losses["after"][1]
    assert np.all((ratio > 1) & (ratio < RHO**-2))
