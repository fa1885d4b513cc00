"""Catches: an argument that goes, moves or is renamed, and a default that changes, without anyone having meant it.

`public_signatures.txt` is the record. After a change that is meant, `python tests/test_signatures.py` writes it anew,
and the CHANGELOG says what callers have to do.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bnp_analysis.results import Result

RECORD = Path(__file__).with_name("public_signatures.txt")
ROOMS = (
    "curvature data diagnose distributed linalg models network plotting precondition results symmetry theory training"
)


def shown(function: Callable[..., Any], *, bound: bool) -> str:
    """Names of arguments and defaults, without annotations, which the type checker reads, and without addresses."""
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()][bound:]
    return re.sub(r" at 0x\w+", "", str(signature.replace(parameters=parameters, return_annotation=signature.empty)))


def methods(cls: type) -> Iterator[str]:
    """How objects are made, and public methods that take a default."""
    for name, own in inspect.getmembers(cls, inspect.isroutine):
        bound = not isinstance(inspect.getattr_static(cls, name), staticmethod | classmethod)
        if str(getattr(own, "__module__", "")).startswith("bnp_analysis") and (name == "__init__" or name[0] != "_"):
            arguments = shown(own, bound=bound)
            if name == "__init__" or "=" in arguments:
                yield f"{name}{arguments}"


def signatures() -> list[str]:
    """A line for each public function, and for each class that is not made by the package alone."""
    found: dict[object, list[str]] = {}
    for room in ("", *ROOMS.split()):
        module = importlib.import_module(f"bnp_analysis.{room}".rstrip("."))
        for name in sorted(set(module.__all__)):
            value, place = getattr(module, name), f"{room or 'bnp'}.{name}"
            if not callable(value) or value in found:
                continue
            if inspect.isfunction(value):
                found[value] = [place + shown(value, bound=False)]
            elif inspect.isclass(value) and not issubclass(value, Result | Exception):
                found[value] = [f"{place}.{line}" for line in methods(value)]
    return [line for lines in found.values() for line in lines]


def test_public_signatures_are_those_on_record() -> None:
    record = RECORD.read_text(encoding="utf-8").splitlines()
    changes = "\n".join(difflib.unified_diff(record, signatures(), "on record", "now", lineterm="", n=0))
    assert not changes, f"{changes}\nif this is meant: python {Path(__file__).name}, and a line in CHANGELOG.md"


if __name__ == "__main__":
    RECORD.write_text("\n".join(signatures()) + "\n", encoding="utf-8")
