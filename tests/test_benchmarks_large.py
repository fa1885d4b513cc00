"""Catches: a run over large models that computes anew what it had done, or goes on with other settings' numbers; a part
that the package refuses and that ends the run; a row of the table that finds no part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bnp_analysis.errors import MemoryLimitError

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not part of this installation")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import large_models

    small = {name: sizes for name, sizes in large_models.QUICK.items() if name == "transformer"}
    for name, value in {"QUICK": small, "PRODUCTS": 2, "STEPS": 4, "PAIRS": 1}.items():
        monkeypatch.setattr(large_models, name, value)
    return large_models


def test_what_is_done_is_kept(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "large.md"
    real, calls = script.Case.density, []

    def cut_off(case: Any, P: Any, word: str) -> dict[str, Any]:
        calls.append(word)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(case, P, word)

    monkeypatch.setattr(script.Case, "density", cut_off)
    with pytest.raises(KeyboardInterrupt):
        script.main(["--quick", "--out", str(out)])
    first = json.loads(out.with_suffix(".json").read_text())["parts"]
    assert len(first) == 4  # products, eigenvalues, density, eigenvalues with P
    assert script.main(["--quick", "--out", str(out)]) == 0
    parts = json.loads(out.with_suffix(".json").read_text())["parts"]
    assert calls == ["", " with P", " with P"]
    assert {name: parts[name] for name in first} == first
    page = out.read_text()
    assert "products" in page
    assert "two-sided" in page
    assert list(tmp_path.glob("*.checkpoint")) == []


def test_a_refused_part_is_a_result(script: Any, tmp_path: Path) -> None:
    def refused() -> dict[str, Any]:
        raise MemoryLimitError("too large")

    store = script.Store(tmp_path / "a.json", {"quick": True})
    assert store.do("part", refused)["refused"] == "MemoryLimitError: too large"
    again = script.Store(tmp_path / "a.json", {"quick": True})
    assert "refused" in again.parts["part"]
    assert script.Store(tmp_path / "a.json", {"quick": False}).parts == {}
