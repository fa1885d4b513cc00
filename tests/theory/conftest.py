"""Checks of the theory on small parts of what they take by default."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _smaller(small_statements: None) -> None:
    """Every test here."""
