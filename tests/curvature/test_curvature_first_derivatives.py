"""Operations with a first derivative only, losses whose kernels have no second, programs of one batch size, channels.

Only these tests would notice: a Gauss-Newton product that asks for a second derivative of the model, a CTC loss whose
curvature is refused or not that of torch's value, factors that cut what `torch.export` made for one size, pixels whose
classes lie along the second axis, operators that cannot be pickled after a product.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from curvature_reference import Problem, classes, numbers, relative, spread
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.network import forms


class Segments(nn.Module):
    """A native operation without a second derivative: products of two features each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).T.contiguous()
        return self.b(torch.segment_reduce(h, "prod", lengths=torch.tensor([2, 2])).T)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * g


class Cubes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Cube.apply(x)


def bags() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3))


ONCE: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "once_differentiable": (lambda: nn.Sequential(nn.Linear(3, 4), Cubes(), nn.Linear(4, 3)), lambda: numbers(6, 3)),
    "segments": (Segments, lambda: numbers(6, 3)),
    "EmbeddingBag": (bags, lambda: classes(6, 7, 4)),
}


def by_rows(problem: Problem) -> Tensor:
    """The Gauss-Newton matrix of cross-entropy from the rows of the Jacobian, by first derivatives alone."""
    model, (x, _) = problem.model, problem.batches[0]
    out = model(x)
    rows = [torch.autograd.grad(part, list(model.parameters()), retain_graph=True) for part in out.reshape(-1)]
    J = torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in rows]).view(*out.shape, -1)
    p = out.detach().softmax(dim=1)
    S = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("jkn,jkl,jlm->nm", J, S, J) / len(x)


@pytest.mark.parametrize("name", ONCE)
def test_gauss_newton_needs_first_derivatives_of_the_model(name: str) -> None:
    make, data = ONCE[name]
    problem = Problem(spread(make()), F.cross_entropy, [(data(), classes(6, 3))])
    risk, G = problem.risk(), by_rows(problem)
    A = bnp.gauss_newton(risk)
    eye = torch.eye(A.dim, dtype=torch.float64)
    assert relative(A @ eye, G) <= 1e-12
    assert relative(bnp.gauss_newton(risk, engine="recompute") @ eye, G) <= 1e-12
    assert relative(A.factor @ eye, A.factor.to_dense()) <= 1e-12
    table = {row["layer"]: row for row in bnp.layer_table(risk).records()}
    assert table[next(iter(table))]["is_hessian"] is (True if name == "EmbeddingBag" else None)
    assert float((G @ bnp.null_directions(risk).basis).norm()) <= 1e-12 * float(G.norm())
    bnp.kfac_preconditioner(risk, damping=1e-3)
    with pytest.raises(InvalidInputError, match=r"no second derivative in torch.*gauss_newton and fisher need first"):
        bnp.hessian(risk) @ eye


def ctc(o: Tensor, y: Tensor) -> Tensor:
    return F.ctc_loss(o.log_softmax(-1).transpose(0, 1), y, torch.tensor([6, 5, 6]), torch.tensor([2, 1, 2]))


LOSSES: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {
    "ctc": (ctc, numbers(3, 6, 3), classes(3, 3, 2) + 1),
    "ctc, module": (
        lambda o, y: nn.CTCLoss(blank=3, reduction="sum")(o.log_softmax(-1).transpose(0, 1), y, (6,) * 3, (2,) * 3),
        numbers(3, 6, 3),
        classes(3, 3, 2),
    ),
    "squared margin": (lambda o, y: F.multi_margin_loss(o, y, p=2), numbers(5, 3), classes(5, 4)),
    "margins of labels": (
        lambda o, y: F.multilabel_margin_loss(o, y) + o.square().mean(),
        numbers(3, 3),
        torch.tensor([[0, 2, -1, 1], [3, -1, 0, 0], [1, 0, 2, -1]]),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_without_a_second_derivative_have_one(name: str) -> None:
    """Against central differences of the gradient that torch's own kernel has."""
    loss, x, y = LOSSES[name]
    model = spread(nn.Linear(3, 4))
    risk = Problem(model, loss, [(x, y)]).risk()

    def gradient(z: Tensor) -> Tensor:
        z = z.clone().requires_grad_()
        return torch.autograd.grad(loss(z, y), z)[0].reshape(-1)

    z, step = model(x).detach(), 1e-5
    units = torch.eye(z.numel(), dtype=torch.float64).view(-1, *z.shape)
    S = torch.stack([(gradient(z + step * e) - gradient(z - step * e)) / (2 * step) for e in units])
    rows = [torch.autograd.grad(part, list(model.parameters()), retain_graph=True) for part in model(x).reshape(-1)]
    J = torch.stack([torch.cat([t.reshape(-1) for t in row]) for row in rows])
    assert relative(risk.value, loss(z, y)) <= 1e-13
    assert relative(risk.gradient, J.T @ gradient(z)) <= 1e-12
    # The model is linear: both matrices are J^T S J.
    for A in (bnp.gauss_newton(risk), bnp.hessian(risk)):
        assert relative(A.to_dense(), J.T @ S @ J) <= 1e-8


def test_where_ctc_is_not_convex_sizes_are_compared() -> None:
    def loss(o: Tensor, y: Tensor) -> Tensor:
        return F.ctc_loss(o.log_softmax(-1).transpose(0, 1), y, torch.tensor([2]), torch.tensor([1]))

    risk = Problem(spread(nn.Linear(2, 3)), loss, [(numbers(1, 2, 2), torch.tensor([[1]]))]).risk()
    A = bnp.gauss_newton(risk)
    exact = torch.linalg.eigvalsh(A.to_dense())
    found = bnp.condition_number(A)
    assert found.negative == int((exact < -1e-12).sum()) > 0
    assert found.quantity != "kappa*"
    (row,) = bnp.layer_table(risk).layers
    assert row.block is not None
    assert row.block.negative == found.negative


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_forms_of_losses_are_torchs(reduction: str) -> None:
    """Values and gradients: repeated labels, empty and concatenated targets, other blanks, impossible targets."""
    logits = numbers(6, 3, 4).requires_grad_()
    targets, lengths, sizes = torch.tensor([[1, 1], [2, 3], [1, -5]]), torch.tensor([6, 5, 2]), torch.tensor([2, 2, 0])
    flat = torch.tensor([1, 1, 2, 3])
    for y in (targets, flat):
        pairs = [
            f(logits.log_softmax(-1), y, lengths, sizes, reduction=reduction) for f in (F.ctc_loss, forms.ctc_loss)
        ]
        assert torch.allclose(*pairs, rtol=1e-13, atol=0)
        theirs, ours = (torch.autograd.grad(value.sum(), logits)[0] for value in pairs)
        assert torch.allclose(theirs, ours, rtol=1e-11, atol=1e-14)
    short = logits[:2, :1].detach().log_softmax(-1), torch.tensor([[1, 1]]), (2,), (2,)
    for zero in (False, True):
        theirs, ours = (f(*short, reduction=reduction, zero_infinity=zero) for f in (F.ctc_loss, forms.ctc_loss))
        assert torch.equal(theirs, ours)
    single = logits[:, 0].detach().log_softmax(-1), torch.tensor([1, 2]), torch.tensor(6), torch.tensor(2)
    theirs, ours = (f(*single, reduction=reduction) for f in (F.ctc_loss, forms.ctc_loss))
    assert theirs.shape == ours.shape
    assert torch.allclose(theirs, ours, rtol=1e-13)
    x, y, w = numbers(5, 4), classes(5, 4), numbers(4).abs()
    for how in ({"p": 1}, {"p": 2, "margin": 0.7, "weight": w}):
        margins = [f(x, y, reduction=reduction, **how) for f in (F.multi_margin_loss, forms.multi_margin_loss)]
        assert torch.allclose(*margins, rtol=1e-13)


def exported(model: nn.Module, x: Tensor) -> nn.Module:
    return torch.export.export(model, (x,)).module()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("rows", [12, 19])
def test_exported_programs_of_one_size(rows: int) -> None:
    """Their factor is formed from whole batches; what is not read is named."""
    model, x, y = spread(bnp.models.mlp([4, 6, 3])).eval(), numbers(rows, 4), classes(rows, 3)
    own = bnp.EmpiricalRisk(model, F.cross_entropy, (x, y))
    risk = bnp.EmpiricalRisk(exported(model, x), F.cross_entropy, (x, y))
    for make in (bnp.hessian, bnp.gauss_newton, lambda r: bnp.fisher(r, "empirical")):
        assert relative(make(risk).to_dense(), make(own).to_dense()) <= 1e-12
    factor = bnp.gauss_newton(risk).factor.to_dense()
    assert relative(factor.T @ factor, bnp.gauss_newton(own).to_dense()) <= 1e-12
    assert relative(bnp.diagonal_preconditioner(risk).scales, bnp.diagonal_preconditioner(own).scales) <= 1e-10
    assert "used by linear" in str(bnp.null_directions(risk))
    with pytest.raises(InvalidInputError, match="no layer that BNP covers"):
        bnp.layer_table(risk)
    with pytest.raises(InvalidInputError, match=r"batch 1 cannot.*Guard failed.*exported with.*torch.export.Dim"):
        bnp.EmpiricalRisk(exported(model, x), F.cross_entropy, [(x, y), (x[:5], y[:5])])


SHAPES = {"pixels": (2, 5, 4), "sequence": (3, 4), "square": (3, 3), "volume": (2, 2, 3)}


@pytest.mark.parametrize("name", SHAPES)
def test_classes_along_the_second_axis(name: str) -> None:
    """The same matrices as with classes last, and the softmax form: rank `C - 1` for each position."""
    places, conv = SHAPES[name], {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    model = spread(conv[len(places)](1, 3, 1))
    x, y = numbers(2, 1, *places), classes(2, 3, *places)
    first = Problem(model, F.cross_entropy, [(x, y)])
    last = bnp.EmpiricalRisk(
        model, lambda o, t: F.cross_entropy(o.flatten(0, -2), t.flatten()), (x, y), output=lambda o: o.movedim(1, -1)
    )
    risk, G = first.risk(), first.gauss_newton()
    A, eye = bnp.gauss_newton(risk), torch.eye(6, dtype=torch.float64)
    factor = A.factor.to_dense()
    assert factor.shape[0] == 2 * x[0].numel() * 3 or factor.shape[0] <= x.numel() * 3
    assert max(relative(factor.T @ factor, G), relative(A @ eye, G), relative(A.factor @ eye, factor)) <= 1e-12
    assert relative(A.factor.T @ (A.factor @ eye), G) <= 1e-12
    for kind in ("mc", "empirical"):
        assert (
            relative(bnp.fisher(risk, kind, samples=3).to_dense(), bnp.fisher(last, kind, samples=3).to_dense())
            <= 1e-12
        )
    for make in (bnp.diagonal_preconditioner, lambda r: bnp.kfac_preconditioner(r, damping=1e-3)):
        assert relative(make(risk).to_dense(), make(last).to_dense()) <= 1e-10
    scaled = [bnp.bnp_preconditioner(r, output_scale=True).to_dense() for r in (risk, last)]
    assert relative(*scaled) <= 1e-12
    assert bnp.null_directions(risk).sources == bnp.null_directions(last).sources


@pytest.mark.parametrize(
    "make", [bnp.hessian, bnp.gauss_newton, bnp.fisher, lambda r: bnp.gauss_newton(r, block="fc1")]
)
def test_operators_are_copied_after_a_product(make: Callable[..., Any]) -> None:
    risk = bnp.EmpiricalRisk(spread(bnp.models.mlp([4, 6, 3])), F.cross_entropy, (numbers(12, 4), classes(12, 3)))
    A = make(risk)
    v = numbers(A.dim)
    before = A @ v
    if A.factor is not None:
        _ = A.factor @ v
    for other in (copy.deepcopy(A), pickle.loads(pickle.dumps(A))):
        assert torch.equal(other @ v, before)
        assert torch.equal(A @ v, before)
