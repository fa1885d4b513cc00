"""Small synthetic data sets in the published formats, with the checksum table patched to know them."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from bnp_analysis.data.catalog import CATALOG, SourceFile
from bnp_analysis.data.files import ENVIRONMENT_VARIABLE, md5_hex

COUNTS = {"train": 40, "test": 20}


def idx_bytes(array: np.ndarray) -> bytes:
    """An array of uint8 in IDX form."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def _patch(monkeypatch: pytest.MonkeyPatch, name: str, contents: dict[str, bytes]) -> None:
    """Let the catalogue expect exactly these decompressed contents."""
    entry = CATALOG[name]
    files = {
        split: tuple(SourceFile(file.name, md5_hex(contents[file.name])) for file in files)
        for split, files in entry.files.items()
    }
    monkeypatch.setitem(CATALOG, name, dataclasses.replace(entry, files=files))


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of synthetic data must not find the real ones."""
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def idx_contents(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], dict[str, bytes]]:
    """Makes the four files of "mnist" or "fashion_mnist", and patches the catalogue to expect them."""

    def make(name: str) -> dict[str, bytes]:
        rng = np.random.default_rng(len(name))
        contents = {}
        for split, prefix in (("train", "train"), ("test", "t10k")):
            count = COUNTS[split]
            images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            images[:, 0, :5] = 7  # five constant features
            contents[f"{prefix}-images-idx3-ubyte"] = idx_bytes(images)
            labels = np.arange(count, dtype=np.uint8) % 10
            contents[f"{prefix}-labels-idx1-ubyte"] = idx_bytes(labels)
        _patch(monkeypatch, name, contents)
        return contents

    return make


@pytest.fixture
def cifar_contents(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The six batches of "cifar10", four images each; the catalogue is patched to expect them."""
    rng = np.random.default_rng(3)
    contents = {}
    for k, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        contents[name] = pickle.dumps({b"data": data, b"labels": [k, k + 1, k + 2, k + 3]}, protocol=2)
    _patch(monkeypatch, "cifar10", contents)
    return contents


@pytest.fixture
def write() -> Callable[[Path, dict[str, bytes]], Path]:
    """Writes named contents into a folder."""

    def write_files(folder: Path, contents: dict[str, bytes]) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        return folder

    return write_files
