"""Atomic writing of files, and saved states of long runs, which only the same run may resume."""

from __future__ import annotations

import fcntl
import glob
import os
import pickle
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PosixPath
from typing import IO, Any, TypeVar

import torch

from bnp_analysis.errors import BNPAnalysisError, InvalidInputError, OutputError

Found = TypeVar("Found")
_EVERY, _SECONDS = 50, 30.0
_LEAST_SPACE = 2**16  # bytes that must be free where a file is to be written


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A binary file to write, which becomes `path` on leaving: the old file or the whole new one, nothing between.

    Args:
        path: missing folders are made; where it is a link, the file behind it is written.

    Raises:
        InvalidInputError: it is a folder, a pipe or a device.
        OutputError: the disk is full, or the folder may not be written to; the old file is as it was.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "runs" / "a.txt"
        >>> with whole_file(path) as file:
        ...     _ = file.write(b"done")
        >>> path.read_bytes()
        b'done'
    """
    path, temporary = _behind(path, f"the path {path!r}")
    if path.exists() and not path.is_file():
        raise InvalidInputError(f"{path} is a folder, a pipe or a device, which writing would replace")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _behind(path: str | os.PathLike[str], said: str) -> tuple[Path, Path]:
    """The file behind links, which stay, and one beside it to write first; refused where no disk could have them."""
    try:
        target = Path(path).resolve()
        temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
        for one in (target, temporary):
            with suppress(FileNotFoundError, NotADirectoryError):
                one.stat()
    except PermissionError:
        return target, temporary  # which writing says better
    except (OSError, RuntimeError, ValueError, TypeError) as error:  # of loops of links, of characters
        reason = getattr(error, "strerror", None) or str(error).partition(" from ")[0]
        raise InvalidInputError(f"{said} is no path of a file ({reason}); give another") from error
    return target, temporary


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write words into a file, whole or not at all; see `whole_file`.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "pages" / "a.md"
        >>> write_text(path, "done")
        >>> path.read_text()
        'done'
    """
    with whole_file(path) as file:
        file.write(text.encode())


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system refuses inside becomes an error of the package that names the file.

    Raises:
        OutputError: in place of an `OSError`, also of one that another error has followed: `torch.save` says only that
            its archive is broken.

    Example:
        >>> from bnp_analysis.errors import OutputError
        >>> try:
        ...     with writing("run.pt"):
        ...         raise OSError(28, "No space left on device")
        ... except OutputError as error:
        ...     print(error)
        run.pt could not be written: No space left on device
    """
    try:
        yield
    except BNPAnalysisError:
        raise
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None:
            raise
        raise OutputError(f"{os.fspath(path)} could not be written: {cause.strerror or cause}") from error


@contextmanager
def sole_writer(path: str | os.PathLike[str] | None, argument: str = "checkpoint") -> Iterator[None]:
    """Keep other runs, of this process and of others, from writing a file as long as this one does.

    The lock belongs to the open file `.NAME.lock` beside it, so a run that was killed leaves none. Where a file system
    knows no locks there is none.

    Args:
        path: the file, or None for nothing.
        argument: its name in the function that was called.

    Raises:
        InvalidInputError: another run has it.
        OutputError: the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run.pt"
        >>> with sole_writer(path):
        ...     try:
        ...         with sole_writer(path):
        ...             pass
        ...     except InvalidInputError as error:
        ...         print(str(error).partition("run.pt ")[2])
        is being written by another run (this process): wait for it, or give another file
    """
    if path is None or isinstance(path, ReadOnlyPath):
        yield
        return
    target = Path(path).resolve()
    lock = target.with_name(f".{target.name}.lock")
    with ExitStack() as held:
        with writing(lock):
            target.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(_locked(lock, f"{argument}={os.fspath(path)}"))
            held.callback(lock.unlink, missing_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):  # by a run that was killed
            left.unlink(missing_ok=True)
        yield


def _locked(lock: Path, said: str) -> ExitStack:
    """What closes the file that holds the lock, with the number of this process in it; an interrupt closes it too."""
    while True:
        if lock.exists() and not lock.is_file():
            raise InvalidInputError(f"{said} is locked by {lock}, which is no ordinary file: delete it")
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with ExitStack() as closing:
            handle = closing.enter_context(os.fdopen(os.open(lock, flags, 0o666), "r+b", buffering=0))
            if _is_held(handle, lock, said):
                return closing.pop_all()


def _is_held(handle: IO[bytes], lock: Path, said: str) -> bool:
    """Lock an open file; False where a run that ended has taken it away meanwhile."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        owner = (handle.read(20) or b"").decode(errors="replace")
        process = f" (process {owner})" if owner.isdecimal() else ""
        process = " (this process)" if owner == str(os.getpid()) else process
        raise InvalidInputError(
            f"{said} is being written by another run{process}: wait for it, or give another file"
        ) from error
    except OSError:
        return True  # no locks here
    if not lock.exists() or not os.path.samestat(os.fstat(handle.fileno()), lock.stat()):
        return False
    with suppress(OSError):
        handle.truncate(0)
        handle.write(str(os.getpid()).encode())
    return True


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
    target, said = Path(path), f"{argument}={os.fspath(path)!r}"
    behind, _ = _behind(path, said)
    if target.is_dir():
        raise InvalidInputError(f"{said} is a folder; give the path of a file")
    if target.exists() and not target.is_file():
        raise InvalidInputError(f"{said} is no ordinary file, which writing would replace; give the path of a file")
    folder = next(parent for parent in behind.parents if parent.exists())
    if not folder.is_dir():
        raise InvalidInputError(f"{said} lies in {folder}, which is no folder")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_LEAST_SPACE))
            file.flush()
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidInputError(f"{said} cannot be written in {folder} ({reason}): nothing was computed") from error


def require_outputs(
    outputs: Mapping[str, Sequence[str | os.PathLike[str]]], read: Mapping[str, Sequence[str | os.PathLike[str]]] = {}
) -> None:
    """Refuse files that `require_output` refuses, and a file that two arguments name: one would replace the other.

    Args:
        outputs: argument -> the files that are written for it.
        read: argument -> files that are read, so that writing would replace what was given.

    Raises:
        InvalidInputError: names the arguments.

    Example:
        >>> require_outputs({"log": ["run.jsonl"], "checkpoint": ["run.pt"]})
        >>> try:
        ...     require_outputs({"log": ["run.pt"], "checkpoint": ["./run.pt"]})
        ... except InvalidInputError as error:
        ...     print(error)
        log and checkpoint name the same file 'run.pt': one would replace the other
    """
    taken = {_behind(path, argument)[0]: argument for argument, files in read.items() for path in files}
    for argument, files in outputs.items():
        for path in files:
            require_output(path, argument)
            other = taken.setdefault(Path(path).resolve(), argument)
            if other != argument:
                raise InvalidInputError(
                    f"{other} and {argument} name the same file {Path(path).name!r}: one would replace the other"
                )


class ReadOnlyPath(PosixPath):
    """Where a state is read, and not written: by a process beside the one that does."""


class SavedRun:
    """The state of a long run on disk, under a key that says what run it is; see `saved_run`."""

    def __init__(self, path: Path | None, key: str) -> None:
        self._path, self._key = path, key
        self._last = time.monotonic()

    def restore(self, put: Callable[[dict[str, Any]], Found]) -> Found | None:
        """Give `put` the state that there is, and return what it makes of it; None where there is no file yet.

        Raises:
            InvalidInputError: the file is damaged, or of another run: resuming it would mix two matrices.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            found = read_state(self._path, "a saved run")
            stored, state = found.get("key"), found.get("state", {})
            if stored != self._key:
                raise InvalidInputError(
                    f"{self._path} holds another run: saved for '{stored}', this is '{self._key}'. Resuming would mix "
                    "two matrices; delete it, or give another checkpoint="
                )
            with clear_read_errors(self._path, "a saved run"):
                return put(state)
        finally:
            self._last = time.monotonic()

    def due(self, steps: int) -> bool:
        """Whether it is time to save after so many steps: every 50, or 30 seconds, whichever comes first."""
        if self._path is None or (steps % _EVERY and time.monotonic() < self._last + _SECONDS):
            return False
        self._last = time.monotonic()
        return True

    def save(self, state: Mapping[str, Any]) -> None:
        """Write tensors and numbers; never half a file."""
        if self._path is not None and not isinstance(self._path, ReadOnlyPath):
            write_state(self._path, {"key": self._key, "state": dict(state)})


@contextmanager
def saved_run(path: str | Path | None, key: str) -> Iterator[SavedRun]:
    """The file of a long run, which no other run writes meanwhile; None saves nothing.

    Raises:
        InvalidInputError: another run is writing it.

    Example:
        >>> with saved_run(None, "a run") as saved:
        ...     saved.restore(dict), saved.due(50)
        (None, False)
    """
    with sole_writer(path):
        yield SavedRun(Path(path) if path is not None and not isinstance(path, Path) else path, key)


@contextmanager
def clear_read_errors(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Errors of someone who reads a damaged file become one of the package, which names the file and what is missing.

    Raises:
        InvalidInputError: in place of an error that damaged data cause.

    Example:
        >>> try:
        ...     with clear_read_errors("run.pt", "a saved run"):
        ...         {}["alpha"]
        ... except InvalidInputError as error:
        ...     print(error)
        run.pt is not a saved run, or damaged (no 'alpha'); delete it, or give another checkpoint=
    """
    try:
        yield
    except BNPAnalysisError:
        raise
    except Exception as error:
        words = f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
        ways = "delete it, or give another checkpoint="
        raise InvalidInputError(f"{os.fspath(path)} is not {what}, or damaged ({words}); {ways}") from error


def write_state(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write tensors, numbers and words with a checksum of each; never half a file."""
    with whole_file(path) as file:
        torch.save(dict(state) | {"checksums": checksums(state)}, file)


def read_state(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Read a state back, on the CPU; files with arbitrary pickled objects are not read.

    Raises:
        InvalidInputError: it is not what `write_state` wrote, to the last bit; names the file and what is wrong.
    """
    with clear_read_errors(path, what):
        if not Path(path).is_file():
            raise ValueError("it is a folder, a pipe or a device")
        found = load_tensors(path)
        if not isinstance(found, dict):
            raise ValueError(f"it holds {type(found).__name__}, not a dict")
        saved, own = found.pop("checksums"), checksums(found)
        if wrong := sorted(name for name in saved.keys() | own.keys() if saved.get(name) != own.get(name)):
            raise ValueError(f"other than saved: {', '.join(wrong[:3])}")
    return found


def load_tensors(path: str | os.PathLike[str]) -> Any:
    """What `torch.save` wrote of tensors, numbers and words, on the CPU; arbitrary pickled objects are not read.

    Raises:
        ValueError: what is wrong with the file, in one line of ours: torch's advises to read it all the same.
    """
    try:
        return torch.load(Path(path), map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, EOFError) as error:
        raise ValueError("no file of tensors, or one with other objects, which are not read") from error
    except RuntimeError as error:
        raise ValueError("an archive that is cut off, or damaged") from error


def checksums(state: Mapping[Any, Any], where: str = "") -> dict[str, int]:
    """A number for every entry of a state, those of dicts inside it under names with points.

    Example:
        >>> list(checksums({"key": "run", "state": {"w": torch.ones(2)}}))
        ['key', 'state.w']
    """
    found: dict[str, int] = {}
    for name, value in state.items():
        if isinstance(value, Mapping) and value:
            found |= checksums(value, f"{where}{name}.")
        else:
            found[f"{where}{name}"] = _checksum(value)
    return found


def _checksum(value: Any, before: int = 0) -> int:
    if isinstance(value, torch.Tensor):
        words = f"{value.dtype} {tuple(value.shape)}".encode()
        content = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return zlib.crc32(content.data, zlib.crc32(words, before))
    if isinstance(value, list | tuple):
        for item in value:
            before = _checksum(item, before + 1)
        return before
    return zlib.crc32(repr(value).encode(), before)
