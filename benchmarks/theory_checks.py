"""Measured sweeps behind the checks of the theory: orbits (T10, T12), patches (T6), scales (T8), blocks (T16).

    python benchmarks/theory_checks.py [--quick] [--out benchmarks/results]

Writes `theory_checks.json` (numbers for figures) and `theory_checks.md` (tables). Everything is float64 on the CPU and
follows from seeds; only the times of T6 do not.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.linalg import condition_number
from bnp_analysis.network.moments import layer_moments
from bnp_analysis.runtime.files import require_outputs, write_text
from bnp_analysis.theory.statements.normalization import check_patch_statistics
from bnp_analysis.theory.statements.setting import NotApplicable, Problem
from bnp_analysis.theory.statements.spectra import Whitened, check_blocks, random_case
from bnp_analysis.theory.statements.symmetry import orbit_curve, scalings
from bnp_analysis.training import fit

cross_entropy = nn.functional.cross_entropy
Json = dict[str, Any]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().double()


def small_network(seed: int, loss: str) -> bnp.EmpiricalRisk:
    """The 6-5-3 ReLU network on Gaussian inputs with shifts of 1 and scales from 0.3 to 3."""
    x = torch.randn(60, 6, generator=generator(seed), dtype=torch.float64)
    x = (x + 1) * 10 ** torch.linspace(-0.5, 0.5, 6, dtype=torch.float64)
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), seed)
    if loss == "squared":
        return bnp.EmpiricalRisk(
            model, nn.functional.mse_loss, (x, torch.randn(60, 3, generator=generator(seed + 1)).double())
        )
    return bnp.EmpiricalRisk(model, cross_entropy, (x, torch.arange(60) % 3))


def digits_network() -> bnp.EmpiricalRisk:
    """64-8-10 on 150 digits after three epochs."""
    data = bnp.data.load("digits", n=150, flatten=True)
    model = bnp.models.mlp([64, 8, 10], seed=0)
    fit(model, cross_entropy, data.tensors, epochs=3, lr=0.05, seed=0)
    return bnp.EmpiricalRisk(model, cross_entropy, data.tensors, dtype=torch.float64)


def orbits(quick: bool) -> list[Json]:
    """`kappa*` along orbits: plain, BNP, BNP with output scaling; observed and by the law."""
    seeds = range(1 if quick else 5)
    problems = {f"6-5-3, {loss}, seed {s}": small_network(s, loss) for loss in ("softmax", "squared") for s in seeds}
    if not quick:
        problems["64-8-10 on digits"] = digits_network()
    each = 1 if quick else 4
    times = [10 ** (k / each) for k in range(-3 * each, 3 * each + 1)]
    found = []
    for name, risk in problems.items():
        for scaling in scalings(Problem(risk)):
            curve = orbit_curve(risk, scaling, times)
            found.append(
                {
                    "problem": name,
                    "parameters": risk.space.dim,
                    "units": len(scaling.units),
                    "t": times,
                    "observed": curve.observed,
                    "predicted": curve.predicted,
                    "worst_deviation": {key: curve.deviation(key) for key in curve.observed},
                    "spread": {key: curve.spread(key) for key in curve.observed},
                    "rank_constant": {key: len(set(ranks)) == 1 for key, ranks in curve.ranks.items()},
                }
            )
            print(f"orbit {name}, {len(scaling.units)} unit(s): {found[-1]['spread']}", flush=True)
    return found


def convolution(**options: Any) -> bnp.EmpiricalRisk:
    """One convolution with ReLU, pooling and a dense layer on 60 digits as images, shifted."""
    data = bnp.data.load("digits", n=60, flatten=False)
    rest = (nn.ReLU, lambda: nn.AdaptiveAvgPool2d(3), nn.Flatten, lambda: nn.Linear(36, 10))
    model = seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, **options), *(make() for make in rest)), 0)
    return bnp.EmpiricalRisk(model, cross_entropy, data.tensors, dtype=torch.float64)


def patches(quick: bool) -> list[Json]:
    """T6: the two statistics, what they cost, and what they do to kappa."""
    cases: dict[str, Json] = {
        "valid 3x3": {"kernel_size": 3},
        "zero padding 3x3": {"kernel_size": 3, "padding": 1},
        "circular 3x3": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        "reflect 3x3": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        "stride 2, zero padding 3x3": {"kernel_size": 3, "padding": 1, "stride": 2},
        "zero padding 5x5": {"kernel_size": 5, "padding": 2},
    }
    found = []
    for name, options in list(cases.items())[: 2 if quick else None]:
        risk = convolution(**options)
        (check,) = (c for c in check_patch_statistics(risk) if c.statement.startswith("per-channel"))
        times = {which: [] for which in ("channel", "patch")}
        for _ in range(3 if quick else 15):
            for which, values in times.items():
                began = time.perf_counter()
                layer_moments(risk, statistics=which)
                values.append(time.perf_counter() - began)
        row: Json = {"case": name, "verdict": check.verdict, **check.details}
        row |= {f"ms {which}": 1e3 * statistics.median(values) for which, values in times.items()}
        A = bnp.gauss_newton(risk)
        row["kappa* network"] = condition_number(A).value
        for which in times:
            P = bnp.bnp_preconditioner(risk, statistics=which)
            row[f"kappa* network {which}"] = condition_number(A, preconditioner=P).value
        found.append(row)
        print(f"T6 {name}: {row}", flush=True)
    return found


def scales(quick: bool) -> list[Json]:
    """T8: `|G^|^2/R` against `m/R`, for independent, correlated and real features."""
    R = 256
    widths = [8, 32] if quick else [8, 16, 32, 64, 128, 256, 512, 1024, 2048]
    pixels = bnp.data.load("digits", n=R, flatten=True).x.double()
    pixels = pixels[:, pixels.std(dim=0) > 0]

    def gaussian(m: int) -> Tensor:
        return torch.randn(R, m, generator=generator(m), dtype=torch.float64)

    def hidden(m: int) -> Tensor:
        weights = torch.randn(pixels.shape[1], m, generator=generator(m + 1), dtype=torch.float64)
        return torch.relu(pixels @ weights / math.sqrt(pixels.shape[1]) + 0.3)

    kinds: dict[str, Callable[[int], Tensor]] = {
        "independent": gaussian,
        "a common factor (correlation 1/2)": lambda m: gaussian(m) + gaussian(m + 1)[:, :1],
        "ReLU features of digits": hidden,
    }
    found = []
    for kind, make in kinds.items():
        for width in widths:
            H = make(width)
            H = H[:, H.std(dim=0) > 1e-12]
            m = H.shape[1]
            G = (H - H.mean(dim=0)) / H.std(dim=0, unbiased=False)
            hat = torch.cat([G, torch.ones(R, 1, dtype=torch.float64)], dim=1)
            size = float(torch.linalg.matrix_norm(hat, 2)) ** 2 / R
            found.append(
                {
                    "kind": kind, "m": m, "R": R, "m/R": m / R, "|G^|^2/R": size, "q^2": max(m / R, 1.0),
                    "over q^2": size / max(m / R, 1.0), "(1+sqrt(m/R))^2": (1 + math.sqrt(m / R)) ** 2,
                    "lower": max(1.0, m / (R - 1)), "upper": float(m),
                }
            )  # fmt: skip
    return found


def trained(quick: bool) -> dict[str, bnp.EmpiricalRisk]:
    """Five networks after a few epochs on digits."""
    flat, images = (bnp.data.load("digits", n=200, flatten=f) for f in (True, False))
    made: dict[str, tuple[nn.Module, tuple[Tensor, Tensor]]] = {
        "relu 64-10-10": (bnp.models.mlp([64, 10, 10], seed=0), flat.tensors),
        "tanh 64-8-8-10": (bnp.models.mlp([64, 8, 8, 10], activation="tanh", seed=1), flat.tensors),
        "batch norm 64-8-10": (bnp.models.mlp([64, 8, 10], norm="batch", seed=2), flat.tensors),
        "layer norm 64-8-10": (bnp.models.mlp([64, 8, 10], norm="layer", seed=3), flat.tensors),
    }
    with torch.random.fork_rng():
        torch.manual_seed(4)
        conv = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    made["convolution 4x3x3 - 10"] = (conv, images.tensors)
    found = {}
    for name, (model, data) in list(made.items())[: 1 if quick else None]:
        fit(model, cross_entropy, data, epochs=5, lr=0.05, seed=0)
        model.eval()
        found[name] = bnp.EmpiricalRisk(model, cross_entropy, data, dtype=torch.float64)
    return found


def blocks(quick: bool) -> Json:
    """T16: `kappa*` with whitened blocks against `s` times the best block-diagonal scaling found."""
    cases = []
    for seed in range(10 if quick else 100):
        try:
            cases.append(_row(f"random {seed}", random_case(seed)))
        except NotApplicable as refusal:
            cases.append({"case": f"random {seed}", "not applicable": str(refusal)})
    networks = []
    for name, risk in trained(quick).items():
        problem = Problem(risk)
        for check in check_blocks(problem):
            if "random matrices" not in check.statement:
                networks.append({"case": name, **check.to_dict()})
                print(f"T16 {name}: {check}", flush=True)
    return {"random": cases, "trained": networks}


def _row(name: str, found: Whitened) -> Json:
    bound = found.blocks * found.best
    return {
        "case": name, "s": found.blocks, "rank": found.rank, "kappa*": found.kappa, "best": found.best,
        "best D": found.best_name, "ratio to the bound": found.kappa / bound, "top": found.top,
        "uneven ratio": found.uneven / (bound * found.spread),
    }  # fmt: skip


def report(record: Json) -> str:
    """The tables."""
    lines = ["# Sweeps behind the checks of the theory", "", record["command"], ""]
    lines += ["## Orbits of ReLU networks (T10, T12)", ""]
    lines += [
        "`kappa*` of the Gauss-Newton matrix at `T_t theta`; the network's function is the same at every t. *Law*:"
    ]
    lines += ["the largest relative distance of the observed values from those predicted at t = 1 alone.", ""]
    lines += ["| network | units scaled | coordinates | t = 0.01 | 1 | 100 | largest/smallest, t in 1e-3..1e3 | law |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for one in record["orbits"]:
        for key, values in one["observed"].items():
            at = {round(math.log10(t), 6): v for t, v in zip(one["t"], values, strict=True)}
            cells = " | ".join(f"{at[e]:.3g}" for e in (-2, 0, 2))
            spread = one["spread"][key]
            span = f"1 + {spread:.1g}" if spread < 0.1 else f"{1 + spread:.3g}"
            rank = "" if one["rank_constant"][key] else " (rank not resolved at every t)"
            deviation = f"{one['worst_deviation'][key]:.1g}{rank}"
            lines += [f"| {one['problem']} | {one['units']} | {key} | {cells} | {span} | {deviation} |"]
    lines += ["", "## Convolutions: statistics per channel and per patch entry (T6)", ""]
    head = list(record["patches"][0])
    lines += _head(head)
    for row in record["patches"]:
        lines += ["| " + " | ".join(_cell(row[key]) for key in head) + " |"]
    lines += ["", "Times: exact moments of all layers of the network over its data, one thread.", ""]
    lines += ["## `|G^|^2/R` against `m/R` (T8)", ""]
    head = list(record["scales"][0])
    lines += _head(head)
    lines += ["| " + " | ".join(_cell(row[key]) for key in head) + " |" for row in record["scales"]]
    tried = [row for row in record["blocks"]["random"] if "kappa*" in row]
    ratios = [row["ratio to the bound"] for row in tried]
    lines += ["", "## From blocks to the network (T16)", ""]
    lines += [
        f"Random matrices: {len(tried)} tried, {sum(r <= 1 for r in ratios)} within the bound; `kappa*` with whitened "
        f"blocks over `s min kappa*(D^T A D)`: median {statistics.median(ratios):.3g}, largest {max(ratios):.3g}.", "",
        "| network | statement | observed | bound | verdict |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for row in record["blocks"]["trained"]:
        words = row["statement"].rsplit(" [", 1)[0]
        lines += [f"| {row['case']} | {words} | {row['observed']:.4g} | {row['predicted']:.4g} | {_verdict(row)} |"]
    return "\n".join(lines) + "\n"


def _head(names: list[str]) -> list[str]:
    return ["| " + " | ".join(name.replace("|", "\\|") for name in names) + " |", "|" + "---|" * len(names)]


def _verdict(row: Json) -> str:
    return {True: "holds", False: "fails", None: f"not applicable: {row['reason']}"}[row["holds"]]


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small part, for the tests")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    require_outputs({"--out": [options.out / "theory_checks.json", options.out / "theory_checks.md"]})
    torch.set_num_threads(1)
    began = time.perf_counter()
    record: Json = {
        "command": f"`python benchmarks/theory_checks.py{' --quick' * options.quick}`, one thread, torch "
        f"{torch.__version__}, Python {platform.python_version()}.",
        "orbits": orbits(options.quick),
        "patches": patches(options.quick),
        "scales": scales(options.quick),
        "blocks": blocks(options.quick),
    }
    record["seconds"] = time.perf_counter() - began
    write_text(options.out / "theory_checks.json", json.dumps(record, indent=1) + "\n")
    write_text(options.out / "theory_checks.md", report(record))
    print(f"{record['seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(answered(main))
