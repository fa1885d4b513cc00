"""ResNet-110 and a small transformer on CIFAR-10 from end to end, on one machine: what works, and how long it takes.

    python benchmarks/large_models.py [--threads 1] [--quick] [--out benchmarks/results/large_models.md]

Per model: a gradient and products, the largest eigenvalues of the Hessian and a spectral density (both with a
checkpoint inside), each without and with the BNP preconditioner, the condition number of every layer's Gauss-Newton
block, all of them from one sweep over the rows of the network's factor, and the full layer table of three layers.
Every finished part is written to a JSON file beside `--out`; a run that was cut off goes on with the first part that
is missing, a Krylov run within a part with the first missing step. Models are at their initialization. `--quick`
takes small models and random images.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis import data, models
from bnp_analysis.cli import answered
from bnp_analysis.errors import BNPAnalysisError
from bnp_analysis.linalg import SymmetricOperator
from bnp_analysis.linalg.condition.reduction import reduced_parts
from bnp_analysis.network import coverage
from bnp_analysis.runtime.files import require_output, write_text

Part = Callable[[], dict[str, Any]]
# Name -> (model, images, images for layer blocks: their factor has ten rows per image).
Sizes = tuple[Callable[[], nn.Module], int, int]
MODELS: dict[str, Sizes] = {
    "ResNet-110, no normalization": (lambda: models.resnet(110), 32, 16),
    "ResNet-110, GroupNorm": (lambda: models.resnet(110, norm="group"), 32, 16),
    "transformer": (models.transformer, 256, 64),
}
QUICK: dict[str, Sizes] = {
    "ResNet-8, GroupNorm": (lambda: models.resnet(8, norm="group", width=4), 8, 4),
    "transformer": (lambda: models.transformer(width=8, heads=2, hidden=8, depth=1), 8, 4),
}
PAIRS, TOLERANCE, PRODUCTS, STEPS = 3, 1e-2, 25, 10
CLASSES = 10


class Store:
    """Finished parts in a JSON file, written after each."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.parts: dict[str, dict[str, Any]] = found.get("parts", {}) if found.get("settings") == settings else {}
        self.settings = settings

    def do(self, name: str, part: Part) -> dict[str, Any]:
        """The part's result, computed now or earlier; what the package refuses is a result."""
        if name not in self.parts:
            began = time.perf_counter()
            try:
                found = part()
            except BNPAnalysisError as error:
                found = {"refused": f"{type(error).__name__}: {error}"}
            self.parts[name] = found | {"seconds": time.perf_counter() - began}
            text = json.dumps({"settings": self.settings, "parts": self.parts}, indent=1, allow_nan=False)
            write_text(self.path, text + "\n")
            print(f"{name}: {self.parts[name]}", flush=True)
        return self.parts[name]


class Case:
    """One model on its images, with its curvature operators in float32."""

    def __init__(self, name: str, model: nn.Module, x: Tensor, y: Tensor, few: int, folder: Path) -> None:
        self.name, self.folder, self.size, self.few = name, folder, len(x), few
        half, loss = len(x) // 2, nn.functional.cross_entropy
        self.risk = bnp.EmpiricalRisk(model, loss, list(zip(x.split(half), y.split(half), strict=True)))
        self.P = bnp.bnp_preconditioner(self.risk)
        self.small = bnp.EmpiricalRisk(model, loss, (x[:few], y[:few]), dtype=torch.float64)
        self.layers = [layer.name for layer in coverage(self.small)]

    def parts(self) -> Iterator[tuple[str, Part]]:
        yield f"{self.name}: products", self.products
        for word, P in (("", None), (" with P", self.P)):
            yield f"{self.name}: largest eigenvalues{word}", lambda P=P, w=word: self.eigenvalues(P, w)
            yield f"{self.name}: density{word}", lambda P=P, w=word: self.density(P, w)
        for place, layer in enumerate(self.layers):
            yield f"{self.name}: block {layer}", lambda place=place: self.block(place)
        yield f"{self.name}: table", self.table

    def products(self) -> dict[str, Any]:
        """A gradient and products in turns, the median of three."""
        risk, found = self.risk, {"parameters": self.risk.space.dim, "images": self.size}
        v = torch.randn(risk.space.dim, generator=torch.Generator().manual_seed(0))
        works: dict[str, Callable[[], Any]] = {"gradient": lambda: risk.at(risk.theta).gradient}
        for name, matrix in (("hessian", bnp.hessian), ("gauss_newton", bnp.gauss_newton)):
            for engine in ("retained", "recompute"):
                A = matrix(risk, engine=engine)
                works[f"{name}_{engine}"] = lambda A=A: A @ v
                found[f"{name}_{engine}_mb"] = A.engine.bytes / 2**20
        times: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(4):
            for name, work in works.items():
                began = time.perf_counter()
                work()
                if turn:  # the first records the graphs
                    times[name].append(time.perf_counter() - began)
        return found | {f"{name}_s": statistics.median(own) for name, own in times.items()}

    def _file(self, what: str) -> Path:
        words = f"{self.name} {what}".replace(",", "").split()
        return self.folder / f"{'_'.join(words)}.checkpoint"

    def eigenvalues(self, P: Any, word: str) -> dict[str, Any]:
        file = self._file(f"eigenvalues{word}")
        found = bnp.eigenpairs(
            bnp.hessian(self.risk), PAIRS, preconditioner=P, tol=TOLERANCE, max_matvecs=PRODUCTS, checkpoint=file
        )
        file.unlink(missing_ok=True)
        return {
            "values": found.values.tolist(),
            "residuals": found.residuals.tolist(),
            "converged": found.converged,
            "products": found.matvecs,
        }

    def density(self, P: Any, word: str) -> dict[str, Any]:
        file = self._file(f"density{word}")
        A = bnp.hessian(self.risk)
        found = bnp.spectral_density(A, preconditioner=P, probes=2, steps=STEPS, checkpoint=file)
        file.unlink(missing_ok=True)
        low, high = float(found.nodes.min()), float(found.nodes.max())
        return {"lowest": low, "highest": high, "products": found.matvecs}

    @cached_property
    def blocks(self) -> tuple[list[SymmetricOperator], Any]:
        """Every layer's block, from one sweep over the rows of the whole network's factor; the `P` of these images."""
        factor = bnp.gauss_newton(self.small).factor
        assert factor is not None
        parts = reduced_parts(factor, [self.small.space.indices(layer) for layer in self.layers])
        return parts, bnp.bnp_preconditioner(self.small)

    def block(self, place: int) -> dict[str, Any]:
        blocks, preconditioner = self.blocks
        A = blocks[place]
        found: dict[str, Any] = {"parameters": A.dim}
        for word, P in (("plain", None), ("with_P", preconditioner.block(self.layers[place]))):
            k = bnp.condition_number(A, preconditioner=P)
            upper = k.upper if math.isfinite(k.upper) else None
            found[word] = {"value": k.value, "lower": k.lower, "upper": upper, "rank": k.rank, "method": k.method}
        return found

    def table(self) -> dict[str, Any]:
        """Units included, for the first, the middle and the last layer, four images."""
        self.__dict__.pop("blocks", None)
        x, y = (t[:4] for t in (next(iter(self.small.batches)).x, next(iter(self.small.batches)).y))
        model = dict(self.small.modules())[""]  # nothing in it requires a gradient
        names = [self.layers[0], self.layers[len(self.layers) // 2], self.layers[-1]]
        risk = bnp.EmpiricalRisk(model, nn.functional.cross_entropy, (x, y), params=lambda n, p: True)
        found = bnp.layer_table(risk, layers=names)
        blocks = [k for row in found.layers for k in (*row.unit_blocks, *row.unit_blocks_with_P)]
        measured = [k for k in blocks if k is not None]
        return {"layers": names, "units": len(blocks), "exact": sum(math.isfinite(k.upper) for k in measured)}


def images(count: int, quick: bool) -> tuple[Tensor, Tensor]:
    """The first images of CIFAR-10; random ones for `--quick`."""
    if quick:
        g = torch.Generator().manual_seed(0)
        return torch.rand(count, 3, 32, 32, generator=g), torch.randint(0, CLASSES, (count,), generator=g)
    return data.load("cifar10", n=count, seed=0).tensors


def table(names: list[str], parts: dict[str, dict[str, Any]]) -> list[str]:
    """What the parts found, models side by side."""
    rows: list[tuple[str, Callable[[str], str]]] = [
        ("parameters", lambda m: f"{parts[f'{m}: products']['parameters']:,}"),
        ("images", lambda m: str(parts[f"{m}: products"]["images"])),
        ("gradient", lambda m: f"{parts[f'{m}: products']['gradient_s']:.2f} s"),
    ]
    for matrix in ("hessian", "gauss_newton"):
        for engine in ("retained", "recompute"):

            def product(m: str, key: str = f"{matrix}_{engine}") -> str:
                own = parts[f"{m}: products"]
                return f"{own[f'{key}_s'] / own['gradient_s']:.2f} gradients, about {own[f'{key}_mb']:.0f} MiB"

            rows.append((f"{matrix.replace('_', '-')} product, {engine}", product))
    for word in ("", " with P"):
        rows.append((f"largest eigenvalues of the Hessian{word}", lambda m, w=word: _eigenvalues(parts, m, w)))
        rows.append((f"its density{word}", lambda m, w=word: _density(parts, m, w)))
    for word in ("plain", "with_P"):
        name = "layer blocks of the Gauss-Newton matrix" + (" with P" if word == "with_P" else "")
        rows.append((name, lambda m, w=word: _blocks(parts, m, w)))
    rows.append(("full table of three layers, 4 images", lambda m: _table(parts, m)))
    rows.append(("all parts", lambda m: f"{sum(p['seconds'] for n, p in parts.items() if n.startswith(m)):.0f} s"))
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    return lines + [f"| {title} | {' | '.join(cell(m) for m in names)} |" for title, cell in rows]


def _eigenvalues(parts: dict[str, dict[str, Any]], model: str, word: str) -> str:
    own = parts[f"{model}: largest eigenvalues{word}"]
    if "refused" in own:
        return own["refused"]
    shown = ", ".join(f"{v:.4g} +- {r:.1g}" for v, r in zip(own["values"], own["residuals"], strict=True))
    return f"{shown} ({own['converged']} converged, {own['products']} products, {own['seconds']:.0f} s)"


def _density(parts: dict[str, dict[str, Any]], model: str, word: str) -> str:
    own = parts[f"{model}: density{word}"]
    if "refused" in own:
        return own["refused"]
    return f"on [{own['lowest']:.3g}, {own['highest']:.3g}] ({own['products']} products, {own['seconds']:.0f} s)"


def _blocks(parts: dict[str, dict[str, Any]], model: str, word: str) -> str:
    own = [part for name, part in parts.items() if name.startswith(f"{model}: block ")]
    done = [part[word] for part in own if "refused" not in part]
    if not done:
        return f"all {len(own)} refused: {own[0]['refused']}" if own else "-"
    values = sorted(k["value"] for k in done)
    exact = sum(k["upper"] is not None for k in done)
    span = f"median {statistics.median(values):.3g}, {values[0]:.3g} to {values[-1]:.3g}"
    return f"{span}; {exact} of {len(own)} two-sided, {len(own) - len(done)} refused"


def _table(parts: dict[str, dict[str, Any]], model: str) -> str:
    own = parts[f"{model}: table"]
    if "refused" in own:
        return own["refused"]
    return f"{own['units']} numbers of units, {own['exact']} two-sided ({own['seconds']:.0f} s)"


def main(arguments: list[str] | None = None) -> int:
    """Compute what is missing and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/large_models.md"))
    options = parser.parse_args(arguments)
    for path in (options.out, options.out.with_suffix(".json")):
        require_output(path, "--out")
    torch.set_num_threads(options.threads)
    settings = {"quick": options.quick, "threads": options.threads}
    store = Store(options.out.with_suffix(".json"), settings)
    wanted = QUICK if options.quick else MODELS
    for name, (build, count, few) in wanted.items():
        case = Case(name, build(), *images(count, options.quick), few, options.out.parent)
        for part, work in case.parts():
            store.do(part, work)
    lines = table(list(wanted), store.parts)
    print("\n".join(lines), flush=True)
    command = f"python benchmarks/large_models.py --threads {options.threads}"
    command += " --quick" if options.quick else ""
    load = (
        f", load {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors at the end"
        if hasattr(os, "getloadavg")
        else ""
    )
    text = f"# Large models\n\n`{command}`: {platform.machine()}, torch {torch.__version__}{load}. "
    text += f"At initialization; eigenvalues to {TOLERANCE:g} or {PRODUCTS} products, densities of 2 probes x {STEPS} "
    few = ", ".join(str(few) for *_, few in wanted.values())
    text += f"steps; layer blocks in float64 over the first {few} images.\n\n"
    write_text(options.out, text + "\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(answered(main))
