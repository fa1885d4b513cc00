"""The base of all results: provenance, a one-line summary, tables and files.

A result is a frozen dataclass that derives from :class:`Result` and holds numbers, words, arrays, tensors,
containers of these, and other results; never a model or an operator. Files are strict JSON, written atomically, and
read back bit for bit.

Strings, integers, booleans, None, finite floats, lists and dicts with plain string keys stand for
themselves (a finite float as the shortest decimal that reads back exactly). The rest stands under a tag:
``$float`` (NaN, infinities), ``$complex``, ``$tuple``, ``$dict`` (other keys), ``$array``, ``$tensor``,
``$dtype``, ``$device``, ``$result``. NumPy scalars and enumeration members become the Python value that they carry.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import html
import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, Union, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import torch

from bnp_analysis.errors import DataNotFoundError, InvalidInputError
from bnp_analysis.runtime.files import write_text
from bnp_analysis.runtime.kinds import KINDS, article

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["FORMAT_VERSION", "Result", "package_versions"]

FORMAT_VERSION = 1
_FORMAT = "bnp_analysis.result"
_HTML_ROWS = 100
_PROVENANCE = ("settings", "seed", "versions", "matvecs", "seconds")
LIST_LIMIT = 10_000  # arrays up to this many entries are written as readable lists, larger ones as base64
_INTEGERS = ("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_DTYPES = (*_INTEGERS, "float16", "float32", "float64", "complex64", "complex128")
_TENSORS = (*_DTYPES, "bfloat16")


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = {"python": platform.python_version()}
    for package in ("bnp_analysis", "torch", "numpy", "scipy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return tuple(found.items())


def package_versions() -> dict[str, str]:
    """Return the versions that a result records: Python, this package, torch, numpy and scipy.

    Returns:
        A new dict from name to version; ``"not installed"`` for a package without metadata.

    >>> sorted(package_versions())
    ['bnp_analysis', 'numpy', 'python', 'scipy', 'torch']
    """
    return dict(_versions())


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Result:
    """Base of every result: what was computed, under which settings, at which cost.

    Subclasses are declared with ``@dataclass(frozen=True, kw_only=True)``; they override :meth:`summary` and, when they
    hold a table, :meth:`records` (numbers) and, for readers, :meth:`cells`. Class names are unique: files are read back
    by them. Two results are equal when their types and all their contents but ``seconds`` and ``engine`` are, to the
    last bit.

    Args:
        settings: the arguments that the computation ran with.
        seed: the seed of its random numbers, None if it drew none.
        versions: versions of the software.
        matvecs: products with the curvature matrix.
        seconds: wall-clock time.
        engine: how the products were computed (kept graphs, memory), as far as the operator says.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class Norm(Result):
    ...     value: float
    ...     def summary(self) -> str:
    ...         return f"norm = {self.value:.3g}"
    >>> Norm(value=2.0, seed=0)
    <Norm: norm = 2>
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=package_versions)
    matvecs: int = 0
    seconds: float = field(default=0.0, compare=False)
    engine: Mapping[str, Any] = field(default_factory=dict, compare=False)

    _registry: ClassVar[dict[str, type[Result]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the class by its name; keep dataclass from replacing repr, equality and hash."""
        super().__init_subclass__(**kwargs)
        known = Result._registry.get(cls.__name__)
        origin = (cls.__module__, cls.__qualname__)
        if known is not None and (known.__module__, known.__qualname__) != origin:
            raise TypeError(
                f"two results are named {cls.__name__} ({known.__module__}, {cls.__module__}); rename one, "
                "because files are read back by this name"
            )
        Result._registry[cls.__name__] = cls
        for name in ("__repr__", "__eq__", "__hash__"):
            if name not in cls.__dict__:
                setattr(cls, name, getattr(cls, name))

    def summary(self) -> str:
        """Return one line that says what the result is; subclasses say it in words.

        >>> Result(seed=3).summary()
        'Result(seed=3, matvecs=0, seconds=0)'
        """
        inner = ", ".join(f"{name}={_short(value)}" for name, value in self._scalars().items())
        return f"{type(self).__name__}({inner})"

    def records(self) -> list[dict[str, Any]]:
        """Return the rows of the result's table; by default one row with the scalar fields.

        >>> Result(seed=3, matvecs=7).records()
        [{'seed': 3, 'matvecs': 7, 'seconds': 0.0}]
        """
        return [self._scalars()]

    def cells(self) -> list[dict[str, Any]]:
        """Return what a reader's table shows: rows of words and rounded numbers; by default :meth:`records`.

        >>> Result(seed=3).cells()
        [{'seed': 3, 'matvecs': 0, 'seconds': 0.0}]
        """
        return self.records()

    def table(self) -> str:
        """Return :meth:`cells` as aligned text.

        >>> print(Result(seed=3).table())
        seed  matvecs  seconds
           3        0        0
        """
        return _aligned(self.cells())

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python data: nested lists for arrays, dicts with a key ``type`` for results.

        >>> Result(settings={"v": np.arange(2)}, versions={}).to_dict()["settings"]
        {'v': [0, 1]}
        """
        return {"type": type(self).__name__} | {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def to_dataframe(self) -> pd.DataFrame:
        """Return :meth:`records` as a pandas data frame.

        Raises:
            ImportError: pandas is not installed.

        >>> Result(seed=3).to_dataframe().shape
        (1, 3)
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_dataframe needs pandas: pip install 'bnp-analysis[dataframe]' (or use records(), "
                "which returns the same rows as plain dicts)"
            ) from error
        return pandas.DataFrame.from_records(self.records())

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to a JSON file, atomically: the old file or the whole new one, nothing between.

        Args:
            path: the file; missing folders are made.

        Returns:
            The path.

        Raises:
            InvalidInputError: a field holds something that is not data; nothing is written.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Result.load(Result(seed=3).save(folder + "/result.json")).seed
        3
        """
        head = {"format": _FORMAT, "format_version": FORMAT_VERSION}
        write_text(path, _dump(head | _encode_result(self), "\n") + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a result that :meth:`save` wrote; it comes back as the class it was.

        Args:
            path: the file.

        Returns:
            The result, tensors on the CPU.

        Raises:
            InvalidInputError: not such a file, damaged, of a newer format, or another kind of result.
            DataNotFoundError: there is none.

        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = Result(settings={"bound": float("inf")}, seed=3)
        ...     Result.load(saved.save(folder + "/result.json")) == saved
        True
        """
        raw = _read_json(path)
        if not isinstance(raw, dict) or raw.get("format") != _FORMAT:
            raise InvalidInputError(f"{path} is JSON, but not a result that save() of this package wrote")
        version = raw.get("format_version")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise InvalidInputError(
                f"{path} has format version {version}; this package reads versions up to {FORMAT_VERSION}: "
                "update bnp-analysis to read it"
            )
        if not isinstance(raw.get("type"), str) or not isinstance(raw.get("fields"), dict):
            raise InvalidInputError(f"{path} is damaged, or from another version: no 'type' with 'fields'")
        try:
            result = _decode_result(raw)
        except InvalidInputError as error:
            raise InvalidInputError(f"{path}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise InvalidInputError(f"{path} is damaged, or from another version: {error!r}") from error
        if not isinstance(result, cls):
            kind = type(result).__name__
            raise InvalidInputError(f"{path} holds a {kind}, not a {cls.__name__}: use {kind}.load")
        return result

    def _scalars(self) -> dict[str, Any]:
        """The scalar fields, a subclass's own first."""
        names = sorted((f.name for f in dataclasses.fields(self)), key=lambda name: name in _PROVENANCE)
        kinds = (bool, int, float, str, np.generic, type(None))
        return {name: getattr(self, name) for name in names if isinstance(getattr(self, name), kinds)}

    def _key(self) -> str:
        return json.dumps(_encode_result(self, compared=True), sort_keys=True)

    def __eq__(self, other: object) -> bool:
        """Equal types and contents, bit for bit, NaN equal to itself; ``seconds`` and ``engine`` do not count."""
        if not isinstance(other, Result):
            return NotImplemented
        return type(self) is type(other) and self._key() == other._key()

    def __hash__(self) -> int:
        """Hash of what equality compares."""
        return hash(self._key())

    def __str__(self) -> str:
        """One line, see :meth:`summary`; a result that is a table prints the table below it."""
        return self._line()

    def _line(self) -> str:
        """The summary, and where derivatives are not those of the risk."""
        surrogate = self.engine.get("derivatives", "exact") != "exact"
        return self.summary() + ("; of surrogate derivatives, not those of the risk" if surrogate else "")

    def __repr__(self) -> str:
        """The class and the line."""
        name, line = type(self).__name__, self._line()
        return f"<{line}>" if line.startswith(name) else f"<{name}: {line}>"

    def _repr_html_(self) -> str:
        """The line of :meth:`summary` above a table of :meth:`cells`, escaped, for notebooks."""
        rows = self.cells()
        columns = list(dict.fromkeys(name for row in rows for name in row))
        body = "".join(_html_row("td", [row.get(name, "") for name in columns]) for row in rows[:_HTML_ROWS])
        more = f"<p>{len(rows) - _HTML_ROWS} more rows</p>" if len(rows) > _HTML_ROWS else ""
        head = f"<p>{html.escape(repr(self)[1:-1])}</p><table><thead>{_html_row('th', columns)}</thead>"
        return f"{head}<tbody>{body}</tbody></table>{more}"


def _encode_result(result: Result, *, compared: bool = False) -> dict[str, Any]:
    """The type and the encoded fields; with `compared` only those that equality looks at."""

    def nested(value: Any) -> Any:
        return {"$result": _encode_result(value, compared=compared)} if isinstance(value, Result) else None

    name = type(result).__name__
    return {
        "type": name,
        "fields": {
            f.name: encode(getattr(result, f.name), f"{name}.{f.name}", nested)
            for f in dataclasses.fields(result)
            if f.init and (f.compare or not compared)
        },
    }


def _decode_result(raw: Mapping[str, Any]) -> Result:
    kind = Result._registry.get(raw["type"])
    if kind is None:
        known = ", ".join(sorted(Result._registry))
        raise InvalidInputError(
            f"unknown type of result {raw['type']!r} (known: {known}); import the module that defines it, or "
            "update bnp-analysis"
        )

    def nested(value: Mapping[str, Any]) -> Result:
        return _decode_result(value["$result"])

    found = {name: decode(value, nested) for name, value in raw["fields"].items()}
    hints, fields = _hints(kind), {f.name: f for f in dataclasses.fields(kind) if f.init}
    strange = [f"unknown field {name!r}" for name in found.keys() - fields.keys()]
    for name, f in fields.items():
        if name not in found and f.default is f.default_factory is dataclasses.MISSING:
            strange.append(f"field {name!r} is missing")
        elif name in found and not _fits(found[name], hints.get(name, Any)):
            given = type(found[name]).__name__
            strange.append(f"field {name!r} holds {article(given)} {given}, not {f.type}")
    if strange:
        raise InvalidInputError(f"damaged, or from another version: {'; '.join(sorted(strange))} of {raw['type']}")
    return kind(**found)


def _hints(kind: type[Result]) -> dict[str, Any]:
    """The types of the fields; empty where a name in them is not known when the program runs."""
    try:
        return get_type_hints(kind)
    except NameError:
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value may stand in a field of this type; types that are not known here take all.

    Example:
        >>> _fits((1, 2.0), tuple[float, ...]), _fits("one", float | None)
        (True, False)
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is tuple and isinstance(value, tuple):
        hints = inner[:1] * len(value) if inner[1:] == (Ellipsis,) else inner
        return len(hints) == len(value) and all(map(_fits, value, hints))
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return all(_fits(key, inner[0]) and _fits(item, inner[1]) for key, item in value.items())
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return isinstance(value, list | tuple)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    wanted = origin or hint
    if hint is Any or not isinstance(wanted, type) or issubclass(wanted, Enum):
        return True
    return isinstance(value, wanted)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (float, np.floating)) else str(value)


def _aligned(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned columns; what a row lacks is left blank."""
    if not rows:
        return "(no rows)"
    head = list(dict.fromkeys(name for row in rows for name in row))
    body = [head, *([_short(row.get(name, "")) for name in head] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*body, strict=True)]
    lines = ("  ".join(entry.rjust(w) for entry, w in zip(row, widths, strict=True)) for row in body)
    return "\n".join(lines)


def _html_row(tag: str, cells: list[Any]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(_short(cell))}</{tag}>" for cell in cells) + "</tr>"


Result._registry["Result"] = Result


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
    if tag in _READERS:
        return _READERS[tag](content)
    if tag in ("$tuple", "$complex"):
        parts = (decode(part, nested) for part in content)
        return tuple(parts) if tag == "$tuple" else complex(*parts)
    if tag == "$dict":
        return {decode(key, nested): decode(item, nested) for key, item in content}
    return nested(raw)


def plain(value: Any, nested: Callable[[Any], Any] = str, *, strict: bool = False) -> Any:
    """Return `value` as plain Python: lists for arrays, tensors and tuples, string keys, untagged NaN.

    Args:
        value: what :func:`encode` accepts, results included.
        nested: converts any other value.
        strict: whether numbers that JSON lacks become words, "nan", "inf", "-inf".

    Returns:
        Nested dicts and lists of Python scalars and strings.

    >>> plain({"v": np.arange(2), 3: (1.0, None)})
    {'v': [0, 1], '3': [1.0, None]}
    >>> plain({"a": torch.tensor([1.0, math.inf])}, strict=True)
    {'a': [1.0, 'inf']}
    """
    value = value.to_dict() if isinstance(value, Result) else _bare(value)
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return plain(value.tolist(), nested, strict=True) if strict else value.tolist()
    if strict and isinstance(value, (float, complex)) and not (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, complex, str)):
        return value
    if isinstance(value, Mapping):
        return {str(_bare(key)): plain(item, nested, strict=strict) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, nested, strict=strict) for item in value]
    return _name(value) if isinstance(value, (torch.dtype, torch.device)) else nested(value)


def _read_json(path: str | os.PathLike[str]) -> Any:
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


#: Tag -> what makes a value from its content, where nothing is nested in it.
_READERS: dict[str, Callable[[Any], Any]] = {
    **{"$float": float, "$array": _decode_array, "$tensor": _decode_tensor},
    **{"$dtype": _torch_dtype, "$device": torch.device},
}
