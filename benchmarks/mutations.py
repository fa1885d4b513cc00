"""Deliberate breakages: which small errors in the package would the tests not notice?

    python benchmarks/mutations.py [--count 60] [--seed 0] [--rooms-only] [--out benchmarks/results]

With a seed it chooses lines of code of the package and breaks one thing on each: a comparison, an operator, a constant,
a `not`, a term, a statement. Left out are docstrings, messages, `__repr__`, annotations and what only type checkers
read. Each is applied in a temporary copy of the tree, and tests run until one fails: first the module's doctests and
the files that name it, then its room's, then all others. `mutations_SEED.json` keeps what was found, so that the next
call goes on from there; `mutations_SEED.md` is the table. A breakage that changes nothing that could be observed is no
gap of the tests: write `"verdict": "equivalent"` and a `"reason"` into its entry, and both stay. So does `"verdict":
"caught"` with `"by": "TEST, written since"`, where a test was added. Exit status 1 if fewer than 95 % of the others
were caught.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

from bnp_analysis.cli import answered
from bnp_analysis.runtime.files import require_outputs, write_text

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bnp_analysis"
GOAL = 0.95
ROOM = "not caught by its room"
SINCE = "written since"
SHOWN = ("file", "line", "kind", "before", "after")
TIMEOUT = 1200  # seconds for the tests of one breakage; one that never ends is caught

COMPARISONS = {
    **{ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq},
    **{ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is},
}
OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult}
OPERATORS |= {ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}


def broken(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The ways to break a node: what is done, and the node afterwards."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=rest) if type(op) in COMPARISONS:
            yield "comparison", ast.Compare(left, [COMPARISONS[type(op)]()], rest)
        case ast.BinOp(op=op, left=left, right=right) if type(op) in OPERATORS:
            yield "operator", ast.BinOp(left, OPERATORS[type(op)](), right)
            if isinstance(op, ast.Add | ast.Sub):
                yield "term dropped", left
        case ast.BoolOp(op=op, values=values):
            yield "and / or", ast.BoolOp(ast.Or() if isinstance(op, ast.And) else ast.And(), values)
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield "not or minus dropped", operand
        case ast.Constant(value=bool(value)):
            yield "constant", ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield "constant", ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield "constant", ast.Constant(value * 2 if value else 1.0)
        case ast.Return(value=value) if value is not None and not isinstance(value, ast.Constant):
            yield "returns None", ast.Return(ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            yield "statement dropped", ast.Pass()


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may be broken."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.FunctionDef) and child.name in ("__repr__", "__str__", "_repr_html_"):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.JoinedStr):
            continue
        yield child
        if isinstance(child, ast.Raise):
            continue  # messages
        for name, part in ast.iter_fields(child):
            if name in ("annotation", "returns", "decorator_list", "type_params"):
                continue
            for inner in part if isinstance(part, list) else [part]:
                if isinstance(inner, ast.AST):
                    holder = ast.Module([inner], [])
                    yield from nodes(holder)


def sites() -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Every line of code that can be broken, with the ways to do so."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        lines = text.encode().splitlines(keepends=True)
        starts = list(accumulate(map(len, lines), initial=0))
        for node in nodes(ast.parse(text)):
            for kind, new in broken(node):
                begin = starts[node.lineno - 1] + node.col_offset
                end = starts[node.end_lineno - 1] + node.end_col_offset
                after = ast.unparse(ast.fix_missing_locations(new))
                if isinstance(node, ast.expr) and not isinstance(new, ast.Constant):
                    after = f"({after})"
                before = text.encode()[begin:end].decode()
                site = {"file": name, "line": node.lineno, "kind": kind, "before": before, "after": after}
                found.setdefault((name, site["line"]), []).append(site | {"begin": begin, "end": end})
    return found


def chosen(count: int, seed: int) -> list[dict[str, Any]]:
    """So many lines, one breakage on each."""
    rng, every = random.Random(seed), sites()
    return [rng.choice(every[place]) for place in rng.sample(sorted(every), count)]


def identity(site: dict[str, Any]) -> str:
    """The same for as long as the breakage and its file are."""
    text = (ROOT / site["file"]).read_text(encoding="utf-8")
    parts = (text, site["begin"], site["end"], site["after"])
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def stages(tree: Path, module: str) -> list[list[str]]:
    """Test files in the order in which they are tried: those that name the module, its room's, all others."""
    inside = Path(module).relative_to(PACKAGE)
    room = inside.parts[0].removesuffix(".py")
    dotted = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
    words = re.compile(rf"\b{re.escape(dotted)}\b|_{re.escape(inside.stem)}\b")
    near, of_room, others = list[str](), list[str](), list[str]()
    for path in sorted((tree / "tests").rglob("test_*.py")):
        name = path.relative_to(tree).as_posix()
        if room in name and (words.search(path.read_text(encoding="utf-8")) or inside.stem in path.stem):
            near.append(name)
        elif f"test_{room}" in name:
            of_room.append(name)
        elif words.search(path.read_text(encoding="utf-8")):
            near.append(name)
        else:
            others.append(name)
    near.sort(key=lambda name: inside.stem not in name)  # those called after the module first
    return [[module, *near], of_room, others]


def failing(tree: Path, files: list[str]) -> str:
    """The first test that fails, or nothing."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--no-header", *files]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=tree, env=environment, start_new_session=True, **both)
    try:
        said = process.communicate(timeout=TIMEOUT)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"no end within {TIMEOUT} s"
    if process.returncode in (0, 5):
        return ""
    failed = re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", said, flags=re.MULTILINE)
    return failed[0] if failed else said.strip().splitlines()[-1]


def sound_copy(tree: Path) -> Path:
    """The checkout as it stands, what is not committed included."""
    git("clone", "--quiet", str(ROOT), str(tree))
    for name in git("ls-files", "--modified", "--others", "--exclude-standard").splitlines():
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    return tree


def attempt(tree: Path, site: dict[str, Any], depth: int) -> dict[str, Any]:
    """Break, test, mend."""
    path, began = tree / site["file"], time.monotonic()
    sound = path.read_bytes()
    text = sound[: site["begin"]] + site["after"].encode() + sound[site["end"] :]
    caught = ""
    try:
        path.write_bytes(text)
        os.utime(path, (time.time() + 10, time.time() + 10))  # the copy's byte code is older, to the second
        for files in stages(tree, site["file"])[:depth]:
            if files and (caught := failing(tree, files)):
                break
    finally:
        path.write_bytes(sound)
        os.utime(path, (time.time() + 20, time.time() + 20))
    verdict = "caught" if caught else "not caught" if depth == 3 else ROOM
    return {"verdict": verdict, "by": caught, "seconds": round(time.monotonic() - began, 1)}


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def table(found: list[dict[str, Any]], count: int, seed: int) -> str:
    """The page: totals, then a line for each breakage, the gaps first."""
    number = {word: sum(row["verdict"] == word for row in found) for word in ("caught", "equivalent")}
    judged, since = len(found) - number["equivalent"], sum(SINCE in row.get("by", "") for row in found)
    rows = sorted(found, key=lambda row: (row["verdict"] == "caught", row["file"], row["line"]))
    page = [
        "# Deliberate breakages",
        "",
        f"`python benchmarks/mutations.py --count {count} --seed {seed}` at {git('describe', '--always').strip()}, "
        f"{len(found)} tried: {number['caught'] - since} of {judged} were caught at first, {number['caught']} are now; "
        f"{number['equivalent']} more change nothing that could be observed.",
        "",
        "| where | what | before | after | verdict | by, or why not |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = (f"{row['file']}:{row['line']}", row["kind"], row["before"], row["after"], row["verdict"])
        words = [" ".join(str(cell).split())[:60].replace("|", "\\|") for cell in cells]
        words[2], words[3] = f"`{words[2]}`", f"`{words[3]}`"
        page.append("| " + " | ".join([*words, row.get("reason") or row.get("by", "")]) + " |")
    return "\n".join(page) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--count", type=int, default=60, help="how many breakages")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--rooms-only", action="store_true", help="do not go on to the tests of other rooms")
    parser.add_argument("--again", action="store_true", help="try once more what was not caught")
    parser.add_argument("--list", action="store_true", help="print the choice, run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the two files")
    options = parser.parse_args(arguments)
    store, page = (options.out / f"mutations_{options.seed}.{kind}" for kind in ("json", "md"))
    require_outputs({"--out": [store, page]})
    choice = chosen(options.count, options.seed)
    if options.list:
        for site in choice:
            print(f"{site['file']}:{site['line']}: {site['kind']}: {site['before']!r} -> {site['after']!r}")
        return 0
    known = {row["key"]: row for row in json.loads(store.read_text())} if store.exists() else {}
    final = {"caught", "equivalent", *([] if options.again else ["not caught"])}
    if options.rooms_only and not options.again:
        final.add(ROOM)
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        tree = sound_copy(Path(folder) / "tree")
        for i, site in enumerate(choice):
            row = known.pop(identity(site), {})
            if row.get("verdict") not in final:
                row = attempt(tree, site, 2 if options.rooms_only else 3)
            found.append({"key": identity(site)} | {w: site[w] for w in SHOWN} | row)
            write_text(store, json.dumps([*found, *known.values()], indent=1) + "\n")
            write_text(page, table(found, len(choice), options.seed))
            print(f"{i + 1}/{len(choice)} {site['file']}:{site['line']} {site['kind']}: {row['verdict']}", flush=True)
        tests = sorted({row["by"].partition(f", {SINCE}")[0] for row in found if "::" in row.get("by", "")})
        if tests and (failed := failing(tree, tests)):
            print(f"{failed} fails without any breakage: what it caught does not count", file=sys.stderr)
            return 2
    judged = [row for row in found if row["verdict"] != "equivalent"]
    return int(sum(row["verdict"] == "caught" for row in judged) < GOAL * len(judged))


if __name__ == "__main__":
    sys.exit(answered(main))
