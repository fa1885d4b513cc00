"""The time of a product with a curvature matrix, in gradients: this package's engines, plain torch and other packages.

    python benchmarks/products.py [--threads 1] [--rounds 7] [--networks MLP CNN ResNet] [--quick] [--gpu] [--out DIR]

Writes `products.md` and `products.json`. The unit is one gradient of the same batch by plain torch. All take turns in
one process, round after round, warmed up; numbers are medians of the ratios to the unit of the same round. Every
product is compared with plain double backward before it is timed. Beside them stands the least number of flops of an
exact product whose activations are cached (`side_by_side.flop_limits`). Memory is by how much the largest resident
memory of a fresh process grows while it makes the operator and three products, over the same for the gradient; the
snapshot of model and data, like the data themselves, is there before. Peers that are not installed are skipped.
`--gpu` runs on CUDA, with TF32 off and on, and tries bfloat16.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from product_methods import METHODS, NETWORKS, OURS, TITLES, Problem, Product, available, double_backward
from side_by_side import (
    PEERS,
    RESULTS,
    about,
    fix_threads,
    flop_limits,
    flops,
    heading,
    in_turns,
    installed,
    require_folder,
    require_gpu,
    seconds,
    table,
    write,
)
from torch import Tensor

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.errors import BNPAnalysisError
from bnp_analysis.runtime.memory import peak_memory

#: Whose memory is measured: a process each takes its time.
WEIGHED = (OURS, "torch, double backward", "torch.func.linearize", "hessian-eigenthings")


def product_of(p: Problem, matrix: str, method: str, reference: dict[str, Tensor]) -> Product | str:
    """The product, or what is wrong with it: an error, or another result than the reference's."""
    # Other packages refuse networks in many ways; which of them cannot run is a result, with the error's name.
    try:
        product = METHODS[matrix][method](p)
        found = product(p.v).detach()
    except (BNPAnalysisError, RuntimeError, TypeError, AttributeError, NotImplementedError) as failure:
        return f"fails: {type(failure).__name__}"
    expected = reference.setdefault(matrix, double_backward(p)(p.v) if matrix == "Hessian" else found)
    error = float((found - expected).norm() / expected.norm())
    return product if error < 1e-2 else f"wrong by {error:.2g}"


def compare(name: str, size: int, rounds: int, device: str) -> dict[str, Any]:
    """Everything about one network: its flops, the unit, ratios, and what could not run."""
    p = Problem(name, size, device)
    reference: dict[str, Tensor] = {}
    works: dict[str, Callable[[], Any]] = {}
    failed: dict[str, str] = {}
    for matrix, method in available():
        product = product_of(p, matrix, method, reference)
        label = f"{matrix}: {method}"
        if isinstance(product, str):
            failed[label] = product
        else:
            works[label] = lambda product=product: product(p.v)
    record: dict[str, Any] = {"examples": size, "parameters": p.v.numel(), "flop_limits": flop_limits(p.model, p.x)}
    unit = flops(p.gradient)
    counted = [f"{matrix}: {OURS}" for matrix in METHODS]
    record["our_flops"] = {label: flops(works[label]) / unit for label in counted if label in works}
    found = in_turns(p.gradient, works, rounds)
    record["gradient_seconds"] = found.pop("seconds")
    return record | {"ratios": found, "failed": failed}


def memory(name: str, size: int, matrix: str, method: str) -> float:
    """Megabytes of three products (or gradients) in this process, whose libraries were loaded before."""
    for warm in NETWORKS:
        Problem(warm, 2, "cpu").gradient()
    if matrix in METHODS:
        METHODS[matrix][method](Problem("MLP", 2, "cpu"))(Problem("MLP", 2, "cpu").v)
    p = Problem(name, size, "cpu")
    _ = p.risk  # snapshot and checks, made once for all operators
    before = peak_memory("cpu", reset=True)
    product = METHODS[matrix][method](p) if matrix in METHODS else lambda v: p.gradient()
    for _ in range(3):
        product(p.v)
    return peak_memory("cpu") - before


def memories(name: str, size: int) -> dict[str, float]:
    """Peak memory of every method over the gradient's, each from a process of its own; `"gradient"` in MB."""
    fixed = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}  # freed blocks go back to the system

    def measured(matrix: str, method: str) -> float:
        words = [sys.executable, __file__, "--memory", name, str(size), matrix, method]
        return float(subprocess.run(words, check=True, capture_output=True, text=True, env=fixed).stdout)

    unit = measured("gradient", "")
    chosen = [(matrix, method) for matrix, method in available() if method.startswith(WEIGHED)]
    return {"gradient": unit} | {f"{matrix}: {method}": measured(matrix, method) / unit for matrix, method in chosen}


def page(record: dict[str, Any]) -> list[str]:
    """The record as Markdown."""
    lines = heading("Products with curvature matrices", record["command"], record["about"])
    lines += [
        "Time over one gradient of plain torch in the same round (median, in brackets the quartiles), random data,",
        "float32. *Flop limit*: least flops of an exact product whose activations are cached, over the gradient's.",
        "*Memory*: peak of the operator and three products over the gradient's; none where it was not measured.",
    ]
    for setting, networks in record["settings"].items():
        lines += ["", f"## {setting}", ""]
        names = list(networks)
        head = ["", *(f"{TITLES[name]}, N {networks[name]['examples']}" for name in names)]
        rows = [["gradient, ms", *(f"{1e3 * networks[name]['gradient_seconds']:.3g}" for name in names)]]
        for matrix, methods in METHODS.items():
            limits = [networks[name]["flop_limits"][matrix.lower()] for name in names]
            ours = [networks[name]["our_flops"].get(f"{matrix}: {OURS}", float("nan")) for name in names]
            rows.append([f"**{matrix}: flop limit**", *(f"**{limit:.2f}**" for limit in limits)])
            rows.append([f"{matrix}: flops of {OURS}", *(f"{count:.2f}" for count in ours)])
            for label in [f"{matrix}: {method}" for method in methods]:
                cells = [cell(networks[name], label) for name in names]
                if any(cells):
                    rows.append([label, *cells])
        lines += table(head, rows)
    absent = [name for name in PEERS if not installed(name)]
    lines += ["", f"Not installed: {', '.join(absent)}."] if absent else []
    return lines + record.get("notes", [])


def cell(network: dict[str, Any], label: str) -> str:
    if label in network["failed"]:
        return network["failed"][label]
    found = network["ratios"].get(label)
    if found is None:
        return ""
    kept = network.get("memory", {}).get(label)
    memory_words = f", memory {kept:.1f}" if kept is not None else ""
    return f"{found['ratio']:.2f} ({found['low']:.2f}-{found['high']:.2f}){memory_words}"


def bfloat16() -> str:
    """What the package does with a bfloat16 model."""
    p = Problem("MLP", 64, "cuda", torch.bfloat16)
    try:
        found = bnp.hessian(p.risk) @ p.v
    except (BNPAnalysisError, RuntimeError) as refused:
        return f"bfloat16 is refused: {refused}"
    exact = Problem("MLP", 64, "cuda", torch.float32)
    expected = bnp.hessian(exact.risk) @ exact.v
    error = float((found.float() - expected).norm() / expected.norm())
    return f"bfloat16 products run, and differ from float32 by {error:.1e} relative: for no condition number."


def matrix_rate() -> float:
    """Flops per second of a large square matrix product in the mode that is on."""
    a = torch.randn(8192, 8192, device="cuda")
    for _ in range(3):
        a @ a
    return 2 * 8192**3 / seconds(lambda: a @ a, 10)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The record of a run."""
    device = require_gpu() if options.gpu else "cpu"
    fix_threads(options.threads)
    flags = [
        f"--threads {options.threads} --rounds {options.rounds}",
        *(f"--{word}" for word in ("quick", "gpu") if getattr(options, word)),
    ]
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/products.py", *flags]),
        "about": about(device),
        "settings": {},
        "notes": [],
    }
    for tf32 in (False, True) if options.gpu else (False,):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        found: dict[str, Any] = {}
        for name in options.networks:
            size = NETWORKS[name][3 if options.quick else 4 if options.gpu else 2]
            found[name] = compare(name, size, options.rounds, device)
            if device == "cpu" and not options.quick:
                found[name]["memory"] = memories(name, size)
            ours = found[name]["ratios"].get(f"Hessian: {OURS}", {"ratio": float("nan")})
            print(
                f"{name}: gradient {found[name]['gradient_seconds']:.3g} s, our Hessian {ours['ratio']:.2f}", flush=True
            )
        record["settings"][f"TF32 {'on' if tf32 else 'off'}" if options.gpu else "CPU"] = found
        if options.gpu:
            peak = matrix_rate()
            for name, one in found.items():
                rate = one["flop_limits"]["gradient"] / one["gradient_seconds"]
                record["notes"] += [
                    "",
                    f"TF32 {tf32}, {name}: the gradient runs at {rate / peak:.2f} of a large matrix product.",
                ]
    if options.gpu:
        record["notes"] += ["", bfloat16()]
    return record


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="of turns (default: 7, with --quick 2)")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small batches, two rounds, no memory")
    parser.add_argument("--gpu", action="store_true", help="on CUDA, with larger batches")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    parser.add_argument("--memory", nargs=4, metavar=("NETWORK", "N", "MATRIX", "METHOD"), help="only this number")
    options = parser.parse_args(arguments)
    require_folder(options.out, "products")
    warnings.filterwarnings("ignore", category=UserWarning)  # of peers, and of torch.func about constants
    options.rounds = options.rounds or (2 if options.quick else 7)
    if options.memory:
        torch.set_num_threads(1)
        print(memory(options.memory[0], int(options.memory[1]), *options.memory[2:]))
        return 0
    record = measure(options)
    lines = page(record)
    write(options.out, "products_gpu" if options.gpu else "products", lines, record)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(answered(main))
