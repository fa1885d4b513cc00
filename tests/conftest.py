"""What every test shares: random numbers by the name of the test, no display, reproducible property tests, fixtures."""

from __future__ import annotations

import gc
import os
import random
import signal
import zlib
from collections.abc import Generator
from typing import Any

os.environ["MPLBACKEND"] = "Agg"

import numpy as np
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


class RandomStates:
    """The global generators start every test and every fixture in a state of its own, made of its name.

    A layer without a generator draws from them. Were they left alone, its numbers would depend on the tests that ran
    before in the same process. Another `BNP_ANALYSIS_TEST_SALT` gives other numbers: a test must pass with any.
    """

    def _begin(self, name: str) -> None:
        seed = zlib.crc32(f"{name}{os.environ.get('BNP_ANALYSIS_TEST_SALT', '')}".encode())
        torch.default_generator.manual_seed(seed)  # `torch.manual_seed` also formats the stack, for devices not begun
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> None:
        self._begin(item.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> None:
        self._begin(fixturedef.argname)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # collections during the tests need not look at the thousands of tests themselves


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(RandomStates(), "random states")


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
def small_statements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks of the theory with fewer examples, random starts, scalings, steps and points: the same code, faster."""
    from bnp_analysis.theory.statements import conditioning, layers, rates, spectra, symmetry

    monkeypatch.setattr(layers, "_MOST_OFFSETS", 64)
    monkeypatch.setattr(conditioning, "_SEARCH", 20)
    monkeypatch.setattr(rates, "_WIDTHS", (4, 2, 2))
    monkeypatch.setattr(rates, "_KAPPA", 30.0)
    monkeypatch.setattr(rates, "_STEPS", 5)
    monkeypatch.setattr(spectra, "_STARTS", 12)
    monkeypatch.setattr(symmetry, "TIMES", (1e-3, 1e-1, 1.0, 1e3))
    monkeypatch.setattr(symmetry, "_ROWS", 300)


@pytest.fixture(scope="session")
def tanh_risk() -> Any:
    """30 examples, 4-5-3, cross-entropy."""
    import bnp_analysis as bnp

    g = torch.Generator().manual_seed(0)
    x = torch.randn(30, 4, generator=g, dtype=torch.float64)
    model = bnp.models.mlp([4, 5, 3], activation="tanh", dtype=torch.float64)
    return bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, torch.arange(30) % 3))


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator of its own for each test; pass it as ``generator=``, the global one stays alone."""
    return torch.Generator().manual_seed(20220823)
