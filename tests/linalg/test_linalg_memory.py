"""Catches: a basis on an accelerator that is allowed by the host's memory, or refused for want of it; what torch holds
in reserve there taken for used. The device is a stand-in: nothing is computed on it. And refusals for lack of memory
where a cheaper method, or fewer steps, would have given an answer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import bnp_analysis as bnp
from bnp_analysis.errors import MemoryLimitError
from bnp_analysis.linalg import CallableOperator, SymmetricOperator, choose_method, lanczos, methods
from bnp_analysis.linalg.condition import lanczos as lanczos_method
from bnp_analysis.linalg.condition import methods as methods_module
from bnp_analysis.linalg.krylov.thick_restart import ThickRestart
from bnp_analysis.runtime import memory as memory_module
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
    assert {r.method for r in methods(here) if r.applies} - {r.method for r in methods(there) if r.applies} >= {"dense"}


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


N = 400
VALUES = 0.98 ** torch.arange(N, dtype=torch.float64)


def small_memory(monkeypatch: pytest.MonkeyPatch, vectors: int) -> SymmetricOperator:
    """An operator without a matrix, and memory for so many vectors of its length."""
    free = vectors * 8 * N
    for module in (memory_module, lanczos_method, methods_module):
        monkeypatch.setattr(module, "available_memory", lambda *_: free)
    return CallableOperator(lambda v: VALUES * v, N, dtype=torch.float64)


@pytest.mark.parametrize(("vectors", "most"), [(1_900, 100), (700, 50), (320, 20)])
def test_a_profile_goes_for_as_many_ranks_as_memory_allows(
    vectors: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    A = small_memory(monkeypatch, vectors)
    found = bnp.condition_profile(A, method="lanczos")
    assert found.ranks[-1] == most
    truth = (VALUES[0] / VALUES).numpy()[found.ranks - 1]
    assert (found.lower <= truth * (1 + 1e-12)).all()
    assert (truth <= found.upper * (1 + 1e-12)).all()
    assert (found.stop == "memory") is (most < 100)
    assert ("lack of memory" in str(found)) is (most < 100)
    with pytest.raises(MemoryLimitError, match=r"\d+ vectors of length 400"):
        bnp.condition_profile(A, method="lanczos", ranks=[390])


def test_lanczos_takes_fewer_steps_where_memory_is_short_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    A = small_memory(monkeypatch, 100)
    found = bnp.condition_number(A, method="lanczos")
    assert "memory has room for 38 of 100 steps" in found.note
    assert found.lower <= float(VALUES[0] / VALUES[-1])
    with pytest.raises(MemoryLimitError, match="112 vectors"):
        bnp.condition_number(A, method="lanczos", steps=100)


def test_what_runs_out_of_memory_gives_way_to_the_next_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was free when the method was chosen may be taken when it begins."""
    dense = bnp.DenseOperator(torch.diag(VALUES))
    assert methods_module.automatic(dense).name == "dense"
    for module in (memory_module, lanczos_method):
        monkeypatch.setattr(module, "available_memory", lambda *_: 8 * 300 * N)
    for found in (bnp.condition_number(dense), bnp.condition_profile(dense)):
        assert found.method == "lanczos"
    with pytest.raises(MemoryLimitError, match="the dense 400 x 400 matrix"):
        bnp.condition_number(dense, method="dense")
