"""Leaving a long computation in order when somebody asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Request:
    """Whether, and by which signal, the computation was asked to stop."""

    def __init__(self) -> None:
        self.signal: str | None = None


@contextmanager
def stop_requests() -> Iterator[Request]:
    """SIGINT and SIGTERM set a flag in place of ending the process; a second one acts as it did before.

    Handlers are those of before afterwards. Outside the main thread, where no handler can be set, signals keep
    their meaning.

    Example:
        >>> with stop_requests() as request:
        ...     signal.raise_signal(signal.SIGTERM)
        >>> request.signal
        'SIGTERM'
    """
    request = Request()
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while before:
            signum, handler = before.popitem()
            signal.signal(signum, handler)

    def note(signum: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(signum).name
        restore()

    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(signum)
            # None: set by another language, and not to be put back from here.
            if handler is not None:
                before[signum] = handler
                signal.signal(signum, note)
    try:
        yield request
    finally:
        restore()
