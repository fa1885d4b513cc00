"""Memory is estimated before a computation starts, never found out by being killed."""

from __future__ import annotations

import os
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
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024 // sharers
    # Not Linux: half of what is built in.
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // sharers


def require_memory(needed: int, what: str, advice: str = "", *, device: torch.device | None = None) -> None:
    """Refuse what would take more than the available memory of a device, or of the host.

    Raises:
        MemoryLimitError: says how much is needed, how much there is, and the ways out.
    """
    free = available_memory(device)
    where = "" if device is None or device.type == "cpu" else f" on {device}"
    if needed > free:
        raise MemoryLimitError(
            f"{what} needs about {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are available{where}. "
            + (advice or "Use fewer steps, fewer samples, a smaller block, or float32")
            + ("; linalg.on_host(A) keeps the vectors of a Krylov run in host memory" if where and not advice else "")
        )
