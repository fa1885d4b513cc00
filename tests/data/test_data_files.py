"""Catches: folders or compressions that are not searched, files parsed before their checksum agreed, batches
out of order, statistics of the wrong split, and errors that do not say how to go on."""

from __future__ import annotations

import gzip
import lzma
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnp_analysis import data
from bnp_analysis.data.files import ENVIRONMENT_VARIABLE, decompress
from bnp_analysis.errors import ChecksumError, DataNotFoundError, InvalidInputError

Contents = dict[str, bytes]
Write = Callable[[Path, Contents], Path]


class Malicious:
    """Unpickling this creates a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def compressions(contents: Contents) -> list[Contents]:
    """The same files as they are, with gzip, with xz."""
    return [
        contents,
        {f"{name}.gz": gzip.compress(content, 1) for name, content in contents.items()},
        {f"{name}.xz": lzma.compress(content, preset=0) for name, content in contents.items()},
    ]


@pytest.mark.parametrize("compression", [0, 1, 2])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "."),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "fashion_mnist"),
        ("fashion_mnist", "fashion-mnist"),
        ("fashion_mnist", "."),
    ],
)
def test_idx_sets_are_found(
    tmp_path: Path,
    idx_contents: Callable[[str], Contents],
    write: Write,
    name: str,
    folder: str,
    compression: int,
) -> None:
    contents = idx_contents(name)
    write(tmp_path / folder, compressions(contents)[compression])
    for split, prefix, count in (("train", "train", 40), ("test", "t10k", 20)):
        loaded = data.load(name, split=split, data_dir=tmp_path)
        assert loaded.x.shape == (count, 1, 28, 28)
        assert loaded.y.tolist() == [k % 10 for k in range(count)]
        pixels = np.frombuffer(contents[f"{prefix}-images-idx3-ubyte"][16:], np.uint8)
        np.testing.assert_array_equal(loaded.x.flatten(), pixels / np.float32(255))
        assert [file["name"].split(".")[0] for file in loaded.provenance["files"]] == [
            f"{prefix}-images-idx3-ubyte",
            f"{prefix}-labels-idx1-ubyte",
        ]


@pytest.mark.parametrize("compression", [0, 1, 2])
@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar10", "."])
def test_cifar_is_found_and_its_batches_are_in_order(
    tmp_path: Path, cifar_contents: Contents, write: Write, folder: str, compression: int
) -> None:
    write(tmp_path / folder, compressions(cifar_contents)[compression])
    train, test = (data.load("cifar10", split=s, data_dir=tmp_path) for s in ("train", "test"))
    assert train.x.shape == (20, 3, 32, 32)
    assert train.y.tolist() == [k + i for k in range(5) for i in range(4)]
    assert test.y.tolist() == [5, 6, 7, 8]
    third = pickle.loads(cifar_contents["data_batch_3"])[b"data"]
    np.testing.assert_array_equal(train.x[8:12].flatten(1), third / np.float32(255))
    assert train.classes[3] == "cat"
    assert data.load("cifar10", data_dir=tmp_path, flatten=True).x.shape == (20, 3072)


def test_standardized_test_split_names_the_training_files(
    tmp_path: Path, idx_contents: Callable[[str], Contents], write: Write
) -> None:
    write(tmp_path, idx_contents("mnist"))
    loaded = data.load("mnist", split="test", standardize=True, data_dir=tmp_path)
    assert [file["name"] for file in loaded.provenance["files"]] == [
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
    ]
    assert loaded.provenance["constant_features"] == 5
    assert loaded.x[:, 0, 0, :5].abs().max() == 0


def test_environment_variable_is_used_unless_a_folder_is_given(
    tmp_path: Path,
    idx_contents: Callable[[str], Contents],
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path / "here", idx_contents("mnist"))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "here"))
    assert len(data.load("mnist")) == 40
    with pytest.raises(DataNotFoundError, match="elsewhere"):
        data.load("mnist", data_dir=tmp_path / "elsewhere")


def test_missing_data_says_what_where_and_how(
    tmp_path: Path, idx_contents: Callable[[str], Contents], write: Write
) -> None:
    contents = idx_contents("fashion_mnist")
    write(tmp_path, {k: v for k, v in contents.items() if "labels" not in k})
    with pytest.raises(FileNotFoundError) as caught:
        data.load("fashion_mnist", data_dir=tmp_path)
    message = str(caught.value)
    assert "lacks: train-labels-idx1-ubyte\n" in message
    for part in (str(tmp_path / "fashion_mnist"), f"{tmp_path} (", "download=True", "apt-get", "digits"):
        assert part in message


def test_without_any_folder_the_error_says_so() -> None:
    with pytest.raises(DataNotFoundError, match=f"{ENVIRONMENT_VARIABLE} is not set"):
        data.load("cifar10")
    with pytest.raises(DataNotFoundError, match=f"{ENVIRONMENT_VARIABLE} is not set"):
        data.download("cifar10")


def test_a_wrong_copy_is_passed_over_for_the_right_one(
    tmp_path: Path, idx_contents: Callable[[str], Contents], write: Write
) -> None:
    """MNIST and Fashion-MNIST use the same file names."""
    mnist = write(tmp_path, idx_contents("mnist"))
    fashion = idx_contents("fashion_mnist")
    with pytest.raises(ChecksumError, match="it is mnist's train-images"):
        data.load("fashion_mnist", data_dir=mnist)
    write(tmp_path / "fashion-mnist", fashion)
    assert len(data.load("fashion_mnist", data_dir=mnist)) == 40


def test_changed_or_damaged_files_are_refused(
    tmp_path: Path, idx_contents: Callable[[str], Contents], write: Write
) -> None:
    contents = idx_contents("mnist")
    name = "train-images-idx3-ubyte"
    changed = bytearray(contents[name])
    changed[-1] ^= 1
    write(tmp_path, {**contents, name: bytes(changed)})
    with pytest.raises(ChecksumError, match=r"md5.*Replace it"):
        data.load("mnist", data_dir=tmp_path)
    assert len(data.load("mnist", split="test", data_dir=tmp_path)) == 20
    (tmp_path / name).unlink()
    for suffix, packed in ((".gz", gzip.compress(contents[name])), (".xz", lzma.compress(contents[name]))):
        path = tmp_path / f"{name}{suffix}"
        for damaged in (packed[:-20], packed[:200] + b"0123456789" + packed[210:], packed[:6]):
            path.write_bytes(damaged)
            with pytest.raises(ChecksumError, match=r"damaged|md5"):
                data.load("mnist", data_dir=tmp_path)
        path.unlink()


def test_an_unknown_pickle_is_not_opened(
    tmp_path: Path, cifar_contents: Contents, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The restricted unpickler is the second defence; the checksum comes first."""
    target = tmp_path / "created by unpickling"
    write(tmp_path, {**cifar_contents, "test_batch": pickle.dumps(Malicious(target))})

    def never(*_: object) -> None:
        raise AssertionError("parsed before its checksum agreed")

    monkeypatch.setattr("bnp_analysis.data.dataset.parse_cifar_batch", never)
    with pytest.raises(ChecksumError, match="not the published test_batch"):
        data.load("cifar10", split="test", data_dir=tmp_path)
    assert not target.exists()


def test_wrong_sizes_with_a_right_checksum_are_refused(
    tmp_path: Path,
    idx_contents: Callable[[str], Contents],
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write(tmp_path, idx_contents("mnist"))
    images, labels = np.zeros((3, 28, 28), np.uint8), np.zeros(3, np.uint8)
    cases = [
        (images[:2], labels, "2 images, 3 labels"),
        (images[:, 1:], labels, r"expected \(N, 28, 28\)"),
        (images, labels[:, None], r"expected \(N,\)"),
    ]
    for bad_images, bad_labels, message in cases:
        arrays = iter([bad_images, bad_labels])
        monkeypatch.setattr("bnp_analysis.data.dataset.parse_idx", lambda *_, a=arrays: next(a))
        with pytest.raises(InvalidInputError, match=message):
            data.load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress])
def test_no_more_is_unpacked_than_was_published(pack: Callable[[bytes], bytes]) -> None:
    assert decompress(pack(b"pixels"), "x", size=6) == b"pixels"
    with pytest.raises(ChecksumError, match="x goes on after the 5 bytes that were published"):
        decompress(pack(b"pixels"), "x", size=5)
