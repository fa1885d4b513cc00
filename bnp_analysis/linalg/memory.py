"""Memory is estimated before a computation starts, never found out by being killed."""

from __future__ import annotations

import os
from pathlib import Path

from bnp_analysis.errors import MemoryLimitError


def available_memory() -> int:
    """Bytes of memory that a computation on the host may still take; its share, where torchrun started several here.

    Example:
        >>> available_memory() > 0
        True
    """
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // sharers
    # Not Linux: half of what is built in.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // sharers


def require_memory(needed: int, what: str, advice: str = "") -> None:
    """Refuse what would take more than the available memory.

    Raises:
        MemoryLimitError: says how much is needed, how much there is, and the ways out.
    """
    free = available_memory()
    if needed > free:
        raise MemoryLimitError(
            f"{what} needs about {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are available. "
            + (advice or "Use fewer steps, fewer samples, a smaller block, or float32")
        )
