"""A dense layer's block from its inputs and the cotangents of its outputs is the Gauss-Newton block.

Bugs that only these tests catch: rows of the factor in another order than the parameters'; a batch weight that is lost
in it; a frozen bias that is counted; directions called null that are not; cotangents kept that do not fit.
"""

from __future__ import annotations

import mpmath
import pytest
import torch
from curvature_reference import Problem, classes, numbers, relative
from test_curvature_products import PROBLEMS
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import bnp_analysis as bnp
from bnp_analysis.curvature import units
from bnp_analysis.curvature.output_curvature import OutputRoot
from bnp_analysis.curvature.units import row_products, unit_blocks
from bnp_analysis.linalg.condition.reduction import reduced
from bnp_analysis.network import coverage
from bnp_analysis.testing import check_symmetric_operator


@pytest.mark.parametrize("name", ["cross_entropy", "mse", "margins", "mlp, LayerNorm"])
def test_a_layers_block_has_the_rows_of_the_jacobian(name, generator):
    risk = PROBLEMS[name]().risk()
    for layer, blocks in unit_blocks(risk, coverage(risk)).items():
        direct = bnp.gauss_newton(risk, block=layer)
        assert blocks.whole.factor.shape == direct.factor.shape
        assert blocks.whole.factor.rank_bound == direct.factor.rank_bound
        assert relative(blocks.whole.to_dense(), direct.to_dense()) <= 1e-10
        assert relative(reduced(blocks.whole).to_dense(), direct.to_dense()) <= 1e-10
        check_symmetric_operator(blocks.whole, generator)


def test_rows_come_in_pieces_that_are_the_matrix(monkeypatch):
    monkeypatch.setattr(units, "_TOGETHER", 1)
    risk = PROBLEMS["cross_entropy"]().risk()
    for blocks in unit_blocks(risk, coverage(risk)).values():
        factor = blocks.whole.factor
        pieces = list(factor.row_blocks())
        assert len(pieces) > 5
        identity = torch.eye(factor.shape[1], dtype=factor.dtype)
        assert relative(torch.cat(pieces), factor @ identity) <= 1e-12


def test_cotangents_that_do_not_fit_are_not_kept(monkeypatch):
    risk = PROBLEMS["cross_entropy"]().risk()
    kept = unit_blocks(risk, coverage(risk))
    monkeypatch.setattr(units, "available_memory", lambda *_: 64)
    for layer, blocks in unit_blocks(risk, coverage(risk)).items():
        assert blocks.whole is None
        assert torch.equal(blocks.scales, kept[layer].scales)


def test_dependences_are_those_of_the_rows_that_count():
    """Two inputs that agree wherever unit 0 is active, and nowhere else."""
    x = numbers(40, 4)
    x[:, 3] = torch.where(x[:, 0] > 0, x[:, 2], -x[:, 2] + 0.1)
    model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0.0, 0, 0, 0]]))
        model[0].bias.copy_(torch.tensor([0.0, 1.0]))
    risk = Problem(model, F.cross_entropy, [(x, classes(40, 3))]).risk()
    blocks = unit_blocks(risk, coverage(risk))["0"]
    found = [blocks.dependences(i, blocks[i].factor) for i in range(2)]
    assert [null.basis.shape[1] for null in found] == [1, 0]
    assert float((blocks[0] @ found[0].basis).abs().max()) <= 1e-14
    assert found[0].basis[:, 0].abs() == pytest.approx([0, 0, 0.5**0.5, 0.5**0.5, 0], abs=1e-12)


def dense_rows(parts, dim):
    """The rows that the parts say, in all columns, of layers with a bias."""
    whole = torch.zeros(parts[0].left.shape[0] * parts[0].left.shape[1], dim, dtype=torch.float64)
    for part in parts:
        g, h = part.left.flatten(0, 1), part.right.repeat_interleave(part.left.shape[1], 0)
        table = g[:, :, None] * h[:, None, :]
        whole[:, part.columns] = torch.cat([table[:, :, :-1].flatten(1), table[:, :, -1]], dim=1)
    return whole


def perceptron(loss=F.cross_entropy, classes=4):
    g = torch.Generator().manual_seed(0)
    x = torch.rand(20, 9, generator=g, dtype=torch.float64)
    y = torch.arange(20) % classes if loss is F.cross_entropy else torch.rand(20, classes, generator=g).double()
    return bnp.EmpiricalRisk(
        bnp.models.mlp([9, 7, classes], dtype=torch.float64), loss, [(x[:13], y[:13]), (x[13:], y[13:])]
    )


@pytest.mark.parametrize("loss", [F.cross_entropy, F.mse_loss])
@pytest.mark.parametrize("block", [None, "fc1"])
def test_rows_of_the_whole_factor_are_products_layer_by_layer(loss, block):
    A = bnp.gauss_newton(perceptron(loss), block=block)
    rows = dense_rows(A.factor.row_parts, A.dim)
    assert len(rows) == 20 * (3 if loss is F.cross_entropy else 4)
    assert relative(rows.T @ rows, A.to_dense()) <= 1e-12


def test_rows_are_no_products_where_a_layer_sees_several():
    x, y = torch.rand(5, 3, 4, dtype=torch.float64), torch.rand(5, 3, 2, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 2)).double()
    assert bnp.gauss_newton(bnp.EmpiricalRisk(model, F.mse_loss, (x, y))).factor.row_parts is None
    model = nn.Sequential(nn.Conv1d(3, 2, 2), nn.Flatten(), nn.Linear(6, 2)).double()
    assert bnp.gauss_newton(bnp.EmpiricalRisk(model, F.mse_loss, (x, y[:, 0]))).factor.row_parts is None


class Scaled(nn.Module):
    """A layer, and a parameter that is none of a layer's."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * self.layer(x)


def test_rows_are_no_products_where_they_would_be_too_few_or_mixed():
    x, y = numbers(6, 4), classes(6, 3)
    data = TensorDataset(x, y)
    coupled = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False), nn.Tanh(), nn.Linear(3, 3)).double()
    for model, given in (
        (coupled.train(), (x, y)),
        (Scaled().double(), (x, y)),
        (nn.Sequential(nn.Linear(4, 3)).double(), DataLoader(data, batch_size=3, shuffle=True)),
    ):
        assert row_products(bnp.EmpiricalRisk(model, F.cross_entropy, given)) is None


@pytest.mark.parametrize("block", [None, "fc1"])
@pytest.mark.parametrize("with_P", [False, True])
def test_the_number_from_row_products_is_that_of_the_singular_values(block, with_P):
    risk = perceptron()
    P = bnp.bnp_preconditioner(risk)
    own = (P if block is None else P.block(block)) if with_P else None
    A = bnp.gauss_newton(risk, block=block)
    found = bnp.condition_number(A, preconditioner=own, method="row-gram")
    other = bnp.condition_number(A, preconditioner=own, method="factor-svd")
    assert found.two_sided
    assert found.rank == other.rank
    assert found.lower <= other.upper
    assert other.lower <= found.upper <= 1.01 * found.lower


def test_tables_and_numbers_follow_one_plan(monkeypatch):
    """A layer whose singular values cost too much, and the network, are measured by the same method in both."""
    for name in ("factor_svd", "row_gram", "reduction"):
        monkeypatch.setattr(f"bnp_analysis.linalg.condition.{name}.affordable", lambda shape: min(shape) < 30)
    risk = perceptron()
    found = bnp.compare(risk, curvature="gauss_newton")
    for row in found.layers.layers:
        number = bnp.condition_number(bnp.gauss_newton(risk, block=row.layer))
        assert row.block.method == number.method
        assert row.block.lower <= number.upper
        assert number.lower <= row.block.upper
    # The second layer has fewer parameters than rows.
    assert [row.block.method for row in found.layers.layers] == ["row-gram", "dense"]
    assert found.network["gauss_newton"][0].method == found.network["gauss_newton"][1].method == "row-gram"


def test_the_independent_rows_of_a_softmax_are_right_entry_by_entry():
    logits = torch.tensor([[0.0, 40.0, 1.0, -30.0], [0.3, -0.2, 0.1, 0.0]], dtype=torch.float64)
    p = torch.softmax(logits, dim=1)
    rows = OutputRoot(p, 6, "softmax", p, torch.tensor([0.5, 2.0], dtype=torch.float64)).independent()
    assert rows.shape == (2, 3, 4)
    for j, w in enumerate((0.5, 2.0)):
        with mpmath.workdps(60):
            q = [mpmath.mpf(v) for v in p[j].tolist()]
            total = sum(q)
            q = [v / total for v in q]
            R = mpmath.matrix(rows[j].tolist())
            gap = R.T * R - w * (mpmath.diag(q) - mpmath.matrix(q) * mpmath.matrix(q).T)
            for a in range(4):
                for b in range(4):
                    assert abs(gap[a, b]) <= 1e-14 * w * mpmath.sqrt(q[a] * (1 - q[a]) * q[b] * (1 - q[b]))
