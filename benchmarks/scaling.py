"""What a second process saves, and what a paper model says of more: products, and Lanczos runs, of one and two ranks.

    python benchmarks/scaling.py [--rounds 9] [--quick] [--out benchmarks/results]

Two processes of one thread each are started, connected by gloo. Round after round the first multiplies alone with all
of the data while the other waits, then both multiply with half of them each; wall-clock time, medians over rounds of
ratios within a round, and beside them ratios of processor times. The constants of the model (the rate of a product,
what meeting and summing cost, what every process repeats) are measured in the same run; docs/scaling.md has the
formulas.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from side_by_side import about, heading, require_folder, table, write
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.distributed.group import Group, digest

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-100-100-100-10, N 4096": (lambda: bnp.models.mlp([784, 100, 100, 100, 10]), (4096, 784)),
    "5-layer CNN, N 128": (bnp.models.cnn, (128, 3, 32, 32)),
}
MATRICES = {"Hessian": bnp.hessian, "Gauss-Newton": bnp.gauss_newton}
STEPS = 10
RANKS = (1, 2, 4, 8, 16, 32, 64)
#: Seconds of latency and bytes per second between neighbours, as assumed.
NETS = {"10 Gbit/s, 30 us": (3e-5, 1.25e9), "200 Gbit/s, 5 us": (5e-6, 25e9)}
EXAMPLES = 16  # of --quick


def model_of(p: int, c: dict[str, float], latency: float, bandwidth: float) -> float:
    """Seconds of a product on `p` ranks: `C/p + M`, plus header and ring all-reduce over `p - 1` neighbours."""
    if p == 1:
        return c["product"]
    header = (p - 1) * latency
    ring = 2 * (p - 1) * latency + 2 * (p - 1) / p * c["bytes"] / bandwidth
    return c["product"] / p + c["digest"] + header + ring


def timed(work: Callable[[], Any], count: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(count):
        work()
    return (time.perf_counter() - began) / count


def paired(group: Group, one: Callable[[], Any], two: Callable[[], Any], rounds: int, least: float) -> dict[str, float]:
    """Medians: of both times, and of their ratio within a round. `one` runs on rank 0 while the others wait.

    `busy` compares processor times, the longest of the ranks', and so leaves out waiting and what other programs take.
    """
    token = torch.zeros(1)
    for _ in range(2):
        if group.rank == 0:
            one()
        group.agree(token, "a turn")
        two()
    count = group.from_first(max(1, round(least / timed(one))) if group.rank == 0 else 0, "how often")
    ones, twos, busy = [], [], []
    for _ in range(rounds):
        clock = time.process_time()
        if group.rank == 0:
            ones.append(timed(one, count))
        alone, clock = time.process_time() - clock, time.process_time()
        group.agree(token, "a turn")
        twos.append(timed(two, count))
        own = time.process_time() - clock
        busy.append(alone / max(group.share(lambda own=own: own, "processor times")))
    if group.rank:
        return {}
    ratios = [a / b for a, b in zip(ones, twos, strict=True)]
    times = {"one": statistics.median(ones), "two": statistics.median(twos)}
    return times | {"faster": statistics.median(ratios), "busy": statistics.median(busy)}


def constants(group: Group, n: int) -> dict[str, float]:
    """Seconds of a digest, of a latency, and bytes per second between the two: fitted to sums of several lengths."""
    lengths = [1, 1000, 10_000, 100_000, 1_000_000]
    times = []
    for length in lengths:
        t = torch.zeros(length, dtype=torch.float64)
        times.append(statistics.median(timed(lambda t=t: group._link.all_reduce(t, "a sum"), 5) for _ in range(9)))
    x = torch.randn(n, dtype=torch.float64)
    # p = 2: a ring takes 2 (p - 1) = 2 latencies and sends 2 (p - 1) / p = 1 times the bytes.
    return {
        "digest": statistics.median(timed(lambda: digest(x), 5) for _ in range(9)),
        "latency": times[0] / 2,
        "bandwidth": 8 * (lengths[-1] - lengths[0]) / (times[-1] - times[0]),
    }


def measured(group: Group, network: str, examples: int | None, rounds: int) -> dict[str, Any]:
    """One network: both matrices, a Lanczos run, and the constants of the model."""
    build, shape = NETWORKS[network]
    g = torch.Generator().manual_seed(0)
    x = torch.rand(examples or shape[0], *shape[1:], generator=g)
    y = torch.randint(0, 10, (len(x),), generator=g)
    model, loss = build().double(), nn.functional.cross_entropy
    parts = bnp.EmpiricalRisk(model, loss, group.shard((x, y)), group=group)
    whole = bnp.EmpiricalRisk(model, loss, (x, y)) if group.rank == 0 else parts
    v: Tensor = torch.randn(parts.space.dim, generator=g, dtype=torch.float64)
    found: dict[str, Any] = {"parameters": len(v), "examples": len(x)} | constants(group, len(v))
    for name, matrix in MATRICES.items():
        A, B = matrix(whole) if group.rank == 0 else None, matrix(parts)
        found[name] = paired(group, lambda A=A: A @ v, lambda B=B: B @ v, rounds, 0.2)
        if name == "Hessian":
            run = paired(group, lambda A=A: _lanczos(A), lambda B=B: _lanczos(B), max(1, rounds // 4), 0.0)
            found[f"Lanczos, {STEPS} steps"] = run
        del A, B
    Q = torch.randn(len(v), STEPS, dtype=torch.float64)
    found["orthogonalization"] = statistics.median(timed(lambda: v - Q @ (Q.T @ v), 3) for _ in range(5)) * 2
    return found


def _lanczos(A: Any) -> None:
    bnp.linalg.lanczos(A, STEPS, seed=0)


def report(record: dict[str, Any], command: str) -> list[str]:
    """Measured, predicted, and predicted further."""
    lines = heading("Two processes against one, and more on paper", command, record["about"])
    head = ["network", "what", "one rank, ms", "two ranks, ms", "faster", "busy", "model of two, ms"]
    rows, paper = [], []
    for network, found in record["networks"].items():
        net = found["latency"], found["bandwidth"]
        for name in (*MATRICES, f"Lanczos, {STEPS} steps"):
            t = found[name]
            c = {"product": t["one"], "bytes": 8.0 * found["parameters"], "digest": found["digest"]}
            predicted = model_of(2, c, *net)
            if name.startswith("Lanczos"):
                # Products are shared, the rest of a step is not.
                own = t["one"] - STEPS * found["Hessian"]["one"]
                predicted = STEPS * model_of(2, c | {"product": found["Hessian"]["one"]}, *net) + max(own, 0.0)
            ms = [f"{1e3 * s:.1f}" for s in (t["one"], t["two"])]
            rows.append([network, name, *ms, f"{t['faster']:.2f}x", f"{t['busy']:.2f}x", f"{1e3 * predicted:.1f}"])
        paper += _paper(network, found)
    lines += table(head, rows)
    lines += [
        "",
        f"One thread a process, float64. `faster`: median of {record['rounds']} rounds of ratios of wall-clock times;",
        "`busy`: of processor times, the longer of the ranks', without waiting, and without what other programs take.",
        "",
    ]
    for network, found in record["networks"].items():
        lines += [
            f"{network}: {found['parameters']} parameters, {8 * found['parameters'] / 1e6:.2f} MB to sum per product; "
            f"between the processes {1e6 * found['latency']:.0f} us and {found['bandwidth'] / 1e9:.2f} GB/s; a digest "
            f"takes {1e6 * found['digest']:.0f} us, full reorthogonalization against {STEPS} vectors "
            f"{1e3 * found['orthogonalization']:.2f} ms on every rank.",
            "",
        ]
    lines += ["## On paper: a Hessian product with the same data on more ranks", ""]
    lines += table(["network", "between ranks", *(f"{p} ranks" for p in RANKS), "80 % at 64 ranks from"], paper)
    return [*lines, "", "Speed-up, and efficiency in brackets; the last column is the number of examples per rank."]


def _paper(network: str, found: dict[str, Any]) -> list[list[str]]:
    rows = []
    nets = {"as measured here": (found["latency"], found["bandwidth"])} | NETS
    c = {"product": found["Hessian"]["one"], "bytes": 8.0 * found["parameters"], "digest": found["digest"]}
    for name, net in nets.items():
        ups = [c["product"] / model_of(p, c, *net) for p in RANKS]
        extra = model_of(64, c | {"product": 0.0}, *net)
        needed = 4 * extra / (c["product"] / found["examples"])
        cells = [f"{up:.1f} ({100 * up / p:.0f} %)" for p, up in zip(RANKS, ups, strict=True)]
        rows.append([network, name, *cells, f"{needed:.0f}"])
    return rows


def start(words: list[str]) -> int:
    """Two of this program, connected."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    shared |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    line = [sys.executable, __file__, *words]
    running = [subprocess.Popen(line, env=shared | {"RANK": str(rank)}) for rank in range(2)]
    return max(abs(process.wait()) for process in running)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="little data, one round: whether it runs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    require_folder(arguments.out, "scaling")
    if bnp.distributed.launched() == 1:
        return start(sys.argv[1:])
    torch.set_num_threads(1)
    rounds, examples = (1, EXAMPLES) if arguments.quick else (arguments.rounds, None)
    facts, networks = about("cpu"), {}
    with bnp.distributed.initialize(timeout=300) as group:
        for network in NETWORKS:
            networks[network] = measured(group, network, examples, rounds)
        if group.rank == 0:
            record = {"about": facts, "rounds": rounds, "networks": networks}
            words = " ".join(["python benchmarks/scaling.py", *sys.argv[1:]])
            lines = report(record, words)
            write(arguments.out, "scaling", lines, record)
            print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(answered(main))
