"""The committed notebooks are those of their sources, ran to the end, and are fit to be read.

Bugs that only these tests catch: a source that was edited without running it again; a notebook without its outputs,
with an error, a warning or a path of the machine that ran it; ids, times or widgets that make every run a large diff; a
picture that says nothing to those who do not see it; a page without a question or without sentences to quote; a cell
that reads the checkout. Nothing is executed here: `make notebooks` does that.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
SOURCES = sorted(FOLDER.glob("[0-9]*.py"))
NOTEBOOKS = [source.with_suffix(".ipynb") for source in SOURCES]
LIMIT = 300_000
PATHS = re.compile(r"(?<![\w.])/(home|root|tmp|work|Users|usr|opt|var|private|mnt)/|[A-Z]:\\\\|site-packages")

by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> dict[str, Any]:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(notebook, dict)
    return notebook


def cells_of_source(text: str) -> list[tuple[str, str]]:
    """The cells of a py:percent source: kind and text."""
    body = re.sub(r"\A# ---\n.*?\n# ---\n", "", text, flags=re.DOTALL)
    parts = re.split(r"^# %%( \[markdown\])?\n", body, flags=re.MULTILINE)
    assert parts[0].strip() == ""
    cells = []
    for mark, cell in zip(parts[1::2], parts[2::2], strict=True):
        lines = cell.strip("\n")
        if mark:
            lines = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines.splitlines())
        cells.append(("markdown" if mark else "code", lines))
    return cells


def outputs(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [output for cell in notebook["cells"] for output in cell.get("outputs", [])]


def texts(output: dict[str, Any]) -> list[str]:
    """What a reader sees of an output, pictures left out."""
    data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
    return ["".join(value) for value in (*data.values(), output.get("text", []))]


def test_they_are_numbered() -> None:
    assert [path.name[:2] for path in SOURCES] == [f"{i:02}" for i in range(1, len(SOURCES) + 1)]
    assert sorted(FOLDER.glob("*.ipynb")) == NOTEBOOKS


@by_notebook
def test_the_notebook_has_the_cells_of_its_source(path: Path) -> None:
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in read(path)["cells"]]
    wanted = cells_of_source(path.with_suffix(".py").read_text(encoding="utf-8"))
    assert cells == wanted, f"{path.name} is not what {path.stem}.py says: make notebooks"


@by_notebook
def test_it_ran_from_top_to_bottom(path: Path) -> None:
    code = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert "assert " in "".join(code[-1]["source"]), "it ends in what it claims"


@by_notebook
def test_it_opens_with_a_question_and_ends_with_sentences_to_quote(path: Path) -> None:
    cells = read(path)["cells"]
    opening, heading, last = ("".join(cells[i]["source"]) for i in (0, -2, -1))
    assert re.match(r"# .+\n\n\*\*What this page answers\.\*\*", opening)
    assert "?" in opening
    assert heading.startswith("## To quote\n")
    assert "assert " in last
    quoted = "".join("".join(output.get("text", [])) for output in cells[-1]["outputs"])
    assert len(re.findall(r"^\* [A-Z].*\w", quoted, flags=re.MULTILINE)) >= 3


@by_notebook
def test_a_picture_says_what_it_shows(path: Path) -> None:
    for cell in read(path)["cells"]:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                text = output["metadata"]["image/png"]["alt"]
                assert len(text) > 80
                assert "".join(output["data"]["text/plain"]) == text
                said = "\n".join(line.removeprefix("# ") for line in "".join(cell["source"]).splitlines())
                assert said.replace("\n", " ").startswith(f"alt: {text} "), "the comment '# alt: ...' of its cell"


@by_notebook
def test_nothing_is_read_from_the_checkout(path: Path) -> None:
    """Notebooks are read beside an installed package: neither its folders nor its files are at hand."""
    for kind, cell in cells_of_source(path.with_suffix(".py").read_text(encoding="utf-8")):
        assert re.search(r"\b(docs|benchmarks|tests|paper_figures|notebooks|shared)/", cell) is None, cell
        assert kind == "markdown" or re.search(r"__file__|\bopen\(|Path\(|import (tests|paper_figures)", cell) is None


@by_notebook
def test_outputs_hold_no_error_warning_or_path(path: Path) -> None:
    found = outputs(read(path))
    assert found
    for output in found:
        assert output["output_type"] in ("stream", "display_data", "execute_result")
        assert output.get("name", "stdout") == "stdout"
        for text in texts(output):
            assert "Warning" not in text
            assert "Traceback" not in text
            assert PATHS.search(text) is None, text


@by_notebook
def test_another_run_would_give_a_small_diff(path: Path) -> None:
    notebook = read(path)
    assert [cell["id"] for cell in notebook["cells"]] == [f"cell-{i:02}" for i in range(len(notebook["cells"]))]
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert notebook["metadata"]["language_info"] == {"name": "python"}
    assert not any("widget" in kind for output in outputs(notebook) for kind in output.get("data", {}))
    assert not any(re.search("at 0x[0-9a-f]{6}", text) for output in outputs(notebook) for text in texts(output))
    for cell in notebook["cells"]:
        names = [output.get("name") for output in cell.get("outputs", [])]
        assert not any(a == b == "stdout" for a, b in pairwise(names)), "what was printed is one output"


@by_notebook
def test_it_is_small(path: Path) -> None:
    assert path.stat().st_size < LIMIT


def test_they_show_tables_and_pictures() -> None:
    kinds = [set(output.get("data", {})) for path in NOTEBOOKS for output in outputs(read(path))]
    assert sum("text/html" in kind for kind in kinds) >= 3
    assert sum("image/png" in kind for kind in kinds) >= 6


def test_the_first_one_ends_with_a_model_of_ones_own_in_ten_lines() -> None:
    cells = [cell for kind, cell in cells_of_source(SOURCES[0].read_text(encoding="utf-8")) if kind == "code"]
    last = cells[-2]  # before the sentences to quote
    assert "class " in last
    lines = [line for line in last.splitlines() if line.strip()]
    after_the_model = lines[max(i for i, line in enumerate(lines) if line.startswith((" ", "\t"))) + 1 :]
    assert len(after_the_model) <= 10
    assert "condition_number" in last


@pytest.mark.parametrize(
    ("text", "found"),
    [("see /" + "home/me/x", True), ("at C:\\\\x", True), ("|A v|/|v| and 1/tmp", False), ("a/home/", False)],
)
def test_paths_of_machines_are_recognized(text: str, found: bool) -> None:
    assert (PATHS.search(text) is not None) == found
