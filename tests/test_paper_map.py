"""Every name in `docs/paper_map.md` exists, and every statement, figure and table of the paper has its entry.

Bugs that only these tests catch: a function, test or figure that was renamed while the map still names the old one; a
statement or a figure that the map forgets; a figure that is said to show what it does not claim to show.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import bnp_analysis
from bnp_analysis.theory import statements as folder
from bnp_analysis.theory.check import Source
from bnp_analysis.theory.statements.setting import Statement

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "paper_map.md"
FIGURES = ROOT / "paper_figures" / "figures"
STATEMENTS = [module for module in vars(folder).values() if isinstance(module, ModuleType)]
PAGES = re.compile(r"\d+")
ROOMS = {module.name for module in pkgutil.iter_modules(bnp_analysis.__path__)}


def sections() -> dict[str, str]:
    parts = re.split(r"^#{1,2} (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text for name, text in zip(parts[1::2], parts[2::2], strict=True) if "* Verdict: " in text}


def statements() -> dict[Source, str]:
    """The entries of statements; the others are the paper's figures and tables."""
    return {Source(name): text for name, text in sections().items() if name in set(Source)}


def anchor(name: str) -> str:
    return re.sub(r"[^\w\s-]", "", name.lower()).replace(" ", "-")


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


def test_every_statement_is_there_with_its_page() -> None:
    assert set(statements()) == set(Source)
    for source, text in statements().items():
        published = not re.fullmatch(r"T\d+'?", source)
        assert ("Lange, Helfrich and Ye 2022" in " ".join(text.split())) is published, source
        assert published or re.search("[Dd]erived|[Oo]wn", text), source
        assert not published or all(f"p. {page}" in " ".join(text.split()) for page in PAGES.findall(source.page)[:1])


def test_every_figure_and_table_of_the_paper_is_there() -> None:
    names = list(sections())
    for k in range(3, 10):
        assert any(name in (f"Figure {k}", "Figures 6 and 7" if k in (6, 7) else "") for name in names), k
    assert {"Table 1", "Tables 2 and 3"} <= set(names)
    built = {path.stem for path in FIGURES.glob("paper_fig*.py")}
    assert built <= set(re.findall(r"`(paper_fig\d+)`", PAGE.read_text(encoding="utf-8")))


def test_links_lead_to_entries() -> None:
    anchors = {anchor(name) for name in sections()}
    links = re.findall(r"\]\(#([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert len(links) > 15
    assert [link for link in links if link not in anchors] == []


def test_every_entry_is_complete() -> None:
    for name, text in sections().items():
        for word in ("* Functions: ", "* Figure: ", "* Verdict: "):
            assert word in text, (name, word)
        assert any(is_function(word) for word in names(text)), name
    for name, text in statements().items():
        assert "* Tests:" in text, name
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
    for source, text in statements().items():
        line = text.split("* Figure: ")[1].split("* Verdict: ")[0]
        numbers = {f"T{n}" for name in source.names for n in re.findall(r"^T(\d+)", name)}
        for figure in re.findall(r"`(fig\d\d_\w+)`", line):
            mapped.setdefault(figure, set()).update(numbers)
    assert mapped == {path.stem: shown_by(path.stem) for path in sorted(FIGURES.glob("fig*.py"))}


def test_every_check_is_named() -> None:
    page = PAGE.read_text(encoding="utf-8")
    checks = {name for module in STATEMENTS for name, found in vars(module).items() if isinstance(found, Statement)}
    assert len(checks) == len(Source)
    assert [name for name in sorted(checks) if name not in page] == []
