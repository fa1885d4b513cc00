"""Catches: a factor whose square is not the matrix, whose rows are in another order than its products say, that exists
where no factor does (random order, coupled or non-convex loss), or whose small singular values are noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from curvature_reference import Problem, classes, numbers, relative, split, spread
from test_curvature_products import PROBLEMS, cnn, image_problem, mlp, table_problem, tanh_mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, Sampler, TensorDataset

import bnp_analysis as bnp
from bnp_analysis.curvature import factors, output_curvature, products
from bnp_analysis.curvature.output_curvature import output_root
from bnp_analysis.curvature.products import output_graph


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_factor_squared_is_the_matrix(name: str) -> None:
    problem = PROBLEMS[name]()
    A = bnp.gauss_newton(problem.risk())
    factor = A.factor
    assert factor is not None
    reference = problem.gauss_newton()
    rows = factor.to_dense()
    assert rows.shape == factor.shape
    assert relative(rows.T @ rows, reference) <= 1e-10
    V, U = numbers(factor.shape[1], 2, seed=3), numbers(factor.shape[0], 2, seed=4)
    assert relative(factor @ V, rows @ V) <= 1e-10
    assert relative(factor.T @ U, rows.T @ U) <= 1e-10
    assert relative(factor @ V[:, 0], rows @ V[:, 0]) <= 1e-10
    assert relative(((factor @ V) * U).sum(dim=0), (V * (factor.T @ U)).sum(dim=0)) <= 1e-10
    assert (factor @ V[:, :0]).shape == (factor.shape[0], 0)
    assert (factor.T @ U[:, :0]).shape == (factor.shape[1], 0)
    sigma = torch.linalg.svdvals(rows)
    assert int((sigma > 1e-12 * sigma[0]).sum()) <= factor.rank_bound <= min(factor.shape)


class Tokens(nn.Module):
    """What the older vmap of torch runs one cotangent after the other: an embedding, a norm, GELU, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.norm, self.leave = nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.rows(x))
        out: Tensor = self.leave(F.gelu(torch.softmax(h @ h.transpose(1, 2), dim=-1) @ h))
        return out


@pytest.mark.parametrize("layout", ["classes last", "classes first"])
def test_a_factor_is_formed_from_its_cheaper_side_with_the_same_numbers(layout: str) -> None:
    if layout == "classes last":
        x, y = torch.arange(12).view(4, 3) % 7, torch.arange(12).view(4, 3) % 5
        y[0, 1] = -100
        weight = torch.linspace(1, 2, 5, dtype=torch.float64)

        def loss(z: Tensor, t: Tensor) -> Tensor:
            return F.cross_entropy(z.flatten(0, 1), t.flatten(), weight=weight, label_smoothing=0.1)

        risk = bnp.EmpiricalRisk(spread(Tokens()), loss, (x, y))
        rows = 4 * 3 * 5
    else:
        x, y = numbers(3, 1, 6, 6), torch.arange(108).view(3, 6, 6) % 4
        risk = bnp.EmpiricalRisk(spread(nn.Conv2d(1, 4, 1)), F.cross_entropy, (x, y))
        rows = 3 * 36 * 4
    found = []
    for by_columns in (False, True):
        factor = bnp.gauss_newton(risk).factor
        factor._by_columns = by_columns
        found.append(factor.to_dense())
    assert found[0].shape == (rows, risk.space.dim)
    assert relative(found[0], found[1]) <= 1e-14
    assert torch.equal(found[0] == 0, found[1] == 0)
    assert bnp.gauss_newton(risk).factor._by_columns == (layout == "classes first")
    assert bnp.gauss_newton(risk).factor.dense_cost <= risk.space.dim


def test_rows_are_the_jacobians_of_the_examples_in_their_order() -> None:
    """A permuted or transposed factor has the same square in no other test than this one and its products."""
    problem = Problem(tanh_mlp(4, 5, 3), F.mse_loss, split(numbers(11, 4), numbers(11, 3, seed=2), (5, 4, 2)))
    rows = bnp.gauss_newton(problem.risk()).factor.to_dense()
    jacobians = torch.cat([problem.jacobian(b) for b in range(3)])
    assert relative(rows, (2 / (11 * 3)) ** 0.5 * jacobians) <= 1e-13


@pytest.mark.parametrize("count", [1, 5])
def test_one_number_for_each_example_has_a_factor(count: int) -> None:
    """Outputs of shape `(N,)`, also where that is one number in all."""
    model = nn.Sequential(tanh_mlp(4, 3, 1), nn.Flatten(0))
    problem = Problem(model, F.mse_loss, [(numbers(count, 4), numbers(count, seed=2))])
    rows = bnp.gauss_newton(problem.risk()).factor.to_dense()
    assert rows.shape == (count, 19)
    assert relative(rows.T @ rows, problem.gauss_newton()) <= 1e-12


def test_rows_of_softmax_are_the_closed_form() -> None:
    problem = Problem(tanh_mlp(4, 5, 3), F.cross_entropy, split(numbers(11, 4), classes(11, 3), (5, 4, 2)))
    risk = problem.risk()
    p = torch.softmax(risk.outputs, dim=1)
    roots = torch.diag_embed(p.sqrt()) - p.sqrt().unsqueeze(2) * p.unsqueeze(1)
    J = torch.cat([problem.jacobian(b).view(-1, 3, risk.space.dim) for b in range(3)])
    assert relative(bnp.gauss_newton(risk).factor.to_dense(), (roots @ J).reshape(33, -1) / 11**0.5) <= 1e-13


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("cross_entropy", 11 * 2),  # one direction of every softmax is flat
        ("mse", 11 * 3),
        ("ignore_index, count=", 5 * 2),
        ("tokens, classes last", 30 * 2),
        ("tokens, flattened", 30 * 2),
    ],
)
def test_rank_bounds_follow_from_structure(name: str, bound: int) -> None:
    factor = bnp.gauss_newton(PROBLEMS[name]().risk()).factor
    assert factor.rank_bound == min(bound, *factor.shape)


@pytest.mark.parametrize("together", [1, 2**22])
@pytest.mark.parametrize("name", ["mlp, BatchNorm, train", "cnn, BatchNorm, train", "tokens, flattened", "mse"])
def test_rows_pulled_back_in_any_portions(name: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factors, "TOGETHER", together)
    monkeypatch.setattr(factors, "_SLICE", 2)
    problem = PROBLEMS[name]()
    rows = bnp.gauss_newton(problem.risk()).factor.to_dense()
    assert relative(rows.T @ rows, problem.gauss_newton()) <= 1e-10


def test_batch_coupled_rows_carry_the_coupling() -> None:
    """Cut into single examples, a BatchNorm in training mode would see other statistics."""
    problem = table_problem(mlp("batch"), (40,), True)
    risk = problem.risk()
    assert risk.coupled
    rows = bnp.gauss_newton(risk).factor.to_dense()
    assert relative(rows.T @ rows, problem.gauss_newton()) <= 1e-10
    assert not table_problem(mlp("batch"), (40,), False).risk().coupled


@pytest.mark.parametrize("rows", [5, 3000])
def test_coupling_is_noticed_however_large_the_batch(rows: int) -> None:
    """In float32 leaving out one of thousands of examples changes less than rounding: no coupling was seen."""
    problem = table_problem(mlp("batch"), (rows,), True)
    assert problem.risk(dtype=torch.float32).coupled


# where there is no factor


class AnyOrder(Sampler[list[int]]):
    """Batches of a random order, from a batch sampler of one's own."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.n).tolist()
        yield from (order[i : i + 4] for i in range(0, self.n, 4))

    def __len__(self) -> int:
        return (self.n + 3) // 4


def loaders(x: Tensor, y: Tensor) -> dict[str, tuple[DataLoader[Any], bool]]:
    data = TensorDataset(x, y)
    return {
        "in order": (DataLoader(data, batch_size=4), True),
        "shuffled": (DataLoader(data, batch_size=4, shuffle=True), False),
        "sampler": (DataLoader(data, batch_size=4, sampler=RandomSampler(data)), False),
        "batch sampler": (DataLoader(data, batch_sampler=AnyOrder(len(data))), False),
        "batch sampler in order": (
            DataLoader(
                data, batch_sampler=torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(data), 4, False)
            ),
            True,
        ),
    }


@pytest.mark.parametrize("kind", ["in order", "shuffled", "sampler", "batch sampler", "batch sampler in order"])
def test_only_data_in_order_have_a_factor(kind: str) -> None:
    """Roots of one pass times the Jacobian of another are no factor of anything."""
    x, y = numbers(10, 4), classes(10, 3)
    loader, ordered = loaders(x, y)[kind]
    problem = Problem(tanh_mlp(4, 5, 3), F.cross_entropy, [(x, y)])
    A = bnp.gauss_newton(bnp.EmpiricalRisk(problem.model, F.cross_entropy, loader))
    reference = problem.gauss_newton()
    assert relative(A.to_dense(), reference) <= 1e-10
    assert relative(A.to_dense(), reference) <= 1e-10  # the second pass, in another order
    assert (A.factor is not None) == ordered
    if A.factor is not None:
        rows = A.factor.to_dense()
        assert relative(rows.T @ rows, reference) <= 1e-10


@pytest.mark.parametrize(
    "loss",
    [
        lambda o, y: -F.mse_loss(o, y),
        lambda o, y: torch.cos(o).mean(),
        lambda o, y: o.square().mean() - (o[:, 0] * o[:, 1]).mean(),
        lambda o, y: o.mean() ** 2,
        lambda o, y: o.var(),
        lambda o, y: torch.logsumexp(o @ o.T, dim=1).mean(),
    ],
    ids=["concave", "cosine", "saddle", "coupled square", "coupled variance", "contrastive"],
)
def test_no_factor_without_a_convex_separate_loss(loss: Callable[..., Tensor]) -> None:
    problem = Problem(tanh_mlp(4, 5, 3), loss, [(numbers(7, 4), numbers(7, 3, seed=2))])
    A = bnp.gauss_newton(problem.risk())
    assert A.factor is None
    assert relative(A.to_dense(), problem.gauss_newton()) <= 1e-10
    assert relative(bnp.hessian(problem.risk()).to_dense(), problem.hessian()) <= 1e-10


def gaussian(o: Tensor, y: Tensor) -> Tensor:
    """Its variance is an output: convex in neither of the two."""
    return F.gaussian_nll_loss(o[:, :1], y[:, :1], o[:, 1:2].exp())


def dice(o: Tensor, y: Tensor) -> Tensor:
    p, t = torch.sigmoid(o), torch.sigmoid(y)
    return (1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)).mean()


@pytest.mark.parametrize("loss", [gaussian, dice, lambda o, y: torch.cos(o).mean()], ids=["gaussian", "dice", "cosine"])
def test_where_a_loss_bends_down_sizes_of_eigenvalues_are_compared(loss: Callable[..., Tensor]) -> None:
    """In the whole matrix, its blocks, with `P` and in a table, as for a Hessian: nothing is refused."""
    problem = Problem(tanh_mlp(4, 3, 2), loss, [(numbers(40, 4), numbers(40, 2, seed=2))])
    risk = problem.risk()
    A, exact = bnp.gauss_newton(risk), torch.linalg.eigvalsh(problem.gauss_newton())
    assert not A.semidefinite
    assert not bnp.gauss_newton(risk, block="fc1").semidefinite
    found, sizes = bnp.condition_number(A), exact.abs()
    assert found.negative == int((exact < 0).sum()) > 0
    assert found.quantity != "kappa*"
    assert found.lower <= float(sizes.max() / sizes.min()) * (1 + 1e-6)
    assert found.upper >= float(sizes.max() / sizes.min()) * (1 - 1e-6)
    rows = bnp.layer_table(risk).records()
    assert len(rows) == 2
    assert "in size" in str(bnp.layer_table(risk))
    assert bnp.compare(risk).records()


@pytest.mark.parametrize("loss", [F.mse_loss, lambda o, y: o.var(), lambda o, y: o.mean() ** 2])
def test_a_convex_loss_makes_a_semidefinite_matrix(loss: Callable[..., Tensor]) -> None:
    risk = Problem(tanh_mlp(4, 5, 3), loss, [(numbers(7, 4), numbers(7, 3, seed=2))]).risk()
    assert bnp.gauss_newton(risk).semidefinite


# small singular values

EXTREME = torch.tensor(
    [[0.0, 18.0, -15.0, 30.0], [3.0, 3.0, -20.0, 2.0], [-35.0, 0.0, 1.0, 0.5], [9.0, -9.0, 25.0, 0.0]],
    dtype=torch.float64,
)


def exact_singular_values(logits: Tensor) -> np.ndarray:
    """Of `(diag p - p p^T)^(1/2)`, in 60 digits."""
    with mpmath.workdps(60):
        e = [mpmath.exp(mpmath.mpf(z)) for z in logits.tolist()]
        p = [v / sum(e) for v in e]
        S = mpmath.diag(p) - mpmath.matrix(p) * mpmath.matrix(p).T
        values = mpmath.eigsy(S, eigvals_only=True)
        return np.array([float(mpmath.sqrt(max(v, 0))) for v in values])[::-1]


def root_of(logits: Tensor, loss: Callable[..., Tensor] = F.cross_entropy) -> output_curvature.OutputRoot:
    problem = Problem(spread(nn.Linear(1, 1)), F.mse_loss, [(numbers(4, 1), numbers(4, 1))])
    risk = problem.risk()
    batch = bnp.network.batches.Batch(None, classes(len(logits), 4), float(len(logits)), 0)
    risk._loss = loss
    found = output_curvature.output_root(risk, batch, logits)
    assert found is not None
    return found


def test_the_softmax_root_has_one_structural_zero_and_the_rest_right() -> None:
    """An eigenvalue root loses all singular values below 1e-8 of the largest, and invents one."""
    found = root_of(EXTREME)
    assert found.kind == "softmax"
    for root, logits in zip(found.root * 2, EXTREME, strict=True):  # four examples: 1/sqrt(4) each
        sigma, exact = singular_values(root), exact_singular_values(logits)
        assert abs(sigma[:-1] / exact[:-1] - 1).max() < 1e-6
        assert sigma[-1] < 1e-15
        assert float((root @ torch.ones(4, dtype=torch.float64)).abs().max()) < 4e-16
    S = (
        torch.diag_embed(torch.softmax(EXTREME, 1))
        - torch.softmax(EXTREME, 1)[:, :, None] * torch.softmax(EXTREME, 1)[:, None]
    )
    eigen = torch.linalg.eigvalsh(S[0]).abs().sqrt().flip(0).numpy()
    assert abs(eigen[2] / exact_singular_values(EXTREME[0])[2] - 1) > 0.05


def singular_values(root: Tensor) -> np.ndarray:
    """In 60 digits: of the root as it was computed."""
    with mpmath.workdps(60):
        values = mpmath.svd_r(mpmath.matrix(root.tolist()), compute_uv=False)
        return np.sort(np.array([float(v) for v in values]))[::-1]


@pytest.mark.parametrize("gap", [0.0, 10.0, 40.0])
def test_nearly_certain_examples_keep_their_class_weights(gap: float) -> None:
    """Weights were read off digits that nearly certain examples do not have: no softmax form after training."""
    w = torch.tensor([1.0, 10.0, 0.1, 5.0], dtype=torch.float64)
    logits = torch.zeros(4, 4, dtype=torch.float64)
    logits[torch.arange(4), classes(4, 4)] = gap
    logits = logits + 0.1 * numbers(4, 4)
    found = root_of(logits, lambda o, y: F.cross_entropy(o, y, weight=w))
    assert found.kind == "softmax"
    y = classes(4, 4)
    assert found.scale is not None
    np.testing.assert_allclose(found.scale.numpy(), (w[y] / w[y].sum()).numpy(), rtol=1e-10)


def test_ignored_examples_have_rows_of_zeros() -> None:
    y = classes(6, 3)
    y[[1, 4]] = -100
    problem = Problem(tanh_mlp(4, 3), F.cross_entropy, [(numbers(6, 4), y)])
    rows = bnp.gauss_newton(problem.risk()).factor.to_dense().view(6, 3, -1)
    assert rows.abs().amax(dim=(1, 2)).eq(0).tolist() == [False, True, False, False, True, False]


def test_two_classes_by_margin_are_still_right() -> None:
    """Any function of z_1 - z_2 has the shape of a softmax Hessian: the weights must then be its own."""
    loss = lambda o, y: F.softplus(o[:, 0] - o[:, 1]).mean() + 0.3 * (o[:, 0] - o[:, 1]).square().mean()  # noqa: E731
    problem = Problem(tanh_mlp(4, 2), loss, [(5 * numbers(8, 4), classes(8, 2))])
    rows = bnp.gauss_newton(problem.risk()).factor.to_dense()
    assert relative(rows.T @ rows, problem.gauss_newton()) <= 1e-12


LARGE = 100 + numbers(4, 4)
MIXING = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)


def logistic(o: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(o, torch.zeros_like(o))


@pytest.mark.parametrize(
    ("loss", "outputs", "kinds", "ranks", "vanished"),
    [
        (lambda o, y: (o @ MIXING).square().mean(), LARGE, ("general", "general"), (8, 12), True),
        (logistic, LARGE - 60, ("diagonal", "diagonal"), (16, 16), False),
        (F.cross_entropy, torch.tensor([[400.0, 0, 1, 2]]).double(), ("softmax", "general"), (3, 4), True),
    ],
    ids=["low rank", "saturated logistic", "saturated softmax"],
)
def test_a_loss_that_refuses_other_outputs_has_the_root_that_is_seen(
    loss: Callable[..., Tensor],
    outputs: Tensor,
    kinds: tuple[str, str],
    ranks: tuple[int, int],
    vanished: bool,
) -> None:
    """What it would be at ordinary outputs is not known: neither its form nor that a zero is structure."""

    def strict(o: Tensor, y: Tensor) -> Tensor:
        if float(o.detach().amax()) < 10:
            raise ValueError("no outputs of mine")
        return loss(o, y)

    found, other = root_of(outputs, loss), root_of(outputs, strict)
    assert (found.kind, other.kind) == kinds
    assert (found.rank, other.rank) == ranks
    assert (found.vanished, other.vanished) == (False, vanished)
    assert found.rounding <= other.rounding > 0
    assert relative(*(root.root.transpose(1, 2) @ root.root for root in (other, found))) <= 1e-10


def test_an_unused_layer_has_rows_of_zeros() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 3), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Any:
            return self.used(x)

    risk = Problem(spread(Unused()), F.mse_loss, [(numbers(2, 4), numbers(2, 3, seed=1))]).risk()
    rows = bnp.gauss_newton(risk, block="unused").factor.to_dense()
    assert rows.shape == (6, 25)
    assert not rows.any()


def test_float32_factors() -> None:
    for name in ("cross_entropy", "mse", "margins", "cnn", "mlp, BatchNorm, train"):
        problem = PROBLEMS[name]()
        factor = bnp.gauss_newton(problem.risk(dtype=torch.float32)).factor
        assert factor.dtype == torch.float32
        rows = factor.to_dense().double()
        assert relative(rows.T @ rows, problem.gauss_newton()) <= 1e-4


def test_positions_of_images_are_rows_of_their_own() -> None:
    """An image-to-image loss: roots per pixel row, not one matrix per image."""
    model = spread(nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 2, 1)))
    problem = Problem(model, F.mse_loss, split(numbers(5, 2, 3, 3), numbers(5, 2, 3, 3, seed=2), (3, 2)))
    factor = bnp.gauss_newton(problem.risk()).factor
    rows = factor.to_dense()
    assert relative(rows.T @ rows, problem.gauss_newton()) <= 1e-10
    jacobians = torch.cat([problem.jacobian(b) for b in range(2)])
    assert relative(rows, (2 / 90) ** 0.5 * jacobians) <= 1e-12


def test_convolutions_in_many_slices() -> None:
    problem = image_problem(cnn("layer"), (9, 11, 1), True)
    rows = bnp.gauss_newton(problem.risk()).factor.to_dense()
    assert relative(rows.T @ rows, problem.gauss_newton()) <= 1e-10


def test_rows_of_nearly_certain_examples_still_sum_to_zero() -> None:
    logits = torch.tensor([[40.0, 0.0, 1.0], [0.0, 36.0, 2.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    layer = nn.Linear(3, 3, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(3))
    risk = bnp.EmpiricalRisk(layer, nn.functional.cross_entropy, (logits, torch.tensor([0, 1, 2])))
    root = output_root(risk, next(iter(risk.batches)), logits)
    assert root is not None
    size = root.root.abs().amax(dim=2)
    assert bool((root.root.sum(dim=2).abs() <= 4e-16 * size).all())


def test_rows_of_a_small_transformer_are_pulled_back_together(monkeypatch):
    """One backward pass for the whole stack and one that checks it, none per row."""
    block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Embedding(7, 8), block, nn.LayerNorm(8), nn.Linear(8, 7)).double()
    x = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(0))
    risk = bnp.EmpiricalRisk(model, lambda out, y: nn.functional.cross_entropy(out.flatten(0, 1), y.flatten()), (x, x))
    (batch,) = risk.batches
    graph = output_graph(risk, batch, forward=False)
    calls, one = [], products.backward
    monkeypatch.setattr(products, "backward", lambda *a, **k: calls.append(k.get("batched", False)) or one(*a, **k))
    u = torch.randn(5, *graph.outputs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = graph.vjp_rows(u)
    assert calls == [True, False]
    for k, row in enumerate(u):
        for stacked, single in zip(together, one([graph.outputs], graph.leaves, [row]), strict=True):
            torch.testing.assert_close(stacked[k], single, rtol=1e-9, atol=1e-12)
