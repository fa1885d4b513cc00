"""Write the map of modules into `docs/architecture.md`: one line each, the first of its docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- modules: written by docs/build_map.py -->\n", "<!-- end of modules -->\n"


def lines(package: Path = ROOT / "bnp_analysis") -> list[str]:
    """Markdown: a list item for each module, indented by room."""
    found = []
    for path in sorted(package.rglob("*.py"), key=lambda p: (p.parent.parts, p.name != "__init__.py", p.name)):
        inside = path.relative_to(package)
        docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
        first = re.split(r"\n\s*\n", docstring)[0].replace("\n", " ").strip()
        name = str(inside.parent) + "/" if path.name == "__init__.py" else inside.name
        if name == "./":
            continue
        depth = len(inside.parts) - (2 if path.name == "__init__.py" else 1)
        found.append(f"{'  ' * depth}- `{name}` {first}")
    return found


def page() -> str:
    """The page with the map as it should be."""
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    return head + BEGIN + "\n".join(lines()) + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page())
