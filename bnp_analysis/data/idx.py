"""IDX, the format of the files of the MNIST family."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from bnp_analysis.errors import InvalidInputError

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
