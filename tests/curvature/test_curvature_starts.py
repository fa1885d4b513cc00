"""Catches: a proposed start that is not the gradient, of one batch or of other tensors; one that misleads a search."""

from __future__ import annotations

import pytest
import torch
from curvature_reference import relative
from test_curvature_engines import mixed
from test_curvature_products import PROBLEMS
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.curvature.engines import ENGINES
from bnp_analysis.training.trainer import fit


@pytest.mark.parametrize("engine", [*ENGINES, "mixed"])
@pytest.mark.parametrize("name", ["cross_entropy", "class weights, count=", "cnn, BatchNorm, train"])
def test_curvature_proposes_the_gradient(name: str, engine: str) -> None:
    risk = PROBLEMS[name]().risk()
    for build in (bnp.hessian, bnp.gauss_newton):
        A = mixed(build, risk) if engine == "mixed" else build(risk, engine=engine)
        assert relative(A.start, risk.gradient) <= 1e-13
    layer = next(iter(risk.space.names)).rpartition(".")[0]
    block = bnp.hessian(risk, block=layer, engine="recompute" if engine == "mixed" else engine)
    assert relative(block.start, risk.restrict(risk.space.layer_names(layer)).gradient) <= 1e-13


def test_a_fisher_matrix_proposes_it_too() -> None:
    risk = PROBLEMS["cross_entropy"]().risk()
    assert torch.equal(bnp.fisher(risk, "empirical").start, risk.gradient)


def test_it_saves_products_after_training() -> None:
    data = bnp.data.load("digits", n=300, flatten=True)
    x, y = data.tensors[0].double(), data.tensors[1]
    model = bnp.models.mlp([64, 20, 10], seed=0, dtype=torch.float64)
    fit(model, F.cross_entropy, (x, y), epochs=20, batch_size=50, lr=0.1, momentum=0.0)
    A = bnp.hessian(bnp.EmpiricalRisk(model, F.cross_entropy, (x, y)))
    found, plain = (bnp.eigenpairs(A, 1, tol=1e-3, start=how) for how in ("auto", "random"))
    assert found.matvecs < plain.matvecs
    assert found.values.item() == pytest.approx(plain.values.item(), rel=1e-4)
    assert found.settings["start"] == "what the operator proposes, and random"
