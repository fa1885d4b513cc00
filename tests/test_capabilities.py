"""`docs/capabilities.md` says what works with what, and this file finds out: every cell of the table is tried.

A cell is a verb in a situation: a kind of layer, a dtype, a way in which data or outputs come. It works, gives a bound
on one side only, or is refused in words; anything else (an error of torch, a number that is not finite) fails here. A
refusal that goes away, or a new one, shows as a page that is not the one committed.

`python tests/test_capabilities.py` writes the page; with `--device cuda` it prints the table of that device.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnp_analysis as bnp
from bnp_analysis.errors import BNPAnalysisError

PAGE = Path(__file__).resolve().parent.parent / "docs" / "capabilities.md"
BEGIN, END = "<!-- cells: written by tests/test_capabilities.py -->\n", "<!-- end of cells -->\n"
cross_entropy = nn.functional.cross_entropy


@dataclass(frozen=True)
class Situation:
    """A model with its loss and data, and what is said about them when the risk is made."""

    model: Callable[[], nn.Module]
    data: Callable[[torch.Generator], Any]
    loss: Callable[..., Tensor] = cross_entropy
    options: dict[str, Any] = field(default_factory=lambda: {"dtype": torch.float64})


class Tokens(nn.Module):
    """A small language model: an embedding, attention, a head; the output has a row per token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x))
        return self.head(h + self.mix(h, h, h, need_weights=False)[0])


class Recurrent(nn.Module):
    """The last state of a recurrent layer, classified."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.cell, self.head = kind(2, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(x)[0][:, -1])
        return out


class Unrolled(nn.Module):
    """A cell over the steps of a sequence, its last state classified."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(2, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        out: Tensor = self.head(state[0])
        return out


class Tied(nn.Module):
    """Embedding and head share their weight; a layer is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.between, self.head = nn.Embedding(5, 3), nn.Linear(3, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.between(self.embed(x))))
        return out


def mlp(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh(), nn.Linear(4, 3))


def conv(layer: Callable[..., nn.Module]) -> nn.Module:
    return nn.Sequential(layer(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))


def vectors(g: torch.Generator, *, n: int = 12) -> Any:
    return torch.randn(n, 3, generator=g), torch.arange(n) % 3


def images(g: torch.Generator, *, axes: int) -> Any:
    return torch.randn(8, 1, *(4 for _ in range(axes)), generator=g), torch.arange(8) % 3


def words(g: torch.Generator, *, each: bool = True) -> Any:
    x = torch.randint(5, (6, 4), generator=g)
    return x, x.roll(1, 1) if each else x[:, 0]


def per_token(output: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(output.flatten(0, 1), y.flatten())


def batches(g: torch.Generator) -> Any:
    x, y = vectors(g)
    return [(x[:5], y[:5]), (x[5:], y[5:])]


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)
    return model


SITUATIONS = {
    "Linear": Situation(mlp, vectors),
    "Conv1d": Situation(partial(conv, nn.Conv1d), partial(images, axes=1)),
    "Conv2d": Situation(partial(conv, nn.Conv2d), partial(images, axes=2)),
    "Conv3d": Situation(partial(conv, nn.Conv3d), partial(images, axes=3)),
    "attention, tokens": Situation(Tokens, words, per_token),
    "RNN": Situation(partial(Recurrent, nn.RNN), lambda g: (torch.randn(9, 4, 2, generator=g), torch.arange(9) % 3)),
    "LSTM": Situation(partial(Recurrent, nn.LSTM), lambda g: (torch.randn(9, 4, 2, generator=g), torch.arange(9) % 3)),
    "GRU": Situation(partial(Recurrent, nn.GRU), lambda g: (torch.randn(9, 4, 2, generator=g), torch.arange(9) % 3)),
    "LSTMCell, unrolled": Situation(Unrolled, lambda g: (torch.randn(9, 4, 2, generator=g), torch.arange(9) % 3)),
    "tied weights": Situation(Tied, words, per_token),
    "frozen layers": Situation(frozen, vectors),
    "mean squared error": Situation(
        mlp, lambda g: (torch.randn(12, 3, generator=g), torch.randn(12, 3, generator=g)), nn.functional.mse_loss
    ),
    "classes first": Situation(
        lambda: nn.Conv2d(1, 3, 2),
        lambda g: (torch.randn(4, 1, 4, 4, generator=g), torch.randint(3, (4, 3, 3), generator=g)),
    ),
    "float32": Situation(mlp, vectors, options={}),
    "bfloat16": Situation(lambda: mlp().bfloat16(), vectors, options={}),
    "two batches": Situation(mlp, batches),
    "BatchNorm, eval()": Situation(lambda: mlp(nn.BatchNorm1d(4)).eval(), batches),
    "BatchNorm, one batch": Situation(lambda: mlp(nn.BatchNorm1d(4)), vectors),
    "BatchNorm, two batches": Situation(lambda: mlp(nn.BatchNorm1d(4)), batches),
    "Dropout, train()": Situation(lambda: mlp(nn.Dropout(0.5)), vectors),
}


# The others are tried by `make test-slow`.
QUICK = {"Linear", "bfloat16", "BatchNorm, two batches", "Dropout, train()"}


class Unfinished(Exception):
    """A number that is bounded on one side only."""


def finite(*numbers: Any) -> None:
    assert all(math.isfinite(float(x)) for x in numbers), numbers


def two_sided(number: Any) -> None:
    finite(number.value, number.lower)
    if not number.two_sided:
        raise Unfinished


def product(A: Any) -> None:
    finite((A @ torch.ones(A.dim, dtype=A.dtype)).norm())


def conditioned(risk: Any) -> None:
    found = bnp.condition(risk, null=None)
    finite(*(row["value"] for row in found.records()))


def trained(situation: Situation, device: str) -> None:
    """One step of BNP in a loop, on the model as it is."""
    data, model = situation.data(torch.Generator().manual_seed(0)), made(situation).to(device)
    x, y = (t.to(device) for t in (data[0] if isinstance(data, list) else data))
    pre = bnp.BNP(model)
    x = x.to(next(model.parameters()).dtype) if x.is_floating_point() else x
    situation.loss(model(x), y).backward()
    pre.step()
    finite(*(p.grad.float().norm() for p in model.parameters() if p.grad is not None))


VERBS: dict[str, Callable[[Any], None]] = {
    "Hessian product": lambda risk: product(bnp.hessian(risk)),
    "Gauss-Newton product": lambda risk: product(bnp.gauss_newton(risk)),
    "Fisher product": lambda risk: product(bnp.fisher(risk, kind="empirical")),
    "`eigenpairs`": lambda risk: finite(bnp.eigenpairs(bnp.hessian(risk), k=1, seed=0).values[0]),
    "`spectral_density`": lambda risk: finite(
        bnp.spectral_density(bnp.hessian(risk), probes=2, seed=0).mass(-9, 9).value
    ),
    "`trace`": lambda risk: finite(bnp.trace(bnp.gauss_newton(risk), seed=0).value),
    "`null_directions`": lambda risk: finite(bnp.null_directions(risk).basis.shape[1]),
    "`condition_number`, Hessian": lambda risk: two_sided(
        bnp.condition_number(bnp.hessian(risk), null=bnp.null_directions(risk, curvature="hessian"), seed=0)
    ),
    "`condition_number`, Gauss-Newton": lambda risk: two_sided(
        bnp.condition_number(bnp.gauss_newton(risk), null=bnp.null_directions(risk), seed=0)
    ),
    "`condition`": conditioned,
    "`layer_table`": lambda risk: finite(len(bnp.layer_table(risk).layers)),
    "`bnp_preconditioner`": lambda risk: finite(bnp.bnp_preconditioner(risk).direction(risk.gradient).norm()),
    "`kfac_preconditioner`": lambda risk: finite(bnp.kfac_preconditioner(risk).direction(risk.gradient).norm()),
}


def made(situation: Situation) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = situation.model()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = situation.data(torch.Generator().manual_seed(0))
            x = data[0][0] if isinstance(data, list) else data[0]
            if any(isinstance(m, nn.modules.lazy.LazyModuleMixin) for m in model.modules()):
                model(x)
    return model


def row(situation: Situation, device: str = "cpu") -> dict[str, str]:
    """verb -> "yes", "bound", or the exception that refuses."""
    found: dict[str, str] = {}
    risk, refusal = None, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            data = situation.data(torch.Generator().manual_seed(0))
            risk = bnp.EmpiricalRisk(made(situation), situation.loss, data, device=device, **situation.options)
        except BNPAnalysisError as error:
            refusal = type(error).__name__
        for name, verb in VERBS.items():
            found[name] = refusal or tried(partial(verb, risk))
        found["`BNP.step`"] = tried(partial(trained, situation, device))
    return found


def tried(call: Callable[[], None]) -> str:
    try:
        call()
    except Unfinished:
        return "bound"
    except BNPAnalysisError as error:
        return type(error).__name__
    return "yes"


def table(device: str = "cpu") -> str:
    rows = {name: row(situation, device) for name, situation in SITUATIONS.items()}
    verbs = [*VERBS, "`BNP.step`"]
    lines = ["| | " + " | ".join(verbs) + " |", "|---" * (len(verbs) + 1) + "|"]
    for name, cells in rows.items():
        lines.append(f"| {name} | " + " | ".join(cells[verb] for verb in verbs) + " |")
    return "\n".join(lines) + "\n"


def committed() -> Iterator[tuple[str, dict[str, str]]]:
    lines = PAGE.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip().splitlines()
    verbs = [cell.strip() for cell in lines[0].strip("|").split("|")][1:]
    for line in lines[2:]:
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        yield name, dict(zip(verbs, cells, strict=True))


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in SITUATIONS])
def test_the_page_says_what_works(name: str) -> None:
    assert row(SITUATIONS[name]) == dict(committed())[name]


def test_the_page_has_every_situation() -> None:
    assert [name for name, _ in committed()] == [*SITUATIONS]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    if device == "cpu":
        head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
        PAGE.write_text(head + BEGIN + table() + END + rest.split(END)[1], encoding="utf-8")
    else:
        print(table(device))
