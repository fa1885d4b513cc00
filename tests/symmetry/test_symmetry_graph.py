"""The recorded operations, what reaches the output through them, and the null vectors of data.

Bugs that only these tests catch: an activation or pooling that is not recognized in one of its spellings; values that
a later in-place operation has overwritten; channels that are looked for in the wrong columns behind a reshape; rows
taken as cut though the output depends on them; small numbers taken for zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.sparse import csr_array
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.linalg.spectra.checks import null_vectors
from bnp_analysis.symmetry.candidates import Chart
from bnp_analysis.symmetry.constraints import Constraints, solutions
from bnp_analysis.symmetry.elementwise import rigid
from bnp_analysis.symmetry.from_data import shift_invariant
from bnp_analysis.symmetry.graph import Graph, Operation
from bnp_analysis.symmetry.null_space import candidate_directions, follow
from bnp_analysis.symmetry.operations import OPERATIONS
from bnp_analysis.symmetry.recording import record_graph

Forward = Callable[["Written", Tensor], Tensor]


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Written(nn.Module):
    """Layers by name, and a forward that is written out."""

    def __init__(self, forward: Forward, **layers: nn.Module) -> None:
        super().__init__()
        for k, (name, layer) in enumerate(layers.items()):
            setattr(self, name, layer.double())
            for j, p in enumerate(layer.parameters()):
                p.data = numbers(*p.shape, seed=10 * k + j + 1)
        self.written = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)


def risk_of(model: nn.Module, x: Tensor | Sequence[Tensor]) -> bnp.EmpiricalRisk:
    parts = [x] if isinstance(x, Tensor) else list(x)
    pairs = [(part, torch.arange(len(part)) % 2) for part in parts]
    return bnp.EmpiricalRisk(model, F.cross_entropy, pairs, derivatives="surrogate")  # some networks detach


def graph_of(model: nn.Module, x: Tensor) -> Graph:
    risk = risk_of(model, x)
    return record_graph(risk, next(iter(risk.batches)))


IMAGES = numbers(5, 1, 6, 6)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "module": nn.ReLU(),
    "module in place": nn.ReLU(inplace=True),
    "functional": F.relu,
    "functional in place": lambda h: F.relu(h, inplace=True),
    "relu_": F.relu_,
    "torch": torch.relu,
    "method": lambda h: h.relu(),
    "method in place": lambda h: h.relu_(),
}


@pytest.mark.parametrize("spelling", ACTIVATIONS)
def test_every_spelling_of_relu_is_one(spelling: str) -> None:
    activation = ACTIVATIONS[spelling]
    model = Written(lambda m, x: m.out(activation(m.a(x))), a=nn.Linear(3, 4), out=nn.Linear(4, 2))
    graph = graph_of(model, numbers(7, 3))
    assert [node.kind for node in graph] == ["linear", "relu", "linear"]
    assert [node.inputs for node in graph] == [(-1,), (0,), (1,)]
    assert graph.result == 2
    # The layer's output is kept as it was before anything was written into it.
    assert torch.equal(graph.nodes[0].output, F.linear(numbers(7, 3), model.a.weight, model.a.bias))
    assert torch.equal(graph.nodes[2].received, graph.nodes[0].output.relu())


def constraints_of(model: nn.Module, x: Tensor) -> Constraints:
    risk = risk_of(model, x)
    batch = next(iter(risk.batches))
    graph = record_graph(risk, batch, calls=True)
    return follow(Constraints(Chart(risk, graph), graph, [graph]))[0]


def columns(model: nn.Module, x: Tensor) -> list[list[int]]:
    """For each label that the first layer makes, the input features of the second that show it."""
    found = constraints_of(model, x)
    first, second = [use for use in found.uses if not use.table][:2]
    made = [[int(first.out[i])] for i in range(len(first.out))]
    # An activation that is linear on the data gives its channels new labels.
    names = {int(new): i for new, old in found.aligned for new, old in zip(new, old, strict=True) for i, m in
             enumerate(made) if int(old) in m} | {m[0]: i for i, m in enumerate(made)}  # fmt: skip
    return [[k for k, label in enumerate(second.source[0]) if names.get(int(label)) == i] for i in range(len(made))]


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "max": nn.MaxPool2d(2),
    "max functional": lambda h: F.max_pool2d(h, 2),
    "max torch": lambda h: torch.max_pool2d(h, 2),
    "max with indices": lambda h: F.max_pool2d(h, 2, return_indices=True)[0],
    "adaptive max": nn.AdaptiveMaxPool2d(2),
    "average": nn.AvgPool2d(2),
    "adaptive average": nn.AdaptiveAvgPool2d(2),
}


@pytest.mark.parametrize("pool", POOLS)
def test_channels_become_runs_of_features_behind_any_pool(pool: str) -> None:
    act = POOLS[pool]
    model = Written(lambda m, x: m.out(act(F.relu(m.a(x))).flatten(1)), a=nn.Conv2d(1, 3, 3), out=nn.Linear(12, 2))
    assert columns(model, IMAGES) == torch.arange(12).view(3, 4).tolist()
    causes = {c.cause: c.count for c in candidate_directions(risk_of(model, IMAGES))[0]}
    assert causes["homogeneity"] == 3


def test_channels_are_followed_through_reshapes() -> None:
    tokens, x = numbers(5, 4, 3), numbers(5, 3)
    dense = {"a": nn.Linear(3, 2), "out": nn.Linear(8, 2)}
    # Channel i of 2 lies at positions i, i + 2, ... behind the flattening of (4, 2).
    strided = [[0, 2, 4, 6], [1, 3, 5, 7]]
    images = {"a": nn.Conv2d(1, 2, 3), "out": nn.Linear(2, 2)}
    whole = {"a": nn.Conv2d(1, 3, 6), "out": nn.Linear(3, 2)}
    plain = {"a": nn.Linear(3, 2), "out": nn.Linear(2, 2)}
    cases: list[tuple[Forward, dict[str, nn.Module], Tensor, list[list[int]]]] = [
        (lambda m, x: m.out(m.a(x).flatten(1)), dense, tokens, strided),
        (lambda m, x: m.out(m.a(x.view(-1, 3)).view(5, 4, 2).reshape(5, 8)), dense, tokens, strided),
        (lambda m, x: m.out(m.a(x).squeeze()), whole, IMAGES, [[0], [1], [2]]),
        (lambda m, x: m.out(m.a(x).mean((2, 3))), images, IMAGES, [[0], [1]]),
        (lambda m, x: m.out(m.a(x).unflatten(1, (2, 1)).flatten(1)), plain, x, [[0], [1]]),
        (lambda m, x: m.out(F.pad(m.a(x), (0, 1), "circular")), {**plain, "out": nn.Linear(3, 2)}, x, [[0, 2], [1]]),
        (lambda m, x: m.out(m.a(x).T.flip(0).t()), plain, x, [[1], [0]]),
        (lambda m, x: m.out(F.pad(m.a(x), (1, 0))), {**plain, "out": nn.Linear(3, 2)}, x, [[1], [2]]),
    ]
    for forward, layers, data, features in cases:
        assert columns(Written(forward, **layers), data) == features


def test_scales_shifts_and_their_sums() -> None:
    """`h`, `2 h + 1` and `h + f(h)`: what one scale and one shift of `h` are behind them."""
    model = Written(
        lambda m, x: m.out((h := m.a(x)) * 2 + 1 + m.b(torch.tanh(h * 0))),
        a=nn.Linear(3, 2), b=nn.Linear(2, 2), out=nn.Linear(2, 2),
    )  # fmt: skip
    found = constraints_of(model, numbers(7, 3))
    first, last = found.uses[0].out, found.uses[-1].source[0]
    assert found.gain(first).tolist() == [1.0, 1.0]
    assert found.gain(last).tolist() == [2.0, 2.0]


def test_what_cannot_be_followed_is_named() -> None:
    forwards: dict[str, Forward] = {
        "passes through cumsum": lambda m, x: m.out(m.b(m.a(x).cumsum(1))),
        "passes through detach": lambda m, x: m.out(m.b(F.relu(m.a(x)).detach())),
        "passes through __setitem__": lambda m, x: m.out(_overwritten(m.b(F.relu(m.a(x))))),
        "passes through linear with computed weights": lambda m, x: m.out(F.linear(m.a(x), 2 * m.b.weight)),
        "b.weight: used by mul": lambda m, x: m.out(F.linear(m.a(x), 2 * m.b.weight)),
        "a.weight, a.bias: used more than once": lambda m, x: m.out(F.relu(m.a(x)) + m.b(m.a(x))),
    }
    for word, forward in forwards.items():
        model = Written(forward, a=nn.Linear(3, 4), b=nn.Linear(4, 4), out=nn.Linear(4, 2))
        _, skipped = candidate_directions(risk_of(model, numbers(7, 3)))
        assert word in "; ".join(skipped), (word, skipped)


class Entries(nn.Module):
    """Parameters without a layer."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


TOKENS, KEPT, PLACES = numbers(60, 4, 3), torch.tensor([True, False, True, False]), numbers(4, 4, seed=3)
SCALED = torch.tensor([1.0, 2.0, 1.0, 1.0], dtype=torch.float64)


def _a() -> nn.Module:
    return nn.Linear(3, 4)


def _b() -> nn.Module:
    return nn.Linear(4, 4)


def _scores(m: Written, x: Tensor) -> Tensor:
    return m.a(x) @ m.k(x).transpose(1, 2)


# Of each rule a network that asks for it: the causes that are found, none too many, and words for what is not followed.
RULES: dict[str, tuple[Forward, dict[str, Callable[[], nn.Module]], Tensor, dict[str, int], str]] = {
    "a mask by its keyword": (
        lambda m, x: torch.tanh(m.a(x)).masked_fill(KEPT, value=0.0),
        {},
        numbers(60, 3),
        {"dependent inputs": 4, "dead units": 8},
        "",
    ),
    "a sum with a factor": (
        lambda m, x: torch.add(m.a(x), 1.0, alpha=2),
        {},
        numbers(60, 3),
        {"dependent inputs": 2, "unread outputs": 8},
        "passes through add",
    ),
    "a difference from a number": (
        lambda m, x: F.relu(1 - m.a(x)),
        {},
        numbers(60, 3),
        {"homogeneity": 3, "always-active units": 2},
        "",
    ),
    "a number minus linear units": (
        lambda m, x: 1 - m.a(x),
        {},
        numbers(60, 3),
        {"dependent inputs": 2, "unread outputs": 8, "linear layer": 8},
        "",
    ),
    "a constant in front": (
        lambda m, x: F.relu(SCALED + 50 + m.a(x)),
        {},
        numbers(60, 3),
        {"dependent inputs": 2, "unread outputs": 8, "always-active units": 8},
        "",
    ),
    "a quotient that is rounded": (
        lambda m, x: torch.div(m.a(x), 3.0, rounding_mode=None),
        {},
        numbers(60, 3),
        {"dependent inputs": 2, "unread outputs": 8},
        "passes through div",
    ),
    "numbers that differ from place to place": (
        lambda m, x: (m.a(x) + PLACES).mean(1),
        {},
        TOKENS,
        {"dependent inputs": 2, "unread outputs": 8, "linear layer": 2},
        "",
    ),
    "factors that differ from place to place": (
        lambda m, x: F.relu(m.a(x) * PLACES.abs()).mean(1),
        {},
        TOKENS,
        {"homogeneity": 4},
        "",
    ),
    "gains of zeros": (
        lambda m, x: torch.tanh(h := m.a(x)) + 0 * h * m.g.weight,
        {"g": lambda: Entries(4)},
        numbers(60, 3),
        {"parameters without effect": 4},
        "",
    ),
    "gains of linear units": (
        lambda m, x: m.a(x) * m.g.weight,
        {"g": lambda: Entries(4)},
        numbers(60, 3),
        {"dependent inputs": 2, "unread outputs": 8, "linear layer": 12},
        "",
    ),
    "a function of parameters": (
        lambda m, x: F.linear(m.a(x), torch.tanh(m.b.weight)),
        {"b": lambda: Entries(4, 4)},
        numbers(60, 3),
        {"dependent inputs": 2, "unread outputs": 8},
        "passes through linear with computed weights; b.weight: used by tanh",
    ),
    "two bounds": (lambda m, x: m.a(x).clamp(0, 0.7), {}, numbers(60, 3), {}, "passes through clamp"),
    "another bound": (lambda m, x: m.a(x).clamp(min=0.1), {}, numbers(60, 3), {}, "passes through clamp"),
    "a mask for each example": (
        lambda m, x: F.relu(torch.where(x[:, :1] > 0, m.a(x) + 50, SCALED[:1] * 0)),
        {},
        numbers(60, 3),
        {"unread outputs": 8, "homogeneity": 4},
        "",
    ),
    "a larger one of two": (
        lambda m, x: torch.max(m.a(x), other=m.b(m.a(x))),
        {"b": _b},
        numbers(60, 3),
        {"dependent inputs": 4},
        "a.weight, a.bias: used more than once; passes through max",
    ),
    "a maximum": (lambda m, x: m.a(x).amax(1), {}, TOKENS, {"linear layer": 8}, ""),
    "a product with parameters": (
        lambda m, x: m.a(x) @ m.w.weight,
        {"w": lambda: Entries(4, 4)},
        numbers(60, 3),
        {"dependent inputs": 2, "unread outputs": 16, "linear layer": 16},
        "",
    ),
    "a product with a vector": (
        lambda m, x: (h := m.a(x)) * (h @ SCALED)[:, None],
        {},
        numbers(60, 3),
        {"unread outputs": 4},
        "passes through matmul",
    ),
    "a product with a constant": (
        lambda m, x: m.a(x) @ PLACES,
        {},
        numbers(60, 3),
        {"dependent inputs": 2, "unread outputs": 8, "linear layer": 1},
        "",
    ),
    "a layer norm of parameters": (
        lambda m, x: F.linear(m.a(x), F.layer_norm(m.b.weight, (4,))),
        {"b": lambda: Entries(4, 4)},
        numbers(60, 3),
        {"dependent inputs": 2, "unread outputs": 8},
        "passes through linear with computed weights; b.weight: used by layer_norm",
    ),
    "a group norm of parameters": (
        lambda m, x: F.linear(m.a(x), F.group_norm(m.b.weight, 2)),
        {"b": lambda: Entries(4, 4)},
        numbers(60, 3),
        {"dependent inputs": 4, "group_norm shift": 8},
        "passes through linear with computed weights; b.weight: used by group_norm",
    ),
    "a batch norm of parameters": (
        lambda m, x: F.linear(m.a(x), F.batch_norm(m.b.weight, None, None, training=True)),
        {"b": lambda: Entries(4, 4)},
        numbers(60, 3),
        {"dependent inputs": 2, "unread outputs": 8},
        "passes through linear with computed weights; b.weight: used by batch_norm",
    ),
    "a norm of zeros too": (lambda m, x: F.layer_norm(F.pad(m.a(x), (0, 1)), (5,))[:, :4], {}, numbers(60, 3), {}, ""),
    "a norm of unequal gains": (lambda m, x: F.rms_norm(m.a(x) * SCALED, (4,), eps=1e-2), {}, numbers(60, 3), {}, ""),
    "scores without a softmax": (
        lambda m, x: torch.tanh(_scores(m, x)).mean(2),
        {"k": _a},
        TOKENS,
        {"attention query-key": 16},
        "",
    ),
    "scores with a softmax along the queries": (
        lambda m, x: _scores(m, x).softmax(1).mean(2),
        {"k": _a},
        TOKENS,
        {"dependent inputs": 2, "unread outputs": 4, "attention query-key": 16},
        "",
    ),
    "a mask that is learned": (
        lambda m, x: F.scaled_dot_product_attention(m.a(x), m.k(x), m.v(x), m.w.weight).mean(1),
        {"k": _a, "v": _a, "w": lambda: Entries(4, 4)},
        TOKENS,
        {"dependent inputs": 2, "unread outputs": 12},
        "passes through scaled_dot_product_attention; w.weight: used by scaled_dot_product_attention",
    ),
    "a norm over two axes": (
        lambda m, x: m.n(m.a(x)).mean(1),
        {"n": lambda: nn.LayerNorm((4, 4))},
        TOKENS,
        {"layer_norm shift": 1, "norm affine": 8},
        "n: layer_norm over several axes",
    ),
    "parameters that are added": (
        lambda m, x: torch.tanh(m.a(x) + m.g.weight).mean(1),
        {"g": lambda: Entries(4, 4)},
        TOKENS,
        {"linear layer": 4},
        "",
    ),
    "a bias of its own": (
        lambda m, x: m.a(x) + m.g.weight,
        {"g": lambda: Entries(4)},
        numbers(60, 3),
        {"dependent inputs": 2, "unread outputs": 10, "linear layer": 10},
        "",
    ),
    "a pool with padding": (
        lambda m, x: F.avg_pool1d(m.a(x).transpose(1, 2), 2, padding=1).mean(2),
        {},
        TOKENS,
        {"dependent inputs": 2, "unread outputs": 8, "linear layer": 8},
        "",
    ),
    "a norm of each example and channel": (
        lambda m, x: torch.tanh(m.n(m.a(x).transpose(1, 2))).mean(2),
        {"n": lambda: nn.InstanceNorm1d(4, affine=True)},
        TOKENS,
        {"instance_norm shift": 4},
        "",
    ),
    "a layer twice": (
        lambda m, x: m.a(x) + m.a(x.flip(0)),
        {},
        numbers(60, 3),
        {"dependent inputs": 2, "residual stream": 16},
        "a.weight, a.bias: used more than once",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule_finds_what_there_is_and_invents_nothing(name: str) -> None:
    forward, layers, x, sources, words = RULES[name]
    made = {"a": _a(), **{layer: make() for layer, make in layers.items()}, "out": nn.Linear(4, 2)}
    model = Written(lambda m, x: m.out(forward(m, x)), **made)
    found = bnp.null_directions(bnp.EmpiricalRisk(model, F.mse_loss, (x, numbers(len(x), 2, seed=9))))
    assert dict(found.sources) == sources
    assert not found.rejected
    assert "; ".join(found.not_analysed) == words


@pytest.mark.parametrize(
    ("options", "zero", "sources", "words"),
    [
        ({}, False, {"unread outputs": 12, "linear layer": 10}, ""),
        # The row gets no gradient: where it is zero, as torch begins, scales and mixings leave it where it is.
        ({"padding_idx": 0}, True, {"parameters without effect": 4, "unread outputs": 10, "linear layer": 8}, ""),
        ({"padding_idx": 0}, False, {"parameters without effect": 4, "unread outputs": 10}, ""),
        ({"max_norm": 1.0}, False, {}, "e.weight: used by embedding"),
    ],
)
def test_rows_of_a_table_that_do_not_move(options: Any, zero: bool, sources: dict[str, int], words: str) -> None:
    x = torch.randint(0, 6, (60, 3), generator=torch.Generator().manual_seed(0))
    model = Written(
        lambda m, x: m.out(F.embedding(x, m.e.weight, **options).mean(1)), e=Entries(6, 4), out=nn.Linear(4, 2)
    )
    if zero:
        model.e.weight.data[0] = 0
    risk = bnp.EmpiricalRisk(model, F.mse_loss, (x, numbers(60, 2, seed=9)), derivatives="surrogate")
    found = bnp.null_directions(risk)
    assert dict(found.sources) == sources
    assert not found.rejected
    assert "; ".join(found.not_analysed) == words


def test_a_layer_that_runs_twice_has_mixings_and_no_orbits_of_them() -> None:
    model = Written(lambda m, x: m.out(m.a(x) + m.a(x.flip(0))), a=_a(), out=nn.Linear(4, 2))
    found = bnp.null_directions(risk := bnp.EmpiricalRisk(model, F.mse_loss, (numbers(60, 3), numbers(60, 2, seed=9))))
    assert found.sources["residual stream"] == 16
    assert found.orbits
    for orbit in found.orbits:
        assert float(risk(orbit.apply(risk.theta, 2.0))) == pytest.approx(float(risk.value))


def test_what_would_take_too_long_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Written(lambda m, x: m.out(m.a(x)), a=_a(), out=nn.Linear(4, 2))
    cut = Written(lambda m, x: m.out(F.relu(m.a(x))), a=_a(), out=nn.Linear(4, 2))
    norm = Written(
        lambda m, x: m.out(m.n(m.a(x)) + m.b(m.a(x))), a=_a(), n=nn.BatchNorm1d(4), b=_b(), out=nn.Linear(4, 2)
    )
    for place, most, model, words in (
        ("solutions._MOST_WORK", 1.0, linear, "4^2 mixings of parallel channels are too many"),
        ("from_data._MOST_WORK", 1.0, cut, "a: too large to search the active rows of each unit for dependences"),
        ("constraints._MOST", 1, norm, "scales and shifts depend on each other: too many to solve for"),
    ):
        with monkeypatch.context() as patch:
            assert words not in "; ".join(candidate_directions(risk_of(model, numbers(9, 3)))[1])
            patch.setattr(f"bnp_analysis.symmetry.{place}", most)
            assert words in "; ".join(candidate_directions(risk_of(model, numbers(9, 3)))[1])


def test_a_new_operation_is_one_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Written(lambda m, x: m.out(F.hardswish(m.a(x))), a=nn.Linear(3, 4), out=nn.Linear(4, 2))
    assert "passes through hardswish" in candidate_directions(risk_of(model, numbers(7, 3)))[1]
    monkeypatch.setitem(OPERATIONS, "hardswish", Operation(rigid))
    assert candidate_directions(risk_of(model, numbers(7, 3)))[1] == []


def _overwritten(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = 1.0
    return h


def test_operations_that_depend_on_the_batch_are_not_analysed() -> None:
    def forward(m: Written, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.out(F.relu(h) if bool(h.sum() > 0) else torch.tanh(h))

    model = Written(forward, a=nn.Linear(3, 4), out=nn.Linear(4, 2))
    model.a.bias.data.zero_()
    x = numbers(7, 3)
    assert candidate_directions(risk_of(model, [x, x + 0])) != ([], ["the operations depend on the batch"])
    assert candidate_directions(risk_of(model, [x, -x])) == ([], ["the operations depend on the batch"])


@pytest.mark.parametrize("in_place", [False, True])
def test_reach_is_what_a_change_of_an_entry_changes(in_place: bool) -> None:
    def forward(m: Written, x: Tensor, bump: Tensor | None = None) -> Tensor:
        a = m.a(x) if bump is None else m.a(x) + bump
        h = F.max_pool2d(F.relu(a, inplace=in_place), 2)
        return m.out(F.relu(m.b(h)).amax((2, 3)))

    model = Written(forward, a=nn.Conv2d(1, 3, 3), b=nn.Conv2d(3, 2, 2), out=nn.Linear(2, 2))
    reach = graph_of(model, IMAGES).nodes[0].reach
    assert reach is not None
    base, seen = forward(model, IMAGES), torch.zeros_like(reach)
    for position in torch.cartesian_prod(*(torch.arange(size) for size in reach.shape)).tolist():
        bump = torch.zeros(reach.shape, dtype=torch.float64)
        bump[tuple(position)] = 1e-7
        seen[tuple(position)] = bool((forward(model, IMAGES, bump) != base).any())
    assert torch.equal(reach, seen)
    assert 0 < int(reach.sum()) < reach.numel() // 2


def test_outputs_that_do_not_count_cut_their_rows() -> None:
    risk = risk_of(nn.Linear(3, 2).double(), numbers(4, 3))
    counted = torch.tensor([[True], [False], [True], [False]]).expand(4, 2)
    graph = record_graph(risk, next(iter(risk.batches)), counted)
    assert torch.equal(graph.nodes[0].reach, counted)
    assert bool(graph.moved["weight"].all())


def test_moved_parameters_are_those_with_an_effect() -> None:
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(4, 2), nn.PReLU(2)).double()
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([9.0, -9.0]))
    graph = graph_of(model, torch.tensor([[0, 1], [3, 1], [0, 0]]))
    assert graph.moved["0.weight"].any(dim=1).tolist() == [True, True, False, True, False]
    assert graph.moved["3.weight"].tolist() == [False, True]


def test_units_that_act_linearly_pass_shifts_with_their_slope() -> None:
    model = Written(lambda m, x: m.out(F.leaky_relu(m.a(x), 0.25)), a=nn.Linear(3, 3), out=nn.Linear(3, 2))
    model.a.bias.data = torch.tensor([50.0, 0.0, -50.0], dtype=torch.float64)
    found = constraints_of(model, numbers(9, 3))
    made, read = found.uses[0].out, found.uses[1].source[0]
    assert read[1] == made[1]
    assert found.gain(read).tolist() == [1.0, 1.0, 0.25]


def test_equations_leave_what_they_leave() -> None:
    rows = torch.tensor([[1.0, -1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 0, 1, -2, 0], [0, 2, 0, -2, 0, 0]])
    basis, left_out = solutions(csr_array(rows.double().numpy()))
    assert left_out == 0
    found = {tuple(u.tolist()): (v / abs(v).max()).tolist() for u, v in basis}
    assert found == {(0, 1, 3, 4): [1.0, 1.0, 1.0, 0.5], (5,): [1.0]}


def test_losses_that_ignore_a_shift() -> None:
    model, x = nn.Linear(3, 4).double(), numbers(6, 3)
    losses: list[tuple[Callable[[Tensor, Tensor], Tensor], bool]] = [
        (F.cross_entropy, True),
        (nn.CrossEntropyLoss(label_smoothing=0.1), True),
        (lambda z, y: F.nll_loss(1.5 * torch.log_softmax(z, 1), y), True),
        (lambda z, y: F.mse_loss(z, F.one_hot(y, 4).double()), False),
        (lambda z, y: F.cross_entropy(z, y) + 1e-6 * z.square().mean(), False),
        # A shift by one is lost in the rounding of these.
        (lambda z, y: F.mse_loss(z, 1e20 * F.one_hot(y, 4).double()), False),
        (lambda z, y: F.mse_loss(1e60 * z, F.one_hot(y, 4).double()), False),
        (lambda z, y: F.l1_loss(z, 1e150 * F.one_hot(y, 4).double()), False),
        (lambda z, y: F.cross_entropy(1e20 * z, y), True),
        (lambda z, y: -(z.exp() / z.exp().sum(1, keepdim=True)).log()[:, 0].mean(), True),  # overflows
    ]
    for loss, expected in losses:
        assert shift_invariant(bnp.EmpiricalRisk(model, loss, (x, torch.arange(6) % 4)), 1) is expected


@pytest.mark.parametrize("shape", [(8, 60), (40, 20), (5, 5)])
@pytest.mark.parametrize("decades", [0, 2, 6, 14])
def test_null_vectors_of_columns_of_all_sizes_are_null_to_rounding(shape: tuple[int, int], decades: int) -> None:
    """Each entry of the image has the rounding of what was added up for it, not that of the largest column."""
    g = torch.Generator().manual_seed(decades)
    count, width = shape
    rank = min(count, width) // 2
    factors = (torch.randn(size, generator=g, dtype=torch.float64) for size in ((count, rank), (rank, width)))
    h = torch.linalg.multi_dot([*factors, torch.diag(10.0 ** -torch.linspace(0, decades, width, dtype=torch.float64))])
    found = null_vectors(h)
    assert found.shape == (width, width - rank)
    torch.testing.assert_close(found.T @ found, torch.eye(width - rank, dtype=torch.float64), rtol=0, atol=1e-13)
    assert bool(((h @ found).abs() <= 1e-13 * (h.abs() @ found.abs())).all())
    assert float((h @ found).norm(dim=0).max()) <= 1e-14 * float(torch.linalg.matrix_norm(h, 2))


def test_null_vectors_find_dependences_at_every_scale_and_none_else() -> None:
    h = numbers(30, 5) * torch.tensor([1e9, 1e3, 1.0, 1e-6, 1e-12], dtype=torch.float64)
    assert null_vectors(h).shape == (5, 0)
    tied = torch.cat([h, 3 * h[:, :1] - 2e9 * h[:, 2:3], torch.zeros(30, 1)], dim=1)
    found = null_vectors(tied)
    assert found.shape == (7, 2)
    assert float((found.T @ found - torch.eye(2)).norm()) < 1e-14
    assert float((tied @ found).norm()) < 1e-14 * float(tied.norm())
    assert null_vectors(h[:3]).shape == (5, 2)
    assert null_vectors(h[:0]).shape == (5, 5)
    # In float32 a rounded dependence is none.
    pair = numbers(30, 2).float()
    assert null_vectors(torch.cat([pair, pair.sum(dim=1, keepdim=True)], dim=1)).shape == (3, 0)
