"""Catches: a basis on an accelerator that is allowed by the host's memory, or refused for want of it; what torch holds
in reserve there taken for used. The device is a stand-in: nothing is computed on it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bnp_analysis.errors import MemoryLimitError
from bnp_analysis.linalg import CallableOperator, block_lanczos, choose_route, lanczos, routes
from bnp_analysis.linalg.krylov.thick_restart import ThickRestart
from bnp_analysis.linalg.memory import available_memory, require_memory

FREE = 3_000


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device with 2500 bytes free and 500 of torch's 800 in reserve, beside a host with a terabyte."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2_500, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 800)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    return torch.device("cuda", 0)


def test_the_device_is_asked_about_itself(device: torch.device) -> None:
    assert available_memory(device) == FREE
    assert available_memory(torch.device("cpu")) > 10**6
    require_memory(FREE, "what fits", device=device)
    with pytest.raises(MemoryLimitError, match=r"on cuda:0\..*on_host"):
        require_memory(FREE + 1, "what does not", device=device)
    with pytest.raises(MemoryLimitError, match=r"on cuda:0\. Use less$"):
        require_memory(FREE + 1, "what does not", "Use less", device=device)


def search(A: CallableOperator) -> ThickRestart:
    return ThickRestart(A, torch.zeros(A.dim, 0), 3, "largest", 1e-3, 0)


@pytest.mark.parametrize("run", [lambda A: lanczos(A, 10), lambda A: block_lanczos(A, 5), search])
def test_a_basis_has_to_fit_where_it_lives(run: Callable[[CallableOperator], object], device: torch.device) -> None:
    with pytest.raises(MemoryLimitError, match="cuda:0"):
        run(CallableOperator(lambda v: v, 200, device=device))
    run(CallableOperator(lambda v: v, 200))


def test_routes_follow_the_memory_of_the_operator(device: torch.device) -> None:
    here, there = (CallableOperator(lambda v: v, 30, device=where) for where in ("cpu", device))
    assert (choose_route(here), choose_route(there)) == ("dense", "lanczos")
    assert {r.method for r in routes(here) if r.applies} - {r.method for r in routes(there) if r.applies} >= {"dense"}
