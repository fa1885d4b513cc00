"""One start of two processes for most of the tests: starting them takes longer than what they do."""

from __future__ import annotations

from typing import Any

import pytest
from distributed_jobs import found, start


@pytest.fixture(scope="session")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of two processes found: measurements, errors, a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("measure")
    for status, output in start("measure", folder):
        assert status == 0, output
    return found("measure", folder)
