"""Catches: a risk that is not one function of its parameters and goes unnoticed: dropout, batch statistics over several
batches, a loss that is a sum or draws numbers; also where a zero output layer, a large batch, a small mask hide it."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from network_models import classes, classify, drawn, numbers, split, table
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError, StochasticModelError
from bnp_analysis.network.purity import extreme_draws, random_layers


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


def test_random_layers_are_known_by_their_settings() -> None:
    """Before anything is drawn: a mask that one pass in a million shows is named all the same."""
    layers = [nn.Dropout(1e-6), nn.Dropout(0.0), nn.Dropout(0.5).eval(), nn.RReLU(), nn.RReLU(0.2, 0.2), nn.ReLU()]
    layers += [nn.LSTM(2, 2, 2, dropout=0.1), nn.LSTM(2, 2), nn.MultiheadAttention(2, 1, dropout=0.1)]
    risk = SimpleNamespace(modules=nn.Sequential(*layers).named_modules)
    assert random_layers(cast(bnp.EmpiricalRisk, risk)) == ["0", "3", "6", "8"]


def test_outputs_of_another_shape_in_every_pass() -> None:
    model = drawn(lambda: nn.Sequential(nn.Linear(4, 99), Inside(lambda h: h[:, : random.randint(3, 99)])))
    with pytest.raises(StochasticModelError, match=r"another mask.*it draws from: Python's random"):
        classify(model, table())


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


class LayerDrop(nn.Module):
    """One decision per pass."""

    def __init__(self, p: float, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.inner, self.p, self.draw = nn.Linear(6, 6), p, draw

    def forward(self, h: Tensor) -> Tensor:
        dropped = self.draw() < self.p  # drawn in evaluation mode too, as some libraries do
        return h if dropped and self.training else h + torch.tanh(self.inner(h))


class Own:
    """A generator that goes on from pass to pass."""

    def __init__(self) -> None:
        self.generator = np.random.default_rng(3)

    def __call__(self) -> float:
        return float(self.generator.random())


TORCH = torch.Generator().manual_seed(1)
DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(()),
    "torch, many": lambda: torch.rand(7)[3],
    "torch, double": lambda: torch.empty((), dtype=torch.float64).uniform_(),
    "python": random.random,
    "python, uniform": lambda: random.uniform(0, 1),
    "numpy": lambda: np.random.rand(),  # noqa: NPY002, PLW0108
    "numpy, own generator": Own(),
    "python, own generator": random.Random(0).random,
    "torch, own generator": lambda: torch.rand((), generator=TORCH),
}


@pytest.mark.parametrize("p", [1e-6, 0.55, 1 - 1e-6])
@pytest.mark.parametrize("name", DRAWS)
def test_rare_decisions_are_seen(name: str, p: float) -> None:
    model = net(LayerDrop(p, DRAWS[name]))
    with pytest.raises(StochasticModelError, match=r"random in training mode .*it draws from"):
        classify(model, table())


@pytest.mark.parametrize("name", [name for name in DRAWS if "own" not in name])
def test_numbers_that_are_drawn_and_not_used_are_fine(name: str) -> None:
    for model in (net(LayerDrop(0.0, DRAWS[name])), net(LayerDrop(0.3, DRAWS[name])).eval()):
        for data in (table(), halves()):
            assert not classify(model, data).coupled
    bnp.EmpiricalRisk(net(), lambda o, y: F.cross_entropy(o, y) + 0 * DRAWS[name](), table())


def test_fixed_random_features_are_one_function() -> None:
    """Generators that begin anew in every pass."""

    def features(h: Tensor) -> Tensor:
        a = torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        b = torch.from_numpy(np.random.default_rng(0).normal(size=(6, 6)))
        return torch.tanh(h @ a + h @ b * random.Random(0).random())

    assert not classify(net(Inside(features)), table()).coupled


def mixed_up(o: Tensor, y: Tensor) -> Tensor:
    share = float(np.random.beta(0.4, 0.4))  # noqa: NPY002
    return share * F.cross_entropy(o, y) + (1 - share) * F.cross_entropy(o, y.flip(0))


LOSSES_THAT_DRAW: dict[str, Callable[..., Tensor]] = {
    "mixup": mixed_up,
    "rarely": lambda o, y: F.cross_entropy(o, y) * (2 if torch.rand(()) < 1e-3 else 1),
    "python": lambda o, y: F.cross_entropy(o, y) * (2 if random.random() > 0.999 else 1),
    "noise on targets": lambda o, y: F.cross_entropy(o + 1e-4 * torch.randn_like(o), y),
    "a few of them": lambda o, y: F.cross_entropy(*(t[torch.randperm(len(o))[:5]] for t in (o, y))),
}


@pytest.mark.parametrize("name", LOSSES_THAT_DRAW)
def test_losses_that_draw_numbers_are_refused(name: str) -> None:
    with pytest.raises(StochasticModelError, match=r"the loss is random.*it draws from"):
        bnp.EmpiricalRisk(net(), LOSSES_THAT_DRAW[name], table())


def test_extreme_draws_are_extreme_and_come_to_an_end() -> None:
    """Loops that reject draws do not hang, and the states come back."""
    before = torch.get_rng_state(), random.getstate()
    for which, (low, high) in enumerate([(0.0, 1e-15), (1 - 1e-7, 1.0)]):
        with extreme_draws(which):
            values = [
                random.random(),
                np.random.rand(),  # noqa: NPY002
                float(torch.rand(())),
                float(torch.rand((), dtype=torch.float64)),
            ]
            assert all(low <= v <= high for v in values), values
            for p in (1e-9, 1 - 1e-7):  # a mask of either kind, however rare
                assert bool((F.dropout(torch.ones(9), p) > 0).all()) == (which == 1)
            assert not torch.ones(9).bernoulli_(0.0).any()
            assert bool(torch.zeros(9).bernoulli_(1.0).all())
            for _ in range(300):
                random.sample(range(100), 7)
                random.gammavariate(0.3, 1.0)
                np.random.normal()  # noqa: NPY002
                np.random.permutation(9)  # noqa: NPY002
                torch.distributions.Gamma(torch.tensor(0.3), torch.tensor(1.0)).sample()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()


# coupled examples


class Mixing(nn.Module):
    """A network over examples that are mixed by a function of the batch."""

    def __init__(self, mix: Callable[[Tensor], Tensor], tokens: bool = False) -> None:
        super().__init__()
        self.first = nn.Embedding(9, 6) if tokens else nn.Linear(4, 6)
        self.out, self.mix = nn.Linear(6, 3), mix

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.out(torch.tanh(self.mix(h.mean(dim=1) if h.ndim > 2 else h)))


def edge(source: int, target: int) -> Callable[[Tensor], Tensor]:
    def mix(h: Tensor) -> Tensor:
        return h.index_add(0, torch.tensor([target]), h[[source]]) if len(h) > max(source, target) else h

    return mix


def routed(h: Tensor) -> Tensor:
    """The two largest of the batch go another way: a decision, with no derivative."""
    return torch.where(h[:, :1] >= h[:, :1].topk(2, dim=0).values[-1], 2 * h, h)


MIXES: dict[str, Callable[[Tensor], Tensor]] = {
    "one edge": edge(5, 9),
    "one edge, backwards": edge(11, 2),
    "pairs": lambda h: h + h.view(-1, 2, h.shape[1]).flip(1).reshape(h.shape) if len(h) % 2 == 0 else h,
    "neighbours": lambda h: h + 0.01 * h.roll(1, 0),
    "in the middle": lambda h: torch.cat([h[:4], h[4:8] - h[4:8].mean(0), h[8:]]),
    "cumulative": lambda h: h.cumsum(0),
    "routed": routed,
}


@pytest.mark.parametrize(("tokens", "dtype"), [(False, torch.float64), (True, torch.float32)])
@pytest.mark.parametrize("name", MIXES)
def test_any_two_examples_that_are_coupled_are_seen(name: str, dtype: torch.dtype, tokens: bool) -> None:
    g = torch.Generator().manual_seed(4)
    x = torch.randint(9, (14, 5), generator=g) if tokens else numbers(14, 4)
    y = classes(14, 3)
    model = drawn(lambda: Mixing(MIXES[name], tokens))
    risk = classify(model, (x, y), dtype=dtype)
    assert risk.coupled
    with pytest.raises(StochasticModelError, match="batch-coupled"):
        classify(model, split(x, y, (12, 2)), dtype=dtype)
    if not tokens:
        # The units of the table are those of the matrix, not those of independent examples.
        table_of = bnp.layer_table(risk, layers=["out"])
        truth = [bnp.condition_number(bnp.gauss_newton(risk, block=("out", i))).value for i in range(3)]
        assert [k.value for k in table_of.layers[0].unit_blocks] == pytest.approx(truth, rel=1e-2)


SEPARATE: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda h: h,
    "another order": lambda h: h.flip(0),
    "shuffled": lambda h: h[torch.randperm(len(h), generator=torch.Generator().manual_seed(0))],
    "rounded": lambda h: h.detach().round(),
    "mask of its own": lambda h: h * (h > 0),
}


@pytest.mark.parametrize(("tokens", "dtype"), [(False, torch.float32), (True, torch.float64)])
@pytest.mark.parametrize("name", SEPARATE)
def test_separate_examples_are_not_called_coupled(name: str, dtype: torch.dtype, tokens: bool) -> None:
    g = torch.Generator().manual_seed(4)
    x = torch.randint(9, (14, 5), generator=g) if tokens else numbers(14, 4)
    model = drawn(lambda: Mixing(SEPARATE[name], tokens))
    assert not classify(model, (x, classes(14, 3)), dtype=dtype, derivatives="surrogate").coupled


def test_batches_that_are_cut_to_their_longest_example_are_coupled() -> None:
    """The shape of all outputs depends on one example."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.words(x[:, (x != 0).any(0)]))).flatten(0, 1)

    x = torch.ones(6, 5, dtype=torch.int64)
    x[:, 3:] = 0
    x[torch.randperm(6, generator=torch.Generator().manual_seed(0))[-1], 4] = 2  # not among those tried first
    assert bnp.EmpiricalRisk(drawn(Cut), lambda o, y: o.square().mean(), (x, torch.zeros(6))).coupled


def test_tokens_that_are_changed_first_take_no_more_passes() -> None:
    """They become numbers later: independence is still seen by derivatives, not by trying all pairs."""

    class Changed(Mixing):
        def __init__(self, more: int) -> None:
            super().__init__(lambda h: h, tokens=True)
            self.more = more

        def forward(self, x: Tensor) -> Tensor:
            passes[self.more] += 1
            return super().forward((x + self.more) % 9 if self.more else x)

    passes = [0, 0]
    x = torch.randint(9, (64, 5), generator=torch.Generator().manual_seed(4))
    for more in (0, 1):
        model = drawn(lambda more=more: Changed(more))
        assert not classify(model, (x, classes(64, 3))).coupled
    assert passes[0] == passes[1]


def test_as_many_positions_as_examples() -> None:
    """A table of positions has as many rows as the batch, and is no example's."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places, self.out = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(self.tokens(x) + self.places(torch.arange(x.shape[1]))).mean(dim=1))

    x = torch.randint(9, (5, 5), generator=torch.Generator().manual_seed(4))
    assert not classify(drawn(Model), (x, classes(5, 3))).coupled


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


@pytest.mark.parametrize("name", COUPLED)
def test_coupling_in_large_batches_is_seen(name: str) -> None:
    """One example of thousands moves the statistics by less than float32 shows."""
    assert classify(net(COUPLED[name]()), table(2000), dtype=torch.float32).coupled


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
    said = r"a sum over batch 0, not a mean" if name == "sum" else r"not a mean over batch 0"
    with pytest.raises(InvalidInputError, match=said + r".*reduction='mean'"):
        bnp.EmpiricalRisk(net(), LOSSES[name], halves())
    assert float(bnp.EmpiricalRisk(net(), LOSSES[name], table()).value) != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_are_means_in_every_precision(dtype: torch.dtype) -> None:
    for loss in (squares("mean"), F.cross_entropy, lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1)):
        bnp.EmpiricalRisk(net(), loss, halves(3000), dtype=dtype)


def test_batches_that_cannot_be_cut_are_believed() -> None:
    """Weights of classes beside the labels are of no example."""
    weights = torch.tensor([1.0, 2.0, 0.5])
    data = [(x, {"class": y, "weights": weights}) for x, y in halves()]
    risk = bnp.EmpiricalRisk(net(), lambda o, t: (o * t["weights"]).square().sum(), data)
    values = [(net()(x) * weights).square().sum().detach() for x, _ in data]
    assert risk.value.item() == pytest.approx(float(4 * values[0] + 5 * values[1]) / 9, rel=1e-6)


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


@pytest.mark.parametrize(
    "gate",
    [
        lambda h: (h[:, 0] > h[:, 0].median()).to(h)[:, None],
        lambda h: (h.detach().abs().max() * 4).ceil(),
        lambda h: 1 + (h.sign().prod(1) == h.sign().prod(1)[0]).to(h)[:, None],
    ],
)
def test_decisions_over_the_batch_without_derivative(gate: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Examples were taken for independent, and a factor made in slices was wrong by 13 to 24 %."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.a, self.o = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = torch.tanh(self.a(x))
            out: torch.Tensor = self.o(h * gate(h))
            return out

    torch.manual_seed(0)
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3
    risk = bnp.EmpiricalRisk(Gated().double(), nn.functional.cross_entropy, (x, y))
    A = bnp.gauss_newton(risk)
    assert risk.coupled
    rows = A.factor.to_dense()
    assert torch.allclose(rows.T @ rows, A @ torch.eye(A.dim, dtype=torch.float64), atol=1e-12)
