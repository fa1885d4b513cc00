"""A check's verdict follows from its numbers, and survives a file.

Bugs that only this file catches: NaN that passes as agreement, an inequality tested in the wrong direction, a table
that says *holds* when nothing applied.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnp_analysis.errors import InvalidInputError
from bnp_analysis.theory import Check, CheckTable


def verdict(observed: float, relation: str, predicted: float, tolerance: float = 0.01) -> bool | None:
    return Check.compare(
        "a law", "T0", observed=observed, predicted=predicted, tolerance=tolerance, relation=relation
    ).holds


@pytest.mark.parametrize(
    ("observed", "relation", "predicted", "expected"),
    [
        (1.0, "=", 1.0, True),
        (1.009, "=", 1.0, True),
        (1.02, "=", 1.0, False),
        (-1.0, "=", 1.0, False),
        (0.0, "=", 0.0, True),
        (1e-30, "=", 0.0, False),
        (2.0, "<=", 1.0, False),
        (1.005, "<=", 1.0, True),
        (-5.0, "<=", 1.0, True),
        (2.0, ">=", 1.0, True),
        (0.5, ">=", 1.0, False),
        (math.inf, "=", math.inf, True),
        (math.inf, "<=", 1.0, False),
        (1.0, "<=", math.inf, True),
        (1.0, ">=", math.inf, False),
    ],
)
def test_the_verdict_follows_from_the_numbers(observed: float, relation: str, predicted: float, expected: bool) -> None:
    assert verdict(observed, relation, predicted) is expected


@given(relation=st.sampled_from(["=", "<=", ">="]), other=st.floats(allow_nan=True))
def test_nan_never_agrees(relation: str, other: float) -> None:
    assert verdict(math.nan, relation, other) is False
    assert verdict(other, relation, math.nan) is False


@given(
    a=st.floats(-1e6, 1e6),
    b=st.floats(-1e6, 1e6),
    scale=st.sampled_from([2.0**-60, 2.0**60]),
    tolerance=st.floats(0, 1),
)
def test_the_verdict_is_relative(a: float, b: float, scale: float, tolerance: float) -> None:
    for relation in ("=", "<=", ">="):
        assert verdict(a, relation, b, tolerance) == verdict(scale * a, relation, scale * b, tolerance)


def test_a_table_needs_one_check_that_applies(tmp_path: Path) -> None:
    good = Check.compare("a law", "T1", observed=1.0, predicted=1.0, tolerance=0.1, hypotheses={"smooth": True})
    bad = Check.compare("a law", "T1", observed=2.0, predicted=1.0, tolerance=0.1)
    absent = Check.not_applicable("a law", "T2", "float32")
    assert CheckTable(checks=(good, absent)).holds
    assert not CheckTable(checks=(absent,)).holds
    table = CheckTable(checks=(good, bad, absent))
    assert not table.holds
    assert table.failed == (bad,)
    assert table.summary() == "1 hold, 1 fail, 1 not applicable"
    assert str(table).splitlines() == [str(good), str(bad), str(absent), table.summary()]
    assert CheckTable.load(table.save(tmp_path / "table.json")) == table


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="relation must be one of"):
        verdict(1.0, "<", 1.0)
    with pytest.raises(InvalidInputError, match="tolerance not negative"):
        verdict(1.0, "=", 1.0, -1.0)
    with pytest.raises(InvalidInputError, match="needs a reason"):
        Check.not_applicable("a law", "T1", "")
