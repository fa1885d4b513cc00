"""Data to strict JSON and back, bit for bit; private to `results`.

Strings, integers, booleans, None, finite floats, lists and dicts with plain string keys stand for
themselves (a finite float as the shortest decimal that reads back exactly). The rest stands under a tag:
``$float`` (NaN, infinities), ``$complex``, ``$tuple``, ``$dict`` (other keys), ``$array``, ``$tensor``,
``$dtype``, ``$device``. NumPy scalars and enumeration members become the Python value that they carry.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import torch

from bnp_analysis.errors import DataNotFoundError, InvalidInputError
from bnp_analysis.runtime.files import write_text
from bnp_analysis.runtime.kinds import KINDS

LIST_LIMIT = 10_000  # arrays up to this many entries are written as readable lists, larger ones as base64
_INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_DTYPES = (*_INTEGERS, "float16", "float32", "float64", "complex64", "complex128")
_TENSORS = (*_DTYPES, "bfloat16")


def encode(value: Any, where: str, nested: Callable[[Any], Any]) -> Any:
    """Return `value` as JSON data.

    Args:
        value: numbers, words, arrays, tensors, containers of these.
        where: name of the value, for the error message.
        nested: encodes any other value, or returns None if it cannot.

    Returns:
        What ``json.dumps(..., allow_nan=False)`` accepts.

    Raises:
        InvalidInputError: the value, or something inside it, is not data.

    >>> encode((1, math.inf), "bounds", lambda value: None)
    {'$tuple': [1, {'$float': 'inf'}]}
    """
    value = _bare(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, complex):
        return {"$complex": [encode(part, where, nested) for part in (value.real, value.imag)]}
    if isinstance(value, Mapping):
        pairs = [
            (encode(key, f"a key of {where}", nested), encode(item, f"{where}[{key!r}]", nested))
            for key, item in value.items()
        ]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$dict": [list(pair) for pair in pairs]}
    if isinstance(value, (list, tuple)):
        items = [encode(item, f"{where}[{i}]", nested) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, np.ndarray) and value.dtype.name in _DTYPES:
        return {"$array": _encode_array(value)}
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and _name(value.dtype) in _TENSORS:
        return {"$tensor": _encode_tensor(value)}
    if isinstance(value, (torch.dtype, torch.device)):
        return {"$dtype" if isinstance(value, torch.dtype) else "$device": _name(value)}
    encoded = nested(value)
    if encoded is None:
        raise InvalidInputError(
            f"{where} holds a {type(value).__module__}.{type(value).__qualname__}, which is not data; "
            "results hold numbers, words, arrays, tensors, containers of these, and other results: store its "
            "name or its numbers instead"
        )
    return encoded


def decode(raw: Any, nested: Callable[[Mapping[str, Any]], Any]) -> Any:
    """Return the value that :func:`encode` wrote as `raw`.

    Args:
        raw: parsed JSON.
        nested: decodes a dict whose only key is a tag unknown here.

    Returns:
        The value; arrays and tensors are new, tensors on the CPU.

    Raises:
        KeyError, TypeError, ValueError, AttributeError, RuntimeError: the data is damaged.

    >>> decode({"$tuple": [1, {"$float": "inf"}]}, lambda raw: None)
    (1, inf)
    """
    if isinstance(raw, list):
        return [decode(item, nested) for item in raw]
    if not isinstance(raw, dict):
        return raw
    tag = next(iter(raw)) if len(raw) == 1 else ""
    if not tag.startswith("$"):
        return {key: decode(item, nested) for key, item in raw.items()}
    content: Any = raw[tag]
    match tag:
        case "$float":
            return float(content)
        case "$complex":
            return complex(*(decode(part, nested) for part in content))
        case "$tuple":
            return tuple(decode(item, nested) for item in content)
        case "$dict":
            return {decode(key, nested): decode(item, nested) for key, item in content}
        case "$array":
            return _decode_array(content)
        case "$tensor":
            return _decode_tensor(content)
        case "$dtype":
            return _torch_dtype(content)
        case "$device":
            return torch.device(content)
    return nested(raw)


def plain(value: Any, nested: Callable[[Any], Any]) -> Any:
    """Return `value` as plain Python: lists for arrays, tensors and tuples, string keys, untagged NaN.

    Args:
        value: what :func:`encode` accepts.
        nested: converts any other value.

    Returns:
        Nested dicts and lists of Python scalars and strings.

    >>> plain({"v": np.arange(2), 3: (1.0, None)}, str)
    {'v': [0, 1], '3': [1.0, None]}
    """
    value = _bare(value)
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return value
    if isinstance(value, Mapping):
        return {str(_bare(key)): plain(item, nested) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, nested) for item in value]
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, (torch.dtype, torch.device)):
        return _name(value)
    return nested(value)


def write_json(path: str | os.PathLike[str], data: Any) -> Path:
    """Write strict JSON atomically: afterwards the file is the old one or the whole new one.

    Args:
        path: the file; missing folders are made.
        data: what :func:`encode` returned.

    Returns:
        The path.

    Raises:
        ValueError: `data` has a NaN or an infinity; nothing is written.
    """
    write_text(path, _dump(data, "\n") + "\n")
    return Path(path)


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the data of a strict JSON file.

    Raises:
        InvalidInputError: the file is not strict JSON (``NaN`` and ``Infinity`` are not); DataNotFoundError: there is
        none.
    """
    fits, words = KINDS["str | os.PathLike[str]"]
    if not fits(path):
        raise InvalidInputError(f"path must be {words}, not {path!r:.60}")
    if not os.path.lexists(path):
        raise DataNotFoundError(f"there is no file {path}, so no result can be read")
    if not Path(path).is_file():
        raise InvalidInputError(f"{path} is a folder, a pipe or a device, so no result can be read")
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path} is not valid JSON, so no result can be read: {error}") from error


def _dump(data: Any, newline: str) -> str:
    """Strict JSON, one line for each entry of a dict and for each list of scalars."""
    inner = newline + " "
    if isinstance(data, dict) and data:
        entries = (f"{json.dumps(key)}: {_dump(item, inner)}" for key, item in data.items())
        return "{" + inner + ("," + inner).join(entries) + newline + "}"
    if isinstance(data, list) and any(isinstance(item, (dict, list)) for item in data):
        return "[" + inner + ("," + inner).join(_dump(item, inner) for item in data) + newline + "]"
    return json.dumps(data, allow_nan=False)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _bare(value: Any) -> Any:
    """The Python value that an enumeration member or a NumPy scalar carries."""
    if isinstance(value, Enum):
        value = value.value
    return value.item() if isinstance(value, np.generic) else value


def _encode_array(array: npt.NDArray[Any]) -> dict[str, Any]:
    head = {"dtype": array.dtype.name, "shape": list(array.shape)}
    if array.size > LIST_LIMIT:
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        return head | {"base64": base64.b64encode(little.tobytes()).decode("ascii")}
    return head | {"data": [encode(item, "", _nothing) for item in array.ravel().tolist()]}


def _decode_array(raw: Mapping[str, Any]) -> npt.NDArray[Any]:
    if raw["dtype"] not in _DTYPES:
        raise ValueError(f"unknown dtype {raw['dtype']!r}")
    dtype = np.dtype(raw["dtype"])
    if "base64" in raw:
        flat = np.frombuffer(base64.b64decode(raw["base64"], validate=True), dtype=dtype.newbyteorder("<"))
        return flat.astype(dtype).reshape(raw["shape"])
    return np.array([decode(item, _nothing) for item in raw["data"]], dtype=dtype).reshape(raw["shape"])


def _encode_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.dtype == torch.bfloat16:  # NumPy has no bfloat16; float32 holds it exactly
        return _encode_array(tensor.float().numpy()) | {"dtype": "bfloat16"}
    return _encode_array(tensor.numpy())


def _decode_tensor(raw: Mapping[str, Any]) -> torch.Tensor:
    stored = "float32" if raw["dtype"] == "bfloat16" else raw["dtype"]
    return torch.from_numpy(_decode_array({**raw, "dtype": stored})).to(_torch_dtype(raw["dtype"]))


def _name(value: torch.dtype | torch.device) -> str:
    return str(value).removeprefix("torch.")


def _torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is not a dtype")
    return dtype


def _nothing(value: Any) -> NoReturn:
    raise ValueError(f"{value!r} inside an array")
