"""Threads: the lock for settings of the process, settings that threads share, one-thread BLAS, workers.

NumPy's BLAS has threads of its own beside torch's. For matrices of a hundred rows they wait for one another, and for
torch's, ten times longer than they compute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ContextDecorator, nullcontext
from functools import cache
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Found = TypeVar("Found")

# Kernels, the global random state and the hooks of a shared model belong to the process: threads take turns with them.
# Never held while other processes are waited for.
LOCK = threading.RLock()


class Switch(ContextDecorator):
    """A setting of the process that several threads may want at once: the first one turns it, the last one back.

    Args:
        turn: turns it, and returns how to turn it back.

    Example:
        >>> switch, seen = Switch(lambda: seen.append("on") or (lambda: seen.append("off"))), []
        >>> with switch, switch:
        ...     print(seen)
        ['on']
        >>> seen
        ['on', 'off']
    """

    def __init__(self, turn: Callable[..., Callable[[], object]]) -> None:
        self._lock, self._users, self._turn = threading.Lock(), 0, turn

    def on(self, *how: Any) -> None:
        """Turn it, as the first user wants it."""
        with self._lock:
            if self._users == 0:
                self._back = self._turn(*how)
            self._users += 1

    def off(self) -> None:
        """Turn it back, if nobody else uses it."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._back()

    def __enter__(self) -> None:
        self.on()

    def __exit__(self, *error: object) -> None:
        self.off()


# Rows up to which BLAS libraries do not divide an eigenproblem, and switching them takes longer than it.
_ALONE = 16


@cache
def _controller() -> Any:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:  # it comes with scikit-learn; without it all is only slower
        return None
    return ThreadpoolController()


def _share(workers: int) -> Callable[[], None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // workers))
    return lambda: torch.set_num_threads(threads)


_BLAS = Switch(lambda: _controller().limit(limits=1, user_api="blas").restore_original_limits)
_TORCH = Switch(_share)


def one_blas_thread(size: int | None = None) -> AbstractContextManager[Any]:
    """Inside it NumPy's and SciPy's BLAS use one thread; torch's threads stay as they are.

    Args:
        size: of the matrices inside; for small ones nothing is switched, since BLAS takes one thread by itself.

    Example:
        >>> import numpy as np
        >>> with one_blas_thread():
        ...     np.linalg.eigvalsh(np.eye(2)).tolist()
        [1.0, 1.0]
    """
    alone = size is not None and size <= _ALONE
    return nullcontext() if alone or _controller() is None else _BLAS


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

    pool = ThreadPoolExecutor(workers)
    _TORCH.on(workers)
    try:
        futures = [pool.submit(work, item) for item in items]
        for count, future in enumerate(as_completed(futures), 1):
            future.result()
            finished(count)
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
        _TORCH.off()
