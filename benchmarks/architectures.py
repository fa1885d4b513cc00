"""A small GPT, an LSTM and a GCN: condition profiles without and with `P`, and steps to a loss at tuned rates.

    python benchmarks/architectures.py [--quick] [--only gpt lstm gcn] [--out benchmarks/results]

*gpt*: characters of English text, two blocks as in GPT-2, dense layers stored as its `Conv1D`. *lstm*: images of
digits, read row by row. *gcn*: the karate club, eight features that are not standardized. Every method has its own
learning rate, the one whose worse of two starts needs fewest steps; these starts are none of the three that are
reported. The profiles are those of the Gauss-Newton matrix in float64, at the start and where plain SGD ends.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from side_by_side import RESULTS, about, fix_threads, heading, require_folder, table, write
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.cli import answered

EVERY, TUNED_ON, REPORTED = 10, (100, 101), (0, 1, 2)
RANKS = (5, 10, 20, 50, 100, 500, 1000)
Optimizer = Callable[..., torch.optim.Optimizer]
#: Name -> optimizer, whether with BNP.
METHODS: dict[str, tuple[Optimizer, bool]] = {
    "SGD": (torch.optim.SGD, False),
    "SGD with BNP": (torch.optim.SGD, True),
    "Adam": (torch.optim.Adam, False),
    "Adam with BNP": (torch.optim.Adam, True),
}
RATES = {
    torch.optim.SGD: (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    torch.optim.Adam: (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
}


class Conv1D(nn.Module):
    """The dense layer of GPT-2: its weight is stored with the units last."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight, self.bias = nn.Parameter(0.02 * torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight)
        return out.view(*x.shape[:-1], self.nf)


class Block(nn.Module):
    """Attention to what came before and a perceptron, each behind a norm and beside a skip."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Conv1D(3 * width, width), Conv1D(width, width)
        self.up, self.down = Conv1D(4 * width, width), Conv1D(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        parts = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return out


class GPT(nn.Module):
    def __init__(self, words: int = 27, places: int = 16, width: int = 12) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(places, width))
        self.blocks = nn.Sequential(Block(width, 2), Block(width, 2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.blocks(self.words(x) + self.places)))
        return out


class Reader(nn.Module):
    """An LSTM over the rows of an image, and a dense layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(8, 12, batch_first=True), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(x)[0][:, -1])
        return out


class GCN(nn.Module):
    """Two graph convolutions: propagation, then a dense layer."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.register_buffer("A", A)
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.outer(self.A @ torch.tanh(self.inner(self.A @ x)))
        return out


def per_token(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), y.flatten())


@dataclass(frozen=True)
class Task:
    """A network, its data and the loss that is to be reached.

    Attributes:
        make: the network at a start that the global generator gives.
        batch: examples in a step; None for all.
        seen: examples on which the loss is looked at, the first ones.
        measured: examples of the profiles.
        steps: at most.
    """

    words: str
    make: Callable[[], nn.Module]
    x: Tensor
    y: Tensor
    loss: Callable[[Tensor, Tensor], Tensor]
    target: float
    batch: int | None
    seen: int
    measured: int
    steps: int

    def network(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()


def gpt() -> Task:
    """Letters and spaces of the descriptions that scikit-learn has of its data sets."""
    from sklearn import datasets

    names = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    text = " ".join(getattr(datasets, f"load_{name}")().DESCR for name in names).lower()
    letters = re.sub("[^a-z]+", " ", text)
    codes = torch.tensor([0 if c == " " else ord(c) - 96 for c in letters])
    pieces = codes[: len(codes) // 17 * 17].view(-1, 17)
    pieces = pieces[torch.randperm(len(pieces), generator=torch.Generator().manual_seed(0))]
    words = f"GPT of two blocks, width 12, on {len(codes)} characters in pieces of 16, batches of 16"
    x, y = pieces[:, :-1].contiguous(), pieces[:, 1:].contiguous()
    return Task(words, GPT, x, y, per_token, 2.3, 16, 200, 6, 1500)


def lstm() -> Task:
    data = bnp.data.load("digits", flatten=True)
    words = "LSTM of 12 units on digits read row by row, batches of 60"
    return Task(words, Reader, data.x.view(-1, 8, 8), data.y, F.cross_entropy, 0.5, 60, 500, 120, 800)


def gcn() -> Task:
    """Degrees, triangles, betweenness, degrees of neighbours, and distances to four members."""
    import networkx as nx

    graph = nx.karate_club_graph()
    A = torch.tensor(nx.to_numpy_array(graph, weight=None)).float() + torch.eye(34)
    A = A / (A.sum(0)[:, None] * A.sum(0)).sqrt()
    paths = dict(nx.all_pairs_shortest_path_length(graph))
    features: list[Mapping[int, float]] = [dict(graph.degree()), nx.triangles(graph)]
    features += [nx.betweenness_centrality(graph), nx.average_neighbor_degree(graph)]
    features += [paths[member] for member in (11, 16, 24, 26)]
    x = torch.tensor([[float(column[node]) for column in features] for node in graph])
    y = torch.tensor([int(graph.nodes[node]["club"] == "Officer") for node in graph])
    words = "GCN of two layers, 8 units, on the 34 members of the karate club, all in every step"
    return Task(words, lambda: GCN(A), x, y, F.cross_entropy, 0.05, None, 34, 34, 1000)


TASKS: dict[str, Callable[[], Task]] = {"gpt": gpt, "lstm": lstm, "gcn": gcn}


def train(task: Task, method: str, rate: float, seed: int, steps: int) -> tuple[float, float, nn.Module]:
    """Steps until the loss is reached, infinity if it is not; the last loss; the network."""
    (make, with_P), model = METHODS[method], task.network(seed)
    optimizer = make(model.parameters(), lr=rate)
    pre = bnp.BNP(model) if with_P else None
    generator, loss = torch.Generator().manual_seed(seed), math.inf
    every = EVERY if task.batch else 1
    for step in range(1, steps + 1):
        rows = torch.randint(len(task.x), (task.batch,), generator=generator) if task.batch else slice(None)
        optimizer.zero_grad()
        task.loss(model(task.x[rows]), task.y[rows]).backward()
        if pre is not None:
            pre.step()
        optimizer.step()
        if step % every == 0:
            with torch.no_grad():
                loss = float(task.loss(model(task.x[: task.seen]), task.y[: task.seen]))
            if loss <= task.target:
                return step, loss, model
            if not loss < 1e3:
                break
    return math.inf, loss if math.isfinite(loss) else math.inf, model


def tuned(task: Task, method: str, steps: int) -> float:
    """The rate whose worse start needs fewest steps to the target, else has the least loss."""
    best, least = math.nan, (math.inf, math.inf)
    for rate in RATES[METHODS[method][0]]:
        worst = (0.0, 0.0)
        for seed in TUNED_ON:
            # More steps than the best rate needs decide nothing.
            worst = max(worst, train(task, method, rate, seed, int(min(steps, least[0])))[:2])
        if worst < least or math.isnan(best):
            best, least = rate, worst
    return best


def profile(task: Task, model: nn.Module, cells: list[str]) -> list[list[str]]:
    """Rows of the table: rank, ratio without and with `P`, and the gain."""
    data = task.x[: task.measured], task.y[: task.measured]
    double = copy.deepcopy(model).double()
    risk = bnp.EmpiricalRisk(double, task.loss, tuple(t.double() if t.is_floating_point() else t for t in data))
    both = bnp.condition(risk, null=None, method="factor-svd")
    assert both.with_P is not None
    other = {row["rank"]: row for row in both.with_P.records()}
    found = []
    for row in both.without_P.records():
        if row["rank"] in RANKS and row["rank"] in other:
            pair: list[dict[str, Any]] = [row, other[row["rank"]]]
            assert all(r["two_sided"] for r in pair)
            shown = [f"{r['value']:.3g}" for r in pair]
            found.append([*cells, str(row["rank"]), *shown, f"{pair[0]['value'] / pair[1]['value']:.3g}"])
    return found


def measured(name: str, *, quick: bool) -> dict[str, Any]:
    """Both tables of a task."""
    began, task = time.process_time(), TASKS[name]()
    steps, seeds = (20, REPORTED[:1]) if quick else (task.steps, REPORTED)
    runs, profiles, ends = [], [], {}
    for method in METHODS:
        rate = tuned(task, method, steps)
        cells = []
        for seed in seeds:
            count, loss, model = train(task, method, rate, seed, steps)
            cells.append(f"{count:g}" if count < math.inf else f"> {steps} ({loss:.2f})")
            ends.setdefault(seed, model)  # of SGD, the first
        runs.append([name, f"{task.target}", method, f"{rate:g}", *cells])
        print(runs[-1], flush=True)
    for seed in seeds:
        for place, model in (("start", task.network(seed)), ("end of SGD", ends[seed])):
            profiles += profile(task, model, [name, str(seed), place])
    return {"words": task.words, "runs": runs, "profiles": profiles, "seconds": time.process_time() - began}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one start, few steps")
    parser.add_argument("--only", nargs="+", choices=TASKS, default=[*TASKS], help="these")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two files")
    options = parser.parse_args(argv)
    require_folder(options.out, "architectures")
    fix_threads(1)
    found = {name: measured(name, quick=options.quick) for name in options.only}
    words = " ".join(["python benchmarks/architectures.py", *(["--quick"] if options.quick else [])])
    record = {"command": words, "about": about("cpu"), "tasks": found}
    seeds = [f"seed {seed}" for seed in (REPORTED[:1] if options.quick else REPORTED)]
    lines = heading("A small GPT, an LSTM and a GCN, without and with BNP", words, record["about"])
    lines += [*(f"* `{name}`: {one['words']}; {one['seconds']:.0f} s." for name, one in found.items()), ""]
    lines += [
        "Steps until the cross-entropy of training examples is at most the target, looked at every 10 steps (`gcn`: "
        "every step); in brackets the loss where it is never.",
        "",
        *table(["task", "target", "method", "rate", *seeds], [row for one in found.values() for row in one["runs"]]),
        "",
        "Condition profiles `lambda_1 / lambda_r` of the Gauss-Newton matrix, without and with the undamped `P` of all "
        "covered layers; gain: their ratio.",
        "",
        *table(
            ["task", "seed", "at", "r", "without P", "with P", "gain"],
            [row for one in found.values() for row in one["profiles"]],
        ),
    ]
    write(options.out, "architectures", lines, record)
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(answered(main))
