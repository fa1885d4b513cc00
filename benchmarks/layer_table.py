"""The time of `layer_table`, beside that of its blocks measured one by one, in one run.

    python benchmarks/layer_table.py [--threads 1 2] [--samples 10000] [--sampled 4] [--out benchmarks/results]

The network is the perceptron 784-100-100-100-10 on MNIST where BNP_ANALYSIS_DATA has it, else 64-100-100-100-10 on
digits, at its initialization.

*One by one*, for each unit: `condition_number` of its block without and with `P`. *Bare*: form `diag(s) H^` and
`diag(s) (H^ P)` with all rows and columns and take the QR factorization and the singular values of both, without any
certificate. Both of a few units of each layer, times how many there are. For each layer's own block: `condition_number`
of the Gauss-Newton operator without and with `P`, with the null directions that `null_directions` finds where it is
small enough to be searched; the table's seconds of the first layer include what it does for all. Half of this runs
before `layer_table` and half after it, so that what else the machine does hits both; with one thread the clock is the
processor time of the process, which leaves out the time that other programs take. Each bare number is compared with the
table's interval.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.curvature.units import UnitBlocks, unit_blocks
from bnp_analysis.diagnose import LayerRow, LayerTable, cell
from bnp_analysis.diagnose.blocks import known_null
from bnp_analysis.errors import DataNotFoundError, ZeroOperatorError
from bnp_analysis.linalg import ConditionNumber
from bnp_analysis.network import coverage
from bnp_analysis.runtime.files import require_output, write_text

HIDDEN = (100, 100, 100)


def network(samples: int) -> tuple[str, bnp.EmpiricalRisk]:
    """The name of the problem and its risk in float64."""
    try:
        data = bnp.data.load("mnist", n=samples, flatten=True)
    except DataNotFoundError:
        data = bnp.data.load("digits", n=min(samples, 1437))
    widths = [data.x.shape[1], *HIDDEN, 10]
    risk = bnp.EmpiricalRisk(bnp.models.mlp(widths), torch.nn.functional.cross_entropy, data.tensors)
    return f"perceptron {'-'.join(map(str, widths))}, {len(data)} samples of {data.name}", risk.to(torch.float64, "cpu")


def timed(clock: Callable[[], float], work: Callable[[], object]) -> float:
    """Seconds."""
    began = clock()
    work()
    return clock() - began


def say(text: str) -> None:
    """Progress, on the error stream."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def sides(blocks: UnitBlocks, P: bnp.linalg.Preconditioner, i: int) -> tuple[float, float]:
    """`sigma_max / sigma_min+` of a unit's factor without and with `P`, squared, by QR and SVD of all rows."""
    scale = blocks.scales[:, i, None]
    found = []
    for rows in (blocks.rows, P.apply_transpose(blocks.rows.T).T):
        sigma = torch.linalg.svdvals(torch.linalg.qr(scale * rows, mode="r")[1])
        kept = sigma[sigma > max(rows.shape) * torch.finfo(sigma.dtype).eps * sigma[0]]
        found.append(float((kept[0] / kept[-1]) ** 2) if len(kept) else float("nan"))
    return found[0], found[1]


class OneByOne:
    """One block after the other, in two halves."""

    def __init__(self, risk: bnp.EmpiricalRisk, sampled: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._risk, self._P = risk, bnp.bnp_preconditioner(risk)
        self.layers = list(coverage(risk))
        self._blocks = unit_blocks(risk, coverage(risk))
        self.bare: dict[str, list[float]] = {layer.name: [] for layer in self.layers}
        self.singly: dict[str, list[float]] = {layer.name: [] for layer in self.layers}
        self.values: dict[tuple[str, int], tuple[float, float]] = {}
        self.whole: dict[str, float] = {}
        self._chosen = {
            layer.name: [layer.units * k // sampled for k in range(min(sampled, layer.units))] for layer in self.layers
        }

    def half(self, which: int) -> None:
        """Every second sampled unit, every second layer."""
        for place, layer in enumerate(self.layers):
            for i in self._chosen[layer.name][which::2]:
                self.bare[layer.name].append(timed(self._clock, partial(self._bare, layer.name, i)))
                self.singly[layer.name].append(timed(self._clock, partial(self._singly, layer.name, i)))
            say(f"one by one: {len(self.singly[layer.name])} units of {layer.name}")
            if place % 2 == which:
                self.whole[layer.name] = timed(self._clock, partial(self._whole, layer.name))
                say(f"one by one: the block of {layer.name} took {self.whole[layer.name]:.1f} s")

    def _bare(self, layer: str, i: int) -> None:
        self.values[layer, i] = sides(self._blocks[layer], self._P.block((layer, i)), i)

    def _singly(self, layer: str, i: int) -> None:
        A = self._blocks[layer][i]
        try:
            bnp.condition_number(A)
            bnp.condition_number(A, preconditioner=self._P.block((layer, i)))
        except ZeroOperatorError:
            pass

    def _whole(self, layer: str) -> None:
        null = known_null(self._risk, layer)
        A = bnp.gauss_newton(self._risk, block=layer)
        bnp.condition_number(A, null=null)
        bnp.condition_number(A, preconditioner=self._P.block(layer), null=null)

    def seconds(self, layer: str, units: int) -> tuple[float, float]:
        """Of all units of a layer, one by one and bare."""
        one, bare = (sum(times[layer]) / len(times[layer]) * units for times in (self.singly, self.bare))
        return one, bare


class Clock:
    """When each step of a table was done."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._began = clock, clock()
        self.times: list[tuple[int, float]] = [(0, 0.0)]

    def __call__(self, done: int, total: int) -> None:
        self.times.append((done, self._clock() - self._began))
        if done % 50 == 0 or done == total:
            say(f"layer_table: {done} of {total}")

    def at(self, done: int) -> float:
        """Seconds until `done` was reached."""
        return next(seconds for count, seconds in self.times if count >= done)


def misses(table: LayerTable, values: dict[tuple[str, int], tuple[float, float]]) -> int:
    """Bare numbers outside the table's intervals, with room for what they round."""
    rows = {row.layer: row for row in table.layers}
    count = 0
    for (layer, i), pair in values.items():
        found = (rows[layer].unit_blocks[i], rows[layer].unit_blocks_with_P[i])
        for k, value in zip(found, pair, strict=True):
            if (k is None) != math.isnan(value):
                count += 1
            elif k is not None:
                count += not k.lower * (1 - 1e-4) <= value <= k.upper * (1 + 1e-4)
    return count


def width(found: tuple[ConditionNumber | None, ...]) -> str:
    """The widest interval, relative."""
    return f"{max((k.upper / k.lower - 1 for k in found if k is not None), default=float('nan')):.1e}"


def exact(row: LayerRow) -> str:
    """How many units with curvature have two-sided numbers, without and with `P`."""
    alive = row.units - row.dead
    both = [sum(k is not None and k.two_sided for k in side) for side in (row.unit_blocks, row.unit_blocks_with_P)]
    return f"{both[0]} and {both[1]} of {alive}" + (f" ({row.dead} dead)" if row.dead else "")


def report(threads: int, samples: int, sampled: int) -> list[str]:
    """Both ways at one number of threads."""
    torch.set_num_threads(threads)
    name, risk = network(samples)
    measured = time.process_time if threads == 1 else time.perf_counter
    other = OneByOne(risk, sampled, measured)
    other.half(0)
    clock = Clock(measured)
    table = bnp.layer_table(risk, progress=clock)
    total = clock.times[-1][1]
    other.half(1)
    lines = [
        f"## {name}, {threads} threads" if threads > 1 else f"## {name}, 1 thread, processor time",
        "",
        "| layer | units | two-sided without, with P | widest | with P | s | one by one s | bare s | ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    blocks, done, sums = [], 0, [0.0, 0.0, 0.0]
    for row in table.layers:
        start, middle, end = clock.at(done), clock.at(done + 1), clock.at(done + 1 + row.units)
        done += row.units + 2
        seconds = [end - middle, *other.seconds(row.layer, row.units)]
        sums = [total + part for total, part in zip(sums, seconds, strict=True)]
        numbers = [exact(row), width(row.unit_blocks), width(row.unit_blocks_with_P)]
        times = [*(f"{part:.1f}" for part in seconds), f"{seconds[1] / seconds[0]:.1f}"]
        lines.append(f"| {' | '.join([row.layer, str(row.units), *numbers, *times])} |")
        whole = [f"{middle - start:.1f}", f"{other.whole[row.layer]:.1f}"]
        blocks.append(f"| {' | '.join([row.layer, cell(row.block), cell(row.block_with_P), *whole])} |")
    count = sum(row.units for row in table.layers)
    lines.append(f"| all | {count} | | | | {' | '.join(f'{t:.1f}' for t in sums)} | {sums[1] / sums[0]:.1f} |")
    lines += [
        "",
        "| layer's own block | kappa* | with P | s | one by one s |",
        "|---|---|---|---|---|",
        *blocks,
        "",
    ]
    whole = sums[1] + sum(other.whole.values())
    lines.append(f"The table: {total:.1f} s; one by one: {whole:.0f} s, {whole / total:.1f} times as long.")
    missed = misses(table, other.values)
    lines.append(f"{2 * len(other.values)} bare numbers of {len(other.values)} units, {missed} outside the table's.")
    for line in lines:
        print(line, flush=True)
    return [*lines, ""]


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--sampled", type=int, default=4, help="units of each layer measured both ways, at least 2")
    parser.add_argument("--out", type=Path, help="folder of layer_table.md")
    options = parser.parse_args(arguments)
    if options.out is not None:
        require_output(options.out / "layer_table.md", "--out")
    if options.sampled < 2:
        parser.error("--sampled must be at least 2: half of them are measured before the table, half after it")
    lines: list[str] = []
    for threads in options.threads:
        lines += report(threads, options.samples, options.sampled)
    if options.out is not None:
        threads = " ".join(map(str, options.threads))
        command = f"python benchmarks/layer_table.py --threads {threads} --samples {options.samples}"
        load = f", load {os.getloadavg()[0]:.1f} at the end" if hasattr(os, "getloadavg") else ""
        where = f"{os.cpu_count()} processors ({platform.machine()}){load}, torch {torch.__version__}"
        text = [
            "# The conditioning of every layer and unit",
            "",
            f"`{command} --sampled {options.sampled}`; {where}.",
            "",
        ]
        write_text(options.out / "layer_table.md", "\n".join([*text, *lines]))
    return 0


if __name__ == "__main__":
    sys.exit(answered(main))
