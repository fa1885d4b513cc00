"""The benchmark of rates writes what it measures, says when a prediction is wrong, and keeps what it has.

Bugs that only this file catches: a benchmark that exits with 0 whatever it finds, a file that no JSON parser reads
because of infinities, an interrupt that loses the rows before it.
"""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bnp_analysis.theory.problems import linear_chain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _modules(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("the benchmarks are not part of this installation")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import convergence_rates

    # A smaller chain than that of the record.
    monkeypatch.setattr(convergence_rates, "linear_chain", partial(linear_chain, (4, 3, 2), n=60))


def strict(constant: str) -> Any:
    raise AssertionError(f"{constant} is not JSON")


def test_it_writes_what_it_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import convergence_rates

    assert convergence_rates.main(["--quick", "--only", "linear", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "convergence_rates.json").read_text(), parse_constant=strict)
    assert {row["method"] for row in record["rows"]} == {"gd", "heavy_ball", "bnp", "bnp_fixed"}
    for row in record["rows"]:
        assert row["verdict"] == "holds"
        assert row["low"] <= row["observed"] <= row["high"]
        assert row["null_dim"] == row["null_dim_known"]
        assert row["gradient_norms"][0] > row["gradient_norms"][-1]
    assert "4 of them within 3 %" in (tmp_path / "convergence_rates.md").read_text()


def test_it_says_that_a_prediction_is_wrong_and_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import convergence_rates

    true, seen = convergence_rates.measure, []

    def wrong_then_interrupted(case: Any, problem: Any) -> Any:
        if seen:
            raise KeyboardInterrupt
        seen.append(true(case, problem))
        return dataclasses.replace(seen[0], holds=False, observed=2 * seen[0].predicted)

    monkeypatch.setattr(convergence_rates, "measure", wrong_then_interrupted)
    assert convergence_rates.main(["--quick", "--only", "linear", "--out", str(tmp_path)]) == 1
    page = (tmp_path / "convergence_rates.md").read_text()
    assert "interrupted after 1 of" in page
    assert "**fails**" in page


def test_the_recorded_results_hold() -> None:
    """What the repository shows was measured, and nothing in it failed."""
    record = json.loads((ROOT / "benchmarks" / "results" / "convergence_rates.json").read_text(), parse_constant=strict)
    rates = [row for row in record["rows"] if row["group"] == "rates"]
    seen = [row for row in rates if row["outcome"] == "observed"]
    assert len(seen) >= 30
    assert all(abs(row["observed"] / row["predicted"] - 1) <= 0.03 for row in seen)
    assert min(row["kappa"] for row in seen) <= 5
    assert max(row["kappa"] for row in seen) >= 0.99e4
    assert {row["kind"] for row in seen} == {"dense", "convolutional"}
    assert all(row["verdict"] != "fails" for row in record["rows"])
