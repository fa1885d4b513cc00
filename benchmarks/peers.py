"""What other tools would report as a condition number, side by side with the truth.

    python benchmarks/peers.py [--out benchmarks/results/peers.md]

None of them has a verb for it, so each gives what its users divide: the largest Ritz value by the smallest one above
`n u lambda_max`. Every problem is a linear least-squares model whose Hessian is prescribed, so that all of them, made
for networks, see the same matrix, and the truth is the singular values of the stored data in extended precision.
SciPy is always there; `hessian-eigenthings` and `pyhessian` are used where they are installed and skipped where not.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from side_by_side import eig_for_pyhessian
from torch import Tensor, nn
from truth_arithmetic import long, singular_values

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.results import package_versions
from bnp_analysis.runtime.files import require_output, write_text
from bnp_analysis.testing import random_orthogonal, spectrum

PEERS = ("hessian-eigenthings", "pyhessian")


@dataclass(frozen=True, eq=False)
class Task:
    """`loss = mean((x w - y)^2)`: its Hessian `2 x^T x / N` has `rank` nonzero eigenvalues; `null` spans the rest."""

    name: str
    x: Tensor
    rank: int
    null: Tensor

    @property
    def truth(self) -> float:
        values = singular_values(long(self.x))
        return float((values[0] / values[self.rank - 1]) ** 2)

    def model(self) -> nn.Module:
        return nn.Linear(self.x.shape[1], 1, bias=False, dtype=self.x.dtype)

    def data(self) -> tuple[Tensor, Tensor]:
        return self.x, self.x.new_zeros(len(self.x), 1)


def tasks() -> list[Task]:
    made = []
    for name, kind, kappa, n, rank, dtype in (
        ("log, kappa 1e2, full rank", "log", 1e2, 200, 200, torch.float64),
        ("log, kappa 1e6, full rank", "log", 1e6, 200, 200, torch.float64),
        ("log, kappa 1e4, 50 null directions", "log", 1e4, 400, 350, torch.float64),
        ("isolated, kappa 1e8, 20 null directions", "isolated", 1e8, 200, 180, torch.float64),
        ("clustered, kappa 1e6, 20 null directions", "clustered", 1e6, 200, 180, torch.float64),
        ("log, kappa 1e10, 20 null directions", "log", 1e10, 200, 180, torch.float64),
        ("log, kappa 1e6, full rank, float32", "log", 1e6, 200, 200, torch.float32),
        ("log, kappa 1e8, full rank, float32", "log", 1e8, 200, 200, torch.float32),
    ):
        g = torch.Generator().manual_seed(6)
        values, Q = spectrum(kind, n, kappa, rank=rank)[:rank], random_orthogonal(n, g)
        x = random_orthogonal(n, g)[:, :rank] * (values * n / 2).sqrt() @ Q[:, :rank].T
        made.append(Task(name, x.to(dtype), rank, Q[:, rank:].to(dtype)))
    return made


def quotient(values: Any, n: int, dtype: torch.dtype) -> float:
    """The largest value by the smallest above `n u` times it, as one would."""
    values = np.asarray(values, dtype=np.float64)
    top = values.max()
    above = values[values > n * torch.finfo(dtype).eps * top]
    return float(top / above.min()) if above.size else float("nan")


def scipy_eigsh(task: Task, steps: int) -> float:
    """`eigsh` over the Hessian product: the largest and the 60 smallest, with `steps` Lanczos vectors, restarted."""
    risk = bnp.EmpiricalRisk(task.model(), nn.functional.mse_loss, task.data())
    A, n = bnp.hessian(risk).to_scipy(), task.x.shape[1]
    settings: dict[str, Any] = {"return_eigenvectors": False, "ncv": min(steps, n - 1), "v0": start(n)}
    top, low = eigsh(A, k=1, which="LA", **settings), eigsh(A, k=60, which="SA", **settings)
    return quotient(np.concatenate([top, low]), n, task.x.dtype)


def start(n: int) -> Any:
    return np.random.default_rng(0).standard_normal(n)


def eigenthings(task: Task, steps: int) -> float:
    from hessian_eigenthings import HessianOperator, lanczos

    model = task.model()
    operator = HessianOperator(model, [task.data()], lambda m, batch: nn.functional.mse_loss(m(batch[0]), batch[1]))
    values = lanczos(operator, k=steps, max_iter=steps, reorthogonalize=True, seed=0).eigenvalues
    return quotient(values.numpy(), operator.size, task.x.dtype)


def pyhessian(task: Task, steps: int) -> float:
    import pyhessian as package

    with eig_for_pyhessian():
        torch.manual_seed(0)
        measured = package.hessian(task.model(), nn.functional.mse_loss, data=task.data(), cuda=False)
        values = measured.density(iter=steps, n_v=1)[0][0]
    return quotient(values, task.x.shape[1], task.x.dtype)


def ours(task: Task, declared: bool) -> bnp.linalg.ConditionNumber:
    risk = bnp.EmpiricalRisk(task.model(), nn.functional.mse_loss, task.data())
    return bnp.condition_number(bnp.gauss_newton(risk), null=task.null if declared else None)


def attempt(report: Callable[[Task, int], float], task: Task, steps: int, truth: float) -> str:
    """The number and its factor from the truth, or why there is none."""
    try:
        value = report(task, steps)
    except Exception as failure:  # whatever another package raises belongs into the table
        return f"fails: {type(failure).__name__}"
    if not np.isfinite(value):
        return "none"
    factor = max(value / truth, truth / value)
    return f"{value:.3g} ({'right' if factor < 1.01 else f'off by {factor:.3g}'})"


def table(steps: tuple[int, ...] = (100, 300)) -> list[str]:
    tools: dict[str, Callable[[Task, int], float]] = {"SciPy `eigsh`": scipy_eigsh}
    if importlib.util.find_spec("hessian_eigenthings"):
        tools["hessian-eigenthings"] = eigenthings
    if importlib.util.find_spec("pyhessian"):
        tools["pyhessian"] = pyhessian
    columns = [f"{name}, {k} steps" for name in tools for k in steps]
    head = ["problem", "truth", *columns, "bnp_analysis, null space declared", "not declared"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task in tasks():
        truth = task.truth
        cells = [task.name, f"{truth:.6g}"]
        for report in tools.values():
            cells += [attempt(report, task, min(k, task.x.shape[1] - 1), truth) for k in steps]
        cells += [str(ours(task, declared)).split(", factor-svd")[0] for declared in (True, False)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    default = Path(__file__).resolve().parent / "results" / "peers.md"
    parser.add_argument("--out", type=Path, default=default, help="the Markdown file to write")
    options = parser.parse_args(arguments)
    require_output(options.out, "--out")
    torch.set_num_threads(1)
    versions = package_versions() | {"bnp_analysis": bnp.__version__}
    for name in PEERS:
        found = importlib.util.find_spec(name.replace("-", "_"))
        versions[name] = importlib.metadata.version(name) if found else "not installed, skipped"
    lines = [
        "# What other tools would report",
        "",
        f"{datetime.datetime.now(datetime.UTC).date().isoformat()}; `python benchmarks/peers.py`; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
        "The largest Ritz value by the smallest above `n u lambda_max`, after so many steps (at most `n - 1`); in",
        "brackets the factor by which it is off. None of these tools calls it a condition number or gives a bound.",
        "`eigsh` restarts until the largest and the 60 smallest have converged. `pyhessian` keeps its tridiagonal",
        "matrix in float32, and calls `torch.eig`, which torch no longer has: a stand-in is used here.",
        "The two last columns are this package's, with its interval or its lower bound.",
        "",
        *table(),
    ]
    write_text(options.out, "\n".join(lines) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(answered(main))
