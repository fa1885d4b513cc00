"""Catches: a basis on an accelerator that is allowed by the host's memory, or refused for want of it; what torch holds
in reserve there taken for used. The device is a stand-in: nothing is computed on it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bnp_analysis.errors import MemoryLimitError
from bnp_analysis.linalg import CallableOperator, choose_method, lanczos, routes
from bnp_analysis.linalg.krylov.thick_restart import ThickRestart
from bnp_analysis.runtime.memory import _within_control_groups, available_memory, require_memory

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


@pytest.mark.parametrize("run", [lambda A: lanczos(A, 10), search])
def test_a_basis_has_to_fit_where_it_lives(run: Callable[[CallableOperator], object], device: torch.device) -> None:
    with pytest.raises(MemoryLimitError, match="cuda:0"):
        run(CallableOperator(lambda v: v, 200, device=device))
    run(CallableOperator(lambda v: v, 200))


def test_routes_follow_the_memory_of_the_operator(device: torch.device) -> None:
    here, there = (CallableOperator(lambda v: v, 30, device=where) for where in ("cpu", device))
    assert (choose_method(here), choose_method(there)) == ("dense", "lanczos")
    assert {r.method for r in routes(here) if r.applies} - {r.method for r in routes(there) if r.applies} >= {"dense"}


def test_the_limits_of_a_container_count(tmp_path: Path) -> None:
    """A process in `/a/b`: the outer group leaves 1000 - 600 + 150 bytes, the inner one more, the root is unlimited."""
    for group, most, used, cache in (("a", "1000", 600, 150), ("a/b", "5000", 600, 0), (".", "max", 0, 0)):
        (tmp_path / group).mkdir(exist_ok=True)
        (tmp_path / group / "memory.max").write_text(f"{most}\n")
        (tmp_path / group / "memory.current").write_text(f"{used}\n")
        (tmp_path / group / "memory.stat").write_text(f"anon 3\ninactive_file {cache}\n")
    own = tmp_path / "cgroup"
    own.write_text("7:cpuset:/elsewhere\n0::/a/b\n")
    assert _within_control_groups(tmp_path, own) == 1000 - 600 + 150
    own.write_text("0::/not/there\n")
    assert _within_control_groups(tmp_path, own) == sys.maxsize
    (tmp_path / "memory" / "c").mkdir(parents=True)
    (tmp_path / "memory" / "c" / "memory.limit_in_bytes").write_text("900")
    (tmp_path / "memory" / "c" / "memory.usage_in_bytes").write_text("200")
    (tmp_path / "memory" / "c" / "memory.stat").write_text("")
    own.write_text("4:memory:/c\n")
    assert _within_control_groups(tmp_path, own) == 700
    # What the first version writes where there is no limit.
    (tmp_path / "memory" / "c" / "memory.limit_in_bytes").write_text(f"{2**63 - 4096}\n")
    assert _within_control_groups(tmp_path, own) == sys.maxsize
