"""Two starts of two processes for all of the tests: starting them takes longer than what they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from distributed_jobs import found, start


@pytest.fixture(scope="session")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[tuple[int, str]], Path]:
    """A run whose second process is killed after 65 steps, and the folder in which it kept its state."""
    folder = tmp_path_factory.mktemp("two_processes")
    return start("killed", folder, KILL_AT="65"), folder


@pytest.fixture(scope="session")
def two(killed: tuple[list[tuple[int, str]], Path]) -> list[Any]:
    """What each of two processes found: the killed run resumed, measurements, errors, a run that nothing disturbed."""
    folder = killed[1]
    for status, output in start("measure", folder):
        assert status == 0, output
    return found("measure", folder)
