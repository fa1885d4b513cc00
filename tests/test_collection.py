"""Catches: folders of tests that run alone and all together, but not two of them in one call; two helpers of one name,
of which the second folder would silently import the first's."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


@pytest.mark.slow
def test_folders_with_fixtures_of_their_own_can_be_named_together() -> None:
    folders = [path.parent for path in sorted(TESTS.glob("*/conftest.py"), reverse=True)]
    assert len(folders) > 1
    smallest = [min(folder.glob("test_*.py"), key=lambda path: path.stat().st_size) for folder in folders]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider", *map(str, smallest)]
    run = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout


def test_no_two_modules_share_a_name() -> None:
    names = Counter(path.name for path in TESTS.rglob("*.py"))
    assert [name for name, count in names.items() if count > 1] == ["conftest.py"]
