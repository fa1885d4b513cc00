"""A hundred kills at random times: every command, run once more, ends with the numbers of an uninterrupted run.

    python benchmarks/kills.py [--quick] [--kills N] [--seed N] [--out DIR]

The commands `train`, `spectrum`, `condition` and `check`, and a search for eigenpairs from Python, on problems of a
second or two, each in a process of its own. Half of the kills are SIGKILL, half SIGINT, at times drawn from the seed.
After each kill, result files must be missing or whole; the same command is then given again, which goes on from its
file where it has one, and its results must equal those of the uninterrupted run bit for bit. Writes `kills.md` and
`kills.json`; exit status 1 if one does not.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from side_by_side import RESULTS, about, heading, require_folder, table, write

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.cli import main as command
from bnp_analysis.results import Result

_SMALL = ["--samples", "100", "--hidden", "8", "--quiet", "--seed", "1"]
_TRAIN = ["--preconditioner", "bnp", "--bnp", "q=measured", "--batch-size", "10", "--checkpoint-every", "7"]

_FILES = ["--checkpoint", "run.pt", "--log", "run.jsonl", "--json", "out.json"]


def search() -> int:
    values = torch.logspace(0, -4, 400, dtype=torch.float64)

    def product(v: torch.Tensor) -> torch.Tensor:
        time.sleep(0.002)
        return values * v

    A = bnp.CallableOperator(product, len(values), dtype=torch.float64)
    found = bnp.eigenpairs(A, 5, which="smallest", tol=1e-6, max_matvecs=300, checkpoint="run.pt")
    found.save("out.json")
    return 130 if found.stop == "interrupted" else 0


#: Each is called in a folder of its own, and writes results there.
WORKS: dict[str, Callable[[], int]] = {
    "train": lambda: command(["train", *_SMALL, *_TRAIN, "--epochs", "15", "--resume", *_FILES]),
    "spectrum": lambda: command(["spectrum", *_SMALL, "--steps", "20", "--probes", "4", "--json", "out.json"]),
    "condition": lambda: command(["condition", *_SMALL, "--json", "out.json"]),
    "check": lambda: command(["check", *_SMALL, "--only", "T1", "T2", "T5", "--json", "out.json"]),
    "search": search,
}


def begin(name: str, folder: Path) -> int:
    """Run it in a process forked from this one, which has loaded everything; the number of the process."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        words = os.open("words", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(words, 1)
        os.dup2(words, 2)
        status = WORKS[name]()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = 130
    finally:
        os._exit(status)


def finish(name: str, folder: Path) -> float:
    """Run it to the end; seconds."""
    began = time.perf_counter()
    status = os.waitstatus_to_exitcode(os.waitpid(begin(name, folder), 0)[1])
    if status:
        raise SystemExit(f"{name} ended with status {status}:\n{(folder / 'words').read_text()}")
    return time.perf_counter() - began


def results(folder: Path) -> dict[str, Result]:
    """All result files, which can be read, without the number of products: a resumed run makes one more."""
    found = {path.name: Result.load(path) for path in sorted(folder.glob("*.json"))}
    return {name: dataclasses.replace(result, matvecs=0) for name, result in found.items()}


def kill(name: str, folder: Path, after: float, sent: signal.Signals) -> bool:
    """Run it and kill it; whether it was killed before its end."""
    pid = begin(name, folder)
    time.sleep(after)
    os.kill(pid, sent)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    results(folder)  # missing, or whole
    return status != 0


def one(name: str, kills: int, draw: random.Random) -> dict[str, Any]:
    """A command killed so many times."""
    record: dict[str, Any] = {"run": name, "kills": 0, "equal": 0, "from a file": 0, "signals": [], "left": []}
    with tempfile.TemporaryDirectory() as root:
        whole = Path(root) / "whole"
        whole.mkdir()
        record["seconds"] = finish(name, whole)
        wanted = results(whole)
        trial = 0
        while record["kills"] < kills and trial < 4 * kills:
            folder = Path(root) / str(trial)
            folder.mkdir()
            sent = (signal.SIGKILL, signal.SIGINT)[trial % 2]
            trial += 1
            if not kill(name, folder, draw.uniform(0, 0.9 * record["seconds"]), sent):
                continue
            record["kills"] += 1
            record["signals"].append(sent.name)
            record["from a file"] += (folder / "run.pt").exists()
            finish(name, folder)
            equal = results(folder) == wanted
            record["equal"] += equal
            if not equal:
                print(f"{name}, killed by {sent.name}: other numbers", file=sys.stderr)
            record["left"] += [path.name for path in folder.iterdir() if path.name.startswith(".run")]
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two kills of each command")
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--seed", type=int, default=0, help="of the times")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    options = parser.parse_args(arguments)
    require_folder(options.out, "kills")
    torch.set_num_threads(1)
    # Loads what each needs, once for all processes.
    with tempfile.TemporaryDirectory() as root, open(os.devnull, "w") as out, redirect_stdout(out):
        for name, work in WORKS.items():
            (Path(root) / name).mkdir()
            with chdir(Path(root) / name):
                work()
    kills, draw = (2 if options.quick else options.kills), random.Random(options.seed)
    words = "python benchmarks/kills.py" + (" --quick" if options.quick else f" --kills {options.kills}")
    runs = []
    for name in WORKS:
        runs.append(one(name, kills, draw))
        print(runs[-1], flush=True)
    record = {"command": words, "about": about("cpu"), "runs": runs}
    rows = [
        [r["run"], f"{r['seconds']:.1f}", str(r["kills"]), str(r["from a file"]), f"{r['equal']} of {r['kills']}"]
        for r in runs
    ]
    lines = heading("Runs killed at random times", words, record["about"])
    lines += table(["run", "uninterrupted, s", "kills", "went on from a file", "equal, bit for bit"], rows)
    write(options.out, "kills", lines, record)
    print("\n".join(lines))
    return int(not all(r["equal"] == r["kills"] == kills and not r["left"] for r in runs))


if __name__ == "__main__":
    sys.exit(answered(main))
