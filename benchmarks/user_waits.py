"""What users wait for, in this build and in another one: null directions, blocks, tables, construction, start.

    python benchmarks/user_waits.py [OTHER] [--only NAME ...] [--rounds 3] [--out benchmarks/results]

OTHER is the folder of another checkout. Each workload runs in processes of its own, one thread each, the two builds in
turns; a number is the least of the rounds, in seconds of processor time, so that what else the machine does is left
out as far as that goes, and the ratio is that of the same round, in the middle. Answers of both builds are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# A workload is prepared, then timed; what it returns are numbers that both builds have to agree on.
Work = Callable[[], list[float]]
LIMIT = 1800.0
AGREE = 1e-6


def _gpt(width: int, layers: int) -> Any:
    """The risk of a causal transformer over 32 words: batch of 16 sequences of 12, float64."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    import bnp_analysis as bnp
    from bnp_analysis.models.transformer import Attention, Branch

    class Causal(Attention):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (
                layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
            )
            out: torch.Tensor = self.out(
                F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            )
            return out

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.place = nn.Embedding(32, width), nn.Parameter(0.02 * torch.randn(12, width))
            self.blocks = nn.Sequential()
            for _ in range(layers):
                perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
                self.blocks.append(Branch(nn.LayerNorm(width), Causal(width, 4, True)))
                self.blocks.append(Branch(nn.LayerNorm(width), perceptron))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.head(self.norm(self.blocks(self.words(x) + self.place)))
            return out

    def loss(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = GPT().double(), torch.randint(32, (16, 13))
    return bnp.EmpiricalRisk(model, loss, (x[:, :-1].contiguous(), x[:, 1:].contiguous()))


def null_directions(width: int, layers: int) -> Work:
    import bnp_analysis as bnp

    find, risk = bnp.null_directions, _gpt(width, layers)
    return lambda: [float(count) for _, count in sorted(find(risk).sources.items())]


def deflated_profile(width: int, layers: int) -> Work:
    import bnp_analysis as bnp

    find, measure, A = bnp.null_directions, bnp.condition_profile, bnp.gauss_newton
    risk = _gpt(width, layers)

    def work() -> list[float]:
        found = measure(A(risk), null=find(risk), method="lanczos", ranks=[2, 5, 10, 20])
        return [float(value) for value in found.value]

    return work


def token_blocks() -> Work:
    import bnp_analysis as bnp

    table, risk = bnp.layer_table, _gpt(16, 2)
    names = [layer.name for layer in bnp.network.coverage(risk) if layer.name.startswith("blocks.0.inner")]
    return lambda: [row.block.value for row in table(risk, layers=names).layers if row.block is not None]


def classes_first() -> Work:
    import torch

    import bnp_analysis as bnp

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 1, 24, 24, generator=g, dtype=torch.float64), torch.randint(4, (4, 24, 24), generator=g)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Conv2d(1, 4, 1).double()
    measure = bnp.condition_number
    return lambda: [
        measure(bnp.gauss_newton(bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, y)))).value
    ]


def _perceptron(sizes: list[int], examples: int) -> tuple[Any, Any]:
    import torch

    import bnp_analysis as bnp

    g = torch.Generator().manual_seed(0)
    x = torch.rand(examples, sizes[0], generator=g, dtype=torch.float64)
    return bnp.models.mlp(sizes, dtype=torch.float64), (x, torch.randint(sizes[-1], (examples,), generator=g))


def mlp_table() -> Work:
    import torch

    import bnp_analysis as bnp

    model, data = _perceptron([784, 6, 10], 100)
    table, risk = bnp.layer_table, bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, data)
    return lambda: [row.block.value for row in table(risk).layers if row.block is not None]


def wide_block(block: str | None) -> Work:
    """`kappa*` without and with `P`: of the layer fc1 of an MLP 784-32-10 on 1,000 digits, or of all of it."""
    import torch

    import bnp_analysis as bnp

    found = bnp.data.load("mnist", n=1000, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bnp.models.mlp([784, 32, 10], dtype=torch.float64)
    x, y = found.tensors
    risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x.double().flatten(1), y))
    P = bnp.bnp_preconditioner(risk, block=block)

    def work() -> list[float]:
        A = bnp.gauss_newton(risk, block=block)
        numbers = [bnp.condition_number(A, preconditioner=p) for p in (None, P)]
        return [k.lambda_max for k in numbers]  # the other end may be a bound from one side alone

    return work


def construction() -> Work:
    import torch

    import bnp_analysis as bnp

    model, data = _perceptron([60, 20, 10, 10], 60)
    make, loss = bnp.EmpiricalRisk, torch.nn.functional.cross_entropy
    make(model, loss, data)
    return lambda: [float(make(model, loss, data).value) for _ in range(50)]


def _program(*words: str) -> Work:
    def run() -> list[float]:
        subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
        return []

    return run


WORKLOADS: dict[str, tuple[str, Callable[[], Work]]] = {
    "null-16": ("null directions, GPT of 7,840 parameters (2 layers, width 16)", lambda: null_directions(16, 2)),
    "null-32": ("null directions, GPT of 53,344 parameters (4 layers, width 32)", lambda: null_directions(32, 4)),
    "profile-32": ("the same, and the ratios at ranks 2 to 20 with them left out", lambda: deflated_profile(32, 4)),
    "token-blocks": ("layer_table, blocks of 272 and more parameters of one GPT block", token_blocks),
    "classes-first": ("kappa of an 8-parameter convolution, outputs (4, 4, 24, 24)", classes_first),
    "mlp-table": ("layer_table, MLP 784-6-10, 100 random images", mlp_table),
    "wide-layer": ("kappa* of fc1 without and with P, MNIST 784-32-10, 1,000 examples", lambda: wide_block("fc1")),
    "wide-network": ("the same of the whole network", lambda: wide_block(None)),
    "construction": ("50 risks of an MLP 60-20-10-10", construction),
    "import": ("python -c 'import bnp_analysis'", lambda: _program("-c", "import bnp_analysis")),
    "help": ("bnp-analysis --help", lambda: _program("-m", "bnp_analysis", "--help")),
}
# Not in minutes in builds that verify candidates one by one.
ALONE = {"null-32", "profile-32"}


def child(name: str) -> None:
    """Time one workload in this process, and print what it took."""
    if name not in ("import", "help"):
        import torch

        torch.set_num_threads(1)
        # The first product with a cotangent makes torch import a second's worth of modules, in any build.
        x = torch.ones(1, requires_grad=True)
        torch.autograd.grad(2 * x, x, torch.ones(1))
    work = WORKLOADS[name][1]()
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = time.process_time() - began + after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({"seconds": spent, "peak_mib": peak / 1024, "answer": answer}))


def measured(build: Path, name: str) -> dict[str, Any] | None:
    """One run of a workload with the package of a build; None where it does not end in `LIMIT` seconds."""
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    environment = os.environ | threads | {"PYTHONPATH": str(build)}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name]
    try:
        done = subprocess.run(
            command, cwd=build, env=environment, check=True, timeout=LIMIT, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(name: str, other: Path | None, rounds: int) -> dict[str, Any]:
    """A workload in both builds, in turns."""
    own: list[dict[str, Any]] = []
    theirs: list[dict[str, Any]] = []
    for _ in range(rounds):
        if other is not None and name not in ALONE and (found := measured(other, name)):
            theirs.append(found)
        if found := measured(ROOT, name):
            own.append(found)
    record: dict[str, Any] = {"workload": WORKLOADS[name][0], "rounds": rounds}
    for key, runs in (("own", own), ("other", theirs)):
        if runs:
            record[key] = {
                "seconds": min(run["seconds"] for run in runs),
                "peak_mib": max(run["peak_mib"] for run in runs),
            }
    if own and theirs:
        record["ratio"] = statistics.median(
            old["seconds"] / new["seconds"] for old, new in zip(theirs, own, strict=False)
        )
        pairs = list(zip(own[0]["answer"], theirs[0]["answer"], strict=False))
        same = len(own[0]["answer"]) == len(theirs[0]["answer"])
        record["agree"] = same and all(abs(a - b) <= AGREE * abs(b) for a, b in pairs)
    return record


def report(records: dict[str, dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    """The page of results."""
    from side_by_side import heading, table

    def cell(record: dict[str, Any], key: str) -> list[str]:
        one = record.get(key)
        return [f"{one['seconds']:.2f}", f"{one['peak_mib']:.0f}"] if one else ["-", "-"]

    rows = [
        [
            record["workload"],
            *cell(record, "other"),
            *cell(record, "own"),
            f"{record['ratio']:.2f}" if "ratio" in record else "-",
            {True: "yes", False: "NO", None: "-"}[record.get("agree")],
        ]
        for record in records.values()
    ]
    rounds = max(record["rounds"] for record in records.values())
    head = ["workload", "other build, s", "MiB", "this build, s", "MiB", "ratio", "same answers"]
    return [
        *heading("What users wait for", "python benchmarks/user_waits.py OTHER", facts),
        f"Processor time of one thread, least of {rounds} round(s), without what torch imports when it first",
        "differentiates; memory is the peak of the process, torch included;",
        "the ratio, other over this, is the median over rounds. `-`: not run, or not ended within the limit.",
        "",
        *table(head, rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", type=Path, help="the folder of another checkout")
    parser.add_argument("--only", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", choices=list(WORKLOADS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child)
        return
    if given.other is not None and not (given.other / "bnp_analysis").is_dir():
        raise SystemExit(f"error: {given.other} holds no bnp_analysis; give the folder of a checkout")
    from bnp_analysis.cli import answered  # not in a child, which measures imports too

    sys.exit(answered(lambda: compare(given)))


def compare(given: argparse.Namespace) -> None:
    """Measure what is asked for, and write the page after each."""
    from side_by_side import about, fix_threads, require_folder, write

    require_folder(given.out, "user_waits")
    fix_threads(1)
    facts, records = about("cpu"), dict[str, dict[str, Any]]()
    for name in given.only:
        records[name] = compared(name, None if given.other is None else given.other.resolve(), given.rounds)
        print(name, records[name], flush=True)
        write(given.out, "user_waits", report(records, facts), {"facts": facts, "workloads": records})


if __name__ == "__main__":
    main()
