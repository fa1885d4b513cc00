"""A dense layer's block from its inputs and the cotangents of its outputs is the Gauss-Newton block.

Bugs that only these tests catch: rows of the factor in another order than the parameters'; a batch weight that is lost
in it; a frozen bias that is counted; directions called null that are not; cotangents kept that do not fit.
"""

from __future__ import annotations

import pytest
import torch
from curvature_reference import Problem, classes, numbers, relative
from test_curvature_products import PROBLEMS
from torch import nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.curvature import units
from bnp_analysis.curvature.units import unit_blocks
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
