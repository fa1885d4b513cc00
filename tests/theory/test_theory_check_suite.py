"""`check_theory`: which statements run, what an interruption leaves, and that measuring changes nothing.

Bugs that only this file catches: an interruption that loses the checks made, a time limit that is not kept or not said,
a table that cannot be saved because a detail is no data, verdicts that depend on anything but the seed.
"""

from __future__ import annotations

import pytest
import torch
from theory_check_problems import NETWORKS, relu
from torch import nn

import bnp_analysis as bnp
from bnp_analysis.theory import statements as suite
from bnp_analysis.theory.check import Source, named
from bnp_analysis.theory.statements.setting import Problem, statement

# On problems of their own, and tried in the tests of the statements.
RATES = {Source.THEOREM_1, Source.T14, Source.T15}
QUICK = ["Prop. 2", "T3", "T4", "T7", "T8", "T11"]


def test_everything_over_one_risk(tmp_path, monkeypatch) -> None:
    seen: list[bnp.theory.Check] = []
    steps: list[tuple[int, int]] = []
    monkeypatch.setattr(suite, "STATEMENTS", [one for one in suite.STATEMENTS if one.source not in RATES])
    table = bnp.check_theory(relu(), report=seen.append, progress=lambda done, total: steps.append((done, total)))
    assert table.holds
    assert table.stop == "done"
    assert tuple(seen) == table.checks
    assert steps[-1] == (len(suite.STATEMENTS), len(suite.STATEMENTS))
    assert {check.source for check in table.checks} == set(Source) - RATES
    assert bnp.theory.CheckTable.load(table.save(tmp_path / "table.json")) == table
    assert all(check.hypotheses or check.details or check.holds is None for check in table.checks[:3])


def test_the_seed_decides() -> None:
    tables = [bnp.check_theory(relu(), only=["T3", "T4", "T16"], seed=seed) for seed in (0, 0, 1)]
    assert tables[0] == tables[1]
    assert tables[0] != tables[2]
    assert tables[2].holds


def test_single_precision_is_measured_in_double_unless_told_otherwise() -> None:
    risk = relu().to(torch.float32)
    assert bnp.check_theory(risk, only=QUICK).holds
    refused = bnp.check_theory(risk, only=QUICK, dtype=None)
    assert not refused.holds
    assert not refused.failed
    assert all("float32" in check.reason for check in refused.checks)


def test_a_given_preconditioner_is_the_one_that_is_checked() -> None:
    risk = relu()
    for P in (bnp.kfac_preconditioner(risk), bnp.diagonal_preconditioner(risk), bnp.identity_preconditioner(risk)):
        table = bnp.check_theory(risk, preconditioner=P, only=["T2", "T16"])
        assert table.holds, [str(check) for check in table.checks]
        rows = [check for check in table.checks if "G^ / q" in check.statement]
        assert all("not BNP's" in check.reason for check in rows)
    damped = bnp.check_theory(risk, preconditioner=bnp.bnp_preconditioner(risk, eps1=1e-2, eps2=1e-4), only=["T2"])
    assert damped.holds, "the rows of a damped BNP follow its own settings"
    assert sum("G^ / q" in check.statement and check.holds is True for check in damped.checks) == 2


def test_an_interruption_keeps_the_checks_made(monkeypatch) -> None:
    @statement(Source.THEOREM_3, "interrupted")
    def interrupted(problem: Problem):
        yield bnp.theory.Check.compare("made before", Source.THEOREM_3, observed=1.0, predicted=1.0, tolerance=0.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "STATEMENTS", (suite.STATEMENTS[1], interrupted, suite.STATEMENTS[-1]))
    table = bnp.check_theory(relu())
    assert [check.source for check in table.checks] == ["Prop. 2 (T1)"] * 6 + ["Theorem 3 (T2)"]
    assert table.stop == "interrupted in Theorem 3 (T2); not finished: Theorem 3 (T2), T16"
    assert table.stop in str(table)


def test_the_time_limit_is_kept_and_said() -> None:
    table = bnp.check_theory(relu(), time_limit=0.0)
    assert table.checks == ()
    assert not table.holds
    assert table.stop.startswith("stopped after 0 s; not tried: Theorem 1 (T14), Prop. 2 (T1), Theorem 3")


def test_unknown_statements_are_refused() -> None:
    for only in (["T99"], []):
        with pytest.raises(bnp.errors.InvalidInputError, match=r"there are: Theorem 1 \(T14\), Prop\. 2"):
            bnp.check_theory(relu(), only=only)


def test_every_spelling_of_a_name() -> None:
    for spelling in ("Prop. 10", "prop10", "Proposition 10", "PROP-10", "Prop. 10 (T6)"):
        assert named([spelling]) == {Source.PROP_10}
    assert named(["T7"]) == {Source.THEOREM_4, Source.PROP_11, Source.T7}
    assert named(["T1"]) == {Source.PROP_2, Source.PROP_9}, "not Theorem 1"
    assert named(["lemma 8", "eq. 8", "algorithm3"]) == {Source.PROP_9, Source.THEOREM_3, Source.ALGORITHM_2}
    table = bnp.check_theory(relu(), only=["theorem 4", "T4"])
    assert {check.source for check in table.checks} == {"Theorem 4 (T7)", "T4"}


def test_every_statement_has_one_check_and_every_name_one_meaning() -> None:
    assert [one.source for one in suite.STATEMENTS if one.source not in set(Source)] == []
    assert sorted(one.source for one in suite.STATEMENTS) == sorted(Source)
    paper = [name for source in Source for name in source.names if not name.startswith("T") or "heorem" in name]
    assert len(set(paper)) == len(paper)
    numbers = {name for source in Source for name in source.names} & {f"T{i}" for i in range(1, 17)}
    assert len(numbers) == 16
    assert all(source.page for source in Source if not source.startswith("T") or "heorem" in source)


def test_a_failing_check_fails_the_table() -> None:
    class Wrong(bnp.linalg.DensePreconditioner):
        def _rmatmat(self, y: torch.Tensor) -> torch.Tensor:
            return self._matmat(y)

    risk = relu()
    table = bnp.check_theory(risk, preconditioner=Wrong(bnp.bnp_preconditioner(risk).to_dense()), only=["T2"])
    assert not table.holds
    assert table.failed


def test_nothing_is_changed() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).double()
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, torch.arange(30) % 3))
    theta, state = risk.theta.clone(), torch.random.get_rng_state()
    bnp.check_theory(risk, only=[source for source in Source if source not in RATES])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(risk.theta, theta)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.training


def test_a_bare_layer_has_a_name_in_the_table() -> None:
    risk = NETWORKS["bare"]()
    table = bnp.check_theory(risk, only=["T9", "T10", "T12"])
    assert table.holds
    assert {check.source for check in table.checks if check.holds is None} == {"T10", "T12"}
