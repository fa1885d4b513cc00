"""Fixtures and settings that every test shares: no global seed, no display, reproducible property tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from typing import Any

os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch
from _pytest.doctest import DoctestModule
from hypothesis import HealthCheck, settings

settings.register_profile(
    "bnp",
    deadline=None,
    derandomize=True,
    max_examples=12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("bnp")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # so a shell starts its background jobs
    signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)  # sums add up in the same order on every machine, and workers do not compete


@pytest.hookimpl(wrapper=True)
def pytest_collect_file() -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """There are no doctests in this folder, and to look for them takes a tenth of the collection."""
    return [found for found in (yield) if not isinstance(found, DoctestModule)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several workers get whole files, so that what a file's tests share is made once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator of its own for each test; pass it as ``generator=``, the global one stays alone."""
    return torch.Generator().manual_seed(20220823)
