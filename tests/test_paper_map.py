"""Every name in `docs/paper_map.md` exists, and every statement has its entry.

Bugs that only these tests catch: a function, test or figure that was renamed while the map still names the old one; a
statement or a figure that the map forgets; a figure that is said to show what it does not claim to show.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path
from typing import Any

import bnp_analysis

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "paper_map.md"
FIGURES = ROOT / "paper_figures" / "figures"
ROOMS = {module.name for module in pkgutil.iter_modules(bnp_analysis.__path__)}


def sections() -> dict[str, str]:
    parts = re.split(r"^## (T\d+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def names(text: str) -> list[str]:
    return re.findall(r"`([^`\s]+)`", text)


def is_function(name: str) -> bool:
    head = name.split(".", maxsplit=1)[0]
    return bool(re.fullmatch(r"\w+(\.\w+)+", name)) and (head == "bnp" or head in ROOMS)


def resolve(name: str) -> Any:
    """The object that a dotted name means, below the package."""
    found: Any = bnp_analysis
    for part in name.removeprefix("bnp.").split("."):
        if not hasattr(found, part):
            importlib.import_module(f"{found.__name__}.{part}")
        found = getattr(found, part)
    return found


def functions_in(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def shown_by(figure: str) -> set[str]:
    """Statements in the `SHOWS` of a figure; `T7a` counts for T7."""
    found = re.search(r'^SHOWS = "(.*)"$', (FIGURES / f"{figure}.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None, figure
    return {f"T{number}" for number in re.findall(r"T(\d+)", found[1])}


def test_every_statement_is_there_in_order() -> None:
    wanted = [f"T{i}" for i in range(1, 17)]
    assert list(sections()) == wanted
    assert re.findall(r"^\| \[(T\d+)\]", PAGE.read_text(encoding="utf-8"), re.MULTILINE) == wanted


def test_every_entry_is_complete() -> None:
    for name, text in sections().items():
        for word in ("* Functions: ", "* Tests:", "* Figure: ", "* Verdict: "):
            assert word in text, (name, word)
        assert re.search("[Rr]ecalled|[Dd]erived|[Oo]wn", text), name
        assert any(is_function(word) for word in names(text)), name
        assert any("::" in word for word in names(text)), name


def test_files_functions_and_tests_exist() -> None:
    seen = 0
    for name in names(PAGE.read_text(encoding="utf-8")):
        path, _, test = name.partition("::")
        if test:
            assert test in functions_in(ROOT / path), name
        elif re.fullmatch(r"\w+(/[\w.]+)+", name):
            # A source distribution has no benchmarks.
            assert (ROOT / name).is_file() or not (ROOT / path.split("/")[0]).is_dir(), name
        elif is_function(name):
            resolve(name)
        else:
            continue
        seen += 1
    assert seen > 100


def test_figures_show_what_the_map_says() -> None:
    mapped: dict[str, set[str]] = {}
    for statement, text in sections().items():
        line = text.split("* Figure: ")[1].split("* Verdict: ")[0]
        for figure in re.findall(r"`(fig\d\d_\w+)`", line):
            mapped.setdefault(figure, set()).add(statement)
    assert mapped == {path.stem: shown_by(path.stem) for path in sorted(FIGURES.glob("fig*.py"))}


def test_every_check_is_named() -> None:
    page = PAGE.read_text(encoding="utf-8")
    suite = (ROOT / "bnp_analysis" / "theory" / "suite.py").read_text(encoding="utf-8")
    checks = set(re.findall(r"\bcheck_\w+", suite)) - {"check_theory"}
    assert len(checks) > 12
    assert [name for name in sorted(checks) if name not in page] == []
