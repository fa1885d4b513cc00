"""What the benchmarks of cost share: fair turns, the machine in words, flop limits, tables."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bnp_analysis
from bnp_analysis.results import package_versions
from bnp_analysis.runtime.files import require_outputs, write_text

_SUFFIXES = (".md", ".json")
RESULTS = Path(__file__).resolve().parent / "results"
PEERS = {"hessian-eigenthings": "hessian_eigenthings", "pyhessian": "pyhessian", "curvlinops-for-pytorch": "curvlinops"}


def installed(name: str) -> bool:
    """Whether a peer is here."""
    return importlib.util.find_spec(PEERS[name]) is not None


def about(device: str) -> dict[str, Any]:
    """Date, machine and versions; no names of hosts."""
    model = ""
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].partition(":")[2].strip() if lines else ""
    versions = package_versions() | {"bnp_analysis": bnp_analysis.__version__}
    for name in PEERS:
        versions[name] = importlib.metadata.version(name) if installed(name) else "not installed, skipped"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processors": os.cpu_count(),
        "processor": model or "unknown",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def heading(title: str, command: str, facts: Mapping[str, Any]) -> list[str]:
    """The first lines of a page of results."""
    where = f"{facts['processor']}, {facts['processors']} processors" if facts["device"] == "cpu" else facts["device"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [
        f"# {title}",
        "",
        f"{facts['date']}; `{command}`; {where}, {facts['threads']} thread(s), load {facts['load']} at the start;",
        f"{versions}.",
        "",
    ]


def fix_threads(number: int) -> None:
    """Torch and every BLAS of the process on so many threads."""
    torch.set_num_threads(number)
    if importlib.util.find_spec("threadpoolctl"):
        import scipy.linalg  # its BLAS must be loaded to be limited
        from threadpoolctl import threadpool_limits

        assert scipy.linalg
        threadpool_limits(limits=number)


def require_gpu() -> str:
    """`"cuda"`, or an error that ends the program."""
    if not torch.cuda.is_available():
        raise SystemExit("error: --gpu needs a CUDA device, and torch sees none here; leave --gpu out for the CPU")
    return "cuda"


def seconds(work: Callable[[], Any], count: int = 1) -> float:
    """Per call; the processor's time on one thread of a CPU, which leaves out what other programs take."""
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    clock = time.process_time if torch.get_num_threads() == 1 and not on_gpu else time.perf_counter
    if on_gpu:
        torch.cuda.synchronize()
    began = clock()
    for _ in range(count):
        work()
    if on_gpu:
        torch.cuda.synchronize()
    return (clock() - began) / count


def in_turns(unit: Callable[[], Any], works: Mapping[str, Callable[[], Any]], rounds: int, least: float = 0.03) -> dict:
    """Times over the unit's of the same round, round after round: `{name: {ratio, low, high}}`, quartiles.

    What else a machine does then hits all alike. The first calls build graphs and are not counted. `"seconds"` has the
    unit's median.
    """
    for work in (unit, *works.values()):
        work()
        work()
    count = max(1, round(least / max(seconds(unit), 1e-9)))
    units: list[float] = []
    ratios: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        own = seconds(unit, count)
        units.append(own)
        for name, work in works.items():
            ratios[name].append(seconds(work, count) / own)
    found: dict[str, Any] = {"seconds": statistics.median(units)}
    for name, values in ratios.items():
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
        found[name] = {"ratio": quartiles[1], "low": quartiles[0], "high": quartiles[2]}
    return found


def flop_limits(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Flops of a gradient, and the least of exact products whose activations and cotangents are cached, in gradients.

    For each layer `F` is its forward pass, `gw` and `gx` the two halves of its backward pass, counted by torch's flop
    counter (matrix products and convolutions alone). A gradient takes `F + gw + gx`, the first layer no `gx`. The
    derivative of every one of these, bilinear in two arguments, is two of it: a Hessian product takes `2 (F + gw +
    gx)`; the data do not change, so the first layer takes `F + gw`. A Gauss-Newton product takes `2 F` forwards (`F` in
    the first layer) and `gw + gx` backwards (`gw`).
    """
    layers: list[tuple[int, int, int]] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        h = inputs[0].detach().requires_grad_()
        with torch.enable_grad(), FlopCounterMode(display=False) as forward:
            value = type(layer).forward(layer, h)
        backward = []
        for target in (layer.weight, h):
            with FlopCounterMode(display=False) as counter:
                torch.autograd.grad(value, target, torch.ones_like(value), retain_graph=True)
            backward.append(counter.get_total_flops())
        layers.append((forward.get_total_flops(), backward[0], backward[1]))

    kinds = (nn.Linear, nn.Conv2d)
    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    gradient = hessian = gauss_newton = 0
    for place, (f, gw, gx) in enumerate(layers):
        inner = place > 0
        gradient += f + gw + inner * gx
        hessian += (1 + inner) * (f + gw) + 2 * inner * gx
        gauss_newton += (1 + inner) * f + gw + inner * gx
    return {"gradient": gradient, "hessian": hessian / gradient, "gauss-newton": gauss_newton / gradient}


def flops(work: Callable[[], Any]) -> int:
    """What torch's flop counter sees of a call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    return [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows)]


def require_folder(folder: Path, name: str) -> None:
    """Refuse a folder in which `write` could not write, before anything is measured."""
    require_outputs({"--out": [folder / f"{name}{suffix}" for suffix in _SUFFIXES]})


def write(folder: Path, name: str, lines: Sequence[str], record: Mapping[str, Any]) -> None:
    """`NAME.md` and `NAME.json`, each replaced as a whole."""
    for suffix, text in zip(_SUFFIXES, ("\n".join(lines), json.dumps(record, indent=1, sort_keys=True)), strict=True):
        write_text(folder / f"{name}{suffix}", text + "\n")


@contextmanager
def eig_for_pyhessian() -> Iterator[None]:
    """A stand-in with the same answer for `torch.eig`, which pyhessian calls and torch has only in name."""

    def eig(matrix: Tensor, eigenvectors: bool = False) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], dim=1), vectors

    had = getattr(torch, "eig", None)
    torch.eig = eig
    try:
        yield
    finally:
        if had is None:
            del torch.eig
        else:
            torch.eig = had
