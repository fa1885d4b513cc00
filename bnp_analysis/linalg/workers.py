"""Many small pieces of dense algebra at once, one thread each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch

from bnp_analysis.linalg.threads import Switch

Item = TypeVar("Item")
Found = TypeVar("Found")

_TORCH = Switch()


def each(
    work: Callable[[Item], Found], items: Sequence[Item], workers: int, finished: Callable[[int], None]
) -> list[Found]:
    """`[work(item) for item in items]` by `workers` threads, which share out torch's threads.

    Torch leaves Python's lock while it factorizes, and small factorizations gain more by running side by side than
    by threads of their own. What torch's number of threads is for others changes while this runs.

    Args:
        work: must not change what another item's work reads.
        items: the pieces.
        workers: 1 does them one after the other, with all threads.
        finished: gets how many are done, in the calling thread.

    Raises:
        What `work` raises; pieces not yet begun are dropped, also on Ctrl-C.

    Example:
        >>> each(lambda x: x + 1, [1, 2, 3], 2, lambda done: None)
        [2, 3, 4]
    """
    if workers < 2:
        found = []
        for item in items:
            found.append(work(item))
            finished(len(found))
        return found

    def share() -> Callable[[], None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(1, threads // workers))
        return lambda: torch.set_num_threads(threads)

    with _TORCH.turned(share):
        pool = ThreadPoolExecutor(workers)
        try:
            futures = [pool.submit(work, item) for item in items]
            for count, future in enumerate(as_completed(futures), 1):
                future.result()
                finished(count)
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
