"""What a figure is to the runner: settings in, data with their provenance in files, a picture from the files alone.

A figure is a module of `figures/` with

* `TITLE`, `CLAIM` (what it claims), `SHOWS` (the statements of the theory),
* `TIMED = True` where the claim is about times: whether it holds is a property of the machine, shown and not judged,
* `PRESETS`: preset -> settings, plain data; a list under `"inputs"` names files, from the root of the checkout, that
  it reads,
* `compute(settings, report) -> arrays`: the work; `report(fraction)` says how far it is,
* `failure(data) -> str`: empty where the data bear out the claim, else what does not,
* `note(data) -> str`: data set, model, seeds,
* `draw(data) -> Figure`: reads the data only.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import pkgutil
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import bnp_analysis
from bnp_analysis.results import package_versions
from bnp_analysis.runtime.files import whole_file, write_text, writing

ROOT = Path(__file__).resolve().parent.parent
HERE = ROOT / "paper_figures"
PRESETS = ("quick", "full")
FORMAT = 1

Report = Callable[[float], None]
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class FigureData:
    """Arrays by name, and how they came about: `about` has settings, seed, versions, revision, command, seconds."""

    arrays: Mapping[str, np.ndarray]
    about: Mapping[str, Any]

    def __getitem__(self, name: str) -> np.ndarray:
        """An array by its name."""
        return self.arrays[name]

    def words(self, name: str) -> list[str]:
        """An array of strings as a list."""
        return [str(word) for word in self.arrays[name]]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that it was computed with."""
        return dict(self.about["settings"])


def names() -> list[str]:
    """The figures, in the order of their numbers."""
    return sorted(module.name for module in pkgutil.iter_modules([str(HERE / "figures")]))


def module(name: str) -> ModuleType:
    """The module of a figure."""
    return importlib.import_module(f"paper_figures.figures.{name}")


def key(name: str, preset: str) -> str:
    """A hash of what decides the data: the figure's code, its settings, the files it reads.

    What judges and draws does not count, so that a label may change without a computation. The package's version does
    not count either: `about` says which version made the data, and the tests say whether it still computes the same.
    """
    settings = module(name).PRESETS[preset]
    digest = hashlib.sha256(_deciding((HERE / "figures" / f"{name}.py").read_text()))
    words = [FORMAT, settings]
    digest.update(json.dumps(words, sort_keys=True).encode())
    for path in settings.get("inputs", []):
        data = (ROOT / path).read_bytes() if (ROOT / path).exists() else b"absent"
        digest.update(_deciding(data.decode()) if path.endswith(".py") else data)
    return digest.hexdigest()[:16]


def _deciding(source: str) -> bytes:
    """The parts of a module that decide the data."""
    nodes = [node for node in ast.parse(source).body if not _is_presentation(node)]
    # The text, not the tree: its form differs between versions of Python.
    return "\n".join(ast.get_source_segment(source, node) or "" for node in nodes).encode()


def _is_presentation(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return node.name in ("failure", "note", "draw")
    words = ("TITLE", "CLAIM", "SHOWS", "TIMED", "PRESETS", "ENTRY")  # settings are hashed as data, those of one preset
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    documentation = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return documentation or any(isinstance(target, ast.Name) and target.id in words for target in targets)


def make(name: str, preset: str, folder: Path, report: Report, *, force: bool = False) -> tuple[FigureData, bool]:
    """The data of a figure, from their files or computed, and whether they were computed."""
    known = None if force else stored(name, folder)
    wanted = key(name, preset)
    if known is not None and known.about["key"] == wanted:
        return known, False
    settings = dict(module(name).PRESETS[preset])
    began = time.perf_counter()
    arrays = {word: np.asarray(value) for word, value in module(name).compute(settings, report).items()}
    about = {
        **{"figure": name, "preset": preset, "key": wanted, "settings": settings, "seed": settings.get("seed")},
        **{"versions": package_versions() | {"bnp_analysis": bnp_analysis.__version__}, "revision": revision()},
        "command": f"bnp-analysis figures {name} --preset {preset}",
        "seconds": round(time.perf_counter() - began, 2),
    }
    save(FigureData(arrays, about), folder / name)
    shutil.rmtree(scratch(name, settings))
    return FigureData(arrays, about), True


def scratch(name: str, settings: Settings) -> Path:
    """A folder for what an interrupted computation goes on from; `make` removes it once the data are written.

    It lies among the temporary files, under a hash of the settings and of all code, so that no figure is put together
    from states that two versions of the code have computed.
    """
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode())
    for path in [HERE / "figures" / f"{name}.py", *sorted(Path(bnp_analysis.__file__).parent.rglob("*.py"))]:
        digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"bnp_analysis-{name}-{digest.hexdigest()[:16]}"
    with writing(folder):
        folder.mkdir(exist_ok=True)
    return folder


def save(data: FigureData, stem: Path) -> None:
    """Write `stem.npz` and, last, `stem.json`: without the second the first does not count."""
    with whole_file(stem.with_suffix(".npz")) as file:
        np.savez_compressed(file, **dict(data.arrays))
    write_text(stem.with_suffix(".json"), json.dumps(data.about, indent=1, sort_keys=True) + "\n")


def stored(name: str, folder: Path) -> FigureData | None:
    """The data of a figure as they lie in a folder, or None."""
    stem = folder / name
    if not stem.with_suffix(".json").exists() or not stem.with_suffix(".npz").exists():
        return None
    with np.load(stem.with_suffix(".npz"), allow_pickle=False) as file:
        arrays = {word: file[word] for word in file.files}
    return FigureData(arrays, json.loads(stem.with_suffix(".json").read_text()))


def revision() -> str:
    """The revision of the checkout, with a plus sign where files differ from it."""
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
