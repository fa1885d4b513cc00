"""Small eigenproblems on one thread.

NumPy's BLAS has threads of its own beside torch's. For matrices of a hundred rows they wait for one another, and for
torch's, ten times longer than they compute.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any


class Switch:
    """A setting of the process that several threads may want at once: the first one turns it, the last one back.

    Example:
        >>> switch, seen = Switch(), []
        >>> with switch.turned(lambda: seen.append("on") or (lambda: seen.append("off"))):
        ...     with switch.turned(lambda: seen.append("again")):
        ...         pass
        >>> seen
        ['on', 'off']
    """

    def __init__(self) -> None:
        self._lock, self._users = threading.Lock(), 0
        self._back: Callable[[], object] = bool

    @contextmanager
    def turned(self, turn: Callable[[], Callable[[], object]]) -> Iterator[None]:
        """Meanwhile the setting is what the first user's `turn()` made it, which returns how to turn it back."""
        with self._lock:
            if self._users == 0:
                self._back = turn()
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._back()


_BLAS = Switch()

# Rows up to which BLAS libraries do not divide an eigenproblem, and switching them takes longer than it.
_ALONE = 16


@cache
def _controller() -> Any:
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:  # it comes with scikit-learn; without it all is only slower
        return None
    return ThreadpoolController()


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
    if size is not None and size <= _ALONE:
        return nullcontext()
    controller = _controller()
    if controller is None:
        return nullcontext()
    return _BLAS.turned(lambda: controller.limit(limits=1, user_api="blas").restore_original_limits)
