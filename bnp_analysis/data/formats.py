"""The formats of the files, read without running what they may hold: IDX (MNIST family), and CIFAR-10's pickles."""

from __future__ import annotations

import io
import math
import pickle
from typing import Any

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
