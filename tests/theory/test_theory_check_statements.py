"""Every statement holds, or says why it does not apply, on many kinds of networks; and applies where it should.

Bugs that only this file catches: a check that is right for dense layers with biases and wrong for convolutions, groups,
sequences, several batches, layers without a bias or a bare layer as root; one that hides behind *not applicable*.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from theory_check_problems import AWKWARD, COSTLY, NETWORKS, checks, inputs, relu
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.theory.check import Check, Source
from bnp_analysis.theory.statements import STATEMENTS, spectra, symmetry
from bnp_analysis.theory.statements import layers as layer_statements
from bnp_analysis.theory.statements.setting import NotApplicable, Problem, Statement, attempted, distance, refused

HOMOGENEOUS = {"relu", "deep", "constant feature", "conv", "conv, circular", "conv, groups, zero padding"}
COUPLED = {"batch norm, live"}
# Statement -> networks on which something of it need not apply; elsewhere it must.
EXCEPT = {
    Source.T1_PRIME: {"tanh"} | COUPLED,
    Source.ALGORITHM_2: {"no bias"},
    Source.PROP_7: {"no bias"} | COUPLED,
    Source.PROP_9: {name for name in NETWORKS if "conv" not in name},
    Source.ONE_EXAMPLE: COUPLED,
    Source.T6: {name for name in NETWORKS if "conv" not in name},
    Source.T9: {"no bias"},
    Source.T10: set(NETWORKS) - HOMOGENEOUS,
    Source.T12: set(NETWORKS) - HOMOGENEOUS,
}
# On problems of their own: the network plays no part, or hardly any.
RATES = {Source.THEOREM_1, Source.T14, Source.T15}
ELSEWHERE = RATES | {Source.T13, Source.PROP_5, Source.PROP_6}


# What a second hidden layer may change; the rest of it is that of one.
SEVERAL_LAYERS = {Source.THEOREM_3, Source.PROP_7, Source.T9, Source.T10, Source.T11, Source.T12, Source.T16}


@functools.cache
def problem_of(name: str) -> Problem:
    """One for all statements, which share rows, factors and orbits as in `check_theory`."""
    return Problem((NETWORKS | AWKWARD)[name]())


def tried(statement: Statement, name: str) -> bool:
    if statement.source in ELSEWHERE:
        return name == "relu"
    # "conv" is "conv, circular" without padding.
    return name != "conv" and (name != "deep" or statement.source in SEVERAL_LAYERS)


@pytest.mark.parametrize(
    ("statement", "name"),
    [(one, name) for name in NETWORKS for one in STATEMENTS if tried(one, name)],
    ids=lambda part: part if isinstance(part, str) else part.source,
)
def test_statements_hold_or_do_not_apply(statement: Statement, name: str) -> None:
    found = checks(statement, problem_of(name))
    for check in found:
        assert check.holds is not False, str(check)
        assert "could not be tried" not in check.reason, str(check)
    if name not in EXCEPT.get(statement.source, ()):
        assert any(check.holds for check in found), [str(check) for check in found]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in COSTLY else []) for name in AWKWARD]
)
def test_no_wrong_verdict_in_awkward_places(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of T13 what the network plays a part in.
    monkeypatch.setattr(spectra, "_factor_and_gram", lambda g: [])
    monkeypatch.setattr(spectra, "_product", lambda g: [])
    for statement in STATEMENTS:
        if statement.source not in ELSEWHERE - {Source.T13}:
            wrong = [str(check) for check in statement(problem_of(name)) if check.holds is False]
            assert not wrong


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("a layer that runs twice", "Prop. 2", "the layer runs 2 times"),
        ("a layer that runs twice", "T1'", "the layer runs 2 times"),
        ("a layer that runs twice", "T9", "the layer runs 2 times"),
        ("on a kink", "Theorem 3", "lie exactly on a kink"),
        ("on a kink", "T9", "lie exactly on a kink"),
        ("a saturated softmax", "T1'", "the softmax is saturated"),
        ("a loader that shuffles", "T9", "3 batches: live statistics are those of one"),
        ("a loader that shuffles", "T16", "no factor"),
        ("a loss that is not convex", "T12", "not convex in the outputs"),
        ("a loss without curvature", "T11", "the Gauss-Newton matrix is zero"),
    ],
)
def test_reasons(name: str, number: str, words: str) -> None:
    reasons = [check.reason for check in checks(source(number), problem_of(name)) if check.holds is None]
    assert any(words in reason for reason in reasons), reasons


def source(name: str) -> Statement:
    return next(s for s in STATEMENTS if s.source.names[0] == name)


def test_the_counter_example_of_centering_is_recognized() -> None:
    """`H = [[10, 3], [-10, 3]]`: 3.16 becomes 10. Its constant feature is set aside; what is left is conditioned."""
    from bnp_analysis.theory.statements.conditioning import Inputs
    from bnp_analysis.theory.statements.setting import NotApplicable, extended, singular

    H = torch.tensor([[10.0, 3.0], [-10.0, 3.0]], dtype=torch.float64)
    whole = Inputs(H, 0)
    assert singular(extended(whole.centered, True)).value > 3 * whole.raw.value
    with pytest.raises(NotApplicable, match="rank 2 of 3 columns"):
        whole.require_full_rank()
    Inputs(H[:, :1], 1).require_full_rank()


def test_too_few_rows_are_named_where_the_statement_needs_rank() -> None:
    lines = [check for check in checks(source("Theorem 4"), relu(5)) if check.statement.startswith("centering")]
    assert [check.holds for check in lines] == [None, None]
    assert "rank 5 of 7 columns (5 rows" in lines[0].reason


def test_a_point_on_a_kink_is_refused() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].weight[2] = 0
        model[0].bias[2] = 0
    risk = relu().at(model.state_dict())
    for name in ("T1'", "T10", "T12"):
        found = checks(source(name), risk)
        assert all(check.holds is None for check in found)
        assert "60 pre-activations lie exactly on a kink" in found[0].reason
    assert any("kink" in check.reason for check in checks(source("T11"), risk))


def test_smooth_activations_are_named_with_the_size_of_the_difference() -> None:
    found = checks(source("T1'"), NETWORKS["tanh"]())
    assert "tanh" in found[0].reason
    assert "differ by" in found[0].reason


@pytest.mark.parametrize(("q", "holds"), [("paper", True), ("measured", None), (2.0, True)])
def test_the_rows_of_bnp_follow_the_rule_of_its_q(q: str | float, holds: bool | None) -> None:
    import bnp_analysis as bnp

    risk = NETWORKS["conv"]()  # more rows than examples
    found = source("Theorem 3")(risk, bnp.bnp_preconditioner(risk, q=q))
    rows = [check for check in found if "the rows of H^ P" in check.statement]
    assert [check.holds for check in rows] == [holds, holds]
    assert all(("q is measured: T8" in check.reason) is (holds is None) for check in rows)


def test_a_network_of_one_block_has_no_blocks_to_whiten() -> None:
    from theory_check_problems import inputs, risk_of

    found = checks(source("T16"), risk_of(lambda: nn.Sequential(nn.Linear(6, 3)), inputs(30, 6)))
    assert [check.reason for check in found if check.holds is None] == ["a single block"]
    assert [check.holds for check in found] == [None, True]


def test_a_factor_that_is_too_large_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    from bnp_analysis.theory.statements import setting

    monkeypatch.setattr(setting, "FACTOR_LIMIT", 100)
    found = checks(source("T16"), relu(5))
    assert any("the dense factor is 15 x 53, more than 100 numbers" in check.reason for check in found)


def test_too_few_steps_for_a_bound_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "_STEPS", 5)
    monkeypatch.setattr(spectra, "_CHANCE", 1e-9)
    found = checks(source("T13"), relu())
    assert any("5 steps are too few for a bound in dimension " in check.reason for check in found)


def test_a_lanczos_run_without_a_bound_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    original = spectra.condition_number

    def unknown(A: Any, **options: Any) -> Any:
        found = original(A, **options)
        return dataclasses.replace(found, lower=math.nan, note="too flat") if "method" in options else found

    monkeypatch.setattr(spectra, "condition_number", unknown)
    (check,) = spectra._ritz(Problem(relu()))
    assert check.holds is None
    assert check.reason == "no bound was issued: too flat"


def test_an_orbit_keeps_its_rank() -> None:
    problem = Problem(relu())
    curve = symmetry.orbit_curve(problem.risk, symmetry.scalings(problem)[0], (0.5, 2.0))
    rank = int(torch.linalg.matrix_rank(problem.factor))
    assert curve.ranks == {name: [rank, rank] for name in curve.observed}


def test_orbits_are_studied_on_a_part_of_many_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetry, "_ROWS", 30)
    assert symmetry._studied(Problem(relu()))[0].batches.total == 10
    assert symmetry._studied(Problem(relu(7)))[0].batches.total == 7


def test_an_eigenvalue_that_is_hardly_known_gives_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(symmetry, "_KNOWN", 1e-18)
    found = [check for check in checks(source("T12"), relu()) if check.statement.startswith(symmetry._KAPPA)]
    assert found
    assert all(check.holds is None for check in found)
    assert all("the smallest eigenvalue is known only to" in check.reason for check in found)


def test_large_problems_name_their_size() -> None:
    risk = relu()
    small = [one for one in STATEMENTS if one.source not in ELSEWHERE]
    found = {check.statement: check for s in small for check in s(Problem(risk, limit=25))}
    sizes = [check.reason for check in found.values() if "takes up to 25" in check.reason]
    assert any("53 parameters" in reason for reason in sizes)
    assert any("35 parameters" in reason for reason in sizes), "the first layer alone"
    kept = [check for check in found.values() if check.holds]
    assert any("[2]" in check.statement and check.source == "T11" for check in kept), "the layer that fits is tried"
    assert all(check.holds is not False for check in found.values())


def test_single_precision_is_refused() -> None:
    risk = relu().to(torch.float32)
    for statement in STATEMENTS:
        (check,) = statement(risk)
        assert check.holds is None
        assert "float32" in check.reason


def test_a_network_without_covered_layers() -> None:
    model = nn.Sequential(nn.Embedding(7, 3)).double()
    import bnp_analysis as bnp

    x, y = torch.arange(7), torch.arange(7) % 3
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y))
    for name in ("Prop. 2", "Theorem 3", "Algorithm 2", "T5", "T7", "T8", "Prop. 7", "T9"):
        (check,) = source(name)(risk)
        assert check.holds is None
        assert "no covered layer (0.weight: covered where it is asked for, also=[Embedding])" in check.reason


def test_a_layer_that_is_reused_is_not_covered() -> None:
    import bnp_analysis as bnp

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(x)))

    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = Twice().double()
    x = torch.rand(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, torch.arange(9) % 3))
    (check,) = source("Theorem 3")(risk)
    assert "tied" in check.reason
    (found,) = (c for c in checks(source("T11"), risk) if "explained" in c.statement)
    assert found.holds, "the null space needs no covered layer"


def _at_scale(size: float, loss: Callable[..., Tensor] = nn.functional.mse_loss) -> bnp.EmpiricalRisk:
    model = bnp.models.mlp([4, 5, 3], dtype=torch.float64)
    return bnp.EmpiricalRisk(model, loss, (size * inputs(20, 4), inputs(20, 3, seed=1)))


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        ("T4", 1e150, "mixture of all rows"),
        ("T5", 1e-150, "its q^2"),
        ("Algorithm 2", 1e-20, "does not see a per-feature map"),
    ],
)
def test_verdicts_do_not_depend_on_the_size_of_the_inputs(name: str, size: float, words: str) -> None:
    found = checks(source(name), _at_scale(size))
    assert any(check.holds and words in check.statement for check in found), [str(check) for check in found]
    assert not [str(check) for check in found if check.holds is False]


def test_a_shift_that_large_targets_hide_is_no_symmetry() -> None:
    found = checks(source("T11"), _at_scale(1.0, lambda z, y: nn.functional.mse_loss(z, 1e150 * y)))
    assert not [str(check) for check in found if check.holds is False]


def test_what_leaves_the_floats_is_no_error() -> None:
    found = checks(source("T11"), _at_scale(1.0, lambda z, y: 0 * (z * y).sum(dim=1).mean()))
    assert any("the Hessian is zero" in check.reason for check in found)

    def beyond() -> Iterator[Check]:
        yield refused("", f"{1e200**2}")

    assert [check.holds for check in attempted("", beyond())] == [None]


@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_distances_of_all_sizes(size: float) -> None:
    one = size * torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert distance(one, one) == 0
    assert distance(2 * one, one) == pytest.approx(1.0)
    assert distance(one, 0 * one) == math.inf
    assert distance(one / 0, one) == math.inf
    assert distance(0 * one, 0 * one) == 0
    with pytest.raises(NotApplicable, match="range of floats"):
        distance(one, one / 0)


def test_rounding_that_large_means_amplify_gives_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bnp.models.mlp([4, 3], dtype=torch.float64)
    risk = bnp.EmpiricalRisk(model, nn.functional.mse_loss, (1e6 + inputs(20, 4), inputs(20, 3, seed=1)))
    found = checks(source("Algorithm 2"), risk)
    assert any("leave" in check.reason and "to rounding" in check.reason for check in found)
    assert not [str(check) for check in found if check.holds is False]
    # More than rounding fails here too.
    monkeypatch.setattr(layer_statements, "_formula", lambda g, *rest: 1e6 * g)
    assert [check for check in checks(source("Algorithm 2"), risk) if check.holds is False]


def test_condition_numbers_that_rounding_hides_give_no_verdict() -> None:
    # Five inputs of rank four, to rounding.
    model = bnp.models.mlp([4, 5, 3], activation="identity", dtype=torch.float64, seed=2)
    risk = bnp.EmpiricalRisk(model, nn.functional.mse_loss, (1e4 + inputs(20, 4), inputs(20, 3, seed=1)))
    assert not [str(check) for check in checks(source("Prop. 11"), risk) if check.holds is False]
