"""What users wait for, in this build and in another one: null directions, blocks, tables, construction, start.

    python benchmarks/user_waits.py [OTHER] [--only NAME ...] [--rounds 3] [--limit 1800] [--images 256]
        [--keep] [--out benchmarks/results]

OTHER is the folder of another checkout. Each workload runs in processes of its own, one thread each, the two builds in
turns; a number is the least of the rounds, in seconds of processor time, so that what else the machine does is left
out as far as that goes, and the ratio is that of the same round, in the middle. Answers of both builds are compared.
*Over* is a workload's time over that of what it is compared with in the same process: its products, a plain step.

`--only eigenpairs eigsh --keep` measures these rows and leaves the others of the record in `--out` as they are; each
says the load of the machine when it was measured. A run ends after `--limit` seconds of processor time, and is then
`>` that. MNIST and CIFAR-10 are found by BNP_ANALYSIS_DATA, packages that are compared by PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
AGREE = 1e-6
SIZES = {"images": 256}


class Beside(NamedTuple):
    """The answer of a workload that timed itself: its seconds, and those of what it is compared with."""

    answer: list[float]
    seconds: float
    beside: float


# A workload is prepared, then timed; what it returns are numbers that both builds have to agree on.
Work = Callable[[], list[float] | Beside]


def _seconds(work: Callable[[], Any]) -> tuple[Any, float]:
    """What the work gives, and the processor's time."""
    began = time.process_time()
    return work(), time.process_time() - began


def _gpt(width: int, layers: int) -> Any:
    """The risk of a causal transformer over 32 words: batch of 16 sequences of 12, float64."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    import bnp_analysis as bnp

    try:
        from bnp_analysis.models.networks import Attention, Branch
    except ModuleNotFoundError:  # where builds before this one have them
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

    def work() -> Beside:
        found, spent = _seconds(lambda: find(risk))
        # Together: with a limit of processor time the clock may stand still for a few milliseconds.
        gradient = _seconds(lambda: [risk.at(risk.theta).gradient for _ in range(50)])[1] / 50
        counts = [float(count) for _, count in sorted(found.sources.items())]
        return Beside(counts, spent, gradient * sum(counts))

    return work


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


def mnist_table() -> Work:
    import torch

    import bnp_analysis as bnp

    data = bnp.data.load("mnist", n=10_000, flatten=True)
    model = bnp.models.mlp([784, 100, 100, 100, 10], dtype=torch.float64)
    table, risk = bnp.layer_table, bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, data.tensors)
    risk = risk.to(torch.float64, "cpu")
    return lambda: [row.block.lambda_max for row in table(risk).layers if row.block is not None]


def _resnet() -> tuple[Any, Any, Any]:
    """ResNet-20 without normalization at its start, float32, and the images."""
    import bnp_analysis as bnp

    x, y = bnp.data.load("cifar10", n=SIZES["images"], seed=0).tensors
    return bnp.models.resnet(20), x.float(), y


def resnet_profile(transformed: bool) -> Work:
    """The 50 largest eigenvalues of the Gauss-Newton matrix; beside, its products and the recording of their graph."""
    import torch

    import bnp_analysis as bnp

    model, x, y = _resnet()
    risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, y))
    A, P, measure = bnp.gauss_newton(risk), bnp.bnp_preconditioner(risk) if transformed else None, bnp.condition_profile
    A @ torch.ones(A.dim)  # checks the risk
    kind, product, spent = type(A), type(A)._matmat, 0.0

    def timed(self: Any, v: Any) -> Any:
        nonlocal spent
        found, seconds = _seconds(lambda: product(self, v))
        spent += seconds
        return found

    def work() -> Beside:
        kind._matmat = timed  # of the class: methods make scaled copies of an operator
        found, seconds = _seconds(lambda: measure(A, preconditioner=P, ranks=[2, 5, 10, 20, 50], method="lanczos"))
        return Beside([float(value) for value in found.value], seconds, spent)

    return work


def resnet_pairs(multiplicity: str = "verify") -> Work:
    """Ten eigenpairs; `multiplicity="trust"` claims of repeated eigenvalues no more than SciPy's search does."""
    import torch

    import bnp_analysis as bnp

    model, x, y = _resnet()
    search, H = bnp.eigenpairs, bnp.hessian
    risk = bnp.EmpiricalRisk(model, torch.nn.functional.cross_entropy, (x, y))
    return lambda: [float(value) for value in search(H(risk), 10, tol=PAIRS, multiplicity=multiplicity).values]


def resnet_eigsh(keep: bool = False) -> Work:
    """The same by SciPy's defaults over double backward of plain torch, its graph recorded anew or once for all."""
    import numpy as np
    import torch
    from scipy.sparse.linalg import LinearOperator, eigsh

    model, x, y = _resnet()
    parameters = list(model.parameters())
    sizes = [p.numel() for p in parameters]

    def graph() -> Any:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        return torch.autograd.grad(loss, parameters, create_graph=True)

    def work() -> list[float]:
        kept = graph() if keep else None

        def product(v: Any) -> Any:
            parts = torch.from_numpy(np.ascontiguousarray(v, dtype=np.float32).reshape(-1)).split(sizes)
            cotangents = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
            found = torch.autograd.grad(kept or graph(), parameters, cotangents, retain_graph=keep)
            return torch.cat([t.reshape(-1) for t in found]).numpy()

        matrix = LinearOperator((sum(sizes), sum(sizes)), matvec=product, dtype=np.float32)
        start = np.random.default_rng(0).standard_normal(sum(sizes)).astype(np.float32)
        return sorted(map(float, eigsh(matrix, 10, which="LA", tol=PAIRS, v0=start)[0]), reverse=True)

    return work


def resnet_eigenthings() -> Work:
    """The same by the Lanczos process of hessian-eigenthings with reorthogonalization, as many steps as asked here."""
    import torch
    from hessian_eigenthings import HessianOperator, lanczos

    model, x, y = _resnet()
    loss = torch.nn.functional.cross_entropy
    operator = HessianOperator(model, [(x, y)], lambda m, batch: loss(m(batch[0]), batch[1]))
    settings = {"k": 10, "max_iter": 40, "reorthogonalize": True, "which": "LA", "seed": 0}
    return lambda: [float(value) for value in lanczos(operator, **settings).eigenvalues]


def steps(batch: int, other: str) -> Work:
    """1,000 training steps with BNP, and as many of the other method, in turns of short blocks."""
    from bnp_step import block, step_of

    network = "MLP 784-100-100-100-10"
    step, plain = (step_of(method, network, batch, "cpu") for method in ("BNP", other))
    for one in (step, plain):
        block(one, 20, "cpu")

    def work() -> Beside:
        pairs = [(block(step, 50, "cpu"), block(plain, 50, "cpu")) for _ in range(20)]
        middle = statistics.median(own / beside for own, beside in pairs)
        own = 1000 * min(own for own, _ in pairs)
        return Beside([], own, own / middle)

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
    "null-16": (
        "null directions, GPT of 7,840 parameters (2 layers, width 16); over gradients, one for each direction",
        lambda: null_directions(16, 2),
    ),
    "null-32": (
        "null directions, GPT of 53,344 parameters (4 layers, width 32); over gradients, one for each direction",
        lambda: null_directions(32, 4),
    ),
    "profile-32": ("the same, and the ratios at ranks 2 to 20 with them left out", lambda: deflated_profile(32, 4)),
    "token-blocks": ("layer_table, blocks of 272 and more parameters of one GPT block", token_blocks),
    "classes-first": ("kappa of an 8-parameter convolution, outputs (4, 4, 24, 24)", classes_first),
    "mlp-table": ("layer_table, MLP 784-6-10, 100 random images", mlp_table),
    "mnist-table": ("layer_table, MLP 784-100-100-100-10, 10,000 digits of MNIST", mnist_table),
    "profile": (
        "profile to rank 50, ResNet-20, {images} images of CIFAR-10; over its products",
        lambda: resnet_profile(False),
    ),
    "profile-P": ("the same with P; over the products with A", lambda: resnet_profile(True)),
    "eigenpairs": (
        "10 eigenpairs, Hessian of ResNet-20, {images} images, tolerance 1e-3; over eigsh on double backward",
        resnet_pairs,
    ),
    "eigenpairs-trust": (
        "the same without the check for repeated eigenvalues, which eigsh does not have; over eigsh",
        lambda: resnet_pairs("trust"),
    ),
    "eigsh": ("eigsh of SciPy for the same, {images} images, on double backward of plain torch", resnet_eigsh),
    "eigsh-kept": ("the same, its graph kept", lambda: resnet_eigsh(keep=True)),
    "eigenthings": ("40 steps of hessian-eigenthings' Lanczos for the same", resnet_eigenthings),
    "step-1": ("1,000 steps of BNP, MLP 784-100-100-100-10, batch 1; over plain ones", lambda: steps(1, "plain")),
    "step-60": (
        "1,000 steps of BNP, the same network, batch 60; over those with BatchNorm on inputs",
        lambda: steps(60, "BatchNorm on inputs"),
    ),
    "wide-layer": ("kappa* of fc1 without and with P, MNIST 784-32-10, 1,000 examples", lambda: wide_block("fc1")),
    "wide-network": ("the same of the whole network", lambda: wide_block(None)),
    "construction": ("50 risks of an MLP 60-20-10-10", construction),
    "import": ("python -c 'import bnp_analysis'", lambda: _program("-c", "import bnp_analysis")),
    "help": ("bnp-analysis --help", lambda: _program("-m", "bnp_analysis", "--help")),
}
PAIRS = 1e-3
# Not in minutes in builds that verify candidates one by one; or nothing of a build in it.
ALONE = {"null-32", "profile-32", "profile", "profile-P", "eigsh", "eigsh-kept", "eigenthings"}
# Workloads in processes of their own: the first is reported over the second.
OVER = {"eigenpairs": "eigsh", "eigenpairs-trust": "eigsh"}
# What answers have in common where a tolerance was asked for.
ROUGH = {"eigenpairs": PAIRS, "eigenpairs-trust": PAIRS}


def child(name: str, limit: int) -> None:
    """Time one workload in this process, and print what it took."""
    if name not in ("import", "help"):
        import torch

        torch.set_num_threads(1)
        # The first product with a cotangent makes torch import a second's worth of modules, in any build.
        x = torch.ones(1, requires_grad=True)
        torch.autograd.grad(2 * x, x, torch.ones(1))
    work = WORKLOADS[name][1]()
    most = int(time.process_time()) + limit
    resource.setrlimit(resource.RLIMIT_CPU, (most, most + 1))
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_CHILDREN)
    answer = work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = time.process_time() - began + after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found = answer._asdict() if isinstance(answer, Beside) else {"seconds": spent, "answer": answer}
    print(json.dumps(found | {"peak_mib": peak / 1024}))


def measured(build: Path, name: str, limit: int) -> dict[str, Any] | None:
    """One run of a workload with the package of a build; None where it does not end within the limit."""
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "MKL", "OPENBLAS")}
    paths = [str(build), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", name, "--limit", str(limit)]
    command += ["--images", str(SIZES["images"])]
    done = subprocess.run(command, check=False, cwd=build, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        return None
    done.check_returncode()
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compared(name: str, other: Path | None, rounds: int, limit: int) -> dict[str, Any]:
    """A workload in both builds, in turns; what did not end once is not tried again."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    builds = {} if other is None or name in ALONE else {"other": other}
    runs: dict[str, list[dict[str, Any]]] = {key: [] for key in (*builds, "own")}
    record: dict[str, Any] = {"workload": WORKLOADS[name][0].format(**SIZES), "rounds": rounds, "load": load}
    for _ in range(rounds):
        for key, build in (*builds.items(), ("own", ROOT)):
            if key not in record:
                found = measured(build, name, limit)
                if found is None:
                    record[key] = {"more_than": limit}
                else:
                    runs[key].append(found)
    for key, found in runs.items():
        if key not in record:
            record[key] = {
                "seconds": min(run["seconds"] for run in found),
                "peak_mib": max(run["peak_mib"] for run in found),
            }
            if "beside" in found[0]:
                record[key]["over"] = statistics.median(run["seconds"] / run["beside"] for run in found)
    if all("seconds" in record.get(key, {}) for key in ("own", "other")):
        own, theirs = runs["own"], runs["other"]
        ratios = [old["seconds"] / new["seconds"] for old, new in zip(theirs, own, strict=True)]
        record["ratio"] = statistics.median(ratios)
        pairs = list(zip(own[0]["answer"], theirs[0]["answer"], strict=False))
        same = len(own[0]["answer"]) == len(theirs[0]["answer"])
        record["agree"] = same and all(abs(a - b) <= ROUGH.get(name, AGREE) * abs(b) for a, b in pairs)
    elif "more_than" in record.get("other", {}) and "seconds" in record["own"]:
        record["ratio_more_than"] = limit / record["own"]["seconds"]
    return record


def report(records: dict[str, dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    """The page of results."""
    from side_by_side import heading, table

    def number(of: dict[str, Any], key: str, form: str) -> str:
        bound = {"seconds": "more_than", "ratio": "ratio_more_than"}.get(key, "")
        return f"{of[key]:{form}}" if key in of else f"> {of[bound]:{form}}" if bound in of else "-"

    def cells(record: dict[str, Any], key: str) -> list[str]:
        one = record.get(key, {})
        return [number(one, "seconds", ".2f"), number(one, "peak_mib", ".0f"), number(one, "over", ".2f")]

    for name, by in OVER.items():
        beside = records.get(by, {}).get("own", {}).get("seconds")
        for one in (records.get(name, {}).get(key, {}) for key in ("own", "other")):
            if beside and "seconds" in one:
                one["over"] = one["seconds"] / beside
    rows = [
        [
            record["workload"],
            *cells(record, "other"),
            *cells(record, "own"),
            number(record, "ratio", ".2f"),
            {True: "yes", False: "NO", None: "-"}[record.get("agree")],
            f"{record['rounds']}",
            number(record, "load", ".1f"),
        ]
        for record in records.values()
    ]
    head = ["workload", "other build, s", "MiB", "over", "this build, s", "MiB", "over"]
    return [
        *heading("What users wait for", "python benchmarks/user_waits.py OTHER", facts),
        "Processor time of one thread, the least of the rounds, without what torch imports when it first",
        "differentiates; memory is the peak of the process, torch and what is compared in the same process included;",
        "the ratio, other over this, is the median over rounds; *over* is the time over that of what the workload",
        "names behind `over`, in the same process or, for eigenpairs, in one of its own. *Load* is that of the machine",
        "when the row began: above 0.5 other programs ran beside it, and caches were shared. `-`: not run, not noted.",
        "",
        *table([*head, "ratio", "same answers", "rounds", "load"], rows),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", nargs="?", type=Path, help="the folder of another checkout")
    parser.add_argument("--only", nargs="+", default=list(WORKLOADS), choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=int, default=1800, help="seconds of processor time of one run")
    parser.add_argument("--images", type=int, default=256, help="of CIFAR-10, for the rows about ResNet-20")
    parser.add_argument("--keep", action="store_true", help="leave other rows of an earlier record as they are")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--child", choices=list(WORKLOADS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    SIZES["images"] = given.images
    if given.child:
        child(given.child, given.limit)
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
    if given.keep and (earlier := given.out / "user_waits.json").exists():
        records = json.loads(earlier.read_text(encoding="utf-8"))["workloads"]
    other = None if given.other is None else given.other.resolve()
    for name in given.only:
        records[name] = compared(name, other, given.rounds, given.limit)
        records = {known: records[known] for known in WORKLOADS if known in records}
        print(name, records[name], flush=True)
        write(given.out, "user_waits", report(records, facts), {"facts": facts, "workloads": records})


if __name__ == "__main__":
    main()
