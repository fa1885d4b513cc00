"""What the processes of a test do: `python distributed_jobs.py JOB FOLDER`, with the variables that `torchrun` sets.

`start` runs it; every process writes what it found to `FOLDER/JOB-RANK.pt`.
"""

from __future__ import annotations

import faulthandler
import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import shard_measurements
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import bnp_analysis as bnp
from bnp_analysis.distributed import Group
from bnp_analysis.errors import BNPAnalysisError

ROOT = Path(__file__).resolve().parents[2]
cross_entropy = nn.functional.cross_entropy


def start(job: str, folder: Path, *, limit: float = 300, size: int = 2, **variables: str) -> list[tuple[int, str]]:
    """Run a job in several processes; exit status and output of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", __file__, job, str(folder)]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, env=shared | {"RANK": str(rank)}, **both) for rank in range(size)]
    try:
        return [(process.returncode, out) for process in running for out in [process.communicate(timeout=limit)[0]]]
    finally:
        for process in running:
            process.kill()


def found(job: str, folder: Path, *, size: int = 2) -> list[Any]:
    """What the processes of a job wrote."""
    return [torch.load(folder / f"{job}-{rank}.pt", weights_only=False) for rank in range(size)]


def measure(group: Group, folder: Path) -> dict[str, Any]:
    """The killed run to its end, every measurement, training, errors on one of the processes, and a run undisturbed."""
    resumed = killed(group, folder)
    return {name: shard_measurements.measured(name, group) for name in shard_measurements.PROBLEMS} | {
        "resumed": resumed,
        "training": trained(group),
        "errors": disagree(group),
        "undisturbed": killed(group, folder / "undisturbed"),
    }


def trained(group: Group) -> dict[str, torch.Tensor]:
    """A few steps of BNP with estimated output scales on half of every batch."""
    model, (x, y) = shard_measurements.dense(), shard_measurements.data(12, 4)
    x, y = group.shard((x, y))
    outer = DistributedDataParallel(model) if group.size > 1 else model
    pre, optimizer = bnp.BNP(outer, output_scale="estimated"), torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        cross_entropy(outer(x), y).backward()
        pre.step()
        optimizer.step()
    layers = pre.state_dict()["layers"].values()
    squares = torch.cat([layer["output_squares"] for layer in layers])
    return {"parameters": nn.utils.parameters_to_vector(model.parameters()).detach(), "output squares": squares}


def _attempt(do: Callable[[], Any]) -> tuple[str, str]:
    try:
        do()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def disagree(group: Group) -> dict[str, tuple[str, str]]:
    """Everything that can go wrong in one process while the other is well; afterwards both go on."""
    odd = group.rank == 1
    x, y = shard_measurements.data(12, 4)
    model, mine = shard_measurements.dense(), group.shard((x, y))

    def risk(**changes: Any) -> bnp.EmpiricalRisk:
        given = {"model": model, "loss": cross_entropy, "data": mine} | changes
        return bnp.EmpiricalRisk(group=group, **given)

    def together() -> None:
        with group.together("a part"):
            if odd:
                raise KeyError("only here")

    other, random = shard_measurements.dense(), nn.Sequential(nn.Linear(4, 3), nn.Dropout()).double()
    with torch.no_grad():
        other[0].weight[0, 0] += 1e-16 if not odd else 1e-15
    good = risk()
    v = torch.ones(good.space.dim, dtype=torch.float64)
    broken = (torch.where(torch.arange(len(mine[0]))[:, None] == 2, float("nan"), mine[0]), mine[1])
    hessian = bnp.hessian(good)
    return {
        "nan": _attempt(lambda: risk(data=broken if odd else mine)),
        "parameters": _attempt(lambda: risk(model=other)),
        "loss": _attempt(lambda: risk(loss=nn.CrossEntropyLoss(label_smoothing=0.1 if odd else 0.2))),
        "modes": _attempt(lambda: risk(model=shard_measurements.dense().train(odd))),
        "dtype": _attempt(lambda: risk(dtype=torch.float32 if odd else None)),
        "random": _attempt(lambda: risk(model=random.train(), data=mine if odd else [])),
        "coupled": _attempt(lambda: risk(model=nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double())),
        "no data": _attempt(lambda: risk(data=[])),
        "a part": _attempt(together),
        "vectors": _attempt(lambda: hessian @ (v * (1 + 1e-15 * odd))),
        "places": _attempt(lambda: hessian @ v if odd else bnp.gauss_newton(good) @ v),
        "points": _attempt(lambda: good.at(v + odd)),
        "afterwards": ("", str(float(good.at(v).value))),
    }


def killed(group: Group, folder: Path) -> dict[str, Any]:
    """One process is killed in the middle of a Lanczos run; started again, the run goes on."""
    folder.mkdir(exist_ok=True)
    x, y = shard_measurements.data(40, 16)
    model = bnp.models.mlp([16, 7, 3], seed=0, dtype=torch.float64)
    risk = bnp.EmpiricalRisk(model, cross_entropy, group.shard((x, y)), group=group)
    path, at, seen = folder / "state.pt", os.environ.get("KILL_AT"), list[int]()
    private = path if group.rank == 0 else folder / "not on this machine.pt"

    def progress(done: int, total: int) -> None:
        seen.append(done)
        if group.rank == 1 and str(done) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    run = bnp.linalg.lanczos(bnp.hessian(risk), 80, seed=4, checkpoint=group.checkpoint(private), progress=progress)
    numbers = {"alpha": torch.as_tensor(run.alpha), "beta": torch.as_tensor(run.beta), "basis": run.basis}
    return numbers | {
        "began at": seen[0] - 1,
        "files": sorted(p.name for p in folder.iterdir() if p.name[0] != "." and "killed" not in p.name),
    }


def late(group: Group, folder: Path) -> dict[str, Any]:
    """One process comes later than the others wait."""
    if group.rank == 1:  # until rank 0, that has waited long enough, has ended
        with open(folder / "alive-0") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    error = _attempt(lambda: group.sum(lambda: torch.ones(3), "ones"))
    again = _attempt(lambda: group.sum(lambda: torch.ones(3), "ones again"))
    return {"error": error, "again": again}


def main(job: str, folder: Path) -> None:
    faulthandler.dump_traceback_later(280, exit=True)
    torch.set_num_threads(1)
    do = {"measure": measure, "killed": killed, "late": late}[job]
    if job == "late":
        alive = os.open(folder / f"alive-{os.environ['RANK']}", os.O_CREAT | os.O_WRONLY)
        fcntl.flock(alive, fcntl.LOCK_EX)  # held until the process ends
    try:
        with bnp.distributed.initialize(timeout=2 if job == "late" else 120) as group:
            torch.save(do(group, folder), folder / f"{job}-{group.rank}.pt")
    except BNPAnalysisError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    # Not through the destructors: torch now and then aborts while it takes DistributedDataParallel apart.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
