"""Predicted against observed convergence rates: gradient descent, heavy ball, BNP with fixed and running statistics.

    python benchmarks/convergence_rates.py [--quick] [--only WORDS] [--out benchmarks/results]

Every row is one call of `check_convergence_rate` on a problem with a known minimizer and a known null space. Writes
`convergence_rates.json` (every row, with its gradient norms thinned out) and `convergence_rates.md`. Interrupted, it
writes what it has. It exits with 1 if a prediction was wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.results import package_versions
from bnp_analysis.runtime.files import require_outputs, write_text
from bnp_analysis.theory import ConvergenceCheck, check_convergence_rate
from bnp_analysis.theory.problems import KnownProblem, convolutional, linear_chain, softmax_regression, teacher_student

METHODS = {
    "gd": "gradient descent",
    "heavy_ball": "heavy ball",
    "bnp_fixed": "BNP, fixed",
    "bnp_heavy_ball": "BNP, fixed, heavy ball",
    "bnp": "BNP, running",
}
TIME_LIMIT = 600.0
POINTS = 200


@dataclass(frozen=True)
class Case:
    """A problem and a method; cases of one pair are compared with each other."""

    group: str
    kind: str
    make: Callable[[], KnownProblem]
    method: str
    pair: str = ""
    quick: bool = False


def cases() -> Iterator[Case]:
    """All of them, fast ones first within each group."""
    problems: dict[str, tuple[str, Callable[[], KnownProblem]]] = {
        "chain 5": ("dense", lambda: linear_chain(kappa=5.0)),
        "softmax 20": ("dense", lambda: softmax_regression(kappa=20.0)),
        "narrow chain 50": ("dense", lambda: linear_chain((6, 2, 4), kappa=50.0, shift=1.0)),
        "relu 100": ("dense", lambda: teacher_student((8, 2, 4), kappa=100.0)),
        "tanh 300": ("dense", lambda: teacher_student((4, 3, 2), activation="tanh", kappa=300.0)),
        "leaky 1e3": ("dense", lambda: teacher_student((6, 4, 3), activation="leaky_relu", kappa=1e3)),
        "conv 1e3": ("convolutional", lambda: convolutional(2, kappa=1e3)),
        "deep relu 3e3": ("dense", lambda: teacher_student((5, 4, 4, 2), kappa=3e3)),
        "conv relu 5e3": ("convolutional", lambda: convolutional(3, activation="relu", kappa=5e3)),
        "relu orbit 1e4": ("dense", lambda: teacher_student((6, 3, 3), kappa=1e4, by="orbit")),
        "softmax 1e4": ("dense", lambda: softmax_regression(4, 8, kappa=1e4)),
        "conv 1e4": ("convolutional", lambda: convolutional(2, kappa=1e4)),
    }
    quick = {"chain 5", "softmax 20"}
    for method, left_out in (
        ("heavy_ball", set()),
        ("bnp_fixed", {"deep relu 3e3", "conv 1e4", "relu orbit 1e4"}),
        ("bnp", {"deep relu 3e3", "conv 1e4", "conv relu 5e3", "relu orbit 1e4", "tanh 300"}),
        ("bnp_heavy_ball", {"chain 5", "softmax 20", "narrow chain 50"}),
        ("gd", {"conv 1e4", "softmax 1e4"}),
    ):
        for name, (kind, make) in problems.items():
            if name not in left_out:
                yield Case("rates", kind, make, method, quick=name in quick)
    dials: dict[str, Callable[[], KnownProblem]] = {
        "white inputs": softmax_regression,
        "shifted by 1": lambda: softmax_regression(shift=1.0),
        "shifted by 3": lambda: softmax_regression(shift=3.0),
        "scales, kappa* 1e3": lambda: softmax_regression(kappa=1e3),
        "shifted by 1, scales, kappa* 3e3": lambda: softmax_regression(shift=1.0, kappa=3e3),
        "shifted by 100": lambda: softmax_regression(shift=100.0),
        "relu, white inputs": lambda: teacher_student((8, 2, 4)),
        "relu, shifted by 1": lambda: teacher_student((8, 2, 4), shift=1.0),
        "relu, shifted by 3": lambda: teacher_student((8, 2, 4), shift=3.0),
        "relu, shifted by 100": lambda: teacher_student((8, 2, 4), shift=100.0),
    }
    for name, make in dials.items():
        for method in ("gd", "bnp"):
            yield Case("what BNP gains", "dense", make, method, pair=name, quick=name == "white inputs")


def measure(case: Case, problem: KnownProblem) -> ConvergenceCheck:
    """Run one check."""
    fixed = case.method in ("bnp_fixed", "bnp_heavy_ball")
    P = bnp.bnp_preconditioner(problem.solved) if fixed else None
    method = {"bnp_fixed": "gd", "bnp_heavy_ball": "heavy_ball"}.get(case.method, case.method)
    return check_convergence_rate(problem.risk, P, method=method, time_limit=TIME_LIMIT)


def row_of(case: Case, problem: KnownProblem, check: ConvergenceCheck) -> dict[str, Any]:
    """A row of plain data."""
    every = max(1, len(check.gradient_norms) // POINTS)
    fit = check.fit
    return {
        "group": case.group,
        "pair": case.pair,
        "kind": case.kind,
        "problem": problem.description,
        "method": case.method,
        "outcome": check.outcome,
        "verdict": check.verdict,
        "reason": check.reason,
        "parameters": problem.risk.space.dim,
        "kappa_of_the_problem": problem.kappa,
        "kappa": check.kappa,
        "null_dim": check.null_dim,
        "null_dim_known": problem.null_dimension,
        "unexplained": check.unexplained,
        "step": check.step,
        "momentum": check.momentum,
        "predicted": _predicted(check),
        "observed": check.observed,
        "low": math.nan if fit is None else fit.low,
        "high": math.nan if fit is None else fit.high,
        "first": -1 if fit is None else fit.first,
        "last": -1 if fit is None else fit.last,
        "e_folds": math.nan if fit is None else fit.e_folds,
        "power": 0 if fit is None else fit.power,
        "without_deflation": check.without_deflation,
        "iterations": check.iterations,
        "seconds": round(check.seconds, 2),
        "every": every,
        "gradient_norms": check.gradient_norms[::every].tolist(),
    }


def _predicted(check: ConvergenceCheck) -> float:
    """The time constant; also of a run that was too slow to observe."""
    return check.predicted if check.holds is not None else -1 / math.log(check.factor) if check.factor < 1 else math.nan


def error(row: dict[str, Any]) -> float:
    """Relative deviation of the observed time constant."""
    return float(row["observed"] / row["predicted"] - 1)


def page(rows: list[dict[str, Any]], state: str) -> str:
    """The Markdown page."""
    rates = [row for row in rows if row["group"] == "rates"]
    seen = [row for row in rates if row["outcome"] == "observed"]
    lines = ["# Predicted and observed convergence rates", ""]
    lines += [f"`python benchmarks/convergence_rates.py`: {state}.", ""]
    if seen:
        worst = max(abs(error(row)) for row in seen)
        held = sum(row["verdict"] == "holds" for row in seen)
        kappas = [row["kappa"] for row in seen]
        lines += [
            f"**{len(rates)} runs, {len(seen)} reached their tail, {held} of them within 3 %; the largest deviation is "
            f"{100 * worst:.2f} %; kappa\\* from {min(kappas):.3g} to {max(kappas):.3g}.**",
            "",
            "Time constants `-1/log r` are iterations per factor of `e`. *kappa\\** is that of `P^T Hess P` at the "
            "limit point on the complement of the null space, whose dimension is known for each problem and found "
            "again. "
            "*Without deflation* is what the same spectrum predicts if the zeros count as eigenvalues, as computed.",
            "",
        ]
    lines += [
        "| problem | method | kappa\\* | null | predicted | observed | 95 % | off | without deflation | iterations |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for row in rates]
    return "\n".join([*lines, *_gains(rows)]) + "\n"


def _line(row: dict[str, Any]) -> str:
    head = f"| {row['problem']} | {METHODS[row['method']]} | {row['kappa']:.4g} | {row['null_dim']} "
    head += f"| {row['predicted']:.5g} |"
    undeflated = f"{row['without_deflation']:.1e}" if math.isfinite(row["without_deflation"]) else "-"
    if row["outcome"] != "observed":
        return f"{head} {row['outcome']} | | | {undeflated} | {row['iterations']} |"
    interval = f"{row['low']:.5g} .. {row['high']:.5g}"
    off = f"{100 * error(row):+.2f} %" + ("" if row["verdict"] == "holds" else " **fails**")
    return f"{head} {row['observed']:.5g} | {interval} | {off} | {undeflated} | {row['iterations']} |"


def _gains(rows: list[dict[str, Any]]) -> list[str]:
    pairs: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["pair"]:
            pairs.setdefault(row["pair"], {})[row["method"]] = row
    lines = [
        "",
        "## What BNP gains",
        "",
        "Undamped BNP with running statistics (rho = 0.99) against gradient descent, each at its best step. Softmax "
        "regression where nothing else is said. The gain is the ratio of time constants; on white inputs BNP gains "
        "nothing in a single layer, and the check says so.",
        "",
        "| inputs | kappa\\* | kappa\\* with BNP | gain, predicted | gain, observed |",
        "|---|---|---|---|---|",
    ]
    for name, pair in pairs.items():
        if len(pair) < 2:
            continue
        plain, helped = pair["gd"], pair["bnp"]
        predicted = plain["predicted"] / helped["predicted"]
        both = plain["outcome"] == helped["outcome"] == "observed"
        observed = f"{plain['observed'] / helped['observed']:.4g}" if both else f"gradient descent: {plain['outcome']}"
        lines.append(f"| {name} | {plain['kappa']:.4g} | {helped['kappa']:.4g} | {predicted:.4g} | {observed} |")
    return lines


def write(rows: list[dict[str, Any]], state: str, out: Path) -> None:
    """Both files."""
    plain = [{k: _finite(v) for k, v in row.items()} for row in rows]
    record = {"state": state, "versions": package_versions(), "rows": plain}
    write_text(out / "convergence_rates.json", json.dumps(record, indent=1) + "\n")
    write_text(out / "convergence_rates.md", page(rows, state))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [float(f"{v:.6g}") for v in value]
    return value


def main(arguments: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few fast ones")
    parser.add_argument("--only", default="", help="cases whose group, method and problem contain these words")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    require_outputs({"--out": [options.out / "convergence_rates.json", options.out / "convergence_rates.md"]})
    torch.set_num_threads(1)
    began, rows, stopped = time.perf_counter(), [], ""
    chosen = [case for case in cases() if case.quick or not options.quick]
    try:
        for k, case in enumerate(chosen):
            problem = case.make()
            if options.only not in f"{case.group} {case.method} {case.kind} {problem.description}":
                continue
            check = measure(case, problem)
            rows.append(row_of(case, problem, check))
            print(f"{k + 1}/{len(chosen)} {problem.description}, {METHODS[case.method]}: {check}", flush=True)
            if check.outcome == "interrupted":
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        stopped = f"interrupted after {len(rows)} of {len(chosen)} cases, "
    load = (
        f", load {os.getloadavg()[0]:.0f} on {os.cpu_count()} processors at the end"
        if hasattr(os, "getloadavg")
        else ""
    )
    state = f"{stopped}{time.perf_counter() - began:.0f} s on one thread, torch {torch.__version__}{load}"
    write(rows, state, options.out)
    return int(any(row["verdict"] == "fails" for row in rows))


if __name__ == "__main__":
    sys.exit(answered(main))
