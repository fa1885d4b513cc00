"""Running statistics: one mixture of all rows, whatever the batches.

Bugs that only these tests catch: variances of batches averaged without the spread of their means (a variance that
dies at batch size 1), micro-batches committed one by one, weights of rows that depend on how a stream was split, a
start that goes on weighing, rows of images counted wrongly (samples for positions), a fast kernel with the unbiased
variance, half-precision sums.
"""

from __future__ import annotations

import pytest
import torch
from bnp_loops import KINDS, backward, network, relative, stepped
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network.moments import corrected_rho, update_moments
from bnp_analysis.training.bnp import BNP
from bnp_analysis.training.bnp.moments import BatchMoments, batch_moments, pool_moments

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=8)
VALUES = st.floats(-100, 100)


def stream(sizes: list[int], seed: int, width: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shift = torch.randn(len(sizes), 1, width, dtype=torch.float64, generator=g)
    return [5 * s + torch.randn(n, width, dtype=torch.float64, generator=g) for n, s in zip(sizes, shift, strict=True)]


def moments(h: Tensor) -> tuple[Tensor, Tensor]:
    return h.mean(0), h.var(0, correction=0)


@given(sizes=SIZES, seed=st.integers(0, 999), data=st.data())
def test_any_weights_give_the_moments_of_the_mixture(sizes: list[int], seed: int, data: st.DataObject) -> None:
    """T4: each row of batch k weighs `(1-rho_k) prod_(j>k) rho_j / R_k`, the start `prod rho_j`."""
    rhos = data.draw(st.lists(st.floats(0, 1), min_size=len(sizes), max_size=len(sizes)))
    batches = stream(sizes, seed)
    start = torch.tensor([-1.0, 0.0, 7.0], dtype=torch.float64), torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    mean, var = start
    for h, rho in zip(batches, rhos, strict=True):
        mean, var = update_moments(mean, var, *moments(h), rho)
    left, weights = 1.0, []
    for h, rho in zip(reversed(batches), reversed(rhos), strict=True):
        weights.insert(0, torch.full((len(h),), left * (1 - rho) / len(h), dtype=torch.float64))
        left *= rho
    w, every = torch.cat(weights)[:, None], torch.cat(batches)
    expected = (w * every).sum(0) + left * start[0]
    second = (w * every.square()).sum(0) + left * (start[1] + start[0].square())
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(var, second - expected.square(), rtol=1e-9, atol=1e-9)


@given(sizes=SIZES, seed=st.integers(0, 999))
def test_cumulative_counts_do_not_see_how_a_stream_is_split(sizes: list[int], seed: int) -> None:
    batches = stream(sizes, seed)
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    count = 0
    for h in batches:
        total = count + len(h)
        mean, var = update_moments(mean, var, *moments(h), count / total)
        count = total
    expected = moments(torch.cat(batches))
    torch.testing.assert_close(mean, expected[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(var, expected[1], rtol=1e-11, atol=1e-11)


def test_constant_weights_do() -> None:
    """The counterexample of T4: constant `rho` weighs rows by their place."""
    h = stream([8], 0)[0]
    whole = update_moments(0.0, 1.0, float(h[:, 0].mean()), float(h[:, 0].var(correction=0)), 0.9)
    mean, var = 0.0, 1.0
    for row in h[:, 0].tolist():
        mean, var = update_moments(mean, var, row, 0.0, 0.9)
    assert abs(mean - whole[0]) > 0.1
    assert abs(var - whole[1]) > 0.1


@given(sizes=SIZES, seed=st.integers(0, 999))
def test_pooling_is_one_batch(sizes: list[int], seed: int) -> None:
    parts = [BatchMoments(len(h), 2 * len(h), 3 * len(h), *moments(h)) for h in stream(sizes, seed)]
    pooled = parts[0]
    for part in parts[1:]:
        pooled = pool_moments(pooled, part)
    mean, var = moments(torch.cat(stream(sizes, seed)))
    assert (pooled.samples, pooled.rows, pooled.examples) == tuple(k * sum(sizes) for k in (1, 2, 3))
    torch.testing.assert_close(pooled.mean, mean, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(pooled.variance, var, rtol=1e-11, atol=1e-11)


@given(rho=st.floats(0, 0.999), k=st.integers(1, 500))
def test_the_corrected_start_weighs_nothing(rho: float, k: int) -> None:
    """Weights of k batches are those of constant `rho`, divided by their sum."""
    expected = [(1 - rho) * rho ** (k - j) / (1 - rho**k) for j in range(1, k + 1)]
    found = [1 - corrected_rho(rho, j) for j in range(1, k + 1)]
    left = 1.0
    for j in reversed(range(k)):
        assert left * found[j] == pytest.approx(expected[j], rel=1e-9, abs=1e-12)
        left *= 1 - found[j]
    assert left == pytest.approx(0, abs=1e-12)
    assert corrected_rho(rho, 1) == 0


def test_corrected_rho_refuses() -> None:
    for rho, k in ((1.0, 1), (-0.1, 1), (0.5, 0)):
        with pytest.raises(InvalidInputError):
            corrected_rho(rho, k)


@pytest.mark.parametrize("init", ["corrected", "paper"])
@pytest.mark.parametrize("variance", ["total", "within"])
def test_what_the_object_keeps(init: str, variance: str) -> None:
    model, x, y = network(rows=40)
    pre = BNP(model, rho=0.9, init=init, variance=variance)
    mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    for k, part in enumerate(x.split(8), start=1):
        stepped(model, part, y[:8], pre)
        rho = corrected_rho(0.9, k) if init == "corrected" else 0.9
        m, v = moments(part)
        new_mean, new_var = update_moments(mean, var, m, v, rho)
        mean, var = new_mean, new_var if variance == "total" else rho * var + (1 - rho) * v
    kept = pre.state_dict()["layers"]["0"]
    assert relative(kept["mean"], mean) < 1e-12
    assert relative(kept["variance"], var) < 1e-12
    assert kept["rows"] == 8


def test_one_row_at_a_time_the_variance_lives() -> None:
    model, x, y = network(rows=60)
    pre = BNP(model, rho=0.999)
    for k in range(60):
        stepped(model, x[k : k + 1], y[k : k + 1], pre)
    kept = pre.state_dict()["layers"]["0"]
    assert relative(kept["variance"], x.var(0, correction=0)) < 0.05
    assert relative(kept["mean"], x.mean(0)) < 0.05
    within = BNP(model, variance="within")
    with pytest.raises(InvalidInputError, match=r"one row.*variance='total'"):
        stepped(model, x[:1], y[:1], within)
    assert within.state_dict()["step"] == 0


def test_reference_rows_give_a_row_the_same_weight_in_any_batch() -> None:
    """`rho^(R/R_ref)`: two batches of 4 leave of the past what one of 8 leaves."""
    model, x, y = network(rows=40)
    kept = []
    for second in ([8], [4, 4]):
        pre = BNP(model, rho=0.5, init="paper", reference_rows=8)
        mean = torch.zeros(5, dtype=torch.float64)
        begin = 0
        for n in [8, *second]:
            stepped(model, x[begin : begin + n], y[begin : begin + n], pre)
            begin += n
            rho = 0.5 ** (n / 8)
            mean = rho * mean + (1 - rho) * x[begin - n : begin].mean(0)
        assert relative(pre.state_dict()["layers"]["0"]["mean"], mean) < 1e-12
        kept.append(pre.state_dict()["layers"]["0"]["start"])
    assert kept[0] == pytest.approx(kept[1]) == pytest.approx(0.25)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("statistics", "layout", "batch"),
    [
        ("channel", "contiguous", 6),
        ("channel", "channels_last", 1),
        ("patch", "channels_last", 6),
        ("patch", "contiguous", 1),
    ],
)
def test_the_kernels(kind: str, statistics: str, layout: str, batch: int) -> None:
    """Each fast way against the plain mean and biased variance; `R` against the rows of the layer."""
    model, x, y = network(kind, rows=batch)
    pre = BNP(model, statistics=statistics)
    layer = pre._layers[0]
    h = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" and x.ndim == 4 else x
    found = batch_moments(layer, h, statistics)
    assert found is not None
    table = layer.rows(x).flatten(1) if statistics == "patch" else layer.channels(x)
    mean, var = moments(table)
    torch.testing.assert_close(found.mean, mean, rtol=1e-12, atol=1e-13)
    variance = torch.zeros_like(var) if found.variance is None else found.variance
    torch.testing.assert_close(variance, var, rtol=1e-12, atol=1e-13)
    assert (found.variance is None) == (found.samples == 1)
    assert found.samples == table.shape[0]
    assert found.rows == layer.rows(x).shape[0]
    stepped(model, h, y, pre)
    assert pre.state_dict()["layers"]["0"]["rows"] == found.rows


def test_statistics_of_half_precision_are_in_float32() -> None:
    """bfloat16 has 8 bits: a mean of 4096 ones that is summed in it stops at 256."""
    model = nn.Linear(3, 2).bfloat16()
    pre = BNP(model)
    x = torch.ones(4096, 3).bfloat16()
    x[::2] = 2
    model(x).float().square().mean().backward()
    pre.step()
    kept = pre.state_dict()["layers"][""]
    assert kept["mean"].dtype == torch.float32
    torch.testing.assert_close(kept["mean"], torch.full((3,), 1.5))
    torch.testing.assert_close(kept["variance"], torch.full((3,), 0.25))
    assert model.weight.grad.dtype == torch.bfloat16


def test_an_input_that_is_overwritten_afterwards_was_seen_before() -> None:
    """A loader that reuses its buffer, at one row too, where nothing needs to be computed."""
    model, x, y = network(rows=4)
    for n in (1, 4):
        pre = BNP(model)
        model.zero_grad()
        buffer = x[:n].clone()
        backward(model, buffer, y[:n])
        buffer.fill_(1e6)
        pre.step()
        assert relative(pre.state_dict()["layers"]["0"]["mean"], x[:n].mean(0)) < 1e-12


@pytest.mark.parametrize("numbers", [1, 70, 10**6])
def test_images_centred_in_parts_are_centred_whole(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bnp_analysis.training.bnp.moments._PART", numbers)
    model, x, _ = network("padding", rows=7)
    found = batch_moments(BNP(model)._layers[0], x, "channel")
    mean, var = moments(x.movedim(1, -1).flatten(0, -2))
    assert found is not None
    assert found.variance is not None
    assert relative(found.mean, mean) < 1e-13
    assert relative(found.variance, var) < 1e-13


class Backwards(nn.Module):
    """Layers that run in another order than they are listed."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(4, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def test_statistics_belong_to_layers_not_to_the_order_of_their_runs() -> None:
    _, x, y = network()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Backwards().double()
    pre = BNP(model)
    hidden = torch.tanh(model.first(x)).detach()
    stepped(model, x, y, pre)
    kept = pre.state_dict()["layers"]
    assert relative(kept["first"]["mean"], x.mean(0)) < 1e-13
    assert relative(kept["last"]["variance"], hidden.var(0, correction=0)) < 1e-12
