"""Whether Hessian products of compiled functions can be trusted: errors against plain double backward.

    python benchmarks/compiled.py [--out benchmarks/results/compiled.md]

Compiled are `torch.func.linearize(grad)`, the only one that could be an engine (its graph is recorded once), and the
gradient of `grad . v`, which starts from the network for every vector. *Run before* means that the function ran
eagerly before it was compiled; *eager afterwards* is the same function called without the compiler, later.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, linearize

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.runtime.files import require_output, write_text

Vector = dict[str, Tensor]


def networks() -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """A name, a network and the shape of its inputs."""
    pooled = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    pooled += [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3)]
    yield "perceptron", bnp.models.mlp([20, 16, 10], activation="tanh", seed=0), (64, 20)
    yield "two max poolings", nn.Sequential(*pooled), (64, 1, 8, 8)
    yield "five-layer CNN", bnp.models.build_for("cnn", (1, 28, 28), 10, seed=0), (32, 1, 28, 28)


def ways(risk: Callable[[Vector], Tensor], at: Vector) -> dict[str, Callable[[Vector], Vector]]:
    """The functions `v -> H v` that are compiled."""

    def along(v: Vector) -> Vector:
        return grad(lambda q: sum((g * v[k]).sum() for k, g in grad(risk)(q).items()))(at)

    return {"linearize(grad)": linearize(grad(risk), at)[1], "grad of grad . v": along}


def errors(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[list[str]]:
    """A row for each function, run before or not."""
    g = torch.Generator().manual_seed(0)
    model = model.to(dtype)
    x, y = torch.randn(shape, generator=g).to(dtype), torch.arange(shape[0]) % 3
    at = {k: p.detach() for k, p in model.named_parameters()}
    v = {k: torch.randn(p.shape, generator=g).to(dtype) for k, p in at.items()}

    def risk(q: Vector) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, q, (x,)), y)

    leaves = {k: p.clone().requires_grad_() for k, p in at.items()}
    first = torch.autograd.grad(risk(leaves), [*leaves.values()], create_graph=True)
    truth = torch.cat([t.flatten() for t in torch.autograd.grad(first, [*leaves.values()], [*v.values()])])

    def error(product: Callable[[Vector], Vector]) -> str:
        try:
            found = product(v)
        except Exception as failure:  # whatever the compiler raises is the answer
            return f"{type(failure).__name__}: {str(failure).splitlines()[0][:60]}"
        return f"{float((torch.cat([found[k].flatten() for k in at]) - truth).norm() / truth.norm()):.1e}"

    for name in ("linearize(grad)", "grad of grad . v"):
        for before in (False, True):
            torch.compiler.reset()
            product = ways(risk, at)[name]
            eager = error(product) if before else "-"
            compiled: Any = torch.compile(product)
            yield [name, "yes" if before else "no", eager, error(compiled), error(product)]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compiled.md")
    out = parser.parse_args().out
    require_output(out, "--out")
    warnings.simplefilter("ignore")
    lines = [
        "# Hessian products of compiled functions",
        "",
        f"`python benchmarks/compiled.py`, {datetime.date.today()}: torch {torch.__version__}, {platform.machine()}. "
        "Errors relative to plain double backward.",
        "",
        "| network | dtype | function | run before | eager, before | compiled | eager, afterwards |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype in (torch.float32, torch.float64):
        for name, model, shape in networks():
            for row in errors(model, shape, dtype):
                lines.append("| " + " | ".join([name, str(dtype).removeprefix("torch."), *row]) + " |")
                print(lines[-1], flush=True)
    write_text(out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(answered(main))
