"""The sweeps behind the checks run, and what is recorded of them says what the documentation says.

Bugs that only this file catches: a benchmark script that no longer runs, and recorded numbers that contradict T10, T12
or T16.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script() -> Path:
    path = BENCHMARKS / "theory_checks.py"
    if not path.exists():
        pytest.skip("the benchmarks are not part of this installation")
    return path


def verify(record: dict[str, Any]) -> None:
    for orbit in record["orbits"]:
        assert all(orbit["rank_constant"].values()), orbit["problem"]
        assert max(orbit["worst_deviation"].values()) < 1e-6, orbit["problem"]
        assert orbit["spread"]["bnp, output scaling"] < 1e-6, "T10"
        assert orbit["spread"]["plain"] > 1e3, "orbits on which nothing happens are no evidence"
    assert all(row["verdict"] != "fails" for row in record["patches"])
    for row in record["scales"]:
        assert row["lower"] * (1 - 1e-9) <= row["|G^|^2/R"] <= row["upper"] * (1 + 1e-9), "T8"
    assert all(row["ratio to the bound"] <= 1 for row in record["blocks"]["random"] if "s" in row), "T16"
    assert all(row["holds"] for row in record["blocks"]["trained"])


@pytest.mark.slow
def test_a_part_of_the_sweeps_runs(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(script), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    verify(json.loads((tmp_path / "theory_checks.json").read_text()))
    assert "| 6-5-3, softmax, seed 0 | 1 | plain |" in (tmp_path / "theory_checks.md").read_text()


def test_the_recorded_sweeps_keep_the_claims(script: Path) -> None:
    record = json.loads((script.parent / "results" / "theory_checks.json").read_text())
    verify(record)
    assert len([row for row in record["blocks"]["random"] if "s" in row]) == 100
    assert len({row["case"] for row in record["blocks"]["trained"]}) == 5
    times = record["orbits"][0]["t"]
    assert (min(times), max(times)) == (1e-3, 1e3)
