"""Catches: a result that does not say how its products were computed, says it of another operator or of a plan that was
never used, or makes a plan only to report it; equality that depends on the memory that happened to be free."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bnp_analysis as bnp
from bnp_analysis.errors import MemoryLimitError


def risk() -> bnp.EmpiricalRisk:
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(12, 4, generator=g), torch.arange(12) % 3) for _ in range(3)]
    model = bnp.models.mlp([4, 5, 3], seed=1)
    return bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, data, dtype=torch.float64)


def asked(engine: str, kept: int) -> dict[str, Any]:
    return {"asked": engine, "max_memory": 10**8, "engine": engine, "kept": kept, "batches": 3}


@pytest.mark.parametrize(("engine", "kept"), [("retained", 3), ("recompute", 0)])
def test_every_result_of_products_carries_the_plan(engine: str, kept: int, tmp_path: Any) -> None:
    problem = risk()
    P = bnp.bnp_preconditioner(problem)
    H, A, fisher = (
        build(problem, engine=engine, max_memory=10**8) for build in (bnp.hessian, bnp.gauss_newton, bnp.fisher)
    )
    unit = bnp.gauss_newton(problem, block=("fc1", 1), engine=engine, max_memory=10**8)
    found = [
        bnp.eigenpairs(H, 1),
        bnp.eigenpairs(H, 1, preconditioner=P),
        bnp.spectral_density(H, probes=1, steps=3),
        bnp.trace(bnp.linalg.congruence(A, P), probes=2),
        bnp.linalg.magnitude_condition_number(H, method="lanczos", steps=5),
        bnp.linalg.regularized_condition_number(fisher, 0.1, method="lanczos"),
        bnp.condition_number(bnp.gauss_newton(problem, engine=engine, max_memory=10**8), method="golub-kahan"),
        bnp.condition_number(unit, method="lanczos", steps=5),
        bnp.condition_number(bnp.linalg.GramOperator(fisher.factor), method="lanczos", steps=5),
    ]
    for result in found:
        back = bnp.results.Result.load(result.save(tmp_path / "result.json"))
        assert back.engine == result.engine
        assert asked(engine, kept).items() <= back.engine.items()
        assert 0 < back.engine["bytes"] <= back.engine["limit"] == 10**8


def test_the_plan_of_a_matrix_is_its_own_even_where_its_factor_has_one() -> None:
    A = bnp.gauss_newton(risk(), engine="recompute")
    _ = A.factor @ torch.ones(A.dim, dtype=torch.float64)
    assert A.record["kept"] == 0
    _ = A @ torch.ones(A.dim, dtype=torch.float64)
    assert A.record == {"asked": "recompute", "max_memory": None} | vars(A.engine)


def test_no_plan_is_made_to_be_reported() -> None:
    """By the dense factor no graph is kept, so a limit that none would meet does not matter."""
    A = bnp.gauss_newton(risk(), max_memory=1)
    assert bnp.condition_number(A, method="factor-svd").engine == {"asked": "auto", "max_memory": 1}
    assert bnp.condition_number(bnp.DenseOperator(torch.eye(2))).engine == {}
    with pytest.raises(MemoryLimitError):
        A @ torch.ones(A.dim, dtype=torch.float64)


def test_results_are_equal_whatever_graphs_were_kept() -> None:
    plans = [bnp.eigenpairs(bnp.hessian(risk(), engine=engine), 1) for engine in ("retained", "recompute")]
    assert plans[0] == plans[1]
    assert plans[0].engine != plans[1].engine


def test_tables_take_an_engine_and_carry_its_plan() -> None:
    found = bnp.compare(risk(), engine="recompute", max_memory=10**8)
    assert asked("recompute", 0).items() <= found.network["hessian"][0].engine.items()
    assert found.network == bnp.compare(risk()).network
    with pytest.raises(MemoryLimitError, match="max_memory"):
        bnp.compare(risk(), max_memory=1)
    with pytest.raises(MemoryLimitError, match="max_memory"):
        bnp.layer_table(risk(), max_memory=1)
