"""Time of one training step: plain, with BatchNorm layers, and with BNP, side by side in one run.

    python benchmarks/bnp_step.py [--threads 1] [--rounds 7] [--device cpu] [--out benchmarks/results/bnp_step.md]

A step is `zero_grad`, forward, loss, backward, `pre.step()` where there is one, `optimizer.step()`: SGD with a learning
rate of 1e-8, so that no network fits its batch and computes with denormal numbers. The three take turns in short
blocks, round after round, so that what else the machine does hits them alike; ratios are medians over rounds of block
ratios to the plain step (or BatchNorm's) of the same round.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bnp_analysis.models import cnn, mlp
from bnp_analysis.training.bnp import BNP

WIDTHS = [784, 100, 100, 100, 10]


def step_of(model: nn.Module, x: Tensor, y: Tensor, pre: BNP | None) -> Callable[[], None]:
    """A training step on one fixed batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-8)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), y).backward()
        if pre is not None:
            pre.step()
        optimizer.step()

    return step


def cases(device: str) -> dict[str, tuple[Callable[[str], nn.Module], tuple[int, ...]]]:
    """Name -> (network by normalization, shape of a batch)."""

    def perceptron(norm: str) -> nn.Module:
        return mlp(WIDTHS, norm=norm, dtype=torch.float32).to(device)

    def convolutional(norm: str) -> nn.Module:
        return cnn(norm=norm, dtype=torch.float32).to(device)

    return {
        "MLP 784-100-100-100-10, batch 1": (perceptron, (1, 784)),
        "MLP 784-100-100-100-10, batch 60": (perceptron, (60, 784)),
        "MLP 784-100-100-100-10, batch 512": (perceptron, (512, 784)),
        "CNN 3 x 32 x 32, batch 128": (convolutional, (128, 3, 32, 32)),
    }


def block(step: Callable[[], None], count: int, device: str) -> float:
    """Seconds per step over `count` steps."""
    begin = time.perf_counter()
    for _ in range(count):
        step()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def measure(name: str, make: Callable[[str], nn.Module], shape: tuple[int, ...], rounds: int, device: str) -> str:
    """One row of the table."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(shape, generator=g).to(device)
    y = (torch.arange(shape[0]) % 10).to(device)
    plain, preconditioned = make("none"), make("none")
    steps = {"plain": step_of(plain, x, y, None), "bnp": step_of(preconditioned, x, y, BNP(preconditioned))}
    if shape[0] > 1:
        steps["bn"] = step_of(make("batch"), x, y, None)
    for step in steps.values():
        block(step, 3, device)
    count = max(1, int(0.15 / block(steps["plain"], 3, device)))
    times: dict[str, list[float]] = {key: [] for key in steps}
    for _ in range(rounds):
        for key, step in steps.items():
            times[key].append(block(step, count, device))
    base = times["plain"]

    def cell(key: str) -> str:
        if key not in times:
            return "- | -"
        ratios = [t / b for t, b in zip(times[key], base, strict=True)]
        return f"{statistics.median(times[key]) * 1e3:.3f} | {statistics.median(ratios):.2f}"

    over = "-"
    if "bn" in times:
        over = f"{statistics.median(t / b for t, b in zip(times['bnp'], times['bn'], strict=True)):.2f}"
    return f"| {name} | {statistics.median(base) * 1e3:.3f} | {cell('bn')} | {cell('bnp')} | {over} |"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = f"{options.threads} thread(s)" if options.device == "cpu" else torch.cuda.get_device_name()
    lines = [
        "| step | plain ms | BatchNorm ms | over plain | BNP ms | over plain | BNP over BatchNorm |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for name, (make, shape) in cases(options.device).items():
        lines.append(measure(name, make, shape, options.rounds, options.device))
        print(lines[-1], flush=True)
    settings = f"{where}, torch {torch.__version__}, Python {platform.python_version()}, {options.rounds} rounds"
    if hasattr(os, "getloadavg"):
        settings += f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors at the end"
    if options.out is not None:
        command = f"python benchmarks/bnp_step.py --threads {options.threads} --rounds {options.rounds}"
        options.out.parent.mkdir(parents=True, exist_ok=True)
        text = [f"# Time of one training step\n\n`{command} --device {options.device}`: {settings}.\n", *lines]
        options.out.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
