"""Groups of processes that divide the data of a risk: initialization, and checked exchanges."""

from __future__ import annotations

import functools
import os
import pickle
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import torch.distributed as dist
from torch import Tensor

from bnp_analysis.distributed.link import Link
from bnp_analysis.errors import DistributedError, InvalidInputError
from bnp_analysis.runtime.files import ReadOnlyPath
from bnp_analysis.runtime.kinds import gated
from bnp_analysis.runtime.trees import map_tensors, tensors_of

_MIX = 0x5851F42D4C957F2D
_PART = 2**20  # numbers that are mixed together
# Starting takes processes longer, and differs more among them, than what they do together.
_START = 300.0


class Group:
    """Processes that run the same program, each on its own shard of the data.

    Before anything is exchanged they meet: each says what it is about to do, with which argument, or that it has
    failed. So an error on one process ends all of them, and processes that have drifted apart are told, not added up.
    Every method but `part` and `shard` must be called by all of them.

    Args:
        link: the wire; None for one process, where every sum is its only part.

    Attributes:
        rank: which process this is, from 0.
        size: how many there are.

    Example:
        >>> from bnp_analysis.distributed import ALONE
        >>> ALONE.rank, ALONE.size, ALONE.part(10)
        (0, 1, range(0, 10))
    """

    def __init__(self, link: Link | None = None) -> None:
        self._link = link
        self.rank, self.size = (0, 1) if link is None else (link.rank, link.size)
        self._private: list[tempfile.TemporaryDirectory[str]] = []

    def part(self, count: int) -> range:
        """Which of `count` examples are this process's: one piece of the row, as even as possible."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def shard(self, data: Any) -> Any:
        """This process's part of a pair `(x, y)`, of a list of batches or of a `Dataset`; a list may come out empty.

        A loader is made from the shard of its dataset. (`DistributedSampler` repeats examples to make shards even,
        which would count them twice.)

        Raises:
            InvalidInputError: data that cannot be cut.
        """
        if isinstance(data, tuple) and len(data) == 2:
            counts = {t.shape[0] if t.ndim else -1 for t in tensors_of(data)}
            if len(counts) != 1:
                raise InvalidInputError(
                    f"(x, y) has tensors of {sorted(counts)} rows, so examples cannot be told apart; cut them with "
                    "group.part(count)"
                )
            mine = self.part(counts.pop())
            return map_tensors(data, lambda t: t[mine.start : mine.stop]) if len(mine) else []
        if isinstance(data, torch.utils.data.Dataset) and isinstance(data, Sized):
            return torch.utils.data.Subset(data, self.part(len(data)))
        if isinstance(data, list | tuple):
            mine = self.part(len(data))
            return list(data[mine.start : mine.stop])
        raise InvalidInputError(
            f"shard cuts a pair (x, y), a list of batches or a Dataset, not {type(data).__name__}: make the loader "
            "from group.shard(dataset)"
        )

    def sum(self, compute: Callable[[], Tensor], what: str, of: Tensor | None = None) -> Tensor:
        """The sum of `compute()` over processes, the same bits on each.

        Args:
            compute: this process's part; of one shape on all of them.
            what: in words, for errors.
            of: an argument that must be the same everywhere.

        Raises:
            DistributedError: another process failed, was lost, does something else, or has another argument.
        """
        if self._link is None:
            return compute()
        with self._local():
            part = compute()
        sizes = self._meet(what, part.numel(), 0 if of is None else digest(of))
        self._require(what, len(set(sizes)) == 1, f"parts of {sizes} numbers cannot be added")
        return self._link.all_reduce(part, what)

    def gather(self, compute: Callable[[], Tensor], what: str, of: Tensor | None = None) -> Tensor:
        """The rows of all processes, one below the other in the order of ranks; they may have any number of them."""
        if self._link is None:
            return compute()
        with self._local():
            part = compute()
        sizes = self._meet(what, part.shape[0], 0 if of is None else digest(of))
        return torch.cat(self._link.all_gather_rows(part, sizes, what))

    def share(self, compute: Callable[[], Any], what: str) -> list[Any]:
        """`compute()` of every process, whatever it is; tensors on the CPU. For small things."""
        if self._link is None:
            return [compute()]
        with self._local():
            raw = torch.frombuffer(bytearray(pickle.dumps(compute())), dtype=torch.uint8)
        found = self._link.all_gather_rows(raw, self._meet(what, raw.numel(), 0), what)
        return [pickle.loads(part.numpy().tobytes()) for part in found]

    def from_first(self, value: Any, what: str) -> Any:
        """What rank 0 gives; the others' values are dropped."""
        return self.share(lambda: value if self.rank == 0 else None, what)[0] if self._link else value

    def require_same(self, compute: Callable[[], Mapping[str, Any]], what: str) -> None:
        """Refuse to go on where processes differ in something that must be the same.

        Raises:
            DistributedError: names what differs, and where.
        """
        if self._link is None:
            return
        found = self.share(compute, what)
        for name, first in found[0].items():
            others = [rank for rank, own in enumerate(found) if own.get(name) != first]
            if others:
                raise DistributedError(
                    f"{name} of {what} on rank {', '.join(map(str, others))} is not that of rank 0 "
                    f"({str(found[others[0]].get(name))[:200]} against {str(first)[:200]}), so sums over processes "
                    "would belong to no one function. Give every process the same: one seed, one file, or "
                    "group.from_first(model.state_dict(), 'the parameters')"
                )

    def agree(self, t: Tensor, what: str) -> None:
        """Refuse to go on where processes hold different tensors."""
        if self._link is not None:
            self._meet(what, t.numel(), digest(t))

    @contextmanager
    def together(self, what: str = "this part") -> Iterator[None]:
        """A part of the program that all processes end, or none: an error inside it on one of them ends all."""
        if self._link is None:
            yield
            return
        with self._local():
            yield
        self._meet(f"the end of {what}", 0, 0)

    def checkpoint(self, path: str | Path) -> Path:
        """Where a run keeps its state, for `checkpoint=`: rank 0 writes, all resume from what rank 0 finds.

        The file need not be visible to the other processes.
        """
        path = Path(path)
        if self._link is None:
            return path
        state = self.from_first(path.read_bytes() if self.rank == 0 and path.exists() else None, "the saved state")
        if self.rank == 0:
            return path
        self._private.append(tempfile.TemporaryDirectory(prefix="bnp_analysis."))
        copy = Path(self._private[-1].name) / path.name
        if state is not None:
            copy.write_bytes(state)
        return ReadOnlyPath(copy)

    def close(self) -> None:
        """End the group; `torch.distributed` too, if `initialize` started it."""
        for folder in self._private:
            folder.cleanup()
        if self._link is not None:
            self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            with self.together("the run"):
                if error is not None:
                    raise error
        finally:
            self.close()

    def _meet(self, what: str, size: int, argument: int, failure: BaseException | None = None) -> list[int]:
        """Say what comes next, hear that all others do the same; their sizes."""
        assert self._link is not None
        own = torch.tensor([failure is not None, zlib.crc32(what.encode()), argument, size])
        seen = torch.stack(self._link.all_gather(own, what))
        if bool(seen[:, 0].any()):
            said = self._words("" if failure is None else f"{type(failure).__name__}: {failure}")
            if failure is None:
                raise DistributedError("ended because of " + "; ".join(f"rank {r}: {s}" for r, s in said.items()))
            return []
        if len(set(seen[:, 1].tolist())) > 1:
            places = "; ".join(f"rank {r}: {s}" for r, s in self._words(what).items())
            raise DistributedError(
                f"the processes are at different places ({places}). All must make the same calls; a choice by free "
                "memory or by time may also fall differently: name the method"
            )
        self._require(
            what,
            len(set(seen[:, 2].tolist())) == 1,
            "they have different vectors. Their arithmetic has drifted apart, or their programs differ: use the same "
            "machines, torch and number of threads",
        )
        return [int(n) for n in seen[:, 3]]

    def _words(self, own: str) -> dict[int, str]:
        """What every process has to say, those that say nothing left out."""
        assert self._link is not None
        raw = torch.zeros(2000, dtype=torch.uint8)
        cut = own.encode()[: len(raw)]
        raw[: len(cut)] = torch.frombuffer(bytearray(cut) or bytearray(1), dtype=torch.uint8)[: len(cut)]
        found = [bytes(t.tolist()).rstrip(b"\0").decode(errors="ignore") for t in self._link.all_gather(raw, "words")]
        return {rank: text for rank, text in enumerate(found) if text}

    @contextmanager
    def _local(self) -> Iterator[None]:
        """What fails here is told to the others, once."""
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if not isinstance(error, DistributedError) and not getattr(error, "_told", False):
                error._told = True  # type: ignore[union-attr]
                try:
                    self._meet("an error", 0, 0, error)
                except DistributedError as lost:
                    error.add_note(str(lost))
            raise

    def _require(self, what: str, holds: bool, why: str) -> None:
        if not holds:
            raise DistributedError(f"the processes cannot go on with {what}: {why}")


ALONE = Group()


class _HasGroup(Protocol):
    @property
    def group(self) -> Group: ...


def over_processes(product: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """Make a product with this process's part of a matrix the product with the whole; `self.group` says whose."""

    @functools.wraps(product)
    def total(self: _HasGroup, x: Tensor) -> Tensor:
        what = f"a product with {type(self).__name__}"
        return self.group.sum(lambda: product(self, x), what, of=x)

    return total


def digest(t: Tensor) -> int:
    """A number that depends on every bit of a tensor."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    t = torch.view_as_real(t) if t.is_complex() else t
    bits = t.detach().contiguous().reshape(-1).view(kinds[t.dtype.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for start in range(0, bits.numel(), _PART):  # no second copy of a data set
        part = bits[start : start + _PART].long()
        # Sums of what multiplication has mixed: differences in several entries do not cancel, nor do swapped ones.
        mixed = (part + torch.arange(start, start + part.numel(), device=bits.device)) * _MIX
        total += ((mixed ^ (mixed >> 29)) * _MIX).sum()
    return int(total)


def launched() -> int:
    """How many processes the launcher (`torchrun`) says there are; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@gated
def initialize(*, timeout: float = 600.0) -> Group:
    """The group of the processes that `torchrun` started, or that `torch.distributed` already connects.

    Tensors on the CPU are summed by gloo, those on GPUs by nccl, one GPU per process of a machine.

    Args:
        timeout: seconds that a process may be late before the others end with an error: more than what one product
            on the largest shard takes, and than what one process may do alone. For the start at least 300.

    Returns:
        A `Group`; of this process alone where nothing was launched.

    Raises:
        DistributedError: processes that do not come, or a torch without `torch.distributed`.

    Example:
        >>> import bnp_analysis as bnp
        >>> group = bnp.distributed.initialize()
        >>> group.rank, group.size, group.shard(list("abc"))
        (0, 1, ['a', 'b', 'c'])
    """
    if not timeout > 0:
        raise InvalidInputError(f"timeout must be a positive number of seconds, got {timeout}")
    if not dist.is_available() or not dist.is_gloo_available():
        if launched() > 1:
            raise DistributedError(
                f"{launched()} processes were launched, but this torch ({torch.__version__}) is built without "
                "torch.distributed and gloo, so each would measure alone. Install a build that has them, or start one "
                "process"
            )
        return ALONE
    own = not dist.is_initialized()
    if own:
        if launched() == 1:
            return ALONE
        backend = "gloo"
        if torch.cuda.is_available() and dist.is_nccl_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            backend = "cpu:gloo,cuda:nccl"
        try:
            dist.init_process_group(backend, timeout=timedelta(seconds=max(timeout, _START)))
        except (RuntimeError, ValueError) as error:
            raise DistributedError(
                f"the {launched()} processes did not find each other in time ({error}). Start all of "
                "them, with one MASTER_ADDR and MASTER_PORT, or let torchrun do it"
            ) from error
    return ALONE if dist.get_world_size() == 1 else Group(Link(timeout, owns=own))
