"""States of long runs on disk: written atomically, read only by the run that they belong to."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path, PosixPath
from typing import Any

import torch

from bnp_analysis.errors import InvalidInputError

_EVERY, _SECONDS = 50, 30.0


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
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"key": key, "state": dict(state)}, file)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
