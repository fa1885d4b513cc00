"""Null directions found from structure and data, against the nullity of the dense Gauss-Newton factor in float64.

Each network is counted with few and with many examples. What is left is the difference, nothing else: with few
examples it holds directions that more data would take away. Run: `python benchmarks/null_accounting.py`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.cli import answered
from bnp_analysis.runtime.files import require_output, write_text

D = torch.float64
OUT = Path(__file__).parent / "results" / "null_accounting.md"


class Stream(nn.Module):
    """Two residual blocks on a stream of four channels.

    Args:
        activation: inside the blocks.
        norm: of the stream, None for none.
        before: the norm stands before each block, else behind it.
        tail: what acts on the stream itself, behind each sum (or before the last layer).
    """

    def __init__(
        self,
        activation: Callable[[], nn.Module],
        norm: Callable[[int], nn.Module] | None = None,
        *,
        before: bool = True,
        tail: Callable[[], nn.Module] = nn.Identity,
    ) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(5, 4), nn.Linear(4, 3)
        self.norms = nn.ModuleList(nn.Identity() if norm is None else norm(4) for _ in range(3))
        self.inner = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))
        self.outer = nn.ModuleList(nn.Linear(3, 4) for _ in range(2))
        self.act, self.tail, self.before = activation(), tail(), before

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        for norm, inner, outer in zip(self.norms, self.inner, self.outer, strict=False):
            if self.before:
                h = h + outer(self.act(inner(norm(h))))
            else:
                h = self.tail(norm(h + outer(self.act(inner(h)))))
        out: Tensor = self.leave(self.tail(self.norms[2](h)) if self.before else h)
        return out


class Attention(nn.Module):
    """Tokens, one attention of two heads written by hand, their mean."""

    def __init__(self, *, causal: bool = False, residual: bool = False) -> None:
        super().__init__()
        self.embed, self.leave = nn.Linear(3, 4), nn.Linear(4, 3)
        self.q, self.k, self.v, self.o = (nn.Linear(4, 4) for _ in range(4))
        self.causal, self.residual = causal, residual

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        q, k, v = (layer(h).view(*h.shape[:2], 2, 2).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / 2**0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), float("-inf"))
        y = self.o((F.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2))
        out: Tensor = self.leave((h + y if self.residual else y).mean(1))
        return out


class Words(nn.Module):
    """An embedding, positions, one encoder layer."""

    def __init__(self, *, norm_first: bool, tied: bool = False) -> None:
        super().__init__()
        self.rows, self.places = nn.Embedding(9, 4), nn.Parameter(torch.zeros(5, 4))
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 5, dropout=0.0, batch_first=True, norm_first=norm_first, activation="gelu"
        )
        self.leave = nn.Linear(4, 9 if tied else 3)
        if tied:
            self.leave.weight = self.rows.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.leave(self.layer(self.rows(x) + self.places).mean(1))
        return out


class Power(nn.Module):
    """`relu(x)^2`."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


@dataclass(frozen=True)
class Network:
    """How to build it, what it reads, and its loss."""

    make: Callable[[], nn.Module]
    inputs: str = "rows"
    loss: str = "CE"
    change: Callable[[nn.Module], None] | None = None


def chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def hidden(*between: nn.Module) -> Callable[[], nn.Module]:
    return chain(nn.Linear(5, 6), *between, nn.Linear(6, 4), *between[-1:], nn.Linear(4, 3))


def dead_and_open(model: nn.Module) -> None:
    """Units 0 dead, 1 and 2 always active."""
    assert isinstance(model, nn.Sequential)
    bias = model[0].bias
    assert isinstance(bias, Tensor)
    bias.data[:3] = torch.tensor([-20.0, 20.0, 20.0], dtype=D)


def resnet(**options: Any) -> Callable[[], nn.Module]:
    return lambda: bnp.models.resnet(8, in_channels=1, num_classes=3, width=1, **options)


NETWORKS = {
    "relu 5-6-4-3": Network(hidden(nn.ReLU())),
    "leaky relu 5-6-4-3": Network(hidden(nn.LeakyReLU(0.2))),
    "prelu 5-6-4-3, MSE": Network(hidden(nn.PReLU()), loss="MSE"),
    "relu squared 5-6-4-3": Network(hidden(Power())),
    "linear 5-6-4-3": Network(chain(nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 3))),
    "tanh 5-6-4-3, MSE": Network(hidden(nn.Tanh()), loss="MSE"),
    "gelu 5-6-4-3, MSE": Network(hidden(nn.GELU()), loss="MSE"),
    "relu, dead and open units": Network(chain(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), change=dead_and_open),
    "BatchNorm relu": Network(chain(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))),
    "LayerNorm relu": Network(chain(nn.Linear(5, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3))),
    "LayerNorm tanh, MSE": Network(chain(nn.LayerNorm(5), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), loss="MSE"),
    "conv relu max-pool": Network(
        chain(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 3)), "images"
    ),
    "conv BatchNorm relu": Network(
        chain(nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.ReLU(),
              nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)), "images"
    ),
    "residual, relu on the stream": Network(lambda: Stream(nn.ReLU, before=False, tail=nn.ReLU)),
    "residual, pre-activation relu": Network(lambda: Stream(nn.ReLU, tail=nn.ReLU)),
    "residual, linear stream, gelu": Network(lambda: Stream(nn.GELU)),
    "residual, tanh on the stream, MSE": Network(lambda: Stream(nn.Tanh, before=False, tail=nn.Tanh), loss="MSE"),
    "residual, LayerNorm before": Network(lambda: Stream(nn.GELU, nn.LayerNorm)),
    "residual, RMSNorm before": Network(lambda: Stream(nn.GELU, lambda d: nn.RMSNorm(d, eps=1e-3))),
    "residual, LayerNorm behind": Network(lambda: Stream(nn.GELU, nn.LayerNorm, before=False)),
    "ResNet-8, projections": Network(resnet(shortcut="projection"), "images"),
    "attention": Network(Attention, "tokens"),
    "attention, causal, residual": Network(lambda: Attention(causal=True, residual=True), "tokens"),
    "encoder layer, norm before": Network(lambda: Words(norm_first=True), "words"),
    "encoder layer, norm behind": Network(lambda: Words(norm_first=False), "words"),
    "encoder layer, tied head": Network(lambda: Words(norm_first=True, tied=True), "words"),
}  # fmt: skip


def problem(network: Network, examples: int) -> bnp.EmpiricalRisk:
    """Generic parameters and data, of one seed."""
    g = torch.Generator().manual_seed(1)
    shapes = {"rows": (5,), "images": (1, 8, 8), "tokens": (5, 3)}
    if network.inputs == "words":
        x = torch.randint(0, 9, (examples, 5), generator=g)
    else:
        x = torch.randn(examples, *shapes[network.inputs], generator=g, dtype=D)
    model = network.make().double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.6 * torch.randn(p.shape, generator=g, dtype=D))
    if network.change is not None:
        network.change(model)
    if network.loss == "MSE":
        return bnp.EmpiricalRisk(model, F.mse_loss, (x, torch.randn(examples, 3, generator=g, dtype=D)))
    return bnp.EmpiricalRisk(model, F.cross_entropy, (x, torch.randint(0, 3, (examples,), generator=g)))


@dataclass(frozen=True)
class Count:
    """One network at one size of data; `gap` is the ratio of the singular values next to the cut."""

    name: str
    examples: int
    parameters: int
    rank_bound: int
    nullity: int
    found: bnp.symmetry.NullDirections
    gap: float
    seconds: float

    @property
    def unexplained(self) -> int:
        return self.nullity - self.found.basis.shape[1]


def counts(name: str, sizes: list[int]) -> Iterator[Count]:
    for examples in sizes:
        risk = problem(NETWORKS[name], examples)
        began = time.perf_counter()
        found = bnp.null_directions(risk)
        seconds = time.perf_counter() - began
        factor = bnp.gauss_newton(risk).factor
        assert factor is not None
        sigma = torch.linalg.svdvals(factor.to_dense())
        floor = 10 * max(factor.shape) * torch.finfo(D).eps * float(sigma[0])
        rank = int((sigma > floor).sum())
        gap = float(sigma[rank - 1] / sigma[rank]) if rank < len(sigma) else float("inf")
        yield Count(name, examples, factor.shape[1], factor.rank_bound, factor.shape[1] - rank, found, gap, seconds)


def report(rows: list[Count]) -> str:
    lines = [
        "# Null-space accounting",
        "",
        "`python benchmarks/null_accounting.py`; float64; generic parameters and data of one seed. *Nullity*:",
        "columns of the dense Gauss-Newton factor minus its singular values above rounding; *gap*: ratio of the two",
        "next to the cut; *left*: nullity minus the rank of what was found and verified, which is not explained.",
        "Where the examples allow fewer independent outputs than there are parameters, the last column has the least",
        "that must be left.",
        "",
        "| network | examples | parameters | nullity | gap | found | left | by cause | too few outputs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        causes = ", ".join(f"{cause} {count}" for cause, count in row.found.sources.items()) or "none"
        r = row.found.basis.shape[1]
        short = max(0, row.parameters - row.rank_bound - r)
        extra = [f"rejected: {dict(row.found.rejected)}"] if row.found.rejected else []
        approximate = ", ".join(f"{c} {n} ({s:.0e})" for c, (n, s) in row.found.approximate.items())
        extra += [f"approximate: {approximate}"] * bool(approximate)
        extra += [f"not analysed: {'; '.join(row.found.not_analysed)}"] * bool(row.found.not_analysed)
        text = "; ".join([causes, *extra])
        lines.append(
            f"| {row.name} | {row.examples} | {row.parameters} | {row.nullity} | {row.gap:.0e} | {r} "
            f"| {row.unexplained} | {text} | {short or ''} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, nargs="+", default=[24, 400])
    parser.add_argument("--only", nargs="+", default=list(NETWORKS), choices=list(NETWORKS), metavar="NETWORK")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    require_output(given.out, "--out")
    rows: list[Count] = []
    for name in given.only:
        for row in counts(name, given.examples):
            rows.append(row)
            write_text(given.out, report(rows))
            print(
                f"{name}, {row.examples}: nullity {row.nullity}, left {row.unexplained}, {row.seconds:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    sys.exit(answered(main))
