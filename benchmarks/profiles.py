"""Condition profiles against the dense spectrum: 40 networks, and prescribed spectra that are hard for Lanczos.

    python benchmarks/profiles.py [--quick] [--out benchmarks/results]

The ratio of the largest eigenvalue to that of a rank is given as an interval. Each is compared with the ratio
from NumPy's eigenvalues of the dense matrix, or singular values of the dense factor, wherever these are known to 1e-6.
Writes `profiles.md`; exit status 1 if an interval misses.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.linalg import ConditionProfile, GramOperator, MatrixOperator
from bnp_analysis.runtime.files import require_output, write_text
from bnp_analysis.testing import random_orthogonal

UNIT = 2.0**-53
# Ratios that the reference knows to this, relative, are compared.
KNOWN = 1e-6
Spectrum = tuple[NDArray[np.float64], float]


@dataclass
class Row:
    """What was compared in one group: ratios, those that miss, those that the reference does not know, widths."""

    ratios: int = 0
    false: int = 0
    undecided: int = 0
    profiles: int = 0
    widths: list[float] = field(default_factory=list)
    seconds: float = 0.0


class Recurrent(nn.Module):
    """An LSTM and a dense layer on its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(3, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.cell(x)[0][:, -1])
        return out


class Attention(nn.Module):
    """One head over tokens, with a norm and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.qkv, self.out = nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        q, k, v = self.qkv(self.norm(h)).chunk(3, dim=-1)
        out: Tensor = self.out((h + nn.functional.scaled_dot_product_attention(q, k, v)).mean(dim=1))
        return out


def images() -> nn.Module:
    """Convolutions with BatchNorm in evaluation mode."""
    layers: list[nn.Module] = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2)]
    return nn.Sequential(*layers, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def perceptron(activation: str, *widths: int) -> Callable[[], nn.Module]:
    return lambda: bnp.models.mlp(widths, activation=activation)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 3, bias=False), nn.Linear(3, 4, bias=False), nn.Linear(4, 3, bias=False))


def normalized() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.SiLU(), nn.Linear(7, 3))


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "LSTM": (Recurrent, (4, 3)),
    "attention": (Attention, (4, 3)),
    "CNN, BatchNorm": (images, (1, 8, 8)),
    "LayerNorm": (normalized, (6,)),
    "linear": (linear, (6,)),
    "ReLU": (perceptron("relu", 6, 9, 3), (6,)),
    "ReLU, deep": (perceptron("relu", 6, 7, 6, 5, 3), (6,)),
    "tanh": (perceptron("tanh", 6, 9, 3), (6,)),
    "GELU": (perceptron("gelu", 6, 7, 5, 3), (6,)),
    "leaky ReLU": (perceptron("leaky_relu", 6, 9, 3), (6,)),
}


def squared(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error against one-hot targets."""
    return nn.functional.mse_loss(output, nn.functional.one_hot(y, output.shape[1]).to(output))


def networks(quick: bool) -> Iterator[tuple[str, bnp.EmpiricalRisk]]:
    """Ten kinds, from four starts each, with either loss."""
    for name, (make, shape) in KINDS.items():
        for seed in range(1 if quick else 4):
            g = torch.Generator().manual_seed(seed)
            x = torch.randn(40, *shape, generator=g, dtype=torch.float64) + 1
            y, model = torch.randint(0, 3, (40,), generator=g), make().double()
            for p in model.parameters():
                p.data = 0.5 * torch.randn(p.shape, generator=g, dtype=p.dtype)
            if name == "CNN, BatchNorm":
                model(x)
            yield name, bnp.EmpiricalRisk(model.eval(), (nn.functional.cross_entropy, squared)[seed % 2], (x, y))


def magnitudes(A: bnp.linalg.SymmetricOperator, P: Any) -> Spectrum:
    """`|lambda|` of the dense `P^T A P`, descending, and within which they are known."""
    right = np.eye(A.dim) if P is None else P.to_dense().numpy()
    size = float(np.linalg.norm(right, 2))
    if A.factor is not None:
        F = A.factor.to_dense().numpy()
        sigma = np.linalg.svd(F @ right, compute_uv=False)
        return sigma**2, 2 * float(sigma[0]) * max(F.shape) * UNIT * float(np.linalg.norm(F, 2)) * size * 10
    M = A.to_dense().numpy()
    M = right.T @ ((M + M.T) / 2) @ right
    values = np.sort(np.abs(np.linalg.eigvalsh((M + M.T) / 2)))[::-1]
    return values, 10 * A.dim * UNIT * float(np.linalg.norm(A.to_dense().numpy(), 2)) * size**2


def compare(row: Row, profile: ConditionProfile, truth: Spectrum) -> None:
    """Count the ratios of one profile."""
    values, doubt = truth
    row.profiles += 1
    for r, low, high in zip(profile.ranks.tolist(), profile.lower, profile.upper, strict=True):
        if r > len(values) or values[r - 1] * KNOWN < doubt:
            row.undecided += 1
            continue
        ratio = values[0] / values[r - 1]
        row.ratios += 1
        row.false += not low * (1 - KNOWN) <= ratio <= high * (1 + KNOWN)
        row.widths.append(high / low - 1)


def prescribed(quick: bool) -> Iterator[tuple[str, bnp.linalg.SymmetricOperator, Spectrum]]:
    """Matrices with given eigenvalues; 160 of them."""
    n = 160
    for seed in range(1 if quick else 3):
        rng = np.random.default_rng(seed)
        spectra = {
            "geometric": 0.9 ** np.arange(n),
            "repeated": np.concatenate([np.repeat([10.0, 5, 3, 1], [3, 5, 2, 4]), rng.uniform(0, 0.3, n - 14)]),
            "clustered": 1 + 1e-3 * rng.standard_normal(n),
            "indefinite": rng.standard_normal(n) * np.exp(2 * rng.standard_normal(n)),
            "copies at both ends": np.concatenate([np.repeat([1.0, -0.9], 10), rng.uniform(-0.5, 0.5, n - 20)]),
            "low rank": np.concatenate([rng.uniform(1, 2, 7), np.zeros(n - 7)]),
            "equal": np.ones(n),
            "sign": np.where(np.arange(n) % 2, 1.0, -1.0),
        }
        Q = random_orthogonal(n, torch.Generator().manual_seed(seed))
        for name, values in spectra.items():
            M = (Q * torch.from_numpy(values)) @ Q.T
            sizes = np.sort(np.abs(values))[::-1]
            yield f"prescribed, {name}", bnp.DenseOperator((M + M.T) / 2), (sizes, 10 * n * UNIT * float(sizes[0]))
        F = torch.logspace(0, -5, n, dtype=torch.float64)[:, None] * Q
        yield "prescribed, a factor", GramOperator(MatrixOperator(F)), magnitudes(GramOperator(MatrixOperator(F)), None)


def measure(quick: bool) -> dict[str, Row]:
    """Group -> what was compared."""
    rows: dict[str, Row] = {}
    for name, risk in networks(quick):
        P = bnp.bnp_preconditioner(risk)
        for curvature, A in (("gauss_newton", bnp.gauss_newton(risk)), ("hessian", bnp.hessian(risk))):
            truth = [magnitudes(A, None), magnitudes(A, P)]
            for method in ("auto", "lanczos"):
                row, began = rows.setdefault(f"{name}, {curvature}, {method}", Row()), time.perf_counter()
                found = bnp.condition(risk, curvature=curvature, preconditioner=P, method=method)
                row.seconds += time.perf_counter() - began
                assert found.with_P is not None
                compare(row, found.without_P, truth[0])
                compare(row, found.with_P, truth[1])
    for name, A, spectrum in prescribed(quick):
        for method in ("dense", "lanczos"):
            row, began = rows.setdefault(f"{name}, {method}", Row()), time.perf_counter()
            profile = bnp.condition_profile(A, ranks=range(2, 41), method=method)
            row.seconds += time.perf_counter() - began
            compare(row, profile, spectrum)
    return rows


def page(rows: dict[str, Row], quick: bool) -> str:
    """The table."""
    ratios, false = sum(row.ratios for row in rows.values()), sum(row.false for row in rows.values())
    lines = [
        "# Condition profiles against the dense spectrum",
        "",
        "`python benchmarks/profiles.py`" + (" `--quick`, a part" if quick else ""),
        "",
        f"**{ratios:,} ratios of {sum(row.profiles for row in rows.values()):,} profiles, {false} false.** Each is an "
        "interval for the ratio of the largest eigenvalue to that of its rank. *Undecided*: the eigenvalue is too "
        f"close to rounding for NumPy's dense spectrum to know it to {KNOWN:g}. *Width*: `upper/lower - 1`.",
        "",
        "| group | profiles | ratios | false | undecided | median width | largest width |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        median, largest = (f"{x:.1g}" for x in (np.median(row.widths), max(row.widths))) if row.widths else ("-", "-")
        lines.append(
            f"| {name} | {row.profiles} | {row.ratios} | {row.false} | {row.undecided} | {median} | {largest} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one network of each kind")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    arguments = parser.parse_args(argv)
    require_output(arguments.out / "profiles.md", "--out")
    rows = measure(arguments.quick)
    text = page(rows, arguments.quick)
    write_text(arguments.out / "profiles.md", text)
    print(text)
    return int(any(row.false for row in rows.values()) or not math.fsum(row.ratios for row in rows.values()))


if __name__ == "__main__":
    sys.exit(answered(main))
