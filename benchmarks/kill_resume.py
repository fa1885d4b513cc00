"""Long runs killed in the middle: each goes on from its file in a new process and must end with the same numbers.

    python benchmarks/kill_resume.py [--quick] [--out DIR]

A search for eigenpairs, a spectral density and a training run with BNP, each made three times in processes of their
own: uninterrupted, killed by SIGKILL once it is about half done, and from the killed one's file to the end. Writes
`kill_resume.md` and `kill_resume.json`; exit status 1 if a number differs in a single bit.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from krylov_peers import LOSS
from side_by_side import RESULTS, about, heading, require_folder, table, write

import bnp_analysis as bnp
from bnp_analysis.cli import answered


def risk(quick: bool) -> bnp.EmpiricalRisk:
    """A perceptron with random data in float64."""
    g = torch.Generator().manual_seed(0)
    n = 64 if quick else 2048
    x, y = torch.rand(n, 784, generator=g).double(), torch.randint(0, 10, (n,), generator=g)
    return bnp.EmpiricalRisk(bnp.models.mlp([784, 100, 100, 100, 10], dtype=torch.float64), LOSS, (x, y))


def search(folder: Path, quick: bool) -> dict[str, torch.Tensor]:
    A, k = bnp.hessian(risk(quick)), 10 if quick else 25  # half of it is more than the 50 products between saves
    found = bnp.eigenpairs(A, k, tol=1e-8, max_matvecs=5000, checkpoint=folder / "run.pt", progress=telling(folder))
    return {"values": found.values, "vectors": found.vectors, "residuals": found.residuals}


def density(folder: Path, quick: bool) -> dict[str, torch.Tensor]:
    A, steps = bnp.hessian(risk(quick)), 15 if quick else 100
    found = bnp.spectral_density(A, probes=10, steps=steps, checkpoint=folder / "run.pt", progress=telling(folder))
    return {name: torch.as_tensor(getattr(found, name)) for name in ("nodes", "weights", "density")}


def training(folder: Path, quick: bool) -> dict[str, torch.Tensor]:
    data, model = bnp.data.load("digits", n=600), bnp.models.mlp([64, 100, 100, 10], seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run = bnp.train(
        *(model, LOSS, data.tensors, optimizer),
        **{"preconditioner": bnp.BNP(model), "epochs": 6 if quick else 300, "batch_size": 60, "checkpoint_every": 10},
        **{"checkpoint": folder / "run.pt", "progress": telling(folder)},
    )
    return model.state_dict() | {"loss": torch.as_tensor(run.loss)}


WORKS: dict[str, Callable[[Path, bool], dict[str, torch.Tensor]]] = {
    "eigenpairs": search,
    "spectral density": density,
    "training with BNP": training,
}


def telling(folder: Path) -> Callable[[int, int], None]:
    """Leave in the folder how far the run is."""
    return lambda done, total: (folder / "done").write_text(str(done)) and None


def finish(name: str, folder: Path, quick: bool, kill_at: int | None = None) -> tuple[float, int]:
    """Run it in a process of its own, to its end or until it is killed; seconds, and how far it said it was."""
    words = [sys.executable, __file__, "--child", name, str(folder), *(["--quick"] if quick else [])]
    began, done = time.perf_counter(), folder / "done"
    process = subprocess.Popen(words)
    if kill_at is not None:
        while process.poll() is None and not (done.exists() and int(done.read_text() or 0) >= kill_at):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        if process.wait() != -signal.SIGKILL:
            raise SystemExit(f"{name} ended with status {process.returncode} before it could be killed")
    elif process.wait():
        raise SystemExit(f"{name} failed with status {process.returncode}")
    return time.perf_counter() - began, int(done.read_text() or 0)


def one(name: str, quick: bool) -> dict[str, Any]:
    """Uninterrupted, killed and resumed."""
    with tempfile.TemporaryDirectory() as root:
        whole, killed = Path(root) / "whole", Path(root) / "killed"
        whole.mkdir()
        killed.mkdir()
        record: dict[str, Any] = {"run": name}
        record["whole_seconds"], record["length"] = finish(name, whole, quick)
        record["killed_seconds"], record["killed_at"] = finish(name, killed, quick, max(record["length"] // 2, 1))
        record["saved"] = (killed / "run.pt").exists()
        record["resumed_seconds"], _ = finish(name, killed, quick)
        first, second = (torch.load(folder / "result.pt", weights_only=True) for folder in (whole, killed))
        record["equal"] = first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
        record["difference"] = max(float((first[k] - second[k]).abs().max()) for k in first)
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    parser.add_argument("--child", nargs=2, metavar=("RUN", "FOLDER"), help="only this run")
    options = parser.parse_args(arguments)
    require_folder(options.out, "kill_resume")
    torch.set_num_threads(1)
    if options.child:
        name, folder = options.child[0], Path(options.child[1])
        torch.save(WORKS[name](folder, options.quick), folder / "result.pt")
        return 0
    command = "python benchmarks/kill_resume.py" + " --quick" * options.quick
    record = {"command": command, "about": about("cpu"), "runs": [one(name, options.quick) for name in WORKS]}
    rows = [
        [
            *(
                r["run"],
                f"{r['whole_seconds']:.0f}",
                f"{r['killed_seconds']:.0f} (at {r['killed_at']} of {r['length']})",
            ),
            *(f"{r['resumed_seconds']:.0f}", "yes" if r["equal"] else f"no, by {r['difference']:.1g}"),
        ]
        for r in record["runs"]
    ]
    lines = heading("Runs that were killed and resumed", command, record["about"])
    lines += table(["run", "uninterrupted, s", "killed after, s", "rest, s", "equal, bit for bit"], rows)
    write(options.out, "kill_resume", lines, record)
    print("\n".join(lines))
    return int(not all(r["equal"] and r["saved"] for r in record["runs"]))


if __name__ == "__main__":
    sys.exit(answered(main))
