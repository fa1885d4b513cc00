"""Catches: sizes read in the wrong byte order, a header read at the wrong offset, multi-byte entries read in
the machine's byte order, and files that are too short, too long or no IDX at all being accepted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bnp_analysis.data.files import parse_idx
from bnp_analysis.errors import InvalidInputError

HEADER = bytes([0, 0, 8, 2, 0, 0, 0, 2, 0, 0, 0, 3])


def test_entries_are_row_major() -> None:
    np.testing.assert_array_equal(parse_idx(HEADER + bytes(range(6))), [[0, 1, 2], [3, 4, 5]])


def test_sizes_use_all_four_bytes() -> None:
    content = bytes([0, 0, 8, 1, 0, 1, 1, 2]) + bytes(65536 + 256 + 2)
    assert parse_idx(content).shape == (65536 + 256 + 2,)


@pytest.mark.parametrize(
    ("code", "stored", "expected"),
    [
        (0x08, ">u1", [255, 1]),
        (0x09, ">i1", [-1, 1]),
        (0x0B, ">i2", [-2, 258]),
        (0x0C, ">i4", [-70000, 16909060]),
        (0x0D, ">f4", [0.5, -3.25]),
        (0x0E, ">f8", [0.1, -1e300]),
    ],
)
def test_every_type_of_the_format(code: int, stored: str, expected: list[float]) -> None:
    content = bytes([0, 0, code, 1, 0, 0, 0, 2]) + np.array(expected, dtype=stored).tobytes()
    assert parse_idx(content).tolist() == expected


@pytest.mark.parametrize(("code", "kind"), [(0x08, "u1"), (0x0B, "i2"), (0x0C, "i4"), (0x0D, "f4"), (0x0E, "f8")])
def test_arrays_are_what_torch_takes(code: int, kind: str) -> None:
    """In the byte order of the machine, and still read-only."""
    array = parse_idx(bytes([0, 0, code, 1, 0, 0, 0, 2]) + np.array([3, 260 % 256]).astype(f">{kind}").tobytes())
    assert array.dtype.isnative
    assert not array.flags.writeable
    assert torch.tensor(array).tolist() == [3, 4]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "nothing"),
        (b"\0\0\x08", "not IDX"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "1f 8b"),
        (b"\0\0\x07\x01" + bytes(4), "a type in"),
        (b"\0\0\x08\0", "number of dimensions"),
        (HEADER[:7], "ends inside"),
        (HEADER + bytes(5), "has 17 bytes.*which is 18"),
        (HEADER + bytes(7), "has 19 bytes.*which is 18"),
        (bytes([0, 0, 8, 4]) + b"\xff" * 16, "announces shape"),
    ],
)
def test_malformed_content_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_idx(content, "some file")
