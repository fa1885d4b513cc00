"""Files of a data set: search, verification before reading, download of missing files, and formats."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import math
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bnp_analysis.data.catalog import Catalogued, SourceFile, catalogued, whose
from bnp_analysis.errors import BNPAnalysisError, ChecksumError, DataNotFoundError, InvalidInputError
from bnp_analysis.runtime.files import require_output, whole_file, writing

#: The environment variable that names the data directory.
ENVIRONMENT_VARIABLE = "BNP_ANALYSIS_DATA"

# Suffix -> how such files begin, and what reads them.
_COMPRESSIONS: dict[str, tuple[bytes, Callable[[Any], Any]]] = {
    ".gz": (b"\x1f\x8b", lambda stream: gzip.GzipFile(fileobj=stream)),
    ".xz": (b"\xfd7zXZ\x00", lzma.LZMAFile),
}


@dataclass(frozen=True)
class VerifiedFile:
    """A file whose decompressed bytes `content` have the published checksum."""

    path: Path
    md5: str
    content: bytes


def md5_hex(content: bytes) -> str:
    """The md5 of some bytes, as 32 hexadecimal digits."""
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def suffix_of(raw: bytes) -> str:
    """The suffix that belongs to the compression of some bytes: ".gz", ".xz" or ""."""
    return next((suffix for suffix, (magic, _) in _COMPRESSIONS.items() if raw.startswith(magic)), "")


def decompress(raw: bytes, source: str, size: int | None = None) -> bytes:
    """Undo gzip or xz, recognized by content, since mirrors and servers rename and recompress.

    Args:
        raw: the bytes of a file.
        source: what to call it in an error.
        size: where to stop: a small file may stand for more than the memory holds.

    Returns:
        The decompressed bytes, or `raw` where it is not compressed.

    Raises:
        ChecksumError: if the compressed stream is damaged, cut short, or goes on after `size` bytes.

    Example:
        >>> decompress(gzip.compress(b"pixels"), "x.gz")
        b'pixels'
    """
    try:
        stream: Any = io.BytesIO(raw)
        if suffix := suffix_of(raw):
            stream = _COMPRESSIONS[suffix][1](stream)
        content: bytes = stream.read(-1 if size is None else size + 1)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise ChecksumError(f"{source} is damaged or cut short: {error}") from error
    if size is not None and len(content) > size:
        raise ChecksumError(f"{source} goes on after the {size} bytes that were published: nothing more was read")
    return content


def verify(raw: bytes, file: SourceFile, source: str) -> bytes:
    """Decompress and compare with the published checksum.

    Args:
        raw: the bytes of a file, compressed or not.
        file: what it should be.
        source: what to call it in an error.

    Returns:
        The decompressed bytes.

    Raises:
        ChecksumError: if it is anything else.

    Example:
        >>> verify(b"pixels", SourceFile("x", md5_hex(b"pixels")), "x")
        b'pixels'
    """
    content = decompress(raw, source, file.size)
    found = md5_hex(content)
    if found != file.md5:
        owner = whose(found)
        hint = f" (it is {owner})" if owner else ""
        raise ChecksumError(
            f"{source} is not the published {file.name}: "
            f"md5 of its decompressed bytes is {found}{hint}, expected {file.md5}"
        )
    return content


def data_root(data_dir: str | os.PathLike[str] | None) -> Path | None:
    """The data directory: the argument, else the environment variable BNP_ANALYSIS_DATA, else None."""
    chosen = data_dir if data_dir is not None else os.environ.get(ENVIRONMENT_VARIABLE) or None
    return None if chosen is None else Path(chosen).expanduser()


def _candidates(entry: Catalogued, file: SourceFile, root: Path) -> Iterator[Path]:
    for folder in entry.folders:
        for suffix in ("", *_COMPRESSIONS):
            yield root / folder / f"{file.name}{suffix}"


def find(entry: Catalogued, file: SourceFile, root: Path) -> VerifiedFile | None:
    """The first copy of a file whose checksum agrees.

    Args:
        entry: the data set.
        file: one of its files.
        root: the data directory.

    Returns:
        The verified file, or None where no copy exists.

    Raises:
        ChecksumError: if copies exist and none is the published one.
    """
    wrong: list[str] = []
    for path in _candidates(entry, file, root):
        if path.is_file():
            try:
                with path.open("rb") as stream:
                    raw = stream.read(-1 if file.size is None else file.size + 1)  # compressed ones are smaller
                return VerifiedFile(path, file.md5, verify(raw, file, str(path)))
            except ChecksumError as error:
                wrong.append(str(error))
            except OSError as error:
                wrong.append(f"{path} could not be read: {error.strerror or error}")
    if wrong:
        raise ChecksumError(
            "; ".join(wrong) + f". Nothing was read from it. Replace it, or let "
            f"load({entry.name!r}, download=True) put the published file into {root / entry.folders[0]}"
        )
    return None


def read(entry: Catalogued, split: str, root: Path | None) -> Iterator[VerifiedFile]:
    """The files of one split in reading order, each verified.

    Args:
        entry: the data set.
        split: "train" or "test".
        root: the data directory, or None where none is known.

    Returns:
        An iterator over the files, so that one at a time is in memory.

    Raises:
        DataNotFoundError: before anything is read, if a file is missing.
        ChecksumError: when the iterator reaches a file that is not the published one.
    """
    files = entry.files[split]
    missing = [file for file in files if root is None or not any(p.is_file() for p in _candidates(entry, file, root))]
    if missing:
        raise not_found(entry, missing, root)
    assert root is not None
    for file in files:
        found = find(entry, file, root)
        if found is None:  # removed between the two looks
            raise not_found(entry, [file], root)
        yield found


def not_found(entry: Catalogued, files: Iterable[SourceFile], root: Path | None) -> DataNotFoundError:
    """The error that names the missing files, where they were looked for, and the ways to get them."""
    names = ", ".join(file.name for file in files)
    if root is None:
        looked = f"nowhere: no data_dir= was given, environment variable {ENVIRONMENT_VARIABLE} is not set"
        where = "'DIR'"
    else:
        places = ", ".join(str(root / folder) if folder != "." else str(root) for folder in entry.folders)
        looked = f"{places} (each name as it is, with .gz and with .xz)"
        where = repr(str(root))
    ways = [
        f"bnp_analysis.data.load({entry.name!r}, data_dir={where}, download=True), "
        f"which needs pip install 'bnp-analysis[download]'",
        f"put the published files into {where}, from {entry.mirrors[0]}",
        f"name the folder that has them: data_dir=... or {ENVIRONMENT_VARIABLE}=...",
        *([entry.hint] if entry.hint else []),
        "use data set 'digits', which needs no files",
    ]
    return DataNotFoundError(
        f"data set {entry.name!r} lacks: {names}\nlooked in: {looked}\nways to get on:\n  - " + "\n  - ".join(ways)
    )


_TIMEOUT_SECONDS = 60
_CHUNK_BYTES = 1 << 16


def download(name: str, *, data_dir: str | os.PathLike[str] | None = None, url: str | None = None) -> tuple[Path, ...]:
    """Download the missing or damaged files of a data set, and verify them before they are put in place.

    Args:
        name: "mnist", "fashion_mnist" or "cifar10".
        data_dir: the data directory, by default the environment variable BNP_ANALYSIS_DATA. It is created
            where it does not exist; the files go into a sub-folder of the data set's own name.
        url: a base URL to use in place of the public mirrors. MNIST and Fashion-MNIST are fetched as
            `<url>/<file>.gz`, CIFAR-10 as `<url>/cifar-10-python.tar.gz`.

    Returns:
        The paths of the files that were written, none if all were there and intact.

    Raises:
        InvalidInputError: for an unknown name; before anything is fetched, where a file could not be put in place.
        DataNotFoundError: if no data directory is known, or no server delivered.
        ChecksumError: if what was delivered is not the published file. Nothing of it stays behind.
        OutputError: the disk is full, or the directory may not be written to; files that were put in place stay.
        ImportError: without pooch, which the extra `download` installs.

    Example:
        >>> download("mnist", data_dir="DIR")  # doctest: +SKIP
    """
    entry = catalogued(name)
    root = data_root(data_dir)
    if root is None:
        raise not_found(entry, entry.all_files, None)
    wanted = [file for file in entry.all_files if not _intact(entry, file, root)]
    if not wanted:
        return ()
    downloader = _downloader()
    mirrors = entry.mirrors if url is None else (url,)
    target = root / entry.folders[0]
    for file in wanted:
        require_output(target / f"{file.name}{'' if entry.archive else '.gz'}", "data_dir")
    placed = []
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
            fetch = _fetch_archive if entry.archive else _fetch_each
            for path in fetch(entry, wanted, mirrors, Path(folder), downloader):
                with path.open("rb") as arrived, whole_file(target / path.name) as final:
                    shutil.copyfileobj(arrived, final)
                path.unlink()
                placed.append(target / path.name)
    return tuple(placed)


def _downloader() -> Any:
    try:
        import pooch
    except ImportError as error:
        raise ImportError(
            "downloading needs pooch: pip install 'bnp-analysis[download]', "
            "or put the files into the data directory by hand"
        ) from error
    return pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=_CHUNK_BYTES, timeout=_TIMEOUT_SECONDS)


def _intact(entry: Catalogued, file: SourceFile, root: Path) -> bool:
    try:
        return find(entry, file, root) is not None
    except ChecksumError:
        return False


def _fetch_each(
    entry: Catalogued, files: list[SourceFile], mirrors: tuple[str, ...], folder: Path, downloader: Any
) -> list[Path]:
    ready = []
    for file in files:
        arrived = folder / "arriving"

        def accept(path: Path, source: str, file: SourceFile = file) -> None:
            verify(path.read_bytes(), file, source)

        _fetch(entry.name, _addresses(mirrors, f"{file.name}.gz"), arrived, downloader, accept)
        # A server may undo the compression on the way, so the suffix follows the content.
        with arrived.open("rb") as stream:
            suffix = suffix_of(stream.read(6))
        ready.append(arrived.rename(folder / f"{file.name}{suffix}"))
    return ready


def _fetch_archive(
    entry: Catalogued, files: list[SourceFile], mirrors: tuple[str, ...], folder: Path, downloader: Any
) -> list[Path]:
    assert entry.archive is not None

    def accept(path: Path, source: str) -> None:
        try:
            with tarfile.open(path) as archive:
                for file in files:
                    member = f"{entry.archive_folder}/{file.name}"
                    # Members are read by their known names: no path of the archive is ever written to.
                    stream = archive.extractfile(member)
                    if stream is None:
                        raise ChecksumError(f"{source}: {member} is not a file")
                    content = verify(
                        stream.read(-1 if file.size is None else file.size + 1), file, f"{source}: {member}"
                    )
                    (folder / file.name).write_bytes(content)
        except (tarfile.TarError, EOFError, zlib.error, KeyError) as error:
            raise ChecksumError(f"{source} is damaged or not the published archive: {error}") from error

    _fetch(entry.name, _addresses(mirrors, entry.archive), folder / "arriving", downloader, accept)
    return [folder / file.name for file in files]


def _addresses(mirrors: tuple[str, ...], remote: str) -> list[str]:
    return [f"{mirror.rstrip('/')}/{remote}" for mirror in mirrors]


def _fetch(
    name: str,
    addresses: list[str],
    destination: Path,
    downloader: Any,
    accept: Callable[[Path, str], None],
) -> None:
    """Try one address after the other until one delivers what `accept` does not refuse."""
    failures: list[str] = []
    kind: type[BNPAnalysisError] = DataNotFoundError
    for address in addresses:
        try:
            downloader(address, str(destination), None)
            accept(destination, address)
            return
        except ChecksumError as error:
            kind = ChecksumError
            failures.append(str(error))
        except OSError as error:
            from requests import RequestException  # which is an OSError too; pooch needs it

            if not isinstance(error, RequestException):
                raise  # of the disk: another server would not help
            failures.append(f"{address}: {error}")
    raise kind(
        f"data set {name!r} could not be downloaded, and nothing was left behind:\n  "
        + "\n  ".join(failures)
        + "\ntry another server with url=..., or put the files into the data directory by hand"
    )


_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def parse_idx(content: bytes, source: str = "IDX data") -> npt.NDArray[np.generic]:
    """Read one IDX array: bytes 0, 0, type, d; then d big-endian sizes; then the entries, row-major.

    Args:
        content: the decompressed bytes of the file.
        source: what to call it in an error.

    Returns:
        A read-only array of the stored shape and type, in the byte order of this machine.

    Raises:
        InvalidInputError: if the magic number, the sizes or the length do not agree.

    Example:
        >>> parse_idx(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
        array([7, 8, 9], dtype=uint8)
    """
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _IDX_TYPES or content[3] == 0:
        raise InvalidInputError(
            f"{source} is not IDX: it starts with {content[:4].hex(' ') or 'nothing'}, expected 00 00, "
            f"a type in {', '.join(f'{t:02x}' for t in _IDX_TYPES)}, and the number of dimensions"
        )
    dtype, ndim = np.dtype(_IDX_TYPES[content[2]]), content[3]
    header = 4 + 4 * ndim
    if len(content) < header:
        raise InvalidInputError(f"{source} ends inside its IDX header: {len(content)} of {header} bytes")
    shape = tuple(int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4))
    expected = header + math.prod(shape) * dtype.itemsize
    if len(content) != expected:
        raise InvalidInputError(
            f"{source} has {len(content)} bytes, but its IDX header announces shape {shape} of {dtype.name}, "
            f"which is {expected} bytes"
        )
    array = np.frombuffer(content, dtype, offset=header).reshape(shape).astype(dtype.newbyteorder("="), copy=False)
    array.flags.writeable = False
    return array


# The name numpy gives its reconstruction function moved; pickles carry either.
_CIFAR_NEEDS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
_RECONSTRUCT = np.empty(0).__reduce__()[0]
_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_CLASSES = 10


class _ArrayUnpickler(pickle.Unpickler):
    """A checksum says that a file is known; this says that an unknown one cannot do harm either."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CIFAR_NEEDS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a CIFAR-10 batch does not need")
        if name == "_reconstruct":
            return _RECONSTRUCT
        return super().find_class(module, name)


def parse_cifar_batch(
    content: bytes, source: str = "CIFAR-10 batch"
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Read one python batch of CIFAR-10, a pickled dict with `data` (N, 3072) and `labels` (N,).

    Args:
        content: the decompressed bytes of the file.
        source: what to call it in an error.

    Returns:
        Images (N, 3, 32, 32), uint8, and labels (N,), int64.

    Raises:
        InvalidInputError: if it is no such pickle, or asks for anything beyond arrays.

    Example:
        >>> batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [3, 5]}
        >>> images, labels = parse_cifar_batch(pickle.dumps(batch))
        >>> images.shape, labels.tolist()
        ((2, 3, 32, 32), [3, 5])
    """
    try:
        batch = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a pickle from elsewhere can raise anything
        raise InvalidInputError(f"{source} is not a CIFAR-10 batch: {error}") from error
    if not isinstance(batch, dict) or not {b"data", b"labels"} <= batch.keys():
        raise InvalidInputError(f"{source} is not a CIFAR-10 batch: no dict with 'data' and 'labels'")
    data, labels = batch[b"data"], batch[b"labels"]
    pixels = int(np.prod(_CIFAR_SHAPE))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (pixels,):
        raise InvalidInputError(f"{source}: 'data' is not a uint8 array of shape (N, {pixels})")
    if not isinstance(labels, list) or len(labels) != len(data):
        raise InvalidInputError(f"{source}: 'labels' is not a list of {len(data)} labels")
    if not all(type(label) is int and 0 <= label < _CIFAR_CLASSES for label in labels):
        raise InvalidInputError(f"{source}: a label is not an integer in 0..{_CIFAR_CLASSES - 1}")
    return data.reshape(-1, *_CIFAR_SHAPE), np.asarray(labels, dtype=np.int64)
