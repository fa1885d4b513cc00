"""Catches: data that are read in a form nobody meant, that change between passes, that are empty or not finite, and a
shuffled loader that is refused or gives other numbers."""

from __future__ import annotations

import random
from collections import UserDict, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from network_models import classes, classify, drawn, mlp, numbers, split, table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import bnp_analysis as bnp
from bnp_analysis.errors import InconsistentDataError, InvalidInputError, NonFiniteError

Pair = namedtuple("Pair", ["a", "b"])


def loader(count: int = 10, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*table(count)), batch_size=4, **options)


def hessian_of(data: Any) -> Tensor:
    return bnp.hessian(classify(mlp(), data)).to_dense()


# forms of data


class Twice:
    """An iterable that is no list and no loader."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@pytest.mark.parametrize(
    "make",
    [
        lambda: table(10),
        lambda: [table(10)],
        lambda: split(*table(10), (4, 4, 2)),
        lambda: tuple(split(*table(10), (4, 4, 2))),
        lambda: [list(pair) for pair in split(*table(10), (4, 6))],
        lambda: Twice(split(*table(10), (4, 6))),
        loader,
        lambda: loader(shuffle=True),
        lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(5)),
        lambda: list(loader(shuffle=True)),
        lambda: DataLoader(TensorDataset(*table(10)), batch_size=3, shuffle=True),
    ],
    ids=[
        "pair",
        "list of one",
        "list",
        "tuple",
        "lists",
        "iterable",
        "loader",
        "shuffled",
        "seeded",
        "list(loader)",
        "3",
    ],
)
def test_all_forms_of_the_same_data_give_the_same_numbers(make: Callable[[], Any]) -> None:
    """In any order, in any batches, twice in a row."""
    risk = classify(mlp(), make())
    reference = classify(mlp(), table(10))
    for _ in range(2):
        torch.testing.assert_close(risk.at(risk.theta).gradient, reference.gradient, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(risk(risk.theta), reference.value, rtol=1e-13, atol=0)
    torch.testing.assert_close(bnp.hessian(risk).to_dense(), bnp.hessian(reference).to_dense(), rtol=1e-10, atol=1e-13)
    assert risk.batches.total == 10


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.fc(a) * self.fc(b)


@pytest.mark.parametrize(
    "pack",
    [
        lambda a, b: (a, b),
        lambda a, b: [a, b],
        lambda a, b: {"b": b, "a": a},
        Pair,
        lambda a, b: UserDict(b=b, a=a),
    ],
    ids=["tuple", "list", "dict", "named tuple", "mapping"],
)
def test_inputs_of_several_tensors(pack: Callable[[Tensor, Tensor], Any]) -> None:
    """Tokenizers give mappings that are no dict; collation keeps named tuples."""
    a, b, y = numbers(7, 4), numbers(7, 4, seed=2), classes(7, 3)
    batches = [(pack(a[:4], b[:4]), y[:4]), (pack(a[4:], b[4:]), y[4:])]
    model = drawn(Two)
    expected = F.cross_entropy(model(a, b), y)
    assert classify(model, batches).value.item() == pytest.approx(expected.item(), rel=1e-13)
    rows = bnp.gauss_newton(classify(model, batches)).factor.to_dense()
    dense = bnp.gauss_newton(classify(model, [(pack(a, b), y)])).to_dense()
    torch.testing.assert_close(rows.T @ rows, dense, rtol=1e-10, atol=1e-13)


def test_targets_of_several_tensors_and_none() -> None:
    model = drawn(lambda: nn.Linear(4, 3))
    x, y = table(8)
    loss = lambda o, t: F.cross_entropy(o, t["class"]) + 0.1 * (o - t["mean"]).square().mean()  # noqa: E731
    target = {"class": y, "mean": numbers(8, 3)}
    halves = [(x[:5], {k: v[:5] for k, v in target.items()}), (x[5:], {k: v[5:] for k, v in target.items()})]
    whole = bnp.EmpiricalRisk(model, loss, (x, target))
    assert bnp.EmpiricalRisk(model, loss, halves).value.item() == pytest.approx(whole.value.item(), rel=1e-13)
    no_target = bnp.EmpiricalRisk(model, lambda o, t: o.square().mean(), [(x[:5], None), (x[5:], None)])
    assert no_target.value.item() == pytest.approx(model(x).square().mean().item(), rel=1e-13)


def test_integer_inputs_stay_integers() -> None:
    model = drawn(lambda: nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(8, 3)))
    risk = classify(model, (classes(5, 6, 2), classes(5, 3)), dtype=torch.float32)
    assert risk.outputs.dtype == torch.float32
    assert bnp.hessian(risk).to_dense().shape == (risk.space.dim,) * 2


def test_data_take_the_dtype_of_the_model() -> None:
    x, y = table(6)
    assert classify(mlp(), (x.float(), y)).value.dtype == torch.float64
    assert classify(mlp().float(), (x, y)).value.dtype == torch.float32


def test_batches_that_weigh_nothing_are_left_out() -> None:
    """All their targets are ignored: their own mean is 0/0."""
    x, y = table(10)
    y[4:8] = -100
    count = lambda pair: int((pair[1] >= 0).sum())  # noqa: E731
    keep = torch.tensor([0, 1, 2, 3, 8, 9])
    expected = classify(mlp(), (x[keep], y[keep]))
    for data in (split(x, y, (4, 4, 2)), Twice(split(x, y, (4, 4, 2)))):
        risk = classify(mlp(), data, count=count)
        assert (risk.batches.number, risk.batches.total) == (2, 6)
        assert risk.value.item() == pytest.approx(expected.value.item(), rel=1e-13)
        torch.testing.assert_close(
            bnp.hessian(risk).to_dense(), bnp.hessian(expected).to_dense(), rtol=1e-10, atol=1e-13
        )
    with pytest.raises(InvalidInputError, match=r"weigh 0.0 in total"):
        classify(mlp(), split(x, y, (4, 4, 2))[1:2], count=count)


# contents that change between passes


class Augmented(Dataset[Any]):
    def __init__(self, draw: Callable[[], float]) -> None:
        self.x, self.y = table(10)
        self.draw = draw

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index] + 1e-9 * self.draw(), self.y[index]


class Stream(IterableDataset[Any]):
    """Every pass begins where the last one ended."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes += 1
        x, y = numbers(8, 4, seed=self.passes), classes(8, 3)
        yield from zip(x, y, strict=True)


def swapped() -> Twice:
    """The same inputs and the same targets, otherwise paired in every pass."""
    x, y = table(8)
    turn = iter(range(100))

    class Swapping(Twice):
        def __iter__(self) -> Iterator[Any]:
            return iter([(x, y.roll(next(turn)))])

    return Swapping([])


PRIVATE = np.random.default_rng(0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Augmented(lambda: float(torch.rand(1))), batch_size=4),
        lambda: DataLoader(Augmented(random.random), batch_size=4),
        lambda: DataLoader(Augmented(lambda: float(np.random.rand())), batch_size=4),  # noqa: NPY002
        lambda: DataLoader(Augmented(lambda: float(PRIVATE.random())), batch_size=4),
        lambda: DataLoader(TensorDataset(*table(1000)), batch_size=600, shuffle=True, drop_last=True),
        lambda: DataLoader(Stream(), batch_size=4),
        swapped,
    ],
    ids=["torch", "python", "numpy", "a generator of its own", "drop_last", "stream", "other pairs"],
)
def test_data_that_change_between_passes_are_refused(make: Callable[[], Any]) -> None:
    """Also where the changes come from random states that are brought back between passes."""
    with pytest.raises(InconsistentDataError) as caught:
        classify(mlp(), make())
    text = str(caught.value)
    assert "different examples" in text
    assert "different matrices" in text  # what would have been computed
    assert "drop_last" in text
    assert "list(loader)" in text  # the ways out


def test_data_that_change_later_are_noticed_then() -> None:
    x, y = table(8)
    risk = classify(mlp(), DataLoader(TensorDataset(x, y), batch_size=4))
    operator = bnp.hessian(risk)
    kept = operator @ risk.theta
    x[3, 0] += 1e-12
    with pytest.raises(InconsistentDataError):
        _ = risk(risk.theta)
    assert torch.equal(operator @ risk.theta, kept)  # its graphs are of the old data


def test_a_loader_is_the_same_data_in_another_dtype() -> None:
    """Other digits have another hash; from then on their changes are noticed as well."""
    x, y = table(8)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    single = classify(mlp(), loader).to(torch.float32)
    expected = classify(mlp(), (x, y)).to(torch.float32)
    for _ in range(2):
        torch.testing.assert_close(single(single.theta), expected.value)
    x[3, 0] += 1
    with pytest.raises(InconsistentDataError, match="two passes over the loader saw different examples"):
        single(single.theta)


def test_a_repeated_example_is_not_a_lost_one() -> None:
    """Sums of examples would not tell apart 1 + 1 and 2 + 0; hashes do."""
    x, y = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    x[0], x[1] = 1, 1
    other = x.clone()
    other[0], other[1] = 2, 0
    turn = iter([x, other, x, other, x])

    class Turning(Twice):
        def __iter__(self) -> Iterator[Any]:
            return iter([(next(turn), y)])

    with pytest.raises(InconsistentDataError):
        classify(mlp(), Turning([]))


def test_dropping_the_last_in_order_loses_the_same_examples() -> None:
    risk = classify(mlp(), loader(drop_last=True))
    x, y = table(10)
    assert risk.batches.total == 8
    assert risk.value.item() == pytest.approx(classify(mlp(), (x[:8], y[:8])).value.item(), rel=1e-13)


def test_workers_change_nothing() -> None:
    risk = classify(mlp(), loader(num_workers=1, shuffle=True))
    assert risk.value.item() == pytest.approx(classify(mlp(), table(10)).value.item(), rel=1e-13)


# what is refused


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: TensorDataset(*table()), r"TensorDataset yields single examples.*DataLoader\(dataset"),
        (lambda: iter([table()]), r"one-shot iterator.*second pass"),
        (lambda: (pair for pair in [table()]), r"one-shot iterator.*Give a list, or a DataLoader"),
        (lambda: [], r"no batch: an empty loader has no mean"),
        (lambda: loader(3, drop_last=True), r"drop_last=True a loader shorter than one batch is empty"),
        (lambda: Twice([]), r"no batch"),
        (lambda: table()[0], r"data is \(x, y\) or an iterable of such batches, not a Tensor"),
        (lambda: {"x": table()}, r"not a dict"),
        (lambda: "data", r"not a str"),
        (lambda: 3, r"not an int"),
        (lambda: [table()[0]], r"batch 0 is a Tensor, not a pair"),
        (lambda: [table(), (*table(), table()[1])], r"batch 1 is a tuple of 3, not a pair"),
        (lambda: [(3.0, 4.0)], r"batch 0 has no input tensor.*but float"),
        (
            lambda: (np.ones((3, 4)), np.ones(3)),
            r"no input tensor.*but ndarray; arrays become tensors by torch.as_tensor",
        ),
        (lambda: [(torch.tensor(3.0), torch.tensor(4.0))], r"batch 0 has no input tensor with a batch dimension"),
        (lambda: [table(), (numbers(0, 4), classes(0, 3))], r"batch 1 has no example"),
    ],
)
def test_data_of_no_use(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        classify(mlp(), make())


@pytest.mark.parametrize(("weight", "match"), [(float("nan"), "nan"), (-1.0, r"-1\.0"), (float("inf"), "inf")])
def test_weights_of_no_use(weight: float, match: str) -> None:
    with pytest.raises(InvalidInputError, match=f"count= gave {match} for batch 0"):
        classify(mlp(), table(), count=lambda pair: weight)


def joined(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "make", [list, Twice, lambda b: DataLoader(TensorDataset(*map(torch.cat, zip(*b, strict=True))), 4)]
)
def test_data_that_are_not_finite_name_the_batch(make: Callable[[Any], Any], value: float) -> None:
    x, y = numbers(12, 4), numbers(12, 3)
    x[9, 2] = value
    model = drawn(lambda: nn.Linear(4, 3))
    with pytest.raises(NonFiniteError, match=r"batch 2 has NaN or infinite inputs: 1 of 16 entries"):
        bnp.EmpiricalRisk(model, F.mse_loss, make(split(x, y, (4, 4, 4))))
    x[9, 2], y[5, 0], y[6, 1] = 0.0, value, value
    with pytest.raises(NonFiniteError, match=r"batch 1 has NaN or infinite targets: 2 of 12 entries"):
        bnp.EmpiricalRisk(model, F.mse_loss, make(split(x, y, (4, 4, 4))))


def test_overflow_of_the_cast_is_found() -> None:
    """Finite in float64, infinite in the model's float32."""
    x, y = table(6)
    x[0, 0] = 1e300
    with pytest.raises(NonFiniteError, match="batch 0"):
        classify(mlp(), (x, y), dtype=torch.float32)


def test_sparse_inputs_are_refused_and_a_sparse_buffer_is_not() -> None:
    x, y = table(9)
    with pytest.raises(InvalidInputError, match=r"batch 0 has a sparse .* t.to_dense\(\)"):
        classify(mlp(), (x.to_sparse(), y))

    class Averaged(nn.Module):
        def __init__(self, layout: torch.layout) -> None:
            super().__init__()
            self.inner = mlp()
            mixing = (torch.eye(9) + torch.eye(9).roll(1, 0)) / 2
            self.register_buffer("mixing", mixing if layout == torch.strided else mixing.to_sparse())

        def forward(self, x: Tensor) -> Tensor:
            return torch.mm(self.mixing, self.inner(x))

    dense, sparse = (classify(Averaged(layout).double(), (x, y)) for layout in (torch.strided, torch.sparse_coo))
    torch.testing.assert_close(bnp.hessian(sparse).to_dense(), bnp.hessian(dense).to_dense())
