"""Progress reports of long computations, which can be stopped between two steps.

Ctrl-C and the like raise a flag, which a long run looks at between two steps.
"""

from __future__ import annotations

import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

Update = Callable[[int], None]
Progress = bool | Callable[[int, int], None]


@contextmanager
def reporting(progress: Progress, total: int, label: str) -> Iterator[Update]:
    """Give an `update(done)` that draws a bar on a terminal's stderr, calls back `(done, total)`, or is silent.

    Example:
        >>> seen = []
        >>> with reporting(lambda done, total: seen.append((done, total)), 2, "demo") as update:
        ...     update(1); update(2)
        >>> seen
        [(1, 2), (2, 2)]
    """
    if progress is True:
        from tqdm.auto import tqdm

        # On a terminal a bar is erased when it is done; in a log its half-drawn lines would stay.
        shown = sys.stderr.isatty() or "ipykernel" in sys.modules
        with tqdm(total=total, desc=label, leave=False, disable=not shown, file=sys.stderr) as bar:

            def update(done: int) -> None:
                bar.update(done - bar.n)

            yield update
    elif callable(progress):
        yield lambda done: progress(done, total)
    else:
        yield lambda done: None


class StopRequest:
    """Whether, and by which signal, the computation was asked to stop."""

    def __init__(self, around: StopRequest | None = None) -> None:
        self.signal: str | None = None
        self._around = around or self

    def heed(self) -> None:
        """End the run here, if that was asked for.

        Raises:
            Stopped: it was.
        """
        if self.signal is not None:
            raise Stopped(self.signal)

    def is_clean(self, error: KeyboardInterrupt) -> bool:
        """Whether an interruption came between two steps, or from a product; not at a line of the run's own.

        Once the flag is up, a further signal acts as it would without this module: it may have met any line.
        """
        return self._around.signal is None or isinstance(error, Stopped)


class Stopped(KeyboardInterrupt):
    """A run has ended between two steps, since a signal asked for it."""


# Of the outermost run; weak, since a further signal may end the lines that would take it back.
_active: weakref.ref[StopRequest] | None = None


@contextmanager
def stop_requests(*signals: signal.Signals) -> Iterator[StopRequest]:
    """The signals set a flag in place of ending the process; a second one acts as it did before.

    Handlers are those of before afterwards. Outside the main thread, where no handler can be set, signals keep
    their meaning; and so they do in a run inside of another, whose state is that which matters.

    Example:
        >>> with stop_requests(signal.SIGTERM) as request:
        ...     signal.raise_signal(signal.SIGTERM)
        >>> request.signal
        'SIGTERM'
    """
    global _active  # noqa: PLW0603 - signals belong to the process
    main = threading.current_thread() is threading.main_thread()
    around = _active() if main and _active is not None else None
    if not main or around is not None:
        yield StopRequest(around)
        return
    request = StopRequest()
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        while before:
            signum, handler = before.popitem()
            signal.signal(signum, handler)

    def note(signum: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(signum).name
        restore()

    try:
        _active = weakref.ref(request)
        for signum in signals:
            handler = signal.getsignal(signum)
            # None: set by another language, and not to be put back from here.
            if handler is not None:
                before[signum] = handler
                signal.signal(signum, note)
        yield request
    finally:
        _active = None
        restore()
