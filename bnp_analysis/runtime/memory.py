"""Memory estimates, checked before a computation starts."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

from bnp_analysis.errors import MemoryLimitError


def available_memory(device: torch.device | None = None) -> int:
    """Bytes of memory that a computation may still take: of a CUDA device its own, else of the host.

    Of the host it is a share, where torchrun started several processes here; on a device what torch holds in reserve
    counts as free.

    Example:
        >>> available_memory() > 0
        True
    """
    if device is not None and device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserve
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with suppress(OSError), open("/proc/meminfo", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, _within_control_groups()) // sharers
    # Not Linux: half of what is built in.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // sharers


def _within_control_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """What the limits of a container leave: the least over this process's control groups, file caches being free."""
    try:
        return min((_left(*group) for group in _limited(root, own.read_text())), default=sys.maxsize)
    except OSError:
        return sys.maxsize


@cache
def _limited(root: Path, own: str) -> list[tuple[Path, str, str]]:
    """The control groups that have a limit of memory, and the names of their files; most on the way have none."""
    found = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, names = (root, ("max", "current")) if not controllers else (root / "memory", _FIRST_VERSION)
        inside = [top / path.lstrip("/"), *(top / path.lstrip("/")).parents]
        inside = inside[: inside.index(top) + 1]
        found += [(group, *names) for group in inside if (group / f"memory.{names[0]}").exists()]
    return found


_FIRST_VERSION = ("limit_in_bytes", "usage_in_bytes")
_NO_LIMIT = 2**62


def _left(group: Path, limit: str, used: str) -> int:
    try:
        most = (group / f"memory.{limit}").read_text().strip()
        # The first version says "no limit" by the largest number of pages, and its statistics are slow to read.
        if most == "max" or int(most) >= _NO_LIMIT:
            return sys.maxsize
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, int(most) - int((group / f"memory.{used}").read_text()) + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return sys.maxsize


def require_memory(needed: int, what: str, advice: str = "", *, device: torch.device | None = None) -> None:
    """Refuse what would take more than the available memory of a device, or of the host.

    Raises:
        MemoryLimitError: says how much is needed, how much there is, and the ways out.
    """
    free = available_memory(device)
    where = "" if device is None or device.type == "cpu" else f" on {device}"
    if needed > free:
        raise MemoryLimitError(
            f"{what} would take about {needed / 2**30:.3g} GiB, {free / 2**30:.3g} GiB are available{where}. "
            + (advice or "Use fewer steps, fewer samples, a smaller block, or float32")
            + ("; linalg.on_host(A) keeps the vectors of a Krylov run in host memory" if where and not advice else "")
        )


def peak_memory(device: str, *, reset: bool = False) -> float:
    """The largest memory so far in MB; with `reset` from now on, where the system can forget the past."""
    if device.startswith("cuda"):
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    # ru_maxrss would count what the parent had when it started this process.
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**10
