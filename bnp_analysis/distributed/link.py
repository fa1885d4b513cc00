"""Communication of tensors between processes, with errors that name a lost rank."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from bnp_analysis.errors import DistributedError

# Seconds for the others to say that they are still there, once something is lost.
_GRACE = 3.0
_NUMBER = itertools.count()


class Link:
    """Collective operations over all processes of `torch.distributed`, each ended after `timeout` seconds.

    What is exchanged on the host goes through a gloo group of its own, whatever the default backend: a process that
    is gone or late is found there, before a kernel on a GPU waits for it.

    Args:
        timeout: seconds.
        owns: whether closing it also ends `torch.distributed`.
    """

    def __init__(self, timeout: float, *, owns: bool) -> None:
        self.rank, self.size, self.timeout = dist.get_rank(), dist.get_world_size(), timeout
        self._owns, self._step, self._lost = owns, 0, ""
        self._key = f"bnp_analysis/{next(_NUMBER)}"
        limit = timedelta(seconds=timeout)
        self._groups: dict[str, dist.ProcessGroup] = {}
        with self._watched("the first meeting"):
            self._groups["cpu"] = dist.new_group(backend="gloo", timeout=limit)
            if torch.cuda.is_available() and "nccl" in dist.get_backend_config():
                self._groups["cuda"] = dist.new_group(backend="nccl", timeout=limit)

    def all_gather(self, t: Tensor, what: str) -> list[Tensor]:
        """The tensors of all processes, in the order of ranks; of one shape."""
        found = [torch.empty_like(t) for _ in range(self.size)]
        with self._watched(what):
            dist.all_gather(found, t.contiguous(), group=self._group(t))
        return found

    def all_gather_rows(self, t: Tensor, rows: list[int], what: str) -> list[Tensor]:
        """The same, for tensors with different numbers of rows."""
        if t.shape[0] < max(rows):
            t = torch.cat([t, t.new_zeros(max(rows) - t.shape[0], *t.shape[1:])])
        found = self.all_gather(t, what)
        return [part[:count] for part, count in zip(found, rows, strict=True)]

    def all_reduce(self, t: Tensor, what: str) -> Tensor:
        """The sum over processes, the same bits on each."""
        total = t.detach().clone(memory_format=torch.contiguous_format)
        with self._watched(what):
            dist.all_reduce(total, group=self._group(t))
        return total

    def close(self) -> None:
        """Leave; `torch.distributed` too, where it was started for this."""
        with contextlib.suppress(Exception):
            for group in self._groups.values():
                dist.destroy_process_group(group)
            if self._owns and dist.is_initialized():
                dist.destroy_process_group()
        self._lost = self._lost or "it was closed"

    def _group(self, t: Tensor) -> dist.ProcessGroup:
        # gloo takes tensors of any device.
        return self._groups.get(t.device.type, self._groups["cpu"])

    @contextmanager
    def _watched(self, what: str) -> Iterator[None]:
        if self._lost:
            raise DistributedError(f"this group of processes cannot go on: {self._lost}. Start all processes again")
        self._step += 1
        try:
            yield
        except RuntimeError as error:
            self._lost = self._report(what, str(error).splitlines()[0][:160])
            raise DistributedError(self._lost) from error

    def _report(self, what: str, said: str) -> str:
        """Tell the others, hear who else is there, and say who is not."""
        place = f"{what!r} (exchange {self._step})"
        try:
            store = dist.distributed_c10d._get_default_store()
            store.set(f"{self._key}/{self.rank}", place)
            for group in self._groups.values():
                # Whoever still waits for this process hears at once that it has left.
                dist.destroy_process_group(group)
            silent = [r for r in range(self.size) if r != self.rank]
            end = time.monotonic() + _GRACE
            while silent and time.monotonic() < end:
                silent = [r for r in silent if not store.check([f"{self._key}/{r}"])]
                time.sleep(0.05)
        except RuntimeError:
            who = "rank 0 or its launcher, who keep the list of processes, are gone"
        else:
            names = ", ".join(f"rank {r}" for r in silent)
            who = f"no sign of {names}" if silent else "all processes have given up, the last to come at another place"
        return (
            f"rank {self.rank} of {self.size} was left alone at {place}: {who}. A process was killed, ran out of "
            f"memory, or came more than {self.timeout:g} s late. Its own output says which; initialize(timeout=...) "
            f"sets how long the others wait; a run with checkpoint= goes on where it was saved. torch says: {said}"
        )
