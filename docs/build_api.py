"""Write the API reference from the docstrings into `docs/api`: the whole of `make docs`. A warning is an error."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import sys
import typing
import warnings
from pathlib import Path

import pdoc

import bnp_analysis

TARGET = Path(__file__).resolve().parent / "api"


def modules() -> list[str]:
    """All public modules of the package; `__main__` would run the command line."""
    found = pkgutil.walk_packages(bnp_analysis.__path__, "bnp_analysis.")
    names = [module.name for module in found]
    return ["bnp_analysis", *(name for name in names if not name.rpartition(".")[2].startswith("_"))]


def resolve_inherited_fields(names: list[str]) -> None:
    """Resolve annotations of dataclasses' `__init__` where their fields were written.

    `@dataclass` copies the annotations of inherited fields as strings into a module that may lack their names.
    """
    for name in names:
        for kind in vars(importlib.import_module(name)).values():
            if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == name):
                continue
            hints = typing.get_type_hints(kind)
            own = kind.__init__.__annotations__
            own.update({field: hints[field] for field in own if field in hints})


def main(folder: Path = TARGET) -> int:
    """Write the reference into a folder."""
    warnings.simplefilter("error")
    names = modules()
    resolve_inherited_fields(names)
    pdoc.render.configure(docformat="google", math=False, show_source=False)
    # A package's `__all__` names what has a page; rooms that the top does not list are named here.
    rooms = [name for name in names if name.count(".") == 1 and name.rpartition(".")[2] not in bnp_analysis.__all__]
    pdoc.pdoc("bnp_analysis", *rooms, output_directory=folder)
    print(f"{folder / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:2])))
