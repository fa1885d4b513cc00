"""An LSTM that reads digits row by row: condition profiles without and with `P`, and steps to a loss at tuned rates.

    python benchmarks/recurrent.py [--quick] [--out benchmarks/results/recurrent.md]

Images of 8 x 8 pixels are sequences of eight rows; the last output is classified. Every method has its own learning
rate, the one that needs fewest steps from a start that is none of those reported; then three starts at that rate. The
profiles are those of the Gauss-Newton matrix in float64, at the start and where plain SGD at rate 1 has come to, after
all steps or at the loss.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnp_analysis as bnp
from bnp_analysis.results import package_versions

WIDTH, BATCH, TARGET, EVERY, TUNED_ON = 12, 60, 0.5, 10, 100
Optimizer = Callable[..., torch.optim.Optimizer]
#: Name -> optimizer, layers that BNP leaves out (None: no BNP), learning rates.
METHODS: dict[str, tuple[Optimizer, tuple[str, ...] | None, tuple[float, ...]]] = {
    "SGD": (torch.optim.SGD, None, (0.1, 0.3, 1.0, 3.0, 10.0)),
    "SGD, BNP on the head alone": (torch.optim.SGD, ("cell",), (0.1, 0.3, 1.0, 3.0)),
    "SGD, BNP on all layers": (torch.optim.SGD, (), (0.03, 0.1, 0.3, 1.0, 3.0)),
    "Adam": (torch.optim.Adam, None, (0.003, 0.01, 0.03, 0.1)),
    "Adam, BNP on all layers": (torch.optim.Adam, (), (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)),
}


class Reader(nn.Module):
    """An LSTM over the rows of an image, and a dense layer on its last output."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.cell, self.head = nn.LSTM(8, WIDTH, batch_first=True), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(x)[0][:, -1])
        return out


def digits() -> tuple[Tensor, Tensor]:
    """Training digits as sequences `(N, 8, 8)`, and their labels."""
    data = bnp.data.load("digits", flatten=True)
    return data.x.view(-1, 8, 8), data.y


def train(method: str, rate: float, seed: int, steps: int) -> tuple[int | None, float, nn.Module]:
    """Steps until the loss of 500 training examples is at most `TARGET`, None if never; the last loss; the network."""
    (x, y), model = digits(), Reader(seed)
    make, left_out, _ = METHODS[method]
    optimizer = make(model.parameters(), lr=rate)
    pre = None if left_out is None else bnp.BNP(model, exclude=left_out or None)
    generator, reached, loss = torch.Generator().manual_seed(seed), None, float("inf")
    for step in range(1, steps + 1):
        rows = torch.randint(len(x), (BATCH,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        if pre is not None:
            pre.step()
        optimizer.step()
        if step % EVERY == 0:
            with torch.no_grad():
                loss = float(F.cross_entropy(model(x[:500]), y[:500]))
            if not loss < 1e3:
                break
            if loss <= TARGET:
                reached = step
                break
    if pre is not None:
        pre.close()
    return reached, loss, model


def tuned(method: str, steps: int) -> float:
    """The rate of fewest steps to the target, else of the least loss."""

    def cost(rate: float) -> tuple[float, float]:
        reached, loss, _ = train(method, rate, TUNED_ON, steps)
        return (reached or float("inf"), loss if math.isfinite(loss) else float("inf"))

    return min(METHODS[method][2], key=cost)


def profiles(seed: int, steps: int, examples: int) -> list[list[str]]:
    """At the start and after SGD: rank, ratio without and with `P`, and the gain."""
    x, y = digits()
    found = []
    trained = train("SGD", 1.0, seed, steps)[2]
    for place, model in (("start", Reader(seed)), ("after SGD, rate 1", trained)):
        risk = bnp.EmpiricalRisk(
            copy.deepcopy(model), F.cross_entropy, (x[:examples], y[:examples]), dtype=torch.float64
        )
        both = bnp.condition(risk, method="dense", null=None)
        assert both.with_P is not None
        with_P = {row["rank"]: row for row in both.with_P.records()}
        for row in both.without_P.records():
            if row["rank"] in with_P:
                other = with_P[row["rank"]]
                ratio = float(str(row["value"])) / float(str(other["value"]))
                cells = [f"{float(str(r['value'])):.3g}" for r in (row, other)]
                found.append([str(seed), place, str(row["rank"]), *cells, f"{ratio:.3g}"])
    return found


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """In Markdown."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def report(*, quick: bool) -> str:
    """The page."""
    steps, seeds, examples = (40, [0], 24) if quick else (800, [0, 1, 2], 120)
    rows = []
    for method in METHODS:
        rate = tuned(method, steps)
        counts = [train(method, rate, seed, steps)[:2] for seed in seeds]
        said = [f"{n}" if n is not None else f"> {steps} ({loss:.2f})" for n, loss in counts]
        rows.append([method, f"{rate:g}", *said])
    lines = [
        "# An LSTM that reads digits row by row",
        "",
        "`python benchmarks/recurrent.py`" + (" `--quick`" if quick else "") + f", torch {package_versions()['torch']}",
        "",
        f"LSTM of {WIDTH} units and a dense layer, batches of {BATCH}. Steps until the cross-entropy of 500 training "
        f"examples is at most {TARGET}, looked at every {EVERY} steps; in brackets the loss where it is never. Rates "
        f"are tuned on seed {TUNED_ON}, method by method.",
        "",
        *table(["method", "rate", *(f"seed {seed}" for seed in seeds)], rows),
        "",
        f"Condition profiles `lambda_1 / lambda_r` of the Gauss-Newton matrix on {examples} examples, float64, without "
        "and with the undamped `P` of all layers; gain: their ratio.",
        "",
        *table(
            ["seed", "at", "r", "without P", "with P", "gain"],
            [row for seed in seeds for row in profiles(seed, steps, examples)],
        ),
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one start, few steps")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results" / "recurrent.md")
    arguments = parser.parse_args(argv)
    text = report(quick=arguments.quick)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
