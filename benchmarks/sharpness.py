"""Products of a tracked step of `SharpnessTracker` beside those of a search from nothing, on the same run.

    python benchmarks/sharpness.py [--out benchmarks/results/sharpness.md]

The cold search is `eigenpairs(B, k, tol=tol)` as it is called by default: it begins with the gradient and ends with a
check for further copies of repeated eigenvalues. Without that check (`multiplicity="trust"`) it is cheaper, and sees
one copy of each; the tracker's block of `k` directions sees as many as it has. Both columns are measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.results import package_versions
from bnp_analysis.runtime.files import require_output, write_text

OPTIMIZERS = {
    "gradient descent, lr 0.12": lambda p: torch.optim.SGD(p, lr=0.12),
    "RMSprop, lr 1e-4": lambda p: torch.optim.RMSprop(p, lr=1e-4),
    "Adam, lr 1e-4": lambda p: torch.optim.Adam(p, lr=1e-4),
}
K, TOL, BEFORE, MEASURED = 3, 1e-2, 200, 24


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().sum(1).mean()


def measure(name: str, every: int) -> tuple[float, float, float]:
    """Mean products of a tracked step but the first, of a cold search, and of one that trusts."""
    x, labels = bnp.data.load("digits", n=200).tensors
    x = ((x - x.mean()) / x.std()).double()
    targets = nn.functional.one_hot(labels, 10).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 10)).double()
    optimizer = OPTIMIZERS[name](model.parameters())
    risk = bnp.EmpiricalRisk(model, loss, (x, targets))

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), targets).backward()
        optimizer.step()

    for _ in range(BEFORE):
        step()
    tracker = bnp.SharpnessTracker(model, loss, (x, targets), optimizer, k=K, most=K, every=every, tol=TOL)
    cold, trusting = [], []
    for _ in range((1 + MEASURED) * every):
        step()
        if tracker.step() is not None:
            here = risk.at(model.state_dict())
            B = bnp.linalg.congruence(bnp.hessian(here), bnp.optimizer_preconditioner(optimizer, model, space=here))
            cold.append(bnp.eigenpairs(B, K, tol=TOL).matvecs)
            trusting.append(bnp.eigenpairs(B, K, tol=TOL, multiplicity="trust").matvecs)
    return float(tracker.result().products[1:].mean()), float(np.mean(cold[1:])), float(np.mean(trusting[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sharpness.md")
    arguments = parser.parse_args()
    require_output(arguments.out, "--out")
    torch.set_num_threads(1)
    lines = [
        "# Products of a tracked step",
        "",
        f"Three largest eigenvalues of `P^T H P` to residuals of {TOL:.0%}, MLP 64-32-32-10 with GELU on 200 digits, "
        f"float64, after {BEFORE} full-batch steps; means over {MEASURED} tracked steps. "
        f"`python benchmarks/sharpness.py`, torch {package_versions()['torch']}.",
        "",
        "| optimizer | steps between | tracked | cold search | ratio | cold, multiplicity trusted | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in OPTIMIZERS:
        for every in (1, 5, 20):
            warm, cold, trusting = measure(name, every)
            row = f"| {name} | {every} | {warm:.1f} | {cold:.1f} | {warm / cold:.2f} |"
            lines.append(f"{row} {trusting:.1f} | {warm / trusting:.2f} |")
            print(lines[-1], flush=True)
    write_text(arguments.out, "\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(answered(main))
