"""The truth suite: every method of `condition_number` against problems whose answer is known.

    python benchmarks/truth_suite.py [--quick] [--out benchmarks/results] [--only WORDS]

Writes `truth_suite.json` and `truth_suite.md` into the folder. What is done is kept when the run is interrupted: both
files are written then as well, and say how far it came. Exit status 1 if a claim was false.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import truth_catalog
import truth_chances
import truth_methods
import truth_networks
import truth_nullity
import truth_report
import truth_saturation
from truth_arithmetic import PRECISE, UNIT

import bnp_analysis
from bnp_analysis.cli import answered
from bnp_analysis.results import package_versions
from bnp_analysis.runtime.files import require_outputs, write_text

HERE = Path(__file__).resolve().parent


def measure(record: dict[str, Any], quick: bool, only: str) -> None:
    """Fill the record, problem by problem, so that an interrupt leaves what is done."""
    chosen = [
        problem
        for problem in (*truth_catalog.problems(), *truth_networks.problems(), *truth_saturation.problems())
        if (problem.quick or not quick) and only.lower() in f"{problem.group} {problem.name}".lower()
    ]
    for i, problem in enumerate(chosen):
        record["state"] = f"interrupted at problem {i + 1} of {len(chosen)}"
        case = problem.make()
        for method in truth_methods.methods(case):
            record["rows"].append(truth_methods.run(problem, case, method))
        if sys.stderr.isatty():
            print(f"\r{i + 1}/{len(chosen)} {problem.group}: {problem.name:<60.60}", end="", file=sys.stderr)
    if not only:
        record["state"] = "interrupted in the claims that rest on a random start"
        record["chances"].extend(truth_chances.tally(10 if quick else 1000))
        record["state"] = "interrupted in the null directions"
        record["nullity"].extend(truth_nullity.counts())
    record["state"] = "complete" if not (quick or only) else "a part: " + ("--quick" if quick else f"--only {only}")


def finish(record: dict[str, Any], out: Path, began: float) -> None:
    """Totals, and both files, each replaced as a whole."""
    record["seconds"] = time.perf_counter() - began
    record["cpu_seconds"] = time.process_time()
    record["totals"] = truth_report.totals(record["rows"])
    record["accuracy"] = truth_report.accuracy(record["rows"])
    for name, text in (
        ("truth_suite.json", json.dumps(_plain(record), separators=(",", ":")) + "\n"),
        ("truth_suite.md", truth_report.markdown(record)),
    ):
        write_text(out / name, text)


def _plain(x: Any) -> Any:
    """Strict JSON: what is not finite becomes a word."""
    if isinstance(x, dict):
        return {key: _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    return x


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a part of the problems, in less than a minute")
    parser.add_argument("--only", default="", metavar="WORDS", help="problems whose group and name contain this")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the two files")
    options = parser.parse_args(arguments)
    require_outputs({"--out": [options.out / "truth_suite.json", options.out / "truth_suite.md"]})
    if not PRECISE:
        print(
            "this machine's long double is no more precise than float64: the answers cannot be known", file=sys.stderr
        )
        return 2
    torch.set_num_threads(1)
    flags = ["--quick"] * options.quick + (["--only", options.only] if options.only else [])
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python benchmarks/truth_suite.py", *flags]),
        "versions": package_versions() | {"bnp_analysis": bnp_analysis.__version__},
        "extended_unit": UNIT,
        "state": "not begun",
        "rows": [],
        "chances": [],
        "nullity": [],
    }
    began = time.perf_counter()
    try:
        measure(record, options.quick, options.only)
    except KeyboardInterrupt:
        print("\ninterrupted; what is done is kept", file=sys.stderr)
    finally:
        finish(record, options.out, began)
    total = record["totals"]
    print(truth_report.markdown(record).split("## By group")[0])
    beyond = sum(not row["within"] for row in record["chances"])
    return int(total["two_sided_violations"] + total["one_sided_violations"] + beyond > 0)


if __name__ == "__main__":
    sys.exit(answered(main))
