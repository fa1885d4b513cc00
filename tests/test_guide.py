"""The recipes of `docs/guide.md` run as they are printed, in order: a renamed option there is caught only here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import matplotlib
import pytest
import torch

from bnp_analysis.cli import main

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
matplotlib.use("Agg")


def test_every_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```(sh|python)\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) == TEXT.count("```") // 2 >= 12
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for kind, block in blocks:
            if kind == "python":
                exec(compile(block, "guide.md", "exec"), names)
                continue
            for line in block.splitlines():
                program, *arguments = shlex.split(line)
                assert program == "bnp-analysis"
                assert main([*arguments, *([] if "check" in arguments else ["--quiet"])]) == 0, line
    printed = capsys.readouterr().out
    for start in ("kappa* = ", "kappa* >= ", "kappa(A + 0.001 I) = "):
        assert start in printed


def test_links_lead_somewhere() -> None:
    for page in ("guide", "training", "paper_map", "theory", "architecture", "scaling"):
        text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
            assert (ROOT / "docs" / target).exists(), (page, target)


def test_the_words_of_a_line_are_explained() -> None:
    for word in ("two-sided", "one-sided:", "no bound:", "gap", "rank", "fails with probability"):
        assert word in TEXT
