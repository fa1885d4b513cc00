"""Catches: a risk that is not one function of its parameters and goes unnoticed: dropout, batch statistics over several
batches, a loss that is a sum or draws numbers; also where a zero output layer, a large batch, a small mask hide it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from network_models import classes, classify, drawn, numbers, split, table
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, StochasticModelError


def halves(count: int = 9) -> list[tuple[Tensor, Tensor]]:
    return split(*table(count), (count // 2, count - count // 2))


def net(*middle: nn.Module, zero: bool = False) -> nn.Module:
    model = drawn(lambda: nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)))
    if zero:
        nn.init.zeros_(model[-1].weight)
        nn.init.zeros_(model[-1].bias)
    return model


class Inside(nn.Module):
    """A function in the middle of a network, no layer of any known type."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# random layers

RANDOM: dict[str, Callable[[], nn.Module]] = {
    "Dropout": lambda: nn.Dropout(0.5),
    "Dropout, small": lambda: nn.Dropout(1e-6),
    "AlphaDropout": lambda: nn.AlphaDropout(0.3),
    "RReLU": nn.RReLU,
    "F.dropout": lambda: Inside(lambda h: F.dropout(h, 0.3)),
    "noise": lambda: Inside(lambda h: h + 0.01 * torch.randn_like(h)),
    "python": lambda: Inside(lambda h: h * random.random()),
}
KNOWN = ("Dropout", "Dropout, small", "AlphaDropout", "RReLU")


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero head"])
@pytest.mark.parametrize("name", RANDOM)
def test_random_models_are_refused(name: str, zero: bool) -> None:
    """Behind a head of zeros all masks give the same outputs, and other derivatives."""
    model = net(RANDOM[name](), zero=zero)
    for data in (table(), halves(), (numbers(1, 4), classes(1, 3))):
        with pytest.raises(StochasticModelError) as caught:
            classify(model, data)
        text = str(caught.value)
        assert "random in training mode (1)" in text
        assert "another mask" in text  # what would have been computed
        assert "model.eval()" in text
        assert "p=0" in text  # the ways out


@pytest.mark.parametrize("name", KNOWN)
def test_random_layers_at_rest_are_fine(name: str) -> None:
    model = net(RANDOM[name]())
    assert not classify(model.eval(), halves()).coupled
    if hasattr(model[1], "p"):
        model[1].p = 0.0
        classify(model.train(), halves())


def test_dropout_beside_live_batch_statistics() -> None:
    """The way out that the error names: everything in evaluation mode but BatchNorm."""
    model = net(nn.BatchNorm1d(6), nn.Dropout(0.5)).eval()
    model[1].train()
    assert classify(model, table()).coupled


def test_functional_dropout_that_forgets_evaluation_mode() -> None:
    with pytest.raises(StochasticModelError, match=r"training mode \(1\)"):
        classify(net(RANDOM["F.dropout"]()).eval(), table())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.LSTM(4, 3, num_layers=2, dropout=0.5, batch_first=True), "the model itself"),
        (lambda: nn.GRU(4, 3, num_layers=2, dropout=0.5, batch_first=True), "the model itself"),
    ],
)
def test_dropout_inside_recurrent_layers(make: Callable[[], nn.Module], name: str) -> None:
    data = (numbers(5, 6, 4), classes(5, 3))
    with pytest.raises(StochasticModelError, match=name):
        classify(drawn(make), data, output=lambda o: o[0][:, -1])
    classify(drawn(make).eval(), data, output=lambda o: o[0][:, -1])


def test_dropout_inside_attention() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(4, 2, dropout=0.2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(x, x, x)[0][:, 0])

    data = (numbers(5, 6, 4), classes(5, 3))
    with pytest.raises(StochasticModelError, match=r"\(mix\)"):
        classify(drawn(Model), data)
    classify(drawn(Model).eval(), data)


def test_random_layers_that_never_run_are_fine() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.drop, self.norm = nn.Linear(4, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    assert not classify(drawn(Model), halves()).coupled


def test_a_loss_that_draws_numbers() -> None:
    with pytest.raises(StochasticModelError, match="the loss is random"):
        bnp.EmpiricalRisk(net(), lambda o, y: F.cross_entropy(F.dropout(o, 0.5), y), table())


# batch-coupled layers

COUPLED: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(6),
    "no running statistics": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "F.batch_norm": lambda: Inside(lambda h: F.batch_norm(h, None, None, training=True)),
    "centred": lambda: Inside(lambda h: h - h.mean(dim=0)),
    "attention over the batch": lambda: Inside(lambda h: torch.softmax(h @ h.T, dim=1) @ h),
}


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero head"])
@pytest.mark.parametrize("name", COUPLED)
def test_coupled_models_are_refused_over_several_batches(name: str, zero: bool) -> None:
    model = net(COUPLED[name](), zero=zero)
    with pytest.raises(StochasticModelError) as caught:
        classify(model, halves())
    text = str(caught.value)
    assert "batch-coupled layers in training mode" in text
    assert "(1)" in text if name in ("BatchNorm1d", "no running statistics") else "look for functional calls" in text
    assert "over 2 batches" in text
    assert "its own statistics" in text  # what would have been computed
    assert "model.eval()" in text
    assert "one batch (x, y)" in text  # the ways out
    assert classify(model, table()).coupled  # one batch is one function


@pytest.mark.parametrize("name", ["no running statistics", "F.batch_norm"])
def test_batch_statistics_without_training_mode(name: str) -> None:
    with pytest.raises(StochasticModelError, match="batch-coupled"):
        classify(net(COUPLED[name]()).eval(), halves())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", COUPLED)
def test_coupling_in_large_batches_is_seen(name: str, dtype: torch.dtype) -> None:
    """One example of thousands moves the statistics by less than float32 shows."""
    assert classify(net(COUPLED[name]()), table(2000), dtype=dtype).coupled


@pytest.mark.parametrize(
    "middle",
    [
        lambda: nn.LayerNorm(6),
        lambda: nn.GroupNorm(2, 6),
        lambda: nn.BatchNorm1d(6).eval(),
        lambda: Inside(lambda h: h / h.norm(dim=1, keepdim=True)),
    ],
)
def test_what_couples_nothing_is_not_refused(middle: Callable[[], nn.Module]) -> None:
    for dtype in (torch.float32, torch.float64):
        assert not classify(net(middle()), halves(2000), dtype=dtype).coupled
        assert not classify(net(middle()), table(1), dtype=dtype).coupled


def test_images_sequences_and_instances_couple_nothing() -> None:
    image = nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2), nn.Flatten(), nn.LazyLinear(3))
    image.double()(numbers(1, 1, 5, 5))
    assert not classify(drawn(lambda: image), (numbers(6, 1, 5, 5), classes(6, 3))).coupled
    rows = drawn(lambda: nn.Linear(4, 3))
    flat = bnp.EmpiricalRisk(
        rows,
        lambda o, y: F.cross_entropy(o, y.flatten()),
        [(numbers(5, 6, 4), classes(5, 3, 6)), (numbers(3, 6, 4), classes(3, 3, 6))],
        output=lambda o: o.flatten(0, 1),
    )
    assert not flat.coupled
    by_position = bnp.EmpiricalRisk(
        rows,
        lambda o, y: F.cross_entropy(o, y.T.flatten()),
        [(numbers(5, 6, 4), classes(5, 3, 6)), (numbers(3, 6, 4), classes(3, 3, 6))],
        output=lambda o: o.transpose(0, 1).flatten(0, 1),
    )
    assert not by_position.coupled


def test_graphs_couple_their_nodes() -> None:
    """Inputs of several shapes, of which only some have one entry per example."""

    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            h = self.fc(x)
            return h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])

    edges = torch.tensor([[0, 1, 5, 2], [1, 0, 0, 3]])
    assert classify(drawn(Graph), ((numbers(6, 4), edges), classes(6, 3))).coupled
    lonely = torch.tensor([[0, 1], [0, 1]])
    assert not classify(drawn(Graph), ((numbers(6, 4), lonely), classes(6, 3))).coupled


def test_one_example_per_batch_is_judged_by_the_layers() -> None:
    """An image is a batch of pixels to BatchNorm, and nothing can be left out."""
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 3))
    data = [(numbers(1, 1, 4, 4, seed=k), classes(1, 3)) for k in range(3)]
    with pytest.raises(StochasticModelError, match=r"\(1\) over 3 batches"):
        classify(drawn(lambda: model), data)
    assert classify(drawn(lambda: model), data[0]).coupled


# losses that are not means


def squares(reduction: str) -> Callable[..., Tensor]:
    return lambda o, y: F.mse_loss(o, F.one_hot(y, 3).to(o), reduction=reduction)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "sum": squares("sum"),
    "nearly a mean": lambda o, y: F.cross_entropy(o, y, reduction="sum") / (len(y) + 1e-3),
    "square of a mean": lambda o, y: F.cross_entropy(o, y) ** 2,
    "contrastive": lambda o, y: torch.logsumexp(o @ o.T, dim=1).mean(),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_are_no_means_are_refused_over_several_batches(name: str) -> None:
    with pytest.raises(InvalidInputError, match=r"not a mean over batch 0.*reduction='mean'.*one batch"):
        bnp.EmpiricalRisk(net(), LOSSES[name], halves())
    assert float(bnp.EmpiricalRisk(net(), LOSSES[name], table()).value) != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_are_means_in_every_precision(dtype: torch.dtype) -> None:
    for loss in (squares("mean"), F.cross_entropy, lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1)):
        bnp.EmpiricalRisk(net(), loss, halves(3000), dtype=dtype)


def test_an_ignored_target_in_a_later_batch() -> None:
    """The first batch has none, so its mean is one over examples; the second one's is not."""
    x, y = table(12)
    y[10] = -100
    with pytest.raises(InvalidInputError, match=r"not a mean over batch 1.*count="):
        classify(net(), split(x, y, (6, 6)))
    risk = classify(net(), split(x, y, (6, 6)), count=lambda pair: int((pair[1] >= 0).sum()))
    assert torch.allclose(risk.value, classify(net(), (x, y)).value, rtol=1e-13)


def test_class_weights_need_a_count() -> None:
    w = torch.tensor([1.0, 3.0, 0.2])
    loss = nn.CrossEntropyLoss(weight=w)
    with pytest.raises(InvalidInputError, match=r"weighted classes.*count="):
        bnp.EmpiricalRisk(net(), loss, halves())
    risk = bnp.EmpiricalRisk(net(), loss, halves(), count=lambda pair: float(w[pair[1]].sum()))
    assert torch.allclose(risk.value, bnp.EmpiricalRisk(net(), loss, table()).value, rtol=1e-7)


def test_a_loss_of_nothing() -> None:
    """0 = 0: a mean, to all digits."""
    assert float(bnp.EmpiricalRisk(net(), lambda o, y: 0 * o.mean(), halves()).value) == 0


def counted(weights: list[float]) -> Callable[[Any], float]:
    return lambda pair: weights[len(pair[0]) % 2]


def test_weights_of_whole_batches() -> None:
    risk = classify(net(), halves(), count=counted([1.0, 7.0]))
    parts = [classify(net(), batch).value for batch in halves()]
    assert torch.allclose(risk.value, (parts[0] + 7 * parts[1]) / 8, rtol=1e-13)
