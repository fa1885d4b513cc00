"""Write the site into `docs/site`: the whole of `make docs`. A warning, or a link that leads nowhere, is an error.

Pages are the Markdown files of `docs/`, a gallery made of `paper_figures/`, and an API reference made of the docstrings
of what each room's `__all__` names. Nothing is fetched, and nothing is computed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
STAGE, TARGET = HERE / "_build", HERE / "site"
ROOMS = {
    "diagnose": "One call",
    "network": "Models and risks",
    "curvature": "Curvature matrices",
    "precondition": "Preconditioners",
    "linalg": "Condition numbers and spectra",
    "symmetry": "Null directions",
    "theory": "Checks of the theory",
    "training": "Training",
    "distributed": "Several processes",
    "plotting": "Figures",
    "data": "Data sets",
    "models": "Networks",
    "testing": "Laws and problems with known answers",
    "results": "Results",
    "errors": "Errors",
}


def pages() -> None:
    """The Markdown pages; what they link to outside of the site becomes a name in code."""
    for path in sorted(HERE.glob("*.md")):
        (STAGE / path.name).write_text(inside(path.read_text(encoding="utf-8")), encoding="utf-8")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](")
        (STAGE / name.lower()).write_text(inside(text), encoding="utf-8")
    for name in ("conf.py", "condition.png"):
        shutil.copy(HERE / name, STAGE / name)


def inside(text: str) -> str:
    """A page's text with the links that the site can follow."""
    text = text.replace("](../CONTRIBUTING.md", "](contributing.md").replace("](../CHANGELOG.md", "](changelog.md")
    text = re.sub(r"\]\(\.\./paper_figures/full/(\w+\.png)", r"](gallery/\1", text)
    text = re.sub(r"\]\(\.\./paper_figures/full/(?:index\.md)?", "](gallery.md", text)

    def plain(match: re.Match[str]) -> str:
        words, target = match[1], match[2]
        return words if words.strip("`") in target else f"{words} (`{target.removeprefix('../')}`)"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)]+)\)", plain, text)


def gallery() -> None:
    """A page of thumbnails, and for each figure one with the picture, its claim and the code that makes it."""
    cells = []
    (STAGE / "gallery").mkdir()
    for path in sorted((ROOT / "paper_figures" / "figures").glob("*fig*.py")):
        picture = ROOT / "paper_figures" / "full" / f"{path.stem}.png"
        if not picture.exists():
            continue
        shutil.copy(picture, STAGE / "gallery" / picture.name)
        shutil.copy(path, STAGE / "gallery" / path.name)
        words = constants(path)
        title, claim = words["TITLE"], words["CLAIM"]
        page = [
            *(f"# {title}", "", f"![{title}]({picture.name})", "", claim, ""),
            *(f"It shows: {words['SHOWS']}. The figure itself says whether the claim holds on its data.", ""),
            *("```sh", f"bnp-analysis figures {path.stem} --preset full", "```", ""),
            f"The code, `paper_figures/figures/{path.name}`: `compute` makes the arrays, `failure` judges",
            *("the claim, `draw` draws.", "", f"```{{literalinclude}} {path.name}", ":language: python", "```", ""),
        ]
        (STAGE / "gallery" / f"{path.stem}.md").write_text("\n".join(page), encoding="utf-8")
        cells += [
            f"[![{title}](gallery/{picture.name}){{width=260px}}](gallery/{path.stem}.md)",
            "",
            f"**{title}.** {claim}",
            "",
        ]
    head = [
        "# Gallery",
        "",
        "Every figure says what it claims, and in red if its data do not bear that out. A click leads to the code.",
        "",
    ]
    toctree = ["```{toctree}", ":hidden:", ":glob:", "", "gallery/*", "```", ""]
    (STAGE / "gallery.md").write_text("\n".join(head + cells + toctree), encoding="utf-8")


def constants(path: Path) -> dict[str, str]:
    """The strings that a module gives names to."""
    found = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                value = ast.literal_eval(node.value)
            except ValueError:
                continue
            found[node.targets[0].id] = value if isinstance(value, str) else ", ".join(map(str, [value]))
    return found


def reference() -> None:
    """A page for each room, with everything that its `__all__` names."""
    (STAGE / "api").mkdir()
    index = ["# API", "", "What `import bnp_analysis as bnp` offers by room; the usual names are also `bnp.NAME`.", ""]
    index += ["```{toctree}", ":maxdepth: 1", ""]
    for room, title in ROOMS.items():
        module = importlib.import_module(f"bnp_analysis.{room}")
        lines = [f"{title}: `bnp.{room}`".replace("`", "``")]
        lines += ["=" * len(lines[0]), "", f".. automodule:: {module.__name__}", "   :no-members:", ""]
        names = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
        ]
        for name in names:
            value = getattr(module, name)
            if inspect.ismodule(value):
                continue
            if inspect.isclass(value) or inspect.isroutine(value):
                kind = "class" if inspect.isclass(value) else "function"
                lines += [f".. auto{kind}:: {module.__name__}.{name}", ""]
                continue
            # A registry, or a type with a name: what is in it stands for a docstring.
            words = ", ".join(map(str, value)) if isinstance(value, dict) else str(value)
            lines += [f".. py:data:: {module.__name__}.{name}", "", "   ::", ""]
            lines += [*(f"      {line}" for line in words.splitlines()), ""]
        (STAGE / "api" / f"{room}.rst").write_text("\n".join(lines), encoding="utf-8")
        index.append(f"api/{room}")
    (STAGE / "api.md").write_text("\n".join([*index, "```", ""]), encoding="utf-8")


def main(folder: Path = TARGET) -> int:
    """Stage the sources and build them."""
    for path in (STAGE, folder):
        shutil.rmtree(path, ignore_errors=True)
    STAGE.mkdir()
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = str(ROOT)
    pages()
    gallery()
    reference()
    status = sphinx(["-q", "-W", "--keep-going", "-b", "html", str(STAGE), str(folder)])
    print(folder / "index.html")
    return int(status)


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
