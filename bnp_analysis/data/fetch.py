"""Downloading a data set: into a temporary folder, verified there, and only then put in place."""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnp_analysis.data.catalog import Catalogued, SourceFile, catalogued
from bnp_analysis.data.files import data_root, find, not_found, suffix_of, verify
from bnp_analysis.errors import BNPAnalysisError, ChecksumError, DataNotFoundError

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
        InvalidInputError: for an unknown name.
        DataNotFoundError: if no data directory is known, or no server delivered.
        ChecksumError: if what was delivered is not the published file. Nothing of it stays behind.
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
    root.mkdir(parents=True, exist_ok=True)
    # Inside the data directory, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
        fetch = _fetch_archive if entry.archive else _fetch_each
        ready = fetch(entry, wanted, mirrors, Path(folder), downloader)
        target = root / entry.folders[0]
        target.mkdir(parents=True, exist_ok=True)
        return tuple(_put_in_place(path, target) for path in ready)


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


def _put_in_place(path: Path, target: Path) -> Path:
    destination = target / path.name
    os.replace(path, destination)
    return destination


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
                    content = verify(stream.read(), file, f"{source}: {member}")
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
        except OSError as error:  # every failure of requests is one
            failures.append(f"{address}: {error}")
    raise kind(
        f"data set {name!r} could not be downloaded, and nothing was left behind:\n  "
        + "\n  ".join(failures)
        + "\ntry another server with url=..., or put the files into the data directory by hand"
    )
