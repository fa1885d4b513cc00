"""`condition`: operator, null directions and block of `P` cut alike, and numbers that are those of the dense matrices.

Bugs that only this file catches: the block of one with the `P` of another, a gain turned around, null directions of
the Gauss-Newton matrix given to the Hessian, a paragraph that says more than the numbers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError


@pytest.fixture(scope="module")
def risk() -> bnp.EmpiricalRisk:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=g, dtype=torch.float64) * torch.logspace(0, 1.5, 8) + 3
    model = bnp.models.mlp([8, 6, 5, 3], seed=1, dtype=torch.float64)
    return bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, torch.randint(0, 3, (60,), generator=g)))


def dense_ratios(A: bnp.linalg.SymmetricOperator, P: Any, ranks: np.ndarray) -> np.ndarray:
    matrix = A.to_dense() if P is None else P.to_dense().T @ A.to_dense() @ P.to_dense()
    sizes = np.sort(np.abs(torch.linalg.eigvalsh(matrix).numpy()))[::-1]
    return np.asarray(sizes[0] / sizes[ranks - 1])


@pytest.mark.parametrize("block", [None, "fc2"])
@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian", "fisher_mc", "fisher_empirical"])
@pytest.mark.parametrize("method", ["auto", "lanczos"])
def test_the_numbers_are_those_of_the_dense_matrices(
    risk: bnp.EmpiricalRisk, curvature: str, block: str | None, method: str
) -> None:
    found = bnp.condition(risk, curvature=curvature, block=block, method=method)
    A = {
        "gauss_newton": lambda: bnp.gauss_newton(risk, block=block),
        "hessian": lambda: bnp.hessian(risk, block=block),
        "fisher_mc": lambda: bnp.fisher(risk, "mc", block=block, seed=0),
        "fisher_empirical": lambda: bnp.fisher(risk, "empirical", block=block),
    }[curvature]()
    P = bnp.bnp_preconditioner(risk)
    own = P if block is None else P.block(block)
    assert found.with_P is not None
    for profile, p in ((found.without_P, None), (found.with_P, own)):
        few = profile.ranks[profile.value < 1e8]
        truth = dense_ratios(A, p, few)
        assert np.all(profile.lower[: len(few)] <= truth * (1 + 1e-6))
        assert np.all(truth <= profile.upper[: len(few)] * (1 + 1e-6))
    assert len(found.ranks) >= 3
    i, j = (np.searchsorted(p.ranks, found.ranks) for p in (found.without_P, found.with_P))
    assert found.gain == pytest.approx(found.without_P.value[i] / found.with_P.value[j])
    assert np.all((found.gain_lower <= found.gain) & (found.gain <= found.gain_upper))


def test_null_directions_decide_the_last_rung(risk: bnp.EmpiricalRisk) -> None:
    found = bnp.condition(risk)
    assert found.null_sources
    assert found.without_P.rank is not None
    assert found.with_P is not None
    assert found.without_P.rank == found.with_P.rank
    assert "kappa*" in str(found)


@pytest.mark.parametrize("block", [None, "fc2"])
def test_null_directions_of_the_hessian_are_its_own(risk: bnp.EmpiricalRisk, block: str | None) -> None:
    """Its number is two-sided then; homogeneity is the Gauss-Newton matrix's only."""
    found = bnp.condition(risk, curvature="hessian", block=block)
    assert "homogeneity" not in found.null_sources
    values = torch.linalg.eigvalsh(bnp.hessian(risk, block=block).to_dense()).abs().flip(0)
    rank = int((values > 1e-10 * values.max()).sum())
    assert block is not None or found.null_sources["softmax shift"] >= 6
    assert found.with_P is not None
    assert found.without_P.rank == found.with_P.rank == rank
    assert found.without_P.value[-1] == pytest.approx(float(values.max() / values.sort().values[-rank]), rel=1e-6)


def test_other_preconditioners_and_none(risk: bnp.EmpiricalRisk) -> None:
    assert bnp.condition(risk, preconditioner=None).with_P is None
    same = bnp.condition(risk, preconditioner=bnp.identity_preconditioner(risk))
    assert same.gain == pytest.approx(np.ones(len(same.ranks)), rel=1e-6)
    damped = bnp.condition(risk, preconditioner=bnp.kfac_preconditioner(risk))
    assert "With Kronecker, " in str(damped)


def test_it_reads_as_a_paragraph_and_saves(risk: bnp.EmpiricalRisk, tmp_path: Any) -> None:
    found = bnp.condition(risk, method="lanczos")
    text = str(found)
    assert "8 parameters" not in text.split("layer", maxsplit=1)[0].split(":", maxsplit=1)[0]
    for words in ("Gauss-Newton matrix of the whole network", "Without a preconditioner", "With BNP", "probability"):
        assert words in text
    rows = found.records()
    assert {"rank", "value", "lower", "upper", "value_with_P", "gain", "gain_lower"} <= set(rows[0])
    assert all(isinstance(row[name], float) for row in rows for name in ("value", "upper_with_P", "gain"))
    assert all(row["two_sided"] in (True, False) for row in rows)
    first = found.table().splitlines()[1]
    assert f"{rows[0]['value']:.4g} ({rows[0]['lower']:.4g} .. {rows[0]['upper']:.4g})" in first
    assert f"{rows[0]['gain']:.4g} (" in first
    path = found.save(tmp_path / "found.json")
    assert bnp.results.Result.load(path).records() == rows
    axes = bnp.plotting.plot_profile(found)
    assert len(axes.lines) >= 2
    assert bnp.plotting.plot_profile(found.without_P, label="one").get_legend() is not None


def test_what_is_missing_is_said(risk: bnp.EmpiricalRisk) -> None:
    assert "steps= goes further" in str(bnp.condition(risk, method="lanczos"))
    assert "Smaller eigenvalues" not in str(bnp.condition(risk))
    assert "no upper bound" in str(bnp.condition(risk, null=None))


def test_what_p_leaves_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, torch.arange(20) % 3))
    found = bnp.condition(risk)
    assert found.uncovered
    assert "leaves as they are" in str(found)


def test_first_mistakes(risk: bnp.EmpiricalRisk) -> None:
    with pytest.raises(InvalidInputError, match="EmpiricalRisk\\(model, loss"):
        bnp.condition(nn.Linear(2, 1))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="unknown curvature 'newton'; there are: gauss_newton, "):
        bnp.condition(risk, curvature="newton")
    with pytest.raises(InvalidInputError, match="preconditioner must be"):
        bnp.condition(risk, preconditioner="kfac")
    with pytest.raises(InvalidInputError, match=r"no factor.*use method='dense' or 'lanczos'"):
        bnp.condition(risk, curvature="hessian", method="factor-svd")
    with pytest.raises(InvalidInputError, match="a profile needs every rank"):
        bnp.condition(risk, method="inertia")
    with pytest.raises(InvalidInputError, match="null must be"):
        bnp.condition(risk, null="none")
