"""Catches: kept, rebuilt and mixed graphs that give different products; a graph that outlives its use; a memory
estimate that is wrong, or advice that does not help; float32 sums that lose digits with the number of batches;
a convolution whose second derivative is wrong for some stride, padding, dilation or group."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvature_reference import Problem, classes, numbers, relative, split, spread
from hypothesis import given
from hypothesis import strategies as st
from test_curvature_products import PROBLEMS, cnn, image_problem
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bnp_analysis as bnp
from bnp_analysis.curvature import engines
from bnp_analysis.curvature.convolutions import Convolution, TwiceDifferentiable
from bnp_analysis.curvature.engines import ENGINES, Engine
from bnp_analysis.curvature.hessian import Hessian
from bnp_analysis.curvature.products import gradient_graph
from bnp_analysis.errors import InvalidInputError, MemoryLimitError

NAMES = ("class weights, count=", "tied", "cnn, BatchNorm, train")


def mixed(build: Callable[..., Any], risk: bnp.EmpiricalRisk) -> Any:
    """An operator that keeps the first graph and has to rebuild two others or more."""
    return build(risk, max_memory=room(build(risk), 2))


def room(A: Any, graphs: float) -> int:
    """Bytes for so many graphs of the largest batch, and for a product."""
    return int((graphs + engines._WORKING + 0.01) * A.engine.graph_bytes)


@pytest.mark.parametrize("engine", [*ENGINES, "mixed"])
@pytest.mark.parametrize("name", NAMES)
def test_every_engine_gives_the_products(name: str, engine: str) -> None:
    problem = PROBLEMS[name]()
    risk = problem.risk()
    V = numbers(risk.space.dim, 3, seed=3)
    made: list[tuple[Any, Tensor]] = []
    GV = problem.gauss_newton() @ V
    for build, product in ((bnp.hessian, problem.hessian_product(V)), (bnp.gauss_newton, GV)):
        A = mixed(build, risk) if engine == "mixed" else build(risk, engine=engine)
        made.append((A, product))
    made.append((bnp.linalg.GramOperator(made[1][0].factor), GV))
    for A, product in made:
        for _ in range(2):
            assert relative(A @ V, product) <= 1e-10
            assert relative(A @ V[:, 0], product[:, 0]) <= 1e-10
        gram = V.T @ (A @ V)
        assert relative(gram, gram.T) <= 1e-12
    plan = made[0][0].engine
    if engine == "mixed" and risk.batches.number > 2:  # keeping one of two takes no less than keeping both
        assert (plan.engine, plan.kept) == ("mixed", 1)
    elif engine != "mixed":
        assert plan.kept == (0 if engine == "recompute" else risk.batches.number)
        assert str(plan).startswith("recompute" if engine == "recompute" else "retained")


@pytest.mark.parametrize("engine", ENGINES)
def test_blocks_and_fisher_matrices_take_an_engine(engine: str) -> None:
    problem = PROBLEMS["cross_entropy"]()
    risk = problem.risk()
    where = problem.positions(["fc1.weight", "fc1.bias"])
    row = problem.positions(["fc1.weight", "fc1.bias"], 2)
    for build, dense in ((bnp.hessian, problem.hessian()), (bnp.gauss_newton, problem.gauss_newton())):
        layer, unit = (build(risk, block=b, engine=engine, max_memory=10**9) for b in ("fc1", ("fc1", 2)))
        assert relative(layer.to_dense(), dense[where][:, where]) <= 1e-10
        assert relative(unit.to_dense(), dense[row][:, row]) <= 1e-10
    A = bnp.fisher(risk, "empirical", engine=engine)
    assert A.engine.kept == (0 if engine == "recompute" else 3)
    assert A.factor.engine == A.engine
    assert relative(A.to_dense(), bnp.fisher(risk, "empirical").factor.to_dense().T @ A.factor.to_dense()) <= 1e-10


def test_what_is_no_engine_is_refused() -> None:
    risk = PROBLEMS["mse"]().risk()
    with pytest.raises(InvalidInputError, match="auto, retained, recompute"):
        bnp.hessian(risk, engine="compiled")
    with pytest.raises(InvalidInputError, match="max_memory"):
        bnp.gauss_newton(risk, max_memory=0)
    with pytest.raises(InvalidInputError, match="max_memory is a positive number of bytes, got 0"):
        Engine(risk, gradient_graph, max_memory=0)


@pytest.mark.parametrize("build", [bnp.hessian, bnp.gauss_newton])
def test_half_precision_is_not_taken_unasked(build: Callable[..., Any]) -> None:
    """Inside autocast torch takes half precision for float32; float64 it leaves alone."""
    x, y = numbers(5, 3), classes(5, 2)
    model = bnp.models.mlp([3, 4, 2], activation="tanh", dtype=torch.float64)
    exact = bnp.EmpiricalRisk(model, F.cross_entropy, (x, y))
    rounded = exact.to(torch.float32)
    A, B, v = build(exact), build(rounded), numbers(exact.space.dim)
    expected = A @ v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(A @ v, expected)
        with pytest.raises(InvalidInputError, match="products would be in torch"):
            B @ v.float()
        with pytest.raises(InvalidInputError, match="outputs of the model would be in torch"):
            _ = rounded.gradient
    assert relative(B @ v.float(), expected) <= 1e-5


# memory


def images(width: int = 8, sizes: tuple[int, ...] = (40, 40, 24)) -> bnp.EmpiricalRisk:
    n = sum(sizes)
    model = spread(bnp.models.cnn((1, 8, 8), 3, channels=(width, width, width), hidden=width))
    return bnp.EmpiricalRisk(model, F.cross_entropy, split(numbers(n, 1, 8, 8), classes(n, 3), sizes))


@pytest.mark.parametrize("build", [bnp.hessian, bnp.gauss_newton])
def test_a_graph_is_as_large_as_was_extrapolated(build: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    small = build(images()).engine.graph_bytes
    monkeypatch.setattr(engines, "_FEW", (100, 200))  # more than there are: the whole batch is counted
    assert small == pytest.approx(build(images()).engine.graph_bytes, rel=0.02)


def test_what_is_kept_follows_from_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    risk = images()
    whole = bnp.hessian(risk)
    each = whole.engine.graph_bytes
    plans = [bnp.hessian(risk, max_memory=room(whole, graphs)).engine for graphs in (1, 2, 2.7)]
    assert [(p.engine, p.kept) for p in plans] == [("recompute", 0), ("mixed", 1), ("retained", 3)]
    assert all(p.bytes <= p.limit for p in plans)
    monkeypatch.setattr(engines, "available_memory", lambda device: 4 * each)  # 40 % of it is not enough for one
    assert bnp.hessian(risk).engine.kept == 0
    assert bnp.hessian(risk, engine="retained").engine.kept == 3


def test_the_data_count_where_a_graph_alone_holds_them() -> None:
    """Thousands of features, few units: a graph of data in memory is small, one of a loader's holds its batch."""
    x, y = numbers(40, 2000), classes(40, 3)
    model = spread(bnp.models.mlp([2000, 3]), scale=0.01)
    kept = bnp.hessian(bnp.EmpiricalRisk(model, F.cross_entropy, (x, y))).engine.graph_bytes
    loader = DataLoader(TensorDataset(x, y), batch_size=40)
    read = bnp.hessian(bnp.EmpiricalRisk(model, F.cross_entropy, loader)).engine.graph_bytes
    size = x.numel() * x.element_size()
    assert kept < size / 2
    assert read - kept == pytest.approx(size, rel=0.02)


def test_a_wider_network_keeps_fewer_graphs() -> None:
    kept = {width: bnp.hessian(images(width), max_memory=10**7).engine.kept for width in (4, 64)}
    assert kept[4] == 3 > kept[64]


def test_too_little_memory_is_refused_before_the_product_and_the_advice_helps() -> None:
    each = bnp.hessian(images()).engine.graph_bytes
    limit = each // 2
    with pytest.raises(
        MemoryLimitError, match=r"one batch of 40 examples needs about .* MiB.*at most \d+ ex"
    ) as caught:
        bnp.hessian(images(), max_memory=limit) @ numbers(images().space.dim)
    advised = int(str(caught.value).split("at most ")[1].split()[0])
    assert 0 < advised < 40
    A = bnp.hessian(images(sizes=(advised,) * 3), max_memory=limit)
    assert (A @ numbers(A.dim)).isfinite().all()
    with pytest.raises(MemoryLimitError, match="Not even one example"):
        _ = bnp.hessian(images(), max_memory=1000).engine
    with pytest.raises(MemoryLimitError, match="keeps 1 of them"):
        _ = bnp.hessian(images(), engine="retained", max_memory=room(bnp.hessian(images()), 2)).engine


def test_a_batch_that_cannot_be_cut_is_counted_until_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm couples the batch: it is recorded whole, and recording stops where memory would."""
    risk = image_problem(cnn("batch"), (40,), True).risk()
    A = bnp.hessian(risk)
    assert relative(A @ torch.ones(A.dim, dtype=A.dtype), A.to_dense().sum(dim=1)) <= 1e-10
    with pytest.raises(MemoryLimitError, match="needs more than"):
        _ = bnp.hessian(risk, max_memory=A.engine.graph_bytes // 3).engine


def test_a_recomputed_graph_is_gone_before_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    most = []

    def build(risk: Any, batch: Any) -> Any:
        most.append(sum(ref() is not None for ref in alive))
        graph = gradient_graph(risk, batch)
        alive.append(weakref.ref(graph))
        return graph

    monkeypatch.setattr(sys.modules[Hessian.__module__], "gradient_graph", build)
    A = bnp.hessian(images(), engine="recompute")
    most.clear()  # of the trial
    A @ numbers(A.dim, 2)
    assert most == [0] * 5  # two small ones to measure, three batches


@pytest.mark.parametrize("few", [(4, 8), (100, 200)])
def test_what_was_recorded_to_measure_is_gone(few: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that gives a saved output back as it came ties the graph to itself: it stayed for ever."""
    monkeypatch.setattr(engines, "_FEW", few)
    leaves: list[weakref.ref[Tensor]] = []
    real = bnp.EmpiricalRisk.leaves

    def noted(risk: bnp.EmpiricalRisk) -> dict[str, Tensor]:
        found = real(risk)
        leaves.extend(weakref.ref(t) for t in found.values())
        return found

    risk = images()
    monkeypatch.setattr(bnp.EmpiricalRisk, "leaves", noted)
    _ = bnp.hessian(risk).engine
    gc.collect()
    assert leaves
    assert all(ref() is None for ref in leaves)


# loaders and sums


def test_graphs_of_an_unordered_loader_are_not_kept() -> None:
    x, y = numbers(9, 4), classes(9, 3)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    problem = PROBLEMS["cross_entropy"]()
    risk = bnp.EmpiricalRisk(problem.model, problem.loss, loader)
    for engine in ("auto", "recompute"):
        H = bnp.hessian(risk, engine=engine)
        for _ in range(2):
            assert relative(H.to_dense(), Problem(problem.model, problem.loss, [(x, y)]).hessian()) <= 1e-10
        assert H.engine.kept == 0
    with pytest.raises(InvalidInputError, match="retain"):
        bnp.hessian(risk, engine="retained")


def test_a_loader_in_order_keeps_its_graphs() -> None:
    x, y = numbers(9, 4), classes(9, 3)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    problem = PROBLEMS["cross_entropy"]()
    whole = Problem(problem.model, problem.loss, [(x, y)]).hessian()
    risk = bnp.EmpiricalRisk(problem.model, problem.loss, loader)
    for H in (bnp.hessian(risk), mixed(bnp.hessian, risk)):
        assert H.engine.kept > 0
        assert relative(H.to_dense(), whole) <= 1e-10
        assert relative(H.to_dense(), whole) <= 1e-10


def test_many_batches_add_no_rounding() -> None:
    """300 sums in float32 lose another digit; in float64 only what each batch rounds is left."""
    x, y = 1 + numbers(300, 2) / 9, numbers(300, 1, seed=2)
    model = nn.Linear(2, 1, bias=False)
    risk = bnp.EmpiricalRisk(model, F.mse_loss, split(x.float(), y.float(), (1,) * 300))
    rows = x.float().double()
    for engine in ("retained", "recompute"):
        found = bnp.hessian(risk, engine=engine).to_dense().double()
        assert relative(found, 2 * rows.T @ rows / 300) <= 1e-7


# convolutions


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    places, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2]))
    size = st.integers(1, 2)
    each = [draw(size) for _ in range(places)]
    kernel = [draw(size) for _ in range(places)]
    return {
        "x": (2, 2 * groups, *(draw(st.integers(3, 4)) for _ in range(places))),
        "w": (groups * draw(size), 2, *kernel),
        "bias": draw(st.booleans()),
        "options": {
            "stride": draw(st.sampled_from([1, 2, each])),
            "padding": draw(st.sampled_from([0, 1, each])),
            "dilation": draw(st.sampled_from([1, each])),
            "groups": groups,
        },
    }


@given(convolutions())
def test_convolutions_have_the_derivatives_of_torch(case: dict[str, Any]) -> None:
    call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(case["x"]) - 2]
    x, w = numbers(*case["x"]).requires_grad_(), numbers(*case["w"], seed=1).requires_grad_()
    b = numbers(len(w), seed=2).requires_grad_() if case["bias"] else None
    given_ = [t for t in (x, w, b) if t is not None]

    def ours(*tensors: Tensor) -> Tensor:
        with TwiceDifferentiable():
            return call(*tensors, **case["options"])

    expected = call(x, w, b, **case["options"])
    assert torch.equal(ours(*given_), expected)
    assert ours(*given_).grad_fn._forward_cls is Convolution
    u = numbers(*expected.shape, seed=3)
    v = [numbers(*t.shape, seed=4 + i) for i, t in enumerate(given_)]

    def second(function: Callable[..., Tensor]) -> list[Tensor]:
        """Through a square, so that the first derivative depends on everything."""
        grads = torch.autograd.grad(function(*given_).square(), given_, u, create_graph=True)
        return list(torch.autograd.grad(list(grads), given_, v))

    for a, e in zip(second(ours), second(lambda *t: call(*t, **case["options"])), strict=True):
        assert relative(a, e) <= 1e-12


@pytest.mark.parametrize("frozen", [(), ("conv.weight",), ("conv.bias",), ("first.weight", "first.bias")])
def test_frozen_parts_of_a_convolution(frozen: tuple[str, ...]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.conv = nn.Conv2d(1, 2, 2), nn.Conv2d(2, 2, 2, groups=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(torch.tanh(self.first(x))).flatten(1)

    model = spread(Net())
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    problem = Problem(model, F.mse_loss, split(numbers(5, 1, 4, 4), numbers(5, 8, seed=1), (3, 2)))
    assert relative(bnp.hessian(problem.risk()).to_dense(), problem.hessian()) <= 1e-10
    assert relative(bnp.gauss_newton(problem.risk()).to_dense(), problem.gauss_newton()) <= 1e-10


class Unusual(nn.Module):
    """What is left to torch: padding by name, images without a batch, `vmap` over a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.single, self.mapped = (nn.Conv2d(1, 1, 3, padding="same") for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.same(x))
        x = torch.tanh(torch.stack([self.single(image) for image in x]))
        weight, bias = self.mapped.weight, self.mapped.bias
        return torch.vmap(lambda image: F.conv2d(image.unsqueeze(0), weight, bias).squeeze(0))(x).flatten(1)


def test_unusual_convolutions() -> None:
    problem = Problem(spread(Unusual()), F.mse_loss, split(numbers(5, 1, 4, 4), numbers(5, 4, seed=1), (3, 2)))
    assert relative(bnp.hessian(problem.risk()).to_dense(), problem.hessian()) <= 1e-10
    assert relative(bnp.gauss_newton(problem.risk()).to_dense(), problem.gauss_newton()) <= 1e-10
