"""Run `notebooks/*.py` and write them, with outputs, as `notebooks/*.ipynb`: the whole of `make notebooks`.

A notebook that fails, or warns, is not written. What would differ from run to run though nothing changed (ids, times,
versions, bars that are gone) is left out, so that a new run gives a small diff.

`python notebooks/build.py 01 05` runs those two. Every picture has alternative text: the comment that begins with
`# alt:` in its cell. It is written where nbconvert looks for it, in the output's metadata, and as the output's text.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
WIDGET = "application/vnd.jupyter.widget-view+json"
TIMEOUT = 900  # seconds for one cell

# Sums add up in the same order on every machine, and small matrices gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")


def sources() -> list[Path]:
    """The notebooks' sources, in their order."""
    return sorted(HERE.glob("[0-9]*.py"))


def chosen(names: list[str]) -> list[Path]:
    """The sources whose names begin like one of these; all where there are none.

    Raises:
        SystemExit: no source begins like one of the names.
    """
    for name in names:
        if not any(source.name.startswith(name) for source in sources()):
            raise SystemExit(f"no notebook begins with {name!r}: {', '.join(source.stem for source in sources())}")
    return [source for source in sources() if not names or source.name.startswith(tuple(names))]


def alternative_text(code: str) -> str:
    """What a cell says of its picture to those who do not see it: its comment from `# alt:` on, as one line."""
    found = re.search(r"^# alt:((?:.*)(?:\n#.*)*)", code, flags=re.MULTILINE)
    return " ".join(found[1].replace("\n#", " ").split()) if found else ""


def convert(source: Path) -> nbformat.NotebookNode:
    """A source as a notebook without outputs, its cells numbered."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02}", nbformat.from_dict({})
    return notebook


def execute(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run all cells in a folder that is gone afterwards.

    Raises:
        CellExecutionError: a cell failed; RuntimeError: a cell wrote a warning, or a picture has no alternative text.
    """
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": folder}}
        ).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata.language_info = nbformat.from_dict({"name": "python"})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({})
        if cell.cell_type == "code":
            cell.outputs = joined([output for output in cell.outputs if WIDGET not in output.get("data", {})])
            for output in cell.outputs:
                if output.get("name") == "stderr":
                    raise RuntimeError(f"{cell.id} wrote to stderr:\n{output.text}")
                if "image/png" in output.get("data", {}):
                    text = alternative_text(cell.source)
                    if not text:
                        raise RuntimeError(
                            f"{cell.id} shows a picture without a comment '# alt: ...' that describes it"
                        )
                    output.metadata = nbformat.from_dict({"image/png": {"alt": text}})
                    output.data["text/plain"] = text
    return notebook


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Text that was printed in several portions as one output."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if found and output.output_type == "stream" and found[-1].get("name") == output.name:
            found[-1].text += output.text
        else:
            found.append(output)
    return found


def main(arguments: list[str]) -> int:
    """Run the sources named by their beginnings, or all."""
    for source in chosen(arguments):
        began = time.perf_counter()
        notebook = execute(convert(source))
        target = source.with_suffix(".ipynb")
        partial = target.with_name(f".{target.name}.tmp")
        nbformat.write(notebook, partial)
        partial.replace(target)
        size = target.stat().st_size / 1000
        print(f"{source.stem}: {time.perf_counter() - began:.0f} s, {size:.0f} kB", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
