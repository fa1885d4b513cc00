"""A method for condition numbers is one object; names that are gone say what to use."""

from __future__ import annotations

import pytest
import torch

import bnp_analysis as bnp
from bnp_analysis.errors import InvalidInputError
from bnp_analysis.linalg import DenseOperator, Method, Price, Problem, condition_number, methods, register
from bnp_analysis.linalg.condition import methods as registry
from bnp_analysis.linalg.condition.dense import dense_ends
from bnp_analysis.linalg.condition.number import Extremes


def test_a_new_method_is_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
    asked: list[Problem] = []

    def solve(problem: Problem) -> Extremes:
        asked.append(problem)
        return dense_ends(problem)

    mine = Method(name="mine", claim="nothing", price=lambda A, steps: Price(A.dim, 8, steps), solve=solve)
    register(mine)
    A = DenseOperator(torch.diag(torch.tensor([4.0, 2.0]).double()))
    k = condition_number(A, method="mine", steps=7, seed=3)
    assert (k.method, k.value, asked[0].steps, asked[0].seed) == ("mine", pytest.approx(2.0), 7, 3)
    assert methods(A)[-1].method == "mine"
    assert condition_number(A).method == "dense"
    with pytest.raises(InvalidInputError, match="semidefinite"):
        bnp.linalg.magnitude_condition_number(A, method="mine")
    with pytest.raises(InvalidInputError, match="already"):
        register(mine)
    with pytest.raises(InvalidInputError, match=r"one of auto, factor-svd, .*, mine, got 'yours'"):
        condition_number(A, method="yours")


def test_names_that_are_gone_say_what_to_use() -> None:
    for where, name, successor in (
        (bnp, "rank_estimate", "spectral_density"),
        (bnp.linalg, "block_lanczos", "eigenpairs"),
        (bnp.linalg, "choose_route", "choose_method"),
        (bnp.linalg, "Route", "MethodCost"),
        (bnp, "routes", "linalg.methods"),
        (bnp.precondition, "SplitsByUnit", r"part\(positions\)"),
    ):
        with pytest.raises(AttributeError, match=successor):
            getattr(where, name)
    with pytest.raises(AttributeError):
        bnp.linalg.nothing  # noqa: B018
