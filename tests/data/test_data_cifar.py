"""Catches: channels taken for columns, a pickle that can run code, and batches of a wrong shape, type or
label range being accepted."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bnp_analysis.data.files import parse_cifar_batch
from bnp_analysis.errors import InvalidInputError


class Malicious:
    """Unpickling this creates a folder."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def batch(**changes: Any) -> bytes:
    content = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [1, 2]}
    content.update({key.encode(): value for key, value in changes.items()})
    return pickle.dumps(content, protocol=2)


def test_a_row_is_three_planes_of_rows() -> None:
    data = np.zeros((1, 3072), np.uint8)
    data[0, 1024 + 2 * 32 + 5] = 9  # second channel, third row, sixth column
    images, labels = parse_cifar_batch(pickle.dumps({b"data": data, b"labels": [4]}))
    assert np.argwhere(images).tolist() == [[0, 1, 2, 5]]
    assert images.dtype == np.uint8
    assert labels.tolist() == [4]
    assert labels.dtype == np.int64


@pytest.mark.parametrize("protocol", range(5))
def test_every_pickle_protocol_up_to_4_is_read(protocol: int) -> None:
    data = np.arange(6144, dtype=np.uint8).reshape(2, 3072)
    content = pickle.dumps({b"data": data, b"labels": [0, 9]}, protocol=protocol)
    np.testing.assert_array_equal(parse_cifar_batch(content)[0].reshape(2, 3072), data)


@pytest.mark.parametrize("where", ["data", "labels", "extra"])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, where: str) -> None:
    target = tmp_path / "created by unpickling"
    with pytest.raises(InvalidInputError, match="mkdir, which a CIFAR-10 batch does not need"):
        parse_cifar_batch(batch(**{where: Malicious(target)}))
    assert not target.exists()
    pickle.loads(batch(**{where: Malicious(target)}))
    assert target.exists(), "the attack of this test does not work"


@pytest.mark.parametrize("name", ["eval", "getattr", "__import__"])
def test_builtins_are_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"builtins.{name}"):
        parse_cifar_batch(f"cbuiltins\n{name}\n.".encode())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a CIFAR-10 batch"),
        (b"no pickle at all", "not a CIFAR-10 batch"),
        (pickle.dumps([1]), "no dict"),
        (pickle.dumps({b"data": 1}), "no dict"),
        (batch()[:-100], "not a CIFAR-10 batch"),
        (batch(data=np.zeros((2, 3071), np.uint8)), "3072"),
        (batch(data=np.zeros((2, 3072), np.float32)), "uint8"),
        (batch(data=[[0] * 3072] * 2), "uint8"),
        (batch(labels=[1]), "list of 2"),
        (batch(labels=np.array([1, 2])), "list of 2"),
        (batch(labels=[1, 10]), "0..9"),
        (batch(labels=[1, -1]), "0..9"),
        (batch(labels=[1, 1.5]), "0..9"),
    ],
)
def test_malformed_batches_are_refused(content: bytes, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_cifar_batch(content, "some file")
