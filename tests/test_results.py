"""Results survive a file, refuse what is not data, and never leave half a file.

Bugs that only these tests catch: a nested result that comes back as a dict; a crash that leaves a torn file,
or a reader that sees half of one; a class that cannot be found again, or another one of its name that is; a
damaged file that is read as if it were whole; dataclass's own equality, which fails on arrays and would
compare clocks; HTML injection.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import FrozenInstanceError, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bnp_analysis import results
from bnp_analysis.errors import DataNotFoundError, InvalidInputError
from bnp_analysis.results import FORMAT_VERSION, Result, package_versions

if TYPE_CHECKING:
    from fractions import Fraction


class Stop(StrEnum):
    """A reason to stop, as Krylov runs have."""

    CONVERGED = "converged"


@dataclass(frozen=True, kw_only=True, repr=False)
class ResultsTestNumber(Result):
    """A result with scalars, like a condition number."""

    value: float
    upper: float = math.inf
    method: str = "dense"

    def summary(self) -> str:
        """One line."""
        return f"kappa = {self.value:.3g} <= {self.upper:.3g}"


@dataclass(frozen=True, kw_only=True)
class ResultsTestTable(Result):
    """A result that holds arrays, tensors, and rows with results in dicts, like a layer table."""

    rows: tuple[Mapping[Any, Any], ...] = ()
    anything: Any = None
    derived: int = field(init=False, default=7)

    def records(self) -> list[dict[str, Any]]:
        """One row for each layer."""
        return [{"name": row["name"], "kappa": row["kappa"].value} for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class ResultsTestList(Result):
    """A result with a list of words."""

    names: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class ResultsTestLater(Result):
    """A result with a type that only type checkers import."""

    path: Fraction | str = ""


def round_trip(result: Result, folder: Path) -> Any:
    """The result after a file, through the base class."""
    return Result.load(result.save(folder / "result.json"))


def test_nested_results_enums_dtypes_and_numpy_scalars(tmp_path: Path) -> None:
    number = ResultsTestNumber(value=1e300, seed=4, matvecs=12, settings={"dtype": torch.float64})
    table = ResultsTestTable(
        rows=({"name": "fc1", "kappa": number, 3: [number]},),
        anything=[Stop.CONVERGED, np.float32(0.1), np.int8(3), np.bool_(True), torch.device("cpu")],
        settings={"tolerance": 1e-12, "nested": {"number": number}},
    )
    back = round_trip(table, tmp_path)
    assert back == table
    assert back.rows[0][3][0] == number
    assert back.settings["nested"]["number"].settings == {"dtype": torch.float64}
    assert back.anything == ["converged", float(np.float32(0.1)), 3, True, torch.device("cpu")]
    assert back.derived == 7
    assert back.to_dict()["rows"][0]["kappa"]["type"] == "ResultsTestNumber"
    assert json.loads(json.dumps(back.to_dict()))["settings"]["nested"]["number"]["value"] == 1e300


def test_files_are_strict_json_that_people_can_read(tmp_path: Path) -> None:
    path = ResultsTestNumber(value=math.nan).save(tmp_path / "new" / "folder" / "result.json")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    raw = json.loads(path.read_text(), parse_constant=refuse)
    assert raw["format_version"] == FORMAT_VERSION
    assert raw["fields"]["value"] == {"$float": "nan"}
    assert '\n  "method": "dense"' in path.read_text()
    vector = ResultsTestTable(anything=np.arange(50.0)).save(tmp_path / "vector.json")
    assert len(vector.read_text().splitlines()) < 40


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"model": torch.nn.Linear(2, 1)}, r"ResultsTestTable\.anything\['model'\].*Linear"),
        ([1, object()], r"anything\[1\]"),
        (np.array([object()]), "ndarray"),
        ({"f": (lambda x: x,)}, r"anything\['f'\]\[0\]"),
        (torch.eye(2).to_sparse(), "Tensor"),
        ({frozenset(): 1}, "a key of ResultsTestTable.anything"),
    ],
)
def test_what_is_not_data_is_refused_by_name_and_leaves_the_old_file(value: Any, where: str, tmp_path: Path) -> None:
    path = Result(seed=1).save(tmp_path / "result.json")
    with pytest.raises(InvalidInputError, match=where):
        ResultsTestTable(anything=value).save(path)
    assert Result.load(path).seed == 1
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_a_crash_while_writing_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Result(seed=1).save(tmp_path / "result.json")

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        Result(seed=2).save(path)
    assert Result.load(path).seed == 1
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_who_reads_while_another_writes_sees_the_old_file_whole(tmp_path: Path) -> None:
    path = Result(seed=1).save(tmp_path / "result.json")
    with path.open() as reader:
        Result(seed=2).save(path)
        assert '"seed": 1' in reader.read()
    assert Result.load(path).seed == 2


GOOD = {"format": "bnp_analysis.result", "format_version": 1, "type": "ResultsTestNumber"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"format": "bnp_analysis.result", "format_vers', "not valid JSON"),
        ('{"value": NaN}', "not valid JSON"),
        ("\x00\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", "not a result"),
        ('{"value": 1}', "not a result"),
        (GOOD | {"format_version": FORMAT_VERSION + 1}, "update bnp-analysis"),
        (GOOD | {"format_version": "1"}, "format version"),
        (GOOD | {"type": "NoSuchResult", "fields": {}}, "unknown type of result 'NoSuchResult'"),
        (GOOD, "damaged"),
        (GOOD | {"type": ["list"], "fields": {}}, "damaged"),
        (GOOD | {"fields": {}}, "damaged.*value"),
        (GOOD | {"fields": {"value": 1.0, "colour": 2}}, "damaged.*colour"),
        (GOOD | {"fields": {"value": {"$float": "one"}}}, "damaged"),
        (GOOD | {"fields": {"value": {"$mystery": 1}}}, "damaged"),
        (
            GOOD | {"fields": {"value": {"$array": {"dtype": "float64", "shape": [3], "data": [1.0]}}}},
            "damaged",
        ),
        (
            GOOD | {"fields": {"value": {"$array": {"dtype": "float64", "shape": [1], "base64": "?"}}}},
            "damaged",
        ),
        (GOOD | {"fields": {"value": {"$tensor": {"dtype": "load", "shape": [], "data": [1]}}}}, "damaged"),
        (GOOD | {"fields": {"value": {"$device": "abacus"}}}, "damaged"),
        (GOOD | {"fields": {"value": {"$dtype": "load"}}}, "damaged.*'load' is not a dtype"),
        (
            GOOD | {"fields": {"value": {"$array": {"dtype": "float64", "shape": [1], "data": [{"$result": {}}]}}}},
            r"damaged.*\{'\$result': \{\}\} inside an array",
        ),
        (GOOD | {"fields": {"value": "one"}}, "field 'value' holds a str, not float of ResultsTestNumber"),
        (GOOD | {"fields": {"value": 1.0, "method": 3}}, "field 'method' holds an int, not str of ResultsTestNumber"),
        (GOOD | {"type": "ResultsTestList", "fields": {"names": "abc"}}, "field 'names' holds a str, not Sequence"),
        (GOOD | {"fields": {"value": {"$result": {"type": "NoSuchResult", "fields": {}}}}}, "unknown type"),
    ],
)
def test_damaged_files_are_refused_with_their_name(text: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text), encoding="latin-1")
    with pytest.raises(InvalidInputError, match=message) as caught:
        Result.load(path)
    assert "damaged.json" in str(caught.value)


def test_sequences_and_types_that_are_not_known_when_the_program_runs(tmp_path: Path) -> None:
    for names in (["a", "b"], ("a", "b")):
        assert round_trip(ResultsTestList(names=names), tmp_path).names == names
    assert round_trip(ResultsTestLater(path="a"), tmp_path).path == "a"


def test_a_package_without_metadata_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(package: str) -> str:
        if package == "scipy":
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", lacking)
    found = dict(results._versions.__wrapped__())
    assert found["scipy"] == "not installed"
    assert found["torch"] == "1.0"


def test_a_folder_is_no_result_and_a_table_may_be_empty(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is a folder, a pipe or a device, so no result can be read"):
        Result.load(tmp_path)
    assert ResultsTestTable().table() == "(no rows)"


def test_load_on_a_subclass_checks_the_class(tmp_path: Path) -> None:
    path = ResultsTestNumber(value=1.0).save(tmp_path / "number.json")
    assert ResultsTestNumber.load(path).value == 1.0
    with pytest.raises(InvalidInputError, match=r"holds a ResultsTestNumber, not a ResultsTestTable"):
        ResultsTestTable.load(path)
    with pytest.raises(DataNotFoundError, match=r"no file .*missing\.json"):
        Result.load(tmp_path / "missing.json")
    for wrong in (None, 3, b"bytes", ""):
        with pytest.raises(InvalidInputError, match="path must be the path of a file"):
            Result.load(wrong)  # type: ignore[arg-type]


def test_two_classes_of_one_name_are_refused_and_a_repeated_definition_is_not() -> None:
    body = {"__module__": __name__, "__qualname__": "ResultsTestNumber"}
    with pytest.raises(TypeError, match="two results are named ResultsTestNumber"):
        type("ResultsTestNumber", (Result,), body | {"__module__": "elsewhere"})
    assert Result._registry["ResultsTestNumber"] is ResultsTestNumber
    again = type("ResultsTestNumber", (Result,), body)
    assert Result._registry["ResultsTestNumber"] is again
    Result._registry["ResultsTestNumber"] = ResultsTestNumber


def test_equality_looks_at_bits_and_not_at_the_clock() -> None:
    one = ResultsTestTable(anything=np.array([1.0, math.nan]), seconds=1.0)
    two = ResultsTestTable(anything=np.array([1.0, math.nan]), seconds=2.0)
    assert one == two
    assert hash(one) == hash(two)
    assert one != ResultsTestTable(anything=np.array([1.0, 0.0]))
    assert ResultsTestTable(anything=0.0) != ResultsTestTable(anything=-0.0)
    assert ResultsTestTable(anything=one) == ResultsTestTable(anything=two)
    assert one != Result()
    assert one != 3


def test_results_are_frozen_and_take_keywords_only() -> None:
    result: Any = ResultsTestNumber(value=1.0)
    with pytest.raises(FrozenInstanceError):
        result.value = 2.0
    with pytest.raises(TypeError):
        Result({})  # type: ignore[call-arg]
    assert result.versions == package_versions()
    assert result.versions is not ResultsTestNumber(value=1.0).versions
    assert set(result.versions) == {"python", "bnp_analysis", "torch", "numpy", "scipy"}
    assert result.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_the_line_the_table_and_the_html() -> None:
    number = ResultsTestNumber(value=12.3456, method="<script>&", seed=0)
    assert str(number) == "kappa = 12.3 <= inf"
    assert repr(number) == "<ResultsTestNumber: kappa = 12.3 <= inf>"
    assert repr(Result(seed=0)) == "<Result(seed=0, matvecs=0, seconds=0)>"
    assert list(number.records()[0]) == ["value", "upper", "method", "seed", "matvecs", "seconds"]
    text = number._repr_html_()
    assert "<script>" not in text
    assert "&lt;script&gt;&amp;" in text
    assert "<td>12.3456</td>" in text
    table = ResultsTestTable(rows=tuple({"name": f"fc{i}", "kappa": number} for i in range(130)))
    assert table._repr_html_().count("<tr>") == 101
    assert "30 more rows" in table._repr_html_()
    frame = table.to_dataframe()
    assert list(frame.columns) == ["name", "kappa"]
    assert len(frame) == 130
    assert not frame.isna().any().any()


def test_without_pandas_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'bnp-analysis\[dataframe\]'"):
        Result().to_dataframe()
