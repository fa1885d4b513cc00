"""Time and memory of one training step: plain, with BatchNorm layers, and with BNP, side by side in one run.

BatchNorm stands before the activations, as it mostly does, or on the layers' inputs: with fixed statistics and `q = 1`,
the latter network is the one that BNP trains (T9), and normalizes as many features as BNP does.

    python benchmarks/bnp_step.py [--threads 1] [--rounds 15] [--device cpu] [--out benchmarks/results/bnp_step.md]

A step is `zero_grad`, forward, loss, backward, `pre.step()` where there is one, `optimizer.step()`: SGD with a learning
rate of 1e-8, so that no network fits its batch and computes with denormal numbers. They take turns in short
blocks, round after round, so that what else the machine does hits them alike; ratios are medians over rounds of block
ratios to the plain step (or BatchNorm's) of the same round. On one thread of a CPU the clock is the processor time of
the process, which leaves out the time that other programs take.

Memory: by how much the largest resident memory of a fresh process grows while it takes five steps, with glibc's
allocator told to return large blocks at once (MALLOC_MMAP_THRESHOLD_): else it keeps freed ones, and numbers vary by
tens of MB from run to run.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from bnp_analysis.models import cnn, mlp, resnet
from bnp_analysis.training import BNP

WIDTHS = [784, 100, 100, 100, 10]
NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "MLP 784-100-100-100-10": (partial(mlp, WIDTHS, dtype=torch.float32), (784,)),
    "CNN 3 x 32 x 32": (partial(cnn, dtype=torch.float32), (3, 32, 32)),
    "ResNet-20 3 x 32 x 32": (partial(resnet, 20, dtype=torch.float32), (3, 32, 32)),
}
CASES = (
    ("MLP 784-100-100-100-10", 1),
    ("MLP 784-100-100-100-10", 60),
    ("MLP 784-100-100-100-10", 512),
    ("CNN 3 x 32 x 32", 128),
    ("ResNet-20 3 x 32 x 32", 128),
)
METHODS = ("plain", "BatchNorm", "BatchNorm on inputs", "BNP")
NORMS = {
    "BatchNorm": {"norm": "batch"},
    "BatchNorm on inputs": {"norm": "batch", "norm_at": "input"},
}


def step_of(method: str, network: str, batch: int, device: str) -> Callable[[], None]:
    """A training step on one fixed batch."""
    make, shape = NETWORKS[network]
    model = make(**NORMS.get(method, {"norm": "none"})).to(device)
    x = torch.rand(batch, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    return steps(model, x, (torch.arange(batch) % 10).to(device), BNP(model) if method == "BNP" else None)


def steps(model: nn.Module, x: Tensor, y: Tensor, pre: BNP | None) -> Callable[[], None]:
    """The step itself."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        if pre is not None:
            pre.step()
        optimizer.step()

    return step


def block(step: Callable[[], None], count: int, device: str) -> float:
    """Seconds per step over `count` steps."""
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    begin = clock()
    for _ in range(count):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (clock() - begin) / count


def row(network: str, batch: int, rounds: int, device: str) -> str:
    """One row of the table of times."""
    able = [m for m in METHODS if batch > 1 or m not in NORMS]
    runs = {method: step_of(method, network, batch, device) for method in able}
    for step in runs.values():
        block(step, 3, device)
    count = max(1, int(0.15 / block(runs["plain"], 3, device)))
    times: dict[str, list[float]] = {method: [] for method in able}
    for _ in range(rounds):
        for method, step in runs.items():
            times[method].append(block(step, count, device))

    def cell(method: str, over: str) -> str:
        if not {method, over} <= times.keys():
            return "-"
        return f"{statistics.median(t / b for t, b in zip(times[method], times[over], strict=True)):.2f}"

    milliseconds = [f"{statistics.median(times[m]) * 1e3:.3f}" if m in times else "-" for m in METHODS]
    ratios = [cell("BNP", other) for other in METHODS[:-1]]
    return f"| {' | '.join([f'{network}, batch {batch}', *milliseconds, *ratios])} |"


def memory(method: str, network: str, batch: int, device: str) -> float:
    """Megabytes of five steps, in this process, in which libraries that load on first use were loaded before."""
    # In functions, since user_waits.py takes steps of older builds too, which have no such module.
    from bnp_analysis.runtime.memory import peak_memory

    step_of("BNP", "MLP 784-100-100-100-10", 2, device)()
    step_of("BatchNorm", "CNN 3 x 32 x 32", 2, device)()
    before = peak_memory(device, reset=True)
    block(step_of(method, network, batch, device), 5, device)
    return peak_memory(device) - before


def memory_row(network: str, batch: int, threads: int, device: str) -> str:
    """One row of the table of memory, each number from a process of its own."""
    found = []
    for method in METHODS:
        words = [sys.executable, __file__, "--threads", str(threads), "--device", device]
        words += ["--memory", method, network, str(batch)]
        fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
        found.append(float(subprocess.run(words, check=True, capture_output=True, text=True, env=fixed).stdout))
    parameters = sum(p.numel() for p in NETWORKS[network][0](norm="none").parameters()) * 4 / 2**20
    numbers = [f"{parameters:.1f}", *(f"{mb:.1f}" for mb in found), f"{found[-1] - found[0]:+.1f}"]
    return f"| {' | '.join([f'{network}, batch {batch}', *numbers])} |"


def report(rounds: int, threads: int, device: str) -> list[str]:
    """Both tables, printed as they come."""
    lines = ["| step | " + " | ".join([f"{m} ms" for m in METHODS] + [f"BNP / {m}" for m in METHODS[:-1]]) + " |"]
    lines.append("|---" * 2 * len(METHODS) + "|")
    print("\n".join(lines), flush=True)
    for network, batch in CASES:
        lines.append(row(network, batch, rounds, device))
        print(lines[-1], flush=True)
    lines += [
        "",
        "| peak memory | parameters MB | " + " | ".join(f"{m} MB" for m in METHODS) + " | BNP - plain |",
        "|---" * (len(METHODS) + 3) + "|",
    ]
    print("\n".join(lines[-3:]), flush=True)
    for network, batch in CASES[2:]:
        lines.append(memory_row(network, batch, threads, device))
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Measure and write the tables."""
    from bnp_analysis.runtime.files import require_output, write_text

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=3, metavar=("METHOD", "NETWORK", "BATCH"), help="only this number")
    options = parser.parse_args()
    if options.out is not None:
        require_output(options.out, "--out")
    torch.set_num_threads(options.threads)
    if options.memory:
        method, network, batch = options.memory
        print(memory(method, network, int(batch), options.device))
        return
    lines = report(options.rounds, options.threads, options.device)
    where = f"{options.threads} thread(s)" if options.device == "cpu" else torch.cuda.get_device_name()
    settings = f"{where}, torch {torch.__version__}, Python {platform.python_version()}, {options.rounds} rounds"
    if hasattr(os, "getloadavg"):
        settings += f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors at the end"
    if options.out is not None:
        command = f"python benchmarks/bnp_step.py --threads {options.threads} --rounds {options.rounds}"
        text = [f"# One training step\n\n`{command} --device {options.device}`: {settings}.\n", *lines]
        write_text(options.out, "\n".join(text) + "\n")


if __name__ == "__main__":
    from bnp_analysis.cli import answered

    sys.exit(answered(main))
