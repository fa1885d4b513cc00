"""How long computations report where they are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
