"""Catches: partial or wrong files left behind after a failed download, unverified files being put in place,
damaged files that are kept for ever, an archive's own paths being trusted, and errors without a way on."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import gzip
import io
import os
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bnp_analysis import data
from bnp_analysis.data.catalog import CATALOG
from bnp_analysis.errors import ChecksumError, DataNotFoundError, InvalidInputError, OutputError

pytest.importorskip("pooch", reason="the extra `download` is not installed")

Contents = dict[str, bytes]


@dataclass
class Server:
    """What the local server delivers, and what it was asked for."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    truncate: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """An HTTP server on this machine."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            content = state.files.get(self.path)
            if content is None:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            for key, value in state.headers.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if self.path in state.truncate else content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_address[1]}/base"
        yield state
        http.shutdown()
        thread.join()


def all_files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def mnist(idx_contents: Callable[[str], Contents], server: Server) -> Contents:
    """Synthetic MNIST, served as it is published."""
    contents = idx_contents("mnist")
    server.files = {f"/base/{name}.gz": gzip.compress(content) for name, content in contents.items()}
    return contents


def tar(contents: Contents, folders: tuple[str, ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(name)
            info.size, info.type = (0, tarfile.DIRTYPE) if name in folders else (len(content), tarfile.REGTYPE)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_idx_files_arrive_and_load(tmp_path: Path, server: Server, mnist: Contents) -> None:
    target = tmp_path / "new" / "folder"
    loaded = data.load("mnist", data_dir=target, download=True, url=server.url + "/")
    assert len(loaded) == 40
    assert all_files(target) == ["mnist", *sorted(f"mnist/{name}.gz" for name in mnist)]
    server.asked.clear()
    assert data.download("mnist", data_dir=target, url=server.url) == ()
    assert len(data.load("mnist", split="test", data_dir=target, download=True, url=server.url)) == 20
    assert server.asked == [], "intact files were downloaded again"


def test_only_missing_and_damaged_files_are_fetched(tmp_path: Path, server: Server, mnist: Contents) -> None:
    data.download("mnist", data_dir=tmp_path, url=server.url)
    images, labels = (tmp_path / "mnist" / f"t10k-{k}-ubyte.gz" for k in ("images-idx3", "labels-idx1"))
    images.unlink()
    labels.write_bytes(b"damaged")
    server.asked.clear()
    assert data.download("mnist", data_dir=tmp_path, url=server.url) == (images, labels)
    assert len(server.asked) == 2
    assert len(data.load("mnist", split="test", data_dir=tmp_path)) == 20


def test_content_decompressed_on_the_way_is_kept_under_its_true_suffix(
    tmp_path: Path, server: Server, mnist: Contents
) -> None:
    server.headers = {"Content-Encoding": "gzip"}
    data.download("mnist", data_dir=tmp_path, url=server.url)
    assert all_files(tmp_path / "mnist") == sorted(mnist)
    assert len(data.load("mnist", data_dir=tmp_path)) == 40


BAD = "/base/t10k-labels-idx1-ubyte.gz"  # the last of four


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("404", DataNotFoundError, "404"),
        ("truncated", DataNotFoundError, "t10k-labels"),
        ("half a file", ChecksumError, "damaged or cut short"),
        ("other content", ChecksumError, "md5"),
        ("web page", ChecksumError, "md5"),
    ],
)
def test_a_failure_leaves_nothing_behind(
    tmp_path: Path, server: Server, mnist: Contents, fault: str, error: type[Exception], message: str
) -> None:
    good = server.files[BAD]
    match fault:
        case "404":
            del server.files[BAD]
        case "truncated":
            server.truncate.add(BAD)
        case "half a file":
            server.files[BAD] = good[: len(good) // 2]
        case "other content":
            server.files[BAD] = gzip.compress(b"something else")
        case "web page":
            server.files[BAD] = b"<html>please log in</html>"
    with pytest.raises(error, match=message) as caught:
        data.load("mnist", data_dir=tmp_path, download=True, url=server.url)
    assert "url=" in str(caught.value)
    assert all_files(tmp_path) == []
    assert len(server.asked) == 4


def test_a_server_that_is_not_there(tmp_path: Path, idx_contents: Callable[[str], Contents]) -> None:
    idx_contents("mnist")
    with pytest.raises(DataNotFoundError, match="could not be downloaded"):
        data.download("mnist", data_dir=tmp_path, url="http://127.0.0.1:9/")
    with pytest.raises(DataNotFoundError, match="could not be downloaded"):
        data.download("mnist", data_dir=tmp_path, url="no address at all")
    assert all_files(tmp_path) == []


def test_a_failure_keeps_what_was_there(tmp_path: Path, server: Server, mnist: Contents) -> None:
    (tmp_path / "mnist").mkdir()
    mine = tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz"
    mine.write_bytes(b"mine")
    del server.files[BAD]
    with pytest.raises(DataNotFoundError):
        data.download("mnist", data_dir=tmp_path, url=server.url)
    assert all_files(tmp_path) == ["mnist", "mnist/t10k-labels-idx1-ubyte.gz"]
    assert mine.read_bytes() == b"mine"


def test_the_next_mirror_is_tried(
    tmp_path: Path, server: Server, mnist: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrors = (f"{server.url}/nothing-here", server.url)
    monkeypatch.setitem(CATALOG, "mnist", dataclasses.replace(CATALOG["mnist"], mirrors=mirrors))
    assert len(data.load("mnist", data_dir=tmp_path, download=True)) == 40


def test_cifar_arrives_from_its_archive(tmp_path: Path, server: Server, cifar_contents: Contents) -> None:
    members = {f"cifar-10-batches-py/{name}": content for name, content in cifar_contents.items()}
    members["../escape"] = b"outside"
    members["cifar-10-batches-py/unasked"] = b"not published"
    server.files["/base/cifar-10-python.tar.gz"] = tar(members)
    root = tmp_path / "root"
    assert len(data.load("cifar10", data_dir=root, download=True, url=server.url)) == 20
    assert all_files(tmp_path) == [
        "root",
        "root/cifar-10-batches-py",
        *sorted(f"root/cifar-10-batches-py/{name}" for name in cifar_contents),
    ]


@pytest.mark.parametrize("fault", ["changed", "missing", "folder", "file is a folder", "cut", "no archive"])
def test_a_bad_archive_leaves_nothing_behind(
    tmp_path: Path, server: Server, cifar_contents: Contents, fault: str
) -> None:
    members = {f"cifar-10-batches-py/{name}": content for name, content in cifar_contents.items()}
    last = "cifar-10-batches-py/test_batch"
    whole: tuple[str, ...] = ()
    if fault == "changed":
        members[last] = members[last][:-1] + b"!"
    elif fault == "file is a folder":
        whole = (last,)
    elif fault == "missing":
        del members[last]
    elif fault == "folder":
        members = {name.split("/")[1]: content for name, content in members.items()}
    content = tar(members, folders=whole)
    if fault == "cut":
        content = content[: len(content) // 2]
    server.files["/base/cifar-10-python.tar.gz"] = b"hello" if fault == "no archive" else content
    what = f": {last} is not a file" if whole else ""
    with pytest.raises(ChecksumError, match=rf"cifar-10-python\.tar\.gz{what}"):
        data.download("cifar10", data_dir=tmp_path, url=server.url)
    assert all_files(tmp_path) == []


def test_a_folder_in_the_way_is_named_before_anything_is_fetched(
    tmp_path: Path, server: Server, mnist: Contents
) -> None:
    name = "t10k-labels-idx1-ubyte.gz"
    (tmp_path / "mnist" / name).mkdir(parents=True)
    said = rf"^data_dir='\S*mnist/{name}' is a folder; give the path of a file$"
    with pytest.raises(InvalidInputError, match=said):
        data.download("mnist", data_dir=tmp_path, url=server.url)
    file = tmp_path / "no-folder"
    file.write_bytes(b"mine")
    with pytest.raises(InvalidInputError, match=r"^data_dir='\S*' lies in \S*no-folder, which is no folder$"):
        data.download("mnist", data_dir=file, url=server.url)
    assert server.asked == []
    assert all_files(tmp_path) == ["mnist", f"mnist/{name}", "no-folder"]


@pytest.mark.parametrize("late", [False, True], ids=["arriving", "put in place"])
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_a_disk_that_fills_up_is_no_fault_of_the_server(
    name: str, late: bool, tmp_path: Path, server: Server, mnist: Contents, cifar_contents: Contents,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One server is asked, once a file; nothing half-written stays, and what was there does."""
    members = {f"cifar-10-batches-py/{member}": content for member, content in cifar_contents.items()}
    server.files["/base/cifar-10-python.tar.gz"] = tar(members)
    monkeypatch.setitem(
        CATALOG, name, dataclasses.replace(CATALOG[name], mirrors=(server.url, f"{server.url}/another"))
    )
    before = tmp_path / ("mnist" if name == "mnist" else "cifar-10-batches-py")
    before.mkdir()
    (before / "mine").write_bytes(b"mine")
    opened = io.open

    def full(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        temporary = str(file).endswith(".tmp") if late else "/.download-" in str(file)
        if set(mode) & set("wx") and temporary:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return opened(file, mode, *args, **kwargs)

    monkeypatch.setattr(io, "open", full)
    monkeypatch.setattr(builtins, "open", full)
    with pytest.raises(OutputError, match=r"^\S* could not be written: No space left on device$"):
        data.download(name, data_dir=tmp_path)
    assert all_files(tmp_path) == [before.name, f"{before.name}/mine"]
    assert not any("another" in path for path in server.asked)


def test_a_link_stays_a_link(tmp_path: Path, server: Server, mnist: Contents) -> None:
    """The file behind it is written."""
    name = "t10k-labels-idx1-ubyte.gz"
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / name).symlink_to(tmp_path / "elsewhere")
    data.download("mnist", data_dir=tmp_path, url=server.url)
    assert (tmp_path / "mnist" / name).is_symlink()
    assert (tmp_path / "elsewhere").read_bytes() == server.files[BAD]


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, server: Server, mnist: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    data.download("mnist", data_dir=tmp_path, url=server.url)
    opened = Path.open

    def refuse(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name.startswith("train-images"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ChecksumError, match=r"train-images-idx3-ubyte\.gz could not be read: Permission denied"):
        data.load("mnist", data_dir=tmp_path)


def test_digits_need_no_download() -> None:
    assert len(data.load("digits", n=3, download=True)) == 3
    with pytest.raises(InvalidInputError, match="mnist, fashion_mnist, cifar10"):
        data.download("digits")


def test_without_pooch_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install 'bnp-analysis\[download\]'"):
        data.load("mnist", data_dir=tmp_path / "new", download=True)
    assert all_files(tmp_path) == []
