"""What the ways to compute a product cost: time beside one gradient, and memory beside one gradient's.

    python benchmarks/engines.py [--rounds 9] [--threads 1] [--quick] [--out benchmarks/results/engines.md]

Times come from one process in which all ways take turns; each memory from a process of its own, as the growth of the
largest resident memory over what the network, data and libraries take. Beside our engines: torch's own kept double
backward, and `torch.func.linearize`, which is not an engine of the package (docs/architecture.md says why).
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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, linearize

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.runtime.files import require_output, write_text
from bnp_analysis.runtime.memory import peak_memory

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-100-100-100-10, N 2048": (lambda: bnp.models.mlp([784, 100, 100, 100, 10]), (2048, 784)),
    "5-layer CNN, N 256": (bnp.models.cnn, (256, 3, 32, 32)),
    "ResNet-20 without BN, N 64": (lambda: bnp.models.resnet(20), (64, 3, 32, 32)),
}
SMALL = 16  # examples of --quick
Work = Callable[[], Any]


class Case:
    """One network with random data; its ways to compute, each of which prepares and gives back the product."""

    def __init__(self, network: str, examples: int | None) -> None:
        build, shape = NETWORKS[network]
        g = torch.Generator().manual_seed(0)
        self.model, self.loss = build(), nn.functional.cross_entropy
        self.x = torch.rand(examples or shape[0], *shape[1:], generator=g)
        self.y = torch.randint(0, 10, (len(self.x),), generator=g)
        self.risk = bnp.EmpiricalRisk(self.model, self.loss, (self.x, self.y))
        self.v = torch.randn(self.risk.space.dim, generator=g)
        self.ways: dict[str, Callable[[], Work]] = {"gradient": self._gradient}
        for name, matrix in (("Hessian", bnp.hessian), ("Gauss-Newton", bnp.gauss_newton)):
            for engine in ("retained", "recompute"):
                self.ways[f"{name}, {engine}"] = lambda m=matrix, e=engine: self._ours(m, e)
        self.ways["Hessian, torch's double backward kept"] = self._double_backward
        self.ways["Hessian, linearize(grad)"] = self._linearized_gradient
        self.ways["Gauss-Newton, linearize"] = self._linearized_outputs

    def _free(self) -> list[Tensor]:
        return list(self.model.parameters())

    def _mean_loss(self) -> Tensor:
        return self.loss(self.model(self.x), self.y)

    def _vectors(self) -> dict[str, Tensor]:
        return self.risk.space.unflatten(self.v)

    def _point(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def _gradient(self) -> Work:
        return lambda: torch.autograd.grad(self._mean_loss(), self._free())

    def _ours(self, matrix: Callable[..., Any], engine: str) -> Work:
        A = matrix(self.risk, engine=engine)
        return lambda: A @ self.v

    def _double_backward(self) -> Work:
        free, vectors = self._free(), list(self._vectors().values())
        gradients = torch.autograd.grad(self._mean_loss(), free, create_graph=True)
        return lambda: self._flat(torch.autograd.grad(gradients, free, vectors, retain_graph=True))

    def _linearized_gradient(self) -> Work:
        of_theta = grad(lambda point: self.loss(functional_call(self.model, point, (self.x,)), self.y))
        product = linearize(of_theta, self._point())[1]
        return lambda: self._flat(product(self._vectors()).values())

    def _linearized_outputs(self) -> Work:
        product = linearize(lambda point: functional_call(self.model, point, (self.x,)), self._point())[1]
        free, outputs = self._free(), self.model(self.x)
        z = outputs.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.loss(z, self.y), z, create_graph=True)

        def work() -> Tensor:
            (u,) = torch.autograd.grad(slope, z, product(self._vectors()), retain_graph=True)
            return self._flat(torch.autograd.grad(outputs, free, u, retain_graph=True))

        return work

    @staticmethod
    def _flat(parts: Any) -> Tensor:
        return torch.cat([part.reshape(-1) for part in parts])


def times(case: Case, rounds: int) -> dict[str, float]:
    """Each way's median time over the gradient's of the same round, and the gradient's in milliseconds."""
    works = {name: prepare() for name, prepare in case.ways.items()}
    reference = {name.split(",")[0]: works[name]() for name in works if name.endswith("retained")}
    for name, work in works.items():
        if name != "gradient":  # also warms up
            expected = reference[name.split(",")[0]]
            assert (work() - expected).norm() <= 1e-4 * expected.norm(), name

    def seconds(work: Work) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        unit = min(seconds(works["gradient"]) for _ in range(2))
        for name, work in works.items():
            found[name].append(1e3 * unit if name == "gradient" else min(seconds(work) for _ in range(2)) / unit)
    return {name: statistics.median(ratios) for name, ratios in found.items()}


def memory(network: str, way: str, examples: int | None) -> float:
    """Megabytes of preparing and computing twice, in this process."""
    Case(network, 16).ways[way]()()  # libraries that load on first use
    prepare = Case(network, examples).ways[way]
    before = peak_memory("cpu", reset=True)
    work = prepare()
    work()
    work()
    return peak_memory("cpu") - before


def memory_alone(network: str, way: str, options: argparse.Namespace) -> float:
    """The same in a process of its own, whose allocator gives everything back at once."""
    words = [sys.executable, __file__, "--threads", str(options.threads), "--memory", network, way]
    fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    words += ["--quick"] if options.quick else []
    return float(subprocess.run(words, check=True, capture_output=True, text=True, env=fixed).stdout.split()[-1])


def report(options: argparse.Namespace) -> list[str]:
    """Both tables, printed as they come."""
    examples = SMALL if options.quick else None
    ways = list(Case(next(iter(NETWORKS)), 4).ways)
    lines = [
        "| way | " + " | ".join(f"{n}: time | memory" for n in NETWORKS) + " |",
        "|---" * (1 + 2 * len(NETWORKS)) + "|",
    ]
    took = {network: times(Case(network, examples), options.rounds) for network in NETWORKS}
    need = {network: {way: memory_alone(network, way, options) for way in ways} for network in NETWORKS}
    for way in ways:
        cells = []
        for network in NETWORKS:
            unit = need[network]["gradient"]
            if way == "gradient":
                cells += [f"{took[network][way]:.1f} ms", f"{unit:.0f} MB"]
            else:
                cells += [f"{took[network][way]:.2f}", f"{need[network][way] / unit:.2f}"]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    print("\n".join(lines), flush=True)
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help=f"{SMALL} examples")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--memory", nargs=2, metavar=("NETWORK", "WAY"), help="only this number")
    options = parser.parse_args(arguments)
    if options.out is not None:
        require_output(options.out, "--out")
    torch.set_num_threads(options.threads)
    if options.memory:
        print(memory(*options.memory, SMALL if options.quick else None))
        return 0
    lines = report(options)
    if options.out is not None:
        command = f"python benchmarks/engines.py --rounds {options.rounds} --threads {options.threads}"
        command += " --quick" if options.quick else ""
        load = f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors" if hasattr(os, "getloadavg") else ""
        settings = f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}{load}"
        text = f"# Ways to compute a product\n\n`{command}`: {settings}, float32. In units of one gradient.\n\n"
        write_text(options.out, text + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(answered(main))
