"""Imports between the rooms of the package go one way, and promises about the whole tree are kept.

Bugs that only these tests catch: a room that starts to know a room to its right, also when the import hides
in a function, behind TYPE_CHECKING or in importlib; linear algebra that learns what a network is; drawing
outside `plotting`; a stub left behind; a committed file that works only on the machine where it was made.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bnp_analysis"
ROOMS = (
    *("errors", "runtime", "results", "linalg", "testing", "distributed", "network", "curvature"),
    *("symmetry", "precondition", "theory", "training", "diagnose", "plotting", "cli"),
)
LEFT_OF = {room: set(ROOMS[:place]) for place, room in enumerate(ROOMS)}
LEFT_OF |= {"data": {"errors", "runtime"}, "models": {"errors"}, "__main__": {"cli"}}
for _room in ("theory", "training", "diagnose", "cli"):
    LEFT_OF[_room] |= {"data", "models"}

DIFFERENTIATION = ("torch.autograd", "torch.func")
FORBIDDEN = {  # what a room must not name at all, whether it imports it or reaches it as an attribute
    "linalg": ("torch.nn", *DIFFERENTIATION),
    "testing": ("torch.nn", *DIFFERENTIATION),
    "theory": DIFFERENTIATION,
    "diagnose": DIFFERENTIATION,
    "cli": DIFFERENTIATION,
}


def imported(tree: ast.AST, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """The dotted names that a module imports, anywhere in it, with their lines."""
    home = module.split(".") if is_package else module.split(".")[:-1]
    for node in walked(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = home[: len(home) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)


def reached(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """The dotted names that a module reaches as attributes of torch, under whatever name it imported it."""
    names = {}
    for node in walked(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    names[alias.asname or "torch"] = alias.name if alias.asname else "torch"
    for node in walked(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.insert(0, inner.attr)
            inner = inner.value
        if isinstance(node, ast.Attribute) and isinstance(inner, ast.Name) and inner.id in names:
            yield node.lineno, ".".join([names[inner.id], *parts])


@functools.cache
def parsed_text(text: str) -> ast.Module:
    return ast.parse(text)


@functools.cache
def walked(tree: ast.AST) -> tuple[ast.AST, ...]:
    """All nodes of a tree, found once for all tests."""
    return tuple(ast.walk(tree))


def parsed(path: Path) -> ast.Module:
    """The tree of a file, which several tests read and none changes."""
    return parsed_text(path.read_text(encoding="utf-8"))


def violations(package: Path) -> list[str]:
    """What the files of a package do against the plan of the house, one line each."""
    found = []
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        module = ".".join([PACKAGE, *(parts[:-1] if is_package else parts)])
        room = parts[0]
        where = path.relative_to(package.parent)
        if room == "__init__":
            continue
        if room not in LEFT_OF:
            found.append(f"{where}: {room} is no known room")
            continue
        tree = parsed(path)
        imports = list(imported(tree, module, is_package=is_package))
        for line, name in imports:
            top, _, rest = name.partition(".")
            target = rest.split(".")[0]
            if top == PACKAGE and target != room and target not in LEFT_OF[room]:
                found.append(f"{where}:{line}: {room} imports {target or 'the whole package'}")
            if top == "matplotlib" and room != "plotting":
                found.append(f"{where}:{line}: {room} imports matplotlib")
        for line, name in [*imports, *reached(tree)]:
            if any(f"{name}.".startswith(f"{banned}.") for banned in FORBIDDEN.get(room, ())):
                found.append(f"{where}:{line}: {room} names {name}")
    return found


def test_rooms_import_only_to_their_left() -> None:
    assert violations(ROOT / PACKAGE) == []


def test_a_risk_is_used_by_its_public_names() -> None:
    """What is private to it may change; copies with other private parts would be risks that nobody has checked."""
    source = (ROOT / PACKAGE / "network" / "risk.py").read_text(encoding="utf-8")
    own = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    own = {name for name in own if name.startswith("_") and not name.startswith("__")} - {"_C", "_version"}
    assert {"_loss", "_model", "_cache"} <= own
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} reads {node.attr}"
        for path in (ROOT / PACKAGE).rglob("*.py")
        for node in walked(parsed(path))
        if isinstance(node, ast.Attribute) and node.attr in own and path.parent.name != "network"
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "other", "cls"))
    ]
    assert found == []


INNER = ("krylov", "spectra", "condition")


def test_linear_algebra_has_an_order_too() -> None:
    """Operators know no Krylov space, Krylov spaces nothing of what is asked of them."""
    found = []
    for path in (ROOT / PACKAGE / "linalg").rglob("*.py"):
        parts = path.relative_to(ROOT / PACKAGE / "linalg").parts
        own = INNER.index(parts[0]) if len(parts) > 1 else -1
        if parts == ("__init__.py",):
            continue
        for line, name in imported(parsed(path), PACKAGE, is_package=False):
            inner = name.removeprefix(f"{PACKAGE}.linalg.").split(".")[0]
            if name.startswith(f"{PACKAGE}.linalg.") and inner in INNER and INNER.index(inner) > own:
                found.append(f"{path.name}:{line} imports {name}")
    assert found == []
    assert {path.name for path in (ROOT / PACKAGE / "linalg").iterdir() if path.is_dir()} - {"__pycache__"} == {*INNER}


ALLOWED = {
    "linalg/lanczos.py": "import torch\nfrom . import operators\nfrom ..errors import InvalidInputError",
    "linalg/operators.py": "import torch\nfrom bnp_analysis.results import Result",
    "network/risk.py": "import torch.nn as nn\nfrom bnp_analysis.linalg.krylov.lanczos import lanczos",
    "results.py": "from bnp_analysis.runtime.files import write_text",
    "plotting.py": "def draw():\n    import matplotlib.pyplot",
    "cli.py": "from bnp_analysis import data, diagnose, plotting",
    "__init__.py": "from bnp_analysis.cli import main",
    "__main__.py": "from bnp_analysis.cli import main",
}


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("linalg/a.py", "from bnp_analysis.network.risk import EmpiricalRisk", "imports network"),
        ("linalg/a.py", "def f():\n    from ..curvature import hessian", "a.py:2: linalg imports curvature"),
        ("linalg/a.py", "from .. import testing", "linalg imports testing"),
        ("linalg/__init__.py", "from ..network import x", "linalg imports network"),
        ("linalg/deep/a.py", "from ...theory import x", "linalg imports theory"),
        ("linalg/a.py", "if TYPE_CHECKING:\n    import bnp_analysis.cli", "linalg imports cli"),
        ("linalg/a.py", "import importlib\nimportlib.import_module('bnp_analysis.cli')", "imports cli"),
        ("linalg/a.py", "from bnp_analysis import EmpiricalRisk", "imports EmpiricalRisk"),
        ("linalg/a.py", "import bnp_analysis", "imports the whole package"),
        ("results.py", "from bnp_analysis.linalg import lanczos", "results imports linalg"),
        ("linalg/a.py", "from torch.func import vmap", "names torch.func.vmap"),
        ("linalg/a.py", "from torch import nn", "names torch.nn"),
        ("linalg/a.py", "import torch as t\nt.autograd.grad(1, 2)", "a.py:2: linalg names torch.autograd.grad"),
        ("linalg/a.py", "import torch.linalg\ntorch.nn.Module", "names torch.nn.Module"),
        ("theory/a.py", "import torch\ntorch.func.jvp", "theory names torch.func.jvp"),
        ("data/a.py", "from bnp_analysis.results import Result", "data imports results"),
        ("models/a.py", "import bnp_analysis.data", "models imports data"),
        ("curvature/a.py", "from bnp_analysis.models import mlp", "curvature imports models"),
        ("plotting.py", "from bnp_analysis.data import load", "plotting imports data"),
        ("training/a.py", "from matplotlib import pyplot", "imports matplotlib"),
        ("__main__.py", "from bnp_analysis.diagnose import compare", "__main__ imports diagnose"),
        ("cellar.py", "x = 1", "cellar is no known room"),
        ("cellar/a.py", "x = 1", "cellar is no known room"),
    ],
)
def test_the_check_finds_what_it_must(path: str, source: str, message: str, tmp_path: Path) -> None:
    def write(files: dict[str, str]) -> list[str]:
        for name, text in files.items():
            file = tmp_path / PACKAGE / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return violations(tmp_path / PACKAGE)

    assert write(ALLOWED) == []
    found = write({path: source})
    assert found
    assert message in "\n".join(found)


def test_nothing_is_left_unimplemented() -> None:
    stubs = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / PACKAGE).rglob("*.py")
        for node in walked(parsed(path))
        if isinstance(node, ast.Name) and node.id == "NotImplementedError"
    ]
    assert stubs == []


#: Writes that no `whole_file` makes: a lock, lines that are appended, a private copy, what only a measurement uses.
OWN_WRITES = {
    *("bnp_analysis/runtime/files.py", "bnp_analysis/runtime/memory.py", "bnp_analysis/training/run.py"),
    *("bnp_analysis/distributed/group.py", "bnp_analysis/data/files.py", "paper_figures/comparison.py"),
    *("benchmarks/mutations.py", "benchmarks/kill_resume.py"),
}
WRITERS = re.compile(r"(torch|np|json|pickle|.*figure|plt)\.(save|savez|savez_compressed|savetxt|dump|savefig)")
MODES = re.compile("'[rwaxb+]*[wax+][rwaxb+]*'")


def writes(tree: ast.AST) -> Iterator[int]:
    """The lines that write a file by its name, and not into the `file` that `whole_file` gives."""
    for node in walked(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        words = [ast.unparse(argument) for argument in node.args]
        if (
            name.endswith((".write_text", ".write_bytes"))
            or (WRITERS.fullmatch(name) and "file" not in words)
            or (name.endswith("open") and any(map(MODES.fullmatch, words)) and "os.devnull" not in words)
        ):
            yield node.lineno


def test_files_are_written_by_one_writer() -> None:
    """By `whole_file`, after which a file is the old or the whole new one: also figures and benchmarks."""
    found = {
        f"{path.relative_to(ROOT)}:{line}"
        for folder in (PACKAGE, "paper_figures", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for line in writes(parsed(path))
        if path.relative_to(ROOT).as_posix() not in OWN_WRITES
    }
    assert found == set()
    broken = "f.write_text(x)\nnp.save(path, x)\nopen(p, 'wb')\nfigure.savefig(path)\nnp.save(file, x)\nopen(p)"
    assert list(writes(ast.parse(broken))) == [1, 2, 3, 4]


def tracked_texts() -> dict[str, str]:
    """The text files under version control."""
    try:
        command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "ls-files", "-z"]
        names = subprocess.run(command, capture_output=True, check=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [name for name in names if name and (ROOT / name).is_file()]
    raw = {name: (ROOT / name).read_bytes() for name in files}
    return {name: content.decode() for name, content in raw.items() if b"\0" not in content}


def test_no_file_depends_on_the_machine_where_it_was_made() -> None:
    sibling = "../" + "shared"
    home = re.compile(r"(?<![\w.:/<])/(?:home|root|Users|work)/\w")  # notebooks' outputs leak such paths easily
    texts = tracked_texts()
    assert texts
    assert [name for name, text in texts.items() if sibling in text and not name.startswith(".ci/")] == []
    assert [name for name, text in texts.items() if home.search(text)] == []


def test_the_map_names_every_module() -> None:
    """`python docs/build_map.py` writes it anew."""
    spec = importlib.util.spec_from_file_location("build_map", ROOT / "docs" / "build_map.py")
    assert spec is not None
    assert spec.loader is not None
    build_map = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build_map)
    assert build_map.PAGE.read_text() == build_map.page(), "run python docs/build_map.py"
    assert all(len(line.split("` ", 1)[1]) > 20 for line in build_map.lines())


def loaded(tree: ast.Module) -> Iterator[ast.stmt]:
    """The statements that run when a module is imported: not those for type checkers, not those inside functions."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.stmt):
                yield child
            pending.append(child)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module -> the modules that it loads."""
    names = {}
    for path in package.rglob("*.py"):
        parts = (PACKAGE, *path.relative_to(package).with_suffix("").parts)
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        statements = ast.Module(body=list(loaded(parsed(path))), type_ignores=[])
        wanted = {target for _, target in imported_here(statements, name, is_package=path.name == "__init__.py")}
        graph[name] = {t if t in names else t.rpartition(".")[0] for t in wanted} & names.keys() - {name}
    return graph


def imported_here(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """As `imported`, of the statements themselves."""
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            yield from imported(ast.Module(body=[statement], type_ignores=[]), module, is_package=is_package)


def test_no_module_waits_for_itself() -> None:
    """No import cycle, between rooms or inside them; packages load their parts, which do not load the package."""
    order = list(TopologicalSorter(import_graph(ROOT / PACKAGE)).static_order())
    assert f"{PACKAGE}.linalg.operators" in order


def test_a_cycle_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(f"from {PACKAGE}.b import x\n")
    (tmp_path / "b.py").write_text("def f():\n    from . import a\n")
    list(TopologicalSorter(import_graph(tmp_path)).static_order())
    (tmp_path / "b.py").write_text("if True:\n    from . import a\n")
    with pytest.raises(CycleError):
        list(TopologicalSorter(import_graph(tmp_path)).static_order())


def test_the_top_is_short_and_names_that_moved_still_work() -> None:
    import types

    import bnp_analysis as bnp

    functions = [name for name in bnp.__all__ if not isinstance(getattr(bnp, name), types.ModuleType)]
    assert len(functions) <= 36, "what few programs ask for belongs to its room"
    for room, names in bnp._ROOMS.items():
        for name in names:
            assert name not in bnp.__all__
            assert getattr(bnp, name) is getattr(getattr(bnp, room), name)
    with pytest.raises(AttributeError, match="nothing"):
        bnp.nothing  # noqa: B018
