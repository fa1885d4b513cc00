"""The loops of `docs/training.md` run as they are printed; a renamed option or method there is caught only here."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import bnp_analysis
from bnp_analysis.training.bnp import BNP
from bnp_analysis.training.bnp.settings import Settings

PAGE = Path(__file__).resolve().parents[2] / "docs" / "training.md"


def test_the_loops_run(monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.setattr(bnp_analysis, "BNP", BNP, raising=False)
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)
    assert torch.isfinite(names["loss"])  # type: ignore[arg-type]


def test_the_table_has_every_option() -> None:
    text = PAGE.read_text(encoding="utf-8")
    options = [f.name for f in fields(Settings)] + ["include", "exclude"]
    rows = "\n".join(line for line in text.splitlines() if line.startswith("| `"))
    assert [name for name in options if f"`{name}`" not in rows] == []
