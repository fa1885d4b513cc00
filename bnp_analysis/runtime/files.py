"""Files written whole or not at all, and states of long runs, read only by the run that they belong to."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import IO, Any

import torch

from bnp_analysis.errors import InvalidInputError

_EVERY, _SECONDS = 50, 30.0


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file to write, which becomes `path` on leaving: the old file or the whole new one, nothing between.

    Args:
        path: missing folders are made.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "runs" / "a.txt"
        >>> with whole_file(path) as file:
        ...     _ = file.write(b"done")
        >>> path.read_bytes()
        b'done'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Schedule:
    """When a run is saved: every 50 steps or 30 seconds, whichever comes first."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def due(self, steps: int) -> bool:
        """Whether it is time after so many steps."""
        if steps % _EVERY and time.monotonic() < self._last + _SECONDS:
            return False
        self._last = time.monotonic()
        return True


class ReadOnlyPath(PosixPath):
    """Where a state is read, and not written: by a process beside the one that does."""


def save_state(path: str | Path, key: str, state: Mapping[str, Any]) -> None:
    """Write tensors and numbers under a key that says what run they belong to; never half a file."""
    if isinstance(path, ReadOnlyPath):
        return
    with whole_file(path) as file:
        torch.save({"key": key, "state": dict(state)}, file)


def load_state(path: str | Path, key: str) -> dict[str, Any]:
    """Read a state back.

    Raises:
        InvalidInputError: damaged, or of another run: resuming it would mix two matrices.
    """
    try:
        found = torch.load(Path(path), map_location="cpu", weights_only=True)
        stored, state = found["key"], found["state"]
    except Exception as error:
        raise InvalidInputError(
            f"{path} is not a saved run ({error}); delete it, or give another checkpoint="
        ) from error
    if stored != key:
        raise InvalidInputError(
            f"{path} holds another run: saved for '{stored}', this is '{key}'. Resuming would mix two matrices; delete "
            "it, or give another checkpoint="
        )
    return dict(state)
