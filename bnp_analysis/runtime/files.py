"""Files written whole or not at all, and states of long runs, read only by the run that they belong to."""

from __future__ import annotations

import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PosixPath
from typing import IO, Any

import torch

from bnp_analysis.errors import InvalidInputError

_EVERY, _SECONDS = 50, 30.0
_LEAST_SPACE = 2**16  # bytes that must be free where a file is to be written


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file to write, which becomes `path` on leaving: the old file or the whole new one, nothing between.

    Args:
        path: missing folders are made; where it is a link, the file behind it is written.

    Raises:
        InvalidInputError: it is a folder, a pipe or a device.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "runs" / "a.txt"
        >>> with whole_file(path) as file:
        ...     _ = file.write(b"done")
        >>> path.read_bytes()
        b'done'
    """
    path = Path(path).resolve()  # behind a link: the link stays
    if path.exists() and not path.is_file():
        raise InvalidInputError(f"{path} is a folder, a pipe or a device, which writing would replace")
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


def require_output(path: str | os.PathLike[str], argument: str) -> None:
    """Refuse a path at which `whole_file` could not write, before anything is computed; missing folders are not made.

    Args:
        path: of a file that will be written, or written anew.
        argument: its name in the function that was called.

    Raises:
        InvalidInputError: it is a folder or no ordinary file, its folder is none or cannot be written to, or the disk
            is full.

    Example:
        >>> require_output("no-such-folder/run.pt", "checkpoint")
        >>> try:
        ...     require_output("/", "checkpoint")
        ... except InvalidInputError as error:
        ...     print(error)
        checkpoint='/' is a folder; give the path of a file
    """
    if isinstance(path, ReadOnlyPath):
        return
    target = Path(path)
    said = f"{argument}={os.fspath(path)!r}"
    if target.is_dir():
        raise InvalidInputError(f"{said} is a folder; give the path of a file")
    if target.exists() and not target.is_file():
        raise InvalidInputError(f"{said} is no ordinary file, which writing would replace; give the path of a file")
    folder = next(parent for parent in target.resolve().parents if parent.exists())
    if not folder.is_dir():
        raise InvalidInputError(f"{said} lies in {folder}, which is no folder")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_LEAST_SPACE))
            file.flush()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidInputError(f"{said} cannot be written in {folder} ({reason}): nothing was computed") from error


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
